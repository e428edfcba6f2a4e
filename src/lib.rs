//! A heap for kernels: scales with CPUs, and may be called from every context.
//!
//! [`Heap`] takes the idea of Zig's `std.heap.SmpAllocator` (a small set of independently locked states, free lists by
//! size class, try-lock and *move on* where a state is busy, no lock that everybody needs) and rebuilds it for a
//! kernel: a cache per CPU instead of per thread, any source of pages instead of `mmap`, and safe in tasks, interrupts,
//! exceptions, NMIs, and on the first line of boot. Stable Rust, `no_std`, no dependency but those of the features
//! below.
//!
//! # Quick start
//! A heap is made of three things: where pages come from ([`PageProvider`]; [`RegionProvider`] is one), how the running
//! CPU is known ([`Hint`] or [`Pinned`]), and how many CPUs get a cache.
//!
//! ```
//! # #[cfg(feature = "region")] {
//! use core::alloc::Layout;
//! use smp_heap::{CpuHint, Heap, Hint, RegionProvider};
//!
//! /// Your kernel's way to tell CPUs apart. Every answer is sound; a good one is fast.
//! struct ThisCpu;
//!
//! impl CpuHint for ThisCpu {
//!     fn current_cpu(&self) -> Option<usize> {
//!         None // not known yet
//!     }
//! }
//!
//! // In a kernel: #[global_allocator]
//! static HEAP: Heap<RegionProvider<4>, Hint<ThisCpu>, 16> = Heap::new(RegionProvider::new(), Hint(ThisCpu));
//!
//! let layout = Layout::new::<[u64; 4]>();
//! assert!(HEAP.alloc(layout).is_err(), "there is no memory yet: an error, no panic");
//!
//! # let memory = Box::leak(vec![0_u8; 64 << 10].into_boxed_slice());
//! # let (start, len) = (memory.as_mut_ptr(), memory.len());
//! // Sound, since nothing else uses these bytes from now on.
//! unsafe { HEAP.provider().add_region(start, len) }?;
//! let block = HEAP.alloc(layout).map_err(|_| "no memory")?;
//! assert!(block.len() >= layout.size());
//! // Sound, since the block came from this heap with this Layout, and is used no more.
//! unsafe { HEAP.free(block.cast(), layout) };
//! # }
//! # Ok::<(), Box<dyn core::error::Error>>(())
//! ```
//!
//! # Rooms
//! Each folder imports only from rows below its own, and inside a row each file only from files that stand further
//! right; `tests/host/layers.rs` reads this list and holds it against the sources.
//!
//! ```text
//! models     what the model checker runs, under `cfg(loom)` only
//! battery    checks that a kernel runs over its own heap, and a provider that fails on demand
//! observe    dump, stats, verify                                  numbers, the same as lines for tools, all invariants
//! api        c, allocator, guarded, leaks, debug_header, reserve, mod
//!                                                                 alloc to free, GlobalAlloc, Allocator, malloc
//! service    maintain, overhead                                   work for idle times, CPUs that go, a bound
//! heap       shrink, large, oom, slow, reclaim, growth, mod, request, punch, coalesce, inspect, depot, source,
//!            orphans, huge_cache, gate, searches, panic_reserve   fast paths, slow paths, out of memory, the provider
//! cache      table, mod, owned_pages                              one CPU's bounded lists; what each CPU has
//! slab       list, parts, free_blocks, word, missed, ring, block  a run cut into blocks: its word, its lists
//! pages      page runs: descriptors, bins, pools, the map from an address
//! harden     how a free block's link is written; what misuse is, and who is told
//! provider   the page providers that come with the crate
//! cpu        the CPU identities that come with the crate
//! base       tuning, trace, size_class, link, sync                atomics, links, Layout to class, events, numbers
//! contract   mode, cpu, interrupts, provider, unwind              what a kernel implements
//! ```
//!
//! # Where it comes from
//!
//! | `SmpAllocator` | here |
//! |---|---|
//! | 128 thread states; the slot is the thread's index, capped by the CPU count | one cache per CPU, their number a const parameter; with [`Hint`] the index is only a guess, with [`Pinned`] a promise |
//! | try-lock, else the next slot, until one is free | hint: try-lock, else one lap over the other caches from where the last one succeeded; pinned: a plain flag, and no other cache. Then single blocks straight from the slabs |
//! | a free list per class and state, unbounded | two lists per class and cache, bounded by a limit that follows the bytes held, down to 0 |
//! | `next_addrs[class]`: fresh memory of a state | fresh blocks are carved from a slab, counted in its word, under its bin's lock |
//! | one search of another slot before mapping | own bin, then a new slab, other bins only when there are no pages |
//! | slabs of 64 KiB; classes are powers of two, 8 B to 32 KiB | slabs of 256 B to 16 KiB, on big heaps to 64 KiB, longer for long blocks; 60 classes, four to a doubling above 64 B, eight from 512 B to 8 KiB, up to 32 KiB |
//! | leftovers of a thread are found by others by chance | surplus goes back to its slab in batches; caches can be drained |
//! | memory is never given back | empty slabs go to the page heap, empty chunks to the provider |
//! | `PageAllocator`: map, unmap, realloc | [`PageProvider`]: `map`, `unmap`, `resize`, `remap`, called with nothing of the heap locked |
//! | `alloc`, `resize`, `remap`, `free` of the `Allocator` vtable | the same four as methods, [`GlobalAlloc`](core::alloc::GlobalAlloc), and with features the `Allocator`s of `core` and of `allocator-api2` |
//! | null or false | [`AllocError`], `None`, false; never a panic |
//!
//! # Words
//! Each has one meaning, in names as in comments: `docs/words.md`.
//!
//! # Contexts
//! [`alloc`](Heap::alloc), [`resize`](Heap::resize), [`remap`](Heap::remap), [`realloc`](Heap::realloc) and
//! [`free`](Heap::free) may be called from every context, with interrupts open or masked; so may
//! [`drain_current`](Heap::drain_current), [`drain`](Heap::drain) and [`stats`](Heap::stats). [`trim`](Heap::trim)
//! calls the provider and takes time in proportion to the heap; [`verify`](Heap::verify) is for a heap at rest. Every
//! wait of the heap has a bound: for a lock of its own 2,000 looks, for the provider's gate 2^24. A
//! nested allocation under a pin takes what lies at hand and asks the provider only if that is
//! [`REENTRANT`](PageProvider::REENTRANT).
//!
//! # Features
//! - `region` (default): [`RegionProvider`], over `linked_list_allocator` and `spin`.
//! - `x86_64`: `cpu::x86_64::InterruptsMasked`, over the `x86_64` crate.
//! - `paging`: on x86-64 `provider::PagingProvider`, over the `x86_64` crate's page tables and frames, and `spin`.
//! - `trace`: `Heap::trace_to`: every allocation and free, flush and refill, run mapped and unmapped, into rings of the
//!   kernel's.
//! - `hardened`: links of free blocks under a key; double frees, foreign and interior pointers, wrong Layouts and
//!   writes to free blocks are reported and ignored (`docs/hardening.md`).
//! - `debug-heap`: also red zones, poison, a quarantine, and the site and age of each block; reports of leaks by site.
//! - `guard-pages`: also one allocation in N on pages of its own beside unmapped ones.
//! - `allocator-api2-02`, `allocator-api2-04`: `Allocator` of that version of the crate `allocator-api2` for `&Heap`;
//!   hashbrown uses 0.2.
//! - `nightly`: `core::alloc::Allocator` for `&Heap`. On other compilers it does nothing, with a warning.
//! - `c-heap`: `malloc`, `free` and their like: see `export_c_heap!`.
//!
//! Why things are as they are, and at what price, stands in `docs/design.md` and at the head of each file.
#![no_std]
#![cfg_attr(not(any(test, loom)), deny(unsafe_code))]
#![cfg_attr(has_allocator, feature(allocator_api))]

#[cfg(not(target_has_atomic = "ptr"))]
compile_error!(
    "smp-heap needs atomic compare-and-exchange, which this target does not have: use a heap behind a critical section"
);
#[cfg(all(feature = "debug-heap", any(split_words, not(target_has_atomic = "64"))))]
compile_error!(
    "smp-heap's feature `debug-heap` needs atomics of 64 bits, which this target does not have: use `hardened`"
);

#[cfg(any(test, loom, simulated))]
extern crate std;

mod api;
mod base;
pub mod battery;
mod cache;
mod contract;
pub mod cpu;
mod harden;
mod heap;
#[cfg(loom)]
#[doc(hidden)]
pub mod models;
mod observe;
mod pages;
pub mod provider;
mod service;
mod slab;

pub use api::{AllocError, Reserve};
#[cfg(feature = "debug-heap")]
pub use api::{LeakSite, Leaks};
pub use base::size_class::{CLASS_COUNT, MAX_SMALL_LEN, SizeClass};
#[cfg(simulated)]
#[doc(hidden)]
pub use base::sync::simulated;
#[cfg(feature = "trace")]
pub use base::trace::{Trace, TraceRing, TraceSlot};
pub use cpu::{CpuHint, CpuPin, Hint, Pinned};
#[cfg(feature = "debug-heap")]
pub use harden::debug::{BlockInfo, Site};
#[cfg(feature = "guard-pages")]
pub use harden::guard::{Fault, FaultKind, NoGuards};
#[cfg(feature = "hardened")]
pub use harden::{Misuse, Report};
pub use heap::Heap;
pub use observe::{ClassStats, CpuClassStats, CpuStats, Dump, RunInfo, RunKind, Skipped, Stats, Totals, Violation};
pub use provider::{PageProvider, PageRun};
#[cfg(feature = "region")]
pub use provider::{RegionError, RegionProvider};
pub use service::{worst_case_overhead, worst_case_overhead_after};

#[cfg(all(test, target_os = "linux", not(miri), not(loom), not(simulated)))]
#[path = "../tests/watchdog/mod.rs"]
mod watchdog;

#[cfg(test)]
#[path = "../tests/host_pages/mod.rs"]
mod host_pages;

/// The examples of the documents, compiled.
#[cfg(all(doctest, feature = "region", target_arch = "x86_64"))]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/hardening.md")]
    struct Hardening;
    #[doc = include_str!("../docs/identity.md")]
    struct Identity;
    #[doc = include_str!("../docs/provider.md")]
    struct Provider;
}

/// The recipes, compiled; what needs a feature with that feature.
#[cfg(all(doctest, feature = "region", target_arch = "x86_64"))]
mod recipes {
    #[doc = include_str!("../docs/recipes/dma.md")]
    struct Dma;
    #[cfg(feature = "guard-pages")]
    #[doc = include_str!("../docs/recipes/guard-pages.md")]
    struct GuardPages;
    #[doc = include_str!("../docs/recipes/like-arceos.md")]
    struct LikeArceos;
    #[doc = include_str!("../docs/recipes/like-blog-os.md")]
    struct LikeBlogOs;
    #[cfg(feature = "x86_64")]
    #[doc = include_str!("../docs/recipes/like-hermit.md")]
    struct LikeHermit;
    #[doc = include_str!("../docs/recipes/one-cpu.md")]
    struct OneCpu;
    #[doc = include_str!("../docs/recipes/out-of-memory.md")]
    struct OutOfMemory;
    #[doc = include_str!("../docs/recipes/per-cpu-areas.md")]
    struct PerCpuAreas;
    #[doc = include_str!("../docs/recipes/picture.md")]
    struct Picture;
    #[doc = include_str!("../docs/recipes/preemptive-scheduler.md")]
    struct PreemptiveScheduler;
    #[doc = include_str!("../docs/recipes/replace-buddy-system-allocator.md")]
    struct ReplaceBuddySystemAllocator;
    #[doc = include_str!("../docs/recipes/replace-linked-list-allocator.md")]
    struct ReplaceLinkedListAllocator;
    #[doc = include_str!("../docs/recipes/replace-talc.md")]
    struct ReplaceTalc;
    #[cfg(feature = "trace")]
    #[doc = include_str!("../docs/recipes/trace.md")]
    struct Trace;
    #[doc = include_str!("../docs/recipes/user-space.md")]
    struct UserSpace;
}

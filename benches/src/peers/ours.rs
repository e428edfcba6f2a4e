//! This crate: pinned and hint mode, over one region and over the operating system's pages.
//!
//! Threads play CPUs: each has a number of its own, in a thread-local variable as a kernel's is in its per-CPU area. No
//! thread enters the heap twice at once, so that a pin needs no instruction.

use std::cell::Cell;

use smp_heap::cpu::{ByAddr, CacheAddr, CpuArea};
use smp_heap::{CpuHint, CpuPin, Heap, Hint, Pinned, RegionProvider};

use super::provider::SystemPages;
use super::{Kind, MAX_THREADS, Peer, calls_of};
use crate::memory::{REGION_LEN, region};

thread_local! {
    static CPU: Cell<usize> = const { Cell::new(usize::MAX) };
    static ADDR: Cell<&'static CacheAddr> = const { Cell::new(&NO_THREADS) };
}

/// Of who is no CPU.
static NO_THREADS: CacheAddr = CacheAddr::new();
static ADDRS: [CacheAddr; MAX_THREADS] = [const { CacheAddr::new() }; MAX_THREADS];

#[derive(Clone, Copy, Debug)]
struct ThreadCpu;

impl CpuHint for ThreadCpu {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        Some(CPU.get())
    }
}

// SAFETY: `enter` gives each thread of a process a number of its own, once, before it calls a heap; nothing interrupts
// a thread inside the heap and calls it again.
unsafe impl CpuPin for ThreadCpu {
    type Guard = ();

    #[inline]
    fn pin(&self) {}

    #[inline]
    fn index(&self, (): &()) -> usize {
        CPU.get()
    }
}

struct ThreadArea;

// SAFETY: `enter` gives each thread of a process a number and a place of its own, once.
unsafe impl CpuArea for ThreadArea {
    #[inline]
    fn cache_addr() -> &'static CacheAddr {
        ADDR.get()
    }

    #[inline]
    fn index() -> usize {
        CPU.get()
    }
}

fn enter(thread: usize) {
    CPU.set(thread);
    ADDR.set(ADDRS.get(thread).unwrap_or(&NO_THREADS));
}

type Region = RegionProvider<4>;

static PINNED: Heap<Region, Pinned<ThreadCpu>, MAX_THREADS> = Heap::new(Region::new(), Pinned(ThreadCpu));
static BY_ADDR: Heap<Region, Pinned<ByAddr<ThreadCpu, ThreadArea>>, MAX_THREADS> =
    // SAFETY: a static, and the only heap that uses those places.
    Heap::new(Region::new(), Pinned(unsafe { ByAddr::new(ThreadCpu) }));
static HINTED: Heap<Region, Hint<ThreadCpu>, MAX_THREADS> = Heap::new(Region::new(), Hint(ThreadCpu));
static PINNED_PAGES: Heap<SystemPages, Pinned<ThreadCpu>, MAX_THREADS> =
    Heap::new(SystemPages::new(), Pinned(ThreadCpu));
static HINTED_PAGES: Heap<SystemPages, Hint<ThreadCpu>, MAX_THREADS> = Heap::new(SystemPages::new(), Hint(ThreadCpu));

fn add_region(provider: &Region) {
    let start = region(REGION_LEN).as_ptr();
    // SAFETY: the region was just mapped for this heap alone.
    unsafe { provider.add_region(start, REGION_LEN) }.expect("a region that makes sense");
}

pub(super) const PEERS: [Peer; 5] = [
    Peer {
        name: "pin",
        about: "smp-heap, pinned, one region",
        kind: Kind::Ours,
        calls: calls_of!(PINNED),
        open: || add_region(PINNED.provider()),
        enter,
        provider_cost: None,
        describe: Some(|| PINNED.stats().to_string()),
        program: None,
    },
    Peer {
        name: "pin-addr",
        about: "smp-heap, pinned, each CPU keeps its cache's address, one region",
        kind: Kind::Ours,
        calls: calls_of!(BY_ADDR),
        open: || add_region(BY_ADDR.provider()),
        enter,
        provider_cost: None,
        describe: Some(|| BY_ADDR.stats().to_string()),
        program: None,
    },
    Peer {
        name: "hint",
        about: "smp-heap, hint, one region",
        kind: Kind::Ours,
        calls: calls_of!(HINTED),
        open: || add_region(HINTED.provider()),
        enter,
        provider_cost: None,
        describe: Some(|| HINTED.stats().to_string()),
        program: None,
    },
    Peer {
        name: "pin-mmap",
        about: "smp-heap, pinned, pages from the operating system",
        kind: Kind::Ours,
        calls: calls_of!(PINNED_PAGES),
        open: super::nothing,
        enter,
        provider_cost: Some(|| PINNED_PAGES.provider().cost()),
        describe: Some(|| PINNED_PAGES.stats().to_string()),
        program: None,
    },
    Peer {
        name: "hint-mmap",
        about: "smp-heap, hint, pages from the operating system",
        kind: Kind::Ours,
        calls: calls_of!(HINTED_PAGES),
        open: super::nothing,
        enter,
        provider_cost: Some(|| HINTED_PAGES.provider().cost()),
        describe: Some(|| HINTED_PAGES.stats().to_string()),
        program: None,
    },
];

//! A provider that uses the heap it serves: allocates and frees while it maps and unmaps, under a lock of its own that
//! must not be entered twice; and (`shootdown`) one that interrupts all other CPUs and waits for each of them, as page
//! tables make it necessary.
//!
//! Timer interrupts allocate meanwhile. Would catch breaking: the provider is called with nothing of the heap held (or
//! its allocations would find a cache or a lock taken for ever), in the caller's own interrupt state, one context at a
//! time, and by no handler that interrupted it; no CPU waits for the heap with interrupts masked (or its
//! acknowledgement would never come).
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits")]

mod common;

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering, Ordering::Relaxed};

use common::block::Block;
use common::heaps::{CPUS, OverRegions, Regions, expect_left, give, heap};
use common::modes::{Index, InterruptsMasked, heaps};
use common::slots::Slots;
use smp_heap::cpu::NeverPreempts;
use smp_heap::{Hint, PageProvider, PageRun, Pinned};
use smp_heap_kernel::arch::{cpu_count, vector};
use smp_heap_kernel::{Boot, Region, cpu, interrupts, ipi, kernel, smp, test, time, timer};

const FLUSH: u8 = vector::FREE;

/// Interrupts that each CPU has in a round, at least.
const TICKS: u64 = 6;

/// Calls of the provider, for which rounds are added.
const CALLS_DUE: usize = 60;

/// The provider's lock.
static BUSY: AtomicBool = AtomicBool::new(false);
/// It uses the heap; not while the heap is emptied in the end.
static USES_HEAP: AtomicBool = AtomicBool::new(false);
static SHOOTS: AtomicBool = AtomicBool::new(false);
/// What it keeps beyond a call, as page tables and lists of ranges are.
static KEPT: Slots<16> = Slots::new();
static CALLS: AtomicUsize = AtomicUsize::new(0);
static SERVED: AtomicUsize = AtomicUsize::new(0);
/// Shootdowns begun, and the last one that each CPU has seen.
static FLUSHES: AtomicUsize = AtomicUsize::new(0);
static SEEN: [AtomicUsize; CPUS] = [const { AtomicUsize::new(0) }; CPUS];
/// The CPU runs a handler, whose interrupts are masked.
static IN_HANDLER: [AtomicBool; CPUS] = [const { AtomicBool::new(false) }; CPUS];

#[derive(Debug)]
struct Calling(Regions);

impl Calling {
    fn locked<T>(call: impl FnOnce() -> T) -> T {
        if BUSY.swap(true, Ordering::Acquire) {
            test::fail(format_args!("the provider was entered while somebody was inside"));
        }
        let in_handler = IN_HANDLER.get(cpu::index()).is_some_and(|flag| flag.load(Relaxed));
        assert_ne!(interrupts::are_enabled(), in_handler, "the provider is called in the caller's own interrupt state");
        let turn = CALLS.fetch_add(1, Relaxed);
        use_heap(turn);
        if SHOOTS.load(Relaxed) {
            shoot_down();
        }
        let result = call();
        use_heap(turn + 1);
        BUSY.store(false, Ordering::Release);
        result
    }
}

/// Allocates, keeps some of it, frees what was kept before.
fn use_heap(turn: usize) {
    if !USES_HEAP.load(Relaxed) {
        return;
    }
    for (place, size) in [40, 200, 3000].into_iter().enumerate() {
        let block = Block::new(heap(), size, 8, turn as u8);
        if block.is_some() {
            SERVED.fetch_add(1, Relaxed);
        }
        if let Some(old) = KEPT.swap(3 * turn + place, block) {
            old.free(heap());
        }
    }
}

/// Interrupts all other CPUs and waits until each has seen it.
fn shoot_down() {
    let flush = FLUSHES.fetch_add(1, Ordering::AcqRel) + 1;
    ipi::send_all_but_self(FLUSH);
    let me = cpu::index();
    let others = || (0..cpu_count()).filter(|cpu| *cpu != me).filter_map(|cpu| SEEN.get(cpu));
    time::wait_for("all CPUs to see a shootdown", time::SOON, || {
        others().all(|seen| seen.load(Ordering::Acquire) >= flush)
    });
}

// It prefers no length, so that it is called often.
// SAFETY: runs come from the regions and go back there.
unsafe impl PageProvider for Calling {
    const PAGE_LEN: usize = Regions::PAGE_LEN;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        Self::locked(|| self.0.map(run))
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: the contract is the same.
        Self::locked(|| unsafe { self.0.unmap(start, run) })
    }
}

impl OverRegions for Calling {
    fn regions(&self) -> &Regions {
        &self.0
    }
}

heaps! {
    over Calling = Calling(Regions::new());
    Hint<Index>,
    Pinned<NeverPreempts<Index>>,
    Pinned<InterruptsMasked<Index>>,
}

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        give(Region { len: 64 << 20, ..boot.largest_region() });
        USES_HEAP.store(true, Relaxed);
        SHOOTS.store(boot.flag("shootdown"), Relaxed);
        interrupts::set_handler(FLUSH, |_| {
            let seen = FLUSHES.load(Ordering::Acquire);
            SEEN.get(cpu::index()).into_iter().for_each(|cpu| cpu.store(seen, Ordering::Release));
        });
        timer::set_handler(|_| {
            let flag = IN_HANDLER.get(cpu::index());
            flag.into_iter().for_each(|flag| flag.store(true, Relaxed));
            common::storm::strike();
            flag.into_iter().for_each(|flag| flag.store(false, Relaxed));
        });
        let rounds = boot.rounds(10_usize.div_ceil(cpu_count()));
        let is_due = |round: &usize| {
            *round < rounds || *round < 10 * rounds && CALLS.load(Relaxed) < CALLS_DUE
        };
        for _ in (0..).take_while(is_due) {
            common::storm::begin();
            smp::on_all(|cpu| {
                let enough = timer::ticks(cpu) + TICKS;
                timer::start(500);
                smp::barrier();
                for turn in 0..10 {
                    common::storm::work(50);
                    large_and_back(cpu, turn);
                }
                while timer::ticks(cpu) < enough {
                    common::storm::work(50);
                }
                timer::stop();
                smp::barrier();
                common::storm::end();
            });
            common::heaps::verify();
        }
        let (calls, served) = (CALLS.load(Relaxed), SERVED.load(Relaxed));
        test::did(calls, "provider_calls");
        test::did(served, "blocks");
        test::did(FLUSHES.load(Relaxed), "shootdowns");
        assert_eq!(FLUSHES.load(Relaxed) > 0, SHOOTS.load(Relaxed), "shootdowns");
        assert!(calls > 8, "the provider was hardly called");
        assert!(served > calls, "the provider could not use the heap");
        USES_HEAP.store(false, Relaxed);
        KEPT.free_part(heap(), 0, 1);
        common::storm::judge(0, 100);
        expect_left(0);
    }
}

/// Long blocks, which the provider is asked for, and which go back to it.
fn large_and_back(cpu: usize, turn: usize) {
    let mut blocks = [const { None }; 12];
    // As much altogether on eight CPUs as on four.
    for place in blocks.iter_mut().take(48 / cpu_count()) {
        *place = Block::new(heap(), (300 + 100 * (cpu % 4)) << 10, 4096, turn as u8);
    }
    blocks.into_iter().flatten().for_each(|block| block.free(heap()));
    if turn % 4 == cpu % 4 {
        heap().trim();
    }
}

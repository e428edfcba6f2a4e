//! A CPU inside the provider waits for an acknowledgement of every other one, as a TLB shootdown does, and those ask
//! the heap for memory with interrupts masked, so that they cannot acknowledge before they are answered.
//!
//! Would catch: a heap that waits for the provider with interrupts masked, which is a deadlock until some bound ends
//! it. No source here says whether it may wait: each answers by the crate's own look at the CPU.
#![no_std]
#![no_main]

mod common;

use core::alloc::Layout;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::block::Block;
use common::heaps::{OverRegions, Regions, expect_left, give, heap};
use common::modes::{InterruptsMasked, Mode, Pins, heaps};
use common::slots::Slots;
use smp_heap::cpu::{NeverPreempts, PreemptionPin};
use smp_heap::{CpuHint, Hint, PageProvider, PageRun, Pinned};
use smp_heap_kernel::arch::cpu_count;
use smp_heap_kernel::step::{self, Next};
use smp_heap_kernel::{Boot, Region, cpu, interrupts, kernel, println, smp, test, time};

/// The most instructions of a request: a search of everything that the heap has, and no wait.
const BUDGET: usize = 400_000;

/// The CPU's number, and nothing else.
#[derive(Clone, Copy, Debug)]
struct Plain;

impl CpuHint for Plain {
    fn current_cpu(&self) -> Option<usize> {
        Some(cpu::index())
    }
}

impl Mode for Hint<Plain> {
    const NAME: &'static str = "hint";
    const NEW: Self = Hint(Plain);
}

impl Mode for Pinned<NeverPreempts<Plain>> {
    const NAME: &'static str = "pinned";
    // SAFETY: this kernel has no threads; areas have their own indices.
    const NEW: Self = Pinned(unsafe { NeverPreempts::new(Plain) });
}

impl Mode for Pinned<PreemptionPin<Pins, Plain>> {
    const NAME: &'static str = "counted";
    // SAFETY: areas have their own indices.
    const NEW: Self = Pinned(unsafe { PreemptionPin::new(Plain) });
}

impl Mode for Pinned<InterruptsMasked<Plain>> {
    const NAME: &'static str = "masked";
    // SAFETY: NMI and exception handlers return to what they interrupted; areas have their own indices.
    const NEW: Self = Pinned(unsafe { InterruptsMasked::new(Plain) });
}

/// Microseconds until the last CPU has asked, step by step.
const LIMIT: u64 = 8 * time::SOON;

/// What is asked for: from a cache, from a slab, from the pages, and what nobody has.
const SIZES: [usize; 4] = [24, 5000, 100_000, 6 << 20];

/// Long blocks, whose chunks go back.
const COUNT: usize = 6;
static BLOCKS: Slots<COUNT> = Slots::new();

/// A CPU is inside `unmap`, and waits.
static WAITS: AtomicBool = AtomicBool::new(false);
/// CPUs that acknowledged.
static SEEN: AtomicUsize = AtomicUsize::new(0);
/// `unmap` waits; not while the heap is emptied in the end.
static SHOOTS: AtomicBool = AtomicBool::new(false);

/// One context at a time; what it takes back, every other CPU has to hear of.
struct Shooting(Regions);

// SAFETY: runs come from the regions and go back there.
unsafe impl PageProvider for Shooting {
    const PAGE_LEN: usize = Regions::PAGE_LEN;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.0.map(run)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        if SHOOTS.swap(false, Ordering::Relaxed) {
            WAITS.store(true, Ordering::Release);
            time::wait_for("all CPUs to acknowledge", LIMIT, || SEEN.load(Ordering::Acquire) == cpu_count() - 1);
        }
        // SAFETY: the contract is the same.
        unsafe { self.0.unmap(start, run) }
    }

    fn prefer(&self, run: PageRun) -> PageRun {
        self.0.prefer(run)
    }
}

impl OverRegions for Shooting {
    fn regions(&self) -> &Regions {
        &self.0
    }
}

heaps! {
    over Shooting = Shooting(Regions::new());
    Hint<Plain>,
    Pinned<NeverPreempts<Plain>>,
    Pinned<PreemptionPin<Pins, Plain>>,
    Pinned<InterruptsMasked<Plain>>,
}

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        give(Region { len: 32 << 20, ..boot.largest_region() });
        let longest = AtomicUsize::new(0);
        // A step by breakpoints takes longer than one by a flag of the processor's.
        for _ in 0..boot.rounds(if cfg!(target_arch = "x86_64") { 3 } else { 1 }) {
            for place in 0..COUNT {
                let block = Block::new(heap(), 3 << 20, 4096, 1);
                assert!(block.is_some(), "no memory");
                BLOCKS.swap(place, block);
            }
            WAITS.store(false, Ordering::Relaxed);
            SEEN.store(0, Ordering::Relaxed);
            SHOOTS.store(true, Ordering::Relaxed);
            smp::on_all(|cpu| {
                if cpu == 0 {
                    BLOCKS.free_part(heap(), 0, 1);
                    heap().trim();
                    return;
                }
                time::wait_for("the shootdown", time::SOON, || WAITS.load(Ordering::Acquire));
                let counts = interrupts::without(|| step::alone(|| SIZES.map(ask)));
                let count = counts.into_iter().max().unwrap_or(0);
                longest.fetch_max(count, Ordering::Relaxed);
                SEEN.fetch_add(1, Ordering::Release);
            });
            test::did(SIZES.len() * (cpu_count() - 1), "answers");
        }
        let longest = longest.into_inner();
        println!("{longest} instructions of the longest request");
        assert!((1..=BUDGET).contains(&longest), "a request took {longest} instructions");
        expect_left(0);
    }
}

/// Asks for memory, and frees what there was; gives the number of the request's instructions.
fn ask(size: usize) -> usize {
    let Ok(layout) = Layout::from_size_align(size, 8) else { test::fail(format_args!("{size} bytes")) };
    let (mut count, mut start) = (0, null_mut());
    step::through(
        // SAFETY: no size is 0.
        || start = unsafe { heap().alloc(layout) },
        |_, _| {
            count += 1;
            Next::Step
        },
    );
    if !start.is_null() {
        // SAFETY: just allocated, with this Layout.
        unsafe { heap().dealloc(start, layout) };
    }
    count
}

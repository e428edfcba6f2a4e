//! How long a hit takes by the emulator's clock, with a hint and under each pin.
//!
//! The modes take turns in short stretches. Each turn gives what the pins take of the hint's time, and the middle one
//! of all turns counts: a host whose cores share their units with others is slower for a while, for all modes of a
//! turn.
//! Would catch: a document that says the wrong thing of the pin that masks, whose instructions are few and whose
//! time in an emulator is long.
#![no_std]
#![no_main]

mod common;

use core::alloc::Layout;
use core::hint::black_box;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use common::heaps::{AnyHeap, CPUS, HeapRef, Regions};
use common::modes::{Index, InterruptsMasked, Mode};
use smp_heap::cpu::{CpuMode, NeverPreempts};
use smp_heap::{Heap, Hint, Pinned};
use smp_heap_kernel::{Boot, Region, interrupts, kernel, println, smp, test, time};

type Measured<M> = Heap<Regions, M, CPUS>;

static HINT: Measured<Hint<Index>> = new();
static PINNED: Measured<Pinned<NeverPreempts<Index>>> = new();
static MASKED: Measured<Pinned<InterruptsMasked<Index>>> = new();

const fn new<M: Mode + CpuMode>() -> Measured<M> {
    Heap::new(Regions::new(), M::NEW)
}

/// Stretches of each mode, and the pairs of `alloc` and `free` in one.
const STRETCHES: usize = 300;
const PAIRS: usize = 1_000;

/// What the pin that masks takes, in hundredths of the hint's time: 160 to 345 was seen, on a busy host as on an idle
/// one.
const LEAST: u64 = 130;
const MOST: u64 = 500;

/// The shortest stretch of each mode on any CPU.
static SHORTEST: [AtomicU64; 3] = [const { AtomicU64::new(u64::MAX) }; 3];

/// What each pin takes in each turn of each CPU, in hundredths of the hint's time.
static PINNED_SHARES: Shares = [const { [const { AtomicU64::new(0) }; STRETCHES] }; CPUS];
static MASKED_SHARES: Shares = [const { [const { AtomicU64::new(0) }; STRETCHES] }; CPUS];

type Shares = [[AtomicU64; STRETCHES]; CPUS];

kernel! {
    fn main(boot: &Boot) {
        let heaps: [HeapRef; 3] = [&HINT, &PINNED, &MASKED];
        let all = boot.largest_region();
        let len = all.len / heaps.len();
        for (heap, at) in heaps.into_iter().zip(0..) {
            let region = Region { start: all.start + at * len, len };
            // SAFETY: RAM that the boot code left to this kernel; each third of it goes to one heap.
            let added = unsafe { heap.regions().add_region(region.as_ptr(), region.len) };
            assert!(added.is_ok(), "{region:?}: {added:?}");
        }
        smp::on_all(|cpu| {
            assert!(interrupts::are_enabled(), "masking would do nothing");
            let own = |shares: &'static Shares| shares.get(cpu).into_iter().flatten();
            let (pinned, masked) = (own(&PINNED_SHARES), own(&MASKED_SHARES));
            for (pinned_share, masked_share) in pinned.zip(masked) {
                let [hint, pinned, masked] = heaps.map(stretch);
                pinned_share.store(100 * pinned / hint, Relaxed);
                masked_share.store(100 * masked / hint, Relaxed);
                for (shortest, taken) in SHORTEST.iter().zip([hint, pinned, masked]) {
                    shortest.fetch_min(taken, Relaxed);
                }
            }
            test::did(STRETCHES, "stretches");
        });
        let shortest = SHORTEST.each_ref().map(|shortest| shortest.load(Relaxed));
        let scale = PAIRS as u64 * time::cycles_per_micro();
        let [hint, pinned, masked] = shortest.map(|cycles| 1_000_000 * cycles / scale);
        println!("picoseconds of a pair: hint {hint}, never preempts {pinned}, interrupts masked {masked}");
        let [pinned, masked] = [&PINNED_SHARES, &MASKED_SHARES].map(middle);
        println!("in hundredths of the hint's time: never preempts {pinned}, interrupts masked {masked}");
        assert!((LEAST..=MOST).contains(&masked), "the documents say {LEAST} to {MOST}");
        for heap in heaps {
            let verified = heap.verify_all();
            assert!(verified.is_ok(), "{verified:?}");
        }
    }
}

/// The middle one of all that were taken.
fn middle(shares: &Shares) -> u64 {
    let mut taken = [0; CPUS * STRETCHES];
    let all = shares.as_flattened().iter().map(|share| share.load(Relaxed)).filter(|share| *share > 0);
    let count = taken.iter_mut().zip(all).map(|(place, share)| *place = share).count();
    let (taken, _) = taken.split_at_mut(count);
    taken.sort_unstable();
    taken.get(count / 2).copied().unwrap_or(0)
}

/// The cycles of some pairs, each a hit.
fn stretch(heap: &dyn AnyHeap) -> u64 {
    let layout = black_box(Layout::new::<[u64; 8]>());
    let before = time::cycles();
    for _ in 0..PAIRS {
        // SAFETY: a Layout of 64 bytes.
        let start = unsafe { heap.alloc(layout) };
        assert!(!start.is_null(), "no memory");
        // SAFETY: allocated above, with this Layout.
        unsafe { heap.dealloc(start, layout) };
    }
    time::cycles() - before
}

//! Workloads without a bug: to see what a level costs, and that it reports nothing.

use std::alloc::{GlobalAlloc, Layout};
use std::hint::black_box;
use std::time::Instant;

use smp_heap::battery::Random;
use smp_heap::{CpuPin, Heap, Pinned};

use crate::corpus::Space;

/// One thread is the one CPU.
#[derive(Debug)]
struct OneCpu;

// SAFETY: this program uses the heap from one thread only.
unsafe impl CpuPin for OneCpu {
    type Guard = ();
    fn pin(&self) {}
    fn index(&self, (): &()) -> usize {
        0
    }
}

static HEAP: Heap<Space, Pinned<OneCpu>, 2> = Heap::new(Space, Pinned(OneCpu));

pub(crate) const NAMES: [&str; 4] = ["pair of 64 B", "churn, 1,000 live", "churn, 100,000 live", "LIFO batches of 100"];

/// Guards one block in so many, if this level can.
fn guard(rate: u32) {
    #[cfg(feature = "guard-pages")]
    HEAP.set_guard_rate(rate).unwrap();
    let _ = rate;
}

fn get(layout: Layout) -> *mut u8 {
    // SAFETY: the size is not 0.
    let block = unsafe { GlobalAlloc::alloc(&HEAP, layout) };
    assert!(!block.is_null(), "out of memory");
    // SAFETY: the block is at least 8 bytes long: a user writes what it allocates.
    unsafe { block.cast::<u64>().write_volatile(1) };
    block
}

fn put(block: *mut u8, layout: Layout) {
    // SAFETY: every caller gives what `get` gave it, once.
    unsafe { GlobalAlloc::dealloc(&HEAP, block, layout) };
}

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

/// Runs a workload for so many pairs of alloc and free, and prints nanoseconds a pair.
pub(crate) fn run(name: &str, operations: usize, guard_rate: u32) -> Result<(), String> {
    guard(guard_rate);
    let start = Instant::now();
    match NAMES.iter().position(|known| *known == name) {
        Some(0) => (0..operations).for_each(|_| put(black_box(get(layout(64))), layout(64))),
        Some(1) => churn(1_000, operations),
        Some(2) => churn(100_000, operations),
        Some(3) => {
            let mut blocks = Vec::with_capacity(100);
            for _ in 0..operations / 100 {
                blocks.extend((0..100).map(|_| get(layout(256))));
                blocks.drain(..).rev().for_each(|block| put(block, layout(256)));
            }
        }
        _ => return Err(format!("no such workload: {name}; there are {NAMES:?}")),
    }
    println!("{}", start.elapsed().as_nanos() as f64 / operations as f64);
    Ok(())
}

/// Frees and allocates at random places: sizes from 8 B to 2 KiB, short ones more often.
fn churn(live: usize, operations: usize) {
    let mut random = Random::new(1);
    let mut any = || {
        let number = random.number() as usize;
        let most = 8 << (number & 7);
        (layout(8 + (number >> 8) % (2 * most)), number >> 24)
    };
    let mut slots: Vec<_> = (0..live).map(|_| any().0).map(|layout| (get(layout), layout)).collect();
    for _ in 0..operations {
        let (layout, place) = any();
        let slot = &mut slots[place % live];
        put(slot.0, slot.1);
        *slot = (get(layout), layout);
    }
    slots.into_iter().for_each(|(block, layout)| put(block, layout));
}

/// Random operations of every kind by the rules, every byte checked. Nothing may be reported.
pub(crate) fn clean(operations: usize) -> Result<(), String> {
    use smp_heap::battery::{churn, free_all};
    #[cfg(feature = "hardened")]
    HEAP.set_report_hook(|report| {
        eprintln!("reported: {report}");
        std::process::exit(1)
    });
    guard(100);
    let mut random = Random::new(42);
    let mut slots: Vec<_> = (0..2_000).map(|_| None).collect();
    churn(&HEAP, &mut random, &mut slots, operations, 2_000).map_err(|failure| failure.to_string())?;
    churn(&HEAP, &mut random, &mut slots, operations / 100, 200_000).map_err(|failure| failure.to_string())?;
    free_all(&mut slots).map_err(|failure| failure.to_string())?;
    HEAP.drain();
    // SAFETY: this is the only thread that uses the heap.
    unsafe { HEAP.verify_at_rest() }.map_err(|violation| violation.to_string())?;
    println!("{operations} operations, nothing reported");
    Ok(())
}

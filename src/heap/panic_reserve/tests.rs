//! What was set aside, and a heap whose locks a panic left held.

use super::*;
use crate::battery::{Call, Faulty, Filled};
use crate::contract::CpuMode;
use crate::contract::cpu::{CpuPin, UnknownCpu};
use crate::host_pages::HostPages;
use crate::{Heap, Hint, Pinned};
use core::alloc::Layout;
use std::vec::Vec;

/// The host's memory, which gives one run.
type Once = Faulty<HostPages<false>>;

struct OneCpu;
// SAFETY: each heap with this pin is used by one thread.
unsafe impl CpuPin for OneCpu {
    type Guard = ();
    fn pin(&self) {}
    fn index(&self, (): &()) -> usize {
        0
    }
}

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

/// What a handler does that reports: strings that grow, a buffer, a table; some of it freed, in any order.
fn report<C: CpuMode>(heap: &Heap<Once, C, 2>) -> bool {
    let served = |size| Filled::new(heap, layout(size), 3).unwrap();
    let Some(mut string) = served(8) else { return false };
    for size in [16, 32, 64, 128, 1000, 5000, 9000, 20_000] {
        if !string.realloc(size).unwrap() {
            return false;
        }
    }
    let blocks: Option<Vec<_>> = [4096, 24, 40_000, 200, 6000].into_iter().map(served).collect();
    let Some(blocks) = blocks else { return false };
    blocks.into_iter().chain([string]).for_each(|block| block.free().unwrap());
    true
}

/// The panic left the CPU's cache and every lock of pages and of a bin held for good.
fn report_after_a_panic<C: CpuMode>(mode: C) {
    let heap: Heap<Once, C, 2> = Heap::new(Once::default(), mode);
    assert_eq!(heap.reserve_for_panic(usize::MAX), Err(crate::AllocError));
    heap.reserve_for_panic(256 << 10).unwrap();
    heap.provider().on(Call::Unmap).fail(0, usize::MAX);
    heap.provider().set_limit(heap.provider().held_len());
    assert_eq!(heap.reserve_for_panic(1 << 10), Err(crate::AllocError), "once is enough");
    heap.verify_all().unwrap();
    let before = Filled::new(&heap, layout(100), 1).unwrap().unwrap();
    let interrupted = heap.enter();
    let mut panicked = false;
    heap.engine.pages.for_each_run(&mut |_| {
        if core::mem::replace(&mut panicked, true) {
            return;
        }
        let calls = heap.provider().on(Call::Map).made();
        assert!(!report(&heap), "without panic mode there is nothing at hand");
        let calls_of_report = heap.provider().on(Call::Map).made() - calls;
        heap.enter_panic_mode();
        assert!((0..2).all(|_| report(&heap)));
        let calls_in_panic = heap.provider().on(Call::Map).made() - calls - calls_of_report;
        assert_eq!(calls_in_panic, 0, "the provider is left alone");
        let last = core::iter::from_fn(|| Filled::new(&heap, layout(30_000), 5).unwrap()).take(100);
        assert!((1..9).contains(&last.count()), "what was set aside has an end, and the end is an error");
    });
    assert!(panicked);
    let strays = heap.stats().stray_count;
    drop(interrupted);
    before.free().unwrap();
    assert_eq!((strays, heap.stats().stray_count), (0, 0));
}

/// Promise 1, for the worst of contexts.
#[test]
fn a_panic_inside_the_heap_can_be_reported() {
    report_after_a_panic(Pinned(OneCpu));
    report_after_a_panic(Hint(UnknownCpu));
}

#[test]
fn bytes_are_handed_out_once_aligned_and_to_the_end() {
    let mut memory = Vec::from([0_u128; 1024]);
    let start = NonNull::new(memory.as_mut_ptr()).unwrap().cast::<u8>();
    let emergency = Emergency::new();
    let block = NonNull::slice_from_raw_parts(start, 16 * memory.len());
    emergency.provide(block).unwrap();
    assert_eq!(emergency.provide(block), Err(block));
    assert!(emergency.take(8, 8).is_none() && !emergency.owns(start), "not before a panic");
    emergency.begin();
    let mut end = start.addr().get() + GAP_LEN;
    while let Some(taken) = emergency.take(100, 64) {
        let addr = taken.cast::<u8>().addr().get();
        assert!(addr >= end && addr % 64 == 0 && taken.len() == 100 && emergency.owns(taken.cast()));
        end = addr + 100;
    }
    let all = start.addr().get() + 16 * memory.len();
    assert!(end <= all && all - end < 164, "{} bytes are left", all - end);
    assert!(emergency.take(usize::MAX, 1).is_none() && emergency.take(1, 1 << (usize::BITS - 1)).is_none());
    assert!(emergency.take(1, 1).is_some(), "what is left serves what is short");
}

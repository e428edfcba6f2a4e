//! Passes over allocators that are slow where the test says. One test, because a pass forks the process.
#![cfg(target_arch = "x86_64")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use smp_heap_bench::cell::Failure;
use smp_heap_bench::peers::{self, Calls, Peer};
use smp_heap_bench::tails::pass::{Pass, Passes};
use smp_heap_bench::tails::sequence::ROWS;

const OPERATIONS: usize = 40_000;
/// Far above what any call here takes by itself.
const SLOW: u32 = 1_000_000;
/// A call in so many is slow.
const EVERY: usize = 1_000;

static CALLS: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C-unwind" fn alloc(size: usize, align: usize) -> *mut u8 {
    // SAFETY: the contract is the same; alignments are powers of two.
    unsafe { System.alloc(Layout::from_size_align_unchecked(size, align)) }
}

unsafe extern "C-unwind" fn free(start: *mut u8, size: usize, align: usize) {
    // SAFETY: the contract is the same; alignments are powers of two.
    unsafe { System.dealloc(start, Layout::from_size_align_unchecked(size, align)) }
}

/// What `CALLS` counts is this process's: each pass begins where the parent put it.
unsafe extern "C-unwind" fn slow_at_times(size: usize, align: usize) -> *mut u8 {
    if CALLS.fetch_add(1, Relaxed) % EVERY == 0 {
        // SAFETY: x86-64 has the instruction.
        let now = || unsafe { std::arch::x86_64::_rdtsc() };
        let start = now();
        while now() - start < u64::from(SLOW) {}
    }
    // SAFETY: the contract is the same.
    unsafe { alloc(size, align) }
}

unsafe extern "C-unwind" fn always_the_same(_: usize, _: usize) -> *mut u8 {
    static BLOCK: [AtomicUsize; 512] = [const { AtomicUsize::new(0) }; 512];
    BLOCK.as_ptr().cast_mut().cast()
}

unsafe extern "C-unwind" fn kept(_: *mut u8, _: usize, _: usize) {}

#[test]
fn what_comes_back_stays_and_what_does_not_is_taken_out() {
    let (all, _) = peers::all();
    let system = *all.iter().find(|peer| peer.name == "system").expect("an allocator");
    let with = |alloc, free| Peer { calls: Calls { alloc, free, ..system.calls }, ..system };
    let slow = with(slow_at_times, free);

    let mut passes = Passes::new(OPERATIONS).unwrap();
    for _ in 0..3 {
        assert_eq!(passes.add(&slow, ROWS[0]).unwrap(), None);
    }
    let ([alloc, free], Pass { p99_99, .. }) = passes.figures();
    assert!(alloc.p99_99 >= SLOW && p99_99[0] >= SLOW, "{alloc:?}");
    assert!(alloc.p99 < SLOW && free.p99 < SLOW, "{alloc:?} {free:?}");
    let slow_calls = passes.cycles()[0].iter().filter(|&&cycles| cycles >= SLOW).count();
    assert_eq!(slow_calls, OPERATIONS / EVERY);

    let mut passes = Passes::new(OPERATIONS).unwrap();
    for start in [0, 300, 600] {
        CALLS.store(start, Relaxed);
        assert_eq!(passes.add(&slow, ROWS[0]).unwrap(), None);
    }
    let ([alloc, _], Pass { p99_99, .. }) = passes.figures();
    assert!(alloc.max < SLOW, "each call was slow in one pass only: {alloc:?}");
    assert!(p99_99[0] >= SLOW, "the best pass by itself has them");

    let spoilt = Passes::new(OPERATIONS).unwrap().add(&with(always_the_same, kept), ROWS[2]);
    assert_eq!(spoilt.unwrap(), Some(Failure::Spoilt));
}

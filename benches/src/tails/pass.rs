//! One pass: the row's calls with one allocator, in a process of its own, each call timed.

use std::arch::x86_64::{_mm_lfence, _rdtsc};
use std::hint::black_box;
use std::io;
use std::time::Duration;

use super::figures::{Figures, at, keep_least};
use super::sequence::{Row, Sequence};
use crate::block::{seal, unseal};
use crate::cell::{Failure, in_process, thread_faults};
use crate::memory::Shared;
use crate::peers::Peer;

/// A pass that takes longer has been stopped by somebody.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the passes of one column have shown so far.
pub struct Passes {
    operations: usize,
    /// The least cycles of each `alloc`, then of each `free`.
    least: Shared<u32>,
    /// What the last pass says of itself.
    last: Shared<Pass>,
    best: Pass,
}

/// One pass by itself.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Its own p99.99, interruptions and all.
    pub p99_99: [u32; 2],
    /// Pages touched first while the clock ran.
    pub faults: u64,
}

impl Passes {
    pub fn new(operations: usize) -> io::Result<Self> {
        let least = Shared::<u32>::new(2 * operations)?;
        for place in 0..2 * operations {
            // SAFETY: the mapping is that long.
            let place = unsafe { least.start().add(place) };
            // SAFETY: within the mapping, which nobody else uses now.
            unsafe { place.write(u32::MAX) };
        }
        Ok(Self { operations, least, last: Shared::new(1)?, best: Pass { p99_99: [u32::MAX; 2], faults: u64::MAX } })
    }

    /// Makes one more pass.
    pub fn add(&mut self, peer: &Peer, row: Row) -> io::Result<Option<Failure>> {
        let (least, last) = (self.least(), self.last.start());
        let failure = in_process(PATIENCE, || {
            // SAFETY: only this process uses the mapping until it has ended.
            let least = unsafe { std::slice::from_raw_parts_mut(least, 2 * self.operations) };
            let (mut cycles, faults) = timed(peer, row, self.operations);
            keep_least(least, &cycles);
            let (allocs, frees) = cycles.split_at_mut(self.operations);
            let pass = Pass { p99_99: [at(allocs, 9_999), at(frees, 9_999)], faults };
            // SAFETY: the same, and the mapping is one `Pass` long.
            unsafe { last.write(pass) };
        })?;
        if failure.is_none() {
            // SAFETY: the process that ended wrote it.
            let pass = unsafe { last.read() };
            for (best, new) in self.best.p99_99.iter_mut().zip(pass.p99_99) {
                *best = new.min(*best);
            }
            self.best.faults = pass.faults.min(self.best.faults);
        }
        Ok(failure)
    }

    fn least(&self) -> *mut u32 {
        self.least.start()
    }

    /// The least cycles of each `alloc` and of each `free`.
    pub fn cycles(&self) -> [&[u32]; 2] {
        // SAFETY: the processes that wrote it have ended.
        let all = unsafe { std::slice::from_raw_parts(self.least(), 2 * self.operations) };
        let (allocs, frees) = all.split_at(self.operations);
        [allocs, frees]
    }

    /// What each call's least figures say, and the best that single passes show, each figure by itself.
    pub fn figures(&self) -> ([Figures; 2], Pass) {
        (self.cycles().map(|cycles| Figures::of(&mut cycles.to_vec())), self.best)
    }
}

/// Cycles of the time-stamp counter. What stands before it is done, what stands behind it has not begun.
#[inline(always)]
fn stamp() -> u64 {
    // SAFETY: x86-64 has both instructions.
    unsafe {
        _mm_lfence();
        let cycles = _rdtsc();
        _mm_lfence();
        cycles
    }
}

fn between(start: u64, end: u64) -> u32 {
    u32::try_from(end.wrapping_sub(start)).unwrap_or(u32::MAX)
}

/// The cycles of each `alloc`, then those of each `free`; and how many pages were touched first.
fn timed(peer: &Peer, row: Row, operations: usize) -> (Vec<u32>, u64) {
    (peer.open)();
    (peer.enter)(0);
    let calls = &peer.calls;
    // Written, so that its pages are in place.
    let mut cycles = vec![1; 2 * operations];
    let (allocs, frees) = cycles.split_at_mut(operations);
    let mut sequence = Sequence::new(row);
    let mut blocks: Vec<_> = (0..row.live)
        .map(|_| {
            let size = sequence.size();
            (crate::block::take(calls, size), size)
        })
        .collect();
    let mut replace = || {
        let (start, size) = &mut blocks[sequence.index()];
        let new_size = sequence.size();
        unseal(*start, *size);
        let before = stamp();
        // SAFETY: the block came from this peer with this size and alignment, and nobody uses it any more.
        unsafe { (calls.free)(*start, *size, 8) };
        let freed = stamp();
        // SAFETY: the size is not 0, the alignment a power of two.
        *start = unsafe { (calls.alloc)(new_size, 8) };
        let end = stamp();
        *size = new_size;
        seal(*start, new_size);
        (between(freed, end), between(before, freed))
    };
    // As long again as what is timed: pages that a heap touches once are not a call's figure.
    for _ in 0..operations {
        replace();
    }
    let faults = thread_faults();
    for (alloc, free) in allocs.iter_mut().zip(frees) {
        (*alloc, *free) = replace();
    }
    let faults = thread_faults() - faults;
    (cycles, faults)
}

/// The least cycles that a call which does nothing takes, as these passes time it.
pub fn empty_call() -> u32 {
    unsafe extern "C-unwind" fn nothing(size: usize, _: usize) -> *mut u8 {
        std::ptr::without_provenance_mut(size)
    }
    let call: unsafe extern "C-unwind" fn(usize, usize) -> *mut u8 = black_box(nothing);
    let once = |_| {
        let start = stamp();
        // SAFETY: it may be called with anything.
        black_box(unsafe { call(64, 8) });
        between(start, stamp())
    };
    (0..100_000).map(once).min().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_call_takes_some_cycles() {
        assert!((1..10_000).contains(&empty_call()));
        assert_eq!(between(5, 105), 100);
        assert_eq!(between(0, 1 << 40), u32::MAX);
    }
}

//! Runs that nobody wants: the heap could not note them, and the provider did not take them back at that moment.
//!
//! They wait in a lock-free stack inside themselves and are offered again before new pages are asked for, and by
//! `trim`. So a provider that refuses loses nothing. Price: until then they are neither's, and no statistics show them.

#![expect(unsafe_code, reason = "a node is written into memory that nobody uses")]

use core::ptr::{NonNull, null_mut};

use crate::base::sync::{AtomicPtr, Ordering, read, write};
use crate::contract::provider::PageRun;
use crate::pages::Mapping;

/// What is written at the start of an orphaned run.
struct Node {
    next: *mut Node,
    start: NonNull<u8>,
    run: PageRun,
}

const _: () = assert!(size_of::<Node>() <= 1024 && align_of::<Node>() <= 1024, "the shortest run holds one");

/// All zero is the empty stack.
#[derive(Debug)]
pub(crate) struct Orphans {
    head: AtomicPtr<Node>,
}

impl Orphans {
    pub(crate) const fn new() -> Self {
        Self { head: AtomicPtr::new(null_mut()) }
    }

    /// Keeps a run. Lock-free, callable from any context.
    pub(crate) fn push(&self, memory: Mapping) {
        let (start, run) = (memory.start(), memory.run());
        let node = start.cast::<Node>();
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            // SAFETY: the run is ours (`Mapping`); it is long and aligned enough (asserted above, and pages are at
            // least 1 KiB).
            unsafe { write(node.as_ptr(), Node { next: head, start, run }) };
            match self.head.compare_exchange_weak(head, node.as_ptr(), Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes every run out at once and passes them on, one by one. They are then the callee's.
    pub(crate) fn take_all(&self, mut take: impl FnMut(Mapping)) {
        if self.head.load(Ordering::Relaxed).is_null() {
            return;
        }
        let mut next = self.head.swap(null_mut(), Ordering::Acquire);
        while let Some(node) = NonNull::new(next) {
            // SAFETY: `push` wrote it, and the swap made the whole stack ours.
            let node = unsafe { read(node.as_ptr()) };
            next = node.next;
            // SAFETY: what `push` was given, which is ours now.
            take(unsafe { Mapping::new(node.start, node.run) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn every_run_comes_back_once_with_its_length() {
        let mut memory = Vec::from([0_u128; 4 * 64]);
        let start = memory.as_mut_ptr().cast::<u8>();
        let orphans = Orphans::new();
        let runs: Vec<_> = (0..4)
            .map(|number| {
                let run = PageRun::new(1024 * (1 + number % 2), 1024, 1024).unwrap();
                (NonNull::new(start.wrapping_add(1024 * number)).unwrap(), run)
            })
            .collect();
        for (start, run) in &runs {
            // SAFETY: 1 KiB of the memory each, which is long enough for a node, and no provider has a claim on it.
            orphans.push(unsafe { Mapping::new(*start, *run) });
        }
        let mut taken = Vec::new();
        orphans.take_all(|memory| taken.push((memory.start(), memory.run())));
        taken.sort_by_key(|(start, _)| *start);
        assert_eq!(taken, runs);
        orphans.take_all(|_| unreachable!("all were taken"));
    }
}

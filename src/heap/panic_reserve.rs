//! Memory for the time after a panic.
//!
//! A panic may strike inside the heap: a cache is then busy and locks are held for good. The handler still wants to
//! format and to print. So a kernel may set some bytes aside in good time; in panic mode they are handed out one after
//! the other by moving one number, without a lock, and what is freed of them is not used again. Price: the bytes, which
//! are nobody else's meanwhile, and one look at a flag on paths that are slow anyway: the fast paths do not know, since
//! panic mode makes every cache look busy.

#![expect(unsafe_code, reason = "a block is cut off what was set aside")]

use core::ptr::{NonNull, null_mut};

use crate::base::sync::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// What is left free in front: no block lies in the first granule, whose descriptor says that all of it is one.
pub(crate) const GAP_LEN: usize = 4096;

/// One run of bytes and how much of it is out. All zero: none, and no panic.
#[derive(Debug)]
pub(crate) struct Emergency {
    on: AtomicBool,
    start: AtomicPtr<u8>,
    len: AtomicUsize,
    /// Bytes handed out from the start, the gap included; 0 before the first.
    used: AtomicUsize,
}

impl Emergency {
    pub(crate) const fn new() -> Self {
        Self {
            on: AtomicBool::new(false),
            start: AtomicPtr::new(null_mut()),
            len: AtomicUsize::new(0),
            used: AtomicUsize::new(0),
        }
    }

    /// Keeps a block for the emergency, for good. Gives it back if there is one already.
    pub(crate) fn provide(&self, block: NonNull<[u8]>) -> Result<(), NonNull<[u8]>> {
        let start = block.cast::<u8>().as_ptr();
        self.start.compare_exchange(null_mut(), start, Ordering::Relaxed, Ordering::Relaxed).map_err(|_| block)?;
        // Until then nothing of it is handed out.
        self.len.store(block.len(), Ordering::Release);
        Ok(())
    }

    pub(crate) fn begin(&self) {
        self.on.store(true, Ordering::Release);
    }

    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// Bytes of it for good; `None` if no panic has begun, or so many are not left. Lock-free, callable from any
    /// context.
    pub(crate) fn take(&self, len: usize, align: usize) -> Option<NonNull<[u8]>> {
        if !self.is_on() {
            return None;
        }
        let all = self.len.load(Ordering::Acquire);
        let start = NonNull::new(self.start.load(Ordering::Relaxed))?;
        let mut used = self.used.load(Ordering::Relaxed);
        loop {
            let from = start.addr().get().checked_add(used.max(GAP_LEN))?;
            let offset = from.checked_next_multiple_of(align)? - start.addr().get();
            let end = offset.checked_add(len).filter(|end| *end <= all)?;
            match self.used.compare_exchange_weak(used, end, Ordering::Relaxed, Ordering::Relaxed) {
                // SAFETY: `offset + len <= all`, so the sum stays in the block.
                Ok(_) => return Some(NonNull::slice_from_raw_parts(unsafe { start.add(offset) }, len)),
                Err(now) => used = now,
            }
        }
    }

    /// Whether a block is of the emergency's bytes: not to be freed.
    pub(crate) fn owns(&self, block: NonNull<u8>) -> bool {
        let start = self.start.load(Ordering::Relaxed).addr();
        block.addr().get().wrapping_sub(start) < self.used.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::battery::Filled;
    use crate::contract::CpuMode;
    use crate::contract::cpu::{CpuPin, UnknownCpu};
    use crate::{Heap, Hint, PageProvider, PageRun, Pinned};
    use core::alloc::Layout;
    use std::vec::Vec;

    /// One run, once.
    #[derive(Debug, Default)]
    struct Once {
        given: AtomicBool,
        calls: AtomicUsize,
    }

    // SAFETY: the run is the host's allocator's, leaked, and given once.
    unsafe impl PageProvider for Once {
        fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
            self.calls.fetch_add(1, Ordering::Relaxed);
            if run.len() > 4 << 20 || self.given.swap(true, Ordering::Relaxed) {
                return None;
            }
            // SAFETY: a run's length is not 0.
            NonNull::new(unsafe { std::alloc::alloc(run.layout()) })
        }
        unsafe fn unmap(&self, _: NonNull<u8>, _: PageRun) -> bool {
            false
        }
    }

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
        assert_eq!(heap.reserve_for_panic(1 << 10), Err(crate::AllocError), "once is enough");
        heap.verify_all().unwrap();
        let before = Filled::new(&heap, layout(100), 1).unwrap().unwrap();
        let interrupted = heap.enter();
        let mut panicked = false;
        heap.engine.pages.for_each_run(&mut |_| {
            if core::mem::replace(&mut panicked, true) {
                return;
            }
            let calls = heap.provider().calls.load(Ordering::Relaxed);
            assert!(!report(&heap), "without panic mode there is nothing at hand");
            let calls_of_report = heap.provider().calls.load(Ordering::Relaxed) - calls;
            heap.enter_panic_mode();
            assert!((0..2).all(|_| report(&heap)));
            let calls_in_panic = heap.provider().calls.load(Ordering::Relaxed) - calls - calls_of_report;
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
}

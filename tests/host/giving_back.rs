//! Pages that go back to the provider by themselves, and those that stay because they are asked for again.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(target_os = "linux")]
use crate::common::Mmap;
use crate::common::{AtRest, Books, filled, layout};
use crate::emptied::Frames;
use smp_heap::battery::Filled;
use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint, PageProvider, PageRun};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

type Host<P> = Heap<P, Hint<UnknownCpu>, 2>;

/// Takes so many blocks, and gives all back.
fn batch<P: PageProvider>(heap: &Host<P>, count: usize, size: usize) {
    let layout = Layout::from_size_align(size, 8).unwrap();
    let blocks: Vec<_> = (0..count).map(|_| heap.alloc(layout).unwrap()).collect();
    for block in blocks {
        // SAFETY: just allocated with this layout, and not used.
        unsafe { heap.free(block.cast(), layout) };
    }
}

/// Calls of the provider that give pages or memory for them in a hundred batches, after some; checks that what stayed
/// is no more than a batch needs, and goes with `maintain`.
fn calls_once_warm<P: PageProvider + Default>(count: usize, size: usize) -> u64 {
    let heap = Host::new(P::default(), Hint(UnknownCpu));
    let calls = || heap.stats().map_count + heap.stats().commit_count;
    (0..40).for_each(|_| batch(&heap, count, size));
    let (before, peak_len) = (calls(), heap.stats().high_held_len);
    (0..100).for_each(|_| batch(&heap, count, size));
    let more = calls() - before;
    assert!(heap.stats().held_len <= peak_len, "{peak_len}");
    assert!(peak_len < count * size * 3 / 2 + 4 * MIB, "{peak_len} bytes for {count} blocks of {size}");
    heap.verify_all().unwrap();
    (0..100).for_each(|_| _ = heap.maintain(usize::MAX));
    assert!(heap.stats().held_len <= 4 * MIB, "{} bytes are left", heap.stats().held_len);
    more
}

/// At first each batch maps and unmaps; what is asked for again then stays, at most as much as a batch needs.
#[test]
fn batches_at_the_edge_stop_calling_the_provider() {
    for size in [1000, 4096, 64 * KIB] {
        let count = 16 * MIB / size;
        assert!(calls_once_warm::<Books>(count, size) <= 1, "{size}");
        assert!(calls_once_warm::<Frames>(count, size) <= 1, "{size}, pages that lose their memory");
        #[cfg(target_os = "linux")]
        assert!(calls_once_warm::<Mmap>(count, size) <= 1, "{size}, over the system's pages");
    }
}

/// Huge blocks are runs of the provider's own: they are kept once one was missed.
#[test]
#[cfg(all(target_os = "linux", not(feature = "hardened")))]
fn huge_blocks_that_come_and_go_stop_calling_the_provider() {
    for (count, size) in [(1, MIB), (1, 5 * MIB), (3, 2 * MIB)] {
        assert!(calls_once_warm::<Mmap>(count, size) <= 1, "{count} of {size}");
    }
}

/// What came and went once is given back at once.
#[test]
fn memory_that_was_used_once_is_given_back() {
    let heap = Host::<Books>::new(Books::default(), Hint(UnknownCpu));
    let kept = Filled::new(&heap, Layout::new::<u64>(), 1).unwrap().unwrap();
    batch(&heap, 1024, 64 * KIB);
    let (held_len, peak_len) = (heap.stats().held_len, heap.stats().high_held_len);
    assert!(held_len <= peak_len / 8 + 2 * MIB, "{held_len} of {peak_len} bytes stay");
    kept.free().unwrap();
}

/// Promise 4: free pages go back by and by, without anybody asking for it.
#[test]
fn free_pages_beyond_a_share_go_back_without_a_trim() {
    for size in [1 << 20, 40_000, 2000] {
        let heap = Heap::<_, _, 2>::new(Books::default(), Hint(UnknownCpu));
        let blocks: Vec<_> = (0..(64 << 20) / size).map(|_| heap.alloc(layout(size, 8)).unwrap()).collect();
        let most = heap.provider().held_len();
        for block in blocks {
            // SAFETY: allocated above with this Layout.
            unsafe { heap.free(block.cast(), layout(size, 8)) };
        }
        let held = heap.provider().held_len();
        assert!(held * 2 <= most, "{held} of {most} still held after freeing all blocks of {size}");
    }
}

/// Blocks that chunks of all lengths and places held one after the other: a remembered chunk that has left is not
/// trusted.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "has a run too short for that many frames")]
fn chunks_that_come_again_in_another_shape_are_looked_up_afresh() {
    /// Gives the same piece of memory in runs of any length, one at a time.
    struct OnePlace(crate::common::Memory, AtomicUsize);

    // SAFETY: one run at a time, inside the memory, at its start.
    unsafe impl PageProvider for OnePlace {
        fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
            let most = self.1.load(Ordering::Relaxed);
            let fits = run.len() <= self.0.len() && run.align() <= 4096 && run.len() <= most;
            (fits && self.1.swap(0, Ordering::Relaxed) > 0).then(|| NonNull::new(self.0.start()).unwrap())
        }
        unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
            // What was left there must not be relied on.
            // SAFETY: the heap gives the run up.
            unsafe { start.write_bytes(0xff, run.len()) };
            true
        }
    }

    let place = OnePlace(crate::common::Memory::new(4 << 20, 4096), AtomicUsize::new(0));
    let heap = Heap::<_, _, 2>::new(place, Hint(UnknownCpu));
    for len in [4 << 20, 8192, 100 << 10, 1 << 20, 16 << 10, 4 << 20, 256 << 10] {
        heap.provider().1.store(len, Ordering::Relaxed);
        let blocks: Vec<_> = (0..100).map(|_| filled(&heap, 24)).collect();
        blocks.into_iter().for_each(|block| block.free().unwrap());
        heap.verify_all().unwrap();
        assert!(heap.stats().cpus[0].cached_count > 0, "own tiny blocks stay in the cache");
        assert!(heap.trim(0) > 0);
        assert_eq!(heap.stats().held_len, 0);
    }
}

//! Pages that go back to the provider by themselves, and those that stay because they are asked for again.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::{AtRest, Books, filled, layout};
use smp_heap::battery::Filled;
use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint, PageProvider, PageRun};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

type Host = Heap<Books, Hint<UnknownCpu>, 1>;

/// Takes so many blocks, and gives all back.
fn batch(heap: &Host, count: usize, size: usize) {
    let layout = Layout::from_size_align(size, 8).unwrap();
    let blocks: Vec<_> = (0..count).map(|_| heap.alloc(layout).unwrap()).collect();
    for block in blocks {
        // SAFETY: just allocated with this layout, and not used.
        unsafe { heap.free(block.cast(), layout) };
    }
}

/// At first each batch maps and unmaps; what is asked for again then stays, at most as much as a batch needs.
#[test]
fn batches_at_the_edge_stop_calling_the_provider() {
    let heap = Host::new(Books::default(), Hint(UnknownCpu));
    (0..40).for_each(|_| batch(&heap, 256, 64 * KIB));
    let (maps, peak_len) = (heap.stats().map_count, heap.stats().high_held_len);
    for _ in 0..100 {
        batch(&heap, 256, 64 * KIB);
    }
    let more = heap.stats().map_count - maps;
    assert!(more <= 1, "{more} calls of map in 100 batches");
    assert!(heap.stats().held_len <= peak_len && peak_len < 24 * MIB, "{peak_len} bytes for 16 MiB");
    // Who calls `maintain` has it back.
    for _ in 0..100 {
        heap.maintain(usize::MAX);
    }
    assert!(heap.stats().held_len <= 4 * MIB, "{} bytes are left", heap.stats().held_len);
}

/// What came and went once is given back at once.
#[test]
fn memory_that_was_used_once_returns_to_its_slab() {
    let heap = Host::new(Books::default(), Hint(UnknownCpu));
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

//! Pages that go back to the provider by themselves, and those that stay because they are asked for again.

use std::alloc::Layout;

use crate::common::Books;
use smp_heap::battery::Filled;
use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint};

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

//! Every bug of freeing, for a block of every kind: tiny, short, longer than a page, the longest of slabs, a run, a
//! huge one.
//!
//! Shown: each is reported, by each level of hardening, in builds with and without debug assertions; the heap is whole
//! afterwards and gives everything back.

use std::alloc::Layout;
use std::ptr::NonNull;

use crate::common::{AtRest, Mmap, ThreadCpu, play_cpu};
use smp_heap::{Heap, Misuse, Pinned};

type Tested = Heap<Mmap, Pinned<ThreadCpu>, 8>;

/// A size, and others as which a block of it may be freed by mistake.
const KINDS: [(&str, usize, &[usize]); 6] = [
    ("tiny", 8, &[64, 5000]),
    ("short", 200, &[24, 5000]),
    ("longer than a page", 5000, &[64, 9000]),
    ("the longest of slabs", 32 << 10, &[5000, 40_000]),
    ("a run", 100_000, &[64, 5000, 60_000]),
    ("huge", 3 << 20, &[64, 100_000, 2 << 20]),
];

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

fn noticed(heap: &Tested) -> u64 {
    Misuse::ALL.into_iter().map(|misuse| heap.misuse_count(misuse)).sum()
}

/// Does one thing with a block of a heap that works, and expects to have it reported. The block is in use before, and
/// afterwards if `stays`.
fn is_noticed(what: &str, size: usize, stays: bool, wrong: impl Fn(&Tested, NonNull<u8>)) {
    play_cpu(0);
    let heap = Tested::new(Mmap::default(), Pinned(ThreadCpu));
    let get = || {
        let block = heap.alloc(layout(size)).unwrap().cast::<u8>();
        // SAFETY: the block is that long.
        unsafe { block.write_bytes(0x11, size) };
        block
    };
    // SAFETY: passed blocks that are in use with this Layout.
    let free = |block| unsafe { heap.free(block, layout(size)) };
    let others: Vec<_> = (0..20).map(|_| get()).collect();
    let (before, block, behind) = (get(), get(), get());
    wrong(&heap, block);
    assert!(noticed(&heap) > 0, "{what}, {size} bytes: nothing is reported");
    let reported = noticed(&heap);
    if stays {
        free(block);
    }
    others.into_iter().chain([before, behind]).for_each(free);
    heap.trim(0);
    heap.verify_all().unwrap();
    assert_eq!(heap.stats().held_len, 0, "{what}, {size} bytes: not all of it came back\n{}", heap.stats());
    assert_eq!(noticed(&heap), reported, "{what}, {size} bytes: more than the bug is reported");
}

#[test]
fn every_bug_is_noticed_in_blocks_of_every_kind() {
    for (kind, size, wrong_sizes) in KINDS {
        // SAFETY: none, here and below: the contract of `free` is broken, which the heap has to see before it does
        // anything.
        let free = |heap: &Tested, block: NonNull<u8>, size| unsafe { heap.free(block, layout(size)) };
        is_noticed(&format!("{kind}, freed twice"), size, false, |heap, block| {
            free(heap, block, size);
            free(heap, block, size);
        });
        is_noticed(&format!("{kind}, freed twice, the cache emptied between"), size, false, |heap, block| {
            free(heap, block, size);
            heap.drain_current();
            free(heap, block, size);
        });
        for offset in [1, 8, 16, 64, 4096, size / 2].into_iter().filter(|offset| *offset < size) {
            is_noticed(&format!("{kind}, freed {offset} bytes inside"), size, true, |heap, block| {
                // SAFETY: inside the block.
                free(heap, unsafe { block.add(offset) }, size);
            });
        }
        for wrong in wrong_sizes {
            is_noticed(&format!("{kind}, freed as {wrong} bytes"), size, true, |heap, block| free(heap, block, *wrong));
        }
    }
}

//! The heap's own calls and `GlobalAlloc`'s, at sizes that change from one kind of block to another.

use std::alloc::GlobalAlloc;
use std::ptr::NonNull;

use crate::common::{AtRest, Books, filled, layout, limited};
use smp_heap::battery::Filled;
use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint};

#[test]
fn the_global_face_serves_every_size_and_keeps_content() {
    let heap = Heap::<_, _, 2>::new(Books::default(), Hint(UnknownCpu));
    let sizes = [1, 9, 100, 4000, 4097, 5000, 6000, 20_000, 32_768, 40_000, 300_000, 5000, 4097, 50];
    let start = layout(sizes[0], 8);
    // SAFETY: the size is not 0.
    let mut block = unsafe { GlobalAlloc::alloc_zeroed(&heap, start) };
    let mut old = start;
    for (turn, size) in sizes.into_iter().enumerate() {
        // SAFETY: the block is the heap's, of Layout `old`, and the new size is not 0.
        block = unsafe { GlobalAlloc::realloc(&heap, block, old, size) };
        assert!(!block.is_null());
        let kept = old.size().min(size);
        for index in 0..kept {
            // SAFETY: inside the block.
            let byte = unsafe { block.add(index) };
            // SAFETY: written before, by the loop below or as zeros.
            let byte = unsafe { byte.read() };
            assert_eq!(
                byte,
                if turn == 0 { 0 } else { (index as u8).wrapping_add(turn as u8 - 1) },
                "{index} of {size}"
            );
        }
        for index in 0..size {
            // SAFETY: inside the block.
            let byte = unsafe { block.add(index) };
            // SAFETY: the block is ours.
            unsafe { byte.write((index as u8).wrapping_add(turn as u8)) };
        }
        old = layout(size, 8);
        heap.verify_all().unwrap();
    }
    // SAFETY: as above, the block's last use.
    unsafe { GlobalAlloc::dealloc(&heap, block, old) };
    for size in [5000, 20_000, 32_768] {
        // Grown by `realloc`, such a block is a run of pages; fresh, it is not.
        let small = layout(4000, 8);
        // SAFETY: the size is not 0.
        let block = unsafe { GlobalAlloc::alloc(&heap, small) };
        // SAFETY: allocated above with this Layout.
        let block = unsafe { GlobalAlloc::realloc(&heap, block, small, size) };
        // SAFETY: as above.
        unsafe { GlobalAlloc::dealloc(&heap, block, layout(size, 8)) };
        heap.verify_all().unwrap();
        // Dirty memory is cleared.
        // SAFETY: the size is not 0.
        let zeroed = unsafe { GlobalAlloc::alloc_zeroed(&heap, layout(size, 8)) };
        // SAFETY: allocated above, that long, all of it zeroed.
        let bytes = unsafe { std::slice::from_raw_parts_mut(zeroed, size) };
        assert!(bytes.iter().all(|byte| *byte == 0));
        bytes.fill(0xff);
        // SAFETY: as above, the block's last use.
        unsafe { GlobalAlloc::dealloc(&heap, zeroed, layout(size, 8)) };
    }
    // SAFETY: nothing is freed or changed by it: null stays null.
    assert!(unsafe { GlobalAlloc::realloc(&heap, std::ptr::null_mut(), start, 10) }.is_null());
    // What waits in quarantine counts as in use.
    heap.drain();
    assert!(heap.stats().classes.iter().all(|class| class.live_count == 0));
    heap.trim(0);
    heap.verify_all().unwrap();
    assert_eq!(heap.provider().held_len(), 0);
}

#[test]
fn what_may_be_used_of_a_block_is_what_it_was_said_to_be() {
    let heap = Heap::<_, _, 2>::new(Books::default(), Hint(UnknownCpu));
    for size in [1, 64, 65, 4000, 5000, 30_000, 33_000, 1_000_001] {
        let block = heap.alloc(layout(size, 8)).unwrap();
        // SAFETY: just allocated, with this Layout.
        assert_eq!(unsafe { heap.usable_len(block.cast(), layout(size, 8)) }, block.len());
        // SAFETY: allocated above with this Layout.
        let grown = unsafe { heap.realloc(block.cast(), layout(size, 8), size + 5000) }.unwrap();
        // SAFETY: it is of this Layout now.
        assert_eq!(unsafe { heap.usable_len(grown.cast(), layout(size + 5000, 8)) }, grown.len());
        // SAFETY: every byte that may be used is ours.
        unsafe { grown.cast::<u8>().write_bytes(0xee, grown.len()) };
        // SAFETY: as above, its last use.
        unsafe { heap.free(grown.cast(), layout(size + 5000, 8)) };
        heap.verify_all().unwrap();
    }
    // SAFETY: a block without bytes is anywhere.
    assert_eq!(unsafe { heap.usable_len(NonNull::dangling(), layout(0, 8)) }, 0);
}

#[test]
fn size_zero_is_no_block_to_free_or_to_become() {
    let heap = Heap::<_, _, 2>::new(Books::default(), Hint(UnknownCpu));
    let nothing = heap.alloc(layout(0, 8)).unwrap();
    // SAFETY: allocated above with this Layout.
    unsafe { heap.free(nothing.cast(), layout(0, 8)) };
    assert_eq!(heap.stats().stray_count, 0);
    let mut block = filled(&heap, 100);
    assert!(!block.resize(0).unwrap(), "it would never be freed");
    block.free().unwrap();
    // What waits in quarantine counts as in use.
    heap.drain();
    assert!(heap.stats().classes.iter().all(|class| class.live_count == 0));
}

/// In a small heap the steps of page runs are finer than those of classes: a run for 8300 bytes is shorter than such a
/// class's blocks.
#[test]
fn a_run_takes_a_new_size_by_its_own_length_not_by_its_class() {
    let heap = Heap::<_, _, 2>::new(limited(100 << 10), Hint(UnknownCpu));
    let mut blocks: Vec<_> = (0..3).map(|_| filled(&heap, 4000)).collect();
    for block in &mut blocks {
        assert!(block.realloc(8300).unwrap());
    }
    for size in [8500, 9000, 10_000] {
        for block in &mut blocks {
            block.resize(size).unwrap();
        }
        blocks.iter().for_each(|block| block.check().unwrap());
        heap.verify_all().unwrap();
    }
    blocks.into_iter().for_each(|block| block.free().unwrap());
}

#[test]
fn a_block_that_grows_takes_one_of_a_slab_when_there_is_no_run() {
    let heap = Heap::<_, _, 2>::new(limited(2 << 20), Hint(UnknownCpu));
    let fill = |size| std::iter::from_fn(|| Filled::new(&heap, layout(size, 8), 1).unwrap()).collect::<Vec<_>>();
    let mut small = filled(&heap, 100);
    let (mut long, rest) = (fill(5000), fill(64));
    long.pop().unwrap().free().unwrap();
    assert!(small.realloc(4900).unwrap());
    long.into_iter().chain(rest).chain([small]).for_each(|block| block.free().unwrap());
    heap.verify_all().unwrap();
}

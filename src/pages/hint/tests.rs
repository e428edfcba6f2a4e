//! Chunks that a cache remembers.

use super::super::{Pages, Provided, Use, Want};
use super::*;
use crate::contract::provider::PageRun;
use crate::pages::Mapping;
use std::vec::Vec;

const LEN: usize = 256 << 10;

#[test]
fn hints_know_each_granule_of_a_chunk_until_it_leaves() {
    let pages = std::boxed::Box::new(Pages::<1>::new());
    let run = PageRun::new(LEN, 4096, 4096).unwrap();
    // SAFETY: the run's length is not 0.
    let memory = NonNull::new(unsafe { std::alloc::alloc(run.layout()) }).unwrap();
    let nothing = Want { len: 0, least_len: 0, align: 1, use_: Use::Slab };
    // SAFETY: just allocated, not zeroed; freed when the chunk has left.
    pages.add_chunk(unsafe { Mapping::new(memory, run) }, nothing, 0, Provided::UNKNOWN, &|work| work(true)).unwrap();
    let hints = ChunkHints::new();
    let chunk = pages.lookup(memory).unwrap();
    // SAFETY: inside the run, or just behind the granules.
    let at = |offset: usize| unsafe { memory.add(offset) };
    assert!(pages.desc_near(&hints, memory).is_none(), "nothing known yet");
    assert!(pages.desc_far(&hints, memory).is_some());
    for offset in [0, 1, 1023, 1024, 100_000, chunk.len() - 1] {
        // A chunk across the border of two stretches has two places.
        assert!(pages.desc(&hints, at(offset)).is_some());
        let found = pages.desc_near(&hints, at(offset)).unwrap();
        assert!(core::ptr::eq(found, chunk.desc(offset >> chunk.shift()).unwrap()));
    }
    assert!(pages.desc_near(&hints, at(chunk.len())).is_none());
    assert!(hints.desc(memory, 1).is_none(), "a chunk has left since");
    let gone = pages.take_empty(0).unwrap();
    assert!(pages.desc_near(&hints, memory).is_none(), "it may be this one");
    pages.chunk_gone(gone.offer(|_| Ok(())).unwrap());
    assert!(pages.desc_near(&hints, memory).is_none());
    // SAFETY: allocated above with this layout, and out of the page heap.
    unsafe { std::alloc::dealloc(memory.as_ptr(), run.layout()) };
}

/// Chunks in neighbouring stretches; what they lie in is never freed.
fn neighbours(pages: &Pages<1>, count: usize) -> Vec<NonNull<u8>> {
    every(pages, MIN_STRETCH_LEN, count)
}

/// Chunks so far from each other, from a stretch's start on.
fn every(pages: &Pages<1>, distance: usize, count: usize) -> Vec<NonNull<u8>> {
    let all = PageRun::new(count * distance, MIN_STRETCH_LEN, 4096).unwrap();
    // SAFETY: the run's length is not 0.
    let memory = NonNull::new(unsafe { std::alloc::alloc(all.layout()) }).unwrap();
    let table = PageRun::new(pages.next_table_len(), 4096, 4096).unwrap();
    // SAFETY: the run's length is not 0.
    let memory_of_table = NonNull::new(unsafe { std::alloc::alloc(table.layout()) }).unwrap();
    // SAFETY: just allocated, never freed.
    pages.add_table(unsafe { Mapping::new(memory_of_table, table) }).unwrap();
    let chunk = |index| {
        // SAFETY: inside the memory.
        let start = unsafe { memory.add(index * distance) };
        let run = PageRun::new(LEN, 4096, 4096).unwrap();
        let nothing = Want { len: 0, least_len: 0, align: 1, use_: Use::Slab };
        // SAFETY: just allocated, not zeroed, apart from all others.
        pages
            .add_chunk(unsafe { Mapping::new(start, run) }, nothing, 0, Provided::UNKNOWN, &|work| work(true))
            .unwrap();
        start
    };
    (0..count).map(chunk).collect()
}

fn known_count(pages: &Pages<1>, hints: &ChunkHints, chunks: &[NonNull<u8>]) -> usize {
    chunks.iter().filter(|chunk| pages.desc_near(hints, **chunk).is_some_and(|desc| desc.index() == 0)).count()
}

#[test]
fn two_chunks_are_known_for_each_place() {
    let pages = std::boxed::Box::new(Pages::<1>::new());
    let chunks = neighbours(&pages, 2 * COUNT + 1);
    let hints = ChunkHints::new();
    assert!(chunks.iter().all(|chunk| pages.desc(&hints, *chunk).is_some()));
    assert_eq!(known_count(&pages, &hints, &chunks), 2 * COUNT, "the last one took a place from another");
}

/// In whatever order they are met, and also when a chunk is met that is known.
#[test]
fn neighbours_in_one_stretch_both_keep_their_place() {
    let pages = std::boxed::Box::new(Pages::<1>::new());
    let chunks = every(&pages, MIN_STRETCH_LEN / 2, 2 * COUNT);
    let (upwards, downwards) = (ChunkHints::new(), ChunkHints::new());
    chunks.iter().for_each(|chunk| assert!(pages.desc_far(&upwards, *chunk).is_some()));
    chunks.iter().rev().for_each(|chunk| assert!(pages.desc_far(&downwards, *chunk).is_some()));
    for hints in [&upwards, &downwards] {
        assert_eq!(known_count(&pages, hints, &chunks), 2 * COUNT);
        chunks.iter().for_each(|chunk| assert!(pages.desc_far(hints, *chunk).is_some()));
        assert_eq!(known_count(&pages, hints, &chunks), 2 * COUNT, "known before");
    }
}

/// The upper one of two chunks leaves, and a longer one comes to where both were.
#[test]
fn a_chunk_is_known_that_lies_where_older_ones_were() {
    let pages = std::boxed::Box::new(Pages::<1>::new());
    let chunks = every(&pages, MIN_STRETCH_LEN / 2, 2);
    let hints = ChunkHints::new();
    assert!(chunks.iter().all(|chunk| pages.desc(&hints, *chunk).is_some()));
    for _ in 0..2 {
        let gone = pages.take_empty(0).unwrap();
        pages.chunk_gone(gone.offer(|_| Ok(())).unwrap());
    }
    let run = PageRun::new(MIN_STRETCH_LEN, 4096, 4096).unwrap();
    let nothing = Want { len: 0, least_len: 0, align: 1, use_: Use::Slab };
    // SAFETY: all of what the two chunks lay in, which have left.
    pages
        .add_chunk(unsafe { Mapping::new(chunks[0], run) }, nothing, 0, Provided::UNKNOWN, &|work| work(true))
        .unwrap();
    for place in chunks {
        assert!(pages.desc(&hints, place).is_some() && pages.desc_near(&hints, place).is_some());
    }
}

/// What was known before a chunk left is not believed again when a hint is written after that.
#[test]
fn a_new_hint_does_not_revive_older_ones() {
    let pages = std::boxed::Box::new(Pages::<1>::new());
    let chunks = neighbours(&pages, 2);
    let hints = ChunkHints::new();
    assert!(chunks.iter().all(|chunk| pages.desc(&hints, *chunk).is_some()));
    let (gone, mut left) = (pages.take_empty(0).unwrap(), chunks[0]);
    let gone = gone.offer(|memory| {
        left = memory.start();
        Ok(())
    });
    let stays = chunks[usize::from(left == chunks[0])];
    assert!(pages.desc(&hints, stays).is_some() && pages.desc_near(&hints, stays).is_some());
    assert!(pages.desc_near(&hints, left).is_none());
    pages.chunk_gone(gone.unwrap());
}

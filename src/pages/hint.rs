//! The chunks that blocks were last found in, kept by each cache: a fast path's way to a block's descriptor.
//!
//! Tiny blocks are asked for their slab's owner at each free, long ones for their kind. Chunks are few and long, so a
//! handful of places, chosen by the address, nearly always know the right one, and the way is a few loads and
//! comparisons. Price: a chunk that left must not be trusted; [`Pages`](super::Pages) counts removals, and hints of
//! another count are void. Whoever frees a block of a newer chunk in the same place got that block after the older
//! one's removal was counted, so it sees the count.
//!
//! *Which place is an address's* follows the heap's length: the places share it out in stretches, neighbouring ones in
//! places of their own. A chunk longer than a stretch is in several places. A place has room for two chunks, of which
//! the upper one is asked first: providers that leave gaps between runs (guard pages) make chunks drift over the
//! stretches' borders, so that most stretches see two. Where they see more, short ones, these take the room from each
//! other.

#![expect(unsafe_code, reason = "descriptors by their address")]

use core::ptr::{NonNull, null_mut};

use super::chunk::Chunk;
use super::desc::PageDesc;
use crate::base::sync::{AtomicPtr, AtomicU32, AtomicUsize, Ordering::Relaxed};

/// Places; a power of two. More where every free looks.
const COUNT: usize = if cfg!(feature = "hardened") { 64 } else { 16 };

/// No stretch is shorter than this: most chunks are as long.
const MIN_STRETCH_LEN: usize = 1 << 20;

/// All zero is valid: it matches nothing.
#[derive(Debug)]
pub(crate) struct ChunkHints {
    /// An address's place is the address over two to the power of this, modulo [`COUNT`].
    shift: AtomicU32,
    /// Removals when the hints were written.
    removals: AtomicUsize,
    places: [Place; COUNT],
}

/// A lower chunk and an upper one, which is the first to become known.
#[derive(Debug)]
struct Place([ChunkHint; 2]);

#[derive(Debug)]
struct ChunkHint {
    start: AtomicUsize,
    table: AtomicPtr<PageDesc>,
    /// Granules, and the shift of one's length. None: nothing is known.
    count: AtomicU32,
    shift: AtomicU32,
}

impl ChunkHint {
    const fn new() -> Self {
        Self {
            start: AtomicUsize::new(0),
            table: AtomicPtr::new(null_mut()),
            count: AtomicU32::new(0),
            shift: AtomicU32::new(0),
        }
    }

    /// The granule that `addr` lies in, if the chunk has it: this hint, the bytes from the chunk's start on, and the
    /// granule's index.
    #[inline]
    fn index(&self, addr: NonNull<u8>) -> Option<(&Self, usize, usize)> {
        let offset = addr.as_ptr().addr().wrapping_sub(self.start.load(Relaxed));
        let index = offset >> (self.shift.load(Relaxed) & 63);
        (index < self.count.load(Relaxed) as usize).then_some((self, offset, index))
    }

    fn know(&self, chunk: &Chunk) {
        self.start.store(chunk.addr(), Relaxed);
        self.table.store(chunk.table().as_ptr(), Relaxed);
        self.shift.store(chunk.shift(), Relaxed);
        self.count.store(u32::try_from(chunk.count()).unwrap_or(0), Relaxed);
    }

    fn copy(&self, other: &Self) {
        self.start.store(other.start.load(Relaxed), Relaxed);
        self.table.store(other.table.load(Relaxed), Relaxed);
        self.shift.store(other.shift.load(Relaxed), Relaxed);
        self.count.store(other.count.load(Relaxed), Relaxed);
    }
}

impl Place {
    const fn new() -> Self {
        Self([const { ChunkHint::new() }; 2])
    }

    /// Remembers a chunk, and of the others the one that is nearer to the top.
    fn know(&self, chunk: &Chunk) {
        let Self([lower, upper]) = self;
        let side = chunk.addr().cmp(&upper.start.load(Relaxed));
        if side.is_gt() {
            lower.copy(upper);
        }
        if side.is_lt() { lower.know(chunk) } else { upper.know(chunk) }
    }
}

impl ChunkHints {
    pub(crate) const fn new() -> Self {
        Self { shift: AtomicU32::new(0), removals: AtomicUsize::new(0), places: [const { Place::new() }; COUNT] }
    }

    #[inline]
    #[expect(clippy::indexing_slicing, reason = "taken modulo the length")]
    fn place_of(&self, addr: usize) -> &Place {
        &self.places[addr >> (self.shift.load(Relaxed) & 63) & (COUNT - 1)]
    }

    /// The descriptor of the granule that `addr`, an address in a live block, lies in, if the hints know. The caller
    /// holds the cache that they are part of. Fast.
    #[inline]
    pub(crate) fn desc(&self, addr: NonNull<u8>, removals: usize) -> Option<&PageDesc> {
        self.place(addr, removals).map(|(desc, ..)| desc)
    }

    /// The same with the bytes from the chunk's start to `addr`, and the granule's shift.
    #[inline]
    fn place(&self, addr: NonNull<u8>, removals: usize) -> Option<(&PageDesc, usize, u32)> {
        let Place([lower, upper]) = self.place_of(addr.as_ptr().addr());
        let (hint, offset, index) = upper.index(addr).or_else(|| lower.index(addr))?;
        if self.removals.load(Relaxed) != removals {
            return None;
        }
        // SAFETY: a hint of a chunk with granules was set, to a table's address.
        let table = unsafe { NonNull::new_unchecked(hint.table.load(Relaxed)) };
        // SAFETY: the index is that of a granule of the chunk that `table` belongs to, which has a descriptor for each.
        let desc = unsafe { table.add(index) };
        // SAFETY: no chunk has left since the hint was written, so this one is still there; descriptors are shared by
        // reference only.
        Some((unsafe { desc.as_ref() }, offset, hint.shift.load(Relaxed) & 63))
    }

    /// As [`desc`](Self::desc), and how many bytes into its slab `addr` is, if that granule is one of a slab. Fast.
    #[cfg(feature = "hardened")]
    #[inline]
    pub(crate) fn in_slab(&self, addr: NonNull<u8>, removals: usize) -> Option<(&PageDesc, usize)> {
        let (desc, offset, shift) = self.place(addr, removals)?;
        let first = (offset >> shift).wrapping_sub(desc.distance());
        Some((desc, offset.wrapping_sub(first << shift)))
    }

    /// Remembers the chunk that `addr` is in, of a heap of `held_len` bytes. `removals` was read before the chunk was
    /// looked up.
    pub(crate) fn set(&self, chunk: &Chunk, addr: NonNull<u8>, removals: usize, held_len: usize) {
        if self.removals.load(Relaxed) != removals {
            self.places.iter().flat_map(|Place(hints)| hints).for_each(|hint| hint.count.store(0, Relaxed));
            self.removals.store(removals, Relaxed);
        }
        let stretch_len = (held_len / COUNT).max(MIN_STRETCH_LEN).next_power_of_two();
        self.shift.store(stretch_len.trailing_zeros(), Relaxed);
        self.place_of(addr.as_ptr().addr()).know(chunk);
    }
}

#[cfg(test)]
mod tests {
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
        pages
            .add_chunk(unsafe { Mapping::new(memory, run) }, nothing, 0, Provided::UNKNOWN, &|work| work(true))
            .unwrap();
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
}

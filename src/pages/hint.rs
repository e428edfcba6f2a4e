//! The chunks that blocks were last found in, kept by each cache: a fast path's way to a block's descriptor.
//!
//! Tiny blocks are asked for their slab's home at each free, long ones for their kind. Chunks are few and long, so a handful of places, chosen by the
//! address, nearly always know the right one, and the way is a few loads and comparisons. Price: a chunk that left must not be trusted; [`Pages`](super::Pages) counts
//! removals, and hints of another count are void. Whoever frees a block of a newer chunk in the same place got that
//! block after the older one's removal was counted, so it sees the count.
//!
//! *Which place is an address's* follows the heap's length: the places share it out in stretches, neighbouring ones in places of their own. A chunk longer
//! than a stretch is in several places, short ones in one stretch take the place from each other.

use core::ptr::{NonNull, null_mut};

use super::chunk::Chunk;
use super::desc::PageDesc;
use crate::sync::{AtomicPtr, AtomicU32, AtomicUsize, Ordering::Relaxed};

/// Places; a power of two. More where every free looks.
const COUNT: usize = if cfg!(feature = "hardened") { 64 } else { 32 };

/// No stretch is shorter than this: most chunks are as long.
const MIN_STRETCH_LEN: usize = 1 << 20;

/// All zero is valid: it matches nothing.
#[derive(Debug)]
pub(crate) struct ChunkHints {
    /// An address's place is the address over two to the power of this, modulo [`COUNT`].
    shift: AtomicU32,
    /// Removals when the hints were written.
    removals: AtomicUsize,
    hints: [ChunkHint; COUNT],
}

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
}

impl ChunkHints {
    pub(crate) const fn new() -> Self {
        Self { shift: AtomicU32::new(0), removals: AtomicUsize::new(0), hints: [const { ChunkHint::new() }; COUNT] }
    }

    #[inline]
    #[expect(clippy::indexing_slicing, reason = "taken modulo the length")]
    fn at(&self, addr: usize) -> &ChunkHint {
        &self.hints[addr >> (self.shift.load(Relaxed) & 63) & (COUNT - 1)]
    }

    /// The descriptor of the granule that `addr`, an address in a live block, lies in, if the hints know. The caller holds the cache
    /// that they are part of. Fast.
    #[inline]
    pub(crate) fn desc(&self, addr: NonNull<u8>, removals: usize) -> Option<&PageDesc> {
        self.place(addr, removals).map(|(desc, ..)| desc)
    }

    /// The same with the bytes from the chunk's start to `addr`, and the granule's shift.
    #[inline]
    fn place(&self, addr: NonNull<u8>, removals: usize) -> Option<(&PageDesc, usize, u32)> {
        let hint = self.at(addr.as_ptr().addr());
        let offset = addr.as_ptr().addr().wrapping_sub(hint.start.load(Relaxed));
        let shift = hint.shift.load(Relaxed) & 63;
        let index = offset >> shift;
        if index >= hint.count.load(Relaxed) as usize || self.removals.load(Relaxed) != removals {
            return None;
        }
        // SAFETY: a hint of a chunk with granules was set, to a table's address.
        let table = unsafe { NonNull::new_unchecked(hint.table.load(Relaxed)) };
        // SAFETY: the index is that of a granule of the chunk that `table` belongs to, which has a descriptor for each.
        let desc = unsafe { table.add(index) };
        // SAFETY: no chunk has left since the hint was written, so this one is still there; descriptors are shared by reference only.
        Some((unsafe { desc.as_ref() }, offset, shift))
    }

    /// As [`desc`](Self::desc), and how many bytes into its slab `addr` is, if that granule is one of a slab. Fast.
    #[cfg(feature = "hardened")]
    #[inline]
    pub(crate) fn in_slab(&self, addr: NonNull<u8>, removals: usize) -> Option<(&PageDesc, usize)> {
        let (desc, offset, shift) = self.place(addr, removals)?;
        let first = (offset >> shift).wrapping_sub(desc.distance());
        Some((desc, offset.wrapping_sub(first << shift)))
    }

    /// Remembers the chunk that `addr` is in, of a heap of `held_len` bytes. `removals` was read before the chunk was looked up.
    pub(crate) fn set(&self, chunk: &Chunk, addr: NonNull<u8>, removals: usize, held_len: usize) {
        if self.removals.load(Relaxed) != removals {
            self.hints.iter().for_each(|hint| hint.count.store(0, Relaxed));
            self.removals.store(removals, Relaxed);
        }
        let stretch_len = (held_len / COUNT).max(MIN_STRETCH_LEN).next_power_of_two();
        self.shift.store(stretch_len.trailing_zeros(), Relaxed);
        let hint = self.at(addr.as_ptr().addr());
        hint.start.store(chunk.addr(), Relaxed);
        hint.table.store(chunk.table().as_ptr(), Relaxed);
        hint.shift.store(chunk.shift(), Relaxed);
        hint.count.store(u32::try_from(chunk.count()).unwrap_or(0), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Pages, Use, Want};
    use super::*;
    use crate::provider::PageRun;
    use std::vec::Vec;

    const LEN: usize = 256 << 10;

    #[test]
    fn hints_know_every_granule_of_a_chunk_and_none_of_one_that_left() {
        let pages = std::boxed::Box::new(Pages::<1>::new());
        let run = PageRun::new(LEN, 4096, 4096).unwrap();
        // SAFETY: the run's length is not 0.
        let memory = NonNull::new(unsafe { std::alloc::alloc(run.layout()) }).unwrap();
        let nothing = Want { len: 0, least_len: 0, align: 1, use_: Use::Slab };
        // SAFETY: just allocated, not zeroed; freed when the chunk has left.
        unsafe { pages.add_chunk(memory, run, nothing, 0, false, &|work| work(true)) }.unwrap();
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
            assert_eq!(found.index(), offset >> chunk.shift());
        }
        assert!(pages.desc_near(&hints, at(chunk.len())).is_none());
        assert!(hints.desc(memory, 1).is_none(), "a chunk has left since");
        let gone = pages.take_empty(0).unwrap();
        assert!(pages.desc_near(&hints, memory).is_none(), "it may be this one");
        pages.chunk_gone(gone);
        assert!(pages.desc_near(&hints, memory).is_none());
        // SAFETY: allocated above with this layout, and out of the page heap.
        unsafe { std::alloc::dealloc(memory.as_ptr(), run.layout()) };
    }

    /// Chunks in neighbouring stretches; what they lie in is never freed.
    fn neighbours(pages: &Pages<1>, count: usize) -> Vec<NonNull<u8>> {
        let all = PageRun::new(count * MIN_STRETCH_LEN, MIN_STRETCH_LEN, 4096).unwrap();
        // SAFETY: the run's length is not 0.
        let memory = NonNull::new(unsafe { std::alloc::alloc(all.layout()) }).unwrap();
        let chunk = |index| {
            // SAFETY: inside the memory.
            let start = unsafe { memory.add(index * MIN_STRETCH_LEN) };
            let run = PageRun::new(LEN, 4096, 4096).unwrap();
            let nothing = Want { len: 0, least_len: 0, align: 1, use_: Use::Slab };
            // SAFETY: just allocated, not zeroed, apart from all others.
            unsafe { pages.add_chunk(start, run, nothing, 0, false, &|work| work(true)) }.unwrap();
            start
        };
        (0..count).map(chunk).collect()
    }

    #[test]
    fn as_many_chunks_are_known_as_there_are_places() {
        let pages = std::boxed::Box::new(Pages::<1>::new());
        let chunks = neighbours(&pages, COUNT + 1);
        let hints = ChunkHints::new();
        assert!(chunks.iter().all(|chunk| pages.desc(&hints, *chunk).is_some()));
        let known = chunks.iter().filter(|chunk| pages.desc_near(&hints, **chunk).is_some()).count();
        assert_eq!(known, COUNT, "the last one took the first one's place");
    }

    /// What was known before a chunk left is not believed again when a hint is written after that.
    #[test]
    fn a_new_hint_does_not_revive_older_ones() {
        let pages = std::boxed::Box::new(Pages::<1>::new());
        let chunks = neighbours(&pages, 2);
        let hints = ChunkHints::new();
        assert!(chunks.iter().all(|chunk| pages.desc(&hints, *chunk).is_some()));
        let gone = pages.take_empty(0).unwrap();
        let [one, other] = [0, 1].map(|index| chunks[index]);
        let (left, stays) = if gone.start == one { (one, other) } else { (other, one) };
        assert!(pages.desc(&hints, stays).is_some() && pages.desc_near(&hints, stays).is_some());
        assert!(pages.desc_near(&hints, left).is_none());
        pages.chunk_gone(gone);
    }
}

//! The chunk that tiny blocks were last found in, kept by each cache: a fast path's way to a block's descriptor.
//!
//! Tiny blocks are asked for their slab's home at each free. With few, long chunks the last one is nearly always the right one, and
//! the way is a subtraction, two comparisons and a load. Price: a chunk that left must not be trusted; [`Pages`](super::Pages) counts
//! removals, and a hint of another count is void. Whoever frees a block of a newer chunk in the same place got that
//! block after the older one's removal was counted, so it sees the count.

use core::ptr::{NonNull, null_mut};

use super::chunk::Chunk;
use super::desc::PageDesc;
use crate::sync::{AtomicPtr, AtomicU32, AtomicUsize, Ordering::Relaxed};

/// All zero is valid: it matches nothing.
#[derive(Debug)]
pub(crate) struct ChunkHint {
    start: AtomicUsize,
    len: AtomicUsize,
    table: AtomicPtr<PageDesc>,
    shift: AtomicU32,
    removals: AtomicUsize,
}

impl ChunkHint {
    pub(crate) const fn new() -> Self {
        Self {
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            table: AtomicPtr::new(null_mut()),
            shift: AtomicU32::new(0),
            removals: AtomicUsize::new(0),
        }
    }

    /// The descriptor of the granule that `addr`, an address in a live block, lies in, if the hint knows. The caller holds the cache
    /// that the hint is part of. Fast.
    #[inline]
    pub(crate) fn desc(&self, addr: NonNull<u8>, removals: usize) -> Option<&PageDesc> {
        let offset = addr.as_ptr().addr().wrapping_sub(self.start.load(Relaxed));
        if offset >= self.len.load(Relaxed) || self.removals.load(Relaxed) != removals {
            return None;
        }
        let index = offset >> (self.shift.load(Relaxed) & 63);
        // SAFETY: a hint that matches has a length above 0, so it was set, to a table's address.
        let table = unsafe { NonNull::new_unchecked(self.table.load(Relaxed)) };
        // SAFETY: `index` is that of a granule of the chunk that `table` belongs to, which has a descriptor for each.
        let desc = unsafe { table.add(index) };
        // SAFETY: no chunk has left since the hint was written, so this one is still there; descriptors are shared by reference only.
        Some(unsafe { desc.as_ref() })
    }

    /// The same, and how many bytes into its slab `addr` is, if that granule is one of a slab. Fast.
    #[cfg(feature = "hardened")]
    #[inline]
    pub(crate) fn place(&self, addr: NonNull<u8>, removals: usize) -> Option<(&PageDesc, usize)> {
        let desc = self.desc(addr, removals)?;
        let shift = self.shift.load(Relaxed) & 63;
        let offset = addr.as_ptr().addr().wrapping_sub(self.start.load(Relaxed));
        let first = (offset >> shift).wrapping_sub(desc.distance());
        Some((desc, offset.wrapping_sub(first << shift)))
    }

    /// Remembers a chunk. `removals` was read before the chunk was looked up.
    pub(crate) fn set(&self, chunk: &Chunk, removals: usize) {
        self.start.store(chunk.addr(), Relaxed);
        self.len.store(chunk.len(), Relaxed);
        self.table.store(chunk.table().as_ptr(), Relaxed);
        self.shift.store(chunk.shift(), Relaxed);
        self.removals.store(removals, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Pages, Use, Want};
    use super::*;
    use crate::provider::PageRun;

    const LEN: usize = 256 << 10;

    #[test]
    fn a_hint_knows_every_granule_of_its_chunk_and_none_of_one_that_left() {
        let pages = std::boxed::Box::new(Pages::<1>::new());
        let run = PageRun::new(LEN, 4096, 4096).unwrap();
        // SAFETY: the run's length is not 0.
        let memory = NonNull::new(unsafe { std::alloc::alloc(run.layout()) }).unwrap();
        let nothing = Want { len: 0, least_len: 0, align: 1, use_: Use::Slab };
        // SAFETY: just allocated, not zeroed; freed when the chunk has left.
        unsafe { pages.add_chunk(memory, run, nothing, 0, false, &|work| work(true)) }.unwrap();
        let hint = ChunkHint::new();
        let chunk = pages.lookup(memory).unwrap();
        // SAFETY: inside the run, or just behind the granules.
        let at = |offset: usize| unsafe { memory.add(offset) };
        assert!(pages.desc_near(&hint, memory).is_none(), "nothing known yet");
        assert!(pages.desc_far(&hint, memory).is_some());
        for offset in [0, 1, 1023, 1024, 100_000, chunk.len() - 1] {
            let found = pages.desc_near(&hint, at(offset)).unwrap();
            assert_eq!(found.index(), offset >> chunk.shift());
        }
        assert!(pages.desc_near(&hint, at(chunk.len())).is_none());
        assert!(hint.desc(memory, 1).is_none(), "a chunk has left since");
        let gone = pages.take_empty(0).unwrap();
        assert!(pages.desc_near(&hint, memory).is_none(), "it may be this one");
        pages.chunk_gone(gone);
        assert!(pages.desc_near(&hint, memory).is_none());
        // SAFETY: allocated above with this layout, and out of the page heap.
        unsafe { std::alloc::dealloc(memory.as_ptr(), run.layout()) };
    }
}

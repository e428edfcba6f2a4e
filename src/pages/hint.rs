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
mod tests;

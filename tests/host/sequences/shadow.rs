//! The shadow heap: what must be true of every block that is out.
//!
//! A fixed table, so that a context that comes into the middle of an operation may use it without allocating from the
//! host. Each block's bytes, as many as may be used, hold a pattern of its own and are read again before the block
//! changes or goes: two blocks that overlap, or one that is shorter than it said, cannot pass. Overlaps are looked for
//! directly as well.

use std::alloc::Layout;
use std::cell::Cell;
use std::ptr::NonNull;

/// Blocks in use at most.
const SLOTS: usize = 128;

/// A block in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) start: NonNull<u8>,
    pub(crate) layout: Layout,
    /// Bytes that may be used.
    pub(crate) len: usize,
    seed: u64,
}

impl Block {
    /// The same block at another place.
    pub(crate) fn at(self, start: NonNull<u8>) -> Self {
        Self { start, ..self }
    }

    fn bytes(&self) -> NonNull<[u8]> {
        NonNull::slice_from_raw_parts(self.start, self.len)
    }

    /// The number that belongs at the `index`-th multiple of 8, its first bytes if the block ends there.
    fn word(&self, index: usize) -> u64 {
        (self.seed ^ index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Writes the pattern.
    pub(crate) fn fill(&self) {
        // SAFETY: the block is in use, that long, and this table's alone.
        let bytes = unsafe { self.bytes().as_mut() };
        for (index, chunk) in bytes.chunks_mut(8).enumerate() {
            let word = self.word(index).to_le_bytes();
            match <&mut [u8; 8]>::try_from(&mut *chunk) {
                Ok(chunk) => *chunk = word,
                Err(_) => chunk.copy_from_slice(&word[..chunk.len()]),
            }
        }
    }

    /// Reads the pattern again, in the first `len` bytes.
    pub(crate) fn check(&self, len: usize) -> Result<(), String> {
        // SAFETY: the block is in use, that long, and written by `fill`.
        let bytes = unsafe { self.bytes().as_ref() };
        // Whole numbers are compared as such: most of the time of long runs is spent here.
        let is_wrong = |(index, chunk): &(usize, &[u8])| match <[u8; 8]>::try_from(*chunk) {
            Ok(chunk) => u64::from_le_bytes(chunk) != self.word(*index),
            Err(_) => *chunk != &self.word(*index).to_le_bytes()[..chunk.len()],
        };
        bytes[..len].chunks(8).enumerate().find(is_wrong).map_or(Ok(()), |(index, _)| {
            Err(format!("bytes from {} on of {self:?} are not what was written", index * 8))
        })
    }

    /// Reads zeros, in the first `layout.size()` bytes.
    pub(crate) fn check_zero(&self) -> Result<(), String> {
        // SAFETY: the block is in use and that long, and `alloc_zeroed` has written so many of its bytes.
        let bytes = unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) };
        bytes.iter().all(|byte| *byte == 0).then_some(()).ok_or_else(|| format!("{self:?} is not zero"))
    }

    fn overlaps(&self, other: &Self) -> bool {
        let (own, its) = (self.start.addr().get(), other.start.addr().get());
        own < its + other.len && its < own + self.len
    }
}

/// Every block in use.
pub(crate) struct Shadow {
    slots: Box<[Cell<Option<Block>>]>,
    seed: Cell<u64>,
}

impl Shadow {
    pub(crate) fn new() -> Self {
        Self { slots: (0..SLOTS).map(|_| Cell::new(None)).collect(), seed: Cell::new(1) }
    }

    /// Checks where a block is, against what was asked and against all others.
    pub(crate) fn admit(&self, start: NonNull<u8>, len: usize, layout: Layout) -> Result<Block, String> {
        self.seed.set(self.seed.get() + 1);
        let block = Block { start, layout, len, seed: self.seed.get() << 32 };
        if start.addr().get() % layout.align() != 0 || len < layout.size() {
            return Err(format!("{block:?} is misplaced or too short"));
        }
        match self.blocks().find(|other| block.overlaps(other)) {
            Some(other) => Err(format!("{block:?} overlaps {other:?}")),
            None => Ok(block),
        }
    }

    /// Keeps a block; gives it back if the table is full.
    pub(crate) fn keep(&self, block: Block) -> Option<Block> {
        match self.slots.iter().find(|slot| slot.get().is_none()) {
            Some(slot) => slot.replace(Some(block)),
            None => Some(block),
        }
    }

    /// Takes the next block from the `from`-th slot on.
    pub(crate) fn take(&self, from: usize) -> Option<Block> {
        (0..SLOTS).find_map(|step| self.slots[(from + step) % SLOTS].take())
    }

    pub(crate) fn blocks(&self) -> impl Iterator<Item = Block> {
        self.slots.iter().filter_map(Cell::get)
    }
}

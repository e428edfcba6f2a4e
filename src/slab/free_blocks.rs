//! Which blocks of a slab are free, as bits: what a free list is turned into to see neighbours.
//!
//! A free list tells nothing about who lies beside whom, and to keep that in order would cost every free. So the whole
//! list of one slab is taken out and marked here when neighbours are wanted, with no lock held: the blocks are the
//! taker's. Price: a walk over the list; slabs of more blocks than there are bits cannot be looked at, which is one
//! reason why slabs do not have more.

#![expect(unsafe_code, reason = "blocks by their place in a slab")]

use core::ops::Range;
use core::ptr::{NonNull, null_mut};

use crate::base::size_class::SizeClass;
use crate::harden::Key;
use crate::slab::block::{Block, Chain, List, set_next};

const WORDS: usize = 4;

/// Free blocks of one slab, owned.
#[must_use = "dropped blocks are leaked"]
#[derive(Debug)]
pub(crate) struct Places {
    /// Where the slab's first block is.
    start: NonNull<u8>,
    class: SizeClass,
    /// What the links of its blocks are written under.
    key: Key,
    free: [u64; WORDS],
    /// Places before this one were searched.
    next: usize,
}

impl Places {
    /// The most blocks that a slab may have.
    pub(crate) const MOST: usize = WORDS * 64;

    /// The places of a list's blocks.
    ///
    /// # Safety
    /// From `start` on lies a slab of at most [`MOST`](Self::MOST) blocks of `class`, and every block of the list is
    /// one of them.
    pub(crate) unsafe fn of(start: NonNull<u8>, class: SizeClass, mut list: List) -> Self {
        let mut places = Self { start, class, key: list.key(), free: [0; WORDS], next: 0 };
        while let Some(block) = list.pop() {
            let offset = block.into_start().addr().get().wrapping_sub(start.addr().get());
            let place = offset / class.block_len();
            if let Some(word) = places.free.get_mut(place / 64) {
                *word |= 1 << (place % 64);
            }
        }
        places
    }

    /// The next `len` bytes (not 0) from a multiple of `align` on that lie in free blocks only, as one block: with it
    /// go all blocks that it touches. Gives how many those are too.
    pub(crate) fn join(&mut self, len: usize, align: usize) -> Option<(Block, u32)> {
        while self.next < Self::MOST {
            let skip = self.addr(self.next).wrapping_neg() & (align - 1);
            let offset = self.next * self.class.block_len() + skip;
            let touched = touched(offset, len, self.class);
            if touched.end > Self::MOST {
                break;
            }
            self.next = touched.end;
            // From behind: who is in the way there is in the way of the next ones too.
            match touched.clone().rev().find(|place| !self.has(*place)) {
                Some(blocked) => self.next = blocked + 1,
                None => {
                    touched.clone().for_each(|place| self.clear(place));
                    return Some((self.block(offset), u32::try_from(touched.len()).unwrap_or(0)));
                }
            }
        }
        self.next = Self::MOST;
        None
    }

    /// What was not joined, as it came: block by block.
    pub(crate) fn into_chain(mut self) -> Option<Chain> {
        let mut chain = Chain::new(self.pop()?);
        while let Some(block) = self.pop() {
            chain.push(block);
        }
        Some(chain)
    }

    fn pop(&mut self) -> Option<Block> {
        let (index, word) = self.free.iter().enumerate().find(|(_, word)| **word != 0)?;
        let place = index * 64 + word.trailing_zeros() as usize;
        self.clear(place);
        Some(self.block(place * self.class.block_len()))
    }

    /// How many in the range are free.
    pub(crate) fn count_in(&self, places: Range<usize>) -> usize {
        places.filter(|place| self.has(*place)).count()
    }

    /// Takes those that are in the range out, which are lost: what begins so many bytes behind the slab's start is no
    /// part of it any more. Gives how many there were. One that begins in front of that looks free from then on, so
    /// that who frees it again is noticed as before.
    pub(crate) fn lose(&mut self, places: Range<usize>, gone: usize) -> usize {
        let count = self.count_in(places.clone());
        if self.has(places.start) && places.start * self.class.block_len() < gone {
            let start = self.block(places.start * self.class.block_len()).into_start();
            // SAFETY: a block that was free, which these places own, and its first bytes are still the slab's.
            unsafe { set_next(start, null_mut(), self.key) };
        }
        places.for_each(|place| self.clear(place));
        count
    }

    /// Whether that place is free.
    pub(crate) fn has(&self, place: usize) -> bool {
        self.free.get(place / 64).is_some_and(|word| word >> (place % 64) & 1 != 0)
    }

    fn clear(&mut self, place: usize) {
        if let Some(word) = self.free.get_mut(place / 64) {
            *word &= !(1 << (place % 64));
        }
    }

    fn addr(&self, place: usize) -> usize {
        self.start.addr().get() + place * self.class.block_len()
    }

    /// The block that begins so many bytes from the slab's start, in places that were free and were just cleared.
    fn block(&self, offset: usize) -> Block {
        // SAFETY: only places of blocks of the list were ever set (`of`), so the offset is inside the slab.
        let start = unsafe { self.start.add(offset) };
        // SAFETY: the list owned the blocks, `of` took them over, and a place that was cleared is given out no more.
        unsafe { Block::unlinked(start, self.key) }
    }
}

/// The blocks of a class that `len` bytes (not 0) touch, which begin `offset` bytes from the first block on.
pub(crate) fn touched(offset: usize, len: usize, class: SizeClass) -> Range<usize> {
    offset / class.block_len()..(offset + len).div_ceil(class.block_len())
}

/// The `count` blocks of a class that a joined one is again, the first of which begins `skip` bytes in front of it.
///
/// # Safety
/// They are those that the block touches; it was joined out of them, or is the one.
pub(crate) unsafe fn cut(block: Block, skip: usize, class: SizeClass, count: u32, key: Key) -> Chain {
    if count == 1 && skip == 0 {
        return Chain::new(block);
    }
    // SAFETY: by the contract the first of them begins there, in the same slab.
    let first = unsafe { block.into_start().sub(skip) };
    // SAFETY: by the contract they are the caller's, side by side within one slab and so one run; blocks are multiples
    // of 8 long, at multiples of 8.
    unsafe { Chain::carve(first, class.block_len(), count, key) }
}

#[cfg(test)]
mod tests;

//! Which blocks of a slab are free, as bits: what a free list is turned into to see neighbours.
//!
//! A free list tells nothing about who lies beside whom, and to keep that in order would cost every free. So the whole
//! list of one slab is taken out and marked here when neighbours are wanted, with no lock held: the blocks are the
//! taker's. Price: a walk over the list; slabs of more blocks than there are bits cannot be looked at, which is one
//! reason why slabs do not have more.

#![expect(unsafe_code, reason = "blocks by their place in a slab")]

use core::ops::Range;
use core::ptr::NonNull;

use crate::base::size_class::SizeClass;
use crate::harden::Key;
use crate::slab::block::{Block, Chain, List};

const WORDS: usize = 4;

/// Free blocks of one slab, owned.
#[must_use = "dropped blocks are leaked"]
#[derive(Debug)]
pub(crate) struct Places {
    /// Where the slab's first block is.
    start: NonNull<u8>,
    class: SizeClass,
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
        let mut places = Self { start, class, free: [0; WORDS], next: 0 };
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
            match touched.clone().rev().find(|place| !self.is_free(*place)) {
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

    fn is_free(&self, place: usize) -> bool {
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
        unsafe { Block::new(start) }
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
mod tests {
    use super::*;
    use std::vec::Vec;

    const LEN: usize = 16;

    fn class(size: usize) -> SizeClass {
        SizeClass::of(core::alloc::Layout::from_size_align(size, 8).unwrap()).unwrap()
    }

    /// Memory of that many blocks.
    struct Ground(Vec<u128>);

    impl Ground {
        fn new(count: usize) -> Self {
            Self(std::vec![0; count])
        }

        fn start(&mut self) -> NonNull<u8> {
            NonNull::new(self.0.as_mut_ptr()).unwrap().cast()
        }

        /// The places in that order.
        fn places(&mut self, order: &[usize]) -> Places {
            let start = self.start();
            let mut list = List::new();
            for place in order {
                // SAFETY: inside the memory.
                let block = unsafe { start.add(place * LEN) };
                // SAFETY: each place is given once.
                list.prepend(Chain::new(unsafe { Block::new(block) }));
            }
            // SAFETY: the blocks lie in the memory from `start` on.
            unsafe { Places::of(start, class(LEN), list) }
        }

        fn place(&mut self, block: &Block) -> usize {
            (block.start().addr().get() - self.start().addr().get()) / LEN
        }
    }

    fn rest(ground: &mut Ground, places: Places) -> Vec<usize> {
        let mut list = List::new();
        places.into_chain().into_iter().for_each(|chain| list.prepend(chain));
        let mut rest: Vec<_> = core::iter::from_fn(|| list.pop()).map(|block| ground.place(&block)).collect();
        rest.sort_unstable();
        rest
    }

    #[test]
    fn neighbours_are_found_in_any_order_and_the_rest_is_left() {
        let mut ground = Ground::new(200);
        let mut places = ground.places(&[9, 3, 130, 5, 4, 7, 64, 63, 128, 65, 129]);
        let joined: Vec<_> = core::iter::from_fn(|| places.join(3 * LEN - 7, 1))
            .map(|(block, count)| (ground.place(&block), count))
            .collect();
        assert_eq!(joined, [(3, 3), (63, 3), (128, 3)]);
        assert_eq!(rest(&mut ground, places), [7, 9]);
    }

    #[test]
    fn a_coalesced_block_is_aligned_and_takes_all_it_touches() {
        for align in [32, 64, 256] {
            let mut ground = Ground::new(128);
            let order: Vec<_> = (1..101).collect();
            let mut places = ground.places(&order);
            let (mut taken, mut before) = (0, 0);
            while let Some((block, count)) = places.join(40, align) {
                assert_eq!(block.start().addr().get() % align, 0);
                assert!(ground.place(&block) >= before);
                before = ground.place(&block) + count as usize;
                taken += count as usize;
            }
            assert!(
                taken >= 3 * (100 * LEN / 48_usize.next_multiple_of(align) - 2),
                "{taken} of 100 at multiples of {align}"
            );
            assert_eq!(rest(&mut ground, places).len(), 100 - taken);
        }
    }

    #[test]
    fn what_reaches_beyond_the_last_place_is_not_joined() {
        let mut ground = Ground::new(Places::MOST);
        let mut places = ground.places(&[Places::MOST - 2, Places::MOST - 1]);
        assert!(places.join(3 * LEN, 1).is_none() && places.join(LEN, 1).is_none(), "searched once");
        assert_eq!(rest(&mut ground, places), [Places::MOST - 2, Places::MOST - 1]);
    }

    /// Blocks of 48 bytes, a joined one that begins in the middle of one.
    #[test]
    fn a_joined_block_returns_as_what_it_was() {
        const LONG: usize = 3 * LEN;
        let mut ground = Ground::new(64);
        let start = ground.start();
        let skip = (start.addr().get() + LONG).wrapping_neg() % 128;
        let mut list = List::new();
        for place in 1..16 {
            // SAFETY: inside the memory.
            let block = unsafe { start.add(place * LONG) };
            // SAFETY: each place is given once.
            list.prepend(Chain::new(unsafe { Block::new(block) }));
        }
        // SAFETY: the blocks lie in the memory from `start` on.
        let mut places = unsafe { Places::of(start, class(LONG), list) };
        let (block, count) = places.join(128, 128).unwrap();
        let offset = block.start().addr().get() - start.addr().get();
        assert_eq!(offset, LONG + skip);
        let parts = touched(offset, 128, class(LONG));
        assert_eq!((parts.len(), parts.start), (count as usize, offset / LONG));
        let mut list = List::new();
        // SAFETY: just joined out of these.
        list.prepend(unsafe { cut(block, offset - parts.start * LONG, class(LONG), count, Key::NONE) });
        let owner =
            core::iter::from_fn(|| list.pop()).map(|block| block.into_start().addr().get() - start.addr().get());
        assert!(owner.eq(parts.map(|part| part * LONG)));
        assert_eq!(places.into_chain().map(|chain| chain.count()), Some(15 - count));
    }
}

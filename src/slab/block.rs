//! Blocks that nobody uses: the only code that reads and writes inside them.
//!
//! A free block holds one link, the address of the next free block. Whoever owns a block owns its link; ownership
//! passes by the tokens of this file, [`Chain`] and [`List`], which can be made only out of a block that somebody
//! gave up (an unsafe promise, at `free`) or out of pages that are ours (at a slab's first use). With them, the
//! files above are safe code. Price: a token must be put somewhere; dropping one leaks its blocks, hence `must_use`.

#![expect(unsafe_code, reason = "links of free blocks")]

use core::ptr::{NonNull, null_mut};

use crate::harden::Key;

/// Reads the link of a free block. `None`: somebody has overwritten it.
///
/// # Safety
/// The caller owns the block `block`, or reads a list that nobody takes blocks from meanwhile.
#[inline]
pub(crate) unsafe fn next(block: NonNull<u8>, key: Key) -> Option<*mut u8> {
    // SAFETY: a block is at least 8 bytes long and aligned to 8 (`SizeClass`), initialised by `set_next`, and nobody
    // writes its link while the caller owns it, or while it is in a list from which only the caller takes.
    unsafe { key.read(block) }
}

/// Writes the link of a free block.
///
/// # Safety
/// The caller owns the block `block`.
#[inline]
pub(crate) unsafe fn set_next(block: NonNull<u8>, next: *mut u8, key: Key) {
    // SAFETY: a block is at least 8 bytes long and aligned to 8, and by the contract it is the caller's alone.
    unsafe { key.write(block, next) }
}

/// A free block, owned; with the key of the list it comes from, if it comes from one.
#[must_use = "a dropped block is leaked"]
#[derive(Debug)]
pub(crate) struct Block(NonNull<u8>, Key);

impl Block {
    /// # Safety
    /// `start` is the start of a block of this heap, of a class of at least 8 bytes, that nobody else uses.
    #[inline]
    pub(crate) unsafe fn new(start: NonNull<u8>) -> Self {
        Self(start, Key::NONE)
    }

    /// The first block of a list, taken out; it looks like a link no more.
    ///
    /// # Safety
    /// As for [`new`](Self::new); the list's links are written under `key`.
    #[inline]
    pub(crate) unsafe fn unlinked(start: NonNull<u8>, key: Key) -> Self {
        // SAFETY: by the contract the block is the caller's alone.
        unsafe { key.clear(start) };
        Self(start, key)
    }

    /// Gives the memory away.
    #[inline]
    pub(crate) fn into_start(self) -> NonNull<u8> {
        self.0
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.0
    }
}

/// Free blocks, owned, linked under `key` from `first` to `last`; the link of `last` says nothing.
#[must_use = "dropped blocks are leaked"]
#[derive(Debug)]
pub(crate) struct Chain {
    first: NonNull<u8>,
    last: NonNull<u8>,
    count: u32,
    key: Key,
}

impl Chain {
    #[inline]
    pub(crate) fn new(block: Block) -> Self {
        Self { first: block.0, last: block.0, count: 1, key: block.1 }
    }

    pub(crate) fn first(&self) -> NonNull<u8> {
        self.first
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// # Safety
    /// `first` to `last` are `count` blocks, linked under `key`, that nobody else can reach.
    pub(crate) unsafe fn from_raw(first: NonNull<u8>, last: NonNull<u8>, count: u32, key: Key) -> Self {
        Self { first, last, count, key }
    }

    /// Links `count` blocks of `len` bytes that lie side by side from `start` on.
    ///
    /// # Safety
    /// `count * len` bytes from `start` on are memory of this heap that nobody uses, within one run; `len` and `start`
    /// are multiples of 8; `count` is not 0.
    pub(crate) unsafe fn carve(start: NonNull<u8>, len: usize, count: u32, key: Key) -> Self {
        let mut last = start;
        for _ in 1..count {
            // SAFETY: fewer than `count` steps of `len` bytes stay inside the memory that the contract names.
            let following = unsafe { last.add(len) };
            // SAFETY: the contract gives us that block.
            unsafe { set_next(last, following.as_ptr(), key) };
            last = following;
        }
        Self { first: start, last, count, key }
    }

    /// Puts a block before the first one.
    pub(crate) fn push(&mut self, block: Block) {
        // SAFETY: the token `block` proves that the block is ours.
        unsafe { set_next(block.0, self.first.as_ptr(), self.key) };
        self.first = block.0;
        self.count += 1;
    }

    /// Makes the last block's link point to `next`, in a list of that key.
    pub(crate) fn set_end(&mut self, next: *mut u8, key: Key) {
        // SAFETY: this chain owns its last block.
        unsafe { set_next(self.last, next, key) };
    }
}

/// Free blocks, owned, linked under `key`, the last link null. May be empty.
#[must_use = "dropped blocks are leaked"]
#[derive(Debug)]
pub(crate) struct List {
    head: *mut u8,
    count: u32,
    key: Key,
}

impl List {
    pub(crate) const fn new() -> Self {
        Self { head: null_mut(), count: 0, key: Key::NONE }
    }

    /// # Safety
    /// From `head`, exactly `count` blocks are linked under `key`, the last link is null, and nobody else uses them.
    #[inline]
    pub(crate) unsafe fn from_raw(head: *mut u8, count: u32, key: Key) -> Self {
        Self { head, count, key }
    }

    pub(crate) fn key(&self) -> Key {
        self.key
    }

    /// The first block, if there is one: after [`pop`](Self::pop) said no, the one whose link is damaged.
    #[cfg(feature = "hardened")]
    pub(crate) fn first(&self) -> Option<NonNull<u8>> {
        NonNull::new(self.head)
    }

    /// Gives the blocks away.
    #[inline]
    pub(crate) fn into_raw(self) -> (*mut u8, u32) {
        (self.head, self.count)
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Takes the first block out. `None`: there is none, or its link is damaged and it stays.
    pub(crate) fn pop(&mut self) -> Option<Block> {
        let first = NonNull::new(self.head)?;
        // SAFETY: this list owns its blocks.
        self.head = unsafe { next(first, self.key) }?;
        self.count -= 1;
        // SAFETY: it was this list's, and is out of it.
        Some(unsafe { Block::unlinked(first, self.key) })
    }

    /// [`pop`](Self::pop), but for the last `rest` blocks.
    #[inline]
    pub(crate) fn pop_beyond(&mut self, rest: u32) -> Option<Block> {
        if self.count > rest { self.pop() } else { None }
    }

    /// The same blocks, the last one first; and the first of those that are not among them, behind a damaged link.
    pub(crate) fn reversed(self) -> (Self, Option<NonNull<u8>>) {
        let (mut head, mut count, mut rest) = (null_mut(), 0, self.head);
        while let Some(first) = NonNull::new(rest) {
            // SAFETY: this list owns its blocks.
            let Some(behind) = (unsafe { next(first, self.key) }) else { break };
            // SAFETY: as above.
            unsafe { set_next(first, head, self.key) };
            (head, count, rest) = (first.as_ptr(), count + 1, behind);
        }
        (Self { head, count, key: self.key }, NonNull::new(rest))
    }

    /// Puts a chain before the first block.
    pub(crate) fn prepend(&mut self, mut chain: Chain) {
        self.key = chain.key;
        chain.set_end(self.head, chain.key);
        self.head = chain.first.as_ptr();
        self.count += chain.count;
    }
}

impl Default for List {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads `count` links of a shared list: gives the last of the `count` blocks from `head` on, and the link behind it.
/// `None`: one of them is damaged.
///
/// # Safety
/// `head` heads a list under `key` of at least `count` blocks, `count` is not 0, and nobody but the caller takes blocks
/// from it meanwhile.
pub(crate) unsafe fn peek(head: NonNull<u8>, count: u32, key: Key) -> Option<(NonNull<u8>, *mut u8)> {
    let mut last = head;
    for _ in 1..count {
        // SAFETY: by the contract the list is that long and its links stand still.
        let Some(following) = NonNull::new(unsafe { next(last, key) }?) else { break };
        last = following;
    }
    // SAFETY: as above.
    Some((last, unsafe { next(last, key) }?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn memory(words: usize) -> Vec<u64> {
        std::vec![0; words]
    }

    #[test]
    fn carved_blocks_come_in_order_and_end() {
        let mut memory = memory(8);
        let start = NonNull::new(memory.as_mut_ptr().cast::<u8>()).unwrap();
        let mut list = List::new();
        // SAFETY: four blocks of 16 bytes fill the eight words exactly.
        list.prepend(unsafe { Chain::carve(start, 16, 4, Key::NONE) });
        for step in 0..4 {
            assert_eq!(list.count(), 4 - step);
            let block = list.pop().unwrap().into_start();
            assert_eq!(block.addr().get() - start.addr().get(), step as usize * 16);
        }
        assert!(list.pop().is_none());
    }

    #[test]
    fn a_chain_leads_from_the_last_pushed_to_its_end() {
        let mut memory = memory(3);
        let start = NonNull::new(memory.as_mut_ptr().cast::<u8>()).unwrap();
        let mut list = List::new();
        // SAFETY: three blocks of 8 bytes fill the three words exactly.
        list.prepend(unsafe { Chain::carve(start, 8, 3, Key::NONE) });
        let mut chain = Chain::new(list.pop().unwrap());
        chain.push(list.pop().unwrap());
        let third = list.pop().unwrap().into_start();
        chain.set_end(third.as_ptr(), Key::NONE);
        assert_eq!(chain.count(), 2);
        // SAFETY: the chain's two blocks, whose end was just set; nobody else has them.
        let (last, rest) = unsafe { peek(chain.first(), 2, Key::NONE) }.unwrap();
        assert_eq!((last, rest), (start, third.as_ptr()));
        list.prepend(chain);
        assert_eq!(list.count(), 2);
        assert_eq!([list.pop(), list.pop()].map(|block| block.unwrap().into_start()).into_iter().last(), Some(start));
    }
}

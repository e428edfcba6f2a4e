//! Links under a key: a free block's first word, if it is one.
//!
//! ```text
//! 63            19 18      8 7     0
//! next, bits 3..48 | sum    | 0      all of it xor key xor the block's own address
//! ```
//! `sum` is 11 bits of a product of `next`, so that a changed upper half does not pass either. Read back, the low byte
//! must be 0 and the sum must be right: 19 bits that a word which is no link of this heap *at this very place* has by
//! chance only; and since the key's low three bits are not all 0, no zero, no pointer and no multiple of 8 ever has
//! them. That serves two ends:
//! - *an overwritten link is seen before it is followed*: the list is given up, and reported;
//! - *a block that is freed although it is free is suspected by its own first word*: one load and one comparison of a
//!   byte, in a cache line about to be written anyway. For that the word is cleared when a block leaves its list: a
//!   block in use never carries a link, unless its user put one there. What is suspected is then
//!   [inspected](crate::heap::inspect).
//!
//! The key is per heap. A heap that is all zero has none; the first chunk's arrival makes one out of where the heap and
//! the chunk lie, before any block exists, unless the kernel has set one from better entropy (`Heap::set_key`). So it
//! keeps out accidents, and an attacker only as far as addresses or the kernel's entropy are secret from him. Sources
//! of the idea: glibc's safe-linking, mimalloc's secure mode, the signed links of snmalloc.
//!
//! Price: some 25 instructions for a pair of `alloc` and `free`, and addresses of 48 bits. Chunks elsewhere (five-level
//! paging) are refused.

#![expect(unsafe_code, reason = "links of free blocks")]

use core::ptr::{NonNull, null_mut, with_exposed_provenance_mut};

use crate::base::sync::{AtomicPtr, AtomicUsize, Counter, Ordering, write};

/// Bits of an address above the 48 that are kept.
const ADDR_SHIFT: u32 = 16;
/// Bits that are the same for every link at its place: zeros and sum.
const CHECK: u64 = (1 << 19) - 1;
/// The low byte is all 0.
const SUM: u64 = CHECK & !0xff;
/// 2^64 over the golden ratio (Knuth): every address bit reaches the product's top bits.
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
const SUM_SHIFT: u32 = 45;
/// In the low three bits of every key.
const KEY_BITS: u64 = 0b101;

/// What links are written under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key(u64);

/// Where a key is kept. Zero: none yet.
#[derive(Debug)]
pub(crate) struct KeyCell(AtomicUsize);

/// Blocks lost behind damaged links, kept where they were lost until somebody can report it.
#[derive(Debug)]
pub(crate) struct Damage {
    at: AtomicPtr<u8>,
    lost_count: Counter,
}

fn sum(next: u64) -> u64 {
    next.wrapping_mul(MIX) >> SUM_SHIFT & SUM
}

/// The address whose low 48 bits a number's are, with the sign in the 16 above: as the hardware wants it.
fn address(number: u64) -> u64 {
    (((number << ADDR_SHIFT) as i64) >> ADDR_SHIFT) as u64
}

/// Whether links can lead to that address.
pub(crate) fn is_linkable(addr: usize) -> bool {
    address(addr as u64) == addr as u64
}

/// 64 bits in which every bit depends on many of the number (the finaliser of splitmix64, Steele, Lea and Flood 2014).
fn mixed(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

impl Key {
    pub(crate) const NONE: Self = Self(0);

    /// A key out of any number.
    pub(crate) fn of(number: u64) -> Self {
        Self(mixed(number) & !0b111 | KEY_BITS).as_kept()
    }

    /// The key that a machine word is kept for: with 32 bits, twice the word.
    #[inline]
    fn from_word(word: usize) -> Self {
        let word = word as u64;
        Self(if size_of::<usize>() < size_of::<u64>() { word << 32 | word } else { word })
    }

    /// The machine word by which a key is kept.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "a shorter word is there twice")]
    fn word(self) -> usize {
        self.0 as usize
    }

    fn as_kept(self) -> Self {
        Self::from_word(self.word())
    }

    /// Whether it is a key, so that links may be written under it.
    pub(crate) fn is_some(self) -> bool {
        self != Self::NONE
    }

    #[inline]
    fn mask(self, place: NonNull<u8>) -> u64 {
        self.0 ^ place.as_ptr().addr() as u64
    }

    /// A hash of a place and words, under the key.
    #[cfg(feature = "debug-heap")]
    pub(crate) fn hash<const N: usize>(self, place: NonNull<u8>, words: [u64; N]) -> u64 {
        words.into_iter().fold(self.mask(place), |hash, word| mixed(hash ^ word))
    }

    #[inline]
    fn decode(word: u64, mask: u64) -> Option<*mut u8> {
        let plain = word ^ mask;
        // The sum's upper bits stand where an address has none.
        let next = address(plain >> ADDR_SHIFT) & !7;
        if (sum(next) ^ plain) & CHECK != 0 {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "the crate is for 64-bit addresses")]
        Some(with_exposed_provenance_mut(next as usize))
    }

    /// Reads the link at `place`. `None`: what stands there is no link of this heap.
    ///
    /// # Safety
    /// The 8 bytes at `place`, aligned to 8, are memory of this heap that nobody writes meanwhile.
    #[inline]
    pub(crate) unsafe fn read(self, place: NonNull<u8>) -> Option<*mut u8> {
        // SAFETY: by the contract; volatile, since a block's last user may have left anything there, also what the
        // compiler calls uninitialised.
        let word = unsafe { place.cast::<u64>().read_volatile() };
        Self::decode(word, self.mask(place))
    }

    /// Writes the link at `place`.
    ///
    /// # Safety
    /// The 8 bytes at `place`, aligned to 8, are the caller's alone.
    #[inline]
    pub(crate) unsafe fn write(self, place: NonNull<u8>, next: *mut u8) {
        // The provenance of `next` is what `decode` takes up again.
        let next = next.expose_provenance() as u64;
        let word = (next << ADDR_SHIFT | sum(next)) ^ self.mask(place);
        // SAFETY: the contract says so.
        unsafe { write(place.cast::<u64>().as_ptr(), word) }
    }

    /// Makes the first word of a block that leaves its list no link any more.
    ///
    /// # Safety
    /// As for [`write`](Self::write).
    #[inline]
    pub(crate) unsafe fn clear(self, place: NonNull<u8>) {
        // SAFETY: the contract says so.
        unsafe { write(place.cast::<u64>().as_ptr(), 0) }
    }

    /// Whether the word at `place` could be a link: true for each link, and for one in 256 of all other words. Fast.
    ///
    /// # Safety
    /// As for [`read`](Self::read).
    #[inline]
    pub(crate) unsafe fn suspects(self, place: NonNull<u8>) -> bool {
        // SAFETY: as in `read`.
        let word = unsafe { place.cast::<u64>().read_volatile() };
        (word ^ self.mask(place)) & 0xff == 0
    }
}

impl KeyCell {
    pub(crate) const fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    #[inline]
    pub(crate) fn get(&self) -> Key {
        Key::from_word(self.0.load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn set(&self, key: Key) {
        self.0.store(key.word(), Ordering::Relaxed);
    }

    /// Makes a key out of this cell's address and another number, if there is none yet. Called before the heap's first
    /// block exists, so that whoever has a block sees the key.
    pub(crate) fn begin(&self, number: usize) {
        let place = core::ptr::from_ref(self).addr() as u64;
        self.offer(Key::of(place.rotate_left(32) ^ number as u64));
    }

    /// Sets the key if there is none yet; true if this one is it.
    pub(crate) fn offer(&self, key: Key) -> bool {
        self.0.compare_exchange(0, key.word(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

impl Damage {
    pub(crate) const fn new() -> Self {
        Self { at: AtomicPtr::new(null_mut()), lost_count: Counter::new(0) }
    }

    /// Notes that `count` blocks from `at` on are lost. By the holder of the list's lock.
    #[cold]
    pub(crate) fn note(&self, at: NonNull<u8>, count: u32) {
        self.lost_count.fetch_add(u64::from(count), Ordering::Relaxed);
        self.at.store(at.as_ptr(), Ordering::Relaxed);
    }

    /// Where it was noted last, once.
    pub(crate) fn take(&self) -> Option<NonNull<u8>> {
        if self.at.load(Ordering::Relaxed).is_null() {
            return None;
        }
        NonNull::new(self.at.swap(null_mut(), Ordering::Relaxed))
    }

    /// Blocks that were lost here, ever.
    pub(crate) fn lost_count(&self) -> u64 {
        self.lost_count.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn word_at(memory: &mut [u64], index: usize) -> NonNull<u8> {
        NonNull::from(&mut memory[index]).cast()
    }

    #[test]
    fn every_link_comes_back_and_no_changed_bit_passes() {
        let mut memory = Vec::from([0_u64; 64]);
        for number in 0..64 {
            let (key, place) = (Key::of(number as u64), word_at(&mut memory, number));
            let ends = [0, 0x1000, 0x7fff_ffff_fff8, 0xffff_8000_0000_0000, 0xffff_ffff_ffff_fff8];
            for next in ends.into_iter().chain([0x5555_1234_5678 + 8 * number]) {
                let next = core::ptr::without_provenance_mut::<u8>(next & !7);
                // SAFETY: the word is this test's.
                unsafe { key.write(place, next) };
                // SAFETY: as above.
                assert_eq!(unsafe { key.read(place) }, Some(next));
                // SAFETY: as above.
                assert!(unsafe { key.suspects(place) });
                for bit in 0..64 {
                    let word = memory[number];
                    memory[number] = word ^ 1 << bit;
                    let place = word_at(&mut memory, number);
                    // SAFETY: as above.
                    assert_eq!(unsafe { key.read(place) }, None, "bit {bit} of the link to {next:?}");
                    memory[number] = word;
                }
            }
        }
    }

    #[test]
    fn what_users_write_is_not_suspected() {
        let mut memory = Vec::from([0_u64; 512]);
        for index in 0..512 {
            let key = Key::of(index as u64 * 77);
            for word in [0, 8 * index as u64, memory.as_ptr().addr() as u64, u64::MAX << 3] {
                memory[index] = word;
                let place = word_at(&mut memory, index);
                // SAFETY: the word is this test's.
                assert!(!unsafe { key.suspects(place) }, "{word:#x}");
            }
        }
    }

    #[test]
    fn a_link_says_nothing_at_another_place_or_under_another_key() {
        let mut memory = Vec::from([0_u64; 512]);
        let (key, next) = (Key::of(1), core::ptr::without_provenance_mut::<u8>(0x5555_0000_1000));
        let place = word_at(&mut memory, 0);
        // SAFETY: the word is this test's.
        unsafe { key.write(place, next) };
        let link = memory[0];
        let seen = (1..512).filter(|index| {
            memory[*index] = link;
            let place = word_at(&mut memory, *index);
            // SAFETY: as above.
            unsafe { key.read(place) }.is_some()
        });
        assert_eq!(seen.count(), 0);
        let place = word_at(&mut memory, 0);
        // SAFETY: as above. One key in 2^19 would do.
        assert!((2..100).all(|number| unsafe { Key::of(number).read(place) }.is_none()));
    }

    #[test]
    fn addresses_beyond_48_bits_are_refused() {
        assert!([0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, usize::MAX].into_iter().all(is_linkable));
        assert!(![0x8000_0000_0000, 0xff11_0000_0000_0000, 0xffff_7fff_ffff_ffff].into_iter().any(is_linkable));
    }
}

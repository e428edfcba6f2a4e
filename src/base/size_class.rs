//! Size classes: which block serves which Layout.
//!
//! Steps of 8 bytes up to 64, then four classes a doubling up to 32 KiB, and eight from 512 bytes to 8 KiB: 60 classes.
//! A block is at most 25 % longer than what was asked above 64 bytes, 12.5 % between 512 bytes and 8 KiB, and at most 7
//! bytes longer below. Random sizes up to 4 KiB lose 4 % of a heap inside blocks, with four a doubling throughout 7 %.
//! Still finer steps would lose more in half-used slabs; and a slab's word has room for 63 classes.
//!
//! Alignment needs no classes of its own: a size rounded up to a multiple of its alignment falls into a class whose
//! length is a multiple of that alignment too, since every multiple of a large power of two in a doubling *is* a class.
//! Slabs start at a multiple of the largest power of two that divides their class's length, so
//! the blocks inherit the alignment.

#![expect(unsafe_code, reason = "indices that are in range are told to the compiler")]

use core::alloc::Layout;
use core::num::NonZeroU16;
use core::ops::Range;

/// The number of size classes.
pub const CLASS_COUNT: usize = 60;

/// The longest block that a slab serves, in bytes; what is longer is a page run of its own.
pub const MAX_SMALL_LEN: usize = 32 * 1024;

/// Classes up to this length advance by [`STEP`] bytes.
const LINEAR_LEN: usize = 64;
const STEP: usize = 8;
const LINEAR_COUNT: usize = LINEAR_LEN / STEP;

/// Sizes from 1 to this are *short*: looked up in steps of 8 bytes, longer ones in steps of [`LONG_STEP`]. A table of 1
/// KiB, of which only the lines of the sizes in use are touched.
pub(crate) const SHORT_LEN: usize = 4096;
const LONG_STEP: usize = 256;

/// Classes of blocks shorter than a cache line of 64 bytes.
const TINY_COUNT: usize = 64 / STEP - 1;
const _: () = assert!(compute_len(TINY_COUNT) == 64, "a cache line's length is the first class that is not tiny");

/// Bytes of a class's entry in the tables that the fast paths index: a class is kept as its entry's offset.
pub(crate) const ENTRY_LEN: usize = 16;

/// A size class: the set of block sizes that blocks of one length serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SizeClass(/* the index times `ENTRY_LEN` */ u16);

/// The class of every size up to [`SHORT_LEN`], by (size - 1) / 8.
static SHORT: [SizeClass; SHORT_LEN / STEP] = table(STEP);

/// The class of every size up to [`MAX_SMALL_LEN`], by (size - 1) / 256; right above [`SHORT_LEN`].
static LONG: [SizeClass; MAX_SMALL_LEN / LONG_STEP] = table(LONG_STEP);

const _: () = assert!(SHORT_LEN / LONG_STEP >= 4, "four classes a doubling: above, every class ends at a step");

/// The classes of `step`, `2 * step` and so on.
#[expect(clippy::indexing_slicing, reason = "at compile time; the loop ends at the table's length")]
const fn table<const LEN: usize>(step: usize) -> [SizeClass; LEN] {
    let mut table = [SizeClass(0); LEN];
    let mut index = 0;
    while index < LEN {
        table[index] = SizeClass::with_index(compute_index((index + 1) * step));
        index += 1;
    }
    table
}

/// The block length of every class, in bytes. Not zero by type, so that a division by it cannot panic.
#[expect(clippy::indexing_slicing, reason = "at compile time; the loop ends at the table's length")]
#[expect(clippy::cast_possible_truncation, reason = "at most MAX_SMALL_LEN, asserted")]
static LENS: [NonZeroU16; CLASS_COUNT] = {
    let mut lens = [NonZeroU16::MAX; CLASS_COUNT];
    let mut index = 0;
    while index < CLASS_COUNT {
        let len = compute_len(index);
        assert!(len <= MAX_SMALL_LEN, "fits u16");
        if let Some(len) = NonZeroU16::new(len as u16) {
            lens[index] = len;
        }
        index += 1;
    }
    lens
};

/// 2^64 divided by every class's block length, rounded up.
#[cfg(feature = "hardened")]
#[expect(clippy::indexing_slicing, reason = "at compile time; the loop ends at the table's length")]
static INVERSES: [u64; CLASS_COUNT] = {
    let mut inverses = [0; CLASS_COUNT];
    let mut index = 0;
    while index < CLASS_COUNT {
        inverses[index] = u64::MAX / compute_len(index) as u64 + 1;
        index += 1;
    }
    inverses
};

/// Classes in a doubling, outside and inside of [`FINE`].
const STEPS: usize = 4;
const FINE_STEPS: usize = 8;

/// The doublings that have finer classes: from 512 bytes to 8 KiB, as shifts.
const FINE: Range<usize> = 9..13;

/// How many classes the doubling that begins at `1 << shift` has.
const fn steps(shift: usize) -> usize {
    if FINE.start <= shift && shift < FINE.end { FINE_STEPS } else { STEPS }
}

/// The index of the smallest class of at least `size` bytes.
const fn compute_index(size: usize) -> usize {
    if size <= LINEAR_LEN {
        return size.saturating_sub(1).wrapping_div(STEP);
    }
    let mut index = LINEAR_COUNT;
    let mut shift = LINEAR_LEN.ilog2() as usize;
    while size > 2 << shift {
        index += steps(shift);
        shift += 1;
    }
    let step = (1 << shift) / steps(shift);
    index + (size - (1 << shift)).div_ceil(step) - 1
}

const _: () = assert!(compute_index(MAX_SMALL_LEN) == CLASS_COUNT - 1, "the last class is the longest");

/// The block length of the class with that index, in bytes.
const fn compute_len(index: usize) -> usize {
    if index < LINEAR_COUNT {
        return (index + 1) * STEP;
    }
    let mut rest = index - LINEAR_COUNT;
    let mut shift = LINEAR_LEN.ilog2() as usize;
    while rest >= steps(shift) {
        rest -= steps(shift);
        shift += 1;
    }
    (1 << shift) + (1 << shift) / steps(shift) * (rest + 1)
}

/// The offset of the last byte of a block with the layout's size, rounded up to its alignment: one less than that. Size
/// 0: `usize::MAX`.
#[inline]
const fn last_byte(layout: Layout) -> usize {
    layout.size().wrapping_sub(1) | (layout.align() - 1)
}

impl SizeClass {
    /// The class of the longest blocks.
    pub const LONGEST: Self = Self::with_index(CLASS_COUNT - 1);

    /// The class that serves `layout`, or `None` if it takes a page run of its own, or no block at all: size 0.
    ///
    /// Constant time, no division; usable in `const`.
    #[inline]
    pub const fn of(layout: Layout) -> Option<Self> {
        match Self::of_short(layout) {
            None => Self::of_long(layout),
            short => short,
        }
    }

    /// The class that serves `layout`, if that is short: takes 1 byte to 4 KiB with its alignment. What the fast paths
    /// ask.
    #[inline]
    #[expect(clippy::indexing_slicing, reason = "the longest short size's last byte is in the table's last step")]
    pub(crate) const fn of_short(layout: Layout) -> Option<Self> {
        let last = last_byte(layout);
        if last < SHORT_LEN { Some(SHORT[last / STEP]) } else { None }
    }

    /// The class that serves `layout`, which is not short; `None` as for [`of`](Self::of).
    #[inline]
    #[expect(clippy::indexing_slicing, reason = "the longest size's last byte is in the table's last step")]
    pub(crate) const fn of_long(layout: Layout) -> Option<Self> {
        let last = last_byte(layout);
        if last < MAX_SMALL_LEN { Some(LONG[last / LONG_STEP]) } else { None }
    }

    /// The class with that index, `None` from [`CLASS_COUNT`] on.
    pub const fn from_index(index: usize) -> Option<Self> {
        if index < CLASS_COUNT { Some(Self::with_index(index)) } else { None }
    }

    /// The class with an index that is known to be below [`CLASS_COUNT`].
    #[expect(clippy::cast_possible_truncation, reason = "an index is below CLASS_COUNT")]
    const fn with_index(index: usize) -> Self {
        Self((index * ENTRY_LEN) as u16)
    }

    /// Every class, shortest first.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> {
        (0..CLASS_COUNT).filter_map(Self::from_index)
    }

    /// From 0 to [`CLASS_COUNT`] - 1, by length.
    #[inline]
    pub const fn index(self) -> usize {
        let offset = self.0 as usize;
        // SAFETY: every class is made by `with_index`, as a multiple of ENTRY_LEN. An entry's offset is then the class
        // as it is.
        unsafe { core::hint::assert_unchecked(offset % ENTRY_LEN == 0) };
        let index = offset / ENTRY_LEN;
        // SAFETY: `with_index` is given indexes below CLASS_COUNT: by the tables from `compute_index`, by the assertion
        // on the longest size, and by `from_index` after its check. Tables by class are then read without a check.
        unsafe { core::hint::assert_unchecked(index < CLASS_COUNT) };
        index
    }

    /// The length of the class's blocks in bytes: what a caller may use of one.
    #[inline]
    #[expect(clippy::indexing_slicing, reason = "an index is below CLASS_COUNT, the table's length")]
    pub const fn block_len(self) -> usize {
        LENS[self.index()].get() as usize
    }

    /// Whether blocks are shorter than a cache line: they stay with the CPU that owns their slab.
    #[inline]
    pub(crate) const fn is_tiny(self) -> bool {
        self.index() < TINY_COUNT
    }

    /// Whether an offset below 2^32 is a multiple of the block length, without a division (Lemire, Kaser and Kurz
    /// 2019).
    #[cfg(feature = "hardened")]
    #[inline]
    #[expect(clippy::indexing_slicing, reason = "an index is below CLASS_COUNT, the table's length")]
    pub(crate) const fn divides(self, offset: usize) -> bool {
        let inverse = INVERSES[self.index()];
        (offset as u64).wrapping_mul(inverse) < inverse
    }

    /// The alignment that every block of this class has: the largest power of two that divides its length.
    pub const fn block_align(self) -> usize {
        1 << self.block_len().trailing_zeros()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    #[test]
    fn every_small_layout_gets_the_tightest_block_that_fits() {
        for size in 1..=MAX_SMALL_LEN {
            let mut align = 1;
            while align <= MAX_SMALL_LEN {
                let padded = size.next_multiple_of(align);
                match SizeClass::of(layout(size, align)) {
                    Some(class) => {
                        assert!(class.block_len() >= size && class.block_align() >= align, "{size} {align}");
                        let tighter = class.index().checked_sub(1).and_then(SizeClass::from_index);
                        assert!(tighter.is_none_or(|t| t.block_len() < padded), "{size} {align}");
                    }
                    None => assert!(padded > MAX_SMALL_LEN, "{size} {align}"),
                }
                align *= 2;
            }
        }
    }

    #[test]
    #[cfg(feature = "hardened")]
    fn multiples_of_a_block_length_are_told_from_all_other_offsets() {
        for class in SizeClass::all() {
            for offset in 0..3 * MAX_SMALL_LEN {
                assert_eq!(class.divides(offset), offset % class.block_len() == 0, "{offset} {class:?}");
            }
            assert!(class.divides(class.block_len() * 1000) && !class.divides(class.block_len() * 1000 + 1));
        }
    }

    #[test]
    fn a_block_wastes_at_most_a_quarter_above_64_bytes() {
        for size in 65..=MAX_SMALL_LEN {
            let len = SizeClass::of(layout(size, 1)).unwrap().block_len();
            assert!((len - size) * 4 <= size, "{size} in {len}");
        }
    }

    #[test]
    fn what_is_longer_or_more_aligned_is_large() {
        assert_eq!(SizeClass::of(layout(MAX_SMALL_LEN + 1, 1)), None);
        assert_eq!(SizeClass::of(layout(1, 2 * MAX_SMALL_LEN)), None);
        assert_eq!((SizeClass::of(layout(0, 1)), SizeClass::of(layout(0, 4096))), (None, None), "no block at all");
        assert_eq!(SizeClass::of(layout(isize::MAX as usize, 1)), None);
        assert_eq!(SizeClass::of(layout(64, 4096)).unwrap().block_len(), 4096);
        assert_eq!(SizeClass::from_index(CLASS_COUNT), None);
    }
}

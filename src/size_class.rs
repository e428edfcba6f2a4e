//! Size classes: which block serves which Layout.
//!
//! Steps of 8 bytes up to 64, then four classes per doubling up to 32 KiB: 44 classes. A block is at most 25 %
//! longer than what was asked above 64 bytes (12 % on average), and at most 7 bytes longer below. Finer steps
//! would waste less inside blocks and more in half-used slabs; powers of two, the other way round.
//!
//! Alignment needs no classes of its own: a size rounded up to a multiple of its alignment falls into a class whose
//! length is a multiple of that alignment too, since every multiple of a large power of two in a doubling *is* a class.
//! Slabs start at a multiple of the largest power of two that divides their class's length, so
//! the blocks inherit the alignment.

use core::alloc::Layout;

/// The number of size classes.
pub const CLASS_COUNT: usize = 44;

/// The longest block that a slab serves, in bytes; what is longer is a page run of its own.
pub const MAX_SMALL_LEN: usize = 32 * 1024;

/// Classes up to this length advance by [`STEP`] bytes.
const LINEAR_LEN: usize = 64;
const STEP: usize = 8;
const LINEAR_COUNT: usize = LINEAR_LEN / STEP;

/// Sizes up to this are looked up; longer ones are computed.
const TABLE_LEN: usize = 1024;

/// A size class: the set of block sizes that blocks of one length serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SizeClass(u8);

/// The class of every size up to [`TABLE_LEN`], in steps of 8 bytes.
#[expect(clippy::indexing_slicing, reason = "at compile time; the loop ends at the table's length")]
static TABLE: [u8; TABLE_LEN / STEP + 1] = {
    let mut table = [0; TABLE_LEN / STEP + 1];
    let mut step = 0;
    while step < table.len() {
        table[step] = compute_index(step * STEP);
        step += 1;
    }
    table
};

/// The block length of every class, in bytes.
#[expect(clippy::indexing_slicing, reason = "at compile time; the loop ends at the table's length")]
#[expect(clippy::cast_possible_truncation, reason = "at most MAX_SMALL_LEN, asserted")]
static LENS: [u16; CLASS_COUNT] = {
    let mut lens = [0; CLASS_COUNT];
    let mut index = 0;
    while index < CLASS_COUNT {
        let len = compute_len(index);
        assert!(len <= MAX_SMALL_LEN, "fits u16");
        lens[index] = len as u16;
        index += 1;
    }
    lens
};

/// The index of the smallest class of at least `size` bytes.
#[expect(clippy::cast_possible_truncation, reason = "at most CLASS_COUNT, checked below for the longest size")]
const fn compute_index(size: usize) -> u8 {
    if size <= LINEAR_LEN {
        return size.saturating_sub(1).wrapping_div(STEP) as u8;
    }
    let last = size - 1;
    let doubling = last.ilog2();
    let quarter = (last >> (doubling - 2)) & 3;
    (LINEAR_COUNT + (doubling as usize - LINEAR_LEN.ilog2() as usize) * 4 + quarter) as u8
}

const _: () = assert!(compute_index(MAX_SMALL_LEN) as usize == CLASS_COUNT - 1, "the last class is the longest");

/// The block length of the class with that index, in bytes.
const fn compute_len(index: usize) -> usize {
    if index < LINEAR_COUNT {
        return (index + 1) * STEP;
    }
    let doubling = LINEAR_LEN << ((index - LINEAR_COUNT) / 4);
    doubling + doubling / 4 * ((index - LINEAR_COUNT) % 4 + 1)
}

impl SizeClass {
    /// The class of the longest blocks.
    pub const LONGEST: Self = Self(compute_index(MAX_SMALL_LEN));

    /// The class that serves `layout`, or `None` if it takes a page run of its own. A Layout
    /// of size 0 needs no block; the answer then says nothing about alignment.
    ///
    /// Constant time, no division; usable in `const`.
    #[inline]
    #[expect(clippy::indexing_slicing, reason = "padded / 8 is at most TABLE_LEN / 8, the table's last index")]
    pub const fn of(layout: Layout) -> Option<Self> {
        let padded = layout.size().wrapping_add(layout.align() - 1) & !(layout.align() - 1);
        if padded <= TABLE_LEN {
            return Some(Self(TABLE[(padded + (STEP - 1)) >> STEP.trailing_zeros()]));
        }
        if padded <= MAX_SMALL_LEN { Some(Self(compute_index(padded))) } else { None }
    }

    /// The class with that index, `None` from [`CLASS_COUNT`] on.
    #[expect(clippy::cast_possible_truncation, reason = "below CLASS_COUNT")]
    pub const fn from_index(index: usize) -> Option<Self> {
        if index < CLASS_COUNT { Some(Self(index as u8)) } else { None }
    }

    /// Every class, shortest first.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> {
        (0..CLASS_COUNT).filter_map(Self::from_index)
    }

    /// From 0 to [`CLASS_COUNT`] - 1, by length.
    #[inline]
    pub const fn index(self) -> usize {
        let index = self.0 as usize;
        // SAFETY: `of` and `from_index`, which make every class, give indexes below CLASS_COUNT: the table and `compute_index` by the
        // assertion on the longest size, `from_index` by its check. Tables by class are then read without a check.
        unsafe { core::hint::assert_unchecked(index < CLASS_COUNT) };
        index
    }

    /// The length of the class's blocks in bytes: what a caller may use of one.
    #[inline]
    #[expect(clippy::indexing_slicing, reason = "an index is below CLASS_COUNT, the table's length")]
    pub const fn block_len(self) -> usize {
        LENS[self.index()] as usize
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
    fn every_small_layout_gets_the_tightest_block_that_holds_and_aligns_it() {
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
        assert_eq!(SizeClass::of(layout(isize::MAX as usize, 1)), None);
        assert_eq!(SizeClass::of(layout(64, 4096)).unwrap().block_len(), 4096);
        assert_eq!(SizeClass::from_index(CLASS_COUNT), None);
    }
}

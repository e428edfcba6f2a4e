//! The parts of a slab: what is left of its run when pages in its middle went back.
//!
//! ```text
//! first part          hole                 second part
//! [ Slab, 5 | rest ... | any runs of others | rest 9 | rest 10 ]   granules
//! ```
//! A slab with one block in use keeps all its pages. So when memory is short, or all that is free is asked for,
//! granules that no block in use lies in leave the slab (as a file system punches holes into a file): they are runs of
//! their own from then on, and no part of the slab. Blocks that lay in them, also those that only reached into them,
//! are lost to it until it is empty and its pages go as a whole.
//!
//! *No room is needed for that.* Granules tell their distance to the slab's first one as before, so a block finds its
//! slab at no further cost. The first granule tells the first part's length, and that there are others; `carved` is
//! what blocks are left. The other parts are found by walking over the granules behind, until all parts together have
//! as many blocks. Price: such a slab is never all fresh again.
//!
//! S6: each part but the first has a block, and of a slab with several parts those together have `carved` blocks.

use core::ops::Range;

use crate::pages::{Chunk, Kind, PageDesc};
use crate::slab::free_blocks::{Places, touched};
use crate::slab::word::{MAX_SLAB_LEN, Slab};

impl<'a> Slab<'a> {
    /// Whether there may be parts behind the first one.
    #[inline]
    pub(crate) fn has_parts(self) -> bool {
        self.desc().is_parted()
    }

    /// Granule length as a shift.
    fn shift(self) -> u32 {
        Chunk::of(self.desc()).shift()
    }

    /// Whether that granule, counted from the first one, is the slab's; as long as there are granules of it behind.
    fn has(self, granule: usize) -> bool {
        let desc = Chunk::of(self.desc()).desc(self.desc().index() + granule);
        granule == 0 || desc.map(|desc| desc.tag()).is_some_and(|tag| tag.is(Kind::SlabRest) && tag.len() == granule)
    }

    /// The granules that a block lies in.
    fn granules_of(self, index: usize) -> Range<usize> {
        let len = self.class().block_len();
        (index * len) >> self.shift()..(((index + 1) * len - 1) >> self.shift()) + 1
    }

    /// Whether the slab has a block of that number.
    #[inline(never)]
    pub(crate) fn has_block(self, index: usize) -> bool {
        self.granules_of(index).all(|granule| self.has(granule))
    }

    /// Blocks that lie in a part.
    fn count_in(self, part: &Range<usize>) -> usize {
        let len = self.class().block_len();
        ((part.end << self.shift()) / len).saturating_sub((part.start << self.shift()).div_ceil(len))
    }

    /// The first part from that granule on and before `limit`, as granules; none of them is of the first part.
    #[cold]
    #[inline(never)]
    fn part_from(self, granule: usize, limit: usize) -> Option<Range<usize>> {
        let start = (granule..limit).find(|granule| self.has(*granule))?;
        let end = (start..limit).find(|granule| !self.has(*granule)).unwrap_or(limit);
        Some(start..end)
    }

    /// The part behind the one that ends before that granule, where `left` is how many blocks those behind it have
    /// together. The caller owns the slab or holds its bin's lock.
    fn next_part(self, end: usize, left: &mut usize) -> Option<Range<usize>> {
        let part = self.part_from(end, if *left > 0 { MAX_SLAB_LEN >> self.shift() } else { 0 })?;
        *left = left.saturating_sub(self.count_in(&part).max(1));
        Some(part)
    }

    /// The parts behind the first one, as granules. The caller owns the slab or holds its bin's lock, and changes
    /// nothing behind a part before it was given.
    pub(crate) fn further_parts(self) -> impl Iterator<Item = Range<usize>> + use<'a> {
        let (mut left, mut end) = (self.counts().1.saturating_sub(self.fit()), self.desc().len());
        core::iter::from_fn(move || {
            let part = self.next_part(end, &mut left)?;
            end = part.end;
            Some(part)
        })
    }

    /// Of the part that begins with the granule `desc` describes and has so many bytes: how many blocks it has, and
    /// how many are out, as if those of the first parts were out first. For pictures: the sums over all parts are
    /// right.
    pub(crate) fn counts_in(self, desc: &PageDesc, len: usize) -> (usize, usize) {
        let (count, carved) = self.counts();
        let first = desc.index().saturating_sub(self.desc().index());
        let (capacity, before) = if first == 0 {
            (self.fit(), 0)
        } else {
            let (mut before, mut end) = (self.fit(), self.desc().len());
            while let Some(part) = self.part_from(end, first) {
                (before, end) = (before + self.count_in(&part), part.end);
            }
            (self.count_in(&(first..first + (len >> self.shift()))), before)
        };
        (capacity, carved.saturating_sub(count + before).min(capacity))
    }

    /// S6.
    #[inline(never)]
    pub(crate) fn is_parted_whole(self) -> bool {
        let carved = self.counts().1;
        let (mut left, mut sum, mut end) = (carved.saturating_sub(self.fit()), self.fit(), self.desc().len());
        while let Some(part) = self.next_part(end, &mut left) {
            (sum, end) = (sum + self.count_in(&part), part.end);
        }
        sum == carved
    }

    /// Whether free blocks, fresh ones too, may fill a granule, and can be [looked at](Places).
    pub(crate) fn may_have_hole(self) -> bool {
        let (count, carved) = self.counts();
        let free = self.capacity() - carved + count;
        let is_long = self.desc().len() > 1 || self.has_parts();
        is_long && self.capacity() <= Places::MOST && (free * self.class().block_len()) >> self.shift() > 0
    }

    /// Offers to `give` each range of granules that no block in use lies in, from the last one on, but for the first
    /// granule; if `spares`, where no more bytes of blocks are lost than the range has. `free` are all free blocks of
    /// the slab, which is the caller's alone; those that were lost, with granules that it took, leave it. Gives how
    /// many those are.
    #[cold]
    #[inline(never)]
    pub(crate) fn punch(self, free: &mut Places, spares: bool, mut give: impl FnMut(Range<usize>) -> bool) -> usize {
        let mut end = self.further_parts().last().map_or(self.desc().len(), |part| part.end);
        let mut lost = 0;
        while let Some(hole) = self.last_idle(end, free) {
            end = hole.start;
            let hole_len = hole.len() << self.shift();
            let blocks = touched(hole.start << self.shift(), hole_len, self.class());
            let lost_len = free.count_in(blocks.clone()) * self.class().block_len();
            if (lost_len <= hole_len || !spares) && give(hole) {
                lost += free.lose(blocks, end << self.shift());
            }
        }
        lost
    }

    /// The last range of granules before `end`, behind the first granule, that no block in use lies in.
    fn last_idle(self, end: usize, free: &Places) -> Option<Range<usize>> {
        let last = (1..end).rev().find(|granule| self.is_idle(*granule, free))?;
        let first = (1..last).rev().take_while(|granule| self.is_idle(*granule, free)).last().unwrap_or(last);
        Some(first..last + 1)
    }

    /// Whether no block in use lies in a granule of the slab.
    #[inline(never)]
    fn is_idle(self, granule: usize, free: &Places) -> bool {
        let mut blocks = touched(granule << self.shift(), 1 << self.shift(), self.class());
        self.has(granule) && blocks.all(|block| free.has(block) || !self.has_block(block))
    }
}

#[cfg(test)]
mod tests;

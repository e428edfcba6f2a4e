//! The window: which addresses of the kernel's virtual window are taken.
//!
//! One bit for each *slot*, a power of two of pages, in a table of fixed length. Decisions, and what pays for each:
//! - *A table of a fixed length, whatever the window's*: it needs no heap, and a longer window has longer slots. Price:
//!   a run is rounded up to whole slots, in addresses only; no frame is spent on the rest of its last slot.
//! - *What a run takes follows from where it starts and ends*, so nothing is kept for each run.
//! - *A run that had to move goes to the middle of the longest hole* ([`Place::Roomy`]), so that it grows in place from
//!   there on; others to the lowest hole that has room. Price: the window is used up in more pieces, so it should be
//!   several times longer than the memory behind it.
//! - *Linear search over the words.* A hole is passed in as many steps as it has words of 64 slots. Price: time in
//!   proportion to the table, which is a constant of the kernel's choice.

/// Bytes in the smallest page.
pub(super) const PAGE: usize = 4096;

/// Bytes whose pages one page table of the lowest level leads to: a huge page's.
pub(super) const TABLE_SPAN: usize = 2 << 20;

/// Where a run is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The lowest addresses that have room.
    Lowest,
    /// Where there is most room to grow.
    Roomy,
}

/// Part of the hole that a [`Place::Roomy`] run may fill and still be placed in its middle.
const ROOMY_SHARE: usize = 4;

/// See the file's head. Without slots until [`open`](Self::open). Invariants:
/// - W1: bits of slots from `slot_count` on are clear, and never looked at.
/// - W2: `start` is a multiple of the slot length, and `start + (slot_count << shift)` does not overflow.
/// - W3: `free_count` is the number of clear bits below `slot_count`.
/// - W4: while no run has addresses, no table is spared.
#[derive(Debug)]
pub(super) struct Window<const WORDS: usize> {
    start: usize,
    /// Slot length as a shift.
    shift: u32,
    slot_count: usize,
    free_count: usize,
    /// Where the pages of spared tables begin, multiples of [`TABLE_SPAN`]; see [`spare`](Self::spare).
    spared: [Option<usize>; SPARED],
    taken: [u64; WORDS],
}

/// Page tables that may be spared at once.
const SPARED: usize = 8;

/// What becomes of the page table that a short run may leave empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    /// It stays.
    Spared,
    /// The same, in the place of another one, which nobody uses: its addresses are the caller's until it is freed.
    Instead(usize),
    /// It is freed if it is empty, for all that are spared are in use.
    Freed,
}

impl<const WORDS: usize> Window<WORDS> {
    pub(super) const fn new() -> Self {
        Self {
            start: 0,
            shift: PAGE.trailing_zeros(),
            slot_count: 0,
            free_count: 0,
            spared: [None; SPARED],
            taken: [0; WORDS],
        }
    }

    /// A window from `start` to before `end`, in slots as short as the table allows. `None` if it has no slot; then it
    /// is as before.
    pub(super) fn open(&mut self, start: usize, end: usize) -> Option<()> {
        let slots = WORDS.checked_mul(64).filter(|slots| *slots > 0)?;
        let slot_len = end.checked_sub(start)?.div_ceil(slots).checked_next_power_of_two()?.max(PAGE);
        let start = start.checked_next_multiple_of(slot_len)?;
        let slot_count = (end.checked_sub(start)? / slot_len).min(slots);
        if slot_count == 0 {
            return None;
        }
        let shift = slot_len.trailing_zeros();
        *self = Self { start, shift, slot_count, free_count: slot_count, spared: [None; SPARED], taken: [0; WORDS] };
        Some(())
    }

    /// Bytes in a slot.
    pub(super) fn slot_len(&self) -> usize {
        1 << self.shift
    }

    /// Bytes in all slots.
    pub(super) fn len(&self) -> usize {
        self.slot_count << self.shift
    }

    /// Bytes in free slots.
    pub(super) fn free_len(&self) -> usize {
        self.free_count << self.shift
    }

    /// Takes slots for `len` bytes at a multiple of `align`, a power of two; gives their address.
    pub(super) fn reserve(&mut self, len: usize, align: usize, place: Place) -> Option<usize> {
        let count = len.div_ceil(self.slot_len());
        if count == 0 || count > self.free_count {
            return None;
        }
        let first = match place {
            Place::Lowest => self.lowest(count, align),
            Place::Roomy => {
                let longest = self.holes().max_by_key(|hole| hole.1 - hole.0)?;
                let room = longest.1 - longest.0;
                let middle = if room / ROOMY_SHARE >= count { longest.0 + (room - count) / 2 } else { longest.0 };
                self.fit(longest, middle, count, align).or_else(|| self.fit(longest, longest.0, count, align))
            }
        }?;
        self.mark(first, count, true);
        Some(self.addr(first))
    }

    /// Takes the slots that the bytes from `start` to `new_end` need beyond those that the bytes up to `old_end` have.
    /// False: unchanged.
    pub(super) fn extend(&mut self, start: usize, old_end: usize, new_end: usize) -> bool {
        let (Some(old), Some(new)) = (self.slots(start, old_end), self.slots(start, new_end)) else {
            return false;
        };
        if (old.1..new.1).any(|slot| self.is_taken(slot)) {
            return false;
        }
        self.mark(old.1, new.1.saturating_sub(old.1), true);
        true
    }

    /// Frees the slots that the bytes from `start` to `old_end` have beyond those that the bytes up to `new_end` need;
    /// all of them if `new_end` is `start`. Whether nothing is taken any more.
    pub(super) fn release(&mut self, start: usize, new_end: usize, old_end: usize) -> bool {
        let Some(old) = self.slots(start, old_end) else { return false };
        let kept = self.slots(start, new_end).map_or(old.0, |new| new.1);
        self.mark(kept, old.1.saturating_sub(kept), false);
        self.free_count == self.slot_count
    }

    /// Asks to spare the table of the pages from `span` on, which a run is about to leave.
    pub(super) fn spare(&mut self, span: usize) -> Table {
        if self.spared.contains(&Some(span)) {
            return Table::Spared;
        }
        if let Some(place) = self.spared.iter_mut().find(|place| place.is_none()) {
            *place = Some(span);
            return Table::Spared;
        }
        let spared = self.spared;
        let Some(unused) = spared.into_iter().flatten().find(|other| self.take_span(*other)) else {
            return Table::Freed;
        };
        self.spared.iter_mut().filter(|place| **place == Some(unused)).for_each(|place| *place = Some(span));
        Table::Instead(unused)
    }

    /// A spared table that must not stay: there is no run any more, so its addresses are the caller's until it is
    /// freed.
    pub(super) fn take_last_spared(&mut self) -> Option<usize> {
        if self.free_count < self.slot_count {
            return None;
        }
        let span = self.spared.iter_mut().find_map(Option::take)?;
        self.take_span(span).then_some(span)
    }

    /// A spared table that must not stay: it would be in the way of a huge page between these addresses, which the
    /// caller has.
    pub(super) fn take_spared_within(&mut self, start: usize, end: usize) -> Option<usize> {
        let within = |span: &mut usize| start <= *span && *span + TABLE_SPAN <= end;
        self.spared.iter_mut().find_map(|spared| spared.take_if(within))
    }

    /// Takes the slots of a table's pages. False: somebody has one.
    fn take_span(&mut self, span: usize) -> bool {
        let (first, count) = self.span_slots(span);
        let is_free = (first..first + count).all(|slot| !self.is_taken(slot));
        if is_free {
            self.mark(first, count, true);
        }
        is_free
    }

    /// Frees what was taken for the table of the pages from `span` on.
    pub(super) fn release_span(&mut self, span: usize) {
        let (first, count) = self.span_slots(span);
        self.mark(first, count, false);
    }

    /// The slots that the pages of a table lie in: the first, and how many.
    fn span_slots(&self, span: usize) -> (usize, usize) {
        let first = span.saturating_sub(self.start) >> self.shift;
        let last = (span + TABLE_SPAN).saturating_sub(self.start).div_ceil(self.slot_len()).min(self.slot_count);
        (first, last.saturating_sub(first))
    }

    /// Whether `start` is the first address of a slot and everything from there to `end` is taken.
    pub(super) fn holds(&self, start: usize, end: usize) -> bool {
        self.slots(start, end).is_some_and(|(first, last)| (first..last).all(|slot| self.is_taken(slot)))
    }

    /// Whether all addresses from `start` to before `end` are in slots that are taken.
    pub(super) fn covers(&self, start: usize, end: usize) -> bool {
        let offset = start.wrapping_sub(self.start) % self.slot_len();
        self.holds(start.wrapping_sub(offset), end)
    }

    /// The slots from `start`, which begins one, to before `end`. `None` if there are none, or they are not the
    /// window's.
    fn slots(&self, start: usize, end: usize) -> Option<(usize, usize)> {
        let offset = start.checked_sub(self.start)?;
        let first = offset >> self.shift;
        let last = end.checked_sub(self.start)?.div_ceil(self.slot_len());
        (self.addr(first) == start && first < last && last <= self.slot_count).then_some((first, last))
    }

    /// The first of the lowest `count` free slots at a multiple of `align`. Looks no further than these.
    fn lowest(&self, count: usize, align: usize) -> Option<usize> {
        let mut from = 0;
        loop {
            let free = self.next(from, false, self.slot_count)?;
            let first = self.fit((free, self.slot_count), free, count, align)?;
            match self.next(free, true, first + count) {
                Some(taken) => from = taken,
                None => return Some(first),
            }
        }
    }

    /// The first of `count` slots at a multiple of `align` in a hole, from the slot `from` on.
    fn fit(&self, hole: (usize, usize), from: usize, count: usize, align: usize) -> Option<usize> {
        let start = self.addr(from).checked_next_multiple_of(align.max(self.slot_len()))?;
        let first = (start - self.start) >> self.shift;
        (first.checked_add(count)? <= hole.1).then_some(first)
    }

    fn addr(&self, slot: usize) -> usize {
        self.start + (slot << self.shift)
    }

    /// The holes, lowest first: first slot and slot behind the last one.
    fn holes(&self) -> impl Iterator<Item = (usize, usize)> {
        let mut from = 0;
        core::iter::from_fn(move || {
            let start = self.next(from, false, self.slot_count)?;
            from = self.next(start, true, self.slot_count).unwrap_or(self.slot_count);
            Some((start, from))
        })
    }

    /// The first slot from `from` to before `end` that is taken, or free.
    fn next(&self, from: usize, taken: bool, end: usize) -> Option<usize> {
        let mut skip = from % 64;
        for (index, word) in self.taken.iter().enumerate().take(end.div_ceil(64)).skip(from / 64) {
            let word = (if taken { *word } else { !*word }) >> skip << skip;
            if word != 0 {
                return Some(index * 64 + word.trailing_zeros() as usize).filter(|slot| *slot < end);
            }
            skip = 0;
        }
        None
    }

    fn is_taken(&self, slot: usize) -> bool {
        self.taken.get(slot / 64).is_none_or(|word| word >> (slot % 64) & 1 != 0)
    }

    fn mark(&mut self, first: usize, count: usize, taken: bool) {
        for slot in first..first + count {
            if let Some(word) = self.taken.get_mut(slot / 64) {
                let bit = 1 << (slot % 64);
                *word = if taken { *word | bit } else { *word & !bit };
            }
        }
        self.free_count = if taken { self.free_count - count } else { self.free_count + count };
    }
}

#[cfg(test)]
mod tests;

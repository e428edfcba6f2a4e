//! Ranges without other ranges, in whole pages, with no memory to keep anything in.
//!
//! Entries come in any order, touch and overlap. Sorting them takes memory, which there is none of before there is a
//! heap. So each free range is looked for anew by passes over the map: the lowest free address, the nearest range in
//! use above it, and how far free entries carry on from there. Price: time in proportion to the square of the number of
//! entries, some ten thousand steps for a UEFI map of 130 entries.
//!
//! Free entries are joined before anything is rounded to pages, so that a page in two of them is not lost. A page is
//! given only if all of it is free. The last page of the address space never is: no range could end behind it.

use core::cmp::Reverse;
use core::iter;
use core::ops::Range;

use crate::map::{Entry, Kind, MemoryMap, Span};

/// What is free in a memory map: what every entry calls free, above the first MiB, in whole pages of 4 KiB.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Free<'a, M> {
    map: M,
    without: &'a [Range<u64>],
    from: u64,
    below: Option<u64>,
    page_len: u64,
    loader: bool,
    acpi: bool,
}

impl<M: MemoryMap> Free<'_, M> {
    /// What is free in `map`.
    pub const fn new(map: M) -> Self {
        Self { map, without: &[], from: 1 << 20, below: None, page_len: 4096, loader: false, acpi: false }
    }
}

impl<'a, M: MemoryMap> Free<'a, M> {
    /// Leaves out these ranges of physical addresses too, which the kernel knows of and the map does not.
    pub fn without(self, in_use: &'a [Range<u64>]) -> Self {
        Self { without: in_use, ..self }
    }

    /// Leaves out everything below an address: 1 MiB if this is not called.
    ///
    /// On a PC the first MiB holds what firmware left there and the code that other CPUs start with. Elsewhere there is
    /// seldom RAM, and what is there is mostly the firmware's. With 0 a heap may also get the page at address 0, unless
    /// it would lie at the null pointer.
    pub fn from(self, address: u64) -> Self {
        Self { from: address, ..self }
    }

    /// Leaves out everything from an address on: what the page tables do not map, or what a device cannot reach.
    pub fn below(self, address: u64) -> Self {
        Self { below: Some(address), ..self }
    }

    /// In whole pages of `len` bytes, rounded up to a power of two: 4096 if this is not called.
    pub fn pages(self, len: u64) -> Self {
        Self { page_len: len.checked_next_power_of_two().unwrap_or(1 << 63), ..self }
    }

    /// Counts [`Kind::Loader`] or [`Kind::Acpi`] as free. (The others stay what they are.)
    ///
    /// Only once nothing of it is in use any more. Under UEFI the stack and the page tables that a kernel starts with
    /// are in such memory, under Limine also the memory map itself.
    pub fn and(self, kind: Kind) -> Self {
        Self { loader: self.loader || kind == Kind::Loader, acpi: self.acpi || kind == Kind::Acpi, ..self }
    }

    /// The free ranges, from low to high addresses; no two touch.
    pub fn ranges(&self) -> Ranges<'_, 'a, M> {
        Ranges { free: self, at: Some(0) }
    }

    /// The free ranges, from the longest to the shortest: for a provider that may have no room for all of them.
    pub fn longest_first(&self) -> LongestFirst<'_, 'a, M> {
        LongestFirst { free: self, last: None }
    }

    /// Bytes in all free ranges.
    #[must_use]
    pub fn total_len(&self) -> u64 {
        self.ranges().map(|range| range.end - range.start).sum()
    }

    pub(crate) const fn page_len(&self) -> u64 {
        self.page_len
    }

    fn is_free(&self, entry: Entry) -> bool {
        match entry.kind() {
            Kind::Free => true,
            Kind::Loader => self.loader,
            Kind::Acpi => self.acpi,
            Kind::Used => false,
        }
    }

    fn open(&self) -> impl Iterator<Item = Span> {
        self.map.entries().filter(|entry| self.is_free(*entry)).filter_map(Entry::span)
    }

    /// Whatever may not be given, for whichever reason.
    fn closed(&self) -> impl Iterator<Item = Span> {
        let low = Entry::new(0, self.from, Kind::Used);
        let high = self.below.map(|address| Entry::new(address, u64::MAX, Kind::Used));
        let without = self.without.iter().map(|range| Entry::between(range.start, range.end, Kind::Used));
        self.map
            .entries()
            .filter(|entry| !self.is_free(*entry))
            .chain(iter::once(low))
            .chain(high)
            .chain(without)
            .filter_map(Entry::span)
    }

    /// The lowest free addresses from `at` on, as far as they go; not rounded.
    fn next_from(&self, mut at: u64) -> Option<Span> {
        loop {
            let first = self.open().filter(|open| open.last >= at).map(|open| open.first.max(at)).min()?;
            match self.closed().filter(|closed| closed.contains(first)).map(|closed| closed.last).max() {
                Some(last) => at = last.checked_add(1)?,
                None => return Some(Span { first, last: self.end_of(first) }),
            }
        }
    }

    /// The last address up to which everything from the free address `first` on is free.
    fn end_of(&self, first: u64) -> u64 {
        let barrier = self.closed().map(|closed| closed.first).filter(|start| *start > first).min();
        let limit = barrier.map_or(u64::MAX, |barrier| barrier - 1);
        let mut last = first;
        while last < limit {
            let further = self.open().filter(|open| open.first <= last + 1 && open.last > last).map(|open| open.last);
            match further.max() {
                Some(further) => last = further.min(limit),
                None => break,
            }
        }
        last
    }

    /// The whole pages of a span.
    fn pages_of(&self, span: Span) -> Option<Range<u64>> {
        let start = span.first.checked_next_multiple_of(self.page_len)?;
        let end = span.last.saturating_add(1) & !(self.page_len - 1);
        (start < end).then_some(start..end)
    }
}

/// The free ranges of a map by address; see [`Free::ranges`].
#[derive(Clone, Debug)]
pub struct Ranges<'f, 'a, M> {
    free: &'f Free<'a, M>,
    /// Where the next one is looked for; nothing is left at `None`.
    at: Option<u64>,
}

impl<M: MemoryMap> Iterator for Ranges<'_, '_, M> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        loop {
            let span = self.free.next_from(self.at?);
            self.at = span.and_then(|span| span.last.checked_add(1));
            if let Some(range) = self.free.pages_of(span?) {
                return Some(range);
            }
        }
    }
}

/// The free ranges of a map by length; see [`Free::longest_first`].
#[derive(Clone, Debug)]
pub struct LongestFirst<'f, 'a, M> {
    free: &'f Free<'a, M>,
    last: Option<Range<u64>>,
}

impl<M: MemoryMap> Iterator for LongestFirst<'_, '_, M> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        // Longest first, of equals the lowest first: no two ranges have the same key.
        let key = |range: &Range<u64>| (Reverse(range.end - range.start), range.start);
        let done = self.last.as_ref().map(key);
        let next = self.free.ranges().filter(|range| done.is_none_or(|done| key(range) > done)).min_by_key(key);
        self.last.clone_from(&next);
        next
    }
}

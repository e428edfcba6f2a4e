//! What a memory map is to this crate: entries in any order, each with a kind.
//!
//! A map is asked for its entries many times over, since there is nowhere to keep them. So it is a trait with one
//! method that starts again, not one iterator: not every loader's crate has iterators that can be cloned.

use core::error::Error;
use core::fmt;

/// What a map says of a range of physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// RAM that nobody uses.
    Free,
    /// RAM that the loader or the firmware uses, and that is free once the kernel has left its stack, its page tables
    /// and whatever else of it. Counts as used, unless [`Free::and`](crate::Free::and) says otherwise.
    Loader,
    /// RAM with ACPI tables, free once they are read. Counts as used, unless [`Free::and`](crate::Free::and) says
    /// otherwise.
    Acpi,
    /// Anything else.
    Used,
}

/// One entry of a map: a range of physical addresses, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    start: u64,
    len: u64,
    kind: Kind,
}

impl Entry {
    /// `len` bytes from the physical address `start` on. One that would reach beyond the address space ends there; one
    /// of no bytes says nothing.
    #[must_use]
    pub const fn new(start: u64, len: u64, kind: Kind) -> Self {
        Self { start, len, kind }
    }

    /// An entry by its end, which is the address behind its last byte. One that ends before it starts says nothing.
    #[must_use]
    pub const fn between(start: u64, end: u64, kind: Kind) -> Self {
        Self { start, len: end.saturating_sub(start), kind }
    }

    /// What it is.
    #[must_use]
    pub const fn kind(self) -> Kind {
        self.kind
    }

    pub(crate) fn span(self) -> Option<Span> {
        let behind_first = self.len.checked_sub(1)?;
        Some(Span { first: self.start, last: self.start.saturating_add(behind_first) })
    }
}

/// A memory map: entries in any order, which may touch and overlap. Of addresses in several entries all have to be
/// free.
pub trait MemoryMap {
    /// All entries, from the first one on each time.
    fn entries(&self) -> impl Iterator<Item = Entry>;
}

impl MemoryMap for [Entry] {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        self.iter().copied()
    }
}

impl<M: MemoryMap + ?Sized> MemoryMap for &M {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        (**self).entries()
    }
}

/// The loader handed over no memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemoryMap;

impl fmt::Display for NoMemoryMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the loader handed over no memory map")
    }
}

impl Error for NoMemoryMap {}

/// Addresses from `first` to `last`, both included: at least one, and also the last one there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl Span {
    pub(crate) fn contains(self, address: u64) -> bool {
        (self.first..=self.last).contains(&address)
    }
}

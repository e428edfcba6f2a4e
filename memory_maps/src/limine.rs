//! The map of the Limine boot protocol, by the types of the `limine` crate 0.5, the last that builds on stable Rust.

use limine::memory_map::{self, EntryType};

use crate::{Entry, Kind, MemoryMap};

/// The entries of a memory map response.
///
/// The map marks image, modules and what the loader uses. [`Kind::Loader`] is its reclaimable memory: the stack and the
/// page tables that the kernel starts with, and all responses, this map among them.
#[derive(Clone, Copy)]
#[expect(missing_debug_implementations, reason = "the loader's crate has none for an entry")]
pub struct Map<'a>(&'a [&'a memory_map::Entry]);

impl<'a> Map<'a> {
    /// What the response's `entries()` gives.
    #[must_use]
    pub const fn new(entries: &'a [&'a memory_map::Entry]) -> Self {
        Self(entries)
    }
}

impl MemoryMap for Map<'_> {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        self.0.iter().map(|entry| {
            let kind = match entry.entry_type {
                EntryType::USABLE => Kind::Free,
                EntryType::BOOTLOADER_RECLAIMABLE => Kind::Loader,
                EntryType::ACPI_RECLAIMABLE => Kind::Acpi,
                _ => Kind::Used,
            };
            Entry::new(entry.base, entry.length, kind)
        })
    }
}

//! UEFI's map, by `uefi-raw`'s types, which are the `uefi` crate's too.
//!
//! What `exit_boot_services` returns goes in as it is:
//!
//! ```ignore
//! let map = unsafe { uefi::boot::exit_boot_services(None) };
//! let free = Free::new(Map::new(map.entries()));
//! ```

use core::fmt;

use uefi_raw::table::boot::{MemoryDescriptor, MemoryType};

use crate::{Entry, Kind, MemoryMap};

/// A map's descriptors.
///
/// The map marks the image, and everything that was allocated, this map among it. [`Kind::Loader`] is the boot
/// services' memory, which the firmware no longer needs after `exit_boot_services`, **but the kernel does**: its stack
/// is there and its page tables and descriptor tables are, until it has set up its own.
#[derive(Clone)]
pub struct Map<I>(I);

impl<'a, I: Iterator<Item = &'a MemoryDescriptor> + Clone> Map<I> {
    /// The map of these descriptors: those of the last map, after which nothing was allocated.
    #[must_use]
    pub const fn new(descriptors: I) -> Self {
        Self(descriptors)
    }
}

impl<'a, I: Iterator<Item = &'a MemoryDescriptor> + Clone> MemoryMap for Map<I> {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        self.0.clone().map(|descriptor| {
            let kind = match descriptor.ty {
                MemoryType::CONVENTIONAL => Kind::Free,
                MemoryType::BOOT_SERVICES_CODE | MemoryType::BOOT_SERVICES_DATA => Kind::Loader,
                MemoryType::ACPI_RECLAIM => Kind::Acpi,
                _ => Kind::Used,
            };
            Entry::new(descriptor.phys_start, descriptor.page_count.saturating_mul(4096), kind)
        })
    }
}

impl<I> fmt::Debug for Map<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map").finish_non_exhaustive()
    }
}

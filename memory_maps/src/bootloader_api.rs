//! The map of the [`bootloader`](https://crates.io/crates/bootloader) crate, by `bootloader_api`'s types.

use core::iter;

use bootloader_api::BootInfo;
use bootloader_api::info::MemoryRegionKind;

use crate::{Entry, Kind, MemoryMap};

/// The memory map of a boot information.
///
/// The map marks what the loader uses, page tables and boot information among it, and the kernel may not use that. The
/// kernel's file and the RAM disk are cut out by their own fields as well.
#[derive(Clone, Copy, Debug)]
pub struct Map<'a>(&'a BootInfo);

impl<'a> Map<'a> {
    /// The map that the entry point was given.
    #[must_use]
    pub const fn new(info: &'a BootInfo) -> Self {
        Self(info)
    }
}

impl MemoryMap for Map<'_> {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        let info = self.0;
        let regions = info.memory_regions.iter().map(|region| {
            let kind = if region.kind == MemoryRegionKind::Usable { Kind::Free } else { Kind::Used };
            Entry::between(region.start, region.end, kind)
        });
        let kernel = Entry::new(info.kernel_addr, info.kernel_len, Kind::Used);
        let disk = info.ramdisk_addr.into_option().map(|start| Entry::new(start, info.ramdisk_len, Kind::Used));
        regions.chain(iter::once(kernel)).chain(disk)
    }
}

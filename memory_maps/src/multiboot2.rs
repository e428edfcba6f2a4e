//! The map of a Multiboot2 loader such as GRUB, by the `multiboot2` crate's types.

use core::fmt;
use core::iter;
use core::ops::Range;

use multiboot2::{BootInformation, MemoryAreaType, MemoryMapTag};

use crate::{Entry, Kind, MemoryMap, NoMemoryMap};

/// The memory map of a boot information, without the kernel's image, the modules and the information itself, none of
/// which the map marks.
#[derive(Clone)]
pub struct Map<'a> {
    info: &'a BootInformation<'a>,
    areas: &'a MemoryMapTag,
    at: u64,
    image: Range<u64>,
}

impl<'a> Map<'a> {
    /// The map in `info`, which lies at the physical address `at` (what the loader left in `ebx`). `image` is the
    /// kernel's own range of physical addresses, `.bss` and boot stack included.
    ///
    /// # Errors
    /// The loader gave no map of this form. One that left UEFI's boot services running gives UEFI's alone; see the
    /// module `uefi`.
    pub fn new(info: &'a BootInformation<'a>, at: u64, image: Range<u64>) -> Result<Self, NoMemoryMap> {
        let areas = info.memory_map_tag().ok_or(NoMemoryMap)?;
        Ok(Self { info, areas, at, image })
    }
}

impl MemoryMap for Map<'_> {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        let areas = self.areas.memory_areas().iter().map(|area| {
            let kind = match area.typ() {
                MemoryAreaType::Available => Kind::Free,
                MemoryAreaType::AcpiAvailable => Kind::Acpi,
                _ => Kind::Used,
            };
            Entry::new(area.start_address(), area.size(), kind)
        });
        let modules = self
            .info
            .module_tags()
            .map(|module| Entry::between(module.start_address().into(), module.end_address().into(), Kind::Used));
        let info = Entry::new(self.at, self.info.total_size() as u64, Kind::Used);
        let image = Entry::between(self.image.start, self.image.end, Kind::Used);
        areas.chain(modules).chain(iter::once(info)).chain(iter::once(image))
    }
}

impl fmt::Debug for Map<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map").field("at", &self.at).field("image", &self.image).finish_non_exhaustive()
    }
}

//! The map that a machine monitor hands to a kernel started by its PVH entry (QEMU, Cloud Hypervisor, Firecracker), by
//! the `pvh` crate's types.

use core::fmt;
use core::ops::Range;

use pvh::start_info::reader::{MemMap, StartInfoReader};
use pvh::start_info::{MemmapTableEntry, MemmapType, ModlistEntry, StartInfo};

use crate::{Entry, Kind, MemoryMap, NoMemoryMap};

/// The memory map of a start info, without the kernel's image, the modules, and the start info with the tables and
/// the command line that it points to.
pub struct Map<'a, M> {
    info: &'a StartInfoReader<'a, M>,
    at: u64,
    image: Range<u64>,
}

impl<'a, M: MemMap> Map<'a, M> {
    /// The map in `info`, which lies at the physical address `at` (what the loader left in `ebx`). `image` is the
    /// kernel's own range of physical addresses, `.bss` and boot stack included.
    ///
    /// # Errors
    /// The start info is of version 0, which has no map.
    pub fn new(info: &'a StartInfoReader<'a, M>, at: u64, image: Range<u64>) -> Result<Self, NoMemoryMap> {
        if info.memmap().is_empty() { Err(NoMemoryMap) } else { Ok(Self { info, at, image }) }
    }
}

impl<M: MemMap> MemoryMap for Map<'_, M> {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        let table = self.info.memmap().iter().map(|entry| {
            let kind = match entry.ty() {
                MemmapType::Ram => Kind::Free,
                MemmapType::Acpi => Kind::Acpi,
                _ => Kind::Used,
            };
            Entry::new(entry.addr, entry.size, kind)
        });
        let raw = self.info.raw();
        let modules = self.info.modlist().map(|module| Entry::new(module.raw().paddr, module.raw().size, Kind::Used));
        let list = array::<ModlistEntry>(raw.modlist_paddr, raw.nr_modules);
        let map = array::<MemmapTableEntry>(raw.memmap_paddr, raw.memmap_entries);
        let line_len = self.info.cmdline().map_or(0, |line| line.to_bytes_with_nul().len());
        let line = Entry::new(raw.cmdline_paddr, line_len as u64, Kind::Used);
        let image = Entry::between(self.image.start, self.image.end, Kind::Used);
        let own = [array::<StartInfo>(self.at, 1), list, map, line, image];
        table.chain(modules).chain(own)
    }
}

/// What an array of `T` at a physical address takes.
fn array<T>(at: u64, count: u32) -> Entry {
    Entry::new(at, u64::from(count) * size_of::<T>() as u64, Kind::Used)
}

impl<M> Clone for Map<'_, M> {
    fn clone(&self) -> Self {
        Self { image: self.image.clone(), ..*self }
    }
}

impl<M> fmt::Debug for Map<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map").field("at", &self.at).field("image", &self.image).finish_non_exhaustive()
    }
}

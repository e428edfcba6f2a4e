//! The start info that a PVH loader hands over: command line, memory map, and where the ACPI tables are.

use core::ptr::with_exposed_provenance;

use crate::{Region, test};

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_len: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    start: u64,
    len: u64,
    kind: u32,
    reserved: u32,
}

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

/// The start info, read.
pub(super) struct Start {
    info: StartInfo,
}

impl Start {
    /// Reads the start info at a physical address.
    pub(super) fn read(address: usize) -> Self {
        // SAFETY: the loader put a start info there, and all of the first 4 GiB is mapped where it lies.
        let info = unsafe { with_exposed_provenance::<StartInfo>(address).read_unaligned() };
        if info.magic != MAGIC || info.version < 1 {
            test::fail(format_args!("not started by a PVH loader that gives a memory map"));
        }
        Self { info }
    }

    /// Copies the command line into `buffer`, which has to hold it.
    pub(super) fn command_line<'a>(&self, buffer: &'a mut [u8]) -> &'a str {
        let mut source = with_exposed_provenance::<u8>(self.info.command_line as usize);
        let mut len = 0;
        // An address of 0 means that there is no command line.
        while !source.is_null() {
            // SAFETY: the loader ends the text by a zero, and the loop ends there.
            let byte = unsafe { source.read() };
            if byte == 0 {
                break;
            }
            if len == buffer.len() {
                test::fail(format_args!("the command line is longer than {len} bytes"));
            }
            buffer[len] = byte;
            len += 1;
            source = source.wrapping_add(1);
        }
        core::str::from_utf8(&buffer[..len]).unwrap_or_default()
    }

    pub(super) fn rsdp(&self) -> usize {
        self.info.rsdp as usize
    }

    /// The usable ranges of RAM, as the firmware gave them.
    pub(super) fn ram(&self) -> impl Iterator<Item = Region> + '_ {
        let map = with_exposed_provenance::<Entry>(self.info.memory_map as usize);
        (0..self.info.memory_map_len as usize)
            // SAFETY: the loader promises that many entries.
            .map(move |i| unsafe { map.wrapping_add(i).read_unaligned() })
            .filter(|entry| entry.kind == RAM)
            .map(|entry| Region { start: entry.start as usize, len: entry.len as usize })
    }
}

//! What the firmware's device tree says of the machine. The tree stays where it is, and its memory is nobody's.

use core::ops::Range;
use core::ptr::with_exposed_provenance;

use fdt::Fdt;

use crate::{Region, start::MAX_CPUS, test};

/// A device tree in memory.
pub(crate) struct Tree {
    fdt: Fdt<'static>,
    range: Range<usize>,
}

impl Tree {
    /// The most ranges that [`used`](Self::used) lists.
    const MAX_USED: usize = 16;

    /// The tree at an address.
    ///
    /// # Safety
    /// If there is a tree, it is readable and nobody writes to it any more.
    pub(crate) unsafe fn read(address: usize) -> Self {
        // SAFETY: as the caller promises; without a tree the first word is not that of one.
        match unsafe { Fdt::from_ptr(with_exposed_provenance(address)) } {
            Ok(fdt) => Self { range: address..address + fdt.total_size(), fdt },
            Err(error) => test::fail(format_args!("no device tree at {address:#x}: {error:?}")),
        }
    }

    /// The kernel's command line.
    pub(crate) fn command_line(&self) -> &'static str {
        let bootargs = self.fdt.find_node("/chosen").and_then(|chosen| chosen.property("bootargs"));
        bootargs.and_then(|args| args.as_str()).unwrap_or_default()
    }

    /// All RAM.
    pub(crate) fn ram(&self) -> impl Iterator<Item = Region> + '_ {
        let memory = self.fdt.all_nodes().filter(|node| node.name.split('@').next() == Some("memory"));
        memory.filter_map(|node| node.reg()).flatten().map(region)
    }

    /// What of the RAM is in use: the kernel's image, the tree, and what the firmware keeps.
    pub(crate) fn used(&self) -> [Range<usize>; Self::MAX_USED] {
        let mut used = [const { 0..0 }; Self::MAX_USED];
        let block = self.fdt.memory_reservations().map(|kept| {
            let start = kept.address().addr();
            start..start + kept.size()
        });
        let nodes = self.fdt.find_node("/reserved-memory").into_iter().flat_map(|node| node.children());
        let nodes = nodes.filter_map(|node| node.reg()).flatten().map(|kept| region(kept).start..region(kept).end());
        let mut all = [crate::memory::image(), self.range.clone()].into_iter().chain(block).chain(nodes);
        used.iter_mut().zip(&mut all).for_each(|(place, range)| *place = range);
        if all.next().is_some() {
            test::fail(format_args!("more than {} ranges of memory are reserved", Self::MAX_USED));
        }
        used
    }

    /// The hardware's numbers of the CPUs, `first` at the first place, and how many there are.
    pub(crate) fn cpus(&self, first: usize) -> ([usize; MAX_CPUS], usize) {
        let mut cpus = [first; MAX_CPUS];
        let mut count = 1;
        for id in self.fdt.cpus().map(|cpu| cpu.ids().first()).filter(|id| *id != first).take(MAX_CPUS - 1) {
            cpus[count] = id;
            count += 1;
        }
        (cpus, count)
    }

    /// How many cycles the clock has in a second, where the tree says it.
    #[cfg(target_arch = "riscv64")]
    pub(crate) fn timebase_frequency(&self) -> u64 {
        let cpus = self.fdt.find_node("/cpus").and_then(|cpus| cpus.property("timebase-frequency"));
        match cpus.and_then(|frequency| frequency.as_usize()) {
            Some(frequency) => frequency as u64,
            None => test::fail(format_args!("the device tree names no timebase-frequency")),
        }
    }

    /// Where the registers of a device are: the range of that number.
    pub(crate) fn device(&self, compatible: &str, number: usize) -> Region {
        let device = self.fdt.find_compatible(&[compatible]).and_then(|node| node.reg());
        match device.and_then(|mut ranges| ranges.nth(number)) {
            Some(range) => region(range),
            None => test::fail(format_args!("the device tree has no {compatible} with {} ranges", number + 1)),
        }
    }
}

fn region(range: fdt::standard_nodes::MemoryRegion) -> Region {
    Region { start: range.starting_address.addr(), len: range.size.unwrap_or(0) }
}

//! The page tables that all CPUs run on.

use x86_64::structures::paging::mapper::MapToError;
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, Page, PageSize, PageTable, PageTableFlags as Flags, PhysFrame, Size2MiB,
    Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use super::apic;
use crate::memory::{self, PAGE, Ram, Rights, Stacks};
use crate::{Region, test};

// SAFETY: `take` hands out each page once.
unsafe impl FrameAllocator<Size4KiB> for Ram {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        PhysFrame::from_start_address(PhysAddr::new(self.take(PAGE) as u64)).ok()
    }
}

/// Builds the page tables and returns where they are. They are not in use yet.
pub(super) fn build(ram: &mut Ram, stacks: Stacks, all: impl Iterator<Item = Region>) -> usize {
    let root = ram.take(PAGE);
    let table = core::ptr::with_exposed_provenance_mut::<PageTable>(root);
    // SAFETY: `root` is a zeroed page of our own, which is an empty table; it lives for ever.
    let table = unsafe { &mut *table };
    // SAFETY: physical memory is mapped at offset 0, as far as `take` gives any.
    let mut mapper = unsafe { OffsetPageTable::new(table, VirtAddr::zero()) };
    let mut map = Tables { mapper: &mut mapper, ram };

    let data = Flags::PRESENT | Flags::WRITABLE | Flags::NO_EXECUTE;
    memory::each_page(stacks, all, |page| {
        let flags = match page.rights {
            Rights::Code => Flags::PRESENT,
            Rights::Constant => Flags::PRESENT | Flags::NO_EXECUTE,
            Rights::Data => data,
        };
        if page.large {
            map.page::<Size2MiB>(page.start, flags);
        } else {
            map.page::<Size4KiB>(page.start, flags);
        }
    });
    map.page::<Size4KiB>(apic::base(), data | Flags::NO_CACHE);
    root
}

struct Tables<'a, 'b> {
    mapper: &'a mut OffsetPageTable<'b>,
    ram: &'a mut Ram,
}

impl Tables<'_, '_> {
    fn page<S: PageSize>(&mut self, address: usize, flags: Flags)
    where
        for<'b> OffsetPageTable<'b>: Mapper<S>,
        MapToError<S>: core::fmt::Debug,
    {
        let page = Page::<S>::containing_address(VirtAddr::new(address as u64));
        let frame = PhysFrame::<S>::containing_address(PhysAddr::new(address as u64));
        // SAFETY: these tables are not in use yet, and map every page to itself.
        let mapped = unsafe { self.mapper.map_to(page, frame, flags, self.ram) };
        match mapped {
            Ok(flush) => flush.ignore(),
            Err(error) => test::fail(format_args!("cannot map {address:#x}: {error:?}")),
        }
    }
}

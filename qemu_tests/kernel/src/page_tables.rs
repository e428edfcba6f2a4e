//! The page tables that all CPUs run on, where one crate writes them for several architectures.

#[cfg(target_arch = "aarch64")]
use page_table_multiarch::aarch64::A64PageTable as PageTable;
#[cfg(target_arch = "riscv64")]
use page_table_multiarch::riscv::Sv39PageTable as PageTable;
use page_table_multiarch::{MappingFlags as Flags, PageSize, PagingHandler, PagingResult};

use crate::memory::{self, CODE_ALIAS, PAGE, Ram, Rights, Stacks};
use crate::{Region, sync::Lock, test};

/// The RAM while tables are made of it.
static RAM: Lock<Option<Ram>> = Lock::new(None);

/// Tables are in boot memory, which is mapped where it lies.
struct BootMemory;

impl PagingHandler for BootMemory {
    fn alloc_frames(num: usize, align: usize) -> Option<memory_addr::PhysAddr> {
        debug_assert!(align <= PAGE);
        RAM.with(|ram| ram.as_mut().map(|ram| ram.take(num * PAGE).into()))
    }

    fn dealloc_frames(_: memory_addr::PhysAddr, _: usize) {}

    fn phys_to_virt(physical: memory_addr::PhysAddr) -> memory_addr::VirtAddr {
        physical.as_usize().into()
    }
}

/// Builds the page tables, for all RAM and some devices, and returns where they are. They are not in use yet.
pub(crate) fn build(
    ram: Ram,
    stacks: Stacks,
    all: impl Iterator<Item = Region>,
    devices: impl Iterator<Item = Region>,
) -> (usize, Ram) {
    RAM.with(|place| *place = Some(ram));
    let mut table = done(PageTable::<BootMemory>::try_new());
    let mut map = table.cursor();
    memory::each_page(stacks, all, |page| {
        let flags = match page.rights {
            Rights::Code => Flags::READ | Flags::EXECUTE,
            Rights::Constant => Flags::READ,
            Rights::Data => Flags::READ | Flags::WRITE,
        };
        let size = if page.large { PageSize::Size2M } else { PageSize::Size4K };
        done(map.map(page.start.into(), page.start.into(), size, flags));
        if page.rights == Rights::Code {
            let alias = page.start + CODE_ALIAS;
            done(map.map(alias.into(), page.start.into(), size, Flags::READ | Flags::WRITE));
        }
    });
    for device in devices {
        for page in (device.start & !(PAGE - 1)..device.end()).step_by(PAGE) {
            done(map.map(page.into(), page.into(), PageSize::Size4K, Flags::READ | Flags::WRITE | Flags::DEVICE));
        }
    }
    map.flush();
    drop(map);
    let root = table.root_paddr().as_usize();
    // They live for ever.
    core::mem::forget(table);
    let ram = RAM.with(Option::take);
    (root, ram.unwrap_or_else(|| test::fail(format_args!("the boot memory is gone"))))
}

fn done<T>(result: PagingResult<T>) -> T {
    result.unwrap_or_else(|error| test::fail(format_args!("the page tables cannot be built: {error:?}")))
}

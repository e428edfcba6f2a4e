//! Which RAM is whose, and the page tables.
//!
//! Everything is mapped where it lies: what a test calls an address is the same on both sides of the page tables, and
//! the upper half of the address space is free for tests that map pages themselves. Rights are real all the same: code
//! is not writable, data is not executable, address 0 is not mapped, and below each stack lies a page that is not.
//! Boot memory is only taken, never given back, and only while CPU 0 is alone.

use x86_64::structures::paging::mapper::MapToError;
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, Page, PageSize, PageTable, PageTableFlags as Flags, PhysFrame, Size2MiB,
    Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use super::{MAX_CPUS, apic};
use crate::{Region, test};

const PAGE: usize = 4096;
const LARGE_PAGE: usize = 2 << 20;
const MIB: usize = 1 << 20;
/// The boot tables end here.
const FOUR_GIB: usize = 4 << 30;

/// The length of the stack that `main` and the closures of `smp::on_all` run on, with its guard page.
pub const STACK_LEN: usize = 256 << 10;
/// The length of the stacks for double faults and NMIs, with their guard pages.
const FAULT_STACK_LEN: usize = 32 << 10;
/// The length of a thread's stack, with its guard page.
const THREAD_STACK_LEN: usize = 64 << 10;
/// How many threads there can be at once.
pub(crate) const THREAD_STACKS: usize = 64;

unsafe extern "C" {
    static kernel_start: u8;
    static kernel_text_end: u8;
    static kernel_rodata_end: u8;
    static kernel_end: u8;
}

/// The address of a symbol of the linker script.
macro_rules! symbol {
    ($name:ident) => {
        (&raw const $name).addr()
    };
}

/// The RAM that is still nobody's.
pub(super) struct Ram {
    regions: [Region; Self::MAX],
    count: usize,
}

impl Ram {
    /// More ranges than any machine here has; more are ignored.
    const MAX: usize = 32;

    /// All RAM above 1 MiB but for the image. Below it live the firmware's leftovers and the trampoline.
    pub(super) fn new(all: impl Iterator<Item = Region>) -> Self {
        let image = symbol!(kernel_start)..symbol!(kernel_end);
        let mut ram = Self { regions: [Region { start: 0, len: 0 }; Self::MAX], count: 0 };
        for region in all {
            let start = region.start.max(MIB).next_multiple_of(PAGE);
            let end = region.end() & !(PAGE - 1);
            if start < image.end && image.start < end {
                ram.push(start, image.start);
                ram.push(image.end, end);
            } else {
                ram.push(start, end);
            }
        }
        ram
    }

    fn push(&mut self, start: usize, end: usize) {
        if start < end && self.count < Self::MAX {
            self.regions[self.count] = Region { start, len: end - start };
            self.count += 1;
        }
    }

    /// What is left.
    pub(super) fn regions(&self) -> &[Region] {
        &self.regions[..self.count]
    }

    /// Takes whole pages, zeroed, from the front of the first region below 4 GiB that has them.
    pub(super) fn take(&mut self, len: usize) -> usize {
        let len = len.next_multiple_of(PAGE);
        let fits = |region: &&mut Region| region.len >= len && region.start + len <= FOUR_GIB;
        let Some(region) = self.regions[..self.count].iter_mut().find(fits) else {
            test::fail(format_args!("out of boot memory: {len} bytes"))
        };
        let start = region.start;
        region.start += len;
        region.len -= len;
        // SAFETY: this is RAM that belonged to nobody until now, and it is mapped, as the boot tables map the first
        // 4 GiB.
        unsafe { core::ptr::with_exposed_provenance_mut::<u8>(start).write_bytes(0, len) };
        start
    }
}

// SAFETY: `take` hands out each page once.
unsafe impl FrameAllocator<Size4KiB> for Ram {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        PhysFrame::from_start_address(PhysAddr::new(self.take(PAGE) as u64)).ok()
    }
}

/// All stacks, one after the other, each with its guard page at its low end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stacks {
    start: usize,
    cpus: usize,
}

impl Stacks {
    const PER_CPU: usize = STACK_LEN + 2 * FAULT_STACK_LEN;

    pub(super) fn new(ram: &mut Ram, cpus: usize) -> Self {
        debug_assert!(cpus <= MAX_CPUS);
        let start = ram.take(cpus * Self::PER_CPU + THREAD_STACKS * THREAD_STACK_LEN);
        Self { start, cpus }
    }

    fn end(self) -> usize {
        self.thread(THREAD_STACKS - 1)
    }

    /// The end of the stack of `cpu`, from which it grows down; likewise the others.
    pub(super) fn main(self, cpu: usize) -> usize {
        self.start + cpu * Self::PER_CPU + STACK_LEN
    }

    pub(super) fn fault(self, cpu: usize) -> usize {
        self.main(cpu) + FAULT_STACK_LEN
    }

    pub(super) fn nmi(self, cpu: usize) -> usize {
        self.fault(cpu) + FAULT_STACK_LEN
    }

    pub(super) fn thread(self, thread: usize) -> usize {
        self.start + self.cpus * Self::PER_CPU + (thread + 1) * THREAD_STACK_LEN
    }

    fn is_guard(self, page: usize) -> bool {
        let cpus_end = self.start + self.cpus * Self::PER_CPU;
        if page < self.start || page >= self.end() {
            false
        } else if page >= cpus_end {
            (page - cpus_end) % THREAD_STACK_LEN == 0
        } else {
            [0, STACK_LEN, STACK_LEN + FAULT_STACK_LEN].contains(&((page - self.start) % Self::PER_CPU))
        }
    }

    /// Whether `address` lies in a guard page: a stack ran over.
    pub(super) fn hits_guard(self, address: usize) -> bool {
        self.is_guard(address & !(PAGE - 1))
    }
}

/// Builds the page tables and returns where they are. They are not in use yet.
pub(super) fn build_tables(ram: &mut Ram, stacks: Stacks, all: impl Iterator<Item = Region>) -> usize {
    let root = ram.take(PAGE);
    let table = core::ptr::with_exposed_provenance_mut::<PageTable>(root);
    // SAFETY: `root` is a zeroed page of our own, which is an empty table; it lives for ever.
    let table = unsafe { &mut *table };
    // SAFETY: physical memory is mapped at offset 0, as far as `take` gives any.
    let mut mapper = unsafe { OffsetPageTable::new(table, VirtAddr::zero()) };
    let mut map = Tables { mapper: &mut mapper, ram };

    let data = Flags::PRESENT | Flags::WRITABLE | Flags::NO_EXECUTE;
    let image = symbol!(kernel_start)..symbol!(kernel_end);
    let (text_end, rodata_end) = (symbol!(kernel_text_end), symbol!(kernel_rodata_end));
    for page in image.clone().step_by(PAGE) {
        let flags = match page {
            _ if page < text_end => Flags::PRESENT,
            _ if page < rodata_end => Flags::PRESENT | Flags::NO_EXECUTE,
            _ => data,
        };
        map.page::<Size4KiB>(page, flags);
    }
    let apart = |page: usize, other: core::ops::Range<usize>| page + LARGE_PAGE <= other.start || other.end <= page;
    for region in all {
        // The first page stays unmapped: it is address 0.
        let mut page = region.start.next_multiple_of(PAGE).max(PAGE);
        let end = region.end() & !(PAGE - 1);
        while page < end {
            let large = page % LARGE_PAGE == 0
                && page + LARGE_PAGE <= end
                && apart(page, image.clone())
                && apart(page, stacks.start..stacks.end());
            if large {
                map.page::<Size2MiB>(page, data);
                page += LARGE_PAGE;
            } else {
                if !image.contains(&page) && !stacks.is_guard(page) {
                    map.page::<Size4KiB>(page, data);
                }
                page += PAGE;
            }
        }
    }
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

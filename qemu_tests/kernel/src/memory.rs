//! Which RAM is whose.
//!
//! Everything is mapped where it lies: what a test calls an address is the same on both sides of the page tables, and
//! the upper half of the address space is free for tests that map pages themselves. Rights are real all the same: code
//! is not writable, data is not executable, address 0 is not mapped, and below each stack lies a page that is not.
//! Boot memory is only taken, never given back, and only while CPU 0 is alone.

use core::ops::Range;

use crate::{Region, start::MAX_CPUS, test};

pub(crate) const PAGE: usize = 4096;
const LARGE_PAGE: usize = 2 << 20;
/// What the boot code reaches on every architecture.
const FOUR_GIB: usize = 4 << 30;

/// The length of the stack that `main` and the closures of `smp::on_all` run on, with its guard page.
pub const STACK_LEN: usize = 256 << 10;
/// The length of the stacks for double faults and NMIs, with their guard pages.
pub(crate) const FAULT_STACK_LEN: usize = 32 << 10;
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

/// Where code is mapped once more, writable and not executable: so much higher.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) const CODE_ALIAS: usize = 128 << 30;

/// Where the kernel's image lies.
pub(crate) fn image() -> Range<usize> {
    symbol!(kernel_start)..symbol!(kernel_end)
}

/// The RAM that is still nobody's.
pub(crate) struct Ram {
    regions: [Region; Self::MAX],
    count: usize,
}

impl Ram {
    /// More ranges than any machine here has; more are ignored.
    const MAX: usize = 32;

    /// All RAM in whole pages, but for what is in use.
    pub(crate) fn new(all: impl Iterator<Item = Region>, used: &[Range<usize>]) -> Self {
        let mut ram = Self { regions: [Region { start: 0, len: 0 }; Self::MAX], count: 0 };
        for region in all {
            let (mut start, end) = (region.start.next_multiple_of(PAGE), region.end() & !(PAGE - 1));
            let next = |start| {
                used.iter().filter(move |used| used.start < end && start < used.end).min_by_key(|used| used.start)
            };
            while let Some(used) = next(start) {
                ram.push(start, used.start & !(PAGE - 1));
                start = used.end.next_multiple_of(PAGE);
            }
            ram.push(start, end);
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
    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions[..self.count]
    }

    /// Takes whole pages, zeroed, from the front of the first region below 4 GiB that has them.
    pub(crate) fn take(&mut self, len: usize) -> usize {
        let len = len.next_multiple_of(PAGE);
        let fits = |region: &&mut Region| region.len >= len && region.start + len <= FOUR_GIB;
        let Some(region) = self.regions[..self.count].iter_mut().find(fits) else {
            test::fail(format_args!("out of boot memory: {len} bytes"))
        };
        let start = region.start;
        region.start += len;
        region.len -= len;
        // SAFETY: this is RAM that belonged to nobody until now, below 4 GiB, where the boot code can write.
        unsafe { core::ptr::with_exposed_provenance_mut::<u8>(start).write_bytes(0, len) };
        start
    }
}

/// Boot memory as a value for which all bits zero are fine.
pub(crate) fn own<T: Copy>(address: usize) -> &'static mut T {
    let pointer = core::ptr::with_exposed_provenance_mut(address);
    // SAFETY: only for integers and structs of integers, over zeroed pages that `Ram::take` just gave away for good.
    unsafe { &mut *pointer }
}

/// All stacks, one after the other, each with its guard page at its low end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stacks {
    start: usize,
    cpus: usize,
}

impl Stacks {
    const PER_CPU: usize = STACK_LEN + 2 * FAULT_STACK_LEN;

    pub(crate) fn new(ram: &mut Ram, cpus: usize) -> Self {
        debug_assert!(cpus <= MAX_CPUS);
        let start = ram.take(cpus * Self::PER_CPU + THREAD_STACKS * THREAD_STACK_LEN);
        Self { start, cpus }
    }

    fn end(self) -> usize {
        self.thread(THREAD_STACKS - 1)
    }

    /// The end of the stack of `cpu`, from which it grows down; likewise the others.
    pub(crate) fn main(self, cpu: usize) -> usize {
        self.start + cpu * Self::PER_CPU + STACK_LEN
    }

    pub(crate) fn fault(self, cpu: usize) -> usize {
        self.main(cpu) + FAULT_STACK_LEN
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn nmi(self, cpu: usize) -> usize {
        self.fault(cpu) + FAULT_STACK_LEN
    }

    pub(crate) fn thread(self, thread: usize) -> usize {
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
    pub(crate) fn hits_guard(self, address: usize) -> bool {
        self.is_guard(address & !(PAGE - 1))
    }
}

/// How a page is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// Code, which is not writable.
    Code,
    /// Constants, neither writable nor executable.
    Constant,
    /// Everything else, which is not executable.
    Data,
}

/// One page of the kernel's address space: of 2 MiB if it is large.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped {
    pub(crate) start: usize,
    pub(crate) large: bool,
    pub(crate) rights: Rights,
}

/// Calls `map` for each page of the image and of all RAM, but for the pages below stacks.
pub(crate) fn each_page(stacks: Stacks, all: impl Iterator<Item = Region>, mut map: impl FnMut(Mapped)) {
    let image = image();
    let (text_end, rodata_end) = (symbol!(kernel_text_end), symbol!(kernel_rodata_end));
    for start in image.clone().step_by(PAGE) {
        let rights = match start {
            _ if start < text_end => Rights::Code,
            _ if start < rodata_end => Rights::Constant,
            _ => Rights::Data,
        };
        map(Mapped { start, large: false, rights });
    }
    let apart = |page: usize, other: Range<usize>| page + LARGE_PAGE <= other.start || other.end <= page;
    for region in all {
        // The first page stays unmapped: it is address 0.
        let mut start = region.start.next_multiple_of(PAGE).max(PAGE);
        let end = region.end() & !(PAGE - 1);
        while start < end {
            let large = start % LARGE_PAGE == 0
                && start + LARGE_PAGE <= end
                && apart(start, image.clone())
                && apart(start, stacks.start..stacks.end());
            if large || !image.contains(&start) && !stacks.is_guard(start) {
                map(Mapped { start, large, rights: Rights::Data });
            }
            start += if large { LARGE_PAGE } else { PAGE };
        }
    }
}

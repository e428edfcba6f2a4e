//! This kernel's side of the paging provider: the page tables that all CPUs use, frames out of one region of RAM,
//! shootdowns by IPI.
//!
//! Frames are filled with [`POISON`] when they come back and with zeros when they go out, so that who still uses one
//! shows. Calls of the mapper and of the frame allocator fail on demand.
#![allow(dead_code, clippy::allow_attributes, reason = "each kernel uses a part of it")]

use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicUsize, Ordering, Ordering::Relaxed};

use smp_heap::provider::{Paging, PagingProvider, Stale};
use smp_heap_kernel::arch::{cpu_count, vector};
use smp_heap_kernel::{Region, cpu, interrupts, ipi, sync::Lock, test, time};
use x86_64::instructions::tlb;
use x86_64::registers::control::Cr3;
use x86_64::structures::paging::mapper::{
    CleanUp, FlagUpdateError, MapToError, MapperFlush, MapperFlushAll, TranslateError, UnmapError,
};
use x86_64::structures::paging::page::PageRangeInclusive;
use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags, PhysFrame, Size2MiB,
    Size4KiB, Translate,
};
use x86_64::{PhysAddr, VirtAddr};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
/// What a free frame holds.
const POISON: u8 = 0xfd;
/// The vector of shootdowns.
const FLUSH: u8 = vector::FREE + 1;
/// The most frames that there can be: 512 MiB.
const FRAMES: usize = 128 << 10;

/// The most CPUs.
const CPUS: usize = 8;

static FREE: Lock<Frames> =
    Lock::new(Frames { base: 0, count: 0, free: [0; FRAMES / 64], free_count: 0, limit: usize::MAX, filled: true });

/// Calls until one fails, of the mapper's `map_to`; 0: none does.
static MAP_FAILS: AtomicUsize = AtomicUsize::new(0);
/// Pages that were mapped to the frame of another page: by moves.
static BEGUN: AtomicUsize = AtomicUsize::new(0);
static SEEN: [AtomicUsize; CPUS] = [const { AtomicUsize::new(0) }; CPUS];

/// Frames that are free: a bit each.
pub(crate) struct Frames {
    /// Physical address of frame 0, a multiple of 2 MiB; mapped there too.
    base: usize,
    count: usize,
    free: [u64; FRAMES / 64],
    free_count: usize,
    /// How many may still be had.
    limit: usize,
    /// Whether frames are filled when they go out and come back.
    filled: bool,
}

impl Frames {
    fn set(&mut self, frame: usize, free: bool) {
        let Some(word) = self.free.get_mut(frame / 64) else { return };
        let bit = 1 << (frame % 64);
        if (*word & bit != 0) == free {
            test::fail(format_args!("frame {frame} is {} twice", if free { "given back" } else { "taken" }));
        }
        *word ^= bit;
        self.free_count = if free { self.free_count + 1 } else { self.free_count - 1 };
    }

    /// Takes `count` frames from `first` on, all free, and zeroes them.
    fn take(&mut self, first: usize, count: usize) -> PhysAddr {
        (first..first + count).for_each(|frame| self.set(frame, false));
        self.limit -= count;
        let addr = self.base + first * PAGE;
        self.fill(addr, count, 0);
        PhysAddr::new(addr as u64)
    }

    fn give(&mut self, addr: PhysAddr, count: usize) {
        let addr = addr.as_u64() as usize;
        let first = addr.wrapping_sub(self.base) / PAGE;
        if first >= self.count {
            test::fail(format_args!("{addr:#x} is no frame of this pool"));
        }
        (first..first + count).for_each(|frame| self.set(frame, true));
        self.limit = self.limit.saturating_add(count);
        self.fill(addr, count, POISON);
    }

    /// Fills frames that nobody uses.
    fn fill(&self, addr: usize, count: usize, byte: u8) {
        if self.filled {
            // SAFETY: RAM that is mapped where it lies; the caller has just taken it, or just got it back.
            unsafe { with_exposed_provenance_mut::<u8>(addr).write_bytes(byte, count * PAGE) };
        }
    }
}

// SAFETY: a frame is given out while its bit says that it is free, and the bit is cleared.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        if self.limit == 0 {
            return None;
        }
        let (index, word) = self.free.iter().enumerate().find(|(_, word)| **word != 0)?;
        let first = index * 64 + word.trailing_zeros() as usize;
        Some(PhysFrame::containing_address(self.take(first, 1)))
    }
}

/// From the end, so that single frames do not break all of them.
// SAFETY: as above.
unsafe impl FrameAllocator<Size2MiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame<Size2MiB>> {
        let count = HUGE_PAGE / PAGE;
        if self.limit < count {
            return None;
        }
        let all_free = |words: &[u64]| words.iter().all(|word| *word == u64::MAX);
        let index = self.free.chunks_exact(count / 64).rposition(all_free)?;
        Some(PhysFrame::containing_address(self.take(index * count, count)))
    }
}

impl FrameDeallocator<Size4KiB> for Frames {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
        self.give(frame.start_address(), 1);
    }
}

impl FrameDeallocator<Size2MiB> for Frames {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame<Size2MiB>) {
        self.give(frame.start_address(), HUGE_PAGE / PAGE);
    }
}

/// Makes the frames of `region` free, as far as they are whole huge ones, and has this kernel answer shootdowns. Once.
pub(crate) fn set_up(region: Region) {
    let base = region.start.next_multiple_of(HUGE_PAGE);
    let count = ((region.end() - base) / HUGE_PAGE * (HUGE_PAGE / PAGE)).min(FRAMES);
    FREE.with(|frames| {
        (frames.base, frames.count) = (base, count);
        (0..count).for_each(|frame| frames.set(frame, true));
    });
    interrupts::set_handler(FLUSH, |_| see());
}

/// How many frames are free.
pub(crate) fn free_frames() -> usize {
    FREE.with(|frames| frames.free_count)
}

/// At most so many more frames, from now on.
pub(crate) fn limit_frames(count: usize) {
    FREE.with(|frames| frames.limit = count);
}

/// From now on frames are neither zeroed nor poisoned: for who counts what the heap and its provider do.
pub(crate) fn leave_frames_as_they_are() {
    FREE.with(|frames| frames.filled = false);
}

/// The mapper's `map_to` fails at the call with that number from now on, once; 0: never.
pub(crate) fn fail_map(call: usize) {
    MAP_FAILS.store(call, Relaxed);
}

/// Whether the failure that was ordered is still to come.
pub(crate) fn is_map_failure_due() -> bool {
    MAP_FAILS.load(Relaxed) > 0
}

/// How many shootdowns there were.
pub(crate) fn shootdowns() -> usize {
    BEGUN.load(Relaxed)
}

/// Answers all shootdowns that were begun.
fn see() {
    let begun = BEGUN.load(Ordering::Acquire);
    tlb::flush_all();
    if let Some(seen) = SEEN.get(cpu::index()) {
        seen.store(begun, Ordering::Release);
    }
}

fn mapper() -> OffsetPageTable<'static> {
    let root = Cr3::read().0.start_address().as_u64() as usize;
    // SAFETY: the table that all CPUs use lies in RAM, which is mapped where it lies, and whoever comes here has the
    // lock of the frames.
    let root = unsafe { &mut *with_exposed_provenance_mut::<PageTable>(root) };
    // SAFETY: as above, and so do all tables below it.
    unsafe { OffsetPageTable::new(root, VirtAddr::zero()) }
}

/// The physical address and the flags of what is mapped at `addr`.
pub(crate) fn translate(addr: usize) -> Option<(usize, PageTableFlags)> {
    use x86_64::structures::paging::mapper::TranslateResult::Mapped;
    FREE.with(|_| match mapper().translate(VirtAddr::new(addr as u64)) {
        Mapped { frame, offset, flags } => Some(((frame.start_address().as_u64() + offset) as usize, flags)),
        _ => None,
    })
}

/// The kernel's pages: with guard pages or not, cached or not.
#[derive(Debug)]
pub(crate) struct Pages<const GUARDS: bool, const UNCACHED: bool>;

// SAFETY: all CPUs use the same tables, in which nothing else maps pages once the boot code is done; frames are RAM of
// the pool's own; `shoot_down` waits until every CPU has flushed its TLB, this one included.
unsafe impl<const GUARDS: bool, const UNCACHED: bool> Paging for Pages<GUARDS, UNCACHED> {
    type Mapper = Failing;
    type Frames = Frames;
    const FLAGS: PageTableFlags = if UNCACHED {
        PageTableFlags::PRESENT
            .union(PageTableFlags::WRITABLE)
            .union(PageTableFlags::NO_EXECUTE)
            .union(PageTableFlags::NO_CACHE)
    } else {
        PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::NO_EXECUTE)
    };
    const ZEROED: bool = true;
    const GUARDS: bool = GUARDS;

    fn with<R>(&self, work: impl FnOnce(&mut Failing, &mut Frames) -> R) -> R {
        FREE.with(|frames| work(&mut Failing(mapper()), frames))
    }

    fn shoot_down(&self, stale: Stale) {
        stale.flush_here();
        let begun = BEGUN.fetch_add(1, Ordering::AcqRel) + 1;
        if cpu_count() == 1 {
            return;
        }
        ipi::send_all_but_self(FLUSH);
        let me = cpu::index();
        let others = || (0..cpu_count()).filter(|cpu| *cpu != me).filter_map(|cpu| SEEN.get(cpu));
        time::wait_for("all CPUs to see a shootdown", time::SOON, || {
            // Somebody may be waiting for this CPU, which may have its interrupts masked.
            if SEEN.get(me).is_some_and(|seen| seen.load(Relaxed) < BEGUN.load(Relaxed)) {
                see();
            }
            others().all(|seen| seen.load(Ordering::Acquire) >= begun)
        });
    }
}

/// A provider over them, with 4096 slots.
pub(crate) type Provider<const GUARDS: bool, const UNCACHED: bool> = PagingProvider<Pages<GUARDS, UNCACHED>, 64>;

/// Opens a window of `len` bytes in the upper half, where the boot code maps nothing, `number` being none that was
/// opened before.
pub(crate) fn open<const GUARDS: bool, const UNCACHED: bool>(
    provider: &Provider<GUARDS, UNCACHED>,
    number: u64,
    len: usize,
) {
    let start = VirtAddr::new(0xffff_9000_0000_0000 + (number << 39));
    // SAFETY: nothing else uses the upper half of the address space.
    if let Err(error) = unsafe { provider.open(start, len) } {
        test::fail(format_args!("window {number}: {error}"));
    }
}

/// The page tables of the CPUs, failing on demand.
pub(crate) struct Failing(OffsetPageTable<'static>);

/// Whether this is the call that was to fail.
fn fails() -> bool {
    MAP_FAILS.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)) == Ok(1)
}

macro_rules! failing_mapper {
    ($($size:ty),*) => {
        $(impl Mapper<$size> for Failing {
            unsafe fn map_to_with_table_flags<A: FrameAllocator<Size4KiB> + ?Sized>(
                &mut self,
                page: Page<$size>,
                frame: PhysFrame<$size>,
                flags: PageTableFlags,
                parents: PageTableFlags,
                frames: &mut A,
            ) -> Result<MapperFlush<$size>, MapToError<$size>> {
                if fails() {
                    return Err(MapToError::PageAlreadyMapped(frame));
                }
                // SAFETY: the contract is the same.
                unsafe { self.0.map_to_with_table_flags(page, frame, flags, parents, frames) }
            }

            fn unmap(&mut self, page: Page<$size>) -> Result<(PhysFrame<$size>, MapperFlush<$size>), UnmapError> {
                self.0.unmap(page)
            }

            unsafe fn update_flags(
                &mut self,
                page: Page<$size>,
                flags: PageTableFlags,
            ) -> Result<MapperFlush<$size>, FlagUpdateError> {
                // SAFETY: the contract is the same.
                unsafe { self.0.update_flags(page, flags) }
            }

            unsafe fn set_flags_p4_entry(
                &mut self,
                page: Page<$size>,
                flags: PageTableFlags,
            ) -> Result<MapperFlushAll, FlagUpdateError> {
                // SAFETY: the contract is the same.
                unsafe { self.0.set_flags_p4_entry(page, flags) }
            }

            unsafe fn set_flags_p3_entry(
                &mut self,
                page: Page<$size>,
                flags: PageTableFlags,
            ) -> Result<MapperFlushAll, FlagUpdateError> {
                // SAFETY: the contract is the same.
                unsafe { self.0.set_flags_p3_entry(page, flags) }
            }

            unsafe fn set_flags_p2_entry(
                &mut self,
                page: Page<$size>,
                flags: PageTableFlags,
            ) -> Result<MapperFlushAll, FlagUpdateError> {
                // SAFETY: the contract is the same.
                unsafe { self.0.set_flags_p2_entry(page, flags) }
            }

            fn translate_page(&self, page: Page<$size>) -> Result<PhysFrame<$size>, TranslateError> {
                self.0.translate_page(page)
            }
        })*
    };
}
failing_mapper!(Size4KiB, Size2MiB);

impl CleanUp for Failing {
    unsafe fn clean_up<D: FrameDeallocator<Size4KiB>>(&mut self, frames: &mut D) {
        // SAFETY: the contract is the same.
        unsafe { self.0.clean_up(frames) };
    }

    unsafe fn clean_up_addr_range<D: FrameDeallocator<Size4KiB>>(&mut self, range: PageRangeInclusive, frames: &mut D) {
        // SAFETY: the contract is the same.
        unsafe { self.0.clean_up_addr_range(range, frames) };
    }
}

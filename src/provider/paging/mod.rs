//! The paging provider for x86-64: frames, mapped one by one at consecutive addresses of a virtual window.
//!
//! ```text
//! map     window (which addresses) ─ frames ─ page tables
//! unmap   page tables ─ shoot_down (nothing locked) ─ frames ─ window
//! resize  more frames behind the run, or those at its end back
//! remap   another part of the window ─ the same frames there ─ page tables of the old place ─ shoot_down ─ window
//! ```
//!
//! The kernel says in one trait, [`Paging`], how its page tables and its frames are reached, by the traits of the
//! `x86_64` crate, and how a TLB shootdown is made. Decisions, and what pays for each:
//! - *The kernel keeps its page tables and frames*, behind whatever lock it has for them, and lends them for one
//!   bounded step at a time ([`Paging::with`]: at most [`HOLD_PAGES`] pages). So they may be shared with everything
//!   else in the kernel. Price: the lock is taken several times for a long run.
//! - *No bookkeeping on any heap*: which addresses are taken stands in a table inside the provider ([`window`]), what
//!   is mapped where stands in the page tables, and frames that wait for a shootdown stand on the stack ([`batch`]).
//!   Nothing here can recurse into the heap.
//! - *Frames, and tables that became empty, go back only after the shootdown*, and addresses only after both. Price:
//!   one shootdown for each run given back, and one more for each further MiB of small pages.
//! - *The table that a short run leaves empty is spared*, eight at a time, as the next short run mostly comes to the
//!   same place: the lowest hole of the window. So blocks on pages of their own ([`GUARDS`](PageProvider::GUARDS)) that
//!   come and go do not make and search a table each time. Price: their frames, until other tables are spared in their
//!   place, they are in the way of huge pages, or the last run goes.
//! - *A move maps the new place first, and unmaps the old one when nothing can fail any more*, so a refusal leaves the
//!   run as it was. Price: for a moment the frames are mapped twice.
//! - *Huge pages of 2 MiB wherever a run covers one whole* and the kernel has such a frame; long runs are aligned for
//!   it. Price: a run that shrinks gives a huge page back only as a whole, and one that has huge pages can move only to
//!   a place as aligned.
//! - *One context at a time* ([`REENTRANT`](PageProvider::REENTRANT) is false), for the kernel's locks must not be
//!   entered by whoever interrupted their holder. Price: nested contexts get no new pages, and who needs pages waits
//!   while another CPU's shootdown is under way.
//! - *The window lies within one entry of the level-4 table, which always stays*: a page at its start is marked in use
//!   for good, without a frame. So the tables of several address spaces, which have copies of that entry, never part.
//!   Price: three frames for tables, 512 GiB at most.
//!
//! Sources of the ideas: `vmalloc` of Linux (a window mapped page by page, guard pages), its `mremap` (moving
//! page-table entries) and its `mmu_gather` (frames wait for one flush of many pages).

#![expect(unsafe_code, reason = "page tables and frames")]

mod batch;
#[cfg(test)]
mod tests;
mod window;

use core::error::Error;
use core::fmt;
use core::hint::spin_loop;
use core::ptr::{NonNull, with_exposed_provenance_mut};

use spin::mutex::{SpinMutex, SpinMutexGuard};
use x86_64::instructions::tlb;
use x86_64::structures::paging::mapper::{CleanUp, Mapper, TranslateError, UnmapError};
use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, Page, PageSize, PageTableFlags, PhysFrame, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use super::{PageProvider, PageRun};
use crate::base::sync::{AtomicUsize, Ordering::Relaxed, SPIN_LIMIT};
use batch::Batch;
use window::{PAGE, Place, TABLE_SPAN, Table, Window};

/// Bytes in a huge page.
const HUGE_PAGE: usize = TABLE_SPAN;

/// The most pages that one call of [`Paging::with`] maps, unmaps or looks at.
const HOLD_PAGES: usize = 128;

/// Up to this many pages are flushed one by one, more by flushing everything.
const FLUSH_PAGES: usize = 64;

/// What a kernel lends the paging provider: page tables, frames, a TLB shootdown.
///
/// # Context
/// Called with nothing of the heap and nothing of the provider locked, in the interrupt state of whoever called the
/// heap, by one context at a time for each heap. Must not unwind. Neither the mapper nor the frame allocator may use
/// the heap from inside of [`with`](Self::with), unless the lock behind that can be entered again.
///
/// # Safety
/// - The mapper of [`with`](Self::with) works on the tables that every CPU uses, for the addresses of the provider's
///   window, whenever it uses memory of the heap; nothing else maps or unmaps there. With several address spaces they
///   share the tables below the window's level-4 entry; the entry itself must exist before the window is
///   [opened](PagingProvider::open).
/// - The tables that lead to the window are used at one place only, as [`CleanUp`] demands, and empty ones may be
///   freed.
/// - Frames are memory that nothing else uses and that may be mapped with [`FLAGS`](Self::FLAGS); all zeros if
///   [`ZEROED`](Self::ZEROED).
/// - When [`shoot_down`](Self::shoot_down) returns, no CPU uses a translation of the stale pages that it read before
///   the call, nor a page table that led to them.
pub unsafe trait Paging {
    /// The page tables.
    type Mapper: Mapper<Size4KiB> + Mapper<Size2MiB> + CleanUp;

    /// The frames. A kernel without huge frames answers `None` for [`Size2MiB`].
    type Frames: FrameAllocator<Size4KiB>
        + FrameAllocator<Size2MiB>
        + FrameDeallocator<Size4KiB>
        + FrameDeallocator<Size2MiB>;

    /// How pages are mapped; at least present and writable. [`NO_CACHE`](PageTableFlags::NO_CACHE) makes a heap of
    /// uncached memory.
    const FLAGS: PageTableFlags =
        PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::NO_EXECUTE);

    /// Whether frames come zeroed.
    const ZEROED: bool = false;

    /// Whether a page behind each run stays unmapped (and one in front of it, which is the one behind its neighbour).
    /// Costs addresses only. Runs are what the heap asks for: its chunks, and blocks that are long enough to be a run
    /// of their own.
    const GUARDS: bool = false;

    /// Runs `work` once, with the page tables and the frames to itself. Short: what `work` does is bounded.
    fn with<R>(&self, work: impl FnOnce(&mut Self::Mapper, &mut Self::Frames) -> R) -> R;

    /// Makes every CPU forget the stale pages, this one too, and waits until all have. Nothing is locked meanwhile, so
    /// that CPUs that need a lock of the kernel's can answer.
    ///
    /// May be called with interrupts masked if the heap is; then it must answer other CPUs' shootdowns while it waits.
    /// With one CPU, or before others run, [`Stale::flush_here`] is all there is to do.
    fn shoot_down(&self, stale: Stale);
}

/// Pages that were unmapped, or tables that were freed, and may still be in TLBs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stale {
    start: usize,
    len: usize,
    global: bool,
}

impl Stale {
    /// The first page's address.
    pub const fn start(self) -> usize {
        self.start
    }

    /// Bytes; a multiple of the page length.
    pub const fn len(self) -> usize {
        self.len
    }

    /// Always false: there is at least one page.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Whether to write `cr3`, which forgets everything but global pages.
    fn is_for_all(self) -> bool {
        self.len / PAGE > FLUSH_PAGES && !self.global
    }

    /// Makes this CPU forget them: page by page, or all of its TLB if they are many. Takes [`invlpg`](tlb::flush) or a
    /// write to `cr3`, which both drop what the CPU remembers of tables, too.
    pub fn flush_here(self) {
        if self.is_for_all() {
            return tlb::flush_all();
        }
        for page in (self.start..self.start + self.len).step_by(PAGE) {
            tlb::flush(VirtAddr::new_truncate(page as u64));
        }
    }
}

/// Why a window was not opened. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WindowError {
    /// The window was opened before.
    Open,
    /// The window is shorter than 2 pages and a slot (see [`PagingProvider`]).
    TooShort,
    /// The window is not within one entry of the level-4 table: 512 GiB at a multiple of 512 GiB.
    Divided,
    /// There are no frames for its page tables, or the mapper refused its first page.
    Refused,
    /// Another context is at work on the window.
    Busy,
}

impl fmt::Display for WindowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "the provider has its window already",
            Self::TooShort => "the window has no room",
            Self::Divided => "the window crosses a multiple of 512 GiB",
            Self::Refused => "the window's first page could not be reserved in the page tables",
            Self::Busy => "another context is at work on the window",
        })
    }
}

impl Error for WindowError {}

/// Runs of pages out of frames, in a virtual window of the kernel's.
///
/// `WORDS` is the length of the table that says which addresses are taken: 64 *slots* to a word of 8 bytes, all equally
/// long, the shorter the longer the table. A run takes whole slots, so make the window several times as long as the
/// memory behind it: 64 words and 64 GiB are slots of 16 MiB.
///
/// Starts without a window (every `map` is refused) and is meant for a `static`.
///
/// ```no_run
/// use smp_heap::provider::{Paging, PagingProvider, Stale};
/// use spin::mutex::SpinMutex;
/// use x86_64::VirtAddr;
/// use x86_64::structures::paging::OffsetPageTable;
/// # use x86_64::structures::paging::{FrameAllocator, FrameDeallocator, PhysFrame, Size2MiB, Size4KiB};
/// # struct Frames;
/// # unsafe impl FrameAllocator<Size4KiB> for Frames { fn allocate_frame(&mut self) -> Option<PhysFrame> { None } }
/// # unsafe impl FrameAllocator<Size2MiB> for Frames {
/// #     fn allocate_frame(&mut self) -> Option<PhysFrame<Size2MiB>> { None }
/// # }
/// # impl FrameDeallocator<Size4KiB> for Frames { unsafe fn deallocate_frame(&mut self, _: PhysFrame) {} }
/// # impl FrameDeallocator<Size2MiB> for Frames { unsafe fn deallocate_frame(&mut self, _: PhysFrame<Size2MiB>) {} }
///
/// /// The kernel's page tables and frames, for everybody who maps pages.
/// struct Kernel(SpinMutex<(OffsetPageTable<'static>, Frames)>);
///
/// // Sound, since all CPUs use these tables, the frames are nobody else's, and there is one CPU.
/// unsafe impl Paging for &'static Kernel {
///     type Mapper = OffsetPageTable<'static>;
///     type Frames = Frames;
///     const GUARDS: bool = true;
///
///     fn with<R>(&self, work: impl FnOnce(&mut Self::Mapper, &mut Frames) -> R) -> R {
///         let mut tables = self.0.lock();
///         let (mapper, frames) = &mut *tables;
///         work(mapper, frames)
///     }
///
///     fn shoot_down(&self, stale: Stale) {
///         stale.flush_here(); // and, with more CPUs: interrupt the others, have them do the same, wait
///     }
/// }
///
/// fn pages(kernel: &'static Kernel) -> PagingProvider<&'static Kernel, 64> {
///     let provider = PagingProvider::new(kernel);
///     // Sound, since nothing else is mapped in these 64 GiB.
///     unsafe { provider.open(VirtAddr::new(0xffff_9000_0000_0000), 64 << 30) }.expect("a window");
///     provider
/// }
/// ```
///
/// # Context
/// What [`Paging`] says: the kernel's lock, and interrupts to other CPUs, decide from where the heap may call. A call
/// that is not the heap's may be refused while another one is under way.
pub struct PagingProvider<K, const WORDS: usize> {
    kernel: K,
    window: SpinMutex<Window<WORDS>>,
    /// Bytes in frames that are mapped, those that are lost included.
    mapped_len: AtomicUsize,
    /// Bytes in pages that the mapper did not let go.
    lost_len: AtomicUsize,
}

impl<K: fmt::Debug, const WORDS: usize> fmt::Debug for PagingProvider<K, WORDS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagingProvider")
            .field("kernel", &self.kernel)
            .field("mapped_len", &self.mapped_len.load(Relaxed))
            .field("lost_len", &self.lost_len.load(Relaxed))
            .finish_non_exhaustive()
    }
}

impl<K, const WORDS: usize> PagingProvider<K, WORDS> {
    /// A provider without a window.
    pub const fn new(kernel: K) -> Self {
        Self {
            kernel,
            window: SpinMutex::new(Window::new()),
            mapped_len: AtomicUsize::new(0),
            lost_len: AtomicUsize::new(0),
        }
    }

    /// The kernel's side.
    pub const fn kernel(&self) -> &K {
        &self.kernel
    }

    /// Bytes in frames that are mapped. A moment's number while others map and unmap.
    pub fn mapped_len(&self) -> usize {
        self.mapped_len.load(Relaxed)
    }

    /// Bytes in pages that the mapper refused to unmap when a run was given back: they stay mapped and are not used
    /// again.
    pub fn lost_len(&self) -> usize {
        self.lost_len.load(Relaxed)
    }

    /// Bytes of the window that no run takes, not necessarily in one piece; `None` while somebody changes that.
    pub fn free_window_len(&self) -> Option<usize> {
        self.window.try_lock().map(|window| window.free_len())
    }

    /// The window, within a bound.
    fn try_window(&self) -> Option<SpinMutexGuard<'_, Window<WORDS>>> {
        (0..SPIN_LIMIT).find_map(|_| {
            let window = self.window.try_lock();
            if window.is_none() {
                spin_loop();
            }
            window
        })
    }
}

impl<K: Paging, const WORDS: usize> PagingProvider<K, WORDS> {
    /// Gives the provider its window: `len` bytes of virtual addresses from `start` on. Once, at any time; until then
    /// there are no pages.
    ///
    /// # Errors
    /// See [`WindowError`]. The window stays the caller's.
    ///
    /// # Safety
    /// Nothing is mapped in the window, and nothing but this provider maps there, as long as the provider is used.
    pub unsafe fn open(&self, start: VirtAddr, len: usize) -> Result<(), WindowError> {
        const { assert!(K::FLAGS.contains(PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE)), "see `FLAGS`") };
        let first = usize::try_from(start.as_u64()).map_err(|_| WindowError::Divided)?;
        let end = first.checked_add(len).ok_or(WindowError::Divided)?;
        let last = end.checked_sub(1).filter(|last| *last >= first).ok_or(WindowError::TooShort)?;
        if !VirtAddr::try_new(last as u64).is_ok_and(|last| last.p4_index() == start.p4_index()) {
            return Err(WindowError::Divided);
        }
        let mut window = self.try_window().ok_or(WindowError::Busy)?;
        if window.len() > 0 {
            return Err(WindowError::Open);
        }
        // The page that keeps the tables, and an unmapped one between it and the first run.
        let anchor = first.checked_next_multiple_of(PAGE).ok_or(WindowError::TooShort)?;
        let begin = anchor.checked_add(2 * PAGE).ok_or(WindowError::TooShort)?;
        window.open(begin, end).ok_or(WindowError::TooShort)?;
        if self.anchor(anchor) {
            return Ok(());
        }
        *window = Window::new();
        Err(WindowError::Refused)
    }

    /// Marks a page as in use without mapping anything: its entry is not empty, and not present.
    fn anchor(&self, addr: usize) -> bool {
        let nothing = PhysFrame::<Size4KiB>::containing_address(PhysAddr::zero());
        self.kernel.with(|mapper, frames| {
            let parents =
                K::FLAGS & (PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE);
            // SAFETY: the page is the window's, which is ours alone, and the entry maps nothing, as it is not present.
            let marked =
                unsafe { mapper.map_to_with_table_flags(page(addr), nothing, PageTableFlags::BIT_9, parents, frames) };
            marked.map(|flush| flush.ignore()).is_ok()
        })
    }

    /// Maps fresh frames from `from` to before `end`. There may not be enough, or the mapper may refuse.
    fn fill(&self, from: usize, end: usize) -> Result<(), Undone> {
        let mut at = from;
        while at < end {
            let mapped = self.kernel.with(|mapper, frames| {
                for _ in 0..HOLD_PAGES {
                    if at >= end {
                        break;
                    }
                    at += self.map_next(mapper, frames, at, end)?;
                }
                Some(())
            });
            if mapped.is_none() {
                // The page that failed may have got tables.
                return Err(Undone { whole: self.take_down(from, at + PAGE, 0, true) });
            }
        }
        Ok(())
    }

    /// Maps a fresh frame at `at`, huge if the pages up to `end` allow; gives its length.
    fn map_next(&self, mapper: &mut K::Mapper, frames: &mut K::Frames, at: usize, end: usize) -> Option<usize> {
        if at % HUGE_PAGE == 0 && end - at >= HUGE_PAGE && self.map_fresh::<Size2MiB>(mapper, frames, at) {
            return Some(HUGE_PAGE);
        }
        self.map_fresh::<Size4KiB>(mapper, frames, at).then_some(PAGE)
    }

    fn map_fresh<S: PageSize>(&self, mapper: &mut K::Mapper, frames: &mut K::Frames, at: usize) -> bool
    where
        K::Mapper: Mapper<S>,
        K::Frames: FrameAllocator<S> + FrameDeallocator<S>,
    {
        let Some(frame) = FrameAllocator::<S>::allocate_frame(frames) else {
            return false;
        };
        // SAFETY: the frame is nobody else's, and the page is part of a run that is being made, which nobody has yet.
        let mapped = unsafe { mapper.map_to(page::<S>(at), frame, K::FLAGS, frames) };
        match mapped {
            Ok(flush) => {
                // Nothing was mapped there, and CPUs remember no absent pages.
                flush.ignore();
                self.mapped_len.fetch_add(len_of::<S>(), Relaxed);
                true
            }
            Err(_) => {
                // SAFETY: it was not mapped.
                unsafe { frames.deallocate_frame(frame) };
                false
            }
        }
    }

    /// Unmaps everything from `from` to before `end`, has every CPU forget it, and gives back the frames, but for those
    /// of pages below `kept_end`, and the page tables that became empty, if `clean`. False: the mapper refused some
    /// pages, which are lost.
    fn take_down(&self, from: usize, end: usize, kept_end: usize, clean: bool) -> bool {
        let (mut at, mut whole) = (from, true);
        while at < end {
            let first = at;
            let mut batch = Batch::new();
            while at < end && batch.has_room() {
                self.kernel.with(|mapper, _| {
                    let begin = at;
                    for _ in 0..HOLD_PAGES {
                        if at >= end || !batch.has_room() {
                            break;
                        }
                        let (len, gone) = self.unmap_next(mapper, at, (at >= kept_end).then_some(&mut batch));
                        at += len;
                        whole &= gone;
                    }
                    if clean {
                        Self::unlink_empty(mapper, (begin, at), &mut batch);
                    }
                });
            }
            self.forget(first, at - first, &batch);
        }
        whole
    }

    /// Takes the page tables out that lead to nothing, of those for the pages of a range.
    fn unlink_empty(mapper: &mut K::Mapper, (start, end): (usize, usize), batch: &mut Batch) {
        let pages = Page::range_inclusive(page(start), page(end - PAGE));
        // SAFETY: by the contract of `Paging` the window's tables are used once, and empty ones may go; their frames do
        // after a shootdown.
        unsafe { mapper.clean_up_addr_range(pages, batch) };
    }

    /// Has every CPU forget the pages of a range, and gives back the frames that led there.
    fn forget(&self, start: usize, len: usize, batch: &Batch) {
        self.kernel.shoot_down(Stale { start, len, global: K::FLAGS.contains(PageTableFlags::GLOBAL) });
        // SAFETY: the pages are unmapped and the tables unlinked, and by the contract of `shoot_down` no CPU remembers
        // them; the caller has given up the content.
        self.kernel.with(|_, frames| unsafe { batch.give_to(frames) });
    }

    /// Frees a table that was spared, if it is empty. Its addresses are the caller's.
    #[cold]
    fn free_table(&self, span: usize) {
        let mut batch = Batch::new();
        self.kernel.with(|mapper, _| Self::unlink_empty(mapper, (span, span + PAGE), &mut batch));
        if !batch.is_empty() {
            self.forget(span, PAGE, &batch);
        }
    }

    /// Frees a table that was spared and whose addresses were taken for that.
    #[cold]
    fn free_unused_table(&self, span: usize) {
        self.free_table(span);
        self.window.lock().release_span(span);
    }

    /// Frees spared tables where huge pages may come: between addresses that are the caller's.
    fn make_way(&self, start: usize, end: usize) {
        if end - start < TABLE_SPAN {
            return;
        }
        let next = || self.window.lock().take_spared_within(start, end);
        core::iter::from_fn(next).for_each(|span| self.free_table(span));
    }

    /// Frees the spared tables if there is no run any more.
    #[cold]
    fn free_last_tables(&self) {
        let next = || self.window.lock().take_last_spared();
        core::iter::from_fn(next).for_each(|span| self.free_unused_table(span));
    }

    /// Whether the table of a run that is about to leave stays although it may become empty.
    fn spares_table(&self, start: usize, end: usize) -> bool {
        let span = start / TABLE_SPAN * TABLE_SPAN;
        if end - span > TABLE_SPAN {
            return false;
        }
        let table = self.window.lock().spare(span);
        if let Table::Instead(other) = table {
            self.free_unused_table(other);
        }
        table != Table::Freed
    }

    /// Unmaps the page at `at`, and puts its frame into the batch, if there is one; gives its length, and whether the
    /// mapper let it go.
    fn unmap_next(&self, mapper: &mut K::Mapper, at: usize, batch: Option<&mut Batch>) -> (usize, bool) {
        let error = match Mapper::<Size4KiB>::unmap(mapper, page(at)) {
            Ok((frame, flush)) => {
                flush.ignore();
                self.put(frame, batch);
                return (PAGE, true);
            }
            Err(error) => error,
        };
        match error {
            // Where filling ended.
            UnmapError::PageNotMapped => return (PAGE, true),
            UnmapError::ParentEntryHugePage if at % HUGE_PAGE == 0 => {
                if let Ok((frame, flush)) = Mapper::<Size2MiB>::unmap(mapper, page(at)) {
                    flush.ignore();
                    self.put(frame, batch);
                } else {
                    self.lost_len.fetch_add(HUGE_PAGE, Relaxed);
                    return (HUGE_PAGE, false);
                }
                return (HUGE_PAGE, true);
            }
            _ => {}
        }
        self.lost_len.fetch_add(PAGE, Relaxed);
        (PAGE, false)
    }

    fn put<S: PageSize>(&self, frame: PhysFrame<S>, batch: Option<&mut Batch>) {
        if let Some(batch) = batch {
            batch.push(frame);
            self.mapped_len.fetch_sub(len_of::<S>(), Relaxed);
        }
    }

    /// Where the page that holds the last of `len` bytes from `start` on ends, if all of them are mapped.
    fn mapped_end(&self, start: usize, len: usize) -> Option<usize> {
        let (mut at, end) = (start, start.checked_add(len)?);
        while at < end {
            self.kernel.with(|mapper, _| {
                for _ in 0..HOLD_PAGES {
                    if at >= end {
                        break;
                    }
                    at += frame_at(mapper, at)?.len();
                }
                Some(())
            })?;
        }
        Some(at)
    }

    /// [`mapped_end`](Self::mapped_end), if the run is one of this provider's.
    fn end_of_run(&self, start: usize, run: PageRun) -> Option<usize> {
        let end = start.checked_add(run.len())?;
        let ours = self.try_window()?.holds(start, end);
        if ours { self.mapped_end(start, run.len()) } else { None }
    }

    /// Whether a range is inside runs of this provider.
    fn owns(&self, start: usize, end: usize) -> bool {
        self.try_window().is_some_and(|window| window.covers(start, end))
    }

    /// Where the pages of a run end, some of which may have no frames. `None`: it is not one of this provider's.
    fn end_of_pages(&self, start: usize, run: PageRun) -> Option<usize> {
        let end = start.checked_add(run.len())?;
        let ours = self.try_window()?.holds(start, end);
        ours.then(|| self.huge_around(end).map_or(end, |huge| huge + HUGE_PAGE))
    }

    /// Where the huge page begins that `at` lies inside of, if it does.
    fn huge_around(&self, at: usize) -> Option<usize> {
        let huge = at / HUGE_PAGE * HUGE_PAGE;
        let is_huge = || self.kernel.with(|mapper, _| matches!(frame_at(mapper, huge), Some(Frame::Huge(_))));
        (huge != at && is_huge()).then_some(huge)
    }

    /// Maps fresh frames where there are none. False: there are not enough, or the mapper refuses.
    fn fill_holes(&self, from: usize, end: usize) -> bool {
        let mut at = self.huge_around(from).map_or(from, |huge| huge + HUGE_PAGE);
        let mut is_there = true;
        while at < end && is_there {
            is_there = self
                .kernel
                .with(|mapper, frames| {
                    for _ in 0..HOLD_PAGES {
                        if at >= end {
                            break;
                        }
                        let len = frame_at(mapper, at).map(Frame::len);
                        at += len.or_else(|| self.map_next(mapper, frames, at, end))?;
                    }
                    Some(())
                })
                .is_some();
        }
        is_there
    }

    /// Where what a run takes of the window ends, if its pages end at `end`.
    fn guarded(end: usize) -> usize {
        if K::GUARDS { end + PAGE } else { end }
    }

    /// Takes addresses for `len` bytes, aligned for huge pages if that is long enough.
    fn reserve(&self, len: usize, align: usize, place: Place) -> Option<usize> {
        let mut window = self.try_window()?;
        let huge = if len >= HUGE_PAGE { align.max(HUGE_PAGE) } else { align };
        let taken = Self::guarded(len);
        let start = window.reserve(taken, huge, place).or_else(|| window.reserve(taken, align, place))?;
        drop(window);
        self.make_way(start, start + len);
        Some(start)
    }

    /// Gives back the addresses that a run with pages up to `old_end` has and one with pages up to `new_end` does not
    /// need; all if `new_end` is `start`.
    fn release(&self, start: usize, new_end: usize, old_end: usize) {
        let new_end = if new_end == start { start } else { Self::guarded(new_end) };
        if self.window.lock().release(start, new_end, Self::guarded(old_end)) {
            self.free_last_tables();
        }
    }

    /// Maps the frames of `len` bytes from `from` on at `to` as well. The mapper may refuse, or have no frame for a
    /// table.
    fn double(&self, from: usize, to: usize, len: usize) -> Result<(), Undone> {
        let mut offset = 0;
        while offset < len {
            let mapped = self.kernel.with(|mapper, frames| {
                for _ in 0..HOLD_PAGES {
                    if offset >= len {
                        break;
                    }
                    let frame = frame_at(mapper, from + offset)?;
                    map_again::<K>(mapper, frames, to + offset, frame)?;
                    offset += frame.len();
                }
                Some(())
            });
            if mapped.is_none() {
                return Err(Undone { whole: self.take_down(to, to + offset + PAGE, usize::MAX, true) });
            }
        }
        Ok(())
    }

    fn grow(&self, start: usize, old_end: usize, new_end: usize) -> bool {
        if new_end <= old_end {
            // A huge page that is not used to its end.
            return true;
        }
        let (old, new) = (Self::guarded(old_end), Self::guarded(new_end));
        if !self.try_window().is_some_and(|mut window| window.extend(start, old, new)) {
            return false;
        }

        self.make_way(old_end, new_end);
        let filled = self.fill(old_end, new_end);
        if matches!(filled, Err(Undone { whole: true })) {
            self.release(start, old_end, new_end);
        }
        filled.is_ok()
    }

    fn shrink(&self, start: usize, old_end: usize, new_len: usize) -> bool {
        let Some(new_end) = self.mapped_end(start, new_len) else {
            return false;
        };
        if self.take_down(new_end, old_end, 0, true) {
            self.release(start, new_end, old_end);
        }
        true
    }

    /// Moves a run whose pages end at `old_end` to another place, with `new.len()` bytes.
    fn move_to(&self, start: usize, old_end: usize, old: PageRun, new: PageRun) -> Option<usize> {
        let moved_end = if new.len() < old.len() { self.mapped_end(start, new.len())? } else { old_end };
        let moved_len = moved_end - start;
        let new_len = new.len().max(moved_len);
        let to = self.reserve(new_len, new.align(), Place::Roomy)?;
        let undone = match self.double(start, to, moved_len) {
            Err(undone) => undone,
            Ok(()) => match self.fill(to + moved_len, to + new_len) {
                Ok(()) => {
                    // Nothing can be refused any more.
                    if self.take_down(start, old_end, moved_end, true) {
                        self.release(start, start, old_end);
                    }
                    return Some(to);
                }
                Err(undone) => Undone { whole: self.take_down(to, to + moved_len, usize::MAX, true) && undone.whole },
            },
        };
        if undone.whole {
            self.release(to, to, to + new_len);
        }
        None
    }
}

/// What was begun could not be done, and is undone: but for pages that were lost if not `whole`.
struct Undone {
    whole: bool,
}

/// A frame that some page leads to.
#[derive(Clone, Copy)]
enum Frame {
    Small(PhysFrame<Size4KiB>),
    Huge(PhysFrame<Size2MiB>),
}

impl Frame {
    fn len(self) -> usize {
        match self {
            Self::Small(_) => PAGE,
            Self::Huge(_) => HUGE_PAGE,
        }
    }
}

/// The frame of the page that begins at `at`.
fn frame_at<M: Mapper<Size4KiB> + Mapper<Size2MiB>>(mapper: &M, at: usize) -> Option<Frame> {
    // In this order: asked for a huge page, mappers take a table for one.
    match Mapper::<Size4KiB>::translate_page(mapper, page(at)) {
        Ok(frame) => Some(Frame::Small(frame)),
        Err(TranslateError::ParentEntryHugePage) if at % HUGE_PAGE == 0 => {
            Mapper::<Size2MiB>::translate_page(mapper, page(at)).ok().map(Frame::Huge)
        }
        Err(_) => None,
    }
}

/// Maps a frame at `at` that is mapped elsewhere, where it will not stay.
fn map_again<K: Paging>(mapper: &mut K::Mapper, frames: &mut K::Frames, at: usize, frame: Frame) -> Option<()> {
    match frame {
        Frame::Small(frame) => {
            // SAFETY: the page is nobody's yet; the owner of the frame's content waits for its new address, and the old
            // one is given up then.
            let mapped = unsafe { mapper.map_to(page::<Size4KiB>(at), frame, K::FLAGS, frames) };
            mapped.map(|flush| flush.ignore()).ok()
        }
        Frame::Huge(frame) if at % HUGE_PAGE == 0 => {
            // SAFETY: as above.
            let mapped = unsafe { mapper.map_to(page::<Size2MiB>(at), frame, K::FLAGS, frames) };
            mapped.map(|flush| flush.ignore()).ok()
        }
        Frame::Huge(_) => None,
    }
}

fn page<S: PageSize>(addr: usize) -> Page<S> {
    Page::containing_address(VirtAddr::new_truncate(addr as u64))
}

const fn len_of<S: PageSize>() -> usize {
    if S::SIZE == Size2MiB::SIZE { HUGE_PAGE } else { PAGE }
}

// SAFETY: A run's addresses come from the window, which gives none of them twice before they come back, and the window
// is this provider's alone; each page is mapped, present and writable, to a frame that the kernel's allocator gave for
// it alone, and stays so until the run is given back, shrunk or moved. Frames and addresses go back only after
// `shoot_down`. A refusal leaves a run as it was: growing only adds pages behind it, moving maps the new place before
// it touches the old. Nothing here unwinds.
unsafe impl<K: Paging, const WORDS: usize> PageProvider for PagingProvider<K, WORDS> {
    const PAGE_LEN: usize = PAGE;
    const ZEROED: bool = K::ZEROED;
    const REMAPS: bool = true;
    const GUARDS: bool = K::GUARDS;
    const DECOMMITS: bool = true;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let run = PageRun::new(run.len(), run.align(), PAGE)?;
        let start = self.reserve(run.len(), run.align(), Place::Lowest)?;
        match self.fill(start, start + run.len()) {
            Ok(()) => NonNull::new(with_exposed_provenance_mut(start)),
            Err(undone) => {
                if undone.whole {
                    self.release(start, start, start + run.len());
                }
                None
            }
        }
    }

    /// Also false while another context is at work on the window.
    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        let start = start.addr().get();
        let Some(end) = self.end_of_pages(start, run) else {
            return false;
        };
        let spares = self.spares_table(start, end);
        if self.take_down(start, end, 0, !spares) {
            self.release(start, start, end);
        }
        true
    }

    /// Page by page; a huge page goes only as a whole, and page tables stay.
    unsafe fn decommit(&self, start: NonNull<u8>, run: PageRun) -> bool {
        let start = start.addr().get();
        let end = start + run.len();
        if !self.owns(start, end) {
            return false;
        }
        let first = if self.huge_around(start).is_some() { start.next_multiple_of(HUGE_PAGE) } else { start };
        let last = self.huge_around(end).unwrap_or(end);
        if first < last {
            self.take_down(first, last, 0, false);
        }
        true
    }

    unsafe fn commit(&self, start: NonNull<u8>, run: PageRun) -> bool {
        let (first, end) = (start.addr().get(), start.addr().get() + run.len());
        let is_there = self.owns(first, end) && self.fill_holes(first, end);
        if !is_there {
            // SAFETY: the contract is the same, and nothing is in the pages yet.
            unsafe { self.decommit(start, run) };
        }
        is_there
    }

    /// Grows as long as the addresses behind the run are free; a shrinking run gives back whole pages.
    unsafe fn resize(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> bool {
        let start = start.addr().get();
        match self.end_of_run(start, old) {
            Some(end) if new.len() > old.len() => self.grow(start, end, start + new.len()),
            Some(end) => self.shrink(start, end, new.len()),
            None => false,
        }
    }

    /// Moves the run's page-table entries to the middle of the longest hole of the window.
    unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
        let start = start.addr().get();
        let end = self.end_of_run(start, old)?;
        let to = self.move_to(start, end, old, new)?;
        NonNull::new(with_exposed_provenance_mut(to))
    }
}

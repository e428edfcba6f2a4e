//! The region provider: page runs out of memory regions that the kernel hands over, for good.
//!
//! Each region is a `linked_list_allocator` heap of its own, behind a `spin` mutex of its own. Decisions, and what
//! pays for each:
//! - *Regions that touch are one*, in whatever order they come, also while runs of them are out: a block may lie across
//!   what a memory map lists as two entries. Price: adding a region below one that is in use moves that one's holes to
//!   a new list, a step for each.
//! - *The heap is asked to take the longest piece that there is* ([`prefer`](PageProvider::prefer)), mostly a whole
//!   region, which it then cuts by itself. Price: who asks this provider for runs beside the heap must do so first.
//! - *Slots beyond the built-in ones lie in the memory handed over*, a page for a dozen; such a page goes back to its
//!   region when joined regions have made it needless. So a long memory map needs no const parameter.
//! - *First fit over a sorted list of holes.* It needs no memory beside the regions and merges whatever comes
//!   back, so everything returned makes the region whole again. Price: time in proportion to the number of holes,
//!   under the region's lock; as the heap takes whole regions, these are few.
//! - *A lock is never waited for, only tried*, at most [`SPIN_LIMIT`] times in one call: the holder may be the very
//!   context that the caller interrupted. Price: when a holder is interrupted or preempted for longer than that, `map`
//!   answers `None` and `unmap` false though nothing is wrong. A kernel that wants neither masks interrupts (or
//!   preemption) around its use of the heap; with several regions the others go on serving.
//! - *Only whole pages of [`PAGE_LEN`](PageProvider::PAGE_LEN) bytes at multiples of it are used*, and neither the
//!   first page of the address space nor the last one. Every hole is then a multiple of a page too, so no rest is ever
//!   too short for the list to remember, whatever the alignment. Price: up to a page less one byte at either end of a
//!   region, which could not have served a run anyway.
//! - *Free memory is written to*: a hole keeps its length and its successor in its first two words. Pages do not
//!   come zeroed, and memory must not be handed over that still has to be read.
//!
//! What the list would answer with a panic or with a corrupted list is refused before it gets there: a run that lies in
//! no region or is longer than what is out, and an alignment that would carry an address past the end of the address
//! space. A run given back twice is the one mistake that is not always found; like any breach of
//! [`unmap`](PageProvider::unmap)'s contract it is the caller's.

#![expect(unsafe_code, reason = "regions, and tables in them")]

use core::alloc::Layout;
use core::error::Error;
use core::fmt;
use core::mem;
use core::ptr::NonNull;

use linked_list_allocator::Heap;
use spin::mutex::{SpinMutex, SpinMutexGuard};

use super::{PageProvider, PageRun};
use crate::base::sync::{AtomicPtr, AtomicUsize, Ordering, SPIN_LIMIT, TryLock, spin_loop};

/// Small, so that a region of 4 KiB at an odd address still has three pages.
const PAGE_LEN: usize = 1024;

/// How often one who adds a region waits, within the spin limit, for others to be done: it has time.
const ADD_TRIES: u32 = 64;

/// Slots in a page of them.
const TABLE_SLOTS: usize = (PAGE_LEN - size_of::<usize>()) / size_of::<Slot>();

/// No run is preferred that is longer than this: the most that one chunk of the heap holds.
const LONGEST: usize = 1 << if usize::BITS > 39 { 38 } else { usize::BITS - 2 };

/// Page runs from regions of memory that the kernel hands over, at any time. The first `REGIONS` that do not touch need
/// no memory for their slots.
///
/// Starts empty (every `map` is refused) and is meant for a `static`:
///
/// ```
/// use smp_heap::provider::RegionProvider;
///
/// static MEMORY: RegionProvider<4> = RegionProvider::new();
/// assert_eq!(MEMORY.region_count(), 0);
/// ```
///
/// # Context
/// Every method may be called from any context on any CPU, by several at once and by one that interrupted another; none
/// waits longer than a bound. The memory is physically contiguous where the region is.
pub struct RegionProvider<const REGIONS: usize> {
    /// Held while a region is added: only its holder changes which slots there are, and which are empty.
    adding: TryLock,
    first: [Slot; REGIONS],
    /// The table that was added last.
    more: AtomicPtr<Table>,
    /// Contexts that are looking at tables.
    readers: AtomicUsize,
    held_len: AtomicUsize,
}

/// One region; an empty one if its end is 0. All but the list is written by the holder of the list's lock.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    free_len: AtomicUsize,
    list: SpinMutex<Heap>,
}

/// A page of slots, taken from a region.
struct Table {
    next: *mut Table,
    slots: [Slot; TABLE_SLOTS],
}

const _: () = assert!(size_of::<Table>() <= PAGE_LEN && align_of::<Table>() <= PAGE_LEN, "a table is a page");

/// A free piece of memory on its way from one list to another, written at its start.
struct Piece {
    next: Option<NonNull<Piece>>,
    len: usize,
}

/// What became of one look at one region.
enum Answer {
    Run(NonNull<u8>),
    Refused,
    Busy,
}

/// Why a region was not added. Nothing was changed, nor was its memory touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegionError {
    /// The region does not fit into the address space, or is longer than `isize::MAX` bytes.
    Wraps,
    /// The region has not one whole page of 1024 bytes at a multiple of 1024, beside the first and the last one of the
    /// address space.
    TooSmall,
    /// The region shares a page with one that was added before, or is that one.
    Overlaps,
    /// Another context is adding a region, or is in one that touches, and did not finish within the bound. Try again,
    /// but not from a context that may have interrupted it.
    Busy,
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wraps => "the region does not fit into the address space",
            Self::TooSmall => "the region has no whole aligned page of 1024 bytes",
            Self::Overlaps => "the region overlaps one that was added before",
            Self::Busy => "another context is adding a region, or is in one that touches",
        })
    }
}

impl Error for RegionError {}

impl<const REGIONS: usize> RegionProvider<REGIONS> {
    /// A provider without any memory.
    pub const fn new() -> Self {
        Self {
            adding: TryLock::new(),
            first: [const { Slot::new() }; REGIONS],
            more: AtomicPtr::new(core::ptr::null_mut()),
            readers: AtomicUsize::new(0),
            held_len: AtomicUsize::new(0),
        }
    }

    /// Hands a region of memory over to the provider, which uses its whole 1024-byte pages and writes to them at once.
    /// A region that touches one that was added before becomes one with it.
    ///
    /// May be called before the provider's first use and at any time after it. The first page of the address space is
    /// left out, and so is the last one.
    ///
    /// # Errors
    /// See [`RegionError`]. The provider goes on as before and the region stays the caller's.
    ///
    /// # Safety
    /// The `len` bytes from `start` on are mapped, readable and writable, `start`'s provenance covers them, and nothing
    /// but this provider uses them, from this call on until the provider and every run it gave are used no more.
    /// (For a provider in a `static` that is: for ever.) Where the region touches another one, either one's pointer may
    /// be used for both: they are parts of one allocation, or of none that the language knows, as what a boot loader's
    /// map lists. If the answer is an error, nothing is asked.
    pub unsafe fn add_region(&self, start: *mut u8, len: usize) -> Result<(), RegionError> {
        if isize::try_from(len).is_err() {
            return Err(RegionError::Wraps);
        }
        let last = match len {
            0 => return Err(RegionError::TooSmall),
            _ => start.addr().checked_add(len - 1).ok_or(RegionError::Wraps)?,
        };
        let pages = Span::of_pages(start.addr(), last).ok_or(RegionError::TooSmall)?;
        let adding = (0..ADD_TRIES).find_map(|_| self.adding.lock_bounded());
        let _adding = adding.ok_or(RegionError::Busy)?;
        if self.find(|slot| slot.span().overlaps(pages).then_some(())).is_some() {
            return Err(RegionError::Overlaps);
        }
        // SAFETY: `pages` lies inside the caller's bytes, which nothing else uses: the caller says so, and no other
        // region of ours has a page of it.
        unsafe { self.add(start.with_addr(pages.start), pages) }?;
        self.drop_tables();
        Ok(())
    }

    /// How many regions there are, those that touch being one. While one is added, a guess.
    pub fn region_count(&self) -> usize {
        let mut count = 0;
        self.for_each(|slot| count += usize::from(slot.span().len() > 0));
        count
    }

    /// Bytes in mapped runs.
    pub fn held_len(&self) -> usize {
        self.held_len.load(Ordering::Relaxed)
    }

    /// Bytes that are not mapped, in whole pages, not necessarily in one piece. While others map and unmap, a sum of
    /// moments.
    pub fn free_len(&self) -> usize {
        let mut len = 0;
        self.for_each(|slot| len += slot.free_len());
        len
    }

    /// The first success of `look` over all slots, empty ones too. What is kept of it is used by the holder of `adding`
    /// only: tables come and go.
    fn find<'a, R>(&'a self, mut look: impl FnMut(&'a Slot) -> Option<R>) -> Option<R> {
        let found = self.first.iter().find_map(&mut look);
        if found.is_some() || self.more.load(Ordering::Relaxed).is_null() {
            return found;
        }
        self.readers.fetch_add(1, Ordering::SeqCst);
        let mut next = self.more.load(Ordering::SeqCst);
        let mut found = None;
        // SAFETY: null, or written by `add_table`; not given back while this context is counted in `readers`, or the
        // caller holds `adding`.
        while let Some(table) = unsafe { next.as_ref() }.filter(|_| found.is_none()) {
            found = table.slots.iter().find_map(&mut look);
            next = table.next;
        }
        self.readers.fetch_sub(1, Ordering::Release);
        found
    }

    fn for_each(&self, mut show: impl FnMut(&Slot)) {
        self.find(|slot| {
            show(slot);
            None::<()>
        });
    }

    /// `map`, with how often to look again at locks that are held, and what to do between two looks.
    fn map_with(&self, run: PageRun, looks: u32, relax: &mut impl FnMut()) -> Option<NonNull<u8>> {
        let run = own(run)?;
        // The first lap takes what is open. Only if a region was busy and none gave is it worth a second one with
        // patience, of which the whole call has no more than one lock's share.
        let mut patience = 0;
        for _ in 0..2 {
            let mut busy = false;
            let found = self.find(|slot| match slot.take(run, &mut patience, relax) {
                Answer::Run(start) => Some(start),
                Answer::Refused => None,
                Answer::Busy => {
                    busy = true;
                    None
                }
            });
            if let Some(start) = found {
                self.held_len.fetch_add(run.len(), Ordering::Relaxed);
                return Some(start);
            }
            if !busy || looks == 0 {
                return None;
            }
            patience = looks;
        }
        None
    }

    /// `unmap`, with what to do between two looks at a lock that is held.
    ///
    /// # Safety
    /// As for `unmap`.
    unsafe fn unmap_with(&self, start: NonNull<u8>, run: PageRun, relax: &mut impl FnMut()) -> bool {
        let Some(run) = own(run) else { return false };
        let addr = start.addr().get();
        let taken = self.find(|slot| {
            if !slot.span().contains(addr, run) {
                return None;
            }
            let mut list = slot.lock(&mut { SPIN_LIMIT }, relax)?;
            // Looked at again: the region may have been joined with another one meanwhile.
            let is_out = slot.span().contains(addr, run) && list.used() >= run.len();
            is_out.then(|| {
                // SAFETY: this list, or one that is part of it now, gave these bytes and has not had them back (the
                // caller's promise).
                unsafe { put(&mut list, addr, run.len()) };
                slot.note(&list);
            })
        });
        if taken.is_some() {
            self.held_len.fetch_sub(run.len(), Ordering::Relaxed);
        }
        taken.is_some()
    }

    /// Takes in memory whose pages are those of `pages`, joined with what touches it. The caller holds `adding`. An
    /// error changes nothing.
    ///
    /// # Safety
    /// It may be read and written through the pointer, and is nobody else's and part of no region; a region that
    /// touches it is as `add_region` says.
    unsafe fn add(&self, start: *mut u8, pages: Span) -> Result<(), RegionError> {
        let lower = self.find(|slot| (slot.span().end == pages.start).then_some(slot));
        let upper = self.find(|slot| (slot.span().start == pages.end).then_some(slot));
        // SAFETY: as many bytes may be used through this pointer, the first ones of them are ours to write, and there
        // is at least one page.
        let fresh = |len| unsafe { Heap::new(start, len) };
        // The list that the sum gets, and what is free of it, but for the new pages.
        let (slot, mut list, len, mut free) = match (lower, upper) {
            (None, None) => {
                self.enter(fresh(pages.len()), pages);
                return Ok(());
            }
            (None, Some(upper)) => {
                let mut list = upper.lock_long().ok_or(RegionError::Busy)?;
                let (len, free) = (pages.len() + list.size(), drain(&mut list));
                *list = fresh(len);
                (upper, list, len, free)
            }
            (Some(lower), upper) => {
                let mut list = lower.lock_long().ok_or(RegionError::Busy)?;
                let mut rest = match upper {
                    Some(upper) => Some(upper.lock_long().ok_or(RegionError::Busy)?),
                    None => None,
                };
                let mut len = pages.len();
                let mut free = drain(&mut list);
                if let (Some(upper), Some(rest)) = (upper, &mut rest) {
                    len += rest.size();
                    free = chain(drain(rest), free);
                    **rest = Heap::empty();
                    upper.set(rest, Span::NONE);
                }
                // SAFETY: the region goes on with what is added; `add_region`'s contract is that its pointer may be
                // used for that.
                unsafe { list.extend(len) };
                (lower, list, len, free)
            }
        };
        // All that was added is one hole, some of which is in use; so the hole is taken, and what is free is put back.
        let _ = list.allocate_first_fit(layout(len));
        // SAFETY: in the region, in no hole, and nobody's.
        unsafe { put(&mut list, pages.start, pages.len()) };
        while let Some(piece) = free {
            // SAFETY: `drain` wrote it.
            let Piece { next, len } = unsafe { piece.read() };
            free = next;
            // SAFETY: taken out of a list of what is this region now.
            unsafe { put(&mut list, piece.addr().get(), len) };
        }
        let span = Span::of(&list);
        slot.set(&list, span);
        Ok(())
    }

    /// Puts the list of a region, all of which is free, into an empty slot, in a new table if there is none; the table
    /// is a page of that region. The caller holds `adding`.
    fn enter(&self, mut list: Heap, span: Span) {
        let empty =
            self.find(|slot| if slot.span().len() == 0 { slot.lock_long().map(|guard| (slot, guard)) } else { None });
        if let Some((slot, mut place)) = empty {
            *place = list;
            return slot.set(&place, span);
        }
        let Ok(page) = list.allocate_first_fit(layout(PAGE_LEN)) else { return };
        let table = page.cast::<Table>();
        let slots = [const { Slot::new() }; TABLE_SLOTS];
        let [first, ..] = &slots;
        first.set(&list, span);
        *first.list.lock() = list;
        // SAFETY: a page, ours, aligned to its length.
        unsafe { table.write(Table { next: self.more.load(Ordering::Relaxed), slots }) };
        self.more.store(table.as_ptr(), Ordering::SeqCst);
    }

    /// Moves what is in the last table to empty slots elsewhere, and gives the table's page to the region that it came
    /// from, as long as that works. The caller holds `adding`.
    fn drop_tables(&self) {
        while self.drop_table().is_some() {}
    }

    /// `None`: the last table stays, as it is needed, or somebody is in the way.
    fn drop_table(&self) -> Option<()> {
        let last = NonNull::new(self.more.load(Ordering::Relaxed))?;
        // SAFETY: `enter` wrote it; only the holder of `adding` gives it back.
        let table = unsafe { last.as_ref() };
        let is_own = |slot: &Slot| table.slots.iter().any(|own| core::ptr::eq(own, slot));
        for own in table.slots.iter().filter(|slot| slot.span().len() > 0) {
            let empty = self.find(|slot| (slot.span().len() == 0 && !is_own(slot)).then_some(slot))?;
            let (mut from, mut to) = (own.lock_long()?, empty.lock_long()?);
            *to = mem::replace(&mut *from, Heap::empty());
            empty.set(&to, own.span());
            own.set(&from, Span::NONE);
        }
        let page = last.addr().get();
        let home = self.find(|slot| (slot.span().start <= page && page < slot.span().end).then_some(slot))?;
        let mut list = home.lock_long()?;
        // A reader that counts itself after this finds the table no more; one that did before is seen.
        self.more.store(table.next, Ordering::SeqCst);
        if self.readers.load(Ordering::SeqCst) != 0 {
            self.more.store(last.as_ptr(), Ordering::SeqCst);
            return None;
        }
        // SAFETY: the page was taken out of this region's list, and nobody uses it any more.
        unsafe { put(&mut list, page, PAGE_LEN) };
        home.note(&list);
        Some(())
    }
}

impl<const REGIONS: usize> Default for RegionProvider<REGIONS> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const REGIONS: usize> fmt::Debug for RegionProvider<REGIONS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionProvider")
            .field("region_count", &self.region_count())
            .field("held_len", &self.held_len())
            .field("free_len", &self.free_len())
            .finish_non_exhaustive()
    }
}

// SAFETY: A run comes from the hole list of a region, which gives none of its bytes twice before they come back. It
// lies inside the region, whose bytes the adder left to this provider, with the provenance of a pointer that an
// adder gave, and so stays mapped and writable. Its start and its length are at least what was asked, since `own`
// rounds upward only. Nothing here unwinds: the list panics on bad frees alone, and `unmap_with` refuses what lies
// outside the region or exceeds what is out; the rest is the caller's promise.
unsafe impl<const REGIONS: usize> PageProvider for RegionProvider<REGIONS> {
    const PAGE_LEN: usize = PAGE_LEN;
    const REENTRANT: bool = true;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.map_with(run, SPIN_LIMIT, &mut spin_loop)
    }

    fn try_map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.map_with(run, SPIN_LIMIT / 32, &mut spin_loop)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: the contract is the same.
        unsafe { self.unmap_with(start, run, &mut spin_loop) }
    }

    fn could_give(&self, run: PageRun) -> bool {
        self.find(|slot| slot.span().serves(run).then_some(())).is_some()
    }

    /// The longest run that there is at that alignment, up to 256 GiB; never less than `run`. Regions whose lock stays
    /// held are left out.
    fn prefer(&self, run: PageRun) -> PageRun {
        let longest = own(run).and_then(|run| {
            let mut longest = 0;
            self.for_each(|slot| longest = slot.room(run, longest).max(longest));
            PageRun::new(longest, run.align(), PAGE_LEN)
        });
        longest.filter(|longest| longest.len() > run.len()).unwrap_or(run)
    }

    /// Whether some region's lock is held, or one is being added.
    fn is_busy(&self) -> bool {
        self.adding.is_held() || self.find(|slot| slot.list.is_locked().then_some(())).is_some()
    }
}

/// The run in pages of this provider. For a run that was made with a shorter page it rounds up, the same way in `map`
/// and in `unmap`.
fn own(run: PageRun) -> Option<PageRun> {
    PageRun::new(run.len(), run.align(), PAGE_LEN)
}

/// So many bytes, a multiple of a page, as the lists know them.
fn layout(len: usize) -> Layout {
    // SAFETY: a page's length is a power of two, and what is part of a region does not exceed `isize::MAX`, rounded up
    // to it.
    unsafe { Layout::from_size_align_unchecked(len, PAGE_LEN) }
}

/// Puts memory back into a region's list, by the pointer that the region came with: another one may be good for the run
/// alone, and a merged hole is wider.
///
/// # Safety
/// The bytes are the region's, and in no hole; nobody uses them.
unsafe fn put(heap: &mut Heap, addr: usize, len: usize) {
    if let Some(start) = NonNull::new(heap.bottom().with_addr(addr)) {
        // SAFETY: the contract is the same; the length is a multiple of a page.
        unsafe { heap.deallocate(start, layout(len)) };
    }
}

impl Slot {
    const fn new() -> Self {
        Self {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            free_len: AtomicUsize::new(0),
            list: SpinMutex::new(Heap::empty()),
        }
    }

    fn span(&self) -> Span {
        Span { start: self.start.load(Ordering::Relaxed), end: self.end.load(Ordering::Relaxed) }
    }

    fn free_len(&self) -> usize {
        self.free_len.load(Ordering::Relaxed)
    }

    /// Notes what the list, which is locked, has free.
    fn note(&self, list: &Heap) {
        self.free_len.store(list.free(), Ordering::Relaxed);
    }

    /// Notes also where its region lies.
    fn set(&self, list: &Heap, span: Span) {
        self.start.store(span.start, Ordering::Relaxed);
        self.end.store(span.end, Ordering::Relaxed);
        self.note(list);
    }

    /// The list, looking again at a lock that is held as often as there is patience left.
    fn lock(&self, patience: &mut u32, relax: &mut impl FnMut()) -> Option<SpinMutexGuard<'_, Heap>> {
        loop {
            // Looks before it writes, so that a busy lock's cache line stays shared.
            if !self.list.is_locked() {
                if let Some(list) = self.list.try_lock() {
                    return Some(list);
                }
            }
            *patience = patience.checked_sub(1)?;
            relax();
        }
    }

    /// The same for one who adds a region.
    fn lock_long(&self) -> Option<SpinMutexGuard<'_, Heap>> {
        (0..ADD_TRIES).find_map(|_| self.lock(&mut { SPIN_LIMIT }, &mut spin_loop))
    }

    fn may_have(&self, run: PageRun) -> bool {
        self.free_len() >= run.len() && self.span().serves(run)
    }

    fn take(&self, run: PageRun, patience: &mut u32, relax: &mut impl FnMut()) -> Answer {
        if !self.may_have(run) {
            return Answer::Refused;
        }
        let Some(mut list) = self.lock(patience, relax) else { return Answer::Busy };
        // Looked at again: it may be another region's by now.
        if !self.may_have(run) {
            return Answer::Refused;
        }
        let Ok(start) = list.allocate_first_fit(run.layout()) else { return Answer::Refused };
        self.note(&list);
        Answer::Run(start)
    }

    /// The length of the longest run of that alignment if it is longer than `run` and `least`; else less, or 0.
    fn room(&self, run: PageRun, least: usize) -> usize {
        let free_len = self.free_len().min(LONGEST);
        let (mut short, mut long) = (least.max(run.len()) / PAGE_LEN, free_len / PAGE_LEN + 1);
        if long <= short + 1 {
            return 0;
        }
        let Some(mut list) = self.lock(&mut { SPIN_LIMIT / 8 }, &mut spin_loop) else { return 0 };
        let mut fits = |pages: usize| {
            let run = PageRun::new(pages * PAGE_LEN, run.align(), PAGE_LEN).filter(|run| self.may_have(*run));
            let Some(start) = run.and_then(|run| list.allocate_first_fit(run.layout()).ok()) else { return false };
            // SAFETY: just taken.
            unsafe { put(&mut list, start.addr().get(), pages * PAGE_LEN) };
            true
        };
        // The whole of what is free is mostly one piece.
        if fits(long - 1) {
            return (long - 1) * PAGE_LEN;
        }
        while long > short + 1 {
            let middle = short + (long - short) / 2;
            if fits(middle) { short = middle } else { long = middle }
        }
        short * PAGE_LEN
    }
}

/// Takes everything out of a region's list: in pieces, of which each hole has no more than a power of two has bits.
fn drain(heap: &mut Heap) -> Option<NonNull<Piece>> {
    let mut pieces = None;
    let mut pages = (heap.free() / PAGE_LEN + 1).next_power_of_two();
    while pages > 0 {
        match heap.allocate_first_fit(layout(pages * PAGE_LEN)) {
            Ok(start) if heap.used() <= heap.size() => {
                let piece = start.cast::<Piece>();
                // SAFETY: just taken, and a page or more.
                unsafe { piece.write(Piece { next: pieces, len: pages * PAGE_LEN }) };
                pieces = Some(piece);
            }
            _ => pages /= 2,
        }
    }
    pieces
}

/// Both chains in one.
fn chain(first: Option<NonNull<Piece>>, second: Option<NonNull<Piece>>) -> Option<NonNull<Piece>> {
    let Some(head) = first else { return second };
    let mut last = head;
    // SAFETY: `drain` wrote each.
    while let Some(next) = unsafe { last.as_ref() }.next {
        last = next;
    }
    // SAFETY: as above.
    unsafe { last.as_mut() }.next = second;
    first
}

/// A range of addresses, of whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: usize,
    end: usize,
}

impl Span {
    /// The whole pages from an address to the last byte, without the first page of the address space and the last one;
    /// `None` if there are none.
    fn of_pages(start: usize, last: usize) -> Option<Self> {
        let start = align_up(start.max(PAGE_LEN), PAGE_LEN)?;
        let end = last.checked_add(1).unwrap_or(usize::MAX - (PAGE_LEN - 1)) & !(PAGE_LEN - 1);
        let end = end.min(usize::MAX - (PAGE_LEN - 1));
        (start < end).then_some(Self { start, end })
    }

    /// No pages, and nothing's neighbour.
    const NONE: Self = Self { start: 0, end: 0 };

    /// A region's.
    fn of(heap: &Heap) -> Self {
        let start = heap.bottom().addr();
        Self { start, end: start + heap.size() }
    }

    fn len(self) -> usize {
        self.end - self.start
    }

    fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether the run can have been given from here: inside, and at a multiple of its alignment.
    fn contains(self, start: usize, run: PageRun) -> bool {
        start >= self.start
            && start & (run.align() - 1) == 0
            && start.checked_add(run.len()).is_some_and(|end| end <= self.end)
    }

    /// Length of the longest run at a multiple of `align`.
    fn room(self, align: usize) -> usize {
        align_up(self.start, align).map_or(0, |start| self.end.saturating_sub(start))
    }

    /// Whether the list may be asked for the run: there is room, and no hole could carry its arithmetic past the end
    /// of the address space, which it does not check. The highest hole that is long enough starts at `end - len`. (A
    /// region that close to the end is refused a run that it might have served.)
    fn serves(self, run: PageRun) -> bool {
        self.room(run.align()) >= run.len()
            && align_up(self.end - run.len(), run.align()).and_then(|start| start.checked_add(run.len())).is_some()
    }
}

/// The next multiple of `align`, a power of two; `None` past the end of the address space.
fn align_up(addr: usize, align: usize) -> Option<usize> {
    Some(addr.checked_add(align - 1)? & !(align - 1))
}

#[cfg(test)]
mod tests;

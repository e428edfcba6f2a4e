//! The region provider: page runs out of memory regions that the kernel hands over, for good.
//!
//! Each region is a `linked_list_allocator` heap of its own, behind a `spin` mutex of its own. Decisions, and what
//! pays for each:
//! - *First fit over a sorted list of holes.* It needs no memory beside the regions and merges whatever comes
//!   back, so everything returned makes the region whole again. Price: time in proportion to the number of holes,
//!   under the region's lock. [`prefer`](PageProvider::prefer) therefore asks the heap to take chunks of at least a
//!   thirty-second of the region, which leaves room for some thirty holes; only a heap that insists on smaller runs can
//!   make more.
//! - *A lock is never waited for, only tried*, at most [`SPIN_LIMIT`] times in one call: the holder may be the very
//!   context that the caller interrupted. Price: when a holder is interrupted or preempted for longer than that, `map`
//!   answers `None` and `unmap` false though nothing is wrong. A kernel that wants neither masks interrupts (or
//!   preemption) around its use of the heap; with several regions the others go on serving.
//! - *Only whole pages of [`PAGE_LEN`](PageProvider::PAGE_LEN) bytes at multiples of it are used.* Every hole is then a
//!   multiple of a page too, so no rest is ever too short for the list to remember, whatever the alignment. Price: up to
//!   a page less one byte at either end of a region, which could not have served a run anyway.
//! - *Free memory is written to*: a hole keeps its length and its successor in its first two words. Pages do not
//!   come zeroed, and memory must not be handed over that still has to be read.
//!
//! What the list would answer with a panic or with a corrupted list is refused before it gets there: a run that lies in
//! no region or is longer than what is out, and an alignment that would carry an address past the end of the address
//! space. A run given back twice is the one mistake that is not always found; like any breach of
//! [`unmap`](PageProvider::unmap)'s contract it is the caller's.

use core::error::Error;
use core::fmt;
use core::ptr::NonNull;

use linked_list_allocator::Heap;
use spin::mutex::{SpinMutex, SpinMutexGuard};

use super::{PageProvider, PageRun};
use crate::base::sync::{AtomicUsize, Ordering, SPIN_LIMIT, TryLock, spin_loop};

/// Small, so that a region of 4 KiB at an odd address still has three pages.
const PAGE_LEN: usize = 1024;

/// How often one who adds a region waits, within the spin limit, for another one to be done: it has time.
const ADD_TRIES: u32 = 64;

/// Up to this length an untouched region is preferred whole: small heaps are one chunk.
const WHOLE_LIMIT: usize = 256 << 10;

/// Larger regions are cut into chunks no shorter than this,
const CHUNK_MIN_LEN: usize = 64 << 10;

/// and no more than about this many of them.
const CHUNK_COUNT: usize = 32;

/// Page runs from up to `REGIONS` regions of memory that the kernel hands over, at any time.
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
    /// Held while a region is added.
    adding: TryLock,
    /// The first `count` of `slots` are in use, for good. Raised, after its slot was filled, by the holder of `adding`.
    count: AtomicUsize,
    slots: [Region; REGIONS],
}

/// One region. `start` and `end` are written once, before `count` lets anybody see the slot.
struct Region {
    /// The first page's address.
    start: AtomicUsize,
    /// The address behind the last page.
    end: AtomicUsize,
    /// Bytes mapped. Written by the holder of `heap`'s lock.
    held_len: AtomicUsize,
    heap: SpinMutex<Heap>,
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
    /// The start is null.
    Null,
    /// The region would reach the end of the address space, or is longer than `isize::MAX` bytes.
    Wraps,
    /// The region has not one whole page of 1024 bytes at a multiple of 1024.
    TooSmall,
    /// The region shares a page with one that was added before, or is that one.
    Overlaps,
    /// All slots are taken; raise the provider's const parameter.
    Full,
    /// Another context is adding a region and did not finish within the bound. Try again, but not from a context that
    /// may have interrupted it.
    Busy,
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Null => "the region starts at the null address",
            Self::Wraps => "the region does not fit into the address space",
            Self::TooSmall => "the region has no whole aligned page of 1024 bytes",
            Self::Overlaps => "the region overlaps one that was added before",
            Self::Full => "the provider has no slot left for another region",
            Self::Busy => "another context is adding a region",
        })
    }
}

impl Error for RegionError {}

impl<const REGIONS: usize> RegionProvider<REGIONS> {
    /// A provider without any memory.
    pub const fn new() -> Self {
        Self { adding: TryLock::new(), count: AtomicUsize::new(0), slots: [const { Region::new() }; REGIONS] }
    }

    /// Hands a region of memory over to the provider, which uses its whole 1024-byte pages and writes to them at once.
    ///
    /// May be called before the provider's first use and at any time after it.
    ///
    /// # Errors
    /// See [`RegionError`]. The provider goes on as before and the region stays the caller's.
    ///
    /// # Safety
    /// The `len` bytes from `start` on are mapped, readable and writable, `start`'s provenance covers them, and nothing
    /// but this provider uses them, from this call on until the provider and every run it gave are used no more.
    /// (For a provider in a `static` that is: for ever.) If the answer is an error, nothing is asked.
    pub unsafe fn add_region(&self, start: *mut u8, len: usize) -> Result<(), RegionError> {
        if start.is_null() {
            return Err(RegionError::Null);
        }
        if isize::try_from(len).is_err() {
            return Err(RegionError::Wraps);
        }
        let end = start.addr().checked_add(len).ok_or(RegionError::Wraps)?;
        let pages = Span::of_pages(start.addr(), end).ok_or(RegionError::TooSmall)?;

        let adding = (0..ADD_TRIES).find_map(|_| self.adding.lock_bounded());
        let _adding = adding.ok_or(RegionError::Busy)?;
        if self.regions().any(|region| region.pages().overlaps(pages)) {
            return Err(RegionError::Overlaps);
        }
        let count = self.count.load(Ordering::Relaxed);
        let region = self.slots.get(count).ok_or(RegionError::Full)?;
        // Nobody looks into a slot at or above `count`, so this lock is open.
        let mut heap = region.heap.try_lock().ok_or(RegionError::Busy)?;
        // SAFETY: The heap is still the empty one: a slot is filled only here, under `adding`, and never again since
        // `count` then passes it. `pages` lies inside the caller's bytes, which nothing else uses: the caller says
        // so, and no other region of ours has a page of it. Its start is a multiple of a page and its length at
        // least one, so that the list's first node fits, aligned.
        unsafe { heap.init(start.with_addr(pages.start), pages.len()) };
        drop(heap);
        region.start.store(pages.start, Ordering::Relaxed);
        region.end.store(pages.end, Ordering::Relaxed);
        self.count.store(count + 1, Ordering::Release);
        Ok(())
    }

    /// How many regions were added.
    pub fn region_count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Bytes in mapped runs. While others map and unmap, a sum of moments.
    pub fn held_len(&self) -> usize {
        self.regions().map(Region::held_len).sum()
    }

    /// Bytes that are not mapped, in whole pages, not necessarily in one piece. While others map and unmap, a sum of
    /// moments.
    pub fn free_len(&self) -> usize {
        self.regions().map(Region::free_len).sum()
    }

    /// `map`, with how often to look again at locks that are held, and what to do between two looks.
    fn map_with(&self, run: PageRun, looks: u32, relax: &mut impl FnMut()) -> Option<NonNull<u8>> {
        let run = own(run)?;
        // The first lap takes what is open. Only if a region was busy and none gave is it worth a second one with
        // patience, of which the whole call has no more than one lock's share.
        let mut patience = 0;
        for _ in 0..2 {
            let mut busy = false;
            for region in self.regions() {
                match region.take(run, &mut patience, relax) {
                    Answer::Run(start) => return Some(start),
                    Answer::Refused => {}
                    Answer::Busy => busy = true,
                }
            }
            if !busy || looks == 0 {
                return None;
            }
            patience = looks;
        }
        None
    }

    fn regions(&self) -> impl Iterator<Item = &Region> {
        self.slots.iter().take(self.region_count())
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
// lies inside the region, whose bytes the adder left to this provider, with the provenance of the pointer that the
// adder gave, and so stays mapped and writable. Its start and its length are at least what was asked, since `own`
// rounds upward only. Nothing here unwinds: the list panics on bad frees alone, and `give_back` refuses what lies
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
        let Some(run) = own(run) else { return false };
        let Some(region) = self.regions().find(|region| region.pages().contains(start.addr().get(), run)) else {
            return false;
        };
        // SAFETY: The run lies in this region. That it is mapped is what our caller promises.
        unsafe { region.give_back(start, run, &mut spin_loop) }
    }

    /// Whole small regions while they are untouched; else at least 64 KiB and a thirty-second of the region, so that
    /// its list of holes stays short; never more than the region has left, never less than `run`.
    fn prefer(&self, run: PageRun) -> PageRun {
        // The region that `map` would come to first.
        let Some(region) = self.regions().find(|region| region.free_len() >= run.len() && region.pages().serves(run))
        else {
            return run;
        };
        let pages = region.pages();
        let len = if pages.len() <= WHOLE_LIMIT && region.held_len() == 0 {
            pages.room(run.align())
        } else {
            // What is left may lie behind padding in front of a multiple of the alignment.
            let left = region.free_len().saturating_sub(run.align() - PAGE_LEN);
            (pages.len() / CHUNK_COUNT).next_power_of_two().max(CHUNK_MIN_LEN).min(left)
        };
        PageRun::new(len.max(run.len()), run.align(), PAGE_LEN).unwrap_or(run)
    }

    /// Whether some region's lock is held.
    fn is_busy(&self) -> bool {
        self.slots.iter().any(|slot| slot.heap.is_locked())
    }
}

/// The run in pages of this provider. For a run that was made with a shorter page it rounds up, the same way in `map`
/// and in `unmap`.
fn own(run: PageRun) -> Option<PageRun> {
    PageRun::new(run.len(), run.align(), PAGE_LEN)
}

impl Region {
    const fn new() -> Self {
        Self {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            held_len: AtomicUsize::new(0),
            heap: SpinMutex::new(Heap::empty()),
        }
    }

    fn pages(&self) -> Span {
        Span { start: self.start.load(Ordering::Relaxed), end: self.end.load(Ordering::Relaxed) }
    }

    fn held_len(&self) -> usize {
        self.held_len.load(Ordering::Relaxed)
    }

    fn free_len(&self) -> usize {
        self.pages().len().saturating_sub(self.held_len())
    }

    /// The region's list, looking again at a lock that is held as often as there is patience left.
    fn lock(&self, patience: &mut u32, relax: &mut impl FnMut()) -> Option<SpinMutexGuard<'_, Heap>> {
        loop {
            // Looks before it writes, so that a busy lock's cache line stays shared.
            if !self.heap.is_locked() {
                if let Some(heap) = self.heap.try_lock() {
                    return Some(heap);
                }
            }
            *patience = patience.checked_sub(1)?;
            relax();
        }
    }

    fn take(&self, run: PageRun, patience: &mut u32, relax: &mut impl FnMut()) -> Answer {
        if self.free_len() < run.len() || !self.pages().serves(run) {
            return Answer::Refused;
        }
        let Some(mut heap) = self.lock(patience, relax) else {
            return Answer::Busy;
        };
        let Ok(start) = heap.allocate_first_fit(run.layout()) else {
            return Answer::Refused;
        };
        self.held_len.store(heap.used(), Ordering::Relaxed);
        Answer::Run(start)
    }

    /// Puts a run back into the list. False: it could not, and nothing changed.
    ///
    /// # Safety
    /// This region's `take` gave the run, it was not given back since, and nobody uses it any more unless the answer
    /// is false.
    unsafe fn give_back(&self, start: NonNull<u8>, run: PageRun, relax: &mut impl FnMut()) -> bool {
        let Some(mut heap) = self.lock(&mut { SPIN_LIMIT }, relax) else {
            return false;
        };
        // The run's memory, by the pointer that the region came with: the caller's may be good for the run alone, and
        // a merged hole is wider.
        let Some(start) = NonNull::new(heap.bottom().with_addr(start.addr().get())) else {
            return false;
        };
        if heap.used() < run.len() {
            return false;
        }
        // SAFETY: This list gave these bytes for this very layout and has not had them back (our contract).
        unsafe { heap.deallocate(start, run.layout()) };
        self.held_len.store(heap.used(), Ordering::Relaxed);
        true
    }
}

/// A range of addresses, of whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: usize,
    end: usize,
}

impl Span {
    /// The whole pages between two addresses; `None` if there are none.
    fn of_pages(start: usize, end: usize) -> Option<Self> {
        let pages = Self { start: align_up(start, PAGE_LEN)?, end: end & !(PAGE_LEN - 1) };
        (pages.start < pages.end).then_some(pages)
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
mod tests {
    use super::*;
    use core::alloc::Layout;
    use core::time::Duration;
    use std::sync::{Arc, mpsc};
    use std::vec::Vec;
    use std::{format, thread};

    const KIB: usize = 1024;

    /// Host memory that starts `odd` bytes behind a multiple of 2 MiB. Declared before the provider that uses it.
    struct Area {
        base: NonNull<u8>,
        layout: Layout,
        odd: usize,
        len: usize,
    }

    // SAFETY: The area is plain memory of its owner's.
    unsafe impl Send for Area {}
    // SAFETY: As above; the methods hand out a pointer only.
    unsafe impl Sync for Area {}

    impl Area {
        fn new(odd: usize, len: usize) -> Self {
            let layout = Layout::from_size_align(odd + len + 1, 2 << 20).unwrap();
            // SAFETY: The layout has at least one byte.
            let base = NonNull::new(unsafe { std::alloc::alloc(layout) }).unwrap();
            Self { base, layout, odd, len }
        }

        fn start(&self) -> *mut u8 {
            self.base.as_ptr().wrapping_add(self.odd)
        }

        fn add_to<const N: usize>(&self, provider: &RegionProvider<N>) -> Result<(), RegionError> {
            // SAFETY: The area is ours, and the tests drop it after the provider.
            unsafe { provider.add_region(self.start(), self.len) }
        }

        fn holds(&self, run: &Mapped) -> bool {
            let start = run.start.as_ptr().addr();
            start >= self.start().addr() && start + run.run.len() <= self.start().addr() + self.len
        }
    }

    impl Drop for Area {
        fn drop(&mut self) {
            // SAFETY: Allocated in `new` with this layout.
            unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) }
        }
    }

    /// A run that is full of its own tag, so that an overlap cannot pass.
    struct Mapped {
        start: NonNull<u8>,
        run: PageRun,
        tag: u64,
    }

    impl Mapped {
        fn map<const N: usize>(provider: &RegionProvider<N>, run: PageRun, tag: u64) -> Option<Self> {
            let start = provider.map(run)?;
            assert_eq!(start.as_ptr().addr() % run.align(), 0);
            let mapped = Self { start, run, tag };
            for word in 0..run.len() / 8 {
                // SAFETY: Inside the run, which the provider just gave.
                unsafe { start.as_ptr().cast::<u64>().wrapping_add(word).write(tag ^ word as u64) };
            }
            Some(mapped)
        }

        fn check(&self) {
            for word in 0..self.run.len() / 8 {
                // SAFETY: Inside the run, written by `map`.
                let found = unsafe { self.start.as_ptr().cast::<u64>().wrapping_add(word).read() };
                assert_eq!(found, self.tag ^ word as u64, "another run wrote into this one");
            }
        }

        fn unmap_untouched<const N: usize>(self, provider: &RegionProvider<N>) {
            // SAFETY: Mapped, given back here once, not used after.
            assert!(unsafe { provider.unmap(self.start, self.run) });
        }

        fn unmap<const N: usize>(self, provider: &RegionProvider<N>) {
            self.check();
            // SAFETY: Mapped by `map`, given back here once (tried again when refused), not used after.
            while !unsafe { provider.unmap(self.start, self.run) } {
                thread::yield_now();
            }
        }
    }

    fn run(len: usize, align: usize) -> PageRun {
        PageRun::new(len, align, PAGE_LEN).unwrap()
    }

    fn random(state: &mut u64) -> usize {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state >> 16) as usize
    }

    /// Fails, instead of hanging, when `work` waits for ever.
    fn ends(work: impl FnOnce() + Send + 'static) {
        let (done, ended) = mpsc::channel();
        let worker = thread::spawn(move || {
            work();
            done.send(()).unwrap();
        });
        if ended.recv_timeout(Duration::from_secs(20)) == Err(mpsc::RecvTimeoutError::Timeout) {
            panic!("waited for ever");
        }
        worker.join().unwrap();
    }

    #[test]
    fn a_region_serves_exactly_its_whole_pages() {
        // (bytes behind a multiple of 2 MiB, length, pages)
        let cases = [
            (0, 0, 0),
            (0, 1, 0),
            (0, 1023, 0),
            (1, 1024, 0),
            (1, 2046, 0),
            (0, 1024, 1),
            (1023, 1025, 1),
            (0, 4096, 4),
            (1, 4096, 3),
            (1016, 4096, 3),
            (8, 4095, 3),
            (0, 100 * KIB, 100),
            (77, 100 * KIB, 99),
        ];
        for (odd, len, pages) in cases {
            let area = Area::new(odd, len);
            let provider = RegionProvider::<2>::new();
            if pages == 0 {
                assert_eq!(area.add_to(&provider), Err(RegionError::TooSmall), "{odd} {len}");
                assert_eq!((provider.region_count(), provider.free_len()), (0, 0));
                continue;
            }
            area.add_to(&provider).unwrap();
            assert_eq!(provider.free_len(), pages * KIB, "{odd} {len}");
            let mut held = Vec::new();
            while let Some(mapped) = Mapped::map(&provider, run(1, 1), held.len() as u64) {
                assert!(area.holds(&mapped));
                held.push(mapped);
            }
            assert_eq!(held.len(), pages, "{odd} {len}");
            assert_eq!((provider.held_len(), provider.free_len()), (pages * KIB, 0));
            held.into_iter().for_each(|mapped| mapped.unmap(&provider));
            assert_eq!((provider.held_len(), provider.free_len()), (0, pages * KIB));
            Mapped::map(&provider, run(pages * KIB, KIB), 0).unwrap().unmap(&provider);
        }
    }

    #[test]
    fn without_a_region_everything_is_refused() {
        let provider = RegionProvider::<3>::new();
        assert_eq!(provider.map(run(1, 1)), None);
        assert_eq!(provider.prefer(run(5000, 1)), run(5000, 1));
        // SAFETY: Not a run of the provider, which is what the test shows to be refused; nothing is touched.
        assert!(!unsafe { provider.unmap(NonNull::dangling(), run(1, 1)) });
        let area = Area::new(0, 4096);
        assert_eq!(area.add_to(&RegionProvider::<0>::new()), Err(RegionError::Full));
    }

    #[test]
    fn what_cannot_be_a_region_is_refused_and_costs_nothing() {
        let area = Area::new(0, 64 * KIB);
        let provider = RegionProvider::<2>::new();
        let add = |start, len| {
            // SAFETY: Inside the area, or refused before it is touched.
            unsafe { provider.add_region(start, len) }
        };
        let at = |offset| area.start().wrapping_add(offset);
        assert_eq!(add(core::ptr::null_mut(), 4096), Err(RegionError::Null));
        assert_eq!(add(at(0), usize::MAX), Err(RegionError::Wraps));
        assert_eq!(add(at(0), isize::MAX as usize + 1), Err(RegionError::Wraps));
        assert_eq!(add(core::ptr::without_provenance_mut(usize::MAX - 4095), 4096), Err(RegionError::Wraps));
        assert_eq!(add(core::ptr::without_provenance_mut(usize::MAX - 10), 4), Err(RegionError::TooSmall));
        add(at(8 * KIB), 8 * KIB).unwrap();
        let held = Mapped::map(&provider, run(8 * KIB, 1), 1).unwrap();
        for (start, len) in [(8, 8), (0, 64), (0, 9), (15, 1), (15, 9), (10, 2), (7, 2)] {
            assert_eq!(add(at(start * KIB), len * KIB), Err(RegionError::Overlaps), "{start} {len}");
        }
        held.check();
        // Neighbours on both sides overlap nothing, but there is one slot left.
        add(at(0), 8 * KIB).unwrap();
        assert_eq!(add(at(16 * KIB), 8 * KIB), Err(RegionError::Full));
        assert_eq!((provider.region_count(), provider.free_len()), (2, 8 * KIB));
        held.unmap(&provider);
        assert_eq!(provider.free_len(), 16 * KIB);
        assert!(format!("{provider:?} {}", RegionError::Full).contains("free_len: 16384"));
    }

    #[test]
    fn a_second_adder_is_told_that_the_first_is_busy() {
        ends(|| {
            let area = Area::new(0, 4096);
            let provider = RegionProvider::<2>::new();
            let adding = provider.adding.try_lock();
            assert_eq!(area.add_to(&provider), Err(RegionError::Busy));
            drop(adding);
            area.add_to(&provider).unwrap();
        });
    }

    #[test]
    fn mixed_runs_are_disjoint_aligned_and_all_come_back() {
        for (odd, len) in [(0, 8 << 20), (1, (8 << 20) - 3), (777, 100 * KIB), (9000, 3 << 20)] {
            let mut seed = 0x9e37_79b9_7f4a_7c15 ^ (odd + len) as u64;
            let areas = [Area::new(odd, len), Area::new(odd + 5, len)];
            let provider = RegionProvider::<2>::new();
            areas.iter().for_each(|area| area.add_to(&provider).unwrap());
            let free_len = provider.free_len();
            let mut held: Vec<Mapped> = Vec::new();
            for step in 0..2000 {
                let align = KIB << (random(&mut seed) % 12);
                let len = 1 + random(&mut seed) % (KIB << (random(&mut seed) % 10));
                if random(&mut seed) % 3 > 0 {
                    if let Some(mapped) = Mapped::map(&provider, run(len, align), step) {
                        assert!(areas.iter().any(|area| area.holds(&mapped)));
                        held.push(mapped);
                    }
                } else if !held.is_empty() {
                    held.swap_remove(random(&mut seed) % held.len()).unmap(&provider);
                }
                let sum: usize = held.iter().map(|mapped| mapped.run.len()).sum();
                assert_eq!((provider.held_len(), provider.free_len()), (sum, free_len - sum));
            }
            held.into_iter().for_each(|mapped| mapped.unmap(&provider));
            let lens = provider.slots.each_ref().map(|region| region.pages().len());
            let whole = lens.map(|len| Mapped::map(&provider, run(len, KIB), 1).unwrap());
            assert_eq!(provider.free_len(), 0);
            whole.into_iter().for_each(|mapped| mapped.unmap(&provider));
        }
    }

    #[test]
    fn padding_in_front_of_an_aligned_run_stays_usable() {
        let mut align = KIB;
        while align <= 2 << 20 {
            // Starts one page behind a multiple of 2 MiB: as much padding as there can be.
            let area = Area::new(KIB, 4 << 20);
            let provider = RegionProvider::<1>::new();
            area.add_to(&provider).unwrap();
            let aligned = Mapped::map(&provider, run(align, align), 1).unwrap();
            let mut rest = Vec::new();
            while let Some(mapped) = Mapped::map(&provider, run(1, 1), 2) {
                rest.push(mapped);
            }
            assert_eq!(rest.len() * KIB + align, 4 << 20);
            aligned.unmap(&provider);
            rest.into_iter().for_each(|mapped| mapped.unmap(&provider));
            Mapped::map(&provider, run(4 << 20, KIB), 3).unwrap().unmap(&provider);
            align *= 2;
        }
    }

    #[test]
    fn a_lock_that_stays_held_is_not_waited_for() {
        ends(|| {
            let areas = [Area::new(0, 4096), Area::new(0, 4096)];
            let provider = RegionProvider::<2>::new();
            areas[0].add_to(&provider).unwrap();
            let first = Mapped::map(&provider, run(1, 1), 1).unwrap();
            // As if this context had interrupted the holder.
            let guard = provider.slots[0].heap.try_lock().unwrap();
            assert_eq!(provider.map(run(1, 1)), None);
            // SAFETY: Mapped above; it is refused, so it stays ours.
            assert!(!unsafe { provider.unmap(first.start, first.run) });
            // The others go on, old and new, and so do the questions.
            areas[1].add_to(&provider).unwrap();
            let second = Mapped::map(&provider, run(1, 1), 2).unwrap();
            assert!(areas[1].holds(&second));
            second.unmap(&provider);
            assert_eq!(areas[0].add_to(&provider), Err(RegionError::Overlaps));
            assert_eq!((provider.held_len(), provider.free_len()), (KIB, 7 * KIB));
            drop(guard);
            first.unmap(&provider);
            assert_eq!(provider.held_len(), 0);
        });
    }

    #[test]
    fn a_lock_is_looked_at_a_bounded_number_of_times() {
        let areas = [Area::new(0, 4096), Area::new(0, 4096), Area::new(0, 4096)];
        let provider = RegionProvider::<3>::new();
        areas.iter().for_each(|area| area.add_to(&provider).unwrap());
        let held = Mapped::map(&provider, run(1, 1), 1).unwrap();
        let lock = |index: usize| provider.slots[index].heap.try_lock();
        let mut looks = 0;
        // An open region serves at once, whoever holds the others.
        let guards = [lock(0), lock(1)];
        let start = provider.map_with(run(1, 1), SPIN_LIMIT, &mut || looks += 1).unwrap();
        Mapped { start, run: run(1, 1), tag: held.tag }.unmap_untouched(&provider);
        assert_eq!(looks, 0);
        // Three held ones cost no more than one, and an open one is not forgotten because of them.
        let mut guard = lock(2);
        assert_eq!(provider.map_with(run(1, 1), SPIN_LIMIT, &mut || looks += 1), None);
        assert_eq!(looks, SPIN_LIMIT);
        looks = 0;
        let mut open_late = || {
            looks += 1;
            if looks == SPIN_LIMIT / 2 {
                guard = None;
            }
        };
        let start = provider.map_with(run(1, 1), SPIN_LIMIT, &mut open_late).unwrap();
        Mapped { start, run: run(1, 1), tag: held.tag }.unmap_untouched(&provider);
        // Giving back waits as long, then refuses.
        looks = 0;
        // SAFETY: Mapped above; it is refused, so it stays ours.
        let taken = unsafe { provider.slots[0].give_back(held.start, held.run, &mut || looks += 1) };
        assert_eq!((taken, looks), (false, SPIN_LIMIT));
        let mut guards = Some(guards);
        // SAFETY: Mapped above, not used after.
        let taken = unsafe { provider.slots[0].give_back(held.start, held.run, &mut || guards = None) };
        assert!(taken);
        assert_eq!(provider.held_len(), 0);
    }

    #[test]
    fn what_lies_in_no_region_is_not_taken_back() {
        let area = Area::new(0, 64 * KIB);
        let provider = RegionProvider::<1>::new();
        // SAFETY: The middle of the area.
        unsafe { provider.add_region(area.start().wrapping_add(16 * KIB), 32 * KIB) }.unwrap();
        let held = Mapped::map(&provider, run(16 * KIB, 1), 1).unwrap();
        for (offset, len, align) in [
            (0, KIB, KIB),
            (8 * KIB, 9 * KIB, KIB),
            (48 * KIB, KIB, KIB),
            (40 * KIB, 9 * KIB, KIB),
            (16 * KIB, 32 * KIB, KIB),
            (17 * KIB, KIB, 2 * KIB),
            (16 * KIB + 8, KIB, KIB),
        ] {
            let start = NonNull::new(area.start().wrapping_add(offset)).unwrap();
            // SAFETY: No run of the provider; the test shows that it is refused before anything is touched.
            let taken = unsafe { provider.unmap(start, run(len, align)) };
            assert!(!taken, "{offset} {len} {align}");
        }
        held.unmap(&provider);
        Mapped::map(&provider, run(32 * KIB, 1), 1).unwrap().unmap(&provider);
    }

    #[test]
    fn a_run_made_with_shorter_pages_is_rounded_up() {
        let area = Area::new(0, 8 * KIB);
        let provider = RegionProvider::<1>::new();
        area.add_to(&provider).unwrap();
        let odd = PageRun::new(24, 8, 8).unwrap();
        let held: Vec<_> = (0..8).map(|tag| Mapped::map(&provider, odd, tag).unwrap()).collect();
        assert_eq!(provider.map(odd), None);
        held.into_iter().for_each(|mapped| mapped.unmap(&provider));
        Mapped::map(&provider, run(8 * KIB, 1), 1).unwrap().unmap(&provider);
    }

    #[test]
    fn no_address_passes_the_end_of_the_address_space() {
        let top = usize::MAX - (KIB - 1);
        let span = Span { start: top - 100 * KIB, end: top };
        assert!(span.serves(run(100 * KIB, KIB)));
        assert!(Span { start: top - (9 << 20), end: top - (1 << 20) }.serves(run(KIB, 512 * KIB)));
        assert!(!span.serves(run(101 * KIB, KIB)));
        // A hole above the last multiple of 2 MiB there is would be aligned to address 0.
        let span = Span { start: usize::MAX - (4 << 20) + 1, end: top };
        assert_eq!(span.room(2 << 20), (4 << 20) - KIB);
        assert!(!span.serves(run(KIB, 2 << 20)));
        assert!(!span.serves(run(KIB, 1 << (usize::BITS - 2))));
        assert!(span.serves(run((4 << 20) - KIB, KIB)));
    }

    #[test]
    fn prefers_small_regions_whole_and_large_ones_in_few_chunks() {
        let small = Area::new(3, 100 * KIB);
        let provider = RegionProvider::<2>::new();
        small.add_to(&provider).unwrap();
        let whole = provider.prefer(run(4096, 4096));
        assert_eq!(whole, run(96 * KIB, 4096));
        let held = Mapped::map(&provider, whole, 1).unwrap();
        // Three pages are left in front of it: what is asked, or all of them.
        assert_eq!(provider.prefer(run(1, 1)), run(3 * KIB, 1));
        assert_eq!(provider.prefer(run(4096, 1)), run(4096, 1));
        held.unmap(&provider);
        // Partly used: no less than the wish, no more than what is left.
        let held = Mapped::map(&provider, run(10 * KIB, 1), 1).unwrap();
        assert_eq!(provider.prefer(run(4096, 1)), run(64 * KIB, 1));
        assert_eq!(provider.prefer(run(70 * KIB, 1)), run(70 * KIB, 1));
        held.unmap(&provider);

        let large = Area::new(1, 24 << 20);
        large.add_to(&provider).unwrap();
        let held = Mapped::map(&provider, whole, 1).unwrap();
        let mut chunks = Vec::new();
        loop {
            let chunk = provider.prefer(run(16 * KIB, 16 * KIB));
            assert!(chunk.len() >= 16 * KIB && chunk.align() == 16 * KIB);
            let Some(mapped) = Mapped::map(&provider, chunk, 1) else {
                break;
            };
            chunks.push(mapped);
        }
        assert!((20..=CHUNK_COUNT).contains(&chunks.len()), "{}", chunks.len());
        assert!(provider.free_len() < 32 * KIB, "{}", provider.free_len());
        held.unmap(&provider);
        chunks.into_iter().for_each(|mapped| mapped.unmap(&provider));
        assert_eq!(provider.held_len(), 0);
    }

    #[test]
    fn threads_share_regions_that_are_added_meanwhile() {
        ends(|| {
            let areas: Arc<Vec<Area>> = Arc::new((0..4).map(|i| Area::new(i * 100, 256 * KIB)).collect());
            let provider = RegionProvider::<4>::new();
            areas[0].add_to(&provider).unwrap();
            let added = AtomicUsize::new(1);
            thread::scope(|scope| {
                for thread in 0..4_u64 {
                    let (provider, areas, added) = (&provider, &areas, &added);
                    scope.spawn(move || {
                        let mut seed = 77 + thread;
                        let mut held: Vec<Mapped> = Vec::new();
                        for step in 0..2000 {
                            if step % 100 == 0 {
                                let area = &areas[random(&mut seed) % 4];
                                match area.add_to(provider) {
                                    Ok(()) => _ = added.fetch_add(1, Ordering::Relaxed),
                                    Err(error) => {
                                        assert!([RegionError::Overlaps, RegionError::Busy].contains(&error));
                                    }
                                }
                            }
                            let wish = run(1 + random(&mut seed) % (16 * KIB), KIB << (random(&mut seed) % 5));
                            if held.len() < 8 {
                                held.extend(Mapped::map(provider, wish, thread << 32 | step));
                            } else {
                                held.swap_remove(random(&mut seed) % 8).unmap(provider);
                            }
                        }
                        held.into_iter().for_each(|mapped| mapped.unmap(provider));
                    });
                }
            });
            assert_eq!(provider.region_count(), added.into_inner());
            assert_eq!(provider.held_len(), 0);
            let count = provider.region_count();
            let whole: Vec<_> =
                (0..count).map(|tag| Mapped::map(&provider, run(255 * KIB, 1), tag as u64).unwrap()).collect();
            whole.into_iter().for_each(|mapped| mapped.unmap(&provider));
        });
    }
}

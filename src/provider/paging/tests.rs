//! The provider over real page tables in the host's memory, which no CPU uses: what is mapped where, in which order,
//! and what comes back.
//!
//! The kernel here fails on demand, and watches the order: a frame or a table that goes back, or an address that is
//! used anew, before a shootdown after its unmapping fails the test, as does a shootdown with something locked.

#![expect(clippy::cast_possible_truncation, reason = "addresses have 64 bits wherever this runs")]

use super::*;
use crate::battery::Random;
use std::boxed::Box;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::vec::Vec;
use x86_64::structures::paging::PageTable;
use x86_64::structures::paging::mapper::{
    FlagUpdateError, MapToError, MappedPageTable, MapperFlush, MapperFlushAll, PageTableFrameMapping,
};
use x86_64::structures::paging::page::PageRangeInclusive;

const WINDOW: usize = 0xffff_a000_0020_0000;
/// Frames of 2 MiB have addresses from here on; there is no memory behind them.
const HUGE_BASE: u64 = 1 << 40;

/// Frame `n` is table `n` of this memory.
struct Ram(*mut PageTable);

// SAFETY: the memory is leaked and used under the kernel's lock.
unsafe impl Send for Ram {}

// SAFETY: the tests' frames of 4 KiB are all in the memory.
unsafe impl PageTableFrameMapping for Ram {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.0.wrapping_add(usize::try_from(frame.start_address().as_u64()).unwrap() / PAGE)
    }
}

/// Which page a frame was unmapped from, or table unlinked above, without a shootdown since.
type Unflushed = BTreeMap<u64, (usize, usize)>;

/// The mapper, failing and watching.
struct Watched {
    tables: MappedPageTable<'static, Ram>,
    unflushed: Unflushed,
    /// Calls until one fails, of `map_to` and `unmap`.
    map_fails: usize,
    unmap_fails: usize,
}

fn fails(left: &mut usize) -> bool {
    *left = left.wrapping_sub(1);
    *left == 0
}

/// No call fails.
const NEVER: usize = usize::MAX;

macro_rules! watched_mapper {
    ($($size:ty),*) => {
        $(impl Mapper<$size> for Watched {
            unsafe fn map_to_with_table_flags<A: FrameAllocator<Size4KiB> + ?Sized>(
                &mut self,
                page: Page<$size>,
                frame: PhysFrame<$size>,
                flags: PageTableFlags,
                parents: PageTableFlags,
                frames: &mut A,
            ) -> Result<MapperFlush<$size>, MapToError<$size>> {
                let at = page.start_address().as_u64() as usize;
                let stale = self.unflushed.values().any(|(start, end)| (*start..*end).contains(&at));
                assert!(!stale, "{at:#x} is used anew before a shootdown");
                let tables = &mut self.tables;
                // SAFETY: the contract is the same.
                let mapped = unsafe { tables.map_to_with_table_flags(page, frame, flags, parents, frames) };
                if mapped.is_ok() && fails(&mut self.map_fails) {
                    // Late, so that tables are there already.
                    let _ = self.tables.unmap(page).unwrap();
                    return Err(MapToError::FrameAllocationFailed);
                }
                mapped
            }

            fn unmap(&mut self, page: Page<$size>) -> Result<(PhysFrame<$size>, MapperFlush<$size>), UnmapError> {
                if Mapper::<$size>::translate_page(&self.tables, page).is_ok() && fails(&mut self.unmap_fails) {
                    return Err(UnmapError::InvalidFrameAddress(PhysAddr::zero()));
                }
                let (frame, flush) = self.tables.unmap(page)?;
                let at = page.start_address().as_u64() as usize;
                self.unflushed.insert(frame.start_address().as_u64(), (at, at + len_of::<$size>()));
                Ok((frame, flush))
            }

            unsafe fn update_flags(
                &mut self,
                _: Page<$size>,
                _: PageTableFlags,
            ) -> Result<MapperFlush<$size>, FlagUpdateError> {
                unimplemented!("the provider does not use it")
            }

            unsafe fn set_flags_p4_entry(
                &mut self,
                _: Page<$size>,
                _: PageTableFlags,
            ) -> Result<MapperFlushAll, FlagUpdateError> {
                unimplemented!("the provider does not use it")
            }

            unsafe fn set_flags_p3_entry(
                &mut self,
                _: Page<$size>,
                _: PageTableFlags,
            ) -> Result<MapperFlushAll, FlagUpdateError> {
                unimplemented!("the provider does not use it")
            }

            unsafe fn set_flags_p2_entry(
                &mut self,
                _: Page<$size>,
                _: PageTableFlags,
            ) -> Result<MapperFlushAll, FlagUpdateError> {
                unimplemented!("the provider does not use it")
            }

            fn translate_page(&self, page: Page<$size>) -> Result<PhysFrame<$size>, TranslateError> {
                self.tables.translate_page(page)
            }
        })*
    };
}
watched_mapper!(Size4KiB, Size2MiB);

/// Notes the tables that are cleaned up on their way to the provider.
struct Noted<'a, D> {
    to: &'a mut D,
    unflushed: &'a mut Unflushed,
    pages: (usize, usize),
}

impl<D: FrameDeallocator<Size4KiB>> FrameDeallocator<Size4KiB> for Noted<'_, D> {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
        self.unflushed.insert(frame.start_address().as_u64(), self.pages);
        // SAFETY: the contract is the same.
        unsafe { self.to.deallocate_frame(frame) };
    }
}

impl CleanUp for Watched {
    unsafe fn clean_up<D: FrameDeallocator<Size4KiB>>(&mut self, _: &mut D) {
        unimplemented!("the provider does not use it")
    }

    unsafe fn clean_up_addr_range<D: FrameDeallocator<Size4KiB>>(&mut self, range: PageRangeInclusive, to: &mut D) {
        let [first, last] = [range.start, range.end].map(|page| page.start_address().as_u64() as usize);
        let mut noted = Noted { to, unflushed: &mut self.unflushed, pages: (first, last + PAGE) };
        // SAFETY: the contract is the same.
        unsafe { self.tables.clean_up_addr_range(range, &mut noted) };
    }
}

/// Frames that are free; the numbers of those of 2 MiB count from `HUGE_BASE`.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Frames {
    small: BTreeSet<u64>,
    huge: BTreeSet<u64>,
}

impl Frames {
    fn count(&self) -> usize {
        self.small.len() + self.huge.len()
    }
}

// SAFETY: a frame that is taken out is not there any more.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        self.small.pop_first().map(|number| PhysFrame::containing_address(PhysAddr::new(number * PAGE as u64)))
    }
}

// SAFETY: as above.
unsafe impl FrameAllocator<Size2MiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame<Size2MiB>> {
        let addr = |number| HUGE_BASE + number * Size2MiB::SIZE;
        self.huge.pop_first().map(|number| PhysFrame::containing_address(PhysAddr::new(addr(number))))
    }
}

impl FrameDeallocator<Size4KiB> for Frames {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
        assert!(self.small.insert(frame.start_address().as_u64() / PAGE as u64), "{frame:?} was given back twice");
    }
}

impl FrameDeallocator<Size2MiB> for Frames {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame<Size2MiB>) {
        let number = (frame.start_address().as_u64() - HUGE_BASE) / Size2MiB::SIZE;
        assert!(self.huge.insert(number), "{frame:?} was given back twice");
    }
}

/// The kernel.
struct Kernel<const GUARDS: bool> {
    tables: Mutex<(Watched, Frames)>,
    shootdowns: AtomicUsize,
    /// The longest `with`, in frames that changed hands or pages that changed.
    longest: AtomicUsize,
}

impl<const GUARDS: bool> Kernel<GUARDS> {
    fn new(small: u64, huge: u64) -> Self {
        let count = usize::try_from(small).unwrap() + 2;
        let memory = Box::leak((0..count).map(|_| PageTable::new()).collect::<Vec<_>>().into_boxed_slice());
        let memory = memory.as_mut_ptr();
        // SAFETY: the last table of the memory is no frame's.
        let root = unsafe { &mut *memory.wrapping_add(count - 1) };
        // SAFETY: the root is an empty table, and all frames are in the memory.
        let tables = unsafe { MappedPageTable::new(root, Ram(memory)) };
        let watched = Watched { tables, unflushed: BTreeMap::new(), map_fails: NEVER, unmap_fails: NEVER };
        let frames = Frames { small: (1..=small).collect(), huge: (0..huge).collect() };
        Self { tables: Mutex::new((watched, frames)), shootdowns: AtomicUsize::new(0), longest: AtomicUsize::new(0) }
    }
}

// SAFETY: no CPU uses the tables, and nobody the memory.
unsafe impl<const GUARDS: bool> Paging for Kernel<GUARDS> {
    type Mapper = Watched;
    type Frames = Frames;
    /// Runs with guard pages have global ones.
    const FLAGS: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(if GUARDS {
        PageTableFlags::GLOBAL
    } else {
        PageTableFlags::NO_EXECUTE
    });
    const GUARDS: bool = GUARDS;

    fn with<R>(&self, work: impl FnOnce(&mut Watched, &mut Frames) -> R) -> R {
        let mut tables = self.tables.try_lock().expect("entered twice");
        let (watched, frames) = &mut *tables;
        let before = (frames.count(), watched.unflushed.len());
        let result = work(watched, frames);
        for (frame, (start, _)) in &watched.unflushed {
            let is_free = if *frame >= HUGE_BASE {
                frames.huge.contains(&((frame - HUGE_BASE) / Size2MiB::SIZE))
            } else {
                frames.small.contains(&(frame / PAGE as u64))
            };
            // A frame that moved is unmapped at its old place, and not given back.
            assert!(!is_free, "frame {frame:#x}, unmapped at {start:#x}, went back before a shootdown");
        }
        let taken = before.0.saturating_sub(frames.count());
        self.longest.fetch_max(taken.max(watched.unflushed.len().saturating_sub(before.1)), Relaxed);
        result
    }

    fn shoot_down(&self, stale: Stale) {
        self.shootdowns.fetch_add(1, Relaxed);
        assert_eq!(stale.global, GUARDS, "whether the entries were global");
        let mut tables = self.tables.try_lock().expect("the kernel's lock is held");
        let flushed = |page: usize| (stale.start()..stale.start() + stale.len()).contains(&page);
        tables.0.unflushed.retain(|_, (start, _)| !flushed(*start));
    }
}

type Provider<const GUARDS: bool> = PagingProvider<Kernel<GUARDS>, 64>;

fn provider<const GUARDS: bool>(small: u64, huge: u64, window_len: usize) -> Provider<GUARDS> {
    let provider = PagingProvider::new(Kernel::new(small, huge));
    // SAFETY: nothing is mapped in new tables.
    unsafe { provider.open(VirtAddr::new(WINDOW as u64), window_len) }.unwrap();
    provider
}

fn run(len: usize, align: usize) -> PageRun {
    PageRun::new(len, align, PAGE).unwrap()
}

/// Everything that must be as before when something was undone.
#[derive(Debug, PartialEq, Eq, Clone)]
struct State {
    frames: Frames,
    window: usize,
    mapped: usize,
}

impl<const GUARDS: bool> Provider<GUARDS> {
    fn state(&self) -> State {
        let frames = self.kernel.tables.lock().unwrap().1.clone();
        State { frames, window: self.free_window_len().unwrap(), mapped: self.mapped_len() }
    }

    /// The frames behind a run, one for each page; `None` for a page that is not mapped.
    fn frames(&self, start: usize, len: usize) -> Vec<Option<u64>> {
        let tables = self.kernel.tables.lock().unwrap();
        let frame = |at: usize| {
            let huge = at & !(HUGE_PAGE - 1);
            match (frame_at(&tables.0, at), frame_at(&tables.0, huge)) {
                (Some(Frame::Small(frame)), _) => Some(frame.start_address().as_u64()),
                (_, Some(Frame::Huge(frame))) => Some(frame.start_address().as_u64() + (at - huge) as u64),
                _ => None,
            }
        };
        (start..start + len).step_by(PAGE).map(frame).collect()
    }

    /// `map`, `unmap`, `resize` and `remap` by addresses.
    fn take(&self, run: PageRun) -> Option<usize> {
        self.map(run).map(|start| start.addr().get())
    }

    fn give(&self, start: usize, run: PageRun) -> bool {
        // SAFETY: nobody uses the memory of these tables; what is no run must be refused.
        unsafe { self.unmap(pointer(start), run) }
    }

    /// `decommit` and `commit` by addresses.
    fn empty(&self, start: usize, len: usize) -> bool {
        // SAFETY: nobody uses the memory of these tables.
        unsafe { self.decommit(pointer(start), run(len, PAGE)) }
    }

    fn refill(&self, start: usize, len: usize) -> bool {
        // SAFETY: as above.
        unsafe { self.commit(pointer(start), run(len, PAGE)) }
    }

    fn change(&self, start: usize, old: PageRun, new: PageRun) -> bool {
        // SAFETY: as above.
        unsafe { self.resize(pointer(start), old, new) }
    }

    fn shift(&self, start: usize, old: PageRun, new: PageRun) -> Option<usize> {
        // SAFETY: as above.
        unsafe { self.remap(pointer(start), old, new) }.map(|start| start.addr().get())
    }

    fn fail(&self, map: usize, unmap: usize) {
        let mut tables = self.kernel.tables.lock().unwrap();
        (tables.0.map_fails, tables.0.unmap_fails) = (map, unmap);
    }
}

fn pointer(addr: usize) -> NonNull<u8> {
    NonNull::new(with_exposed_provenance_mut(addr)).unwrap()
}

#[test]
fn windows_without_sense_are_refused_until_a_good_one() {
    let provider: Provider<false> = PagingProvider::new(Kernel::new(10, 0));
    let before = provider.state();
    // SAFETY: nothing is mapped in new tables.
    let open = |start: u64, len| unsafe { provider.open(VirtAddr::new(start), len) };
    assert_eq!(provider.take(run(PAGE, PAGE)), None, "not open yet");
    assert_eq!(open(WINDOW as u64, 0), Err(WindowError::TooShort));
    assert_eq!(open(WINDOW as u64, 2 * PAGE), Err(WindowError::TooShort));
    assert_eq!(open(WINDOW as u64, usize::MAX), Err(WindowError::Divided));
    assert_eq!(open(WINDOW as u64, 512 << 30), Err(WindowError::Divided));
    assert_eq!(open(0x7fff_ffff_f000, 1 << 20), Err(WindowError::Divided));
    provider.kernel.tables.lock().unwrap().1.small.clear();
    assert_eq!(open(WINDOW as u64, 1 << 30), Err(WindowError::Refused));
    provider.kernel.tables.lock().unwrap().1.small = before.frames.small.clone();
    assert_eq!(provider.state(), before, "nothing was changed");
    assert_eq!(open(WINDOW as u64, 1 << 30), Ok(()));
    assert_eq!(open(WINDOW as u64, 1 << 30), Err(WindowError::Open));
    assert_eq!(provider.state().frames.small.len(), 7, "three tables, and no frame beside");
    assert!(provider.take(run(PAGE, PAGE)).is_some());
}

/// The table of a short run stays for the next one there; up to eight stay, none where a huge page comes, none when the
/// last run has gone.
#[test]
fn tables_of_short_runs_are_spared_until_they_are_in_the_way() {
    // Slots of 4 MiB: each run has a table of its own.
    let provider = provider::<false>(200, 8, 16 << 30);
    let (all, short) = (provider.state(), run(PAGE, PAGE));
    let free = || provider.state().frames.small.len();
    let other = provider.take(short).unwrap();
    let before = free();
    let start = provider.take(short).unwrap();
    assert_eq!(free(), before - 2, "a page and a table");
    assert!(provider.give(start, short));
    assert_eq!(free(), before - 1, "the table stays");
    assert_eq!((provider.take(short), free()), (Some(start), before - 2), "and is used again");
    assert!(provider.give(start, short));
    let huge = run(HUGE_PAGE, PAGE);
    assert_eq!(provider.take(huge), Some(start));
    assert_eq!((free(), provider.state().frames.huge.len()), (before, 7), "the table is not in its way");
    assert!(provider.give(start, huge));
    let [two, four] = [2, 4].map(|count| run(count * HUGE_PAGE, PAGE));
    assert_eq!(provider.take(two), Some(start));
    let next = provider.take(short).unwrap();
    assert!(provider.give(next, short) && provider.change(start, two, four));
    assert_eq!((free(), provider.state().frames.huge.len()), (before, 4), "nor in the way of one that grows");
    assert!(provider.give(start, four));
    let runs: Vec<_> = (0..10).map(|_| provider.take(short).unwrap()).collect();
    assert!(runs.iter().all(|start| provider.give(*start, short)));
    assert_eq!(free(), before - 8, "eight at a time");
    let used: Vec<_> = (0..20).map(|_| provider.take(short).unwrap()).collect();
    assert_eq!(free(), before - 40);
    assert!(provider.give(used[19], short));
    assert_eq!(free(), before - 38, "all that are spared are in use");
    used[..19].iter().chain([&other]).for_each(|start| assert!(provider.give(*start, short)));
    assert_eq!(provider.state(), all);
}

#[test]
fn every_page_has_its_own_frame_and_all_come_back() {
    fn churn<const GUARDS: bool>(seed: u64) {
        let provider = provider::<GUARDS>(3000, 8, 64 << 20);
        let before = provider.state();
        let mut random = Random::new(seed);
        let mut runs: Vec<(usize, PageRun)> = Vec::new();
        let mut moves = 0;
        for step in 0..3000 {
            let longest = if random.below(10) == 0 { 1500 } else { 100 };
            let len = PAGE * (1 + random.below(longest));
            let index = random.below(runs.len());
            match random.below(5) {
                0 | 1 => {
                    let run = run(len, PAGE << random.below(10));
                    let Some(start) = provider.take(run) else { continue };
                    assert_eq!(start % run.align(), 0);
                    runs.push((start, run));
                }
                2 if !runs.is_empty() => {
                    let (start, run) = runs.swap_remove(index);
                    assert!(provider.give(start, run));
                    assert!(provider.frames(start, run.len()).iter().all(Option::is_none), "it is still mapped");
                }
                action if !runs.is_empty() => {
                    let (start, old) = runs[index];
                    let new = run(len, old.align());
                    let kept = old.len().min(new.len());
                    let frames = provider.frames(start, kept);
                    let place = if action == 3 {
                        provider.change(start, old, new).then_some(start)
                    } else {
                        let place = provider.shift(start, old, new);
                        moves += usize::from(place.is_some_and(|place| place != start));
                        place
                    };
                    assert_eq!(provider.frames(place.unwrap_or(start), kept), frames, "its content is another");
                    runs[index] = place.map_or((start, old), |place| (place, new));
                }
                _ => {}
            }
            if step % 20 != 0 {
                continue;
            }
            let mut seen = BTreeSet::new();
            for (start, run) in &runs {
                let frames = provider.frames(*start, run.len());
                assert!(frames.iter().all(|frame| seen.insert(frame.expect("mapped"))), "a frame is mapped twice");
                if GUARDS {
                    let around = [start - PAGE, start + run.len().next_multiple_of(PAGE)];
                    let huge_tail = provider.frames(around[1], PAGE)[0] == frames.last().unwrap().map(|f| f + 4096);
                    assert_eq!(provider.frames(around[0], PAGE), [None], "no guard in front");
                    assert!(huge_tail || provider.frames(around[1], PAGE) == [None], "no guard behind");
                }
            }
        }
        assert!(moves > 50, "{moves} moves");
        for (start, run) in runs {
            assert!(provider.give(start, run));
        }
        assert_eq!(provider.state(), before);
        assert_eq!(provider.lost_len(), 0);
        assert!(provider.kernel.longest.load(Relaxed) <= 2 * HOLD_PAGES, "a hold is bounded");
    }
    for seed in 1..4 {
        churn::<false>(seed);
        churn::<true>(seed);
    }
}

#[test]
fn frames_that_run_out_in_the_middle_of_a_run_all_come_back() {
    for small in [4, 5, 100, 400, 600] {
        let provider = provider::<false>(small, 0, 64 << 20);
        let before = provider.state();
        assert_eq!(provider.take(run(700 * PAGE, PAGE)), None);
        assert_eq!(provider.state(), before, "{small}");
    }
    // Growing, in place and by a move.
    let provider = provider::<false>(600, 0, 64 << 20);
    let held = run(300 * PAGE, PAGE);
    let start = provider.take(held).unwrap();
    let (before, frames) = (provider.state(), provider.frames(start, held.len()));
    assert!(!provider.change(start, held, run(700 * PAGE, PAGE)));
    assert_eq!(provider.shift(start, held, run(700 * PAGE, PAGE)), None);
    assert_eq!((provider.state(), provider.frames(start, held.len())), (before, frames));
}

#[test]
fn a_full_window_is_a_refusal_and_frames_stay() {
    let provider = provider::<true>(3000, 0, 1 << 20);
    let mut runs = Vec::new();
    while let Some(start) = provider.take(run(5 * PAGE, PAGE)) {
        runs.push(start);
    }
    // Of 256 pages 2 are no run's, and a run takes 6 with its guard.
    assert_eq!(runs.len(), 42);
    let before = provider.state();
    assert_eq!(provider.take(run(5 * PAGE, PAGE)), None);
    let resized = provider.change(runs[0], run(5 * PAGE, PAGE), run(9 * PAGE, PAGE));
    assert!(!resized, "a neighbour is in the way");
    let moved = provider.shift(runs[0], run(5 * PAGE, PAGE), run(9 * PAGE, PAGE));
    assert_eq!((moved, provider.state()), (None, before));
}

#[test]
fn whichever_page_the_mapper_refuses_nothing_has_changed() {
    let provider = provider::<false>(4000, 4, 64 << 20);
    let old = run(700 * PAGE, HUGE_PAGE);
    let start = provider.take(old).unwrap();
    assert!(provider.state().frames.huge.len() < 4, "the run has a huge page");
    let (before, frames) = (provider.state(), provider.frames(start, old.len()));
    let mut refused = 0;
    for call in 1..1500 {
        provider.fail(call, NEVER);
        let new = run(1100 * PAGE, HUGE_PAGE);
        let done = match call % 3 {
            0 => provider.take(new),
            1 => provider.change(start, old, new).then_some(start),
            _ => provider.shift(start, old, new),
        };
        provider.fail(NEVER, NEVER);
        if let Some(place) = done {
            // More calls than it has; this is how it would have gone.
            assert!(call > 50, "call {call} did not fail");
            assert_eq!(provider.frames(place, new.len()).iter().flatten().count(), 1100);
            break;
        }
        refused += 1;
        assert_eq!(provider.state(), before, "call {call}");
        assert_eq!(provider.frames(start, old.len()), frames, "call {call}");
    }
    assert!(refused > 50, "{refused} calls were refused");
    assert_eq!(provider.lost_len(), 0);
}

#[test]
fn a_page_that_the_mapper_keeps_is_lost_and_no_more() {
    let provider = provider::<false>(4000, 4, 64 << 20);
    let before = provider.state();
    let start = provider.take(run(1000 * PAGE, HUGE_PAGE)).unwrap();
    provider.fail(NEVER, 300);
    assert!(provider.give(start, run(1000 * PAGE, HUGE_PAGE)));
    let after = provider.state();
    assert_eq!(provider.lost_len(), PAGE);
    assert_eq!(after.mapped, PAGE);
    // The page, and the tables of level 1 and 2 over it, if they are not the anchor's.
    let missing = before.frames.small.len() - after.frames.small.len();
    assert!((1..=3).contains(&missing), "{missing} frames are missing");
    assert_eq!(after.frames.huge, before.frames.huge);
    assert!(after.window < before.window, "its addresses are not given again");
    // The others go on.
    let again = provider.take(run(1000 * PAGE, PAGE)).unwrap();
    assert!(again != start);
    assert!(provider.give(again, run(1000 * PAGE, PAGE)));
    assert_eq!(provider.state(), after);
}

#[test]
fn huge_pages_are_used_where_they_fit_and_go_back_whole() {
    let provider = provider::<false>(4000, 8, 1 << 30);
    let before = provider.state();
    let huge_free = || provider.state().frames.huge.len();
    let short = provider.take(run(HUGE_PAGE - PAGE, PAGE)).unwrap();
    assert_eq!(huge_free(), 8, "too short");
    let old = run(5 * HUGE_PAGE + 3 * PAGE, PAGE);
    let start = provider.take(old).unwrap();
    assert_eq!((start % HUGE_PAGE, huge_free()), (0, 3));
    // Into the middle of a huge page: it stays until the run ends in front of it.
    let new = run(2 * HUGE_PAGE + 5 * PAGE, PAGE);
    assert!(provider.change(start, old, new));
    assert_eq!(huge_free(), 5);
    assert!(provider.frames(start, 3 * HUGE_PAGE).iter().all(Option::is_some));
    let frames = provider.frames(start, new.len());
    let moved = provider.shift(start, new, old).unwrap();
    assert_eq!(provider.frames(moved, new.len()), frames, "the same frames elsewhere");
    assert_eq!((moved % HUGE_PAGE, huge_free()), (0, 3));
    assert!(provider.give(moved, old) && provider.give(short, run(HUGE_PAGE - PAGE, PAGE)));
    assert_eq!(provider.state(), before);
    // Where small pages were the table is gone, so a huge page can be there.
    let again = provider.take(run(2 * HUGE_PAGE, HUGE_PAGE)).unwrap();
    assert_eq!(huge_free(), 6);
    assert!(provider.give(again, run(2 * HUGE_PAGE, HUGE_PAGE)));
    // Without frames of 2 MiB: small ones.
    provider.kernel.tables.lock().unwrap().1.huge.clear();
    assert!(provider.take(run(2 * HUGE_PAGE, HUGE_PAGE)).is_some());
}

/// Pages of a run by their number: which have frames.
fn mapped(provider: &Provider<false>, start: usize, count: usize) -> Vec<bool> {
    provider.frames(start, count * PAGE).iter().map(Option::is_some).collect()
}

#[test]
fn pages_lose_their_frames_and_get_others_where_they_are() {
    let provider = provider::<false>(1000, 0, 1 << 30);
    let before = provider.state();
    let all = run(600 * PAGE, PAGE);
    let start = provider.take(all).unwrap();
    let full = provider.state();
    let shootdowns = provider.kernel.shootdowns.load(Relaxed);
    assert!(provider.empty(start + 10 * PAGE, 300 * PAGE));
    assert_eq!(provider.kernel.shootdowns.load(Relaxed) - shootdowns, 2, "one for each MiB");
    let held = |number: usize| !(10..310).contains(&number);
    assert_eq!(mapped(&provider, start, 600), (0..600).map(held).collect::<Vec<_>>());
    assert_eq!((provider.mapped_len(), provider.state().window), (300 * PAGE, full.window));
    // Some that have frames, and some that have none.
    assert!(provider.refill(start + 5 * PAGE, 20 * PAGE) && provider.refill(start + 300 * PAGE, 50 * PAGE));
    let held = |number: usize| !(25..300).contains(&number);
    assert_eq!(mapped(&provider, start, 600), (0..600).map(held).collect::<Vec<_>>());
    assert!(provider.kernel.longest.load(Relaxed) <= HOLD_PAGES + 8, "in short steps");
    // Not enough frames: nothing has changed.
    let missing = provider.take(run(provider.state().frames.count() * PAGE - 250 * PAGE, PAGE)).unwrap();
    assert!(!provider.refill(start + 25 * PAGE, 275 * PAGE));
    assert_eq!(mapped(&provider, start, 600), (0..600).map(held).collect::<Vec<_>>());
    assert!(!provider.empty(WINDOW + (1 << 29), PAGE) && !provider.refill(WINDOW - PAGE, PAGE), "nobody's");
    let missing_len = provider.mapped_len() - 325 * PAGE;
    assert!(provider.give(missing, run(missing_len, PAGE)));
    assert!(provider.give(start, all), "with holes");
    assert_eq!(provider.state(), before);
}

#[test]
fn huge_pages_lose_their_frames_only_as_a_whole() {
    let provider = provider::<false>(2000, 4, 1 << 30);
    let before = provider.state();
    let all = run(3 * HUGE_PAGE, HUGE_PAGE);
    let start = provider.take(all).unwrap();
    let huge_free = || provider.state().frames.huge.len();
    assert_eq!(huge_free(), 1);
    assert!(provider.empty(start + PAGE, HUGE_PAGE - 2 * PAGE), "it stays");
    assert_eq!(huge_free(), 1);
    assert!(provider.empty(start + HUGE_PAGE / 2, 2 * HUGE_PAGE));
    assert_eq!(huge_free(), 2, "the middle one");
    assert!(provider.refill(start + HUGE_PAGE / 2, HUGE_PAGE), "half of it");
    assert_eq!((huge_free(), provider.mapped_len()), (2, 2 * HUGE_PAGE + HUGE_PAGE / 2));
    assert!(provider.refill(start, 3 * HUGE_PAGE));
    assert_eq!(provider.mapped_len(), 3 * HUGE_PAGE);
    assert!(provider.empty(start, 3 * HUGE_PAGE));
    assert_eq!(provider.mapped_len(), 0);
    assert!(provider.give(start, all));
    assert_eq!(provider.state(), before);
}

#[test]
fn one_shootdown_for_a_run_and_one_more_for_each_mib() {
    let provider = provider::<false>(6000, 8, 1 << 30);
    let count = |work: &dyn Fn()| {
        let before = provider.kernel.shootdowns.load(Relaxed);
        work();
        provider.kernel.shootdowns.load(Relaxed) - before
    };
    for (len, most) in [(PAGE, 1), (1 << 20, 1), (3 << 19, 2), (16 << 20, 1)] {
        let run = run(len, PAGE);
        let start = provider.take(run).unwrap();
        assert_eq!(count(&|| assert!(provider.give(start, run))), most, "{len}");
    }
    provider.kernel.tables.lock().unwrap().1.huge.clear();
    let (old, new) = (run(8 << 20, PAGE), run(12 << 20, PAGE));
    let start = provider.take(old).unwrap();
    let moved = count(&|| _ = provider.shift(start, old, new).unwrap());
    assert_eq!(moved, 1, "a move needs no more for long runs");
    assert_eq!(count(&|| _ = provider.take(run(1 << 20, PAGE)).unwrap()), 0, "mapping needs none");
}

/// A write to `cr3` would leave global pages in the TLB, however many they are.
#[test]
fn a_shootdown_tells_whether_entries_are_global() {
    fn is_told<const GUARDS: bool>() {
        let provider = provider::<GUARDS>(6000, 0, 1 << 30);
        let run = run(100 * PAGE, PAGE);
        let start = provider.take(run).unwrap();
        assert!(provider.give(start, run) && provider.kernel.shootdowns.load(Relaxed) > 0);
    }
    is_told::<false>();
    is_told::<true>();
    let stale = |pages, global| Stale { start: WINDOW, len: pages * PAGE, global };
    assert!(stale(100, false).is_for_all() && !stale(100, true).is_for_all());
    assert!(!stale(64, false).is_for_all() && !stale(64, true).is_for_all());
}

#[test]
fn the_level_4_entry_stays_whatever_goes() {
    let provider = provider::<false>(1000, 0, 1 << 30);
    let entry = || {
        let tables = provider.kernel.tables.lock().unwrap();
        tables.0.tables.level_4_table()[VirtAddr::new(WINDOW as u64).p4_index()].addr()
    };
    let before = entry();
    assert!(!before.is_null());
    let start = provider.take(run(600 * PAGE, PAGE)).unwrap();
    assert!(provider.give(start, run(600 * PAGE, PAGE)));
    assert_eq!(entry(), before);
}

#[test]
fn what_is_no_run_of_the_window_is_refused() {
    let provider = provider::<false>(1000, 0, 1 << 30);
    let held = provider.take(run(8 * PAGE, PAGE)).unwrap();
    let before = provider.state();
    let inside = held + PAGE;
    for (start, len) in [(inside, PAGE), (held, 100 * PAGE), (WINDOW - PAGE, PAGE), (WINDOW, PAGE)] {
        assert!(!provider.give(start, run(len, PAGE)), "{start:#x} {len}");
    }
    assert_eq!(provider.state(), before);
}

#[test]
fn a_busy_window_refuses_and_nothing_waits_for_ever() {
    let provider = provider::<false>(1000, 0, 1 << 20);
    let held = provider.take(run(8 * PAGE, PAGE)).unwrap();
    let window = provider.window.try_lock().unwrap();
    assert_eq!(provider.take(run(PAGE, PAGE)), None);
    assert_eq!(provider.free_window_len(), None);
    assert!(!provider.give(held, run(8 * PAGE, PAGE)));
    drop(window);
    assert!(provider.give(held, run(8 * PAGE, PAGE)));
}

//! Level 3: one block in many on pages of its own, between pages that are not mapped.
//!
//! ```text
//! unmapped │ red 64 B ... block │ unmapped       the block's end is the page's end, as near as its alignment allows
//! ```
//! *Which allocation is the one* is counted down in the CPU's cache, by its holder: a load, a subtraction and a store
//! where all are at hand. With the rate off, the count starts anew every [`IDLE`] allocations, so that a new rate
//! reaches every CPU without anybody touching another CPU's cache.
//!
//! *Freeing asks nobody on the fast path*: guarded pages are no chunk of the heap, so the inspection of level 1 finds a
//! foreign pointer, and only then is the table of guarded blocks looked at. That is why this level needs level 1.
//!
//! *Whether a block is guarded* is told by a tally for its page's hash: how many of those in use there are, and the sum
//! of their places. Of one, which is what there nearly always is, that says which place it is; so neither an ordinary
//! block nor a guarded one is looked for.
//!
//! *A fixed table*: a place for each block, which remembers it after it was freed until another one takes the place,
//! for the second free and for faults. When all are taken by blocks in use, nothing is sampled. Price: two calls of the
//! provider for each block, with whatever a shootdown costs.
//!
//! Sources of the idea: Electric Fence (Perens 1987), GWP-ASan, KFENCE of Linux.

#![expect(unsafe_code, reason = "red bytes beside guarded blocks")]

use core::alloc::Layout;
use core::fmt;
use core::ptr::{NonNull, null_mut};

use crate::base::sync::{AtomicPtr, AtomicU32, AtomicUsize, Ordering::Relaxed};
use crate::contract::provider::PageRun;
#[cfg(feature = "debug-heap")]
use crate::harden::debug::inner;

/// Guarded blocks in use at most.
const PLACES: usize = 64;
/// Tallies of blocks in use by page. Many more than there are blocks, since who meets one of more than one block looks
/// at all places.
const TALLIES: usize = 1024;
/// A tally counts blocks below this bit, and from it on has the sum of their places' numbers.
const NUMBER_SHIFT: u32 = 8;
const _: () = assert!(PLACES < 1 << NUMBER_SHIFT && PLACES * PLACES < 1 << (u32::BITS - NUMBER_SHIFT));
/// Allocations of a CPU between two looks at a rate that is off.
const IDLE: u32 = 4096;
/// Bytes in front of a block, at most, that must stay as they are.
const RED_LEN: usize = 64;
const RED: u8 = 0xb9;
const RED_WORD: u64 = u64::from_ne_bytes([RED; 8]);
/// Pages are at least that long.
const PAGE_SHIFT: u32 = 12;

/// Nothing, or nothing any more.
const EMPTY: u32 = 0;
/// Somebody is writing the place.
const CLAIMED: u32 = 1;
const LIVE: u32 = 2;
/// The block was freed.
const GONE: u32 = 3;

/// How many allocations a CPU has left until the next one that is guarded.
#[derive(Debug)]
pub(crate) struct Countdown(AtomicU32);

impl Countdown {
    pub(crate) const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Counts one allocation; true if its turn has come. By the cache's holder. Fast.
    #[inline]
    pub(crate) fn is_due(&self) -> bool {
        match self.0.load(Relaxed).checked_sub(1) {
            Some(left) => {
                self.0.store(left, Relaxed);
                false
            }
            None => true,
        }
    }

    /// Starts anew, by the cache's holder.
    pub(crate) fn restart(&self, left: u32) {
        self.0.store(left, Relaxed);
    }
}

/// One guarded block.
#[derive(Debug)]
pub(crate) struct Place {
    state: AtomicU32,
    /// Its position among the places.
    number: AtomicU32,
    block: AtomicUsize,
    size: AtomicUsize,
    align: AtomicUsize,
    run: AtomicPtr<u8>,
    run_len: AtomicUsize,
    /// Which free it was, of all.
    freed: AtomicUsize,
}

/// A heap's guarded blocks.
#[derive(Debug)]
pub(crate) struct Guards {
    every: AtomicU32,
    turn: AtomicUsize,
    /// Blocks in use, by a hash of their page.
    tallies: [AtomicU32; TALLIES],
    places: [Place; PLACES],
}

/// What an access did that faulted beside or inside a guarded block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// Behind a block in use.
    Behind,
    /// In front of a block in use.
    InFront,
    /// In a block that was freed.
    AfterFree,
}

/// A fault, explained by [`Heap::explain_fault`](crate::Heap::explain_fault). Prints without allocating.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// What was done.
    pub kind: FaultKind,
    /// The address that faulted.
    pub addr: usize,
    /// The block's address.
    pub block: usize,
    /// Bytes that were asked for.
    pub size: usize,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            FaultKind::Behind => "behind",
            FaultKind::InFront => "in front of",
            FaultKind::AfterFree => "after the free of",
        };
        write!(f, "access to {:#x} {what} the {} bytes at {:#x}", self.addr, self.size, self.block)
    }
}

/// The provider has no unmapped pages around its runs: see [`PageProvider::GUARDS`](crate::PageProvider::GUARDS).
/// Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoGuards;

impl fmt::Display for NoGuards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the provider has no unmapped pages around its runs")
    }
}

impl core::error::Error for NoGuards {}

impl Place {
    const fn new() -> Self {
        Self {
            state: AtomicU32::new(EMPTY),
            number: AtomicU32::new(0),
            block: AtomicUsize::new(0),
            size: AtomicUsize::new(0),
            align: AtomicUsize::new(0),
            run: AtomicPtr::new(null_mut()),
            run_len: AtomicUsize::new(0),
            freed: AtomicUsize::new(0),
        }
    }

    fn is(&self, state: u32, block: usize) -> bool {
        self.state.load(core::sync::atomic::Ordering::Acquire) == state && self.block.load(Relaxed) == block
    }

    fn claim(&self, state: u32) -> bool {
        self.state.compare_exchange(state, CLAIMED, core::sync::atomic::Ordering::Acquire, Relaxed).is_ok()
    }

    fn settle(&self, state: u32) {
        self.state.store(state, core::sync::atomic::Ordering::Release);
    }

    pub(crate) fn layout(&self) -> Layout {
        let (size, align) = (self.size.load(Relaxed), self.align.load(Relaxed));
        Layout::from_size_align(size, align).unwrap_or(Layout::new::<u8>())
    }

    /// The run that the block has, as the provider gave it.
    pub(crate) fn run(&self, page_len: usize) -> Option<(NonNull<u8>, PageRun)> {
        Some((NonNull::new(self.run.load(Relaxed))?, PageRun::new(self.run_len.load(Relaxed), page_len, page_len)?))
    }

    /// The bytes in front of the block and behind it that must stay as they are: address and length.
    fn reds(&self) -> [(*mut u8, usize); 2] {
        let (run, block) = (self.run.load(Relaxed), self.block.load(Relaxed));
        let end = block + self.size.load(Relaxed);
        let front = (block - run.addr()).min(RED_LEN);
        [(run.with_addr(block - front), front), (run.with_addr(end), run.addr() + self.run_len.load(Relaxed) - end)]
    }

    /// The first byte that is not as it was: in front of the block, behind it.
    ///
    /// # Safety
    /// The run is mapped, and the block nobody else's.
    pub(crate) unsafe fn red_damage(&self) -> [Option<*mut u8>; 2] {
        // SAFETY: the red bytes are inside the run.
        self.reds().map(|(start, len)| unsafe { first_other(start, len) })
    }

    /// What it adds to its page's tally.
    fn entry(&self) -> u32 {
        1 | self.number.load(Relaxed) << NUMBER_SHIFT
    }

    /// What an access to `addr` has to do with this block: `None`: nothing; `Some(None)`: it is in the block's own
    /// pages.
    fn explain(&self, addr: usize, page_len: usize) -> Option<Option<FaultKind>> {
        let state = self.state.load(core::sync::atomic::Ordering::Acquire);
        let (start, len) = (self.run.load(Relaxed).addr(), self.run_len.load(Relaxed));
        // A place that somebody is writing says anything; distances do not overflow.
        let is_in = |from: usize, len: usize| addr.wrapping_sub(from) < len;
        match state {
            LIVE if is_in(start, len) => Some(None),
            LIVE if is_in(start.wrapping_add(len), page_len) => Some(Some(FaultKind::Behind)),
            LIVE if is_in(start.wrapping_sub(page_len), page_len) => Some(Some(FaultKind::InFront)),
            GONE if is_in(start, len) => Some(Some(FaultKind::AfterFree)),
            _ => None,
        }
    }
}

/// The first of `len` bytes from `start` on that is not red.
///
/// # Safety
/// They are mapped, and within one allocation.
unsafe fn first_other(start: *mut u8, len: usize) -> Option<*mut u8> {
    let front = (start.addr().wrapping_neg() % 8).min(len);
    // SAFETY: below `len`, so inside the bytes; volatile, since who writes there now breaks the contract.
    let is_red = |offset: &usize| unsafe { start.wrapping_add(*offset).read_volatile() } == RED;
    // SAFETY: one of the words that fit behind `front`, where they are aligned; volatile as above.
    let is_red_word =
        |word: &usize| unsafe { start.wrapping_add(front + 8 * word).cast::<u64>().read_volatile() } == RED_WORD;
    let mut good = (0..front).take_while(is_red).count();
    if good == front {
        good += 8 * (0..(len - front) / 8).take_while(is_red_word).count();
    }
    (good..len).find(|offset| !is_red(offset)).map(|offset| start.wrapping_add(offset))
}

/// Which tally an address's page has.
fn page_hash(addr: usize) -> usize {
    let page = (addr >> PAGE_SHIFT) as u64;
    (page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - TALLIES.ilog2())) as usize
}

impl Guards {
    pub(crate) const fn new() -> Self {
        Self {
            every: AtomicU32::new(0),
            turn: AtomicUsize::new(0),
            tallies: [const { AtomicU32::new(0) }; TALLIES],
            places: [const { Place::new() }; PLACES],
        }
    }

    pub(crate) fn set_rate(&self, every: u32) {
        self.every.store(every, Relaxed);
    }

    /// Restarts a countdown that has ended; true if the allocation is to be guarded.
    pub(crate) fn restart(&self, countdown: &Countdown) -> bool {
        let every = self.every.load(Relaxed);
        if every == 0 {
            countdown.restart(IDLE);
            return false;
        }
        // Uneven, so that a program that repeats itself does not escape; `every` on average.
        let turn = self.turn.fetch_add(1, Relaxed) as u64;
        let uneven = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let span = 2 * u64::from(every) - 1;
        countdown.restart((uneven % span).min(u64::from(u32::MAX)) as u32);
        true
    }

    /// A place for a block of that Layout, the caller's until it is kept or given up.
    pub(crate) fn claim(&self) -> Option<&Place> {
        let first = self.turn.load(Relaxed);
        let numbers = (0..PLACES).map(|step| first.wrapping_add(step) % PLACES);
        let mut places = numbers.filter_map(|number| Some((number, self.places.get(number)?)));
        let (number, place) = places.find(|(_, place)| place.claim(EMPTY) || place.claim(GONE))?;
        place.number.store(u32::try_from(number).unwrap_or(0), Relaxed);
        Some(place)
    }

    /// Gives up a place that was claimed for a new block.
    pub(crate) fn give_up(&self, place: &Place) {
        place.settle(EMPTY);
    }

    /// Puts a block at the end of its run and remembers it.
    ///
    /// # Safety
    /// The run is the caller's, mapped, and long enough; the place is claimed; the alignment is at most a page's.
    pub(crate) unsafe fn keep(&self, place: &Place, start: NonNull<u8>, run: PageRun, layout: Layout) -> NonNull<u8> {
        let offset = (run.len() - layout.size()) & !(layout.align() - 1);
        // SAFETY: by the contract the run is at least as long as the block.
        let block = unsafe { start.add(offset) };
        place.block.store(block.addr().get(), Relaxed);
        place.size.store(layout.size(), Relaxed);
        place.align.store(layout.align(), Relaxed);
        place.run.store(start.as_ptr(), Relaxed);
        place.run_len.store(run.len(), Relaxed);
        for (red, len) in place.reds() {
            // SAFETY: inside the run, beside the block.
            unsafe { red.write_bytes(RED, len) };
        }
        self.tally(block.addr().get(), |tally| tally.fetch_add(place.entry(), Relaxed));
        place.settle(LIVE);
        block
    }

    /// Does something with the tally of the blocks in use on pages like that address's.
    fn tally(&self, block: usize, of: impl FnOnce(&AtomicU32) -> u32) -> u32 {
        self.tallies.get(page_hash(block)).map_or(0, of)
    }

    /// The place of the guarded block in use that starts there, and is the caller's.
    fn find(&self, block: usize) -> Option<&Place> {
        let tally = self.tally(block, |tally| tally.load(Relaxed));
        let is_it = |place: &&Place| place.is(LIVE, block);
        match tally % (1 << NUMBER_SHIFT) {
            0 => None,
            1 => self.places.get((tally >> NUMBER_SHIFT) as usize).filter(is_it),
            _ => self.places.iter().find(is_it),
        }
    }

    /// Guarded blocks in use whose Layout is one of those.
    pub(crate) fn count(&self, is_one: impl Fn(Layout) -> bool) -> usize {
        let live = |place: &&Place| place.state.load(core::sync::atomic::Ordering::Acquire) == LIVE;
        self.places.iter().filter(live).filter(|place| is_one(place.layout())).count()
    }

    /// Whether a guarded block in use starts there.
    pub(crate) fn is_live(&self, block: NonNull<u8>) -> bool {
        self.find(block.addr().get()).is_some()
    }

    /// The Layout of the guarded block in use that starts there.
    #[cfg(feature = "c-heap")]
    pub(crate) fn layout_of(&self, block: NonNull<u8>) -> Option<Layout> {
        self.find(block.addr().get()).map(Place::layout)
    }

    /// Whether a guarded block that was freed started there, and no other one took its place.
    pub(crate) fn is_gone(&self, block: NonNull<u8>) -> bool {
        self.places.iter().any(|place| place.is(GONE, block.addr().get()))
    }

    /// Takes the guarded block in use that starts there; of two that try, one succeeds.
    pub(crate) fn take(&self, block: NonNull<u8>) -> Option<&Place> {
        let addr = block.addr().get();
        let place = self.find(addr).filter(|place| place.claim(LIVE))?;
        if place.block.load(Relaxed) != addr {
            // Freed meanwhile, and the place is another block's.
            place.settle(LIVE);
            return None;
        }
        self.tally(addr, |tally| tally.fetch_sub(place.entry(), Relaxed));
        Some(place)
    }

    /// Puts a block back that was taken, as it was.
    pub(crate) fn put_back(&self, place: &Place) {
        self.tally(place.block.load(Relaxed), |tally| tally.fetch_add(place.entry(), Relaxed));
        place.settle(LIVE);
    }

    /// Remembers that a block that was taken is free.
    pub(crate) fn bury(&self, place: &Place) {
        place.freed.store(self.turn.fetch_add(1, Relaxed), Relaxed);
        place.settle(GONE);
    }

    /// What an access to `addr` has to do with a guarded block: one in use, else the one that was freed last there,
    /// since the provider gives the same addresses out again. Nothing if the page is one in use.
    pub(crate) fn explain(&self, addr: usize, page_len: usize) -> Option<Fault> {
        let seen = || self.places.iter().filter_map(|place| Some((place.explain(addr, page_len)?, place)));
        let is_gone = |kind: &Option<FaultKind>| *kind == Some(FaultKind::AfterFree);
        let (kind, place) = seen()
            .find(|(kind, _)| !is_gone(kind))
            .or_else(|| seen().max_by_key(|(_, place)| place.freed.load(Relaxed)))?;
        let (front_len, size) = inner(place.layout());
        Some(Fault { kind: kind?, addr, block: place.block.load(Relaxed).wrapping_add(front_len), size })
    }
}

/// Where in a guarded block the caller's begins, and how long that is: without frames they are the same.
#[cfg(not(feature = "debug-heap"))]
const fn inner(layout: Layout) -> (usize, usize) {
    (0, layout.size())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::boxed::Box;
    use std::vec::Vec;

    const PAGE: usize = 4096;

    /// The first page of so many, never freed.
    fn pages(count: usize) -> NonNull<u8> {
        let layout = Layout::from_size_align(count * PAGE, PAGE).unwrap();
        // SAFETY: the length is not 0.
        NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).unwrap()
    }

    fn keep(guards: &Guards, page: NonNull<u8>, layout: Layout) -> NonNull<u8> {
        let place = guards.claim().unwrap();
        // SAFETY: the page is the test's, and no other block's.
        unsafe { guards.keep(place, page, PageRun::new(PAGE, PAGE, PAGE).unwrap(), layout) }
    }

    /// As many as there may be, so that some share a tally, with pages between them that are not guarded; each is
    /// found, and taken once.
    #[test]
    fn every_block_in_use_is_found_and_nothing_else() {
        let (guards, all) = (Box::new(Guards::new()), pages(16 * TALLIES));
        // SAFETY: inside the pages.
        let page = |index: usize| unsafe { all.add(index * PAGE) };
        let hash = |index: usize| page_hash(page(index).addr().get());
        let same: Vec<_> = (0..16 * TALLIES).filter(|index| hash(*index) == hash(0)).collect();
        let [first, second, third] = [same[0], same[1], same[2]].map(page);
        let layout = Layout::new::<u64>();
        let block = |page| keep(&guards, page, layout);
        let [one, other] = [first, second].map(block);
        let neighbour = third.map_addr(|addr| addr.saturating_add(PAGE - 8));
        for (freed, left) in [(one, other), (other, one)] {
            assert!(guards.is_live(one) && guards.is_live(other) && !guards.is_live(neighbour));
            let place = guards.take(freed).unwrap();
            assert!(guards.take(freed).is_none() && !guards.is_live(freed) && guards.is_live(left));
            assert!(!guards.is_live(neighbour) && guards.take(neighbour).is_none());
            guards.put_back(place);
        }
        let others = (0..PLACES * 8).map(page).filter(|page| ![first, second].contains(page));
        let rest: Vec<_> = others.step_by(7).take(PLACES - 2).map(block).collect();
        assert!(guards.claim().is_none());
        for (index, block) in rest.iter().chain([&one, &other]).enumerate() {
            assert_eq!(guards.count(|_| true), PLACES - index);
            let place = guards.take(*block).unwrap();
            assert_eq!(place.layout(), layout);
            guards.bury(place);
            assert!(guards.is_gone(*block) && guards.take(*block).is_none());
        }
        assert!(guards.tallies.iter().all(|tally| tally.load(Relaxed) == 0));
    }

    /// Wherever it is, whatever the block's length leaves of the page.
    #[test]
    fn the_first_byte_that_is_not_red_is_told() {
        let (guards, page) = (Guards::new(), pages(1));
        for (size, align) in
            [(8, 8), (64, 1), (61, 1), (3, 1), (3, 16), (100, 64), (PAGE - 5, 1), (PAGE - 60, 4), (PAGE, 8), (2, 4096)]
        {
            let layout = Layout::from_size_align(size, align).unwrap();
            let block = keep(&guards, page, layout);
            let place = guards.take(block).unwrap();
            // SAFETY: the page is the test's.
            let damage = || unsafe { place.red_damage() };
            assert_eq!(damage(), [None, None], "{layout:?}");
            for (side, (start, len)) in place.reds().into_iter().enumerate() {
                for at in (0..len).map(|offset| start.wrapping_add(offset)) {
                    let mut expected = [None, None];
                    expected[side] = Some(at);
                    // SAFETY: in the page.
                    unsafe { at.write(RED ^ 1) };
                    assert_eq!(damage(), expected, "{layout:?}");
                    // SAFETY: as above.
                    unsafe { at.write(RED) };
                }
            }
            guards.bury(place);
        }
    }
}

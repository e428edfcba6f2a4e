//! Providers that keep books, fail on demand, and are places to be interrupted at.

use std::alloc::Layout;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::rc::Rc;

use smp_heap::{PageProvider, PageRun, RegionError, RegionProvider};

use super::Kinds;
use super::machine::Machine;

/// Regions that a provider takes.
const REGIONS: usize = 5;

/// A provider below [`Pages`].
pub(crate) trait Source: PageProvider + 'static {
    /// Whether it may be interrupted at any instruction: it does not use the host's allocator.
    const STEPS: bool;

    fn new() -> Self;

    /// More memory; false if there is no place for it. `Err`: it was refused, or taken, wrongly.
    fn add(&self, pages: u8, skew: u16) -> Result<bool, String>;

    /// The most bytes that it gives at all, if a test sets that.
    const LIMITED: bool;
}

/// A provider with books. Every run is remembered until it comes back, as it was given.
pub(crate) struct Pages<S> {
    source: S,
    machine: Rc<Machine>,
    runs: RefCell<BTreeMap<usize, PageRun>>,
    held_len: Cell<usize>,
    limit_len: Cell<usize>,
    relief_len: Cell<usize>,
    is_entered: Cell<bool>,
}

impl<S: Source> Pages<S> {
    pub(crate) fn new(machine: Rc<Machine>, limit_len: usize) -> Self {
        Self {
            source: S::new(),
            machine,
            runs: RefCell::default(),
            held_len: Cell::new(0),
            limit_len: Cell::new(if S::LIMITED { limit_len } else { usize::MAX }),
            relief_len: Cell::new(0),
            is_entered: Cell::new(false),
        }
    }

    pub(crate) fn held_len(&self) -> usize {
        self.held_len.get()
    }

    /// Whether it gives `len` bytes more, whatever shape they have.
    pub(crate) fn has(&self, len: usize) -> bool {
        S::LIMITED && !self.machine.is_failing() && len <= self.limit_len.get().saturating_sub(self.held_len())
    }

    /// More memory: at once if the source has a place for it, else when it is asked for relief.
    pub(crate) fn add(&self, pages: u8, skew: u16) -> Result<(), String> {
        if !self.source.add(pages, skew)? {
            self.relief_len.set(usize::from(pages) << 12);
        }
        Ok(())
    }

    /// One call: counted, perhaps refused, with `books` kept of its answer outside of what may be interrupted.
    fn call<T>(&self, kind: Kinds, refused: T, work: impl FnOnce() -> T, books: impl FnOnce(&T)) -> T {
        self.machine.unstepped(|| {
            let was_entered = self.is_entered.replace(true);
            if was_entered && !S::REENTRANT {
                self.machine.report("the provider was entered a second time".into());
            }
            self.machine.call();
            let answer = if self.machine.fails(kind) {
                refused
            } else if S::STEPS {
                self.machine.stepped(work)
            } else {
                work()
            };
            books(&answer);
            self.machine.call();
            self.is_entered.set(was_entered);
            answer
        })
    }

    /// Takes a run out of the books, for good or until it is put back.
    fn strike(&self, start: NonNull<u8>, run: PageRun) {
        let known = self.runs.borrow_mut().remove(&start.addr().get());
        if known != Some(run) {
            self.machine.report(format!("{run:?} at {start:?} comes back, but what was given is {known:?}"));
        }
        self.held_len.set(self.held_len.get() - run.len());
    }

    fn enter(&self, start: NonNull<u8>, run: PageRun) {
        let (addr, mut runs) = (start.addr().get(), self.runs.borrow_mut());
        let before = runs.range(..addr).next_back().is_none_or(|(other, run)| other + run.len() <= addr);
        let behind = runs.range(addr..).next().is_none_or(|(other, _)| addr + run.len() <= *other);
        if !before || !behind || addr % run.align() != 0 {
            self.machine.report(format!("the source gave {run:?} at {start:?}"));
        }
        runs.insert(addr, run);
        self.held_len.set(self.held_len.get() + run.len());
    }
}

// SAFETY: the source's.
unsafe impl<S: Source> PageProvider for Pages<S> {
    const PAGE_LEN: usize = S::PAGE_LEN;
    const ZEROED: bool = S::ZEROED;
    const REENTRANT: bool = S::REENTRANT;
    const REMAPS: bool = S::REMAPS;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let fits = self.held_len.get().checked_add(run.len()).is_some_and(|len| len <= self.limit_len.get());
        let books = |start: &Option<NonNull<u8>>| {
            if let Some(start) = start {
                self.enter(*start, run);
            }
        };
        self.call(Kinds::Map, None, || if fits { self.source.map(run) } else { None }, books)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // Struck out first: who interrupts the call may be given the same addresses.
        self.machine.unstepped(|| self.strike(start, run));
        // SAFETY: the contract is the same.
        let work = || unsafe { self.source.unmap(start, run) };
        let books = |taken: &bool| {
            if !taken {
                self.enter(start, run);
            }
        };
        self.call(Kinds::Unmap, false, work, books)
    }

    unsafe fn resize(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> bool {
        let fits = self.held_len.get() - old.len() + new.len() <= self.limit_len.get();
        // SAFETY: the contract is the same.
        let work = || fits && unsafe { self.source.resize(start, old, new) };
        let books = |done: &bool| {
            if *done {
                self.strike(start, old);
                self.enter(start, new);
            }
        };
        self.call(Kinds::Change, false, work, books)
    }

    unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
        let fits = self.held_len.get() + new.len() <= self.limit_len.get();
        let work = || {
            // SAFETY: the contract is the same.
            fits.then(|| unsafe { self.source.remap(start, old, new) }).flatten()
        };
        let books = |place: &Option<NonNull<u8>>| {
            if let Some(place) = place {
                self.strike(start, old);
                self.enter(*place, new);
            }
        };
        self.call(Kinds::Change, None, work, books)
    }

    fn prefer(&self, run: PageRun) -> PageRun {
        self.source.prefer(run)
    }

    fn is_busy(&self) -> bool {
        self.source.is_busy()
    }

    fn relieve(&self, _: PageRun) -> bool {
        self.machine.call();
        let more = self.relief_len.take();
        self.limit_len.set(self.limit_len.get().saturating_add(more));
        more > 0
    }
}

/// Regions, added as the sequence goes.
pub(crate) struct Regions {
    provider: RegionProvider<REGIONS>,
    memories: RefCell<Vec<Box<[u64]>>>,
}

// SAFETY: the region provider's.
unsafe impl PageProvider for Regions {
    const PAGE_LEN: usize = RegionProvider::<REGIONS>::PAGE_LEN;
    const REENTRANT: bool = true;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.provider.map(run)
    }

    fn try_map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.provider.try_map(run)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: the contract is the same.
        unsafe { self.provider.unmap(start, run) }
    }

    fn prefer(&self, run: PageRun) -> PageRun {
        self.provider.prefer(run)
    }

    fn is_busy(&self) -> bool {
        self.provider.is_busy()
    }
}

impl Source for Regions {
    const STEPS: bool = true;
    const LIMITED: bool = false;

    fn new() -> Self {
        Self { provider: RegionProvider::new(), memories: RefCell::default() }
    }

    /// A region of up to 1 MiB, from an odd address on; then the same again, which must be refused.
    fn add(&self, pages: u8, skew: u16) -> Result<bool, String> {
        // Few pages are more interesting than many.
        let len = (usize::from(pages).pow(2) << 4) + usize::from(skew % 4096);
        let skip = usize::from(skew / 16);
        let mut memory = vec![0xa5a5_a5a5_a5a5_a5a5_u64; (len + skip).div_ceil(8)].into_boxed_slice();
        // In the memory: it is that much longer.
        let start = memory.as_mut_ptr().cast::<u8>().wrapping_add(skip);
        let whole = ((start.addr() + len) & !1023).saturating_sub(start.addr().next_multiple_of(1024)) > 0;
        let expected = if whole { Ok(()) } else { Err(RegionError::TooSmall) };
        // SAFETY: the memory is nobody else's, and stays as long as the provider if it is taken.
        let added = unsafe { self.provider.add_region(start, len) };
        if added.is_ok() {
            self.memories.borrow_mut().push(memory);
            // SAFETY: as above; it is refused, since it is there already.
            let again = unsafe { self.provider.add_region(start, len) };
            if again != Err(RegionError::Overlaps) {
                return Err(format!("a region added twice: {again:?}"));
            }
        }
        if added == expected { Ok(true) } else { Err(format!("{len} bytes at {start:?}: {added:?}, not {expected:?}")) }
    }
}

/// The host's memory. `MOVES`: pages come zeroed, and runs can be resized and moved.
pub(crate) struct Host<const REENTRANT: bool, const MOVES: bool> {
    /// What the host's allocator gave, by address.
    layouts: RefCell<BTreeMap<usize, Layout>>,
}

/// Runs from this length on have room behind them, so that some grow in place.
const ROOMY_LEN: usize = 1 << 20;

/// Runs lie at multiples of this, so that how they fit does not depend on where the host's memory is.
const PLACE_ALIGN: usize = 2 << 20;

/// Bytes at a run's start that are made dirty, where no zeros are promised.
const DIRTY_LEN: usize = 64 << 10;

impl<const REENTRANT: bool, const MOVES: bool> Host<REENTRANT, MOVES> {
    fn give(&self, run: PageRun) -> Option<NonNull<u8>> {
        let len = if MOVES && run.len() >= ROOMY_LEN { run.len() + run.len() / 2 } else { run.len() };
        let layout = Layout::from_size_align(len, run.align().max(PLACE_ALIGN)).ok()?;
        let alloc = if MOVES { std::alloc::alloc_zeroed } else { std::alloc::alloc };
        // SAFETY: a run's length is not 0.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        if !MOVES {
            // SAFETY: just allocated, at least that long.
            unsafe { start.write_bytes(0xa5, run.len().min(DIRTY_LEN)) };
        }
        self.layouts.borrow_mut().insert(start.addr().get(), layout);
        Some(start)
    }

    fn take(&self, start: NonNull<u8>) -> bool {
        let Some(layout) = self.layouts.borrow_mut().remove(&start.addr().get()) else { return false };
        // SAFETY: the host's allocator gave it with this layout, and by `unmap`'s contract nobody uses it.
        unsafe { std::alloc::dealloc(start.as_ptr(), layout) };
        true
    }
}

// SAFETY: runs come from the host's allocator, are remembered until they are given back, and given back once. They are
// not interrupted by each other at an instruction (`STEPS`), and nothing is borrowed where they are interrupted at a
// call.
unsafe impl<const REENTRANT: bool, const MOVES: bool> PageProvider for Host<REENTRANT, MOVES> {
    const ZEROED: bool = MOVES;
    const REENTRANT: bool = REENTRANT;
    const REMAPS: bool = MOVES;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.give(run)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, _: PageRun) -> bool {
        self.take(start)
    }

    unsafe fn resize(&self, start: NonNull<u8>, _: PageRun, new: PageRun) -> bool {
        self.layouts.borrow().get(&start.addr().get()).is_some_and(|layout| new.len() <= layout.size())
    }

    unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
        let place = self.give(new)?;
        // SAFETY: both runs are at least that long, and the new one is nobody else's.
        unsafe { start.copy_to_nonoverlapping(place, old.len().min(new.len())) };
        self.take(start);
        Some(place)
    }
}

impl<const REENTRANT: bool, const MOVES: bool> Source for Host<REENTRANT, MOVES> {
    const STEPS: bool = false;
    const LIMITED: bool = true;

    fn new() -> Self {
        Self { layouts: RefCell::default() }
    }

    fn add(&self, _: u8, _: u16) -> Result<bool, String> {
        Ok(false)
    }
}

/// What the heap never gave back goes with the provider, so that a leak shows as a failed check and not also as the
/// host's.
impl<const REENTRANT: bool, const MOVES: bool> Drop for Host<REENTRANT, MOVES> {
    fn drop(&mut self) {
        for (addr, layout) in std::mem::take(self.layouts.get_mut()) {
            // SAFETY: the host's allocator gave it with this layout; the heap that had it is gone or never touches it
            // again.
            unsafe { std::alloc::dealloc(std::ptr::with_exposed_provenance_mut(addr), layout) };
        }
    }
}

//! The out-of-memory sequence: where memory is looked for when the fast and the slow path found none, with nothing
//! held.
//!
//! Who waits, and for what: a context that [may wait](crate::CpuHint::may_wait) looks again as long as it sees another
//! context with memory in hand (in a lock, on its way to or from the provider, among blocks to be joined), up to
//! [`LAST_TRIES`] looks. One that may not looks again too, while waits [in vain](crate::heap::searches) leave it
//! patience, but for no call of the provider, which may be waiting for this very CPU. A context that interrupted the
//! heap on its own CPU, by its id, looks once, everywhere, and waits for nothing.

use core::cell::Cell;
use core::ptr::NonNull;

use crate::base::size_class::SizeClass;
use crate::base::sync::{SPIN_LIMIT, spin_loop};
use crate::base::tuning::{
    BUSY_TRIES, HELD_TIMES, HOLDER_SHARE, JOIN_TRIES, LAST_TRIES, NESTED_TRIES, QUIET_LOOKS, RELIEF_TRIES, TRIED_LEN,
};
use crate::cache::CpuCache;
use crate::contract::CpuMode;
use crate::contract::provider::{PageProvider, PageRun};
use crate::heap::Heap;
use crate::heap::depot::Caller;
use crate::heap::request::{Depth, Seek};
use crate::heap::searches::Search;
use crate::pages::{Refused, Run, Step, Want, chunk_len_for};
use crate::slab::block::Block;

/// A search for a small block.
struct Small<'a, P, C, const CPUS: usize> {
    heap: &'a Heap<P, C, CPUS>,
    class: SizeClass,
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Seek for Small<'_, P, C, CPUS> {
    type Found = Block;

    fn want(&self) -> Want {
        self.heap.engine.slab_want(self.class)
    }

    fn attempt(&self, depth: Depth) -> Result<Block, Refused> {
        let engine = &self.heap.engine;
        let at_hand = match self.heap.enter() {
            Ok(entered) => {
                let popped = entered.cache.pop(self.class).ok_or(Refused::Empty);
                popped.or_else(|_| engine.refill(entered.cache, self.class, entered.caller()))
            }
            Err(caller) => engine.obtain_one(self.class, self.heap.mark(caller).caller),
        };
        match (at_hand, depth) {
            (Err(refused), Depth::Thorough { wait }) => match self.heap.alloc_in_any_page(self.class, wait) {
                Err(Refused::Empty) => Err(refused),
                other => other,
            },
            (at_hand, _) => at_hand,
        }
    }

    fn has_more(&self) -> bool {
        self.heap.engine.is_joining(self.class)
    }

    fn is_held_up(&self) -> bool {
        let engine = &self.heap.engine;
        let is_cache_held = !C::PINNED && engine.caches().any(CpuCache::is_busy);
        is_cache_held || engine.bins(self.class).any(|(_, bin)| bin.looks_busy())
    }

    fn adopt(&self, run: Run<'_>, caller: Caller) -> Option<Block> {
        self.heap.engine.adopt(run, self.class, caller)
    }

    fn last_resort(&self, hurried: bool) -> Option<Block> {
        let engine = &self.heap.engine;
        let tries = if hurried { 1 } else { JOIN_TRIES };
        // A look begins at another owner each time.
        let goes_on = |count: &u32| (*count as usize) < engine.owner_count() || engine.is_joining(self.class);
        let join = |_| self.heap.held(|caller| engine.join_one(self.class, caller));
        let joined = (0..tries).take_while(goes_on).find_map(join);
        joined.or_else(|| engine.borrow(self.class))
    }
}

/// The step's answer, if it is worth a try.
fn when<T>(worth: bool, step: impl FnOnce() -> Option<T>) -> Option<T> {
    if worth { step() } else { None }
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    #[cold]
    pub(crate) fn search_small(&self, class: SizeClass, refused: Refused, caller: Caller) -> Option<NonNull<u8>> {
        self.search(&Small { heap: self, class }, refused, caller).map(Block::into_start)
    }

    /// A block past the caches in panic mode: what lies at hand, and the provider is left alone.
    #[cold]
    pub(crate) fn alloc_small_in_panic(&self, class: SizeClass, caller: Caller) -> Option<NonNull<u8>> {
        let block = self.engine.obtain_one(class, caller).ok();
        let block = block.or_else(|| self.alloc_in_any_page(class, false).ok()).or_else(|| self.engine.borrow(class));
        block.map(Block::into_start)
    }

    /// A block of a new slab in whatever pages are free, of either kind.
    fn alloc_in_any_page(&self, class: SizeClass, wait: bool) -> Result<Block, Refused> {
        let Want { least_len, align, use_, .. } = self.engine.slab_want(class);
        let step: Step<'_> = &|work| self.step_if(wait, work);
        let run = self.engine.pages.alloc_any(least_len, align, use_, step)?;
        self.held(|caller| self.engine.adopt(run, class, caller)).ok_or(Refused::Busy)
    }

    /// Finds memory for a request that was just refused, in the order of what it costs others. Called with nothing
    /// held.
    #[cold]
    #[inline(never)]
    pub(crate) fn search<S: Seek>(&self, seek: &S, refused: Refused, caller: Caller) -> Option<S::Found> {
        let want = seek.want();
        let least = PageRun::new(want.least_len, want.align, P::PAGE_LEN)?;
        if want.least_len > self.engine.pages.held_len() && !self.source.could_give(least) {
            return self.retry_after_relief(seek, least, false, caller, self.mode.may_wait());
        }
        let need = chunk_len_for(want.least_len, want.align, P::PAGE_LEN)?;
        let search = self.searches.begin(caller.index);
        if self.interrupts(&search, caller) {
            let found = self.search_at_once(seek, caller);
            // Whom it interrupted has not moved meanwhile.
            if found.is_some() || self.interrupts(&search, caller) {
                return found;
            }
        }
        let (busy, wait) = (refused == Refused::Busy, self.mode.may_wait());
        let meets_own = (caller.nested || search.interrupts()) && !self.searches.are_ids_shared();
        // Others run meanwhile, and give up what they hold.
        let looks = match (wait, meets_own) {
            (true, _) => LAST_TRIES,
            (false, false) => self.searches.patience(LAST_TRIES),
            (false, true) => 0,
        };
        let fits = self.is_within_reach(least);
        // Chunks that the provider has again may come back as one; for a page they are long enough as they are.
        let may_join = want.least_len > P::PAGE_LEN;
        let closed = Cell::new(false);
        let open = || !closed.get();
        let quiet = Cell::new(0);
        let quick = || seek.attempt(Depth::Quick).ok();
        let grow = |tight| {
            self.grow(seek, tight, caller, wait).unwrap_or_else(|_| {
                // The gate's holder may be the context that we interrupted, or wait for us: there is what the heap has.
                closed.set(true);
                None
            })
        };
        when(fits && busy, || (0..looks.clamp(NESTED_TRIES, BUSY_TRIES)).find_map(|_| quick()))
            .or_else(|| when(fits && busy && wait, || self.wait_for_pages(seek, looks / HOLDER_SHARE)))
            .or_else(|| when(fits && (wait || !self.engine.pages.is_busy()) && self.release_reserves(wait), quick))
            .or_else(|| (0..JOIN_TRIES).take_while(|_| seek.has_more()).find_map(|_| quick()))
            .or_else(|| grow(busy))
            .or_else(|| when(fits, || self.look(seek, wait, wait, &quiet)))
            .or_else(|| when(fits && may_join && open(), || self.return_then_grow(seek, &want, caller, wait)))
            .or_else(|| when(open(), || self.retry_after_relief(seek, need, fits, caller, wait)))
            .or_else(|| {
                when(fits && open() && looks > 0, || self.retry_while_contended(seek, &search, caller, looks, &quiet))
            })
            .or_else(|| when(fits, || seek.last_resort(false)))
            .or_else(|| when(fits, || self.punch_then_look(seek, wait)))
    }

    /// Free pages inside of slabs in use become the pages', if there are any.
    fn punch_then_look<S: Seek>(&self, seek: &S, wait: bool) -> Option<S::Found> {
        let punched = self.engine.punch_slabs(true, &|work| self.step_if(wait, work)) > 0;
        when(punched, || seek.attempt(Depth::Thorough { wait }).ok())
    }

    /// Looks again as long as a lock of the pages is held, and nothing else is the matter.
    fn wait_for_pages<S: Seek>(&self, seek: &S, looks: u32) -> Option<S::Found> {
        (0..looks)
            .map_while(|_| match seek.attempt(Depth::Quick) {
                Err(Refused::Busy) if self.engine.pages.is_busy() => Some(None),
                Err(_) => None,
                Ok(found) => Some(Some(found)),
            })
            .find_map(|found| found)
    }

    /// [`search`](Self::search) by a context that interrupted the heap on its own CPU: one look everywhere, and no
    /// wait.
    fn search_at_once<S: Seek>(&self, seek: &S, caller: Caller) -> Option<S::Found> {
        let grow = || self.grow(seek, true, caller, false).ok().flatten();
        let at_hand = seek.attempt(Depth::Thorough { wait: false }).ok();
        at_hand.or_else(|| when(P::REENTRANT, grow)).or_else(|| seek.last_resort(true))
    }

    /// Whether the caller certainly interrupted the heap on its own CPU. A hint is never certain: its id may be another
    /// CPU's, for which waiting pays.
    fn interrupts(&self, search: &Search<'_>, caller: Caller) -> bool {
        // Who may wait is a task, and the search that it meets on its CPU is a preempted one's.
        let meets_own = || search.interrupts() && !self.mode.may_wait() && !self.searches.are_ids_shared();
        C::PINNED && (caller.nested || meets_own())
    }

    /// Whether it may help to give back all that the heap has free.
    pub(crate) fn is_within_reach(&self, run: PageRun) -> bool {
        let is_short = run.len() <= TRIED_LEN || run.len() / HELD_TIMES <= self.engine.pages.held_len();
        is_short && self.source.could_give(run)
    }

    /// Gives empty slabs that are kept to the pages; true if there were any.
    fn release_reserves(&self, wait: bool) -> bool {
        let step: Step<'_> = &|work| self.step_if(wait, work);
        self.engine.release_reserves(step) | self.engine.pages.drain_deferred(step)
    }

    /// Looks everywhere, up to `looks` times, until looks in a row have seen everything, and nobody with memory in
    /// hand.
    fn retry_while_contended<S: Seek>(
        &self,
        seek: &S,
        search: &Search<'_>,
        caller: Caller,
        looks: u32,
        quiet: &Cell<u32>,
    ) -> Option<S::Found> {
        let wait = self.mode.may_wait();
        // Null: the wait was not in vain, and there is nothing.
        let ended = (0..looks).find_map(|_| {
            search.watch();
            // Give whoever it is a moment; who stays is not waited for lock by lock.
            let is_free = (0..SPIN_LIMIT).any(|_| {
                let busy = self.is_memory_in_hand(wait) || self.engine.pages.is_busy() || seek.is_held_up();
                if busy {
                    spin_loop();
                }
                !busy
            });
            let grown = self.grow(seek, true, caller, wait);
            let closed = grown.is_err();
            let found = grown.ok().flatten().or_else(|| self.look(seek, is_free, wait, quiet));
            (found.is_some() || closed || quiet.get() >= QUIET_LOOKS).then_some(found)
        });
        if !wait {
            self.searches.waited(ended.is_none());
        }
        ended.flatten()
    }

    /// [`reclaim`](Self::reclaim), which counts looks in a row that saw everything.
    fn look<S: Seek>(&self, seek: &S, waits: bool, may_wait: bool, quiet: &Cell<u32>) -> Option<S::Found> {
        if !may_wait && self.engine.pages.is_busy() {
            // What would be given back now would wait for the holder too, and others live on it.
            quiet.set(0);
            return seek.attempt(Depth::Thorough { wait: false }).ok();
        }
        let before = self.is_memory_in_hand(may_wait);
        match self.reclaim(seek, waits) {
            Ok(found) => return Some(found),
            Err(Refused::Empty) if !before && !self.is_memory_in_hand(may_wait) => quiet.set(quiet.get() + 1),
            Err(_) => quiet.set(0),
        }
        None
    }

    /// Whether some context has memory in hand that others do not see: for who may not wait, one that cannot be waiting
    /// for it. A provider that may be re-entered waits for nobody.
    fn is_memory_in_hand(&self, may_wait: bool) -> bool {
        let is_moving = || self.source.in_transit.is_any() || self.source.is_busy();
        self.engine.in_hand.is_any() || ((may_wait || P::REENTRANT) && is_moving())
    }

    /// Empties what can be reached, and looks there. Empty: it saw everything.
    fn reclaim<S: Seek>(&self, seek: &S, wait: bool) -> Result<S::Found, Refused> {
        let mut drained = true;
        if C::PINNED {
            self.drain_current();
        } else {
            for (index, cache, _) in self.engine.cpus.iter() {
                let had_any = SizeClass::all().any(|class| cache.count(class) > 0);
                drained &= self.drain_index(index);
                if let Some(found) = when(had_any, || seek.attempt(Depth::Quick).ok()) {
                    return Ok(found);
                }
            }
        }
        let swept = self.engine.release_empty(&|work| self.step_if(wait, work));
        match seek.attempt(Depth::Thorough { wait }) {
            Err(Refused::Empty) if !(drained && swept) => Err(Refused::Busy),
            answer => answer,
        }
    }

    /// Chunks that are free as a whole may be had again in another length.
    fn return_then_grow<S: Seek>(&self, seek: &S, want: &Want, caller: Caller, wait: bool) -> Option<S::Found> {
        // What was freed meanwhile would be given back for nothing.
        let has_run = self.engine.pages.largest_free() >= want.least_len.saturating_add(want.align);
        when(has_run, || seek.attempt(Depth::Thorough { wait }).ok()).or_else(|| {
            let returned = self.return_chunks(0, caller) > 0;
            when(returned, || self.grow(seek, false, caller, wait).ok().flatten())
        })
    }

    /// The pressure hook, unlocked, and a search after each time that it helped. Asked once for what the heap itself
    /// could not make possible.
    fn retry_after_relief<S: Seek>(
        &self,
        seek: &S,
        need: PageRun,
        fits: bool,
        caller: Caller,
        wait: bool,
    ) -> Option<S::Found> {
        let tries = if fits { RELIEF_TRIES } else { 1 };
        self.retry_after_pressure(need, tries, caller, || {
            let found = when(fits, || seek.attempt(Depth::Thorough { wait }).ok());
            found.or_else(|| self.grow(seek, false, caller, wait).ok().flatten())
        })
    }

    /// Asks the kernel to relieve the pressure until `look` finds something, the kernel says no, or it was asked often
    /// enough. Not inside the hook itself.
    fn retry_after_pressure<T>(
        &self,
        need: PageRun,
        tries: u32,
        caller: Caller,
        mut look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let relieve = || {
            let _inside = self.searches.enter_relief(caller.index)?;
            self.source.relieve(need).then_some(())
        };
        (0..tries).map_while(|_| relieve()).find_map(|()| look())
    }

    /// [`retry_after_pressure`](Self::retry_after_pressure) for a run of its own.
    pub(crate) fn retry_huge_after_pressure<T>(
        &self,
        run: PageRun,
        caller: Caller,
        look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let tries = if self.is_within_reach(run) { RELIEF_TRIES } else { 1 };
        self.retry_after_pressure(run, tries, caller, look)
    }
}

//! The out-of-memory sequence: where memory is looked for when the fast and the slow path found none, with nothing held.

use core::ptr::NonNull;

use crate::base::size_class::SizeClass;
use crate::base::sync::{SPIN_LIMIT, spin_loop};
use crate::contract::CpuMode;
use crate::contract::provider::{PageProvider, PageRun};
use crate::heap::Heap;
use crate::heap::depot::{Caller, Surplus};
use crate::heap::request::{Depth, Seek};
use crate::pages::{Refused, Run, Step, Want, chunk_len_for};
use crate::slab::block::Block;

/// How often `search` looks again because a lock was busy, before it asks for pages it may not need. Each look waits within the spin limit,
/// so the sum is about a millisecond: more than any holder takes that runs, less than a time slice of one that does not.
const BUSY_TRIES: u32 = 16;

/// How often `search` looks again before it gives up, while it sees a lock held: a context that was preempted in the middle of a step, here or in
/// the provider, or a virtual CPU that its host does not run, hides what it holds for a time slice. Each look waits within the spin limit.
const LAST_TRIES: u32 = 4096;

/// So many looks in a row without a lock in sight end the search: during a single one somebody may have come and gone unseen.
const QUIET_LOOKS: u32 = 2;

/// Looks for neighbours to join, a slab each, when there are no pages for a short block.
const JOIN_TRIES: u32 = 64;

/// How often the kernel is asked to relieve the pressure for one allocation.
const RELIEF_TRIES: u32 = 64;

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

    fn attempt(&self, _: Depth) -> Option<Block> {
        let engine = &self.heap.engine;
        match self.heap.enter() {
            Ok(entered) => {
                let mut surplus = Surplus::default();
                let refill = || engine.refill(entered.cache, self.class, entered.caller(), &mut surplus).ok();
                let block = entered.cache.pop(self.class).or_else(refill);
                drop(entered);
                self.heap.send_home(surplus.into_lists());
                block
            }
            Err(caller) => engine.obtain_one(self.class, caller).ok(),
        }
    }

    fn has_more(&self) -> bool {
        self.heap.engine.is_joining(self.class)
    }

    fn adopt(&self, run: Run<'_>, caller: Caller) -> Option<Block> {
        self.heap.engine.adopt(&run, self.class, caller)
    }
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    #[cold]
    pub(crate) fn search_small(&self, class: SizeClass, refused: Refused, caller: Caller) -> Option<NonNull<u8>> {
        let found = self.search(&Small { heap: self, class }, refused, caller);
        let joined = || (0..JOIN_TRIES).find_map(|_| self.held(|caller| self.engine.join_one(class, caller)));
        found.or_else(joined).or_else(|| self.engine.borrow(class)).map(Block::into_start)
    }

    /// [`search_small`](Self::search_small) for a context that interrupted the heap.
    pub(crate) fn search_small_nested(&self, class: SizeClass, caller: Caller) -> Option<NonNull<u8>> {
        let grown = self.grow_nested(&Small { heap: self, class }, caller);
        grown.or_else(|| self.engine.borrow(class)).map(Block::into_start)
    }

    /// Finds memory for a request that was just refused, in the order of what it costs others: a lock that was busy, reserves, new
    /// pages, everything that is reachable, what the kernel can do. Called with nothing held.
    pub(crate) fn search<S: Seek>(&self, seek: &S, refused: Refused, caller: Caller) -> Option<S::Found> {
        let busy = refused == Refused::Busy;
        let may_wait = self.mode.may_wait();
        let tries = if busy && may_wait { BUSY_TRIES } else { 0 };
        let step: Step<'_> = &|work| self.step(work);
        let reserves = || self.engine.release_reserves(step) | self.engine.pages.drain_deferred(step);
        let at_hand = (0..tries)
            .find_map(|_| seek.attempt(Depth::Quick))
            .or_else(|| if reserves() { seek.attempt(Depth::Quick) } else { None })
            .or_else(|| (0..JOIN_TRIES).take_while(|_| seek.has_more()).find_map(|_| seek.attempt(Depth::Quick)));
        if at_hand.is_some() {
            return at_hand;
        }
        match self.grow(seek, busy, caller) {
            Ok(Some(found)) => Some(found),
            Ok(None) => self
                .reclaim_then_grow(seek, caller)
                .or_else(|| self.retry_after_relief(seek, caller))
                .or_else(|| if may_wait { self.retry_while_contended(seek, caller) } else { None }),
            // Whoever is with the provider may be waiting for us, or may be us: then there is what there is.
            Err(_) => self.reclaim(seek),
        }
    }

    /// The last look before giving up, and more of them as long as somebody is seen in the way, or memory on its way.
    fn retry_while_contended<S: Seek>(&self, seek: &S, caller: Caller) -> Option<S::Found> {
        let is_busy = || {
            self.source.in_transit.is_any()
                || self.engine.walks.is_any()
                || self.source.is_busy()
                || self.engine.pages.is_busy()
        };
        let mut quiet = 0;
        for _ in 0..LAST_TRIES {
            let busy = is_busy();
            // Give whoever it is a moment.
            let _ = (0..SPIN_LIMIT).take_while(|_| is_busy()).map(|_| spin_loop()).count();
            let grown = self.grow(seek, true, caller);
            let closed = grown.is_err();
            let found = grown.ok().flatten().or_else(|| seek.attempt(Depth::Thorough));
            quiet = if busy || is_busy() { 0 } else { quiet + 1 };
            if found.is_some() || closed || quiet == QUIET_LOOKS {
                return found;
            }
        }
        None
    }

    /// Empties what can be reached, and looks there.
    fn reclaim<S: Seek>(&self, seek: &S) -> Option<S::Found> {
        self.drain_reachable();
        self.engine.release_whole(&|work| self.step(work));
        seek.attempt(Depth::Thorough)
    }

    /// [`reclaim`](Self::reclaim); and chunks that are then free as a whole may be had again in another length.
    fn reclaim_then_grow<S: Seek>(&self, seek: &S, caller: Caller) -> Option<S::Found> {
        let found = self.reclaim(seek);
        if found.is_some() {
            return found;
        }
        let want = seek.want();
        if self.engine.pages.largest_free() >= want.least_len.saturating_add(want.align) {
            // Freed meanwhile: a chunk that would be given back for nothing.
            let found = seek.attempt(Depth::Thorough);
            if found.is_some() {
                return found;
            }
        }
        if self.return_chunks(0, caller) > 0 { self.grow(seek, false, caller).ok().flatten() } else { None }
    }

    /// The pressure hook, unlocked, and a search after each time that it helped.
    fn retry_after_relief<S: Seek>(&self, seek: &S, caller: Caller) -> Option<S::Found> {
        let want = seek.want();
        let need = chunk_len_for(want.least_len, want.align, P::PAGE_LEN)?;
        self.retry_after_pressure(need, || {
            seek.attempt(Depth::Thorough).or_else(|| self.grow(seek, false, caller).ok().flatten())
        })
    }

    /// Asks the kernel to relieve the pressure until `look` finds something, the kernel says no, or it was asked often.
    pub(crate) fn retry_after_pressure<T>(&self, need: PageRun, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        (0..RELIEF_TRIES).map_while(|_| self.source.relieve(need).then_some(())).find_map(|()| look())
    }

    /// What a nested caller may ask of the provider: pages, if that is safe while the provider was interrupted.
    pub(crate) fn grow_nested<S: Seek>(&self, seek: &S, caller: Caller) -> Option<S::Found> {
        if P::REENTRANT { self.grow(seek, true, caller).ok().flatten() } else { None }
    }
}

//! Between the page heap and the provider: when to get more and how much, and what goes back.
//!
//! Everything here is called with nothing held, and takes this CPU's cache for one step at a time.

use crate::base::sync::{SPIN_LIMIT, spin_loop};
use crate::base::trace::{Event, Kind};
use crate::base::tuning::{
    CHUNK_SHARE, FINE_CHUNK_SHARE, FINE_HEAP_LEN, GROW_TRIES, KEPT_CHUNKS, KEPT_LEN, KEPT_SHARE, MAX_CHUNK_LEN,
    MIN_CHUNK_LEN, RETURN_PIECE_LEN, RETURN_STEP,
};
use crate::contract::CpuMode;
use crate::contract::provider::{PageProvider, PageRun};
use crate::heap::Heap;
use crate::heap::depot::Caller;
use crate::heap::request::{Depth, Seek};
use crate::heap::source::{Asker, Away};
use crate::pages::{AddError, Mapping, Provided, Run, Step, Use, Want, chunk_len_for};

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// Who asks the provider.
    pub(crate) fn asker(&self, caller: Caller) -> Asker {
        Asker {
            index: caller.index,
            certain: C::PINNED && caller.index < CPUS,
            may_wait: self.mode.may_wait(),
            nested: C::PINNED && caller.nested,
        }
    }

    /// Gets a chunk from the provider that has what is wanted, longer if there is more to be had; or, if `tight`, as
    /// short as will do.
    pub(crate) fn grow<S: Seek>(
        &self,
        seek: &S,
        tight: bool,
        caller: Caller,
        wait: bool,
    ) -> Result<Option<S::Found>, Away> {
        const {
            assert!(
                P::PAGE_LEN.is_power_of_two() && P::PAGE_LEN >= 1024 && P::PAGE_LEN <= 65536,
                "see PageProvider::PAGE_LEN"
            )
        };
        let want = seek.want();
        let Some(need) = chunk_len_for(want.least_len, want.align, P::PAGE_LEN) else { return Ok(None) };
        let wish = if tight { 0 } else { wished_len(self.engine.pages.held_len(), want.use_) };
        let asker = Asker { may_wait: wait, ..self.asker(caller) };
        let wait = asker.waits_inside();
        self.offer_orphans(caller);
        if !tight && wait && self.source.in_transit.is_any() {
            // Somebody is fetching a chunk, which mostly is enough for both: else all CPUs that run out at once bring
            // one each.
            let _ = (0..SPIN_LIMIT).take_while(|_| self.source.in_transit.is_any()).map(|_| spin_loop()).count();
            let found = seek.attempt(Depth::Quick).ok();
            if found.is_some() {
                return Ok(found);
            }
        }
        if let Some(run) = self.recommit(want, wish, asker) {
            return Ok(seek.adopt(run, caller));
        }
        // Counted in before there is anything to carry: a virtual CPU may be stopped right behind the provider's
        // answer. Who takes no more than it needs has nothing for others; counted in as well, those who look again
        // would keep each other waiting.
        let mut moving = (!tight).then(|| self.source.in_transit.begin());
        for _ in 0..GROW_TRIES {
            match self.source.map_wished(need, wish, asker) {
                Ok(Some(memory)) => {
                    let len = memory.len();
                    self.engine.set_ample(if tight { self.engine.is_ample() } else { len >= wish });
                    self.trace_run(Kind::Map, &memory);
                    self.engine.grows();
                    self.source.recent.note_mapped(len, self.used_len().saturating_add(len));
                    moving.get_or_insert_with(|| self.source.in_transit.begin());
                    let run = self.add_chunk(memory, want, caller, wait);
                    return Ok(run.and_then(|run| match run {
                        Some(run) => seek.adopt(run, Caller { nested: !wait, ..caller }),
                        None => seek.attempt(Depth::Quick).ok(),
                    }));
                }
                Ok(None) if self.return_kept_huge(0, caller) > 0 => {}
                Ok(None) => {
                    // That there is no room for a very long run does not say that memory is short.
                    if need.len() <= MAX_CHUNK_LEN {
                        self.engine.set_ample(false);
                    }
                    return Ok(None);
                }
                Err(Away::Closed) => return Err(Away::Closed),
                Err(Away::Waited) => {}
            }
            // Somebody else was with the provider and may have got enough for both.
            let found = seek.attempt(Depth::Quick).ok();
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Memory for pages that the heap has the addresses of, from who may wait for the provider.
    fn recommit(&self, want: Want, wish: usize, asker: Asker) -> Option<Run<'_>> {
        if !P::DECOMMITS || !asker.waits_inside() {
            return None;
        }
        let _moving = self.source.in_transit.begin();
        let recalled = self.held(|_| self.engine.pages.recall(want, wish))?;
        if !self.source.commit(&recalled, asker) {
            self.held(|_| self.engine.pages.stayed_away(recalled));
            return None;
        }
        self.source.recent.note_mapped(recalled.pages().1, self.used_len());
        self.engine.grows();
        Some(self.held(|_| self.engine.pages.came_back(recalled)))
    }

    /// Makes memory from the provider a chunk, and cuts off what is wanted. `None`: it cannot be noted, and went back.
    fn add_chunk(&self, mut memory: Mapping, want: Want, caller: Caller, wait: bool) -> Option<Option<Run<'_>>> {
        let provided = Provided { zeroed: P::ZEROED, decommits: P::DECOMMITS };
        let step: Step<'_> = &|work| self.step_if(wait, work);
        for _ in 0..GROW_TRIES {
            let error;
            (error, memory) = match self.engine.pages.add_chunk(memory, want, caller.index, provided, step) {
                Ok(run) => {
                    if wait {
                        self.held(|caller| self.engine.pages.set_all_aside(caller.index));
                    }
                    return Some(run);
                }
                Err(refused) => refused,
            };
            match error {
                AddError::Full if self.add_table(caller) => {}
                AddError::Busy => {}
                _ => break,
            }
        }
        self.give_back(memory, caller);
        None
    }

    /// Gets memory for a further table of chunks.
    pub(crate) fn add_table(&self, caller: Caller) -> bool {
        let Some(run) = PageRun::new(self.engine.pages.next_table_len(), P::PAGE_LEN, P::PAGE_LEN) else {
            return false;
        };
        let Ok(Some(memory)) = self.map(run, caller) else {
            return false;
        };
        let refused = self.engine.pages.add_table(memory).map_err(|(_, memory)| self.give_back(memory, caller));
        refused.is_ok()
    }

    /// A run from the provider.
    pub(crate) fn map(&self, run: PageRun, caller: Caller) -> Result<Option<Mapping>, Away> {
        let memory = self.source.map(run, self.asker(caller))?;
        Ok(memory.inspect(|memory| self.trace_run(Kind::Map, memory)))
    }

    /// A run from the provider if nobody is with it: for who can do without.
    #[cfg(feature = "guard-pages")]
    pub(crate) fn map_at_once(&self, run: PageRun, caller: Caller) -> Option<Mapping> {
        let asker = Asker { may_wait: false, ..self.asker(caller) };
        self.source.map(run, asker).ok()?.inspect(|memory| self.trace_run(Kind::Map, memory))
    }

    /// Memory back to the provider. `Err`: it is still the heap's.
    pub(crate) fn unmap(&self, memory: Mapping, caller: Caller) -> Result<(), Mapping> {
        let event = event(Kind::Unmap, &memory);
        self.source.unmap(memory, self.asker(caller))?;
        self.engine.trace.record(|| event);
        Ok(())
    }

    fn trace_run(&self, kind: Kind, memory: &Mapping) {
        self.engine.trace.record(|| event(kind, memory));
    }

    /// Offers the provider again what it did not take.
    pub(crate) fn offer_orphans(&self, caller: Caller) {
        self.source.orphans.take_all(|memory| self.give_back(memory, caller));
    }

    /// Gives memory that the heap does not use to the provider, now or later.
    pub(crate) fn give_back(&self, memory: Mapping, caller: Caller) {
        if let Err(memory) = self.unmap(memory, caller) {
            self.source.orphans.push(memory);
        }
    }

    /// Gives free chunks, and the memory of free pages, back while more than a share of the heap is free. Called after
    /// frees, with nothing held.
    #[inline]
    pub(crate) fn return_surplus(&self, caller: Caller) {
        if !caller.nested && (self.engine.pages.has_surplus() || self.could_return() && self.is_idle()) {
            self.return_some(caller);
        }
    }

    /// Whether memory lies where it could go back although its chunk is in use, or where a little keeps a chunk.
    #[inline]
    fn could_return(&self) -> bool {
        P::DECOMMITS || self.engine.pages.chunk_count() > KEPT_CHUNKS
    }

    /// Whether so many pages are free that their memory should go back.
    #[inline(never)]
    fn is_idle(&self) -> bool {
        let pages = &self.engine.pages;
        self.source.recent.is_worth(pages.free_len(), pages.held_len())
    }

    /// Whether blocks in caches, and empty slabs that wait for their class, may keep more memory than they are worth.
    fn is_kept_by_little(&self) -> bool {
        if P::DECOMMITS { self.engine.shrinks() } else { self.could_return() && self.is_idle() }
    }

    #[cold]
    #[inline(never)]
    fn return_some(&self, caller: Caller) {
        if self.mode.may_wait() {
            let recent = &self.source.recent;
            recent.note(self.used_len());
            if self.is_kept_by_little() {
                self.drain_caches();
                let _ = self.engine.release_empty(&|work| self.step(work));
            }
            let used_len = self.used_len();
            let lately_len = recent.spare_len(used_len).max(recent.regretted_len());
            let returned_len = self.return_chunks(lately_len.max(self.engine.pages.held_len() / KEPT_SHARE), caller);
            let keep = lately_len.max(used_len / KEPT_SHARE).max(KEPT_LEN);
            // Not for a little: what stays because it was missed shrinks slowly.
            let is_worth = self.engine.pages.free_len() > keep + keep / RETURN_STEP;
            let idle_len = if is_worth { self.decommit(keep, caller) } else { 0 };
            recent.note_returned(returned_len + idle_len);
            recent.note_idle(self.engine.pages.free_len());
        }
    }

    /// Gives the memory behind free pages back, if the provider takes it, as long as `keep` bytes of them stay; gives
    /// the bytes that went back.
    pub(crate) fn decommit(&self, keep: usize, caller: Caller) -> usize {
        let mut len = 0;
        if !P::DECOMMITS || !self.asker(caller).waits_inside() {
            return len;
        }
        let _moving = self.source.in_transit.begin();
        let least = if keep == 0 { P::PAGE_LEN } else { RETURN_PIECE_LEN.max(P::PAGE_LEN) };
        while let Some(idle) = self.held(|_| self.engine.pages.take_idle(least, keep, P::PAGE_LEN)) {
            if !self.source.decommit(&idle, self.asker(caller)) {
                self.held(|_| self.engine.pages.stayed(idle));
                break;
            }
            len += idle.pages().1;
            self.held(|_| self.engine.pages.went_back(idle));
        }
        len
    }

    /// Bytes held that are not free pages.
    pub(crate) fn used_len(&self) -> usize {
        self.engine.pages.held_len().saturating_sub(self.engine.pages.free_len())
    }

    /// Gives wholly free chunks back to the provider as long as `keep` bytes of free pages stay; gives the bytes that
    /// went back.
    #[inline(never)]
    pub(crate) fn return_chunks(&self, keep: usize, caller: Caller) -> usize {
        let mut len = if keep == 0 { self.return_kept_huge(0, caller) } else { 0 };
        let _moving = self.source.in_transit.begin();
        while let Some(empty) = self.held(|_| self.engine.pages.take_empty(keep)) {
            match empty.offer(|memory| self.unmap(memory, caller)) {
                Ok(gone) => {
                    len += gone.len;
                    self.engine.pages.chunk_gone(gone);
                }
                Err(empty) => {
                    self.engine.pages.put_back(empty);
                    break;
                }
            }
        }
        len
    }

    pub(crate) fn return_tables(&self, caller: Caller) -> usize {
        let mut len = 0;
        while let Some(memory) = self.engine.pages.take_empty_table() {
            let table_len = memory.len();
            if let Err(memory) = self.unmap(memory, caller) {
                if let Err((_, memory)) = self.engine.pages.add_table(memory) {
                    self.source.orphans.push(memory);
                }
                break;
            }
            len += table_len;
        }
        len
    }
}

fn event(kind: Kind, memory: &Mapping) -> Event {
    let run = memory.run();
    Event { kind, addr: memory.start().as_ptr().addr(), len: run.len(), align: run.align() }
}

/// How long the next chunk should be: a share of the bytes held, as a power of two.
fn wished_len(held_len: usize, use_: Use) -> usize {
    let is_fine = use_ == Use::Slab && held_len <= FINE_HEAP_LEN;
    let share = (held_len / if is_fine { FINE_CHUNK_SHARE } else { CHUNK_SHARE }).clamp(MIN_CHUNK_LEN, MAX_CHUNK_LEN);
    (share + 1).next_power_of_two() / 2
}

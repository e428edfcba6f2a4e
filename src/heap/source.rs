//! The provider, and the only file that calls it: its gate, its calls and how often each was made, and the runs that it
//! did not take back.

#![expect(unsafe_code, reason = "calls of the provider")]

use crate::base::sync::{AtomicUsize, Counter, InHand, Ordering};
use crate::base::tuning::{DECAY_SHARE, LOOK_LEN, LOOK_SHARE, LOOK_STEP, PROVIDER_TURNS, REGRET_SHARE};
use crate::contract::provider::{PageProvider, PageRun};
use crate::heap::gate::{Entry, Gate};
use crate::heap::huge_cache::HugeCache;
use crate::heap::orphans::Orphans;
use crate::pages::{Idle, Mapping, Recalled};

/// The provider and what belongs to it. All zero but for the provider itself.
pub(crate) struct Source<P> {
    gate: Gate,
    pub(crate) calls: Calls,
    /// Contexts that carry a chunk between provider and heap, or may be about to: neither has it meanwhile.
    pub(crate) in_transit: InHand,
    pub(crate) orphans: Orphans,
    pub(crate) recent: Recent,
    pub(crate) huge_cache: HugeCache,
    pub(super) provider: P,
}

/// Who asks the provider.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asker {
    /// The CPU's index.
    pub(crate) index: usize,
    /// No other CPU has that index.
    pub(crate) certain: bool,
    /// The kernel allows it to wait for others.
    pub(crate) may_wait: bool,
    /// It certainly interrupted the heap on its own CPU.
    pub(crate) nested: bool,
}

impl Asker {
    /// Whether it may wait inside the provider.
    pub(crate) fn waits_inside(self) -> bool {
        self.may_wait && !self.nested
    }
}

/// Why the provider was not asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Away {
    /// Somebody else was inside and has left: what was missing may be there now.
    Waited,
    /// Somebody was with the provider, and stayed there as long as this caller may wait.
    Closed,
}

impl<P> Source<P> {
    pub(crate) const fn new(provider: P) -> Self {
        Self {
            gate: Gate::new(),
            calls: Calls::new(),
            in_transit: InHand::new(),
            orphans: Orphans::new(),
            recent: Recent::new(),
            huge_cache: HugeCache::new(),
            provider,
        }
    }

    pub(crate) const fn provider(&self) -> &P {
        &self.provider
    }
}

impl<P: PageProvider> Source<P> {
    /// Runs `call` with the provider to itself, unless the provider needs no such thing: at the first of so many turns
    /// that this caller gets, each time that somebody else was inside and has left.
    fn ask<T>(&self, asker: Asker, turns: u32, call: impl Fn(&P) -> T) -> Result<T, Away> {
        if P::REENTRANT {
            return Ok(call(&self.provider));
        }
        for _ in 0..turns {
            match self.gate.enter(asker.index, asker.certain, asker.may_wait) {
                Entry::Inside(_inside) => return Ok(call(&self.provider)),
                Entry::Waited => {}
                Entry::Closed => return Err(Away::Closed),
            }
        }
        Err(Away::Waited)
    }

    /// Does `work` as a provider does that uses its own heap.
    pub(crate) fn inside<T>(&self, asker: Asker, work: impl Fn() -> T) -> Result<T, Away> {
        self.ask(asker, PROVIDER_TURNS, |_| work())
    }

    /// A run from the provider.
    pub(crate) fn map(&self, run: PageRun, asker: Asker) -> Result<Option<Mapping>, Away> {
        self.ask(asker, 1, |provider| self.map_inside(provider, run, asker.waits_inside()))
    }

    /// A run of `wish` bytes, then of what the provider prefers, then of ever shorter lengths down to `need`.
    pub(crate) fn map_wished(&self, need: PageRun, wish: usize, asker: Asker) -> Result<Option<Mapping>, Away> {
        self.ask(asker, 1, |provider| self.map_wished_inside(provider, need, wish, asker.waits_inside()))
    }

    fn map_wished_inside(&self, provider: &P, need: PageRun, wish: usize, wait: bool) -> Option<Mapping> {
        let mut preferred = provider.prefer(need).len();
        let longer = |len| PageRun::new(len, need.align(), P::PAGE_LEN).filter(|run| run.len() > need.len());
        let mut len = wish.max(preferred);
        while let Some(run) = longer(len) {
            let memory = self.map_inside(provider, run, wait);
            if memory.is_some() {
                return memory;
            }
            // What is preferred may be another length by now.
            preferred = provider.prefer(need).len();
            let shorter = run.len().next_power_of_two() / 2;
            len = if (shorter..run.len()).contains(&preferred) { preferred } else { shorter };
        }
        self.map_inside(provider, need, wait)
    }

    fn map_inside(&self, provider: &P, run: PageRun, wait: bool) -> Option<Mapping> {
        let start = if wait { provider.map(run) } else { provider.try_map(run) };
        Calls::count(if start.is_some() { &self.calls.maps } else { &self.calls.failed_maps });
        // SAFETY: the provider just gave it, to nobody else (contract of `PageProvider`).
        start.map(|start| unsafe { Mapping::new(start, run) })
    }

    /// Memory back to the provider. `Err`: it is still the heap's.
    pub(crate) fn unmap(&self, memory: Mapping, asker: Asker) -> Result<(), Mapping> {
        let (start, run) = (memory.start(), memory.run());
        // SAFETY: it is as the provider gave it, and nobody's but this caller's (`Mapping`), who has it no more if this
        // succeeds.
        let taken = self.ask(asker, PROVIDER_TURNS, |provider| unsafe { provider.unmap(start, run) }) == Ok(true);
        Calls::count(if taken { &self.calls.unmaps } else { &self.calls.refused_unmaps });
        if taken { Ok(()) } else { Err(memory) }
    }

    /// Another length for memory where it stands. `Err`: it has the one that it had.
    pub(crate) fn resize(&self, memory: Mapping, new: PageRun, asker: Asker) -> Result<Mapping, Mapping> {
        let (start, run) = (memory.start(), memory.run());
        // SAFETY: it is as the provider gave it, and nobody's but this caller's (`Mapping`).
        let resized =
            self.ask(asker, PROVIDER_TURNS, |provider| unsafe { provider.resize(start, run, new) }) == Ok(true);
        if !resized {
            return Err(memory);
        }
        // SAFETY: the provider gave it that length.
        Ok(unsafe { Mapping::new(start, new) })
    }

    /// Another length for memory, and another place if need be, without a copy. `Err`: it is as it was.
    pub(crate) fn remap(&self, memory: Mapping, new: PageRun, asker: Asker) -> Result<Mapping, Mapping> {
        let (start, run) = (memory.start(), memory.run());
        // SAFETY: it is as the provider gave it, and nobody's but this caller's (`Mapping`).
        let moved = self.ask(asker, PROVIDER_TURNS, |provider| unsafe { provider.remap(start, run, new) });
        let Ok(Some(place)) = moved else { return Err(memory) };
        // SAFETY: the provider gave it there, with that length, and it is nowhere else any more.
        Ok(unsafe { Mapping::new(place, new) })
    }

    /// The memory behind free pages back to the provider. False: they still have it.
    pub(crate) fn decommit(&self, idle: &Idle<'_>, asker: Asker) -> bool {
        let (start, len) = idle.pages();
        let Some(run) = PageRun::new(len, P::PAGE_LEN, P::PAGE_LEN) else { return false };
        // SAFETY: whole pages of a run of the provider's, which are free and this caller's alone (`Idle`).
        let taken = self.ask(asker, PROVIDER_TURNS, |provider| unsafe { provider.decommit(start, run) }) == Ok(true);
        self.calls.decommits.fetch_add(u64::from(taken), Ordering::Relaxed);
        taken
    }

    /// Memory for pages that have none. False: they still have none.
    pub(crate) fn commit(&self, recalled: &Recalled<'_>, asker: Asker) -> bool {
        let (start, len) = recalled.pages();
        let Some(run) = PageRun::new(len, P::PAGE_LEN, P::PAGE_LEN) else { return false };
        // SAFETY: the pages were decommitted, are in a run of the provider's and this caller's alone (`Recalled`).
        let given = self.ask(asker, PROVIDER_TURNS, |provider| unsafe { provider.commit(start, run) }) == Ok(true);
        self.calls.commits.fetch_add(u64::from(given), Ordering::Relaxed);
        given
    }

    /// Asks the kernel to relieve the pressure; true if it did.
    pub(crate) fn relieve(&self, need: PageRun) -> bool {
        Calls::count(&self.calls.reliefs);
        self.provider.relieve(need)
    }

    /// Whether the provider could ever give such a run.
    pub(crate) fn could_give(&self, run: PageRun) -> bool {
        self.provider.could_give(run)
    }

    /// Whether somebody is inside the provider, as far as that tells.
    pub(crate) fn is_busy(&self) -> bool {
        self.provider.is_busy()
    }
}

/// Calls of the provider, for statistics.
#[derive(Debug)]
pub(crate) struct Calls {
    pub(crate) maps: Counter,
    pub(crate) failed_maps: Counter,
    pub(crate) unmaps: Counter,
    pub(crate) refused_unmaps: Counter,
    pub(crate) reliefs: Counter,
    pub(crate) commits: Counter,
    pub(crate) decommits: Counter,
}

impl Calls {
    const fn new() -> Self {
        Self {
            maps: Counter::new(0),
            failed_maps: Counter::new(0),
            unmaps: Counter::new(0),
            refused_unmaps: Counter::new(0),
            reliefs: Counter::new(0),
            commits: Counter::new(0),
            decommits: Counter::new(0),
        }
    }

    fn count(counter: &Counter) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// The most bytes that were in use lately, for who calls `maintain`.
#[derive(Debug)]
pub(crate) struct Recent {
    /// Up to the last call; 0: nobody maintains the heap.
    used_len: AtomicUsize,
    /// Since then, as far as somebody noted it.
    since_len: AtomicUsize,
    /// Bytes that went back to the provider after frees, and were not asked for again yet.
    returned_len: AtomicUsize,
    /// Bytes that were asked for again after they had gone back: they stay from then on, and are forgotten slowly.
    regretted_len: AtomicUsize,
    /// Bytes in free pages that stayed when it was last looked what can go back.
    idle_len: AtomicUsize,
    /// The bin that is swept next.
    pub(crate) turn: AtomicUsize,
}

impl Recent {
    const fn new() -> Self {
        Self {
            used_len: AtomicUsize::new(0),
            since_len: AtomicUsize::new(0),
            returned_len: AtomicUsize::new(0),
            regretted_len: AtomicUsize::new(0),
            idle_len: AtomicUsize::new(0),
            turn: AtomicUsize::new(0),
        }
    }

    /// That many bytes are in use now.
    pub(crate) fn note(&self, used_len: usize) {
        self.since_len.fetch_max(used_len, Ordering::Relaxed);
    }

    /// So many bytes went back after a free.
    pub(crate) fn note_returned(&self, len: usize) {
        self.returned_len.fetch_add(len, Ordering::Relaxed);
    }

    /// So many bytes came, with so many in use: as far as as many had gone back, that was a mistake. A guess, if others
    /// change it meanwhile.
    pub(crate) fn note_mapped(&self, len: usize, used_len: usize) {
        self.note(used_len);
        let returned_len = self.returned_len.load(Ordering::Relaxed);
        let again = returned_len.min(len);
        if again > 0 {
            self.returned_len.store(returned_len - again, Ordering::Relaxed);
            self.regretted_len.fetch_add(again, Ordering::Relaxed);
        }
    }

    /// Nothing was missed.
    pub(crate) fn forget_missed(&self) {
        self.returned_len.store(0, Ordering::Relaxed);
        self.regretted_len.store(0, Ordering::Relaxed);
    }

    /// Free bytes that stay although nobody maintains the heap. Each question forgets a very small share.
    pub(crate) fn regretted_len(&self) -> usize {
        self.forget(REGRET_SHARE)
    }

    /// So many bytes of free pages stay for now.
    pub(crate) fn note_idle(&self, free_len: usize) {
        self.idle_len.store(free_len, Ordering::Relaxed);
    }

    /// Whether so many bytes of free pages, of so many held, are worth a look at what can go back: more than half, and
    /// clearly more than stayed at the last look.
    pub(crate) fn is_worth(&self, free_len: usize, held_len: usize) -> bool {
        let idle_len = self.idle_len.load(Ordering::Relaxed);
        free_len > (held_len / LOOK_SHARE).max(LOOK_LEN).max(idle_len + idle_len / LOOK_STEP)
    }

    fn forget(&self, share: usize) -> usize {
        let before = self.regretted_len.load(Ordering::Relaxed);
        let kept = before - before.div_ceil(share);
        self.regretted_len.store(kept, Ordering::Relaxed);
        kept
    }

    /// Begins anew with that many bytes in use, and forgets a share of what is in use no more and was not since the
    /// last call.
    pub(crate) fn decay(&self, used_len: usize) {
        self.forget(DECAY_SHARE);
        let since = self.since_len.swap(used_len, Ordering::Relaxed).max(used_len);
        let before = self.used_len.load(Ordering::Relaxed);
        let kept = before - before.saturating_sub(since).div_ceil(DECAY_SHARE);
        self.used_len.store(kept.max(since).max(1), Ordering::Relaxed);
    }

    /// Free bytes that were in use lately; 0 if nobody maintains the heap.
    pub(crate) fn spare_len(&self, used_len: usize) -> usize {
        match self.used_len.load(Ordering::Relaxed) {
            0 => 0,
            before => before.max(self.since_len.load(Ordering::Relaxed)).saturating_sub(used_len),
        }
    }
}

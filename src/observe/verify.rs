//! Every invariant of the heap, executed.
//!
//! The invariants stand where the state is: P1 to P9 beside the fields of `pages::pool`, S and B at the head of `slab`
//! and `partial`, C of `cache`. What belongs to one lock is checked at any time, by whoever has that lock. The sums
//! over all locks hold at rest only: between two locks a block is on its way, and no lock says so. Price of checking at
//! any time: a bin's slabs are turned in their list, and a pool is closed to others while its runs are walked.
//!
//! Here are the identities between layers, checked at rest:
//! - E1: for each class, the blocks that slabs count as out are the blocks that were ever taken less those pushed.
//! - E2: for each class, the bytes in slabs are the sum of their runs.
//! - E3: a slab is LISTED exactly if it is in a list, and one that is not has nothing to give.
//! - E4: what caches hold of all classes together is not more than what slabs count as out.

use core::fmt;

use crate::base::size_class::{CLASS_COUNT, SizeClass};
use crate::cache::CpuCache;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
use crate::heap::Heap;
use crate::pages::{Chunk, Kind, PageFault, RunInfo};
use crate::slab::list::{Bin, Sweep};
use crate::slab::word::Slab;

/// An invariant that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant's layer: `P` pages, `B` bins and the slabs in them, `C` caches, `E` between layers.
    pub layer: char,
    /// Its number there; 0 if the layer's check does not tell.
    pub rule: u8,
    /// The address, class or CPU that it was seen at.
    pub at: usize,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invariant {}{} does not hold at {:#x}", self.layer, self.rule, self.at)
    }
}

impl core::error::Error for Violation {}

/// What [`Heap::verify`] left out, since somebody else had it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "what was busy was not checked"]
#[non_exhaustive]
pub struct Skipped {
    /// Caches that others held. With a pin, all but the running CPU's own: have each CPU call [`Heap::verify`].
    pub caches: usize,
    /// Lists of partial slabs, of a size class and a CPU each.
    pub bins: usize,
    /// Pools of page runs.
    pub pools: usize,
}

impl Skipped {
    /// Whether everything was checked.
    pub const fn is_nothing(self) -> bool {
        self.caches == 0 && self.bins == 0 && self.pools == 0
    }
}

fn check(holds: bool, layer: char, rule: u8, at: usize) -> Result<(), Violation> {
    if holds { Ok(()) } else { Err(Violation { layer, rule, at }) }
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// Checks the invariants of each cache, bin and pool of pages, one after the other, whatever others do meanwhile.
    /// For a kernel that suspects damage.
    ///
    /// Takes what it looks at, and leaves out what it cannot have: see [`Skipped`]. It changes nothing but the order of
    /// slabs in their lists.
    ///
    /// # Errors
    /// The first [`Violation`] found: the heap's memory was damaged, or the heap is wrong.
    ///
    /// # Context
    /// Any. Takes as long as the heap is large. A cache is held for one class at a time, a bin for four slabs; a pool
    /// of pages for as long as it has chunks and runs, while others look elsewhere.
    pub fn verify(&self) -> Result<Skipped, Violation> {
        let mut skipped = Skipped::default();
        for class in SizeClass::all() {
            for (owner, bin) in self.engine.bins(class) {
                skipped.bins += usize::from(!self.verify_bin(bin, class, owner)?);
            }
        }
        let pools = self.engine.pages.verify_pools(&|work| self.step(work));
        skipped.pools = pools.map_err(page_violation)?;
        for (index, ..) in self.engine.cpus.iter() {
            skipped.caches += usize::from(!self.verify_cache(index)?);
        }
        Ok(skipped)
    }

    /// [`verify`](Self::verify) of everything, and of the sums over all of it, which hold at rest only. For tests.
    ///
    /// # Errors
    /// The first [`Violation`] found: the heap's memory was damaged, or the heap is wrong.
    ///
    /// # Safety
    /// From the call to the return nobody else uses the heap: no other thread or CPU, no interrupt handler; and what
    /// they did before happened before this call.
    #[expect(unsafe_code, reason = "a promise that nobody else is in the heap")]
    pub unsafe fn verify_at_rest(&self) -> Result<(), Violation> {
        for class in SizeClass::all() {
            for (owner, bin) in self.engine.bins(class) {
                check(bin.receive_all(), 'B', 4, class.index())?;
                check(bin.verify(class, owner), 'B', 0, class.index())?;
            }
        }
        self.engine.pages.verify().map_err(page_violation)?;
        for (index, cache, _) in self.engine.cpus.iter() {
            // Whoever the cache belongs to is outside of the heap, by the contract: so the cache is the caller's.
            check(cache.verify(), 'C', 0, index)?;
        }
        self.verify_sums()
    }

    /// [`verify_at_rest`](Self::verify_at_rest), for tests that know.
    #[cfg(any(test, loom))]
    pub(crate) fn verify_all(&self) -> Result<(), Violation> {
        // SAFETY: the tests of this crate call it when the contexts that they started have ended, or are stopped.
        unsafe { self.verify_at_rest() }
    }

    /// False: somebody else has the bin's lock.
    fn verify_bin(&self, bin: &Bin, class: SizeClass, owner: usize) -> Result<bool, Violation> {
        let (mut left, mut seen) = ([u32::MAX; 2], Some(Sweep::More));
        while seen == Some(Sweep::More) && !bin.looks_empty() {
            self.step(&mut |wait| seen = bin.verify_next(class, owner, &mut left, wait));
        }
        check(seen.is_some(), 'B', 0, class.index())?;
        Ok(seen != Some(Sweep::Busy))
    }

    /// False: somebody else has the cache.
    fn verify_cache(&self, index: usize) -> Result<bool, Violation> {
        for class in SizeClass::all() {
            let seen = self.with_cache(index, |cache| cache.verify_class(class) && cache.verify_limits());
            let Some(holds) = seen else { return Ok(false) };
            check(holds, 'C', 0, index)?;
        }
        Ok(true)
    }

    /// Does `work` with that cache held. `None`: somebody else has it, or with a pin it is another CPU's.
    fn with_cache<T>(&self, index: usize, work: impl FnOnce(&CpuCache) -> T) -> Option<T> {
        if C::PINNED {
            let entered = self.enter().ok().filter(|entered| entered.index == index)?;
            return Some(work(entered.cache));
        }
        let cache = self.engine.cache(index).filter(|cache| cache.try_lock(index))?;
        let result = work(cache);
        cache.unlock(index);
        Some(result)
    }

    fn verify_sums(&self) -> Result<(), Violation> {
        self.verify_slab_lens()?;
        let mut out_counts = [0; CLASS_COUNT];
        self.add_slabs(&mut out_counts, |run, slab| if run.kind == Kind::SlabRest { 0 } else { out_count(slab) })?;
        for (class, out_count) in SizeClass::all().zip(&out_counts) {
            check(*out_count == self.engine.out_count(class), 'E', 1, class.index())?;
        }
        let cached = |class| self.engine.caches().map(move |cache| u64::from(cache.count(class))).sum::<u64>();
        let cached_count: u64 = SizeClass::all().map(cached).sum();
        check(cached_count <= out_counts.iter().sum(), 'E', 4, 0)
    }

    /// By itself, so that the stack holds one class's sums at a time.
    #[inline(never)]
    fn verify_slab_lens(&self) -> Result<(), Violation> {
        let mut lens = [0; CLASS_COUNT];
        self.add_slabs(&mut lens, |run, _| run.len as u64)?;
        for (class, len) in SizeClass::all().zip(&lens) {
            check(*len == self.engine.slab_len(class).get() as u64, 'E', 2, class.index())?;
        }
        Ok(())
    }

    /// Adds what all slabs, and all their parts, come to by `of`, by class.
    fn add_slabs(
        &self,
        sums: &mut [u64; CLASS_COUNT],
        of: impl Fn(&RunInfo<'_>, Slab<'_>) -> u64,
    ) -> Result<(), Violation> {
        let mut fault = None;
        self.engine.pages.for_each_run(&mut |run| {
            let slab = Chunk::head(run.desc).and_then(Slab::of);
            let is_part = run.kind == Kind::SlabRest;
            if slab.map_or(is_part, |slab| !is_part && !is_sound(slab)) {
                fault = Some(core::ptr::from_ref(run.desc).addr());
            }
            if let Some((sum, slab)) = slab.and_then(|slab| Some((sums.get_mut(slab.class().index())?, slab))) {
                *sum += of(&run, slab);
            }
        });
        check(fault.is_none(), 'E', 3, fault.unwrap_or(0))
    }
}

/// Blocks that are not in the slab.
fn out_count(slab: Slab<'_>) -> u64 {
    let (count, carved) = slab.counts();
    carved.saturating_sub(count) as u64
}

/// S1 to S6, at rest.
#[inline(never)]
fn is_sound(slab: Slab<'_>) -> bool {
    let (count, carved) = slab.counts();
    let is_linked = slab.desc().kind() != Kind::Slab;
    let has_some = count > 0 || carved < slab.capacity();
    slab.verify() && !slab.is_claimed() && slab.is_listed() == is_linked && has_some == is_linked
}

fn page_violation(fault: PageFault) -> Violation {
    Violation { layer: 'P', rule: fault.rule, at: fault.at }
}

#[cfg(test)]
mod tests;

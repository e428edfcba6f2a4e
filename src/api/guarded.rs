//! Level 3 in the heap: an allocation whose turn has come gets pages of its own.
//!
//! The provider is called as for any run: with nothing held, by way of the gate; but if somebody is inside, the
//! allocation goes on without, so that nobody waits to be sampled. A nested context is never sampled, and its free of a
//! guarded block leaves the run to be given back later.

use core::alloc::Layout;
use core::ptr::NonNull;

use crate::base::size_class::SizeClass;
use crate::contract::CpuMode;
use crate::contract::provider::{PageProvider, PageRun};
use crate::harden::Misuse;
use crate::harden::guard::{Fault, NoGuards, Place};
use crate::heap::depot::Caller;
use crate::heap::large::{LargeBlock, is_huge};
use crate::heap::{Entered, Heap};
use crate::pages::Mapping;

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// Has about one allocation in `every` guarded from now on: on pages of its own that end where the block ends, or
    /// up to an alignment before; with `debug-heap`, where the red bytes behind it end. 0: none, as at first. Each CPU
    /// follows within a few thousand allocations of its own. At most 64 guarded blocks are in use at once; allocations
    /// that interrupted the heap on their CPU, alignments of more than a page, and what is 1 MiB or longer over a
    /// provider that moves runs, are not sampled.
    ///
    /// # Errors
    /// [`NoGuards`]: [`PageProvider::GUARDS`] is false.
    pub fn set_guard_rate(&self, every: u32) -> Result<(), NoGuards> {
        if !P::GUARDS {
            return Err(NoGuards);
        }
        self.guards.set_rate(every);
        Ok(())
    }

    /// What an access that faulted at `addr` has to do with a guarded block: for the kernel's page fault handler. Waits
    /// for nothing, allocates nothing, callable from any context.
    pub fn explain_fault(&self, addr: usize) -> Option<Fault> {
        self.guards.explain(addr, P::PAGE_LEN)
    }

    /// An allocation whose turn has come, or that finds the countdown at its end.
    #[cold]
    #[inline(never)]
    pub(crate) fn alloc_sampled(
        &self,
        entered: Entered<'_, C>,
        class: SizeClass,
        layout: Layout,
    ) -> Option<NonNull<u8>> {
        let (due, caller) = (self.guards.restart(&entered.cache.countdown), entered.caller());
        drop(entered);
        let guarded = if due { self.alloc_guarded(layout, caller) } else { None };
        guarded.or_else(|| self.alloc_unsampled(class))
    }

    /// A large block that is not huge, if its turn has come.
    #[cold]
    pub(crate) fn sample_large(&self, layout: Layout) -> Option<LargeBlock> {
        if layout.size() == 0 || is_huge::<P>(layout.size()) {
            return None;
        }
        let entered = self.enter().ok().filter(|entered| entered.cache.countdown.is_due())?;
        let (due, caller) = (self.guards.restart(&entered.cache.countdown), entered.caller());
        drop(entered);
        let start = if due { self.alloc_guarded(layout, caller) } else { None }?;
        Some(LargeBlock { block: NonNull::slice_from_raw_parts(start, layout.size()), zeroed: false })
    }

    fn alloc_guarded(&self, layout: Layout, caller: Caller) -> Option<NonNull<u8>> {
        let run = PageRun::new(layout.size(), P::PAGE_LEN, P::PAGE_LEN).filter(|_| layout.align() <= P::PAGE_LEN)?;
        let place = self.guards.claim()?;
        let Some(memory) = self.map_at_once(run, caller) else {
            self.guards.give_up(place);
            return None;
        };
        // SAFETY: the run is new and ours, at least as long as the block; the alignment was looked at above.
        Some(unsafe { self.guards.keep(place, memory.start(), run, layout) })
    }

    /// Whether a block in use is guarded.
    pub(crate) fn is_guarded(&self, block: NonNull<u8>) -> bool {
        self.guards.is_live(block)
    }

    /// Guarded blocks in use that the class would serve.
    pub(crate) fn guarded_count(&self, class: SizeClass) -> u64 {
        self.guards.count(|layout| SizeClass::of(layout) == Some(class)) as u64
    }

    /// Frees a guarded block in use; false: it is none.
    pub(crate) fn free_guarded(&self, block: NonNull<u8>, caller: Caller, fits: impl Fn(Layout) -> bool) -> bool {
        let place = self.guards.take(block);
        place.map(|place| self.free_place(place, block, caller, fits)).is_some()
    }

    /// Reports the second free of a guarded block; false: it is none that was freed.
    pub(crate) fn refuse_guarded(&self, block: NonNull<u8>) -> bool {
        let is_gone = self.guards.is_gone(block);
        if is_gone {
            self.engine.report(Misuse::DoubleFree, block);
        }
        is_gone
    }

    /// Frees the guarded block that was taken out of its place, if that Layout fits.
    pub(crate) fn free_place(&self, place: &Place, block: NonNull<u8>, caller: Caller, fits: impl Fn(Layout) -> bool) {
        if !fits(place.layout()) {
            self.guards.put_back(place);
            return self.engine.report(Misuse::LayoutMismatch, block);
        }
        // SAFETY: the block was in use until now, so its run is mapped, and it is ours.
        let damage = unsafe { place.red_damage() };
        for (at, misuse) in damage.into_iter().zip([Misuse::Underrun, Misuse::Overrun]) {
            if let Some(at) = at.and_then(NonNull::new) {
                self.engine.report(misuse, at);
            }
        }
        if let Some((start, run)) = place.run(P::PAGE_LEN) {
            // SAFETY: the run came from `map` as it is, and its block is free.
            let memory = unsafe { Mapping::new(start, run) };
            if C::PINNED && caller.nested {
                self.source.orphans.push(memory);
            } else {
                self.give_back(memory, caller);
            }
        }
        self.guards.bury(place);
    }
}

//! The heap: fast paths, and what happens when they find nothing.
//!
//! ```text
//! alloc ─┬─ small: enter ─ pop                                     fast, in view below
//!        │          ├─ refill (depot)                              own cache empty
//!        │          ├─ elsewhere: lap over caches │ one block      own cache busy
//!        │          └─ search (oom): reserves → provider → everything   nothing found; nothing held
//!        └─ large: pages ─ search
//! free  ─┬─ small: enter ─ push                                    fast, in view below
//!        │          ├─ spill (depot): a part of the list back ─ return surplus chunks
//!        │          └─ elsewhere: lap │ straight to the slab       own cache busy: always succeeds
//!        └─ large: pages (waits for no lock) ─ return surplus chunks
//! ```
//! A fast path reads the CPU's index once and takes one cache; slow steps do so anew. While it holds the cache an
//! operation waits for one lock at a time, within the spin limit; it gives the cache up before the provider and before
//! a longer search. Only `source.rs` calls the provider, with nothing held.
//!
//! **What a busy cache means.** Pinned: this CPU was interrupted inside the heap, so the caller is *nested*: it takes
//! single blocks from slabs, never waits, and calls the provider only if that says that it may be re-entered. Hint:
//! another CPU has it, or the same; that cannot be told, so the caller tries the other caches once around (a *lap*,
//! starting where the last one succeeded) and takes on no duties; it may still ask the provider, whose gate excludes
//! what must be excluded.
//!
//! **What a hit costs**, in instructions on x86-64 where a pin takes none, stands at the fast paths. With the class, 8,
//! and the return it is 27 for `alloc`, and 42 for `free`, which also asks whether there is a block.

pub(crate) mod coalesce;
pub(crate) mod depot;
pub(crate) mod gate;
pub(crate) mod growth;
mod huge_cache;
#[cfg(feature = "hardened")]
mod inspect;
pub(crate) mod large;
mod oom;
pub(crate) mod orphans;
pub(crate) mod panic_reserve;
mod punch;
mod reclaim;
mod request;
mod searches;
#[cfg(not(feature = "debug-heap"))]
mod shrink;
mod slow;
pub(crate) mod source;
#[cfg(test)]
mod tests;

use core::alloc::Layout;
use core::fmt;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::NonNull;

use crate::base::size_class::SizeClass;
use crate::base::sync::Counter;
use crate::cache::CpuCache;
use crate::cache::table::Mark;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
#[cfg(feature = "debug-heap")]
use crate::harden::debug::Debugging;
#[cfg(feature = "guard-pages")]
use crate::harden::guard::Guards;
use crate::heap::depot::{Caller, Engine};
use crate::heap::panic_reserve::Emergency;
use crate::heap::searches::Searches;
use crate::heap::source::Source;
use crate::pages::PageDesc;
use crate::slab::block::Block;

/// A heap for kernels: scales with CPUs, callable from every context. See the [crate's documentation](crate).
///
/// `P` gives pages, `C` says how a CPU is known ([`Hint`](crate::Hint) or [`Pinned`](crate::Pinned)), `CPUS` is the
/// number of caches: the most CPUs that run without sharing. What a CPU needs comes with its first use, out of the
/// heap's own pages, but for CPU 0's; so a heap is 31 KB for up to 16 CPUs and 56 KB for 1024. `new` is `const` and all
/// zero but for provider and mode: a static heap needs no set-up code, and is `.bss` if these are zero too.
pub struct Heap<P, C, const CPUS: usize> {
    pub(crate) engine: Engine<CPUS>,
    pub(crate) emergency: Emergency,
    #[cfg(feature = "debug-heap")]
    pub(crate) debugging: Debugging,
    #[cfg(feature = "guard-pages")]
    pub(crate) guards: Guards,
    /// Bytes that `realloc` copied while the caller's cache was busy: of short blocks, of long ones.
    pub(crate) copied: [Counter; 2],
    pub(crate) source: Source<P>,
    pub(crate) searches: Searches<CPUS>,
    pub(crate) mode: C,
}

impl<P: fmt::Debug, C: fmt::Debug, const CPUS: usize> fmt::Debug for Heap<P, C, CPUS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heap")
            .field("provider", self.source.provider())
            .field("mode", &self.mode)
            .field("held_len", &self.engine.pages.held_len())
            .finish_non_exhaustive()
    }
}

/// A cache that this context holds, until dropped. Two words: what is out of line takes it and the guard as arguments,
/// since an [`Entered`] would be given to it in memory.
pub(crate) struct Held<'a, C: CpuMode> {
    pub(crate) cache: &'a CpuCache,
    pub(crate) index: usize,
    mode: PhantomData<C>,
}

impl<C: CpuMode> Held<'_, C> {
    pub(crate) fn caller(&self) -> Caller {
        Caller { index: self.index, nested: false }
    }
}

impl<C: CpuMode> Drop for Held<'_, C> {
    #[inline]
    fn drop(&mut self) {
        if C::PINNED { self.cache.unmark(self.index) } else { self.cache.unlock(self.index) }
    }
}

/// A cache that this context holds, and what keeps it on its CPU.
pub(crate) struct Entered<'a, C: CpuMode> {
    // Dropped before the pin.
    pub(crate) held: Held<'a, C>,
    pub(crate) guard: C::Guard,
}

impl<'a, C: CpuMode> Entered<'a, C> {
    #[inline]
    fn new(cache: &'a CpuCache, index: usize, guard: C::Guard) -> Self {
        Self { held: Held { cache, index, mode: PhantomData }, guard }
    }
}

impl<'a, C: CpuMode> Deref for Entered<'a, C> {
    type Target = Held<'a, C>;

    #[inline]
    fn deref(&self) -> &Held<'a, C> {
        &self.held
    }
}

/// A context that works without its CPU's cache, until dropped.
pub(crate) struct Outside<'h, C: CpuMode> {
    pub(crate) caller: Caller,
    // Dropped before the pin.
    _mark: Option<Mark<'h>>,
    _guard: Option<C::Guard>,
}

impl<P, C, const CPUS: usize> Heap<P, C, CPUS> {
    /// A heap without memory: `alloc` fails until the provider gives some. Usable in a `static`.
    pub const fn new(provider: P, mode: C) -> Self {
        Self {
            engine: Engine::new(),
            emergency: Emergency::new(),
            #[cfg(feature = "debug-heap")]
            debugging: Debugging::new(),
            #[cfg(feature = "guard-pages")]
            guards: Guards::new(),
            copied: [const { Counter::new(0) }; 2],
            source: Source::new(provider),
            searches: Searches::new(),
            mode,
        }
    }

    /// [`new`](Self::new) at the place where the heap stays: for a heap that is no static, whose length should not pass
    /// over the stack.
    ///
    /// # Safety
    /// `place` is aligned, and valid for writes of a heap's length; nobody else uses that memory.
    #[expect(unsafe_code, reason = "a heap is written where there was none")]
    pub unsafe fn init_at(place: *mut Self, provider: P, mode: C) {
        // SAFETY: the contract is the same. All bytes zero is the state that `new` gives to every field but provider
        // and mode.
        unsafe { place.write_bytes(0, 1) };
        // SAFETY: a field's place, inside the caller's memory.
        let own_provider = unsafe { &raw mut (*place).source.provider };
        // SAFETY: as above.
        let own_mode = unsafe { &raw mut (*place).mode };
        // SAFETY: inside the caller's memory, and aligned as a field is.
        unsafe { own_provider.write(provider) };
        // SAFETY: as above.
        unsafe { own_mode.write(mode) };
    }

    /// The provider.
    pub const fn provider(&self) -> &P {
        self.source.provider()
    }
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// A block of the class that serves the Layout.
    #[cfg(feature = "guard-pages")]
    #[inline]
    pub(crate) fn alloc_small(&self, class: SizeClass, layout: Layout) -> Option<NonNull<u8>> {
        match self.enter() {
            Ok(entered) if entered.cache.countdown.is_due() => self.alloc_sampled(entered, class, layout),
            Ok(entered) => match entered.cache.pop(class) {
                Some(block) => Some(block.into_start()),
                None => self.alloc_refill(entered.held, entered.guard, class),
            },
            Err(caller) => self.alloc_elsewhere(class, caller),
        }
    }

    /// A block of the class that serves the Layout.
    #[cfg(not(feature = "guard-pages"))]
    #[inline]
    pub(crate) fn alloc_small(&self, class: SizeClass, _: Layout) -> Option<NonNull<u8>> {
        self.alloc_unsampled(class)
    }

    /// A hit: 11 to enter, 6 to pop, 1 when the cache is given up.
    #[inline]
    pub(crate) fn alloc_unsampled(&self, class: SizeClass) -> Option<NonNull<u8>> {
        match self.enter() {
            Ok(entered) => match entered.cache.pop(class) {
                Some(block) => Some(block.into_start()),
                None => self.alloc_refill(entered.held, entered.guard, class),
            },
            Err(caller) => self.alloc_elsewhere(class, caller),
        }
    }

    /// A hit: 11 to enter, 9 to see that a tiny block is this CPU's, 8 to push, 1 when the cache is given up.
    #[inline]
    pub(crate) fn free_small(&self, block: Block, class: SizeClass) {
        match self.enter() {
            Ok(entered) => self.free_entered(entered, block, class),
            Err(caller) => self.free_elsewhere(class, block, caller),
        }
    }

    /// [`free_small`](Self::free_small) into a cache that is held.
    #[inline(always)]
    pub(crate) fn free_entered(&self, entered: Entered<'_, C>, block: Block, class: SizeClass) {
        if !self.is_plain(&entered, &block, class) {
            return self.free_other(entered.held, entered.guard, class, block);
        }
        self.put(entered, class, block);
    }

    /// Puts a block into a cache that is held.
    #[inline(always)]
    fn put(&self, entered: Entered<'_, C>, class: SizeClass, block: Block) {
        if let Err(block) = entered.cache.push(class, block) {
            self.free_spill(entered.held, entered.guard, class, block);
        }
    }

    /// The own cache is empty.
    #[cold]
    #[inline(never)]
    fn alloc_refill(&self, held: Held<'_, C>, guard: C::Guard, class: SizeClass) -> Option<NonNull<u8>> {
        let entered = Entered { held, guard };
        let caller = entered.caller();
        let block = self.engine.refill(entered.cache, class, caller);
        let asked = entered.cache.is_drain_asked();
        drop(entered);
        if asked {
            self.drain_current();
        }
        match block {
            Ok(block) => Some(block.into_start()),
            Err(refused) => self.search_small(class, refused, caller),
        }
    }

    /// The own cache is full.
    #[cold]
    #[inline(never)]
    fn free_spill(&self, held: Held<'_, C>, guard: C::Guard, class: SizeClass, block: Block) {
        let entered = Entered { held, guard };
        #[cfg(not(feature = "hardened"))]
        if entered.cache.begins_to_check(class) && !self.is_own(&entered, &block) {
            return self.free_away(entered, class, block);
        }
        #[cfg(not(feature = "hardened"))]
        entered.cache.owned_pages.forget(block.start());
        let caller = entered.caller();
        self.engine.spill(entered.cache, class, block, caller);
        let asked = entered.cache.is_drain_asked();
        drop(entered);
        if asked {
            self.drain_current();
        }
        self.return_surplus(caller);
    }

    /// Whether a block may be put into this cache without further questions.
    #[cfg(not(feature = "hardened"))]
    #[inline]
    fn is_plain(&self, entered: &Entered<'_, C>, block: &Block, class: SizeClass) -> bool {
        entered.cache.is_plain(class, block.start())
    }

    /// Whether a block may be put into this cache without further questions.
    #[cfg(feature = "hardened")]
    #[inline]
    fn is_plain(&self, entered: &Entered<'_, C>, block: &Block, class: SizeClass) -> bool {
        self.engine.is_plain(entered.cache, entered.index, block, class)
    }

    /// The CPU that runs, for as long as the guard lives if it is pinned.
    #[inline]
    fn cpu(&self) -> (C::Guard, usize) {
        let guard = self.mode.pin();
        let index = self.index(&guard);
        (guard, index)
    }

    #[inline]
    fn index(&self, guard: &C::Guard) -> usize {
        let index = self.mode.index(guard);
        if C::PINNED || index < CPUS { index } else { index % CPUS }
    }

    /// Takes this CPU's cache. `Err`: it is busy, or the CPU has none; [`outside`](Self::outside) tells which.
    #[inline]
    pub(crate) fn enter(&self) -> Result<Entered<'_, C>, Caller> {
        let guard = self.mode.pin();
        if let Some(addr) = self.mode.cache_addr(&guard) {
            // SAFETY: the pin is this heap's, which alone writes the address, and takes it back before the cache goes.
            #[expect(unsafe_code, reason = "the cache that a pin keeps")]
            let taken = unsafe { CpuCache::try_mark_at(addr) };
            return match taken {
                Some((cache, index)) => Ok(Entered::new(cache, index, guard)),
                None => Err(self.without_cache(&guard)),
            };
        }
        let index = self.index(&guard);
        let Some(cache) = self.engine.cpus.cache_to_try(index, C::PINNED) else {
            return Err(Caller { index, nested: false });
        };
        let taken = if C::PINNED { cache.try_mark(index) } else { cache.try_lock(index) };
        if !taken {
            return Err(Caller { index, nested: true });
        }
        Ok(Entered::new(cache, index, guard))
    }

    /// [`enter`](Self::enter) of who may be the first since its CPU has a cache: its pin is told where that is, or this
    /// context would pass for nested.
    #[inline]
    fn enter_told(&self) -> Result<Entered<'_, C>, Caller> {
        let entered = self.enter();
        if entered.is_err() && self.tell_addr() { self.enter() } else { entered }
    }

    /// Who found no free cache at its CPU's address.
    #[inline]
    fn without_cache(&self, guard: &C::Guard) -> Caller {
        let index = self.index(guard);
        Caller { index, nested: index < CPUS }
    }

    /// Who could not [`enter`](Self::enter): nested, or of a CPU without a cache. Not asked on fast paths, which keep
    /// nothing over a call.
    pub(crate) fn outside(&self, caller: Caller) -> Caller {
        let Caller { index, .. } = caller;
        let nested = match self.engine.cache(index) {
            // Under a pin it may have come meanwhile, by a handler that has ended.
            Some(cache) => !C::PINNED || cache.is_busy(),
            None => self.engine.cpus.is_inside(index) || self.emergency.is_on(),
        };
        Caller { index, nested }
    }

    /// The descriptor of the granule that a live block starts in, remembered by the own cache if that is free.
    #[inline]
    pub(crate) fn desc_at(&self, start: NonNull<u8>) -> Option<&PageDesc> {
        match self.enter_told() {
            Ok(entered) => self.engine.pages.desc(&entered.cache.chunk_hints, start),
            Err(_) => self.engine.pages.lookup(start)?.head_of(start),
        }
    }

    /// Does bounded work that takes locks with this CPU's cache held, so that a context that interrupts it knows that
    /// it is nested and does not wait for them. The caller of the work is this context, nested if the cache is busy.
    pub(crate) fn held<R>(&self, work: impl FnOnce(Caller) -> R) -> R {
        let entered = self.enter_told().map_err(|caller| self.mark(caller));
        work(entered.as_ref().map_or_else(|outside| outside.caller, |entered| entered.caller()))
    }

    /// Makes what interrupts this context know that it is nested, though it could not take its CPU's cache. If there is
    /// none, the CPU is marked instead, and pinned meanwhile.
    #[inline]
    pub(crate) fn mark(&self, caller: Caller) -> Outside<'_, C> {
        if caller.index < CPUS && !self.engine.cpus.has(caller.index) {
            return self.mark_cpu();
        }
        Outside { caller, _mark: None, _guard: None }
    }

    #[cold]
    fn mark_cpu(&self) -> Outside<'_, C> {
        let (guard, index) = self.cpu();
        // A context that came to a CPU with a cache meanwhile works as a nested one there, which waits for nothing.
        let mark = if self.engine.cpus.has(index) { None } else { self.engine.cpus.mark(index) };
        let nested = mark.is_none() || self.emergency.is_on();
        Outside { caller: Caller { index, nested }, _mark: mark, _guard: Some(guard) }
    }

    /// [`held`](Self::held), for work that only asks whether it may wait.
    pub(crate) fn step(&self, work: &mut dyn FnMut(bool)) {
        self.step_if(self.mode.may_wait(), work);
    }

    /// [`step`](Self::step) of who knows already whether it may wait.
    pub(crate) fn step_if(&self, wait: bool, work: &mut dyn FnMut(bool)) {
        self.held(|caller| work(wait && !(C::PINNED && caller.nested)));
    }

    /// Who runs.
    pub(crate) fn caller(&self) -> Caller {
        self.held(|caller| caller)
    }

    /// Whether a cache is held at this moment: asked after each instruction by what measures how long it is.
    #[doc(hidden)]
    pub fn is_any_cache_held(&self) -> bool {
        self.engine.caches().any(CpuCache::is_busy)
    }
}

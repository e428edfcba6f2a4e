//! Slow paths of short blocks: the own cache is busy, or the block is not for it.
//!
//! The names say what is found: `away` gives the cache up, `elsewhere` finds it busy. What is refused here goes to the
//! out-of-memory sequence (`oom`), with nothing held.

#[cfg(feature = "hardened")]
use core::alloc::Layout;
use core::ptr::NonNull;

use crate::base::size_class::SizeClass;
use crate::base::sync::Ordering;
use crate::cache::{Counts, CpuCache};
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
#[cfg(feature = "hardened")]
use crate::harden::Misuse;
use crate::heap::depot::Caller;
use crate::heap::{Entered, Heap, Held};
use crate::slab::block::{Block, List};
#[cfg(not(feature = "hardened"))]
use crate::slab::word::owner_at;

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// Returns blocks to their slabs that are in no cache any more, a batch a hold, so that nobody waits long: with the
    /// cache of whichever CPU this is by then, or as a nested caller if that is busy.
    pub(crate) fn return_blocks(&self, lists: impl IntoIterator<Item = (SizeClass, List)>) {
        for (class, mut list) in lists {
            while list.count() > 0 {
                match self.enter() {
                    Ok(entered) => self.engine.flush(class, &mut list, Some(entered.cache), entered.caller()),
                    Err(caller) => self.engine.flush(class, &mut list, None, self.mark(caller).caller),
                }
            }
        }
    }

    /// Whether a block's slab is owned by this CPU.
    #[cfg(not(feature = "hardened"))]
    #[inline]
    pub(crate) fn is_own(&self, entered: &Entered<'_, C>, block: &Block) -> bool {
        let desc = self.engine.pages.desc(&entered.cache.chunk_hints, block.start());
        desc.is_some_and(|desc| owner_at(desc) == entered.index)
    }

    /// A tiny block of another CPU's slab, or in a page that is not known.
    #[cfg(not(feature = "hardened"))]
    #[inline(never)]
    pub(crate) fn free_other(&self, held: Held<'_, C>, guard: C::Guard, class: SizeClass, block: Block) {
        let entered = Entered { held, guard };
        if !self.is_own(&entered, &block) {
            return self.free_away(entered, class, block);
        }
        entered.cache.owned_pages.note(block.start());
        self.put(entered, class, block);
    }

    /// A block that a fast check does not tell: of another chunk than the last one, of another CPU's slab, or none that
    /// may be freed.
    #[cfg(feature = "hardened")]
    #[cold]
    #[inline(never)]
    pub(crate) fn free_other(&self, held: Held<'_, C>, guard: C::Guard, class: SizeClass, block: Block) {
        let entered = Entered { held, guard };
        let fits = |layout| SizeClass::of(layout) == Some(class);
        #[cfg(feature = "guard-pages")]
        if let Some(place) = self.guards.take(block.start()) {
            let caller = entered.caller();
            drop(entered);
            return self.free_place(place, block.into_start(), caller, fits);
        }
        match self.engine.inspect(Some(entered.cache), block.start(), class) {
            Ok(slab) => {
                let is_near = !class.is_tiny() || slab.owner() == entered.index;
                if !is_near || slab.class() != class {
                    return self.free_away(entered, class, block);
                }
                self.put(entered, class, block);
            }
            Err(misuse) => {
                let caller = entered.caller();
                drop(entered);
                self.refuse(misuse, block.into_start(), caller, fits);
            }
        }
    }

    /// What the inspection refused: nothing is freed, unless it is a block that the heap's descriptors do not know, of
    /// a Layout that fits.
    #[cfg(feature = "hardened")]
    pub(crate) fn refuse(&self, misuse: Misuse, start: NonNull<u8>, caller: Caller, fits: impl Fn(Layout) -> bool) {
        #[cfg(feature = "guard-pages")]
        if misuse == Misuse::ForeignPointer && (self.free_guarded(start, caller, fits) || self.refuse_guarded(start)) {
            return;
        }
        #[cfg(not(feature = "guard-pages"))]
        let _ = (caller, fits);
        self.engine.report(misuse, start);
    }

    /// A block that is not for the own list: to its slab at once.
    #[inline(never)]
    pub(crate) fn free_away(&self, entered: Entered<'_, C>, class: SizeClass, block: Block) {
        let caller = entered.caller();
        self.engine.give_back(class, block, Some(entered.cache), caller);
        drop(entered);
        self.return_surplus(caller);
    }

    // Own cache busy.

    #[cold]
    #[inline(never)]
    pub(crate) fn alloc_elsewhere(&self, class: SizeClass, caller: Caller) -> Option<NonNull<u8>> {
        if self.emergency.is_on() {
            let block = self.emergency.take(class.block_len(), class.block_align()).map(NonNull::cast);
            return block.or_else(|| self.alloc_small_in_panic(class, caller));
        }
        if self.add_cpu(caller) {
            return self.alloc_unsampled(class);
        }
        let caller = self.outside(caller);
        self.count_nested(caller, Counts::nested_alloc);
        let lapped =
            self.lap(caller, |cache| cache.pop(class).or_else(|| self.engine.refill(cache, class, caller).ok()));
        if let Some(block) = lapped.flatten() {
            return Some(block.into_start());
        }
        // The mark goes before the search, which works with nothing held.
        let block = self.engine.obtain_one(class, self.mark(caller).caller);
        match block {
            Ok(block) => Some(block.into_start()),
            Err(refused) => self.search_small(class, refused, caller),
        }
    }

    /// Gives the CPU a cache if it has none and the heap is long enough for it, and its pin the address of the one that
    /// it has; true if one of them is new.
    pub(crate) fn add_cpu(&self, caller: Caller) -> bool {
        if caller.index >= CPUS || self.emergency.is_on() {
            return false;
        }
        if self.engine.cpus.has(caller.index) {
            return self.tell_addr();
        }
        let outside = self.mark(caller);
        !outside.caller.nested && self.engine.add_cpu(outside.caller.index)
    }

    /// Tells the pin of the running CPU where its cache is; true if it did not know.
    pub(crate) fn tell_addr(&self) -> bool {
        let guard = self.mode.pin();
        let Some(addr) = self.mode.cache_addr(&guard) else { return false };
        self.engine.cache(self.mode.index(&guard)).is_some_and(|cache| cache.tell_addr(addr))
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn free_elsewhere(&self, class: SizeClass, block: Block, caller: Caller) {
        if self.emergency.owns(block.start()) {
            return;
        }
        #[cfg(feature = "hardened")]
        match self.engine.inspect(None, block.start(), class) {
            Ok(slab) if slab.class() == class => {}
            Ok(_) => return self.engine.give_back(class, block, None, caller),
            Err(misuse) => {
                return self.refuse(misuse, block.into_start(), caller, |layout| SizeClass::of(layout) == Some(class));
            }
        }
        if self.add_cpu(caller) {
            return self.free_small(block, class);
        }
        let caller = self.outside(caller);
        self.count_nested(caller, Counts::nested_free);
        let mut block = Some(block);
        self.lap(caller, |cache| {
            let kept = block.take().and_then(|block| cache.push(class, block).err());
            block = kept;
        });
        if let Some(block) = block {
            // Its slab may be one that nobody else can find meanwhile.
            let _in_hand = self.engine.in_hand.begin();
            self.engine.give_back(class, block, None, self.mark(caller).caller);
            self.return_surplus(caller);
        }
    }

    /// Counts an operation that found its CPU's cache busy.
    fn count_nested(&self, caller: Caller, count: fn(&Counts)) {
        if let Some(cache) = self.engine.cache(caller.index).filter(|_| caller.nested) {
            count(&cache.counts);
        }
    }

    /// Works with the first cache that it can lock, in one lap over all others, from where the last lap from here
    /// succeeded. Pinned caches are nobody else's. Source of the idea: the rotation of Zig's `SmpAllocator`, which goes
    /// on until it succeeds.
    fn lap<T>(&self, caller: Caller, work: impl FnOnce(&CpuCache) -> T) -> Option<T> {
        if C::PINNED {
            return None;
        }
        let own = self.engine.cache(caller.index)?;
        own.counts.lap();
        let (start, end) = (own.lap_start.load(Ordering::Relaxed), self.engine.cpus.end());
        for index in (start..end).chain(0..start) {
            let Some(cache) = self.engine.cache(index) else {
                continue;
            };
            if index == caller.index || !cache.try_lock(index) {
                continue;
            }
            if index != start {
                own.lap_start.store(index, Ordering::Relaxed);
            }
            let result = work(cache);
            cache.unlock(index);
            return Some(result);
        }
        None
    }
}

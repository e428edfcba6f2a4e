//! Memory that waits somewhere comes back: caches are emptied, free pages go to the provider.

#![expect(unsafe_code, reason = "a promise that nobody else is in the heap")]

use crate::base::size_class::SizeClass;
use crate::cache::table::AtRest;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
use crate::heap::Heap;

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// Empties every cache that this context may take: all by try-lock (hint), its own (pinned).
    fn drain_reachable(&self) {
        if C::PINNED {
            self.drain_current();
        } else {
            self.engine.cpus.iter().for_each(|(index, ..)| _ = self.drain_index(index));
        }
    }

    /// Empties the cache with that index, class by class. Only the lists' heads are taken while it is held. False: it
    /// was busy.
    pub(crate) fn drain_index(&self, index: usize) -> bool {
        let Some(cache) = self.engine.cache(index) else { return true };
        self.held(|_| self.engine.pages.release_kept_of(self.engine.run_cache(cache)));
        // With hints a cache of a CPU that has gone may still get blocks from others.
        if !cache.is_used() && !cache.is_gone() {
            return true;
        }
        let mut is_complete = true;
        for class in SizeClass::all().filter(|class| cache.count(*class) > 0) {
            if !cache.try_lock(index) {
                is_complete = false;
                continue;
            }
            let _in_hand = self.engine.in_hand.begin();
            let lists = cache.empty(class);
            cache.unlock(index);
            self.return_blocks(lists.map(|list| (class, list)));
        }
        is_complete && !cache.is_busy()
    }

    /// Empties the cache of the CPU that runs. For the idle loop, or for the handler of an interrupt that asks a CPU to
    /// do so; a nested caller changes nothing.
    ///
    /// Takes the cache once for each class and each batch of blocks, so that nobody waits long. Callable from any
    /// context.
    pub fn drain_current(&self) {
        for class in SizeClass::all() {
            let Ok(entered) = self.enter() else { return };
            let lists = entered.cache.empty(class);
            entered.cache.end_drain();
            let _in_hand = lists.iter().any(|list| list.count() > 0).then(|| self.engine.in_hand.begin());
            drop(entered);
            self.return_blocks(lists.map(|list| (class, list)));
        }
        self.held(|caller| {
            if let Some(cache) = self.engine.cache(caller.index) {
                self.engine.pages.release_kept_of(self.engine.run_cache(cache));
            }
        });
    }

    /// Empties all caches: at once with CPU hints; with pins, this CPU's at once and the others' at their next slow
    /// path, or when they call [`drain_current`](Self::drain_current).
    ///
    /// Callable from any context; takes as long as the caches are many.
    pub fn drain(&self) {
        #[cfg(feature = "debug-heap")]
        self.empty_quarantine();
        self.drain_caches();
    }

    /// [`drain`](Self::drain) of what the heap keeps for speed: what waits in quarantine stays there.
    pub(crate) fn drain_caches(&self) {
        if C::PINNED {
            for cache in self.engine.caches().filter(|cache| cache.is_used()) {
                cache.ask_drain();
            }
        }
        self.drain_reachable();
    }

    /// Gives what is free back to the provider, but for `keep` bytes of free pages; returns the bytes that went back.
    ///
    /// Drains like [`drain`](Self::drain) first. Chunks go back whole; of one with a single block in use, the memory of
    /// its free pages does, if the provider [takes it](PageProvider::DECOMMITS).
    /// If `keep` is 0, what was missed after it had gone back stays no more, and free pages inside of slabs in use go
    /// too: such a slab has fewer blocks from then on, until all of them were free at once. With nothing locked while
    /// the provider runs. Callable from any context that may call the provider; not meant for interrupt handlers, since
    /// it takes as long as the heap is large.
    pub fn trim(&self, keep: usize) -> usize {
        let caller = self.caller();
        self.offer_orphans(caller);
        if keep == 0 {
            self.source.recent.forget_missed();
        }
        let mut len = 0;
        // Until a round gives nothing: the provider may use the heap meanwhile.
        loop {
            self.drain();
            let _ = self.engine.release_empty(&|work| self.step(work));
            if keep == 0 {
                self.engine.punch_slabs(false, &|work| self.step(work));
            }
            match self.return_chunks(keep, caller) + self.decommit(keep, caller) {
                0 => break,
                more => len += more,
            }
        }
        len + self.return_tables(caller)
    }

    /// [`trim`](Self::trim) of everything, and of what the heap keeps for each CPU but the first: for a heap that goes.
    /// With no block in use, no page is held afterwards that the provider takes back. The heap may go on; CPUs get what
    /// they need anew. Returns the bytes that went back.
    ///
    /// What a CPU needs is found by the fast paths, which tell nobody that they look; hence the contract. While there
    /// are slabs in use it stays.
    ///
    /// # Safety
    /// No other context is in the heap, nor enters it before this returns: no other CPU, and no interrupt on this one.
    pub unsafe fn trim_at_rest(&self) -> usize {
        for (index, ..) in self.engine.cpus.iter() {
            self.drain_index(index);
        }
        let len = self.trim(0);
        // SAFETY: passed on to the caller; this context holds no cache here.
        self.engine.remove_cpus(&unsafe { AtRest::new() });
        len + self.trim(0)
    }
}

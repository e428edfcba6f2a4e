//! Work for idle times, and CPUs that go.
//!
//! *What to keep is told by what was in use since the last call*, not by a clock, which the heap has none of: the
//! kernel's calls are the time. *A CPU that goes leaves its slabs where they are*, and the others look there first: a
//! slab's owner never changes, since every pusher reads it. Price: the most that was in use is noted where chunks come
//! and go, and while a CPU is gone each refill looks at its bins.

use crate::base::size_class::SizeClass;
use crate::base::sync::Ordering;
use crate::base::tuning::RETIRE_TRIES;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
use crate::heap::Heap;

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// Gives back what was not in use lately, in small steps; for an idle loop or a timer. Returns the bytes that the
    /// provider took.
    ///
    /// Each call looks at `budget` bins of slabs (a heap has 60 for each CPU and three CPUs more), beginning where the
    /// last call ended, and frees up to 16 empty slabs there but for one a bin; then it forgets an eighth of what was
    /// in use once and is not now, and offers the provider those chunks that are neither in use nor were lately. From
    /// the first call on, frees too leave what was in use lately with the heap, so a load that comes and goes maps
    /// nothing anew; without a call, they leave a quarter of the bytes held. Caches are left alone:
    /// [`drain_current`](Self::drain_current) is for a CPU that will sleep.
    ///
    /// Takes two holds a bin and one for each of these slabs, and one call of the provider for each chunk that goes.
    /// Callable from any context that may call the provider.
    pub fn maintain(&self, budget: usize) -> usize {
        let all = self.engine.bin_count();
        let bins = budget.min(all);
        let first = self.source.recent.turn.fetch_add(bins, Ordering::Relaxed);
        for number in 0..bins {
            let number = first.wrapping_add(number).checked_rem(all).unwrap_or(0);
            self.engine.release_from(number, &|work| self.step(work));
        }
        let used_len = self.used_len();
        self.source.recent.decay(used_len);
        let caller = self.caller();
        self.offer_orphans(caller);
        let keep = self.source.recent.spare_len(used_len);
        let huge_len = self.return_kept_huge(self.source.recent.regretted_len(), caller);
        huge_len + self.return_chunks(keep, caller) + self.decommit(keep, caller)
    }

    /// Moves everything that a CPU holds to the others, after it was taken offline: its cache returns to its slab, and
    /// its partial slabs serve every other CPU before new pages do. When the CPU uses the heap again, it counts again.
    /// False: there is no such cache, or with hints another CPU was in it each time that this was tried; then nothing
    /// but its free blocks has moved.
    ///
    /// Takes as long as the cache is full, a batch of blocks a hold. Callable from any context that is not nested in
    /// the heap.
    ///
    /// # Safety
    /// No context of that CPU is inside the heap, nor enters it before this returns; and what it did there happened
    /// before this call, as for anything that is handed from one CPU to another.
    #[expect(unsafe_code, reason = "a promise that a CPU is not in the heap")]
    pub unsafe fn retire_cpu(&self, index: usize) -> bool {
        let Some(cache) = self.engine.cache(index) else { return index < CPUS };
        let is_empty = (0..RETIRE_TRIES).any(|_| {
            let _ = self.drain_index(index);
            SizeClass::all().all(|class| cache.count(class) == 0)
        });
        if is_empty {
            self.engine.retire(cache);
        }
        is_empty
    }
}

#[cfg(test)]
mod tests;

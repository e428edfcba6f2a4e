//! What each CPU has: its cache, its partial slabs, its run cache. A CPU gets them with its first use of the heap.
//!
//! ```text
//! CpuTable ── first: the cache and shard of CPU 0, in the heap's struct
//!     ├── states[index] ──► CpuState { cache, shard, run_cache }   in the heap's own pages, null before
//!     └── inside[index]     a context of a CPU without a state is in the heap
//! ```
//! Decisions, and what pays for each:
//! - *The struct has a pointer and a flag for each CPU.* A kernel names the most CPUs it could ever have, and most
//!   machines have few. Price: a load on every fast path, where an address was computed.
//! - *CPU 0 has its state in the struct.* So the first line of boot, a region of 4 KiB and a heap for one CPU need no
//!   page for it. No pointer leads there, so that a heap may be moved: null stands for the first CPU's cache. A free
//!   cache says whose it is, and the one comparison that tells whether a cache is free also turns the other CPUs away.
//!   Price: 7 KiB of every heap.
//! - *The others' states take at most a [`STATES_SHARE`] of the bytes held.* A CPU that has to wait for its state takes
//!   single blocks from the slabs. Price: in a heap of 100 KiB only CPU 0 has a cache.
//! - *States lie side by side at the end of a chunk*, so that they part no free memory for ever, and keep one chunk. A
//!   CPU that comes while something else lies there waits, for [`STATE_WAITS`] calls at most. Price: so many calls take
//!   the slow path, some milliseconds in all.
//! - *A state stays*, for its CPU or for the one that gets its index later, since the fast paths tell nobody that they
//!   read it. Only a heap [at rest](crate::Heap::trim_at_rest) takes it back. Price: two pages of 4 KiB for each CPU
//!   that ever used the heap, and the chunk that they lie in.
//!
//! **Publication.** The holder of the CPU's mark in `inside` makes the state, all zero but for the cache's owner, and
//! stores its address with `Release`. A context that is pinned to the CPU loads it relaxed, since the store was made on
//! this CPU; the others load it with `Acquire`. A context that comes before the store finds null and takes the slow
//! path. If it interrupted the maker it finds the mark, and knows that it is nested.

#![expect(unsafe_code, reason = "a CPU's state is made of a run")]

use core::ptr::{NonNull, null_mut};

use crate::base::sync::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use crate::base::tuning::{STATE_WAITS, STATES_SHARE};
use crate::cache::CpuCache;
use crate::pages::{Run, RunCache};
use crate::slab::list::Shard;

/// What a CPU other than the first has. All zero is valid, but for the cache's owner.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct CpuState {
    cache: CpuCache,
    shard: Shard,
    run_cache: RunCache,
}

/// See the file's head. All zero is the valid empty state.
#[derive(Debug)]
pub(crate) struct CpuTable<const CPUS: usize> {
    first: CpuCache,
    first_shard: Shard,
    /// By index; the first one's stays null.
    states: [AtomicPtr<CpuState>; CPUS],
    /// By index: somebody is inside for a CPU that has no cache.
    inside: [AtomicBool; CPUS],
    /// One more than the highest index of a state; 0 if there is none.
    end: AtomicUsize,
    /// States.
    count: AtomicUsize,
    /// Calls that found no place for a state since one was made.
    waits: AtomicUsize,
}

/// Nobody else is in the heap: no other CPU, and nothing that was interrupted.
#[derive(Debug)]
pub(crate) struct AtRest(());

impl AtRest {
    /// # Safety
    /// It is so as long as this value lives, and its holder refers to no CPU's state.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

/// A CPU without a cache is inside until this is dropped.
#[derive(Debug)]
#[must_use = "dropped at once it marks nothing"]
pub(crate) struct Mark<'a> {
    flag: &'a AtomicBool,
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        self.flag.store(false, Ordering::Release);
    }
}

impl<const CPUS: usize> CpuTable<CPUS> {
    pub(crate) const fn new() -> Self {
        Self {
            first: CpuCache::new(),
            first_shard: Shard::new(),
            states: [const { AtomicPtr::new(null_mut()) }; CPUS],
            inside: [const { AtomicBool::new(false) }; CPUS],
            end: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            waits: AtomicUsize::new(0),
        }
    }

    /// The cache to try for a CPU: its own, or while it has none the first one's, which is free for the first CPU only.
    /// `is_pinned`: the caller is pinned to that CPU. `None`: there is no such CPU. Fast.
    #[inline(always)]
    pub(crate) fn cache_to_try(&self, index: usize, is_pinned: bool) -> Option<&CpuCache> {
        let order = if is_pinned { Ordering::Relaxed } else { Ordering::Acquire };
        let state = self.states.get(index)?.load(order);
        // SAFETY: null, or a state that `install` was given, which stays until `take_out`.
        Some(unsafe { state.cast::<CpuCache>().as_ref() }.unwrap_or(&self.first))
    }

    /// Whether a context of a CPU without a cache is inside.
    pub(crate) fn is_inside(&self, index: usize) -> bool {
        self.inside.get(index).is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    fn state(&self, index: usize) -> Option<&CpuState> {
        let state = self.states.get(index)?.load(Ordering::Acquire);
        // SAFETY: as for `cache_to_try`.
        unsafe { state.as_ref() }
    }

    /// Whether a CPU has a cache.
    pub(crate) fn has(&self, index: usize) -> bool {
        index == 0 || self.state(index).is_some()
    }

    /// A CPU's cache, if it has one.
    pub(crate) fn cache(&self, index: usize) -> Option<&CpuCache> {
        if index == 0 { Some(&self.first) } else { self.state(index).map(|state| &state.cache) }
    }

    /// A CPU's partial slabs, if it has its own.
    pub(crate) fn shard(&self, index: usize) -> Option<&Shard> {
        if index == 0 { Some(&self.first_shard) } else { self.state(index).map(|state| &state.shard) }
    }

    /// One more than the highest index of a CPU that has a cache.
    pub(crate) fn end(&self) -> usize {
        self.end.load(Ordering::Relaxed).max(1)
    }

    /// Where states lie, the last one first.
    pub(crate) fn places(&self) -> impl Iterator<Item = NonNull<u8>> {
        (1..self.end()).rev().filter_map(|index| self.state(index).map(|state| NonNull::from(state).cast()))
    }

    /// Each CPU that has them, by its index: cache and shard.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &CpuCache, &Shard)> {
        let others =
            (1..self.end()).filter_map(|index| self.state(index).map(|state| (index, &state.cache, &state.shard)));
        [(0, &self.first, &self.first_shard)].into_iter().chain(others)
    }

    /// Marks a CPU without a cache as inside. `None`: it was, so the caller interrupted it, or may have; or there is no
    /// such CPU.
    pub(crate) fn mark(&self, index: usize) -> Option<Mark<'_>> {
        let flag = self.inside.get(index)?;
        (!flag.swap(true, Ordering::Acquire)).then(|| Mark { flag })
    }

    /// Whether a heap of that many bytes has room for another state, of that many bytes.
    pub(crate) fn has_room(&self, held_len: usize, state_len: usize) -> bool {
        self.count.load(Ordering::Relaxed).saturating_add(1).saturating_mul(state_len) <= held_len / STATES_SHARE
    }

    /// Whether CPUs have waited long enough for a place that parts nothing.
    pub(crate) fn has_waited(&self) -> bool {
        self.waits.load(Ordering::Relaxed) >= STATE_WAITS
    }

    /// There was no place for a state.
    pub(crate) fn note_wait(&self) {
        self.waits.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives a CPU its state, in a run that fits, and shows its run cache to `add` before. The run is the table's until
    /// [`take_out`](Self::take_out) gives it back. The caller holds the CPU's mark.
    #[expect(clippy::needless_pass_by_value, reason = "the run is the table's from now on")]
    pub(crate) fn install(&self, index: usize, run: Run<'_>, add: impl FnOnce(&RunCache)) {
        let Some(slot) = self.states.get(index) else { return };
        let place = run.start.cast::<CpuState>();
        if run.len < size_of::<CpuState>() || !place.is_aligned() {
            return;
        }
        // SAFETY: the run is ours alone (`Run`), aligned and long enough.
        unsafe { place.write_bytes(0, 1) };
        // SAFETY: every field is an atomic for which all bits zero are valid, or an array or struct of those.
        let state = unsafe { place.as_ref() };
        state.cache.begin(index, &state.run_cache);
        add(&state.run_cache);
        self.count.fetch_add(1, Ordering::Relaxed);
        self.waits.store(0, Ordering::Relaxed);
        self.end.fetch_max(index.wrapping_add(1), Ordering::Relaxed);
        slot.store(place.as_ptr(), Ordering::Release);
    }

    /// Takes every state out, and gives each to `free`. What referred to them was emptied before.
    pub(crate) fn take_out(&self, _: &AtRest, mut free: impl FnMut(NonNull<CpuState>)) {
        for slot in &self.states {
            let state = slot.load(Ordering::Acquire);
            slot.store(null_mut(), Ordering::Relaxed);
            NonNull::new(state).into_iter().for_each(&mut free);
        }
        self.count.store(0, Ordering::Relaxed);
        self.end.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::boxed::Box;

    /// A place that nobody else uses, full of what was there before.
    fn place() -> Run<'static> {
        let place: &mut core::mem::MaybeUninit<CpuState> = Box::leak(Box::new_uninit());
        // SAFETY: bytes of the box.
        unsafe { place.as_mut_ptr().write_bytes(0xa5, 1) };
        // SAFETY: the whole box, which is leaked.
        unsafe { Run::apart(NonNull::from(place).cast(), size_of::<CpuState>()) }
    }

    #[test]
    fn a_cpu_without_a_state_finds_the_first_cache_taken() {
        let table = Box::new(CpuTable::<3>::new());
        let first = table.cache_to_try(0, true).unwrap();
        assert!(core::ptr::eq(table.cache_to_try(2, true).unwrap(), first) && table.cache_to_try(3, true).is_none());
        assert!(!first.try_mark(2) && !first.try_lock(2), "not its own");
        assert!(first.try_mark(0));
        first.unmark(0);
        assert!(table.has(0) && !table.has(1) && !table.has(2) && table.cache(2).is_none() && table.shard(2).is_none());
        assert_eq!((table.iter().count(), table.end()), (1, 1));
    }

    #[test]
    fn a_state_is_its_cpus_alone() {
        let table = Box::new(CpuTable::<3>::new());
        let mut kept = null_mut();
        table.install(2, place(), |new| kept = core::ptr::from_ref(new).cast_mut());
        let cache = table.cache_to_try(2, false).unwrap();
        assert!(!cache.try_lock(0) && cache.try_lock(2) && cache.is_busy() && !cache.try_lock(2));
        cache.unlock(2);
        assert!(core::ptr::eq(cache, table.cache(2).unwrap()) && core::ptr::eq(kept, cache.run_cache().unwrap()));
        assert!(cache.verify(), "all zero but for its owner");
        let all: std::vec::Vec<_> = table.iter().map(|(index, ..)| index).collect();
        assert_eq!((all, table.end()), ([0, 2].into(), 3));
        let mut count = 0;
        // SAFETY: the test is alone.
        table.take_out(&unsafe { AtRest::new() }, |_| count += 1);
        assert_eq!((count, table.iter().count(), table.has(2)), (1, 1, false));
    }

    #[test]
    fn one_context_is_inside_for_a_cpu_without_a_cache() {
        let table = CpuTable::<2>::new();
        let mark = table.mark(1).unwrap();
        assert!(table.mark(1).is_none() && table.mark(0).is_some() && table.mark(2).is_none());
        assert!(table.mark(1).is_none(), "who is refused clears nothing");
        drop(mark);
        assert!(table.mark(1).is_some());
    }

    #[test]
    fn states_take_a_share_of_the_heap() {
        let table = Box::new(CpuTable::<3>::new());
        assert!(!table.has_room(STATES_SHARE * 8192 - 1, 8192) && table.has_room(STATES_SHARE * 8192, 8192));
        table.install(1, place(), |_| ());
        assert!(!table.has_room(STATES_SHARE * 8192, 8192) && table.has_room(2 * STATES_SHARE * 8192, 8192));
    }
}

//! The one seam through which every atomic of the heap comes.
//!
//! Everything shared in this crate is an atomic, also what a lock protects: a plain field read by a statistics
//! call or by a context that interrupted its owner would be a data race, and a relaxed load costs the same
//! instruction. What pays for it is that no `UnsafeCell` is left in the engine, so no `unsafe impl Sync` either.
//! The few reads and writes of memory that is no atomic's, links in free blocks, come through it too. Under `cfg(loom)`
//! a model checker stands here (`sync/model.rs`), and what it runs is the shipped code; under `cfg(simulated)` a
//! counter of accesses (`sync/simulated.rs`).

#[cfg(loom)]
pub(crate) mod model;
#[cfg(simulated)]
pub mod simulated;
#[cfg(any(split_words, not(target_has_atomic = "64"), all(test, not(any(loom, simulated)))))]
mod split;

#[cfg(simulated)]
pub(crate) use simulated::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, compiler_fence, fence, read, spin_loop, write,
};

#[cfg(loom)]
pub(crate) use model::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, compiler_fence, fence, read, spin_loop, write,
};

#[cfg(not(any(loom, simulated)))]
pub(crate) use core::{
    hint::spin_loop,
    ptr::{read, write},
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, compiler_fence, fence},
};

pub(crate) use wide::{AtomicWord, Counter, SPLIT};

/// Atomics of 32 bits are all there are: that is so here, or `--cfg split_words` wants it tested where it is not.
#[cfg(any(split_words, not(target_has_atomic = "64")))]
mod wide {
    pub(crate) use super::split::{ShortCounter as Counter, SplitWord as AtomicWord};

    pub(crate) const SPLIT: bool = true;
}

/// `AtomicWord`: 64 bits whose lower half is changed as a whole, and here all of it. `Counter`: for statistics.
#[cfg(not(any(split_words, not(target_has_atomic = "64"))))]
mod wide {
    #[cfg(not(any(loom, simulated)))]
    use core::sync::atomic as whole;

    #[cfg(loom)]
    use super::model as whole;
    #[cfg(simulated)]
    use super::simulated as whole;
    pub(crate) use whole::{AtomicU64 as AtomicWord, AtomicU64 as Counter};

    pub(crate) const SPLIT: bool = false;
}

/// A sum of counters, some of them subtracted. It is below 0, and 0 then, only where others counted while it was read.
#[inline]
pub(crate) fn summed(sum: u64) -> u64 {
    u64::try_from(signed(sum)).unwrap_or(0)
}

/// A counter that may have gone below 0.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "counters of 32 bits begin anew after 2^32 - 1")]
pub(crate) const fn signed(count: u64) -> i64 {
    if SPLIT { count as i32 as i64 } else { count as i64 }
}

/// How often a bounded wait looks at a lock before it gives up. Every hold of a lock of the heap touches a constant
/// number of slabs or runs, so a holder that runs is gone long before; one that does not run (preempted, or interrupted
/// by the waiter itself) must not be waited for.
pub(crate) const SPIN_LIMIT: u32 = looks(2_000);

/// A wait's bound, in looks. A model checker needs no patience: it tries every outcome of two looks.
pub(crate) const fn looks(limit: u32) -> u32 {
    if cfg!(loom) { 2 } else { limit }
}

/// How many contexts have something in hand that others do not see meanwhile. A guess to whoever asks; all zero: none.
#[derive(Debug)]
pub(crate) struct InHand {
    count: AtomicUsize,
}

/// One of them, until dropped.
#[derive(Debug)]
pub(crate) struct Carrier<'a> {
    all: &'a InHand,
}

impl InHand {
    pub(crate) const fn new() -> Self {
        Self { count: AtomicUsize::new(0) }
    }

    /// Counts the caller in.
    pub(crate) fn begin(&self) -> Carrier<'_> {
        self.count.fetch_add(1, Ordering::Relaxed);
        Carrier { all: self }
    }

    pub(crate) fn is_any(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Carrier<'_> {
    fn drop(&mut self) {
        self.all.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A lock that nobody is forced to wait for.
///
/// It protects no data by type: what it guards are atomics beside it, and the lock makes their *combination*
/// consistent. All zero is the open state.
#[derive(Debug)]
pub(crate) struct TryLock {
    held: AtomicBool,
}

/// Proof that the lock it came from is held; opens it when dropped.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    lock: &'a TryLock,
}

impl TryLock {
    pub(crate) const fn new() -> Self {
        Self { held: AtomicBool::new(false) }
    }

    /// Takes the lock if it is open. Never waits; callable from any context. Looks before it writes, so that a
    /// busy lock's cache line stays shared.
    #[inline]
    pub(crate) fn try_lock(&self) -> Option<Held<'_>> {
        self.try_take().then(|| Held { lock: self })
    }

    /// [`try_lock`](Self::try_lock) for who opens the lock itself, by [`open`](Self::open).
    #[inline]
    pub(crate) fn try_take(&self) -> bool {
        !self.held.load(Ordering::Relaxed)
            && self.held.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Opens what [`try_take`](Self::try_take) took.
    #[inline]
    pub(crate) fn open(&self) {
        self.held.store(false, Ordering::Release);
    }

    /// Whether somebody holds the lock. A guess.
    #[inline]
    pub(crate) fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    /// Takes the lock, looking at most [`SPIN_LIMIT`] times.
    pub(crate) fn lock_bounded(&self) -> Option<Held<'_>> {
        self.take_bounded().then(|| Held { lock: self })
    }

    /// [`lock_bounded`](Self::lock_bounded) for who opens the lock itself.
    pub(crate) fn take_bounded(&self) -> bool {
        (0..SPIN_LIMIT).any(|_| {
            let taken = self.try_take();
            if !taken {
                spin_loop();
            }
            taken
        })
    }
}

/// A sum that goes up and down and remembers its maximum. All zero is the empty state.
#[derive(Debug)]
pub(crate) struct Level {
    now: AtomicUsize,
    high: AtomicUsize,
}

impl Level {
    pub(crate) const fn new() -> Self {
        Self { now: AtomicUsize::new(0), high: AtomicUsize::new(0) }
    }

    #[inline]
    pub(crate) fn get(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }

    /// The most it ever was.
    pub(crate) fn high(&self) -> usize {
        self.high.load(Ordering::Relaxed)
    }

    /// Adds, by any writer. Looks before it writes the maximum, which changes rarely.
    pub(crate) fn add(&self, more: usize) {
        let now = self.now.fetch_add(more, Ordering::Relaxed).wrapping_add(more);
        if now > self.high() {
            self.high.fetch_max(now, Ordering::Relaxed);
        }
    }

    /// Subtracts, by any writer.
    pub(crate) fn sub(&self, less: usize) {
        self.now.fetch_sub(less, Ordering::Relaxed);
    }
}

impl Drop for Held<'_> {
    #[inline]
    fn drop(&mut self) {
        self.lock.open();
    }
}

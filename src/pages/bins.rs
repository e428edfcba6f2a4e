//! Bins: the free runs of a pool, by length.
//!
//! Segregated free lists with a bitmap over them, after Masmano, Ripoll, Crespo and Real, "TLSF: a new dynamic
//! memory allocator for real-time systems", ECRTS 2004: a bin holds the runs of one range of lengths, four ranges
//! to a doubling, and one bit a bin says whether it is empty. Insertion, removal and the search are constant time.
//!
//! Decisions, and what pays for each:
//! - *Good fit instead of best fit*: a request is rounded up to the next bin's lower end, where every run fits.
//!   Price: a run that lies in the request's own bin and would have fitted is missed, so when nothing else is
//!   found a bounded number of runs of that bin is looked at.
//! - *Lists end with null, and the first run's `prev` is the last run.* A list can then be turned in constant time, so
//!   that a search which gave up goes on where it stopped when it is repeated, and a first or only run comes and goes
//!   with fewer writes than in a ring. Price: the last run is found through the first one.
//! - *A bin for every length there can be*, and a power of two of them, so that no index has to be checked or capped.
//!   Price: 24 heads that stay empty in all but the longest heaps.
//! - *Lengths count in units of 256 bytes*, since chunks with different granules share bins.
//!
//! All zero is the empty state. Every function is called under the pool's lock.

use super::chunk::{COARSE_SHIFT, UNIT_SHIFT};
use super::desc::{MAX_LEN, PageDesc};
use crate::base::link::Link;
use crate::base::sync::{AtomicWord, Ordering};

/// Bins to a doubling of length, as a shift.
const FINENESS: u32 = 2;
/// The longest length of a run, in units.
pub(crate) const MAX_UNITS: usize = (MAX_LEN << (COARSE_SHIFT - UNIT_SHIFT)) | ((1 << (COARSE_SHIFT - UNIT_SHIFT)) - 1);
/// The same in bytes.
pub(crate) const MAX_RUN_LEN: usize = MAX_UNITS << UNIT_SHIFT;
/// One bin for each of 0 to 3 units, then four for each doubling.
pub(crate) const BIN_COUNT: usize = 128;

const _: () =
    assert!(index(2 * MAX_UNITS) + 1 < BIN_COUNT, "also a length with what it may lose to an alignment has a bin");

/// See the file's head. Invariants, executed by `Pool::verify`:
/// - B1: bit `i % 64` of `filled[i / 64]` is set exactly if `heads[i]` is not null.
/// - B2: the runs of a bin form a list in both directions, whose first run's `prev` is the last one.
/// - B3: a run is in the bin that [`index`] gives for its length.
#[derive(Debug)]
pub(crate) struct Bins {
    filled: [AtomicWord; 2],
    heads: [Link<PageDesc>; BIN_COUNT],
}

/// The bin of runs of that many units, without a branch. Up to 7 units, a bin holds one length.
#[inline]
pub(crate) const fn index(units: usize) -> usize {
    let shift = (units | 1 << FINENESS).ilog2() - FINENESS;
    (((shift as usize) << FINENESS) + (units >> shift)) % BIN_COUNT
}

/// The first bin all of whose runs have at least that many units, which are not 0.
#[inline]
pub(crate) const fn good_index(units: usize) -> usize {
    (index(units.wrapping_sub(1)) + 1) % BIN_COUNT
}

impl Bins {
    pub(crate) const fn new() -> Self {
        Self { filled: [const { AtomicWord::new(0) }; 2], heads: [const { Link::new() }; BIN_COUNT] }
    }

    /// The first run of a bin.
    #[inline]
    pub(crate) fn head(&self, bin: usize) -> Option<&PageDesc> {
        self.heads.get(bin)?.get()
    }

    /// Whether the bitmap says that a bin has runs.
    pub(crate) fn is_filled(&self, bin: usize) -> bool {
        self.filled.get(bin / 64).is_some_and(|word| word.load(Ordering::Relaxed) >> (bin % 64) & 1 != 0)
    }

    /// Puts a run where another one is, in bin `from`, that it is part of or has become part of: with lengths of one
    /// bin, in its place there.
    #[inline(always)]
    pub(crate) fn replace(&self, old: &PageDesc, from: usize, new: &PageDesc, to: usize) {
        if from != to {
            self.remove(old, from);
            self.insert(new, to);
        } else if !core::ptr::eq(old, new) {
            self.replace_in(from, old, new);
        }
    }

    /// Puts a run first into a bin, that of its length.
    #[inline(always)]
    pub(crate) fn insert(&self, run: &PageDesc, bin: usize) {
        let Some(head) = self.heads.get(bin) else { return };
        let first = head.get();
        run.next.set(first);
        let last = match first {
            Some(first) => {
                let last = first.prev.get();
                first.prev.set(Some(run));
                last
            }
            None => {
                self.mark(bin, true);
                Some(run)
            }
        };
        run.prev.set(last);
        head.set(Some(run));
    }

    /// Takes a run out of the bin that it is in.
    #[inline(always)]
    pub(crate) fn remove(&self, run: &PageDesc, bin: usize) {
        let Some(head) = self.heads.get(bin).and_then(Link::get) else { return };
        if core::ptr::eq(head, run) {
            return self.remove_first(run, bin);
        }
        let (next, prev) = (run.next.get(), run.prev.get());
        if let Some(before) = prev {
            before.next.set(next);
        }
        next.unwrap_or(head).prev.set(prev);
    }

    /// Takes the first run out of a bin.
    #[inline(always)]
    pub(crate) fn remove_first(&self, run: &PageDesc, bin: usize) {
        let Some(head) = self.heads.get(bin) else { return };
        let next = run.next.get();
        head.set(next);
        match next {
            Some(first) => first.prev.set(run.prev.get()),
            None => self.mark(bin, false),
        }
    }

    /// Puts a run in another one's place in a bin. Seldom: out of line, or its registers are saved each time.
    #[inline(never)]
    fn replace_in(&self, bin: usize, old: &PageDesc, new: &PageDesc) {
        let Some(head) = self.heads.get(bin) else { return };
        let (next, prev) = (old.next.get(), old.prev.get());
        new.next.set(next);
        new.prev.set(prev);
        let before = if head.leads_to(old) { Some(head) } else { prev.map(|prev: &PageDesc| &prev.next) };
        if let Some(before) = before {
            before.set(Some(new));
        }
        // An only run is its own last one.
        if let Some(behind) = next.or_else(|| head.get()) {
            behind.prev.set(Some(new));
        }
    }

    /// The first bin from `bin` on that has runs.
    #[inline]
    pub(crate) fn first_from(&self, bin: usize) -> Option<usize> {
        let [low, high] = &self.filled;
        let (word, base) = if bin < 64 { (low, 0) } else { (high, 64) };
        let at = word.load(Ordering::Relaxed) & (u64::MAX << (bin % 64));
        if at != 0 {
            return Some(base + at.trailing_zeros() as usize);
        }
        let rest = if bin < 64 { high.load(Ordering::Relaxed) } else { 0 };
        (rest != 0).then_some(64 + rest.trailing_zeros() as usize)
    }

    /// The last bin that has runs.
    pub(crate) fn last(&self) -> Option<usize> {
        let high = |(at, word): (usize, &AtomicWord)| {
            word.load(Ordering::Relaxed).checked_ilog2().map(|bit| at * 64 + bit as usize)
        };
        self.filled.iter().enumerate().rev().find_map(high)
    }

    /// The first success of `fits` among the first `limit` runs of a bin.
    pub(crate) fn look<'a, P>(
        &'a self,
        bin: usize,
        limit: usize,
        fits: impl Fn(&'a PageDesc) -> Option<P>,
    ) -> Option<P> {
        core::iter::successors(self.head(bin), |run| run.next.get()).take(limit).find_map(fits)
    }

    /// Turns a bin's list by `steps`, so that the next [`look`](Self::look) sees other runs.
    pub(crate) fn turn(&self, bin: usize, steps: usize) {
        let Some(head) = self.heads.get(bin) else { return };
        for _ in 0..steps {
            let Some(first) = head.get() else { return };
            let (Some(next), Some(last)) = (first.next.get(), first.prev.get()) else { return };
            last.next.set(Some(first));
            first.next.set(None);
            head.set(Some(next));
        }
    }

    #[inline]
    fn mark(&self, bin: usize, filled: bool) {
        let Some(word) = self.filled.get(bin / 64) else { return };
        let (old, bit) = (word.load(Ordering::Relaxed), 1 << (bin % 64));
        word.store(if filled { old | bit } else { old & !bit }, Ordering::Relaxed);
    }
}

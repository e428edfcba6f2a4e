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
//! - *Circular lists.* A list can then be turned in constant time, so that a search which gave up goes on where it
//!   stopped when it is repeated. Price: none but the test for the way round.
//! - *Lengths count in units of 256 bytes*, since chunks with different granules share bins.
//!
//! All zero is the empty state. Every function is called under the pool's lock.

use super::desc::PageDesc;
use crate::sync::{AtomicPtr, AtomicU64, Ordering};

/// Bins to a doubling of length, as a shift.
const FINENESS: u32 = 2;
/// Lengths of this many units and more share the last bin.
const MAX_UNITS: usize = (1 << 27) - 1;
/// One bin for each of 0 to 3 units, then four for each doubling up to `MAX_UNITS`.
pub(crate) const BIN_COUNT: usize = 104;

const _: () = assert!(index(MAX_UNITS) == BIN_COUNT - 1, "the last bin ends at MAX_UNITS");

/// See the file's head. Invariants, executed by `Pool::verify`:
/// - B1: bit `i % 64` of `filled[i / 64]` is set exactly if `heads[i]` is not null.
/// - B2: the runs of a bin form a ring in both directions.
/// - B3: a run is in the bin that [`index`] gives for its length.
#[derive(Debug)]
pub(crate) struct Bins {
    filled: [AtomicU64; 2],
    heads: [AtomicPtr<PageDesc>; BIN_COUNT],
}

/// The bin of runs of that many units.
pub(crate) const fn index(units: usize) -> usize {
    let units = if units > MAX_UNITS { MAX_UNITS } else { units };
    if units < 1 << FINENESS {
        return units;
    }
    let order = units.ilog2();
    let fine = (units >> (order - FINENESS)) & ((1 << FINENESS) - 1);
    (((order - FINENESS + 1) as usize) << FINENESS) | fine
}

/// The first bin all of whose runs have at least that many units (below `MAX_UNITS`; above, the last bin).
pub(crate) const fn good_index(units: usize) -> usize {
    if units < 1 << FINENESS {
        return index(units);
    }
    index(units.saturating_add((1 << (units.ilog2() - FINENESS)) - 1))
}

impl Bins {
    pub(crate) const fn new() -> Self {
        Self {
            filled: [const { AtomicU64::new(0) }; 2],
            heads: [const { AtomicPtr::new(core::ptr::null_mut()) }; BIN_COUNT],
        }
    }

    /// The first run of a bin.
    pub(crate) fn head(&self, bin: usize) -> Option<&PageDesc> {
        follow(self.heads.get(bin)?)
    }

    /// Whether the bitmap says that a bin has runs.
    pub(crate) fn is_filled(&self, bin: usize) -> bool {
        self.filled.get(bin / 64).is_some_and(|word| word.load(Ordering::Relaxed) >> (bin % 64) & 1 != 0)
    }

    /// Puts a run first into the bin of its length.
    pub(crate) fn insert(&self, run: &PageDesc, units: usize) {
        let bin = index(units);
        let Some(head) = self.heads.get(bin) else { return };
        let first = follow(head).unwrap_or(run);
        let last = follow(&first.prev).filter(|_| !core::ptr::eq(first, run)).unwrap_or(run);
        run.next.store(first.as_link(), Ordering::Relaxed);
        run.prev.store(last.as_link(), Ordering::Relaxed);
        first.prev.store(run.as_link(), Ordering::Relaxed);
        last.next.store(run.as_link(), Ordering::Relaxed);
        head.store(run.as_link(), Ordering::Relaxed);
        self.mark(bin, true);
    }

    /// Takes a run out of the bin of its length, where it is.
    pub(crate) fn remove(&self, run: &PageDesc, units: usize) {
        let bin = index(units);
        let Some(head) = self.heads.get(bin) else { return };
        let (Some(next), Some(prev)) = (follow(&run.next), follow(&run.prev)) else {
            return;
        };
        if core::ptr::eq(next, run) {
            head.store(core::ptr::null_mut(), Ordering::Relaxed);
            self.mark(bin, false);
        } else {
            prev.next.store(next.as_link(), Ordering::Relaxed);
            next.prev.store(prev.as_link(), Ordering::Relaxed);
            if core::ptr::eq(head.load(Ordering::Relaxed), run) {
                head.store(next.as_link(), Ordering::Relaxed);
            }
        }
        run.next.store(core::ptr::null_mut(), Ordering::Relaxed);
        run.prev.store(core::ptr::null_mut(), Ordering::Relaxed);
    }

    /// The first bin from `bin` on that has runs.
    pub(crate) fn first_from(&self, bin: usize) -> Option<usize> {
        let mut skip = bin % 64;
        for (at, word) in self.filled.iter().enumerate().skip(bin / 64) {
            let word = word.load(Ordering::Relaxed) >> skip << skip;
            if word != 0 {
                return Some(at * 64 + word.trailing_zeros() as usize);
            }
            skip = 0;
        }
        None
    }

    /// The last bin that has runs.
    pub(crate) fn last(&self) -> Option<usize> {
        let high = |(at, word): (usize, &AtomicU64)| {
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
        let head = self.head(bin)?;
        let mut run = head;
        for _ in 0..limit {
            if let Some(place) = fits(run) {
                return Some(place);
            }
            run = follow(&run.next)?;
            if core::ptr::eq(run, head) {
                return None;
            }
        }
        None
    }

    /// Turns a bin's ring by `steps`, so that the next [`look`](Self::look) sees other runs.
    pub(crate) fn turn(&self, bin: usize, steps: usize) {
        let Some(head) = self.heads.get(bin) else { return };
        for _ in 0..steps {
            let Some(run) = follow(head) else { return };
            head.store(run.next.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn mark(&self, bin: usize, filled: bool) {
        let Some(word) = self.filled.get(bin / 64) else { return };
        let (old, bit) = (word.load(Ordering::Relaxed), 1 << (bin % 64));
        word.store(if filled { old | bit } else { old & !bit }, Ordering::Relaxed);
    }
}

/// The descriptor a link in a bin leads to.
fn follow<'a>(link: &AtomicPtr<PageDesc>) -> Option<&'a PageDesc> {
    // SAFETY: only `insert` and `remove` write these links, and a chunk leaves the heap after all its runs left
    // their bins; the callers hold the lock that this takes, so no link leads to a chunk that is gone.
    unsafe { PageDesc::from_link(link.load(Ordering::Relaxed)) }
}

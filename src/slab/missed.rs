//! How many empty slabs a bin keeps beyond its least: as many as were missed.
//!
//! Blocks that come and go in batches empty slabs and need them again. Given to the pages meanwhile, each costs two
//! holds of a lock that all CPUs share. So a bin learns: *a slab that is founded after one went to the pages was
//! missed*, and makes a place more. *Places that were not all used between two times that the reserve was full were too
//! many*, and an eighth of those goes, so that a class whose slabs come and go at random keeps what that takes and no
//! more; and so that a batch much longer than the reserve may be, which it would help little, does not keep it full.
//! Memory that is short, or asked for, makes the bin forget. Source of the idea: the low-water marks by which
//! `TCMalloc` sizes its caches.
//!
//! One word for each bin. Written by the holder of the bin's lock but for [`found`](Missed::found) and
//! [`forget`](Missed::forget), whose races lose a step of a guess.

use crate::base::sync::{AtomicU32, Ordering::Relaxed};
use crate::base::tuning::UNUSED_SHARE;

/// `places` in the low bits, then `unused`, then `gone`.
const COUNT_BITS: u32 = 12;
const MOST: u32 = (1 << COUNT_BITS) - 1;
const MOST_GONE: u32 = (1 << (32 - 2 * COUNT_BITS)) - 1;

/// All zero: nothing was missed.
#[derive(Debug)]
pub(crate) struct Missed(AtomicU32);

#[derive(Clone, Copy)]
struct State {
    /// Slabs to keep beyond the least.
    places: u32,
    /// The fewest that were kept since the reserve was full.
    unused: u32,
    /// Slabs that went to the pages and were not missed yet.
    gone: u32,
}

impl Missed {
    pub(crate) const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    fn state(&self) -> State {
        let word = self.0.load(Relaxed);
        State { places: word & MOST, unused: (word >> COUNT_BITS) & MOST, gone: word >> (2 * COUNT_BITS) }
    }

    fn put(&self, State { places, unused, gone }: State) {
        self.0.store(places | unused << COUNT_BITS | gone << (2 * COUNT_BITS), Relaxed);
    }

    /// Slabs to keep beyond the least.
    pub(crate) fn places(&self) -> u32 {
        self.state().places
    }

    /// The reserve is full, with `count` slabs, and one goes to the pages. True: it has fewer places from now on.
    pub(crate) fn full(&self, count: u32) -> bool {
        let State { places, unused, gone } = self.state();
        let fewer = places.saturating_sub(unused.div_ceil(UNUSED_SHARE));
        self.put(State { places: fewer, unused: count.min(MOST), gone: (gone + 1).min(MOST_GONE) });
        fewer < places
    }

    /// A slab was taken out of the reserve, and `count` are left.
    pub(crate) fn used(&self, count: u32) {
        let state = self.state();
        if count < state.unused {
            self.put(State { unused: count, ..state });
        }
    }

    /// A slab is founded, as the bin had none.
    pub(crate) fn found(&self) {
        let State { places, unused, gone } = self.state();
        if gone > 0 {
            self.put(State { places: (places + 1).min(MOST), unused, gone: gone - 1 });
        }
    }

    /// Nothing was missed.
    pub(crate) fn forget(&self) {
        self.0.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes and gives back so many slabs in turn; gives how many were founded.
    fn batch(missed: &Missed, count: &mut u32, slabs: u32) -> u32 {
        let mut founded = 0;
        for _ in 0..slabs {
            match count.checked_sub(1) {
                Some(less) => {
                    *count = less;
                    missed.used(less);
                }
                None => {
                    founded += 1;
                    missed.found();
                }
            }
        }
        for _ in 0..slabs {
            if *count <= missed.places() {
                *count += 1;
            } else if missed.full(*count) {
                *count -= 1;
            }
        }
        founded
    }

    #[test]
    fn what_a_batch_missed_is_kept_from_the_next_on() {
        let (missed, mut count) = (Missed::new(), 0);
        assert_eq!(batch(&missed, &mut count, 100), 100);
        assert_eq!(count, 1, "what was used once goes");
        assert_eq!(batch(&missed, &mut count, 100), 99);
        assert_eq!((count, missed.places()), (100, 99));
        assert_eq!((0..50).map(|_| batch(&missed, &mut count, 100)).sum::<u32>(), 0);
    }

    #[test]
    fn places_that_are_not_used_go() {
        let (missed, mut count) = (Missed::new(), 0);
        (0..3).for_each(|_| _ = batch(&missed, &mut count, 1000));
        let most = missed.places();
        for _ in 0..100 {
            batch(&missed, &mut count, 10);
            // One more than there are places for, each time.
            count -= u32::from(missed.full(count));
        }
        assert!(missed.places() < 20, "{} of {most} places", missed.places());
        missed.forget();
        assert_eq!(missed.places(), 0);
    }

    #[test]
    fn counts_stay_in_their_bits() {
        let missed = Missed::new();
        for _ in 0..3 * MOST {
            let _ = missed.full(u32::MAX);
            missed.found();
            missed.used(0);
        }
        assert_eq!(missed.places(), MOST);
        (0..1000).for_each(|_| _ = missed.full(0));
        assert_eq!((missed.state().gone, missed.places()), (MOST_GONE, MOST));
    }
}

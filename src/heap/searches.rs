//! Who is inside a search for memory, or inside the pressure hook, by CPU.
//!
//! A search works with nothing held, so a busy cache does not tell an interrupt handler that it interrupted one. What
//! it interrupted cannot go on before it returns, so waiting for it is in vain. With a pin, the count of searches on
//! the own CPU tells. A preempted task may leave its search on another CPU's count: a search that runs while one begun
//! after it is still inside was not interrupted by that one; this is seen, and from then on the count is not believed.
//! With a hint it is taken for true by who may not wait only, since another CPU may have the same id.
//!
//! Where the count is not believed, a context with interrupts masked cannot know whether it waits for what it
//! interrupted. Such contexts share a patience: each wait that was in vain leaves an eighth of it to the next one, each
//! that was not gives it back.
//!
//! Price: under a pin, a context that meets the search of a preempted task on its CPU gives up early, until the count
//! is no longer believed. Where ids lie, four waits are in vain, the first one as long as a task's.

use crate::base::sync::{AtomicUsize, Ordering};
use crate::base::tuning::{VAIN_LIMIT, VAIN_SHIFT};

/// All zero: nobody is inside, and ids are believed.
#[derive(Debug)]
pub(crate) struct Searches<const CPUS: usize> {
    /// Searches by CPU.
    inside: [AtomicUsize; CPUS],
    /// Contexts inside the pressure hook, by CPU; the last one counts those without an index.
    relieving: [AtomicUsize; CPUS],
    relieving_elsewhere: AtomicUsize,
    /// Not 0: two contexts with one index ran side by side. A word, so that the struct has no padding.
    ids_are_shared: AtomicUsize,
    /// Waits of masked contexts that were in vain, less those that were not; at most [`VAIN_LIMIT`].
    vain_waits: AtomicUsize,
}

/// A search, until dropped.
#[derive(Debug)]
pub(crate) struct Search<'a> {
    place: Option<&'a AtomicUsize>,
    ids_are_shared: &'a AtomicUsize,
    /// Searches on this CPU when this one began.
    before: usize,
}

/// A call of the pressure hook, until dropped.
#[derive(Debug)]
pub(crate) struct Relief<'a> {
    place: &'a AtomicUsize,
}

impl<const CPUS: usize> Searches<CPUS> {
    pub(crate) const fn new() -> Self {
        Self {
            inside: [const { AtomicUsize::new(0) }; CPUS],
            relieving: [const { AtomicUsize::new(0) }; CPUS],
            relieving_elsewhere: AtomicUsize::new(0),
            ids_are_shared: AtomicUsize::new(0),
            vain_waits: AtomicUsize::new(0),
        }
    }

    /// What is left of `most` looks for a context with interrupts masked.
    pub(crate) fn patience(&self, most: u32) -> u32 {
        (most >> (VAIN_SHIFT * self.vain_waits.load(Ordering::Relaxed).min(VAIN_LIMIT))).max(1)
    }

    /// A wait with interrupts masked is over. Two that end at the same moment may count as one.
    pub(crate) fn waited(&self, in_vain: bool) {
        let before = self.vain_waits.load(Ordering::Relaxed);
        let now = if in_vain { (before + 1).min(VAIN_LIMIT) } else { before.saturating_sub(1) };
        self.vain_waits.store(now, Ordering::Relaxed);
    }

    /// Begins a search on the CPU with that index.
    pub(crate) fn begin(&self, index: usize) -> Search<'_> {
        let place = self.inside.get(index);
        let before = place.map_or(0, |place| place.fetch_add(1, Ordering::Relaxed));
        Search { place, ids_are_shared: &self.ids_are_shared, before }
    }

    /// Enters the pressure hook. `None`: this CPU is inside already.
    pub(crate) fn enter_relief(&self, index: usize) -> Option<Relief<'_>> {
        let place = self.relieving.get(index).unwrap_or(&self.relieving_elsewhere);
        if place.fetch_add(1, Ordering::Relaxed) == 0 {
            return Some(Relief { place });
        }
        place.fetch_sub(1, Ordering::Relaxed);
        None
    }

    /// Whether two contexts with one index were seen side by side.
    pub(crate) fn are_ids_shared(&self) -> bool {
        self.ids_are_shared.load(Ordering::Relaxed) > 0
    }
}

impl Search<'_> {
    /// Whether this CPU was searching when this began.
    pub(crate) fn interrupts(&self) -> bool {
        self.before > 0
    }

    /// Looks whether a search with the same index, begun later, is inside while this one runs.
    pub(crate) fn watch(&self) {
        if self.place.is_some_and(|place| place.load(Ordering::Relaxed) > self.before + 1) {
            self.doubt();
        }
    }

    /// Notes that ids are not to be believed.
    fn doubt(&self) {
        self.ids_are_shared.store(1, Ordering::Relaxed);
    }
}

impl Drop for Search<'_> {
    fn drop(&mut self) {
        if self.place.is_some_and(|place| place.fetch_sub(1, Ordering::Relaxed) != self.before + 1) {
            self.doubt();
        }
    }
}

impl Drop for Relief<'_> {
    fn drop(&mut self) {
        self.place.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_knows_that_it_interrupted_a_search() {
        let searches = Searches::<2>::new();
        let task = searches.begin(1);
        assert!(!task.interrupts() && !searches.begin(0).interrupts());
        let handler = searches.begin(1);
        assert!(handler.interrupts() && searches.begin(1).interrupts());
        drop(handler);
        task.watch();
        drop(task);
        assert!(!searches.are_ids_shared(), "each began and ended inside the one that it interrupted");
        assert!(!searches.begin(1).interrupts() && !searches.begin(9).interrupts());
    }

    #[test]
    fn an_id_that_two_contexts_have_at_once_is_not_believed() {
        let searches = Searches::<2>::new();
        let (early, late) = (searches.begin(1), searches.begin(1));
        late.watch();
        assert!(!searches.are_ids_shared());
        early.watch();
        assert!(searches.are_ids_shared(), "it runs while the later one is inside");
        drop((early, late));
        let searches = Searches::<2>::new();
        let (early, late) = (searches.begin(1), searches.begin(1));
        drop(early);
        assert!(searches.are_ids_shared(), "it ends before the later one");
        drop(late);
    }

    #[test]
    fn waits_in_vain_get_shorter_and_others_longer_again() {
        let searches = Searches::<1>::new();
        let mut seen = std::vec::Vec::new();
        for in_vain in [true, true, true, true, true, false, false, false, false, false] {
            seen.push(searches.patience(4096));
            searches.waited(in_vain);
        }
        assert_eq!(seen, [4096, 512, 64, 8, 1, 1, 8, 64, 512, 4096]);
        assert_eq!(searches.patience(0), 1, "one look is always taken");
    }

    #[test]
    fn the_pressure_hook_is_entered_once_on_a_cpu() {
        let searches = Searches::<2>::new();
        for index in [0, 1, 2, usize::MAX] {
            let relief = searches.enter_relief(index);
            assert!(relief.is_some() && searches.enter_relief(index).is_none());
        }
        assert!(searches.enter_relief(0).is_some());
    }
}

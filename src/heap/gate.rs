//! The gate in front of the provider: one context at a time.
//!
//! A provider may take locks of its own, so it must not be entered by an interrupt handler that interrupted it. CPU ids
//! may lie and tasks migrate in the middle of a call, so the only exclusion that always holds is one gate for the whole
//! heap. It is held while nothing else of the heap is. Price: who needs new pages while another context maps waits for
//! it, within a bound. A context that is certain (by a pin) to find the gate held from its own CPU does not wait at
//! all, since the holder cannot go on before it; one that has only a hint waits the bound out, for an equal hint may be
//! another CPU's.
//!
//! A provider that says `REENTRANT` has no gate.

use crate::base::sync::{AtomicUsize, Ordering, spin_loop};
use crate::base::tuning::{EQUAL_LIMIT, WAIT_LIMIT};

const OPEN: usize = 0;

/// One context at a time. All zero is open.
#[derive(Debug)]
pub(crate) struct Gate {
    /// [`OPEN`], or the holder's CPU index plus 1.
    holder: AtomicUsize,
    /// How often somebody left: a waiter whose looks find the same holder each time may have missed that it left and
    /// came again.
    visits: AtomicUsize,
}

/// What a context found at the gate.
#[derive(Debug)]
pub(crate) enum Entry<'a> {
    /// It is inside until this is dropped.
    Inside(Inside<'a>),
    /// Somebody else was inside and has left: what was missing may be there now.
    Waited,
    /// Somebody is inside and may be waiting for us.
    Closed,
}

/// Opens the gate when dropped.
#[derive(Debug)]
pub(crate) struct Inside<'a> {
    gate: &'a Gate,
}

impl Gate {
    pub(crate) const fn new() -> Self {
        Self { holder: AtomicUsize::new(OPEN), visits: AtomicUsize::new(0) }
    }

    /// Goes in, or, if `wait`, waits within the bound for whoever is inside to leave. `index` is the CPU's, and
    /// `certain` if it is no other one's. Call with nothing of the heap held.
    pub(crate) fn enter(&self, index: usize, certain: bool, wait: bool) -> Entry<'_> {
        let me = index.saturating_add(1);
        let visits = self.visits.load(Ordering::Relaxed);
        match self.holder.compare_exchange(OPEN, me, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => Entry::Inside(Inside { gate: self }),
            Err(holder) if !wait || certain && holder == me => Entry::Closed,
            Err(holder) => self.wait(holder, visits, if holder == me { EQUAL_LIMIT } else { WAIT_LIMIT }),
        }
    }

    /// How often somebody left.
    #[cfg(loom)]
    pub(crate) fn visit_count(&self) -> usize {
        self.visits.load(Ordering::Relaxed)
    }

    /// Waits for the holder to leave that was there when so many had left.
    fn wait(&self, holder: usize, visits: usize, limit: u32) -> Entry<'_> {
        for _ in 0..limit {
            if self.visits.load(Ordering::Acquire) != visits || self.holder.load(Ordering::Acquire) != holder {
                return Entry::Waited;
            }
            spin_loop();
        }
        Entry::Closed
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // By the holder alone, so that no locked instruction is needed.
        let visits = self.gate.visits.load(Ordering::Relaxed);
        self.gate.visits.store(visits.wrapping_add(1), Ordering::Release);
        self.gate.holder.store(OPEN, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_no_wait_for_the_own_cpu() {
        let gate = Gate::new();
        let inside = gate.enter(3, true, true);
        assert!(matches!(inside, Entry::Inside(_)));
        let start = std::time::Instant::now();
        assert!(matches!(gate.enter(3, true, true), Entry::Closed));
        assert!(matches!(gate.enter(4, true, false), Entry::Closed));
        let at_once = start.elapsed();
        assert!(matches!(gate.enter(3, false, true), Entry::Closed), "the wait has a bound");
        assert!(start.elapsed() > 10 * at_once, "who may be another CPU waits");
        drop(inside);
        assert!(matches!(gate.enter(usize::MAX, false, true), Entry::Inside(_)), "no index is an index too");
        assert!(matches!(gate.enter(0, true, true), Entry::Inside(_)));
    }

    /// Where CPUs come and go all the time, a look nearly always finds one inside, and often the same.
    #[test]
    fn who_left_and_came_again_has_left() {
        let gate = Gate::new();
        let inside = gate.enter(0, true, true);
        let visits = gate.visits.load(Ordering::Relaxed);
        drop(inside);
        let inside = gate.enter(0, true, true);
        assert!(matches!(inside, Entry::Inside(_)));
        assert!(matches!(gate.wait(1, visits, 1), Entry::Waited));
        assert!(matches!(gate.wait(1, visits + 1, 1), Entry::Closed), "this time it is still inside");
    }

    #[test]
    fn who_waited_is_told() {
        let gate = Gate::new();
        let inside = gate.enter(0, false, true);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| matches!(gate.enter(1, false, true), Entry::Waited));
            drop(inside);
            // Whether the waiter came before or after, it is not turned away.
            let waited = waiter.join().unwrap();
            assert!(waited || matches!(gate.enter(2, false, true), Entry::Inside(_)));
        });
    }
}

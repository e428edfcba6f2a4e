//! The gate in front of the provider, and the stack of what the provider did not take.

use core::ptr::NonNull;
use std::vec::Vec;

use super::{Kept, Place, explore, memory, spawn};
use crate::base::sync::model::together;
use crate::base::sync::{read, write};
use crate::contract::provider::PageRun;
use crate::heap::gate::{Entry, Gate};
use crate::heap::orphans::Orphans;
use crate::pages::Mapping;

models! {
    one_context_at_a_time_is_with_the_provider
    who_waited_sees_what_was_done_inside
    orphaned_runs_are_taken_once
}

/// What a call of the provider does to memory that is no atomic's.
fn work_inside(at: *mut u64) {
    // SAFETY: leaked memory; whether nobody else is here is what is being checked.
    let value = unsafe { read(at) };
    // SAFETY: as above.
    unsafe { write(at, value + 1) };
}

fn one_context_at_a_time_is_with_the_provider() {
    let (gate, at) = (Place::new(), memory(8).cast().as_ptr());
    explore(3, move || {
        let (gate, kept) = (gate.fill(Gate::new()), Kept::new());
        let work = |index, certain, wait| {
            let kept = kept.clone();
            spawn(move || {
                if let Entry::Inside(inside) = gate.enter(index, certain, wait) {
                    work_inside(at);
                    drop(inside);
                    kept.add(());
                }
            })
        };
        together(Vec::from([work(0, true, true), work(1, true, true), work(0, false, false)]));
        let visits = kept.take().len();
        assert!(visits > 0, "somebody came in");
        assert_eq!(gate.visit_count(), visits, "a waiter would take two visits for one");
        assert!(matches!(gate.enter(0, true, false), Entry::Inside(_)), "left open");
    });
}

fn who_waited_sees_what_was_done_inside() {
    let (gate, at) = (Place::new(), memory(8).cast().as_ptr());
    explore(8, move || {
        let gate = gate.fill(Gate::new());
        let work = |index| {
            spawn(move || match gate.enter(index, true, true) {
                Entry::Inside(_inside) => work_inside(at),
                // The other one came once, and has left.
                Entry::Waited => work_inside(at),
                Entry::Closed => {}
            })
        };
        together(Vec::from([work(0), work(1)]));
    });
}

/// Two runs are left behind while a third context takes what is there, and leaves it behind again.
fn orphaned_runs_are_taken_once() {
    const LEN: usize = 1024;
    let (orphans, memory) = (Place::new(), memory(2 * LEN).as_ptr().expose_provenance());
    explore(3, move || {
        let (orphans, kept) = (orphans.fill(Orphans::new()), Kept::new());
        let run = PageRun::new(LEN, LEN, LEN).unwrap();
        let start = |index: usize| NonNull::new(core::ptr::with_exposed_provenance_mut(memory + index * LEN)).unwrap();
        let push = |index| {
            let start = start(index);
            // SAFETY: each run is one thread's.
            spawn(move || orphans.push(unsafe { Mapping::new(start, run) }))
        };
        let take = {
            let kept = kept.clone();
            spawn(move || {
                orphans.take_all(|taken| {
                    let start = taken.start();
                    // SAFETY: it is ours now.
                    unsafe { write(start.cast::<u64>().as_ptr(), 0xa5) };
                    if start.addr().get() == memory {
                        orphans.push(taken);
                    } else {
                        kept.add(start);
                    }
                });
            })
        };
        together(Vec::from([push(0), push(1), take]));
        orphans.take_all(|taken| kept.add(taken.start()));
        let mut all = kept.take();
        all.sort_unstable();
        assert_eq!(all, [start(0), start(1)], "each once");
    });
}

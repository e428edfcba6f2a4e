//! Threads that a timer takes off their CPU at any instruction, inside the heap too, and that go on on another one.
//!
//! With a hint, what the heap was told is stale a moment later, and a thread may stay in the queue while it holds a
//! cache or a lock; with a pin, the pin has to hold. Would catch breaking: alloc and free never deadlock, preempted and
//! migrated at any instruction; a wrong hint costs time only (of a thousand requests at most one is refused, since
//! waits have bounds); nothing is handed out twice; everything freed comes back.
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits")]

mod common;

use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::block::Block;
use common::heaps::{Regions, expect_left, give, heap};
use common::modes::{Index, InterruptsMasked, Pins, heaps};
use common::sizes::random_size;
use common::slots::Slots;
use smp_heap::battery::Random;
use smp_heap::cpu::PreemptionPin;
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::{Boot, kernel, println, sched, test};

heaps! {
    over Regions = Regions::new();
    Hint<Index>,
    Pinned<PreemptionPin<Pins, Index>>,
    Pinned<InterruptsMasked<Index>>,
}

const THREADS: usize = 24;
/// Microseconds between two timer interrupts: each one sends a thread elsewhere.
const QUANTUM: u32 = 200;

/// Where threads leave blocks for each other.
static SHARED: Slots<128> = Slots::new();
static STEPS: AtomicUsize = AtomicUsize::new(0);
static DONE: AtomicUsize = AtomicUsize::new(0);
static REFUSED: AtomicUsize = AtomicUsize::new(0);

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        give(boot.largest_region());
        STEPS.store(boot.number("steps", 500), Relaxed);
        let rounds = boot.rounds(10);
        for round in 0..rounds {
            for thread in 0..THREADS {
                assert!(sched::spawn(work, round * THREADS + thread), "no room for a thread");
            }
            sched::run(QUANTUM);
            common::heaps::verify();
        }
        let (counts, refused) = (sched::counts(), REFUSED.load(Relaxed));
        println!("{counts:?}, {refused} requests refused");
        assert_eq!(DONE.load(Relaxed), rounds * THREADS);
        assert!(boot.cpu_count() == 1 || counts.migrations > 20, "no thread came to another CPU");
        assert!(counts.preemptions > 20, "threads were not preempted");
        // Waits have bounds, and who holds a lock may be off its CPU for longer.
        let asked = rounds * THREADS * STEPS.load(Relaxed);
        assert!(1000 * refused <= asked, "{refused} of {asked} requests found no memory where there was plenty");
        test::did(asked, "blocks");
        test::did(counts.preemptions, "preemptions");
        SHARED.free_part(heap(), 0, 1);
        expect_left(0);
    }
}

/// Allocates, leaves the block where others find it or keeps it, frees what it finds there.
fn work(thread: usize) {
    let mut random = Random::new(thread as u64 + 1);
    let mut own: [Option<Block>; 32] = [const { None }; 32];
    for step in 0..STEPS.load(Relaxed) {
        let block = Block::new(heap(), random_size(&mut random), 8, step as u8);
        if block.is_none() {
            REFUSED.fetch_add(1, Relaxed);
        }
        let mine = own.get_mut(random.below(64));
        let old = match mine {
            Some(place) => core::mem::replace(place, block),
            None => SHARED.swap(random.below(128), block),
        };
        if let Some(old) = old {
            old.free(heap());
        }
        if step % 64 == 0 {
            sched::yield_now();
        }
    }
    own.into_iter().flatten().for_each(|block| block.free(heap()));
    DONE.fetch_add(1, Relaxed);
}

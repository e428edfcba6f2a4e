//! All at once: threads that the timer takes off their CPU at any instruction and that go on elsewhere, timer handlers,
//! broadcast IPIs and NMIs whose handlers allocate and free.
//!
//! Would catch breaking: alloc and free never deadlock, whoever interrupts whom and wherever the interrupted goes on;
//! nothing is handed out twice (each block is filled, and checked when it is freed, by a thread or a handler, on any
//! CPU); of a thousand requests of threads at most one is refused while there is memory, of a hundred of handlers at
//! most five; everything freed comes back. Which handlers came inside the heap is a guess here: the mark stays with the
//! CPU, the thread does not.
#![no_std]
#![no_main]

mod common;

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use common::heaps::{Regions, expect_left, give};
use common::modes::{Index, InterruptsMasked, Pins, Places, heaps};
use smp_heap::cpu::{ByAddr, PreemptionPin, UnknownCpu};
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::arch::vector;
use smp_heap_kernel::{Boot, interrupts, ipi, kernel, nmi, println, sched, test, timer};

heaps! {
    over Regions = Regions::new();
    Hint<Index>,
    Pinned<PreemptionPin<Pins, Index>>,
    Pinned<ByAddr<PreemptionPin<Pins, UnknownCpu>, Places>>,
    Pinned<InterruptsMasked<Index>>,
}

const THREADS: usize = 24;
/// Microseconds between two timer interrupts of a CPU.
const QUANTUM: u32 = 100;
/// What a thread does before it interrupts the other CPUs.
const STEPS: usize = 50;
/// The interrupts whose handlers allocate, besides the timer's.
const STRIKE: u8 = vector::FREE + 2;

/// Migrations in each round: threads go on until there were so many, however fast the host is.
const MIGRATIONS: u64 = 500;

/// What each thread does at least.
static TURNS: AtomicUsize = AtomicUsize::new(0);
/// Migrations, since the kernel was booted, before which nobody stops.
static WANTED: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicUsize = AtomicUsize::new(0);
static REFUSED: AtomicUsize = AtomicUsize::new(0);

kernel! {
    fn main(boot: &Boot) {
        assert!(boot.cpu_count() > 1, "nobody sends interrupts to a CPU that is alone");
        choose(boot);
        give(boot.largest_region());
        TURNS.store(boot.number("turns", 50), Relaxed);
        timer::set_handler(|_| common::storm::strike());
        if nmi::EXISTS {
            nmi::set_handler(|_| common::storm::strike());
        }
        interrupts::set_handler(STRIKE, |_| common::storm::strike());
        let rounds = boot.rounds(1);
        for _ in 0..rounds {
            for thread in 0..THREADS {
                assert!(sched::spawn(work, thread), "no room for a thread");
            }
            WANTED.store(sched::counts().migrations + MIGRATIONS, Relaxed);
            common::storm::begin();
            sched::run(QUANTUM);
            common::storm::end();
            common::heaps::verify();
        }
        let turns = DONE.load(Relaxed);
        let (counts, refused, asked) = (sched::counts(), REFUSED.load(Relaxed), turns * STEPS);
        println!("{} operations of threads, {refused} requests refused; {counts:?}", 2 * asked);
        assert!(asked * 2 >= 100_000 * rounds, "that was no storm");
        assert!(counts.preemptions > 100, "threads were not preempted");
        test::did(2 * asked, "operations");
        test::did(counts.migrations, "migrations");
        assert!(1000 * refused <= asked, "{refused} of {asked} requests found no memory where there was plenty");
        common::storm::judge(0, 5);
        expect_left(0);
    }
}

/// A thread: works, and interrupts all CPUs but the one it is on.
fn work(thread: usize) {
    let more = |turn| turn < TURNS.load(Relaxed) || sched::counts().migrations < WANTED.load(Relaxed);
    for turn in (0..).take_while(|turn| more(*turn)) {
        REFUSED.fetch_add(common::storm::try_work(STEPS), Relaxed);
        if nmi::EXISTS && (thread + turn) % 2 == 0 {
            nmi::broadcast();
        } else {
            ipi::send_all_but_self(STRIKE);
        }
        DONE.fetch_add(1, Relaxed);
    }
}

//! Threads are preempted in the middle of their work, go on on other CPUs, and keep their registers and stacks.
#![no_std]
#![no_main]

use core::hint::black_box;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use smp_heap_kernel::{Boot, cpu, kernel, println, sched, test};

const ROUNDS: usize = 400;

static DONE: AtomicUsize = AtomicUsize::new(0);

kernel! {
    fn main(boot: &Boot) {
        for thread in 0..sched::MAX_THREADS {
            assert!(sched::spawn(work, thread), "too many threads");
        }
        assert!(!sched::spawn(work, 0), "there is a limit");
        sched::run(200);
        // All are gone, so there is room again; these make children of their own.
        for thread in 0..4 {
            assert!(sched::spawn(parent, thread), "no room after all were done");
        }
        sched::run(200);
        let counts = sched::counts();
        println!("{counts:?}");
        assert_eq!(DONE.load(Relaxed), sched::MAX_THREADS + 4 * 4);
        assert!(counts.preemptions > 16, "threads were not preempted");
        assert!(boot.cpu_count() == 1 || counts.migrations > 0, "no thread came to another CPU");
        test::did(DONE.load(Relaxed), "threads");
        test::did(counts.preemptions, "preemptions");
    }
}

fn parent(number: usize) {
    for child in 0..4 {
        assert!(sched::spawn(work, 4 * number + child), "no room for a child");
        sched::yield_now();
    }
}

/// A sum over a stack full of numbers that only this thread knows, again and again.
fn work(thread: usize) {
    let mut numbers = [0_usize; 512];
    for round in 0..ROUNDS {
        for (i, number) in numbers.iter_mut().enumerate() {
            *number = black_box(i * (thread + 1) + round);
        }
        let sum: usize = black_box(&numbers).iter().sum();
        assert_eq!(sum, 511 * 512 / 2 * (thread + 1) + 512 * round, "thread {thread} lost a number");
        stays_where_it_is_pinned();
        if round % 64 == 0 {
            sched::yield_now();
        }
    }
    DONE.fetch_add(1, Relaxed);
}

fn stays_where_it_is_pinned() {
    cpu::pin();
    let before = cpu::index();
    for _ in 0..1000 {
        assert_eq!(cpu::index(), before, "a pinned thread was moved");
    }
    cpu::unpin();
}

//! A source of CPU numbers that lies: random ones, none, far too large ones, the same for all, and now this, now that.
//!
//! Every CPU works, and timer interrupts allocate meanwhile. Would catch breaking: a wrong hint costs time only: no
//! request of a task is refused while there is memory (the test stops at the first one), nothing is handed out twice,
//! everything freed comes back.
#![no_std]
#![no_main]

mod common;

use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::heaps::{CPUS, Regions, expect_left, give};
use smp_heap::{CpuHint, Heap, Hint};
use smp_heap_kernel::{Boot, cpu, interrupts, kernel, println, smp, test, time, timer};

/// Its name, and what it tells.
type Lie = (&'static str, fn() -> Option<usize>);

const LIES: [Lie; 6] = [
    ("random", || Some((random() >> 3) as usize)),
    ("random small", || Some((random() >> 3) as usize % CPUS)),
    ("huge", || Some(usize::MAX)),
    ("constant", || Some(3)),
    ("none", || None),
    ("the neighbour's", || Some((cpu::index() + 1) % CPUS)),
];

/// Which lie is told; one more than the last: a different one each time.
/// Interrupts that each CPU has in a round, at least.
const TICKS: u64 = 5;

static LIE: AtomicUsize = AtomicUsize::new(0);

/// Different at each call, on each CPU.
fn random() -> u64 {
    (time::cycles() ^ (cpu::index() as u64) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The source.
#[derive(Debug)]
struct Liar;

impl CpuHint for Liar {
    fn current_cpu(&self) -> Option<usize> {
        let lie = LIES.get(LIE.load(Relaxed)).or_else(|| LIES.get((random() >> 7) as usize % LIES.len()));
        lie.and_then(|(_, lie)| lie())
    }

    fn may_wait(&self) -> bool {
        interrupts::are_enabled()
    }
}

static HEAP: Heap<Regions, Hint<Liar>, CPUS> = Heap::new(Regions::new(), Hint(Liar));

kernel! {
    fn main(boot: &Boot) {
        common::heaps::set_chosen(&HEAP);
        give(boot.largest_region());
        let (steps, rounds) = (boot.number("steps", 2_000), boot.rounds(2));
        timer::set_handler(|_| common::storm::strike());
        for (index, name) in LIES.map(|(name, _)| name).into_iter().chain(["all of them"]).enumerate() {
            LIE.store(index, Relaxed);
            let start = time::micros();
            for _ in 0..rounds {
                common::storm::begin();
                smp::on_all(|cpu| {
                    let enough = timer::ticks(cpu) + TICKS;
                    timer::start(500);
                    smp::barrier();
                    common::storm::work(steps);
                    while timer::ticks(cpu) < enough {
                        common::storm::work(100);
                    }
                    timer::stop();
                    smp::barrier();
                    common::storm::end();
                });
                common::heaps::verify();
            }
            println!("{name}: {} us", time::micros() - start);
            test::did(rounds * steps * boot.cpu_count(), "blocks");
        }
        // By an id that lies a handler cannot tell that it interrupted whoever it waits for, and is refused late: so
        // late that the next ones find that where it was.
        common::storm::judge(0, 20);
        expect_left(0);
    }
}

//! Blocks allocated on one CPU and freed on another: in pairs, around a ring, from all to all, and one way only.
//!
//! Would catch breaking: everything freed can be had again by any CPU, and comes back when all is freed; a producer and
//! a consumer do not make the heap grow; nothing is handed out twice. In the last pattern even CPUs only allocate and
//! odd ones only free.
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits")]

mod common;

use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::block::Block;
use common::heaps::{CPUS, Regions, expect_left, give, heap};
use common::modes::{Index, heaps};
use common::sizes::random_size;
use common::slots::Slots;
use smp_heap::battery::Random;
use smp_heap::cpu::NeverPreempts;
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::{Boot, Region, kernel, println, smp, test};

heaps! {
    over Regions = Regions::new();
    Hint<Index>,
    Pinned<NeverPreempts<Index>>,
}

/// Blocks on their way to one CPU.
const PLACES: usize = 256;
static MAIL: [Slots<PLACES>; CPUS] = [const { Slots::new() }; CPUS];
/// Blocks that arrived.
static ARRIVED: AtomicUsize = AtomicUsize::new(0);

/// Little enough that chunks are short, and that a heap which grows runs out.
const REGION_LEN: usize = 16 << 20;

/// Blocks on their way are at most this long together.
const MOST_LIVE: usize = CPUS * PLACES * 1024;

/// To whom a CPU sends, given its index, the turn and the number of CPUs; `None`: it only receives.
type Route = fn(usize, usize, usize) -> Option<usize>;

const ROUTES: [(&str, Route); 4] = [
    ("pairs", |cpu, _, count| Some((cpu ^ 1) % count)),
    ("ring", |cpu, _, count| Some((cpu + 1) % count)),
    ("all to all", |cpu, turn, count| Some((cpu + turn) % count)),
    ("one way", |cpu, _, count| (cpu % 2 == 0).then_some((cpu + 1) % count)),
];

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        give(Region { len: REGION_LEN, ..boot.largest_region() });
        let (rounds, count) = (boot.rounds(10), boot.cpu_count());
        for (name, route) in ROUTES {
            ARRIVED.store(0, Relaxed);
            let mut most_held = 0;
            for round in 0..rounds {
                smp::on_all(|cpu| {
                    smp::barrier();
                    exchange(cpu, round, |turn| route(cpu, turn, count));
                });
                most_held = most_held.max(heap().used_len());
                common::heaps::verify();
            }
            println!("{name}: {} blocks freed elsewhere, at most {} KiB used", ARRIVED.load(Relaxed), most_held / 1024);
            assert!(ARRIVED.load(Relaxed) > 100 * rounds, "hardly a block arrived");
            test::did(ARRIVED.load(Relaxed), "freed_elsewhere");
            assert!(most_held <= 5 * MOST_LIVE, "the heap grew to {most_held} bytes\n{}", common::heaps::Shown);
        }
        expect_left(0);
    }
}

/// Sends blocks and frees what arrives; frees what the receiver did not fetch in time, too.
fn exchange(cpu: usize, round: usize, to: impl Fn(usize) -> Option<usize>) {
    let mut random = Random::new((round * CPUS + cpu) as u64 + 1);
    for turn in 0..4 * PLACES {
        if let Some(mail) = to(turn).and_then(|cpu| MAIL.get(cpu)) {
            let size = random_size(&mut random).min(1024);
            let Some(block) = Block::new(heap(), size, 8, turn as u8) else {
                test::fail(format_args!("no memory for {size} bytes\n{}", common::heaps::Shown));
            };
            if let Some(late) = mail.swap(turn, Some(block)) {
                late.free(heap());
            }
        }
        let arrived = MAIL.get(cpu).and_then(|mail| mail.swap(random.below(PLACES), None));
        if let Some(block) = arrived {
            ARRIVED.fetch_add(1, Relaxed);
            block.free(heap());
        }
    }
    smp::barrier();
    ARRIVED.fetch_add(MAIL.get(cpu).map_or(0, |mail| mail.free_part(heap(), 0, 1)), Relaxed);
}

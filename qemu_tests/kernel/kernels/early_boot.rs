//! The heap before anything else works: no CPU numbers, no interrupts, a first region of 4 KiB, more later.
//!
//! Each CPU allocates its own area, the one that its number will stand in, from the heap. Would catch breaking: usable
//! from a `const` static before CPU ids are set up, with a first region of 4 KiB; what was allocated then can be freed
//! later, on another CPU; a CPU number that is unknown or garbage costs time only; everything freed comes back, but for
//! the areas and what is kept for each CPU.
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits")]

mod common;

use core::alloc::Layout;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::area::{Area, source};
use common::block::Block;
use common::heaps::{CPUS, Regions, expect_left, give, heap};
use common::modes::{Index, Mode, Places, heaps};
use common::sizes::random_size;
use common::slots::Slots;
use smp_heap::battery::Random;
use smp_heap::cpu::{ByAddr, NeverPreempts, UnknownCpu};
use smp_heap::{CpuHint, Hint, Pinned};
use smp_heap_kernel::{Boot, Hooks, Region, cpu, interrupts, kernel, println, smp, test};

/// The CPU's index once it is known; before that nothing, or garbage.
#[derive(Debug)]
struct Unsure;

impl CpuHint for Unsure {
    fn current_cpu(&self) -> Option<usize> {
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        let asked = ASKED.fetch_add(1, Relaxed);
        match cpu::index() {
            usize::MAX if asked % 2 == 0 => None,
            usize::MAX => Some(asked.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            index => Some(index),
        }
    }

    fn may_wait(&self) -> bool {
        interrupts::are_enabled()
    }
}

/// The number that stands in the CPU's area, by the source that comes with the crate.
impl Mode for Pinned<NeverPreempts<Area<u32>>> {
    const NAME: &'static str = "area";
    // SAFETY: this kernel has no threads; areas have their own indices, and before there is one the number is above the
    // heap's CPU count.
    const NEW: Self = Pinned(unsafe { NeverPreempts::new(source()) });
}

impl Mode for Hint<Unsure> {
    const NAME: &'static str = "unsure";
    const NEW: Self = Hint(Unsure);
}

heaps! {
    over Regions = Regions::new();
    Hint<Unsure>,
    Pinned<NeverPreempts<Index>>,
    Pinned<ByAddr<NeverPreempts<UnknownCpu>, Places>>,
    Pinned<NeverPreempts<Area<u32>>>,
}

const FIRST_LEN: usize = 4096;
const SECOND_LEN: usize = 128 * 1024;

/// Allocated before there were CPU numbers.
static EARLY: Slots<64> = Slots::new();
static AREAS: AtomicUsize = AtomicUsize::new(0);
static STEPS: AtomicUsize = AtomicUsize::new(0);

kernel! {
    hooks = Hooks { early: Some(early), per_cpu_area: Some(area) };
    fn main(boot: &Boot) {
        let count = boot.cpu_count();
        assert_eq!(AREAS.load(Relaxed), count, "each CPU allocated its area");
        common::heaps::verify();
        // The rest comes in two pieces while all CPUs work, the second from the last CPU to come up.
        let rest = rest(boot);
        let half = rest.len / 2;
        let (third, fourth) =
            (Region { len: half, ..rest }, Region { start: rest.start + half, len: rest.len - half });
        smp::on_all(|cpu| {
            smp::barrier();
            if cpu == 0 {
                give(third);
            }
            if cpu == count - 1 {
                EARLY.free_part(heap(), 0, 1);
                give(fourth);
            }
            smp::barrier();
            work(boot.rounds(10) * 200, cpu as u64 + 1);
        });
        // The other CPUs' caches lie in the rest, and stay there as long as there are areas.
        let kept = if count > 1 { rest.len } else { 0 };
        expect_left(FIRST_LEN + SECOND_LEN + kept);
        println!("{} bytes held for {count} areas", heap().regions().held_len());
        test::did(AREAS.load(Relaxed), "areas");
        test::did(STEPS.load(Relaxed), "blocks");
    }
}

/// What the early regions left over.
fn rest(boot: &Boot) -> Region {
    let all = boot.largest_region();
    let used = FIRST_LEN + SECOND_LEN;
    Region { start: all.start + used, len: all.len - used }
}

fn early(boot: &Boot) {
    choose(boot);
    assert_eq!(cpu::index(), usize::MAX, "the CPU's number is not known yet");
    assert!(Block::new(heap(), 16, 8, 0).is_none(), "a heap without memory gave some");
    let all = boot.largest_region();
    give(Region { len: FIRST_LEN, ..all });
    for (place, size) in [16, 100, 300, 64, 16, 500].into_iter().enumerate() {
        let block = Block::new(heap(), size, 8, 1);
        assert!(block.is_some(), "no {size} bytes in the first 4 KiB\n{}", common::heaps::Shown);
        EARLY.swap(place, block);
    }
    give(Region { start: all.start + FIRST_LEN, len: SECOND_LEN });
    for (place, size) in [4096, 20_000, 40_000].into_iter().enumerate() {
        let block = Block::new(heap(), size, 8, 2);
        assert!(block.is_some(), "no {size} bytes in the second region\n{}", common::heaps::Shown);
        EARLY.swap(8 + place, block);
    }
    common::heaps::verify();
}

/// The area of a CPU that does not know its number; it uses the heap for other things too.
fn area(layout: Layout) -> *mut u8 {
    assert_eq!(cpu::index(), usize::MAX, "the CPU's number is not known yet");
    let count = AREAS.fetch_add(1, Relaxed);
    for round in 0..50 {
        let block = Block::new(heap(), 8 + 16 * (round % 16), 8, round as u8);
        if block.is_none() {
            test::fail(format_args!("no memory for a starting CPU\n{}", common::heaps::Shown));
        }
        if let Some(old) = EARLY.swap(16 + round % 8 + count % CPUS * 4, block) {
            old.free(heap());
        }
    }
    // SAFETY: an area is longer than 0 bytes.
    unsafe { heap().alloc_zeroed(layout) }
}

fn work(steps: usize, seed: u64) {
    static BLOCKS: Slots<256> = Slots::new();
    let mut random = Random::new(seed);
    for step in 0..steps {
        let size = random_size(&mut random);
        let block = Block::new(heap(), size, 8, step as u8);
        assert!(block.is_some(), "no memory for {size} bytes\n{}", common::heaps::Shown);
        if let Some(old) = BLOCKS.swap(random.below(256), block) {
            old.free(heap());
        }
    }
    STEPS.fetch_add(steps, Relaxed);
    smp::barrier();
    BLOCKS.free_part(heap(), 0, 1);
}

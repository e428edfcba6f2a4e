//! Blocks of mixed sizes come and go, round after round, with little in use in a large region: no round takes longer
//! than the first ones.
//!
//! QEMU counts instructions, which all CPUs take in turns: a microsecond of its clock is the same number of them in
//! each run. Would catch: a heap in which the same work takes more and more instructions. What a round takes by the
//! wall is not looked at: in an emulator it varies tenfold while the instructions stay the same.
#![no_std]
#![no_main]

mod common;

use core::alloc::Layout;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use common::heaps::{Regions, expect_left, give, heap};
use common::modes::{Index, heaps};
use smp_heap::battery::Random;
use smp_heap::cpu::NeverPreempts;
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::{Boot, kernel, println, smp, test, time};

heaps! {
    over Regions = Regions::new();
    Hint<Index>,
    Pinned<NeverPreempts<Index>>,
}

const ROUNDS: usize = 15;
/// Replacements of each CPU in a round.
const STEPS: usize = 10_000;
/// Blocks in use on each CPU.
const COUNT: usize = 128;
/// The longest block: with half of it on average, 64 KiB are in use on each.
const MAX_LEN: usize = 1024;

/// What the longest round took, and the longest of the first ones, in which caches fill.
static LONGEST: AtomicU64 = AtomicU64::new(0);
static FIRST: AtomicU64 = AtomicU64::new(0);

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        give(boot.largest_region());
        smp::on_all(work);
        let (first, longest) = (FIRST.load(Relaxed), LONGEST.load(Relaxed));
        assert!(10 * longest <= 11 * first, "a round took {longest} us, the first ones {first} us");
        expect_left(0);
    }
}

fn work(cpu: usize) {
    let mut random = Random::new(cpu as u64 + 1);
    let mut blocks = [(null_mut(), Layout::new::<u64>()); COUNT];
    for round in 0..ROUNDS {
        smp::barrier();
        let before = time::micros();
        for _ in 0..STEPS {
            let new = Layout::array::<u8>(1 + random.below(MAX_LEN));
            if let (Ok(new), Some(place)) = (new, blocks.get_mut(random.below(COUNT))) {
                replace(place, new);
            }
        }
        smp::barrier();
        if cpu == 0 {
            let took = time::micros() - before;
            println!("round {round}: {took} us of {STEPS} replacements on each CPU");
            if round < 3 {
                FIRST.fetch_max(took, Relaxed);
            }
            LONGEST.fetch_max(took, Relaxed);
        }
        test::did(STEPS, "replacements");
    }
    blocks.into_iter().for_each(|(start, layout)| free(start, layout));
}

fn replace(place: &mut (*mut u8, Layout), new: Layout) {
    free(place.0, place.1);
    // SAFETY: the size is at least 1.
    *place = (unsafe { heap().alloc(new) }, new);
    assert!(!place.0.is_null(), "no memory");
}

fn free(start: *mut u8, layout: Layout) {
    if !start.is_null() {
        // SAFETY: what `replace` allocated with this Layout, once.
        unsafe { heap().dealloc(start, layout) };
    }
}

//! All CPUs take everything in blocks of one size, give it back, and take everything in another size.
//!
//! Would catch breaking: everything freed can be had again by any CPU in any size; after freeing all, draining and trim
//! the provider has every page back; running out of memory is null, on all CPUs at once, and no damage. And a heap of
//! 100 KiB in all serves twenty size classes on every CPU at once (`small`).
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits")]

mod common;

use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::block::Block;
use common::heaps::{Regions, expect_left, give, heap};
use common::modes::{Index, heaps};
use common::slots::Slots;
use smp_heap::cpu::NeverPreempts;
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::{Boot, Region, arch::cpu_count, kernel, println, smp, test};

heaps! {
    over Regions = Regions::new();
    Hint<Index>,
    Pinned<NeverPreempts<Index>>,
}

const LEN: usize = 4 << 20;
const SMALL_LEN: usize = 100 << 10;

/// Sizes, and how many percent of the region they must be able to fill.
const SIZES: [(usize, usize); 9] =
    [(64, 90), (1024, 90), (16, 90), (40_960, 80), (5120, 90), (1 << 20, 50), (256, 90), (32_768, 85), (200, 80)];

/// As many as the region can have of the smallest size.
static BLOCKS: Slots<{ LEN / 16 }> = Slots::new();

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        let all = boot.largest_region();
        let small = boot.flag("small");
        if small {
            give(Region { len: SMALL_LEN, ..all });
            twenty_classes(boot.rounds(50));
        } else {
            give(Region { len: LEN, ..all });
            use_once();
            for round in 0..boot.rounds(2) {
                for (size, percent) in SIZES {
                    let count = take_all(size);
                    test::did(count, "blocks");
                    println!("round {round}: {count} of {size} bytes, {} %", 100 * count * size / LEN);
                    assert!(100 * count * size >= percent * LEN, "too few\n{}", common::heaps::Shown);
                    common::heaps::verify();
                    // Most of them elsewhere than where they were allocated.
                    smp::on_all(|cpu| _ = BLOCKS.free_part(heap(), cpu, boot.cpu_count()));
                    if boot.arg("mode") == Some("pinned") {
                        // Nobody else can empty a pinned cache.
                        smp::on_all(|_| heap().drain_current());
                    }
                    common::heaps::verify();
                }
            }
        }
        expect_left(0);
        let (free_len, len) = (heap().regions().free_len(), if small { SMALL_LEN } else { LEN });
        assert_eq!(free_len, len, "the provider has every page");
    }
}

/// Every CPU uses the heap once, the first one before the others: what a CPU has of its own then lies where it parts
/// nothing. A CPU that comes first to a heap that is full may part it.
fn use_once() {
    let once = || match Block::new(heap(), 64, 8, 0) {
        Some(block) => block.free(heap()),
        None => test::fail(format_args!("no memory in a fresh heap")),
    };
    once();
    smp::on_all(|_| once());
}

/// On all CPUs at once until each finds no more, then on one alone, since what one CPU moves at the moment the others
/// do not see; gives the number.
fn take_all(size: usize) -> usize {
    let taken = AtomicUsize::new(0);
    let take = || {
        while let Some(block) = Block::new(heap(), size, 8, size as u8) {
            if BLOCKS.swap(taken.fetch_add(1, Relaxed), Some(block)).is_some() {
                test::fail(format_args!("more blocks than the region has room for"));
            }
        }
    };
    smp::on_all(|_| {
        smp::barrier();
        take();
    });
    take();
    taken.into_inner()
}

/// One block of each of the first twenty classes on every CPU at the same time.
fn twenty_classes(rounds: usize) {
    let sizes = (8..=64).step_by(8).chain([80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512]);
    for _ in 0..rounds {
        smp::on_all(|_| {
            let mut blocks = [const { None }; 20];
            for (place, size) in blocks.iter_mut().zip(sizes.clone()) {
                *place = Block::new(heap(), size, 8, size as u8);
                assert!(place.is_some(), "no memory for {size} bytes in a small heap\n{}", common::heaps::Shown);
            }
            smp::barrier();
            blocks.into_iter().flatten().for_each(|block| block.free(heap()));
        });
        common::heaps::verify();
    }
    test::did(20 * rounds * cpu_count(), "blocks");
}

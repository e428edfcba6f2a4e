//! A heap without memory refuses, and serves as soon as somebody gives it a region, while others are trying.
//!
//! Would catch breaking: before any region alloc is null, without a panic or a hang, on all CPUs at once; a region may
//! be added at any time, from any CPU, and is used by all; everything freed comes back.
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits")]

mod common;

use common::block::Block;
use common::heaps::{Regions, expect_left, give, heap};
use common::modes::{Index, heaps};
use common::slots::Slots;
use smp_heap::cpu::NeverPreempts;
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::{Boot, Region, kernel, smp, test, time};

heaps! {
    over Regions = Regions::new();
    Hint<Index>,
    Pinned<NeverPreempts<Index>>,
}

static BLOCKS: Slots<16> = Slots::new();

const SIZES: [usize; 8] = [8, 16, 100, 1000, 4096, 30_000, 100_000, 3 << 20];

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        common::heaps::verify();
        heap().trim_all();
        smp::on_all(|_| {
            for size in SIZES.into_iter().cycle().take(100) {
                if Block::new(heap(), size, 8, 0).is_some() {
                    test::fail(format_args!("{size} bytes out of nothing"));
                }
            }
        });
        common::heaps::verify();

        let all = boot.largest_region();
        let half = all.len / 2;
        let (last, first) = (Region { len: half, ..all }, Region { start: all.start + half, len: all.len - half });
        smp::on_all(|cpu| {
            smp::barrier();
            if cpu == boot.cpu_count() - 1 {
                time::spin(5_000);
                give(first);
            }
            for round in 0..boot.rounds(20) {
                for size in SIZES {
                    let mut block = None;
                    time::wait_for("memory", time::SOON, || {
                        block = Block::new(heap(), size, 64, round as u8);
                        block.is_some()
                    });
                    if let Some(old) = BLOCKS.swap(cpu + round, block) {
                        old.free(heap());
                    }
                }
                if cpu == 0 && round == 3 {
                    give(last);
                }
            }
            test::did(boot.rounds(20) * SIZES.len(), "blocks");
        });
        BLOCKS.free_part(heap(), 0, 1);
        expect_left(0);
    }
}

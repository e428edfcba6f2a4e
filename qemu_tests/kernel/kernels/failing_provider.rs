//! A provider that fails at its k-th call, for one k after the other, once or from then on; and one that does not take
//! pages back.
//!
//! All CPUs work meanwhile. Would catch breaking: a failing provider, at whichever call, gives null and a heap that
//! `verify` finds whole; nothing leaks; runs that the provider refuses to take back are used again.
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
use smp_heap::battery::{Call, Faulty, Random};
use smp_heap::cpu::NeverPreempts;
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::{Boot, arch::cpu_count, kernel, println, smp, test};

heaps! {
    over Faulty<Regions> = Faulty::new(Regions::new());
    Hint<Index>,
    Pinned<NeverPreempts<Index>>,
}

static BLOCKS: [Slots<64>; CPUS] = [const { Slots::new() }; CPUS];

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        give(boot.largest_region());
        let steps = boot.number("steps", 300);
        for (for_ever, name) in [(false, "once"), (true, "from then on")] {
            let map = heap().faults(Call::Map);
            let (mut refused, mut failed) = (0, map.failed());
            for k in 0..boot.rounds(16) {
                map.fail(k, if for_ever { usize::MAX } else { 1 });
                refused += work(steps, k);
                common::heaps::verify();
                clear();
                map.fail(0, 0);
                expect_left(0);
            }
            failed = map.failed() - failed;
            println!("failing {name}: {failed} calls failed, {refused} requests refused");
            assert!(failed > 0, "nothing failed");
            test::did(failed, "failures");
            assert!(refused > 0 || !for_ever, "there was memory although the provider had none to give");
        }
        assert_eq!(work(steps, 1), 0, "requests refused by a provider that works again");
        clear();
        unmaps_are_refused(steps);
        expect_left(0);
    }
}

/// Blocks of all kinds on all CPUs; gives how many there was no memory for.
fn work(steps: usize, seed: usize) -> usize {
    let refused = AtomicUsize::new(0);
    smp::on_all(|cpu| {
        let mut random = Random::new((seed * CPUS + cpu) as u64);
        smp::barrier();
        for step in 0..steps {
            let block = match random.below(32) {
                0 => Block::new(heap(), random.below(600 * 1024), 4096, step as u8),
                _ => Block::new(heap(), random_size(&mut random), 8, step as u8),
            };
            if block.is_none() {
                refused.fetch_add(1, Relaxed);
            }
            if let Some(old) = BLOCKS.get(random.below(CPUS)).and_then(|blocks| blocks.swap(random.below(64), block)) {
                old.free(heap());
            }
        }
    });
    refused.into_inner()
}

fn clear() {
    smp::on_all(|cpu| {
        for blocks in &BLOCKS {
            blocks.free_part(heap(), cpu, cpu_count());
        }
    });
}

/// What cannot be given back stays usable, and goes back when it can.
fn unmaps_are_refused(steps: usize) {
    let (map, unmap) = (heap().faults(Call::Map), heap().faults(Call::Unmap));
    let kept = unmap.failed();
    unmap.fail(0, usize::MAX);
    work(steps, 2);
    clear();
    let held_len = heap().regions().held_len();
    for _ in 0..3 {
        smp::on_all(|_| heap().drain_current());
        heap().trim_all();
        common::heaps::verify();
        assert_eq!(heap().regions().held_len(), held_len, "a refused run is still the heap's");
    }
    let mapped = map.made();
    let size = held_len / 64;
    for _ in 0..16 {
        let block = Block::new(heap(), size, 8, 9);
        assert!(block.is_some() && map.made() == mapped, "refused runs are not used again\n{}", common::heaps::Shown);
        if let Some(block) = block {
            block.free(heap());
        }
    }
    let kept = unmap.failed() - kept;
    println!("{kept} runs not taken back, {} KiB kept and used again", held_len / 1024);
    assert!(kept > 0, "no run was refused");
    test::did(kept, "cached_runs");
    unmap.fail(0, 0);
}

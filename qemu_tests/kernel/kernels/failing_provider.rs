//! A provider that fails at its k-th call, for one k after the other, once or from then on; and one that does not take
//! pages back.
//!
//! All CPUs work meanwhile. Would catch breaking: a failing provider, at whichever call, gives null and a heap that
//! `verify` finds whole; nothing leaks; runs that the provider refuses to take back are used again.
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits")]

mod common;

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering::Relaxed};

use common::block::Block;
use common::heaps::{CPUS, OverRegions, Regions, expect_left, give, heap};
use common::modes::{Index, heaps};
use common::sizes::random_size;
use common::slots::Slots;
use smp_heap::battery::Random;
use smp_heap::cpu::NeverPreempts;
use smp_heap::{Hint, PageProvider, PageRun, Pinned};
use smp_heap_kernel::{Boot, arch::cpu_count, kernel, println, smp, test};

/// Counts down at each `map`: at 0 it fails.
static LEFT: AtomicIsize = AtomicIsize::new(isize::MAX);
/// It goes on failing.
static FOR_EVER: AtomicBool = AtomicBool::new(false);
/// `unmap` says no.
static KEEPS: AtomicBool = AtomicBool::new(false);
static FAILED: AtomicUsize = AtomicUsize::new(0);
static KEPT: AtomicUsize = AtomicUsize::new(0);
static MAPPED: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug)]
struct Failing(Regions);

// SAFETY: runs come from the regions and go back there, or nothing happens.
unsafe impl PageProvider for Failing {
    const PAGE_LEN: usize = Regions::PAGE_LEN;
    const REENTRANT: bool = true;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let left = LEFT.fetch_sub(1, Relaxed);
        if left == 0 || left < 0 && FOR_EVER.load(Relaxed) {
            FAILED.fetch_add(1, Relaxed);
            return None;
        }
        MAPPED.fetch_add(1, Relaxed);
        self.0.map(run)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        if KEEPS.load(Relaxed) {
            KEPT.fetch_add(1, Relaxed);
            return false;
        }
        // SAFETY: the contract is the same, and all runs are the regions'.
        unsafe { self.0.unmap(start, run) }
    }

    fn prefer(&self, run: PageRun) -> PageRun {
        self.0.prefer(run)
    }
}

impl OverRegions for Failing {
    fn regions(&self) -> &Regions {
        &self.0
    }
}

heaps! {
    over Failing = Failing(Regions::new());
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
            FOR_EVER.store(for_ever, Relaxed);
            let (mut refused, mut failed) = (0, 0);
            for k in 0..boot.rounds(16) {
                FAILED.store(0, Relaxed);
                LEFT.store(k as isize, Relaxed);
                refused += work(steps, k);
                failed += FAILED.load(Relaxed);
                common::heaps::verify();
                clear();
                LEFT.store(isize::MAX, Relaxed);
                expect_left(0);
            }
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
    KEEPS.store(true, Relaxed);
    work(steps, 2);
    clear();
    let held_len = heap().regions().held_len();
    for _ in 0..3 {
        smp::on_all(|_| heap().drain_current());
        heap().trim_all();
        common::heaps::verify();
        assert_eq!(heap().regions().held_len(), held_len, "a refused run is still the heap's");
    }
    MAPPED.store(0, Relaxed);
    let size = held_len / 64;
    for _ in 0..16 {
        let block = Block::new(heap(), size, 8, 9);
        assert!(
            block.is_some() && MAPPED.load(Relaxed) == 0,
            "refused runs are not used again\n{}",
            common::heaps::Shown
        );
        if let Some(block) = block {
            block.free(heap());
        }
    }
    println!("{} runs not taken back, {} KiB kept and used again", KEPT.load(Relaxed), held_len / 1024);
    assert!(KEPT.load(Relaxed) > 0, "no run was refused");
    test::did(KEPT.load(Relaxed), "cached_runs");
    KEEPS.store(false, Relaxed);
}

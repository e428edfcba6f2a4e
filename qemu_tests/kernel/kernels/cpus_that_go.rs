//! CPUs go offline, one after the other, and come back; the one that is left has everything they held. Afterwards idle
//! CPUs give memory back in steps.
//!
//! Would catch breaking: `retire_cpu` moves what a CPU holds to the others, whose blocks serve before new pages do; a
//! CPU that comes back is a CPU again; `maintain` on all CPUs at once gives back what was not in use lately, and never
//! what is in use; free neighbours serve longer blocks and are whole again.
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits")]

mod common;

use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::block::Block;
use common::heaps::{Regions, expect_left, give, heap};
use common::modes::{Index, Places, heaps};
use common::slots::Slots;
use smp_heap::cpu::{ByAddr, NeverPreempts, UnknownCpu};
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::{Boot, Region, kernel, println, smp, test};

heaps! {
    over Regions = Regions::new();
    Hint<Index>,
    Pinned<NeverPreempts<Index>>,
    Pinned<ByAddr<NeverPreempts<UnknownCpu>, Places>>,
}

const LEN: usize = 16 << 20;
const SIZE: usize = 192;
const BLOCKS: usize = 24_000;
static KEPT: Slots<BLOCKS> = Slots::new();

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        give(Region { len: LEN, ..boot.largest_region() });
        let count = boot.cpu_count();
        for round in 0..boot.rounds(3) {
            fill(count);
            let held_len = heap().used_len();
            // Half of each CPU's blocks are freed where they came from, so that it holds partial slabs and a full
            // cache.
            smp::on_all(|cpu| (cpu * 2..BLOCKS).step_by(count * 2).for_each(take_out));
            for cpu in 1..count {
                // SAFETY: the CPUs wait for a job, and the last one ended before this.
                let gone = unsafe { heap().retire_cpu(cpu) };
                assert!(gone, "CPU {cpu} was idle");
            }
            common::heaps::verify();
            let mut served = 0;
            for place in 0..BLOCKS / 4 {
                let block = Block::new(heap(), SIZE, 8, place as u8);
                assert!(block.is_some(), "no memory at {place}\n{}", common::heaps::Shown);
                served += usize::from(KEPT.swap(free_place(place, count), block).is_none());
            }
            let grown = heap().used_len().saturating_sub(held_len);
            println!("round {round}: {served} blocks out of what {} CPUs left, {grown} bytes more held", count - 1);
            assert!(grown == 0 && served > BLOCKS / 5, "{grown} bytes more for {served} blocks\n{}", common::heaps::Shown);
            test::did(count - 1, "retired");
            test::did(served, "served");
            longer(count);
            smp::on_all(|cpu| _ = KEPT.free_part(heap(), cpu, count));
            idle(boot);
        }
        expect_left(0);
    }
}

/// Every CPU allocates its part.
fn fill(count: usize) {
    smp::on_all(|cpu| {
        for place in (cpu..BLOCKS).step_by(count) {
            let block = Block::new(heap(), SIZE, 8, place as u8);
            assert!(block.is_some(), "no memory\n{}", common::heaps::Shown);
            KEPT.swap(place, block);
        }
    });
}

fn take_out(place: usize) {
    if let Some(block) = KEPT.swap(place, None) {
        block.free(heap());
    }
}

/// A place that one CPU or another took a block out of.
fn free_place(number: usize, count: usize) -> usize {
    let (turn, cpu) = (number / count, number % count);
    cpu * 2 + turn * count * 2
}

/// Most blocks are freed, in the middle of their slabs, and longer ones are taken until there are no more.
fn longer(count: usize) {
    for place in (0..BLOCKS).filter(|place| place % 16 != 0) {
        take_out(place);
    }
    smp::on_all(|_| heap().drain_current());
    common::heaps::verify();
    let taken = AtomicUsize::new(0);
    smp::on_all(|cpu| {
        smp::barrier();
        for place in (0..BLOCKS).filter(|place| place % 16 != 0).skip(cpu).step_by(count) {
            let Some(block) = Block::new(heap(), 5 * SIZE, 8, place as u8) else { break };
            KEPT.swap(place, Some(block));
            taken.fetch_add(1, Relaxed);
        }
    });
    common::heaps::verify();
    let (len, held_len) = (taken.load(Relaxed) * 5 * SIZE, heap().regions().held_len());
    println!("  {} blocks of {} bytes beside {} of {SIZE}", taken.load(Relaxed), 5 * SIZE, BLOCKS / 16);
    assert!(len > held_len / 2, "{len} of {held_len} bytes\n{}", common::heaps::Shown);
}

/// All CPUs are idle and maintain the heap at once.
fn idle(boot: &Boot) {
    smp::on_all(|_| heap().drain_current());
    common::heaps::verify();
    let before = heap().used_len();
    smp::on_all(|_| {
        smp::barrier();
        (0..20).for_each(|_| _ = heap().maintain());
    });
    common::heaps::verify();
    let after = heap().used_len();
    println!("  {before} bytes used, {after} after a while idle on {} CPUs", boot.cpu_count());
    assert!(after < before || before == 0, "nothing went back\n{}", common::heaps::Shown);
}

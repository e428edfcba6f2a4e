//! Every alignment from 1 byte to 2 MiB against sizes from 1 byte to 4 MiB, on every CPU at once.
//!
//! Would catch breaking: any Layout is served where there is memory, at its alignment and in full length, and comes
//! back; Layouts that can never be served are refused.
#![no_std]
#![no_main]

mod common;

use core::alloc::Layout;

use common::block::Block;
use common::heaps::{CPUS, HeapRef, Regions, expect_left, give};
use common::slots::Slots;
use smp_heap::cpu::{CpuMode, NeverPreempts};
use smp_heap::{CpuHint, Heap, Hint, Pinned, battery};
use smp_heap_kernel::arch::cpu_count;
use smp_heap_kernel::{Boot, cpu, interrupts, kernel, smp, test};

#[derive(Debug)]
struct Index;

impl CpuHint for Index {
    fn current_cpu(&self) -> Option<usize> {
        Some(cpu::index())
    }

    fn may_wait(&self) -> bool {
        interrupts::are_enabled()
    }
}

// SAFETY: this kernel starts no threads, so a CPU runs one task and what interrupts it; each area has its own index.
const PIN: NeverPreempts<Index> = unsafe { NeverPreempts::new(Index) };

static HINTED: Heap<Regions, Hint<Index>, CPUS> = Heap::new(Regions::new(), Hint(Index));
static PINNED: Heap<Regions, Pinned<NeverPreempts<Index>>, CPUS> = Heap::new(Regions::new(), Pinned(PIN));

const MAX_ALIGN: usize = 2 << 20;
const MAX_SIZE: usize = 4 << 20;
/// Up to here every byte is written.
const FULL_SIZE: usize = 16 << 10;

kernel! {
    fn main(boot: &Boot) {
        match boot.arg("mode") {
            Some("hint") => all(boot, &HINTED, &HINTED),
            Some("pinned") => all(boot, &PINNED, &PINNED),
            other => test::fail(format_args!("no such mode: {other:?}")),
        }
    }
}

fn all<C: CpuMode + Sync>(boot: &Boot, heap: &Heap<Regions, C, CPUS>, chosen: HeapRef) {
    common::heaps::set_chosen(chosen);
    give(boot.largest_region());
    for _ in 0..boot.rounds(1) {
        smp::on_all(|cpu| {
            smp::barrier();
            if let Err(failure) = battery::layouts(heap, MAX_ALIGN, FULL_SIZE, false) {
                test::fail(format_args!("{failure}\n{}", common::heaps::Shown));
            }
            large(chosen, cpu);
            never(heap);
        });
        common::heaps::verify();
        test::did(cpu_count(), "batteries");
    }
    expect_left(0);
}

/// The long ones, of which only some words are written, and each is freed by the next CPU.
fn large(heap: HeapRef, cpu: usize) {
    static NEXT: Slots<CPUS> = Slots::new();
    let powers = |most: usize| (0..).map(|bit| 1_usize << bit).take_while(move |power| *power <= most);
    for align in powers(MAX_ALIGN) {
        for power in powers(MAX_SIZE).filter(|power| *power > FULL_SIZE) {
            for size in [power - 1, power, power + 1] {
                let block = Block::new(heap, size, align, 7);
                if block.is_none() {
                    test::fail(format_args!("no {size} bytes at a multiple of {align}\n{}", common::heaps::Shown));
                }
                NEXT.swap(cpu, block).into_iter().for_each(|old| old.free(heap));
                NEXT.swap(cpu + 1, None).into_iter().for_each(|old| old.free(heap));
            }
        }
    }
    smp::barrier();
    NEXT.free_part(heap, cpu, CPUS);
}

/// What no provider has.
fn never<C: CpuMode>(heap: &Heap<Regions, C, CPUS>) {
    const MOST: usize = isize::MAX as usize;
    for (size, align) in [(MOST, 1), (MOST - 4095, 4096), (1, 1 << 62), (1 << 46, 8), (MOST / 2, 1 << 30)] {
        match Layout::from_size_align(size, align) {
            Ok(layout) if heap.alloc(layout).is_ok() => test::fail(format_args!("{layout:?} was served")),
            _ => {}
        }
    }
}

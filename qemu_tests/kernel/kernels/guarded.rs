//! Level 3 of hardening over the page tables that the CPUs run on: one allocation in many on pages of its own, between
//! pages that are not mapped.
//!
//! Would catch breaking: an access behind a guarded block, in front of it or after its free is a page fault on every
//! CPU, and the heap explains which block it is about; while all CPUs allocate and timer interrupts do too, blocks are
//! guarded at about the rate that was set; every frame comes back. Under `-icount` it also tells what that costs in
//! instructions, map, unmap and shootdown included.
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits; addresses have 64 bits")]

mod common;

use core::alloc::Layout;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering::Relaxed};

use common::block::Block;
use common::paging::{Provider, free_frames, shootdowns};
use common::sizes::random_size;
use common::slots::Slots;
use smp_heap::battery::Random;
use smp_heap::cpu::NeverPreempts;
use smp_heap::{CpuHint, FaultKind, Heap, Pinned};
use smp_heap_kernel::arch::cpu_count;
use smp_heap_kernel::{Boot, cpu, fault, interrupts, kernel, println, smp, test, time, timer};

const CPUS: usize = 8;
const PAGE: usize = 4096;
/// Allocations to one that is guarded, where all CPUs allocate.
const EVERY: u32 = 100;

#[derive(Debug)]
struct Index;

impl CpuHint for Index {
    fn current_cpu(&self) -> Option<usize> {
        Some(cpu::index())
    }

    /// Whoever is with the provider may be waiting for this CPU to answer a shootdown.
    fn may_wait(&self) -> bool {
        interrupts::are_enabled()
    }
}

// SAFETY: this kernel starts no threads, so a CPU runs one task and what interrupts it; each area has its own index.
const PIN: NeverPreempts<Index> = unsafe { NeverPreempts::new(Index) };

static HEAP: Heap<Provider<true, false>, Pinned<NeverPreempts<Index>>, CPUS> =
    Heap::new(Provider::new(common::paging::Pages), Pinned(PIN));
static BLOCKS: Slots<256> = Slots::new();
static SEED: AtomicU64 = AtomicU64::new(0);

kernel! {
    fn main(boot: &Boot) {
        common::paging::set_up(boot.largest_region());
        common::paging::open(HEAP.provider(), 0, 8 << 30);
        let all = free_frames();
        // While all CPUs want pages for guarded blocks, who does not get its turn takes from this chunk.
        pair(64);
        if boot.flag("price") {
            price();
        } else {
            faults();
            load(boot);
        }
        rate(0);
        // SAFETY: the other CPUs wait for a job, and no interrupt handler uses the heap.
        if let Err(violation) = unsafe { HEAP.verify_at_rest() } {
            test::fail(format_args!("{violation}"));
        }
        smp::on_all(|_| HEAP.drain_current());
        // SAFETY: as above.
        unsafe { HEAP.trim_at_rest() };
        assert_eq!(HEAP.stats().held_len, 0, "not all of it came back\n{}", HEAP.stats());
        assert_eq!(free_frames(), all, "frames are missing");
    }
}

fn rate(every: u32) {
    assert!(HEAP.set_guard_rate(every).is_ok(), "the provider has guard pages");
    // Until each CPU's countdown has come to its end.
    smp::on_all(|_| (0..5000).for_each(|_| pair(64)));
}

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap_or(Layout::new::<u64>())
}

fn alloc(size: usize) -> NonNull<u8> {
    match HEAP.alloc(layout(size)) {
        Ok(block) => block.cast(),
        Err(_) => test::fail(format_args!("no memory for {size} bytes\n{}", HEAP.stats())),
    }
}

/// # Safety
/// A block of `alloc`, of that size, that nobody uses any more.
unsafe fn free(start: NonNull<u8>, size: usize) {
    // SAFETY: the contract is the same.
    unsafe { HEAP.free(start, layout(size)) };
}

/// A block that is freed at once.
fn pair(size: usize) {
    let start = alloc(size);
    // SAFETY: the block is ours, of that size.
    unsafe { free(start, size) };
}

/// Every CPU reads beside a guarded block of each CPU, and where it was.
fn faults() {
    rate(1);
    for size in [8, 100, 1000, 4096, 9000, 100_000] {
        let start = alloc(size);
        let block = start.addr().get();
        let (first, end) = (block & !(PAGE - 1), (block + size).next_multiple_of(PAGE));
        let on_all = |addr: usize, expected: Option<FaultKind>| {
            smp::on_all(|cpu| {
                let faulted = fault::read(addr).err().map(|fault| fault.address);
                assert_eq!(faulted, expected.map(|_| addr), "CPU {cpu}, {size} bytes at {block:#x}");
                let told = HEAP.explain_fault(addr).map(|fault| (fault.kind, fault.block, fault.size));
                assert_eq!(told, expected.map(|kind| (kind, block, size)), "CPU {cpu}, {addr:#x}");
            });
        };
        on_all(block, None);
        on_all(end - 1, None);
        on_all(end, Some(FaultKind::Behind));
        on_all(first - 1, Some(FaultKind::InFront));
        // SAFETY: the block is ours, of that size.
        unsafe { free(start, size) };
        on_all(block, Some(FaultKind::AfterFree));
        on_all(end - 1, Some(FaultKind::AfterFree));
    }
    test::did(6 * cpu_count(), "faults");
}

/// All CPUs allocate and free what others allocated, and so do timer interrupts.
fn load(boot: &Boot) {
    rate(EVERY);
    let steps = 1600 / cpu_count();
    timer::set_handler(|_| replace());
    let before = shootdowns();
    for _ in 0..boot.rounds(2) {
        smp::on_all(|_| {
            timer::start(2000);
            smp::barrier();
            (0..steps).for_each(|_| replace());
            timer::stop();
            smp::barrier();
        });
    }
    let guarded = shootdowns() - before;
    smp::on_all(|cpu| _ = BLOCKS.free_part(&HEAP, cpu, cpu_count()));
    println!("{guarded} shootdowns in {} steps and what interrupted them", boot.rounds(2) * steps * cpu_count());
    assert!(guarded > 4, "hardly a block was guarded");
    test::did(guarded, "guarded");
}

/// A random block in the place of another one.
fn replace() {
    let seed = SEED.fetch_add(1, Relaxed);
    let mut random = Random::new(seed + 1);
    let block = Block::new(&HEAP, random_size(&mut random), 8, seed as u8);
    if let Some(old) = BLOCKS.swap(random.below(256), block) {
        old.free(&HEAP);
    }
}

/// Instructions of random replacements among 1,000 blocks, by how many are guarded.
fn price() {
    const STEPS: usize = 200_000;
    static PLACES: [AtomicPtr<u8>; 1000] = [const { AtomicPtr::new(null_mut()) }; 1000];
    let size = |place: usize| 8 + 37 * place % 1000;
    let empty = |place: usize, start: *mut u8| {
        // SAFETY: what is in a place is a block of the place's size, and who took it out has it alone.
        NonNull::new(start).into_iter().for_each(|start| unsafe { free(start, size(place)) });
    };
    common::paging::leave_frames_as_they_are();
    for every in [0, 10_000, 1000, 100] {
        rate(every);
        let mut random = Random::new(7);
        let (start, calls) = (time::cycles(), HEAP.stats().map_count);
        for _ in 0..STEPS {
            let place = random.below(PLACES.len());
            let block = alloc(size(place));
            // SAFETY: the block is ours, and long enough.
            unsafe { block.write(1) };
            let old = PLACES.get(place).map_or(null_mut(), |place| place.swap(block.as_ptr(), Relaxed));
            empty(place, old);
        }
        let hundredths = 100 * (time::cycles() - start) / STEPS as u64;
        let guarded = HEAP.stats().map_count - calls;
        println!(
            "one in {every}: {}.{:02} instructions a step, {guarded} blocks guarded",
            hundredths / 100,
            hundredths % 100
        );
        test::did(guarded, "guarded");
        test::did(STEPS, "steps");
    }
    PLACES.iter().enumerate().for_each(|(place, start)| empty(place, start.swap(null_mut(), Relaxed)));
}

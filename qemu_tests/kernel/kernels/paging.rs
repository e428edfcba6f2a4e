//! The paging provider over the page tables that the CPUs run on.
//!
//! Would catch breaking: a run given back is mapped for no CPU any more, whatever its TLB remembers, and a touch of it
//! is a page fault; memory of freed blocks goes back frame by frame, and stays if it is missed; guard pages lie around
//! runs; blocks move by their page-table entries and keep their content; frames that run out, a full window and a
//! mapper that refuses, at whichever call, undo what was begun; everything freed, drained and trimmed, every frame is
//! back, those of page tables included.
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits; addresses have 64 bits")]

mod common;

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};

use common::block::Block;
use common::paging::{Provider, free_frames, shootdowns};
use common::sizes::random_size;
use common::slots::Slots;
use smp_heap::battery::Random;
use smp_heap::cpu::{CpuMode, NeverPreempts};
use smp_heap::{CpuHint, Heap, Hint, Pinned};
use smp_heap_kernel::arch::cpu_count;
use smp_heap_kernel::{Boot, Fault, cpu, fault, interrupts, kernel, println, smp, sync::Once, test, timer};

const CPUS: usize = 8;
const PAGE: usize = 4096;

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

type Paged<C> = Heap<Provider<true, false>, C, CPUS>;

static HINTED: Paged<Hint<Index>> = Heap::new(Provider::new(common::paging::Pages), Hint(Index));
static PINNED: Paged<Pinned<NeverPreempts<Index>>> = Heap::new(Provider::new(common::paging::Pages), Pinned(PIN));
/// With a window that is shorter than the memory.
static NARROW: Paged<Hint<Index>> = Heap::new(Provider::new(common::paging::Pages), Hint(Index));

static BLOCKS: Slots<256> = Slots::new();
static HANDLER_BLOCKS: Slots<16> = Slots::new();
static ON: AtomicBool = AtomicBool::new(false);
static SERVED: AtomicU64 = AtomicU64::new(0);
static INTERRUPTED: Once<&'static (dyn GlobalAlloc + Sync)> = Once::new();

kernel! {
    fn main(boot: &Boot) {
        common::paging::set_up(boot.largest_region());
        match boot.arg("mode") {
            Some("hint") => all(boot, &HINTED),
            Some("pinned") => all(boot, &PINNED),
            other => test::fail(format_args!("no such mode: {other:?}")),
        }
    }
}

fn all<C: CpuMode + Sync>(boot: &Boot, heap: &'static Paged<C>) {
    common::paging::open(heap.provider(), 0, 8 << 30);
    let all = free_frames();
    // SAFETY: once, while the other CPUs wait for a job.
    unsafe { INTERRUPTED.set(heap) };
    println!("{} MiB in frames", (all * PAGE) >> 20);
    for (what, part) in [
        ("load", load::<C> as fn(&Boot, &Paged<C>)),
        ("faults", faults),
        ("exhaustion", exhaustion),
        ("failures", failures),
        ("coming home", coming_home),
    ] {
        let before = shootdowns();
        part(boot, heap);
        expect_all_back(heap, all, what);
        println!("{what}: every frame is back");
        test::did(shootdowns() - before, "shootdowns");
    }
    common::paging::open(NARROW.provider(), 1, 24 << 20);
    let all = free_frames();
    narrow();
    expect_all_back(&NARROW, all, "a narrow window");
}

/// Everything was freed: every frame is free, and every address.
fn expect_all_back<C: CpuMode + Sync>(heap: &Paged<C>, all: usize, what: &str) {
    verify(heap);
    smp::on_all(|_| heap.drain_current());
    // SAFETY: the other CPUs wait for a job, and no interrupt handler uses the heap.
    unsafe { heap.trim_at_rest() };
    verify(heap);
    let provider = heap.provider();
    let (held_len, mapped_len, lost_len) = (heap.stats().held_len, provider.mapped_len(), provider.lost_len());
    assert_eq!((held_len, mapped_len, lost_len), (0, 0, 0), "{what}\n{}", heap.stats());
    assert_eq!(free_frames(), all, "{what}: frames of page tables are missing");
}

fn verify<C: CpuMode>(heap: &Paged<C>) {
    // SAFETY: the other CPUs wait for a job, and no interrupt handler uses the heap.
    if let Err(violation) = unsafe { heap.verify_at_rest() } {
        test::fail(format_args!("{violation}"));
    }
}

/// Memory of which most was freed goes back frame by frame, without a trim; and what comes and goes stays once it was
/// missed.
fn coming_home<C: CpuMode + Sync>(_: &Boot, heap: &Paged<C>) {
    const COUNT: usize = 8 << 10;
    let layout = const { Layout::new::<[u64; 125]>() };
    let table = must_alloc(heap, const { Layout::new::<[*mut u8; COUNT]>() }).cast::<NonNull<u8>>();
    for at in 0..COUNT {
        let block = must_alloc(heap, layout);
        // SAFETY: inside the table.
        let place = unsafe { table.add(at) };
        // SAFETY: as above.
        unsafe { place.write(block) };
    }
    let (peak_len, mut random) = (heap.provider().mapped_len(), Random::new(5));
    for left in (1..=COUNT).rev() {
        // SAFETY: inside the table, and written.
        let [chosen, last] = [random.below(left), left - 1].map(|at| unsafe { table.add(at) });
        // SAFETY: as above.
        let block = unsafe { chosen.read() };
        // SAFETY: as above.
        let moved = unsafe { last.read() };
        // SAFETY: as above; the last block takes the place of the one that goes.
        unsafe { chosen.write(moved) };
        // SAFETY: allocated with this Layout, and in the table no more.
        unsafe { heap.free(block, layout) };
    }
    let mapped_len = heap.provider().mapped_len();
    println!("{mapped_len} of {peak_len} bytes are mapped");
    assert!(mapped_len <= peak_len / 8 + (2 << 20), "{mapped_len} of {peak_len}\n{}", heap.stats());
    assert!(heap.stats().decommit_count > 0, "{}", heap.stats());
    // SAFETY: allocated with this Layout, and used no more.
    unsafe { heap.free(table.cast(), const { Layout::new::<[*mut u8; COUNT]>() }) };
    for (count, size) in [(64, 64 << 10), (1, 2 << 20)] {
        (0..20).for_each(|_| batch(heap, count, size));
        let calls = || heap.stats().map_count + heap.stats().commit_count;
        let before = calls();
        (0..100).for_each(|_| batch(heap, count, size));
        assert!(calls() - before <= 1, "{count} blocks of {size}: {} calls", calls() - before);
    }
}

fn must_alloc<C: CpuMode>(heap: &Paged<C>, layout: Layout) -> NonNull<u8> {
    match heap.alloc(layout) {
        Ok(block) => block.cast(),
        Err(error) => test::fail(format_args!("{layout:?}: {error}")),
    }
}

/// Takes so many blocks, and gives all back.
fn batch<C: CpuMode + Sync>(heap: &Paged<C>, count: usize, size: usize) {
    let Ok(layout) = Layout::from_size_align(size, 8) else { return };
    let mut blocks = [None; 64];
    for place in blocks.iter_mut().take(count) {
        *place = Some(must_alloc(heap, layout));
    }
    for block in blocks.into_iter().flatten() {
        // SAFETY: just allocated with this Layout, and not used.
        unsafe { heap.free(block, layout) };
    }
}

/// All CPUs allocate, free what others allocated, and have long blocks grow, while timer interrupts allocate too.
fn load<C: CpuMode + Sync>(boot: &Boot, heap: &Paged<C>) {
    timer::set_handler(|_| interrupt());
    ON.store(true, Relaxed);
    for round in 0..boot.rounds(if cpu_count() > 2 { 1 } else { 2 }) {
        smp::on_all(|cpu| {
            let mut random = Random::new((round * CPUS + cpu) as u64);
            timer::start(2000);
            smp::barrier();
            for step in 0..200 / cpu_count().max(2) {
                let (place, seed) = (random.below(256), step as u8);
                let block = match random.below(16) {
                    0 => Block::new(heap, random.below(3 << 20), PAGE, seed),
                    1 | 2 => Block::new(heap, random.below(600 << 10), 8, seed),
                    _ => Block::new(heap, random_size(&mut random), 8, seed),
                };
                // Handlers may be at the provider when this asks, but not for long.
                assert!(block.is_some(), "no memory\n{}", heap.stats());
                if let Some(old) = BLOCKS.swap(place, block) {
                    old.free(heap);
                }
                if step % 10 == 0 {
                    grow(heap, &mut random, seed);
                }
            }
            timer::stop();
            smp::barrier();
            ON.store(false, Relaxed);
        });
        ON.store(true, Relaxed);
        verify(heap);
    }
    ON.store(false, Relaxed);
    smp::on_all(|cpu| {
        BLOCKS.free_part(heap, cpu, cpu_count());
        HANDLER_BLOCKS.free_part(heap, cpu, cpu_count());
    });
    println!("handlers had {} blocks", SERVED.load(Relaxed));
    assert!(shootdowns() > 10, "hardly anything was unmapped");
}

/// The heap as collections see it.
fn raw<C: CpuMode + Sync>(heap: &Paged<C>) -> &dyn GlobalAlloc {
    heap
}

/// A block that becomes longer in steps, and shorter again, with its content.
fn grow<C: CpuMode + Sync>(heap: &Paged<C>, random: &mut Random, seed: u8) {
    let mut size = 40 << 10;
    let layout = |size| Layout::from_size_align(size, 8).unwrap_or(Layout::new::<u64>());
    // SAFETY: the size is not 0.
    let mut start = unsafe { raw(heap).alloc(layout(size)) };
    assert!(!start.is_null(), "no memory");
    let write = |start: *mut u8, at: usize| {
        // SAFETY: callers stay inside the block, which is this function's alone.
        unsafe { start.wrapping_add(at).write_volatile(seed ^ at as u8) };
    };
    // SAFETY: as above.
    let read = |start: *mut u8, at: usize| unsafe { start.wrapping_add(at).read_volatile() };
    let mut written = 0;
    for step in 0..12 {
        (written..size).step_by(1021).for_each(|at| write(start, at));
        written = size;
        let new = if step < 9 { size + random.below(size) + 1 } else { size / 3 + 1 };
        // SAFETY: the block is this function's, of that size.
        let grown = unsafe { raw(heap).realloc(start, layout(size), new) };
        assert!(!grown.is_null(), "no memory for {new} bytes\n{}", heap.stats());
        let mut at = 0;
        while at < written.min(new) {
            // The places that were written: each step's begin where the last one ended.
            let is = read(grown, at);
            if at == 0 && is != seed {
                test::fail(format_args!("a block of {size} bytes lost its content on the way to {new}"));
            }
            at += 1021;
        }
        written = written.min(new);
        (start, size) = (grown, new);
    }
    // SAFETY: as above.
    unsafe { raw(heap).dealloc(start, layout(size)) };
}

fn interrupt() {
    let (true, Some(heap)) = (ON.load(Relaxed), INTERRUPTED.get()) else { return };
    assert!(!interrupts::are_enabled());
    let mut random = Random::new(SERVED.load(Relaxed) + 1);
    let block = Block::new(*heap, random_size(&mut random), 8, 0x5a);
    SERVED.fetch_add(u64::from(block.is_some()), Relaxed);
    if let Some(old) = HANDLER_BLOCKS.swap(random.below(16), block) {
        old.free(*heap);
    }
}

/// What every CPU has read, freed, faults on every CPU; so do guard pages, and where a block was before it moved.
fn faults<C: CpuMode + Sync>(_: &Boot, heap: &Paged<C>) {
    let layout = |size| Layout::from_size_align(size, PAGE).unwrap_or(Layout::new::<u64>());
    let on_all = |address: usize, mapped: bool| {
        smp::on_all(|cpu| {
            let read = fault::read(address);
            let right = if mapped { read.is_ok() } else { read == Err(Fault { address }) };
            assert!(right, "CPU {cpu} read {read:x?} at {address:#x}");
        });
    };
    for len in [1 << 20, 5 << 20] {
        // SAFETY: the size is not 0.
        let start = unsafe { raw(heap).alloc(layout(len)) };
        assert!(!start.is_null(), "no memory");
        let places = [0, PAGE + 5, len / 2, len - 1].map(|offset| start.addr() + offset);
        places.iter().for_each(|place| on_all(*place, true));
        on_all(start.addr() - 1, false);
        on_all(start.addr() + len, false);
        // Something in the way, so that it has to move.
        let behind = Block::new(heap, 3 << 20, PAGE, 1);
        // SAFETY: the block is ours, of that size.
        let moved = unsafe { raw(heap).realloc(start, layout(len), 64 << 20) };
        assert!(!moved.is_null() && moved != start, "it did not move");
        places.iter().for_each(|place| on_all(*place, false));
        on_all(moved.addr() + (64 << 20) - 1, true);
        on_all(moved.addr() + (64 << 20), false);
        // SAFETY: the block is ours, of that size.
        let shrunk = unsafe { raw(heap).realloc(moved, layout(64 << 20), 3 << 20) };
        assert_eq!(shrunk, moved, "a shrinking block stays");
        on_all(moved.addr() + (3 << 20) - 1, true);
        on_all(moved.addr() + (64 << 20) - 1, false);
        // SAFETY: as above.
        unsafe { raw(heap).dealloc(shrunk, layout(3 << 20)) };
        behind.into_iter().for_each(|block| block.free(heap));
        // They may be kept, if such blocks were missed before.
        heap.trim(0);
        places.iter().map(|place| place - start.addr() + moved.addr()).for_each(|place| on_all(place, false));
    }
    // A chunk: the block's last use is over, and the heap gives the pages back when it is told to.
    // SAFETY: the size is not 0.
    let start = unsafe { raw(heap).alloc(layout(100 << 10)) };
    on_all(start.addr(), true);
    // SAFETY: the block is ours, of that size.
    unsafe { raw(heap).dealloc(start, layout(100 << 10)) };
    smp::on_all(|_| heap.drain_current());
    // SAFETY: the other CPUs wait for a job, and no interrupt handler uses the heap.
    unsafe { heap.trim_at_rest() };
    on_all(start.addr(), false);
}

/// All CPUs take blocks until there is no frame left, and give them back.
fn exhaustion<C: CpuMode + Sync>(boot: &Boot, heap: &Paged<C>) {
    for (limit, size) in [(2000, 900), (3000, 50_000), (6000, 3 << 20), (1000, 4096)] {
        common::paging::limit_frames(limit);
        let taken = AtomicUsize::new(0);
        smp::on_all(|_| {
            smp::barrier();
            // A chain through the blocks themselves, as there are more than any table here has places.
            let mut last: *mut u8 = core::ptr::null_mut();
            let layout = Layout::from_size_align(size, 8).unwrap_or(Layout::new::<u64>());
            loop {
                // SAFETY: the size is not 0.
                let start = unsafe { raw(heap).alloc(layout) };
                if start.is_null() {
                    break;
                }
                // SAFETY: the block is ours, long enough and aligned.
                unsafe { start.cast::<*mut u8>().write(last) };
                last = start;
                taken.fetch_add(1, Relaxed);
            }
            smp::barrier();
            while !last.is_null() {
                // SAFETY: written above.
                let next = unsafe { last.cast::<*mut u8>().read() };
                // SAFETY: the block is ours, of that Layout.
                unsafe { raw(heap).dealloc(last, layout) };
                last = next;
            }
        });
        let (count, len) = (taken.into_inner(), limit * PAGE);
        println!("{count} of {size} bytes, {} % of the frames", 100 * count * size / len);
        assert!(100 * count * size >= 40 * len, "too few\n{}", heap.stats());
        test::did(count, "blocks");
        smp::on_all(|_| heap.drain_current());
        // SAFETY: the other CPUs wait for a job, and no interrupt handler uses the heap.
        unsafe { heap.trim_at_rest() };
        verify(heap);
    }
    common::paging::limit_frames(usize::MAX);
    _ = boot;
}

/// The mapper refuses its k-th call, for one k after the other, while blocks are allocated, grow and move.
fn failures<C: CpuMode + Sync>(boot: &Boot, heap: &Paged<C>) {
    let all = free_frames();
    let mut refused = 0;
    for call in (1..boot.number("calls", 1200)).step_by(if boot.cpu_count() > 2 { 101 } else { 13 }) {
        common::paging::fail_map(call);
        let mut blocks = [const { None }; 4];
        for (place, size) in blocks.iter_mut().zip([100, 60_000, 2 << 20, 3 << 20]) {
            *place = Block::new(heap, size, 8, call as u8);
        }
        let seed = &mut Random::new(call as u64);
        grow(heap, seed, call as u8);
        refused += u32::from(!common::paging::is_map_failure_due());
        common::paging::fail_map(0);
        blocks.into_iter().flatten().for_each(|block| block.free(heap));
        smp::on_all(|_| heap.drain_current());
        // SAFETY: the other CPUs wait for a job, and no interrupt handler uses the heap.
        unsafe { heap.trim_at_rest() };
        verify(heap);
        assert_eq!(free_frames(), all, "frames are missing after call {call} was refused");
    }
    println!("{refused} calls of the mapper refused");
    assert!(refused > 4, "hardly a call was refused");
    test::did(refused, "refused_maps");
}

/// More memory than addresses.
fn narrow() {
    let heap = &NARROW;
    let mut blocks = [const { None }; 64];
    let mut count = 0;
    for place in &mut blocks {
        *place = Block::new(heap, 1 << 20, PAGE, count);
        if place.is_none() {
            break;
        }
        count += 1;
    }
    println!("{count} MiB in a window of 24 MiB");
    assert!((12..=24).contains(&count), "{count} blocks of 1 MiB in a window of 24 MiB");
    blocks.into_iter().flatten().for_each(|block| block.free(heap));
}

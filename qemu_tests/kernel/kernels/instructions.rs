//! How long each call of the heap is, in instructions, how many of them lock memory, and how long a cache is held at a
//! stretch.
//!
//! Every call is walked through in single steps, so the figures are exact, and the same each time; the driver holds
//! them against a table of budgets for each architecture (`budgets.txt` and those beside it). A call is counted from
//! its first instruction to its return, in a kernel without checks. Under a pin that masks, the stretch in which
//! interrupts are masked is what counts as held. Mode `bare` is a heap whose pin is nothing but the CPU's index: what
//! other pins take more than that is theirs.
//! Would catch: a path that became longer or took a lock unseen; a locked instruction on the pinned fast paths; a hold
//! that grows with the heap or with the number of CPUs.
#![no_std]
#![no_main]

mod common;

use core::alloc::Layout;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use common::block::Block;
use common::heaps::{Regions, expect_left, heap};
use common::modes::{Index, InterruptsMasked, Mode, heaps};
use common::slots::Slots;
use smp_heap::cpu::{CpuPin, NeverPreempts, PreemptionCounter, PreemptionPin};
use smp_heap::{CpuHint, Hint, PageProvider, PageRun, Pinned};
use smp_heap_kernel::step::{self, Next};
use smp_heap_kernel::{Boot, cpu, kernel, println, smp, test};

/// All there is.
const REGION_LIMIT: usize = 1 << 40;

heaps! {
    renewable 8 within REGION_LIMIT over Regions = Regions::new();
    Hint<Index>,
    Pinned<Bare>,
    Pinned<NeverPreempts<Index>>,
    Pinned<PreemptionPin<Counter, Index>>,
    Pinned<InterruptsMasked<Index>>,
}

/// No pin at all.
#[derive(Clone, Copy, Debug)]
struct Bare;

// SAFETY: this kernel has no threads, so a CPU runs one task and what interrupts it and returns; areas have their own
// indices, and before there is one the index is above the heap's CPU count.
unsafe impl CpuPin for Bare {
    type Guard = ();

    fn pin(&self) {}

    fn index(&self, (): &()) -> usize {
        cpu::index()
    }

    fn may_wait(&self) -> bool {
        Index.may_wait()
    }
}

impl Mode for Pinned<Bare> {
    const NAME: &'static str = "bare";
    const NEW: Self = Pinned(Bare);
}

/// Preemption as this kernel's scheduler counts it, on x86-64 with the branch that Linux has behind its subtraction,
/// there taken when a switch became due.
#[derive(Debug)]
enum Counter {}

// SAFETY: this kernel has no threads; the count is changed by one instruction of the CPU it runs on, between compiler
// fences.
unsafe impl PreemptionCounter for Counter {
    #[inline]
    fn disable() {
        cpu::pin();
    }

    #[inline]
    fn enable() {
        #[cfg(target_arch = "x86_64")]
        cpu::unpin_or_fail();
        #[cfg(not(target_arch = "x86_64"))]
        cpu::unpin();
    }
}

impl Mode for Pinned<PreemptionPin<Counter, Index>> {
    const NAME: &'static str = "counted";
    // SAFETY: areas have their own indices, and before there is one the index is above the heap's CPU count.
    const NEW: Self = Pinned(unsafe { PreemptionPin::new(Index) });
}

/// No path holds a cache for more instructions than this, whatever the heap's size and however many CPUs there are: 64
/// blocks are looked up at most, which takes less than 100 each, and return to their slabs to 14 slabs, one more to its
/// own; a slab that goes to the pages takes less than 2,300.
const LONGEST_HOLD: u32 = 64 * 100 + 15 * 2_300;

/// Blocks of each kind.
const COUNT: usize = 500;

/// Blocks that other CPUs allocated.
static OTHERS: Slots<COUNT> = Slots::new();
static MASKS: AtomicBool = AtomicBool::new(false);

/// What one call was, or the most of several.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    instructions: u32,
    locked: u32,
    held: u32,
}

impl Figures {
    fn most(self, other: Self) -> Self {
        Self {
            instructions: self.instructions.max(other.instructions),
            locked: self.locked.max(other.locked),
            held: self.held.max(other.held),
        }
    }

    fn least(self, other: Self) -> Self {
        if other.instructions < self.instructions { other } else { self }
    }

    /// Tells the driver.
    fn report(self, name: &str) {
        println!("MEASURED {} {} {} {name}", self.instructions, self.locked, self.held);
        test::did(1, "measured");
        assert!(self.held <= LONGEST_HOLD, "{name}: a cache was held for {} instructions", self.held);
    }
}

/// The shortest and the longest of several calls.
#[derive(Clone, Copy, Debug)]
struct Range {
    shortest: Figures,
    longest: Figures,
}

impl Range {
    const NONE: Self = Self {
        shortest: Figures { instructions: u32::MAX, locked: 0, held: 0 },
        longest: Figures { instructions: 0, locked: 0, held: 0 },
    };

    fn add(&mut self, figures: Figures) {
        self.shortest = self.shortest.least(figures);
        self.longest = self.longest.most(figures);
    }
}

/// Walks through one call.
fn measure(work: impl FnOnce()) -> Figures {
    let (mut figures, mut stretch) = (Figures::default(), 0);
    let masks = MASKS.load(Relaxed);
    step::through(work, |context, step| {
        figures.instructions += 1;
        figures.locked += u32::from(step.locks);
        let held = if masks { !context.interrupts_are_open() } else { common::renew::is_held() };
        stretch = if held { stretch + 1 } else { 0 };
        figures.held = figures.held.max(stretch);
        Next::Step
    });
    figures
}

fn layout(size: usize) -> Layout {
    match Layout::from_size_align(core::hint::black_box(size), 8) {
        Ok(layout) => layout,
        Err(_) => test::fail(format_args!("{size} bytes cannot be")),
    }
}

/// A measured allocation.
fn alloc(size: usize) -> (NonNull<u8>, Figures) {
    let (layout, mut start) = (layout(size), null_mut());
    let heap = heap();
    // SAFETY: no size here is 0.
    let figures = measure(|| start = unsafe { heap.alloc(layout) });
    let Some(start) = NonNull::new(start) else { test::fail(format_args!("no memory for {size} bytes")) };
    (start, figures)
}

/// A measured free.
fn free(start: NonNull<u8>, size: usize) -> Figures {
    let (layout, heap) = (layout(size), heap());
    // SAFETY: callers pass what `alloc` gave for that size, once.
    measure(|| unsafe { heap.dealloc(start.as_ptr(), layout) })
}

/// Allocates so many, then frees all: the shortest of each are those that find what they want in the cache.
fn cycle(size: usize) -> (Range, Range) {
    let mut blocks = [NonNull::<u8>::dangling(); COUNT];
    let (mut allocs, mut frees) = (Range::NONE, Range::NONE);
    for block in &mut blocks {
        let (start, figures) = alloc(size);
        *block = start;
        allocs.add(figures);
    }
    for block in blocks {
        frees.add(free(block, size));
    }
    (allocs, frees)
}

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        MASKS.store(boot.arg("mode") == Some("masked"), Relaxed);
        common::renew::renew();
        is_exact();
        warm_up();
        for (size, names) in [
            (64, ["alloc 64, hit", "alloc 64, longest", "free 64, hit", "free 64, longest"]),
            (24, ["alloc 24, hit", "alloc 24, longest", "free 24, hit", "free 24, longest"]),
            (1000, ["alloc 1000, hit", "alloc 1000, longest", "free 1000, hit", "free 1000, longest"]),
        ] {
            let (allocs, frees) = cycle(size);
            let figures = [allocs.shortest, allocs.longest, frees.shortest, frees.longest];
            figures.iter().zip(names).for_each(|(figures, name)| figures.report(name));
        }
        large();
        absurd();
        if boot.arg("mode") == Some("hint") {
            holes();
        }
        nested();
        if boot.cpu_count() > 1 {
            remote();
        }
        measure(|| heap().drain_current()).report("drain_current");
        expect_left(0);
        let holds = [
            (MANY / 16, "free of each slab's last block, 5 MiB held"),
            (MANY / 4, "free of each slab's last block, 20 MiB held"),
            (MANY, "free of each slab's last block, 80 MiB held"),
        ];
        // By breakpoints, the last one alone takes twice as long as all else.
        let count = if cfg!(target_arch = "x86_64") { holds.len() } else { holds.len() - 1 };
        for (count, name) in holds.into_iter().take(count) {
            longest_hold(count).report(name);
            expect_left(0);
        }
        let did = common::renew::counts();
        assert!(did.refilled > 0 && did.flushed > 0 && did.maps > 1 && did.unmaps > 0, "paths are left out: {did:?}");
        // The last thing, as the heap is of no use afterwards.
        common::renew::set_aside(64 << 10);
        common::renew::panics();
        println!("in panic mode: alloc 4096 {:?}", alloc(4096).1);
    }
}

/// The instrument, on code that is known.
fn is_exact() {
    let word = 0_u64;
    let known = measure(|| five_instructions(&raw const word));
    let empty = measure(|| ());
    println!("an empty call: {empty:?}; with five instructions, two of them locked: {known:?}");
    assert_eq!(known.locked, 2, "locked instructions are not seen");
    assert!((5..=12).contains(&(known.instructions - empty.instructions)), "instructions are not counted");
    empty.report("an empty call");
}

/// Two of them lock memory: the word, which is changed.
fn five_instructions(word: *const u64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: changes a number of the caller's.
    unsafe {
        core::arch::asm!("nop", "lock inc qword ptr [{0}]", "xchg {1}, {1}", "xchg [{0}], {1}", "nop",
            in(reg) word, inout(reg) 0_u64 => _);
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above. The last one belongs to the second pair.
    unsafe {
        core::arch::asm!(
            "ldaxr {1}, [{0}]", "stlxr {2:w}, {1}, [{0}]", "ldxr {1}, [{0}]", "stxr {2:w}, {1}, [{0}]",
            "cbnz {2:w}, .-8",
            in(reg) word, out(reg) _, out(reg) _);
    }
    #[cfg(target_arch = "riscv64")]
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("nop", "amoadd.d {1}, {1}, ({0})", "lr.d {1}, ({0})", "sc.d {2}, {1}, ({0})", "bnez {2}, .-8",
            in(reg) word, inout(reg) 1_u64 => _, out(reg) _);
    }
}

/// Every CPU uses its cache, and leaves blocks for the others.
fn warm_up() {
    smp::on_all(|cpu| {
        for round in 0..4 {
            let blocks: [_; 100] = core::array::from_fn(|_| Block::new(heap(), 64, 8, round));
            blocks.into_iter().flatten().for_each(|block| block.free(heap()));
        }
        if cpu == 1 {
            for place in 0..COUNT {
                OTHERS.swap(place, Block::new(heap(), 24, 8, 1));
            }
        }
    });
}

fn large() {
    let mut ranges = [Range::NONE; 3];
    let (mut in_place, mut fillers) = (0, [None; 8]);
    // As often as 8 times where the pages behind a block are free; a hole between slabs that is as long as the block is
    // filled.
    for round in 0..16 {
        let (start, figures) = alloc(40_000);
        let (heap, old) = (heap(), layout(40_000));
        let mut new = null_mut();
        // SAFETY: just allocated with this Layout.
        let grown = measure(|| new = unsafe { heap.realloc(start.as_ptr(), old, 60_000) });
        let Some(block) = NonNull::new(new) else { test::fail(format_args!("no memory for 60000 bytes")) };
        let freed = free(block, 60_000);
        if block == start && in_place < 8 {
            in_place += 1;
            ranges.iter_mut().zip([figures, grown, freed]).for_each(|(range, figures)| range.add(figures));
        } else if let Some(filler) = fillers.get_mut(round) {
            *filler = Some(alloc(40_000).0);
        }
    }
    fillers.into_iter().flatten().for_each(|filler| _ = free(filler, 40_000));
    assert_eq!(in_place, 8, "blocks that grew where they are");
    let names = ["alloc 40000", "realloc 40000 to 60000 in place", "free 60000"];
    ranges.iter().zip(names).for_each(|(range, name)| range.longest.report(name));

    // Of one length again and again.
    let mut pairs = [Range::NONE; 2];
    for _ in 0..8 {
        let (start, figures) = alloc(40_000);
        pairs[0].add(figures);
        pairs[1].add(free(start, 40_000));
    }
    pairs.iter().zip(["alloc 40000, hit", "free 40000, hit"]).for_each(|(range, name)| range.shortest.report(name));
}

/// More than the provider could ever give, from the second time on.
fn absurd() {
    let (layout, heap) = (layout(1 << 45), heap());
    let mut refused = Figures::default();
    for _ in 0..2 {
        let mut start = null_mut();
        // SAFETY: the size is not 0.
        refused = measure(|| start = unsafe { heap.alloc(layout) });
        assert!(start.is_null(), "more than the address space of the kernel");
    }
    refused.report("alloc 1 << 45, refused");
}

/// The region provider's search, past every hole of one region and of one four times as long, all of them too short: a
/// few, and as many as there are if the heap takes the shortest runs.
fn holes() {
    const REGION_LEN: usize = 256 << 10;
    let names = [
        (8 << 10, ["map past 16 holes", "unmap behind 16 holes", "map past 16 holes in each of 4 regions"]),
        (1 << 10, ["map past 128 holes", "unmap behind 128 holes", "map past 128 holes in each of 4 regions"]),
    ];
    for (len, [past_one, behind_one, past_four]) in names {
        let blocks = [(); 4].map(|()| alloc(REGION_LEN).0);
        let last = with_holes(&blocks[..1], REGION_LEN, len, past_one);
        last.report(behind_one);
        with_holes(&blocks, REGION_LEN, len, past_four);
        for block in blocks {
            free(block, REGION_LEN);
        }
    }
}

/// Cuts regions into runs of that length, every other one a hole, and reports a search for a run that is longer; gives
/// what it takes to free the last run.
fn with_holes(blocks: &[NonNull<u8>], region_len: usize, len: usize, name: &str) -> Figures {
    let run_of = |len| match PageRun::new(len, 1, Regions::PAGE_LEN) {
        Some(run) => run,
        None => test::fail(format_args!("no run of {len} bytes")),
    };
    let (regions, run, longer) = (Regions::new(), run_of(len), run_of(2 * len));
    for block in blocks {
        // SAFETY: the block is the caller's, and outlives the provider's use.
        let added = unsafe { regions.add_region(block.as_ptr(), region_len) };
        added.unwrap_or_else(|error| test::fail(format_args!("{error}")));
    }
    while regions.map(run).is_some() {}
    let unmap = |block: NonNull<u8>, place: usize| {
        // SAFETY: inside of the block.
        let start = unsafe { block.add(place * len) };
        // SAFETY: the runs lie side by side, and each is unmapped once.
        unsafe { regions.unmap(start, run) }
    };
    let count = region_len / len;
    for block in blocks {
        assert!((0..count).step_by(2).all(|place| unmap(*block, place)), "runs do not lie side by side");
    }
    let mut found = None;
    measure(|| found = regions.map(longer)).report(name);
    assert!(found.is_none(), "a hole that is long enough");
    measure(|| assert!(blocks.iter().take(1).all(|block| unmap(*block, count - 1)), "the last run is not out"))
}

/// A call interrupts another one that holds the cache.
fn nested() {
    for (size, names) in
        [(64, ["alloc 64, nested", "free 64, nested"]), (40_000, ["alloc 40000, nested", "free 40000, nested"])]
    {
        let mut figures = [Figures::default(); 2];
        let (layout, heap) = (layout(64), heap());
        let mut outer = null_mut();
        let mut done = false;
        step::through(
            // SAFETY: the size is not 0.
            || outer = unsafe { heap.alloc(layout) },
            |_, _| {
                if !done && common::renew::is_held() {
                    done = true;
                    let (start, alloc) = alloc(size);
                    figures = [alloc, free(start, size)];
                }
                Next::Step
            },
        );
        // SAFETY: just allocated with this Layout.
        unsafe { heap.dealloc(outer, layout) };
        // Whoever interrupts finds the cache held all the time: that is not its doing.
        assert!(done, "a call that never holds its cache");
        for (figures, name) in figures.iter().zip(names) {
            Figures { held: 0, ..*figures }.report(name);
        }
    }
}

/// Tiny blocks of another CPU's slabs.
fn remote() {
    let mut frees = Range::NONE;
    for place in 0..COUNT {
        if let Some(block) = OTHERS.swap(place, None) {
            block.check();
            frees.add(free(block.into_start().cast(), 24));
        }
    }
    frees.shortest.report("free 24 of another CPU, shortest");
    frees.longest.report("free 24 of another CPU, longest");
}

/// Blocks of each size that [`longest_hold`] begins with, at most.
const MANY: usize = 160_000;

/// Lists as long as they get, each of their blocks the last one of its slab: sent home, every block retires one. Of two
/// sizes in turn, so that one class's list returns to its slab and another's has to give way.
fn longest_hold(count: usize) -> Figures {
    static BLOCKS: [Slots<MANY>; 2] = [const { Slots::new() }; 2];
    let sizes = [256, 248];
    for (blocks, size) in BLOCKS.iter().zip(sizes) {
        for place in 0..count {
            blocks.swap(place, Block::new(heap(), size, 8, 2));
        }
    }
    // All but every 64th, of which there is one in each slab; then those, so that list after list is of last blocks.
    for blocks in &BLOCKS {
        let most = (0..count).filter(|place| place % 64 != 0).filter_map(|place| blocks.swap(place, None));
        most.for_each(|block| block.free(heap()));
    }
    let mut longest = Figures::default();
    for place in (0..count).step_by(64) {
        for (blocks, size) in BLOCKS.iter().zip(sizes) {
            if let Some(block) = blocks.swap(place, None) {
                block.check();
                longest = longest.most(free(block.into_start().cast(), size));
            }
        }
    }
    assert!(BLOCKS.iter().all(|blocks| blocks.free_part(heap(), 0, 1) == 0), "blocks are left");
    longest
}

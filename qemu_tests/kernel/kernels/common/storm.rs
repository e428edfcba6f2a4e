//! Tasks that allocate and free on every CPU while something interrupts them that does the same.
//!
//! Each CPU has places for blocks that its task and its handlers use alike, so what one of them allocated most often
//! another frees. A flag says when the task is inside the heap; a handler that finds it set interrupted the heap
//! itself.

use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, compiler_fence};

use smp_heap::battery::Random;
use smp_heap_kernel::{cpu, println, test, time};

use super::block::Block;
use super::heaps::{CPUS, HeapRef, heap};
use super::sizes::random_size;
use super::slots::Slots;

/// What a handler does each time.
const OPERATIONS: usize = 3;
/// The heap works on this many blocks of each CPU.
const PLACES: usize = 64;
/// Requests of one CPU's handlers that are judged together.
const WINDOW: u64 = 48;

struct Cpu {
    inside: AtomicBool,
    blocks: Slots<PLACES>,
    seed: AtomicU64,
    interrupts: [AtomicU64; 2],
    allocs: [AtomicU64; 2],
    refused: [AtomicU64; 2],
    /// Requests since the last window was full, and how many of them were refused.
    window: [AtomicU64; 2],
    /// Windows, by how many in a hundred were refused.
    windows: [AtomicU64; 101],
}

impl Cpu {
    const fn new() -> Self {
        Self {
            inside: AtomicBool::new(false),
            blocks: Slots::new(),
            seed: AtomicU64::new(0),
            interrupts: [const { AtomicU64::new(0) }; 2],
            allocs: [const { AtomicU64::new(0) }; 2],
            refused: [const { AtomicU64::new(0) }; 2],
            window: [const { AtomicU64::new(0) }; 2],
            windows: [const { AtomicU64::new(0) }; 101],
        }
    }

    /// Counts a handler's requests, of which so many were refused.
    fn note(&self, refused: u64) {
        let [all, bad] = &self.window;
        let refused = bad.fetch_add(refused, Relaxed) + refused;
        if all.fetch_add(OPERATIONS as u64, Relaxed) + OPERATIONS as u64 >= WINDOW {
            let all = all.swap(0, Relaxed).max(1);
            bad.store(0, Relaxed);
            let share = usize::try_from(100 * refused / all).unwrap_or(100).min(100);
            self.windows.get(share).inspect(|windows| _ = windows.fetch_add(1, Relaxed));
        }
    }
}

static STATE: [Cpu; CPUS] = [const { Cpu::new() }; CPUS];
static ON: AtomicBool = AtomicBool::new(false);

fn state() -> &'static Cpu {
    match STATE.get(cpu::index()) {
        Some(cpu) => cpu,
        None => test::fail(format_args!("CPU {} takes part in a storm", cpu::index())),
    }
}

/// Handlers work from now on. The heap has its first pages by then, as when a kernel lets its other CPUs run: before, a
/// handler that comes while somebody fetches them finds nothing, by right, and on a starved host that lasts for
/// hundreds of interrupts.
pub(crate) fn begin() {
    match Block::new(heap(), 8, 8, 0) {
        Some(first) => first.free(heap()),
        None => test::fail(format_args!("no memory before the storm")),
    }
    ON.store(true, Relaxed);
}

/// Handlers work no more.
pub(crate) fn end() {
    ON.store(false, Relaxed);
}

/// The heap as the task uses it: whoever interrupts a call can tell.
struct Watched(HeapRef);

impl Watched {
    fn inside<T>(&self, call: impl FnOnce(HeapRef) -> T) -> T {
        let cpu = state();
        cpu.inside.store(true, Relaxed);
        compiler_fence(core::sync::atomic::Ordering::SeqCst);
        let result = call(self.0);
        compiler_fence(core::sync::atomic::Ordering::SeqCst);
        cpu.inside.store(false, Relaxed);
        result
    }
}

// SAFETY: all of it is the heap's doing.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the contract is the same.
        self.inside(|heap| unsafe { heap.alloc(layout) })
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the contract is the same.
        self.inside(|heap| unsafe { heap.dealloc(start, layout) });
    }
}

/// [`try_work`], where there is memory for every block.
#[allow(dead_code, clippy::allow_attributes, reason = "not where tasks are preempted")]
pub(crate) fn work(steps: usize) {
    if try_work(steps) > 0 {
        test::fail(format_args!("a request was refused\n{}", super::heaps::Shown));
    }
}

/// The task: so many blocks, each left in a place and what was there freed. Gives the number of requests that were
/// refused.
pub(crate) fn try_work(steps: usize) -> usize {
    let (cpu, heap) = (state(), Watched(heap()));
    let mut random = Random::new(time::cycles() + cpu::index() as u64);
    let mut refused = 0;
    for step in 0..steps {
        let block = Block::new(&heap, random_size(&mut random), 8, step as u8);
        refused += usize::from(block.is_none());
        if let Some(old) = cpu.blocks.swap(random.below(PLACES), block) {
            old.free(&heap);
        }
    }
    refused
}

/// The handler: allocates and frees as the task does.
pub(crate) fn strike() {
    if !ON.load(Relaxed) {
        return;
    }
    let (cpu, heap) = (state(), heap());
    let nested = usize::from(cpu.inside.load(Relaxed));
    let count = |counters: &[AtomicU64; 2]| counters.get(nested).map(|counter| counter.fetch_add(1, Relaxed));
    count(&cpu.interrupts);
    let mut random = Random::new(cpu.seed.fetch_add(1, Relaxed) + 1);
    let mut refused = 0;
    for _ in 0..OPERATIONS {
        let block = Block::new(heap, random_size(&mut random), 8, 0xa5);
        count(&cpu.allocs);
        if block.is_none() {
            count(&cpu.refused);
            refused += 1;
        }
        if let Some(old) = cpu.blocks.swap(random.below(PLACES), block) {
            old.free(heap);
        }
    }
    cpu.note(refused);
}

/// Frees what is left, tells what happened and judges it: three quarters of the time at most `most_refused` in a
/// hundred of the handlers' requests were refused, and of the interrupts at least `least_inside` in a hundred came
/// while the CPU was inside the heap.
///
/// Some are refused by right: page runs, and now and then a block, while the host has stopped a virtual CPU that holds
/// the locks of provider and pages. That is nearly all of them for a while, and none at other times: hence the windows.
/// A heap that does not serve nested callers refuses several times ten in a hundred all the time.
pub(crate) fn judge(least_inside: u64, most_refused: usize) {
    for cpu in &STATE {
        cpu.blocks.free_part(heap(), 0, 1);
    }
    let sum = |of: fn(&Cpu) -> &[AtomicU64; 2]| {
        let total =
            |kind: usize| STATE.iter().filter_map(|cpu| of(cpu).get(kind)).map(|n| n.load(Relaxed)).sum::<u64>();
        (total(0), total(1))
    };
    let (outside, inside) = sum(|cpu| &cpu.interrupts);
    let (allocs, nested_allocs) = sum(|cpu| &cpu.allocs);
    let (refused, nested_refused) = sum(|cpu| &cpu.refused);
    test::did(outside + inside, "interrupts");
    test::did(inside, "interrupts_inside");
    test::did(allocs + nested_allocs, "nested_requests");
    println!("refused: {refused} of {allocs} requests outside, {nested_refused} of {nested_allocs} inside");
    assert!(outside + inside > 50, "that was no storm");
    assert!(100 * inside >= least_inside * (outside + inside), "too few interrupts came inside the heap");
    let windows = |shares: core::ops::RangeInclusive<usize>| -> u64 {
        let of =
            |cpu: &Cpu| cpu.windows.get(shares.clone()).into_iter().flatten().map(|n| n.load(Relaxed)).sum::<u64>();
        STATE.iter().map(of).sum()
    };
    let (all, bad) = (windows(0..=100), windows(most_refused + 1..=100));
    println!("more than {most_refused} in a hundred were refused in {bad} of {all} windows of {WINDOW} requests");
    assert!(all > 0 && 4 * bad <= all, "too many requests of handlers were refused");
}

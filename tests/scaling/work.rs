//! What the CPUs do, and what it may cost.

use core::alloc::{GlobalAlloc, Layout};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use smp_heap::battery::Random;
use smp_heap::cpu::NeverPreempts;
use smp_heap::{CpuHint, Heap, Hint, Pinned, RegionProvider, simulated};

use crate::machine::{self, Counts};

const MOST_CPUS: usize = 64;
const CPU_COUNTS: [usize; 7] = [1, 2, 4, 8, 16, 32, MOST_CPUS];
/// What each CPU does before it is measured, and while it is.
const STEPS: usize = 500;
/// Memory for each CPU.
const SHARE_LEN: usize = 8 << 20;
const REGION_ALIGN: usize = 2 << 20;

/// What the most CPUs may cost, to what the fewest do that can be compared, and what may come on top for each
/// operation.
const MOST_GROWTH: f64 = 1.5;
const SLACK: f64 = 0.05;

struct ThisCpu;

impl CpuHint for ThisCpu {
    fn current_cpu(&self) -> Option<usize> {
        machine::cpu()
    }
}

type Heaps<C> = Heap<RegionProvider<1>, C, MOST_CPUS>;

/// A heap as the work sees it.
trait AnyHeap: GlobalAlloc + Sync {
    fn provider(&self) -> &RegionProvider<1>;
    fn drain_current(&self);
    fn trim_and_verify(&self);
}

impl<C: smp_heap::cpu::CpuMode + Sync> AnyHeap for Heaps<C> {
    fn provider(&self) -> &RegionProvider<1> {
        self.provider()
    }

    fn drain_current(&self) {
        self.drain_current();
    }

    fn trim_and_verify(&self) {
        // SAFETY: called between runs, when no simulated CPU is at work.
        unsafe { self.trim_at_rest() };
        // SAFETY: as above.
        unsafe { self.verify_at_rest() }.unwrap();
    }
}

type Boxed = Box<dyn AnyHeap>;

/// A way to know the CPU, and a heap that does.
type Mode = (&'static str, fn() -> Boxed);

const MODES: [Mode; 2] = [
    ("pinned", || {
        // SAFETY: a thread of the simulation is one CPU and is never interrupted by another user of that CPU's cache.
        let pin = unsafe { NeverPreempts::new(ThisCpu) };
        Box::new(Heaps::new(RegionProvider::new(), Pinned(pin)))
    }),
    ("hint", || Box::new(Heaps::new(RegionProvider::new(), Hint(ThisCpu)))),
];

/// A block, owned. Dropped, it is leaked.
struct Owned {
    start: *mut u8,
    layout: Layout,
}

// SAFETY: a block belongs to whoever has it.
unsafe impl Send for Owned {}

/// One CPU at work.
struct Worker<'a> {
    cpu: usize,
    cpus: usize,
    heap: &'a dyn AnyHeap,
    /// For each CPU, what others left for it.
    boxes: &'a [Mutex<Vec<Owned>>],
    random: Random,
    blocks: Vec<Owned>,
    ops: u64,
}

impl Worker<'_> {
    fn alloc(&mut self, size: usize) -> Owned {
        let layout = Layout::from_size_align(size, 8).unwrap();
        // SAFETY: the size is not 0.
        let start = unsafe { self.heap.alloc(layout) };
        assert!(!start.is_null(), "no memory for {size} bytes");
        self.ops += 1;
        machine::touch(start);
        Owned { start, layout }
    }

    fn free(&mut self, block: Owned) {
        machine::touch(block.start);
        // SAFETY: the block is owned, from this heap, of that Layout.
        unsafe { self.heap.dealloc(block.start, block.layout) };
        self.ops += 1;
    }

    /// Another block in the place of one of the own `live` ones.
    fn replace(&mut self, live: usize, size: usize) {
        let block = self.alloc(size);
        if self.blocks.len() < live {
            return self.blocks.push(block);
        }
        let place = self.random.below(live);
        let old = core::mem::replace(&mut self.blocks[place], block);
        self.free(old);
    }

    fn usual_size(&mut self) -> usize {
        [16, 24, 48, 64, 100, 200, 512, 1000][self.random.below(8)]
    }

    /// A block for that CPU, and whatever is there for the own one is freed.
    fn send_to(&mut self, cpu: usize, size: usize) {
        let block = self.alloc(size);
        self.boxes[cpu].lock().unwrap().push(block);
        let here = core::mem::take(&mut *self.boxes[self.cpu].lock().unwrap());
        here.into_iter().for_each(|block| self.free(block));
    }
}

/// Something that CPUs do, and a step of it. What they share is compared from the number of CPUs on at which nearly all
/// of it comes from another one.
struct Work {
    name: &'static str,
    least_cpus: usize,
    step: fn(&mut Worker<'_>),
}

const WORK: [Work; 5] = [
    Work {
        name: "own blocks",
        least_cpus: 1,
        step: |worker| {
            let size = worker.usual_size();
            worker.replace(500, size);
        },
    },
    Work {
        name: "batches",
        least_cpus: 1,
        step: |worker| {
            let size = worker.usual_size();
            let batch: Vec<_> = (0..5 + worker.random.below(20)).map(|_| worker.alloc(size)).collect();
            batch.into_iter().for_each(|block| worker.free(block));
        },
    },
    Work {
        name: "to the next CPU",
        least_cpus: 8,
        step: |worker| {
            let size = worker.usual_size();
            worker.send_to((worker.cpu + 1) % worker.cpus, size);
        },
    },
    Work {
        name: "to any CPU",
        least_cpus: 8,
        step: |worker| {
            let (size, cpu) = (worker.usual_size(), worker.random.below(worker.cpus));
            worker.send_to(cpu, size);
        },
    },
    Work {
        name: "page runs",
        least_cpus: 8,
        step: |worker| {
            let size = 40_000 + worker.random.below(200_000);
            worker.replace(8, size);
        },
    },
];

/// Costs of one operation.
#[derive(Clone, Copy)]
struct Costs([f64; 4]);

const COSTS: [&str; 4] = ["locked", "lock tries", "lines moved", "waits"];

fn cost(new_heap: fn() -> Boxed, work: &Work, cpus: usize) -> Costs {
    let heap = new_heap();
    let layout = Layout::from_size_align(SHARE_LEN * cpus.max(2), REGION_ALIGN).unwrap();
    // SAFETY: the size is not 0.
    let region = unsafe { std::alloc::alloc(layout) };
    // SAFETY: just allocated, that long, and nobody else's until it goes below.
    unsafe { heap.provider().add_region(region, layout.size()) }.unwrap();
    let boxes: Vec<_> = (0..cpus).map(|_| Mutex::new(Vec::new())).collect();
    let ops = AtomicU64::new(0);
    let counts = machine::run(cpus, |cpu| {
        let random = Random::new(cpu as u64 + 1);
        let mut worker = Worker { cpu, cpus, heap: &*heap, boxes: &boxes, random, blocks: Vec::new(), ops: 0 };
        (0..STEPS).for_each(|_| (work.step)(&mut worker));
        machine::measure();
        let before = worker.ops;
        (0..STEPS).for_each(|_| (work.step)(&mut worker));
        machine::stop();
        ops.fetch_add(worker.ops - before, Ordering::Relaxed);
        core::mem::take(&mut worker.blocks).into_iter().for_each(|block| worker.free(block));
        heap.drain_current();
    });
    // What nobody took.
    for block in boxes.iter().flat_map(|left| core::mem::take(&mut *left.lock().unwrap())) {
        // SAFETY: the block is owned, from this heap, of that Layout.
        unsafe { heap.dealloc(block.start, block.layout) };
    }
    machine::run(cpus, |_| heap.drain_current());
    heap.trim_and_verify();
    assert_eq!(heap.provider().held_len(), 0, "{}: everything comes back", work.name);
    drop(heap);
    // SAFETY: allocated above with this layout; the heap, which used it, is gone.
    unsafe { std::alloc::dealloc(region, layout) };
    let Counts { updates, tries, transfers, waits } = counts;
    let ops = ops.into_inner() as f64;
    Costs([updates, tries, transfers, waits].map(|count| count as f64 / ops))
}

/// Counts everything, prints it, and says whether nothing grows.
pub(crate) fn run() -> ExitCode {
    simulated::observe_with(machine::observe);
    let mut grown = Vec::new();
    let columns: String = CPU_COUNTS.iter().map(|cpus| format!(" {cpus} |")).collect();
    println!("| for each operation, on so many CPUs | |{columns}\n|---|---|{}", "---:|".repeat(CPU_COUNTS.len()));
    for (mode, new_heap) in MODES {
        for work in &WORK {
            let costs = CPU_COUNTS.map(|cpus| cost(new_heap, work, cpus));
            for (index, what) in COSTS.iter().enumerate() {
                let of = |costs: &Costs| costs.0[index];
                let row: String = costs.iter().map(|costs| format!(" {:.3} |", of(costs))).collect();
                println!("| {mode}, {} | {what} |{row}", work.name);
                let least =
                    CPU_COUNTS.iter().position(|cpus| *cpus >= work.least_cpus).map_or(0.0, |at| of(&costs[at]));
                let most = of(&costs[CPU_COUNTS.len() - 1]);
                if most > MOST_GROWTH * least + SLACK {
                    grown.push(format!("{mode}, {}: {what} {least:.3} -> {most:.3}", work.name));
                }
            }
        }
    }
    if grown.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("these grow with the CPUs:\n{}", grown.join("\n"));
    ExitCode::FAILURE
}

//! What the threads of a cell do. Each workload is modelled on a published one; its parameters are constants here, so
//! that a row means the same in every run.

mod growth;
mod local;
mod long;
mod shared;
mod traces;

use std::ptr;

use crate::peers::Calls;

/// One thread's part of a workload.
pub trait Work: Send {
    /// Takes what is in use from the start.
    fn prepare(&mut self, calls: &Calls) {
        let _ = calls;
    }

    /// Some hundred operations; how many.
    fn round(&mut self, calls: &Calls) -> u64;

    /// Bytes in use, as asked for; asked when all threads have stopped. What is between threads counts for one of them.
    fn live_len(&self) -> usize {
        0
    }

    /// Gives everything back that is in use between rounds.
    fn clear(&mut self, calls: &Calls) {
        let _ = calls;
    }
}

/// The parts of a cell's threads.
pub struct Plan {
    pub works: Vec<Box<dyn Work>>,
    /// Wakes threads that wait for others, because none shall go on.
    pub close: Box<dyn Fn()>,
}

/// One row, for any number of threads.
#[derive(Clone, Copy)]
pub struct Workload {
    pub name: &'static str,
    /// What an operation is, and whom it is modelled on.
    pub about: &'static str,
    pub group: Group,
    pub plan: fn(usize) -> Plan,
    /// Blocks move from thread to thread and never back: a column that never shares would only ever take new memory.
    pub shares: bool,
    /// Whether memory held over live says something.
    pub holds: bool,
}

/// Rows that are judged together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// Small blocks, freed by the thread that took them.
    Local,
    /// Sizes that change.
    Phases,
    /// Blocks freed by another thread.
    Remote,
    /// Neighbours in a cache line.
    FalseSharing,
    /// Blocks that grow.
    Realloc,
    /// Blocks of many pages.
    Large,
    /// What a kernel did.
    Traces,
    /// More in use, or longer heaps; not among all rows.
    Growth,
}

impl Group {
    /// In words.
    pub fn title(self) -> &'static str {
        match self {
            Self::Local => "small, local",
            Self::Phases => "changing sizes",
            Self::Remote => "freed by others",
            Self::FalseSharing => "false sharing",
            Self::Realloc => "realloc",
            Self::Large => "large",
            Self::Traces => "recorded traces",
            Self::Growth => "growth",
        }
    }
}

/// All rows.
pub fn all() -> Vec<Workload> {
    let mut all = Vec::new();
    all.extend(local::WORKLOADS);
    all.extend(shared::WORKLOADS);
    all.extend(long::WORKLOADS);
    all.extend(traces::WORKLOADS);
    all.extend(growth::WORKLOADS);
    all
}

/// A plan whose threads have nothing to do with each other.
fn apart<W: Work + 'static>(threads: usize, work: impl Fn(u64) -> W) -> Plan {
    let works = (1..=threads as u64).map(|seed| Box::new(work(seed)) as Box<dyn Work>).collect();
    Plan { works, close: Box::new(|| ()) }
}

/// A block in use, or none.
#[derive(Clone, Copy, Debug)]
struct Slot {
    start: *mut u8,
    size: usize,
}

// SAFETY: a block may be used and freed by any thread; who has the slot has the block.
unsafe impl Send for Slot {}

impl Slot {
    const EMPTY: Self = Self { start: ptr::null_mut(), size: 0 };

    fn is_empty(&self) -> bool {
        self.start.is_null()
    }

    #[inline(always)]
    fn take(calls: &Calls, size: usize) -> Self {
        Self { start: crate::block::take(calls, size), size }
    }

    #[inline(always)]
    fn give(self, calls: &Calls) {
        crate::block::give(calls, self.start, self.size);
    }

    fn give_if_any(&mut self, calls: &Calls) {
        if !self.is_empty() {
            self.give(calls);
            *self = Self::EMPTY;
        }
    }
}

/// Empty slots whose own memory is in place, so that a cell does not count it.
fn slots(count: usize) -> Box<[Slot]> {
    let mut slots = vec![Slot { start: ptr::dangling_mut(), size: 1 }; count];
    slots.fill(Slot::EMPTY);
    slots.into_boxed_slice()
}

fn live_len(slots: &[Slot]) -> usize {
    slots.iter().map(|slot| slot.size).sum()
}

fn give_all(slots: &mut [Slot], calls: &Calls) {
    for slot in slots {
        slot.give_if_any(calls);
    }
}

/// How many sizes are drawn ahead.
const SIZE_COUNT: usize = 4096;

/// Sizes drawn ahead, so that the clock does not see the drawing.
pub(crate) struct Sizes {
    sizes: Box<[u32]>,
    next: usize,
}

impl Sizes {
    pub(crate) fn new(seed: u64, draw: impl Fn(&mut fastrand::Rng) -> usize) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        Self { sizes: (0..SIZE_COUNT).map(|_| draw(&mut random) as u32).collect(), next: 0 }
    }

    #[inline(always)]
    pub(crate) fn next(&mut self) -> usize {
        self.next = (self.next + 1) % SIZE_COUNT;
        self.sizes[self.next] as usize
    }
}

/// Evenly on a logarithmic scale.
pub(crate) fn log_uniform(random: &mut fastrand::Rng, from: usize, to: usize) -> usize {
    let (from, to) = ((from as f64).ln(), (to as f64).ln());
    (from + (to - from) * random.f64()).exp().round() as usize
}

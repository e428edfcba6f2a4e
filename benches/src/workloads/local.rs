//! Small blocks that are freed by the thread that took them.

use super::{Group, Plan, Sizes, Slot, Work, Workload, apart, give_all, live_len, log_uniform, slots};
use crate::block::{give, take};
use crate::peers::Calls;

/// Operations in a round of the plain loops.
const ROUND: usize = 1024;

/// A block is taken and given back at once.
struct Pair<const SIZE: usize>;

impl<const SIZE: usize> Work for Pair<SIZE> {
    fn round(&mut self, calls: &Calls) -> u64 {
        for _ in 0..ROUND {
            let start = take(calls, SIZE);
            give(calls, start, SIZE);
        }
        ROUND as u64
    }
}

/// Blocks in a batch.
const BATCH: usize = 256;

/// A batch is taken, then given back, last block first.
struct Lifo<const SIZE: usize>(Box<[Slot]>);

impl<const SIZE: usize> Work for Lifo<SIZE> {
    fn round(&mut self, calls: &Calls) -> u64 {
        for slot in &mut self.0 {
            slot.start = take(calls, SIZE);
        }
        for slot in self.0.iter().rev() {
            give(calls, slot.start, SIZE);
        }
        BATCH as u64
    }
}

/// The same, first block first.
struct Fifo<const SIZE: usize>(Box<[Slot]>);

impl<const SIZE: usize> Work for Fifo<SIZE> {
    fn round(&mut self, calls: &Calls) -> u64 {
        for slot in &mut self.0 {
            slot.start = take(calls, SIZE);
        }
        for slot in &self.0 {
            give(calls, slot.start, SIZE);
        }
        BATCH as u64
    }
}

/// A live set in which random blocks are replaced by blocks of random sizes.
pub(super) struct Churn {
    slots: Box<[Slot]>,
    sizes: Sizes,
    random: fastrand::Rng,
}

impl Churn {
    /// So many blocks, each from `from` to `to` bytes long.
    pub(super) fn new(seed: u64, live: usize, from: usize, to: usize) -> Self {
        let sizes = Sizes::new(seed, |random| log_uniform(random, from, to));
        Self { slots: slots(live), sizes, random: fastrand::Rng::with_seed(seed) }
    }
}

impl Work for Churn {
    fn prepare(&mut self, calls: &Calls) {
        for slot in &mut self.slots {
            *slot = Slot::take(calls, self.sizes.next());
        }
    }

    fn round(&mut self, calls: &Calls) -> u64 {
        for _ in 0..ROUND {
            let index = self.random.usize(..self.slots.len());
            let slot = &mut self.slots[index];
            slot.give(calls);
            *slot = Slot::take(calls, self.sizes.next());
        }
        ROUND as u64
    }

    fn live_len(&self) -> usize {
        live_len(&self.slots)
    }

    fn clear(&mut self, calls: &Calls) {
        give_all(&mut self.slots, calls);
    }
}

/// All sizes from 8 bytes to 32 KiB, four to a doubling, one after the other, 64 of them in use.
struct Sweep {
    slots: Box<[Slot]>,
    sizes: Vec<usize>,
    next: usize,
}

impl Sweep {
    fn new(seed: u64) -> Self {
        let sizes: Vec<usize> = (0..48).map(|step| (8.0 * 2_f64.powf(f64::from(step) / 4.0)) as usize).collect();
        Self { slots: slots(64), next: seed as usize, sizes }
    }
}

impl Work for Sweep {
    fn round(&mut self, calls: &Calls) -> u64 {
        for slot in &mut self.slots {
            slot.give_if_any(calls);
            self.next = (self.next + 1) % self.sizes.len();
            *slot = Slot::take(calls, self.sizes[self.next]);
        }
        self.slots.len() as u64
    }

    fn live_len(&self) -> usize {
        live_len(&self.slots)
    }

    fn clear(&mut self, calls: &Calls) {
        give_all(&mut self.slots, calls);
    }
}

/// Blocks in one pass of `sh8bench`.
const SH8_LEN: usize = 1024;

/// `sh8bench`: mostly small sizes; each pass frees a half last first and takes it again, then frees in two sweeps that
/// leave gaps.
struct Sh8bench {
    slots: Box<[Slot]>,
    sizes: Sizes,
}

impl Sh8bench {
    fn new(seed: u64) -> Self {
        let sizes = Sizes::new(seed, |random| match random.u32(..16) {
            0..12 => random.usize(8..=64),
            12..15 => random.usize(65..=256),
            _ => random.usize(257..=1000),
        });
        Self { slots: slots(SH8_LEN), sizes }
    }
}

impl Work for Sh8bench {
    fn round(&mut self, calls: &Calls) -> u64 {
        for slot in &mut self.slots {
            *slot = Slot::take(calls, self.sizes.next());
        }
        for slot in self.slots[SH8_LEN / 2..].iter().rev() {
            slot.give(calls);
        }
        for slot in &mut self.slots[SH8_LEN / 2..] {
            *slot = Slot::take(calls, self.sizes.next());
        }
        for first in [0, 1] {
            for slot in self.slots[first..].iter_mut().step_by(2) {
                slot.give(calls);
                *slot = Slot::EMPTY;
            }
        }
        (SH8_LEN + SH8_LEN / 2) as u64
    }
}

/// Bytes that a thread of `phases` has in use.
const PHASE_LEN: usize = 2 << 20;

/// The live set moves from one size to the next, block by block, from 16 B to 4 KiB and round again.
struct Phases {
    old: Vec<Slot>,
    new: Vec<Slot>,
    size: usize,
}

impl Phases {
    fn new() -> Self {
        let mut old = slots(PHASE_LEN / 16).into_vec();
        let mut new = slots(PHASE_LEN / 16).into_vec();
        old.clear();
        new.clear();
        Self { old, new, size: 16 }
    }

    fn next_size(&self) -> usize {
        if self.size == 4096 { 16 } else { self.size * 2 }
    }
}

impl Work for Phases {
    fn prepare(&mut self, calls: &Calls) {
        self.old.extend((0..PHASE_LEN / self.size).map(|_| Slot::take(calls, self.size)));
    }

    fn round(&mut self, calls: &Calls) -> u64 {
        let new_size = self.next_size();
        let mut done = 0;
        while done < ROUND {
            if self.old.is_empty() {
                std::mem::swap(&mut self.old, &mut self.new);
                self.size = new_size;
                break;
            }
            // As many bytes of the one as of the other.
            let len = new_size.max(self.size);
            for _ in 0..len / self.size {
                if let Some(slot) = self.old.pop() {
                    slot.give(calls);
                }
            }
            self.new.extend((0..len / new_size).map(|_| Slot::take(calls, new_size)));
            done += (len / self.size + len / new_size) / 2;
        }
        done as u64
    }

    fn live_len(&self) -> usize {
        live_len(&self.old) + live_len(&self.new)
    }

    fn clear(&mut self, calls: &Calls) {
        give_all(&mut self.old, calls);
        give_all(&mut self.new, calls);
    }
}

pub(super) const fn pair<const SIZE: usize>(name: &'static str, group: Group) -> Workload {
    Workload {
        name,
        about: "a block is taken and given back at once; per pair",
        group,
        plan: |threads| apart(threads, |_| Pair::<SIZE>),
        shares: false,
        holds: false,
    }
}

const fn lifo<const SIZE: usize>(name: &'static str) -> Workload {
    Workload {
        name,
        about: "batches of 256, given back last first; per pair",
        group: Group::Local,
        plan: |threads| apart(threads, |_| Lifo::<SIZE>(slots(BATCH))),
        shares: false,
        holds: false,
    }
}

fn churn(threads: usize, live: usize) -> Plan {
    apart(threads, move |seed| Churn::new(seed, live, 16, 1024))
}

pub(super) const WORKLOADS: [Workload; 17] = [
    pair::<8>("pair-8", Group::Local),
    pair::<64>("pair-64", Group::Local),
    pair::<512>("pair-512", Group::Local),
    pair::<4096>("pair-4096", Group::Local),
    pair::<32768>("pair-32768", Group::Local),
    lifo::<16>("lifo-16"),
    lifo::<64>("lifo-64"),
    lifo::<256>("lifo-256"),
    lifo::<1024>("lifo-1024"),
    lifo::<4096>("lifo-4096"),
    Workload {
        name: "fifo-64",
        about: "batches of 256, given back first first; per pair",
        group: Group::Local,
        plan: |threads| apart(threads, |_| Fifo::<64>(slots(BATCH))),
        shares: false,
        holds: false,
    },
    Workload {
        name: "churn-1k",
        about: "1000 blocks of 16 to 1024 B in use, random ones replaced; per replacement",
        group: Group::Local,
        plan: |threads| churn(threads, 1000),
        shares: false,
        holds: false,
    },
    Workload {
        name: "churn-100k",
        about: "100,000 blocks of 16 to 1024 B in use, random ones replaced; per replacement",
        group: Group::Local,
        plan: |threads| churn(threads, 100_000),
        shares: false,
        holds: true,
    },
    Workload {
        name: "sweep",
        about: "sizes from 8 B to 27 KiB one after the other, 64 in use; per pair",
        group: Group::Local,
        plan: |threads| apart(threads, Sweep::new),
        shares: false,
        holds: false,
    },
    Workload {
        name: "sh8bench",
        about: "mostly small sizes, freed last first and in sweeps with gaps (SmartHeap); per pair",
        group: Group::Local,
        plan: |threads| apart(threads, Sh8bench::new),
        shares: false,
        holds: false,
    },
    Workload {
        name: "mstress",
        about: "random sizes, some kept, some handed to other threads (mimalloc-bench); per block",
        group: Group::Local,
        plan: super::shared::mstress,
        shares: false,
        holds: true,
    },
    Workload {
        name: "phases",
        about: "2 MiB in use move from 16 B blocks to 32 B and so on to 4 KiB, and round again; per pair",
        group: Group::Phases,
        plan: |threads| apart(threads, |_| Phases::new()),
        shares: false,
        holds: true,
    },
];

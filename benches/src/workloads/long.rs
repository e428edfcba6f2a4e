//! Blocks that grow, and blocks of many pages.

use super::local::pair;
use super::{Group, Sizes, Slot, Work, Workload, apart, give_all, live_len, log_uniform, slots};
use crate::block::{check, seal};
use crate::peers::Calls;

/// How far blocks grow.
const GROWN: usize = 1 << 20;

/// By how much they grow at a time, where not by doubling.
const STEP: usize = 1 << 10;

/// Grows a block and checks that its content came along.
#[inline(always)]
fn grow(calls: &Calls, slot: &mut Slot, new_size: usize) {
    let old = *slot;
    // SAFETY: the block is this thread's, with this size and alignment.
    let start = unsafe { (calls.realloc)(old.start, old.size, 8, new_size) };
    if !start.is_null() {
        check(start, old.start, old.size);
    }
    seal(start, new_size);
    *slot = Slot { start, size: new_size };
}

/// Blocks grow in turn, by steps, to 1 MiB.
struct Steps<const BLOCKS: usize>;

impl<const BLOCKS: usize> Work for Steps<BLOCKS> {
    fn round(&mut self, calls: &Calls) -> u64 {
        let mut blocks = [Slot::EMPTY; BLOCKS];
        for block in &mut blocks {
            *block = Slot::take(calls, STEP);
        }
        for size in (STEP..=GROWN).step_by(STEP).skip(1) {
            for block in &mut blocks {
                grow(calls, block, size);
            }
        }
        for block in blocks {
            block.give(calls);
        }
        (BLOCKS * GROWN / STEP) as u64
    }
}

/// A block grows by doubling from 16 B to 1 MiB.
struct Doubling;

impl Work for Doubling {
    fn round(&mut self, calls: &Calls) -> u64 {
        const START: usize = 16;
        let mut block = Slot::take(calls, START);
        let mut operations = 1;
        while block.size < GROWN {
            let new_size = block.size * 2;
            grow(calls, &mut block, new_size);
            operations += 1;
        }
        block.give(calls);
        operations
    }
}

/// Blocks of 64 KiB to 8 MiB, 8 in use, random ones replaced.
struct Large {
    slots: Box<[Slot]>,
    sizes: Sizes,
    random: fastrand::Rng,
}

impl Work for Large {
    fn round(&mut self, calls: &Calls) -> u64 {
        const ROUND: usize = 64;
        for _ in 0..ROUND {
            let slot = &mut self.slots[self.random.usize(..8)];
            slot.give_if_any(calls);
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

pub(super) const WORKLOADS: [Workload; 7] = [
    Workload {
        name: "realloc-steps",
        about: "a block grows to 1 MiB by 1 KiB at a time; per step",
        group: Group::Realloc,
        plan: |threads| apart(threads, |_| Steps::<1>),
        shares: false,
        holds: false,
    },
    Workload {
        name: "realloc-four",
        about: "four blocks grow in turn to 1 MiB by 1 KiB at a time; per step",
        group: Group::Realloc,
        plan: |threads| apart(threads, |_| Steps::<4>),
        shares: false,
        holds: false,
    },
    Workload {
        name: "realloc-double",
        about: "a block grows from 16 B to 1 MiB by doubling; per step",
        group: Group::Realloc,
        plan: |threads| apart(threads, |_| Doubling),
        shares: false,
        holds: false,
    },
    pair::<{ 64 << 10 }>("pair-64k", Group::Large),
    pair::<{ 1 << 20 }>("pair-1m", Group::Large),
    pair::<{ 8 << 20 }>("pair-8m", Group::Large),
    Workload {
        name: "large",
        about: "8 blocks of 64 KiB to 8 MiB in use, random ones replaced; per replacement",
        group: Group::Large,
        plan: |threads| {
            apart(threads, |seed| Large {
                slots: slots(8),
                sizes: Sizes::new(seed, |random| log_uniform(random, 64 << 10, 8 << 20)),
                random: fastrand::Rng::with_seed(seed),
            })
        },
        shares: false,
        holds: false,
    },
];

//! Does an operation cost more when more is in use, or when the heap is longer? What does a vector cost that grows by
//! pushes? Rows that are run when they are named.

use super::local::Churn;
use super::{Group, Plan, Slot, Work, Workload, apart, give_all, live_len, slots};
use crate::block::{out_of_memory, spoilt};
use crate::peers::Calls;

/// How long a block is that only makes the heap longer.
const BALLAST_LEN: usize = 64 << 10;

/// A small live set, in a heap that longer blocks fill.
struct Ballast {
    churn: Churn,
    blocks: Box<[Slot]>,
}

impl Work for Ballast {
    fn prepare(&mut self, calls: &Calls) {
        self.blocks.fill_with(|| Slot::take(calls, BALLAST_LEN));
        self.churn.prepare(calls);
    }

    fn round(&mut self, calls: &Calls) -> u64 {
        self.churn.round(calls)
    }

    fn live_len(&self) -> usize {
        self.churn.live_len() + live_len(&self.blocks)
    }

    fn clear(&mut self, calls: &Calls) {
        self.churn.clear(calls);
        give_all(&mut self.blocks, calls);
    }
}

/// Vectors of words that grow by pushes to so many, one after the other: as `Vec` does it, from 4 words by doubling.
struct Pushes {
    count: usize,
}

impl Work for Pushes {
    fn round(&mut self, calls: &Calls) -> u64 {
        const VECTORS: u64 = 64;
        for _ in 0..VECTORS {
            pushes(calls, self.count);
        }
        VECTORS
    }
}

/// One vector. After each growth its ends are looked at.
fn pushes(calls: &Calls, count: usize) {
    const WORD: usize = size_of::<usize>();
    let mut size = 4 * WORD;
    // SAFETY: the size is not 0, the alignment a power of two.
    let mut start = unsafe { (calls.alloc)(size, WORD) };
    if start.is_null() {
        out_of_memory(size);
    }
    for at in 0..count {
        if at * WORD == size {
            // SAFETY: the block is ours, of that size and alignment.
            start = unsafe { (calls.realloc)(start, size, WORD, 2 * size) };
            if start.is_null() {
                out_of_memory(2 * size);
            }
            for index in [0, at - 1] {
                // SAFETY: the block is ours, and the word was written before it grew.
                if unsafe { start.cast::<usize>().add(index).read() } != index {
                    spoilt(start, size);
                }
            }
            size *= 2;
        }
        // SAFETY: the block has room for more than `at` words. Volatile, or one `memset` might stand for many pushes.
        unsafe { start.cast::<usize>().add(at).write_volatile(at) };
    }
    // SAFETY: the block is ours, of that size and alignment.
    unsafe { (calls.free)(start, size, WORD) };
}

const fn vector(name: &'static str, plan: fn(usize) -> Plan) -> Workload {
    Workload {
        name,
        about: "a vector grows by pushes of a word each, from 4 words by doubling; per vector",
        group: Group::Growth,
        plan,
        shares: false,
        holds: false,
    }
}

const fn live(name: &'static str, plan: fn(usize) -> Plan) -> Workload {
    Workload {
        name,
        about: "so many blocks of 16 to 128 B in use, random ones replaced; per replacement",
        group: Group::Growth,
        plan,
        shares: false,
        holds: true,
    }
}

const fn ballast(name: &'static str, plan: fn(usize) -> Plan) -> Workload {
    Workload {
        name,
        about: "1000 blocks of 16 to 1024 B replaced in a heap that blocks of 64 KiB fill to that length; per replacement",
        group: Group::Growth,
        plan,
        shares: false,
        holds: false,
    }
}

fn churned(threads: usize, live: usize) -> Plan {
    apart(threads, move |seed| Churn::new(seed, live, 16, 128))
}

fn filled(threads: usize, len: usize) -> Plan {
    apart(threads, move |seed| Ballast { churn: Churn::new(seed, 1000, 16, 1024), blocks: slots(len / BALLAST_LEN) })
}

pub(super) const WORKLOADS: [Workload; 13] = [
    live("live-100", |threads| churned(threads, 100)),
    live("live-1k", |threads| churned(threads, 1000)),
    live("live-10k", |threads| churned(threads, 10_000)),
    live("live-100k", |threads| churned(threads, 100_000)),
    live("live-1m", |threads| churned(threads, 1_000_000)),
    live("live-10m", |threads| churned(threads, 10_000_000)),
    ballast("heap-1m", |threads| filled(threads, 1 << 20)),
    ballast("heap-32m", |threads| filled(threads, 32 << 20)),
    ballast("heap-1g", |threads| filled(threads, 1 << 30)),
    ballast("heap-8g", |threads| filled(threads, 8 << 30)),
    vector("vec-64", |threads| apart(threads, |_| Pushes { count: 64 })),
    vector("vec-1k", |threads| apart(threads, |_| Pushes { count: 1 << 10 })),
    vector("vec-64k", |threads| apart(threads, |_| Pushes { count: 64 << 10 })),
];

//! Does an operation cost more when more is in use, or when the heap is longer? Rows that are run when they are named.

use super::local::Churn;
use super::{Group, Plan, Slot, Work, Workload, apart, give_all, live_len, slots};
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

pub(super) const WORKLOADS: [Workload; 10] = [
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
];

//! What kernels did, event by event: traces that the demonstration recorded, and Linux.
//!
//! Each thread replays all of a trace, whichever CPU recorded it, in the order of time, and begins again at its end.

use std::sync::Arc;

use smp_heap_view::{Step, parse_trace, unpack};

use super::{Group, Plan, Slot, Work, Workload, apart};
use crate::block::{MIN_SIZE, check, seal, unseal};
use crate::peers::Calls;

/// A block of the trace, with its alignment.
#[derive(Clone, Copy)]
struct Traced {
    slot: Slot,
    align: usize,
}

impl Traced {
    const NONE: Self = Self { slot: Slot::EMPTY, align: 1 };

    fn take(calls: &Calls, size: usize, align: usize) -> Self {
        // SAFETY: the size is not 0, the alignment that of a Layout.
        let start = unsafe { (calls.alloc)(size, align) };
        seal(start, size);
        Self { slot: Slot { start, size }, align }
    }

    fn resize(&mut self, calls: &Calls, new_size: usize) {
        let Slot { start: old, size } = self.slot;
        // SAFETY: the block is this thread's, with this size and alignment.
        let start = unsafe { (calls.realloc)(old, size, self.align, new_size) };
        if !start.is_null() && new_size >= size {
            check(start, old, size);
        }
        seal(start, new_size);
        self.slot = Slot { start, size: new_size };
    }

    fn give(&mut self, calls: &Calls) {
        let Slot { start, size } = self.slot;
        unseal(start, size);
        // SAFETY: the block came from this peer with this size and alignment, and nobody uses it any more.
        unsafe { (calls.free)(start, size, self.align) };
        *self = Self::NONE;
    }
}

struct Replay {
    steps: Arc<[Step]>,
    next: usize,
    /// Blocks by their number in the trace, as many as it allocates.
    blocks: Box<[Traced]>,
    allocs: usize,
}

impl Replay {
    fn step(&mut self, calls: &Calls) {
        match self.steps[self.next] {
            // An alignment above a word's goes with the size that it needs anyway.
            Step::Alloc { len, align } => {
                self.blocks[self.allocs] = Traced::take(calls, len.max(MIN_SIZE), align.max(MIN_SIZE));
                self.allocs += 1;
            }
            Step::Free { block } => self.blocks[block].give(calls),
            Step::Resize { block, len } => self.blocks[block].resize(calls, len.max(MIN_SIZE)),
        }
        self.next += 1;
        if self.next == self.steps.len() {
            self.clear(calls);
        }
    }
}

impl Work for Replay {
    fn round(&mut self, calls: &Calls) -> u64 {
        const ROUND: u64 = 256;
        for _ in 0..ROUND {
            self.step(calls);
        }
        ROUND
    }

    fn live_len(&self) -> usize {
        self.blocks.iter().map(|block| block.slot.size).sum()
    }

    fn clear(&mut self, calls: &Calls) {
        self.blocks.iter_mut().filter(|block| !block.slot.is_empty()).for_each(|block| block.give(calls));
        (self.next, self.allocs) = (0, 0);
    }
}

fn replayed(threads: usize, packed: &[u8]) -> Plan {
    let text = unpack(packed).expect("the trace was packed whole");
    let trace = parse_trace(&text).expect("a test reads the same trace");
    let steps: Arc<[Step]> = trace.steps.into_iter().map(|(_, step)| step).collect();
    let allocs = steps.iter().filter(|step| matches!(step, Step::Alloc { .. })).count();
    apart(threads, |_| Replay {
        steps: steps.clone(),
        next: 0,
        blocks: vec![Traced::NONE; allocs].into_boxed_slice(),
        allocs: 0,
    })
}

/// A row for a file of the viewer's traces.
macro_rules! row {
    ($work:literal, $about:literal) => {
        Workload {
            name: concat!("trace-", $work),
            about: concat!("recorded in ", $about, "; per event"),
            group: Group::Traces,
            plan: |threads| {
                let packed = include_bytes!(concat!("../../../tools/viewer/traces/", $work, ".events.gz"));
                replayed(threads, packed)
            },
            shares: false,
            holds: false,
        }
    };
}

pub(super) const WORKLOADS: [Workload; 6] = [
    row!("json", "the test kernel: documents parsed and written"),
    row!("index", "the test kernel: an index of words"),
    row!("search", "the test kernel: expressions compiled and searched for"),
    row!("wasm", "the test kernel: a WebAssembly program interpreted"),
    row!("linux-processes", "Linux: programs started, pipes"),
    row!("linux-files", "Linux: files, TCP"),
];

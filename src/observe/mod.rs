//! What can be seen of a heap: numbers, the same as lines for tools, and the check of every invariant.

mod dump;
mod stats;
mod verify;

pub use dump::Dump;
pub use stats::{ClassStats, CpuClassStats, CpuStats, RunInfo, RunKind, Stats, Totals};
pub use verify::{Skipped, Violation};

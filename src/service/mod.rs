//! What a kernel asks of a heap beside blocks: work for idle times, CPUs that go, a bound for provision.

mod maintain;
mod overhead;

pub use overhead::{worst_case_overhead, worst_case_overhead_after};

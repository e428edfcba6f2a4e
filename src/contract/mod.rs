//! What a kernel implements: where pages come from, and which CPU runs.

pub(crate) mod cpu;
pub(crate) mod interrupts;
mod mode;
pub(crate) mod provider;
pub(crate) mod unwind;

pub use mode::CpuMode;

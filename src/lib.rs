//! A heap for kernels: scales with CPUs, and may be called from every context.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod battery;
mod block;
mod cache;
pub mod cpu;
mod engine;
mod faces;
mod gate;
mod heap;
mod large;
mod pages;
mod partial;
pub mod provider;
mod ring;
mod size_class;
mod slab;
mod stats;
mod sync;
mod verify;

pub use cpu::{CpuHint, CpuPin, Hint, Pinned};
pub use faces::AllocError;
pub use heap::Heap;
pub use provider::{PageProvider, PageRun};
#[cfg(feature = "region")]
pub use provider::{RegionError, RegionProvider};
pub use size_class::{CLASS_COUNT, MAX_SMALL_LEN, SizeClass};
pub use stats::{ClassStats, CpuStats, RunInfo, RunKind, Stats};
pub use verify::Violation;

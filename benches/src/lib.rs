//! `smp-heap` beside its peers: one process run, interleaved, every block written and checked.
//!
//! ```text
//! bin/bench           builds what this machine can build (C and C++ peers, Zig's allocator), says what it cannot, and
//!                     starts bin/cells
//! bin/cells           arguments, the run, the reports
//! run                 which cells, in which order: row by row, repetition by repetition, the columns side by side
//! report              what the samples say: medians and ratios; as a table, as JSON, as plots
//! cell                one cell: a process of its own, its threads, the clock, what the kernel says of its memory
//! workloads           what the threads do, modelled on the published benchmarks
//! peers               the allocators, each behind the same three calls
//! tails, bin/tails    how long single calls take; on x86-64
//! block, memory       blocks that are written and checked; memory straight from the operating system
//! ```
//!
//! Decisions, and what pays for each:
//! - *A process per cell.* No column inherits another's pages, caches or threads. Price: a fork of a small process each
//!   time, outside the clock.
//! - *A span of time, not a number of operations.* All cells take equally long, slow columns too. Price: two looks at a
//!   flag for each round of some hundred operations.
//! - *One indirect call for each operation, in every column.* So no column is inlined and none is called by another
//!   way. Price: a handful of instructions on top of each figure, the floor's too.
//! - *Sizes and alignments are values, not constants.* A kernel's `__rust_alloc` gets them so.
#![allow(clippy::missing_safety_doc, reason = "the calls of a peer have the contract of GlobalAlloc")]

pub mod args;
pub mod block;
pub mod cell;
pub mod memory;
pub mod peers;
pub mod report;
pub mod run;
#[cfg(target_arch = "x86_64")]
pub mod tails;
pub mod workloads;

//! How long single calls take: not their mean, but the slowest of a thousand, of ten thousand, and of all.
//!
//! ```text
//! args      what the command can be told
//! run       row by row, pass by pass, the columns side by side
//! sequence  which block is replaced, by which size: the same in every pass of every column
//! pass      one pass: a process of its own, each call timed
//! figures   what the times of several passes say
//! table     the figures as text
//! ```
//!
//! Decisions, and what pays for each:
//! - *An operation is a replacement, and its two calls are timed apart.* A kernel author asks how long `alloc` may keep
//!   him, and how long `free`; a sum hides which one it was.
//! - *A call's figure is the least of its passes.* All passes make the same calls, each in a new process. An
//!   allocator's own slow path comes at the same call again; an interrupt, a preemption or a neighbour's load does not.
//!   Price: a slow path that comes at another call in each pass, as one that a clock starts, is taken out as well. The
//!   p99.99 of the best single pass, which has everything in it, is shown beside, as the upper bound.
//! - *All passes are forks of one process*, so that addresses are the same in all of them. Price: what a layout of
//!   addresses costs is that of one layout; another run has another one.
//! - *Fences around each reading of the clock.* No call runs into the next one's figure. Price: an empty call's figure
//!   is in every one; it is shown, and not taken off.
//! - *Blocks are written and checked outside the clock*, so that a block is in the processor's cache when it is freed,
//!   as it is when somebody used it.

pub mod args;
pub mod figures;
pub mod pass;
pub mod run;
pub mod sequence;
pub mod table;

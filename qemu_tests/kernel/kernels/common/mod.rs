//! What several kernels share: blocks that know their content, heaps and modes to choose from, storms of interrupts.
#![allow(dead_code, unused_imports, unused_macros, reason = "each kernel uses a part of it")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "a failed check ends the test, which is what a test is for; addresses have 64 bits wherever this runs"
)]

pub(crate) mod area;
pub(crate) mod block;
pub(crate) mod heaps;
pub(crate) mod modes;
#[cfg(feature = "paging")]
pub(crate) mod paging;
pub(crate) mod renew;
pub(crate) mod sizes;
pub(crate) mod slots;
pub(crate) mod storm;

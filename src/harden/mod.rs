//! Hardening: what is done about callers that break the contract. Nothing of it exists without its feature.
//!
//! ```text
//! level 1  hardened      links under a key (here); every free inspected (inspect)
//! level 2  debug-heap    poison, red zones, quarantine, sites (debug here; debug_header, leaks)
//! level 3  guard-pages   one block in N beside pages that cannot be touched (guard here; guarded)
//! ```
//! A kernel's bug is reported through a hook ([`Report`]) and the faulty call is ignored; without a hook it is counted.
//! The decision behind that: a heap that stops the machine at the first double free is a worse neighbour than one that
//! keeps its lists whole and says so, and a kernel that wants to stop does so in its hook. Price: what was lost (a list
//! behind an overwritten link) stays lost until reboot.
//!
//! This file is the bottom layer: how the link of a free block is written. Without `hardened` it is the pointer itself
//! and [`Key`] is a type without bytes, so that the files above are the same code for every level.

#[cfg(feature = "debug-heap")]
pub(crate) mod debug;
#[cfg(feature = "guard-pages")]
pub(crate) mod guard;
#[cfg(not(feature = "hardened"))]
mod plain;
#[cfg(feature = "hardened")]
mod report;
#[cfg(feature = "hardened")]
mod sealed;

#[cfg(not(feature = "hardened"))]
pub(crate) use plain::{Damage, Key, KeyCell};
#[cfg(feature = "hardened")]
pub(crate) use report::Watch;
#[cfg(feature = "hardened")]
pub use report::{Misuse, Report};
#[cfg(feature = "hardened")]
pub(crate) use sealed::{Damage, Key, KeyCell, is_linkable};

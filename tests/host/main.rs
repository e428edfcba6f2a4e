//! The heap on the host: threads play CPUs, signals play interrupts. One file for each kind of behaviour.

#![expect(
    clippy::std_instead_of_core,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "these run on a host, and a failed check ends a test, which is what a test is for"
)]

mod allocators;
mod battery;
mod borders;
#[cfg(target_os = "linux")]
mod c_heap;
mod cache_addr;
mod caches;
mod common;
#[cfg(all(feature = "hardened", target_os = "linux"))]
mod corpus;
#[cfg(feature = "debug-heap")]
mod debug_heap;
mod documents;
mod emptied;
mod faces;
mod faults;
mod faulty;
mod figures;
#[cfg(not(feature = "debug-heap"))]
mod fullness;
mod gate;
mod giving_back;
mod growth;
#[cfg(feature = "guard-pages")]
mod guard_pages;
#[cfg(feature = "hardened")]
mod hardening;
#[path = "../host_pages/mod.rs"]
mod host_pages;
mod hourglass;
mod layers;
mod manifest;
mod many_cpus;
// With frames every length is another one, and a quarantine keeps what is freed.
#[cfg(not(feature = "debug-heap"))]
mod memory;
mod nested;
mod one_piece;
mod panics;
mod promises;
mod random_sequences;
#[cfg(not(feature = "debug-heap"))]
mod refusals;
mod regions;
mod safety;
mod sequences;
mod set_aside;
mod statistics;
mod stress;
mod waits;
#[cfg(all(target_os = "linux", not(miri)))]
#[path = "../watchdog/mod.rs"]
mod watchdog;

use smp_heap::{PageProvider, PageRun};

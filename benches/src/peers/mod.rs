//! The allocators, each behind the same three calls.

#[cfg(feature = "c")]
mod c;
#[cfg(feature = "cxx")]
mod cxx;
mod floor;
pub mod levels;
mod locked;
mod ours;
mod provider;
mod sharded;
mod system;
pub mod zig;

use std::alloc::Layout;
use std::path::Path;

/// What a workload calls: alignments are powers of two, sizes not 0; a block goes back with the size and alignment it
/// has.
#[derive(Clone, Copy, Debug)]
pub struct Calls {
    /// Size, alignment.
    pub alloc: unsafe extern "C-unwind" fn(usize, usize) -> *mut u8,
    /// Block, its size, its alignment.
    pub free: unsafe extern "C-unwind" fn(*mut u8, usize, usize),
    /// Block, its size, its alignment, the new size.
    pub realloc: unsafe extern "C-unwind" fn(*mut u8, usize, usize, usize) -> *mut u8,
}

/// What a column is, for the ratios.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// This crate.
    Ours,
    /// What it is measured against.
    Peer,
    /// No allocator: what the harness itself costs.
    Floor,
}

/// What a provider was asked, where it keeps count.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProviderCost {
    pub calls: u64,
    pub nanos: u64,
}

/// One column.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub name: &'static str,
    pub about: &'static str,
    pub kind: Kind,
    pub calls: Calls,
    /// Readies the heap, once in each cell, before its threads start.
    pub open: fn(),
    /// Readies a thread, whose number is below [`MAX_THREADS`].
    pub enter: fn(usize),
    /// What the page provider was asked so far.
    pub provider_cost: Option<fn() -> ProviderCost>,
    /// What the heap says of itself, where it does.
    pub describe: Option<fn() -> String>,
    /// Another build of `cells` whose column [`levels::COLUMN`] this is; the calls here are then not used.
    pub program: Option<&'static Path>,
}

/// How many threads a cell may have.
pub const MAX_THREADS: usize = 16;

fn nothing() {}
fn no_entry(_: usize) {}

/// A size and an alignment from a workload.
#[inline(always)]
fn layout(size: usize, align: usize) -> Layout {
    // SAFETY: workloads use powers of two and sizes far below the limit.
    unsafe { Layout::from_size_align_unchecked(size, align) }
}

/// The three calls over a static that is a `GlobalAlloc`.
macro_rules! calls_of {
    ($heap:path) => {{
        use ::std::alloc::GlobalAlloc;
        unsafe extern "C-unwind" fn alloc(size: usize, align: usize) -> *mut u8 {
            // SAFETY: the contract is the same.
            unsafe { GlobalAlloc::alloc(&$heap, $crate::peers::layout(size, align)) }
        }
        unsafe extern "C-unwind" fn free(start: *mut u8, size: usize, align: usize) {
            // SAFETY: the contract is the same.
            unsafe { GlobalAlloc::dealloc(&$heap, start, $crate::peers::layout(size, align)) }
        }
        unsafe extern "C-unwind" fn realloc(start: *mut u8, size: usize, align: usize, new_size: usize) -> *mut u8 {
            // SAFETY: the contract is the same.
            unsafe { GlobalAlloc::realloc(&$heap, start, $crate::peers::layout(size, align), new_size) }
        }
        $crate::peers::Calls { alloc, free, realloc }
    }};
}
use calls_of;

/// A column that is not there, and why.
#[derive(Clone, Debug)]
pub struct Missing {
    pub name: &'static str,
    pub why: String,
}

/// All columns this build has, and those it has not.
pub fn all() -> (Vec<Peer>, Vec<Missing>) {
    let mut peers = Vec::new();
    let mut missing = Vec::new();
    peers.push(floor::PEER);
    peers.extend(ours::PEERS);
    for level in levels::LEVELS {
        match levels::load(level) {
            Ok(peer) => peers.push(peer),
            Err(why) => missing.push(Missing { name: level.name, why }),
        }
    }
    #[cfg(feature = "cxx")]
    peers.push(cxx::SNMALLOC);
    #[cfg(not(feature = "cxx"))]
    missing
        .push(Missing { name: "snmalloc", why: "built without the feature `cxx`, which needs a C++ compiler".into() });
    #[cfg(feature = "c")]
    peers.extend([c::MIMALLOC, c::RPMALLOC, c::JEMALLOC]);
    #[cfg(not(feature = "c"))]
    for name in ["mimalloc", "rpmalloc", "jemalloc"] {
        missing.push(Missing { name, why: "built without the feature `c`, which needs a C compiler and make".into() });
    }
    peers.push(system::PEER);
    match zig::load() {
        Ok(peer) => peers.push(peer),
        Err(why) => missing.push(Missing { name: zig::NAME, why }),
    }
    peers.extend(sharded::PEERS);
    peers.extend(locked::PEERS);
    (peers, missing)
}

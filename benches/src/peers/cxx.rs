//! The peer that needs a C++ compiler.

use super::{Calls, Kind, Peer, no_entry, nothing};

unsafe extern "C-unwind" fn alloc(size: usize, align: usize) -> *mut u8 {
    // SAFETY: the contract is the same.
    unsafe { snmalloc_sys::sn_rust_alloc(align, size).cast() }
}

unsafe extern "C-unwind" fn free(start: *mut u8, size: usize, align: usize) {
    // SAFETY: the contract is the same.
    unsafe { snmalloc_sys::sn_rust_dealloc(start.cast(), align, size) };
}

unsafe extern "C-unwind" fn realloc(start: *mut u8, size: usize, align: usize, new_size: usize) -> *mut u8 {
    // SAFETY: the contract is the same.
    unsafe { snmalloc_sys::sn_rust_realloc(start.cast(), align, size, new_size).cast() }
}

pub(super) const SNMALLOC: Peer = Peer {
    name: "snmalloc",
    about: "snmalloc, without its assertions",
    kind: Kind::Peer,
    calls: Calls { alloc, free, realloc },
    open: nothing,
    enter: no_entry,
    provider_cost: None,
    describe: None,
    program: None,
};

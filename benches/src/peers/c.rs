//! The peers that need a C compiler. Blocks are aligned to 8, which all of them give without being asked.

use super::{Calls, Kind, Peer, no_entry, nothing};

mod mimalloc {
    pub(super) unsafe extern "C-unwind" fn alloc(size: usize, _: usize) -> *mut u8 {
        // SAFETY: any size may be asked for.
        unsafe { libmimalloc_sys::mi_malloc(size).cast() }
    }

    pub(super) unsafe extern "C-unwind" fn free(start: *mut u8, _: usize, _: usize) {
        // SAFETY: the block is mimalloc's and unused.
        unsafe { libmimalloc_sys::mi_free(start.cast()) }
    }

    pub(super) unsafe extern "C-unwind" fn realloc(start: *mut u8, _: usize, _: usize, new_size: usize) -> *mut u8 {
        // SAFETY: the block is mimalloc's.
        unsafe { libmimalloc_sys::mi_realloc(start.cast(), new_size).cast() }
    }
}

mod rpmalloc {
    pub(super) fn open() {
        // SAFETY: called once, before any other call.
        unsafe { rpmalloc_sys::rpmalloc_initialize() };
    }

    pub(super) fn enter(_: usize) {
        // SAFETY: called once in each thread, before its first allocation.
        unsafe { rpmalloc_sys::rpmalloc_thread_initialize() };
    }

    pub(super) unsafe extern "C-unwind" fn alloc(size: usize, _: usize) -> *mut u8 {
        // SAFETY: the thread is initialised.
        unsafe { rpmalloc_sys::rpmalloc(size).cast() }
    }

    pub(super) unsafe extern "C-unwind" fn free(start: *mut u8, _: usize, _: usize) {
        // SAFETY: the block is rpmalloc's and unused.
        unsafe { rpmalloc_sys::rpfree(start.cast()) }
    }

    pub(super) unsafe extern "C-unwind" fn realloc(start: *mut u8, _: usize, _: usize, new_size: usize) -> *mut u8 {
        // SAFETY: the block is rpmalloc's.
        unsafe { rpmalloc_sys::rprealloc(start.cast(), new_size).cast() }
    }
}

mod jemalloc {
    pub(super) unsafe extern "C-unwind" fn alloc(size: usize, _: usize) -> *mut u8 {
        // SAFETY: any size may be asked for.
        unsafe { tikv_jemalloc_sys::malloc(size).cast() }
    }

    pub(super) unsafe extern "C-unwind" fn free(start: *mut u8, size: usize, _: usize) {
        // SAFETY: the block is jemalloc's, of this size and unused.
        unsafe { tikv_jemalloc_sys::sdallocx(start.cast(), size, 0) }
    }

    pub(super) unsafe extern "C-unwind" fn realloc(start: *mut u8, _: usize, _: usize, new_size: usize) -> *mut u8 {
        // SAFETY: the block is jemalloc's.
        unsafe { tikv_jemalloc_sys::realloc(start.cast(), new_size).cast() }
    }
}

pub(super) const MIMALLOC: Peer = Peer {
    name: "mimalloc",
    about: "mimalloc",
    kind: Kind::Peer,
    calls: Calls { alloc: mimalloc::alloc, free: mimalloc::free, realloc: mimalloc::realloc },
    open: nothing,
    enter: no_entry,
    provider_cost: None,
    describe: None,
    program: None,
};

pub(super) const RPMALLOC: Peer = Peer {
    name: "rpmalloc",
    about: "rpmalloc",
    kind: Kind::Peer,
    calls: Calls { alloc: rpmalloc::alloc, free: rpmalloc::free, realloc: rpmalloc::realloc },
    open: rpmalloc::open,
    enter: rpmalloc::enter,
    provider_cost: None,
    describe: None,
    program: None,
};

pub(super) const JEMALLOC: Peer = Peer {
    name: "jemalloc",
    about: "jemalloc",
    kind: Kind::Peer,
    calls: Calls { alloc: jemalloc::alloc, free: jemalloc::free, realloc: jemalloc::realloc },
    open: nothing,
    enter: no_entry,
    provider_cost: None,
    describe: None,
    program: None,
};

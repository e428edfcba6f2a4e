//! No allocator: a list for each power of two and a bump pointer, per thread, nothing shared and nothing given back. What is left of a
//! workload's time when allocation costs next to nothing.

use std::cell::Cell;
use std::ptr;

use super::{Calls, Kind, Peer, no_entry, nothing};
use crate::memory;

const CHUNK_LEN: usize = 64 << 20;

struct State {
    lists: [Cell<*mut u8>; 64],
    next: Cell<*mut u8>,
    left: Cell<usize>,
}

thread_local! {
    static STATE: State = const {
        State { lists: [const { Cell::new(ptr::null_mut()) }; 64], next: Cell::new(ptr::null_mut()), left: Cell::new(0) }
    };
}

#[inline(always)]
fn list(size: usize, align: usize) -> u32 {
    (size.max(align) - 1).checked_ilog2().map_or(3, |log| (log + 1).max(3))
}

unsafe extern "C" fn alloc(size: usize, align: usize) -> *mut u8 {
    let index = list(size, align);
    STATE.with(|state| {
        let head = &state.lists[index as usize & 63];
        let start = head.get();
        if start.is_null() {
            return bump(state, 1 << index);
        }
        // SAFETY: a block in a list holds the link that `free` wrote.
        head.set(unsafe { start.cast::<*mut u8>().read() });
        start
    })
}

#[cold]
#[inline(never)]
fn bump(state: &State, len: usize) -> *mut u8 {
    if state.left.get() < len {
        let Some(chunk) = memory::map(CHUNK_LEN.max(len)) else {
            return ptr::null_mut();
        };
        state.next.set(chunk.as_ptr());
        state.left.set(CHUNK_LEN.max(len));
    }
    let start = state.next.get();
    // SAFETY: `len` bytes are left.
    state.next.set(unsafe { start.add(len) });
    state.left.set(state.left.get() - len);
    start
}

unsafe extern "C" fn free(start: *mut u8, size: usize, align: usize) {
    let index = list(size, align);
    STATE.with(|state| {
        let head = &state.lists[index as usize & 63];
        // SAFETY: the block is unused and at least a word long.
        unsafe { start.cast::<*mut u8>().write(head.get()) };
        head.set(start);
    });
}

unsafe extern "C" fn realloc(start: *mut u8, size: usize, align: usize, new_size: usize) -> *mut u8 {
    if list(size, align) == list(new_size, align) {
        return start;
    }
    // SAFETY: the contract is the same.
    let block = unsafe { alloc(new_size, align) };
    if !block.is_null() {
        // SAFETY: both blocks are at least that long, and two.
        unsafe { block.copy_from_nonoverlapping(start, size.min(new_size)) };
        // SAFETY: the contract is the same.
        unsafe { free(start, size, align) };
    }
    block
}

pub(super) const PEER: Peer = Peer {
    name: "floor",
    about: "no allocator: thread-local lists, nothing shared, nothing given back",
    kind: Kind::Floor,
    calls: Calls { alloc, free, realloc },
    open: nothing,
    enter: no_entry,
    provider_cost: None,
};

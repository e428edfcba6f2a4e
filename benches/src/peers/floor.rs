//! No allocator: lists by size and a bump pointer, per thread, nothing shared and nothing given back. What is left of a
//! workload's time when allocation costs next to nothing.

use std::cell::Cell;
use std::ptr;

use super::{Calls, Kind, Peer, no_entry, nothing};
use crate::memory;

const CHUNK_LEN: usize = 64 << 20;

/// Sizes up to this have a list for each 8 bytes; longer ones one for each power of two.
const STEPS_LEN: usize = 8192;
const STEPS: usize = STEPS_LEN / 8 + 1;

struct State {
    steps: [Cell<*mut u8>; STEPS],
    powers: [Cell<*mut u8>; 64],
    next: Cell<*mut u8>,
    left: Cell<usize>,
}

thread_local! {
    static STATE: State = const {
        State {
            steps: [const { Cell::new(ptr::null_mut()) }; STEPS],
            powers: [const { Cell::new(ptr::null_mut()) }; 64],
            next: Cell::new(ptr::null_mut()),
            left: Cell::new(0),
        }
    };
}

impl State {
    /// The list of a size, and how long its blocks are. Workloads align to 8.
    #[inline(always)]
    fn list(&self, size: usize) -> (&Cell<*mut u8>, usize) {
        if size <= STEPS_LEN {
            let step = size.div_ceil(8);
            (&self.steps[step], step * 8)
        } else {
            let power = (size - 1).ilog2() + 1;
            (&self.powers[power as usize & 63], 1 << power)
        }
    }
}

unsafe extern "C-unwind" fn alloc(size: usize, _: usize) -> *mut u8 {
    STATE.with(|state| {
        let (head, len) = state.list(size);
        let start = head.get();
        if start.is_null() {
            return bump(state, len);
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

unsafe extern "C-unwind" fn free(start: *mut u8, size: usize, _: usize) {
    STATE.with(|state| {
        let (head, _) = state.list(size);
        // SAFETY: the block is unused and at least a word long.
        unsafe { start.cast::<*mut u8>().write(head.get()) };
        head.set(start);
    });
}

unsafe extern "C-unwind" fn realloc(start: *mut u8, size: usize, align: usize, new_size: usize) -> *mut u8 {
    if STATE.with(|state| state.list(size).1 == state.list(new_size).1) {
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
    describe: None,
    program: None,
};

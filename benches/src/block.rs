//! Blocks that are written when they come and checked when they go.
//!
//! The first word says where the block is and how long; the last byte is written too. Freed, the first word is wiped: a
//! block that two owners were given is wiped by one and found wrong by the other, and blocks that overlap spoil each
//! other's ends.

use std::process;

use crate::peers::Calls;

/// The least size: a word.
pub const MIN_SIZE: usize = 8;

/// Where the size stands in the first word.
const SIZE_SHIFT: u32 = 40;

#[inline(always)]
fn word(start: *mut u8, size: usize) -> usize {
    start.addr() ^ size << SIZE_SHIFT
}

#[inline(always)]
fn last_byte(start: *mut u8) -> u8 {
    (start.addr() >> 3) as u8
}

/// Takes a block from a peer and writes it. Ends the cell if there is none.
#[inline(always)]
pub fn take(calls: &Calls, size: usize) -> *mut u8 {
    // SAFETY: the size is not 0, the alignment a power of two.
    let start = unsafe { (calls.alloc)(size, 8) };
    seal(start, size);
    start
}

/// Writes a block of `size` bytes. Ends the cell if `start` is null.
#[inline(always)]
pub fn seal(start: *mut u8, size: usize) {
    if start.is_null() {
        out_of_memory(size);
    }
    // SAFETY: a peer gave the block, at least a word long and aligned to it.
    unsafe { start.cast::<usize>().write(word(start, size)) };
    if size > MIN_SIZE {
        // SAFETY: a peer gave `size` bytes.
        unsafe { start.add(size - 1).write(last_byte(start)) };
    }
}

/// Checks a block of `size` bytes, written by [`seal`] at `from`, and wipes it. Ends the cell if it is not as it was
/// written.
#[inline(always)]
pub fn unseal(start: *mut u8, size: usize) {
    check(start, start, size);
    // SAFETY: the block is the caller's.
    unsafe { start.cast::<usize>().write(0) };
}

/// Checks a block that was written at `from`. Ends the cell if it is not as it was written.
#[inline(always)]
pub fn check(start: *mut u8, from: *mut u8, size: usize) {
    // SAFETY: the block is the caller's, at least a word long and aligned to it.
    let found = unsafe { start.cast::<usize>().read() };
    if found != word(from, size) {
        spoilt(start, size);
    }
    if size > MIN_SIZE {
        // SAFETY: the block is the caller's, `size` bytes long.
        let found = unsafe { start.add(size - 1).read() };
        if found != last_byte(from) {
            spoilt(start, size);
        }
    }
}

/// Checks a block and gives it back.
#[inline(always)]
pub fn give(calls: &Calls, start: *mut u8, size: usize) {
    unseal(start, size);
    // SAFETY: the block came from this peer with this size and alignment, and nobody uses it any more.
    unsafe { (calls.free)(start, size, 8) };
}

/// The size that stands in a block's first word. Ends the cell if none can stand there.
#[inline(always)]
pub fn size_in(start: *mut u8) -> usize {
    // SAFETY: the block is the caller's and was written.
    let found = unsafe { start.cast::<usize>().read() } ^ start.addr();
    if found & ((1 << SIZE_SHIFT) - 1) != 0 {
        spoilt(start, 0);
    }
    found >> SIZE_SHIFT
}

/// Ends the cell: there is no such block.
#[cold]
#[inline(never)]
pub fn out_of_memory(size: usize) -> ! {
    crate::cell::fail(crate::cell::Failure::OutOfMemory, &format!("no memory for {size} bytes"));
    process::abort()
}

/// Ends the cell: a block's content is not its owner's.
#[cold]
#[inline(never)]
pub fn spoilt(start: *mut u8, size: usize) -> ! {
    crate::cell::fail(
        crate::cell::Failure::Spoilt,
        &format!("block {start:p} of {size} bytes is not as it was written"),
    );
    process::abort()
}

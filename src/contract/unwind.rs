//! Calls of the kernel's own code that may panic, and must not unwind through the heap.
//!
//! An allocator that unwinds is undefined behaviour, and a hint or a hook is safe to write. So a panic ends at the
//! call: the program is aborted. Where panics abort anyway, as in most kernels, this is no instruction.

/// Does `call`; a panic in it aborts.
#[inline(always)]
pub(crate) extern "C" fn never_unwinding<T>(call: impl FnOnce() -> T) -> T {
    call()
}

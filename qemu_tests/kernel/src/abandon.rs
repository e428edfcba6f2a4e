//! Code that is left in the middle, for good: what a panic does, and then the test goes on.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{Context, erased::Erased};

unsafe extern "C" {
    /// Calls `work(argument)`, having noted the stack pointer with which a handler may go on at `catch_resume` instead.
    fn catch_call(work: unsafe extern "C" fn(*mut u8), argument: *mut u8, stack: *const AtomicU64);
    static catch_resume: u8;
}

/// The stack pointer of the call that may be left. One at a time, on one CPU.
static STACK: AtomicU64 = AtomicU64::new(0);

/// Runs `work`, which a handler may [`leave`]. What it borrowed is then as it was at that moment, and nothing of it is
/// dropped. Does not nest.
pub fn catch(work: impl FnOnce()) {
    let mut work = Erased::new(work);
    let (run, argument) = work.parts();
    // SAFETY: `run` is for that argument.
    unsafe { catch_call(run, argument, &raw const STACK) };
}

/// For a handler that interrupted code inside [`catch`], on the same CPU: when it returns, that code is left,
/// interrupts open.
pub fn leave(context: &mut Context) {
    context.leave_for((&raw const catch_resume).addr() as u64, STACK.load(Relaxed));
}

//! The timer of each CPU.

use crate::{Context, arch, arch::vector, erased::Erased, handlers};

pub use crate::ticker::{start, stop};

/// Has `handler` called at each timer interrupt of every CPU.
pub fn set_handler(handler: handlers::Handler) {
    handlers::set_handler(vector::TIMER, handler);
}

/// How many timer interrupts `cpu` has had.
#[must_use]
pub fn ticks(cpu: usize) -> u64 {
    handlers::ticks(cpu)
}

/// What [`once_in`] raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raise {
    /// An interrupt.
    Vector(u8),
    /// An NMI. Processors may not know this way to raise one; the emulator does.
    Nmi,
}

unsafe extern "C" {
    static timed_begin: u8;
    static timed_end: u8;
}

/// Runs `work` and has the timer raise an interrupt once, after `count` of its counts: before the call, if they are
/// few; not at all, if the call is over by then. Where the emulator counts instructions, at a count each, a count is an
/// instruction.
pub fn once_in(work: impl FnOnce(), count: u32, raise: Raise) {
    let mut work = Erased::new(work);
    let (run, argument) = work.parts();
    // SAFETY: `run` is for that argument.
    unsafe { arch::call_timed(run, argument, count, raise) };
}

/// For the handler of [`once_in`]'s interrupt: whether it came inside the call.
#[must_use]
pub fn is_inside(context: &Context) -> bool {
    let outside = (&raw const timed_begin).addr() as u64..(&raw const timed_end).addr() as u64;
    !outside.contains(&context.pc())
}

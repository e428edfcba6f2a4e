//! Which function is called for which interrupt or exception, the same on every CPU.

use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use crate::{Context, cpu, sched, start::MAX_CPUS};

/// What is called for a vector.
pub type Handler = fn(&mut Context);

static HANDLERS: [AtomicPtr<()>; 256] = [const { AtomicPtr::new(core::ptr::null_mut()) }; 256];
static TICKS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// Has `handler` called for `vector`, on every CPU, from now on.
pub fn set_handler(vector: u8, handler: Handler) {
    HANDLERS[usize::from(vector)].store(handler as *mut (), Ordering::Release);
}

/// The handler of `vector`.
pub(crate) fn handler(vector: u8) -> Option<Handler> {
    let handler = HANDLERS[usize::from(vector)].load(Ordering::Acquire);
    // SAFETY: `set_handler` stores nothing else, and null is `None`.
    unsafe { core::mem::transmute::<*mut (), Option<Handler>>(handler) }
}

/// This CPU has had a timer interrupt.
pub(crate) fn count_tick() {
    TICKS[cpu::index()].fetch_add(1, Ordering::Relaxed);
}

/// How many timer interrupts came to `cpu`.
pub(crate) fn ticks(cpu: usize) -> u64 {
    TICKS[cpu].load(Ordering::Relaxed)
}

/// The end of a timer interrupt: the context to go on with.
pub(crate) fn after_tick(context: *mut Context) -> *mut Context {
    if cpu::is_pinned() { context } else { sched::switch(context, true) }
}

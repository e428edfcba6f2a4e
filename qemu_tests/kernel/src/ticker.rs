//! Timer interrupts: again and again, or once as another interrupt.
//!
//! A CPU's timer has one deadline. The next one is set at the end of the handler, so that what was interrupted goes on
//! for a whole period, however slow the handler is on a loaded host.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{Context, arch, clock, cpu, handlers, start::MAX_CPUS};

/// Cycles from the end of an interrupt of each CPU to the next; 0: none.
static PERIODS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
/// The vector that the next interrupt of each CPU stands for, plus one; 0: a tick.
static ONCE: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// Interrupts this CPU from now on: `micros` microseconds after now, and after the end of each timer interrupt.
pub fn start(micros: u32) {
    let period = (u64::from(micros) * clock::cycles_per_micro()).max(1);
    PERIODS[cpu::index()].store(period, Relaxed);
    arch::set_deadline(period);
}

/// No more timer interrupts on this CPU; one may be on its way still.
pub fn stop() {
    PERIODS[cpu::index()].store(0, Relaxed);
    arch::clear_deadline();
}

/// The next timer interrupt of this CPU is another one.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn stand_for(vector: u8) {
    ONCE[cpu::index()].store(u64::from(vector) + 1, Relaxed);
}

/// The next timer interrupt of this CPU is a tick again.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn stand_for_nothing() {
    ONCE[cpu::index()].store(0, Relaxed);
}

/// The timer's interrupt has come: calls the handler and sets the next deadline. Gives the context to go on with.
pub(crate) fn tick(context: *mut Context) -> *mut Context {
    // SAFETY: the stub's frame, which nobody else uses meanwhile.
    let registers = unsafe { &mut *context };
    arch::clear_deadline();
    match ONCE[cpu::index()].swap(0, Relaxed) {
        0 => {}
        vector => {
            if let Some(handler) = handlers::handler((vector - 1) as u8) {
                handler(registers);
            }
            return context;
        }
    }
    handlers::count_tick();
    if let Some(handler) = handlers::handler(arch::vector::TIMER) {
        handler(registers);
    }
    match PERIODS[cpu::index()].load(Relaxed) {
        0 => {}
        period => arch::set_deadline(period),
    }
    handlers::after_tick(context)
}

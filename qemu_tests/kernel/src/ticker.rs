//! Timer interrupts, where a CPU's timer counts up to one deadline: again and again, or once as another interrupt.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{Context, arch, clock, cpu, handlers, start::MAX_CPUS};

/// Cycles between two interrupts of each CPU; 0: none.
static PERIODS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
/// The vector that the next interrupt of each CPU stands for, plus one; 0: a tick.
static ONCE: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// Interrupts this CPU every `micros` microseconds from now on.
pub fn start_timer(micros: u32) {
    let period = (u64::from(micros) * clock::cycles_per_micro()).max(1);
    PERIODS[cpu::index()].store(period, Relaxed);
    arch::set_deadline(period);
}

/// No more timer interrupts on this CPU; one may be on its way still.
pub fn stop_timer() {
    PERIODS[cpu::index()].store(0, Relaxed);
    arch::clear_deadline();
}

/// The next timer interrupt of this CPU is another one.
pub(crate) fn stand_for(vector: u8) {
    ONCE[cpu::index()].store(u64::from(vector) + 1, Relaxed);
}

/// The next timer interrupt of this CPU is a tick again.
pub(crate) fn stand_for_nothing() {
    ONCE[cpu::index()].store(0, Relaxed);
}

/// The timer's interrupt has come: sets the next deadline and calls the handler. Gives the context to go on with.
pub(crate) fn tick(context: *mut Context) -> *mut Context {
    // SAFETY: the stub's frame, which nobody else uses meanwhile.
    let registers = unsafe { &mut *context };
    match PERIODS[cpu::index()].load(Relaxed) {
        0 => arch::clear_deadline(),
        period => arch::set_deadline(period),
    }
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
    handlers::after_tick(context)
}

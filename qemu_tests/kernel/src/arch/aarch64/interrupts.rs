//! Interrupts and exceptions: one way in, a handler per interrupt number.
//!
//! Handlers run with IRQs masked, on the stack of what they interrupted; FIQs, which are the NMIs here, and exceptions
//! on the CPU's own. An interrupt without a handler fails the test, with the registers.

use core::arch::asm;

use aarch64_cpu::registers::{DAIF, ESR_EL1, FAR_EL1, Readable, VBAR_EL1, Writeable};

use super::{exit, gic, vector};
use crate::{breakpoints, console, cpu, fault, handlers, println, sched, start, ticker};

pub use crate::handlers::{Handler, set_handler};

/// Why `interrupt_dispatch` is called.
pub(super) const EXCEPTION: u64 = 0;
pub(super) const IRQ: u64 = 1;
pub(super) const FIQ: u64 = 2;
pub(super) const SERROR: u64 = 3;
pub(super) const YIELDED: u64 = 4;
pub(super) const OTHER: u64 = 5;

/// Exception classes.
pub(super) const SVC: u64 = 0x15;
const DATA_ABORT: u64 = 0x25;
const BREAKPOINT: u64 = 0x3c;

/// IRQs are masked, in a saved or live mask.
const MASKED: u64 = 1 << 7;

/// The registers of what was interrupted. A handler may change them; what it leaves here is what goes on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "the names of the registers")]
pub struct Context {
    pub x: [u64; 31],
    /// The task's.
    pub sp: u64,
    pub pc: u64,
    pub pstate: u64,
}

impl Context {
    /// Where it was interrupted.
    #[must_use]
    pub fn pc(&self) -> u64 {
        self.pc
    }

    /// Goes on somewhere else.
    pub(crate) fn go_on_at(&mut self, pc: u64) {
        self.pc = pc;
    }

    /// Goes on somewhere else, on another stack, interrupts open.
    pub(crate) fn leave_for(&mut self, pc: u64, stack: u64) {
        self.pc = pc;
        self.sp = stack;
        self.pstate &= !(MASKED | 1 << 6);
    }

    /// Whether interrupts were open there.
    #[must_use]
    pub fn interrupts_are_open(&self) -> bool {
        self.pstate & MASKED == 0
    }
}

/// Whether IRQs are open.
#[must_use]
pub fn are_enabled() -> bool {
    DAIF.get() & MASKED == 0
}

/// Masks IRQs on this CPU.
pub fn disable() {
    // SAFETY: sets a mask bit. A barrier to the compiler.
    unsafe { asm!("msr daifset, #2", options(nostack, preserves_flags)) };
}

/// Opens IRQs on this CPU.
pub fn enable() {
    // SAFETY: clears a mask bit; every interrupt that may come has a handler, or fails the test. A barrier to the
    // compiler.
    unsafe { asm!("msr daifclr, #2", options(nostack, preserves_flags)) };
}

/// Runs `f` with IRQs masked; then they are as before.
pub fn without<R>(f: impl FnOnce() -> R) -> R {
    let open = are_enabled();
    disable();
    let result = f();
    if open {
        enable();
    }
    result
}

/// Opens FIQs on this CPU, for good.
pub(super) fn open_nmis() {
    // SAFETY: as for `enable`.
    unsafe { asm!("msr daifclr, #1", options(nostack, preserves_flags)) };
}

unsafe extern "C" {
    static vectors: u8;
}

/// Loads the table of vectors on this CPU.
pub(super) fn load() {
    VBAR_EL1.set((&raw const vectors).addr() as u64);
    aarch64_cpu::asm::barrier::isb(aarch64_cpu::asm::barrier::SY);
}

/// Called by every stub. Returns the context to go on with: another one if threads are to be switched.
#[unsafe(no_mangle)]
extern "C" fn interrupt_dispatch(context: *mut Context, kind: u64) -> *mut Context {
    // SAFETY: the stub passes what it has just saved.
    let registers = unsafe { &mut *context };
    match kind {
        YIELDED => return sched::switch(context, false),
        IRQ => return irq(context),
        FIQ => gic::take_nmi(|| match handlers::handler(vector::NMI) {
            Some(handler) => handler(registers),
            None => unexpected(registers, "NMI"),
        }),
        EXCEPTION => exception(registers),
        SERROR => unexpected(registers, "system error"),
        _ => unexpected(registers, "exception where none can be"),
    }
    context
}

fn irq(context: *mut Context) -> *mut Context {
    // A false alarm has no number.
    let Some(number) = gic::acknowledge() else { return context };
    if number == vector::TIMER {
        let next = ticker::tick(context);
        gic::end(number);
        return next;
    }
    match handlers::handler(number) {
        // SAFETY: the stub passes what it has just saved.
        Some(handler) => handler(unsafe { &mut *context }),
        None if number == vector::WAKE => {}
        // SAFETY: as above.
        None => unexpected(unsafe { &*context }, "interrupt without a handler"),
    }
    gic::end(number);
    context
}

fn exception(context: &mut Context) {
    match ESR_EL1.read(ESR_EL1::EC) {
        DATA_ABORT if fault::recover(context) => {}
        DATA_ABORT => unexpected(context, "page fault"),
        BREAKPOINT if breakpoints::stepped(context) => {}
        BREAKPOINT => unexpected(context, "breakpoint"),
        0 => unexpected(context, "invalid instruction"),
        0x21 => unexpected(context, "page fault of the code"),
        0x22 => unexpected(context, "unaligned code"),
        0x26 => unexpected(context, "unaligned stack"),
        _ => unexpected(context, "exception"),
    }
}

/// Called by the stub on the new thread's stack when the context was switched.
#[unsafe(no_mangle)]
extern "C" fn interrupt_switched() {
    sched::switched();
}

fn unexpected(context: &Context, name: &str) -> ! {
    console::take_for_failure();
    let (address, syndrome) = (FAR_EL1.get(), ESR_EL1.get());
    let remark = start::remark(address as usize);
    println!(
        "EXCEPTION {}: {name} (syndrome {syndrome:#x}) at {:#x}, address {address:#x}{remark}",
        cpu::Name,
        context.pc
    );
    println!("{context:#x?}");
    exit(super::Exit::Fail)
}

//! Interrupts and exceptions: one way in, a handler per vector.
//!
//! The processor has one software interrupt; which vectors it stands for is in a set of each CPU. Handlers run with
//! interrupts off, on the stack of what they interrupted, those of exceptions on the CPU's own. There are no interrupts
//! in S-mode that cannot be masked. An interrupt without a handler fails the test, with the registers.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use riscv::register::{sie, sstatus, stval, stvec};

use super::{exit, vector};
use crate::{breakpoints, console, cpu, fault, handlers, println, sched, start, start::MAX_CPUS, ticker};

pub use crate::handlers::{Handler, set_handler};

/// Causes; that of an interrupt has the highest bit.
const INTERRUPT: usize = 1 << 63;
const SOFTWARE: usize = INTERRUPT | 1;
const TIMER: usize = INTERRUPT | 5;
const BREAKPOINT: usize = 3;
const LOAD_FAULT: usize = 13;
/// No processor's.
pub(super) const YIELDED: usize = INTERRUPT | 63;

/// `sstatus`: interrupts are open, and were.
const SIE: usize = 1 << 1;
const SPIE: usize = 1 << 5;

/// Vectors that were sent to each CPU and not taken yet, a bit each.
static SENT: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// The registers of what was interrupted. A handler may change them; what it leaves here is what goes on. `tp` stays
/// the CPU's own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "the names of the registers")]
pub struct Context {
    pub ra: u64,
    pub sp: u64,
    pub gp: u64,
    pub unused: u64,
    pub t: [u64; 3],
    pub s: [u64; 2],
    pub a: [u64; 8],
    pub s2: [u64; 10],
    pub t3: [u64; 4],
    pub pc: u64,
    pub sstatus: u64,
    pub fcsr: u64,
    pub f: [u64; 32],
}

const _: () = assert!(size_of::<Context>() == 528, "as the way into a trap has it");

impl Context {
    /// Where it was interrupted.
    #[must_use]
    pub fn pc(&self) -> u64 {
        self.pc
    }

    /// The register of that number, but for `tp`.
    pub(super) fn x(&self, number: u32) -> u64 {
        let place = |first: u32| (number - first) as usize;
        match number {
            1 => self.ra,
            2 => self.sp,
            3 => self.gp,
            5..=7 => self.t[place(5)],
            8 | 9 => self.s[place(8)],
            10..=17 => self.a[place(10)],
            18..=27 => self.s2[place(18)],
            28..=31 => self.t3[place(28)],
            _ => 0,
        }
    }

    /// Goes on somewhere else.
    pub(crate) fn go_on_at(&mut self, pc: u64) {
        self.pc = pc;
    }

    /// Goes on somewhere else, on another stack, interrupts open.
    pub(crate) fn leave_for(&mut self, pc: u64, stack: u64) {
        self.pc = pc;
        self.sp = stack;
        self.sstatus |= SPIE as u64;
    }

    /// Whether interrupts were open there.
    #[must_use]
    pub fn interrupts_are_open(&self) -> bool {
        self.sstatus & SPIE as u64 != 0
    }
}

/// Whether interrupts are open.
#[must_use]
pub fn are_enabled() -> bool {
    sstatus::read().sie()
}

/// Masks interrupts on this CPU.
pub fn disable() {
    // SAFETY: clears a bit. A barrier to the compiler.
    unsafe { asm!("csrci sstatus, {}", const SIE, options(nostack)) };
}

/// Opens interrupts on this CPU.
pub fn enable() {
    // SAFETY: sets a bit; every interrupt that may come has a handler, or fails the test. A barrier to the compiler.
    unsafe { asm!("csrsi sstatus, {}", const SIE, options(nostack)) };
}

/// Runs `f` with interrupts off; then they are as before.
pub fn without<R>(f: impl FnOnce() -> R) -> R {
    let before: usize;
    // SAFETY: reads the register and clears a bit. A barrier to the compiler.
    unsafe { asm!("csrrci {}, sstatus, {}", out(reg) before, const SIE, options(nostack)) };
    let result = f();
    if before & SIE != 0 {
        enable();
    }
    result
}

unsafe extern "C" {
    fn trap_entry();
}

/// Loads the way in on this CPU, and lets its timer and software interrupts through.
pub(super) fn load() {
    let mut entry = stvec::Stvec::from_bits(0);
    entry.set_address(trap_entry as unsafe extern "C" fn() as usize);
    entry.set_trap_mode(stvec::TrapMode::Direct);
    // SAFETY: the way into traps, on every CPU that has an area, if only the shared one.
    unsafe { stvec::write(entry) };
    // SAFETY: there are handlers for both.
    unsafe { sie::set_ssoft() };
    // SAFETY: as above.
    unsafe { sie::set_stimer() };
}

/// Has `vector` handled by a CPU, which has to be interrupted afterwards.
pub(super) fn leave_for(cpu: usize, vector: u8) {
    SENT[cpu].fetch_or(1 << vector, Ordering::Release);
}

/// Called by every trap. Returns the context to go on with: another one if threads are to be switched.
#[unsafe(no_mangle)]
extern "C" fn interrupt_dispatch(context: *mut Context, cause: usize) -> *mut Context {
    match cause {
        YIELDED => return sched::switch(context, false),
        TIMER => return ticker::tick(context),
        _ => {}
    }
    // SAFETY: the stub passes what it has just saved.
    let registers = unsafe { &mut *context };
    match cause {
        SOFTWARE => software(registers),
        LOAD_FAULT if fault::recover(registers) => {}
        BREAKPOINT if breakpoints::stepped(registers) => {}
        _ => unexpected(registers, cause, ""),
    }
    context
}

fn software(context: &mut Context) {
    // SAFETY: clears the one bit, before the set is looked at.
    unsafe { asm!("csrci sip, 2", options(nostack)) };
    let mut sent = SENT[cpu::index()].swap(0, Ordering::AcqRel);
    while sent != 0 {
        let vector = sent.trailing_zeros() as u8;
        sent &= sent - 1;
        match handlers::handler(vector) {
            Some(handler) => handler(context),
            None if vector == vector::WAKE => {}
            None => unexpected(context, SOFTWARE, ": a vector without a handler"),
        }
    }
}

/// Called by the stub on the new thread's stack when the context was switched.
#[unsafe(no_mangle)]
extern "C" fn interrupt_switched() {
    sched::switched();
}

fn unexpected(context: &Context, cause: usize, what: &str) -> ! {
    console::take_for_failure();
    let address = stval::read();
    let name = match cause {
        0 => "unaligned code",
        1 => "access fault of the code",
        2 => "invalid instruction",
        3 => "breakpoint",
        4 | 6 => "unaligned access",
        5 | 7 => "access fault",
        12 => "page fault of the code",
        13 | 15 => "page fault",
        _ if cause & INTERRUPT != 0 => "interrupt without a handler",
        _ => "exception",
    };
    let remark = start::remark(address);
    println!(
        "EXCEPTION {}: {name}{what} (cause {cause:#x}) at {:#x}, address {address:#x}{remark}",
        cpu::Name,
        context.pc
    );
    println!("{context:#x?}");
    exit(super::Exit::Fail)
}

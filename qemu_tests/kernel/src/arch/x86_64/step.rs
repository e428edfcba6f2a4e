//! Single steps by the trap flag, which makes the CPU raise a debug exception after each instruction; it clears the
//! flag at every entry.
//!
//! A repeated string instruction traps after every repetition; the last one alone is shown.

use core::ptr::with_exposed_provenance;

use super::Context;
use super::interrupts::{self, INTERRUPTS};
use crate::step::{self, Next, Step};

/// The trap flag in a saved flags register.
const TRAP: u64 = 1 << 8;
const DEBUG: u8 = 1;

/// Before the first step.
pub(crate) fn prepare_steps() {
    interrupts::set_handler(DEBUG, stepped);
}

/// The handler of the exception.
fn stepped(context: &mut Context) {
    /// `sti`, one byte.
    const OPEN: u8 = 0xfb;
    let Some(mut current) = step::current() else {
        context.rflags &= !TRAP;
        return;
    };
    let rip = current.pc;
    if rip == context.rip {
        return;
    }
    current.pc = context.rip;
    step::go_on(current);
    let mut last = rip;
    // Interrupts stay out for one instruction more, which is shown as masking; in the emulator so does this exception.
    if code(rip) == OPEN && context.rip != rip + 1 {
        last = rip + 1;
        let mut between = Context { rip: last, rflags: context.rflags & !INTERRUPTS, ..*context };
        current.look(&mut between, Step { pc: rip, locks: false });
    }
    let next = current.look(context, Step { pc: last, locks: locks(last) });
    if context.rip == step::returned() || next == Next::Run {
        context.rflags &= !TRAP;
    }
}

/// A byte of code.
fn code(rip: u64) -> u8 {
    // SAFETY: asked for the bytes of instructions that were executed, which are mapped.
    unsafe { with_exposed_provenance::<u8>(rip as usize).read_volatile() }
}

/// Whether the instruction at `rip` locks memory.
fn locks(rip: u64) -> bool {
    const LOCK: u8 = 0xf0;
    // Operand and address size, repetition, segments, and REX, which comes last.
    let is_prefix =
        |byte: u8| matches!(byte, 0x66 | 0x67 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x40..=0x4f);
    let mut offset = 0;
    loop {
        match code(rip + offset) {
            LOCK => return true,
            prefix if is_prefix(prefix) => offset += 1,
            // `xchg` whose operand is memory, not a register.
            0x86 | 0x87 => return code(rip + offset + 1) < 0xc0,
            _ => return false,
        }
    }
}

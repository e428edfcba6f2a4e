//! Single steps: a look at this CPU after every instruction of a piece of code.
//!
//! The trap flag makes the CPU raise a debug exception after each instruction; `step_call` in `entry` sets it right before it calls
//! the code, so that the first step is the call and the last one the return, and nothing of the instrument is in between. While a look is
//! at work the flag is clear, since the CPU clears it at every entry: a look may raise interrupts, and may step other code itself.
//!
//! A repeated string instruction traps after every repetition; [`through`] shows the last one alone.

use core::cell::Cell;
use core::ptr::{NonNull, with_exposed_provenance};

use super::interrupts::{self, INTERRUPTS};
use super::{Context, cpu};
use crate::{erased::Erased, start::MAX_CPUS};

/// The trap flag in a saved flags register.
const TRAP: u64 = 1 << 8;
const DEBUG: u8 = 1;

/// What is asked after each step.
type Look<'a> = dyn FnMut(&mut Context, Step) -> Next + 'a;

/// One instruction that was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it is.
    pub pc: u64,
    /// Whether it locks memory: it has the prefix, or exchanges a register with memory, which locks without it.
    pub locks: bool,
}

/// What happens after a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another step.
    Step,
    /// The rest runs freely.
    Run,
}

/// The steps that are being made on a CPU.
struct Current {
    look: NonNull<Look<'static>>,
    /// The instruction that the next exception comes after.
    rip: u64,
}

struct Cpu(Cell<Option<Current>>);

// SAFETY: each CPU uses its own entry only, and never in two contexts at once: whoever has the value out of the cell puts one back before
// the next step.
unsafe impl Sync for Cpu {}

static CPUS: [Cpu; MAX_CPUS] = [const { Cpu(Cell::new(None)) }; MAX_CPUS];

unsafe extern "C" {
    /// Calls `work(argument)` with the trap flag set.
    fn step_call(work: unsafe extern "C" fn(*mut u8), argument: *mut u8);
    static step_called: u8;
    static step_returned: u8;
}

/// Runs `work` and has `look` called after each instruction of it, from the call to the return. Nests: `look` may do the same. From any
/// context of a CPU that stays this one.
pub fn through(work: impl FnOnce(), mut look: impl FnMut(&mut Context, Step) -> Next) {
    interrupts::set_handler(DEBUG, stepped);
    let look: &mut Look<'_> = &mut look;
    // SAFETY: only the lifetime changes; the pointer is out of use when this function returns.
    let look = unsafe { core::mem::transmute::<&mut Look<'_>, &mut Look<'static>>(look) };
    let here = &CPUS[cpu::index()].0;
    let outer = here.replace(Some(Current { look: NonNull::from(look), rip: (&raw const step_called).addr() as u64 }));
    let mut work = Erased::new(work);
    let (run, argument) = work.parts();
    // SAFETY: `run` is for that argument, and `stepped` handles the exceptions.
    unsafe { step_call(run, argument) };
    here.set(outer);
}

/// The handler of the exception.
fn stepped(context: &mut Context) {
    /// `sti`, one byte.
    const OPEN: u8 = 0xfb;
    let here = &CPUS[cpu::index()].0;
    let Some(mut current) = here.take() else {
        context.rflags &= !TRAP;
        return;
    };
    let (rip, mut look) = (current.rip, current.look);
    let repeats = rip == context.rip;
    current.rip = context.rip;
    here.set(Some(current));
    if repeats {
        return;
    }
    // SAFETY: `through` keeps the value alive until it returns, and takes no other reference to it; its code is not entered again before
    // this call of it is over, since it runs without the flag.
    let look = unsafe { look.as_mut() };
    let mut last = rip;
    // Interrupts stay out for one instruction more, which is shown as masking; in the emulator so does this exception.
    if code(rip) == OPEN && context.rip != rip + 1 {
        last = rip + 1;
        let mut between = Context { rip: last, rflags: context.rflags & !INTERRUPTS, ..*context };
        look(&mut between, Step { pc: rip, locks: false });
    }
    let next = look(context, Step { pc: last, locks: locks(last) });
    let returned = context.rip == (&raw const step_returned).addr() as u64;
    if returned || next == Next::Run {
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

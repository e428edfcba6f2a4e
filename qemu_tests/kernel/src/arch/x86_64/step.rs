//! Single steps: a look at this CPU after every instruction of a piece of code.
//!
//! The trap flag makes the CPU raise a debug exception after each instruction; `step_call` in `entry` sets it right before it calls
//! the code, so that the first step is the call and the last one the return, and nothing of the instrument is in between. While a look is
//! at work the flag is clear, since the CPU clears it at every entry: a look may raise interrupts, and may step other code itself.
//!
//! A repeated string instruction traps after every repetition; [`through`] shows the last one alone.

use core::cell::Cell;
use core::ptr::{NonNull, with_exposed_provenance};

use super::{Context, Erased, MAX_CPUS, cpu, interrupts};

/// The trap flag in a saved flags register.
const TRAP: u64 = 1 << 8;
const DEBUG: u8 = 1;

/// What is asked after each step.
type Look<'a> = &'a mut dyn FnMut(&mut Context, Step) -> Next;

/// One instruction that was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it is.
    pub rip: u64,
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
    look: NonNull<dyn FnMut(&mut Context, Step) -> Next>,
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
    let look: Look<'_> = &mut look;
    // SAFETY: only the lifetime changes; the pointer is out of use when this function returns.
    let look = unsafe { core::mem::transmute::<Look<'_>, Look<'static>>(look) };
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
    let here = &CPUS[cpu::index()].0;
    let Some(mut current) = here.take() else {
        context.rflags &= !TRAP;
        return;
    };
    let step = Step { rip: current.rip, locks: locks(current.rip) };
    let repeats = current.rip == context.rip;
    current.rip = context.rip;
    let returned = context.rip == (&raw const step_returned).addr() as u64;
    let mut look = current.look;
    here.set(Some(current));
    if repeats {
        return;
    }
    // SAFETY: `through` keeps the value alive until it returns, and takes no other reference to it; its code is not entered again before
    // this call of it is over, since it runs without the flag.
    let next = (unsafe { look.as_mut() })(context, step);
    if returned || next == Next::Run {
        context.rflags &= !TRAP;
    }
}

/// Whether the instruction at `rip` locks memory.
fn locks(rip: u64) -> bool {
    const LOCK: u8 = 0xf0;
    // Operand and address size, repetition, segments, and REX, which comes last.
    let is_prefix = |byte: u8| {
        matches!(byte, 0x66 | 0x67 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 | 0x40..=0x4f)
    };
    // SAFETY: an instruction that was just executed is mapped, and it is at most 15 bytes long; the loop below ends inside it.
    let byte = |offset: u64| unsafe { with_exposed_provenance::<u8>((rip + offset) as usize).read_volatile() };
    let mut offset = 0;
    loop {
        match byte(offset) {
            LOCK => return true,
            prefix if is_prefix(prefix) => offset += 1,
            // `xchg` whose operand is memory, not a register.
            0x86 | 0x87 => return byte(offset + 1) < 0xc0,
            _ => return false,
        }
    }
}

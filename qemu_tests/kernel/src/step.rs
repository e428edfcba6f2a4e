//! Single steps: a look at this CPU after every instruction of a piece of code.
//!
//! `step_call`, in the architecture's `entry`, begins right before it calls the code, so that the first step is the
//! call and the last one the return, and nothing of the instrument is in between. While a look is at work nothing is
//! stepped: it may raise interrupts, and may step other code itself. How a CPU stops after an instruction is the
//! architecture's: a flag of the processor's, or breakpoints.

use core::cell::Cell;
use core::ptr::NonNull;

use crate::{Context, arch, cpu, erased::Erased, start::MAX_CPUS, sync::Lock};

/// What is asked after each step.
pub(crate) type Look<'a> = dyn FnMut(&mut Context, Step) -> Next + 'a;

/// One instruction that was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it is.
    pub pc: u64,
    /// Whether it locks memory: an instruction that reads and writes at once, or the store of a pair that does.
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
#[derive(Clone, Copy)]
pub(crate) struct Current {
    look: NonNull<Look<'static>>,
    /// The instruction that is executed next, and looked at then.
    pub(crate) pc: u64,
}

impl Current {
    /// Asks what is wanted after a step.
    pub(crate) fn look(&mut self, context: &mut Context, step: Step) -> Next {
        // SAFETY: `through` keeps the value alive until it returns, and takes no other reference to it; its code is not
        // entered again before this call of it is over, since it is not stepped.
        let look = unsafe { self.look.as_mut() };
        look(context, step)
    }
}

struct Cpu(Cell<Option<Current>>);

// SAFETY: each CPU uses its own entry only, and never in two contexts at once: steps are made by one of them, and
// `through` restores what it found.
unsafe impl Sync for Cpu {}

static CPUS: [Cpu; MAX_CPUS] = [const { Cpu(Cell::new(None)) }; MAX_CPUS];

unsafe extern "C" {
    /// Calls `work(argument)` in steps.
    fn step_call(work: unsafe extern "C" fn(*mut u8), argument: *mut u8);
    static step_called: u8;
    static step_returned: u8;
}

/// Runs `work` and has `look` called after each instruction of it, from the call to the return. Nests: `look` may do
/// the same. From any context of a CPU that stays this one.
pub fn through(work: impl FnOnce(), mut look: impl FnMut(&mut Context, Step) -> Next) {
    arch::prepare_steps();
    let look: &mut Look<'_> = &mut look;
    // SAFETY: only the lifetime changes; the pointer is out of use when this function returns.
    let look = unsafe { core::mem::transmute::<&mut Look<'_>, &mut Look<'static>>(look) };
    let here = &CPUS[cpu::index()].0;
    let outer = here.replace(Some(Current { look: NonNull::from(look), pc: called() }));
    let mut work = Erased::new(work);
    let (run, argument) = work.parts();
    // SAFETY: `run` is for that argument, and the architecture handles the exceptions.
    unsafe { step_call(run, argument) };
    here.set(outer);
}

/// Runs `work`, which makes steps, while no other CPU is in here: where steps are made by breakpoints, these stand in
/// code that all CPUs share. On x86-64 each CPU has steps of its own, and nobody waits.
///
/// What other CPUs do meanwhile must not be code that is stepped, nor anything that this code calls.
pub fn alone<R>(work: impl FnOnce() -> R) -> R {
    static TURN: Lock<()> = Lock::new(());
    if cfg!(target_arch = "x86_64") { work() } else { TURN.with(|()| work()) }
}

/// The steps of this CPU, if it makes any.
pub(crate) fn current() -> Option<Current> {
    CPUS[cpu::index()].0.get()
}

/// The instruction that is executed next.
pub(crate) fn go_on(current: Current) {
    CPUS[cpu::index()].0.set(Some(current));
}

/// The address of the call, which is the first step.
pub(crate) fn called() -> u64 {
    (&raw const step_called).addr() as u64
}

/// The address behind the last step.
pub(crate) fn returned() -> u64 {
    (&raw const step_returned).addr() as u64
}

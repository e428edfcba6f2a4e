//! The machine that a sequence runs on: which CPU it says to be, and what comes into the middle of an operation.
//!
//! An interrupt is armed before an operation and comes once: at the n-th *call* (a question to the CPU identity, a call
//! of the provider), or behind the n-th *instruction*, counted by the processor's trap flag, which raises `SIGTRAP`
//! after each one. Providers that use the host's own allocator lift the flag, since that must not be interrupted by
//! what uses it too.

use std::cell::{Cell, OnceCell};
use std::rc::Weak;

use smp_heap::{CpuHint, CpuPin};

use super::{At, Cpu, Failing, Interrupt, Kinds};

/// Who does what an interrupt brings.
pub(crate) trait Handler {
    fn interrupted(&self, interrupt: Interrupt);
}

/// See the file's head. All that interrupts share with what they interrupt is in cells.
pub(crate) struct Machine {
    /// Caches of the heap.
    caches: usize,
    cpu: Cell<Cpu>,
    /// How often a lying CPU was asked.
    asked: Cell<usize>,
    armed: Cell<Option<Interrupt>>,
    left: Cell<u32>,
    inside: Cell<bool>,
    handler: OnceCell<Weak<dyn Handler>>,
    failing: Cell<Failing>,
    failing_left: Cell<u32>,
    wrong: Cell<Option<String>>,
    /// Calls of the provider that may fail.
    pub(crate) calls: Cell<u64>,
    pub(crate) at_calls: Cell<u64>,
    pub(crate) at_instructions: Cell<u64>,
    pub(crate) failed: Cell<u64>,
}

impl Machine {
    pub(crate) fn new(caches: usize) -> Self {
        Self {
            caches,
            cpu: Cell::new(Cpu(0)),
            asked: Cell::new(0),
            armed: Cell::new(None),
            left: Cell::new(0),
            inside: Cell::new(false),
            handler: OnceCell::new(),
            failing: Cell::new(Failing::Never),
            failing_left: Cell::new(0),
            wrong: Cell::new(None),
            calls: Cell::new(0),
            at_calls: Cell::new(0),
            at_instructions: Cell::new(0),
            failed: Cell::new(0),
        }
    }

    /// Who is called, once there is somebody.
    pub(crate) fn call_on_interrupt(&self, handler: Weak<dyn Handler>) {
        assert!(self.handler.set(handler).is_ok(), "one handler for a machine");
    }

    /// Something that must not be was seen. The first one counts; contexts in the middle of others cannot say so in
    /// another way.
    pub(crate) fn report(&self, what: String) {
        let first = self.wrong.take().unwrap_or(what);
        self.wrong.set(Some(first));
    }

    /// What was reported.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.wrong.take().map_or(Ok(()), Err)
    }

    // CPUs.

    pub(crate) fn move_to(&self, cpu: Cpu) {
        self.cpu.set(cpu);
    }

    /// What the CPU says as a hint: its number, too large a one, none, or another one each time.
    fn hint(&self) -> Option<usize> {
        let Cpu(number) = self.cpu.get();
        match number % 16 {
            low @ 0..=9 => Some(usize::from(low)),
            10 => None,
            11 => Some(usize::MAX),
            12 => Some(usize::MAX / 2 + 7),
            _ => {
                self.asked.set(self.asked.get() + 1);
                Some(self.asked.get().wrapping_mul(0x9e37_79b9) >> 3)
            }
        }
    }

    /// Its index under a pin: one of the caches', or one more, without a cache.
    fn index(&self) -> usize {
        usize::from(self.cpu.get().0) % (self.caches + 1)
    }

    /// Another CPU than the one that runs, if that is what `cpu` must be.
    fn another(&self, cpu: Cpu) -> Cpu {
        let other = usize::from(cpu.0) % (self.caches + 1);
        if other == self.index() { Cpu(((other + 1) % (self.caches + 1)) as u8) } else { cpu }
    }

    // Interrupts.

    /// Does `work`, an operation of the heap, with `interrupt` coming in between.
    pub(crate) fn interrupted<R>(&self, interrupt: Interrupt, work: impl FnOnce() -> R) -> R {
        self.armed.set(Some(interrupt));
        match interrupt.at {
            At::Call(count) => {
                self.left.set(u32::from(count % 32));
                let result = work();
                self.armed.set(None);
                result
            }
            At::Instruction(count) => {
                self.left.set(u32::from(count % At::LONGEST) + 1);
                step::run(self, work)
            }
        }
    }

    /// A place where what is armed for the n-th call may come.
    pub(crate) fn call(&self) {
        if !matches!(self.armed.get(), Some(Interrupt { at: At::Call(_), .. })) {
            return;
        }
        match self.left.get().checked_sub(1) {
            Some(left) => self.left.set(left),
            None => {
                self.at_calls.set(self.at_calls.get() + 1);
                self.deliver();
            }
        }
    }

    /// Something comes, now.
    fn deliver(&self) {
        let Some(interrupt) = self.armed.take() else { return };
        let cpu = self.cpu.get();
        if let Some(other) = interrupt.cpu {
            self.cpu.set(self.another(other));
        }
        self.inside.set(true);
        if let Some(handler) = self.handler.get().and_then(Weak::upgrade) {
            handler.interrupted(interrupt);
        }
        self.inside.set(false);
        self.cpu.set(cpu);
    }

    /// Whether instructions are being counted.
    fn is_counting(&self) -> bool {
        matches!(self.armed.get(), Some(Interrupt { at: At::Instruction(_), .. }))
    }

    /// Does what must not be interrupted at an instruction: what the host's allocator is used in.
    pub(crate) fn unstepped<R>(&self, work: impl FnOnce() -> R) -> R {
        if !self.is_counting() {
            return work();
        }
        step::set(false);
        let result = work();
        step::set(self.is_counting());
        result
    }

    /// Does what may be interrupted at an instruction after all, in the middle of what is
    /// [`unstepped`](Self::unstepped).
    pub(crate) fn stepped<R>(&self, work: impl FnOnce() -> R) -> R {
        step::set(self.is_counting());
        let result = work();
        step::set(false);
        result
    }

    /// Whether something has come into the middle of an operation.
    pub(crate) fn is_inside(&self) -> bool {
        self.inside.get()
    }

    // Failing providers.

    pub(crate) fn fail(&self, failing: Failing) {
        self.failing.set(failing);
        if let Failing::Once(_, count) = failing {
            self.failing_left.set(u32::from(count));
        }
    }

    pub(crate) fn is_failing(&self) -> bool {
        !matches!(self.failing.get(), Failing::Never)
    }

    /// Whether this call of the provider fails.
    pub(crate) fn fails(&self, kind: Kinds) -> bool {
        let calls = self.calls.get() + 1;
        self.calls.set(calls);
        let is_meant = |kinds| kinds == kind || kinds == Kinds::Any;
        let fails = match self.failing.get() {
            Failing::Once(kinds, _) if is_meant(kinds) => match self.failing_left.get().checked_sub(1) {
                Some(left) => {
                    self.failing_left.set(left);
                    false
                }
                None => {
                    self.failing.set(Failing::Never);
                    true
                }
            },
            Failing::Share(kinds, share) if is_meant(kinds) => {
                calls.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56 < u64::from(share)
            }
            _ => false,
        };
        self.failed.set(self.failed.get() + u64::from(fails));
        fails
    }
}

/// The machine's CPUs, known by hint.
pub(crate) struct Guess(pub(crate) std::rc::Rc<Machine>);

impl CpuHint for Guess {
    fn current_cpu(&self) -> Option<usize> {
        self.0.call();
        self.0.hint()
    }

    // What came into the middle would wait for what stands still.
    fn may_wait(&self) -> bool {
        !self.0.is_inside()
    }
}

/// The machine's CPUs, known by a pin.
pub(crate) struct Sure(pub(crate) std::rc::Rc<Machine>);

// SAFETY: one thread; what comes into the middle on the same CPU finishes before it goes on, and what comes as another
// CPU has another index, or the one without a cache.
unsafe impl CpuPin for Sure {
    type Guard = ();

    fn pin(&self) {
        self.0.call();
    }

    fn index(&self, (): &()) -> usize {
        self.0.index()
    }

    fn may_wait(&self) -> bool {
        !self.0.is_inside()
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod step {
    //! One instruction at a time.

    use std::cell::Cell;
    use std::ptr::{null, null_mut};
    use std::sync::Once;

    use super::Machine;

    /// The trap flag of the processor's flags.
    const TRAP: i64 = 1 << 8;

    thread_local! {
        /// The machine whose instructions are counted on this thread.
        static STEPPED: Cell<*const Machine> = const { Cell::new(null()) };
    }

    /// Does `work` one instruction at a time until the armed interrupt has come.
    pub(super) fn run<R>(machine: &Machine, work: impl FnOnce() -> R) -> R {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(install);
        STEPPED.set(machine);
        set(true);
        let result = work();
        set(false);
        STEPPED.set(null());
        machine.armed.set(None);
        result
    }

    /// Sets or clears the trap flag.
    #[inline(never)]
    pub(super) fn set(on: bool) {
        // SAFETY: changes the trap flag alone; the traps that follow go to `on_trap`, which `run` installed.
        unsafe {
            std::arch::asm!("pushfq", "and qword ptr [rsp], {clear}", "or qword ptr [rsp], {flag}", "popfq",
                clear = const !TRAP, flag = in(reg) if on { TRAP } else { 0 });
        }
    }

    fn install() {
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_trap;
        // SAFETY: all zero is a valid value: no flags, an empty mask, no restorer.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: the handler uses cells of the thread that it comes to, and what the interrupted code allows (see
        // `unstepped`).
        let installed = unsafe { libc::sigaction(libc::SIGTRAP, &action, null_mut()) };
        assert_eq!(installed, 0, "SIGTRAP has a handler");
    }

    extern "C" fn on_trap(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let context = context.cast::<libc::ucontext_t>();
        // SAFETY: null, or a machine that `run` keeps borrowed until it is over.
        let machine = unsafe { STEPPED.get().as_ref() };
        let left = machine.map_or(0, |machine| {
            let left = machine.left.get().saturating_sub(1);
            machine.left.set(left);
            left
        });
        if left > 0 {
            return;
        }
        // SAFETY: the kernel passes the interrupted context, which this handler alone has.
        let registers = unsafe { &mut (*context).uc_mcontext.gregs };
        registers[libc::REG_EFL as usize] &= !TRAP;
        if let Some(machine) = machine {
            machine.at_instructions.set(machine.at_instructions.get() + 1);
            machine.deliver();
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod step {
    //! No instruction is interrupted here.

    use super::Machine;

    pub(super) fn run<R>(machine: &Machine, work: impl FnOnce() -> R) -> R {
        let result = work();
        machine.armed.set(None);
        result
    }

    pub(super) fn set(_: bool) {}
}

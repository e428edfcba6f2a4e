//! QEMU's `virt` board for aarch64: GICv3, PSCI, generic timer, EL1.
//!
//! Everything runs with the MMU and the caches on, from before the first line of Rust: without them, atomic
//! instructions are not guaranteed to work.

pub(crate) mod code;
pub mod cpu;
mod entry;
mod gic;
pub mod interrupts;

use core::arch::asm;
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use aarch64_cpu::asm::barrier;
use aarch64_cpu::registers::{
    CNTFRQ_EL0, CNTV_CTL_EL0, CNTV_TVAL_EL0, CNTVCT_EL0, FAR_EL1, MPIDR_EL1, Readable, Writeable,
};
use smccc::{Hvc, psci};

use crate::device_tree::Tree;
use crate::memory::{Ram, Stacks};
use crate::{clock, page_tables, start, start::MAX_CPUS, sync::Once, test, ticker, time, timer::Raise};

pub(crate) use crate::breakpoints::prepare_steps;
pub(crate) use cpu::AREA;
pub use interrupts::Context;

/// QEMU puts the device tree at the start of RAM.
const DEVICE_TREE: usize = 0x4000_0000;

/// Who uses which interrupt number. From `FREE` to 14 they are the test kernels'.
pub mod vector {
    /// The virtual timer.
    pub const TIMER: u8 = 27;
    /// Ends a sleep, and does nothing else.
    pub const WAKE: u8 = 0;
    /// The first of those that test kernels may use.
    pub const FREE: u8 = 1;
    /// No interrupt's number: that of the handler of NMIs.
    pub(super) const NMI: u8 = 255;
}

static IDS: Once<[usize; MAX_CPUS]> = Once::new();
static SERIAL: AtomicUsize = AtomicUsize::new(0x0900_0000);

/// What a CPU that starts has to know. It reads it past the caches.
#[repr(C, align(64))]
struct CpuStart {
    tables: AtomicUsize,
    stack: AtomicUsize,
    fault_stack: AtomicUsize,
    index: AtomicUsize,
}

static START: CpuStart = CpuStart {
    tables: AtomicUsize::new(0),
    stack: AtomicUsize::new(0),
    fault_stack: AtomicUsize::new(0),
    index: AtomicUsize::new(0),
};

unsafe extern "C" {
    fn run_on(stack: usize, fault_stack: usize, go: extern "C" fn() -> !) -> !;
    fn cpu_entry();
}

/// CPU 0 comes here from `boot_entry`, on a stack of the image.
#[unsafe(no_mangle)]
extern "C" fn rust_entry() -> ! {
    cpu::set_unknown();
    interrupts::load();
    clock::set_rate(CNTFRQ_EL0.get());

    // SAFETY: the boot tables map it, and the loader is done with it.
    let tree = unsafe { Tree::read(DEVICE_TREE) };
    let serial = tree.device("arm,pl011", 0);
    SERIAL.store(serial.start, Relaxed);
    // Bits beside those of the affinities say what the processor is like.
    let (ids, cpu_count) = tree.cpus(MPIDR_EL1.get() as usize & 0xff_00ff_ffff);
    let (distributor, redistributors) = (tree.device("arm,gic-v3", 0), tree.device("arm,gic-v3", 1));

    let mut ram = Ram::new(tree.ram(), &tree.used());
    let stacks = Stacks::new(&mut ram, cpu_count);
    let devices = [serial, distributor, redistributors];
    let (tables, mut ram) = page_tables::build(ram, stacks, tree.ram(), devices.into_iter());
    START.tables.store(tables, Relaxed);
    // SAFETY: here and below: the other CPUs do not run yet, and this runs once.
    unsafe { IDS.set(ids) };
    // SAFETY: as above.
    unsafe { start::share_out(&mut ram, stacks, cpu_count, tree.command_line()) };
    // SAFETY: the new tables map what is in use where it was, as the old ones do: image, stacks, boot memory.
    unsafe {
        asm!("dsb ish", "msr ttbr0_el1, {}", "isb", "tlbi vmalle1", "dsb nsh", "isb", in(reg) tables, options(nostack));
    }
    gic::set_up(distributor, redistributors, cpu_count);
    // SAFETY: the stacks are this CPU's own and mapped, and nothing of the old ones is needed any more.
    unsafe { run_on(stacks.main(0), stacks.fault(0), start_all) }
}

/// CPU 0, on its own stack and the final page tables.
extern "C" fn start_all() -> ! {
    gic::enable(0);
    start::run(start_cpu)
}

fn start_cpu(index: usize) {
    let stacks = start::stacks();
    START.stack.store(stacks.main(index), Relaxed);
    START.fault_stack.store(stacks.fault(index), Relaxed);
    START.index.store(index, Relaxed);
    let what = (&raw const START).addr();
    // SAFETY: writes the line back to memory, where the new CPU looks for it.
    unsafe { asm!("dc civac, {}", "dsb sy", in(reg) what, options(nostack)) };
    let entry = cpu_entry as unsafe extern "C" fn() as usize;
    if let Err(error) = psci::cpu_on::<Hvc>(hardware_id(index) as u64, entry as u64, what as u64) {
        test::fail(format_args!("CPU {index} does not start: {error}"));
    }
    time::wait_for("a CPU to start", 3 * time::SOON, || start::is_online(index));
}

/// The other CPUs come here from `cpu_entry`, on their own stacks and the final page tables.
#[unsafe(no_mangle)]
extern "C" fn cpu_main(index: usize) -> ! {
    cpu::set_unknown();
    interrupts::load();
    gic::enable(index);
    start::join(index)
}

/// Makes `memory` the area of this CPU, which from now on is `index`.
///
/// # Safety
/// `memory` fits [`AREA`] and belongs to this CPU for ever.
pub(crate) unsafe fn set_up_cpu(memory: *mut u8, index: usize) {
    // SAFETY: the contract is the same.
    unsafe { cpu::set_up(memory, index) };
    interrupts::open_nmis();
}

/// The processor's own number for a CPU.
fn hardware_id(cpu: usize) -> usize {
    IDS.get().map_or(0, |ids| ids[cpu])
}

/// The cycle counter: nanoseconds, or instructions when the emulator counts those.
#[must_use]
pub fn cycles() -> u64 {
    barrier::isb(barrier::SY);
    CNTVCT_EL0.get()
}

/// The address of the last page fault.
pub(crate) fn fault_address() -> usize {
    FAR_EL1.get() as usize
}

/// Code at `address` was changed, through another address.
pub(crate) fn code_has_changed(address: usize) {
    let alias = address + crate::memory::CODE_ALIAS;
    // SAFETY: writes the change back as far as code is fetched from, and has it fetched anew.
    unsafe {
        asm!("dc cvau, {}", "dsb ish", "ic ivau, {}", "dsb ish", "isb", in(reg) alias, in(reg) address,
            options(nostack, preserves_flags));
    }
}

/// Sleeps until an interrupt comes. With interrupts off when called, none is missed in between.
pub fn enable_and_halt() {
    barrier::dsb(barrier::SY);
    // A masked interrupt that is there ends the sleep too.
    aarch64_cpu::asm::wfi();
    interrupts::enable();
}

/// This CPU does nothing any more.
pub fn stop() -> ! {
    // SAFETY: masks everything.
    unsafe { asm!("msr daifset, #15", options(nostack)) };
    loop {
        aarch64_cpu::asm::wfi();
    }
}

/// Sends a byte once the port takes one.
pub fn serial_write(byte: u8) {
    /// Data and flags of a PL011, as words.
    const FLAGS: usize = 0x18;
    const FULL: u32 = 1 << 5;
    let port = SERIAL.load(Relaxed);
    let flags = with_exposed_provenance_mut::<u32>(port + FLAGS);
    // SAFETY: a register of the serial port, mapped as a device.
    while unsafe { flags.read_volatile() } & FULL != 0 {
        core::hint::spin_loop();
    }
    // SAFETY: as above.
    unsafe { with_exposed_provenance_mut::<u32>(port).write_volatile(byte.into()) };
}

/// How a run ends.
#[derive(Clone, Copy, Debug)]
pub enum Exit {
    /// QEMU leaves with 33.
    Pass,
    /// QEMU leaves with 35.
    Fail,
    /// QEMU leaves with twice the number and one.
    Code(u32),
}

/// Ends the run at once, on all CPUs: by a call of the debugger that QEMU stands for.
pub fn exit(how: Exit) -> ! {
    const EXIT: u64 = 0x18;
    const APPLICATION: u64 = 0x2_0026;
    let code = match how {
        Exit::Pass => 33,
        Exit::Fail => 35,
        Exit::Code(value) => 2 * u64::from(value) + 1,
    };
    let block = [APPLICATION, code];
    // SAFETY: the call reads the block and does not return.
    unsafe { asm!("hlt #0xf000", in("x0") EXIT, in("x1") &raw const block, options(nostack)) };
    stop()
}

/// Starts the machine anew.
pub fn reset() -> ! {
    // If it fails, this CPU stops.
    let _ = psci::system_reset::<Hvc>();
    stop()
}

/// The timer comes after so many cycles.
pub(crate) fn set_deadline(cycles: u64) {
    CNTV_TVAL_EL0.set(cycles);
    CNTV_CTL_EL0.write(CNTV_CTL_EL0::ENABLE::SET);
    barrier::isb(barrier::SY);
}

/// The timer does not come.
pub(crate) fn clear_deadline() {
    CNTV_CTL_EL0.write(CNTV_CTL_EL0::ENABLE::CLEAR);
    barrier::isb(barrier::SY);
}

unsafe extern "C" {
    fn timed_call(work: unsafe extern "C" fn(*mut u8), argument: *mut u8, count: u64);
}

/// Calls `work(argument)` with the timer set to raise something once, about `count` counts after the call begins.
///
/// # Safety
/// As for `work`.
pub(crate) unsafe fn call_timed(work: unsafe extern "C" fn(*mut u8), argument: *mut u8, count: u32, raise: Raise) {
    let cpu = cpu::index();
    match raise {
        Raise::Vector(vector) => ticker::stand_for(vector),
        Raise::Nmi => gic::timer_is_nmi(cpu, true),
    }
    // SAFETY: as the caller promises.
    unsafe { timed_call(work, argument, count.into()) };
    match raise {
        Raise::Vector(_) => ticker::stand_for_nothing(),
        Raise::Nmi => gic::timer_is_nmi(cpu, false),
    }
}

/// Interrupts from one CPU to others. Not from NMI handlers.
pub mod ipi {
    use super::gic::{self, To};

    /// To one CPU, this one if need be.
    pub fn send(cpu: usize, vector: u8) {
        gic::send(vector, To::Cpu(cpu));
    }

    /// To all others.
    pub fn send_all_but_self(vector: u8) {
        gic::send(vector, To::Others);
    }
}

/// Interrupts that masking IRQs does not keep out: FIQs. Their handler must not wait for anything, print, or send IPIs.
pub mod nmi {
    use super::gic::{self, To};
    use super::{interrupts, vector};

    /// Whether there is such a thing.
    pub const EXISTS: bool = true;

    /// Has `handler` called for each NMI of every CPU.
    pub fn set_handler(handler: interrupts::Handler) {
        interrupts::set_handler(vector::NMI, handler);
    }

    /// To one CPU, this one if need be.
    pub fn send(cpu: usize) {
        gic::send_nmi(To::Cpu(cpu));
    }

    /// To all others.
    pub fn broadcast() {
        gic::send_nmi(To::Others);
    }
}

/// Lets the scheduler choose on this CPU: an exception, whose context is saved as an interrupt's would be.
pub(crate) fn switch_threads() {
    // SAFETY: the stub saves and restores everything.
    unsafe { asm!("svc #0") };
}

/// The context of a thread that is to start with `entry(argument)` on the thread stack `stack`.
pub(crate) fn new_thread(stack: usize, entry: extern "C" fn(usize) -> !, argument: usize) -> *mut Context {
    /// EL1 on the task's stack, debug exceptions masked, everything else open.
    const TASK: u64 = 0b0100 | 1 << 9;
    let top = start::stacks().thread(stack);
    let context = with_exposed_provenance_mut::<Context>(top - 64 - size_of::<Context>());
    let mut registers = Context { pc: entry as usize as u64, sp: top as u64, pstate: TASK, ..Context::default() };
    registers.x[0] = argument as u64;
    // SAFETY: the stack is nobody's at the moment, and large enough.
    unsafe { context.write(registers) };
    context
}

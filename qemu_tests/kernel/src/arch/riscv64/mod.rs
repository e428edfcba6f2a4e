//! QEMU's `virt` board for riscv64: S-mode over a firmware with the SBI's timer, IPI, and hart state management.

pub(crate) mod code;
pub mod cpu;
mod entry;
pub mod interrupts;

use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::Relaxed, Ordering::Release};

use riscv::register::{satp, stval, time};

use crate::device_tree::Tree;
use crate::memory::{PAGE, Ram, Stacks};
use crate::{Region, clock, page_tables, start, start::MAX_CPUS, sync::Once, test, ticker, timer::Raise};

pub(crate) use crate::breakpoints::prepare_steps;
pub(crate) use cpu::AREA;
pub use interrupts::Context;

/// Who uses which vector. From `FREE` to 63 they are the test kernels'.
pub mod vector {
    /// Ends a sleep, and does nothing else.
    pub const WAKE: u8 = 0;
    /// The first of those that test kernels may use.
    pub const FREE: u8 = 1;
    /// The timer, which is an interrupt of its own.
    pub const TIMER: u8 = 64;
}

static IDS: Once<[usize; MAX_CPUS]> = Once::new();
static SERIAL: AtomicUsize = AtomicUsize::new(0x1000_0000);
/// The device that ends a run.
static FINISHER: AtomicUsize = AtomicUsize::new(0x10_0000);

/// What a hart that comes to `boot_entry` has to know.
#[repr(C)]
struct CpuStart {
    /// The end of the stack for the next one, which takes it.
    stack: AtomicPtr<u8>,
    /// The page tables, 0 before there are any.
    tables: AtomicUsize,
    index: AtomicUsize,
}

static START: CpuStart = CpuStart {
    stack: AtomicPtr::new((&raw const boot_stack).cast_mut()),
    tables: AtomicUsize::new(0),
    index: AtomicUsize::new(0),
};

unsafe extern "C" {
    /// The end of the image's stack.
    static boot_stack: u8;
    fn boot_entry();
    fn run_on(stack: usize, go: extern "C" fn() -> !) -> !;
    fn yield_to_threads();
}

/// The hart that came first, which is CPU 0 from now on, comes here from `boot_entry`, on a stack of the image.
#[unsafe(no_mangle)]
extern "C" fn rust_entry(hart: usize, device_tree: usize) -> ! {
    interrupts::load();
    // SAFETY: nothing is mapped yet, and the firmware is done with it.
    let tree = unsafe { Tree::read(device_tree) };
    clock::set_rate(tree.timebase_frequency());
    let (serial, finisher) = (tree.device("ns16550a", 0), tree.device("sifive,test0", 0));
    SERIAL.store(serial.start, Relaxed);
    FINISHER.store(finisher.start, Relaxed);
    let (ids, cpu_count) = tree.cpus(hart);

    let mut ram = Ram::new(tree.ram(), &tree.used());
    let stacks = Stacks::new(&mut ram, cpu_count);
    let (tables, mut ram) = page_tables::build(ram, stacks, tree.ram(), [serial, finisher].into_iter());
    // SAFETY: here and below: the other harts do not run yet, and this runs once.
    unsafe { IDS.set(ids) };
    // SAFETY: as above.
    unsafe { start::share_out(&mut ram, stacks, cpu_count, tree.command_line()) };
    let mut translation = satp::Satp::from_bits(0);
    translation.set_mode(satp::Mode::Sv39);
    translation.set_ppn(tables / PAGE);
    START.tables.store(translation.bits(), Relaxed);
    riscv::asm::sfence_vma_all();
    // SAFETY: the tables map what is in use where it lies: image, stacks, boot memory, device tree.
    unsafe { satp::write(translation) };
    riscv::asm::sfence_vma_all();
    // SAFETY: the stack is this hart's own and mapped, and nothing of the old one is needed any more.
    unsafe { run_on(stacks.main(0), start_all) }
}

/// CPU 0, on its own stack and the final page tables.
extern "C" fn start_all() -> ! {
    start::run(start_cpu)
}

fn start_cpu(index: usize) {
    START.index.store(index, Relaxed);
    // The last store, which orders the others before what the hart reads that takes the stack.
    START.stack.store(with_exposed_provenance_mut(start::stacks().main(index)), Release);
    let hart = hart(index);
    let result = sbi_rt::hart_start(hart, boot_entry as unsafe extern "C" fn() as usize, 0);
    if result.is_err() {
        test::fail(format_args!("CPU {index}, hart {hart}, does not start: {result:?}"));
    }
    crate::time::wait_for("a CPU to start", 3 * crate::time::SOON, || start::is_online(index));
}

/// The other harts come here from `boot_entry`, on their own stacks and the final page tables.
#[unsafe(no_mangle)]
extern "C" fn cpu_main(index: usize) -> ! {
    interrupts::load();
    start::join(index)
}

/// Makes `memory` the area of this CPU, which from now on is `index`.
///
/// # Safety
/// `memory` fits [`AREA`] and belongs to this CPU for ever.
pub(crate) unsafe fn set_up_cpu(memory: *mut u8, index: usize) {
    let end = start::stacks().fault(index);
    // Without the page below it, which is not mapped.
    let stack =
        Region { start: end - crate::memory::FAULT_STACK_LEN + PAGE, len: crate::memory::FAULT_STACK_LEN - PAGE };
    // SAFETY: the contract is the same.
    unsafe { cpu::set_up(memory, index, stack) };
}

/// The number of a CPU's hart.
fn hart(cpu: usize) -> usize {
    IDS.get().map_or(0, |ids| ids[cpu])
}

/// The clock, of which a cycle is 100 ns in QEMU.
#[must_use]
pub fn cycles() -> u64 {
    time::read64()
}

/// The address of the last page fault.
pub(crate) fn fault_address() -> usize {
    stval::read()
}

/// Code was changed, through another address.
pub(crate) fn code_has_changed(_: usize) {
    riscv::asm::fence_i();
}

/// Sleeps until an interrupt comes. With interrupts off when called, none is missed in between.
pub fn enable_and_halt() {
    // A masked interrupt that is there ends the sleep too.
    riscv::asm::wfi();
    interrupts::enable();
}

/// This CPU does nothing any more.
pub fn stop() -> ! {
    interrupts::disable();
    loop {
        riscv::asm::wfi();
    }
}

/// Sends a byte once the port takes one.
pub fn serial_write(byte: u8) {
    /// The line status of a 16550, and its bit for an empty place.
    const STATUS: usize = 5;
    const EMPTY: u8 = 1 << 5;
    let port = SERIAL.load(Relaxed);
    let status = with_exposed_provenance_mut::<u8>(port + STATUS);
    // SAFETY: a register of the serial port.
    while unsafe { status.read_volatile() } & EMPTY == 0 {
        core::hint::spin_loop();
    }
    // SAFETY: as above.
    unsafe { with_exposed_provenance_mut::<u8>(port).write_volatile(byte) };
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

/// Ends the run at once, on all CPUs.
pub fn exit(how: Exit) -> ! {
    /// What the device calls a failure, which is what it has codes for.
    const WITH_CODE: u32 = 0x3333;
    let code = match how {
        Exit::Pass => 33,
        Exit::Fail => 35,
        Exit::Code(value) => 2 * value + 1,
    };
    let device = with_exposed_provenance_mut::<u32>(FINISHER.load(Relaxed));
    // SAFETY: the device ends the run.
    unsafe { device.write_volatile(code << 16 | WITH_CODE) };
    stop()
}

/// Starts the machine anew.
pub fn reset() -> ! {
    let _ = sbi_rt::system_reset(sbi_rt::ColdReboot, sbi_rt::NoReason);
    stop()
}

/// The timer comes after so many cycles.
pub(crate) fn set_deadline(cycles: u64) {
    sbi_rt::set_timer(time::read64() + cycles);
}

/// The timer does not come.
pub(crate) fn clear_deadline() {
    sbi_rt::set_timer(u64::MAX);
}

unsafe extern "C" {
    fn timed_call(work: unsafe extern "C" fn(*mut u8), argument: *mut u8, count: u64);
}

/// Calls `work(argument)` with the timer set to raise something once, after about `count` instructions of the call or a
/// few more, where the emulator counts instructions as the driver has it.
///
/// # Safety
/// As for `work`.
pub(crate) unsafe fn call_timed(work: unsafe extern "C" fn(*mut u8), argument: *mut u8, count: u32, raise: Raise) {
    match raise {
        Raise::Vector(vector) => ticker::stand_for(vector),
        Raise::Nmi => no_nmi(),
    }
    // SAFETY: as the caller promises.
    unsafe { timed_call(work, argument, count.into()) };
    ticker::stand_for_nothing();
}

/// Interrupts from one CPU to others.
pub mod ipi {
    use sbi_rt::HartMask;

    use super::{hart, interrupts, start};

    /// To one CPU, this one if need be.
    pub fn send(cpu: usize, vector: u8) {
        interrupts::leave_for(cpu, vector);
        raise(1 << hart(cpu));
    }

    /// To all others.
    pub fn send_all_but_self(vector: u8) {
        // A thread stays where it is, so that "self" is one CPU.
        interrupts::without(|| {
            let me = crate::cpu::index();
            let others = (0..start::cpu_count()).filter(|cpu| *cpu != me);
            raise(others.fold(0, |mask, cpu| {
                interrupts::leave_for(cpu, vector);
                mask | 1 << hart(cpu)
            }));
        });
    }

    fn raise(harts: usize) {
        if harts != 0 {
            let _ = sbi_rt::send_ipi(HartMask::from_mask_base(harts, 0));
        }
    }
}

/// Interrupts that cannot be masked: S-mode has none. They would be an extension of the firmware's or M-mode's.
pub mod nmi {
    use super::{interrupts, no_nmi};

    /// Whether there is such a thing.
    pub const EXISTS: bool = false;

    /// Nothing to handle.
    pub fn set_handler(_: interrupts::Handler) {
        no_nmi();
    }

    /// Fails the test.
    pub fn send(_: usize) {
        no_nmi();
    }

    /// Fails the test.
    pub fn broadcast() {
        no_nmi();
    }
}

fn no_nmi() -> ! {
    test::fail(format_args!("S-mode has no interrupts that cannot be masked"))
}

/// Lets the scheduler choose on this CPU, which saves the context as an interrupt would. With interrupts open.
pub(crate) fn switch_threads() {
    // SAFETY: the stub saves and restores everything that a call keeps.
    unsafe { yield_to_threads() };
}

/// The context of a thread that is to start with `entry(argument)` on the thread stack `stack`.
pub(crate) fn new_thread(stack: usize, entry: extern "C" fn(usize) -> !, argument: usize) -> *mut Context {
    /// `sstatus` of a task: it runs in S-mode with interrupts open and the floating-point registers on.
    const TASK: u64 = 1 << 13 | 1 << 8 | 1 << 5;
    let top = start::stacks().thread(stack);
    let context = with_exposed_provenance_mut::<Context>(top - 64 - size_of::<Context>());
    let mut registers = Context { pc: entry as usize as u64, sp: top as u64, sstatus: TASK, ..Context::default() };
    registers.a[0] = argument as u64;
    // SAFETY: the stack is nobody's at the moment, and large enough.
    unsafe { context.write(registers) };
    context
}

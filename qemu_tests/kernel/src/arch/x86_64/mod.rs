//! x86-64 PCs, as QEMU's `microvm` and `q35` are.
//!
//! The order of the start is the order of `rust_entry` below: serial port, memory map, CPUs, page tables, the kernel's
//! early hook, own tables, interrupt controllers and clocks, the other CPUs, `main`.

mod acpi;
mod apic;
pub mod cpu;
mod entry;
pub mod interrupts;
mod pvh;
mod step;
mod tables;

use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::PhysAddr;
use x86_64::instructions::port::Port;
use x86_64::registers::control::{Cr2, Cr3, Cr3Flags};
use x86_64::structures::paging::PhysFrame;

use crate::memory::{Ram, Stacks, image, own};
use crate::{start, start::MAX_CPUS, sync::Once};

pub(crate) use apic::{call_timed, clear_deadline, set_deadline};
pub(crate) use cpu::AREA;
pub use interrupts::Context;
pub(crate) use step::prepare_steps;

/// Where the other CPUs begin; a page below 1 MiB that no firmware table lies in.
const TRAMPOLINE_PAGE: usize = 0x8000;

/// Who uses which interrupt vector. 0x40 to 0xdf are the test kernels'.
pub mod vector {
    /// The local timer.
    pub const TIMER: u8 = 0x20;
    /// Ends a sleep, and does nothing else.
    pub const WAKE: u8 = 0x21;
    /// A thread that lets others run.
    pub(crate) const YIELD: u8 = 0x22;
    /// The interrupt controller's false alarms.
    pub(crate) const SPURIOUS: u8 = 0xff;
    /// The first of those that test kernels may use.
    pub const FREE: u8 = 0x40;
}

static APIC_IDS: Once<[u32; MAX_CPUS]> = Once::new();

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    safe static ap_tables: AtomicU64;
    safe static ap_stack: AtomicU64;
    safe static ap_index: AtomicU64;
}

/// CPU 0 comes here from `pvh_entry`, on a stack of the image.
#[unsafe(no_mangle)]
extern "C" fn rust_entry(start_info: usize) -> ! {
    cpu::set_unknown();
    serial_init();

    let start = pvh::Start::read(start_info);
    // Below 1 MiB live the firmware's leftovers and the trampoline.
    let mut ram = Ram::new(start.ram(), &[0..1 << 20, image()]);
    let mut ids = [0; MAX_CPUS];
    let mut cpu_count = 1;
    ids[0] = apic::id();
    acpi::cpus(start.rsdp(), |id| {
        if id != ids[0] && cpu_count < MAX_CPUS {
            ids[cpu_count] = id;
            cpu_count += 1;
        }
    });

    let command_line = own::<[u8; 4096]>(ram.take(4096));
    let args = start.command_line(command_line);
    let stacks = Stacks::new(&mut ram, cpu_count);
    let tables = tables::build(&mut ram, stacks, start.ram());
    copy_trampoline();
    ap_tables.store(tables as u64, Ordering::Relaxed);
    // SAFETY: here and below: the other CPUs do not run yet, and this runs once.
    unsafe { APIC_IDS.set(ids) };
    // SAFETY: as above.
    unsafe { start::share_out(&mut ram, stacks, cpu_count, args) };
    let frame = PhysFrame::containing_address(PhysAddr::new(tables as u64));
    // SAFETY: the new tables map what is in use where it was, as the old ones do: image, stacks, boot memory.
    unsafe { Cr3::write(frame, Cr3Flags::empty()) };

    let stack = stacks.main(0);
    // SAFETY: the stack is this CPU's own and mapped, and nothing of the old one is needed any more.
    unsafe {
        core::arch::asm!("mov rsp, {stack}", "xor ebp, ebp", "call {go}", "ud2",
            stack = in(reg) stack, go = sym start_all, options(noreturn))
    }
}

/// CPU 0, on its own stack and the final page tables.
extern "C" fn start_all() -> ! {
    apic::mask_legacy();
    // Before the hook, which may wait and be slow; an exception there shows its registers.
    interrupts::load();
    apic::enable();
    apic::calibrate();
    start::run(|index| {
        ap_stack.store(start::stacks().main(index) as u64, Ordering::Relaxed);
        ap_index.store(index as u64, Ordering::Release);
        apic::start(apic_id(index), TRAMPOLINE_PAGE, || start::is_online(index));
    })
}

/// The other CPUs come here from the trampoline, on their own stacks and the final page tables.
#[unsafe(no_mangle)]
extern "C" fn ap_main(index: usize) -> ! {
    cpu::set_unknown();
    interrupts::load();
    apic::enable();
    start::join(index)
}

/// Makes `memory` the area of this CPU, which from now on is `index`.
///
/// # Safety
/// `memory` fits [`AREA`] and belongs to this CPU for ever.
pub(crate) unsafe fn set_up_cpu(memory: *mut u8, index: usize) {
    // SAFETY: the contract is the same.
    unsafe { cpu::set_up(memory, index, start::stacks()) };
    interrupts::load();
}

fn copy_trampoline() {
    let source = &raw const trampoline;
    let len = (&raw const trampoline_end).addr() - source.addr();
    let target = core::ptr::with_exposed_provenance_mut(TRAMPOLINE_PAGE);
    // SAFETY: the boot tables map low memory, of which this page belongs to nobody; the start info was read before.
    unsafe { core::ptr::copy_nonoverlapping(source, target, len) };
}

/// The cycle counter: host cycles, or instructions when the emulator counts those.
#[must_use]
pub fn cycles() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The address of the last page fault.
pub(crate) fn fault_address() -> usize {
    Cr2::read_raw() as usize
}

/// Sleeps until an interrupt comes. With interrupts off when called, none is missed in between.
pub fn enable_and_halt() {
    x86_64::instructions::interrupts::enable_and_hlt();
}

/// This CPU does nothing any more.
pub fn stop() -> ! {
    interrupts::disable();
    loop {
        x86_64::instructions::hlt();
    }
}

const SERIAL: u16 = 0x3f8;

fn serial_init() {
    // No interrupts; divisor 1; 8 bits, no parity, one stop bit; FIFOs on.
    for (register, value) in [(1, 0_u8), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7)] {
        // SAFETY: the registers of the first serial port.
        unsafe { Port::new(SERIAL + register).write(value) };
    }
}

/// Sends a byte once the port takes one.
pub fn serial_write(byte: u8) {
    // SAFETY: the line status of the first serial port.
    while unsafe { Port::<u8>::new(SERIAL + 5).read() } & 0x20 == 0 {
        core::hint::spin_loop();
    }
    // SAFETY: its data register.
    unsafe { Port::new(SERIAL).write(byte) };
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
    let value = match how {
        Exit::Pass => 0x10,
        Exit::Fail => 0x11,
        Exit::Code(value) => value,
    };
    // SAFETY: the exit device; without one nothing happens.
    unsafe { Port::new(0xf4).write(value) };
    stop()
}

/// Makes the processor reset itself, as it does when it meets an exception that it cannot raise.
pub fn reset() -> ! {
    let nothing = [0_u8; 10];
    // SAFETY: an empty interrupt table; what follows is the purpose.
    unsafe { core::arch::asm!("lidt [{}]", "int3", in(reg) &nothing, options(nostack)) };
    stop()
}

/// Interrupts from one CPU to others. Not from NMI handlers.
pub mod ipi {
    use super::{apic, apic_id};

    /// To one CPU, this one if need be.
    pub fn send(cpu: usize, vector: u8) {
        apic::send(apic_id(cpu), u32::from(vector));
    }

    /// To all others.
    pub fn send_all_but_self(vector: u8) {
        apic::send(0, apic::ALL_BUT_SELF | u32::from(vector));
    }
}

/// Interrupts that cannot be masked. Their handler must not wait for anything, print, or send IPIs.
pub mod nmi {
    use super::{apic, apic_id, interrupts};

    /// Whether there is such a thing.
    pub const EXISTS: bool = true;

    /// Has `handler` called for each NMI of every CPU.
    pub fn set_handler(handler: interrupts::Handler) {
        interrupts::set_handler(2, handler);
    }

    /// To one CPU, this one if need be.
    pub fn send(cpu: usize) {
        apic::send(apic_id(cpu), apic::NMI);
    }

    /// To all others.
    pub fn broadcast() {
        apic::send(0, apic::ALL_BUT_SELF | apic::NMI);
    }
}

fn apic_id(cpu: usize) -> u32 {
    APIC_IDS.get().map_or(0, |ids| ids[cpu])
}

/// Lets the scheduler choose on this CPU: a software interrupt, so that the context is saved as a timer's would be.
pub(crate) fn switch_threads() {
    // SAFETY: the stub saves and restores everything.
    unsafe { core::arch::asm!("int {}", const vector::YIELD) };
}

/// The context of a thread that is to start with `entry(argument)` on the thread stack `stack`.
pub(crate) fn new_thread(stack: usize, entry: extern "C" fn(usize) -> !, argument: usize) -> *mut Context {
    let top = start::stacks().thread(stack);
    let context = core::ptr::with_exposed_provenance_mut::<Context>(top - 64 - size_of::<Context>());
    let registers = Context {
        rip: entry as usize as u64,
        rdi: argument as u64,
        cs: 0x08,
        ss: 0x10,
        // As if called: 8 short of a multiple of 16.
        rsp: (top - 8) as u64,
        // Interrupts enabled; bit 1 is always set.
        rflags: 0x202,
        ..Context::default()
    };
    // SAFETY: the stack is nobody's at the moment, and large enough.
    unsafe { context.write(registers) };
    context
}

//! Interrupts and exceptions: one table for all CPUs, one way in, a handler per vector.
//!
//! Handlers run with interrupts off, on the stack of what they interrupted (double faults and NMIs on their own). A
//! vector without a handler that comes all the same fails the test, with the registers.

use x86_64::VirtAddr;
use x86_64::registers::control::Cr2;
use x86_64::structures::idt::{EntryOptions, InterruptDescriptorTable};

use super::{apic, cpu, exit, vector};
use crate::{console, fault, handlers, println, sched, start, sync::Once, ticker};

pub use crate::handlers::{Handler, set_handler};
pub use x86_64::instructions::interrupts::{are_enabled, disable, enable, without_interrupts as without};

/// The registers of what was interrupted. A handler may change them; what it leaves here is what goes on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "the names of the registers")]
pub struct Context {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    /// Which interrupt or exception it is.
    pub vector: u64,
    /// What the CPU says about an exception; 0 where it says nothing.
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Interrupts are open, in a saved flags register.
pub(super) const INTERRUPTS: u64 = 1 << 9;

impl Context {
    /// Where it was interrupted.
    #[must_use]
    pub fn pc(&self) -> u64 {
        self.rip
    }

    /// Goes on somewhere else.
    pub(crate) fn go_on_at(&mut self, pc: u64) {
        self.rip = pc;
    }

    /// Goes on somewhere else, on another stack, interrupts open.
    pub(crate) fn leave_for(&mut self, pc: u64, stack: u64) {
        self.rip = pc;
        self.rsp = stack;
        self.rflags |= INTERRUPTS;
    }

    /// Whether interrupts were open there.
    #[must_use]
    pub fn interrupts_are_open(&self) -> bool {
        self.rflags & INTERRUPTS != 0
    }
}

static TABLE: Once<InterruptDescriptorTable> = Once::new();

/// Fills the table, once, and loads it on this CPU.
pub(super) fn load() {
    let table = TABLE.get().unwrap_or_else(|| {
        // SAFETY: CPU 0 comes here first, alone.
        unsafe { TABLE.set(new_table()) }
    });
    table.load();
}

unsafe extern "C" {
    static interrupt_stubs: u8;
}

fn new_table() -> InterruptDescriptorTable {
    let mut table = InterruptDescriptorTable::new();
    let stub = |vector: usize| VirtAddr::new(((&raw const interrupt_stubs).addr() + 16 * vector) as u64);
    /// Points the entry of an exception to its stub.
    macro_rules! exceptions {
        ($($vector:literal $name:ident)*) => {
            $(
                // SAFETY: the stub of this vector is an interrupt handler, and pushes an error code if the CPU does
                // not.
                let _: &mut EntryOptions = unsafe { table.$name.set_handler_addr(stub($vector)) };
            )*
        };
    }
    exceptions! {
        0 divide_error 1 debug 2 non_maskable_interrupt 3 breakpoint 4 overflow 5 bound_range_exceeded
        6 invalid_opcode 7 device_not_available 8 double_fault 10 invalid_tss 11 segment_not_present
        12 stack_segment_fault 13 general_protection_fault 14 page_fault 16 x87_floating_point 17 alignment_check
        18 machine_check 19 simd_floating_point
    }
    // SAFETY: as for all of them.
    let options = unsafe { table.double_fault.set_handler_addr(stub(8)) };
    // SAFETY: an entry of the TSS's table that every CPU fills, used for nothing else.
    unsafe { options.set_stack_index(cpu::FAULT_STACK) };
    // SAFETY: as for all of them.
    let options = unsafe { table.non_maskable_interrupt.set_handler_addr(stub(2)) };
    // SAFETY: as above.
    unsafe { options.set_stack_index(cpu::NMI_STACK) };
    for (entry, vector) in table.slice_mut(32..).iter_mut().zip(32..) {
        // SAFETY: as for the exceptions.
        unsafe { entry.set_handler_addr(stub(vector)) };
    }
    table
}

/// Called by every stub. Returns the context to go on with: another one if threads are to be switched.
#[unsafe(no_mangle)]
extern "C" fn interrupt_dispatch(context: *mut Context) -> *mut Context {
    // SAFETY: the stub passes what it has just pushed.
    let registers = unsafe { &mut *context };
    let vector = registers.vector as u8;
    match vector {
        vector::SPURIOUS => return context,
        vector::YIELD => return sched::switch(context, false),
        vector::TIMER => {
            apic::end_of_interrupt();
            return ticker::tick(context);
        }
        14 if fault::recover(registers) => return context,
        _ => {}
    }
    match handlers::handler(vector) {
        Some(handler) => handler(registers),
        None if vector == vector::WAKE => {}
        None => unexpected(registers),
    }
    if vector >= 32 {
        apic::end_of_interrupt();
    }
    context
}

/// Called by the stub on the new thread's stack when the context was switched.
#[unsafe(no_mangle)]
extern "C" fn interrupt_switched() {
    sched::switched();
}

fn unexpected(context: &Context) -> ! {
    const NAMES: [&str; 20] = [
        "divide error",
        "debug",
        "NMI",
        "breakpoint",
        "overflow",
        "bound range exceeded",
        "invalid opcode",
        "device not available",
        "double fault",
        "?",
        "invalid TSS",
        "segment not present",
        "stack segment fault",
        "general protection fault",
        "page fault",
        "?",
        "x87 error",
        "alignment check",
        "machine check",
        "SIMD error",
    ];
    console::take_for_failure();
    let address = Cr2::read_raw();
    let name = NAMES.get(context.vector as usize).unwrap_or(&"interrupt without a handler");
    let remark = if matches!(context.vector, 8 | 14) { start::remark(address as usize) } else { "" };
    println!(
        "EXCEPTION {}: {name} (vector {}, error {:#x}) at {:#x}, address {address:#x}{remark}",
        cpu::Name,
        context.vector,
        context.error,
        context.rip
    );
    println!("{context:#x?}");
    exit(super::Exit::Fail)
}

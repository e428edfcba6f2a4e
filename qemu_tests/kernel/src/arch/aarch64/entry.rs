//! Every instruction that Rust cannot express: how a CPU gets into Rust with its MMU and caches on, how an interrupt
//! does, a read that may fault, and calls that are looked at closely.
//!
//! Tasks run at EL1 on `SP_EL0`; `SP_EL1` is a stack of each CPU's own, which exceptions and FIQs (the NMIs here) stay
//! on, so that they have a stack even where a task's ran over. An IRQ goes over to the stack that it interrupted, since
//! what is saved there is the thread's, which may go on elsewhere; so does `svc`, by which a thread yields. A stub
//! saves the general registers only: the target has no others in use, which `compile_error!` holds.

use page_table_entry::aarch64::MemAttr;

#[cfg(target_feature = "neon")]
compile_error!("the interrupt stubs save no vector registers: build for a soft-float target");

/// What the processor's control register has set: everything that is always 1, stack alignment, caches, the MMU.
const CONTROL: u64 = 0x30d0_0800 | 1 << 12 | 1 << 3 | 1 << 2 | 1;
/// 48-bit addresses of 4 KiB pages in the lower half alone, walked through the caches, 40-bit physical ones.
const TRANSLATION: u64 = 16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32;
/// A block of 1 GiB in the boot tables: memory, and devices.
const MEMORY_BLOCK: u64 = 0x705;
const DEVICE_BLOCK: u64 = 0x401 | 3 << 53;

core::arch::global_asm!(
    r#"
    .section .data.boot, "aw"
    .balign 4096
boot_blocks:
    .quad {device}            // below 1 GiB there are devices, above RAM
    .set block, 1
    .rept 511
    .quad {memory} + (block << 30)
    .set block, block + 1
    .endr
boot_tables:
    .quad boot_blocks + 3
    .skip 511 * 8

    .section .bss.boot, "aw", @nobits
    .balign 16
    .skip 64 * 1024
boot_stack:
    .skip 16 * 1024
boot_fault_stack:

    .section .text.boot, "ax"
    .global boot_entry
boot_entry:
    msr daifset, #15
    adrp x0, boot_tables
    bl enable_mmu
    adrp x1, boot_fault_stack
    add x1, x1, :lo12:boot_fault_stack
    mov sp, x1
    adrp x1, boot_stack
    add x1, x1, :lo12:boot_stack
    msr sp_el0, x1
    msr spsel, #0
    mov x29, xzr
    b rust_entry

    // Where PSCI starts another CPU; x0: what it needs, see `CpuStart`.
    .global cpu_entry
cpu_entry:
    msr daifset, #15
    mov x19, x0
    ldr x0, [x19]
    bl enable_mmu
    ldp x1, x2, [x19, #8]
    mov sp, x2
    msr sp_el0, x1
    msr spsel, #0
    ldr x0, [x19, #24]
    mov x29, xzr
    mov x30, xzr
    b cpu_main

    // x0: page tables. Atomic instructions are not guaranteed to work before.
enable_mmu:
    ldr x1, ={attributes}
    msr mair_el1, x1
    ldr x1, ={translation}
    msr tcr_el1, x1
    msr ttbr0_el1, x0
    dsb ish
    tlbi vmalle1
    ic iallu
    dsb nsh
    isb
    ldr x1, ={control}
    msr sctlr_el1, x1
    isb
    ret

    // void run_on(stack, fault_stack, void (*go)(void))
    .global run_on
run_on:
    mov sp, x0
    msr spsel, #1
    mov sp, x1
    msr spsel, #0
    mov x29, xzr
    mov x30, xzr
    br x2

    .macro save, on_stack, kind
    .balign 128
    .if \on_stack
    msr spsel, #0
    .endif
    sub sp, sp, #272
    stp x0, x1, [sp]
    mov x1, #\kind
    .if \on_stack
    b on_task_stack
    .else
    b on_fault_stack
    .endif
    .endm

    .section .text.vectors, "ax"
    .balign 2048
    .global vectors
vectors:
    // From a task: exception, IRQ, FIQ, SError.
    .balign 128
    stp x0, x1, [sp, #-16]!
    mrs x0, esr_el1
    lsr x0, x0, #26
    cmp x0, #{svc}
    ldp x0, x1, [sp], #16
    b.eq yields
    sub sp, sp, #272
    stp x0, x1, [sp]
    mov x1, #{exception}
    b on_fault_stack
    save 1, {irq}
    save 0, {fiq}
    save 0, {serror}
    // From an exception's or FIQ's handler.
    save 0, {exception}
    save 0, {other}
    save 0, {other}
    save 0, {serror}
    // From below, where nothing runs.
    .rept 8
    save 0, {other}
    .endr

yields:
    msr spsel, #0
    sub sp, sp, #272
    stp x0, x1, [sp]
    mov x1, #{yielded}
    b on_task_stack

    .macro save_rest
    stp x2, x3, [sp, #16]
    stp x4, x5, [sp, #32]
    stp x6, x7, [sp, #48]
    stp x8, x9, [sp, #64]
    stp x10, x11, [sp, #80]
    stp x12, x13, [sp, #96]
    stp x14, x15, [sp, #112]
    stp x16, x17, [sp, #128]
    stp x18, x19, [sp, #144]
    stp x20, x21, [sp, #160]
    stp x22, x23, [sp, #176]
    stp x24, x25, [sp, #192]
    stp x26, x27, [sp, #208]
    stp x28, x29, [sp, #224]
    mrs x2, elr_el1
    mrs x3, spsr_el1
    stp x2, x3, [sp, #256]
    .endm

on_task_stack:
    save_rest
    add x2, sp, #272
    stp x30, x2, [sp, #240]
    mov x19, sp
    mov x0, sp
    msr daifclr, #1           // FIQs come through handlers too
    bl interrupt_dispatch
    cmp x0, x19
    b.eq 1f
    mov x19, x0
    mov sp, x0                // another thread's context; the one that was left may be taken from now on
    bl interrupt_switched
    mov x0, x19
1:  msr daifset, #1
    ldr x1, [x0, #248]
    msr spsel, #1
    msr sp_el0, x1
    b restore

on_fault_stack:
    save_rest
    mrs x2, sp_el0
    stp x30, x2, [sp, #240]
    mov x0, sp
    bl interrupt_dispatch
    mov x0, sp
    ldr x1, [x0, #248]
    msr sp_el0, x1
    add sp, sp, #272          // nothing comes before the return: all is masked

restore:
    ldp x2, x3, [x0, #256]
    msr elr_el1, x2
    msr spsr_el1, x3
    ldp x2, x3, [x0, #16]
    ldp x4, x5, [x0, #32]
    ldp x6, x7, [x0, #48]
    ldp x8, x9, [x0, #64]
    ldp x10, x11, [x0, #80]
    ldp x12, x13, [x0, #96]
    ldp x14, x15, [x0, #112]
    ldp x16, x17, [x0, #128]
    ldp x18, x19, [x0, #144]
    ldp x20, x21, [x0, #160]
    ldp x22, x23, [x0, #176]
    ldp x24, x25, [x0, #192]
    ldp x26, x27, [x0, #208]
    ldp x28, x29, [x0, #224]
    ldr x30, [x0, #240]
    ldp x0, x1, [x0]
    eret

    .section .text.probe, "ax"
    .global probe_read, probe_instruction, probe_faulted
probe_read:
    mov x2, x0
    mov w0, #0
probe_instruction:
    ldrb w3, [x2]
    strb w3, [x1]
    mov w0, #1
probe_faulted:
    ret

    // void step_call(void (*work)(void *), void *argument): a breakpoint begins the steps.
    .section .text.step, "ax"
    .global step_call, step_called, step_returned
step_call:
    stp x29, x30, [sp, #-16]!
    mov x2, x0
    mov x0, x1
    brk #0
step_called:
    blr x2
step_returned:
    ldp x29, x30, [sp], #16
    ret

    // void timed_call(void (*work)(void *), void *argument, uint64_t count): starts the timer before the call, and
    // stops it behind it.
    .section .text.timed, "ax"
    .global timed_call, timed_begin, timed_end
timed_call:
timed_begin:
    stp x29, x30, [sp, #-16]!
    mov x3, #1
    msr cntv_tval_el0, x2
    msr cntv_ctl_el0, x3
    mov x2, x0
    mov x0, x1
    blr x2
    msr cntv_ctl_el0, xzr
    isb
    ldp x29, x30, [sp], #16
    ret
timed_end:

    // void catch_call(void (*work)(void *), void *argument, uint64_t *stack)
    .section .text.catch, "ax"
    .global catch_call, catch_resume
catch_call:
    stp x29, x30, [sp, #-96]!
    stp x19, x20, [sp, #16]
    stp x21, x22, [sp, #32]
    stp x23, x24, [sp, #48]
    stp x25, x26, [sp, #64]
    stp x27, x28, [sp, #80]
    mov x3, sp
    str x3, [x2]
    mov x2, x0
    mov x0, x1
    blr x2
catch_resume:
    ldp x19, x20, [sp, #16]
    ldp x21, x22, [sp, #32]
    ldp x23, x24, [sp, #48]
    ldp x25, x26, [sp, #64]
    ldp x27, x28, [sp, #80]
    ldp x29, x30, [sp], #96
    ret
"#,
    device = const DEVICE_BLOCK,
    memory = const MEMORY_BLOCK,
    attributes = const MemAttr::MAIR_VALUE,
    translation = const TRANSLATION,
    control = const CONTROL,
    svc = const super::interrupts::SVC,
    exception = const super::interrupts::EXCEPTION,
    irq = const super::interrupts::IRQ,
    fiq = const super::interrupts::FIQ,
    serror = const super::interrupts::SERROR,
    yielded = const super::interrupts::YIELDED,
    other = const super::interrupts::OTHER,
);

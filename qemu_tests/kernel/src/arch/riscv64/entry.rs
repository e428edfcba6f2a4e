//! Every instruction that Rust cannot express: how a hart gets into Rust, how an interrupt does, a read that may fault,
//! and calls that are looked at closely.
//!
//! `tp` is the hart's own in all of the kernel: it points to the hart's area, and no thread takes it along. An
//! interrupt is saved on the stack that it came to, since what is saved there is the thread's, which may go on
//! elsewhere; an exception on a stack of the hart's own, which is there also where a task's ran over. The target has
//! floating-point registers, so a stub saves them too.

core::arch::global_asm!(
    r#"
    .option push
    .option arch, +m, +a, +c, +d
    .section .bss.boot, "aw", @nobits
    .balign 16
    .skip 64 * 1024
    .global boot_stack
boot_stack:

    # Where every hart comes: the one that the firmware chose, and those that it is asked to start. The firmware may let
    # one go before it has noted where and with what (OpenSBI 1.1 does, rarely), so `CpuStart` says who it is: it
    # has a stack for one hart. While it has no page tables, that is the first one.
    .section .text.boot, "ax"
    .global boot_entry
boot_entry:                   # a0: this hart, a1: device tree, of the first one
    csrw sie, zero
    csrci sstatus, 2
    li t0, 1 << 13            # floating-point registers on
    csrs sstatus, t0
    la tp, {unknown}
    mv s0, zero
    la t0, {start}
    amoswap.d.aqrl sp, zero, (t0)
    beqz sp, 2f
    ld t1, 8(t0)
    bnez t1, 1f
    tail rust_entry
1:  ld a0, 16(t0)
    sfence.vma
    csrw satp, t1
    sfence.vma
    tail cpu_main
2:  wfi                       # nobody asked for it
    j 2b

    # void run_on(stack, void (*go)(void))
    .global run_on
run_on:
    mv sp, a0
    mv s0, zero
    mv ra, zero
    jr a1

    .section .text.traps, "ax"
    # void switch_threads(): the way an interrupt would come, with a cause that none has. With interrupts open.
    .global yield_to_threads
yield_to_threads:
    csrci sstatus, 2
    li t0, (1 << 8) | (1 << 5)
    csrs sstatus, t0
    li t0, {yielded}
    csrw scause, t0
    csrw sepc, ra

    .balign 4
    .global trap_entry
trap_entry:
    sd t0, {saved_t0}(tp)
    sd sp, {saved_sp}(tp)
    csrr t0, scause
    bltz t0, 2f
    ld t0, {fault_stack_low}(tp)
    bltu sp, t0, 1f
    ld t0, {fault_stack}(tp)
    bgeu t0, sp, 2f           # it is on that stack already
1:  ld sp, {fault_stack}(tp)
2:  addi sp, sp, -528
    sd ra, 0(sp)
    sd gp, 16(sp)
    sd t1, 40(sp)
    sd t2, 48(sp)
    sd s0, 56(sp)
    sd s1, 64(sp)
    sd a0, 72(sp)
    sd a1, 80(sp)
    sd a2, 88(sp)
    sd a3, 96(sp)
    sd a4, 104(sp)
    sd a5, 112(sp)
    sd a6, 120(sp)
    sd a7, 128(sp)
    sd s2, 136(sp)
    sd s3, 144(sp)
    sd s4, 152(sp)
    sd s5, 160(sp)
    sd s6, 168(sp)
    sd s7, 176(sp)
    sd s8, 184(sp)
    sd s9, 192(sp)
    sd s10, 200(sp)
    sd s11, 208(sp)
    sd t3, 216(sp)
    sd t4, 224(sp)
    sd t5, 232(sp)
    sd t6, 240(sp)
    ld t0, {saved_sp}(tp)
    sd t0, 8(sp)
    ld t0, {saved_t0}(tp)
    sd t0, 32(sp)
    csrr t0, sepc
    sd t0, 248(sp)
    csrr t0, sstatus
    sd t0, 256(sp)
    frcsr t0
    sd t0, 264(sp)
    .set at, 0
    .irp number, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    fsd f\number, 272+at(sp)
    .set at, at + 8
    .endr
    mv a0, sp
    csrr a1, scause
    call interrupt_dispatch
    beq a0, sp, 3f
    mv sp, a0                 # another thread's context; the one that was left may be taken from now on
    call interrupt_switched
3:  .set at, 0
    .irp number, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    fld f\number, 272+at(sp)
    .set at, at + 8
    .endr
    ld t0, 264(sp)
    fscsr t0
    ld t0, 256(sp)
    csrw sstatus, t0
    ld t0, 248(sp)
    csrw sepc, t0
    ld ra, 0(sp)
    ld gp, 16(sp)
    ld t0, 32(sp)
    ld t1, 40(sp)
    ld t2, 48(sp)
    ld s0, 56(sp)
    ld s1, 64(sp)
    ld a0, 72(sp)
    ld a1, 80(sp)
    ld a2, 88(sp)
    ld a3, 96(sp)
    ld a4, 104(sp)
    ld a5, 112(sp)
    ld a6, 120(sp)
    ld a7, 128(sp)
    ld s2, 136(sp)
    ld s3, 144(sp)
    ld s4, 152(sp)
    ld s5, 160(sp)
    ld s6, 168(sp)
    ld s7, 176(sp)
    ld s8, 184(sp)
    ld s9, 192(sp)
    ld s10, 200(sp)
    ld s11, 208(sp)
    ld t3, 216(sp)
    ld t4, 224(sp)
    ld t5, 232(sp)
    ld t6, 240(sp)
    ld sp, 8(sp)
    sret

    .section .text.probe, "ax"
    .global probe_read, probe_instruction, probe_faulted
probe_read:
    mv a2, a0
    li a0, 0
probe_instruction:
    lb a3, 0(a2)
    sb a3, 0(a1)
    li a0, 1
probe_faulted:
    ret

    # void step_call(void (*work)(void *), void *argument): a breakpoint begins the steps.
    .section .text.step, "ax"
    .global step_call, step_called, step_returned
step_call:
    addi sp, sp, -16
    sd ra, 0(sp)
    mv a2, a0
    mv a0, a1
    c.ebreak
step_called:
    jalr a2
step_returned:
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

    # void timed_call(void (*work)(void *), void *argument, uint64_t count): sets the timer before
    # the call, by the register that the firmware uses itself (Sstc), and stops it behind it. Where the emulator counts
    # instructions, `cycle` is its clock, an instruction 128 ns, and a count of the timer 100 ns; the count that it is
    # at when the register is written is known only so. A sum of counts from there falls to each instruction once, and
    # to some twice.
    .section .text.timed, "ax"
    .global timed_call, timed_begin, timed_end
timed_call:
timed_begin:
    addi sp, sp, -16
    sd ra, 0(sp)
    mv t2, a0
    mv a0, a1
    li t1, 100
    rdcycle t0
    addi t0, t0, 4 * 128
    divu t0, t0, t1
    add t0, t0, a2
    csrw 0x14d, t0
    jalr t2
    li t0, -1
    csrw 0x14d, t0
    ld ra, 0(sp)
    addi sp, sp, 16
    ret
timed_end:

    # void catch_call(void (*work)(void *), void *argument, uint64_t *stack)
    .section .text.catch, "ax"
    .global catch_call, catch_resume
catch_call:
    addi sp, sp, -208
    sd ra, 0(sp)
    sd s0, 8(sp)
    sd s1, 16(sp)
    sd s2, 24(sp)
    sd s3, 32(sp)
    sd s4, 40(sp)
    sd s5, 48(sp)
    sd s6, 56(sp)
    sd s7, 64(sp)
    sd s8, 72(sp)
    sd s9, 80(sp)
    sd s10, 88(sp)
    sd s11, 96(sp)
    .set at, 0
    .irp register, fs0,fs1,fs2,fs3,fs4,fs5,fs6,fs7,fs8,fs9,fs10,fs11
    fsd \register, 104+at(sp)
    .set at, at + 8
    .endr
    sd sp, 0(a2)
    mv a2, a0
    mv a0, a1
    jalr a2
catch_resume:
    .set at, 0
    .irp register, fs0,fs1,fs2,fs3,fs4,fs5,fs6,fs7,fs8,fs9,fs10,fs11
    fld \register, 104+at(sp)
    .set at, at + 8
    .endr
    ld ra, 0(sp)
    ld s0, 8(sp)
    ld s1, 16(sp)
    ld s2, 24(sp)
    ld s3, 32(sp)
    ld s4, 40(sp)
    ld s5, 48(sp)
    ld s6, 56(sp)
    ld s7, 64(sp)
    ld s8, 72(sp)
    ld s9, 80(sp)
    ld s10, 88(sp)
    ld s11, 96(sp)
    addi sp, sp, 208
    ret
    .option pop
"#,
    unknown = sym super::cpu::UNKNOWN,
    start = sym super::START,
    saved_t0 = const super::cpu::SAVED_T0,
    saved_sp = const super::cpu::SAVED_SP,
    fault_stack_low = const super::cpu::FAULT_STACK_LOW,
    fault_stack = const super::cpu::FAULT_STACK,
    yielded = const super::interrupts::YIELDED,
);

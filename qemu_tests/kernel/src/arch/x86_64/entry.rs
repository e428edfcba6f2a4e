//! Every instruction that Rust cannot express: how a CPU gets into 64-bit Rust, how an interrupt does, a read that
//! may fault, and calls that are looked at closely.
//!
//! QEMU enters at `pvh_entry` in 32-bit protected mode without paging, `ebx` pointing to the start info. The other CPUs
//! enter in real mode at a copy of `trampoline`, which is only ten instructions long because the image lies below 4 GiB
//! and unpaged 32-bit code can run right in it. All 256 interrupt stubs lie 16 bytes apart, so a table of addresses is
//! not needed. A stub saves the general registers only: the target has no others in use, which `compile_error!` holds.

#[cfg(target_feature = "sse")]
compile_error!("the interrupt stubs save no vector registers: build for a soft-float target");

core::arch::global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18            # lengths of name and value; type: 32-bit physical entry point
    .asciz "Xen"
    .quad pvh_entry

    .section .bss.boot, "aw", @nobits
    .balign 4096
boot_tables:
    .skip 6 * 4096            # one PML4, one PDPT, four page directories: 4 GiB in 2 MiB pages
boot_stack:
    .skip 64 * 1024
boot_stack_top:

    .section .data.boot, "aw"
    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff  # 0x08 64-bit code
    .quad 0x00cf93000000ffff  # 0x10 data
    .quad 0x00cf9b000000ffff  # 0x18 32-bit code
boot_gdt_pointer:
    .word 31
    .long boot_gdt
    .balign 8
    .global ap_tables, ap_stack, ap_index
ap_tables: .quad 0
ap_stack: .quad 0
ap_index: .quad 0

    .section .text.boot, "ax"
    .code32
    .global pvh_entry
pvh_entry:
    cli
    cld
    movl $boot_stack_top, %esp
    movl %ebx, %esi           # start info, kept for Rust

    # Four page directories that map each address to itself, present, writable, 2 MiB.
    movl $boot_tables + 2 * 4096, %edi
    movl $0x83, %eax
1:  movl %eax, (%edi)
    movl $0, 4(%edi)
    addl $8, %edi
    addl $0x200000, %eax
    jnc 1b
    movl $boot_tables + 4096, %edi
    movl $boot_tables + 2 * 4096 + 3, %eax
    movl $4, %ecx
2:  movl %eax, (%edi)
    addl $8, %edi
    addl $4096, %eax
    loop 2b
    movl $boot_tables + 4096 + 3, boot_tables
    movl $boot_tables, %edi
    movl $rust_entry, %ebp
    jmp enter_long_mode

    .global ap_entry32
ap_entry32:
    movl ap_tables, %edi
    movl ap_index, %esi
    movl $ap_main, %ebp

    # edi: page tables, esi: argument, ebp: where to go on the stack that `ap_stack` names, if it names one.
enter_long_mode:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    lgdt boot_gdt_pointer
    movl $0x20, %eax          # PAE
    movl %eax, %cr4
    movl %edi, %cr3
    movl $0xc0000080, %ecx    # EFER: long mode, no-execute
    rdmsr
    orl $0x900, %eax
    wrmsr
    movl $0x80010033, %eax    # paging, write protection in ring 0 too, protected mode
    movl %eax, %cr0
    ljmp $0x08, $3f
    .code64
3:  movl $boot_stack_top, %esp
    movq ap_stack(%rip), %rax
    testq %rax, %rax
    cmovnzq %rax, %rsp
    movl %ebp, %eax
    movl %esi, %edi
    xorl %ebp, %ebp
    movl %ebp, %fs
    movl %ebp, %gs
    callq *%rax
    ud2

    .section .rodata.trampoline, "a"
    .global trampoline, trampoline_end
    .code16
trampoline:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl {trampoline_page} + (4f - trampoline)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x18, $ap_entry32
    .balign 4
4:  .word 31
    .long boot_gdt
trampoline_end:
    .code64

    .section .text.interrupts, "ax"
    .balign 16
    .global interrupt_stubs
interrupt_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .set has_code, (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
    .if !(has_code || (vector == 29) || (vector == 30))
    pushq $0                  # in place of the error code
    .endif
    .byte 0x68                # push the vector
    .long vector
    jmp interrupt_common
    .set vector, vector + 1
    .endr

interrupt_common:
    pushq %rax
    pushq %rbx
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %rbp
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    movq %rsp, %rdi           # aligned to 16: the CPU aligned it, and 22 words were pushed since
    callq interrupt_dispatch
    cmpq %rax, %rsp
    je 5f
    movq %rax, %rsp           # another thread's context; the one that was left may be taken from now on
    callq interrupt_switched
5:  popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rbp
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rbx
    popq %rax
    addq $16, %rsp
    iretq

    # bool probe_read(address, *byte): false if the read faults, in which case the handler goes on at `probe_faulted`.
    .section .text.probe, "ax"
    .global probe_read, probe_instruction, probe_faulted
probe_read:
    xorl %eax, %eax
probe_instruction:
    movb (%rdi), %cl
    movb %cl, (%rsi)
    movb $1, %al
probe_faulted:
    retq

    # void step_call(void (*work)(void *), void *argument): calls with the trap flag set. The first
    # exception comes after the instruction behind the one that sets it, which is the call; the handler clears it after
    # the return.
    .section .text.step, "ax"
    .global step_call, step_called, step_returned
step_call:
    movq %rdi, %rax
    movq %rsi, %rdi
    subq $8, %rsp
    pushfq
    orq $0x100, (%rsp)
    popfq
step_called:
    callq *%rax
step_returned:
    addq $8, %rsp
    retq

    # void timed_call(void (*work)(void *), void *argument, uint32_t count, uint32_t *timer): starts the timer before
    # the call, and stops it in the one behind it. The timer takes a count or two to begin, for which there are
    # instructions of no use.
    .section .text.timed, "ax"
    .global timed_call, timed_begin, timed_end
timed_call:
timed_begin:
    movq %rdi, %rax
    movq %rsi, %rdi
    pushq %rbx
    movq %rcx, %rbx
    movl %edx, (%rbx)
    nop
    nop
    nop
    callq *%rax
    movl $0, (%rbx)
    popq %rbx
    retq
timed_end:

    # void catch_call(void (*work)(void *), void *argument, uint64_t *stack): calls, having noted the
    # stack pointer with which a handler may go on at `catch_resume` instead.
    .section .text.catch, "ax"
    .global catch_call, catch_resume
catch_call:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    movq %rsp, (%rdx)
    movq %rdi, %rax
    movq %rsi, %rdi
    callq *%rax
catch_resume:
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    retq
"#,
    trampoline_page = const super::TRAMPOLINE_PAGE,
    options(att_syntax)
);

# Every hart begins at `start`, in machine mode, with the device tree in a1: calls `main(hart, tree)` on a stack of 64 KiB.
# There are four of these. What traps calls
# `trapped(cause, address)`.

    .section .text.start, "ax"
    .global start
start:
    la t0, trap
    csrw mtvec, t0
    csrr a0, mhartid
    li t0, 4
    bgeu a0, t0, halt
    la sp, stacks
    addi t0, a0, 1
    slli t0, t0, 16
    add sp, sp, t0
    call main
halt:
    wfi
    j halt
    .balign 4
trap:
    csrr a0, mcause
    csrr a1, mepc
    call trapped

    .section .bss.stacks, "aw", @nobits
    .balign 16
stacks:
    .skip 4 * 0x10000

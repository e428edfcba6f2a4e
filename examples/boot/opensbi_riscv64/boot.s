# `start`: a0 is this hart's number. A hart that has a stack in `STACKS`, at the place of its number, calls
# `other_main(hart)`. The first one has none, and the device tree in a1: it calls `main(hart, tree)`.
# A hart is not told by its entry or by a1 that it is another one: OpenSBI 1.1 may let it go before it has noted these.
# The first 64 bytes are the header of Linux's images, by which U-Boot's `booti` knows a kernel.

    .section .text.start, "ax"
    .option norvc
    .global start
start:
    j enter
    .word 0
    .quad 0x200000                      # offset from the start of RAM
    .quad image_end - image_start
    .quad 0                             # flags
    .word 2, 0                          # version
    .quad 0
    .ascii "RISCV\0\0\0"
    .ascii "RSC\x05"
    .word 0
enter:
    mv tp, a0
    li t0, 8                            # as many as `STACKS` has
    bgeu a0, t0, first
    la t0, STACKS
    slli t1, a0, 3
    add t0, t0, t1
    ld sp, (t0)
    fence r, rw
    bnez sp, other
first:
    la sp, first_stack_end
    call main
other:
    call other_main
halt:
    wfi
    j halt

    .section .bss.start, "aw", @nobits
    .balign 16
    .skip 0x20000
first_stack_end:

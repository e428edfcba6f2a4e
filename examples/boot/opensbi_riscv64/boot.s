# `start`: a0 is this hart's number, a1 the device tree. Calls `main(hart, tree)`. The first 64 bytes are the header of
# Linux's images, by which U-Boot's `booti` knows a kernel.
# `start_other`: a0 is this hart's number, a1 the end of its stack. Calls `other_main(hart)`.

    .section .text.start, "ax"
    .option norvc
    .global start, start_other
start:
    j start_first
    .word 0
    .quad 0x200000                      # offset from the start of RAM
    .quad image_end - image_start
    .quad 0                             # flags
    .word 2, 0                          # version
    .quad 0
    .ascii "RISCV\0\0\0"
    .ascii "RSC\x05"
    .word 0
start_first:
    la sp, first_stack_end
    mv tp, a0
    call main
start_other:
    mv sp, a1
    mv tp, a0
    call other_main
halt:
    wfi
    j halt

    .section .bss.start, "aw", @nobits
    .balign 16
    .skip 0x20000
first_stack_end:

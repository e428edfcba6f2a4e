// `start`: the first CPU, from QEMU. `start_other`: another one, from PSCI; x0 is the number that the kernel gave it.
// Both come with MMU and caches off, at EL1, and call `main(number)`: with the number in `TPIDR_EL1`, on a stack of their
// own, and with MMU and caches on, since exclusive accesses, which the heap makes, are promised only then.

    .section .text.start, "ax"
    .global start, start_other
start:
    mov x0, xzr
start_other:
    msr tpidr_el1, x0
    adrp x1, stacks
    add x2, x0, #1
    add x1, x1, x2, lsl #16
    mov sp, x1

    ldr x1, ={attributes}
    msr mair_el1, x1
    ldr x1, ={translation}
    msr tcr_el1, x1
    adrp x1, table
    msr ttbr0_el1, x1
    tlbi vmalle1
    ic iallu
    dsb sy
    isb
    mrs x1, sctlr_el1
    mov x2, {caches_and_mmu}
    orr x1, x1, x2
    msr sctlr_el1, x1
    isb
    bl main
halt:
    wfi
    b halt

// Every GiB where it is: the first one has the devices, the others have RAM.
    .section .data.table, "aw"
    .balign 4096
table:
    .quad {device}
    .set block, 1
    .rept 511
    .quad {memory} + (block << 30)
    .set block, block + 1
    .endr

    .section .bss.stacks, "aw", @nobits
    .balign 4096
stacks:
    .skip {cpus} << 16

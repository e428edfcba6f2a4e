// Where another CPU starts, with its MMU and caches off: x0 is the address of a `Start`, from which it takes the first
// CPU's translation, a stack, and its number. Calls `other_main(number)`.

    .text
    .global start_other
start_other:
    ldp x1, x2, [x0]
    ldp x3, x4, [x0, #16]
    ldp x5, x6, [x0, #32]
    msr ttbr0_el1, x1
    msr tcr_el1, x2
    msr mair_el1, x3
    mov x7, #(3 << 20)
    msr cpacr_el1, x7                   // vector registers
    tlbi vmalle1
    dsb sy
    isb
    msr sctlr_el1, x4
    isb
    mov sp, x5
    mov x0, x6
    bl other_main
halt:
    wfi
    b halt

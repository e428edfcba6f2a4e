# How a CPU of a PC comes into 64-bit mode, for the kernels pvh_x86_64, paging_x86_64 and
# multiboot2_x86_64.
#
# `start32`: the loader enters here, in 32-bit mode without paging, ebx with the address of what it tells. Calls
# `main(address)`. `ap_start` to `ap_end`: copied to the page AP_PAGE, where another CPU starts in 16-bit mode. Calls
# `ap_main(number)`, numbers from 1 up. Both with the lowest 4 GiB mapped where they are, interrupts off.

    .set STACK_LEN, 0x20000
    .set MAX_CPUS, 16
    .set AP_PAGE, 0x8000

    .section .text.start, "ax"
    .code32
    .global start32
start32:
    cli
    movl %ebx, %ebp
    lgdt gdt_pointer
    movl $level4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $(1 << 5), %eax                 # PAE
    movl %eax, %cr4
    movl $0xc0000080, %ecx              # EFER
    rdmsr
    orl $(1 << 8), %eax                 # LME
    wrmsr
    movl %cr0, %eax
    orl $(1 << 31), %eax                # PG
    movl %eax, %cr0
    ljmp $8, $start64

    .code64
start64:
    xorl %eax, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    leaq stacks + STACK_LEN(%rip), %rsp
    movl %ebp, %edi
    call main
    ud2

    # Runs at AP_PAGE, in a segment that begins at 0; so what it reads of itself is found by hand.
    .code16
    .global ap_start, ap_end
ap_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl AP_PAGE + ap_gdt_pointer - ap_start
    movl $level4, %eax
    movl %eax, %cr3
    movl $(1 << 5), %eax                # PAE
    movl %eax, %cr4
    movl $0xc0000080, %ecx              # EFER
    rdmsr
    orl $(1 << 8), %eax                 # LME
    wrmsr
    movl $0x80000011, %eax              # PG, ET, PE; caches on
    movl %eax, %cr0
    ljmpl $8, $ap64
    .balign 4
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_end:

    .code64
ap64:
    movl $1, %edi
    lock xaddl %edi, ap_count(%rip)
    incl %edi
    cmpl $MAX_CPUS, %edi
    jae halt
    movl %edi, %eax
    incl %eax
    imulq $STACK_LEN, %rax, %rax
    leaq stacks(%rip), %rsp
    addq %rax, %rsp
    xorl %eax, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    call ap_main
halt:
    hlt
    jmp halt

    .section .rodata.start, "a"
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9a000000ffff            # 64-bit code
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

    # 2048 pages of 2 MiB.
    .section .data.start, "aw"
    .balign 4096
level4:
    .quad level3 + 3
    .fill 511, 8, 0
level3:
    .quad level2 + 3, level2 + 0x1003, level2 + 0x2003, level2 + 0x3003
    .fill 508, 8, 0
level2:
    .set page, 0
    .rept 2048
    .quad page + 0x83                   # present, writable, 2 MiB
    .set page, page + (2 << 20)
    .endr

    .section .bss.start, "aw", @nobits
    .balign 16
stacks:
    .skip MAX_CPUS * STACK_LEN
ap_count:
    .skip 8

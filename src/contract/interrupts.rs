//! Whether this CPU takes interrupts, as its own status register says.

#![cfg_attr(
    any(
        all(target_arch = "x86_64", not(miri)),
        all(any(target_arch = "aarch64", target_arch = "riscv64"), any(target_os = "none", target_os = "uefi"))
    ),
    expect(unsafe_code, reason = "reads a register")
)]

/// Whether interrupts are open on this CPU: `RFLAGS.IF` on x86-64, `DAIF.I` on AArch64, `sstatus.SIE` on 64-bit RISC-V.
/// True where the crate does not know: on other architectures, and on a host, whose user code can neither mask
/// interrupts nor, but on x86-64, read the register.
#[inline]
pub(crate) fn are_open() -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let flags: u64;
        // SAFETY: pushes the flags and pops them again.
        unsafe { core::arch::asm!("pushfq", "pop {}", out(reg) flags, options(preserves_flags)) };
        flags & 1 << 9 != 0
    }
    #[cfg(all(target_arch = "aarch64", any(target_os = "none", target_os = "uefi")))]
    {
        let daif: u64;
        // SAFETY: reads a register.
        unsafe { core::arch::asm!("mrs {}, daif", out(reg) daif, options(nostack, preserves_flags)) };
        daif & 1 << 7 == 0
    }
    #[cfg(all(target_arch = "riscv64", any(target_os = "none", target_os = "uefi")))]
    {
        let sstatus: usize;
        // SAFETY: reads a register.
        unsafe { core::arch::asm!("csrr {}, sstatus", out(reg) sstatus, options(nostack, preserves_flags)) };
        sstatus & 1 << 1 != 0
    }
    #[cfg(not(any(
        all(target_arch = "x86_64", not(miri)),
        all(any(target_arch = "aarch64", target_arch = "riscv64"), any(target_os = "none", target_os = "uefi"))
    )))]
    {
        true
    }
}

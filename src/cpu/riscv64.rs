//! CPU numbers and a pin for riscv64, for kernels that run in S-mode.
//!
//! The hart's own number cannot be read in S-mode; it comes from the boot loader, and kernels keep it, or a pointer to
//! their per-CPU data, in the thread pointer `tp`: [`TpNumber`] and [`Tp`]. Neither is `pure` to the compiler: it may
//! not reuse an answer, since the code may have moved to another hart in between.

#![expect(unsafe_code, reason = "registers of the CPU")]

use core::arch::asm;
use core::marker::PhantomData;

use super::number::{Load, Number};
use super::pin::PinnedIndex;
use super::{CpuHint, CpuPin};
use crate::contract::interrupts;
use crate::contract::unwind::never_unwinding;

/// The number that lies `OFFSET` bytes behind where `tp` points, in the kernel's per-CPU data; a `usize`, or what the
/// second parameter says.
///
/// # Context
/// One load. In a trap handler only once it has put the kernel's `tp` back, if the code it interrupted was in user
/// mode. Before `tp` is set up the load would fault or read something else; see
/// [Before the number works](super#before-the-number-works).
#[derive(Clone, Copy, Debug)]
pub struct Tp<const OFFSET: usize, N: Number = usize>(PhantomData<fn() -> N>);

impl<const OFFSET: usize, N: Number> Tp<OFFSET, N> {
    const ENCODABLE: () = assert!(OFFSET < 2048, "the offset does not fit into an instruction");

    /// # Safety
    /// Whenever the source is asked, the number at `OFFSET` from this hart's `tp` is aligned and readable, and stays so
    /// if the code that asks moves to another hart at that moment.
    pub const unsafe fn new() -> Self {
        let () = Self::ENCODABLE;
        Self(PhantomData)
    }
}

impl<const OFFSET: usize, N: Number> CpuHint for Tp<OFFSET, N> {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        // SAFETY: the bytes are aligned and readable, as `new`'s caller promised.
        Some(unsafe { N::load::<OFFSET>() })
    }
}

macro_rules! numbers {
    ($($number:ty: $load:literal),+) => {$(
        impl Load for $number {
            #[inline]
            unsafe fn load<const OFFSET: usize>() -> usize {
                let number;
                // SAFETY: reads bytes that are readable, as the caller promises, and touches nothing else.
                unsafe {
                    asm!($load, number = out(reg) number, offset = const OFFSET,
                        options(nostack, preserves_flags, readonly));
                }
                number
            }
        }
    )+};
}

numbers! {
    u16: "lhu {number}, {offset}(tp)",
    u32: "lwu {number}, {offset}(tp)",
    u64: "ld {number}, {offset}(tp)",
    usize: "ld {number}, {offset}(tp)"
}

/// The value of `tp`, into which the kernel wrote the CPU's number.
///
/// # Context
/// One instruction, in any context in which `tp` is the kernel's. Until the kernel wrote it its answer is arbitrary,
/// which is good enough for a hint and fatal for a pin; see [Before the number works](super#before-the-number-works).
#[derive(Clone, Copy, Debug, Default)]
pub struct TpNumber;

impl CpuHint for TpNumber {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        let number;
        // SAFETY: Reads a register.
        unsafe { asm!("mv {}, tp", out(reg) number, options(nomem, nostack, preserves_flags)) };
        Some(number)
    }
}

/// `sstatus.SIE`: interrupts reach S-mode.
const SIE: usize = 1 << 1;

/// Pins by clearing `sstatus.SIE` for the guard's life; where it was clear already it stays so.
///
/// # Context
/// Any in S-mode. Exceptions still come, and nest. Costs two accesses to a status register and the source; it
/// lengthens the time without interrupts by the heap's section.
#[derive(Clone, Copy, Debug)]
pub struct InterruptsMasked<I> {
    id: I,
}

impl<I: CpuHint> InterruptsMasked<I> {
    /// A pin that takes the CPU's number from `id`, which is asked when interrupts are masked already.
    ///
    /// # Safety
    /// The heap is used in S-mode. The kernel switches tasks on interrupts or by its own calls only, not in an
    /// exception that comes while the heap is at work, and nothing unmasks interrupts in such a handler, in `id` or in
    /// a hook that the heap calls. `id`, asked while interrupts are masked, never gives two CPUs the same number below
    /// the heap's CPU count. If any of it is untrue, two tasks or CPUs use one cache at once and a block may be handed
    /// out twice.
    pub const unsafe fn new(id: I) -> Self {
        Self { id }
    }
}

/// Interrupts are masked until this is dropped; then they are as before.
#[derive(Debug)]
pub struct MaskGuard {
    index: PinnedIndex,
    unmask: bool,
}

impl Drop for MaskGuard {
    #[inline]
    fn drop(&mut self) {
        if self.unmask {
            // SAFETY: Sets the bit that `pin` found set. A barrier to the compiler, as an end of the pin must be.
            unsafe { asm!("csrsi sstatus, {}", const SIE, options(nostack)) };
        }
    }
}

// SAFETY: With `SIE` clear, only exceptions interrupt S-mode; they finish before this code goes on and switch no task,
// as `new`'s caller promises, so the CPU is kept until the guard's drop sets the bit. (One instruction reads and clears
// it.) The number is read masked, cannot change in the guard, and `id` gives no other CPU the same one.
unsafe impl<I: CpuHint> CpuPin for InterruptsMasked<I> {
    type Guard = MaskGuard;

    #[inline]
    fn pin(&self) -> MaskGuard {
        let sstatus: usize;
        // SAFETY: Reads the register and clears one bit. A barrier to the compiler, as a pin must be.
        unsafe { asm!("csrrci {}, sstatus, {}", out(reg) sstatus, const SIE, options(nostack)) };
        MaskGuard { index: PinnedIndex::read(&self.id), unmask: sstatus & SIE != 0 }
    }

    #[inline]
    fn index(&self, guard: &MaskGuard) -> usize {
        guard.index.get()
    }

    /// Not where interrupts were masked before: whoever is waited for may be waiting for this CPU.
    fn may_wait(&self) -> bool {
        interrupts::are_open() && never_unwinding(|| self.id.may_wait())
    }
}

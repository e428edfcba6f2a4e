//! CPU numbers and a pin for aarch64, for kernels that run at EL1.
//!
//! Three sources: [`TpidrEl1`] follows the kernel's per-CPU pointer, [`TpidrEl1Number`] is for kernels that keep the
//! number in the register itself, and [`Mpidr`] folds the number that the hardware gave the CPU. None of them is `pure`
//! to the compiler: it may not reuse an answer, since the code may have moved to another CPU in between.

#![expect(unsafe_code, reason = "registers of the CPU")]

use core::arch::asm;
use core::marker::PhantomData;

use super::number::{Load, Number};
use super::pin::PinnedIndex;
use super::{CpuHint, CpuPin};
use crate::contract::interrupts;
use crate::contract::unwind::never_unwinding;

/// The number that lies `OFFSET` bytes behind where `TPIDR_EL1` points, in the kernel's per-CPU data; a `usize`, or
/// what the second parameter says.
///
/// # Context
/// A register read and a load. In any context, NMI included, once the register is set: it is the kernel's at every
/// privilege level. Before that the load would fault or read something else; see
/// [Before the number works](super#before-the-number-works).
#[derive(Clone, Copy, Debug)]
pub struct TpidrEl1<const OFFSET: usize, N: Number = usize>(PhantomData<fn() -> N>);

impl<const OFFSET: usize, N: Number> TpidrEl1<OFFSET, N> {
    const ENCODABLE: () = assert!(
        OFFSET % size_of::<N>() == 0 && OFFSET <= 4095 * size_of::<N>(),
        "the offset does not fit into an instruction"
    );

    /// # Safety
    /// Whenever the source is asked, the number at `OFFSET` from this CPU's `TPIDR_EL1` is aligned and readable, and
    /// stays so if the code that asks moves to another CPU at that moment.
    pub const unsafe fn new() -> Self {
        let () = Self::ENCODABLE;
        Self(PhantomData)
    }
}

impl<const OFFSET: usize, N: Number> CpuHint for TpidrEl1<OFFSET, N> {
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
                    asm!("mrs {number}, tpidr_el1", $load, number = out(reg) number, offset = const OFFSET,
                        options(nostack, preserves_flags, readonly));
                }
                number
            }
        }
    )+};
}

numbers! {
    u16: "ldrh {number:w}, [{number}, #{offset}]",
    u32: "ldr {number:w}, [{number}, #{offset}]",
    u64: "ldr {number}, [{number}, #{offset}]",
    usize: "ldr {number}, [{number}, #{offset}]"
}

/// The value of `TPIDR_EL1`, into which the kernel wrote the CPU's number.
///
/// # Context
/// A register read, in any context, NMI included. Until the kernel wrote the register its answer is arbitrary, which is
/// good enough for a hint and fatal for a pin; see [Before the number works](super#before-the-number-works).
#[derive(Clone, Copy, Debug, Default)]
pub struct TpidrEl1Number;

impl CpuHint for TpidrEl1Number {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        let number;
        // SAFETY: Reads a register.
        unsafe { asm!("mrs {}, tpidr_el1", out(reg) number, options(nomem, nostack, preserves_flags)) };
        Some(number)
    }
}

/// The affinity levels of `MPIDR_EL1`, folded to one number: the lowest level counts to `AFF0`, the next one to `AFF1`.
///
/// Works from the first instruction of every CPU, without any set-up. What the levels mean (thread, core, cluster,
/// socket) and how full they are depends on the machine; so the lower two widths are the kernel's to say. One cluster:
/// `Mpidr<16, 1>`. Cores that stand at the second level, one thread each: `Mpidr<1, 16>`.
///
/// # Context
/// A register read and some arithmetic, in any context, NMI included. Widths that are too small give different CPUs the
/// same number, which is good enough for a hint and fatal for a pin; widths that are too large leave gaps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mpidr<const AFF0: usize, const AFF1: usize>;

impl<const AFF0: usize, const AFF1: usize> Mpidr<AFF0, AFF1> {
    const fn fold(mpidr: usize) -> usize {
        let aff0 = mpidr & 0xFF;
        let aff1 = mpidr >> 8 & 0xFF;
        let above = mpidr >> 16 & 0xFF | mpidr >> 24 & 0xFF00;
        above.wrapping_mul(AFF1).wrapping_add(aff1).wrapping_mul(AFF0).wrapping_add(aff0)
    }
}

// Bit 31 is always set, bit 24 says that level 0 counts threads.
const _: () = assert!(Mpidr::<16, 1>::fold(0x8000_0003) == 3);
const _: () = assert!(Mpidr::<4, 2>::fold(0x8000_0103) == 7);
const _: () = assert!(Mpidr::<1, 16>::fold(0x8100_0500) == 5);
const _: () = assert!(Mpidr::<2, 4>::fold(0x01_8102_0301) == (258 * 4 + 3) * 2 + 1);

impl<const AFF0: usize, const AFF1: usize> CpuHint for Mpidr<AFF0, AFF1> {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        let mpidr;
        // SAFETY: Reads a register.
        unsafe { asm!("mrs {}, mpidr_el1", out(reg) mpidr, options(nomem, nostack, preserves_flags)) };
        Some(Self::fold(mpidr))
    }
}

/// Pins by masking IRQ and FIQ for the guard's life; what was masked already stays so.
///
/// # Context
/// Any at EL1. SErrors, debug exceptions and non-maskable interrupts still come, and nest. Costs three accesses to the
/// mask bits and the source; it lengthens the time without interrupts by the heap's section.
#[derive(Clone, Copy, Debug)]
pub struct InterruptsMasked<I> {
    id: I,
}

impl<I: CpuHint> InterruptsMasked<I> {
    /// A pin that takes the CPU's number from `id`, which is asked when interrupts are masked already.
    ///
    /// # Safety
    /// The kernel switches tasks on IRQ, FIQ or by its own calls only, not in another exception that comes while the
    /// heap is at work, and nothing unmasks interrupts in such a handler, in `id` or in a hook that the heap calls.
    /// `id`, asked while interrupts are masked, never gives two CPUs the same number below the heap's CPU count. If
    /// either is untrue, two tasks or CPUs use one cache at once and a block may be handed out twice.
    pub const unsafe fn new(id: I) -> Self {
        Self { id }
    }
}

/// IRQ and FIQ are masked until this is dropped; then they are as before.
#[derive(Debug)]
pub struct MaskGuard {
    index: PinnedIndex,
    daif: u64,
}

impl Drop for MaskGuard {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: Puts the mask bits back as `pin` found them. A barrier to the compiler, as an end of the pin must be.
        unsafe { asm!("msr daif, {}", in(reg) self.daif, options(nostack, preserves_flags)) };
    }
}

// SAFETY: With IRQ and FIQ masked, only other exceptions interrupt this code; they finish before it goes on and switch
// no task, as `new`'s caller promises, so the CPU is kept until the guard's drop puts the bits back. (An interrupt
// between reading and setting them returns with the same bits, perhaps on another CPU, before anything else is read.)
// The number is read masked, cannot change in the guard, and `id` gives no other CPU the same one.
unsafe impl<I: CpuHint> CpuPin for InterruptsMasked<I> {
    type Guard = MaskGuard;

    #[inline]
    fn pin(&self) -> MaskGuard {
        let daif;
        // SAFETY: Reads the mask bits and sets two of them. A barrier to the compiler, as a pin must be.
        unsafe { asm!("mrs {}, daif", "msr daifset, #3", out(reg) daif, options(nostack, preserves_flags)) };
        MaskGuard { index: PinnedIndex::read(&self.id), daif }
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

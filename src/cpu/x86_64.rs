//! CPU numbers and a pin for x86_64.
//!
//! Three sources, by price: [`GsBase`] is one load, [`Rdpid`] some tens of cycles, [`InitialApicId`] a
//! `cpuid`, which traps under a hypervisor. None of them is `pure` to the compiler: it may not reuse an answer, since
//! the code may have moved to another CPU in between.

#![expect(unsafe_code, reason = "registers of the CPU")]

use core::arch::asm;
use core::marker::PhantomData;

use super::CpuHint;
#[cfg(feature = "x86_64")]
use super::CpuPin;
use super::number::{Load, Number};
#[cfg(feature = "x86_64")]
use super::pin::PinnedIndex;
use crate::base::sync::{AtomicU32, Ordering};
#[cfg(feature = "x86_64")]
use crate::contract::unwind::never_unwinding;
#[cfg(feature = "x86_64")]
use ::x86_64::registers::rflags::{self, RFlags};

/// The number at `gs:[OFFSET]`, where the kernel keeps it in the per-CPU data that GS points to; a `usize`, or what the
/// second parameter says.
///
/// ```
/// use core::mem::offset_of;
/// use smp_heap::cpu::x86_64::GsBase;
///
/// #[repr(C)]
/// struct PerCpu {
///     stack: usize,
///     number: u32,
/// }
/// # #[expect(dead_code, reason = "for show")]
/// // SAFETY: GS points to a PerCpu before the heap is used.
/// const ID: GsBase<{ offset_of!(PerCpu, number) }, u32> = unsafe { GsBase::new() };
/// ```
///
/// # Context
/// One load. In an NMI only if GS is the kernel's there, which a handler that interrupted the first instructions of a
/// system call (before `swapgs`) must see to first. Before GS is set up the load would fault or read something else;
/// see [Before the number works](super#before-the-number-works).
#[derive(Clone, Copy, Debug)]
pub struct GsBase<const OFFSET: usize, N: Number = usize>(PhantomData<fn() -> N>);

impl<const OFFSET: usize, N: Number> GsBase<OFFSET, N> {
    const ENCODABLE: () = assert!(OFFSET <= i32::MAX as usize, "the offset does not fit into an instruction");

    /// # Safety
    /// Whenever the source is asked, the number's bytes at `OFFSET` from this CPU's GS base are readable, and stay so
    /// if the code that asks moves to another CPU at that moment.
    pub const unsafe fn new() -> Self {
        let () = Self::ENCODABLE;
        Self(PhantomData)
    }
}

impl<const OFFSET: usize, N: Number> CpuHint for GsBase<OFFSET, N> {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        // SAFETY: the bytes are readable, as `new`'s caller promised; this processor does not ask for alignment.
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
    u16: "movzx {number:e}, word ptr gs:[{offset}]",
    u32: "mov {number:e}, dword ptr gs:[{offset}]",
    u64: "mov {number}, qword ptr gs:[{offset}]",
    usize: "mov {number}, qword ptr gs:[{offset}]"
}

/// The `IA32_TSC_AUX` register, by `rdpid`. The kernel writes the CPU's number into it when it starts the CPU.
///
/// # Context
/// Any, NMI included: no memory is read. Until the kernel wrote the register its answer is usually 0 on every CPU,
/// which is good enough for a hint and fatal for a pin; see [Before the number works](super#before-the-number-works).
#[derive(Clone, Copy, Debug)]
pub struct Rdpid(());

impl Rdpid {
    /// The source, if this CPU has the instruction.
    pub fn detect() -> Option<Self> {
        (cpuid(0, 0).eax >= 7 && cpuid(7, 0).ecx & (1 << 22) != 0).then_some(Self(()))
    }

    /// The source, for use in a constant.
    ///
    /// # Safety
    /// Every CPU that asks it has the instruction; on others it is an invalid opcode.
    pub const unsafe fn assume() -> Self {
        Self(())
    }
}

impl CpuHint for Rdpid {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        let number: u64;
        // SAFETY: The CPU has the instruction (`detect` saw it or `assume`'s caller promised it), which reads one
        // register that every privilege level may read.
        unsafe { asm!("rdpid {}", out(reg) number, options(nomem, nostack, preserves_flags)) };
        // The register has 32 bits.
        usize::try_from(number).ok()
    }
}

/// The local APIC's number that the CPU was started with, by `cpuid`: 32 bits from leaf 0xB, or where there is no such
/// leaf 8 bits from leaf 1.
///
/// Works from the first instruction of every CPU, without any set-up. The numbers may have gaps, and 8 bits are not
/// enough for more than 255 CPUs to differ.
///
/// # Context
/// Any, NMI included. Slow: a hundred cycles or two, and thousands under a hypervisor, which has to emulate it. For
/// boot and for trying out.
#[derive(Debug, Default)]
pub struct InitialApicId {
    /// The leaf to ask; 0 until the first question.
    leaf: AtomicU32,
}

impl InitialApicId {
    const EXTENDED_LEAF: u32 = 0xB;
    const LEAF: u32 = 1;

    /// The source. It finds the leaf when it is first asked.
    pub const fn new() -> Self {
        Self { leaf: AtomicU32::new(0) }
    }

    fn find_leaf(&self) -> u32 {
        // A CPU without the extended leaf answers with zeros, or with another leaf if it has none so high.
        let extended = cpuid(0, 0).eax >= Self::EXTENDED_LEAF && cpuid(Self::EXTENDED_LEAF, 0).ebx != 0;
        let leaf = if extended { Self::EXTENDED_LEAF } else { Self::LEAF };
        self.leaf.store(leaf, Ordering::Relaxed);
        leaf
    }
}

impl CpuHint for InitialApicId {
    fn current_cpu(&self) -> Option<usize> {
        let leaf = match self.leaf.load(Ordering::Relaxed) {
            0 => self.find_leaf(),
            leaf => leaf,
        };
        let answer = cpuid(leaf, 0);
        usize::try_from(if leaf == Self::EXTENDED_LEAF { answer.edx } else { answer.ebx >> 24 }).ok()
    }
}

struct Cpuid {
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// `core`'s function of this name is `unsafe` in some of the compilers that this crate supports and safe in others.
fn cpuid(leaf: u32, sub_leaf: u32) -> Cpuid {
    let (eax, ebx, ecx, edx): (u32, u32, u32, u32);
    // SAFETY: Every x86_64 CPU has the instruction. It changes the four registers that are named or saved here, and
    // no memory. (The compiler keeps `rbx` for itself, so it cannot be an operand.)
    unsafe {
        asm!("mov {saved:r}, rbx", "cpuid", "xchg {saved:r}, rbx", saved = out(reg) ebx,
            inout("eax") leaf => eax, inout("ecx") sub_leaf => ecx, out("edx") edx,
            options(nomem, nostack, preserves_flags));
    }
    Cpuid { eax, ebx, ecx, edx }
}

/// Pins by masking maskable interrupts for the guard's life; where they were masked already they stay so.
///
/// # Context
/// Any at privilege level 0. NMIs and machine checks still come, and nest. Costs a read of the flags, `cli` and `sti`,
/// and the source; it lengthens the time without interrupts by the heap's section.
#[cfg(feature = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub struct InterruptsMasked<I> {
    id: I,
}

#[cfg(feature = "x86_64")]
impl<I: CpuHint> InterruptsMasked<I> {
    /// A pin that takes the CPU's number from `id`, which is asked when interrupts are masked already.
    ///
    /// # Safety
    /// The kernel switches tasks on interrupts or by its own calls only, not in an NMI or exception that comes while
    /// the heap is at work, and nothing unmasks interrupts in such a handler, in `id` or in a hook that the heap calls.
    /// `id`, asked while interrupts are masked, never gives two CPUs the same number below the heap's CPU count. If
    /// either is untrue, two tasks or CPUs use one cache at once and a block may be handed out twice.
    pub const unsafe fn new(id: I) -> Self {
        Self { id }
    }
}

/// Maskable interrupts are masked until this is dropped; then they are as before.
#[cfg(feature = "x86_64")]
#[derive(Debug)]
pub struct MaskGuard {
    index: PinnedIndex,
    /// RFLAGS before.
    flags: u64,
}

#[cfg(feature = "x86_64")]
impl Drop for MaskGuard {
    #[inline]
    fn drop(&mut self) {
        if self.flags & RFlags::INTERRUPT_FLAG.bits() != 0 {
            ::x86_64::instructions::interrupts::enable();
        }
    }
}

// SAFETY: With interrupts masked, only NMIs and exceptions interrupt this code; they finish before it goes on and
// switch no task, as `new`'s caller promises, so the CPU is kept until the guard's drop unmasks. (An interrupt between
// the look at the flags and the masking returns with the same flag, perhaps on another CPU, before anything is read.)
// The number is read masked, cannot change in the guard, and `id` gives no other CPU the same one.
#[cfg(feature = "x86_64")]
unsafe impl<I: CpuHint> CpuPin for InterruptsMasked<I> {
    type Guard = MaskGuard;

    #[inline]
    fn pin(&self) -> MaskGuard {
        // Masking what is masked costs less than to ask, and the flag is tested once, at the end.
        let flags = rflags::read_raw();
        ::x86_64::instructions::interrupts::disable();
        MaskGuard { index: PinnedIndex::read(&self.id), flags }
    }

    #[inline]
    fn index(&self, guard: &MaskGuard) -> usize {
        guard.index.get()
    }

    /// Not where interrupts were masked before: whoever is waited for may be waiting for this CPU.
    fn may_wait(&self) -> bool {
        ::x86_64::instructions::interrupts::are_enabled() && never_unwinding(|| self.id.may_wait())
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use std::{string::String, thread, vec::Vec};

    /// What Linux found out about each CPU under this name.
    fn linux_says(name: &str) -> Vec<String> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        fields.filter(|(field, _)| field.trim() == name).map(|(_, value)| value.trim().into()).collect()
    }

    /// Linux's numbers of the CPUs, each with the field of that name.
    fn cpus(name: &str) -> Vec<(usize, usize)> {
        let numbers = |name| linux_says(name).into_iter().map(|number| number.parse().unwrap());
        numbers("processor").zip(numbers(name)).collect()
    }

    /// The source's answer on this CPU; `None` if the CPU is not ours to run on.
    fn ask_on(cpu: usize, id: &(impl CpuHint + Sync)) -> Option<usize> {
        let mut mask = [0_u64; 128];
        mask[cpu / 64] = 1 << (cpu % 64);
        let ask = move || {
            let failed: usize;
            // SAFETY: sched_setaffinity of this thread reads the mask.
            unsafe {
                asm!("syscall", inout("rax") 203_usize => failed, in("rdi") 0, in("rsi") size_of_val(&mask),
                    in("rdx") &raw const mask, out("rcx") _, out("r11") _, options(nostack, readonly));
            }
            if failed == 0 { id.current_cpu() } else { None }
        };
        thread::scope(|scope| scope.spawn(ask).join().unwrap())
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn the_apic_id_is_the_one_that_linux_lists() {
        let id = InitialApicId::new();
        let old = InitialApicId { leaf: AtomicU32::new(InitialApicId::LEAF) };
        for (cpu, listed) in cpus("initial apicid") {
            assert!([None, Some(listed)].contains(&ask_on(cpu, &id)));
            assert!([None, Some(listed & 0xFF)].contains(&ask_on(cpu, &old)));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn cpuid_names_the_vendor() {
        let vendor = cpuid(0, 0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
        assert!(linux_says("vendor_id").iter().all(|listed| listed.as_bytes() == name), "{name:?}");
        assert!(vendor.eax >= 1);
    }

    #[test]
    #[cfg_attr(miri, ignore)]
    fn rdpid_says_what_linux_wrote() {
        let flags = linux_says("flags");
        let listed = flags.iter().all(|flags| flags.split(' ').any(|flag| flag == "rdpid"));
        assert!(flags.is_empty() || Rdpid::detect().is_some() == listed);
        let Some(id) = Rdpid::detect() else { return };
        for (cpu, _) in cpus("processor") {
            // The node's number stands above the CPU's 12 bits.
            assert!([None, Some(cpu)].contains(&ask_on(cpu, &id).map(|number| number & 0xFFF)));
        }
    }

    /// Linux lets a thread set its own GS base, and no host code uses it.
    #[test]
    #[cfg_attr(miri, ignore)]
    fn gs_base_reads_at_its_offset() {
        static ONE: [usize; 3] = [11, 22, 0x4000_0003_0021];
        static OTHER: [usize; 3] = [44, 55, 0x5000_0006_0042];
        fn set_gs(base: usize) {
            let failed: usize;
            // SAFETY: arch_prctl(ARCH_SET_GS) changes this thread's GS base, which nothing but this test uses. `nomem`,
            // so that the compiler sees no more of it than of a move to another CPU.
            unsafe {
                asm!("syscall", inout("rax") 158_usize => failed, in("rdi") 0x1001, in("rsi") base,
                    out("rcx") _, out("r11") _, options(nomem, nostack));
            }
            assert_eq!(failed, 0);
        }
        set_gs(ONE.as_ptr().expose_provenance());
        // SAFETY: GS points to the array, of which this is the first word.
        let first = unsafe { GsBase::<0>::new() };
        // SAFETY: And this the last.
        let last = unsafe { GsBase::<16>::new() };
        // SAFETY: The last one's lower half.
        let half = unsafe { GsBase::<16, u32>::new() };
        // SAFETY: And the upper half of that.
        let quarter = unsafe { GsBase::<18, u16>::new() };
        let ask = || (first.current_cpu(), last.current_cpu(), half.current_cpu(), quarter.current_cpu());
        assert_eq!(ask(), (Some(11), Some(0x4000_0003_0021), Some(0x3_0021), Some(3)));
        // "Another CPU": the answer is not kept.
        set_gs(OTHER.as_ptr().expose_provenance());
        assert_eq!(ask(), (Some(44), Some(0x5000_0006_0042), Some(0x6_0042), Some(6)));
        set_gs(0);
    }
}

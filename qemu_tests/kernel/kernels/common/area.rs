//! The crate's own source that reads the index in the CPU's area, where each architecture's kernel has it.

#[cfg(target_arch = "aarch64")]
use smp_heap::cpu::aarch64::TpidrEl1 as Source;
#[cfg(target_arch = "riscv64")]
use smp_heap::cpu::riscv64::Tp as Source;
#[cfg(target_arch = "x86_64")]
use smp_heap::cpu::x86_64::GsBase as Source;

use smp_heap_kernel::cpu::INDEX_OFFSET;

/// The index, as a number of the width `N`.
pub(crate) type Area<N> = Source<INDEX_OFFSET, N>;

/// The source.
pub(crate) const fn source<N: smp_heap::cpu::Number>() -> Area<N> {
    // SAFETY: the register points to an area since before any Rust code runs, and the index in it is as long as the
    // longest number, little-endian and aligned.
    unsafe { Source::new() }
}

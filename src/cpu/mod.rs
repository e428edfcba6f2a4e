//! Identities of the CPU that come with the crate, and the contracts that they fulfil.

#[cfg(target_arch = "aarch64")]
pub mod aarch64;
mod pin;
#[cfg(target_arch = "riscv64")]
pub mod riscv64;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

pub use crate::contract::CpuMode;
pub use crate::contract::cpu::{CpuHint, CpuPin, Hint, Pinned, UnknownCpu};
pub use pin::{Armed, NO_INDEX, NeverPreempts, PinnedIndex, PreemptionCounter, PreemptionGuard, PreemptionPin};

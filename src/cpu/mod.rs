//! Identities of the CPU that come with the crate, and the contracts that they fulfil.
//!
//! # Before the number works
//! A CPU whose number is not known yet, or not below the heap's CPU count, is served without a cache. What makes a
//! source say so until the CPU is set up:
//! - *an area that all starting CPUs share*, whose number is [`NO_INDEX`] (`u32::MAX` in 4 bytes): each CPU points its
//!   per-CPU register there as the first thing it does. Costs nothing later.
//! - *numbers from 1* ([`FromOne`]), where the register or the area is 0 before it is set up. Costs a subtraction.
//! - *a switch for all CPUs together* ([`Armed`]), turned when the last of them is set up. Costs a load and a branch.

#[cfg(target_arch = "aarch64")]
pub mod aarch64;
#[cfg(any(target_arch = "aarch64", target_arch = "riscv64", target_arch = "x86_64"))]
mod number;
mod pin;
#[cfg(target_arch = "riscv64")]
pub mod riscv64;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

pub use crate::contract::CpuMode;
pub use crate::contract::cpu::{CacheAddr, CpuHint, CpuPin, Hint, OnlyCpu, Pinned, UnknownCpu};
#[cfg(any(target_arch = "aarch64", target_arch = "riscv64", target_arch = "x86_64"))]
pub use number::Number;
pub use pin::{
    Armed, ByAddr, CpuArea, FromOne, NO_INDEX, NeverPreempts, PinnedIndex, PreemptionCounter, PreemptionGuard,
    PreemptionPin,
};

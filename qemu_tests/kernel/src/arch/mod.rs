//! What the rest of the kernel needs from a processor architecture. Everything outside this folder is the same for all.
//!
//! An architecture is a folder that provides the names re-exported here; its own modules stay private to it.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
use aarch64 as imp;
#[cfg(target_arch = "riscv64")]
mod riscv64;
#[cfg(target_arch = "riscv64")]
use riscv64 as imp;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
use x86_64 as imp;

pub(crate) use imp::{
    AREA, call_timed, clear_deadline, fault_address, new_thread, prepare_steps, set_deadline, set_up_cpu,
    switch_threads,
};
pub use imp::{
    Context, Exit, cpu, cycles, enable_and_halt, exit, interrupts, ipi, nmi, reset, serial_write, stop, vector,
};
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use imp::{code, code_has_changed};

pub use crate::memory::STACK_LEN;
pub use crate::start::{MAX_CPUS, cpu_count, kernel};

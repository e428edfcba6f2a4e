//! What the rest of the kernel needs from a processor architecture. Everything outside this folder is the same for all.
//!
//! An architecture is a folder that provides the names re-exported here; its own modules stay private to it.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
use x86_64 as imp;

pub(crate) use imp::{AREA, new_thread, set_up_cpu, stop, switch_threads};
pub use imp::{
    Context, Exit, abandon, clock, cpu, enable_and_halt, exit, fault, fault::Fault, interrupts, ipi, nmi, serial_write,
    step, timer, vector,
};

pub use crate::memory::STACK_LEN;
pub use crate::start::{MAX_CPUS, cpu_count, kernel};

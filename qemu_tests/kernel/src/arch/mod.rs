//! What the rest of the kernel needs from a processor architecture. Everything outside this folder is the same for all.
//!
//! An architecture is a folder that provides the names re-exported here; its own modules stay private to it.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    Context, Exit, MAX_CPUS, STACK_LEN, abandon, cpu, cpu_count, enable_and_halt, exit, fault, interrupts, ipi, kernel,
    nmi, serial_write, step, timer, vector,
};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{THREAD_STACKS, new_thread, stop, switch_threads};
#[cfg(target_arch = "x86_64")]
pub use x86_64::{clock, fault::Fault};

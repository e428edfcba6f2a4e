//! The host side of the QEMU tests: find a toolchain, build the test kernels, boot one, judge how it ended.
//!
//! [`Boot`] describes one run of one kernel and [`Boot::run`] does all of it, streaming the guest's lines:
//!
//! ```no_run
//! use smp_heap_qemu::{Boot, Profile};
//!
//! let outcome = Boot::new("boot")
//!     .cpus(4)
//!     .profile(Profile::Fast)
//!     .arg("seconds", 5)
//!     .run(|line| println!("{line}"));
//! if let Err(failure) = outcome {
//!     eprintln!("{failure}");
//! }
//! ```
//!
//! Nothing here is ever skipped. What is missing on the machine is a [`Failure`] that names the command which installs
//! it; the price is that `cargo test` needs `./setup` once. A guest passes only if QEMU leaves with the one exit code
//! that a kernel has to ask for *and* its last line says so: a triple fault, which ends QEMU with code 0, or a kernel
//! that leaves half-way through cannot look like success.
#![expect(clippy::std_instead_of_core, reason = "a host program: std is what it is made of")]

mod arch;
mod boot;
mod budgets;
mod build;
mod kernels;
mod loaded;
mod patience;
mod qemu;
mod size;
mod toolchain;

pub use arch::{Arch, Needs};
pub use boot::{Boot, Failure, Passed, Work};
pub use budgets::{Figures, Table};
pub use build::{Profile, kernel_elf};
pub use kernels::{KERNELS, Kernel, Least, Rows, Soak};
pub use loaded::loaded;
pub use qemu::{Machine, find_qemu};
pub use size::sizes;
pub use toolchain::BareMetal;

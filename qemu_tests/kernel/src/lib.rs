//! The kernel that `smp-heap` is tested in: small, but with everything around a heap that a heap has to survive.
//!
//! Several CPUs, interrupts on all of them, IPIs, NMIs, exceptions, page tables with real rights and guard pages,
//! threads that are preempted anywhere and go on on another CPU. What it does not have is a heap: each test kernel
//! declares its own `#[global_allocator]`, and nothing here allocates, so whatever a test sees is the heap's doing.
//!
//! A kernel is a file in `kernels/`:
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//! use smp_heap_kernel::{Boot, kernel, println, smp, test};
//!
//! kernel! {
//!     fn main(boot: &Boot) {
//!         smp::on_all(|cpu| println!("hello from {cpu} of {}", boot.cpu_count()));
//!         test::did(boot.cpu_count(), "greetings");
//!     }
//! }
//! ```
//!
//! It passes by returning from `main` when it has told how much it did ([`test::did`]) and has asked for every word of
//! its command line; it fails by a panic. `main` runs on CPU 0 with interrupts enabled and no timer
//! running; the other CPUs wait for [`smp::on_all`].
#![no_std]
#![expect(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a failed check ends the test, which is what a test is for; addresses have 64 bits wherever this runs"
)]

pub mod abandon;
pub mod arch;
mod boot;
#[cfg(not(target_arch = "x86_64"))]
mod breakpoints;
mod clock;
pub mod console;
#[cfg(not(target_arch = "x86_64"))]
mod device_tree;
mod erased;
pub mod fault;
mod handlers;
mod memory;
#[cfg(not(target_arch = "x86_64"))]
mod page_tables;
pub mod sched;
pub mod smp;
mod start;
pub mod step;
pub mod sync;
pub mod test;
mod ticker;
pub mod time;
pub mod timer;

pub use arch::{Context, cpu, interrupts, ipi, nmi};
pub use boot::{Boot, Hooks, Kernel, Region};
pub use fault::Fault;

/// Declares the kernel's `main`, and optionally what it does before CPUs know who they are (see [`Hooks`]).
#[macro_export]
macro_rules! kernel {
    ($(hooks = $hooks:expr;)? fn main($boot:ident: &$type:ty) $body:block) => {
        fn kernel_main($boot: &$type) $body

        /// What the boot code starts.
        #[unsafe(no_mangle)]
        static SMP_HEAP_KERNEL: $crate::Kernel = $crate::Kernel {
            name: env!("CARGO_CRATE_NAME"),
            main: kernel_main,
            hooks: {
                #[allow(unused_mut, unused_assignments, clippy::allow_attributes)]
                let mut hooks = $crate::Hooks::none();
                $(hooks = $hooks;)?
                hooks
            },
        };
    };
}

#[cfg(target_os = "none")]
#[panic_handler]
fn on_panic(info: &core::panic::PanicInfo<'_>) -> ! {
    interrupts::disable();
    console::take_for_failure();
    println!("PANIC {}: {info}", cpu::Name);
    arch::exit(arch::Exit::Fail)
}

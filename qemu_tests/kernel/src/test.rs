//! How a kernel ends.

use core::fmt;

use crate::{arch, console, cpu, println};

/// Ends the run with success: the pass line, then the exit code that belongs to it. Returning from `main` does this.
pub fn pass() -> ! {
    println!("PASS {}", arch::kernel().name);
    arch::exit(arch::Exit::Pass)
}

/// Ends the run with failure, from any context.
pub fn fail(why: fmt::Arguments<'_>) -> ! {
    console::take_for_failure();
    println!("FAIL {}: {why}", cpu::Name);
    arch::exit(arch::Exit::Fail)
}

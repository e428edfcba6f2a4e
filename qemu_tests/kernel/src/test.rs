//! What a kernel tells of its work, and how it ends.

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::{arch, console, cpu, println};

/// Something was done.
static WORKED: AtomicBool = AtomicBool::new(false);

/// Tells the driver how much of something was done. It adds up what is said of one kind, which is a word without
/// spaces, and fails the run if that is less than the row demands.
pub fn did(count: impl TryInto<u64>, what: &str) {
    let Ok(count) = count.try_into() else { fail(format_args!("less than no {what}")) };
    println!("DID {count} {what}");
    WORKED.fetch_or(count > 0, Relaxed);
}

/// Ends the run with success: the pass line, then the exit code that belongs to it. Returning from `main` does this.
///
/// # Panics
/// If nothing was done: a `main` that returns too early has tested nothing.
pub(crate) fn pass() -> ! {
    if !WORKED.load(Relaxed) {
        fail(format_args!("the kernel returned and says of no work that it was done"));
    }
    println!("PASS {}", arch::kernel().name);
    arch::exit(arch::Exit::Pass)
}

/// Ends the run with failure, from any context.
pub fn fail(why: fmt::Arguments<'_>) -> ! {
    console::take_for_failure();
    println!("FAIL {}: {why}", cpu::Name);
    arch::exit(arch::Exit::Fail)
}

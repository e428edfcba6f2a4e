//! `println!` to the serial port, a line at a time.
//!
//! The lock is held with interrupts off, so no handler waits for the CPU it interrupted. Where masking does not help,
//! in an NMI or an exception that hit the holder itself, the line is printed without the lock: two lines may then mix,
//! but no report of a failure is ever lost in a deadlock. The first CPU that fails breaks the lock and has the console
//! to itself; the others stop at their next line, so that its report stays readable.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::{arch, cpu, interrupts};

/// Nobody holds the lock. One more than any holder's number, which is a CPU's index plus one.
const FREE: usize = 0;

static HOLDER: AtomicUsize = AtomicUsize::new(FREE);
/// The CPU whose failure ends the run, numbered as `HOLDER` is.
static FAILED: AtomicUsize = AtomicUsize::new(FREE);

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(arch::serial_write);
        Ok(())
    }
}

/// Prints a line; what [`println!`](crate::println) calls.
pub fn print_line(line: fmt::Arguments<'_>) {
    interrupts::without(|| {
        let me = me();
        let nested = HOLDER.load(Ordering::Relaxed) == me;
        while !nested && HOLDER.compare_exchange_weak(FREE, me, Ordering::Acquire, Ordering::Relaxed).is_err() {
            match FAILED.load(Ordering::Relaxed) {
                FREE => core::hint::spin_loop(),
                failed if failed == me => break,
                _ => arch::stop(),
            }
        }
        // `Serial` cannot fail, and an argument's `Display` that does has printed what it could.
        let _ = Serial.write_fmt(format_args!("{line}\n"));
        if !nested {
            HOLDER.store(FREE, Ordering::Release);
        }
    });
}

/// This CPU has failed: it waits for the console no more, since the holder may be what failed. If another CPU has
/// failed already, this one stops here and lets it finish.
pub fn take_for_failure() {
    if let Err(failed) = FAILED.compare_exchange(FREE, me(), Ordering::Relaxed, Ordering::Relaxed) {
        if failed != me() {
            arch::stop();
        }
    }
}

/// A CPU that does not know its index yet counts as the last one: there is at most one such CPU.
fn me() -> usize {
    cpu::index().saturating_add(1)
}

/// Prints a line to the serial port. Allocates nothing; may be used in every context.
#[macro_export]
macro_rules! println {
    () => { $crate::console::print_line(format_args!("")) };
    ($($arg:tt)*) => { $crate::console::print_line(format_args!($($arg)*)) };
}

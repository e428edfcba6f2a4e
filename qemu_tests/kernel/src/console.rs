//! `println!` to the serial port, a line at a time.
//!
//! The lock is held with interrupts off, so no handler waits for the CPU it interrupted. Where masking does not help,
//! in an NMI or an exception that hit the holder itself, the line is printed without the lock: two lines may then mix,
//! but no report of a failure is ever lost in a deadlock. A panic breaks the lock for good.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::{arch, cpu, interrupts};

/// Nobody holds the lock. One more than any holder's number, which is a CPU's index plus one.
const FREE: usize = 0;

static HOLDER: AtomicUsize = AtomicUsize::new(FREE);
static BROKEN: AtomicBool = AtomicBool::new(false);

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
        // A CPU that does not know its index yet counts as the last one: there is at most one such CPU.
        let me = cpu::index().saturating_add(1);
        let nested = HOLDER.load(Ordering::Relaxed) == me;
        if !nested {
            while !BROKEN.load(Ordering::Relaxed)
                && HOLDER.compare_exchange_weak(FREE, me, Ordering::Acquire, Ordering::Relaxed).is_err()
            {
                core::hint::spin_loop();
            }
        }
        // `Serial` cannot fail, and an argument's `Display` that does has printed what it could.
        let _ = Serial.write_fmt(format_args!("{line}\n"));
        if !nested {
            HOLDER.store(FREE, Ordering::Release);
        }
    });
}

/// From now on nobody waits for the lock: the holder may be the one that failed.
pub fn break_lock() {
    BROKEN.store(true, Ordering::Relaxed);
}

/// Prints a line to the serial port. Allocates nothing; may be used in every context.
#[macro_export]
macro_rules! println {
    () => { $crate::console::print_line(format_args!("")) };
    ($($arg:tt)*) => { $crate::console::print_line(format_args!($($arg)*)) };
}

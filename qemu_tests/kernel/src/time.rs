//! Time since boot, and waiting with an end.

use crate::test;

pub use crate::clock::{cycles, cycles_per_micro, micros};

/// How long [`wait_for`] waits for anything that should happen at once. An emulator on a loaded host has been seen to
/// take a second for it.
pub const SOON: u64 = 20_000_000;

/// Spins until `condition` holds, at most `limit` microseconds.
#[must_use = "false: the time was over first"]
pub fn wait_until(limit: u64, mut condition: impl FnMut() -> bool) -> bool {
    let start = micros();
    while !condition() {
        if micros() - start > limit {
            return condition();
        }
        core::hint::spin_loop();
    }
    true
}

/// Spins until `condition` holds and fails the test if that takes longer than `limit` microseconds.
pub fn wait_for(what: &str, limit: u64, condition: impl FnMut() -> bool) {
    if !wait_until(limit, condition) {
        test::fail(format_args!("waited {limit} us in vain for {what}"));
    }
}

/// Spins for so many microseconds.
pub fn spin(micros_: u64) {
    let _ = wait_until(micros_, || false);
}

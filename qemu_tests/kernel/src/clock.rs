//! The cycle counter as a clock.

use core::sync::atomic::{AtomicU64, Ordering};

pub use crate::arch::cycles;

static START: AtomicU64 = AtomicU64::new(0);
/// Microseconds per cycle, times 2^32.
static SCALE: AtomicU64 = AtomicU64::new(0);
static PER_SECOND: AtomicU64 = AtomicU64::new(0);

/// How many cycles a microsecond has.
#[must_use]
pub fn cycles_per_micro() -> u64 {
    PER_SECOND.load(Ordering::Relaxed) / 1_000_000
}

/// Microseconds since the clock was measured, early in the boot; 0 before.
#[must_use]
pub fn micros() -> u64 {
    let elapsed = cycles().saturating_sub(START.load(Ordering::Relaxed));
    ((u128::from(elapsed) * u128::from(SCALE.load(Ordering::Relaxed))) >> 32) as u64
}

/// Sets how many cycles a second has, and begins to count microseconds.
pub(crate) fn set_rate(per_second: u64) {
    PER_SECOND.store(per_second, Ordering::Relaxed);
    START.store(cycles(), Ordering::Relaxed);
    SCALE.store((1_000_000 << 32) / per_second, Ordering::Relaxed);
}

//! The cycle counter as a clock.

use core::sync::atomic::{AtomicU64, Ordering};

static START: AtomicU64 = AtomicU64::new(0);
/// Microseconds per cycle, times 2^32.
static SCALE: AtomicU64 = AtomicU64::new(0);
static PER_SECOND: AtomicU64 = AtomicU64::new(0);

/// The cycle counter: host cycles, or instructions when the emulator counts those.
#[must_use]
pub fn cycles() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

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

pub(super) fn set_rate(per_second: u64) {
    PER_SECOND.store(per_second, Ordering::Relaxed);
    START.store(cycles(), Ordering::Relaxed);
    SCALE.store((1_000_000 << 32) / per_second, Ordering::Relaxed);
}

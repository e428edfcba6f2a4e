//! What stands for atomics of 64 bits on processors whose atomics have 32.
//!
//! Whoever uses them sees the same few methods with the same values as of an `AtomicU64`, which they are elsewhere. So
//! the rest of the crate is one code, and what differs is where a slab's word has its fields (`slab/word.rs`).

use super::{AtomicU32, Ordering};

/// 64 bits, of which only the lower half is changed as a whole.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct SplitWord {
    low: AtomicU32,
    high: AtomicU32,
}

fn joined(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[expect(clippy::cast_possible_truncation, reason = "the other half is `high`")]
const fn low(value: u64) -> u32 {
    value as u32
}

const fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

impl SplitWord {
    pub(crate) const fn new(value: u64) -> Self {
        Self { low: AtomicU32::new(low(value)), high: AtomicU32::new(high(value)) }
    }

    /// The halves one after the other: of one moment only if nobody writes the upper one meanwhile.
    #[inline]
    pub(crate) fn load(&self, order: Ordering) -> u64 {
        let high = self.high.load(Ordering::Relaxed);
        joined(self.low.load(order), high)
    }

    /// Writes the halves one after the other; whoever reads the lower one by `Acquire` then has the upper one too, if
    /// `order` is `Release`.
    #[inline]
    pub(crate) fn store(&self, value: u64, order: Ordering) {
        self.high.store(high(value), Ordering::Relaxed);
        self.low.store(low(value), order);
    }

    /// Changes the lower half from that of `old` to that of `new`. The upper one is the same in both, and nobody writes
    /// it as long as this may succeed; it is not read again, since with success others may begin to use it anew.
    #[inline]
    pub(crate) fn compare_exchange(
        &self,
        old: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        debug_assert!(high(old) == high(new));
        match self.low.compare_exchange(low(old), low(new), success, failure) {
            Ok(_) => Ok(old),
            Err(low) => Err(joined(low, high(old))),
        }
    }

    /// Clears bits of the lower half. The upper one is not changed, whatever `mask` says of it, and is read before:
    /// with this step others may begin to use it anew.
    #[inline]
    pub(crate) fn fetch_and(&self, mask: u64, order: Ordering) -> u64 {
        let high = self.high.load(Ordering::Relaxed);
        joined(self.low.fetch_and(low(mask), order), high)
    }

    /// Sets bits of either half, each half at a moment of its own.
    pub(crate) fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        let high = self.high.fetch_or(high(bits), order);
        joined(self.low.fetch_or(low(bits), order), high)
    }
}

/// A counter of 32 bits: begins anew at 0 after 2^32 - 1.
#[derive(Debug)]
pub(crate) struct ShortCounter(AtomicU32);

impl ShortCounter {
    pub(crate) const fn new(value: u64) -> Self {
        Self(AtomicU32::new(low(value)))
    }

    #[inline]
    pub(crate) fn load(&self, order: Ordering) -> u64 {
        u64::from(self.0.load(order))
    }

    #[inline]
    pub(crate) fn store(&self, value: u64, order: Ordering) {
        self.0.store(low(value), order);
    }

    #[inline]
    pub(crate) fn fetch_add(&self, more: u64, order: Ordering) -> u64 {
        u64::from(self.0.fetch_add(low(more), order))
    }

    #[inline]
    pub(crate) fn fetch_sub(&self, less: u64, order: Ordering) -> u64 {
        u64::from(self.0.fetch_sub(low(less), order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicU64;
    use std::boxed::Box;
    use std::thread;

    const IDENTITY: u64 = 0x3f_1234 << 32;

    /// Each method beside that of the atomic which it stands for.
    #[test]
    fn a_split_word_answers_as_a_whole_one() {
        let (split, whole) = (SplitWord::new(IDENTITY | 7), AtomicU64::new(IDENTITY | 7));
        let same = || assert_eq!(split.load(Ordering::Acquire), whole.load(Ordering::Acquire));
        same();
        for (old, new) in [(7, 8), (7, 9), (8, u32::MAX), (u32::MAX, 0x8000_0001)] {
            let [old, new] = [old, new].map(|low| IDENTITY | u64::from(low));
            assert_eq!(
                split.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire),
                whole.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            );
            same();
        }
        for mask in [!1, !(1 << 31), IDENTITY | 0xff] {
            assert_eq!(split.fetch_and(mask, Ordering::AcqRel), whole.fetch_and(mask, Ordering::AcqRel));
            same();
        }
        for bits in [1, 1 << 31, 1 << 32, 1 << 63] {
            assert_eq!(split.fetch_or(bits, Ordering::Relaxed), whole.fetch_or(bits, Ordering::Relaxed));
            same();
        }
        for value in [0, u64::MAX, 1 << 32, u64::from(u32::MAX)] {
            split.store(value, Ordering::Release);
            whole.store(value, Ordering::Release);
            same();
        }
    }

    #[test]
    fn an_exchange_leaves_the_upper_half_alone() {
        let word = SplitWord::new(IDENTITY | 1);
        assert_eq!(word.fetch_and(0, Ordering::AcqRel), IDENTITY | 1);
        assert_eq!(word.load(Ordering::Acquire), IDENTITY);
    }

    #[test]
    fn many_writers_lose_no_exchange() {
        const EACH: u64 = 20_000;
        let word = Box::new(SplitWord::new(IDENTITY));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..EACH {
                        let mut old = word.load(Ordering::Acquire);
                        while let Err(now) = word.compare_exchange(old, old + 1, Ordering::AcqRel, Ordering::Acquire) {
                            old = now;
                        }
                    }
                });
            }
        });
        assert_eq!(word.load(Ordering::Acquire), IDENTITY + 3 * EACH);
    }

    #[test]
    fn a_short_counter_begins_anew_after_32_bits() {
        let counter = ShortCounter::new(0);
        assert_eq!(counter.fetch_sub(2, Ordering::Relaxed), 0);
        assert_eq!(counter.fetch_add(1, Ordering::Relaxed), u64::from(u32::MAX) - 1);
        assert_eq!(counter.load(Ordering::Relaxed), u64::from(u32::MAX));
        assert_eq!(counter.fetch_add(3, Ordering::Relaxed), u64::from(u32::MAX));
        assert_eq!(counter.load(Ordering::Relaxed), 2);
        counter.store(1 << 32 | 5, Ordering::Relaxed);
        assert_eq!(counter.load(Ordering::Relaxed), 5);
    }
}

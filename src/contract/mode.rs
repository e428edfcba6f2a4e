//! How a cache is taken: the one difference between hint and pin, as a sealed trait.

use super::cpu::{CacheAddr, CpuHint, CpuPin, Hint, Pinned};
use super::unwind::never_unwinding;

mod sealed {
    pub trait Sealed {}
    impl<H> Sealed for super::Hint<H> {}
    impl<P> Sealed for super::Pinned<P> {}
}

/// The strength of CPU identity that a heap is built with: [`Hint`] or [`Pinned`]. Sealed; a kernel implements
/// [`CpuHint`] or [`CpuPin`].
pub trait CpuMode: sealed::Sealed {
    /// Whether a cache belongs to one CPU alone, so that a plain flag takes it, and one that is busy was interrupted on
    /// this very CPU.
    const PINNED: bool;

    /// What keeps the CPU while an operation runs.
    type Guard;

    /// Keeps the CPU.
    fn pin(&self) -> Self::Guard;

    /// Reads the CPU's index: once on the fast path of an operation that asks for it, again for each slow step.
    fn index(&self, guard: &Self::Guard) -> usize;

    /// Where the CPU keeps its cache's address.
    fn cache_addr<'a>(&'a self, guard: &'a Self::Guard) -> Option<&'a CacheAddr>;

    /// Whether the caller may wait for others; asked with nothing held.
    fn may_wait(&self) -> bool;
}

impl<H: CpuHint> CpuMode for Hint<H> {
    const PINNED: bool = false;
    type Guard = ();

    #[inline]
    fn pin(&self) {}

    #[inline]
    fn index(&self, (): &()) -> usize {
        never_unwinding(|| self.0.current_cpu()).unwrap_or(0)
    }

    #[inline]
    fn cache_addr(&self, (): &()) -> Option<&CacheAddr> {
        None
    }

    fn may_wait(&self) -> bool {
        never_unwinding(|| self.0.may_wait())
    }
}

impl<P: CpuPin> CpuMode for Pinned<P> {
    const PINNED: bool = true;
    type Guard = P::Guard;

    #[inline]
    fn pin(&self) -> P::Guard {
        self.0.pin()
    }

    #[inline]
    fn index(&self, guard: &P::Guard) -> usize {
        self.0.index(guard)
    }

    #[inline]
    fn cache_addr<'a>(&'a self, guard: &'a P::Guard) -> Option<&'a CacheAddr> {
        self.0.cache_addr(guard)
    }

    fn may_wait(&self) -> bool {
        self.0.may_wait()
    }
}

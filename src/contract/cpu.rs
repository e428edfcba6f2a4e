//! CPU identity, at two strengths.
//!
//! The heap keeps a cache for each CPU. It must learn which one to use, and how much it may trust the answer:
//!
//! - A *hint* ([`CpuHint`], safe to implement) may be unknown, stale, wrong, out of range, the same for all
//!   CPUs, and may change between two calls. It costs time when it is bad, never soundness: the cache is taken by
//!   an atomic try-lock, one compare-and-exchange for each operation.
//! - A *pin* ([`CpuPin`], an unsafe promise) keeps the CPU to itself while a guard lives. The cache is then taken by
//!   a plain busy flag: no locked instruction on the fast path. Nobody else can take a pinned cache; draining it
//!   is cooperative.
//!
//! A kernel names its choice in the heap's type: `Heap<P, Hint<H>, N>` or `Heap<P, Pinned<C>, N>`.

#![expect(unsafe_code, reason = "contracts of the kernel")]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::interrupts;

/// A guess at the CPU that runs.
///
/// # Context
/// Called once on the fast path of each heap operation, and again for each slow step, from whatever context calls the
/// heap, NMI included, and before any CPU is set up. It must not use the heap. Aim at a few instructions. A panic in it
/// ends the program, since it may not unwind through an allocator.
pub trait CpuHint {
    /// A number that tends to be the same for the same CPU and different for different ones, small by
    /// preference; `None` if nothing is known yet. Any answer is sound.
    fn current_cpu(&self) -> Option<usize>;

    /// Whether the running code may wait a moment for others: not in a handler of an interrupt, an exception or an NMI,
    /// since the one it waits for may be the one that it interrupted, nor with interrupts masked, since that one may be
    /// waiting for this CPU. Asked by slow paths only. Any answer is sound: a wrong yes costs time, a wrong no may cost
    /// the request.
    ///
    /// The default: whether interrupts are open on this CPU, by `RFLAGS.IF` on x86-64, `DAIF.I` on AArch64,
    /// `sstatus.SIE` on 64-bit RISC-V (a kernel in M-mode has to override it); on other architectures, yes. It does not
    /// see an NMI, nor a handler that opens interrupts.
    fn may_wait(&self) -> bool {
        interrupts::are_open()
    }
}

/// A promise that the CPU stays ours.
///
/// # Context
/// As for [`CpuHint`]. `pin` and the guard's drop bracket the fast path of each operation and each slow step;
/// they may nest, since an interrupt handler may use the heap while the code it interrupted holds a guard.
///
/// # Safety
/// From the return of [`pin`](Self::pin) until its guard is dropped:
/// - what runs on this CPU is only the code that pinned, and contexts that interrupt it and finish before it
///   goes on (interrupts, NMIs, exceptions); no other task runs here, and the code does not move to another CPU;
/// - neither method unwinds, nor does the guard's drop;
/// - [`index`](Self::index) gives the same number each time, and no other CPU that holds a guard of a pin for the same
///   heap gets that number.
pub unsafe trait CpuPin {
    /// Ends the pin when dropped.
    type Guard;

    /// Pins the running code to its CPU.
    fn pin(&self) -> Self::Guard;

    /// The index of this CPU. An index at or above the heap's CPU count is allowed, and slow: such a CPU has no cache.
    fn index(&self, guard: &Self::Guard) -> usize;

    /// Where this CPU keeps the address of its cache, if it does: the fast paths then need no index and no table. The
    /// default: nowhere.
    ///
    /// # Safety of an implementation
    /// Beside the trait's contract: each CPU always gives the same place, which no other CPU gives, and gives it to one
    /// heap only. The place stays as long as the heap, and only the heap changes it. The heap is not moved once it
    /// was used.
    #[inline(always)]
    fn cache_addr<'a>(&'a self, _guard: &'a Self::Guard) -> Option<&'a CacheAddr> {
        None
    }

    /// As [`CpuHint::may_wait`]; asked while no guard lives.
    fn may_wait(&self) -> bool {
        interrupts::are_open()
    }
}

/// What the address of a cache leads to where there is none: as a cache that is always taken begins.
static NO_CACHE: AtomicUsize = AtomicUsize::new(HELD);

/// What a cache that is taken begins with.
pub(crate) const HELD: usize = usize::MAX;

/// The address of a CPU's cache, for the CPU's own data: see [`CpuPin::cache_addr`]. One word, and not zero: a place
/// that was only zeroed must not be used. The heap writes it on its own CPU, and empties it when that CPU is retired.
/// Linux's SLUB keeps its `cpu_slab` so.
#[derive(Debug)]
#[repr(transparent)]
pub struct CacheAddr {
    cache: AtomicPtr<()>,
}

impl CacheAddr {
    /// Of a CPU that has no cache yet.
    pub const fn new() -> Self {
        Self { cache: AtomicPtr::new(no_cache()) }
    }

    /// Where the cache is, or what looks like one that is taken.
    #[inline(always)]
    pub(crate) fn get(&self) -> *mut () {
        self.cache.load(Ordering::Relaxed)
    }

    /// True if it is new.
    pub(crate) fn set(&self, cache: NonNull<()>) -> bool {
        let is_new = self.get() != cache.as_ptr();
        if is_new {
            self.cache.store(cache.as_ptr(), Ordering::Relaxed);
        }
        is_new
    }

    /// The CPU has no cache any more.
    pub(crate) fn clear(&self) {
        self.cache.store(no_cache(), Ordering::Relaxed);
    }
}

const fn no_cache() -> *mut () {
    (&raw const NO_CACHE).cast_mut().cast()
}

impl Default for CacheAddr {
    fn default() -> Self {
        Self::new()
    }
}

/// CPU identity by [hint](CpuHint): right or wrong, always sound.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hint<H>(pub H);

/// CPU identity by [pin](CpuPin): no locked instruction on the fast path.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pinned<P>(pub P);

/// Every CPU looks the same: for the first lines of boot, and as the worst case in tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnknownCpu;

impl CpuHint for UnknownCpu {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        None
    }
}

/// The only CPU that the kernel runs: number 0. On several CPUs good enough for a hint, and fatal for a pin.
#[derive(Clone, Copy, Debug, Default)]
pub struct OnlyCpu;

impl CpuHint for OnlyCpu {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        Some(0)
    }
}

impl<F: Fn() -> Option<usize>> CpuHint for F {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        self()
    }
}

//! Pins that need no instruction of their own, and the arming of a CPU number that does not work yet.
//!
//! A pin has two halves: something that keeps this CPU to the running code, and a source of the CPU's number. The
//! source is any [`CpuHint`]; that it tells the truth is promised where the pin is made, in an `unsafe` constructor.
//!
//! Decisions, and what pays for each:
//! - *The number is read once, when the pin is taken, and stays in the guard.* It is then the same for the guard's
//!   life even if the source learns the truth meanwhile. Price: a register while the guard lives.
//! - *A source that knows nothing yet gives the index [`NO_INDEX`]*, which no heap has a cache for. Boot code and CPUs
//!   that are being started need no other heap: theirs is only slow. Price: none, the heap compares the index anyway.

#![expect(unsafe_code, reason = "contracts of the kernel")]

use core::marker::PhantomData;

use super::{CacheAddr, CpuHint, CpuPin};
use crate::base::sync::{AtomicBool, Ordering};
use crate::contract::interrupts;
use crate::contract::unwind::never_unwinding;

/// The index of a CPU that is not known: at or above every heap's CPU count.
pub const NO_INDEX: usize = usize::MAX;

/// A CPU number that was read while pinned. It stays on its CPU (it is not `Send`).
#[derive(Debug)]
pub struct PinnedIndex {
    index: usize,
    stays_here: PhantomData<*const ()>,
}

impl PinnedIndex {
    /// Asks the source. Call it pinned.
    #[inline]
    pub(super) fn read(id: &impl CpuHint) -> Self {
        Self { index: never_unwinding(|| id.current_cpu()).unwrap_or(NO_INDEX), stays_here: PhantomData }
    }

    /// The number.
    #[inline]
    pub(super) fn get(&self) -> usize {
        self.index
    }
}

/// The pin of a kernel that never preempts: a task leaves its CPU only where it says so, and never inside the heap.
///
/// # Context
/// Any, NMI included, if `I` may be asked there. Costs what `I` costs and no more.
#[derive(Clone, Copy, Debug)]
pub struct NeverPreempts<I> {
    id: I,
}

impl<I: CpuHint> NeverPreempts<I> {
    /// A pin that takes the CPU's number from `id`.
    ///
    /// # Safety
    /// While code is inside the heap that is given this pin, the kernel neither moves it to another CPU nor runs
    /// another task on its CPU: interrupt and exception handlers return to the code they interrupted, and so do `id`
    /// and the hooks that the heap calls. And `id` never gives two CPUs the same number below the heap's CPU count. If
    /// either is untrue, two tasks use one cache at once and a block may be handed out twice.
    pub const unsafe fn new(id: I) -> Self {
        Self { id }
    }
}

// SAFETY: `new`'s caller promises that a CPU runs, from entering the heap to leaving it, one task and what interrupts
// it, so also while a guard lives. The number cannot change in the guard, and `id` gives no other CPU the same one.
unsafe impl<I: CpuHint> CpuPin for NeverPreempts<I> {
    type Guard = PinnedIndex;

    #[inline]
    fn pin(&self) -> PinnedIndex {
        PinnedIndex::read(&self.id)
    }

    #[inline]
    fn index(&self, guard: &PinnedIndex) -> usize {
        guard.get()
    }

    fn may_wait(&self) -> bool {
        never_unwinding(|| self.id.may_wait())
    }
}

/// The kernel's way to forbid preemption on the running CPU for a short while.
///
/// A typical one counts in the CPU's own data: `disable` increments with one instruction that no interrupt can split
/// (`inc gs:[..]`), `enable` decrements and switches tasks if that became due meanwhile.
///
/// # Context
/// Called in every heap operation, from whatever context calls the heap; calls nest, within one context and
/// across contexts that interrupt each other. Neither may use the heap; `enable` may switch to another task, which may.
///
/// # Safety
/// - From the return of `disable` until the matching `enable`, what runs on this CPU is only the code that called, and
///   contexts that interrupt it and finish before it goes on; the code does not move to another CPU.
/// - The compiler moves no access to memory from behind `disable` to before it, nor from before `enable` to behind it.
///   An `asm!` block without `nomem` and `readonly`, a volatile access between compiler fences or an atomic with
///   `Acquire` and `Release` ordering does that.
/// - Neither unwinds.
pub unsafe trait PreemptionCounter {
    /// From here on the running code keeps its CPU.
    fn disable();

    /// Takes back one `disable`.
    fn enable();
}

/// The pin of a preemptive kernel that counts: no task is switched while a guard lives, interrupts stay open.
///
/// # Context
/// Any in which `C` and `I` work. Costs two changes of the counter for each guard.
pub struct PreemptionPin<C, I> {
    id: I,
    counter: PhantomData<fn() -> C>,
}

impl<C: PreemptionCounter, I: CpuHint> PreemptionPin<C, I> {
    /// A pin that takes the CPU's number from `id`, which is asked when preemption is off already.
    ///
    /// # Safety
    /// `id`, asked while preemption is off, never gives two CPUs the same number below the heap's CPU count. If it
    /// does, those CPUs use one cache at once and a block may be handed out twice.
    pub const unsafe fn new(id: I) -> Self {
        Self { id, counter: PhantomData }
    }
}

impl<C, I: core::fmt::Debug> core::fmt::Debug for PreemptionPin<C, I> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("PreemptionPin").field("id", &self.id).finish()
    }
}

/// Preemption is off until this is dropped.
#[derive(Debug)]
pub struct PreemptionGuard<C: PreemptionCounter> {
    index: PinnedIndex,
    counter: PhantomData<C>,
}

impl<C: PreemptionCounter> Drop for PreemptionGuard<C> {
    #[inline]
    fn drop(&mut self) {
        C::enable();
    }
}

// SAFETY: `C` keeps the CPU to the running code and its interrupters from `pin`'s `disable` to the guard's `enable`,
// as its own contract says. The number is read after `disable`, cannot change in the guard, and `id` gives no other
// CPU the same one: `new`'s caller promises that.
unsafe impl<C: PreemptionCounter, I: CpuHint> CpuPin for PreemptionPin<C, I> {
    type Guard = PreemptionGuard<C>;

    #[inline]
    fn pin(&self) -> PreemptionGuard<C> {
        C::disable();
        PreemptionGuard { index: PinnedIndex::read(&self.id), counter: PhantomData }
    }

    #[inline]
    fn index(&self, guard: &PreemptionGuard<C>) -> usize {
        guard.index.get()
    }

    fn may_wait(&self) -> bool {
        never_unwinding(|| self.id.may_wait())
    }
}

/// What the running CPU has of its own that the heap uses: in its per-CPU area.
///
/// # Context
/// Called pinned, from whatever context calls the heap, and before the CPU is set up if the heap is used there:
/// `cache_addr` is then a place that stays as it was made, and `index` [`NO_INDEX`]. A panic in them ends the program.
///
/// # Safety
/// Each CPU always gives the same place and index, and no other CPU that is set up gives one of them. The place stays
/// for ever.
pub unsafe trait CpuArea {
    /// Where the address of this CPU's cache is kept. Asked on the fast path of each operation.
    fn cache_addr() -> &'static CacheAddr;

    /// The index of this CPU. Asked by slow paths only.
    fn index() -> usize;

    /// As [`CpuHint::may_wait`].
    fn may_wait() -> bool {
        interrupts::are_open()
    }
}

/// A pin whose CPU keeps the address of its cache in its own area, so that the fast paths need no index and no table.
/// How the CPU is kept is `P`'s affair, which is not asked for the index: `NeverPreempts<UnknownCpu>` will do.
///
/// # Context
/// As for `P`. An `alloc` or a `free` takes some 6 instructions less than with an index.
pub struct ByAddr<P, A> {
    pin: P,
    area: PhantomData<fn() -> A>,
}

impl<P: CpuPin, A: CpuArea> ByAddr<P, A> {
    /// A pin that keeps the CPU as `pin` does.
    ///
    /// # Safety
    /// It becomes the mode of one heap, which is the only one that uses the places of `A`, and is neither moved nor
    /// dropped once it was used. Else a CPU would work with a cache that is another heap's, or nobody's.
    pub const unsafe fn new(pin: P) -> Self {
        Self { pin, area: PhantomData }
    }
}

impl<P: core::fmt::Debug, A> core::fmt::Debug for ByAddr<P, A> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("ByAddr").field("pin", &self.pin).finish()
    }
}

// SAFETY: `P` keeps the CPU while its guard lives; index and place are as `A` promises, which serve this heap only, as
// `new`'s caller promises; and no call of `A` unwinds.
unsafe impl<P: CpuPin, A: CpuArea> CpuPin for ByAddr<P, A> {
    type Guard = P::Guard;

    #[inline]
    fn pin(&self) -> P::Guard {
        self.pin.pin()
    }

    #[inline]
    fn index(&self, _: &P::Guard) -> usize {
        never_unwinding(A::index)
    }

    #[inline(always)]
    fn cache_addr<'a>(&'a self, _: &'a P::Guard) -> Option<&'a CacheAddr> {
        Some(never_unwinding(A::cache_addr))
    }

    fn may_wait(&self) -> bool {
        never_unwinding(A::may_wait)
    }
}

/// A source that counts from 1: its 0 says that this CPU is not set up yet.
///
/// So each CPU has its cache from when it wrote its own number, plus 1, whatever the others do. Before that must be 0:
/// - `IA32_TSC_AUX`, which `cpu::x86_64::Rdpid` reads, is 0 after a reset;
/// - `TPIDR_EL1` or `tp` is 0 if the entry code writes that, one instruction;
/// - a per-CPU area is 0 if its memory came zeroed.
///
/// A kernel that warm-starts a CPU puts the 0 back first.
///
/// # Context
/// Any in which `I` works. Adds one subtraction to the source.
#[derive(Clone, Copy, Debug, Default)]
pub struct FromOne<I>(pub I);

impl<I: CpuHint> CpuHint for FromOne<I> {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        self.0.current_cpu().map(|number| number.wrapping_sub(1))
    }

    fn may_wait(&self) -> bool {
        self.0.may_wait()
    }
}

/// A CPU number that is unknown until the kernel says that it works, for all CPUs together.
///
/// It stands between a heap that serves from the first line of boot and a source that would fault there. The kernel
/// keeps it in a static, and calls [`arm`](Self::arm) once, when the source answers on every CPU that uses the heap
/// then. A CPU that starts later needs one of the other [ways](super#before-the-number-works).
///
/// # Context
/// Any. Adds one load and one branch to the source.
#[derive(Debug, Default)]
pub struct Armed<I> {
    armed: AtomicBool,
    id: I,
}

impl<I: CpuHint> Armed<I> {
    /// Not armed.
    pub const fn new(id: I) -> Self {
        Self { armed: AtomicBool::new(false), id }
    }

    /// From here on the source is asked. What was written before is visible to it. For good; again is nothing.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::Release);
    }
}

impl<I: CpuHint> CpuHint for Armed<I> {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        if self.armed.load(Ordering::Acquire) { self.id.current_cpu() } else { None }
    }

    fn may_wait(&self) -> bool {
        self.id.may_wait()
    }
}

impl<I: CpuHint> CpuHint for &Armed<I> {
    #[inline]
    fn current_cpu(&self) -> Option<usize> {
        (**self).current_cpu()
    }

    fn may_wait(&self) -> bool {
        (**self).may_wait()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;
    use std::thread_local;

    thread_local! {
        static DEPTH: Cell<usize> = const { Cell::new(0) };
    }

    #[derive(Debug)]
    struct Counter;

    // SAFETY: A host thread stands for the CPU; nothing is ever switched on it.
    unsafe impl PreemptionCounter for Counter {
        fn disable() {
            DEPTH.set(DEPTH.get() + 1);
        }

        fn enable() {
            DEPTH.set(DEPTH.get() - 1);
        }
    }

    #[test]
    fn a_cpu_that_is_not_known_has_an_index_without_a_cache() {
        // SAFETY: The test's heap is imagined.
        let pin = unsafe { NeverPreempts::new(super::super::UnknownCpu) };
        assert_eq!(pin.index(&pin.pin()), usize::MAX);
        // SAFETY: As above.
        let pin = unsafe { PreemptionPin::<Counter, _>::new(|| Some(7)) };
        assert_eq!(pin.index(&pin.pin()), 7);
    }

    #[test]
    fn preemption_is_off_while_the_number_is_read_and_guarded() {
        // The source's answer is the depth at which it was asked.
        // SAFETY: The test's heap is imagined.
        let pin = unsafe { PreemptionPin::<Counter, _>::new(|| Some(DEPTH.get())) };
        let outer = pin.pin();
        let inner = pin.pin();
        assert_eq!((pin.index(&outer), pin.index(&inner), DEPTH.get()), (1, 2, 2));
        drop(inner);
        assert_eq!(DEPTH.get(), 1);
        drop(outer);
        assert_eq!(DEPTH.get(), 0);
    }

    #[test]
    fn zero_of_a_source_from_one_is_no_cpu() {
        let number = Cell::new(Some(0));
        let id = FromOne(|| number.get());
        // SAFETY: The test's heap is imagined.
        let pin = unsafe { NeverPreempts::new(FromOne(|| number.get())) };
        assert_eq!((id.current_cpu(), pin.index(&pin.pin())), (Some(NO_INDEX), NO_INDEX));
        number.set(Some(1));
        assert_eq!(id.current_cpu(), Some(0));
        number.set(None);
        assert_eq!(id.current_cpu(), None);
    }

    /// A source whose kernel says that nobody may wait.
    #[derive(Debug)]
    struct Hurried;

    impl CpuHint for Hurried {
        fn current_cpu(&self) -> Option<usize> {
            Some(1)
        }

        fn may_wait(&self) -> bool {
            false
        }
    }

    #[test]
    fn whether_the_caller_may_wait_is_the_inner_sources_to_say() {
        static ARMED: Armed<Hurried> = Armed::new(Hurried);
        assert!(!ARMED.may_wait() && !CpuHint::may_wait(&&ARMED) && !FromOne(Hurried).may_wait());
        // SAFETY: The test's heap is imagined.
        let never = unsafe { NeverPreempts::new(Hurried) };
        // SAFETY: As above.
        let counted = unsafe { PreemptionPin::<Counter, _>::new(Hurried) };
        assert!(!never.may_wait() && !counted.may_wait());
    }

    #[test]
    fn the_number_does_not_change_under_a_guard() {
        static ID: Armed<fn() -> Option<usize>> = Armed::new(|| Some(3));
        // SAFETY: The test's heap is imagined.
        let pin = unsafe { NeverPreempts::new(&ID) };
        let before = pin.pin();
        assert_eq!((ID.current_cpu(), pin.index(&before)), (None, NO_INDEX));
        ID.arm();
        assert_eq!((pin.index(&before), pin.index(&pin.pin())), (NO_INDEX, 3));
        ID.arm();
        assert_eq!((ID.current_cpu(), CpuHint::current_cpu(&&ID)), (Some(3), Some(3)));
    }
}

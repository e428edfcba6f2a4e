//! Fault injection: a page provider that fails when it is told to, for tests of what a kernel does when memory is
//! short.
//!
//! It is an adapter over any provider, and every knob is an atomic: so it stands in a kernel's own static heap, over
//! the kernel's own provider, and is told what to do while the kernel runs. Price: a few atomic operations for each
//! call of the provider, on cache lines that all CPUs share; and two knobs are turned one after the other.

#![expect(unsafe_code, reason = "runs and promises are given on")]

use core::ptr::NonNull;

use crate::base::sync::{AtomicUsize, Ordering, spin_loop};
use crate::contract::provider::{PageProvider, PageRun};
use crate::contract::unwind::never_unwinding;

/// A method of [`PageProvider`] that [`Faulty`] counts, and may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `map` and `try_map`.
    Map,
    /// `unmap`. A provider that fails it keeps the run, and the heap uses that again.
    Unmap,
    /// `resize`.
    Resize,
    /// `remap`.
    Remap,
    /// `decommit`.
    Decommit,
    /// `commit`.
    Commit,
    /// `relieve`.
    Relieve,
}

/// When a hook of [`Faulty`] runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before it is decided whether the call fails.
    Before,
    /// When its answer is known and counted.
    After,
}

/// What calls of one kind are told to do, and how many there were. Every method may be called in every context.
#[derive(Debug)]
pub struct Faults {
    made: AtomicUsize,
    failed: AtomicUsize,
    /// Calls from this one on, counted from 0, fail...
    first: AtomicUsize,
    /// ... up to the one before this.
    end: AtomicUsize,
    /// Of 256.
    share: AtomicUsize,
}

impl Faults {
    const fn new() -> Self {
        Self {
            made: AtomicUsize::new(0),
            failed: AtomicUsize::new(0),
            first: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            share: AtomicUsize::new(0),
        }
    }

    /// Lets `skip` calls through from now on, and fails the `count` calls after them; in place of what was told before.
    /// `(k, 1)` fails one call, `(0, usize::MAX)` fails all, `(0, 0)` fails none.
    pub fn fail(&self, skip: usize, count: usize) {
        // Who calls meanwhile sees no order at all, and no half of one.
        self.end.store(0, Ordering::Relaxed);
        let first = self.made().saturating_add(skip);
        self.first.store(first, Ordering::Relaxed);
        self.end.store(first.saturating_add(count), Ordering::Relaxed);
    }

    /// Fails that many of 256 calls from now on, spread as by chance and the same in every test; 0: none, 256: all.
    pub fn fail_share(&self, share: usize) {
        self.share.store(share, Ordering::Relaxed);
    }

    /// Calls until now.
    pub fn made(&self) -> usize {
        self.made.load(Ordering::Relaxed)
    }

    /// Those of them that were answered with a no, whoever said it.
    pub fn failed(&self) -> usize {
        self.failed.load(Ordering::Relaxed)
    }

    /// Counts a call. True: it fails.
    fn next_fails(&self) -> bool {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let mixed = (number as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
        let in_range = self.first.load(Ordering::Relaxed) <= number && number < self.end.load(Ordering::Relaxed);
        in_range || mixed < self.share.load(Ordering::Relaxed) as u64
    }
}

/// A provider over the provider `P` that fails when it is told to, and counts what it is asked for.
///
/// New, it fails nothing and answers as `P` does; so do always `could_give`, `prefer`, `is_busy` and every constant of
/// [`PageProvider`]. Its own methods may be called in every context, wait for nobody, and take effect with the next
/// call.
///
/// ```
/// # #[cfg(feature = "region")] {
/// use core::alloc::Layout;
/// use smp_heap::battery::{Call, Faulty};
/// use smp_heap::{Heap, Hint, RegionProvider, cpu::UnknownCpu};
///
/// static HEAP: Heap<Faulty<RegionProvider<4>>, Hint<UnknownCpu>, 4> =
///     Heap::new(Faulty::new(RegionProvider::new()), Hint(UnknownCpu));
///
/// # let memory = Box::leak(vec![0_u8; 64 << 10].into_boxed_slice());
/// # let (start, len) = (memory.as_mut_ptr(), memory.len());
/// let provider = HEAP.provider();
/// // Sound, since nothing else uses these bytes from now on.
/// unsafe { provider.inner().add_region(start, len) }?;
/// provider.on(Call::Map).fail(0, usize::MAX);
/// assert!(HEAP.alloc(Layout::new::<u64>()).is_err(), "the provider gives nothing");
/// assert!(provider.on(Call::Map).failed() > 0);
/// provider.on(Call::Map).fail(0, 0);
/// assert!(HEAP.alloc(Layout::new::<u64>()).is_ok());
/// assert_eq!(provider.held_len(), HEAP.stats().held_len);
/// # }
/// # Ok::<(), Box<dyn core::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Faulty<P, H = fn(Call, Moment)> {
    inner: P,
    hook: H,
    map: Faults,
    unmap: Faults,
    resize: Faults,
    remap: Faults,
    decommit: Faults,
    commit: Faults,
    relieve: Faults,
    held_len: AtomicUsize,
    peak_len: AtomicUsize,
    limit_len: AtomicUsize,
    least_len: AtomicUsize,
    delay: AtomicUsize,
    relief_len: AtomicUsize,
    relief_count: AtomicUsize,
}

impl<P> Faulty<P> {
    /// Over `inner`, without a hook.
    pub const fn new(inner: P) -> Self {
        Self::with_hook(inner, |_, _| ())
    }
}

impl<P: Default> Default for Faulty<P> {
    fn default() -> Self {
        Self::new(P::default())
    }
}

impl<P, H> Faulty<P, H> {
    /// Over `inner`, with a hook: run before and after each counted call, in its caller's context. It may use the heap
    /// and turn knobs, also for the call that it runs before; over a `REENTRANT` provider it must allow to be entered
    /// again. If it unwinds, the program is aborted.
    pub const fn with_hook(inner: P, hook: H) -> Self {
        Self {
            inner,
            hook,
            map: Faults::new(),
            unmap: Faults::new(),
            resize: Faults::new(),
            remap: Faults::new(),
            decommit: Faults::new(),
            commit: Faults::new(),
            relieve: Faults::new(),
            held_len: AtomicUsize::new(0),
            peak_len: AtomicUsize::new(0),
            limit_len: AtomicUsize::new(usize::MAX),
            least_len: AtomicUsize::new(0),
            delay: AtomicUsize::new(0),
            relief_len: AtomicUsize::new(0),
            relief_count: AtomicUsize::new(0),
        }
    }

    /// The provider below.
    pub const fn inner(&self) -> &P {
        &self.inner
    }

    /// What calls of this kind are told, and their counts.
    pub const fn on(&self, call: Call) -> &Faults {
        match call {
            Call::Map => &self.map,
            Call::Unmap => &self.unmap,
            Call::Resize => &self.resize,
            Call::Remap => &self.remap,
            Call::Decommit => &self.decommit,
            Call::Commit => &self.commit,
            Call::Relieve => &self.relieve,
        }
    }

    /// Bytes in runs that were given and not taken back; pages without memory count too.
    pub fn held_len(&self) -> usize {
        self.held_len.load(Ordering::Relaxed)
    }

    /// The most bytes that were held at once.
    pub fn peak_len(&self) -> usize {
        self.peak_len.load(Ordering::Relaxed)
    }

    /// Fails every call that would make the bytes held more than `len`. At first it is `usize::MAX`.
    pub fn set_limit(&self, len: usize) {
        self.limit_len.store(len, Ordering::Relaxed);
    }

    /// Fails `map` of a run of fewer bytes. At first it is 0.
    pub fn set_least(&self, len: usize) {
        self.least_len.store(len, Ordering::Relaxed);
    }

    /// Makes each call slow by that many spins of the CPU. At first it is 0.
    pub fn set_delay(&self, spins: usize) {
        self.delay.store(spins, Ordering::Relaxed);
    }

    /// Has the next `count` calls of `relieve` add `len` bytes to the limit and say yes; the others ask `P`.
    pub fn set_relief(&self, len: usize, count: usize) {
        self.relief_len.store(len, Ordering::Relaxed);
        self.relief_count.store(count, Ordering::Relaxed);
    }
}

/// Replaces a number; `None` if `change` gives nothing.
fn update(number: &AtomicUsize, change: impl Fn(usize) -> Option<usize>) -> Option<usize> {
    let mut old = number.load(Ordering::Relaxed);
    loop {
        let new = change(old)?;
        match number.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return Some(new),
            Err(now) => old = now,
        }
    }
}

impl<P, H: Fn(Call, Moment)> Faulty<P, H> {
    /// One call, which makes a run of `old_len` bytes one of `new_len`.
    fn call<T>(&self, call: Call, old_len: usize, new_len: usize, work: impl FnOnce() -> Option<T>) -> Option<T> {
        never_unwinding(|| (self.hook)(call, Moment::Before));
        (0..self.delay.load(Ordering::Relaxed)).for_each(|_| spin_loop());
        let faults = self.on(call);
        let answer = if faults.next_fails() { None } else { self.book(old_len, new_len, work) };
        if answer.is_none() {
            faults.failed.fetch_add(1, Ordering::Relaxed);
        }
        never_unwinding(|| (self.hook)(call, Moment::After));
        answer
    }

    /// Does `work` if the limit allows it, and keeps the books of its answer.
    fn book<T>(&self, old_len: usize, new_len: usize, work: impl FnOnce() -> Option<T>) -> Option<T> {
        let more = new_len.saturating_sub(old_len);
        if more > 0 {
            let limit_len = self.limit_len.load(Ordering::Relaxed);
            update(&self.held_len, |held_len| held_len.checked_add(more).filter(|sum| *sum <= limit_len))?;
        }
        let answer = work();
        let less = if answer.is_some() { old_len.saturating_sub(new_len) } else { more };
        let held_len = self.held_len.fetch_sub(less, Ordering::Relaxed).wrapping_sub(less);
        self.peak_len.fetch_max(held_len, Ordering::Relaxed);
        answer
    }

    fn give(&self, run: PageRun, work: impl FnOnce() -> Option<NonNull<u8>>) -> Option<NonNull<u8>> {
        let is_long = run.len() >= self.least_len.load(Ordering::Relaxed);
        self.call(Call::Map, 0, run.len(), || if is_long { work() } else { None })
    }

    fn relieves(&self) -> bool {
        let relieves = update(&self.relief_count, |count| count.checked_sub(1)).is_some();
        if relieves {
            let len = self.relief_len.load(Ordering::Relaxed);
            update(&self.limit_len, |limit_len| Some(limit_len.saturating_add(len)));
        }
        relieves
    }
}

// SAFETY: every run is one of `P`'s, in `P`'s state: each method either asks the same method of `P`, with the same
// arguments, and gives its answer on, or does nothing and says no, which the contract allows at any time. So a run that
// was given, or whose pages have memory, is one for `P` too. The constants are `P`'s, and what is added keeps them: it
// writes to no page, and waits for nobody. It does not panic, and the hook does not unwind.
unsafe impl<P: PageProvider, H: Fn(Call, Moment)> PageProvider for Faulty<P, H> {
    const PAGE_LEN: usize = P::PAGE_LEN;
    const ZEROED: bool = P::ZEROED;
    const REENTRANT: bool = P::REENTRANT;
    const REMAPS: bool = P::REMAPS;
    const GUARDS: bool = P::GUARDS;
    const DECOMMITS: bool = P::DECOMMITS;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.give(run, || self.inner.map(run))
    }

    fn try_map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.give(run, || self.inner.try_map(run))
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: the run is as `P` gave it, and the caller keeps the same contract.
        let unmap = || unsafe { self.inner.unmap(start, run) }.then_some(());
        self.call(Call::Unmap, run.len(), 0, unmap).is_some()
    }

    unsafe fn decommit(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: the pages are in a run of `P`'s, and the caller keeps the same contract.
        let decommit = || unsafe { self.inner.decommit(start, run) }.then_some(());
        self.call(Call::Decommit, 0, 0, decommit).is_some()
    }

    unsafe fn commit(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: the pages are in a run of `P`'s, and were decommitted by `P`.
        let commit = || unsafe { self.inner.commit(start, run) }.then_some(());
        self.call(Call::Commit, 0, 0, commit).is_some()
    }

    unsafe fn resize(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> bool {
        // SAFETY: `old` is as `P` gave it, and the caller keeps the same contract.
        let resize = || unsafe { self.inner.resize(start, old, new) }.then_some(());
        self.call(Call::Resize, old.len(), new.len(), resize).is_some()
    }

    unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
        // SAFETY: `old` is as `P` gave it, and the caller keeps the same contract.
        let remap = || unsafe { self.inner.remap(start, old, new) };
        self.call(Call::Remap, old.len(), new.len(), remap)
    }

    fn could_give(&self, run: PageRun) -> bool {
        self.inner.could_give(run)
    }

    fn prefer(&self, run: PageRun) -> PageRun {
        self.inner.prefer(run)
    }

    fn is_busy(&self) -> bool {
        self.inner.is_busy()
    }

    fn relieve(&self, need: PageRun) -> bool {
        self.call(Call::Relieve, 0, 0, || (self.relieves() || self.inner.relieve(need)).then_some(())).is_some()
    }
}

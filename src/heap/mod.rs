//! The heap: fast paths, and what happens when they find nothing.
//!
//! ```text
//! alloc ─┬─ small: enter ─ pop                                     fast, in view below
//!        │          ├─ refill (engine)                             own cache empty
//!        │          ├─ elsewhere: lap over caches │ one block      own cache busy
//!        │          └─ search: reserves → provider → everything    nothing found; nothing held
//!        └─ large: pages ─ search
//! free  ─┬─ small: enter ─ push                                    fast, in view below
//!        │          ├─ spill (engine) ─ send home the rest, a batch a hold ─ return surplus chunks
//!        │          └─ elsewhere: lap │ straight to the slab       own cache busy: always succeeds
//!        └─ large: pages (waits for no lock) ─ return surplus chunks
//! ```
//! An operation reads the CPU's index once, takes one cache at most, and gives it up before anything that may wait. The
//! provider is called from `search` and from the return of surplus chunks, with nothing held.
//!
//! **What a busy cache means.** Pinned: this CPU was interrupted inside the heap, so the caller is *nested*: it takes single blocks
//! from slabs, never waits, and calls the provider only if that says that it may be re-entered. Hint: another CPU has it, or the same; that cannot be told, so the caller tries
//! the other caches once around (a *lap*, starting where the last one succeeded) and takes on no duties; it may still ask the provider,
//! whose gate excludes what must be excluded.

pub(crate) mod coalesce;
pub(crate) mod depot;
pub(crate) mod gate;
#[cfg(feature = "hardened")]
mod inspect;
pub(crate) mod large;
pub(crate) mod orphans;
pub(crate) mod panic_reserve;

use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;

use crate::base::size_class::SizeClass;
use crate::base::sync::{AtomicU64, AtomicUsize, InHand, Ordering, SPIN_LIMIT, spin_loop};
use crate::base::trace::{Event, Kind};
use crate::cache::{Counts, CpuCache};
use crate::contract::CpuMode;
use crate::contract::provider::{PageProvider, PageRun};
#[cfg(feature = "hardened")]
use crate::harden::Misuse;
#[cfg(feature = "debug-heap")]
use crate::harden::debug::Debugging;
#[cfg(feature = "guard-pages")]
use crate::harden::guard::Guards;
use crate::heap::depot::{Caller, Engine, Surplus, TINY_COUNT};
use crate::heap::gate::{Entry, Gate};
use crate::heap::orphans::Stranded;
use crate::heap::panic_reserve::Emergency;
use crate::pages::{AddError, PageDesc, Refused, Run, Step, Use, Want, chunk_len_for};
use crate::slab::block::{Block, List};
#[cfg(not(feature = "hardened"))]
use crate::slab::word::home_at;

/// The shortest chunk worth asking a provider for that has as much.
const MIN_CHUNK_LEN: usize = 1024 * 1024;
const MAX_CHUNK_LEN: usize = 32 * 1024 * 1024;
/// A new chunk is this share of the bytes held, so that the number of chunks grows with the logarithm of the heap's size.
const CHUNK_SHARE: usize = 8;

/// Up to so many bytes held, a chunk for slabs is a smaller share of them: what is held then stays closer to what is used. On longer heaps that would be more chunks
/// than the first table of their map holds.
const FINE_HEAP_LEN: usize = 64 * 1024 * 1024;
const FINE_CHUNK_SHARE: usize = 32;

/// Free pages up to this share of the bytes held stay with the heap.
const KEPT_SHARE: usize = 4;

/// Each call of `maintain` forgets this share of what was in use once and is not now.
const DECAY_SHARE: usize = 8;

/// How often a run waits for its turn to be given back, resized or moved. Else it would become a chunk, or be copied.
const ASK_TRIES: u32 = 64;

/// How often `search` asks for its turn at the provider, or for its chunk to be noted. The gate is not fair, so that who comes while several others are with the provider all the
/// time loses many turns; without one turn, "none" would say nothing.
const GROW_TRIES: u32 = 64;

/// How often `search` looks again because a lock was busy, before it asks for pages it may not need. Each look waits within the spin limit,
/// so the sum is about a millisecond: more than any holder takes that runs, less than a time slice of one that does not.
const BUSY_TRIES: u32 = 16;

/// How often `search` looks again before it gives up, while it sees a lock held: a context that was preempted in the middle of a step, here or in
/// the provider, or a virtual CPU that its host does not run, hides what it holds for a time slice. Each look waits within the spin limit.
const LAST_TRIES: u32 = 4096;

/// So many looks in a row without a lock in sight end the search: during a single one somebody may have come and gone unseen.
const QUIET_LOOKS: u32 = 2;

/// Looks for neighbours to join, a slab each, when there are no pages for a short block.
const JOIN_TRIES: u32 = 64;

/// How often the kernel is asked to relieve the pressure for one allocation.
const RELIEF_TRIES: u32 = 64;

/// A heap for kernels: scales with CPUs, callable from every context. See the [crate's documentation](crate).
///
/// `P` gives pages, `C` says how a CPU is known ([`Hint`](crate::Hint) or [`Pinned`](crate::Pinned)), `CPUS` is the number of
/// caches: the most CPUs that run without sharing. `new` is `const` and all zero but for the provider: a static heap costs no
/// image size, less than 8,100 bytes of `.bss` per CPU and 12 KiB more, and no set-up code.
pub struct Heap<P, C, const CPUS: usize> {
    pub(crate) engine: Engine<CPUS>,
    pub(crate) gate: Gate,
    pub(crate) calls: Calls,
    /// Contexts that carry a chunk between provider and heap, or may be about to: neither has it meanwhile.
    moving: InHand,
    stranded: Stranded,
    pub(crate) recent: Recent,
    pub(crate) emergency: Emergency,
    #[cfg(feature = "debug-heap")]
    pub(crate) debugging: Debugging,
    #[cfg(feature = "guard-pages")]
    pub(crate) guards: Guards,
    /// Bytes that `realloc` copied while the caller's cache was busy: of short blocks, of long ones.
    pub(crate) copied: [AtomicU64; 2],
    pub(crate) provider: P,
    pub(crate) mode: C,
}

/// Calls of the provider, for statistics.
#[derive(Debug)]
pub(crate) struct Calls {
    pub(crate) maps: AtomicU64,
    pub(crate) failed_maps: AtomicU64,
    pub(crate) unmaps: AtomicU64,
    pub(crate) refused_unmaps: AtomicU64,
    pub(crate) reliefs: AtomicU64,
}

impl<P: fmt::Debug, C: fmt::Debug, const CPUS: usize> fmt::Debug for Heap<P, C, CPUS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heap")
            .field("provider", &self.provider)
            .field("mode", &self.mode)
            .field("held_len", &self.engine.pages.held_len())
            .finish_non_exhaustive()
    }
}

/// The most bytes that were in use lately, for who calls [`maintain`](Heap::maintain).
#[derive(Debug)]
pub(crate) struct Recent {
    /// Up to the last call; 0: nobody maintains the heap.
    used_len: AtomicUsize,
    /// Since then, as far as somebody noted it.
    since_len: AtomicUsize,
    /// The bin that is swept next.
    pub(crate) turn: AtomicUsize,
}

impl Recent {
    const fn new() -> Self {
        Self { used_len: AtomicUsize::new(0), since_len: AtomicUsize::new(0), turn: AtomicUsize::new(0) }
    }

    /// That many bytes are in use now.
    fn note(&self, used_len: usize) {
        self.since_len.fetch_max(used_len, Ordering::Relaxed);
    }

    /// Begins anew with that many bytes in use, and forgets a share of what is in use no more and was not since the last call.
    pub(crate) fn decay(&self, used_len: usize) {
        let since = self.since_len.swap(used_len, Ordering::Relaxed).max(used_len);
        let before = self.used_len.load(Ordering::Relaxed);
        let kept = before - before.saturating_sub(since).div_ceil(DECAY_SHARE);
        self.used_len.store(kept.max(since).max(1), Ordering::Relaxed);
    }

    /// Free bytes that were in use lately; 0 if nobody maintains the heap.
    pub(crate) fn spare_len(&self, used_len: usize) -> usize {
        match self.used_len.load(Ordering::Relaxed) {
            0 => 0,
            before => before.max(self.since_len.load(Ordering::Relaxed)).saturating_sub(used_len),
        }
    }
}

/// A cache that this context holds.
pub(crate) struct Entered<'a, C: CpuMode> {
    pub(crate) cache: &'a CpuCache,
    pub(crate) index: usize,
    _guard: C::Guard,
}

impl<C: CpuMode> Entered<'_, C> {
    pub(crate) fn caller(&self) -> Caller {
        Caller { index: self.index, nested: false }
    }
}

impl<C: CpuMode> Drop for Entered<'_, C> {
    #[inline]
    fn drop(&mut self) {
        if C::PINNED { self.cache.unmark() } else { self.cache.unlock() }
    }
}

/// Somebody was with the provider, and stayed there as long as this caller may wait.
struct Closed;

/// How hard an attempt looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    Quick,
    /// Also where the quick search may overlook a run.
    Thorough,
}

/// Who searches for memory, and what would do.
pub(crate) trait Seek {
    type Found;

    /// What a run for it must be.
    fn want(&self) -> Want;

    /// Looks once among what the heap has.
    fn attempt(&self, depth: Depth) -> Option<Self::Found>;

    /// Whether the last attempt had not looked everywhere that a further one would.
    fn has_more(&self) -> bool {
        false
    }

    /// Makes a run, wanted like this and owned, what is searched for.
    fn adopt(&self, run: Run<'_>, caller: Caller) -> Option<Self::Found>;
}

/// A search for a small block.
struct Small<'a, P, C, const CPUS: usize> {
    heap: &'a Heap<P, C, CPUS>,
    class: SizeClass,
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Seek for Small<'_, P, C, CPUS> {
    type Found = Block;

    fn want(&self) -> Want {
        self.heap.engine.slab_want(self.class)
    }

    fn attempt(&self, _: Depth) -> Option<Block> {
        let engine = &self.heap.engine;
        match self.heap.enter() {
            Ok(entered) => {
                let mut surplus = Surplus::default();
                let refill = || engine.refill(entered.cache, self.class, entered.caller(), &mut surplus).ok();
                let block = entered.cache.pop(self.class).or_else(refill);
                drop(entered);
                self.heap.send_home(surplus.into_lists());
                block
            }
            Err(caller) => engine.obtain_one(self.class, caller).ok(),
        }
    }

    fn has_more(&self) -> bool {
        self.heap.engine.is_joining(self.class)
    }

    fn adopt(&self, run: Run<'_>, caller: Caller) -> Option<Block> {
        self.heap.engine.adopt(&run, self.class, caller)
    }
}

impl<P, C, const CPUS: usize> Heap<P, C, CPUS> {
    /// A heap without memory: `alloc` fails until the provider gives some. Usable in a `static`.
    pub const fn new(provider: P, mode: C) -> Self {
        Self {
            engine: Engine::new(),
            gate: Gate::new(),
            calls: Calls::new(),
            moving: InHand::new(),
            stranded: Stranded::new(),
            recent: Recent::new(),
            emergency: Emergency::new(),
            #[cfg(feature = "debug-heap")]
            debugging: Debugging::new(),
            #[cfg(feature = "guard-pages")]
            guards: Guards::new(),
            copied: [const { AtomicU64::new(0) }; 2],
            provider,
            mode,
        }
    }

    /// The provider.
    pub const fn provider(&self) -> &P {
        &self.provider
    }
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    // Fast paths.

    /// Takes this CPU's cache. `Err`: it is busy, or the CPU has none.
    #[inline]
    pub(crate) fn enter(&self) -> Result<Entered<'_, C>, Caller> {
        let (guard, index) = self.mode.enter();
        let index = if C::PINNED || index < CPUS { index } else { index % CPUS };
        let Some(cache) = self.engine.cache(index) else {
            return Err(Caller { index, nested: false });
        };
        let taken = if C::PINNED { cache.try_mark() } else { cache.try_lock() };
        if !taken {
            return Err(Caller { index, nested: true });
        }
        Ok(Entered { cache, index, _guard: guard })
    }

    /// A block of the class that serves the Layout.
    #[cfg(feature = "guard-pages")]
    #[inline]
    pub(crate) fn alloc_small(&self, class: SizeClass, layout: Layout) -> Option<NonNull<u8>> {
        match self.enter() {
            Ok(entered) if entered.cache.countdown.is_due() => self.alloc_sampled(entered, class, layout),
            Ok(entered) => match entered.cache.pop(class) {
                Some(block) => Some(block.into_start()),
                None => self.alloc_refill(entered, class),
            },
            Err(caller) => self.alloc_elsewhere(class, caller),
        }
    }

    /// A block of the class that serves the Layout.
    #[cfg(not(feature = "guard-pages"))]
    #[inline]
    pub(crate) fn alloc_small(&self, class: SizeClass, _: Layout) -> Option<NonNull<u8>> {
        self.alloc_unsampled(class)
    }

    #[inline]
    pub(crate) fn alloc_unsampled(&self, class: SizeClass) -> Option<NonNull<u8>> {
        match self.enter() {
            Ok(entered) => match entered.cache.pop(class) {
                Some(block) => Some(block.into_start()),
                None => self.alloc_refill(entered, class),
            },
            Err(caller) => self.alloc_elsewhere(class, caller),
        }
    }

    #[inline]
    pub(crate) fn free_small(&self, block: Block, class: SizeClass) {
        match self.enter() {
            Ok(entered) => self.free_entered(entered, block, class),
            Err(caller) => self.free_elsewhere(class, block, caller),
        }
    }

    /// [`free_small`](Self::free_small) into a cache that is held.
    #[inline(always)]
    pub(crate) fn free_entered(&self, entered: Entered<'_, C>, block: Block, class: SizeClass) {
        if !self.is_plain(&entered, &block, class) {
            return self.free_other(entered, class, block);
        }
        self.put(entered, class, block);
    }

    /// Puts a block into a cache that is held.
    #[inline(always)]
    fn put(&self, entered: Entered<'_, C>, class: SizeClass, block: Block) {
        if let Err(block) = entered.cache.push(class, block) {
            self.free_spill(entered, class, block);
        }
    }

    /// The descriptor of the granule that a live block starts in, remembered by the own cache if that is free.
    #[inline]
    pub(crate) fn desc_at(&self, start: NonNull<u8>) -> Option<&PageDesc> {
        match self.enter() {
            Ok(entered) => self.engine.pages.desc(&entered.cache.chunk_hints, start),
            Err(_) => self.engine.pages.lookup(start)?.head_of(start),
        }
    }

    /// Whether a block may be put into this cache without further questions: it is not tiny, or its slab is known to be at home on this CPU. If it
    /// is not, keeping the block would make two CPUs deal out neighbours in one cache line for ever.
    #[cfg(not(feature = "hardened"))]
    #[inline]
    fn is_plain(&self, entered: &Entered<'_, C>, block: &Block, class: SizeClass) -> bool {
        class.index() >= TINY_COUNT || entered.cache.home_pages.has(block.start())
    }

    /// Whether a block may be put into this cache without further questions.
    #[cfg(feature = "hardened")]
    #[inline]
    fn is_plain(&self, entered: &Entered<'_, C>, block: &Block, class: SizeClass) -> bool {
        // SAFETY: the token says that the memory is the caller's, or that the contract of `free` was broken.
        unsafe { self.engine.is_plain(entered.cache, entered.index, block.start(), class) }
    }

    /// Does bounded work that takes locks with this CPU's cache held, so that a context that interrupts it knows that it is nested and
    /// does not wait for them. The caller of the work is this context, nested if the cache is busy.
    pub(crate) fn held<R>(&self, work: impl FnOnce(Caller) -> R) -> R {
        let entered = self.enter();
        let caller = entered.as_ref().map_or_else(|caller| *caller, Entered::caller);
        work(caller)
    }

    /// [`held`](Self::held), for work that only asks whether it may wait.
    pub(crate) fn step(&self, work: &mut dyn FnMut(bool)) {
        let wait = self.mode.may_wait();
        self.held(|caller| work(wait && !(C::PINNED && caller.nested)));
    }

    // Slow paths: own cache empty or full.

    #[cold]
    #[inline(never)]
    fn alloc_refill(&self, entered: Entered<'_, C>, class: SizeClass) -> Option<NonNull<u8>> {
        let caller = entered.caller();
        let mut surplus = Surplus::default();
        let block = self.engine.refill(entered.cache, class, caller, &mut surplus);
        let asked = entered.cache.is_drain_asked();
        drop(entered);
        self.send_home(surplus.into_lists());
        if asked {
            self.drain_current();
        }
        match block {
            Ok(block) => Some(block.into_start()),
            Err(refused) => self.search_small(class, refused, caller),
        }
    }

    #[cold]
    #[inline(never)]
    fn free_spill(&self, entered: Entered<'_, C>, class: SizeClass, block: Block) {
        #[cfg(not(feature = "hardened"))]
        entered.cache.home_pages.forget(block.start());
        let caller = entered.caller();
        let mut surplus = Surplus::default();
        self.engine.spill(entered.cache, class, block, caller, &mut surplus);
        let asked = entered.cache.is_drain_asked();
        drop(entered);
        self.send_home(surplus.into_lists());
        if asked {
            self.drain_current();
        }
        self.return_surplus(caller);
    }

    /// Sends blocks home that are in no cache any more, a batch a hold, so that nobody waits long: with the cache of whichever CPU this is by then, or
    /// as a nested caller if that is busy.
    pub(crate) fn send_home(&self, lists: impl IntoIterator<Item = (SizeClass, List)>) {
        for (class, mut list) in lists {
            while list.count() > 0 {
                match self.enter() {
                    Ok(entered) => self.engine.flush(class, &mut list, Some(entered.cache), entered.caller()),
                    Err(caller) => self.engine.flush(class, &mut list, None, caller),
                }
            }
        }
    }

    /// A tiny block of another CPU's slab, or in a page that is not known.
    #[cfg(not(feature = "hardened"))]
    #[inline(never)]
    fn free_other(&self, entered: Entered<'_, C>, class: SizeClass, block: Block) {
        let desc = self.engine.pages.desc(&entered.cache.chunk_hints, block.start());
        if desc.is_none_or(|desc| home_at(desc) != entered.index) {
            return self.free_away(entered, class, block);
        }
        entered.cache.home_pages.note(block.start());
        self.put(entered, class, block);
    }

    /// A block that a glance does not tell: of another chunk than the last one, of another CPU's slab, or none that may be freed.
    #[cfg(feature = "hardened")]
    #[cold]
    #[inline(never)]
    fn free_other(&self, entered: Entered<'_, C>, class: SizeClass, block: Block) {
        let fits = |layout| SizeClass::of(layout) == Some(class);
        #[cfg(feature = "guard-pages")]
        if let Some(place) = self.guards.take(block.start()) {
            let caller = entered.caller();
            drop(entered);
            return self.free_place(place, block.into_start(), caller, fits);
        }
        match self.engine.inspect(Some(entered.cache), block.start(), class) {
            Ok(slab) => {
                let is_near = class.index() >= TINY_COUNT || slab.home() == entered.index;
                if !is_near || slab.class() != class {
                    return self.free_away(entered, class, block);
                }
                self.put(entered, class, block);
            }
            Err(misuse) => {
                let caller = entered.caller();
                drop(entered);
                self.refuse(misuse, block.into_start(), caller, fits);
            }
        }
    }

    /// What the inspection refused: nothing is freed, unless it is a block that the heap's descriptors do not know, of a Layout that fits.
    #[cfg(feature = "hardened")]
    pub(crate) fn refuse(&self, misuse: Misuse, start: NonNull<u8>, caller: Caller, fits: impl Fn(Layout) -> bool) {
        #[cfg(feature = "guard-pages")]
        if misuse == Misuse::ForeignPointer && (self.free_guarded(start, caller, fits) || self.refuse_guarded(start)) {
            return;
        }
        #[cfg(not(feature = "guard-pages"))]
        let _ = (caller, fits);
        self.engine.report(misuse, start);
    }

    /// A block that is not for the own list: home at once.
    #[inline(never)]
    fn free_away(&self, entered: Entered<'_, C>, class: SizeClass, block: Block) {
        let caller = entered.caller();
        self.engine.give_back(class, block, Some(entered.cache), caller);
        drop(entered);
        self.return_surplus(caller);
    }

    // Slow paths: own cache busy.

    #[cold]
    #[inline(never)]
    fn alloc_elsewhere(&self, class: SizeClass, caller: Caller) -> Option<NonNull<u8>> {
        if self.emergency.is_on() {
            let block = self.emergency.take(class.block_len(), class.block_align()).map(NonNull::cast);
            return block.or_else(|| self.engine.obtain_one(class, caller).ok().map(Block::into_start));
        }
        self.count_nested(caller, Counts::nested_alloc);
        let mut surplus = Surplus::default();
        let lapped = self.lap(caller, |cache| {
            cache.pop(class).or_else(|| self.engine.refill(cache, class, caller, &mut surplus).ok())
        });
        self.send_home(surplus.into_lists());
        if let Some(block) = lapped.flatten() {
            return Some(block.into_start());
        }
        match self.engine.obtain_one(class, caller) {
            Ok(block) => Some(block.into_start()),
            Err(_) if C::PINNED && caller.nested => {
                let grown = self.grow_nested(&Small { heap: self, class }, caller);
                grown.or_else(|| self.engine.borrow(class)).map(Block::into_start)
            }
            Err(refused) => self.search_small(class, refused, caller),
        }
    }

    #[cold]
    #[inline(never)]
    fn free_elsewhere(&self, class: SizeClass, block: Block, caller: Caller) {
        if self.emergency.owns(block.start()) {
            return;
        }
        #[cfg(feature = "hardened")]
        match self.engine.inspect(None, block.start(), class) {
            Ok(slab) if slab.class() == class => {}
            Ok(_) => return self.engine.give_back(class, block, None, caller),
            Err(misuse) => {
                return self.refuse(misuse, block.into_start(), caller, |layout| SizeClass::of(layout) == Some(class));
            }
        }
        self.count_nested(caller, Counts::nested_free);
        let mut block = Some(block);
        self.lap(caller, |cache| {
            let kept = block.take().and_then(|block| cache.push(class, block).err());
            block = kept;
        });
        if let Some(block) = block {
            self.engine.give_back(class, block, None, caller);
        }
    }

    /// Counts an operation that found its CPU's cache busy.
    fn count_nested(&self, caller: Caller, count: fn(&Counts)) {
        if let Some(counts) = self.engine.counts(caller.index).filter(|_| caller.nested) {
            count(counts);
        }
    }

    /// One bounded lap over the other caches in use, from where the last lap from here succeeded, by try-lock. Pinned caches are nobody
    /// else's. Source of the idea: the rotation of Zig's `SmpAllocator`, which goes on until it succeeds.
    fn lap<T>(&self, caller: Caller, work: impl FnOnce(&CpuCache) -> T) -> Option<T> {
        if C::PINNED {
            return None;
        }
        let own = self.engine.cache(caller.index)?;
        self.engine.counts(caller.index).inspect(|counts| counts.lap());
        let start = own.lap_start.load(Ordering::Relaxed);
        for step in 0..CPUS {
            let index = start.wrapping_add(step) % CPUS;
            let Some(cache) = self.engine.cache(index) else {
                continue;
            };
            if index == caller.index || !cache.try_lock() {
                continue;
            }
            if step != 0 {
                own.lap_start.store(index, Ordering::Relaxed);
            }
            let result = work(cache);
            cache.unlock();
            return Some(result);
        }
        None
    }

    // Slow paths: nothing found, nothing held.

    #[cold]
    fn search_small(&self, class: SizeClass, refused: Refused, caller: Caller) -> Option<NonNull<u8>> {
        let found = self.search(&Small { heap: self, class }, refused, caller);
        let joined = || (0..JOIN_TRIES).find_map(|_| self.held(|caller| self.engine.join_one(class, caller)));
        found.or_else(joined).or_else(|| self.engine.borrow(class)).map(Block::into_start)
    }

    /// Finds memory for a request that was just refused, in the order of what it costs others: a lock that was busy, reserves, new
    /// pages, everything that is reachable, what the kernel can do. Called with nothing held.
    pub(crate) fn search<S: Seek>(&self, seek: &S, refused: Refused, caller: Caller) -> Option<S::Found> {
        let busy = refused == Refused::Busy;
        let may_wait = self.mode.may_wait();
        let tries = if busy && may_wait { BUSY_TRIES } else { 0 };
        let step: Step<'_> = &|work| self.step(work);
        let reserves = || self.engine.release_reserves(step) | self.engine.pages.drain_deferred(step);
        let at_hand = (0..tries)
            .find_map(|_| seek.attempt(Depth::Quick))
            .or_else(|| if reserves() { seek.attempt(Depth::Quick) } else { None })
            .or_else(|| (0..JOIN_TRIES).take_while(|_| seek.has_more()).find_map(|_| seek.attempt(Depth::Quick)));
        if at_hand.is_some() {
            return at_hand;
        }
        match self.grow(seek, busy, caller) {
            Ok(Some(found)) => Some(found),
            Ok(None) => self
                .scrape(seek, caller)
                .or_else(|| self.relieve(seek, caller))
                .or_else(|| if may_wait { self.look_again(seek, caller) } else { None }),
            // Whoever is with the provider may be waiting for us, or may be us: then there is what there is.
            Err(Closed) => self.gather(seek),
        }
    }

    /// The last look before giving up, and more of them as long as somebody is seen in the way, or memory on its way.
    fn look_again<S: Seek>(&self, seek: &S, caller: Caller) -> Option<S::Found> {
        let is_busy = || {
            self.moving.is_any() || self.engine.walks.is_any() || self.provider.is_busy() || self.engine.pages.is_busy()
        };
        let mut quiet = 0;
        for _ in 0..LAST_TRIES {
            let busy = is_busy();
            // Give whoever it is a moment.
            let _ = (0..SPIN_LIMIT).take_while(|_| is_busy()).map(|_| spin_loop()).count();
            let grown = self.grow(seek, true, caller);
            let closed = grown.is_err();
            let found = grown.ok().flatten().or_else(|| seek.attempt(Depth::Thorough));
            quiet = if busy || is_busy() { 0 } else { quiet + 1 };
            if found.is_some() || closed || quiet == QUIET_LOOKS {
                return found;
            }
        }
        None
    }

    /// Empties what can be reached, and looks there.
    fn gather<S: Seek>(&self, seek: &S) -> Option<S::Found> {
        self.drain_reachable();
        self.engine.release_whole(&|work| self.step(work));
        seek.attempt(Depth::Thorough)
    }

    /// [`gather`](Self::gather); and chunks that are then free as a whole may be had again in another length.
    fn scrape<S: Seek>(&self, seek: &S, caller: Caller) -> Option<S::Found> {
        let found = self.gather(seek);
        if found.is_none() && self.return_chunks(0, caller) > 0 {
            return self.grow(seek, false, caller).ok().flatten();
        }
        found
    }

    /// The pressure hook, unlocked, and a search after each time that it helped.
    fn relieve<S: Seek>(&self, seek: &S, caller: Caller) -> Option<S::Found> {
        let want = seek.want();
        let need = chunk_len_for(want.least_len, want.align, P::PAGE_LEN)?;
        self.relieved(need, || seek.attempt(Depth::Thorough).or_else(|| self.grow(seek, false, caller).ok().flatten()))
    }

    /// Asks the kernel to relieve the pressure until `look` finds something, the kernel says no, or it was asked often.
    pub(crate) fn relieved<T>(&self, need: PageRun, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        (0..RELIEF_TRIES).map_while(|_| self.calls.relieve(&self.provider, need).then_some(())).find_map(|()| look())
    }

    /// What a nested caller may ask of the provider: pages, if that is safe while the provider was interrupted.
    pub(crate) fn grow_nested<S: Seek>(&self, seek: &S, caller: Caller) -> Option<S::Found> {
        if P::REENTRANT { self.grow(seek, true, caller).ok().flatten() } else { None }
    }

    /// Gets a chunk from the provider that has what is wanted, longer if there is more to be had; or, if `tight`, as short as will do.
    fn grow<S: Seek>(&self, seek: &S, tight: bool, caller: Caller) -> Result<Option<S::Found>, Closed> {
        const {
            assert!(
                P::PAGE_LEN.is_power_of_two() && P::PAGE_LEN >= 1024 && P::PAGE_LEN <= 65536,
                "see PageProvider::PAGE_LEN"
            )
        };
        let want = seek.want();
        let Some(need) = chunk_len_for(want.least_len, want.align, P::PAGE_LEN) else { return Ok(None) };
        let wish = if tight { 0 } else { wished_len(self.engine.pages.held_len(), want.use_) };
        let wait = !(C::PINNED && caller.nested) && self.mode.may_wait();
        self.offer_stranded(caller);
        if !tight && wait && self.moving.is_any() {
            // Somebody is fetching a chunk, which mostly is enough for both: else all CPUs that run out at once bring one each.
            let _ = (0..SPIN_LIMIT).take_while(|_| self.moving.is_any()).map(|_| spin_loop()).count();
            let found = seek.attempt(Depth::Quick);
            if found.is_some() {
                return Ok(found);
            }
        }
        // Counted in before there is anything to carry: a virtual CPU may be stopped right behind the provider's answer. Who takes no more than it needs has
        // nothing for others; counted in as well, those who look again would keep each other waiting.
        let mut moving = (!tight).then(|| self.moving.begin());
        for _ in 0..GROW_TRIES {
            match self.with_provider(caller, |provider| map_chunk(provider, &self.calls, need, wish, wait)) {
                Ok(Some((start, run))) => {
                    self.engine.set_ample(if tight { self.engine.is_ample() } else { run.len() >= wish });
                    self.trace_run(Kind::Map, start, run);
                    self.recent.note(self.used_len().saturating_add(run.len()));
                    moving.get_or_insert_with(|| self.moving.begin());
                    let run = self.add_chunk(start, run, want, caller);
                    return Ok(run.ok().and_then(|run| match run {
                        Some(run) => seek.adopt(run, Caller { nested: !wait, ..caller }),
                        None => seek.attempt(Depth::Quick),
                    }));
                }
                Ok(None) => {
                    self.engine.set_ample(false);
                    return Ok(None);
                }
                Err(Entry::Closed) => return Err(Closed),
                Err(_) => {}
            }
            // Somebody else was with the provider and may have got enough for both.
            let found = seek.attempt(Depth::Quick);
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Offers the provider again what it did not take.
    pub(crate) fn offer_stranded(&self, caller: Caller) {
        // SAFETY: `take_all` makes each run ours, and it came from `map` as it is.
        self.stranded.take_all(|start, run| unsafe { self.give_back(start, run, caller) });
    }

    /// Gives a run that the heap does not use to the provider, now or later.
    ///
    /// # Safety
    /// The run came from `map` as it is, and is the caller's alone.
    pub(crate) unsafe fn give_back(&self, start: NonNull<u8>, run: PageRun, caller: Caller) {
        // SAFETY: the contract is the same.
        if !unsafe { self.unmap(start, run, caller) } {
            // SAFETY: the provider did not take it, so it still is the caller's.
            unsafe { self.strand(start, run) };
        }
    }

    /// Keeps a run that the heap does not use, to offer it to the provider later.
    ///
    /// # Safety
    /// As for [`give_back`](Self::give_back).
    pub(crate) unsafe fn strand(&self, start: NonNull<u8>, run: PageRun) {
        // SAFETY: the contract is the same.
        unsafe { self.stranded.push(start, run) };
    }

    // The provider.

    /// Runs `call` with the provider to itself, unless the provider needs no such thing. `None`: somebody else was inside.
    pub(crate) fn with_provider<T>(&self, caller: Caller, call: impl FnOnce(&P) -> T) -> Result<T, Entry<'_>> {
        self.with_provider_within(caller, self.mode.may_wait(), call)
    }

    fn with_provider_within<T>(&self, caller: Caller, wait: bool, call: impl FnOnce(&P) -> T) -> Result<T, Entry<'_>> {
        if P::REENTRANT {
            return Ok(call(&self.provider));
        }
        // Only a pin tells for certain that the holder is this very CPU.
        let certain = C::PINNED && caller.index < CPUS;
        match self.gate.enter(caller.index, certain, wait) {
            Entry::Inside(inside) => {
                let result = call(&self.provider);
                drop(inside);
                Ok(result)
            }
            entry => Err(entry),
        }
    }

    /// [`with_provider`](Self::with_provider), again as long as others are inside and leave. `None`: it was not this caller's turn within the bound.
    pub(crate) fn ask_provider<T>(&self, caller: Caller, call: impl Fn(&P) -> T) -> Option<T> {
        for _ in 0..ASK_TRIES {
            match self.with_provider(caller, &call) {
                Ok(answer) => return Some(answer),
                Err(Entry::Waited) => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// A run from the provider.
    pub(crate) fn map(&self, run: PageRun, caller: Caller) -> Result<Option<NonNull<u8>>, Entry<'_>> {
        let wait = !(C::PINNED && caller.nested) && self.mode.may_wait();
        let start = self.with_provider(caller, |provider| self.calls.map(provider, run, wait))?;
        start.inspect(|start| self.trace_run(Kind::Map, *start, run));
        Ok(start)
    }

    /// A run from the provider if nobody is with it: for who can do without.
    #[cfg(feature = "guard-pages")]
    pub(crate) fn map_at_once(&self, run: PageRun, caller: Caller) -> Option<NonNull<u8>> {
        let map = |provider: &P| self.calls.map(provider, run, false);
        self.with_provider_within(caller, false, map).ok()?.inspect(|start| self.trace_run(Kind::Map, *start, run))
    }

    fn trace_run(&self, kind: Kind, start: NonNull<u8>, run: PageRun) {
        let event = || Event { kind, addr: start.as_ptr().addr(), len: run.len(), align: run.align() };
        self.engine.trace.record(event);
    }

    /// A run back to the provider. False: it is still the heap's.
    ///
    /// # Safety
    /// As for [`PageProvider::unmap`].
    pub(crate) unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun, caller: Caller) -> bool {
        // SAFETY: the contract is the same.
        let taken = self.ask_provider(caller, |provider| unsafe { provider.unmap(start, run) }) == Some(true);
        if taken {
            self.trace_run(Kind::Unmap, start, run);
        }
        Calls::count(if taken { &self.calls.unmaps } else { &self.calls.refused_unmaps });
        taken
    }

    /// Makes a run from the provider a chunk, and cuts off what is wanted. If it cannot be noted, it goes back.
    fn add_chunk(
        &self,
        start: NonNull<u8>,
        run: PageRun,
        want: Want,
        caller: Caller,
    ) -> Result<Option<Run<'_>>, AddError> {
        let mut result = Err(AddError::Busy);
        let step: Step<'_> = &|work| self.step(work);
        for _ in 0..GROW_TRIES {
            // SAFETY: `map` just gave us the whole run, and nobody else knows it.
            result = unsafe { self.engine.pages.add_chunk(start, run, want, caller.index, P::ZEROED, step) };
            match result {
                Err(AddError::Full) if self.add_table(caller) => {}
                Err(AddError::Busy) => {}
                _ => break,
            }
        }
        if result.is_err() {
            // SAFETY: the run came from `map` and was not used.
            unsafe { self.give_back(start, run, caller) };
        }
        result
    }

    /// Gets memory for a further table of chunks.
    pub(crate) fn add_table(&self, caller: Caller) -> bool {
        let Some(run) = PageRun::new(self.engine.pages.next_table_len(), P::PAGE_LEN, P::PAGE_LEN) else {
            return false;
        };
        let Ok(Some(start)) = self.map(run, caller) else {
            return false;
        };
        // SAFETY: `map` just gave us the whole run, and nobody else knows it.
        if unsafe { self.engine.pages.add_table(start, run) }.is_ok() {
            return true;
        }
        // SAFETY: the run came from `map` and was not used.
        unsafe { self.give_back(start, run, caller) };
        false
    }

    /// Gives free chunks back while more than a share of the heap is free. Called after frees, with nothing held.
    #[inline]
    pub(crate) fn return_surplus(&self, caller: Caller) {
        if !caller.nested && self.engine.pages.has_surplus() {
            self.return_some(caller);
        }
    }

    #[cold]
    #[inline(never)]
    fn return_some(&self, caller: Caller) {
        if self.mode.may_wait() {
            let used_len = self.used_len();
            self.recent.note(used_len);
            let keep = (self.engine.pages.held_len() / KEPT_SHARE).max(self.recent.spare_len(used_len));
            self.return_chunks(keep, caller);
        }
    }

    /// Bytes held that are not free pages.
    pub(crate) fn used_len(&self) -> usize {
        self.engine.pages.held_len().saturating_sub(self.engine.pages.free_len())
    }

    /// Gives wholly free chunks back to the provider as long as `keep` bytes of free pages stay; gives the bytes that went back.
    #[inline(never)]
    pub(crate) fn return_chunks(&self, keep: usize, caller: Caller) -> usize {
        let mut len = 0;
        let _moving = self.moving.begin();
        while let Some(empty) = self.held(|_| self.engine.pages.take_empty(keep)) {
            let (start, run) = (empty.start, empty.run);
            // SAFETY: the run came from `map` as it is, and no block of it is out (`EmptyChunk`).
            if !unsafe { self.unmap(start, run, caller) } {
                // SAFETY: the provider did not take it, so it is as it was.
                unsafe { self.engine.pages.put_back(empty) };
                break;
            }
            self.engine.pages.chunk_gone(empty);
            len += run.len();
        }
        len
    }

    // Emptying caches.

    /// Empties every cache that this context may take: all by try-lock (hint), its own (pinned).
    fn drain_reachable(&self) {
        if C::PINNED {
            self.drain_current();
        } else {
            for index in 0..CPUS {
                self.drain_index(index);
            }
        }
    }

    /// Empties the cache with that index, class by class. Only the lists' heads are taken while it is held.
    pub(crate) fn drain_index(&self, index: usize) {
        self.held(|_| self.engine.pages.release_kept_of(index));
        // With hints a cache of a CPU that has gone may still get blocks from others.
        let Some(cache) = self.engine.cache(index).filter(|cache| cache.is_used() || cache.is_gone()) else {
            return;
        };
        for class in SizeClass::all() {
            if cache.count(class) > 0 && cache.try_lock() {
                let lists = cache.lower(class, 0);
                cache.unlock();
                self.send_home(lists.map(|list| (class, list)));
            }
        }
    }

    /// Empties the cache of the CPU that runs. For the idle loop, or for the handler of an interrupt that asks a CPU to do so; a nested caller
    /// changes nothing.
    ///
    /// Takes the cache once for each class and each batch of blocks, so that nobody waits long. Callable from any context.
    pub fn drain_current(&self) {
        for class in SizeClass::all() {
            let Ok(entered) = self.enter() else { return };
            let lists = entered.cache.lower(class, 0);
            entered.cache.end_drain();
            drop(entered);
            self.send_home(lists.map(|list| (class, list)));
        }
        self.held(|caller| self.engine.pages.release_kept_of(caller.index));
    }

    /// Empties all caches: at once with CPU hints; with pins, this CPU's at once and the others' at their next slow path, or when
    /// they call [`drain_current`](Self::drain_current).
    ///
    /// Callable from any context; takes as long as the caches are many.
    pub fn drain(&self) {
        #[cfg(feature = "debug-heap")]
        self.empty_quarantine();
        if C::PINNED {
            for cache in self.engine.caches().iter().filter(|cache| cache.is_used()) {
                cache.ask_drain();
            }
        }
        self.drain_reachable();
    }

    /// Gives what is free back to the provider, but for `keep` bytes of free pages; returns the bytes that went back.
    ///
    /// Drains like [`drain`](Self::drain) first. Chunks go back whole, so a chunk with a single block in use stays. With nothing locked while the provider
    /// runs. Callable from any context that may call the provider; not meant for interrupt handlers, since it takes as long as the heap is large.
    pub fn trim(&self, keep: usize) -> usize {
        self.drain();
        self.engine.release_whole(&|work| self.step(work));
        let caller = self.caller();
        self.offer_stranded(caller);
        let mut len = self.return_chunks(keep, caller);
        // The provider may have used the heap meanwhile.
        while self.engine.pages.drain_deferred(&|work| self.step(work)) {
            match self.return_chunks(keep, caller) {
                0 => break,
                more => len += more,
            }
        }
        len + self.return_tables(caller)
    }

    fn return_tables(&self, caller: Caller) -> usize {
        let mut len = 0;
        while let Some((start, run)) = self.engine.pages.take_empty_table() {
            // SAFETY: the table's memory came from `map` as it is, and no reader is in it any more.
            if !unsafe { self.unmap(start, run, caller) } {
                // SAFETY: the run is still ours alone.
                if unsafe { self.engine.pages.add_table(start, run) }.is_err() {
                    // SAFETY: as before; it was not taken in.
                    unsafe { self.stranded.push(start, run) };
                }
                break;
            }
            len += run.len();
        }
        len
    }

    /// Whether a cache is held at this moment: asked after each instruction by what measures how long it is.
    #[doc(hidden)]
    pub fn is_any_cache_held(&self) -> bool {
        self.engine.caches().iter().any(CpuCache::is_busy)
    }

    /// Who runs.
    pub(crate) fn caller(&self) -> Caller {
        self.held(|caller| caller)
    }
}

impl Calls {
    const fn new() -> Self {
        Self {
            maps: AtomicU64::new(0),
            failed_maps: AtomicU64::new(0),
            unmaps: AtomicU64::new(0),
            refused_unmaps: AtomicU64::new(0),
            reliefs: AtomicU64::new(0),
        }
    }

    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn relieve(&self, provider: &impl PageProvider, need: PageRun) -> bool {
        Self::count(&self.reliefs);
        provider.relieve(need)
    }

    fn map(&self, provider: &impl PageProvider, run: PageRun, wait: bool) -> Option<NonNull<u8>> {
        let start = if wait { provider.map(run) } else { provider.try_map(run) };
        Self::count(if start.is_some() { &self.maps } else { &self.failed_maps });
        start
    }
}

/// How long the next chunk should be: a share of the bytes held, as a power of two.
fn wished_len(held_len: usize, use_: Use) -> usize {
    let is_fine = use_ == Use::Slab && held_len <= FINE_HEAP_LEN;
    let share = (held_len / if is_fine { FINE_CHUNK_SHARE } else { CHUNK_SHARE }).clamp(MIN_CHUNK_LEN, MAX_CHUNK_LEN);
    (share + 1).next_power_of_two() / 2
}

/// Asks for a chunk of `wish` bytes, then of what the provider prefers, then for ever shorter ones down to `need`.
fn map_chunk<P: PageProvider>(
    provider: &P,
    calls: &Calls,
    need: PageRun,
    wish: usize,
    wait: bool,
) -> Option<(NonNull<u8>, PageRun)> {
    let preferred = provider.prefer(need).len();
    let longer = |len| PageRun::new(len, need.align(), P::PAGE_LEN).filter(|run| run.len() > need.len());
    let mut len = if wish == 0 { 0 } else { wish.max(preferred) };
    while let Some(run) = longer(len) {
        if let Some(start) = calls.map(provider, run, wait) {
            return Some((start, run));
        }
        let shorter = run.len().next_power_of_two() / 2;
        len = if (shorter..run.len()).contains(&preferred) { preferred } else { shorter };
    }
    calls.map(provider, need, wait).map(|start| (start, need))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::sync::{AtomicBool, AtomicUsize};
    use crate::battery::Filled;
    use crate::contract::cpu::{CpuPin, UnknownCpu};
    use crate::{Hint, Pinned};
    use core::alloc::Layout;
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::vec::Vec;

    /// Every caller is on CPU 0 and stays there.
    #[derive(Debug)]
    struct OneCpu;

    // SAFETY: each heap with this pin is used by one thread.
    unsafe impl CpuPin for OneCpu {
        type Guard = ();
        fn pin(&self) {}
        fn index(&self, (): &()) -> usize {
            0
        }
    }

    /// The host's memory with books, as a provider that does what a test tells it to. `MOVES`: it can move runs, and its pages come zeroed.
    #[derive(Debug, Default)]
    struct Host<const MOVES: bool> {
        /// By address: what the heap has, and what the host's allocator gave for it.
        runs: Mutex<BTreeMap<usize, (PageRun, Layout)>>,
        held_len: AtomicUsize,
        calls: AtomicUsize,
        /// Most bytes out at once; 0: any number.
        limit_len: AtomicUsize,
        /// Shorter runs are refused.
        least_len: AtomicUsize,
        /// Takes nothing back, moves nothing.
        stubborn: AtomicBool,
        /// What `relieve` adds to the limit.
        relief_len: AtomicUsize,
    }

    impl<const MOVES: bool> Host<MOVES> {
        fn calls(&self) -> usize {
            self.calls.load(Ordering::Relaxed)
        }
        fn held_len(&self) -> usize {
            self.held_len.load(Ordering::Relaxed)
        }
        fn is_stubborn(&self) -> bool {
            self.stubborn.load(Ordering::Relaxed)
        }
        fn fits(&self, more: usize) -> bool {
            let limit = self.limit_len.load(Ordering::Relaxed);
            limit == 0 || self.held_len() + more <= limit
        }
        fn give(&self, run: PageRun) -> Option<NonNull<u8>> {
            let layout = run.layout();
            let alloc = if MOVES { std::alloc::alloc_zeroed } else { std::alloc::alloc };
            // SAFETY: a run's length is not 0.
            let start = NonNull::new(unsafe { alloc(layout) })?;
            self.runs.lock().unwrap().insert(start.addr().get(), (run, layout));
            self.held_len.fetch_add(run.len(), Ordering::Relaxed);
            Some(start)
        }
        fn take(&self, start: NonNull<u8>, run: PageRun) {
            let (given, layout) = self.runs.lock().unwrap().remove(&start.addr().get()).unwrap();
            assert_eq!(given, run, "a run goes back as it came");
            self.held_len.fetch_sub(run.len(), Ordering::Relaxed);
            // SAFETY: the host's allocator gave it with this layout, and the heap uses it no more.
            unsafe { std::alloc::dealloc(start.as_ptr(), layout) };
        }
    }

    // SAFETY: runs come from the host's allocator, are remembered until they are given back, and given back once.
    unsafe impl<const MOVES: bool> PageProvider for Host<MOVES> {
        const ZEROED: bool = MOVES;
        const REMAPS: bool = MOVES;

        fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let refused = run.len() < self.least_len.load(Ordering::Relaxed) || !self.fits(run.len());
            if refused { None } else { self.give(run) }
        }

        unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
            self.calls.fetch_add(1, Ordering::Relaxed);
            if self.is_stubborn() {
                return false;
            }
            self.take(start, run);
            true
        }

        unsafe fn resize(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> bool {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let mut runs = self.runs.lock().unwrap();
            let (given, _) = runs.get_mut(&start.addr().get()).unwrap();
            assert_eq!(*given, old);
            if self.is_stubborn() || new.len() > old.len() {
                return false;
            }
            *given = new;
            self.held_len.fetch_sub(old.len() - new.len(), Ordering::Relaxed);
            true
        }

        unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
            self.calls.fetch_add(1, Ordering::Relaxed);
            if self.is_stubborn() {
                return None;
            }
            let place = self.give(new)?;
            // SAFETY: both runs are at least that long, and the new one is nobody else's.
            unsafe { start.copy_to_nonoverlapping(place, old.len().min(new.len())) };
            self.take(start, old);
            Some(place)
        }

        fn relieve(&self, _: PageRun) -> bool {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let more = self.relief_len.swap(0, Ordering::Relaxed);
            self.limit_len.fetch_add(more, Ordering::Relaxed);
            more > 0
        }
    }

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 8).unwrap()
    }

    fn filled<P: PageProvider, C: CpuMode, const N: usize>(heap: &Heap<P, C, N>, size: usize) -> Option<Filled> {
        Filled::new(heap, layout(size), 0x3c).unwrap()
    }

    fn fill<P: PageProvider, C: CpuMode, const N: usize>(heap: &Heap<P, C, N>, size: usize) -> Vec<Filled> {
        core::iter::from_fn(|| filled(heap, size)).collect()
    }

    fn all_back<const MOVES: bool, C: CpuMode, const N: usize>(heap: &Heap<Host<MOVES>, C, N>) {
        heap.verify().unwrap();
        let held_len = heap.provider().held_len();
        assert_eq!(held_len, heap.stats().held_len, "what the provider gave is what the heap has");
        assert_eq!(heap.trim(0), held_len);
        heap.verify().unwrap();
        assert_eq!((heap.stats().held_len, heap.provider().held_len()), (0, 0));
    }

    #[test]
    fn under_a_pin_a_nested_context_takes_what_is_at_hand_and_never_calls_the_provider() {
        let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
        let small: Vec<_> = (0..100).map(|_| filled(&heap, 200).unwrap()).collect();
        // Chunks of their own, all of which are empty once these are free.
        let large: Vec<_> = (0..4).map(|index| filled(&heap, 1_500_000 << index).unwrap()).collect();
        filled(&heap, 300_000).unwrap().free(&heap).unwrap();
        let before = (heap.provider().calls(), heap.provider().held_len());
        let interrupted = heap.enter().unwrap();
        for size in [8, 64, 200, 3000, 9000, 50_000] {
            filled(&heap, size).unwrap().free(&heap).unwrap();
        }
        assert!(filled(&heap, 100 << 20).is_none(), "not at hand");
        small.into_iter().chain(large).for_each(|block| block.free(&heap).unwrap());
        heap.drain_current();
        heap.drain();
        drop(interrupted);
        assert_eq!((heap.provider().calls(), heap.provider().held_len()), before);
        assert!(heap.engine.pages.has_surplus(), "left to the next ordinary caller");
        filled(&heap, 40_000).unwrap().free(&heap).unwrap();
        assert!(heap.provider().held_len() < before.1);
        all_back(&heap);
    }

    #[test]
    fn work_that_takes_locks_is_done_with_the_cache_held() {
        let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
        heap.held(|caller| {
            assert!(!caller.nested);
            assert!(heap.enter().is_err_and(|caller| caller.nested), "who interrupts here knows");
            heap.held(|caller| assert!(caller.nested));
        });
        assert!(heap.enter().is_ok());
        heap.step(&mut |may_wait| {
            assert!(may_wait);
            heap.step(&mut |may_wait| assert!(!may_wait));
        });
    }

    #[test]
    fn a_nested_context_with_nothing_at_hand_is_refused_at_once() {
        let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
        let interrupted = heap.enter().unwrap();
        for size in [8, 200, 9000, 50_000] {
            assert!(filled(&heap, size).is_none());
        }
        drop(interrupted);
        assert_eq!((heap.provider().calls(), heap.stats().relief_count), (0, 0));
        filled(&heap, 200).unwrap().free(&heap).unwrap();
        all_back(&heap);
    }

    #[test]
    #[cfg_attr(miri, ignore = "times are not those of a machine")]
    fn a_nested_context_does_not_wait_for_the_lock_of_pages() {
        let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
        filled(&heap, 200).unwrap().free(&heap).unwrap();
        let shortest = |work: &dyn Fn() -> bool| {
            let time = |_| {
                let start = std::time::Instant::now();
                assert!(work(), "the lock is held");
                start.elapsed()
            };
            (0..20).map(time).min().unwrap()
        };
        let pages = &heap.engine.pages;
        let mut times = None;
        pages.for_each_run(&mut |_| {
            if times.is_none() {
                let ordinary = shortest(&|| pages.alloc(50_000, 8, Use::Large, 0, true).is_err());
                let interrupted = heap.enter().unwrap();
                times = Some((ordinary, shortest(&|| heap.alloc(layout(50_000)).is_err())));
                drop(interrupted);
            }
        });
        let (ordinary, nested) = times.unwrap();
        assert!(nested * 4 < ordinary, "a nested caller took {nested:?}, another one {ordinary:?}");
    }

    /// Hole 10: what nested frees made whole is still listed as partial, and found, by who needs pages and by who trims.
    #[test]
    fn slabs_that_nested_frees_emptied_are_found() {
        for needs_pages in [true, false] {
            let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
            let blocks: Vec<_> = (0..6000).map(|_| filled(&heap, 600).unwrap()).collect();
            let (early, late): (Vec<_>, Vec<_>) = blocks.into_iter().enumerate().partition(|(index, _)| index % 2 == 0);
            early.into_iter().for_each(|(_, block)| block.free(&heap).unwrap());
            heap.drain_current();
            heap.verify().unwrap();
            let interrupted = heap.enter().unwrap();
            late.into_iter().for_each(|(_, block)| block.free(&heap).unwrap());
            drop(interrupted);
            if needs_pages {
                let free_len = heap.stats().free_len;
                heap.provider().limit_len.store(heap.provider().held_len(), Ordering::Relaxed);
                let all = fill(&heap, 40_000);
                assert!(
                    all.len() * 45_000 > heap.provider().held_len(),
                    "{} blocks, {free_len} bytes were free",
                    all.len()
                );
                all.into_iter().for_each(|block| block.free(&heap).unwrap());
            }
            heap.trim(0);
            assert_eq!(heap.provider().held_len(), 0);
            all_back(&heap);
        }
    }

    #[test]
    fn a_huge_block_freed_in_a_nested_context_waits_for_an_ordinary_one() {
        let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Pinned(OneCpu));
        let huge = filled(&heap, 2 << 20).unwrap();
        let before = (heap.provider().calls(), heap.provider().held_len());
        let interrupted = heap.enter().unwrap();
        huge.free(&heap).unwrap();
        drop(interrupted);
        assert_eq!((heap.provider().calls(), heap.provider().held_len()), before);
        all_back(&heap);
    }

    #[test]
    #[cfg(not(any(feature = "hardened", feature = "trace")))]
    fn a_cpu_costs_less_than_8100_bytes_of_bss() {
        let [one, eight] = [size_of::<Heap<(), Hint<UnknownCpu>, 1>>(), size_of::<Heap<(), Hint<UnknownCpu>, 8>>()];
        assert!((eight - one) / 7 < 8100, "{} bytes", (eight - one) / 7);
        assert!(one < 19 << 10, "{one} bytes for one");
    }

    /// Each kind of event as often as the heap counts what it did, and each block with the Layout that it was asked for with.
    #[test]
    #[cfg(all(feature = "trace", not(feature = "debug-heap")))]
    fn a_trace_tells_what_the_heap_did() {
        use crate::base::trace::{Trace, TraceRing, TraceSlot};
        const COUNT: usize = 3000;
        const ABSURD: usize = 1 << 47;
        let rings = std::vec![TraceRing::new()].leak();
        let slots: Vec<_> = (0..1 << 15).map(|_| TraceSlot::new()).collect();
        let trace: &'static Trace = &std::vec![Trace::new(rings, slots.leak(), || 0, || 0)].leak()[0];
        let heap = Heap::<Host<false>, _, 1>::new(Host::default(), Pinned(OneCpu));
        heap.trace_to(Some(trace));
        let small: Vec<_> = (0..COUNT).map(|_| filled(&heap, 100).unwrap()).collect();
        let aligned = Layout::from_size_align(5000, 64).unwrap();
        let block = heap.alloc(aligned).unwrap().cast();
        // SAFETY: just allocated, and one of its class.
        assert!(unsafe { heap.resize(block, aligned, 5100) });
        // SAFETY: its Layout now, and nobody uses it.
        unsafe { heap.free(block, Layout::from_size_align(5100, 64).unwrap()) };
        assert!(heap.alloc(layout(ABSURD)).is_err());
        small.into_iter().for_each(|block| block.free(&heap).unwrap());
        heap.trim(0);
        heap.trace_to(None);
        filled(&heap, 100).unwrap().free(&heap).unwrap();

        let text = std::format!("{trace}");
        let events: Vec<Vec<&str>> = text
            .split("list=")
            .skip(1)
            .flat_map(|line| line.lines().next().unwrap().split(','))
            .map(|event| event.split(':').collect())
            .collect();
        let number = |text: &str| usize::from_str_radix(text, 16).unwrap();
        let of = |letter: char| events.iter().filter(move |event| event[0].starts_with(letter));
        let sum = |letter| of(letter).map(|event| number(event[2])).sum::<usize>() as u64;
        let layouts = |letter| of(letter).map(|event| (number(event[2]), number(event[3]))).collect::<Vec<_>>();
        let addrs = |letter| {
            let mut addrs: Vec<_> = of(letter).map(|event| number(event[1])).collect();
            addrs.sort_unstable();
            addrs
        };
        assert_eq!(trace.dropped(), 0);
        let stats = heap.stats();
        let mut taken = std::vec![(100, 3); COUNT];
        taken.push((5000, 6));
        assert_eq!(layouts('a'), taken);
        assert_eq!(layouts('r'), [(5100, 6)]);
        assert_eq!(layouts('x'), [(ABSURD, 3)]);
        assert_eq!(layouts('f').iter().filter(|freed| **freed == (100, 3)).count(), COUNT);
        assert_eq!(layouts('f')[0], (5100, 6));
        assert_eq!(addrs('a'), addrs('f'));
        let runs = (of('m').count() as u64, of('n').count() as u64);
        assert_eq!(runs, (stats.map_count - 1, stats.unmap_count));
        assert_eq!(addrs('m'), addrs('n'));
        // The block that a chunk was asked for comes past the cache.
        assert_eq!((sum('l') + runs.0, sum('u')), (stats.cpus[0].flushed_count, stats.cpus[0].flushed_count));
        assert!(sum('u') > COUNT as u64);
    }

    #[test]
    fn a_nested_context_gets_no_huge_block() {
        let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Pinned(OneCpu));
        let interrupted = heap.enter().unwrap();
        assert!(filled(&heap, 2 << 20).is_none());
        drop(interrupted);
        assert_eq!(heap.stats().map_count, 0);
    }

    #[test]
    fn with_hints_every_cache_may_be_busy_and_the_lap_ends() {
        let heap = Heap::<Host<false>, _, 3>::new(Host::default(), Hint(UnknownCpu));
        filled(&heap, 64).unwrap().free(&heap).unwrap();
        let held = heap.engine.caches().iter().all(CpuCache::try_lock);
        assert!(held);
        let blocks: Vec<_> = [8, 64, 200, 3000, 9000, 50_000, 3 << 20].map(|size| filled(&heap, size).unwrap()).into();
        blocks.into_iter().for_each(|block| block.free(&heap).unwrap());
        heap.engine.caches().iter().for_each(CpuCache::unlock);
        all_back(&heap);
    }

    #[test]
    #[cfg_attr(feature = "debug-heap", ignore = "asks for the class of a block without a frame")]
    fn a_lap_goes_on_where_the_last_one_succeeded_and_leaves_caches_open() {
        let heap = Heap::<Host<false>, _, 4>::new(Host::default(), Hint(UnknownCpu));
        filled(&heap, 100).unwrap().free(&heap).unwrap();
        let caches = heap.engine.caches();
        assert!(caches[0].try_lock() && caches[1].try_lock());
        let block = filled(&heap, 200).unwrap();
        let start = || caches[0].lap_start.load(Ordering::Relaxed);
        assert_eq!(start(), 2);
        caches[1].unlock();
        block.free(&heap).unwrap();
        assert_eq!(start(), 2, "the free went there too");
        assert!(caches[2].tally(SizeClass::of(layout(200)).unwrap()).get().0 > 0);
        assert!(caches[2].try_lock(), "it was left open");
        filled(&heap, 200).unwrap().free(&heap).unwrap();
        assert_eq!(start(), 3);
        caches[0].unlock();
        caches[2].unlock();
        all_back(&heap);
    }

    #[test]
    #[cfg_attr(feature = "debug-heap", ignore = "with a frame, 48 bytes need an alignment that 64 do not have")]
    fn a_longer_block_serves_when_no_other_is_left() {
        fn serve<C: CpuMode>(heap: &Heap<Host<false>, C, 2>, nested: bool) {
            heap.provider().limit_len.store(256 << 10, Ordering::Relaxed);
            let mut blocks = fill(heap, 64);
            assert!(filled(heap, 48).is_none());
            for _ in 0..3 {
                blocks.pop().unwrap().free(heap).unwrap();
            }
            heap.drain_current();
            let interrupted = nested.then(|| heap.enter().unwrap());
            let borrowed = filled(heap, 48).unwrap();
            drop(interrupted);
            heap.verify().unwrap();
            blocks.into_iter().chain([borrowed]).for_each(|block| block.free(heap).unwrap());
            all_back(heap);
        }
        serve(&Heap::new(Host::default(), Pinned(OneCpu)), true);
        serve(&Heap::new(Host::default(), Pinned(OneCpu)), false);
        serve(&Heap::new(Host::default(), Hint(UnknownCpu)), false);
    }

    #[test]
    fn free_chunks_may_be_had_again_in_another_length() {
        let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Hint(UnknownCpu));
        heap.provider().limit_len.store(8 << 20, Ordering::Relaxed);
        let blocks = fill(&heap, 1 << 20);
        blocks.into_iter().for_each(|block| block.free(&heap).unwrap());
        filled(&heap, 7 << 20).expect("the chunks went back for it").free(&heap).unwrap();
        all_back(&heap);
    }

    /// What a CPU keeps is free when its cache is emptied, although nothing else was ever in that.
    #[test]
    fn draining_frees_the_kept_run() {
        fn check<C: CpuMode>(mode: C, drain: impl Fn(&Heap<Host<false>, C, 2>)) {
            let heap = Heap::new(Host::default(), mode);
            let other = filled(&heap, 100_000).unwrap();
            let free_len = || heap.engine.pages.free_len();
            filled(&heap, 200_000).unwrap().free(&heap).unwrap();
            drain(&heap);
            let before = free_len();
            filled(&heap, 200_000).unwrap().free(&heap).unwrap();
            assert_ne!(free_len(), before, "kept");
            drain(&heap);
            assert_eq!(free_len(), before);
            other.free(&heap).unwrap();
            all_back(&heap);
        }
        check(Hint(UnknownCpu), |heap| heap.drain());
        check(Pinned(OneCpu), |heap| heap.drain_current());
    }

    #[test]
    fn what_another_cpus_cache_holds_is_had_before_null() {
        let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Hint(UnknownCpu));
        // A chunk's granules and nothing else.
        heap.provider().limit_len.store(1 << 20, Ordering::Relaxed);
        let class = SizeClass::of(layout(2048)).unwrap();
        let blocks = fill(&heap, 2048);
        // The other CPU's cache takes a few, and then everything else is in use.
        let other = &heap.engine.caches()[1];
        let caller = Caller { index: 1, nested: false };
        let mut kept = Vec::new();
        for block in blocks {
            if other.count(class) < 4 {
                block.check().unwrap();
                block.free(&heap).unwrap();
                let freed = heap.engine.obtain_one(class, Caller { index: 0, nested: true });
                let mut surplus = Surplus::default();
                let _ = freed.map(|freed| heap.engine.spill(other, class, freed, caller, &mut surplus));
                heap.send_home(surplus.into_lists());
                continue;
            }
            kept.push(block);
        }
        let _ = other.is_new();
        let count = other.count(class);
        kept.extend(fill(&heap, 2048));
        assert_eq!(other.count(class), 0, "{count} were there");
        kept.into_iter().for_each(|block| block.free(&heap).unwrap());
        all_back(&heap);
    }

    #[test]
    fn huge_blocks_that_the_provider_does_not_take_back_are_used_again() {
        let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Hint(UnknownCpu));
        let block = filled(&heap, 3 << 20).unwrap();
        heap.provider().stubborn.store(true, Ordering::Relaxed);
        block.free(&heap).unwrap();
        let held_len = heap.provider().held_len();
        assert_eq!(heap.stats().held_len, held_len);
        // Dirty now, although the provider gives zeros.
        let again: Vec<_> = (0..5).map(|_| Filled::zeroed(&heap, layout(500_000), 7).unwrap().unwrap()).collect();
        assert_eq!(heap.provider().held_len(), held_len, "no new pages");
        again.into_iter().for_each(|block| block.free(&heap).unwrap());
        heap.provider().stubborn.store(false, Ordering::Relaxed);
        all_back(&heap);
    }

    #[test]
    fn huge_blocks_shrink_move_and_stay_with_their_content() {
        let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Hint(UnknownCpu));
        let mut block = filled(&heap, 6 << 20).unwrap();
        for (stubborn, size) in
            [(false, 4 << 20), (false, 9 << 20), (true, 12 << 20), (true, 2 << 20), (false, 3 << 20)]
        {
            heap.provider().stubborn.store(stubborn, Ordering::Relaxed);
            assert!(block.realloc(&heap, size).unwrap());
            heap.verify().unwrap();
        }
        block.free(&heap).unwrap();
        all_back(&heap);
        let mut block = filled(&heap, 6 << 20).unwrap();
        assert!(block.realloc(&heap, 8 << 20).unwrap());
        block.free(&heap).unwrap();
        assert_eq!((heap.provider().held_len(), heap.stats().held_len), (0, 0), "freed means given back");
    }

    #[test]
    #[cfg_attr(feature = "debug-heap", ignore = "a frame does not fit beside a block of all that there is")]
    fn a_huge_block_is_had_after_free_chunks_went_back_or_the_kernel_helped() {
        let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Hint(UnknownCpu));
        heap.provider().limit_len.store(8 << 20, Ordering::Relaxed);
        let blocks = fill(&heap, 900_000);
        assert!(blocks.len() > 4);
        blocks.into_iter().for_each(|block| block.free(&heap).unwrap());
        let block = filled(&heap, 8 << 20).expect("after all chunks went back");
        assert!(filled(&heap, 7 << 20).is_none());
        heap.provider().relief_len.store(8 << 20, Ordering::Relaxed);
        let more = filled(&heap, 7 << 20).expect("after relief");
        [block, more].into_iter().for_each(|block| block.free(&heap).unwrap());
        all_back(&heap);
    }

    /// Promise 5, for the map of chunks: it is full, and there is no memory for another table of it.
    #[test]
    fn runs_that_cannot_be_noted_go_back_and_tables_come_and_go() {
        let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Hint(UnknownCpu));
        heap.provider().least_len.store(256 << 10, Ordering::Relaxed);
        let huge = || heap.alloc(layout(1 << 20)).ok();
        let mut blocks: Vec<_> = core::iter::from_fn(huge).take(10_000).collect();
        assert!(blocks.len() < 10_000, "no table was needed");
        // Some addresses may still find a slot.
        let mut small: Vec<_> = (0..8).filter_map(|_| filled(&heap, 64)).collect();
        blocks.extend((0..50).filter_map(|_| huge()));
        assert_eq!(heap.provider().held_len(), heap.stats().held_len, "after {} blocks", blocks.len());
        heap.provider().least_len.store(0, Ordering::Relaxed);
        small.push(filled(&heap, 64).expect("in a chunk that a new table has"));
        blocks.extend((0..500).map(|_| huge().expect("in a new table")));
        heap.verify().unwrap();
        for block in blocks {
            // SAFETY: allocated above with this Layout; nobody used it.
            unsafe { heap.free(block.cast(), layout(1 << 20)) };
        }
        small.into_iter().for_each(|block| block.free(&heap).unwrap());
        heap.provider().stubborn.store(true, Ordering::Relaxed);
        let held_len = heap.provider().held_len();
        assert!(held_len > 0 && heap.trim(0) == 0);
        assert_eq!((heap.provider().held_len(), heap.stats().held_len), (held_len, held_len));
        heap.provider().stubborn.store(false, Ordering::Relaxed);
        all_back(&heap);
    }

    /// Chunks need more slots than huge blocks, so that some that become chunks find none.
    #[test]
    fn huge_blocks_that_neither_the_provider_nor_the_map_takes_go_back_later() {
        let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Hint(UnknownCpu));
        heap.provider().least_len.store(256 << 10, Ordering::Relaxed);
        let blocks: Vec<_> = core::iter::from_fn(|| heap.alloc(layout(1 << 20)).ok()).take(10_000).collect();
        assert!(blocks.len() < 10_000, "no table was needed");
        heap.provider().stubborn.store(true, Ordering::Relaxed);
        for block in blocks {
            // SAFETY: allocated above with this Layout; nobody used it.
            unsafe { heap.free(block.cast(), layout(1 << 20)) };
        }
        let stats = heap.stats();
        assert!(stats.held_len < heap.provider().held_len(), "every run found a slot, so nothing is shown");
        heap.verify().unwrap();
        heap.provider().stubborn.store(false, Ordering::Relaxed);
        heap.trim(0);
        assert_eq!((heap.stats().held_len, heap.provider().held_len()), (0, 0));
        all_back(&heap);
    }

    /// A provider that looks whether its caller holds anything of [`PROBED`], and comes back into it.
    struct Probe {
        host: Host<false>,
        depth: AtomicUsize,
        deepest: AtomicUsize,
        held: AtomicBool,
    }

    static PROBED: Heap<Probe, Pinned<OneCpu>, 1> = Heap::new(
        Probe {
            host: Host {
                runs: Mutex::new(BTreeMap::new()),
                held_len: AtomicUsize::new(0),
                calls: AtomicUsize::new(0),
                limit_len: AtomicUsize::new(0),
                least_len: AtomicUsize::new(0),
                stubborn: AtomicBool::new(false),
                relief_len: AtomicUsize::new(0),
            },
            depth: AtomicUsize::new(0),
            deepest: AtomicUsize::new(0),
            held: AtomicBool::new(false),
        },
        Pinned(OneCpu),
    );

    impl Probe {
        fn call<T>(&self, call: impl FnOnce(&Host<false>) -> T) -> T {
            let depth = self.depth.fetch_add(1, Ordering::Relaxed) + 1;
            self.deepest.fetch_max(depth, Ordering::Relaxed);
            let locked = SizeClass::all().any(|class| PROBED.engine.bins(class).any(|(_, bin)| bin.looks_busy()));
            let held = locked || PROBED.engine.pages.is_busy() || PROBED.enter().is_err();
            self.held.fetch_or(held, Ordering::Relaxed);
            if depth == 1 {
                for size in [24, 5000, 40_000, 20 << 20] {
                    if let Some(block) = filled(&PROBED, size) {
                        block.free(&PROBED).unwrap();
                    }
                }
            }
            let result = call(&self.host);
            self.depth.fetch_sub(1, Ordering::Relaxed);
            result
        }
    }

    // SAFETY: the host's.
    unsafe impl PageProvider for Probe {
        fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
            self.call(|host| host.map(run))
        }
        unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
            // SAFETY: the contract is the same.
            self.call(|host| unsafe { host.unmap(start, run) })
        }
    }

    #[test]
    fn the_provider_is_called_with_nothing_held_and_is_not_entered_again() {
        let heap = &PROBED;
        let blocks: Vec<_> = [8, 200, 4000, 30_000, 100_000, 3 << 20, 9 << 20, 20 << 20]
            .iter()
            .flat_map(|size| (0..20).map(|_| filled(heap, *size).unwrap()).collect::<Vec<_>>())
            .collect();
        let many: Vec<_> = (0..30_000).map(|_| filled(heap, 1000).unwrap()).collect();
        blocks.into_iter().chain(many).for_each(|block| block.free(heap).unwrap());
        heap.trim(0);
        heap.verify().unwrap();
        let probe = heap.provider();
        assert!(probe.host.calls() > 10);
        assert!(!probe.held.load(Ordering::Relaxed), "something was held while the provider was called");
        assert_eq!(probe.deepest.load(Ordering::Relaxed), 1, "the provider was entered again from within");
        assert_eq!(probe.host.held_len(), 0);
    }
}

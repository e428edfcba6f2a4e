//! Large blocks: page runs.
//!
//! Three kinds, told apart by what is found at the block's address:
//! - a run in a chunk, for what no slab serves: found, split and merged by `pages`; grows into the free run behind it;
//! - the same, shorter, for blocks that outgrew [`MAX_GROWN_SMALL_LEN`] by `realloc`: they will grow again, and a
//!   slab's block cannot. A block that is fresh at that length stays in a slab. Price: freeing a block of 4 to 32 KiB
//!   asks for its kind;
//! - *huge*, a run of its own straight from a provider that can move runs: grows without copying, and goes back when
//!   freed. Fresh blocks are from
//!   [`HUGE_LEN`] on; those that `realloc` makes outgrow the slab sizes, or finds no room for where they are, at any
//!   length: what has grown will grow again, and is copied for the last time while it is short. Price: a call of the
//!   provider for each such block and each time it grows, and a shootdown when it is freed, where a run in a chunk has
//!   neither. Where the provider cannot move runs, there are none.
//!
//! The cache of the CPU is held while locks of the page heap are ([`Heap::held`]): that is what tells a nested caller
//! that it must not wait for them.

#![expect(unsafe_code, reason = "blocks that are freed, and the memory of huge ones")]

use core::alloc::Layout;
use core::ptr::NonNull;

use crate::base::size_class::{MAX_SMALL_LEN, SHORT_LEN, SizeClass};
use crate::base::tuning::{HUGE_LEN, HUGE_SLACK, NOTE_TRIES};
use crate::contract::CpuMode;
use crate::contract::provider::{PageProvider, PageRun};
#[cfg(feature = "hardened")]
use crate::harden::Misuse;
#[cfg(not(feature = "debug-heap"))]
use crate::heap::Held;
use crate::heap::depot::Caller;
use crate::heap::request::{Depth, Seek};
use crate::heap::source::Away;
use crate::heap::{Entered, Heap};
use crate::pages::{AddError, AtHand, Chunk, Kind, Mapping, PageDesc, Provided, Refused, Run, Step, Use, Want};

/// The longest block that stays in a slab when `realloc` makes it grow. What the fast paths look up is then surely in
/// one.
const MAX_GROWN_SMALL_LEN: usize = SHORT_LEN;

/// A large block as it came.
#[derive(Debug)]
pub(crate) struct LargeBlock {
    /// The block, as long as it may be used.
    pub(crate) block: NonNull<[u8]>,
    /// Its bytes are zeros.
    pub(crate) zeroed: bool,
}

/// Whether a block of that Layout may be a page run although its size has a class.
#[inline]
pub(crate) fn may_be_run(class: SizeClass) -> bool {
    class.block_len() > MAX_GROWN_SMALL_LEN
}

/// A search for a large block.
struct LargeRun<'a, P, C, const CPUS: usize> {
    heap: &'a Heap<P, C, CPUS>,
    layout: Layout,
    use_: Use,
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Seek for LargeRun<'_, P, C, CPUS> {
    type Found = LargeBlock;

    fn want(&self) -> Want {
        Want { len: self.layout.size(), least_len: self.layout.size(), align: self.layout.align(), use_: self.use_ }
    }

    fn attempt(&self, depth: Depth) -> Result<LargeBlock, Refused> {
        match depth {
            Depth::Quick => self.heap.run_once(self.layout, self.use_).0,
            Depth::Thorough { wait } => self.heap.run_anywhere(self.layout, self.use_, wait),
        }
    }

    fn adopt(&self, run: Run<'_>, _: Caller) -> Option<LargeBlock> {
        Some(as_block(&run))
    }
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// A block that no slab serves, from a run that lies at hand: no loop, one lock.
    pub(crate) fn alloc_large(&self, layout: Layout) -> Option<LargeBlock> {
        #[cfg(feature = "guard-pages")]
        if let Some(block) = self.sample_large(layout) {
            return Some(block);
        }
        self.alloc_near(layout).map(|run| as_block(&run.into_run())).or_else(|| self.alloc_far(layout))
    }

    /// The start of an [`alloc_large`](Self::alloc_large). Every way but the shortest is out of line, so that this one
    /// saves no registers.
    #[cfg(not(feature = "debug-heap"))]
    #[inline(always)]
    pub(crate) fn alloc_large_start(&self, layout: Layout) -> Option<NonNull<u8>> {
        #[cfg(feature = "guard-pages")]
        if let Some(sampled) = self.sample_large(layout) {
            return Some(sampled.block.cast());
        }
        if is_huge::<P>(layout.size()) {
            return self.alloc_far_start(layout);
        }
        let Ok(entered) = self.enter() else { return self.alloc_far_start(layout) };
        match self.engine.pages.reuse(self.engine.run_cache(entered.cache), layout.size(), layout.align()) {
            Some(run) => Some(run.start()),
            None => self.alloc_cut_start(entered.held, entered.guard, layout),
        }
    }

    #[cfg(not(feature = "debug-heap"))]
    #[inline(never)]
    fn alloc_cut_start(&self, held: Held<'_, C>, guard: C::Guard, layout: Layout) -> Option<NonNull<u8>> {
        let entered = Entered { held, guard };
        // What is longer than all that the heap holds leaves the cached run alone, and so does what has no bytes.
        let fits = layout.size().wrapping_sub(1) < self.engine.pages.held_len();
        let kept = self.engine.run_cache(entered.cache);
        let cut = || self.engine.pages.cut(kept, entered.index, layout.size(), layout.align());
        let run = if fits { cut() } else { None };
        drop(entered);
        run.map(|run| run.start()).or_else(|| self.alloc_far_start(layout))
    }

    /// What the CPU keeps, or the page heap has at hand. `None` also if this CPU's cache is busy, as it is in panic
    /// mode.
    #[inline(always)]
    fn alloc_near(&self, layout: Layout) -> Option<AtHand<'_>> {
        if is_huge::<P>(layout.size()) {
            return None;
        }
        let entered = self.enter().ok()?;
        let (pages, index) = (&self.engine.pages, entered.index);
        let kept = self.engine.run_cache(entered.cache);
        let run = pages.reuse(kept, layout.size(), layout.align());
        run.or_else(|| pages.cut(kept, index, layout.size(), layout.align()))
    }

    #[cfg(not(feature = "debug-heap"))]
    #[cold]
    #[inline(never)]
    fn alloc_far_start(&self, layout: Layout) -> Option<NonNull<u8>> {
        if layout.size() == 0 {
            return Some(dangling(layout));
        }
        self.alloc_far(layout).map(|large| large.block.cast())
    }

    /// A block that takes a search, or is no run in a chunk.
    #[cold]
    #[inline(never)]
    fn alloc_far(&self, layout: Layout) -> Option<LargeBlock> {
        if self.emergency.is_on() {
            return self.alloc_in_panic(layout);
        }
        if is_huge::<P>(layout.size()) {
            return self.alloc_huge(layout);
        }
        self.alloc_run(layout, Use::Large)
    }

    /// A page run for a block that has to move because it grew.
    pub(crate) fn alloc_grown(&self, layout: Layout) -> Option<LargeBlock> {
        if self.emergency.is_on() {
            return self.alloc_in_panic(layout);
        }
        if is_huge::<P>(layout.size()) {
            return self.alloc_huge(layout);
        }
        self.alloc_own(layout).or_else(|| self.alloc_cached(layout)).or_else(|| {
            let grown = self.alloc_run(layout, Use::Grown)?;
            if let (Some(run), Ok(entered)) = (self.run_of(grown.block.cast()), self.enter()) {
                self.engine.pages.note_cut(self.engine.run_cache(entered.cache), run);
            }
            Some(grown)
        })
    }

    /// The run that this CPU freed last, if it is as long.
    fn alloc_cached(&self, layout: Layout) -> Option<LargeBlock> {
        let entered = self.enter().ok()?;
        let run = self.engine.pages.reuse(self.engine.run_cache(entered.cache), layout.size(), layout.align())?;
        Some(as_block(&run.into_run()))
    }

    /// A run of its own for a block that is longer than slabs serve, if the provider can move runs and has one.
    pub(crate) fn alloc_own(&self, layout: Layout) -> Option<LargeBlock> {
        self.huge_once(huge_run::<P>(layout.size(), layout.align())?, self.caller())
    }

    /// A block in panic mode: of what was set aside, else a run that lies at hand.
    #[cold]
    fn alloc_in_panic(&self, layout: Layout) -> Option<LargeBlock> {
        let block = self.emergency.take(layout.size(), layout.align());
        let block = block.map(|block| LargeBlock { block, zeroed: false });
        block
            .or_else(|| self.run_once(layout, Use::Large).0.ok())
            .or_else(|| self.run_anywhere(layout, Use::Large, false).ok())
    }

    /// A run in a chunk, whatever its length, in which no granule but the first tells of a block.
    pub(crate) fn alloc_alone(&self, layout: Layout) -> Option<NonNull<[u8]>> {
        let block = self.alloc_run(layout, Use::Large)?.block;
        let desc = self.run_of(block.cast())?;
        let inside = Chunk::of(desc).descs_of(desc).skip(1).take(desc.len().saturating_sub(2));
        inside.for_each(|desc| desc.set(Kind::Inside, 0, false));
        Some(block)
    }

    fn alloc_run(&self, layout: Layout, use_: Use) -> Option<LargeBlock> {
        let seek = LargeRun { heap: self, layout, use_ };
        // What is longer than all that the heap holds disturbs nobody.
        let (run, caller) = if layout.size() > self.engine.pages.held_len() {
            (Err(Refused::Empty), self.caller())
        } else {
            self.run_once(layout, use_)
        };
        match run {
            Ok(run) => Some(run),
            Err(refused) => self.search(&seek, refused, caller),
        }
    }

    /// A run out of any pool.
    fn run_anywhere(&self, layout: Layout, use_: Use, wait: bool) -> Result<LargeBlock, Refused> {
        let step: Step<'_> = &|work| self.step_if(wait, work);
        self.engine.pages.alloc_any(layout.size(), layout.align(), use_, step).map(|run| as_block(&run))
    }

    /// One attempt.
    fn run_once(&self, layout: Layout, use_: Use) -> (Result<LargeBlock, Refused>, Caller) {
        self.held(|caller| {
            let wait = !(C::PINNED && caller.nested);
            let run = self.engine.pages.alloc(layout.size(), layout.align(), use_, caller.index, wait);
            (run.map(|run| as_block(&run)), caller)
        })
    }

    fn alloc_huge(&self, layout: Layout) -> Option<LargeBlock> {
        let run = huge_run::<P>(layout.size(), layout.align())?;
        let caller = self.caller();
        let kept = self.take_huge(run).map(|start| NonNull::slice_from_raw_parts(start, run.len()));
        kept.map(|block| LargeBlock { block, zeroed: false })
            .or_else(|| self.huge_once(run, caller))
            .or_else(|| {
                if !self.is_within_reach(run) {
                    return None;
                }
                self.trim(0);
                self.huge_once(run, caller)
            })
            .or_else(|| self.retry_huge_after_pressure(run, caller, || self.huge_once(run, caller)))
    }

    /// A run from the provider, noted as one block.
    fn huge_once(&self, run: PageRun, caller: Caller) -> Option<LargeBlock> {
        if C::PINNED && caller.nested && !P::REENTRANT {
            return None;
        }
        // Who was waited for was another one's business.
        let asked = (0..NOTE_TRIES).map(|_| self.map(run, caller)).find(|asked| !matches!(asked, Err(Away::Waited)));
        let memory = asked?.ok()??;
        self.source.recent.note_mapped(run.len(), self.used_len());
        if !self.insert_huge(memory.start(), run, caller) {
            self.give_back(memory, caller);
            return None;
        }
        Some(LargeBlock { block: memory.into_block(), zeroed: P::ZEROED })
    }

    /// Notes a huge block, in a new table if there is no slot left.
    fn insert_huge(&self, start: NonNull<u8>, run: PageRun, caller: Caller) -> bool {
        for _ in 0..NOTE_TRIES {
            match self.held(|caller| self.engine.pages.insert_huge(start, run, !(C::PINNED && caller.nested))) {
                Ok(()) => return true,
                Err(AddError::Full) if self.add_table(caller) => {}
                Err(AddError::Busy) => {}
                Err(_) => return false,
            }
        }
        false
    }

    /// The page run that a block is, or `None` if it is a slab's block or huge.
    pub(crate) fn run_of(&self, start: NonNull<u8>) -> Option<&PageDesc> {
        self.desc_at(start).filter(|desc| desc.kind() == Kind::Large)
    }

    /// Whether a live block is in a slab, as far as the cache's hint knows.
    #[inline]
    pub(crate) fn is_in_slab(&self, entered: &Entered<'_, C>, start: NonNull<u8>) -> bool {
        let desc = self.engine.pages.desc_near(&entered.cache.chunk_hints, start);
        desc.is_some_and(|desc| !desc.tag().is(Kind::Large))
    }

    /// The run of a huge block; asked only for what is long enough to be one.
    fn huge_run_of(&self, start: NonNull<u8>, len: usize) -> Option<PageRun> {
        if may_be_huge::<P>(len) { self.engine.pages.huge_run(start) } else { None }
    }

    /// Takes a large block back. Waits for no lock; gives surplus chunks, and huge blocks, to the provider.
    ///
    /// # Safety
    /// `start` is a block of this heap, of that Layout, that nobody uses any more.
    #[inline(always)]
    pub(crate) unsafe fn free_large(&self, start: NonNull<u8>, layout: Layout) {
        #[cfg(not(feature = "hardened"))]
        if let Some(entered) = self.enter().ok().filter(|_| !may_be_huge::<P>(layout.size())) {
            if self.engine.pages.keep_again(self.engine.run_cache(entered.cache), start) {
                return;
            }
            if let Some(desc) = self.engine.pages.desc_near(&entered.cache.chunk_hints, start) {
                let tag = desc.tag();
                if tag.is(Kind::Large) {
                    if !self.engine.pages.keep(self.engine.run_cache(entered.cache), desc, tag) {
                        self.free_run(entered.held, entered.guard, desc);
                    }
                    return;
                }
            }
        }
        // SAFETY: the contract is the same.
        unsafe { self.free_far(start, layout) };
    }

    /// Frees a run to its pool. Out of line, so that keeping it, in front of this, saves no registers.
    #[cfg(not(feature = "hardened"))]
    #[inline(never)]
    fn free_run(&self, held: Held<'_, C>, guard: C::Guard, desc: &PageDesc) {
        let entered = Entered { held, guard };
        let caller = entered.caller();
        self.engine.pages.free(desc);
        drop(entered);
        self.return_surplus(caller);
    }

    /// [`free_large`](Self::free_large) of what takes a look into the chunk map, or is no run in a chunk.
    ///
    /// # Safety
    /// As for [`free_large`](Self::free_large).
    #[cold]
    #[inline(never)]
    unsafe fn free_far(&self, start: NonNull<u8>, layout: Layout) {
        // A block without bytes is none of the heap's.
        if layout.size() == 0 {
            return;
        }
        let caller = self.caller();
        self.add_cpu(caller);
        if let Some(run) = self.huge_run_of(start, layout.size()) {
            #[cfg(feature = "hardened")]
            if huge_run::<P>(layout.size(), layout.align()) != Some(run) {
                return self.engine.report(Misuse::LayoutMismatch, start);
            }
            return self.free_huge(start, run, caller);
        }
        #[cfg(feature = "hardened")]
        match self.engine.inspect_run(start, layout) {
            _ if self.emergency.owns(start) => {}
            Ok(desc) => self.held(|caller| self.keep_or_free(desc, caller)),
            Err(misuse) => return self.refuse(misuse, start, caller, |own| own == layout),
        }
        #[cfg(not(feature = "hardened"))]
        match self.run_of(start) {
            Some(desc) => self.held(|caller| self.keep_or_free(desc, caller)),
            None if self.emergency.owns(start) => {}
            None => self.engine.count_stray(),
        }
        self.return_surplus(caller);
    }

    /// Frees a large block's run in a hold, or keeps it if the caller holds its CPU's cache.
    fn keep_or_free(&self, desc: &PageDesc, caller: Caller) {
        let cache = self.engine.cache(caller.index).filter(|_| !caller.nested);
        if !cache.is_some_and(|cache| self.engine.pages.keep(self.engine.run_cache(cache), desc, desc.tag())) {
            self.engine.pages.free(desc);
        }
    }

    /// Keeps a huge block that is likely to be asked for again, or gives it back.
    fn free_huge(&self, start: NonNull<u8>, run: PageRun, caller: Caller) {
        let is_likely = self.source.recent.regretted_len() >= self.kept_huge_len() + run.len() - run.len() / HUGE_SLACK;
        // With `hardened` what is freed is to fault.
        if cfg!(feature = "hardened") || !is_likely || !self.source.huge_cache.put(start) {
            self.return_huge(start, caller);
        }
    }

    /// Bytes in huge blocks that are kept.
    pub(crate) fn kept_huge_len(&self) -> usize {
        let len_of = |start| self.engine.pages.huge_run(start).map_or(0, PageRun::len);
        self.source.huge_cache.starts().map(len_of).sum()
    }

    /// A kept block of that length at a multiple of that alignment.
    fn take_huge(&self, run: PageRun) -> Option<NonNull<u8>> {
        let fits = |start: NonNull<u8>| {
            let kept = self.engine.pages.huge_run(start);
            kept.is_some_and(|kept| kept.len() == run.len()) && start.addr().get() & (run.align() - 1) == 0
        };
        let start = self.source.huge_cache.take(fits)?;
        if fits(start) && self.engine.pages.update_huge(start, run) {
            return Some(start);
        }
        // It came back at another length between the look and the exchange.
        self.return_huge(start, self.caller());
        None
    }

    /// Gives kept blocks back as long as more than `keep` bytes of them stay; gives the bytes that went.
    pub(crate) fn return_kept_huge(&self, keep: usize, caller: Caller) -> usize {
        let mut len = 0;
        while P::REMAPS && self.kept_huge_len() > keep {
            let Some(start) = self.source.huge_cache.take(|_| true) else { break };
            len += self.engine.pages.huge_run(start).map_or(0, PageRun::len);
            self.return_huge(start, caller);
        }
        len
    }

    /// Gives a huge block's run back, or makes it a chunk if the provider does not take it (now).
    fn return_huge(&self, start: NonNull<u8>, caller: Caller) {
        let Some(run) = self.engine.pages.leave_huge(start) else {
            return;
        };
        // SAFETY: by the contract of `free_large` the block is unused; this run of it came from `map`, and no lookup
        // finds it any more.
        let memory = unsafe { Mapping::new(start, run) };
        let offered = if C::PINNED && caller.nested { Err(memory) } else { self.unmap(memory, caller) };
        let Err(memory) = offered else {
            self.engine.pages.huge_gone(start, run);
            return self.source.recent.note_returned(run.len());
        };
        let whole = Want { len: 0, least_len: 0, align: 1, use_: Use::Large };
        let provided = Provided { zeroed: false, decommits: P::DECOMMITS };
        let step: Step<'_> = &|work| self.step(work);
        let refused = self.engine.pages.add_chunk(memory, whole, caller.index, provided, step);
        self.engine.pages.huge_gone(start, run);
        if let Err((_, memory)) = refused {
            self.source.orphans.push(memory);
        }
    }

    /// Changes the length of a run in the chunk that the own cache remembers, if that cache is free: how many bytes may
    /// be used then, or `Some(None)` if it stays as it is. `None`: not found so easily, or no run.
    ///
    /// # Safety
    /// As for [`resize_large`](Self::resize_large).
    #[inline(always)]
    pub(crate) unsafe fn resize_near(&self, start: NonNull<u8>, old: Layout, new_size: usize) -> Option<Option<usize>> {
        if may_be_huge::<P>(old.size()) || new_size <= MAX_GROWN_SMALL_LEN {
            return None;
        }
        let entered = self.enter().ok()?;
        let desc = self.engine.pages.desc_near(&entered.cache.chunk_hints, start)?;
        (desc.kind() == Kind::Large).then(|| self.engine.pages.resize(desc, new_size, true))
    }

    /// Changes a large block's length where it stands. False: unchanged.
    ///
    /// # Safety
    /// `start` is a block of this heap, of that Layout; the caller uses nothing behind `new_size` any more if the
    /// answer is true.
    pub(crate) unsafe fn resize_large(&self, start: NonNull<u8>, old: Layout, new_size: usize) -> bool {
        if let Some(run) = self.huge_run_of(start, old.size()) {
            let Some(new_run) = huge_run::<P>(new_size, old.align()) else {
                return false;
            };
            if run == new_run {
                return true;
            }
            // SAFETY: the block's run, of which by the contract nobody uses what the new one lacks.
            let memory = unsafe { Mapping::new(start, run) };
            return self.source.resize(memory, new_run, self.asker(self.caller())).is_ok()
                && self.engine.pages.update_huge(start, new_run);
        }
        // A run shorter than this could not be told from a slab's block when it is freed.
        if new_size <= MAX_GROWN_SMALL_LEN {
            return false;
        }
        let Some(desc) = self.run_of(start) else { return false };
        self.held(|caller| self.engine.pages.resize(desc, new_size, !(C::PINNED && caller.nested))).is_some()
    }

    /// Changes a huge block's length, moving its pages if need be, without a copy.
    ///
    /// # Safety
    /// As for [`resize_large`](Self::resize_large); after success the block is only at its new place.
    pub(crate) unsafe fn remap_huge(&self, start: NonNull<u8>, old: Layout, new_size: usize) -> Option<NonNull<[u8]>> {
        let run = self.huge_run_of(start, old.size())?;
        let new_run = huge_run::<P>(new_size, old.align())?;
        let caller = self.caller();
        if C::PINNED && caller.nested {
            return None;
        }
        self.engine.pages.leave_huge(start)?;
        // SAFETY: the block's run, which by the contract is this caller's to move.
        let memory = unsafe { Mapping::new(start, run) };
        let Ok(moved) = self.source.remap(memory, new_run, self.asker(caller)) else {
            self.engine.pages.huge_stays(start, run);
            return None;
        };
        let place = moved.start();
        self.engine.pages.huge_gone(start, run);
        // The slot that has just become free makes room. Without a note (a race for the last slot, and no memory for a
        // table) the block stays usable, and is not given back when it is freed.
        self.insert_huge(place, new_run, caller);
        Some(NonNull::slice_from_raw_parts(place, new_run.len()))
    }

    /// How many bytes of a large block may be used.
    pub(crate) fn large_len(&self, start: NonNull<u8>, layout: Layout) -> Option<usize> {
        if let Some(run) = self.huge_run_of(start, layout.size()) {
            return Some(run.len());
        }
        self.run_of(start).map(|desc| self.engine.pages.usable_len(desc))
    }
}

/// Whether a fresh block of that many bytes is a run of its own.
pub(crate) const fn is_huge<P: PageProvider>(len: usize) -> bool {
    P::REMAPS && len >= HUGE_LEN
}

/// Whether a block of that many bytes may be a run of its own. What is shorter is recognised by its size when it is
/// freed.
const fn may_be_huge<P: PageProvider>(len: usize) -> bool {
    P::REMAPS && len > MAX_SMALL_LEN
}

/// The run of a huge block of that many bytes; `None` if there are none of that length.
fn huge_run<P: PageProvider>(len: usize, align: usize) -> Option<PageRun> {
    if may_be_huge::<P>(len) { PageRun::new(len, align, P::PAGE_LEN) } else { None }
}

/// Where a block without bytes is.
pub(crate) fn dangling(layout: Layout) -> NonNull<u8> {
    // An alignment is a power of two, so never 0.
    NonNull::new(core::ptr::without_provenance_mut(layout.align())).unwrap_or(NonNull::dangling())
}

fn as_block(run: &Run<'_>) -> LargeBlock {
    LargeBlock { block: NonNull::slice_from_raw_parts(run.start, run.len), zeroed: run.zeroed }
}

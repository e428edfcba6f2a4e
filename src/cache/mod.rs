//! One CPU's cache: for each class two bounded lists of free blocks.
//!
//! ```text
//! Hot  { head, room }          the list that alloc pops and free pushes
//! Cold { limit, spare }        its limit, and an older list: a loop at the edge of the limit does not go to the slabs
//!                              for each block
//! ```
//! Everything here is owned by whoever holds the cache, by the try-lock (hint) or the plain busy flag (pinned).
//! The fields are atomics, accessed relaxed, so that statistics may read them meanwhile. All zero is the valid empty
//! state: no room, so the first free of a class takes the slow path, which grants a limit.
//!
//! **Limits follow the heap.** A class starts without a limit; each slow path doubles it, from a cache line's worth up
//! to 256 KiB and [`MAX_BLOCKS`], as long as the cache's sum stays within its budget, a share of the bytes the heap
//! holds. When the budget is spent, the classes in turn are asked for half of their limits, and those that were busy
//! lately pass. So a heap of 100 KiB keeps next to nothing in caches, and a big one batches. Price: a slow path now and
//! then hands a part of another class's blocks back.
//!
//! **Blocks leave in parts.** Both lists together have at most one and a half times the limit ([`most_for`]). When that
//! is reached, the newer one becomes the older one, if there is none; a part of that returns to its slabs, those first
//! that were freed first; and the newer one may grow by as much. So no call waits for a whole list. Price: a list is
//! turned round when it becomes the older one, a load and a store for each block.
//!
//! Invariants (executed by `verify`): C1 the list from `head` has `most - spare_count - room` blocks; C2 the list from
//! `spare` has `spare_count` blocks; C3 `limit_len` is the sum of `2 * limit * block_len`.

#![expect(unsafe_code, reason = "links of free blocks; the cache that a pin keeps")]

#[cfg(not(feature = "hardened"))]
pub(crate) mod owned_pages;
pub(crate) mod table;
#[cfg(test)]
mod tests;

use core::ptr::{NonNull, from_ref, null_mut};

use crate::base::link::Link;
use crate::base::size_class::{CLASS_COUNT, ENTRY_LEN, SizeClass};
use crate::base::sync::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Counter, Ordering, compiler_fence};
use crate::base::tuning::{FIRST_LIST_LEN, HEAT, MAX_BLOCKS, MAX_LIST_LEN};
#[cfg(not(feature = "hardened"))]
use crate::cache::owned_pages::OwnedPages;
use crate::contract::cpu::{CacheAddr, HELD};
#[cfg(feature = "guard-pages")]
use crate::harden::guard::Countdown;
use crate::harden::{Damage, Key, KeyCell};
use crate::pages::{ChunkHints, RunCache};
use crate::slab::block::{Block, List};

const HEAT_SHIFT: u32 = 16;

/// The most blocks of a class that both lists have together, for its limit. They mostly have nearly as many, since
/// blocks leave in parts. Budgets count twice the limit.
const fn most_for(limit: u32) -> u32 {
    limit + limit / 2
}

/// One class's list. 16 bytes, four to a cache line.
#[derive(Debug)]
#[cfg_attr(target_pointer_width = "32", repr(align(16)))]
struct Hot {
    head: AtomicPtr<u8>,
    /// How many more blocks may be pushed.
    room: AtomicU32,
    /// Which bits of a page's number must be as noted for a block of it to be pushed: none, or if blocks are tiny, all.
    #[cfg(not(feature = "hardened"))]
    checked: AtomicU32,
}

impl Hot {
    const fn new() -> Self {
        Self {
            head: AtomicPtr::new(null_mut()),
            room: AtomicU32::new(0),
            #[cfg(not(feature = "hardened"))]
            checked: AtomicU32::new(0),
        }
    }
}

const _: () = assert!(size_of::<Hot>() == ENTRY_LEN, "a class is its entry's offset");

/// What only slow paths touch.
#[derive(Debug)]
struct Cold {
    spare: AtomicPtr<u8>,
    spare_count: AtomicU32,
    /// The limit; and above [`HEAT_SHIFT`], how often the class whose turn it is may pass
    /// before it gives up half of it, [`HEAT`] at each slow path.
    limit: AtomicU32,
    tally: Tally,
}

impl Cold {
    const fn new() -> Self {
        Self {
            spare: AtomicPtr::new(null_mut()),
            spare_count: AtomicU32::new(0),
            limit: AtomicU32::new(0),
            tally: Tally::new(),
        }
    }
}

/// Blocks that went from slabs to users or caches, and back. Counted by the class of the slab.
#[derive(Debug)]
pub(crate) struct Tally {
    taken: Counter,
    pushed: Counter,
}

impl Tally {
    pub(crate) const fn new() -> Self {
        Self { taken: Counter::new(0), pushed: Counter::new(0) }
    }

    /// Blocks out of slabs and blocks back into slabs, ever.
    pub(crate) fn get(&self) -> (u64, u64) {
        (self.taken.load(Ordering::Relaxed), self.pushed.load(Ordering::Relaxed))
    }

    /// Counts, by the only writer.
    fn add_own(counter: &Counter, count: u32) {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(u64::from(count)), Ordering::Relaxed);
    }

    /// Adds what another one counted, by any writer.
    pub(crate) fn add(&self, other: &Self) {
        let (taken, pushed) = other.get();
        self.taken.fetch_add(taken, Ordering::Relaxed);
        self.pushed.fetch_add(pushed, Ordering::Relaxed);
    }

    /// Counts blocks taken from slabs, by any writer.
    pub(crate) fn taken_by_any(&self, count: u32) {
        self.taken.fetch_add(u64::from(count), Ordering::Relaxed);
    }

    /// Counts blocks pushed to slabs, by any writer.
    pub(crate) fn pushed_by_any(&self, count: u32) {
        self.pushed.fetch_add(u64::from(count), Ordering::Relaxed);
    }
}

/// What was done at a cache besides pops and pushes, ever. The holder counts plainly; who passes the cache by does not
/// hold it, and adds.
#[derive(Debug)]
pub(crate) struct Counts {
    refills: Counter,
    flushes: Counter,
    laps: Counter,
    nested_allocs: Counter,
    nested_frees: Counter,
}

impl Counts {
    pub(crate) const fn new() -> Self {
        Self {
            refills: Counter::new(0),
            flushes: Counter::new(0),
            laps: Counter::new(0),
            nested_allocs: Counter::new(0),
            nested_frees: Counter::new(0),
        }
    }

    fn read(counter: &Counter) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    fn add(counter: &Counter) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Batches from slabs, by the cache's holder.
    pub(crate) fn refill(&self) {
        Tally::add_own(&self.refills, 1);
    }

    pub(crate) fn refills(&self) -> u64 {
        Self::read(&self.refills)
    }

    /// Batches to slabs, by the cache's holder.
    pub(crate) fn flush(&self) {
        Tally::add_own(&self.flushes, 1);
    }

    pub(crate) fn flushes(&self) -> u64 {
        Self::read(&self.flushes)
    }

    /// Laps over the other caches.
    pub(crate) fn lap(&self) {
        Self::add(&self.laps);
    }

    pub(crate) fn laps(&self) -> u64 {
        Self::read(&self.laps)
    }

    /// Allocations that found the cache busy.
    pub(crate) fn nested_alloc(&self) {
        Self::add(&self.nested_allocs);
    }

    pub(crate) fn nested_allocs(&self) -> u64 {
        Self::read(&self.nested_allocs)
    }

    /// Frees that found the cache busy.
    pub(crate) fn nested_free(&self) {
        Self::add(&self.nested_frees);
    }

    pub(crate) fn nested_frees(&self) -> u64 {
        Self::read(&self.nested_frees)
    }
}

/// What became of a wish for a higher limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Raise {
    /// There is more room.
    Done,
    /// The class has all it may have.
    Longest,
    /// Other classes have what it would need.
    Spent,
}

/// One CPU's cache. Aligned to two cache lines, since neighbouring lines are fetched together.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct CpuCache {
    /// The index of the CPU that this cache is of while it is free, or [`HELD`]. So one comparison tells that a cache
    /// is that CPU's and free; and all zero is the first CPU's, free.
    free_for: AtomicUsize,
    /// Null for the first CPU's cache.
    run_cache: Link<RunCache>,
    /// Somebody wants this cache emptied; its owner does so at its next slow path.
    drain_asked: AtomicBool,
    /// Whether this cache was ever used: it then counts in the budget's divisor.
    used: AtomicBool,
    /// Whether its CPU used it and was retired.
    gone: AtomicBool,
    /// The class that gives up half its limit next.
    victim: AtomicU32,
    /// Allocations until the next one that is guarded.
    #[cfg(feature = "guard-pages")]
    pub(crate) countdown: Countdown,
    /// Where the next lap over the caches starts: where the last one succeeded.
    pub(crate) lap_start: AtomicUsize,
    /// Bytes that the limits allow.
    limit_len: AtomicUsize,
    /// The chunks that blocks were last looked up in.
    pub(crate) chunk_hints: ChunkHints,
    /// Where this CPU's own tiny blocks are.
    #[cfg(not(feature = "hardened"))]
    pub(crate) owned_pages: OwnedPages,
    /// Bytes that `realloc` copied on this CPU: of short blocks, of long ones.
    copied: [Counter; 2],
    /// What the lists' links are written under.
    key: KeyCell,
    /// Blocks lost out of these lists.
    pub(crate) damage: Damage,
    hot: [Hot; CLASS_COUNT],
    cold: [Cold; CLASS_COUNT],
    pub(crate) counts: Counts,
    /// Where the CPU keeps this cache's address, if it does.
    addr: AtomicPtr<CacheAddr>,
}

impl CpuCache {
    /// The first CPU's.
    pub(crate) const fn new() -> Self {
        Self {
            free_for: AtomicUsize::new(0),
            run_cache: Link::new(),
            drain_asked: AtomicBool::new(false),
            used: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            victim: AtomicU32::new(0),
            #[cfg(feature = "guard-pages")]
            countdown: Countdown::new(),
            lap_start: AtomicUsize::new(0),
            limit_len: AtomicUsize::new(0),
            chunk_hints: ChunkHints::new(),
            #[cfg(not(feature = "hardened"))]
            owned_pages: OwnedPages::new(),
            key: KeyCell::new(),
            damage: Damage::new(),
            copied: [const { Counter::new(0) }; 2],
            hot: [const { Hot::new() }; CLASS_COUNT],
            cold: [const { Cold::new() }; CLASS_COUNT],
            counts: Counts::new(),
            addr: AtomicPtr::new(null_mut()),
        }
    }

    /// Makes a cache that is all zero that CPU's, with the run cache beside it. Before others see it.
    pub(crate) fn begin(&self, index: usize, run_cache: &RunCache) {
        self.free_for.store(index, Ordering::Relaxed);
        self.run_cache.set(Some(run_cache));
    }

    /// The run cache of a CPU other than the first.
    #[inline]
    pub(crate) fn run_cache(&self) -> Option<&RunCache> {
        self.run_cache.get()
    }

    /// Takes the cache if it is that CPU's and free, against other CPUs: one locked instruction. Fast.
    #[inline]
    pub(crate) fn try_lock(&self, index: usize) -> bool {
        self.free_for.load(Ordering::Relaxed) == index
            && self.free_for.compare_exchange(index, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Opens what [`try_lock`](Self::try_lock) took with that index. Fast.
    #[inline]
    pub(crate) fn unlock(&self, index: usize) {
        self.free_for.store(index, Ordering::Release);
    }

    /// Takes the cache if it is that CPU's and free, against contexts that interrupt this one on the pinned CPU: no
    /// locked instruction. A context that comes between the load and the store finds the cache free, finishes with it,
    /// and leaves it free. Fast.
    #[inline]
    pub(crate) fn try_mark(&self, index: usize) -> bool {
        if self.free_for.load(Ordering::Relaxed) != index {
            return false;
        }
        self.free_for.store(HELD, Ordering::Relaxed);
        compiler_fence(Ordering::Acquire);
        true
    }

    /// [`try_mark`](Self::try_mark) of the cache whose address the pinned CPU keeps, which says whose it is: the cache,
    /// and its CPU's index. Fast.
    ///
    /// # Safety
    /// The address is what [`tell_addr`](Self::tell_addr) left there, or none was ever told, and its cache stays.
    #[inline(always)]
    pub(crate) unsafe fn try_mark_at<'a>(addr: &CacheAddr) -> Option<(&'a Self, usize)> {
        let cache = addr.get();
        // SAFETY: a cache begins with this word, and so does what stands for none, which is only read, as it is `HELD`.
        let free_for = unsafe { &*cache.cast::<AtomicUsize>() };
        let index = free_for.load(Ordering::Relaxed);
        if index == HELD {
            return None;
        }
        // SAFETY: it is not what stands for none, so it is a cache (caller).
        let cache = unsafe { &*cache.cast::<Self>() };
        cache.free_for.store(HELD, Ordering::Relaxed);
        compiler_fence(Ordering::Acquire);
        Some((cache, index))
    }

    /// Has the CPU keep this cache's address there, as one that is pinned to it; true if it did not.
    pub(crate) fn tell_addr(&self, addr: &CacheAddr) -> bool {
        self.addr.store(from_ref(addr).cast_mut(), Ordering::Relaxed);
        addr.set(NonNull::from(self).cast())
    }

    /// The CPU must not use this cache any more. Nobody else uses it.
    pub(crate) fn forget_addr(&self) {
        // SAFETY: null, or what a pin of this heap gave, which stays as long as the heap.
        if let Some(addr) = unsafe { self.addr.load(Ordering::Relaxed).as_ref() } {
            addr.clear();
        }
        self.addr.store(null_mut(), Ordering::Relaxed);
    }

    /// Ends what [`try_mark`](Self::try_mark) began with that index. Fast.
    #[inline]
    pub(crate) fn unmark(&self, index: usize) {
        compiler_fence(Ordering::Release);
        self.free_for.store(index, Ordering::Relaxed);
    }

    /// Makes the cache look busy for good, whoever has it: after a panic. Its owner may open it again.
    pub(crate) fn close(&self) {
        self.free_for.store(HELD, Ordering::Relaxed);
    }

    /// Whether somebody has the cache. A guess.
    pub(crate) fn is_busy(&self) -> bool {
        self.free_for.load(Ordering::Relaxed) == HELD
    }

    pub(crate) fn ask_drain(&self) {
        self.drain_asked.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_drain_asked(&self) -> bool {
        self.drain_asked.load(Ordering::Relaxed)
    }

    pub(crate) fn end_drain(&self) {
        self.drain_asked.store(false, Ordering::Relaxed);
    }

    /// True the first time.
    pub(crate) fn is_new(&self) -> bool {
        let new = !self.used.load(Ordering::Relaxed);
        if new {
            self.used.store(true, Ordering::Relaxed);
        }
        new
    }

    pub(crate) fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// Notes that the CPU has gone; false if it did not use the heap.
    pub(crate) fn goes(&self) -> bool {
        let used = self.is_used();
        if used {
            self.used.store(false, Ordering::Relaxed);
            self.gone.store(true, Ordering::Relaxed);
        }
        used
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Notes that the CPU is there; true if it had gone.
    pub(crate) fn comes_back(&self) -> bool {
        let gone = self.is_gone();
        if gone {
            self.gone.store(false, Ordering::Relaxed);
        }
        gone
    }

    #[inline]
    #[expect(clippy::indexing_slicing, reason = "a class's index is below CLASS_COUNT")]
    fn hot(&self, class: SizeClass) -> &Hot {
        &self.hot[class.index()]
    }

    #[expect(clippy::indexing_slicing, reason = "a class's index is below CLASS_COUNT")]
    fn cold(&self, class: SizeClass) -> &Cold {
        &self.cold[class.index()]
    }

    pub(crate) fn tally(&self, class: SizeClass) -> &Tally {
        &self.cold(class).tally
    }

    /// Counts bytes that were copied, as the cache's holder.
    pub(crate) fn add_copied(&self, is_long: bool, len: u64) {
        let [short, long] = &self.copied;
        let counter = if is_long { long } else { short };
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(len), Ordering::Relaxed);
    }

    /// Bytes that were copied: of short blocks, of long ones.
    pub(crate) fn copied(&self) -> [u64; 2] {
        self.copied.each_ref().map(|counter| counter.load(Ordering::Relaxed))
    }

    /// Counts blocks taken from slabs for this cache.
    pub(crate) fn count_taken(&self, class: SizeClass, count: u32) {
        Tally::add_own(&self.tally(class).taken, count);
    }

    /// Counts blocks given back to slabs from this cache.
    pub(crate) fn count_pushed(&self, class: SizeClass, count: u32) {
        Tally::add_own(&self.tally(class).pushed, count);
    }

    /// Takes a block out of the class's list. Fast.
    #[inline]
    pub(crate) fn pop(&self, class: SizeClass) -> Option<Block> {
        let hot = self.hot(class);
        let first = NonNull::new(hot.head.load(Ordering::Relaxed))?;
        let key = self.key.get();
        // SAFETY: blocks in the list are owned by the cache's holder (C1), whom we are.
        let Some(next) = (unsafe { crate::slab::block::next(first, key) }) else {
            self.give_up(class, first);
            return None;
        };
        hot.head.store(next, Ordering::Relaxed);
        hot.room.store(hot.room.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        // SAFETY: it is out of the list, so nobody else has it.
        Some(unsafe { Block::unlinked(first, key) })
    }

    /// Loses the class's list, whose first block has a damaged link. Nobody looks at it again.
    #[cold]
    #[inline(never)]
    fn give_up(&self, class: SizeClass, at: NonNull<u8>) {
        self.damage.note(at, self.take_list(class).count());
    }

    /// What the lists' links are written under.
    #[inline]
    #[cfg(feature = "hardened")]
    pub(crate) fn key(&self) -> Key {
        self.key.get()
    }

    /// Says under which key links are written. Every list's is the same, that of the heap.
    pub(crate) fn set_key(&self, key: Key) {
        self.key.set(key);
    }

    /// Puts a block into the class's list, or gives it back if there is no room. Fast.
    #[inline]
    pub(crate) fn push(&self, class: SizeClass, block: Block) -> Result<(), Block> {
        let hot = self.hot(class);
        let room = hot.room.load(Ordering::Relaxed);
        if room == 0 {
            return Err(block);
        }
        let start = block.into_start();
        // SAFETY: the token proved that the block is ours.
        unsafe { crate::slab::block::set_next(start, hot.head.load(Ordering::Relaxed), self.key.get()) };
        hot.head.store(start.as_ptr(), Ordering::Relaxed);
        hot.room.store(room - 1, Ordering::Relaxed);
        Ok(())
    }

    /// Blocks that this cache holds of a class: about so many, if it is not held.
    pub(crate) fn count(&self, class: SizeClass) -> u32 {
        self.most(class).saturating_sub(self.hot(class).room.load(Ordering::Relaxed))
    }

    fn spare_count(&self, class: SizeClass) -> u32 {
        self.cold(class).spare_count.load(Ordering::Relaxed)
    }

    fn add_room(&self, class: SizeClass, more: u32) {
        let room = &self.hot(class).room;
        room.store(room.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    /// The most blocks of the class that both lists have together.
    fn most(&self, class: SizeClass) -> u32 {
        most_for(self.limit(class))
    }

    /// The class's limit: the most blocks that it gets from slabs at once.
    pub(crate) fn limit(&self, class: SizeClass) -> u32 {
        self.cold(class).limit.load(Ordering::Relaxed) & ((1 << HEAT_SHIFT) - 1)
    }

    fn heat(&self, class: SizeClass) -> u32 {
        self.cold(class).limit.load(Ordering::Relaxed) >> HEAT_SHIFT
    }

    fn set_limit(&self, class: SizeClass, limit: u32, heat: u32) {
        self.cold(class).limit.store(limit | heat << HEAT_SHIFT, Ordering::Relaxed);
    }

    /// Whether a block may be pushed without further questions: it is not tiny, or its slab is known to be owned by
    /// this CPU. If it is not, keeping the block would make two CPUs deal out neighbours in one cache line for ever.
    /// Fast: one branch, which a mix of sizes makes no harder to predict.
    #[cfg(not(feature = "hardened"))]
    #[inline]
    pub(crate) fn is_plain(&self, class: SizeClass, start: NonNull<u8>) -> bool {
        self.owned_pages.difference(start) & self.hot(class).checked.load(Ordering::Relaxed) == 0
    }

    /// Has tiny blocks checked from now on ([`is_plain`](Self::is_plain)); false if they were, or need not be.
    #[cfg(not(feature = "hardened"))]
    pub(crate) fn begins_to_check(&self, class: SizeClass) -> bool {
        let checked = &self.hot(class).checked;
        let begins = class.is_tiny() && checked.load(Ordering::Relaxed) == 0;
        if begins {
            checked.store(u32::MAX, Ordering::Relaxed);
        }
        begins
    }

    /// Puts a list in place of the class's empty one. There is room for it.
    pub(crate) fn fill(&self, class: SizeClass, list: List) {
        self.key.set(list.key());
        let (head, count) = list.into_raw();
        self.hot(class).head.store(head, Ordering::Relaxed);
        self.add_room(class, count.wrapping_neg());
    }

    /// Takes the class's list out.
    pub(crate) fn take_list(&self, class: SizeClass) -> List {
        let count = self.count(class).wrapping_sub(self.spare_count(class));
        let head = self.hot(class).head.swap_relaxed(null_mut());
        self.add_room(class, count);
        // SAFETY: C1: that list has `count` blocks, and it is out of the cache now.
        unsafe { List::from_raw(head, count, self.key.get()) }
    }

    /// Takes the class's previous magazine out.
    pub(crate) fn take_spare(&self, class: SizeClass) -> List {
        let (cold, count) = (self.cold(class), self.spare_count(class));
        let head = cold.spare.swap_relaxed(null_mut());
        cold.spare_count.store(0, Ordering::Relaxed);
        self.add_room(class, count);
        // SAFETY: C2: that list has `count` blocks, and it is out of the cache now.
        unsafe { List::from_raw(head, count, self.key.get()) }
    }

    /// Makes a list the previous magazine, of which there is none. There is room for it.
    pub(crate) fn set_spare(&self, class: SizeClass, list: List) {
        let (cold, (head, count)) = (self.cold(class), list.into_raw());
        cold.spare.store(head, Ordering::Relaxed);
        cold.spare_count.store(count, Ordering::Relaxed);
        self.add_room(class, count.wrapping_neg());
    }

    /// Takes the list out whose blocks were used longest ago, these first: the previous magazine, or if there is none,
    /// the other list.
    pub(crate) fn take_older(&self, class: SizeClass) -> List {
        if self.spare_count(class) > 0 {
            return self.take_spare(class);
        }
        let list = self.take_list(class);
        let count = list.count();
        let (older, lost) = list.reversed();
        if let Some(at) = lost {
            self.damage.note(at, count - older.count());
        }
        older
    }

    /// Doubles the class's limit, if `budget` bytes for the whole cache allow it.
    pub(crate) fn raise_limit(&self, class: SizeClass, budget: usize) -> Raise {
        let block_len = class.block_len();
        let limit = self.limit(class);
        let wish = if limit == 0 { FIRST_LIST_LEN.div_ceil(block_len) } else { limit as usize * 2 };
        let longest = (budget / 4).min(MAX_LIST_LEN) / block_len;
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_BLOCKS")]
        let new = wish.min(longest).min(MAX_BLOCKS as usize) as u32;
        let Some(more) = new.checked_sub(limit).filter(|more| *more > 0) else {
            return Raise::Longest;
        };
        let limit_len = self.limit_len.load(Ordering::Relaxed) + 2 * more as usize * block_len;
        if limit_len > budget {
            return Raise::Spent;
        }
        self.limit_len.store(limit_len, Ordering::Relaxed);
        self.set_limit(class, new, self.heat(class));
        #[cfg(not(feature = "hardened"))]
        self.begins_to_check(class);
        self.add_room(class, most_for(new) - most_for(limit));
        Raise::Done
    }

    /// Notes that the class took a slow path.
    pub(crate) fn warm(&self, class: SizeClass) {
        self.set_limit(class, self.limit(class), HEAT);
    }

    /// Halves the limit of the class whose turn it is (not `but`), unless it was busy lately; if `all`, in any case.
    /// Gives the class if it has blocks, which have to return to their slabs first: it is its turn again then. Looks at
    /// every class at most once.
    pub(crate) fn lower_limit(&self, but: SizeClass, all: bool) -> Option<SizeClass> {
        for _ in 0..CLASS_COUNT {
            let turn = self.victim.load(Ordering::Relaxed);
            let class = SizeClass::from_index(turn as usize).filter(|class| *class != but && self.limit(*class) > 0);
            let is_cold = |class: SizeClass| all || self.heat(class) == 0;
            if let Some(full) = class.filter(|class| is_cold(*class) && self.count(*class) > 0) {
                return Some(full);
            }
            self.victim.store(if turn as usize + 1 < CLASS_COUNT { turn + 1 } else { 0 }, Ordering::Relaxed);
            if let Some(class) = class {
                let limit = self.limit(class);
                match self.heat(class).checked_sub(1) {
                    Some(less) if !all => self.set_limit(class, limit, less),
                    _ => self.shorten(class, limit / 2),
                }
                return None;
            }
        }
        None
    }

    /// Lowers the class's limit; it has no more blocks than the new one allows.
    fn shorten(&self, class: SizeClass, limit: u32) {
        let old = self.limit(class);
        self.set_limit(class, limit, self.heat(class));
        self.add_room(class, most_for(limit).wrapping_sub(most_for(old)));
        let len = 2 * (old - limit) as usize * class.block_len();
        self.limit_len.store(self.limit_len.load(Ordering::Relaxed).wrapping_sub(len), Ordering::Relaxed);
    }

    /// Takes both of the class's lists out, and with them its limit.
    pub(crate) fn empty(&self, class: SizeClass) -> [List; 2] {
        let lists = [self.take_list(class), self.take_spare(class)];
        self.shorten(class, 0);
        lists
    }

    /// Whether the limits allow more bytes than the budget, which shrinks when the heap does.
    pub(crate) fn is_over(&self, budget: usize) -> bool {
        self.limit_len.load(Ordering::Relaxed) > budget
    }

    /// Checks C1 to C3. By the holder; as long as the cache is full.
    pub(crate) fn verify(&self) -> bool {
        SizeClass::all().all(|class| self.verify_class(class)) && self.verify_limits()
    }

    /// Checks C1 and C2 of one class. By the holder.
    pub(crate) fn verify_class(&self, class: SizeClass) -> bool {
        let (hot, cold, spare_count) = (self.hot(class), self.cold(class), self.spare_count(class));
        let (most, room) = (self.most(class), hot.room.load(Ordering::Relaxed));
        let listed = most.checked_sub(spare_count).and_then(|count| count.checked_sub(room));
        listed.is_some_and(|count| self.has_length(hot.head.load(Ordering::Relaxed), count))
            && self.has_length(cold.spare.load(Ordering::Relaxed), spare_count)
    }

    /// Checks C3. By the holder.
    pub(crate) fn verify_limits(&self) -> bool {
        let sum: usize = SizeClass::all().map(|class| 2 * self.limit(class) as usize * class.block_len()).sum();
        sum == self.limit_len.load(Ordering::Relaxed)
    }

    /// Whether `count` blocks are linked from `head` on. By the holder.
    fn has_length(&self, head: *mut u8, count: u32) -> bool {
        let mut block = head;
        for _ in 0..count {
            let Some(here) = NonNull::new(block) else { return false };
            // SAFETY: the holder of the cache owns the blocks in its lists (C1, C2), whom we are.
            let Some(next) = (unsafe { crate::slab::block::next(here, self.key.get()) }) else { return false };
            block = next;
        }
        block.is_null()
    }
}

/// A swap by the only writer: two plain instructions instead of a locked one.
trait SwapRelaxed {
    fn swap_relaxed(&self, new: *mut u8) -> *mut u8;
}

impl SwapRelaxed for AtomicPtr<u8> {
    fn swap_relaxed(&self, new: *mut u8) -> *mut u8 {
        let old = self.load(Ordering::Relaxed);
        self.store(new, Ordering::Relaxed);
        old
    }
}

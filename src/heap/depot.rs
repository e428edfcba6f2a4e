//! The slow paths that need no provider: between caches, partial slabs and pages.
//!
//! ```text
//! refill ─ previous magazine │ obtain ─ own bin → new slab → any other bin
//! spill  ─ flush a part of the previous magazine ─ blocks grouped by slab, each group returned by one push
//! ```
//! The order in `obtain` is "own, then new, then others": a slab that another CPU works with is left to it while there
//! are free pages, since two CPUs that deal out one slab's blocks share its cache lines. Price: memory that others
//! could use waits in their shards until the pages run out.
//!
//! What runs here may hold a cache, and takes locks one at a time, by trying. Nothing here calls the kernel. Lists may
//! have hundreds of blocks, each the last of its slab; so they return to their slabs a few ([`return_batch`],
//! [`RETURN_SLABS`]) a hold: of a class that has no room left, or gives way to one, one part a call.
//!
//! A *nested* caller interrupted the heap on this CPU, or may have. It takes single blocks straight from the slabs,
//! prefers the spare shards (one for each level of nesting that a CPU has: interrupt, NMI, machine check) where its own
//! shard's lock is held, and takes on no duty that needs a lock.

use core::ops::RangeInclusive;
use core::ptr::NonNull;

use crate::base::size_class::{CLASS_COUNT, SizeClass};
use crate::base::sync::{AtomicUsize, Counter, InHand, Level, Ordering, summed};
use crate::base::trace::{Event, Hook, Kind};
use crate::base::tuning::{
    AMPLE_CACHE_LEN, CACHED_SHARES, CLASS_SHARE, LARGER_HEAP_LEN, LEAST_BATCH, LONG_BLOCKS, LONG_SLAB_SHARE,
    MAX_LONG_SLAB_LEN, MAX_MISSED_LEN, MAX_SLAB_LEN, MIN_SLAB_LEN, MISSED_SHARE, RELEASED_SLABS, RESERVE_SHARE,
    RETURN_BATCH, RETURN_LEN, RETURN_SLABS, SLAB_SHARES, SMALL_HEAP_LEN, SPARSE_CACHED_SHARE, SPARSE_SHARE,
    STATES_LOOK, TIGHT_SHARE,
};
use crate::cache::table::{AtRest, CpuState, CpuTable};
use crate::cache::{CpuCache, Raise, Tally};
use crate::harden::Damage;
#[cfg(feature = "hardened")]
use crate::harden::{Misuse, Report, Watch};
use crate::pages::{Chunk, Kind as RunKind, Pages, Refused, Run, RunCache, Step, Use, Want, granule_shift};
use crate::slab::block::{Block, Chain, List};
use crate::slab::free_blocks::Places;
use crate::slab::list::{Bin, Busy, Shard, Sweep};
use crate::slab::word::{MAX_OWNERS, Slab, slab_len};

/// Shards that belong to no CPU: for nested callers, and for CPUs without an index.
pub(crate) const SPARE_SHARDS: usize = 3;

/// Shards of the page heap. As many as CPUs were a third of the struct; each CPU keeps the run it freed last, so pools
/// are asked for what lengths do not repeat.
const PAGE_SHARDS: usize = 4;

/// A slab has at most this many blocks, if it is longer than a granule: one block that stays then keeps little, and all
/// that are free can be looked at in one hold to join neighbours.
const MAX_SLAB_BLOCKS: usize = Places::MOST;

/// Slabs that one flush gathers blocks for at a time.
const GROUPS: usize = 8;

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    /// The CPU's index; at or above the heap's CPU count if it has no cache.
    pub(crate) index: usize,
    /// It interrupted the heap on this CPU, or may have.
    pub(crate) nested: bool,
}

/// The heap but for the provider and the CPU identity. All zero is the valid empty state.
#[derive(Debug)]
pub(crate) struct Engine<const CPUS: usize> {
    pub(crate) cpus: CpuTable<CPUS>,
    spare_shards: [Shard; SPARE_SHARDS],
    pub(crate) pages: Pages<PAGE_SHARDS>,
    /// Blocks that went past the caches.
    loose: [Tally; CLASS_COUNT],
    /// Blocks in use that serve a class less those of its slabs that serve other classes; below 0 it wraps.
    fallback: [Counter; CLASS_COUNT],
    /// The owner where neighbours are looked for next.
    pub(crate) join_turn: AtomicUsize,
    /// Contexts that have blocks or a slab in hand which others do not find meanwhile.
    pub(crate) in_hand: InHand,
    /// By class, how far the search for neighbours has come; 0: it begins.
    join_positions: [AtomicUsize; CLASS_COUNT],
    /// Bytes in slabs, by class.
    slab_lens: [Level; CLASS_COUNT],
    /// Caches in use: what the budget is divided by.
    used_caches: AtomicUsize,
    /// What all caches together may hold in a heap that shrinks, in bytes; 0: as usual.
    cached_limit: AtomicUsize,
    /// Caches of CPUs that have gone.
    gone_caches: AtomicUsize,
    /// Frees of what this heap never gave.
    stray_count: Counter,
    pub(crate) trace: Hook,
    /// Blocks in use that came from a slab of longer ones.
    #[cfg(feature = "hardened")]
    pub(crate) fallback_count: Counter,
    #[cfg(feature = "hardened")]
    pub(crate) watch: Watch,
}

/// The most blocks of the class that one flush returns.
#[expect(clippy::cast_possible_truncation, reason = "at most a batch")]
fn return_batch(class: SizeClass) -> u32 {
    (RETURN_LEN / class.block_len()).min(RETURN_BATCH as usize).max(LEAST_BATCH as usize) as u32
}

/// Blocks of one slab on their way back to slabs.
pub(crate) struct Group<'a> {
    pub(crate) slab: Slab<'a>,
    pub(crate) chain: Chain,
}

impl<const CPUS: usize> Engine<CPUS> {
    pub(crate) const fn new() -> Self {
        const { assert!(CPUS >= 1 && CPUS + SPARE_SHARDS <= MAX_OWNERS, "a heap is for 1 to 65,533 CPUs") };
        Self {
            cpus: CpuTable::new(),
            spare_shards: [const { Shard::new() }; SPARE_SHARDS],
            pages: Pages::new(),
            loose: [const { Tally::new() }; CLASS_COUNT],
            fallback: [const { Counter::new(0) }; CLASS_COUNT],
            join_turn: AtomicUsize::new(0),
            in_hand: InHand::new(),
            join_positions: [const { AtomicUsize::new(0) }; CLASS_COUNT],
            slab_lens: [const { Level::new() }; CLASS_COUNT],
            used_caches: AtomicUsize::new(0),
            cached_limit: AtomicUsize::new(0),
            gone_caches: AtomicUsize::new(0),
            stray_count: Counter::new(0),
            trace: Hook::new(),
            #[cfg(feature = "hardened")]
            fallback_count: Counter::new(0),
            #[cfg(feature = "hardened")]
            watch: Watch::new(),
        }
    }

    /// A CPU's cache, if it has one.
    pub(crate) fn cache(&self, index: usize) -> Option<&CpuCache> {
        self.cpus.cache(index)
    }

    /// Every CPU's cache.
    pub(crate) fn caches(&self) -> impl Iterator<Item = &CpuCache> {
        self.cpus.iter().map(|(_, cache, _)| cache)
    }

    /// The run cache of the CPU that has that cache.
    #[inline]
    pub(crate) fn run_cache<'a>(&'a self, cache: &'a CpuCache) -> &'a RunCache {
        cache.run_cache().unwrap_or(self.pages.first_run_cache())
    }

    /// Gives a CPU its cache, if it has none and the heap is long enough; true if it got one. The caller holds the
    /// CPU's mark.
    pub(crate) fn add_cpu(&self, index: usize) -> bool {
        let len = size_of::<CpuState>();
        if index >= CPUS || self.cpus.has(index) || !self.cpus.has_room(self.pages.held_len(), len) {
            return false;
        }
        let may_part = self.cpus.has_waited();
        let others = self.cpus.places().take(STATES_LOOK);
        let Some(run) = self.pages.alloc_own(len, align_of::<CpuState>(), others, may_part) else {
            self.cpus.note_wait();
            return false;
        };
        self.cpus.install(index, run, |run_cache| self.pages.add_run_cache(run_cache));
        true
    }

    /// Takes their caches and slabs' bins from all CPUs but the first, when those are empty, and gives the memory to
    /// the pages.
    pub(crate) fn remove_cpus(&self, rest: &AtRest) {
        let is_idle = |cache: &CpuCache| SizeClass::all().all(|class| cache.count(class) == 0);
        let is_unused = |shard: &Shard| SizeClass::all().all(|class| shard.bin(class).looks_empty());
        if self.cpus.iter().skip(1).any(|(_, cache, shard)| !is_idle(cache) || !is_unused(shard)) {
            return;
        }
        // A slab that is full is in no bin, and still at owner there.
        if SizeClass::all().any(|class| self.slab_len(class).get() > 0) {
            return;
        }
        for (_, cache, _) in self.cpus.iter().skip(1) {
            cache.forget_addr();
            for class in SizeClass::all() {
                self.loose(class).add(cache.tally(class));
            }
            self.used_caches.fetch_sub(usize::from(cache.is_used()), Ordering::Relaxed);
            self.gone_caches.fetch_sub(usize::from(cache.is_gone()), Ordering::Relaxed);
        }
        self.pages.forget_run_caches();
        let free = |state: NonNull<CpuState>| {
            let run = self.pages.lookup(state.cast()).and_then(|chunk| chunk.head_of(state.cast()));
            run.into_iter().for_each(|run| self.pages.free_own(run));
        };
        self.cpus.take_out(rest, free);
    }

    /// Owners: one for each CPU up to the last that has its own bins, and the spare ones.
    pub(crate) fn owner_count(&self) -> usize {
        self.cpus.end() + SPARE_SHARDS
    }

    /// The owner with that number, below [`owner_count`](Self::owner_count).
    pub(crate) fn owner(&self, number: usize) -> usize {
        let end = self.cpus.end();
        if number < end { number } else { CPUS.wrapping_add(number.wrapping_sub(end)) }
    }

    /// All bins.
    pub(crate) fn bin_count(&self) -> usize {
        self.owner_count() * CLASS_COUNT
    }

    pub(crate) fn stray_count(&self) -> u64 {
        self.stray_count.load(Ordering::Relaxed)
    }

    /// The shard with that number; numbers beyond the last one mean the first.
    fn shard(&self, owner: usize) -> &Shard {
        let [first, ..] = &self.spare_shards;
        self.cpus.shard(owner).or_else(|| self.spare_shards.get(owner.wrapping_sub(CPUS))).unwrap_or(first)
    }

    pub(crate) fn bin(&self, owner: usize, class: SizeClass) -> &Bin {
        self.shard(owner).bin(class)
    }

    /// Every owner, with its bin of the class.
    pub(crate) fn bins(&self, class: SizeClass) -> impl Iterator<Item = (usize, &Bin)> {
        let own = self.cpus.iter().map(move |(index, _, shard)| (index, shard.bin(class)));
        own.chain((CPUS..).zip(&self.spare_shards).map(move |(owner, shard)| (owner, shard.bin(class))))
    }

    #[expect(clippy::indexing_slicing, reason = "a class's index is below CLASS_COUNT")]
    fn loose(&self, class: SizeClass) -> &Tally {
        &self.loose[class.index()]
    }

    #[expect(clippy::indexing_slicing, reason = "a class's index is below CLASS_COUNT")]
    pub(crate) fn fallback(&self, class: SizeClass) -> &Counter {
        &self.fallback[class.index()]
    }

    #[expect(clippy::indexing_slicing, reason = "a class's index is below CLASS_COUNT")]
    pub(crate) fn join_position(&self, class: SizeClass) -> &AtomicUsize {
        &self.join_positions[class.index()]
    }

    /// The bins of one CPU.
    pub(crate) fn own_bin(&self, index: usize, class: SizeClass) -> Option<&Bin> {
        self.cpus.shard(index).map(|shard| shard.bin(class))
    }

    /// Bytes in slabs of the class.
    #[expect(clippy::indexing_slicing, reason = "a class's index is below CLASS_COUNT")]
    pub(crate) fn slab_len(&self, class: SizeClass) -> &Level {
        &self.slab_lens[class.index()]
    }

    /// Whether some slab has that class now.
    pub(crate) fn has_slabs(&self, class: SizeClass) -> bool {
        self.slab_len(class).get() > 0
    }

    /// The classes that have slabs now.
    pub(crate) fn classes(&self) -> impl Iterator<Item = SizeClass> {
        SizeClass::all().filter(|class| self.has_slabs(*class))
    }

    /// Blocks that serve the class and are not in slabs: in use, or in a cache.
    pub(crate) fn served_count(&self, class: SizeClass) -> u64 {
        summed(self.out_count(class).wrapping_add(self.fallback(class).load(Ordering::Relaxed)))
    }

    /// Blocks of the class's slabs that are not there: in use, or in a cache.
    pub(crate) fn out_count(&self, class: SizeClass) -> u64 {
        let tallies = self.caches().map(|cache| cache.tally(class)).chain([self.loose(class)]);
        let lost = self.bins(class).map(|(_, bin)| bin.damage.lost_count()).sum();
        let out = |out: u64, (taken, pushed)| out.wrapping_add(taken).wrapping_sub(pushed);
        summed(tallies.map(Tally::get).fold(lost, out))
    }

    fn trace_batch(&self, kind: Kind, class: SizeClass, count: u32) {
        self.trace.record(|| Event { kind, addr: class.block_len(), len: count as usize, align: 1 });
    }

    // Up: blocks for a caller.

    /// The slow path of `alloc` with the cache held: fills the class's list and gives one block.
    pub(crate) fn refill(&self, cache: &CpuCache, class: SizeClass, caller: Caller) -> Result<Block, Refused> {
        self.report_damage(&cache.damage);
        let spare = cache.take_spare(class);
        if spare.count() > 0 {
            cache.fill(class, spare);
            return cache.pop(class).ok_or(Refused::Empty);
        }
        self.tune(cache, class, caller);
        let limit = cache.limit(class);
        let mut list = self.obtain(class, limit.max(1), caller, Some(cache))?;
        cache.counts.refill();
        self.trace_batch(Kind::Refill, class, list.count());
        let block = list.pop();
        if list.count() > 0 {
            cache.fill(class, list);
        }
        block.ok_or(Refused::Empty)
    }

    /// One block past the caches, for a caller that has none or finds its own busy.
    pub(crate) fn obtain_one(&self, class: SizeClass, caller: Caller) -> Result<Block, Refused> {
        self.obtain(class, 1, caller, None)?.pop().ok_or(Refused::Empty)
    }

    /// One block out of a run that the caller got from the provider for this purpose.
    pub(crate) fn adopt(&self, run: Run<'_>, class: SizeClass, caller: Caller) -> Option<Block> {
        let mut list = self.create_slab(run, class, 1, self.owner_for(class, caller))?;
        self.count_taken(None, class, list.count());
        list.pop()
    }

    /// Up to `most` blocks, at least one: from the own bin or what CPUs left that have gone, else from a new slab, else
    /// from any other bin, else joined. Counted as taken at the cache, if there is one.
    fn obtain(&self, class: SizeClass, most: u32, caller: Caller, cache: Option<&CpuCache>) -> Result<List, Refused> {
        let list = match self.obtain_cut(class, most, caller) {
            Ok(list) => list,
            Err(refused) => return self.join(class, most, caller, cache, true).ok_or(refused),
        };
        self.count_taken(cache, class, list.count());
        Ok(list)
    }

    /// Counts blocks that left slabs of the class.
    pub(crate) fn count_taken(&self, cache: Option<&CpuCache>, class: SizeClass, count: u32) {
        match cache {
            Some(cache) => cache.count_taken(class, count),
            None => self.loose(class).taken_by_any(count),
        }
    }

    /// Blocks of the class's own slabs.
    fn obtain_cut(&self, class: SizeClass, most: u32, caller: Caller) -> Result<List, Refused> {
        let owner = self.owner_for(class, caller);
        let own = self.bin(owner, class);
        let taken = own.take(most, !caller.nested);
        self.report_damage(&own.damage);
        if let Ok(Some(list)) = taken {
            return Ok(list);
        }
        if let Some(list) = self.obtain_left(class, most) {
            return Ok(list);
        }
        let mut refused = match self.slab_run(class, caller) {
            Ok(run) => {
                own.missed.found();
                return self.create_slab(run, class, most, owner).ok_or(Refused::Empty);
            }
            Err(refused) => refused,
        };
        for (_, bin) in self.bins(class) {
            let taken = bin.take(most, false);
            self.report_damage(&bin.damage);
            match taken {
                Ok(Some(list)) => return Ok(list),
                Ok(None) => {}
                Err(Busy) => refused = Refused::Busy,
            }
        }
        Err(refused)
    }

    /// Blocks of slabs that are owned by a CPU that has gone.
    fn obtain_left(&self, class: SizeClass, most: u32) -> Option<List> {
        if self.gone_caches.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let gone = self.cpus.iter().filter(|(_, cache, _)| cache.is_gone());
        gone.map(|(_, _, shard)| shard.bin(class)).find_map(|bin| bin.take(most, false).ok().flatten())
    }

    /// The shard that the caller works with: its own; if that is locked under a nested caller, or if it has none, a
    /// spare one.
    pub(crate) fn owner_for(&self, class: SizeClass, caller: Caller) -> usize {
        let is_own = self.cpus.has(caller.index);
        if is_own && !(caller.nested && self.bin(caller.index, class).looks_busy()) {
            return caller.index;
        }
        (CPUS..CPUS + SPARE_SHARDS).find(|owner| !self.bin(*owner, class).looks_busy()).unwrap_or(CPUS)
    }

    /// What a new slab of the class needs.
    pub(crate) fn slab_want(&self, class: SizeClass) -> Want {
        let held_len = self.pages.worked_len();
        let granule = 1 << granule_shift(held_len, held_len);
        let class_len = self.slab_len(class).get();
        let target = slab_target(class, held_len).min(class_len / CLASS_SHARE).max(granule);
        let tight_len = if held_len <= SMALL_HEAP_LEN { 0 } else { class_len / TIGHT_SHARE };
        Want {
            len: slab_len(class, granule, target, tight_len),
            least_len: class.block_len().next_multiple_of(MIN_SLAB_LEN),
            align: class.block_align(),
            use_: Use::Slab,
        }
    }

    fn slab_run(&self, class: SizeClass, caller: Caller) -> Result<Run<'_>, Refused> {
        let Want { len, least_len, align, use_ } = self.slab_want(class);
        let alloc = |len| self.pages.alloc(len, align, use_, caller.index, !caller.nested);
        alloc(len).or_else(|refused| if len > least_len { alloc(least_len) } else { Err(refused) })
    }

    /// Blocks from a new slab, which joins the owner's bin if it has more.
    fn create_slab(&self, run: Run<'_>, class: SizeClass, most: u32, owner: usize) -> Option<List> {
        self.slab_len(class).add(run.len);
        let slab = Slab::create(run, class, owner);
        let taken = slab.take(most)?;
        if !taken.exhausted {
            self.bin(owner, class).enlist(slab);
        }
        let mut list = List::new();
        list.prepend(taken.chain);
        Some(list)
    }

    // Down: blocks that return to their slabs.

    /// The slow path of `free` with the cache held: makes room in the class's list, or gives the block back.
    pub(crate) fn spill(&self, cache: &CpuCache, class: SizeClass, block: Block, caller: Caller) {
        self.tune(cache, class, caller);
        let Err(block) = cache.push(class, block) else { return };
        if cache.limit(class) > 0 {
            self.flush_part(cache, class, caller);
        }
        if let Err(block) = cache.push(class, block) {
            self.give_back(class, block, Some(cache), caller);
        }
    }

    /// Returns a part of the class's blocks, those used longest ago, to their slabs. What stays of them is the previous
    /// magazine.
    fn flush_part(&self, cache: &CpuCache, class: SizeClass, caller: Caller) {
        let mut older = cache.take_older(class);
        self.report_damage(&cache.damage);
        self.flush(class, &mut older, Some(cache), caller);
        cache.set_spare(class, older);
    }

    /// Gives one block that served `class` back to its slab. Callable from any context, always succeeds.
    pub(crate) fn give_back<'a>(&'a self, class: SizeClass, block: Block, cache: Option<&'a CpuCache>, caller: Caller) {
        match self.slab_of(block.start(), cache) {
            Some(slab) => self.return_blocks(self.group_of(slab, class, block), cache, caller),
            None => self.free_run(class, block.start()),
        }
    }

    /// Frees the page run that a block of the class is, which had shrunk; anything else there was never given.
    #[cold]
    fn free_run(&self, class: SizeClass, start: NonNull<u8>) {
        let desc = self.pages.lookup(start).and_then(|chunk| chunk.head_of(start));
        match desc.filter(|desc| desc.kind() == RunKind::Large && Chunk::start_of(desc) == start) {
            Some(desc) => {
                self.fallback(class).fetch_sub(1, Ordering::Relaxed);
                self.pages.free(desc);
            }
            None => self.count_stray(),
        }
    }

    /// Gives the first blocks of a list, which served `class`, back to their slabs, each group of one slab by one push;
    /// as many as a hold may.
    #[expect(clippy::indexing_slicing, reason = "the slot is taken modulo the length")]
    pub(crate) fn flush<'a>(&'a self, class: SizeClass, list: &mut List, cache: Option<&'a CpuCache>, caller: Caller) {
        let rest = list.count().saturating_sub(return_batch(class));
        if let Some(cache) = cache.filter(|_| list.count() > 0) {
            cache.counts.flush();
        }
        // In registers while blocks are popped.
        let mut left = core::mem::take(list);
        let mut groups: [Option<Group<'_>>; GROUPS] = [const { None }; GROUPS];
        // The last block's slab, whose neighbours mostly follow: where it lies, and its group.
        let (mut near, mut slot) = (0..0, 0);
        let mut sent = 0;
        while sent < RETURN_SLABS {
            let Some(block) = left.pop_beyond(rest) else { break };
            if let Some(group) = groups[slot].as_mut().filter(|_| near.contains(&block.start().as_ptr().addr())) {
                group.chain.push(block);
                continue;
            }
            let Some(slab) = self.slab_of(block.start(), cache) else {
                self.free_run(class, block.start());
                sent += 1;
                continue;
            };
            if slab.class() != class {
                self.return_blocks(self.group_of(slab, class, block), cache, caller);
                sent += 1;
                continue;
            }
            (near, slot) = (slab.addrs(), slab.desc().index() % GROUPS);
            let place = &mut groups[slot];
            match place {
                Some(group) if core::ptr::eq(group.slab.desc(), slab.desc()) => group.chain.push(block),
                _ => {
                    if let Some(group) = place.replace(Group { slab, chain: Chain::new(block) }) {
                        self.return_blocks(group, cache, caller);
                        sent += 1;
                    }
                }
            }
        }
        for group in groups.into_iter().flatten() {
            self.return_blocks(group, cache, caller);
        }
        #[cfg(feature = "hardened")]
        if let Some(at) = left.first().filter(|_| sent < RETURN_SLABS && left.count() > rest) {
            // What is behind a damaged link is lost.
            left = List::new();
            self.report(Misuse::CorruptLink, at);
        }
        *list = left;
    }

    /// Reports blocks that were lost since the last time.
    #[cfg(feature = "hardened")]
    #[inline]
    fn report_damage(&self, damage: &Damage) {
        if let Some(at) = damage.take() {
            self.report(Misuse::CorruptLink, at);
        }
    }

    /// Nothing is lost where nothing is checked.
    #[cfg(not(feature = "hardened"))]
    #[inline]
    fn report_damage(&self, _: &Damage) {}

    #[cfg(feature = "hardened")]
    pub(crate) fn report(&self, misuse: Misuse, at: NonNull<u8>) {
        if misuse == Misuse::ForeignPointer {
            self.count_stray();
        }
        self.watch.report(Report::new(misuse, at.as_ptr().addr()));
    }

    /// Pushes a group onto its slab and does what that obliges to.
    pub(crate) fn return_blocks(&self, group: Group<'_>, cache: Option<&CpuCache>, caller: Caller) {
        let Group { slab, chain } = group;
        // Read before the push: afterwards the slab may be gone.
        let (class, bin) = (slab.class(), self.bin(slab.owner(), slab.class()));
        match cache {
            Some(cache) => cache.count_pushed(class, chain.count()),
            None => self.loose(class).pushed_by_any(chain.count()),
        }
        if cache.is_some() {
            self.trace_batch(Kind::Flush, class, chain.count());
        }
        let duty = slab.push(chain, caller.nested);
        if duty.enlist {
            bin.enlist(slab);
        }
        if duty.settle {
            let surplus = bin.settle(slab, &self.reserve_counts(slab));
            surplus.into_iter().flatten().for_each(|slab| self.dissolve(slab));
        }
    }

    /// Gives an empty slab, owned, back to the pages.
    fn dissolve(&self, slab: Slab<'_>) {
        if slab.has_parts() {
            self.free_parts(slab);
        }
        self.slab_len(slab.class()).sub(Chunk::run_len(slab.desc()));
        #[cfg(feature = "debug-heap")]
        slab.wipe();
        #[cfg(feature = "hardened")]
        slab.dissolve();
        self.pages.release(slab.desc(), slab.desc().tag());
    }

    /// How many empty slabs a bin keeps, least and most. Counted by the length that new ones have: shorter ones fill
    /// what is left over in chunks, and if as many of them were kept as have the same length together, they would keep
    /// a chunk each.
    #[expect(clippy::cast_possible_truncation, reason = "a share of the bytes held over at least 1 KiB")]
    fn reserve_counts(&self, slab: Slab<'_>) -> RangeInclusive<u32> {
        let worked_len = self.pages.worked_len();
        let slab_len = slab_target(slab.class(), worked_len).max(Chunk::run_len(slab.desc())).max(1);
        let own_len = worked_len / self.used_count();
        let places = |len: usize| (len / slab_len).max(1) as u32;
        places(own_len / RESERVE_SHARE)..=places((own_len / MISSED_SHARE).min(MAX_MISSED_LEN))
    }

    /// Counts a free of what this heap never gave; nothing else happens to it.
    pub(crate) fn count_stray(&self) {
        self.stray_count.fetch_add(1, Ordering::Relaxed);
    }

    /// The slab that a block lies in; `cache`, which the caller holds, remembers in which chunk the last one was.
    #[inline]
    pub(crate) fn slab_of<'a>(&'a self, block: NonNull<u8>, cache: Option<&'a CpuCache>) -> Option<Slab<'a>> {
        let head = match cache {
            Some(cache) => Chunk::head(self.pages.desc(&cache.chunk_hints, block)?),
            None => self.pages.lookup(block)?.head_of(block),
        };
        Slab::of(head?)
    }

    // Limits.

    fn used_count(&self) -> usize {
        self.used_caches.load(Ordering::Relaxed).max(1)
    }

    pub(crate) fn is_ample(&self) -> bool {
        self.pages.is_ample()
    }

    /// Notes whether the provider last gave what the heap wished for.
    pub(crate) fn set_ample(&self, ample: bool) {
        self.pages.set_ample(ample);
    }

    /// What one cache may hold, in bytes.
    fn budget(&self) -> usize {
        let (held_len, used_count) = (self.pages.worked_len(), self.used_count());
        let share = share_of(held_len, CACHED_SHARES) / used_count;
        let ample = self.is_ample() && held_len >= LARGER_HEAP_LEN;
        let budget = if ample { share.max(AMPLE_CACHE_LEN.min(held_len / 2 / used_count)) } else { share };
        match self.cached_limit.load(Ordering::Relaxed) {
            0 => budget,
            limit => budget.min(limit / used_count),
        }
    }

    /// Bytes in slabs, and in blocks that are not there: in use, or in a cache. Takes as long as there are classes and
    /// CPUs.
    fn slab_lens(&self) -> (usize, usize) {
        let out_len = |class: SizeClass| usize::try_from(self.out_count(class)).unwrap_or(0) * class.block_len();
        let add = |(held, out): (usize, usize), class| (held + self.slab_len(class).get(), out + out_len(class));
        self.classes().fold((0, 0), add)
    }

    /// Whether slabs are mostly free blocks, so that the few which wait in caches may keep more pages than they are
    /// worth: caches then hold little until [`grows`](Self::grows).
    pub(crate) fn shrinks(&self) -> bool {
        let (slab_len, out_len) = self.slab_lens();
        let shrinks = slab_len > LARGER_HEAP_LEN && out_len < slab_len / SPARSE_SHARE;
        if shrinks {
            self.cached_limit.store((out_len / SPARSE_CACHED_SHARE).max(1), Ordering::Relaxed);
        }
        shrinks
    }

    /// New pages came: caches hold as much as they do else.
    pub(crate) fn grows(&self) {
        if self.cached_limit.load(Ordering::Relaxed) != 0 {
            self.cached_limit.store(0, Ordering::Relaxed);
        }
    }

    /// Raises the class's limit, or lowers that of one that was not busy lately, so that a later attempt succeeds; of
    /// which a part of its blocks returns to their slabs, if it has too many.
    fn tune(&self, cache: &CpuCache, class: SizeClass, caller: Caller) {
        if cache.is_new() {
            self.used_caches.fetch_add(1, Ordering::Relaxed);
            if cache.comes_back() {
                self.gone_caches.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let key = self.pages.key.get();
        // The key comes with the first chunk, and a huge block may come before. Without one no link may be written.
        let budget = if key.is_some() { self.budget() } else { 0 };
        cache.set_key(key);
        let raise = cache.raise_limit(class, budget);
        cache.warm(class);
        let is_over = cache.is_over(budget);
        if raise == Raise::Spent || is_over {
            let full = cache.lower_limit(class, is_over);
            full.into_iter().for_each(|full| self.flush_part(cache, full, caller));
        }
    }

    /// Notes that the CPU of this cache, which is empty, has gone; until it uses the heap again, what is owned there
    /// serves every other one first.
    pub(crate) fn retire(&self, cache: &CpuCache) {
        cache.forget_addr();
        if cache.goes() {
            self.gone_caches.fetch_add(1, Ordering::Relaxed);
            self.used_caches.fetch_sub(1, Ordering::Relaxed);
        }
    }

    // Back to the pages.

    /// Gives the reserves of empty slabs to the pages, a slab a step; true if there was one.
    pub(crate) fn release_reserves(&self, step: Step<'_>) -> bool {
        let mut any = false;
        for bin in self.classes().flat_map(|class| self.bins(class)).map(|(_, bin)| bin) {
            bin.missed.forget();
            while bin.has_whole() {
                let (mut released, _in_hand) = (false, self.in_hand.begin());
                step(&mut |_| released = bin.take_empty().map(|slab| self.dissolve(slab)).is_some());
                if !released {
                    break;
                }
                any = true;
            }
        }
        any
    }

    /// Finds empty slabs among the partial ones too, a few a step, and gives all to the pages. False: some bin was
    /// locked, or got another one meanwhile.
    pub(crate) fn release_empty(&self, step: Step<'_>) -> bool {
        let mut is_complete = true;
        for bin in self.classes().flat_map(|class| self.bins(class)).map(|(_, bin)| bin) {
            let (mut left, mut sweep) = (u32::MAX, Sweep::More);
            while sweep == Sweep::More && !bin.looks_empty() {
                step(&mut |_| sweep = bin.sweep(&mut left));
            }
            is_complete &= sweep != Sweep::Busy;
        }
        self.release_reserves(step);
        self.pages.drain_deferred(step);
        is_complete && !self.classes().flat_map(|class| self.bins(class)).any(|(_, bin)| bin.has_whole())
    }

    /// [`release_empty`](Self::release_empty) for one bin, by its number of all [`bin_count`](Self::bin_count): looks
    /// at the next few slabs, and keeps one empty one.
    pub(crate) fn release_from(&self, number: usize, step: Step<'_>) {
        let Some(class) = SizeClass::from_index(number % CLASS_COUNT) else { return };
        let bin = self.bin(self.owner(number / CLASS_COUNT), class);
        if bin.looks_empty() {
            return;
        }
        bin.missed.forget();
        step(&mut |_| _ = bin.sweep(&mut { u32::MAX }));
        for _ in 0..RELEASED_SLABS {
            let mut released = false;
            step(&mut |_| released = bin.take_surplus(1).map(|slab| self.dissolve(slab)).is_some());
            if !released {
                break;
            }
        }
    }
}

/// How long a slab should be.
fn slab_target(class: SizeClass, held_len: usize) -> usize {
    let longest = (held_len / LONG_SLAB_SHARE).clamp(MAX_SLAB_LEN, MAX_LONG_SLAB_LEN);
    let most = longest.max(LONG_BLOCKS * class.block_len()).min(MAX_SLAB_BLOCKS * class.block_len());
    share_of(held_len, SLAB_SHARES).min(most)
}

/// The share of the bytes held that small and larger heaps spend on something.
fn share_of(held_len: usize, [small, larger]: [usize; 2]) -> usize {
    held_len / if held_len < LARGER_HEAP_LEN { small } else { larger }
}

#[cfg(test)]
mod tests;

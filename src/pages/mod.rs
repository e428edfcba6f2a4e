//! The page heap: page runs out of the provider's chunks, for slabs and for large blocks.
//!
//! ```text
//! Pages ── shard ── pool of slab chunks, pool of large chunks ── bins of free runs (bins)
//!   │                 each: one try-lock, a lock-free stack of deferred runs (pool)
//!   ├── for each CPU, the large run that it freed last (kept)
//!   └── chunk map: address -> chunk -> descriptor (chunk_map, chunk, desc)
//! ```
//!
//! Decisions, and what pays for each:
//! - *Shards with try-lock.* One lock over all runs becomes the whole heap's limit as soon as several CPUs use
//!   large blocks. A request starts at its own shard and moves on when that one is busy. Price: memory free in one
//!   shard is looked for by others only after their own; so the number of shards follows the bytes held, one below
//!   16 MiB and one more for each further 16 MiB, as many as chunks at most, and a lap over all of them comes before
//!   new pages. A region that is one chunk has one lock.
//! - *Slabs and large blocks in different chunks.* Slabs live long and are small; between large blocks they would
//!   keep those from merging. Price: one more chunk. Heaps below 16 MiB, of one chunk, or whose provider gave less than
//!   wished for mix them when one pool is out.
//! - *Nothing is ever waited for but within a bound*, and not at all if the caller does not allow it: a free that
//!   cannot have its pool's lock leaves the run on the pool's lock-free stack.
//! - *Nothing here calls the provider.* The heap above asks for pages and gives them in (`add_chunk`, `add_table`,
//!   `insert_huge`), and takes them out again in two steps (`take_empty`, then `chunk_gone` or `put_back`), with no
//!   lock held in between. Price: the caller writes that loop.
//! - *An empty chunk stays until another one is empty too* (`has_surplus`), or a block freed and allocated in
//!   turn at the end of a chunk would have its pages mapped and unmapped each time.
//!
//! Context: unless a function says otherwise, it never waits and can be called from any context, also from one that
//! interrupted another call at any instruction.

mod bins;
mod chunk;
mod chunk_map;
mod desc;
mod hint;
mod owned;
mod pool;
mod run_cache;
#[cfg(test)]
mod tests;
mod want;

use core::ops::Range;
use core::ptr::NonNull;

use crate::base::link::Link;
use crate::base::sync::{AtomicBool, AtomicUsize, Level, Ordering::Relaxed};
#[cfg(feature = "hardened")]
use crate::base::sync::{Ordering::Release, fence};
use crate::base::tuning::{
    DRAIN_HOLDS, FIRST_LEN, RELEASED_RUNS, ROUND_LIMIT, SHARD_LEN, SPARE_HEAP_LEN, SPARE_SHARE, SPARE_STEP,
};
use crate::contract::provider::PageRun;
use crate::harden::KeyCell;

pub(crate) use chunk::{Chunk, chunk_len_for, granule_shift};
pub(crate) use desc::{Kind, PageDesc};
pub(crate) use hint::ChunkHints;
pub(crate) use owned::{AtHand, EmptyChunk, GoneChunk, Idle, Mapping, Recalled, Run};
pub(crate) use pool::PageFault;
pub(crate) use run_cache::RunCache;
pub(crate) use want::{AddError, Provided, Refused, Use, Want};

use bins::MAX_RUN_LEN;
use chunk::Descs;
#[cfg(not(loom))]
use chunk_map::{Change, ChunkMap, Entry};
#[cfg(loom)]
pub(crate) use chunk_map::{Change, ChunkMap, Entry};
use desc::Tag;
use owned::hand_out;
use pool::{Open, Pool, Request, Told, check};
use run_cache::RunCacheList;

/// Lengths of runs that are set aside for contexts which find every lock held, as handlers do for as long as a holder
/// is preempted, or its virtual CPU stopped: each in a heap that used [`SPARE_SHARE`] times as much.
const SPARE_LENS: [usize; 13] = {
    const KIB: usize = 1 << 10;
    let (page, slab) = (4 * KIB, 16 * KIB);
    [page, page, page, page, page, page, page, page, slab, slab, slab, slab, 48 * KIB]
};
/// A shard's pool for large blocks.
const LARGE: usize = 1;
/// Does one bounded piece of work that takes locks, in the way the caller chose: with the CPU's cache held, so that a
/// context that interrupts it knows. The work is told whether it may wait.
pub(crate) type Step<'a> = &'a dyn Fn(&mut dyn FnMut(bool));

/// The page heap. All zero is the empty state.
#[derive(Debug)]
pub(crate) struct Pages<const N: usize> {
    /// What the links of free blocks are written under; made when the first chunk arrives.
    pub(crate) key: KeyCell,
    map: ChunkMap,
    /// Bytes that the provider has given and not taken back; P8.
    held_len: Level,
    /// Bytes of it that no block can have: tables of the map, descriptors, what a chunk's granules leave over, runs of
    /// the heap's own; P8.
    own_len: AtomicUsize,
    told: Told,
    /// Chunks that ever began to leave: what a [`ChunkHints`] is checked against.
    removals: AtomicUsize,
    /// Chunks that are here.
    chunk_count: AtomicUsize,
    /// Shards that requests are spread over; 0 means one.
    active: AtomicUsize,
    /// One more than the highest shard that ever had a chunk.
    used_shards: AtomicUsize,
    /// Requests stay with the chunks of their own kind.
    parted: AtomicBool,
    /// The provider last gave as much as the heap wished for.
    ample: AtomicBool,
    /// Each shard's pools: slabs, large.
    shards: [[Pool; 2]; N],
    /// The first CPU's cached run.
    first_run_cache: RunCache,
    /// The others' cached runs.
    kept: RunCacheList,
    /// Runs of kind `Deferred`, as long as [`SPARE_LENS`], for who finds every lock held, as a context may that
    /// interrupted the holder.
    spares: [Link<PageDesc>; SPARE_LENS.len()],
    /// The place for one that is looked at next.
    spare_turn: AtomicUsize,
}

/// A run as [`Pages::for_each_run`] shows it.
#[derive(Debug)]
pub(crate) struct RunInfo<'a> {
    pub(crate) desc: &'a PageDesc,
    /// Address of the chunk's first granule.
    pub(crate) chunk_start: usize,
    /// Bytes from there to the run.
    pub(crate) offset: usize,
    /// Bytes.
    pub(crate) len: usize,
    pub(crate) kind: Kind,
}

impl<const N: usize> Pages<N> {
    pub(crate) const fn new() -> Self {
        Self {
            key: KeyCell::new(),
            map: ChunkMap::new(),
            held_len: Level::new(),
            own_len: AtomicUsize::new(0),
            told: Told::new(),
            removals: AtomicUsize::new(0),
            chunk_count: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            used_shards: AtomicUsize::new(0),
            parted: AtomicBool::new(false),
            ample: AtomicBool::new(false),
            shards: [const { [const { Pool::new() }; 2] }; N],
            first_run_cache: RunCache::new(),
            kept: RunCacheList::new(),
            spares: [const { Link::new() }; SPARE_LENS.len()],
            spare_turn: AtomicUsize::new(0),
        }
    }

    /// Bytes that the provider has given: chunks, huge blocks, tables of the map.
    #[inline]
    pub(crate) fn held_len(&self) -> usize {
        self.held_len.get()
    }

    /// Bytes that the provider has given and that were used at some time: what the sizes of caches, slabs and reserves
    /// follow, so that a long region spends no more on them than a heap that grew to what is used of it. At first up to
    /// [`FIRST_LEN`].
    pub(crate) fn worked_len(&self) -> usize {
        let held_len = self.held_len();
        held_len.saturating_sub(self.told.untouched_len.load(Relaxed)).max(held_len.min(FIRST_LEN))
    }

    /// Bytes that the provider has given and that were used at some time.
    pub(crate) fn touched_len(&self) -> usize {
        self.held_len().saturating_sub(self.told.untouched_len.load(Relaxed))
    }

    pub(crate) fn chunk_count(&self) -> usize {
        self.chunk_count.load(Relaxed)
    }

    /// The most bytes that the provider had given at once.
    pub(crate) fn high_held_len(&self) -> usize {
        self.held_len.high()
    }

    /// Bytes that the page heap needs for itself, or cannot use.
    pub(crate) fn own_len(&self) -> usize {
        self.own_len.load(Relaxed)
    }

    /// Bytes in free runs; deferred ones are not counted. Takes as long as there are shards that ever had a chunk.
    pub(crate) fn free_len(&self) -> usize {
        self.shards.iter().take(self.used_shards.load(Relaxed)).flatten().map(Pool::free_len).sum()
    }

    /// Whether somebody holds a pool's lock. A guess.
    pub(crate) fn is_busy(&self) -> bool {
        self.pools().any(Pool::is_busy)
    }

    /// Shards that requests are spread over.
    #[inline]
    fn active(&self) -> usize {
        self.active.load(Relaxed).max(1)
    }

    pub(crate) fn is_ample(&self) -> bool {
        self.ample.load(Relaxed)
    }

    /// Notes whether the provider last gave what the heap wished for.
    pub(crate) fn set_ample(&self, ample: bool) {
        if self.is_ample() != ample {
            self.ample.store(ample, Relaxed);
            self.tune();
        }
    }

    /// Spreads requests over as many shards as what is held, and the number of chunks, is worth; and parts the kinds if
    /// there is enough of both. A guess, if others change that meanwhile.
    fn tune(&self) {
        let (held_len, chunk_count) = (self.held_len(), self.chunk_count());
        self.active.store(active_for(held_len, N).min(chunk_count), Relaxed);
        self.parted.store(held_len >= SHARD_LEN && chunk_count > 1 && self.is_ample(), Relaxed);
    }

    /// A chunk came, or one went.
    fn count_chunk(&self, came: bool) {
        if came {
            self.chunk_count.fetch_add(1, Relaxed);
        } else {
            self.chunk_count.fetch_sub(1, Relaxed);
        }
        self.tune();
    }

    /// About the longest free run, in bytes; pools whose lock is taken are left out.
    pub(crate) fn largest_free(&self) -> usize {
        self.pools().filter_map(|pool| self.open(pool, false)).map(|open| open.largest_free()).max().unwrap_or(0)
    }

    /// The pool that an allocation of `len` bytes looks at first, if its lock is free: the own kind's at `shard`, or
    /// while little is held, and that has nothing, the other kind's. `None` also if it has nothing, or no run is so
    /// long.
    #[inline(always)]
    fn open_near(&self, len: usize, use_: Use, shard: usize) -> Option<Open<'_>> {
        if len.wrapping_sub(1) >= MAX_RUN_LEN || use_ == Use::Grown && self.held_len() > SHARD_LEN {
            return None;
        }
        let active = self.active.load(Relaxed);
        let shard = if shard < active { shard } else { shard.checked_rem(active).unwrap_or(0) };
        let [slabs, large] = self.shards.get(shard)?;
        let (own, other) = if use_ == Use::Slab { (slabs, large) } else { (large, slabs) };
        if own.may_have(len) {
            self.open(own, false)
        } else if !self.parted.load(Relaxed) && other.may_have(len) {
            self.open(other, false)
        } else {
            None
        }
    }

    /// What [`alloc`](Self::alloc) nearly always comes to, at a fraction of the instructions: the first descriptor of a
    /// run that may still have to be handed out. Never waits. `align` is a power of two.
    #[inline(always)]
    fn alloc_near(&self, len: usize, align: usize, use_: Use, shard: usize) -> Option<&PageDesc> {
        let open = self.open_near(len, use_, shard)?;
        open.alloc_first(len.wrapping_sub(1), align, if use_ == Use::Slab { Kind::Slab } else { Kind::Large })
    }

    /// The run for a large block that the CPU keeps whose cache the caller holds, if it fits: no lock. `len` is not 0,
    /// `align` a power of two.
    #[inline(always)]
    pub(crate) fn reuse(&self, kept: &RunCache, len: usize, align: usize) -> Option<AtHand<'_>> {
        kept.reuse(len.wrapping_sub(1), align)
    }

    /// A run for a large block that lies at hand, by who holds that CPU's cache and could not [`reuse`](Self::reuse)
    /// what it keeps. Never waits. `align` is a power of two.
    #[inline(always)]
    pub(crate) fn cut(&self, kept: &RunCache, cpu: usize, len: usize, align: usize) -> Option<AtHand<'_>> {
        if !kept.is_empty() {
            self.release_kept_of(kept);
        }
        let run = self.alloc_near(len, align, Use::Large, cpu)?;
        kept.note_cut(run);
        Some(AtHand::new(run, None))
    }

    /// Lets the holder of that CPU's cache keep a run that is as long as `run`, a large block's, if none is kept.
    pub(crate) fn note_cut(&self, kept: &RunCache, run: &PageDesc) {
        if kept.is_empty() {
            kept.note_cut(run);
        }
    }

    /// A run of at least `len` bytes at a multiple of `align`. Laps over the active shards from `shard` on: the own
    /// kind's pools; while little is held, the other kind's too. If some lock was taken and `wait`, laps once more,
    /// waiting for each within the spin limit. If that finds nothing, frees up to [`RELEASED_RUNS`] cached runs and
    /// does it again. At most `8 * N + 1 + RELEASED_RUNS` holds.
    pub(crate) fn alloc(
        &self,
        len: usize,
        align: usize,
        use_: Use,
        shard: usize,
        wait: bool,
    ) -> Result<Run<'_>, Refused> {
        let at_hand = if align.is_power_of_two() { self.alloc_near(len, align, use_, shard) } else { None };
        if let Some(head) = at_hand {
            if wait && use_ == Use::Slab {
                self.set_aside(shard);
            }
            return Ok(hand_out(head));
        }
        match self.alloc_far(len, align, use_, shard, wait) {
            Err(Refused::Busy) => self.take_spare(len, align, use_).ok_or(Refused::Busy),
            Err(_) if self.release_kept(RELEASED_RUNS) | self.release_spares() => {
                self.alloc_far(len, align, use_, shard, wait)
            }
            answer => answer,
        }
    }

    /// Sets a run aside for those who find every lock held, if the one whose turn it is is missing and memory is at
    /// hand.
    #[inline]
    fn set_aside(&self, shard: usize) {
        let turn = self.spare_turn.load(Relaxed);
        self.spare_turn.store(if turn + 1 < SPARE_LENS.len() { turn + 1 } else { 0 }, Relaxed);
        let (Some(spare), Some(len)) = (self.spares.get(turn), SPARE_LENS.get(turn)) else { return };
        if spare.is_empty() && (len * SPARE_SHARE).max(SPARE_HEAP_LEN) <= self.basis_of(turn) {
            self.set_one_aside(spare, *len, shard);
        }
    }

    /// The bytes that the length of a run that is set aside is compared with.
    fn basis_of(&self, turn: usize) -> usize {
        match turn % SPARE_STEP == 0 {
            true => self.worked_len(),
            false if self.chunk_count() == 1 => self.told.untouched_len.load(Relaxed),
            false => 0,
        }
    }

    /// Sets aside all that is missing, if a heap's first chunk came.
    #[cold]
    pub(crate) fn set_all_aside(&self, shard: usize) {
        if self.chunk_count() == 1 {
            SPARE_LENS.iter().for_each(|_| self.set_aside(shard));
        }
    }

    #[cold]
    #[inline(never)]
    fn set_one_aside(&self, spare: &Link<PageDesc>, len: usize, shard: usize) {
        let Some(run) = self.alloc_near(len, 1, Use::Large, shard) else { return };
        run.put(Tag::new(Kind::Deferred, run.len(), false));
        if !spare.fill(run) {
            self.release(run, run.tag());
        }
    }

    /// A run that was set aside, if one is long enough: whole for a slab, cut for a large block, as long as any other
    /// way gives it.
    #[cold]
    fn take_spare(&self, len: usize, align: usize, use_: Use) -> Option<Run<'_>> {
        for spare in
            self.spares.iter().zip(SPARE_LENS).filter(|(_, spare_len)| *spare_len >= len).map(|(spare, _)| spare)
        {
            let Some(run) = spare.take() else { continue };
            let fits = Chunk::run_len(run) >= len && Chunk::start_of(run).as_ptr().addr() & align.wrapping_sub(1) == 0;
            if fits {
                self.shorten_spare(run, len, use_);
                return Some(hand_out(run));
            }
            // Its lock is held, so this leaves it to the holder.
            self.release(run, run.tag());
        }
        None
    }

    /// Makes a run that was set aside one in use; what a large block has no use for is left to its lock's holder.
    fn shorten_spare(&self, run: &PageDesc, len: usize, use_: Use) {
        let (descs, all) = (Descs::around(run), run.len());
        if use_ == Use::Slab {
            return pool::mark_used(descs, run, Kind::Slab, all, false);
        }
        let len = pool::granules(descs.chunk(), len);
        pool::mark_used(descs, run, Kind::Large, len, false);
        if let Some(rest) = descs.begin(run.index() + len).filter(|_| len < all) {
            pool::mark_used(descs, rest, Kind::Large, all - len, false);
            self.release(rest, rest.tag());
        }
    }

    /// Frees what was set aside; true if there was any.
    fn release_spares(&self) -> bool {
        self.spares.iter().filter_map(Link::take).map(|run| self.release(run, run.tag())).count() > 0
    }

    #[inline(never)]
    fn alloc_far(&self, len: usize, align: usize, use_: Use, shard: usize, wait: bool) -> Result<Run<'_>, Refused> {
        let held_len = self.held_len();
        let Some(want) = Request::new(len, align, use_, held_len > SHARD_LEN) else {
            return Err(Refused::Empty);
        };
        let active = self.active();
        // Who may not wait cannot ask the provider either, as a rule.
        let (own, mixes) = (kind_index(use_), !wait || !self.parted.load(Relaxed));
        let mut busy = false;
        for (kind, waits, on) in
            [(own, false, true), (1 - own, false, mixes), (own, true, wait), (1 - own, true, wait && mixes)]
        {
            if !on || waits && !busy {
                continue;
            }
            match self.lap(&want, kind, shard, active, waits) {
                Err(refused) => busy |= refused == Refused::Busy,
                Ok(run) => return Ok(run),
            }
        }
        Err(if busy { Refused::Busy } else { Refused::Empty })
    }

    /// As [`alloc`](Self::alloc), for when the provider has nothing more: searches every pool of either kind, each
    /// in up to [`ROUND_LIMIT`] holds or as many as there are bins, so that also runs are found that the quick search
    /// misses. Each hold is a step of the caller's, and waits for its lock within the spin limit if the step says so.
    pub(crate) fn alloc_any(&self, len: usize, align: usize, use_: Use, step: Step<'_>) -> Result<Run<'_>, Refused> {
        let Some(want) = Request::new(len, align, use_, false) else {
            return Err(Refused::Empty);
        };
        let rounds = want.bins_between().max(ROUND_LIMIT);
        let own = kind_index(use_);
        let mut refused = Refused::Empty;
        for pool in [own, 1 - own].into_iter().flat_map(|kind| self.shards.iter().filter_map(move |s| s.get(kind))) {
            for round in 0..rounds {
                let mut found = None;
                step(&mut |wait| found = self.hold(pool, wait, |open| open.alloc_round(&want, round)));
                match found {
                    Some(Some(head)) => return Ok(hand_out(head)),
                    Some(None) if !pool.may_have(len) => break,
                    Some(None) => {}
                    None => refused = Refused::Busy,
                }
            }
        }
        Err(refused)
    }

    fn lap(&self, want: &Request, kind: usize, shard: usize, active: usize, wait: bool) -> Result<Run<'_>, Refused> {
        let mut refused = Refused::Empty;
        let (before, from) = self.shards.split_at(shard.checked_rem(active).unwrap_or(0).min(N));
        let (from, before) =
            (from.iter().take(self.used_shards.load(Relaxed).saturating_sub(before.len())), before.iter());
        let pools = from.chain(before).filter_map(|shard| shard.get(kind));
        for pool in pools.filter(|pool| pool.may_have(want.len)) {
            match self.hold(pool, wait, |open| open.alloc(want)) {
                Some(Some(head)) => return Ok(hand_out(head)),
                Some(None) => {}
                None => refused = Refused::Busy,
            }
        }
        Err(refused)
    }

    /// Does `work` with a pool open; `None` if its lock could not be had.
    #[inline(always)]
    fn hold<'a, R>(&'a self, pool: &'a Pool, wait: bool, work: impl FnOnce(&Open<'a>) -> R) -> Option<R> {
        Some(work(&self.open(pool, wait)?))
    }

    /// Opens a pool: see there.
    #[inline(always)]
    fn open<'a>(&'a self, pool: &'a Pool, wait: bool) -> Option<Open<'a>> {
        pool.open(&self.told, wait)
    }

    /// Frees a run; given its first descriptor, which the caller owns and uses no more. If the pool's lock is taken
    /// the run is left to the next holder. Does nothing to what is no used run's first descriptor.
    pub(crate) fn free(&self, desc: &PageDesc) {
        if matches!(desc.kind(), Kind::Slab | Kind::SlabPartial | Kind::SlabEmpty | Kind::Large) {
            self.release(desc, desc.tag());
        }
    }

    /// Frees granules of a slab, counted from its first one, of which they are not; what of it lies behind them is
    /// another part of it. The slab is the caller's alone. False: unchanged, as the lock could not be had (waited for
    /// within the spin limit if `wait`).
    #[cold]
    #[inline(never)]
    pub(crate) fn punch(&self, slab: &PageDesc, hole: Range<usize>, wait: bool) -> bool {
        let pool = self.pool_of(Chunk::of(slab));
        let run = pool.and_then(|pool| self.open(pool, wait)?.punch(Descs::around(slab), slab, hole));
        run.inspect(|run| self.release(run, run.tag())).is_some()
    }

    /// Frees a part of a slab behind its first one. The slab is the caller's alone, and on its way to be free.
    pub(crate) fn free_part(&self, slab: &PageDesc, part: Range<usize>) {
        let descs = Descs::around(slab);
        let mut granules = part.clone().filter_map(|granule| descs.get(slab.index() + granule));
        let Some(first) = granules.next() else { return };
        first.leave_slab(Kind::Deferred, part.len());
        #[cfg(feature = "hardened")]
        {
            // Who walks over runs meanwhile and sees what follows sees that here begins one.
            fence(Release);
            granules.for_each(|rest| rest.leave_slab(Kind::Inside, 0));
        }
        self.release(first, first.tag());
    }

    /// Keeps a run of that CPU's instead of freeing it, by who holds its cache and owns the run, a large block's; its
    /// tag is given. False: unchanged.
    #[inline(always)]
    pub(crate) fn keep(&self, kept: &RunCache, desc: &PageDesc, tag: Tag) -> bool {
        kept.keep(desc, tag, self.removals.load(Relaxed))
    }

    /// [`keep`](Self::keep) of the run of the large block at `start`, if it is the one that this CPU kept last. Fast.
    #[cfg(not(feature = "hardened"))]
    #[inline(always)]
    pub(crate) fn keep_again(&self, kept: &RunCache, start: NonNull<u8>) -> bool {
        kept.keep_again(start, self.removals.load(Relaxed))
    }

    /// Frees what a CPU keeps. Any context.
    pub(crate) fn release_kept_of(&self, kept: &RunCache) {
        if let Some(run) = kept.take() {
            self.release(run, run.tag());
        }
    }

    /// Frees what up to `limit` CPUs keep; true if there was any.
    fn release_kept(&self, limit: usize) -> bool {
        self.keepers().take(limit).map(|kept| self.release_kept_of(kept)).count() > 0
    }

    /// CPUs that keep a run. A guess.
    fn keepers(&self) -> impl Iterator<Item = &RunCache> {
        [&self.first_run_cache].into_iter().chain(self.kept.iter()).filter(|kept| !kept.is_empty())
    }

    /// What the first CPU keeps.
    #[inline]
    pub(crate) fn first_run_cache(&self) -> &RunCache {
        &self.first_run_cache
    }

    /// Takes in another CPU's, which is new and stays where it is until [`forget_run_caches`](Self::forget_run_caches).
    pub(crate) fn add_run_cache(&self, kept: &RunCache) {
        self.kept.add(kept);
    }

    /// Frees what all but the first CPU keep, and forgets those CPUs. While nobody else uses the heap.
    pub(crate) fn forget_run_caches(&self) {
        self.kept.iter().for_each(|kept| self.release_kept_of(kept));
        self.kept.clear();
    }

    /// A run for what the heap itself needs, at a multiple of `align`; it counts as the page heap's own. Never waits.
    /// It lies beside one of those in `others`, the first one at the end of a chunk, so that memory is parted once;
    /// elsewhere if it `may_part` more.
    pub(crate) fn alloc_own(
        &self,
        len: usize,
        align: usize,
        others: impl Iterator<Item = NonNull<u8>>,
        may_part: bool,
    ) -> Option<Run<'_>> {
        let want = Request::new(len, align, Use::Own, false)?;
        let mut is_first = true;
        let beside = others.inspect(|_| is_first = false).find_map(|other| self.alloc_beside(other, &want));
        let use_ = if may_part { Use::OwnAnywhere } else { Use::Own };
        let far = || self.alloc_far(len, align, use_, 0, false).ok();
        let run = beside.or_else(|| if is_first || may_part { far() } else { None })?;
        run.desc.set_kind(Kind::Own);
        self.own_len.fetch_add(run.len, Relaxed);
        Some(run)
    }

    /// A run beside the heap's own one at `start`.
    fn alloc_beside(&self, start: NonNull<u8>, want: &Request) -> Option<Run<'_>> {
        let chunk = self.lookup(start)?;
        let own = chunk.head_of(start)?;
        let found = self.hold(self.pool_of(chunk)?, false, |open| open.alloc_beside(own, want));
        found.flatten().map(hand_out)
    }

    /// Frees a run that [`alloc_own`](Self::alloc_own) gave; nobody uses its memory any more.
    pub(crate) fn free_own(&self, desc: &PageDesc) {
        self.own_len.fetch_sub(self.usable_len(desc), Relaxed);
        self.release(desc, desc.tag());
    }

    /// [`free`](Self::free) of what is certainly a run that the caller owns, whose tag this is.
    #[inline(never)]
    pub(crate) fn release(&self, desc: &PageDesc, tag: Tag) {
        let pool = self.pool_of(Chunk::of(desc));
        if let Some(open) = pool.and_then(|pool| opened_for(desc, pool, self.open(pool, false))) {
            open.release(Descs::around(desc), desc, tag);
        }
    }

    /// Changes the length of a large block in place; gives the bytes that it has then. `None`: unchanged, as there is
    /// no free memory behind it or the lock could not be had (waited for within the spin limit if `wait`).
    #[inline(always)]
    pub(crate) fn resize(&self, desc: &PageDesc, new_len: usize, wait: bool) -> Option<usize> {
        let (shift, tag, last) = (Chunk::of(desc).shift() % usize::BITS, desc.tag(), new_len.wrapping_sub(1));
        if !tag.is(Kind::Large) || last >= MAX_RUN_LEN {
            return None;
        }
        let len = (last >> shift) + 1;
        (len == tag.len() || self.resize_run(desc, len, wait)).then_some(len << shift)
    }

    /// [`resize`](Self::resize) to another number of granules.
    #[inline(never)]
    fn resize_run(&self, desc: &PageDesc, len: usize, wait: bool) -> bool {
        let (descs, old) = (Descs::around(desc), desc.len());
        for _ in 0..2 {
            let Some(open) = self.pool_of(descs.chunk()).and_then(|pool| self.open(pool, wait)) else { return false };
            if len <= old {
                return open.shrink(descs, desc, old, len);
            }
            if open.grow(descs, desc, old, len) {
                return true;
            }
            drop(open);
            let behind = descs.get(desc.index() + old).filter(|behind| behind.tag().is(Kind::Deferred));
            if !behind.is_some_and(|run| self.release_cached_run(run)) {
                return false;
            }
        }
        false
    }

    /// Frees the first `skip` bytes of a large block's run, whole granules of it but not all: `before` is called once
    /// that is certain; gives the run that is left. `None`: unchanged, as for [`resize`](Self::resize).
    #[cfg(not(feature = "debug-heap"))]
    pub(crate) fn cut_front<'a>(
        &'a self,
        desc: &'a PageDesc,
        skip: usize,
        wait: bool,
        before: impl FnOnce(),
    ) -> Option<&'a PageDesc> {
        let descs = Descs::around(desc);
        let open = self.open(self.pool_of(descs.chunk())?, wait)?;
        before();
        open.cut_front(descs, desc, skip >> descs.shift())
    }

    /// Frees a run if some CPU keeps it.
    #[cold]
    fn release_cached_run(&self, run: &PageDesc) -> bool {
        self.keepers().find(|kept| kept.is_keeping(run)).map(|kept| self.release_kept_of(kept)).is_some()
    }

    /// Bytes in the run whose first descriptor this is.
    #[inline]
    pub(crate) fn usable_len(&self, desc: &PageDesc) -> usize {
        desc.len() << Chunk::of(desc).shift()
    }

    /// The chunk that `addr` lies in. The address must be in a live block, or the answer may be a chunk that is just
    /// leaving; for a huge block's address the answer is `None`, but ask [`huge_run`](Self::huge_run) first.
    #[inline]
    pub(crate) fn lookup(&self, addr: NonNull<u8>) -> Option<&Chunk> {
        self.map.chunk(addr.as_ptr().addr())
    }

    /// The descriptor of the granule that `addr`, an address in a live block, lies in, if the caller's hints know.
    /// Fast.
    #[inline]
    pub(crate) fn desc_near<'a>(&'a self, hints: &'a ChunkHints, addr: NonNull<u8>) -> Option<&'a PageDesc> {
        hints.desc(addr, self.removals.load(Relaxed))
    }

    /// The descriptor of the granule that `addr`, an address in a live block, lies in. The caller holds the cache that
    /// the hints are part of.
    #[inline]
    pub(crate) fn desc<'a>(&'a self, hints: &'a ChunkHints, addr: NonNull<u8>) -> Option<&'a PageDesc> {
        self.desc_near(hints, addr).or_else(|| self.desc_far(hints, addr))
    }

    /// The same with the bytes from the start of its slab to `addr`, if it is in a slab. Fast.
    #[cfg(feature = "hardened")]
    #[inline]
    pub(crate) fn place_near<'a>(&'a self, hints: &'a ChunkHints, addr: NonNull<u8>) -> Option<(&'a PageDesc, usize)> {
        hints.in_slab(addr, self.removals.load(Relaxed))
    }

    /// [`desc_near`](Self::desc_near) by looking the chunk up, which the hints then know.
    #[cold]
    pub(crate) fn desc_far(&self, hints: &ChunkHints, addr: NonNull<u8>) -> Option<&PageDesc> {
        let chunk = self.chunk_far(Some(hints), addr)?;
        chunk.desc((addr.as_ptr().addr() - chunk.addr()) >> chunk.shift())
    }

    /// [`lookup`](Self::lookup) of a chunk that the hints then know.
    pub(crate) fn chunk_far(&self, hints: Option<&ChunkHints>, addr: NonNull<u8>) -> Option<&Chunk> {
        let removals = self.removals.load(Relaxed);
        let chunk = self.lookup(addr)?;
        if let Some(hints) = hints {
            hints.set(chunk, addr, removals, self.held_len());
        }
        Some(chunk)
    }

    /// Takes in a run of the provider's as a chunk, for the kind that is wanted and the shard that
    /// [`alloc`](Self::alloc) starts at for `shard`, and hands out the wanted run at once, before anybody else can
    /// see the chunk: who asked the provider is served even if the pool's lock cannot be had meanwhile. Only where
    /// the run would be the whole chunk, it is left to [`alloc`](Self::alloc). Takes time in proportion to the number
    /// of granules, outside of all locks; then it is entered, in one step of the caller's. The memory is as `provided`
    /// says; it is the page heap's, unless this fails, until [`take_empty`](Self::take_empty) gives it out.
    pub(crate) fn add_chunk(
        &self,
        memory: Mapping,
        want: Want,
        shard: usize,
        provided: Provided,
        step: Step<'_>,
    ) -> Result<Option<Run<'_>>, (AddError, Mapping)> {
        let len = memory.len();
        let active = active_for(self.held_len() + len, N).min(self.chunk_count() + 1);
        let shard = shard.checked_rem(active).unwrap_or(0);
        // An only chunk serves both kinds, and slabs can better do with the longer way.
        let kind = if self.chunk_count() == 0 { LARGE } else { kind_index(want.use_) };
        // Not where a lock is held that this context may have interrupted, or it brings a chunk for each request.
        let is_busy = |kind: usize| self.pools().nth(2 * shard + kind).is_some_and(Pool::is_busy);
        let kind = if is_busy(kind) && !is_busy(LARGE - kind) { LARGE - kind } else { kind };
        let Ok(pool) = u16::try_from(2 * shard + kind) else { return Err((AddError::TooSmall, memory)) };
        let held_len = if provided.decommits { usize::MAX } else { self.held_len().saturating_add(len) };
        let new = Chunk::create(memory, granule_shift(len, held_len), pool, provided.zeroed)
            .map_err(|memory| (AddError::TooSmall, memory))?;
        let chunk = new.chunk();
        #[cfg(feature = "hardened")]
        if !crate::harden::is_linkable(chunk.addr()) || !crate::harden::is_linkable(chunk.addr() + chunk.len()) {
            return Err((AddError::TooSmall, new.give_up()));
        }
        self.key.begin(chunk.addr());
        chunk.set_key(self.key.get());
        let mut fits = false;
        let mut rests = [want.len, want.least_len].into_iter().filter_map(|len| {
            let rest = pool::split_new(chunk, want, len);
            fits |= rest.is_some();
            rest
        });
        let cut = rests.find(|rest| rest.index() > 0);
        let Some(rest) = cut.or_else(|| chunk.desc(0).filter(|_| fits)) else {
            return Err((AddError::TooSmall, new.give_up()));
        };
        let is_cut = rest.index() > 0;
        let mut entered = Err(AddError::Busy);
        step(&mut |wait| {
            entered = self.map.insert(&Entry::of(chunk), wait);
            if entered.is_ok() {
                self.held_len.add(len);
                self.own_len.fetch_add(chunk.own_len(), Relaxed);
                self.used_shards.fetch_max(shard + 1, Relaxed);
                chunk.touch(rest.index());
                self.told.untouched_len.fetch_add(chunk.untouched_len(), Relaxed);
                self.count_chunk(true);
                self.release(rest, rest.tag());
            }
        });
        match entered {
            Ok(()) => Ok(new.enter().desc(0).filter(|_| is_cut).map(hand_out)),
            Err(error) => Err((error, new.give_up())),
        }
    }

    /// Takes a wholly free chunk out, if at least `keep` bytes of free runs remain (as far as can be told while
    /// others allocate): first from pools that have more than one. At most one hold a pool and lap.
    pub(crate) fn take_empty(&self, keep: usize) -> Option<EmptyChunk> {
        self.told.surplus.store(false, Relaxed);
        let chunk = [2, 1].into_iter().find_map(|least| {
            let has = |pool: &Pool| pool.empty_count() >= least;
            let is_worth = |pool: &&Pool| has(pool) || pool.has_deferred() || pool.absent_len() > 0;
            self.pools().filter(is_worth).find_map(|pool| {
                // What waited is free in the hold.
                let spare = || self.free_len().saturating_sub(keep);
                self.hold(pool, false, |open| {
                    open.take_absent_chunk().or_else(|| if has(pool) { open.take_empty(spare()) } else { None })
                })?
            })
        })?;
        let memory = chunk.leave()?;
        self.removals.fetch_add(1, Relaxed);
        self.count_chunk(false);
        self.told.untouched_len.fetch_sub(chunk.untouched_len(), Relaxed);
        let entry = Entry::of(chunk);
        self.map.change(&entry, Change::Leave);
        self.own_len.fetch_sub(chunk.own_len(), Relaxed);
        let is_absent = chunk.desc(0).is_some_and(|head| head.tag().is(Kind::LeavingAbsent));
        Some(EmptyChunk { memory, absent_len: if is_absent { chunk.len() } else { 0 }, entry })
    }

    /// The provider has the chunk back. Touches none of its memory.
    pub(crate) fn chunk_gone(&self, gone: GoneChunk) {
        self.map.change(&gone.entry, Change::Forget);
        self.held_len.sub(gone.len - gone.absent_len);
    }

    /// The provider did not take the chunk: it is used again. Cannot fail.
    pub(crate) fn put_back(&self, chunk: EmptyChunk) {
        self.map.change(&chunk.entry, Change::Stay);
        let Some(chunk) = chunk.entry.chunk_in(chunk.memory) else { return };
        self.own_len.fetch_add(chunk.own_len(), Relaxed);
        self.told.untouched_len.fetch_add(chunk.untouched_len(), Relaxed);
        self.count_chunk(true);
        if let Some(head) = chunk.desc(0) {
            self.release(head, head.tag());
        }
    }

    /// Takes free pages of `page_len` bytes out, `least` bytes or more in one piece, as long as `keep` bytes of free
    /// ones stay. At most one hold a pool.
    pub(crate) fn take_idle(&self, least: usize, keep: usize, page_len: usize) -> Option<Idle<'_>> {
        let spare = || self.free_len().saturating_sub(keep);
        let pools = self.pools().filter(|pool| pool.free_len() >= least && spare() >= least);
        let mut taken =
            pools.filter_map(|pool| self.hold(pool, false, |open| open.take_idle(least, spare(), page_len)));
        taken.find_map(|run| run).map(|run| Idle(hand_out(run)))
    }

    /// The provider has the memory behind them.
    pub(crate) fn went_back(&self, idle: Idle<'_>) {
        self.held_len.sub(idle.0.len);
        self.release_absent(idle.0.desc, idle.0.desc.len());
    }

    /// The provider did not take it.
    pub(crate) fn stayed(&self, idle: Idle<'_>) {
        self.free(idle.0.desc);
    }

    fn release_absent(&self, run: &PageDesc, len: usize) {
        self.release(run, pool::mark_emptied(run, len));
    }

    /// Takes absent pages out for what is wanted, and more of them up to `wish` bytes. At most one hold a pool.
    pub(crate) fn recall(&self, want: Want, wish: usize) -> Option<Recalled<'_>> {
        let own = kind_index(want.use_);
        let pools = [own, 1 - own].into_iter().flat_map(|kind| self.shards.iter().filter_map(move |s| s.get(kind)));
        let mut pools = pools.filter(|pool| pool.absent_len() >= want.least_len);
        let taken = pools.find_map(|pool| self.hold(pool, false, |open| open.take_absent(want, wish)).flatten());
        let (run, rest) = taken?;
        let len = Chunk::run_len(run) + rest.map_or(0, Chunk::run_len);
        self.held_len.add(len);
        Some(Recalled { start: Chunk::start_of(run), len, run, rest })
    }

    /// The pages have memory again: gives the run that is wanted, and frees the rest.
    pub(crate) fn came_back<'a>(&self, recalled: Recalled<'a>) -> Run<'a> {
        if let Some(rest) = recalled.rest {
            self.release(rest, rest.tag());
        }
        hand_out(recalled.run)
    }

    /// The provider has no memory for them.
    pub(crate) fn stayed_away(&self, recalled: Recalled<'_>) {
        self.held_len.sub(recalled.len);
        self.release_absent(recalled.run, recalled.run.len() + recalled.rest.map_or(0, PageDesc::len));
    }

    /// Bytes in pages whose memory the provider has back.
    pub(crate) fn absent_len(&self) -> usize {
        self.pools().map(Pool::absent_len).sum()
    }

    /// Whether some pool has had more than one empty chunk since [`take_empty`](Self::take_empty) was last
    /// called: the moment to call it. One load.
    #[inline]
    pub(crate) fn has_surplus(&self) -> bool {
        self.told.surplus.load(Relaxed)
    }

    /// Frees what CPUs keep, and deferred runs of all pools, at most 1024 of each, a few a hold; true if there were
    /// any. Each hold is a step of the caller's, and waits for its lock within the spin limit if the step says so.
    #[inline(never)]
    pub(crate) fn drain_deferred(&self, step: Step<'_>) -> bool {
        let mut any = false;
        for kept in self.keepers() {
            step(&mut |_| self.release_kept_of(kept));
            any = true;
        }
        step(&mut |_| any |= self.release_spares());
        for pool in self.pools() {
            for _ in 0..DRAIN_HOLDS {
                let mut drained = false;
                if pool.has_deferred() {
                    step(&mut |wait| drained = self.hold(pool, wait, |_| ()).is_some());
                }
                if !drained {
                    break;
                }
                any = true;
            }
        }
        any
    }

    /// How long a run the caller should give to [`add_table`](Self::add_table) next, in bytes.
    pub(crate) fn next_table_len(&self) -> usize {
        self.map.next_table_len()
    }

    /// Gives the map another table, after [`AddError::Full`]. Waits for the map's lock within the spin limit. Unless
    /// this fails, the memory is the page heap's until [`take_empty_table`](Self::take_empty_table) gives it out.
    pub(crate) fn add_table(&self, memory: Mapping) -> Result<(), (AddError, Mapping)> {
        let len = memory.len();
        self.map.add_table(memory)?;
        self.held_len.add(len);
        self.own_len.fetch_add(len, Relaxed);
        Ok(())
    }

    /// Takes the last of the map's added tables out if it is empty and nobody is looking there. If the provider does
    /// not take it back, it can be added again.
    pub(crate) fn take_empty_table(&self) -> Option<Mapping> {
        let memory = self.map.take_empty_table()?;
        self.held_len.sub(memory.len());
        self.own_len.fetch_sub(memory.len(), Relaxed);
        Some(memory)
    }

    /// Takes note of a huge block: a run of the provider's that is one block and no chunk. Waits for the map's lock
    /// within the spin limit if `wait`.
    pub(crate) fn insert_huge(&self, start: NonNull<u8>, run: PageRun, wait: bool) -> Result<(), AddError> {
        self.map.insert_huge(start.as_ptr().addr(), run, wait)?;
        self.held_len.add(run.len());
        Ok(())
    }

    /// The run of the huge block that starts at `start`, which is the start of some live block.
    #[inline]
    pub(crate) fn huge_run(&self, start: NonNull<u8>) -> Option<PageRun> {
        self.map.huge_run(start.as_ptr().addr())
    }

    /// The huge block that the caller owns, and that starts at `start`, has the length of `run` now.
    pub(crate) fn update_huge(&self, start: NonNull<u8>, run: PageRun) -> bool {
        let Some(old) = self.huge_run(start) else { return false };
        // One step, so that the maximum never counts the block twice.
        match run.len().checked_sub(old.len()) {
            Some(more) => self.held_len.add(more),
            None => self.held_len.sub(old.len() - run.len()),
        }
        self.map.update_huge(start.as_ptr().addr(), run)
    }

    /// Begins to take out a huge block, before the provider is asked to take it back or move it: no lookup finds it
    /// from now on. [`huge_gone`](Self::huge_gone) or [`huge_stays`](Self::huge_stays) follows.
    pub(crate) fn leave_huge(&self, start: NonNull<u8>) -> Option<PageRun> {
        let run = self.huge_run(start)?;
        self.map.change_huge(start.as_ptr().addr(), run, Change::Leave);
        Some(run)
    }

    /// A huge block that was leaving has left.
    pub(crate) fn huge_gone(&self, start: NonNull<u8>, run: PageRun) {
        self.map.change_huge(start.as_ptr().addr(), run, Change::Forget);
        self.held_len.sub(run.len());
    }

    /// A huge block that was leaving did not leave. Cannot fail.
    pub(crate) fn huge_stays(&self, start: NonNull<u8>, run: PageRun) {
        self.map.change_huge(start.as_ptr().addr(), run, Change::Stay);
    }

    /// Shows every run of every chunk. At rest, or the picture is not of one moment; holds one pool's lock at a time
    /// (waited for within the spin limit) as long as `show` takes, so that must not use the heap.
    pub(crate) fn for_each_run(&self, show: &mut dyn FnMut(RunInfo<'_>)) {
        for open in self.pools().filter_map(|pool| self.open(pool, true)) {
            for chunk in open.chunks() {
                for (desc, len) in pool::runs(chunk) {
                    let (offset, len) = (desc.index() << chunk.shift(), len << chunk.shift());
                    show(RunInfo { desc, chunk_start: chunk.addr(), offset, len, kind: desc.kind() });
                }
            }
        }
    }

    /// Checks invariants P1 to P7 and P9, which stand beside the fields of `Pool`, pool by pool, at any time; gives how
    /// many pools were busy and left out. Each pool is a step of the caller's, and its lock is held as long as it has
    /// chunks and runs.
    pub(crate) fn verify_pools(&self, step: Step<'_>) -> Result<usize, PageFault> {
        let mut skipped = 0;
        for (index, pool) in self.pools().enumerate() {
            let mut seen = Ok(());
            step(&mut |wait| match self.open(pool, wait) {
                Some(open) => seen = self.verify_pool(index, &open),
                None => skipped += 1,
            });
            seen?;
        }
        Ok(skipped)
    }

    fn verify_pool(&self, index: usize, open: &Open<'_>) -> Result<(), PageFault> {
        open.verify(index)?;
        for chunk in open.chunks() {
            let found = |addr| self.map.chunk(addr).is_some_and(|found| core::ptr::eq(found, chunk));
            let last = chunk.addr() + chunk.len() - 1;
            check(7, found(chunk.addr()) && found(last), chunk)?;
            check(7, !found(last + 1), chunk)?;
        }
        Ok(())
    }

    /// Checks invariants P1 to P9. At rest, with no chunk on its way out.
    pub(crate) fn verify(&self) -> Result<(), PageFault> {
        self.drain_deferred(&|work| work(true));
        let mut held_len = self.map.outside_len();
        let mut own_len = self.map.tables_len();
        let mut untouched_len = 0;
        for (index, pool) in self.pools().enumerate() {
            let Some(open) = self.open(pool, true) else {
                return check(6, false, pool);
            };
            self.verify_pool(index, &open)?;
            held_len += pool.held_len();
            own_len += open.chunks().map(Chunk::own_len).sum::<usize>();
            untouched_len += open.chunks().map(Chunk::untouched_len).sum::<usize>();
            let runs = open.chunks().flat_map(pool::runs).map(|(run, _)| run);
            let own = runs.filter(|run| run.kind() == Kind::Own);
            own_len += own.map(Chunk::run_len).sum::<usize>();
        }
        check(8, held_len == self.held_len(), &raw const self.held_len)?;
        check(8, own_len == self.own_len(), &raw const self.own_len)?;
        let told_len = &self.told.untouched_len;
        check(8, untouched_len == told_len.load(Relaxed), told_len)
    }

    /// The pool that a chunk belongs to.
    #[inline]
    fn pool_of(&self, chunk: &Chunk) -> Option<&Pool> {
        self.shards.as_flattened().get(chunk.pool())
    }

    /// All pools; a chunk's pool index counts them so.
    fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.shards.as_flattened().iter()
    }
}

/// The run's pool, if it could be opened; else the run is left to whoever opens it next.
#[inline(always)]
fn opened_for<'a>(run: &PageDesc, pool: &Pool, open: Option<Open<'a>>) -> Option<Open<'a>> {
    if open.is_none() {
        pool.defer(run);
    }
    open
}

/// Shards that so many bytes are worth, of `limit` at most.
fn active_for(held_len: usize, limit: usize) -> usize {
    (held_len / SHARD_LEN + 1).min(limit)
}

/// The pool of a shard that a use belongs to.
#[inline]
fn kind_index(use_: Use) -> usize {
    if use_.is_large() { LARGE } else { 0 }
}

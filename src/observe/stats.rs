//! What the heap looks like: numbers, and the map of its runs.
//!
//! Fast paths count nothing. Live blocks are derived: blocks that ever left slabs, less those that came back, less
//! those in caches. So the price of statistics is paid by who asks for them, a walk over the classes of every cache;
//! and by slow paths, which add a plain number to a line they have at hand.
//!
//! **At rest** every number is exact, but for the longest free run where more than 16 are about as long. **While others
//! work** each number is of some moment during the call, and sums over CPUs are sums of different moments. The live
//! blocks of a class are then off by at most what was allocated and freed of it during the call, and two lists of its
//! blocks for each CPU: what went between a cache and the slabs after one of the two was read. What was in the middle
//! of such a step counts as live. Counts that only ever rise never fall from one call to the next.

use core::fmt;
use core::ops::Deref;

use crate::base::size_class::{CLASS_COUNT, SizeClass};
use crate::base::sync::{Counter, Ordering, signed};
use crate::cache::CpuCache;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
#[cfg(feature = "hardened")]
use crate::harden::{Misuse, Report};
use crate::heap::Heap;
use crate::pages::{self, Chunk, Kind};
use crate::slab::list::Bin;
use crate::slab::word::Slab;

/// One size class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassStats {
    /// Bytes in a block.
    pub block_len: usize,
    /// Blocks in use.
    pub live_count: u64,
    /// Free blocks in caches.
    pub cached_count: u64,
    /// Blocks of this class that other classes' slabs serve, as coalesced neighbours or longer blocks, less those
    /// that its own slabs serve to others.
    pub fallback_count: i64,
    /// Slabs with blocks to give, of all CPUs.
    pub partial_count: u64,
    /// Slabs that no block is missing from, kept in reserve.
    pub empty_count: u64,
    /// Bytes in slabs of this class.
    pub held_len: usize,
    /// The most bytes that were ever in slabs of this class at once.
    pub high_held_len: usize,
}

/// One CPU's cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// Whether this CPU uses the heap: it did, and was not retired since.
    pub is_used: bool,
    /// Free blocks in the cache.
    pub cached_count: u64,
    /// Bytes in them.
    pub cached_len: usize,
    /// Slabs with blocks to give that this CPU owns.
    pub partial_count: u64,
    /// Blocks that the cache ever got from slabs.
    pub refilled_count: u64,
    /// Blocks that the cache ever gave back to slabs.
    pub flushed_count: u64,
    /// Batches that it got.
    pub refill_count: u64,
    /// Batches that it gave back; single blocks are not counted here.
    pub flush_count: u64,
    /// Laps over the other caches, since this one was busy. With a pin there are none.
    pub lap_count: u64,
    /// Allocations that found the cache busy: they interrupted the heap on this CPU, or with a hint may have.
    pub nested_alloc_count: u64,
    /// Frees that found it busy.
    pub nested_free_count: u64,
}

/// One size class on one CPU, as [`Heap::class_stats_on`] found it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuClassStats {
    /// Bytes in a block.
    pub block_len: usize,
    /// Free blocks in the cache.
    pub cached_count: u64,
    /// The most blocks that each of the cache's two lists may have now.
    pub limit_count: u64,
    /// Blocks that the cache ever got from slabs.
    pub refilled_count: u64,
    /// Blocks that it ever gave back.
    pub flushed_count: u64,
    /// Slabs with blocks to give that this CPU owns.
    pub partial_count: u64,
    /// Slabs in reserve there.
    pub empty_count: u64,
}

impl CpuClassStats {
    /// Blocks that this cache gave to callers less those it took from them. Negative on a CPU that frees what others
    /// allocate. Over all CPUs it sums up to the live blocks of the class, but for those that went past every cache.
    pub const fn balance(&self) -> i64 {
        signed(self.refilled_count.wrapping_sub(self.flushed_count).wrapping_sub(self.cached_count))
    }
}

/// The heap as a whole in numbers, as [`Heap::totals`] found it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes that the provider gave and has not got back.
    pub held_len: usize,
    /// The most bytes that it had given at once.
    pub high_held_len: usize,
    /// Bytes of these that were ever used: less than [`held_len`](Self::held_len) where the heap was given a long
    /// region as one piece.
    pub touched_len: usize,
    /// Bytes in free page runs.
    pub free_len: usize,
    /// Bytes in the longest free page run, as far as could be seen.
    pub largest_free_len: usize,
    /// Bytes in slabs.
    pub slab_len: usize,
    /// Bytes that the page heap needs for itself: descriptors, tables, what is too short to be a page.
    pub own_len: usize,
    /// Successful and failed calls of [`map`](PageProvider::map).
    pub map_count: u64,
    /// See [`map_count`](Self::map_count).
    pub failed_map_count: u64,
    /// Runs that the provider took back.
    pub unmap_count: u64,
    /// Runs that it did not take back.
    pub refused_unmap_count: u64,
    /// Bytes in pages whose memory the provider has back while the heap has their addresses; not in
    /// [`held_len`](Self::held_len).
    pub absent_len: usize,
    /// Successful calls of [`commit`](PageProvider::commit).
    pub commit_count: u64,
    /// Successful calls of [`decommit`](PageProvider::decommit).
    pub decommit_count: u64,
    /// Calls of [`relieve`](PageProvider::relieve).
    pub relief_count: u64,
    /// Bytes that `realloc` ever copied out of blocks of up to [`MAX_SMALL_LEN`](crate::MAX_SMALL_LEN).
    pub copied_short_len: u64,
    /// Bytes that `realloc` ever copied out of longer blocks; with a provider that can move runs, blocks that grew into
    /// that length are moved instead.
    pub copied_long_len: u64,
    /// Frees of addresses that this heap never gave; nothing happened to them.
    pub stray_count: u64,
    /// Bytes in blocks of classes in use.
    live_small_len: u64,
}

impl Totals {
    /// Bytes in large blocks: all that is neither slab, nor free, nor the page heap's own.
    pub const fn large_len(&self) -> usize {
        self.held_len.saturating_sub(self.slab_len).saturating_sub(self.free_len).saturating_sub(self.own_len)
    }

    /// Bytes in blocks in use, as long as the blocks are.
    pub const fn live_len(&self) -> u64 {
        self.live_small_len + self.large_len() as u64
    }

    /// How much of the free pages is not in the longest free run, in thousandths: 0 where all free pages are one run,
    /// or there are none.
    pub fn fragmentation(&self) -> u64 {
        let elsewhere = self.free_len.saturating_sub(self.largest_free_len) as u64;
        (1000 * elsewhere).checked_div(self.free_len as u64).unwrap_or(0)
    }
}

/// The heap in numbers, class by class and CPU by CPU, as [`Heap::stats`] found it. Prints as an aligned table, without
/// allocating. The [`Totals`] are read as fields of it: `stats.held_len`.
#[derive(Clone, Debug)]
pub struct Stats<const CPUS: usize> {
    /// By size class, shortest blocks first.
    pub classes: [ClassStats; CLASS_COUNT],
    /// By CPU index.
    pub cpus: [CpuStats; CPUS],
    totals: Totals,
}

impl<const CPUS: usize> Stats<CPUS> {
    /// Of an empty heap: a place for [`Heap::stats_into`].
    #[expect(unsafe_code, reason = "long, and all zero")]
    pub const fn new() -> Self {
        // SAFETY: every field is an integer or a `bool`, for which all bytes zero are valid.
        unsafe { core::mem::zeroed() }
    }
}

impl<const CPUS: usize> Default for Stats<CPUS> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const CPUS: usize> Deref for Stats<CPUS> {
    type Target = Totals;

    fn deref(&self) -> &Totals {
        &self.totals
    }
}

/// What a run of pages is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Nothing.
    Free,
    /// Blocks of one class: a slab, or the first part of one that gave pages in its middle back.
    Slab {
        /// The class.
        class: SizeClass,
        /// Blocks that fit.
        capacity: usize,
        /// Blocks that are not in the slab: in use, or in a cache. Of a slab that has parts the sum is right, and the
        /// first parts are taken to be used first.
        out_count: usize,
    },
    /// Another part of the slab in front.
    SlabPart {
        /// The class.
        class: SizeClass,
        /// Blocks that fit.
        capacity: usize,
        /// As of the first part.
        out_count: usize,
    },
    /// One block.
    Large,
    /// What the heap itself needs for a CPU.
    Own,
}

/// A run of pages, as [`Heap::for_each_run`] shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunInfo {
    /// The address of the chunk that the run lies in.
    pub chunk_addr: usize,
    /// Bytes from the chunk's start to the run.
    pub offset: usize,
    /// Bytes in the run.
    pub len: usize,
    /// What it is used for.
    pub kind: RunKind,
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// The heap in numbers, by value: 4 KiB, and 88 bytes per CPU. Where that is much for the stack,
    /// [`stats_into`](Self::stats_into) fills a place of the caller's, and [`totals`](Self::totals),
    /// [`class_stats`](Self::class_stats) and [`cpu_stats`](Self::cpu_stats) are parts of it.
    ///
    /// # Context
    /// Any, at any time. Tries the heap's locks one by one, for a moment each, and waits for none. How exact it is
    /// while others work stands at [`Stats`]. At most 2 KiB of stack beside the numbers themselves.
    pub fn stats(&self) -> Stats<CPUS> {
        let mut stats = Stats::new();
        self.stats_into(&mut stats);
        stats
    }

    /// [`stats`](Self::stats) in place. At most 2 KiB of stack.
    pub fn stats_into(&self, stats: &mut Stats<CPUS>) {
        // First, since it gives the pages what was set aside.
        stats.totals = self.totals();
        for (place, class) in stats.classes.iter_mut().zip(SizeClass::all()) {
            *place = self.class_stats(class);
        }
        for (place, index) in stats.cpus.iter_mut().zip(0..) {
            *place = self.cpu_stats(index).unwrap_or_default();
        }
    }

    /// The heap as a whole in numbers. Context and exactness as for [`stats`](Self::stats); at most 2 KiB of stack.
    pub fn totals(&self) -> Totals {
        let read = |counter: &Counter| counter.load(Ordering::Relaxed);
        // Runs that wait for a lock to be free are free.
        self.engine.pages.drain_deferred(&|work| self.held(|_| work(false)));
        let live_len = |class: SizeClass| self.live_count(class) * class.block_len() as u64;
        let pages = &self.engine.pages;
        let [copied_short_len, copied_long_len] = self.copied_len();
        Totals {
            held_len: pages.held_len(),
            high_held_len: pages.high_held_len(),
            touched_len: pages.touched_len(),
            free_len: pages.free_len() + self.kept_huge_len(),
            largest_free_len: pages.largest_free(),
            slab_len: SizeClass::all().map(|class| self.engine.slab_len(class).get()).sum(),
            own_len: pages.own_len(),
            map_count: read(&self.source.calls.maps),
            failed_map_count: read(&self.source.calls.failed_maps),
            unmap_count: read(&self.source.calls.unmaps),
            refused_unmap_count: read(&self.source.calls.refused_unmaps),
            absent_len: pages.absent_len(),
            commit_count: read(&self.source.calls.commits),
            decommit_count: read(&self.source.calls.decommits),
            relief_count: read(&self.source.calls.reliefs),
            copied_short_len,
            copied_long_len,
            stray_count: self.engine.stray_count(),
            live_small_len: SizeClass::all().map(live_len).sum(),
        }
    }

    /// One size class on one CPU; `None` if the heap is for fewer CPUs. Callable from any context, at any time.
    pub fn class_stats_on(&self, cpu: usize, class: SizeClass) -> Option<CpuClassStats> {
        let Some(cache) = self.engine.cache(cpu) else {
            return (cpu < CPUS).then(|| CpuClassStats { block_len: class.block_len(), ..CpuClassStats::default() });
        };
        let (refilled_count, flushed_count) = cache.tally(class).get();
        let (partial_count, empty_count) = self.count_slabs(self.engine.own_bin(cpu, class));
        Some(CpuClassStats {
            block_len: class.block_len(),
            cached_count: u64::from(cache.count(class)),
            limit_count: u64::from(cache.limit(class)),
            refilled_count,
            flushed_count,
            partial_count,
            empty_count,
        })
    }

    /// Bytes copied out of short blocks, and out of long ones.
    fn copied_len(&self) -> [u64; 2] {
        let busy = self.copied.each_ref().map(|counter| counter.load(Ordering::Relaxed));
        let caches = self.engine.caches().map(CpuCache::copied);
        caches.fold(busy, |[short, long], [more_short, more_long]| [short + more_short, long + more_long])
    }

    /// Free blocks of the class in caches.
    fn cached_count(&self, class: SizeClass) -> u64 {
        self.engine.caches().map(|cache| u64::from(cache.count(class))).sum()
    }

    /// Blocks of the class in use.
    fn live_count(&self, class: SizeClass) -> u64 {
        let live_count = self.engine.served_count(class).saturating_sub(self.cached_count(class));
        #[cfg(feature = "guard-pages")]
        let live_count = live_count + self.guarded_count(class);
        live_count
    }

    /// One size class of all CPUs. Context and exactness as for [`stats`](Self::stats).
    pub fn class_stats(&self, class: SizeClass) -> ClassStats {
        let (partial_count, empty_count) = self.count_slabs(self.engine.bins(class).map(|(_, bin)| bin));
        let slab_len = self.engine.slab_len(class);
        ClassStats {
            block_len: class.block_len(),
            live_count: self.live_count(class),
            cached_count: self.cached_count(class),
            fallback_count: signed(self.engine.fallback(class).load(Ordering::Relaxed)),
            partial_count,
            empty_count,
            held_len: slab_len.get(),
            high_held_len: slab_len.high(),
        }
    }

    /// Partial and empty slabs in bins. Takes locks, so the cache is held meanwhile, for one bin at a time.
    fn count_slabs<'a>(&self, bins: impl IntoIterator<Item = &'a Bin>) -> (u64, u64) {
        bins.into_iter().fold((0, 0), |(partials, wholes), bin| {
            let (partial, whole) = self.held(|_| bin.counts());
            (partials + u64::from(partial), wholes + u64::from(whole))
        })
    }

    /// One CPU's cache; `None` if it did not get one yet. Context and exactness as for [`stats`](Self::stats).
    pub fn cpu_stats(&self, index: usize) -> Option<CpuStats> {
        let cache = self.engine.cache(index)?;
        let counts = &cache.counts;
        let mut stats = CpuStats {
            is_used: cache.is_used(),
            refill_count: counts.refills(),
            flush_count: counts.flushes(),
            lap_count: counts.laps(),
            nested_alloc_count: counts.nested_allocs(),
            nested_free_count: counts.nested_frees(),
            ..CpuStats::default()
        };
        for class in SizeClass::all() {
            let on = self.class_stats_on(index, class).unwrap_or_default();
            stats.cached_count += on.cached_count;
            stats.cached_len += usize::try_from(on.cached_count).unwrap_or(0) * on.block_len;
            stats.partial_count += on.partial_count;
            stats.refilled_count += on.refilled_count;
            stats.flushed_count += on.flushed_count;
        }
        Some(stats)
    }

    /// Has every bug that is noticed reported to `hook`, instead of only being counted. There is one hook; the last one
    /// set is called.
    ///
    /// # Context
    /// The hook runs where the bug was noticed: in any context, and in the middle of the heap. It may do what an
    /// interrupt handler may that interrupted the heap on this CPU: print, stop the machine, even use this heap, which
    /// then serves it as a nested context.
    #[cfg(feature = "hardened")]
    pub fn set_report_hook(&self, hook: fn(&Report)) {
        self.engine.watch.set_hook(hook);
    }

    /// How often a bug was noticed.
    #[cfg(feature = "hardened")]
    pub fn misuse_count(&self, misuse: Misuse) -> u64 {
        self.engine.watch.count(misuse)
    }

    /// Makes the key that links of free blocks are written under out of `entropy`. Before the heap has its first
    /// memory; false: it has some, and with it a key made of addresses.
    #[cfg(feature = "hardened")]
    pub fn set_key(&self, entropy: u64) -> bool {
        self.engine.pages.key.offer(crate::harden::Key::of(entropy))
    }

    /// Shows every run of every chunk, chunk by chunk, in the order of addresses within a chunk. For pictures and
    /// dumps.
    ///
    /// Holds one lock of the page heap at a time while `show` runs, so `show` must not use this heap, and other CPUs
    /// look elsewhere meanwhile. Huge blocks, which are no chunks, are not shown.
    pub fn for_each_run(&self, mut show: impl FnMut(RunInfo)) {
        self.engine.pages.for_each_run(&mut |run| show(describe(&run)));
    }
}

fn describe(run: &pages::RunInfo<'_>) -> RunInfo {
    let kind = match (Chunk::head(run.desc).and_then(Slab::of), run.kind) {
        (Some(slab), kind) => {
            let (class, (capacity, out_count)) = (slab.class(), slab.counts_in(run.desc, run.len));
            match kind {
                Kind::SlabRest => RunKind::SlabPart { class, capacity, out_count },
                _ => RunKind::Slab { class, capacity, out_count },
            }
        }
        (None, Kind::Large) => RunKind::Large,
        (None, Kind::Own) => RunKind::Own,
        _ => RunKind::Free,
    };
    RunInfo { chunk_addr: run.chunk_start, offset: run.offset, len: run.len, kind }
}

/// Bytes as KiB, rounded up.
fn kib(len: usize) -> usize {
    len.div_ceil(1024)
}

impl<const CPUS: usize> fmt::Display for Stats<CPUS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>8} {:>10} {:>10} {:>8} {:>8} {:>10} {:>10} {:>6}",
            "block", "live", "cached", "partial", "empty", "held KiB", "high KiB", "used %"
        )?;
        for class in self.classes.iter().filter(|class| class.high_held_len > 0 || class.live_count > 0) {
            // Of its own slabs: what neighbours or longer blocks serve is elsewhere.
            let own_count = class.live_count.saturating_add_signed(-class.fallback_count);
            let live_len = own_count * class.block_len as u64;
            let used = (100 * live_len).checked_div(class.held_len as u64).unwrap_or(0);
            let (held, high) = (kib(class.held_len), kib(class.high_held_len));
            let ClassStats { block_len, live_count, cached_count, partial_count, empty_count, .. } = class;
            writeln!(
                f,
                "{block_len:>8} {live_count:>10} {cached_count:>10} {partial_count:>8} {empty_count:>8} {held:>10} {high:>10} {used:>6}"
            )?;
        }
        writeln!(
            f,
            "{:>8} {:>10} {:>10} {:>8} {:>8} {:>8} {:>10} {:>10} {:>8} {:>8} {:>8}",
            "cpu", "cached", "KiB", "partial", "refills", "flushes", "refilled", "flushed", "laps", "allocs*", "frees*"
        )?;
        for (index, cpu) in self.cpus.iter().enumerate().filter(|(_, cpu)| cpu.is_used) {
            writeln!(
                f,
                "{index:>8} {:>10} {:>10} {:>8} {:>8} {:>8} {:>10} {:>10} {:>8} {:>8} {:>8}",
                cpu.cached_count,
                kib(cpu.cached_len),
                cpu.partial_count,
                cpu.refill_count,
                cpu.flush_count,
                cpu.refilled_count,
                cpu.flushed_count,
                cpu.lap_count,
                cpu.nested_alloc_count,
                cpu.nested_free_count
            )?;
        }
        writeln!(f, "* nested: they found the CPU's cache busy")?;
        let [held, high, slabs, large] = [self.held_len, self.high_held_len, self.slab_len, self.large_len()].map(kib);
        writeln!(
            f,
            "KiB held {held} (at most {high}): slabs {slabs}, large blocks {large}, own {}",
            kib(self.own_len)
        )?;
        let (free, longest, percent) = (kib(self.free_len), kib(self.largest_free_len), self.fragmentation() / 10);
        writeln!(f, "free {free}, longest run {longest}: {percent} % of it elsewhere")?;
        write!(
            f,
            "provider: {} maps, {} failed, {} unmaps, {} refused, {} calls for relief; {} stray frees",
            self.map_count,
            self.failed_map_count,
            self.unmap_count,
            self.refused_unmap_count,
            self.relief_count,
            self.stray_count
        )
    }
}

#[cfg(test)]
mod tests;

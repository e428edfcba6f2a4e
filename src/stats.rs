//! What the heap looks like: numbers, and the map of its runs.
//!
//! Fast paths count nothing. Live blocks are derived: blocks that ever left slabs, less those that came back, less those in caches. So the
//! price of statistics is paid by who asks for them: a walk over the classes of every cache. While others allocate, the numbers
//! are of slightly different moments, and off by at most what was allocated and freed meanwhile; at rest they are exact.

use core::fmt;

use crate::cache::CpuCache;
use crate::cpu::CpuMode;
use crate::heap::Heap;
use crate::pages::{self, Kind};
use crate::provider::PageProvider;
use crate::size_class::{CLASS_COUNT, SizeClass};
use crate::slab::Slab;
use crate::sync::{AtomicU64, Ordering};

/// One size class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassStats {
    /// Bytes in a block.
    pub block_len: usize,
    /// Blocks in use.
    pub live_count: u64,
    /// Free blocks in caches.
    pub cached_count: u64,
    /// Bytes in slabs of this class.
    pub held_len: usize,
}

/// One CPU's cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// Whether this CPU ever used the heap.
    pub is_used: bool,
    /// Free blocks in the cache.
    pub cached_count: u64,
    /// Bytes in them.
    pub cached_len: usize,
    /// Blocks that the cache ever got from slabs.
    pub refilled_count: u64,
    /// Blocks that the cache ever gave back to slabs.
    pub flushed_count: u64,
}

/// The heap in numbers, as [`Heap::stats`] found it. Prints as an aligned table, without allocating.
#[derive(Clone, Debug)]
pub struct Stats<const CPUS: usize> {
    /// By size class, shortest blocks first.
    pub classes: [ClassStats; CLASS_COUNT],
    /// By CPU index.
    pub cpus: [CpuStats; CPUS],
    /// Bytes that the provider gave and has not got back.
    pub held_len: usize,
    /// Bytes in free page runs.
    pub free_len: usize,
    /// Bytes in the longest free page run, as far as could be seen.
    pub largest_free_len: usize,
    /// Bytes in slabs.
    pub slab_len: usize,
    /// Successful and failed calls of [`map`](PageProvider::map).
    pub map_count: u64,
    /// See [`map_count`](Self::map_count).
    pub failed_map_count: u64,
    /// Runs that the provider took back.
    pub unmap_count: u64,
    /// Runs that it did not take back.
    pub refused_unmap_count: u64,
    /// Calls of [`relieve`](PageProvider::relieve).
    pub relief_count: u64,
    /// Bytes that `realloc` ever copied out of blocks of up to [`MAX_SMALL_LEN`](crate::MAX_SMALL_LEN).
    pub copied_short_len: u64,
    /// Bytes that `realloc` ever copied out of longer blocks; with a provider that can move runs, blocks that grew into that length are moved instead.
    pub copied_long_len: u64,
    /// Frees of addresses that this heap never gave; nothing happened to them.
    pub stray_count: u64,
}

/// What a run of pages is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Nothing.
    Free,
    /// Blocks of one class.
    Slab {
        /// The class.
        class: SizeClass,
        /// Blocks that fit.
        capacity: usize,
        /// Blocks that are not in the slab: in use, or in a cache.
        out_count: usize,
    },
    /// One block.
    Large,
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
    /// The heap in numbers. Tries the page heap's locks one by one, for a moment each, and waits for none; callable from any context, at any time. About 2 KiB of stack, and 40 bytes per CPU.
    pub fn stats(&self) -> Stats<CPUS> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut classes = [ClassStats::default(); CLASS_COUNT];
        for (place, class) in classes.iter_mut().zip(SizeClass::all()) {
            *place = self.class_stats(class);
        }
        let mut cpus = [CpuStats::default(); CPUS];
        for (place, index) in cpus.iter_mut().zip(0..) {
            *place = self.cpu_stats(index);
        }
        let pages = &self.engine.pages;
        let [copied_short_len, copied_long_len] = self.copied_len();
        Stats {
            classes,
            cpus,
            held_len: pages.held_len(),
            free_len: pages.free_len(),
            largest_free_len: pages.largest_free(),
            slab_len: classes.iter().map(|class| class.held_len).sum(),
            map_count: read(&self.calls.maps),
            failed_map_count: read(&self.calls.failed_maps),
            unmap_count: read(&self.calls.unmaps),
            refused_unmap_count: read(&self.calls.refused_unmaps),
            relief_count: read(&self.calls.reliefs),
            copied_short_len,
            copied_long_len,
            stray_count: self.engine.stray_count(),
        }
    }

    /// Bytes copied out of short blocks, and out of long ones.
    fn copied_len(&self) -> [u64; 2] {
        let busy = self.copied.each_ref().map(|counter| counter.load(Ordering::Relaxed));
        let caches = self.engine.caches().iter().map(CpuCache::copied);
        caches.fold(busy, |[short, long], [more_short, more_long]| [short + more_short, long + more_long])
    }

    fn class_stats(&self, class: SizeClass) -> ClassStats {
        let cached_count = self.engine.caches().iter().map(|cache| u64::from(cache.count(class))).sum();
        ClassStats {
            block_len: class.block_len(),
            live_count: self.engine.out_count(class).saturating_sub(cached_count),
            cached_count,
            held_len: self.engine.slab_len(class).load(Ordering::Relaxed),
        }
    }

    fn cpu_stats(&self, index: usize) -> CpuStats {
        let Some(cache) = self.engine.cache(index) else {
            return CpuStats::default();
        };
        let mut stats = CpuStats { is_used: cache.is_used(), ..CpuStats::default() };
        for class in SizeClass::all() {
            let (refilled, flushed) = cache.tally(class).get();
            let count = cache.count(class);
            stats.cached_count += u64::from(count);
            stats.cached_len += count as usize * class.block_len();
            stats.refilled_count += refilled;
            stats.flushed_count += flushed;
        }
        stats
    }

    /// Shows every run of every chunk, chunk by chunk, in the order of addresses within a chunk. For pictures and dumps.
    ///
    /// Holds one lock of the page heap at a time while `show` runs, so `show` must not use this heap, and other CPUs look elsewhere
    /// meanwhile. Huge blocks, which are no chunks, are not shown.
    pub fn for_each_run(&self, mut show: impl FnMut(RunInfo)) {
        self.engine.pages.for_each_run(&mut |run| show(describe(&run)));
    }
}

fn describe(run: &pages::RunInfo<'_>) -> RunInfo {
    let kind = match (Slab::of(run.desc), run.kind) {
        (Some(slab), _) => {
            let (count, carved) = slab.counts();
            RunKind::Slab { class: slab.class(), capacity: slab.capacity(), out_count: carved.saturating_sub(count) }
        }
        (None, Kind::Large) => RunKind::Large,
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
        writeln!(f, "{:>8} {:>10} {:>10} {:>10} {:>6}", "block", "live", "cached", "held KiB", "used %")?;
        for class in self.classes.iter().filter(|class| class.held_len > 0 || class.live_count > 0) {
            let live_len = class.live_count * class.block_len as u64;
            let used = (100 * live_len).checked_div(class.held_len as u64).unwrap_or(0);
            let held = kib(class.held_len);
            let (block_len, live, cached) = (class.block_len, class.live_count, class.cached_count);
            writeln!(f, "{block_len:>8} {live:>10} {cached:>10} {held:>10} {used:>6}")?;
        }
        writeln!(f, "{:>8} {:>10} {:>10} {:>10} {:>10}", "cpu", "cached", "KiB", "refilled", "flushed")?;
        for (index, cpu) in self.cpus.iter().enumerate().filter(|(_, cpu)| cpu.is_used) {
            let (cached, len) = (cpu.cached_count, kib(cpu.cached_len));
            let (refilled, flushed) = (cpu.refilled_count, cpu.flushed_count);
            writeln!(f, "{index:>8} {cached:>10} {len:>10} {refilled:>10} {flushed:>10}")?;
        }
        let (held, slabs, free, longest) =
            (kib(self.held_len), kib(self.slab_len), kib(self.free_len), kib(self.largest_free_len));
        writeln!(
            f,
            "KiB held {held}: slabs {slabs}, free {free} (longest run {longest}), large blocks and tables the rest"
        )?;
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

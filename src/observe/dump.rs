//! The heap as lines for tools: what a kernel writes to its serial port or a file, and a program elsewhere reads.
//!
//! A table for people changes with what people ask; a program that reads it breaks. So there is a second form, with a
//! version in each line, one fact a line and one name a value. It costs a few times the bytes of a table, and in return
//! a line stands alone: it is found anywhere in a log, behind whatever the kernel puts before its lines, and between
//! whatever else it says.
//!
//! # The form, version 1
//! A line is `smp-heap v1`, a word, and `key=value` pairs, each after one space. Values are decimal numbers without
//! sign, or hexadecimal behind `0x` where the key is an address, or words of letters. A dump begins with a `dump` line
//! and ends with an `end` line.
//!
//! | word | keys | |
//! |---|---|---|
//! | `dump` | `time` `cpus` | begins a dump; the time is the kernel's, in microseconds; caches in the heap |
//! | `heap` | `held` `high` `live` `slabs` `large` `free` `longest` `own` `maps` `failed` `unmaps` `refused` `reliefs` `strays` | bytes, then counts: the fields of [`Totals`](crate::Totals) in its order |
//! | `class` | `block` `live` `cached` `from_others` `to_others` `partial` `empty` `held` `high` | one for each class that ever had a slab or a block: block length in bytes; blocks, of the live ones those that other classes' slabs serve, and blocks of its own slabs that serve other classes (of each, what one exceeds the other by); slabs; bytes |
//! | `cpu` | `cpu` `cached` `bytes` `partial` `refilled` `flushed` `refills` `flushes` `laps` `nested_allocs` `nested_frees` | one for each CPU that used the heap |
//! | `share` | `cpu` `block` `cached` `limit` `refilled` `flushed` `partial` `empty` | a class on a CPU, where any of it is not 0 |
//! | `run` | `chunk` `offset` `len` `kind`, for a slab also `block` `blocks` `out` | a run of pages: address of its chunk, bytes; `kind` is `free`, `large`, `slab`, or `own` for what the heap itself needs; blocks that fit, blocks not in the slab |
//! | `end` | `lines` | how many lines there were since `dump`, itself included, this one not: a reader knows whether any was lost |
//!
//! Within version 1, words and keys may be added and order may change; a reader passes over what it does not know. What
//! is there keeps its name and meaning, or the version changes.

use core::fmt;

use crate::base::size_class::SizeClass;
use crate::base::trace::PREFIX;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
use crate::heap::Heap;
use crate::observe::stats::{ClassStats, CpuClassStats, CpuStats, RunInfo, RunKind, Totals};

/// The heap as lines, made by [`Heap::dump`]. Its `Display` looks at the heap when it is printed, and allocates
/// nothing; the last line has no line end.
pub struct Dump<'a, P, C, const CPUS: usize> {
    heap: &'a Heap<P, C, CPUS>,
    time: u64,
    has_runs: bool,
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// The heap as lines for tools, of this moment, `time` in microseconds since whenever the kernel likes.
    ///
    /// Printing it shows every run of pages ([`for_each_run`](Self::for_each_run)), so that what it is printed to must
    /// not use this heap, and takes as long as the heap is large; [`brief`](Dump::brief) leaves the runs out. Otherwise
    /// as [`stats`](Self::stats).
    pub const fn dump(&self, time: u64) -> Dump<'_, P, C, CPUS> {
        Dump { heap: self, time, has_runs: true }
    }
}

impl<P, C, const CPUS: usize> Dump<'_, P, C, CPUS> {
    /// The same without the runs of pages: some lines only, for one dump a second, say. May be printed where
    /// [`Heap::stats`] may be called, to anything.
    pub const fn brief(mut self) -> Self {
        self.has_runs = false;
        self
    }
}

impl<P, C, const CPUS: usize> fmt::Debug for Dump<'_, P, C, CPUS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dump").field("time", &self.time).field("has_runs", &self.has_runs).finish_non_exhaustive()
    }
}

/// Writes lines and counts them.
struct Lines<'a, 'b> {
    f: &'a mut fmt::Formatter<'b>,
    count: u64,
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> fmt::Display for Dump<'_, P, C, CPUS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = Lines { f, count: 0 };
        lines.line(format_args!("dump time={} cpus={CPUS}", self.time))?;
        lines.totals(&self.heap.totals())?;
        for class in SizeClass::all().map(|class| self.heap.class_stats(class)) {
            lines.class(&class)?;
        }
        for (index, cpu) in (0..CPUS).filter_map(|index| Some((index, self.heap.cpu_stats(index)?))) {
            lines.cpu(index, &cpu)?;
        }
        for cpu in 0..CPUS {
            for share in SizeClass::all().filter_map(|class| self.heap.class_stats_on(cpu, class)) {
                lines.share(cpu, &share)?;
            }
        }
        if self.has_runs {
            let mut result = Ok(());
            self.heap.for_each_run(|run| result = result.and_then(|()| lines.run(&run)));
            result?;
        }
        let count = lines.count;
        write!(lines.f, "{PREFIX} end lines={count}")
    }
}

impl Lines<'_, '_> {
    fn line(&mut self, line: fmt::Arguments<'_>) -> fmt::Result {
        self.count += 1;
        writeln!(self.f, "{PREFIX} {line}")
    }

    fn totals(&mut self, stats: &Totals) -> fmt::Result {
        self.line(format_args!(
            "heap held={} high={} live={} slabs={} large={} free={} longest={} own={} maps={} failed={} unmaps={} refused={} reliefs={} strays={}",
            stats.held_len,
            stats.high_held_len,
            stats.live_len(),
            stats.slab_len,
            stats.large_len(),
            stats.free_len,
            stats.largest_free_len,
            stats.own_len,
            stats.map_count,
            stats.failed_map_count,
            stats.unmap_count,
            stats.refused_unmap_count,
            stats.relief_count,
            stats.stray_count
        ))
    }

    fn class(&mut self, class: &ClassStats) -> fmt::Result {
        if class.high_held_len == 0 && class.live_count == 0 {
            return Ok(());
        }
        self.line(format_args!(
            "class block={} live={} cached={} from_others={} to_others={} partial={} empty={} held={} high={}",
            class.block_len,
            class.live_count,
            class.cached_count,
            class.fallback_count.max(0),
            class.fallback_count.min(0).unsigned_abs(),
            class.partial_count,
            class.empty_count,
            class.held_len,
            class.high_held_len
        ))
    }

    fn cpu(&mut self, index: usize, cpu: &CpuStats) -> fmt::Result {
        if !cpu.is_used {
            return Ok(());
        }
        self.line(format_args!(
                "cpu cpu={index} cached={} bytes={} partial={} refilled={} flushed={} refills={} flushes={} laps={} nested_allocs={} nested_frees={}",
                cpu.cached_count,
                cpu.cached_len,
                cpu.partial_count,
                cpu.refilled_count,
                cpu.flushed_count,
                cpu.refill_count,
                cpu.flush_count,
                cpu.lap_count,
                cpu.nested_alloc_count,
                cpu.nested_free_count
            ))
    }

    fn share(&mut self, cpu: usize, share: &CpuClassStats) -> fmt::Result {
        if *share == (CpuClassStats { block_len: share.block_len, ..CpuClassStats::default() }) {
            return Ok(());
        }
        self.line(format_args!(
            "share cpu={cpu} block={} cached={} limit={} refilled={} flushed={} partial={} empty={}",
            share.block_len,
            share.cached_count,
            share.limit_count,
            share.refilled_count,
            share.flushed_count,
            share.partial_count,
            share.empty_count
        ))
    }

    fn run(&mut self, run: &RunInfo) -> fmt::Result {
        let RunInfo { chunk_addr, offset, len, kind } = *run;
        let mut line = |what: fmt::Arguments<'_>| {
            self.line(format_args!("run chunk={chunk_addr:#x} offset={offset} len={len} kind={what}"))
        };
        match kind {
            RunKind::Free => line(format_args!("free")),
            RunKind::Large => line(format_args!("large")),
            RunKind::Own => line(format_args!("own")),
            RunKind::Slab { class, capacity, out_count } => {
                line(format_args!("slab block={} blocks={capacity} out={out_count}", class.block_len()))
            }
            RunKind::SlabPart { class, capacity, out_count } => {
                line(format_args!("part block={} blocks={capacity} out={out_count}", class.block_len()))
            }
        }
    }
}

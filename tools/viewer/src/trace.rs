//! A recorded trace (the `events` lines described at the head of the library's `trace.rs`): read, brought into one
//! order, replayed.
//!
//! Events of one CPU are in its order; those of several are merged by time. What cannot be is repaired and counted,
//! since a trace that begins in the middle of a kernel's life, or overran its rings, is still worth replaying: a free
//! of a block whose allocation was not recorded is passed over, and a block allocated where another one still is, ends
//! that one.
//!
//! A replay is one thread that plays the CPUs in turn, so that it does the same each time: a failure is found again,
//! and instructions can be counted. What it does not show is CPUs that get in each other's way.

use std::{
    collections::{BTreeMap, HashMap},
    io::Read,
    sync::atomic::{AtomicUsize, Ordering},
};

use flate2::{
    Compression,
    read::{GzDecoder, GzEncoder},
};
use smp_heap::{CpuHint, Heap, PageProvider, cpu::CpuMode};

use crate::dump::{Misread, What, ours};

/// One event as recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Event {
    time: u64,
    kind: char,
    addr: u64,
    len: u64,
    align: u32,
}

/// One step of a replay. Blocks are numbered in the order of their allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A block is allocated.
    Alloc {
        /// Bytes.
        len: usize,
        /// Bytes.
        align: usize,
    },
    /// A block is freed.
    Free {
        /// Its number.
        block: usize,
    },
    /// A block changed its length where it stood.
    Resize {
        /// Its number.
        block: usize,
        /// Bytes.
        len: usize,
    },
}

/// A trace in order, ready to be replayed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    /// The steps, each with its CPU.
    pub steps: Vec<(usize, Step)>,
    /// CPUs that recorded anything.
    pub cpu_count: usize,
    /// Refills, flushes, runs mapped and unmapped, and refused allocations, as they were recorded; a replay makes its
    /// own.
    pub others: BTreeMap<char, u64>,
    /// Events that found no room in their ring.
    pub dropped: u64,
    /// Frees and resizes of blocks whose allocation was not recorded.
    pub unknown: u64,
    /// Allocations where a block still was.
    pub overlaps: u64,
}

/// A log's bytes as text; packed with gzip or not.
///
/// # Errors
/// What is wrong with the packed file.
pub fn unpack(bytes: &[u8]) -> std::io::Result<String> {
    let mut plain = Vec::new();
    if bytes.starts_with(&[0x1f, 0x8b]) {
        GzDecoder::new(bytes).read_to_end(&mut plain)?;
    } else {
        plain.extend_from_slice(bytes);
    }
    Ok(String::from_utf8_lossy(&plain).into_owned())
}

/// Text packed with gzip.
pub fn pack(text: &str) -> Vec<u8> {
    let mut packed = Vec::new();
    // Reading from memory does not fail.
    let _ = GzEncoder::new(text.as_bytes(), Compression::best()).read_to_end(&mut packed);
    packed
}

/// Reads the `events` lines of a log.
///
/// # Errors
/// The first [`Misread`] line; a log without events is an error too.
pub fn parse_trace(log: &str) -> Result<Trace, Misread> {
    let mut cpus: BTreeMap<usize, Vec<Event>> = BTreeMap::new();
    let mut dropped: BTreeMap<usize, u64> = BTreeMap::new();
    for (index, text) in log.lines().enumerate() {
        let Some((word, fields)) = ours(text).map_err(|what| Misread { line: index + 1, what })? else { continue };
        if word != "events" {
            continue;
        }
        let misread = |what| Misread { line: index + 1, what };
        let cpu = fields.hex("cpu").map_err(misread)?;
        let cpu = usize::try_from(cpu).map_err(|_| misread(What::Value("cpu", format!("{cpu:x}"))))?;
        let mut time = fields.hex("time").map_err(misread)?;
        dropped.insert(cpu, fields.hex("dropped").map_err(misread)?);
        let events = cpus.entry(cpu).or_default();
        for text in fields.text("list").map_err(misread)?.split(',') {
            let event = event(text, time).ok_or_else(|| misread(What::Value("list", text.to_owned())))?;
            time = event.time;
            events.push(event);
        }
    }
    if cpus.is_empty() {
        return Err(Misread { line: 0, what: What::NoEvents });
    }
    Ok(merge(&cpus, dropped.values().sum()))
}

/// One event of a list, `before` the time of the one before.
fn event(text: &str, before: u64) -> Option<Event> {
    let kind = text.chars().next().filter(|kind| "axfrlumn".contains(*kind))?;
    let numbers: Option<Vec<u64>> =
        text.get(1..)?.split(':').map(|number| u64::from_str_radix(number, 16).ok()).collect();
    let [passed, addr, len, align] = numbers?.try_into().ok()?;
    let align = u32::try_from(align).ok().filter(|align| *align < 48)?;
    Some(Event { time: before.checked_add(passed)?, kind, addr, len: (len < 1 << 47).then_some(len)?, align })
}

fn merge(cpus: &BTreeMap<usize, Vec<Event>>, dropped: u64) -> Trace {
    let mut all: Vec<(usize, Event)> = Vec::new();
    for (cpu, events) in cpus {
        all.extend(events.iter().map(|event| (*cpu, *event)));
    }
    // Stable: equal times of one CPU keep its order.
    all.sort_by_key(|(_, event)| event.time);
    let mut trace = Trace { cpu_count: cpus.len(), dropped, ..Trace::default() };
    let mut live: HashMap<u64, usize> = HashMap::new();
    let mut count = 0;
    for (cpu, Event { kind, addr, len, align, .. }) in all {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        match kind {
            'a' => {
                if let Some(block) = live.insert(addr, count) {
                    trace.overlaps += 1;
                    trace.steps.push((cpu, Step::Free { block }));
                }
                trace.steps.push((cpu, Step::Alloc { len, align: 1 << align }));
                count += 1;
            }
            'f' => match live.remove(&addr) {
                Some(block) => trace.steps.push((cpu, Step::Free { block })),
                None => trace.unknown += 1,
            },
            'r' => match live.get(&addr) {
                Some(block) => trace.steps.push((cpu, Step::Resize { block: *block, len })),
                None => trace.unknown += 1,
            },
            other => *trace.others.entry(other).or_default() += 1,
        }
    }
    trace
}

/// The CPU that a replay plays.
static PLAYED: AtomicUsize = AtomicUsize::new(0);

/// The identity of a heap that a trace is replayed on.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlayedCpu;

impl CpuHint for PlayedCpu {
    fn current_cpu(&self) -> Option<usize> {
        Some(PLAYED.load(Ordering::Relaxed))
    }
}

/// What a replay saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Allocations done.
    pub allocs: u64,
    /// The most bytes asked for at once.
    pub peak_live_len: usize,
    /// The most bytes held at once.
    pub peak_held_len: usize,
}

/// Why a replay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failed {
    /// The heap refused a block: the step's number.
    Refused(usize),
    /// A block no longer had what was written into it: the step that looked.
    Damaged(usize),
}

impl core::fmt::Display for Failed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Refused(step) => write!(f, "step {step}: the heap had no memory for a block"),
            Self::Damaged(step) => write!(f, "step {step}: a block's content was overwritten"),
        }
    }
}

impl core::error::Error for Failed {}

/// Does on a heap what the trace says, and frees what is left. If `checks`, both ends of every block are written, and
/// looked at before it goes.
///
/// # Errors
/// The step that [`Failed`]; the blocks then in use are leaked.
pub fn replay<P: PageProvider, C: CpuMode, const CPUS: usize>(
    trace: &Trace,
    heap: &Heap<P, C, CPUS>,
    checks: bool,
) -> Result<Replayed, Failed> {
    use std::{alloc::Layout, ptr::NonNull};

    let mut blocks: Vec<Option<(NonNull<u8>, Layout)>> = Vec::new();
    let mut seen = Replayed::default();
    let mut live_len = 0;
    // One byte at each end, so that blocks of any length are marked, and neighbours differ.
    let mark = |number: usize| number.to_le_bytes()[0] ^ number.to_le_bytes()[1];
    let ends = |layout: Layout| [0, layout.size().saturating_sub(1)];
    let place = |start: NonNull<u8>, at: usize| {
        // SAFETY: asked for places inside of blocks in use only.
        unsafe { start.add(at) }
    };
    let is_whole = |(start, layout): (NonNull<u8>, Layout), number: usize| {
        let holds = |at| {
            // SAFETY: the block is in use, the place is inside it, and `write` has initialised it.
            unsafe { place(start, at).read() == mark(number) }
        };
        layout.size() == 0 || ends(layout).into_iter().all(holds)
    };
    let write = |(start, layout): (NonNull<u8>, Layout), number: usize| {
        for at in ends(layout).into_iter().filter(|_| layout.size() > 0) {
            // SAFETY: the block is this replay's, and the place is inside it.
            unsafe { place(start, at).write(mark(number)) };
        }
    };
    for (number, (cpu, step)) in trace.steps.iter().enumerate() {
        PLAYED.store(*cpu, Ordering::Relaxed);
        match *step {
            Step::Alloc { len, align } => {
                let layout = Layout::from_size_align(len, align).map_err(|_| Failed::Refused(number))?;
                let start = heap.alloc(layout).map_err(|_| Failed::Refused(number))?.cast();
                if checks {
                    write((start, layout), blocks.len());
                    seen.peak_held_len = seen.peak_held_len.max(heap.stats().held_len);
                }
                blocks.push(Some((start, layout)));
                live_len += len;
                seen.allocs += 1;
                seen.peak_live_len = seen.peak_live_len.max(live_len);
            }
            Step::Free { block } => {
                let Some((start, layout)) = blocks.get_mut(block).and_then(Option::take) else { continue };
                if checks && !is_whole((start, layout), block) {
                    return Err(Failed::Damaged(number));
                }
                live_len -= layout.size();
                // SAFETY: allocated above with this Layout, or resized to it, and out of the list.
                unsafe { heap.free(start, layout) };
            }
            Step::Resize { block, len } => {
                let Some(Some((start, layout))) = blocks.get_mut(block) else { continue };
                // SAFETY: the block is in use with this Layout.
                let done = unsafe { heap.resize(*start, *layout, len) };
                // Where this heap cannot, the block moves.
                if !done {
                    // SAFETY: as above; after success only the new place is used.
                    let moved = unsafe { heap.realloc(*start, *layout, len) };
                    *start = moved.map_err(|_| Failed::Refused(number))?.cast();
                }
                live_len = live_len - layout.size() + len;
                seen.peak_live_len = seen.peak_live_len.max(live_len);
                *layout = Layout::from_size_align(len, layout.align()).map_err(|_| Failed::Refused(number))?;
                if checks {
                    write((*start, *layout), block);
                }
            }
        }
    }
    for (block, place) in blocks.into_iter().enumerate() {
        let Some((start, layout)) = place else { continue };
        if checks && !is_whole((start, layout), block) {
            return Err(Failed::Damaged(trace.steps.len()));
        }
        // SAFETY: allocated above with this Layout, and used no more.
        unsafe { heap.free(start, layout) };
    }
    seen.peak_held_len = seen.peak_held_len.max(heap.stats().high_held_len);
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
[1] smp-heap v1 events cpu=1 time=64 dropped=2 list=f0:1000:20:3,a6:3000:40:4
[1] smp-heap v1 events cpu=0 time=60 dropped=0 list=a0:1000:20:3,l1:20:8:0,a9:1000:10:3,r1:1000:18:3,f0:9000:8:3
";

    #[test]
    fn events_of_all_cpus_come_in_the_order_of_time() {
        let trace = parse_trace(LOG).expect("understood");
        let expected = [
            (0, Step::Alloc { len: 0x20, align: 8 }),
            (1, Step::Free { block: 0 }),
            (0, Step::Alloc { len: 0x10, align: 8 }),
            (1, Step::Alloc { len: 0x40, align: 16 }),
            (0, Step::Resize { block: 1, len: 0x18 }),
        ];
        // CPU 0's second allocation and CPU 1's are at the same time, 6a; the lower number comes first.
        assert_eq!(trace.steps, expected);
        assert_eq!((trace.cpu_count, trace.dropped, trace.unknown, trace.overlaps), (2, 2, 1, 0));
        assert_eq!(trace.others.get(&'l'), Some(&1));
    }

    #[test]
    fn a_block_over_a_live_one_ends_it() {
        let trace = parse_trace(&LOG.replace("f0:1000:20:3,", "")).expect("understood");
        assert_eq!(trace.overlaps, 1);
        assert!(trace.steps.contains(&(0, Step::Free { block: 0 })));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        let told = |from: &str, to: &str| parse_trace(&LOG.replacen(from, to, 1)).expect_err("damaged").to_string();
        assert_eq!(told("a9:1000:10:3", "a9:1000:10"), "line 2: `list` cannot be `a9:1000:10`");
        assert_eq!(told("a9:1000:10:3", "z9:1000:10:3"), "line 2: `list` cannot be `z9:1000:10:3`");
        assert_eq!(told("f0:1000:20:3", "f0:1000:20:50"), "line 1: `list` cannot be `f0:1000:20:50`");
        assert_eq!(told("time=64 ", ""), "line 1: `time=` is missing");
        assert!(parse_trace("x").expect_err("nothing").to_string().contains("no events"));
        assert!(unpack(&[0x1f, 0x8b, 0]).is_err());
        assert_eq!(unpack(&pack(LOG)).expect("packed"), LOG);
    }
}

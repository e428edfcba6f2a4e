//! What the heap did, event by event: for a bug report, or for a benchmark that is somebody's real kernel.
//!
//! ```text
//! Heap ── Hook ── Trace (the kernel's static) ── a ring for each CPU ── lines for tools
//! ```
//! Decisions, and what pays for each:
//! - *The kernel owns the rings* ([`TraceRing`], [`TraceSlot`]: two statics) and says which CPU and what time it is. So
//!   their length is its choice, and a heap that is not traced is one pointer longer. Without the feature `trace`,
//!   [`Hook`] is empty and nothing of this is compiled.
//! - *A full ring drops what is new and counts it.* What was recorded up to there stays whole and can be replayed;
//!   overwriting the oldest would lose the allocations that later frees refer to.
//! - *A slot is claimed by one compare-and-exchange, then written, then published by its state*, so that a context that
//!   interrupts another one between these steps, or a CPU that takes itself for another one, only takes the next slot.
//!   Who loses the race [`CLAIM_TRIES`] times drops the event. After Dmitry Vyukov's bounded queue, with states that
//!   count laps from zero: all zero is the empty ring.
//! - *A free is recorded before it is done, an allocation after.* So where clocks agree, sorting all rings by time
//!   never shows an address allocated twice. A block that moves without a copy is written as a free and an allocation.
//!
//! # The form, version 1
//! [`Trace`] prints lines beside those of [`dump`](crate::Heap::dump): `smp-heap v1 events cpu=0 time=7f31 dropped=0
//! list=...`, all numbers hexadecimal. The list has up to 16 events of one CPU in its order, with commas between, each
//! a letter and up to four numbers with colons between: time since the event before (the first: since `time`), address,
//! bytes, and the alignment as a power of two.
//!
//! | letter | event | address | bytes | alignment |
//! |---|---|---|---|---|
//! | `a` | allocation | the block | as asked for | as asked for |
//! | `x` | refused allocation | 0 | as asked for | as asked for |
//! | `f` | free | the block | as asked for | as asked for |
//! | `r` | resize in place | the block | the new size | as asked for |
//! | `l` | refill: blocks from slabs to a cache | length of a block | how many | 0 |
//! | `u` | flush: blocks from a cache to slabs | length of a block | how many | 0 |
//! | `m`, `n` | run from, run back to the provider | the run | its length | its alignment |

/// What each line for tools begins with.
pub(crate) const PREFIX: &str = "smp-heap v1";

#[cfg(feature = "trace")]
pub(crate) use recording::Hook;
#[cfg(feature = "trace")]
pub use recording::{Trace, TraceRing, TraceSlot};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) kind: Kind,
    pub(crate) addr: usize,
    pub(crate) len: usize,
    pub(crate) align: usize,
}

/// The kinds of events; each is its letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Alloc = b'a',
    Refused = b'x',
    Free = b'f',
    Resize = b'r',
    Refill = b'l',
    Flush = b'u',
    Map = b'm',
    Unmap = b'n',
}

/// Where a heap records to: nowhere, without the feature.
#[cfg(not(feature = "trace"))]
#[derive(Debug)]
pub(crate) struct Hook;

#[cfg(not(feature = "trace"))]
impl Hook {
    pub(crate) const fn new() -> Self {
        Self
    }

    #[inline(always)]
    pub(crate) fn record(&self, _: impl FnOnce() -> Event) {}
}

#[cfg(feature = "trace")]
mod recording {
    use core::fmt;

    use super::Event;
    use crate::base::link::StaticLink;
    use crate::base::sync::{AtomicUsize, AtomicWord, Counter, Ordering, TryLock};
    use crate::contract::unwind::never_unwinding;

    /// How often a context tries to claim a slot; it loses only to contexts that claim one.
    const CLAIM_TRIES: usize = 16;
    /// Events in a line.
    const LINE_EVENTS: usize = 16;
    /// Where alignment and kind stand in the word beside the length.
    const ALIGN_SHIFT: u32 = 48;
    const KIND_SHIFT: u32 = 56;

    /// Room for one event. All zero is the empty slot.
    #[derive(Debug)]
    pub struct TraceSlot {
        /// `2 * lap`: free for that lap around the ring; one more: written in it.
        state: AtomicUsize,
        time: AtomicWord,
        addr: AtomicUsize,
        /// Length, and above it alignment and kind.
        rest: AtomicWord,
    }

    /// One CPU's ring but for its slots. All zero is the empty ring.
    #[derive(Debug)]
    #[repr(align(128))]
    pub struct TraceRing {
        /// Slots ever claimed.
        claimed: AtomicUsize,
        /// Slots ever read.
        read: AtomicUsize,
        dropped: Counter,
        reader: TryLock,
    }

    impl TraceSlot {
        /// An empty slot.
        pub const fn new() -> Self {
            Self {
                state: AtomicUsize::new(0),
                time: AtomicWord::new(0),
                addr: AtomicUsize::new(0),
                rest: AtomicWord::new(0),
            }
        }
    }

    impl Default for TraceSlot {
        fn default() -> Self {
            Self::new()
        }
    }

    impl TraceRing {
        /// An empty ring.
        pub const fn new() -> Self {
            Self {
                claimed: AtomicUsize::new(0),
                read: AtomicUsize::new(0),
                dropped: Counter::new(0),
                reader: TryLock::new(),
            }
        }

        fn push(&self, slots: &[TraceSlot], time: u64, event: Event) -> bool {
            for _ in 0..CLAIM_TRIES {
                let place = self.claimed.load(Ordering::Relaxed);
                let (Some(lap), Some(slot)) = (place.checked_div(slots.len()), at(slots, place)) else { return false };
                match slot.state.load(Ordering::Acquire) {
                    state if state < 2 * lap => return false,
                    state if state == 2 * lap => {}
                    _ => continue,
                }
                let claim = self.claimed.compare_exchange(place, place + 1, Ordering::Relaxed, Ordering::Relaxed);
                if claim.is_ok() {
                    slot.time.store(time, Ordering::Relaxed);
                    slot.addr.store(event.addr, Ordering::Relaxed);
                    slot.rest.store(pack(event), Ordering::Relaxed);
                    slot.state.store(2 * lap + 1, Ordering::Release);
                    return true;
                }
            }
            false
        }

        /// The oldest event, if it is written. By whoever holds `reader`.
        fn pop(&self, slots: &[TraceSlot]) -> Option<(u64, usize, u64)> {
            let place = self.read.load(Ordering::Relaxed);
            let (lap, slot) = (place.checked_div(slots.len())?, at(slots, place)?);
            if slot.state.load(Ordering::Acquire) != 2 * lap + 1 {
                return None;
            }
            let read = (
                slot.time.load(Ordering::Relaxed),
                slot.addr.load(Ordering::Relaxed),
                slot.rest.load(Ordering::Relaxed),
            );
            slot.state.store(2 * (lap + 1), Ordering::Release);
            self.read.store(place + 1, Ordering::Relaxed);
            Some(read)
        }
    }

    impl Default for TraceRing {
        fn default() -> Self {
            Self::new()
        }
    }

    fn at(slots: &[TraceSlot], place: usize) -> Option<&TraceSlot> {
        slots.get(place.checked_rem(slots.len())?)
    }

    fn pack(event: Event) -> u64 {
        let len = (event.len as u64).min((1 << ALIGN_SHIFT) - 1);
        let align = event.align.checked_ilog2().unwrap_or(0);
        len | u64::from(align) << ALIGN_SHIFT | u64::from(event.kind as u8) << KIND_SHIFT
    }

    /// A recording: rings of the kernel's, and who tells CPU and time. Its `Display` takes the events out and prints
    /// them.
    ///
    /// ```
    /// use smp_heap::{Trace, TraceRing, TraceSlot};
    ///
    /// static RINGS: [TraceRing; 4] = [const { TraceRing::new() }; 4];
    /// static SLOTS: [TraceSlot; 4 * 1024] = [const { TraceSlot::new() }; 4 * 1024];
    /// // The CPU's number and a clock that all CPUs agree on: the time stamp counter, say.
    /// static TRACE: Trace = Trace::new(&RINGS, &SLOTS, || 0, || 0);
    /// // HEAP.trace_to(Some(&TRACE)); ...; HEAP.trace_to(None); println!("{TRACE}");
    /// ```
    #[derive(Debug)]
    pub struct Trace {
        rings: &'static [TraceRing],
        slots: &'static [TraceSlot],
        cpu: fn() -> usize,
        time: fn() -> u64,
    }

    impl Trace {
        /// A recording into as many rings, each with its equal part of the slots. `cpu` and `time` are called in every
        /// context and in the middle of the heap: they must not use it, nor wait. A number without a ring goes to
        /// another CPU's.
        pub const fn new(
            rings: &'static [TraceRing],
            slots: &'static [TraceSlot],
            cpu: fn() -> usize,
            time: fn() -> u64,
        ) -> Self {
            Self { rings, slots, cpu, time }
        }

        /// Events that found no room, over all rings.
        pub fn dropped(&self) -> u64 {
            self.rings.iter().map(|ring| ring.dropped.load(Ordering::Relaxed)).sum()
        }

        fn slots_of(&self, cpu: usize) -> &[TraceSlot] {
            let each = self.slots.len().checked_div(self.rings.len()).unwrap_or(0);
            self.slots.get(cpu * each..(cpu + 1) * each).unwrap_or_default()
        }

        pub(crate) fn record(&self, event: Event) {
            let time = never_unwinding(self.time);
            let Some(cpu) = never_unwinding(self.cpu).checked_rem(self.rings.len()) else { return };
            let Some(ring) = self.rings.get(cpu) else { return };
            if !ring.push(self.slots_of(cpu), time, event) {
                ring.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }

        fn print_ring(&self, f: &mut fmt::Formatter<'_>, cpu: usize, ring: &TraceRing) -> fmt::Result {
            let slots = self.slots_of(cpu);
            let Some(_reader) = ring.reader.try_lock() else { return Ok(()) };
            let (mut last, mut count) = (0, 0);
            // At most what the ring holds now: others may go on recording.
            while let Some((time, addr, rest)) = if count < slots.len() { ring.pop(slots) } else { None } {
                if count % LINE_EVENTS == 0 {
                    let (end, dropped) = (if count == 0 { "" } else { "\n" }, ring.dropped.load(Ordering::Relaxed));
                    last = time;
                    write!(f, "{end}{} events cpu={cpu:x} time={time:x} dropped={dropped:x} list=", super::PREFIX)?;
                } else {
                    f.write_str(",")?;
                }
                let kind = char::from(rest.to_be_bytes()[0]);
                let (align, len) = (rest >> ALIGN_SHIFT & 0xff, rest & ((1 << ALIGN_SHIFT) - 1));
                // An interrupted context may publish an earlier time after a later one; the ring's order holds.
                write!(f, "{kind}{:x}:{addr:x}:{len:x}:{align:x}", time.saturating_sub(last))?;
                (last, count) = (time.max(last), count + 1);
            }
            if count > 0 { writeln!(f) } else { Ok(()) }
        }
    }

    impl fmt::Display for Trace {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.rings.iter().enumerate().try_for_each(|(cpu, ring)| self.print_ring(f, cpu, ring))
        }
    }

    /// Where a heap records to. All zero: nowhere.
    #[derive(Debug)]
    pub(crate) struct Hook(StaticLink<Trace>);

    impl Hook {
        pub(crate) const fn new() -> Self {
            Self(StaticLink::new())
        }

        pub(crate) fn set(&self, trace: Option<&'static Trace>) {
            self.0.set(trace);
        }

        #[inline]
        pub(crate) fn record(&self, event: impl FnOnce() -> Event) {
            if let Some(trace) = self.0.get() {
                trace.record(event());
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::super::Kind;
        use super::*;
        use std::boxed::Box;
        use std::string::{String, ToString};
        use std::vec::Vec;

        fn trace(cpus: usize, events: usize, cpu: fn() -> usize, time: fn() -> u64) -> &'static Trace {
            let rings: Vec<_> = (0..cpus).map(|_| TraceRing::new()).collect();
            let slots: Vec<_> = (0..cpus * events).map(|_| TraceSlot::new()).collect();
            Box::leak(Box::new(Trace::new(rings.leak(), slots.leak(), cpu, time)))
        }

        fn event(addr: usize) -> Event {
            Event { kind: Kind::Alloc, addr, len: 0x20, align: 16 }
        }

        #[test]
        fn what_was_recorded_is_printed_once_in_order() {
            let trace = trace(2, 40, || 1, || 7);
            (1..=18).for_each(|addr| trace.record(event(addr)));
            let text = trace.to_string();
            let lines: Vec<_> = text.lines().collect();
            assert_eq!(lines.len(), 2, "{text}");
            assert!(
                lines[0].starts_with("smp-heap v1 events cpu=1 time=7 dropped=0 list=a0:1:20:4,a0:2:20:4,"),
                "{text}"
            );
            assert!(lines[1].ends_with("list=a0:11:20:4,a0:12:20:4"), "{text}");
            assert_eq!(trace.to_string(), "");
        }

        /// Of two contexts on a CPU, the one that looked at the clock first may be recorded last.
        #[test]
        fn where_time_goes_back_it_stands_still_instead() {
            static NOW: Counter = Counter::new(0);
            let trace = trace(1, 4, || 0, || NOW.load(Ordering::Relaxed));
            for now in [10, 5, 12] {
                NOW.store(now, Ordering::Relaxed);
                trace.record(event(1));
            }
            assert!(trace.to_string().ends_with("time=a dropped=0 list=a0:1:20:4,a0:1:20:4,a2:1:20:4\n"));
        }

        #[test]
        fn a_full_ring_keeps_the_oldest_and_counts_the_rest() {
            let trace = trace(1, 5, || 0, || 0);
            for lap in 0..4 {
                (0..8).for_each(|addr| trace.record(event(16 * lap + addr)));
                let text = trace.to_string();
                let found: Vec<_> = text.split(':').filter_map(|part| usize::from_str_radix(part, 16).ok()).collect();
                assert_eq!(text.matches("a0:").count(), 5, "{text}");
                (0..5).for_each(|addr| assert!(found.contains(&(16 * lap + addr)), "{text}"));
                assert_eq!(trace.dropped(), 3 * (lap as u64 + 1));
            }
        }

        /// A context that is interrupted between claiming a slot and publishing it: the nested one takes the next;
        /// nobody reads past the gap until it is closed.
        #[test]
        fn a_context_inside_another_ones_recording_takes_the_next_slot() {
            let trace = trace(1, 4, || 0, || 0);
            trace.rings[0].claimed.store(1, Ordering::Relaxed);
            trace.record(event(2));
            assert_eq!(trace.to_string(), "", "the gap is in front");
            let slot = &trace.slots[0];
            slot.addr.store(1, Ordering::Relaxed);
            slot.rest.store(pack(event(1)), Ordering::Relaxed);
            slot.state.store(1, Ordering::Release);
            assert!(trace.to_string().ends_with("list=a0:1:20:4,a0:2:20:4\n"));
        }

        /// Four threads that all take themselves for CPU 0, each with patience, while a fifth reads: each event is read
        /// once, whole, and in its thread's order.
        #[test]
        fn nothing_is_lost_or_torn_when_all_share_a_ring() {
            const EACH: usize = if cfg!(miri) { 50 } else { 5000 };
            let trace = trace(1, 64, || 0, || 0);
            let text = std::thread::scope(|scope| {
                let writers: Vec<_> = (0..4)
                    .map(|thread| {
                        scope.spawn(move || {
                            for step in 1..=EACH {
                                let addr = thread << 32 | step;
                                let event = Event { kind: Kind::Free, addr, len: addr, align: 1 };
                                while !trace.rings[0].push(trace.slots_of(0), 0, event) {
                                    std::thread::yield_now();
                                }
                            }
                        })
                    })
                    .collect();
                let mut text = String::new();
                while !writers.iter().all(|writer| writer.is_finished()) {
                    text += &trace.to_string();
                }
                text + &trace.to_string()
            });
            let events = text.split("list=").skip(1).flat_map(|line| line.lines().next().unwrap().split(','));
            let (mut last, mut count) = ([0; 4], 0);
            for event in events {
                let parts: Vec<_> =
                    event[1..].split(':').map(|part| usize::from_str_radix(part, 16).unwrap()).collect();
                assert_eq!(parts[1], parts[2], "torn: {event}");
                let (thread, step) = (parts[1] >> 32, parts[1] & 0xffff_ffff);
                assert!(step > last[thread], "out of order: {event}");
                last[thread] = step;
                count += 1;
            }
            assert_eq!(count, 4 * EACH);
        }
    }
}

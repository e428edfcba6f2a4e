//! `cargo demo` with the crate's own heap: pinned caches, interrupts open.
//!
//! The memory is given in eight parts. The region provider only tries its locks, and a virtual CPU that the host stops
//! while it holds one would make the others believe that there is no memory; with several regions they go on to the
//! next.
//!
//! Nothing is masked around the heap: a timer interrupt that comes in the middle of an allocation allocates in its
//! turn.
#![no_std]
#![no_main]

#[path = "demo_common.rs"]
mod common;

use core::fmt::{self, Write};

use smp_heap::{CpuHint, Heap, Pinned, RegionProvider, cpu::NeverPreempts};
use smp_heap_kernel::{Boot, Hooks, cpu, kernel, println, smp, sync::Lock, test, time};

/// The most CPUs that `cargo demo` asks for.
const CPUS: usize = 8;

/// How many parts the memory is given in.
const REGIONS: usize = 8;

/// The number of the CPU that runs, from its own area.
#[derive(Debug)]
struct Index;

impl CpuHint for Index {
    fn current_cpu(&self) -> Option<usize> {
        Some(cpu::index())
    }
}

#[global_allocator]
static HEAP: Heap<RegionProvider<REGIONS>, Pinned<NeverPreempts<Index>>, CPUS> = Heap::new(
    RegionProvider::new(),
    // SAFETY: this kernel starts no threads, so a CPU runs one task and what interrupts it, and the area that `Index`
    // reads is the CPU's own; before it is set up, the number is above any CPU count.
    Pinned(unsafe { NeverPreempts::new(Index) }),
);

kernel! {
    hooks = Hooks { early: Some(give_memory), ..Hooks::none() };
    fn main(boot: &Boot) {
        println!("smp-heap, interrupts open: a tick inside the heap allocates in its turn.");
        #[cfg(feature = "trace")]
        HEAP.trace_to(Some(&recording::TRACE));
        common::run(boot, &Shown);
        println!("@stats");
        give_back("in the end");
    }
}

/// What the heap says of itself, and when.
struct Shown;

/// Samples of a slot, as text.
static SAMPLES: Lock<Samples> = Lock::new(Samples { text: [0; SAMPLES_LEN], len: 0 });
/// A sample has a line for each class, and one for each class on each CPU.
const SAMPLES_LEN: usize = common::SAMPLES * (1 + CPUS) * (6 << 10);

impl common::Demonstrated for Shown {
    fn sample(&self) {
        let dump = HEAP.dump(time::micros());
        if SAMPLES.with(|samples| writeln!(samples, "{}", dump.brief())).is_err() {
            test::fail(format_args!("the samples of a slot are longer than {SAMPLES_LEN} bytes"));
        }
    }

    fn say_samples(&self) {
        SAMPLES.with(|samples| {
            if samples.len > 0 {
                println!("{}", samples.as_str());
            }
            samples.len = 0;
        });
    }

    fn after_phases(&self) {
        #[cfg(feature = "trace")]
        recording::end();
        give_back("after the phases");
    }

    fn report(&self) {
        verify("while the products are held");
        // No part of the heap may be used while it shows its runs, and `println!` uses none.
        println!("{}", HEAP.dump(time::micros()));
        say_stats();
    }
}

/// Text that was written, all of it.
struct Samples {
    text: [u8; SAMPLES_LEN],
    len: usize,
}

impl Samples {
    fn as_str(&self) -> &str {
        self.text.get(..self.len).and_then(|text| core::str::from_utf8(text).ok()).unwrap_or_default()
    }
}

impl Write for Samples {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let place = self.text.get_mut(self.len..).and_then(|room| room.get_mut(..text.len())).ok_or(fmt::Error)?;
        place.copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}

/// What `cargo demo --record` asks for: every event of the phases, as long as there is room.
#[cfg(feature = "trace")]
mod recording {
    use smp_heap::{Trace, TraceRing, TraceSlot};
    use smp_heap_kernel::{cpu, println, time};

    use super::{CPUS, HEAP};

    /// Events that each CPU has room for.
    const EVENTS: usize = 16 << 10;

    static RINGS: [TraceRing; CPUS] = [const { TraceRing::new() }; CPUS];
    static SLOTS: [TraceSlot; CPUS * EVENTS] = [const { TraceSlot::new() }; CPUS * EVENTS];
    /// In cycles: the time stamp counter is the same on all CPUs.
    pub(crate) static TRACE: Trace = Trace::new(&RINGS, &SLOTS, cpu::index, time::cycles);

    /// Ends the recording and says it.
    pub(crate) fn end() {
        HEAP.trace_to(None);
        println!("{TRACE}");
    }
}

/// The largest region, as the other heap gets.
fn give_memory(boot: &Boot) {
    let region = boot.largest_region();
    let len = region.len / REGIONS;
    for part in 0..REGIONS {
        let start = region.as_ptr().wrapping_add(part * len);
        // SAFETY: usable memory that nobody else uses; the parts do not overlap, and each is given once.
        if let Err(error) = unsafe { HEAP.provider().add_region(start, len) } {
            test::fail(format_args!("part {part} of the memory: {error}"));
        }
    }
}

/// Everything was freed: the provider gets its pages back. (The picture then shows what the products need, and no
/// reserve.)
fn give_back(when: &str) {
    verify(when);
    let held = HEAP.stats().held_len;
    smp::on_all(|_| HEAP.drain_current());
    HEAP.trim(0);
    verify("after trim");
    let left = HEAP.stats().held_len;
    println!("@stats everything freed {when}: {} KiB held, {} KiB after trim", held / 1024, left / 1024);
}

fn verify(when: &str) {
    // SAFETY: called before and after the work, when nobody else is in the heap.
    if let Err(violation) = unsafe { HEAP.verify_at_rest() } {
        test::fail(format_args!("verify() {when}: {violation}"));
    }
}

/// The statistics, each line of the table marked as such.
fn say_stats() {
    // `Marked` cannot fail.
    let _ = writeln!(Marked::default(), "{}", HEAP.stats());
}

/// Collects a line, without allocating, and prints it with the mark.
struct Marked {
    line: [u8; 160],
    len: usize,
}

impl Default for Marked {
    fn default() -> Self {
        Self { line: [0; 160], len: 0 }
    }
}

impl Write for Marked {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                let line = self.line.get(..self.len).unwrap_or_default();
                println!("@stats {}", core::str::from_utf8(line).unwrap_or("?"));
                self.len = 0;
            } else if let Some(place) = self.line.get_mut(self.len) {
                *place = byte;
                self.len += 1;
            }
        }
        Ok(())
    }
}

//! The battery over sound and over broken providers and pins: each break is named, in the line of the promise that it
//! breaks.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use smp_heap::battery::{Failed, Failure, Filled, Random, churn, exhaust, free_all, layouts, run};
use smp_heap::cpu::{CpuMode, UnknownCpu};
use smp_heap::{CpuPin, Heap, Hint, PageProvider, PageRun, Pinned, RunKind};

use crate::common::{Books, ThreadCpu, filled, layout, limited, play_cpu};

/// So many threads as CPUs, all at work at once.
fn on_threads(count: usize, work: &(dyn Fn() + Sync)) {
    std::thread::scope(|scope| {
        for cpu in 0..count {
            scope.spawn(move || {
                play_cpu(cpu);
                work();
            });
        }
    });
}

/// What the battery says of a heap on three threads.
fn report<P: PageProvider + Sync, C: CpuMode + Sync>(provider: P, mode: C) -> (Result<(), Failed>, String) {
    play_cpu(0);
    let heap = Heap::<P, C, 4>::new(provider, mode);
    let mut report = String::new();
    let passed = run(&heap, |work| on_threads(3, work), &mut report);
    assert!(report.lines().count() <= 22, "{report}");
    let failures = report.lines().filter(|line| line.starts_with("FAIL ")).count();
    assert_eq!(passed.map_or_else(|failed| failed.count, |()| 0), failures, "{report}");
    let is_known = |line: &str| ["ok   ", "FAIL ", "skip "].iter().any(|start| line.starts_with(start));
    assert!(report.lines().all(is_known), "{report}");
    (passed, report)
}

#[test]
fn a_sound_heap_passes_the_battery() {
    for (passed, report) in [
        report(Books::default(), Hint(ThreadCpu)),
        report(Books::default(), Pinned(ThreadCpu)),
        report(limited(8 << 20), Pinned(ThreadCpu)),
    ] {
        assert_eq!(passed, Ok(()), "{report}");
        assert!(report.lines().count() > 15, "{report}");
    }
}

/// What a provider does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    /// Aligns to pages only.
    Alignment,
    /// Gives a run that begins in the one before.
    Overlap,
    /// Says that pages are zeroed, and they are not.
    Zeros,
    /// Takes a run back and loses it.
    Loses,
    /// Gives some pages, whatever was asked for.
    Absurd,
}

/// Pages of a long piece of the host's memory, one after the other, with something wrong.
struct Broken<const ZEROED: bool> {
    wrong: Wrong,
    memory: NonNull<u8>,
    used: Mutex<usize>,
}

const MEMORY: Layout = match Layout::from_size_align(256 << 20, 2 << 20) {
    Ok(layout) => layout,
    Err(_) => panic!("a power of two"),
};

impl<const ZEROED: bool> Broken<ZEROED> {
    fn new(wrong: Wrong) -> Self {
        // SAFETY: the length is not 0.
        let memory = NonNull::new(unsafe { std::alloc::alloc_zeroed(MEMORY) }).unwrap();
        // SAFETY: inside the memory.
        let byte = unsafe { memory.add((2 << 20) + 8) };
        // SAFETY: as above, and nobody else has it yet.
        unsafe { byte.write(1) };
        Self { wrong, memory, used: Mutex::new(0x1000) }
    }
}

// SAFETY: the memory is this value's, and handed out under a lock.
unsafe impl<const ZEROED: bool> Send for Broken<ZEROED> {}
// SAFETY: as above.
unsafe impl<const ZEROED: bool> Sync for Broken<ZEROED> {}

// SAFETY: it breaks the contract on purpose; nothing of this memory is anybody else's, and the battery touches only
// what it was given, which is never more.
unsafe impl<const ZEROED: bool> PageProvider for Broken<ZEROED> {
    const ZEROED: bool = ZEROED;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let mut used = self.used.lock().unwrap();
        if run.len() > 64 << 20 {
            // SAFETY: inside the memory.
            return (self.wrong == Wrong::Absurd).then(|| unsafe { self.memory.add(*used) });
        }
        let align = if self.wrong == Wrong::Alignment { 4096 } else { run.align() };
        let start = used.next_multiple_of(align);
        let end = start + run.len();
        // What it loses is soon all.
        let limit = if self.wrong == Wrong::Loses { 64 << 20 } else { MEMORY.size() };
        if end > limit {
            return None;
        }
        let overlap = if self.wrong == Wrong::Overlap && run.len() > 4096 { 4096 } else { 0 };
        *used = end - overlap;
        // SAFETY: inside the memory.
        Some(unsafe { self.memory.add(start) })
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        let mut used = self.used.lock().unwrap();
        if self.wrong == Wrong::Loses {
            return true;
        }
        let offset = start.addr().get() - self.memory.addr().get();
        let is_last = offset + run.len() == *used;
        if is_last {
            *used = offset;
        }
        is_last
    }
}

#[test]
fn each_broken_promise_of_a_provider_is_named() {
    for (wrong, line) in [
        (Wrong::Alignment, "FAIL provider: runs are aligned as asked for: the run of"),
        (Wrong::Overlap, "FAIL provider: no two runs share memory: the runs at 0x"),
        (Wrong::Loses, "FAIL provider: what it takes back it gives again: a run of"),
        (Wrong::Absurd, "FAIL provider: refuses what it cannot have: a run of half"),
    ] {
        let (_, report) = report(Broken::<false>::new(wrong), Hint(ThreadCpu));
        assert!(report.contains(line), "{wrong:?}: {report}");
    }
    let (_, report) = report(Broken::<true>::new(Wrong::Zeros), Hint(ThreadCpu));
    assert!(report.contains("FAIL provider: pages are zeroed if it says so: ZEROED is true"), "{report}");
}

/// What a pin does wrong.
enum Pin {
    /// Every CPU is the same one.
    Same,
    /// Another number each time.
    Changing(AtomicUsize),
    /// Numbers that the heap has no cache for.
    Beyond,
}

// SAFETY: it breaks the contract on purpose; the battery finds that out before more than one thread allocates.
unsafe impl CpuPin for Pin {
    type Guard = ();
    fn pin(&self) {}
    fn index(&self, (): &()) -> usize {
        match self {
            Self::Same => 0,
            Self::Changing(turn) => turn.fetch_add(1, Ordering::Relaxed) % 3,
            Self::Beyond => 77,
        }
    }
}

/// A heap under such a pin would break, so it is not tried.
fn identity(pin: Pin) -> String {
    let (_, report) = report(Books::default(), Pinned(pin));
    assert!(
        !report.contains("heap: ") && report.ends_with("skip all that rests on a promise that failed\n"),
        "{report}"
    );
    report
}

#[test]
fn a_pin_that_does_not_pin_is_named() {
    let same = identity(Pin::Same);
    assert!(
        same.contains("FAIL identity: a pin keeps others away: two callers were pinned to CPU 0 at once"),
        "{same}"
    );
    let changing = identity(Pin::Changing(AtomicUsize::new(0)));
    assert!(changing.contains("FAIL identity: a pin keeps the CPU: a caller that was pinned to CPU "), "{changing}");
    let beyond = identity(Pin::Beyond);
    assert!(beyond.contains("FAIL identity: every CPU has a cache: 3 callers"), "{beyond}");
}

/// Says that its pages are zeros, but they are not.
#[derive(Default)]
struct Liar(Books);

// SAFETY: but for the zeros it is as good as the books; nothing but a test of the battery uses it.
unsafe impl PageProvider for Liar {
    const ZEROED: bool = true;
    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.0.map(run)
    }
    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: the contract is the same.
        unsafe { self.0.unmap(start, run) }
    }
}

/// The battery is what every other test looks through: it has to see what is wrong.
#[test]
fn the_battery_sees_damage_missing_zeros_and_missing_memory() {
    let heap = Heap::<_, _, 2>::new(Liar::default(), Hint(UnknownCpu));
    assert!(matches!(Filled::zeroed(&heap, layout(100_000, 8), 1), Err(Failure::Damaged { .. })));

    let heap = Heap::<_, _, 2>::new(Books::default(), Hint(UnknownCpu));
    let damaged = |size: usize| {
        let block = filled(&heap, size);
        let mut place = None;
        heap.for_each_run(|run| {
            if run.kind == RunKind::Large {
                place = Some(run.chunk_addr + run.offset);
            }
        });
        let byte: *mut u8 = std::ptr::with_exposed_provenance_mut(place.unwrap() + size - 1);
        // SAFETY: the last byte of the block, which is in use; that its owner does not know of it is the point of the
        // test.
        let old = unsafe { byte.read() };
        // SAFETY: as above.
        unsafe { byte.write(!old) };
        block
    };
    let mut block = damaged(50_000);
    assert!(matches!(block.check(), Err(Failure::Damaged { .. })));
    assert!(matches!(block.realloc(60_000), Err(Failure::Damaged { .. })));
    assert!(matches!(block.free(), Err(Failure::Damaged { .. })));

    let heap = Heap::<_, _, 2>::new(limited(1 << 20), Hint(UnknownCpu));
    assert!(matches!(layouts(&heap, 8, 4 << 20, false), Err(Failure::OutOfMemory { .. })));
    assert_eq!(layouts(&heap, 8, 4 << 20, true), Ok(()));
    assert_eq!(exhaust(&heap, layout(100, 8), 7), Ok(7));
    let mut slots: Vec<Option<Filled<_>>> = (0..10).map(|_| None).collect();
    churn(&heap, &mut Random::new(1), &mut slots, 200, 1000).unwrap();
    free_all(&mut slots).unwrap();
    assert!(slots.iter().all(Option::is_none));
    heap.trim(0);
    assert_eq!(heap.provider().held_len(), 0, "the battery gives back what it takes");
}

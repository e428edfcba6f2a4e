//! Everything at once: what a porter runs over a new provider and a new CPU identity, and reads line by line.
//!
//! Each check is one line. The provider's and the identity's contracts come first, since a heap over a broken one fails
//! in any way.

use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;

use crate::base::sync::{AtomicPtr, AtomicUsize, Ordering, spin_loop};
use crate::battery::{Failure, Filled, Random, churn, free_all, layouts};
use crate::contract::CpuMode;
use crate::contract::provider::{PageProvider, PageRun};
use crate::heap::Heap;
use crate::observe::Violation;
use crate::pages::Mapping;

/// How often a pinned caller looks whether it is still alone: several time slices of most kernels.
const LOOKS: u32 = if cfg!(miri) { 100 } else { 1 << 16 };
/// Waits between two looks.
const WAITS: u32 = 32;
/// Blocks that callers hand to each other.
const HANDED: usize = 64;
/// Steps of each caller.
const STEPS: usize = if cfg!(miri) { 50 } else { 4000 };
/// The longest run that is asked of the provider.
const LONGEST_RUN: usize = 16 << 20;
/// How often that is mapped and unmapped.
const ROUNDS: usize = 64;

/// Runs, in pages: length and alignment.
const RUNS: [(usize, usize); 12] =
    [(1, 1), (1, 1), (3, 1), (2, 4), (1, 16), (16, 16), (5, 2), (1, 64), (64, 1), (7, 8), (1, 512), (2, 1)];

/// Why a check failed.
enum Finding {
    Heap(Failure),
    Broken(Violation),
    NoMemory,
    Busy,
    Misaligned { start: usize, run: PageRun },
    Overlap { one: usize, other: usize },
    OfHeap { start: usize },
    Changed { addr: usize },
    NotZero { addr: usize },
    Lost { round: usize, len: usize },
    Absurd { start: usize },
    NoCache { callers: usize },
    Shared { index: usize },
    Moved { index: usize },
    Strays { count: u64 },
}

impl From<Failure> for Finding {
    fn from(failure: Failure) -> Self {
        Self::Heap(failure)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Heap(failure) => failure.fmt(f),
            Self::Broken(violation) => violation.fmt(f),
            Self::NoMemory => f.write_str("no memory"),
            Self::Busy => f.write_str("somebody else was with the provider all the time"),
            Self::Misaligned { start, run } => {
                write!(f, "the run of {:#x} bytes at {start:#x} is not at a multiple of {:#x}", run.len(), run.align())
            }
            Self::Overlap { one, other } => write!(f, "the runs at {one:#x} and {other:#x} share bytes"),
            Self::OfHeap { start } => write!(f, "the run at {start:#x} lies in memory that the heap has"),
            Self::Changed { addr } => write!(f, "the page at {addr:#x} has not what was written there"),
            Self::NotZero { addr } => write!(f, "ZEROED is true, and the word at {addr:#x} is not zero"),
            Self::Lost { round, len } => {
                write!(f, "a run of {len:#x} bytes was taken back {round} times, and then not given any more")
            }
            Self::Absurd { start } => write!(f, "a run of half the address space was given, at {start:#x}"),
            Self::NoCache { callers } => write!(f, "{callers} callers have an index that the heap has no cache for"),
            Self::Shared { index } => write!(f, "two callers were pinned to CPU {index} at once"),
            Self::Moved { index } => write!(f, "a caller that was pinned to CPU {index} was then on another one"),
            Self::Strays { count } => write!(f, "{count} frees of what the heap never gave"),
        }
    }
}

/// Some checks failed; the report names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed {
    /// How many.
    pub count: usize,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} checks of the battery failed", self.count)
    }
}

impl core::error::Error for Failed {}

struct Report<'a> {
    out: &'a mut dyn fmt::Write,
    failed: usize,
}

impl Report<'_> {
    /// One line. What the kernel's console does not take is lost.
    fn judge(&mut self, what: &str, found: Result<(), Finding>) {
        let _ = match found {
            Ok(()) => writeln!(self.out, "ok   {what}"),
            Err(finding) => {
                self.failed += 1;
                writeln!(self.out, "FAIL {what}: {finding}")
            }
        };
    }
}

fn addr(memory: &Mapping) -> usize {
    memory.start().as_ptr().addr()
}

fn overlaps(memory: &Mapping, start: usize, len: usize) -> bool {
    addr(memory) < start.saturating_add(len) && start < addr(memory).saturating_add(memory.len())
}

/// The first word of each page.
fn pages(memory: &Mapping, page_len: usize) -> impl Iterator<Item = *mut usize> {
    let start = memory.start().as_ptr();
    (0..memory.len() / page_len).map(move |page| start.wrapping_add(page * page_len).cast())
}

/// Checks a heap over its provider and its CPU identity: one line a check to `report`, at most 22, each with `ok` or
/// `FAIL` in front and what was found. Where a promise of the provider or of the identity is broken, what rests on it
/// is not tried.
///
/// `cpus` does the given work once on each CPU that uses the heap, all at once, and returns when all are done; with one
/// CPU it is `|work| work()`. Where tasks are preempted, have it start two tasks for each CPU: only then a pin that
/// does not keep others away is found.
///
/// ```
/// # #[cfg(feature = "region")] {
/// use smp_heap::{Heap, Hint, RegionProvider, battery, cpu::UnknownCpu};
///
/// static HEAP: Heap<RegionProvider<1>, Hint<UnknownCpu>, 4> = Heap::new(RegionProvider::new(), Hint(UnknownCpu));
/// # let memory = Box::leak(vec![0_u8; 4 << 20].into_boxed_slice());
/// # unsafe { HEAP.provider().add_region(memory.as_mut_ptr(), memory.len()) }?;
/// let mut report = String::new(); // in a kernel: whatever prints
/// let passed = battery::run(&HEAP, |work| work(), &mut report);
/// assert!(passed.is_ok(), "{report}");
/// # }
/// # Ok::<(), Box<dyn core::error::Error>>(())
/// ```
///
/// # Errors
/// [`Failed`]: how many checks failed.
///
/// # Context
/// A task, with interrupts as usual, while others may use the heap. Takes some seconds under an emulator, about 4 KiB
/// of stack on each CPU, up to 16 MiB of the provider's memory for a moment. With a pin each CPU stays pinned for some
/// ten milliseconds.
pub fn run<P: PageProvider, C: CpuMode, const CPUS: usize>(
    heap: &Heap<P, C, CPUS>,
    cpus: impl Fn(&(dyn Fn() + Sync)),
    report: &mut dyn fmt::Write,
) -> Result<(), Failed>
where
    Heap<P, C, CPUS>: Sync,
{
    let mut report = Report { out: report, failed: 0 };
    provider(heap, &mut report);
    if report.failed == 0 {
        identity(heap, &cpus, &mut report);
    }
    if report.failed == 0 {
        contexts(heap, &mut report);
        all_of_heap(heap, &cpus, &mut report);
    } else {
        let _ = writeln!(report.out, "skip all that rests on a promise that failed");
    }
    match report.failed {
        0 => Ok(()),
        count => Err(Failed { count }),
    }
}

fn all_of_heap<P: PageProvider, C: CpuMode, const CPUS: usize>(
    heap: &Heap<P, C, CPUS>,
    cpus: &impl Fn(&(dyn Fn() + Sync)),
    report: &mut Report<'_>,
) where
    Heap<P, C, CPUS>: Sync,
{
    let strays = heap.engine.stray_count();
    let all = layouts(heap, 1 << 16, 1 << 16, true);
    report.judge("heap: every size at every alignment up to 64 KiB", all.map_err(Finding::from));
    report.judge("heap: all CPUs allocate, resize and free at once", together(cpus, |seed| mix(heap, seed)));
    let handed = [const { AtomicPtr::new(core::ptr::null_mut()) }; HANDED];
    report.judge("heap: blocks freed by other CPUs", together(cpus, |_| hand_over(heap, &handed)));
    let left = handed.iter().filter_map(|place| NonNull::new(place.swap(core::ptr::null_mut(), Ordering::Acquire)));
    report.judge("heap: blocks handed over and kept", left.into_iter().try_for_each(|block| end(heap, block)));
    report.judge("heap: every invariant", heap.verify().map(drop).map_err(Finding::Broken));
    let strays = heap.engine.stray_count() - strays;
    report.judge("heap: nothing foreign was freed", found(strays == 0, Finding::Strays { count: strays }));
}

fn found(holds: bool, finding: Finding) -> Result<(), Finding> {
    if holds { Ok(()) } else { Err(finding) }
}

/// Does `work` on each CPU, with another number each; the last finding.
fn together(
    cpus: &impl Fn(&(dyn Fn() + Sync)),
    work: impl Fn(u64) -> Result<(), Finding> + Sync,
) -> Result<(), Finding> {
    let (callers, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (place, size) = (AtomicUsize::new(0), AtomicUsize::new(0));
    cpus(&|| {
        let caller = callers.fetch_add(1, Ordering::Relaxed) as u64;
        match work(caller + 1) {
            Ok(()) => {}
            Err(Finding::Heap(Failure::OutOfMemory { size: len })) => {
                size.store(len, Ordering::Relaxed);
                failed.store(1, Ordering::Release);
            }
            Err(Finding::Heap(Failure::Damaged { addr } | Failure::Misplaced { addr, .. })) => {
                place.store(addr, Ordering::Relaxed);
                failed.store(2, Ordering::Release);
            }
            Err(_) => failed.store(3, Ordering::Release),
        }
    });
    match failed.load(Ordering::Acquire) {
        0 => Ok(()),
        1 => Err(Finding::Heap(Failure::OutOfMemory { size: size.load(Ordering::Relaxed) })),
        2 => Err(Finding::Heap(Failure::Damaged { addr: place.load(Ordering::Relaxed) })),
        _ => Err(Finding::NoMemory),
    }
}

// The provider's contract.

fn provider<P: PageProvider, C: CpuMode, const CPUS: usize>(heap: &Heap<P, C, CPUS>, report: &mut Report<'_>) {
    let mut runs = [const { None }; RUNS.len()];
    let asked = RUNS.iter().zip(&mut runs).try_for_each(|((len, align), place)| {
        let run = PageRun::new(len * P::PAGE_LEN, align * P::PAGE_LEN, P::PAGE_LEN).ok_or(Finding::NoMemory)?;
        *place = map(heap, run)?;
        Ok(())
    });
    let any = asked.and_then(|()| found(runs.iter().any(Option::is_some), Finding::NoMemory));
    report.judge("provider: gives pages", any);
    let mapped = || runs.iter().flatten();
    let misaligned = mapped().find(|memory| addr(memory) % memory.run().align() != 0);
    let finding = |memory: &Mapping| Err(Finding::Misaligned { start: addr(memory), run: memory.run() });
    report.judge("provider: runs are aligned as asked for", misaligned.map_or(Ok(()), finding));
    let apart = apart(heap, mapped);
    let is_sound = apart.is_ok();
    report.judge("provider: no two runs share memory", apart);
    // Where two runs share memory, writing to them would tell nothing more.
    if is_sound {
        report.judge("provider: pages are zeroed if it says so", if P::ZEROED { zeroed(mapped()) } else { Ok(()) });
        report.judge("provider: pages keep what is written", kept(mapped, P::PAGE_LEN));
        runs.into_iter().flatten().for_each(|memory| heap.give_back(memory, heap.caller()));
    }
    report.judge("provider: what it takes back it gives again", comes_back(heap));
    report.judge("provider: refuses what it cannot have", refuses(heap));
}

fn map<P: PageProvider, C: CpuMode, const CPUS: usize>(
    heap: &Heap<P, C, CPUS>,
    run: PageRun,
) -> Result<Option<Mapping>, Finding> {
    heap.source.map(run, heap.asker(heap.caller())).map_err(|_| Finding::Busy)
}

/// Whether no run lies in another one, or in a chunk of the heap.
fn apart<'m, P: PageProvider, C: CpuMode, const CPUS: usize, I: Iterator<Item = &'m Mapping>>(
    heap: &Heap<P, C, CPUS>,
    mapped: impl Fn() -> I,
) -> Result<(), Finding> {
    for (index, one) in mapped().enumerate() {
        if let Some(other) = mapped().skip(index + 1).find(|other| overlaps(one, addr(other), other.len())) {
            return Err(Finding::Overlap { one: addr(one), other: addr(other) });
        }
    }
    let mut inside = None;
    heap.for_each_run(|run| {
        let start = run.chunk_addr.wrapping_add(run.offset);
        inside = inside.or_else(|| mapped().find(|memory| overlaps(memory, start, run.len)));
    });
    inside.map_or(Ok(()), |memory| Err(Finding::OfHeap { start: addr(memory) }))
}

fn zeroed<'m>(mut mapped: impl Iterator<Item = &'m Mapping>) -> Result<(), Finding> {
    mapped.try_for_each(|memory| {
        let words = memory.len() / size_of::<usize>();
        let mut words = (0..words).map(|word| memory.start().as_ptr().cast::<usize>().wrapping_add(word));
        // SAFETY: inside the run, which the provider has just given, mapped and readable, and nobody else uses.
        let other = words.find(|word| unsafe { word.read_volatile() } != 0);
        other.map_or(Ok(()), |word| Err(Finding::NotZero { addr: word.addr() }))
    })
}

/// Writes to each page of all runs, then reads all of them: a page that is there twice has another one's word.
fn kept<'m, I: Iterator<Item = &'m Mapping>>(mapped: impl Fn() -> I, page_len: usize) -> Result<(), Finding> {
    let pages = || mapped().flat_map(|memory| pages(memory, page_len));
    for page in pages() {
        // SAFETY: a page's first word, inside the run, which the provider has just given and nobody else uses.
        unsafe { page.write_volatile(!page.addr()) };
    }
    // SAFETY: as above; it was just written.
    let other = pages().find(|page| unsafe { page.read_volatile() } != !page.addr());
    other.map_or(Ok(()), |page| Err(Finding::Changed { addr: page.addr() }))
}

/// Has the longest run that there is taken back and given again.
fn comes_back<P: PageProvider, C: CpuMode, const CPUS: usize>(heap: &Heap<P, C, CPUS>) -> Result<(), Finding> {
    let mut len = LONGEST_RUN;
    let mut memory = loop {
        let run = PageRun::new(len, P::PAGE_LEN, P::PAGE_LEN).ok_or(Finding::NoMemory)?;
        match map(heap, run)? {
            Some(memory) => break memory,
            None if len <= P::PAGE_LEN => return Err(Finding::NoMemory),
            None => len /= 2,
        }
    };
    let run = memory.run();
    for round in 1..=ROUNDS {
        if let Err(memory) = heap.unmap(memory, heap.caller()) {
            // It need not take anything back: the heap then keeps it.
            heap.give_back(memory, heap.caller());
            return Ok(());
        }
        memory = map(heap, run)?.ok_or(Finding::Lost { round, len })?;
    }
    heap.give_back(memory, heap.caller());
    Ok(())
}

fn refuses<P: PageProvider, C: CpuMode, const CPUS: usize>(heap: &Heap<P, C, CPUS>) -> Result<(), Finding> {
    let absurd =
        PageRun::new(isize::MAX as usize & !(P::PAGE_LEN - 1), P::PAGE_LEN, P::PAGE_LEN).ok_or(Finding::NoMemory)?;
    map(heap, absurd)?.map_or(Ok(()), |memory| Err(Finding::Absurd { start: addr(&memory) }))
}

// The identity's contract.

/// What callers found about the numbers that they were given.
struct Seats<const CPUS: usize> {
    /// Callers pinned to each index now.
    taken: [AtomicUsize; CPUS],
    /// An index plus 1 that two callers had at once, and one that a caller lost.
    shared: AtomicUsize,
    moved: AtomicUsize,
    beyond: AtomicUsize,
}

fn identity<P: PageProvider, C: CpuMode, const CPUS: usize>(
    heap: &Heap<P, C, CPUS>,
    cpus: &impl Fn(&(dyn Fn() + Sync)),
    report: &mut Report<'_>,
) where
    Heap<P, C, CPUS>: Sync,
{
    let seats = Seats::<CPUS> {
        taken: [const { AtomicUsize::new(0) }; CPUS],
        shared: AtomicUsize::new(0),
        moved: AtomicUsize::new(0),
        beyond: AtomicUsize::new(0),
    };
    cpus(&|| seats.sit(heap));
    let beyond = seats.beyond.load(Ordering::Relaxed);
    report.judge("identity: every CPU has a cache", found(beyond == 0, Finding::NoCache { callers: beyond }));
    let broken = |place: &AtomicUsize| place.load(Ordering::Relaxed).checked_sub(1);
    let shared = broken(&seats.shared).map_or(Ok(()), |index| Err(Finding::Shared { index }));
    report.judge("identity: a pin keeps others away", shared);
    let moved = broken(&seats.moved).map_or(Ok(()), |index| Err(Finding::Moved { index }));
    report.judge("identity: a pin keeps the CPU", moved);
}

impl<const CPUS: usize> Seats<CPUS> {
    /// Stays pinned for a while, and looks whether the number stays, and stays the caller's alone. A hint promises
    /// neither.
    fn sit<P, C: CpuMode>(&self, heap: &Heap<P, C, CPUS>) {
        let guard = heap.mode.pin();
        let index = heap.mode.index(&guard);
        let Some(taken) = self.taken.get(index).filter(|_| C::PINNED) else {
            self.beyond.fetch_add(usize::from(C::PINNED), Ordering::Relaxed);
            return;
        };
        taken.fetch_add(1, Ordering::Relaxed);
        for _ in 0..LOOKS {
            (0..WAITS).for_each(|_| spin_loop());
            if taken.load(Ordering::Relaxed) > 1 {
                self.shared.store(index + 1, Ordering::Relaxed);
            }
            if heap.mode.index(&heap.mode.pin()) != index {
                self.moved.store(index + 1, Ordering::Relaxed);
            }
        }
        taken.fetch_sub(1, Ordering::Relaxed);
        drop(guard);
    }
}

// Contexts.

fn contexts<P: PageProvider, C: CpuMode, const CPUS: usize>(heap: &Heap<P, C, CPUS>, report: &mut Report<'_>) {
    let block = |size: usize| {
        let layout = Layout::from_size_align(size, 8).unwrap_or(Layout::new::<u64>());
        Filled::new(heap, layout, 0x69)?.ok_or(Finding::NoMemory)
    };
    let nested = || {
        // A second block beside each one that stays, so that there is something at hand.
        let kept = [block(8)?, block(200)?, block(3000)?];
        let interrupted = heap.enter();
        let served = [8, 200, 3000].map(block);
        let freed = served.into_iter().try_for_each(|block| block?.free().map_err(Finding::from));
        drop(interrupted);
        kept.into_iter().try_for_each(Filled::free)?;
        freed
    };
    report.judge("contexts: one that interrupts the heap is served", nested());
    let inside = heap.source.inside(heap.asker(heap.caller()), || block(200)?.free().map_err(Finding::from));
    report.judge("contexts: the provider may use the heap", inside.unwrap_or(Err(Finding::Busy)));
}

// The heap.

fn mix<P: PageProvider, C: CpuMode, const CPUS: usize>(heap: &Heap<P, C, CPUS>, seed: u64) -> Result<(), Finding> {
    let mut slots = [const { None }; 32];
    churn(heap, &mut Random::new(seed), &mut slots, STEPS, 1 << 14)?;
    Ok(free_all(&mut slots)?)
}

/// What is handed over.
const WORDS: Layout = Layout::new::<[usize; 8]>();

/// Takes what another caller left, or leaves something.
fn hand_over<P: PageProvider, C: CpuMode, const CPUS: usize>(
    heap: &Heap<P, C, CPUS>,
    places: &[AtomicPtr<u8>],
) -> Result<(), Finding> {
    for place in places.iter().cycle().take(STEPS) {
        if let Some(block) = NonNull::new(place.swap(core::ptr::null_mut(), Ordering::Acquire)) {
            end(heap, block)?;
            continue;
        }
        let block = heap.alloc(WORDS).map_err(|_| Finding::NoMemory)?.cast::<usize>();
        // SAFETY: just allocated, long enough and aligned for a word.
        unsafe { block.write(!block.as_ptr().addr()) };
        if let Some(other) = NonNull::new(place.swap(block.as_ptr().cast(), Ordering::AcqRel)) {
            end(heap, other)?;
        }
    }
    Ok(())
}

/// Checks and frees a block that was handed over.
fn end<P: PageProvider, C: CpuMode, const CPUS: usize>(
    heap: &Heap<P, C, CPUS>,
    block: NonNull<u8>,
) -> Result<(), Finding> {
    // SAFETY: `hand_over` wrote the word, and whoever swapped the block out of its place has it alone.
    let is_whole = unsafe { block.cast::<usize>().read() } == !block.as_ptr().addr();
    // SAFETY: as above; it is this heap's, of that Layout, and used no more.
    unsafe { heap.free(block, WORDS) };
    found(is_whole, Finding::Heap(Failure::Damaged { addr: block.as_ptr().addr() }))
}

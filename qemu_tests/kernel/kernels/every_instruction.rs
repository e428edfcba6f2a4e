//! An interrupt, or an NMI, at every instruction of a sequence of calls of the heap, its handler calling the heap too.
//!
//! The sequence is run again and again from the same state. Each of its calls is first walked through in single steps,
//! which gives the list of its instructions; then it is run with the CPU's timer set to come after k counts, for k = 1,
//! 2, 3 and so on until the call is over first. The emulator counts instructions (`-icount`), so a count is an
//! instruction, and whatever is found can be had again. That no instruction is left out is checked by the list: each
//! interrupt has to come at the next one, except where interrupts are masked. The long calls are interrupted at every
//! 61st instruction unless `soak` says more; then the sequence is a longer one too. Would catch breaking: alloc and
//! free never deadlock, nor refuse without cause, interrupted at *any* instruction; nothing is handed out twice; the
//! heap is whole afterwards; everything freed comes back, whoever freed it.
//!
//! With `raise=panic` the interrupt is a panic: its handler puts the heap into panic mode, formats a message into a
//! `String`, fills a buffer of 4 KiB and prints, and what it interrupted never goes on.
//!
//! The handler allocates and frees in the class of the interrupted call, in another one, and a large block, and frees
//! blocks that the task allocated; the task frees what the handler left. There is memory for all of it, in regions of
//! which one at most is locked: no request is refused.
#![no_std]
#![no_main]
#![expect(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "patterns take the low bits; a list that is too short ends the test"
)]

extern crate alloc;

mod common;

use alloc::string::String;
use alloc::vec;
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};

use common::block::{Block, each_word};
use common::heaps::{Regions, expect_back, heap, verify};
use common::modes::{Index, InterruptsMasked, Places, heaps};
use common::renew::Counts;
use common::slots::Slots;
use smp_heap::cpu::{ByAddr, NeverPreempts, UnknownCpu};
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::step::{self, Next};
use smp_heap_kernel::sync::Once;
use smp_heap_kernel::timer::{self, Raise};
use smp_heap_kernel::{Boot, Context, abandon, arch, interrupts, kernel, nmi, println, test};

heaps! {
    renewable 2 within REGION_LIMIT over Regions = Regions::new();
    Hint<Index>,
    Pinned<NeverPreempts<Index>>,
    Pinned<ByAddr<NeverPreempts<UnknownCpu>, Places>>,
    Pinned<InterruptsMasked<Index>>,
}

/// What a run of the sequence is for.
struct Trial {
    /// The call that is looked at, counted from 1.
    call: AtomicUsize,
    /// After how many counts its timer comes; 0: none, the call is listed.
    count: AtomicUsize,
    /// Calls that this run has made.
    made: AtomicUsize,
    /// The interrupts that came.
    came: AtomicUsize,
    /// Where, as [`LIST`] has it; [`OVER`] if the call was over.
    place: AtomicU64,
    /// The size that the call is about.
    size: AtomicUsize,
}

static TRIAL: Trial = Trial {
    call: AtomicUsize::new(0),
    count: AtomicUsize::new(0),
    made: AtomicUsize::new(0),
    came: AtomicUsize::new(0),
    place: AtomicU64::new(0),
    size: AtomicUsize::new(0),
};

/// The places between the instructions of the call that is looked at: the address of the next one, and [`OPEN`].
static LIST: [AtomicU64; 1 << 18] = [const { AtomicU64::new(0) }; 1 << 18];
static LIST_LEN: AtomicUsize = AtomicUsize::new(0);
/// Interrupts are not masked there.
const OPEN: u64 = 1 << 63;
/// No place in a call.
const OVER: u64 = 0;

/// What the heap does in a run that nothing interrupts.
static LONE: Once<Counts> = Once::new();
/// The interrupt is a panic: it reports, and what it interrupted does not go on.
static PANICS: AtomicBool = AtomicBool::new(false);
/// Panics that reported.
static REPORTS: AtomicUsize = AtomicUsize::new(0);
static NMIS: AtomicBool = AtomicBool::new(false);
/// Handlers that found a cache held; requests of handlers; those that were refused.
static INSIDE: AtomicUsize = AtomicUsize::new(0);
static REQUESTS: AtomicUsize = AtomicUsize::new(0);
static REFUSED: AtomicUsize = AtomicUsize::new(0);

/// Blocks that task and handler take from each other: of the interrupted class, of another one, large.
static SHARED: Slots<3> = Slots::new();
const OTHER: usize = 200;
const LARGE: usize = 40_000;

/// Room for a block of 1 MiB, if nothing else is in the region: so that the heap asks for a second one.
const REGION_LIMIT: usize = (1 << 20) + (64 << 10);

/// The vector of the interrupt.
const VECTOR: u8 = arch::vector::FREE;

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        match boot.arg("raise") {
            Some("interrupt") => {}
            Some("nmi") => NMIS.store(true, Relaxed),
            Some("panic") => {
                // Wherever one can.
                NMIS.store(nmi::EXISTS, Relaxed);
                PANICS.store(true, Relaxed);
            }
            other => test::fail(format_args!("raise={other:?} is not a way to interrupt")),
        }
        interrupts::set_handler(VECTOR, strike);
        if nmi::EXISTS {
            nmi::set_handler(strike);
        }
        // What takes hours is for the long form of the tests.
        let soak = boot.number("soak", 1) > 1;
        let sequence: fn(&Task) = if soak { long } else { short };
        // In calls of more than so many instructions the counts go up by `stride`, else by 1.
        let (limit, stride) = (boot.number("limit", 1000), if soak { 1 } else { boot.number("stride", 61) });
        run(sequence, 0, 0);
        let calls = TRIAL.made.load(Relaxed);
        let did = LONE.get().copied().unwrap_or_default();
        println!("{did:?}");
        let is_all_there = did.refilled > 0 && did.flushed > 0 && did.maps > 1 && did.unmaps > 0;
        assert!(is_all_there, "the sequence leaves out what it is for");
        let mut sum = Sum::default();
        for call in 1..=calls {
            run(sequence, call, 0);
            let len = LIST_LEN.load(Relaxed);
            sum.add(interrupt_each(sequence, call, if len > limit { stride } else { 1 }), len);
        }
        println!(
            "{calls} calls of {} instructions, the longest of {}: interrupted at {}, {} of {} interrupts inside the heap",
            sum.instructions,
            sum.longest,
            sum.places,
            INSIDE.load(Relaxed),
            sum.interrupts,
        );
        println!("{} of {} requests of handlers refused", REFUSED.load(Relaxed), REQUESTS.load(Relaxed));
        assert!(sum.places > 1000, "nothing was interrupted");
        test::did(sum.places, "places");
        test::did(REQUESTS.load(Relaxed), "nested_requests");
        if PANICS.load(Relaxed) {
            let reports = REPORTS.load(Relaxed);
            test::did(reports, "panics");
            assert!(reports >= sum.interrupts, "{} panics, {reports} reports", sum.interrupts);
        }
        // Masking keeps interrupts out of what a cache is held for, and does so for nothing else.
        let kept_out = boot.arg("mode") == Some("masked") && !NMIS.load(Relaxed);
        assert_eq!(kept_out, INSIDE.load(Relaxed) == 0, "interrupts inside the heap");
        assert_eq!(REFUSED.load(Relaxed), 0, "requests refused though there was memory");
    }
}

/// What came of one call or of all.
#[derive(Default)]
struct Sum {
    instructions: usize,
    longest: usize,
    interrupts: usize,
    places: usize,
}

impl Sum {
    fn add(&mut self, (interrupts, places): (usize, usize), instructions: usize) {
        self.instructions += instructions;
        self.longest = self.longest.max(instructions);
        self.interrupts += interrupts;
        self.places += places;
    }
}

/// Interrupts the call at each instruction, which is checked, or at each `stride`-th; gives how many interrupts came,
/// and at how many places.
fn interrupt_each(sequence: fn(&Task), call: usize, stride: usize) -> (usize, usize) {
    let list = &LIST[..LIST_LEN.load(Relaxed)];
    // The place that was interrupted last; none yet.
    let mut last = None;
    let (mut interrupts, mut places) = (0, 0);
    // The first counts are over before the call begins.
    for count in (1..).step_by(stride) {
        run(sequence, call, count);
        if TRIAL.came.load(Relaxed) == 0 {
            break;
        }
        let place = TRIAL.place.load(Relaxed);
        if place == OVER && last.is_none() {
            continue;
        }
        interrupts += 1;
        if place == OVER {
            break;
        }
        if stride > 1 {
            places += 1;
            last = Some(0);
            continue;
        }
        // The same place, or the next one at which it can come.
        let is_open = |at: usize| NMIS.load(Relaxed) || list.get(at).is_some_and(|at| at.load(Relaxed) & OPEN != 0);
        let is_here = |at: &usize| list.get(*at).is_some_and(|at| at.load(Relaxed) & !OPEN == place);
        let first = last.map_or(0, |last: usize| last + 1);
        let open = (first..list.len()).find(|at| is_open(*at)).unwrap_or(list.len());
        let Some(next) = last.filter(is_here).or_else(|| (first..=open).find(is_here)) else {
            test::fail(format_args!(
                "{count} counts into call {call} the interrupt came at {place:#x}, not at place {first}"
            ));
        };
        places += usize::from(Some(next) != last);
        last = Some(next);
    }
    (interrupts, places)
}

/// One run from the first state.
fn run(sequence: fn(&Task), call: usize, count: usize) {
    common::renew::renew();
    TRIAL.call.store(call, Relaxed);
    TRIAL.count.store(count, Relaxed);
    TRIAL.made.store(0, Relaxed);
    TRIAL.came.store(0, Relaxed);
    TRIAL.place.store(OVER, Relaxed);
    for (place, size) in [64, OTHER, LARGE].into_iter().enumerate() {
        SHARED.swap(place, Block::new(heap(), size, 8, place as u8));
    }
    if PANICS.load(Relaxed) {
        common::renew::set_aside(64 << 10);
    }
    abandon::catch(|| sequence(&Task));
    if PANICS.load(Relaxed) && TRIAL.came.load(Relaxed) > 0 {
        // The heap is as the panic left it, and is used no more.
        (0..3).for_each(|place| _ = SHARED.swap(place, None));
        return;
    }
    if call == 0 {
        // SAFETY: once, at the start, on the only CPU that does anything.
        unsafe { LONE.set(common::renew::counts()) };
    }
    SHARED.free_part(heap(), 0, 1);
    if !PANICS.load(Relaxed) {
        verify();
        // What is renewed next is not verified once more.
        expect_back(0);
    }
}

/// The heap as the task calls it: steps where the trial wants them.
struct Task;

impl Task {
    fn call(&self, size: usize, work: impl FnOnce()) {
        let made = TRIAL.made.load(Relaxed) + 1;
        TRIAL.made.store(made, Relaxed);
        if made != TRIAL.call.load(Relaxed) {
            return work();
        }
        TRIAL.size.store(size, Relaxed);
        match TRIAL.count.load(Relaxed) {
            0 => list(work),
            count => {
                let raise = if NMIS.load(Relaxed) { Raise::Nmi } else { Raise::Vector(VECTOR) };
                timer::once_in(work, count as u32, raise);
            }
        }
    }
}

/// Lists the call's instructions.
fn list(work: impl FnOnce()) {
    let mut len = 0;
    step::through(work, |context, _| {
        let open = if context.interrupts_are_open() { OPEN } else { 0 };
        LIST[len].store(context.pc() | open, Relaxed);
        len += 1;
        Next::Step
    });
    // The last place is behind the call.
    LIST_LEN.store(len - 1, Relaxed);
}

// SAFETY: all of it is the heap's doing.
unsafe impl GlobalAlloc for Task {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut start = core::ptr::null_mut();
        // SAFETY: the contract is the same.
        self.call(layout.size(), || start = unsafe { heap().alloc(layout) });
        start
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the contract is the same.
        self.call(layout.size(), || unsafe { heap().dealloc(start, layout) });
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let mut new = core::ptr::null_mut();
        // SAFETY: the contract is the same.
        self.call(layout.size(), || new = unsafe { heap().realloc(start, layout, new_size) });
        new
    }
}

/// The handler.
fn strike(context: &mut Context) {
    if TRIAL.came.fetch_add(1, Relaxed) != 0 || TRIAL.count.load(Relaxed) == 0 {
        test::fail(format_args!("an interrupt that was not asked for, at {:#x}", context.pc()));
    }
    if timer::is_inside(context) {
        TRIAL.place.store(context.pc(), Relaxed);
    }
    INSIDE.fetch_add(usize::from(common::renew::is_held()), Relaxed);
    if PANICS.load(Relaxed) {
        report(context);
        return abandon::leave(context);
    }
    let size = TRIAL.size.load(Relaxed);
    for (place, size) in [size, OTHER, LARGE].into_iter().enumerate() {
        let [kept, freed] = core::array::from_fn(|seed| {
            let block = Block::new(heap(), size, 8, seed as u8);
            REQUESTS.fetch_add(1, Relaxed);
            REFUSED.fetch_add(usize::from(block.is_none()), Relaxed);
            block
        });
        if let Some(freed) = freed {
            freed.free(heap());
        }
        if let Some(old) = SHARED.swap(place, kept) {
            old.free(heap());
        }
    }
}

/// What a panic handler does: it formats a message, which grows, takes a buffer, and prints.
fn report(context: &Context) {
    use core::fmt::Write;
    common::renew::panics();
    let mut text = String::new();
    let (call, count) = (TRIAL.call.load(Relaxed), TRIAL.count.load(Relaxed));
    if write!(text, "panic {count} counts into call {call}, at {:#x}: {:?}", context.pc(), Layout::new::<u64>())
        .is_err()
    {
        test::fail(format_args!("a string does not take what is written to it"));
    }
    let mut buffer = vec![0_u8; 4096];
    buffer.iter_mut().zip(text.bytes().cycle()).for_each(|(place, byte)| *place = byte);
    assert!(buffer.starts_with(text.as_bytes()), "the buffer is somebody else's too");
    println!("{text}");
    REPORTS.fetch_add(1, Relaxed);
}

/// The heap as `String` and `Vec` know it.
struct Global;

// SAFETY: all of it is the heap's doing.
unsafe impl GlobalAlloc for Global {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the contract is the same.
        unsafe { heap().alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the contract is the same.
        unsafe { heap().dealloc(start, layout) };
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the contract is the same.
        unsafe { heap().realloc(start, layout, new_size) }
    }
}

#[global_allocator]
static GLOBAL: Global = Global;

/// A block of the task's; there is memory for all of them.
fn new(task: &Task, size: usize) -> Block {
    let Some(block) = Block::new(task, size, 8, size as u8) else {
        test::fail(format_args!("no memory for {size} bytes\n{}", common::heaps::Shown));
    };
    block
}

/// Reallocates, and checks that the content is what it was.
fn grow(task: &Task, block: Block, size: usize) -> Block {
    let layout = block.check();
    let start = block.into_start();
    let kept_len = layout.size().min(size);
    let before = sum(start, kept_len);
    // SAFETY: the block is the heap's, of that Layout, and used by nobody else.
    let Some(new) = NonNull::new(unsafe { task.realloc(start.as_ptr().cast(), layout, size) }) else {
        test::fail(format_args!("no memory to make {layout:?} {size} bytes long"));
    };
    let new = new.cast();
    assert_eq!(sum(new, kept_len), before, "a block lost its content on the way to {size} bytes");
    let Ok(layout) = Layout::from_size_align(size, layout.align()) else {
        test::fail(format_args!("{size} bytes cannot be"));
    };
    // SAFETY: what `realloc` gave is of that Layout.
    unsafe { Block::filled(new, layout, size as u8) }
}

/// A sum over the words that are written in a block of so many bytes.
fn sum(start: NonNull<u64>, size: usize) -> u64 {
    let mut sum = 0_u64;
    let mut add = |index| {
        // SAFETY: callers stay inside the block.
        let place = unsafe { start.add(index) };
        // SAFETY: as above; a word that nobody wrote is read too, as whatever it is.
        sum = sum.rotate_left(1) ^ unsafe { place.read_volatile() };
    };
    add(0);
    each_word(size, add);
    sum
}

/// A block for which the heap needs a chunk more, and which leaves too much when it is freed.
fn chunk(task: &Task) {
    let layout = Layout::new::<[u64; 128 << 10]>();
    // SAFETY: the size is not 0.
    let Some(start) = NonNull::new(unsafe { task.alloc(layout) }) else {
        test::fail(format_args!("no memory for {layout:?}"));
    };
    // SAFETY: the block is as long as that.
    unsafe { start.write_bytes(1, 64) };
    // SAFETY: just allocated with this Layout, and used no more.
    unsafe { task.dealloc(start.as_ptr(), layout) };
}

/// All kinds of calls, few of each.
fn short(task: &Task) {
    let small = [48, 64].map(|size| [new(task, size), new(task, size), new(task, size)]);
    small.into_iter().flatten().for_each(|block| block.free(task));
    let large = new(task, LARGE);
    let large = grow(task, large, 60_000);
    let grown = grow(task, new(task, 100), 3000);
    let grown = grow(task, grown, 50_000);
    large.free(task);
    grown.free(task);
    chunk(task);
    task.call(64, || heap().drain_current());
    task.call(64, || heap().trim());
}

/// Enough of each to found slabs, to fill lists, to send them home in batches, and to retire slabs.
fn long(task: &Task) {
    /// Blocks of each size.
    const COUNT: usize = 40;
    /// The order in which they are freed: neighbours far from each other.
    const STEP: usize = 7;
    for size in [40, 600, 3000] {
        let mut blocks: [Option<Block>; COUNT] = core::array::from_fn(|_| Some(new(task, size)));
        for place in 0..COUNT {
            if let Some(block) = blocks[place * STEP % COUNT].take() {
                block.free(task);
            }
        }
    }
    let shrunk = grow(task, grow(task, new(task, 200_000), 80_000), 300_000);
    let large = [1, 2, 3].map(|pages| new(task, 40_000 * pages));
    shrunk.free(task);
    large.into_iter().for_each(|block| block.free(task));
    short(task);
}

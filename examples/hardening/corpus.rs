//! Bugs, each a function that breaks the heap's contract in one way, and what a forked process saw of it.

use std::alloc::Layout;
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use smp_heap::{CpuHint, Heap, Hint, PageProvider, PageRun};

/// The host's address space, page by page: zeroed pages, growth by moving.
#[derive(Debug)]
pub(crate) struct Space;

// SAFETY: anonymous private mappings are nobody else's and stay until unmapped.
unsafe impl PageProvider for Space {
    const ZEROED: bool = true;
    const REENTRANT: bool = true;
    const REMAPS: bool = true;
    const GUARDS: bool = cfg!(feature = "guard-pages");

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let (protection, flags) =
            (if Self::GUARDS { libc::PROT_NONE } else { rights }, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let len = run.len() + run.align() - Self::PAGE_LEN + 2 * GUARD_LEN;
        // SAFETY: a new anonymous mapping at an address of the system's choice touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let start = NonNull::new(start.cast::<u8>())?;
        // What is in front of the aligned start, and behind the run's end, stays mapped and unused: this process is
        // short.
        let skip = GUARD_LEN + ((start.addr().get() + GUARD_LEN).wrapping_neg() & (run.align() - 1));
        // SAFETY: less than the alignment and one guard page, so inside the mapping.
        let start = unsafe { start.add(skip) };
        // SAFETY: the run is inside the mapping just made.
        let opened = !Self::GUARDS || unsafe { libc::mprotect(start.as_ptr().cast(), run.len(), rights) == 0 };
        opened.then_some(start)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        let first = start.as_ptr().wrapping_sub(GUARD_LEN);
        // SAFETY: the run came from `map` and is unused by the caller's contract; the guard pages beside it are its
        // own.
        unsafe { libc::munmap(first.cast(), run.len() + 2 * GUARD_LEN) == 0 }
    }
}

/// Bytes that are never mapped in front of a run and behind it.
const GUARD_LEN: usize = if Space::GUARDS { Space::PAGE_LEN } else { 0 };

thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
}

/// The CPU that a bug says it runs on.
#[derive(Debug)]
pub(crate) struct Played;

impl CpuHint for Played {
    fn current_cpu(&self) -> Option<usize> {
        Some(CPU.get())
    }
}

pub(crate) type Tested = Heap<Space, Hint<Played>, 4>;

static HEAP: Tested = Heap::new(Space, Hint(Played));
static OTHER: Tested = Heap::new(Space, Hint(Played));

/// What freed memory reads as at level 2.
const POISON: u64 = 0xd5d5_d5d5_d5d5_d5d5;

/// A block and how it was asked for.
#[derive(Clone, Copy)]
struct Out(NonNull<u8>, Layout);

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

#[cfg_attr(feature = "debug-heap", track_caller)]
fn get_from(heap: &Tested, size: usize) -> Out {
    let layout = layout(size, 8);
    let block = heap.alloc(layout).unwrap().cast::<u8>();
    // SAFETY: the block is that long.
    unsafe { block.write_bytes(0x11, size) };
    Out(block, layout)
}

#[cfg_attr(feature = "debug-heap", track_caller)]
fn get(size: usize) -> Out {
    get_from(&HEAP, size)
}

impl Out {
    fn free_as(self, layout: Layout) {
        // SAFETY: none: that is what is tested, in a process of its own.
        unsafe { HEAP.free(self.0, layout) };
    }

    fn free(self) {
        self.free_as(self.1);
    }

    fn at(self, offset: isize) -> Self {
        Self(NonNull::new(self.0.as_ptr().wrapping_offset(offset)).unwrap(), self.1)
    }

    /// Reads a byte and does nothing with it.
    fn look(self, offset: isize) {
        // SAFETY: none, as above.
        unsafe { self.0.as_ptr().wrapping_offset(offset).read_volatile() };
    }

    /// Reads what this block's user wrote, if it is still there.
    fn expect_own(self, offset: isize) {
        // SAFETY: none, as above.
        let seen = unsafe { self.at(offset).0.cast::<u64>().read_volatile() };
        if seen != 0x1111_1111_1111_1111 {
            note(if seen == POISON { Seen::Poison } else { Seen::Changed });
        }
    }

    fn write(self, offset: isize, bytes: &[u8]) {
        let place = self.0.as_ptr().wrapping_offset(offset);
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: none, as above.
            unsafe { place.wrapping_add(index).write_volatile(*byte) };
        }
    }
}

/// Blocks of one length, all in use, and the CPU's list for them warm.
fn some(size: usize) -> Vec<Out> {
    (0..400).map(|_| get(size)).collect::<Vec<_>>().into_iter().for_each(Out::free);
    (0..40).map(|_| get(size)).collect()
}

/// Uses the heap for a while, so that what is damaged is met.
fn go_on(size: usize) {
    let blocks: Vec<_> = (0..3000).map(|_| get(size)).collect();
    blocks.into_iter().for_each(Out::free);
    HEAP.drain();
}

pub(crate) struct Bug {
    pub(crate) name: &'static str,
    pub(crate) run: fn(),
}

macro_rules! bugs {
    ($($name:literal => $run:expr,)*) => { &[$(Bug { name: $name, run: || $run },)*] };
}

pub(crate) const BUGS: &[Bug] = bugs![
    "freed twice in a row" => { let a = some(64)[3]; a.free(); a.free(); go_on(64) },
    "freed twice, another block between" => { let a = some(64); a[3].free(); a[4].free(); a[3].free(); go_on(64) },
    "freed twice, tiny" => { let a = some(8)[3]; a.free(); a.free(); go_on(8) },
    "freed twice, 200 blocks between" => {
        let a: Vec<_> = (0..300).map(|_| get(96)).collect(); a[..200].iter().for_each(|b| b.free()); a[7].free();
        go_on(96)
    },
    "freed twice, the cache flushed between" => { let a = some(64); a[3].free(); HEAP.drain(); a[3].free(); go_on(64) },
    "freed twice, the slab whole between" => {
        let a = get(5000); let b = get(5000); a.free(); b.free(); HEAP.drain(); a.free(); go_on(5000)
    },
    "freed twice, the slab's pages given up between" => {
        let keep = get(100_000); let a = get(64); a.free(); HEAP.drain(); HEAP.trim(1 << 30); a.free(); go_on(64);
        keep.free()
    },
    "freed twice, the chunk unmapped between" => { let a = get(64); a.free(); HEAP.trim(0); a.free(); go_on(64) },
    "freed twice, the second time on another CPU" => { let a = some(64)[3]; a.free(); CPU.set(1); a.free(); go_on(64) },
    "freed twice on other CPUs than it was allocated on" => {
        let a = some(64)[3]; CPU.set(1); a.free(); CPU.set(2); a.free(); go_on(64)
    },
    "freed twice by two threads" => {
        let (a, turn) = (some(64)[3].0.as_ptr().expose_provenance(), AtomicUsize::new(0));
        std::thread::scope(|scope| for cpu in 1..3 {
            let turn = &turn;
            scope.spawn(move || {
                CPU.set(cpu);
                while turn.load(Ordering::Acquire) != cpu - 1 { std::hint::spin_loop() }
                Out(NonNull::new(std::ptr::with_exposed_provenance_mut(a)).unwrap(), layout(64, 8)).free();
                turn.store(cpu, Ordering::Release);
            });
        });
        go_on(64)
    },
    "freed twice, the second time in a nested context" => { let a = some(64)[3]; a.free(); nested(a); go_on(64) },
    "freed twice, the first time in a nested context" => { let a = some(64)[3]; nested(a); a.free(); go_on(64) },
    "freed twice, a page run" => { let a = get(100_000); a.free(); a.free(); go_on(100_000) },
    "freed twice, a huge block" => { let a = get(3 << 20); a.free(); a.free(); go_on(64) },
    "freed after realloc had moved it" => {
        let a = some(64)[3];
        // SAFETY: the block is the heap's, of that Layout.
        let b = unsafe { HEAP.realloc(a.0, a.1, 400) }.unwrap();
        a.free();
        go_on(64);
        Out(b.cast(), layout(400, 8)).free()
    },
    "freed twice, its first word written between" => {
        let a = some(64); a[3].free(); a[4].free(); a[3].write(0, &[7; 8]); a[3].free(); go_on(64)
    },
    "freed twice, in use again between" => {
        let a = some(64)[3]; a.free(); let b = get(64); a.free(); let c = get(64); b.write(0, &[1]);
        c.write(0, &[2]); go_on(64)
    },
    "freed as a shorter class" => { let a = some(200)[3]; a.free_as(layout(24, 8)); go_on(24) },
    "freed as a longer class" => { let a = some(24)[3]; a.free_as(layout(200, 8)); go_on(200) },
    "freed with another size of its class" => { let a = some(200)[3]; a.free_as(layout(195, 8)); go_on(200) },
    "freed with another alignment" => { let a = some(24)[3]; a.free_as(layout(24, 64)); go_on(64) },
    "a page run freed as a small block" => { let a = get(100_000); a.free_as(layout(64, 8)); go_on(64) },
    "a small block freed as a page run" => { let a = some(64)[3]; a.free_as(layout(100_000, 8)); go_on(64) },
    "a page run freed with a wrong size" => { let a = get(100_000); a.free_as(layout(200_000, 8)); go_on(64) },
    "a stack address freed" => {
        let mut word = [0_u64; 32]; Out(NonNull::from(&mut word).cast(), layout(64, 8)).free(); go_on(64)
    },
    "a block of another heap freed" => { let _ = some(64); get_from(&OTHER, 64).free(); go_on(64) },
    "a fresh block freed that was never handed out" => { let a = get(64); a.at(64 * 40).free(); go_on(64) },
    "a pointer 8 bytes into a block freed" => { let a = some(64)[3]; a.at(8).free(); go_on(64) },
    "a pointer 1 byte into a block freed" => { let a = some(64)[3]; a.at(1).free(); go_on(64) },
    "a pointer a page into a page run freed" => {
        let a = get(100_000); a.at(4096).free_as(layout(100_000, 8)); go_on(64)
    },
    "a free block's first word overwritten" => { let a = some(64)[3]; a.free(); a.write(0, &[0; 8]); go_on(64) },
    "a free block's upper link half overwritten" => {
        let a = some(64); a[3].free(); a[5].free(); a[5].write(4, &[0x20, 0x31, 0x42, 0]); go_on(64)
    },
    "a free block overwritten behind its first word" => {
        let a = some(64)[3]; a.free(); a.write(24, &[7; 8]); go_on(64)
    },
    // All of them: one alone may lie in a slab that became whole, which forgets what was free in it.
    "a free block overwritten, the cache flushed between" => {
        let a = some(64); a.iter().step_by(2).for_each(|b| b.free()); HEAP.drain();
        a.iter().step_by(2).for_each(|b| b.write(0, &[7; 8])); go_on(64)
    },
    "a free block read" => {
        let a = some(64)[3];
        a.free();
        a.expect_own(16)
    },
    "a free block read, the cache flushed between" => {
        let a = some(64);
        a.iter().step_by(2).for_each(|b| b.free());
        HEAP.drain();
        a[4].expect_own(16)
    },
    "a free block's last byte overwritten" => { let a = some(200)[3]; a.free(); a.write(199, &[7]); go_on(200) },
    "a free page run read" => { let a = get(100_000); a.free(); a.expect_own(1_000) },
    "a free page run overwritten" => { let a = get(100_000); a.free(); a.write(64, &[7; 8]); go_on(100_000) },
    "a free huge block read" => { let a = get(3 << 20); a.free(); a.expect_own(4096) },
    "one byte behind a block read" => { some(64)[3].look(64) },
    "one byte behind a page run read" => { get(98_304).look(98_304) },
    "one byte behind a block, the next one free" => {
        let a = pair(64); a[1].free(); a[0].write(64, &[7]); go_on(64); a[0].free()
    },
    "one byte behind a block, the next one in use" => {
        let a = pair(64); a[0].write(64, &[7]); a[0].free(); a[1].free(); go_on(64)
    },
    "one byte behind what was asked for, in the same block" => {
        let a = some(58)[3]; a.write(58, &[7]); a.free(); go_on(58)
    },
    "one byte in front of a block, the one before in use" => {
        let a = pair(64); a[1].write(-1, &[7]); a[1].free(); a[0].free(); go_on(64)
    },
    "one byte in front of a block, the one before free" => {
        let a = pair(64); a[0].free(); a[1].write(-1, &[7]); a[1].free(); go_on(64)
    },
    "eight bytes in front of a block, the one before in use" => {
        let a = pair(64); a[1].write(-8, &[7; 8]); a[1].free(); a[0].free(); go_on(64)
    },
    "one byte in front of a page run" => {
        let a = get(98_304); let b = get(98_304); b.write(-1, &[7]); b.free(); a.free(); go_on(64)
    },
    "one byte behind a page run" => { let a = get(98_304); a.write(98_304, &[7]); a.free(); go_on(64) },
    "eight bytes behind a block, into a free link" => {
        let a = pair(64); a[1].free(); a[0].write(64, &[9; 8]); go_on(64); a[0].free()
    },
    "a block never freed" => { let _ = get(640); note_leaks() },
    "blocks of one place never freed, among others that are" => {
        for _ in 0..50 { get(640); get(48).free(); }
        HEAP.drain();
        note_leaks()
    },
];

/// What a signal handler is to free while it finds the heap interrupted.
static NESTED: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn on_timer(_: libc::c_int) {
    if HEAP.is_any_cache_held() {
        if let Some(block) = NonNull::new(NESTED.swap(std::ptr::null_mut(), Ordering::Relaxed)) {
            Out(block, layout(64, 8)).free();
        }
    }
}

/// Frees a block in a context that interrupted the heap while a cache was held.
fn nested(block: Out) {
    NESTED.store(block.0.as_ptr(), Ordering::Relaxed);
    let every = libc::timeval { tv_sec: 0, tv_usec: 50 };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: the handler does what a nested context may.
    unsafe { libc::signal(libc::SIGPROF, on_timer as *const () as libc::sighandler_t) };
    // SAFETY: a timer of this process.
    unsafe { libc::setitimer(libc::ITIMER_PROF, &raw const timer, std::ptr::null_mut()) };
    while !NESTED.load(Ordering::Relaxed).is_null() {
        get(40).free();
    }
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGPROF, libc::SIG_IGN) };
}

/// Two blocks that lie side by side, the lower one first.
fn pair(size: usize) -> [Out; 2] {
    let mut all: Vec<_> = (0..64).map(|_| get(size)).collect();
    all.sort_by_key(|block| block.0);
    let near = |pair: &&[Out]| pair[1].0.addr().get() - pair[0].0.addr().get() <= size + 128;
    // Guarded blocks have no neighbours.
    let pair = all.windows(2).find(near).unwrap_or(&all[..2]);
    [pair[0], pair[1]]
}

/// What there was to see of a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Seen {
    Nothing = 0,
    DoubleFree,
    Foreign,
    Interior,
    Layout,
    FreeWritten,
    Overrun,
    Underrun,
    Poison,
    Leak,
    LeakSite,
    Guard,
    Changed,
    Broken,
    Crash,
    Hang,
}

impl Seen {
    const ALL: [Self; 16] = [
        Self::Nothing,
        Self::DoubleFree,
        Self::Foreign,
        Self::Interior,
        Self::Layout,
        Self::FreeWritten,
        Self::Overrun,
        Self::Underrun,
        Self::Poison,
        Self::Leak,
        Self::LeakSite,
        Self::Guard,
        Self::Changed,
        Self::Broken,
        Self::Crash,
        Self::Hang,
    ];

    /// As it stands in the table.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Nothing => "-",
            Self::DoubleFree => "double free",
            Self::Foreign => "foreign pointer",
            Self::Interior => "interior pointer",
            Self::Layout => "wrong Layout",
            Self::FreeWritten => "write to a free block",
            Self::Overrun => "write behind a block",
            Self::Underrun => "write in front of a block",
            Self::Poison => "poison read",
            Self::Leak => "live blocks by class",
            Self::LeakSite => "live blocks by site and age",
            Self::Changed => "(other data read)",
            Self::Guard => "page fault, explained",
            Self::Broken => "(verify fails)",
            Self::Crash | Self::Hang => "(crash or hang)",
        }
    }
}

/// Whether a cell of the table says what was wrong.
pub(crate) fn is_caught(cell: &str) -> bool {
    cell != Seen::Nothing.text() && !cell.starts_with('(')
}

/// Ends the child with what was seen.
fn note(seen: Seen) -> ! {
    // SAFETY: ends this process, and nothing else.
    unsafe { libc::_exit(seen as i32) }
}

#[cfg(feature = "debug-heap")]
fn note_leaks() {
    if HEAP.leaks(0).sites().any(|site| matches!(site.site, smp_heap::Site::Line(_))) {
        note(Seen::LeakSite);
    }
}

#[cfg(not(feature = "debug-heap"))]
fn note_leaks() {
    if HEAP.stats().classes.iter().any(|class| class.live_count > 0) {
        note(Seen::Leak);
    }
}

#[cfg(feature = "hardened")]
fn install() {
    use smp_heap::Misuse;
    HEAP.set_report_hook(|report| {
        note(match report.misuse {
            Misuse::DoubleFree => Seen::DoubleFree,
            Misuse::ForeignPointer => Seen::Foreign,
            Misuse::InteriorPointer => Seen::Interior,
            Misuse::LayoutMismatch => Seen::Layout,
            Misuse::CorruptLink | Misuse::WriteAfterFree => Seen::FreeWritten,
            Misuse::Underrun => Seen::Underrun,
            _ => Seen::Overrun,
        })
    });
    #[cfg(feature = "guard-pages")]
    guard();
}

/// Every block guarded, as long as there is room; faults explained.
#[cfg(feature = "guard-pages")]
fn guard() {
    extern "C" fn on_fault(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the system hands over the signal's data.
        let info = unsafe { &*info };
        // SAFETY: a fault's data have an address.
        let addr = unsafe { info.si_addr() };
        note(if HEAP.explain_fault(addr.addr()).is_some() { Seen::Guard } else { Seen::Crash });
    }
    HEAP.set_guard_rate(1).unwrap();
    // SAFETY: all zero is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_fault as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler ends the process.
    unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) };
}

#[cfg(not(feature = "hardened"))]
fn install() {}

/// Runs one bug in a process of its own.
pub(crate) fn observe(bug: &Bug) -> Seen {
    // SAFETY: the child uses what it inherited and ends by `_exit`.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "no process for {}", bug.name);
    if child == 0 {
        // SAFETY: sets a limit on this process; a panic must not be told, nor unwind into the parent's code.
        unsafe { libc::alarm(60) };
        std::panic::set_hook(Box::new(|_| note(Seen::Crash)));
        install();
        (bug.run)();
        // SAFETY: the child has one thread, and the bug was run to its end.
        note(if unsafe { HEAP.verify_at_rest() }.is_err() { Seen::Broken } else { Seen::Nothing });
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    if libc::WIFEXITED(status) {
        return Seen::ALL.get(libc::WEXITSTATUS(status) as usize).copied().unwrap_or(Seen::Crash);
    }
    if libc::WTERMSIG(status) == libc::SIGALRM { Seen::Hang } else { Seen::Crash }
}

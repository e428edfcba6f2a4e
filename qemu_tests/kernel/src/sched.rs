//! Threads that are preempted anywhere and go on anywhere.
//!
//! This scheduler is as unkind as it may be: at every timer interrupt the running thread goes to the end of one queue
//! that all CPUs share, even if no other thread waits, so that it is most often another CPU that takes it on. A thread
//! becomes available to others only when the CPU that left it stands on another stack ([`switched`]).

use core::cell::Cell;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::Relaxed};
use core::sync::atomic::{Ordering, compiler_fence};

use crate::arch::{self, Context, MAX_CPUS};
use crate::memory::THREAD_STACKS;
use crate::sync::Lock;
use crate::{cpu, interrupts, smp, test, timer};

/// How many threads there can be at once.
pub const MAX_THREADS: usize = THREAD_STACKS;

/// No thread: a CPU's own idle context. Others are numbered from 1, so that all-zero is the start.
const IDLE: usize = 0;

/// What a thread runs, and with which argument.
type Start = (fn(usize), usize);

struct Thread {
    context: AtomicPtr<Context>,
    /// The CPU it ran on last, plus one.
    last_cpu: AtomicUsize,
    finished: AtomicBool,
    start: Cell<Option<Start>>,
}

impl Thread {
    const fn new() -> Self {
        Self {
            context: AtomicPtr::new(null_mut()),
            last_cpu: AtomicUsize::new(0),
            finished: AtomicBool::new(false),
            start: Cell::new(None),
        }
    }
}

// SAFETY: `start` is written before the thread is in the queue and read by the thread, which came out of it.
unsafe impl Sync for Thread {}

struct Cpu {
    running: AtomicUsize,
    /// The thread that was left in the switch that is going on.
    left: AtomicUsize,
    idle: AtomicPtr<Context>,
    on: AtomicBool,
}

impl Cpu {
    const fn new() -> Self {
        Self {
            running: AtomicUsize::new(IDLE),
            left: AtomicUsize::new(IDLE),
            idle: AtomicPtr::new(null_mut()),
            on: AtomicBool::new(false),
        }
    }
}

static THREADS: [Thread; MAX_THREADS] = [const { Thread::new() }; MAX_THREADS];
static CPUS: [Cpu; MAX_CPUS] = [const { Cpu::new() }; MAX_CPUS];
/// Threads that wait for a CPU, and numbers that no thread has.
static READY: Lock<Ring> = Lock::new(Ring::new());
static WAITING: AtomicUsize = AtomicUsize::new(0);
static NUMBERS: Lock<[bool; MAX_THREADS]> = Lock::new([false; MAX_THREADS]);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static SWITCHES: AtomicU64 = AtomicU64::new(0);
static MIGRATIONS: AtomicU64 = AtomicU64::new(0);
static PREEMPTIONS: AtomicU64 = AtomicU64::new(0);

/// First in, first out; it has room for every thread there can be.
struct Ring {
    threads: [usize; MAX_THREADS],
    first: usize,
    len: usize,
}

impl Ring {
    const fn new() -> Self {
        Self { threads: [IDLE; MAX_THREADS], first: 0, len: 0 }
    }

    fn push(&mut self, thread: usize) {
        self.threads[(self.first + self.len) % MAX_THREADS] = thread;
        self.len += 1;
    }

    fn pop(&mut self) -> Option<usize> {
        (self.len > 0).then(|| {
            let thread = self.threads[self.first];
            self.first = (self.first + 1) % MAX_THREADS;
            self.len -= 1;
            thread
        })
    }
}

fn thread(number: usize) -> &'static Thread {
    &THREADS[number - 1]
}

fn make_ready(number: usize) {
    READY.with(|ready| ready.push(number));
    WAITING.fetch_add(1, Relaxed);
}

/// Makes a thread that runs `entry(argument)` once [`run`] does, or now if it does already. `false`: too many threads.
pub fn spawn(entry: fn(usize), argument: usize) -> bool {
    let free = NUMBERS.with(|taken| {
        let free = taken.iter().position(|taken| !*taken)?;
        taken[free] = true;
        Some(free)
    });
    let Some(free) = free else { return false };
    let number = free + 1;
    let new = thread(number);
    new.finished.store(false, Relaxed);
    new.last_cpu.store(0, Relaxed);
    new.start.set(Some((entry, argument)));
    new.context.store(arch::new_thread(free, thread_main, number), Relaxed);
    LIVE.fetch_add(1, Ordering::AcqRel);
    make_ready(number);
    true
}

/// Runs threads on all CPUs, with a timer interrupt every `quantum` microseconds, until none is left.
pub fn run(quantum: u32) {
    smp::on_all(|cpu| {
        CPUS[cpu].on.store(true, Relaxed);
        timer::start(quantum);
        while LIVE.load(Ordering::Acquire) > 0 {
            if WAITING.load(Relaxed) > 0 {
                arch::switch_threads();
            } else {
                interrupts::disable();
                arch::enable_and_halt();
            }
        }
        timer::stop();
        CPUS[cpu].on.store(false, Relaxed);
    });
}

/// Lets other threads run.
pub fn yield_now() {
    arch::switch_threads();
}

/// What the scheduler has done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// How often a CPU went over to a thread.
    pub switches: u64,
    /// How often that thread had run on another CPU last.
    pub migrations: u64,
    /// How often a thread was left because a timer interrupt came, not because it yielded or was done.
    pub preemptions: u64,
}

/// What the scheduler has done so far.
#[must_use]
pub fn counts() -> Counts {
    Counts {
        switches: SWITCHES.load(Relaxed),
        migrations: MIGRATIONS.load(Relaxed),
        preemptions: PREEMPTIONS.load(Relaxed),
    }
}

extern "C" fn thread_main(number: usize) -> ! {
    if let Some((entry, argument)) = thread(number).start.get() {
        entry(argument);
    }
    thread(number).finished.store(true, Relaxed);
    yield_now();
    test::fail(format_args!("a finished thread went on"))
}

/// Chooses what this CPU goes on with, given the context that an interrupt saved. With interrupts off.
pub(crate) fn switch(context: *mut Context, preempted: bool) -> *mut Context {
    let cpu = &CPUS[cpu::index()];
    if !cpu.on.load(Relaxed) {
        return context;
    }
    let running = cpu.running.load(Relaxed);
    let next = READY.with(Ring::pop);
    if next.is_some() {
        WAITING.fetch_sub(1, Relaxed);
    }
    let place = match (running, next) {
        (IDLE, None) => return context,
        (IDLE, _) => &cpu.idle,
        _ => &thread(running).context,
    };
    place.store(context, Relaxed);
    if preempted && running != IDLE {
        PREEMPTIONS.fetch_add(1, Relaxed);
    }
    cpu.left.store(running, Relaxed);
    let next = next.unwrap_or(IDLE);
    cpu.running.store(next, Relaxed);
    if next == IDLE {
        return cpu.idle.load(Relaxed);
    }
    SWITCHES.fetch_add(1, Relaxed);
    let here = cpu::index() + 1;
    let last = thread(next).last_cpu.swap(here, Relaxed);
    if last != 0 && last != here {
        MIGRATIONS.fetch_add(1, Relaxed);
    }
    thread(next).context.load(Relaxed)
}

/// The second half of a switch, on the new stack: nothing uses that of the thread that was left any more.
pub(crate) fn switched() {
    compiler_fence(Ordering::SeqCst);
    let left = CPUS[cpu::index()].left.swap(IDLE, Relaxed);
    if left == IDLE {
        return;
    }
    if thread(left).finished.load(Relaxed) {
        NUMBERS.with(|taken| taken[left - 1] = false);
        LIVE.fetch_sub(1, Ordering::AcqRel);
    } else {
        make_ready(left);
    }
}

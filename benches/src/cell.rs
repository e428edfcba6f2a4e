//! One cell: one column's allocator under one workload, in a process of its own.
//!
//! ```text
//! parent   fork ─────────────────────────────────────────────── wait ── read the shared page
//! main     open ─ start ─ memory before ─┐         ┌─ warm-up ─ span ─┐        ┌─ memory held ─┐       ┌─ memory left
//! threads  enter ────────────────────────┴─ prepare ─┴─ rounds ─────────┴─ stop ─┴───────────────┴ clear ┘
//! ```
//! A thread looks at the phase between rounds only, so what it counts are whole rounds; its time runs from the common
//! start to the end of its last one. The cell's rate is the sum of its threads' rates.

use std::io;
use std::mem;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Barrier, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize};

use crate::memory::{self, Shared};
use crate::peers::Peer;
use crate::peers::levels::COLUMN;
use crate::workloads::{Plan, Work, Workload};

/// Threads not done by then have been stopped by somebody, or wait for ever.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long threads may take to free everything, in seconds: some heaps walk a list of all free blocks for each.
const CLEARING_SECONDS: u32 = 3;

/// Why a cell has no figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u32)]
pub enum Failure {
    OutOfMemory = 1,
    Spoilt = 2,
    Crashed = 3,
    TooLong = 4,
}

impl Failure {
    /// A word for a table.
    pub fn word(self) -> &'static str {
        match self {
            Self::OutOfMemory => "no memory",
            Self::Spoilt => "SPOILT",
            Self::Crashed => "crash",
            Self::TooLong => "too long",
        }
    }
}

/// What a cell measured.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[repr(C)]
pub struct Sample {
    /// Time over operations of all threads together, in ns.
    pub wall_ns: f64,
    /// Processor time of the threads for one operation, in ns.
    pub cpu_ns: f64,
    /// Of that, time in the operating system.
    pub system_ns: f64,
    /// Pages touched first, per operation.
    pub faults: f64,
    pub operations: u64,
    /// Bytes in use, as asked for, when the threads stopped.
    pub live_len: u64,
    /// Bytes of memory then, beyond what the process had before.
    pub held_len: u64,
    /// The same after everything was freed; not a number if that took too long.
    #[serde(deserialize_with = "or_nan")]
    pub left_len: f64,
    /// Calls of the page provider per operation, and time in them in ns, where it keeps count.
    pub provider_calls: f64,
    pub provider_ns: f64,
}

/// Less than this in use says nothing of what is held for it.
const LIVE_MIN: u64 = 256 << 10;

/// JSON has no word for what is not a number but `null`.
fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

impl Sample {
    /// Memory held over memory in use, where enough is in use.
    pub fn held_over_live(&self) -> Option<f64> {
        (self.live_len >= LIVE_MIN).then(|| self.held_len as f64 / self.live_len as f64)
    }
}

/// How a cell ended.
pub type Outcome = Result<Sample, Failure>;

/// What one thread counted.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    operations: u64,
    elapsed: Duration,
    cpu: Duration,
    system: Duration,
    faults: u64,
    live_len: u64,
}

const WARMING: u32 = 0;
const COUNTING: u32 = 1;
const STOPPED: u32 = 2;

/// How long a cell runs.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub warm_up: Duration,
    pub counted: Duration,
}

/// Ends the process, a cell, with a reason that the parent reads.
pub fn fail(failure: Failure, what: &str) {
    eprintln!("{what}");
    // SAFETY: ends the process without anybody's clean-up, as a fork's child should.
    unsafe { libc::_exit(failure as i32) };
}

/// Runs a cell in a process of its own. The calling process has one thread.
pub fn run(peer: &Peer, workload: &Workload, threads: usize, span: Span) -> io::Result<Outcome> {
    match peer.program {
        Some(program) => run_program(program, workload, threads, span),
        None => run_forked(peer, workload, threads, span),
    }
}

/// Has another build of this program run its cell.
fn run_program(program: &Path, workload: &Workload, threads: usize, span: Span) -> io::Result<Outcome> {
    let seconds = span.counted.as_secs_f64().to_string();
    let threads = threads.to_string();
    let output = Command::new(program)
        .args(["--cell", "--workloads", workload.name, "--allocators", COLUMN])
        .args(["--threads", &threads, "--seconds", &seconds])
        .stderr(Stdio::inherit())
        .output()?;
    if output.status.success() {
        serde_json::from_slice(&output.stdout).map_err(io::Error::other)
    } else {
        Err(io::Error::other(format!("{}: {}", program.display(), output.status)))
    }
}

fn run_forked(peer: &Peer, workload: &Workload, threads: usize, span: Span) -> io::Result<Outcome> {
    let shared = Shared::<Sample>::new(1)?;
    let patience = PATIENCE + (span.warm_up + span.counted) * 2;
    let failure = in_process(patience, || {
        inside(peer, workload, threads, span, |sample| {
            // SAFETY: the mapping lasts as long as both processes run, and the parent reads it when this one has ended.
            unsafe { shared.start().write(sample) };
        });
    })?;
    // SAFETY: the child wrote it and has ended; zero bytes are a sample too.
    let sample = unsafe { shared.start().read() };
    Ok(match failure {
        None => Ok(sample),
        // It was only too slow to free everything.
        Some(Failure::TooLong) if sample.operations > 0 => Ok(sample),
        Some(failure) => Err(failure),
    })
}

/// Runs `inside` in a process of its own, which is ended when it takes longer than `patience`. How it failed, if it
/// did. The calling process has one thread.
pub(crate) fn in_process(patience: Duration, inside: impl FnOnce()) -> io::Result<Option<Failure>> {
    // SAFETY: this process has one thread, so that the child's memory is in order.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: the default action of the signal, which is to end the process, is what is wanted.
            unsafe { libc::alarm(u32::try_from(patience.as_secs()).unwrap_or(u32::MAX)) };
            inside();
            // SAFETY: ends the process without anybody's clean-up, as a fork's child should.
            unsafe { libc::_exit(0) }
        }
        child => wait(child),
    }
}

/// Runs a cell in this very process, for profilers: so many rounds in each thread. How many operations those were.
pub fn run_here(peer: &Peer, workload: &Workload, threads: usize, rounds: u64) -> u64 {
    (peer.open)();
    let Plan { works, .. } = (workload.plan)(threads);
    let barrier = Barrier::new(threads);
    let run = |index: usize, mut work: Box<dyn Work>| {
        (peer.enter)(index);
        work.prepare(&peer.calls);
        barrier.wait();
        (0..rounds).map(|_| work.round(&peer.calls)).sum::<u64>()
    };
    let run = &run;
    thread::scope(|scope| {
        let workers: Vec<_> =
            works.into_iter().enumerate().map(|(index, work)| scope.spawn(move || run(index, work))).collect();
        workers.into_iter().map(|worker| worker.join().expect("a thread that ends")).sum()
    })
}

/// Waits for the child. `None`: it ended well.
fn wait(child: libc::pid_t) -> io::Result<Option<Failure>> {
    let mut status = 0;
    // SAFETY: `status` is valid for the call.
    while unsafe { libc::waitpid(child, &mut status, 0) } == -1 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if libc::WIFSIGNALED(status) {
        let late = libc::WTERMSIG(status) == libc::SIGALRM;
        return Ok(Some(if late { Failure::TooLong } else { Failure::Crashed }));
    }
    Ok(match libc::WEXITSTATUS(status) {
        0 => None,
        1 => Some(Failure::OutOfMemory),
        2 => Some(Failure::Spoilt),
        _ => Some(Failure::Crashed),
    })
}

fn inside(peer: &Peer, workload: &Workload, threads: usize, span: Span, publish: impl Fn(Sample)) {
    (peer.open)();
    let Plan { works, close } = (workload.plan)(threads);
    let phase = AtomicU32::new(WARMING);
    let start = OnceLock::new();
    let begun = AtomicU32::new(0);
    let barrier = Barrier::new(threads + 1);
    let counts = Mutex::new(Vec::with_capacity(threads));
    thread::scope(|scope| {
        for (index, work) in works.into_iter().enumerate() {
            let course = Course { phase: &phase, start: &start, begun: &begun, barrier: &barrier, counts: &counts };
            scope.spawn(move || worker(peer, index, work, course));
        }
        barrier.wait(); // All threads exist.
        let before_len = memory::resident_len();
        barrier.wait(); // May prepare.
        barrier.wait(); // Prepared.
        thread::sleep(span.warm_up);
        let cost = peer.provider_cost.map(|cost| cost());
        start.get_or_init(Instant::now);
        phase.store(COUNTING, Ordering::Release);
        // On a busy machine it may take several spans until a thread had its turn.
        while begun.load(Ordering::Relaxed) == 0 {
            thread::sleep(span.counted);
        }
        phase.store(STOPPED, Ordering::Relaxed);
        close();
        barrier.wait(); // All have stopped.
        let held_len = memory::resident_len();
        let cost_after = peer.provider_cost.map(|cost| cost());
        barrier.wait(); // All have counted.
        let counts = counts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut sample = sum(&counts);
        sample.held_len = held_len.saturating_sub(before_len);
        if let (Some(before), Some(after)) = (cost, cost_after) {
            let operations = sample.operations.max(1) as f64;
            sample.provider_calls = (after.calls - before.calls) as f64 / operations;
            sample.provider_ns = (after.nanos - before.nanos) as f64 / operations;
        }
        publish(sample);
        // SAFETY: the default action of the signal, which is to end the process, is what is wanted.
        unsafe { libc::alarm(CLEARING_SECONDS) };
        barrier.wait(); // May clear.
        barrier.wait(); // Cleared.
        sample.left_len = memory::resident_len().saturating_sub(before_len) as f64;
        publish(sample);
    });
}

/// What main and threads go by.
#[derive(Clone, Copy)]
struct Course<'a> {
    phase: &'a AtomicU32,
    /// When counting began.
    start: &'a OnceLock<Instant>,
    /// How many threads have counted an operation.
    begun: &'a AtomicU32,
    barrier: &'a Barrier,
    counts: &'a Mutex<Vec<Count>>,
}

fn worker(peer: &Peer, index: usize, mut work: Box<dyn Work>, course: Course<'_>) {
    let Course { phase, start, begun, barrier, counts } = course;
    (peer.enter)(index);
    barrier.wait(); // All threads exist.
    barrier.wait(); // May prepare.
    work.prepare(&peer.calls);
    barrier.wait(); // Prepared.
    while phase.load(Ordering::Acquire) == WARMING {
        work.round(&peer.calls);
    }
    let usage = usage();
    let mut operations = 0;
    while phase.load(Ordering::Relaxed) == COUNTING {
        let done = work.round(&peer.calls);
        if operations == 0 && done > 0 {
            begun.fetch_add(1, Ordering::Relaxed);
        }
        operations += done;
    }
    let elapsed = start.get().map_or(Duration::ZERO, Instant::elapsed);
    let used = usage.until_now();
    barrier.wait(); // All have stopped.
    let live_len = work.live_len() as u64;
    let count = Count { operations, elapsed, cpu: used.cpu, system: used.system, faults: used.faults, live_len };
    counts.lock().unwrap_or_else(PoisonError::into_inner).push(count);
    barrier.wait(); // All have counted.
    barrier.wait(); // May clear.
    work.clear(&peer.calls);
    barrier.wait(); // Cleared.
}

fn sum(counts: &[Count]) -> Sample {
    let operations: u64 = counts.iter().map(|count| count.operations).sum();
    let rate: f64 = counts.iter().map(|count| count.operations as f64 / count.elapsed.as_secs_f64().max(1e-9)).sum();
    let per_operation = |total: f64| total / operations.max(1) as f64;
    let nanos = |time: fn(&Count) -> Duration| counts.iter().map(|count| time(count).as_secs_f64() * 1e9).sum::<f64>();
    Sample {
        wall_ns: 1e9 / rate.max(1e-9),
        cpu_ns: per_operation(nanos(|count| count.cpu)),
        system_ns: per_operation(nanos(|count| count.system)),
        faults: per_operation(counts.iter().map(|count| count.faults as f64).sum()),
        operations,
        live_len: counts.iter().map(|count| count.live_len).sum(),
        left_len: f64::NAN,
        ..Sample::default()
    }
}

/// What this thread used of the machine.
#[derive(Clone, Copy, Debug)]
struct Usage {
    cpu: Duration,
    system: Duration,
    faults: u64,
}

impl Usage {
    fn until_now(self) -> Self {
        let now = usage();
        Self {
            cpu: now.cpu.saturating_sub(self.cpu),
            system: now.system.saturating_sub(self.system),
            faults: now.faults - self.faults,
        }
    }
}

fn usage() -> Usage {
    // SAFETY: plain numbers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: `usage` is valid for the call.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    // SAFETY: plain numbers, for which zero is a value.
    let mut clock: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: `clock` is valid for the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut clock) };
    Usage {
        cpu: Duration::new(clock.tv_sec as u64, clock.tv_nsec as u32),
        system: Duration::new(usage.ru_stime.tv_sec as u64, usage.ru_stime.tv_usec as u32 * 1000),
        faults: usage.ru_minflt as u64,
    }
}

/// Pages that this thread touched first, so far.
pub(crate) fn thread_faults() -> u64 {
    usage().faults
}

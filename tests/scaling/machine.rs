//! A machine of many CPUs that runs the shipped heap one access at a time, and counts whose cache has which line.
//!
//! Each CPU is a thread, of which one runs: the one whose turn it is. After a random number of accesses, and whenever
//! somebody waits, it is another one's. So every interleaving of accesses may come, locks are found busy, and a run
//! with the same seed is the same run. Caches are as large as they like: a line moves only because somebody else wants
//! it.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;

use smp_heap::battery::Random;
use smp_heap::simulated::Access;

const LINE_LEN: usize = 64;
/// Accesses that a CPU makes in a row, on average.
const QUANTUM: usize = 32;
/// Nobody's turn.
const NOBODY: usize = usize::MAX;

/// What the CPUs did while they were measured.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Locked instructions.
    pub(crate) updates: u64,
    /// Those of them that tried to take a flag, as a lock is taken.
    pub(crate) tries: u64,
    /// Lines that came from another CPU's cache.
    pub(crate) transfers: u64,
    /// Looks at something that somebody else has to change first.
    pub(crate) waits: u64,
}

struct Machine {
    /// Which CPUs have each line.
    lines: HashMap<usize, u64>,
    running: Vec<Option<Thread>>,
    random: Random,
    /// Accesses until it is another CPU's turn.
    left: usize,
    counts: Counts,
}

static MACHINE: LazyLock<Mutex<Machine>> = LazyLock::new(|| Mutex::new(Machine::new(0)));
static TURN: AtomicUsize = AtomicUsize::new(NOBODY);

thread_local! {
    static CPU: Cell<Option<usize>> = const { Cell::new(None) };
    static MEASURED: Cell<bool> = const { Cell::new(false) };
}

impl Machine {
    fn new(cpus: usize) -> Self {
        Self {
            lines: HashMap::new(),
            running: vec![None; cpus],
            random: Random::new(cpus as u64 + 1),
            left: QUANTUM,
            counts: Counts::default(),
        }
    }

    /// One access of a CPU; true if its turn is over.
    fn access(&mut self, cpu: usize, addr: usize, access: Access, counted: bool) -> bool {
        if access != Access::Wait {
            let has = self.lines.entry(addr / LINE_LEN).or_insert(1 << cpu);
            let (own, others) = (*has & 1 << cpu, *has & !(1 << cpu));
            let comes = own == 0 || access != Access::Load && others != 0;
            *has = if access == Access::Load { *has | 1 << cpu } else { 1 << cpu };
            self.counts.transfers += u64::from(comes && counted);
        }
        if counted {
            self.counts.updates += u64::from(matches!(access, Access::Update | Access::UpdateFlag));
            self.counts.tries += u64::from(access == Access::UpdateFlag);
            self.counts.waits += u64::from(access == Access::Wait);
        }
        self.left = if access == Access::Wait { 0 } else { self.left - 1 };
        self.left == 0
    }

    /// The next CPU's turn.
    fn pass_on(&mut self) {
        self.left = 1 + self.random.below(2 * QUANTUM - 1);
        let running = self.running.iter().flatten().count();
        if running == 0 {
            return TURN.store(NOBODY, Ordering::Release);
        }
        let which = self.random.below(running);
        let next = self.running.iter().enumerate().filter_map(|(cpu, thread)| Some((cpu, thread.as_ref()?))).nth(which);
        if let Some((cpu, thread)) = next {
            TURN.store(cpu, Ordering::Release);
            thread.unpark();
        }
    }
}

fn machine() -> MutexGuard<'static, Machine> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_for_turn(cpu: usize) {
    while TURN.load(Ordering::Acquire) != cpu {
        std::thread::park();
    }
}

/// The CPU that the caller is.
pub(crate) fn cpu() -> Option<usize> {
    CPU.get()
}

/// What the heap tells of.
pub(crate) fn observe(addr: usize, access: Access) {
    on_access(addr, access, MEASURED.get());
}

/// What the heap's caller does to a block: lines move, but that is not the heap's doing.
pub(crate) fn touch(block: *const u8) {
    on_access(block.addr(), Access::Store, false);
}

fn on_access(addr: usize, access: Access, counted: bool) {
    let Some(cpu) = CPU.get() else { return };
    let mut machine = machine();
    if machine.access(cpu, addr, access, counted) {
        machine.pass_on();
        drop(machine);
        wait_for_turn(cpu);
    }
}

/// From now on, what this CPU does is counted.
pub(crate) fn measure() {
    MEASURED.set(true);
}

/// And no more.
pub(crate) fn stop() {
    MEASURED.set(false);
}

/// Runs `work` on so many CPUs and tells what it did.
pub(crate) fn run(cpus: usize, work: impl Fn(usize) + Sync) -> Counts {
    *machine() = Machine::new(cpus);
    let start = std::sync::Barrier::new(cpus);
    std::thread::scope(|scope| {
        for cpu in 0..cpus {
            let (work, start) = (&work, &start);
            scope.spawn(move || {
                if let Some(place) = machine().running.get_mut(cpu) {
                    *place = Some(std::thread::current());
                }
                // Everybody is known before anybody runs.
                if start.wait().is_leader() {
                    machine().pass_on();
                }
                wait_for_turn(cpu);
                CPU.set(Some(cpu));
                work(cpu);
                CPU.set(None);
                let mut machine = machine();
                if let Some(place) = machine.running.get_mut(cpu) {
                    *place = None;
                }
                machine.pass_on();
            });
        }
    });
    machine().counts
}

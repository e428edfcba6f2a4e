//! All CPUs at work on one closure.
//!
//! The CPUs other than 0 sleep until an IPI says that there is a job. One job at a time: `on_all` is for `main` and for
//! what `main` calls. A waiting CPU sleeps too once it has spun for a while, and is woken by the last one to arrive:
//! eight virtual CPUs that spin on two real ones keep the one they wait for from running.

use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use crate::{arch, cpu, interrupts, ipi, test, time};

/// How often a waiter looks before it sleeps.
const SPINS: usize = 2_000;

static BUSY: AtomicBool = AtomicBool::new(false);
static JOB: AtomicPtr<Job<'_>> = AtomicPtr::new(core::ptr::null_mut());
static GENERATION: AtomicUsize = AtomicUsize::new(0);
static RUNNING: AtomicUsize = AtomicUsize::new(0);

struct Job<'a> {
    run: &'a (dyn Fn(usize) + Sync),
}

/// Runs `f` with its index on every CPU at once and returns when all are done. From CPU 0, not nested.
pub fn on_all(f: impl Fn(usize) + Sync) {
    if BUSY.swap(true, Ordering::Acquire) || cpu::index() != 0 {
        test::fail(format_args!("smp::on_all inside smp::on_all, or not from CPU 0"));
    }
    let job = Job { run: &f };
    RUNNING.store(arch::cpu_count() - 1, Ordering::Relaxed);
    JOB.store((&raw const job).cast_mut().cast(), Ordering::Relaxed);
    GENERATION.fetch_add(1, Ordering::Release);
    ipi::send_all_but_self(arch::vector::WAKE);
    f(0);
    sleep_until(|| RUNNING.load(Ordering::Acquire) == 0);
    BUSY.store(false, Ordering::Release);
}

/// Fails the test while CPUs work on a closure: what is to be done when they are at rest cannot be done then.
pub fn expect_rest() {
    if BUSY.load(Ordering::Acquire) {
        test::fail(format_args!("the other CPUs are at work"));
    }
}

/// What a CPU other than 0 does for ever.
pub(crate) fn work_loop() -> ! {
    let mut done = 0;
    loop {
        sleep_until(|| GENERATION.load(Ordering::Acquire) != done);
        done += 1;
        // SAFETY: `on_all` stored the job before it raised the generation that was read with acquire, and does not
        // return, so the job and what it borrows live, before this CPU has counted itself out.
        let job = unsafe { &*JOB.load(Ordering::Relaxed) };
        (job.run)(cpu::index());
        if RUNNING.fetch_sub(1, Ordering::Release) == 1 {
            ipi::send(0, arch::vector::WAKE);
        }
    }
}

/// Waits until every CPU has called this as often; for use inside [`on_all`]. Fails the test after two minutes.
pub fn barrier() {
    static ARRIVED: AtomicUsize = AtomicUsize::new(0);
    static ROUND: AtomicUsize = AtomicUsize::new(0);
    let round = ROUND.load(Ordering::Acquire);
    if ARRIVED.fetch_add(1, Ordering::AcqRel) + 1 == arch::cpu_count() {
        ARRIVED.store(0, Ordering::Relaxed);
        ROUND.store(round.wrapping_add(1), Ordering::Release);
        ipi::send_all_but_self(arch::vector::WAKE);
        return;
    }
    let start = time::micros();
    sleep_until(|| {
        let is_open = ROUND.load(Ordering::Acquire) != round;
        if !is_open && time::micros() - start > 120_000_000 {
            test::fail(format_args!("{} CPUs at the barrier after two minutes", ARRIVED.load(Ordering::Relaxed)));
        }
        is_open
    });
}

/// Waits for a condition whose change is followed by an IPI to this CPU; spins if interrupts are off.
fn sleep_until(condition: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if condition() {
            return;
        }
        core::hint::spin_loop();
    }
    let may_sleep = interrupts::are_enabled();
    loop {
        // Looked at with interrupts off, so that the IPI cannot come between the look and the sleep.
        let seen = interrupts::without(|| {
            let seen = condition();
            if !seen && may_sleep {
                arch::enable_and_halt();
            }
            seen
        });
        if seen {
            return;
        }
        core::hint::spin_loop();
    }
}

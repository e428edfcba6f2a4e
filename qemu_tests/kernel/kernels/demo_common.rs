//! The guest side of `cargo demo`, the same for every heap: real work on some of the CPUs, timer interrupts that
//! allocate on those, results checked, and everything told over the serial line as `@word key=value` lines (read by the
//! driver's `demo/protocol.rs`).
//!
//! CPUs that are not part of a phase sleep without a timer: they cost nothing but are there, so that a phase with one
//! CPU runs on the same machine as one with four.
//!
//! The emulator's serial port is slow. So while work is timed, only lines about its progress are sent; what a heap
//! wants to say of itself meanwhile, it keeps and says afterwards.

use core::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use smp_heap_kernel::{Boot, Context, arch::MAX_CPUS, cpu, println, smp, sync::Lock, test, time, timer};
use smp_heap_work::{ALL, Workload, interrupt::Ring};

/// The timer's period: a thousand interrupts a second on each CPU at work.
const TICK_MICROS: u32 = 1_000;

/// How often the first CPU says how far it is.
const PROGRESS_MICROS: u64 = 250_000;

/// Samples of a heap in one slot at most.
pub(crate) const SAMPLES: usize = 8;

/// What is different for each heap.
pub(crate) trait Demonstrated: Sync {
    /// Now and then while work is timed, at most [`SAMPLES`] times in a slot: to keep what the heap is like. Prints
    /// nothing.
    fn sample(&self) {}

    /// When the time is over: to print what [`sample`](Self::sample) kept.
    fn say_samples(&self) {}

    /// After the phases, everything freed.
    fn after_phases(&self) {}

    /// When all CPUs have done all kinds of work once more and hold what they made.
    fn report(&self);
}

/// What the handlers hold. Each CPU's handler takes its own lock only, so it never waits.
static RINGS: [Lock<Ring>; MAX_CPUS] = [const { Lock::new(Ring::new()) }; MAX_CPUS];

/// The units done in this slot by all CPUs.
static UNITS: AtomicU64 = AtomicU64::new(0);

/// Runs every phase, and at the end all kinds of work once more.
pub(crate) fn run(boot: &Boot, heap: &impl Demonstrated) {
    let slot = boot.number("slot_us", 200_000) as u64;
    for Workload { name, about, unit, .. } in &ALL {
        println!("@work name={name} unit={} about={about}", unit.name());
    }
    timer::set_handler(on_timer);
    let mut widest = 1;
    for count in boot.arg("phases").unwrap_or("1").split(',') {
        match count.parse() {
            Ok(count) if (1..=boot.cpu_count()).contains(&count) => {
                phase(count, boot.arg("record"), slot, heap);
                widest = count;
            }
            _ => test::fail(format_args!("phases: `{count}` of {} CPUs", boot.cpu_count())),
        }
    }
    for ring in &RINGS {
        if ring.with(Ring::release).is_err() {
            fail("a block that a handler held at the end was overwritten");
        }
    }
    heap.after_phases();
    hold(widest, heap);
}

/// All kinds of work on `count` CPUs.
fn phase(count: usize, only: Option<&str>, slot: u64, heap: &impl Demonstrated) {
    let before = ticks();
    // A recording is of one kind of work.
    for work in ALL.iter().filter(|work| only.is_none_or(|only| only == work.name)) {
        println!("@slot cpus={count} work={}", work.name);
        UNITS.store(0, Relaxed);
        smp::on_all(|cpu| {
            if cpu < count {
                timer::start(TICK_MICROS);
            }
            smp::barrier();
            if cpu < count {
                let (units, micros) = laps(work, cpu, count, slot, heap);
                timer::stop();
                println!("@result cpus={count} work={} cpu={cpu} units={units} micros={micros}", work.name);
            }
        });
        heap.say_samples();
        test::did(UNITS.load(Relaxed), "units");
    }
    let after = ticks();
    println!("@ticks cpus={count} count={} refused={}", after.0 - before.0, after.1 - before.1);
}

/// Goes over a workload's inputs again and again until the time is over, and at least through one of them.
///
/// The slower heap may need seconds for one input, so nobody waits for the end of a lap. Inputs differ little in what a
/// unit of them costs; where the heap is quick, many laps even out the rest.
fn laps(work: &Workload, cpu: usize, count: usize, slot: u64, heap: &impl Demonstrated) -> (u64, u64) {
    let start = time::micros();
    let (mut said, mut sampled) = (start, start);
    let mut units = 0;
    // Each CPU begins elsewhere, so that they do not all want the same at the same moment.
    for round in cpu.. {
        let done = work.run(round).unwrap_or_else(|mismatch| fail(mismatch)).units;
        units += done;
        let all = UNITS.fetch_add(done, Relaxed) + done;
        let now = time::micros();
        if now - start >= slot {
            break;
        }
        if cpu == 0 && now - said > PROGRESS_MICROS {
            said = now;
            println!("@progress cpus={count} work={} units={all} micros={}", work.name, now - start);
        }
        if cpu == 0 && now - sampled > PROGRESS_MICROS.max(slot / SAMPLES as u64) {
            sampled = now;
            heap.sample();
        }
    }
    (units, time::micros() - start)
}

/// Every kind of work once more on `count` CPUs, the products alive until the heap has been looked at.
fn hold(count: usize, heap: &impl Demonstrated) {
    smp::on_all(|cpu| {
        let product = |work: &Workload| work.run(cpu).unwrap_or_else(|mismatch| fail(mismatch));
        let products = (cpu < count).then(|| ALL.each_ref().map(product));
        smp::barrier();
        if cpu == 0 {
            heap.report();
        }
        smp::barrier();
        drop(products);
    });
}

/// The interrupts of all CPUs so far, and the requests refused in them.
fn ticks() -> (u64, u64) {
    RINGS.iter().fold((0, 0), |(ticks, refused), ring| {
        let (more, less) = ring.with(|ring| (ring.ticks(), ring.refused()));
        (ticks + more, refused + less)
    })
}

fn on_timer(_: &mut Context) {
    let cpu = cpu::index();
    if let Some(ring) = RINGS.get(cpu)
        && ring.with(|ring| ring.tick(cpu as u64)).is_err()
    {
        fail("a block that a timer handler held was overwritten");
    }
}

fn fail(why: impl fmt::Display) -> ! {
    test::fail(format_args!("{why}"))
}

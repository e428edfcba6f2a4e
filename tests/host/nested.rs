//! Signals as interrupts: a handler that allocates and frees comes at any instruction of the heap, on a CPU (thread)
//! that is inside it.
//!
//! Promises shown: 1 (no deadlock in nested contexts; a hang is the test's failure), 5 (whole afterwards), and that
//! frees always succeed.

use std::alloc::Layout;
use std::cell::{Cell, UnsafeCell};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::common::{AtRest, Memory, ThreadCpu, play_cpu};
use smp_heap::battery::{Filled, Random, churn, free_all};
use smp_heap::cpu::CpuMode;
use smp_heap::{Heap, Hint, Pinned, RegionProvider};

const CPUS: usize = 4;
const HELD: usize = 8;
const NESTED_GOAL: u64 = 20_000;

type Regions<C> = Heap<RegionProvider<4>, C, CPUS>;

static PINNED: Regions<Pinned<ThreadCpu>> = Heap::new(RegionProvider::new(), Pinned(ThreadCpu));
static HINTED: Regions<Hint<ThreadCpu>> = Heap::new(RegionProvider::new(), Hint(ThreadCpu));

/// What one thread's handler keeps between signals: blocks of its own, touched by nobody else.
struct Handler {
    random: Random,
    pinned: Held<Pinned<ThreadCpu>>,
    hinted: Held<Hint<ThreadCpu>>,
}

type Held<C> = [Option<Filled<'static, Regions<C>>>; HELD];

/// A cell that only the handlers of one thread look into; a signal is blocked while its handler runs.
struct OwnCell(UnsafeCell<Handler>);

thread_local! {
    static OWN: OwnCell = const {
        OwnCell(UnsafeCell::new(Handler {
            random: Random::new(7),
            pinned: [const { None }; HELD],
            hinted: [const { None }; HELD],
        }))
    };
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

static IN_TURN: AtomicBool = AtomicBool::new(false);
static USES_PIN: AtomicBool = AtomicBool::new(false);
static SIGNALS: AtomicU64 = AtomicU64::new(0);
static NESTED: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);
static BROKEN: AtomicBool = AtomicBool::new(false);

fn interrupt<C: CpuMode>(heap: &'static Regions<C>, random: &mut Random, held: &mut Held<C>) {
    let place = random.below(HELD);
    let bits = if random.below(50) == 0 { 17 } else { 10 };
    let size = 1 << random.below(bits);
    let Some(slot) = held.get_mut(place) else { return };
    if let Some(block) = slot.take() {
        BROKEN.fetch_or(block.free().is_err(), Ordering::Relaxed);
        return;
    }
    match Layout::from_size_align(size, 8).ok().map(|layout| Filled::new(heap, layout, place as u8)) {
        Some(Ok(Some(block))) => *slot = Some(block),
        Some(Ok(None)) => drop(REFUSED.fetch_add(1, Ordering::Relaxed)),
        _ => BROKEN.store(true, Ordering::Relaxed),
    }
}

extern "C" fn on_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
    NESTED.fetch_add(u64::from(INSIDE.get()), Ordering::Relaxed);
    OWN.with(|own| {
        // SAFETY: only handlers of this thread come here, one at a time since the signal is blocked meanwhile, and
        // `storm` after them.
        let Handler { random, pinned, hinted } = unsafe { &mut *own.0.get() };
        match USES_PIN.load(Ordering::Relaxed) {
            true => interrupt(&PINNED, random, pinned),
            false => interrupt(&HINTED, random, hinted),
        }
    });
}

/// Threads churn while one of them is sent signals all the time.
fn storm<C: CpuMode + Sync>(heap: &'static Regions<C>, uses_pin: bool) {
    static MEMORY: OnceLock<[usize; 2]> = OnceLock::new();
    let starts = MEMORY
        .get_or_init(|| [0, 1].map(|_| Box::leak(Box::new(Memory::new(24 << 20, 4096))).start().expose_provenance()));
    while IN_TURN.swap(true, Ordering::Acquire) {
        std::thread::yield_now();
    }
    let start = std::ptr::with_exposed_provenance_mut(starts[usize::from(uses_pin)]);
    // SAFETY: the memory is leaked, and each heap gets one half of it, once.
    unsafe { heap.provider().add_region(start, 24 << 20) }.unwrap();
    // Before the first pages have come, a handler that interrupts whoever fetches them finds nothing, by right.
    Filled::new(heap, Layout::new::<u64>(), 1).unwrap().unwrap().free().unwrap();
    USES_PIN.store(uses_pin, Ordering::Relaxed);
    for counter in [&SIGNALS, &NESTED, &REFUSED] {
        counter.store(0, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = on_signal;
    // SAFETY: the handler uses atomics, thread-locals without destructors, and the heap under test.
    unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };

    let working = AtomicUsize::new(CPUS);
    let over = AtomicBool::new(false);
    let threads: Vec<OnceLock<libc::pthread_t>> = (0..CPUS).map(|_| OnceLock::new()).collect();
    std::thread::scope(|scope| {
        for (index, thread) in threads.iter().enumerate() {
            let (working, over) = (&working, &over);
            scope.spawn(move || {
                play_cpu(index);
                // SAFETY: no preconditions.
                thread.set(unsafe { libc::pthread_self() }).unwrap();
                let mut random = Random::new(index as u64);
                let mut slots: Vec<Option<Filled<_>>> = (0..64).map(|_| None).collect();
                while NESTED.load(Ordering::Relaxed) < NESTED_GOAL {
                    INSIDE.set(true);
                    churn(heap, &mut random, &mut slots, 500, 1 << 10).unwrap();
                    INSIDE.set(false);
                }
                free_all(&mut slots).unwrap();
                working.fetch_sub(1, Ordering::Relaxed);
                // Signals must find a living thread.
                while !over.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
            });
        }
        while working.load(Ordering::Relaxed) > 0 {
            for thread in threads.iter().filter_map(OnceLock::get) {
                // SAFETY: every thread lives until `over`.
                unsafe { libc::pthread_kill(*thread, libc::SIGUSR1) };
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    let [signals, nested, refused] = [&SIGNALS, &NESTED, &REFUSED].map(|counter| counter.load(Ordering::Relaxed));
    println!("{signals} signals, {nested} of them inside the churn, {refused} allocations refused");
    // There is memory, and the provider may be re-entered; but a thread that the host preempts with a lock held hides
    // what that guards.
    assert!(1000 * refused <= signals, "{refused} of {signals}");
    assert!(!BROKEN.load(Ordering::Relaxed), "a handler's block was damaged");
    heap.verify_all().unwrap();
    IN_TURN.store(false, Ordering::Release);
}

#[test]
fn signals_inside_a_pinned_heap() {
    storm(&PINNED, true);
}

#[test]
fn signals_inside_a_hinted_heap() {
    storm(&HINTED, false);
}

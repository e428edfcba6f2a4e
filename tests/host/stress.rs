//! Threads as CPUs, all at once, with every block filled and checked, on more threads than cores; `verify` and a
//! complete return of memory at the end.
//!
//! Promises shown: 1 (no deadlock), 2 (wrong hints cost time only), 3 (everything comes back), 4 (producer/consumer
//! does not grow).

use std::alloc::Layout;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Barrier};

use crate::common::{AtRest, Books, Mmap, ThreadCpu, limited, play_cpu, told};
use smp_heap::battery::{Filled, Random, churn, free_all, random_layout};
use smp_heap::cpu::CpuMode;
use smp_heap::{CpuHint, Heap, Hint, PageProvider, Pinned};

const CPUS: usize = 8;
const STEPS: usize = 6_000;

/// Prints the seed, so that a failing run can be repeated with `SMP_HEAP_SEED`.
pub(crate) fn seed() -> u64 {
    let seed = match std::env::var("SMP_HEAP_SEED") {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("SMP_HEAP_SEED={text}: {error}")),
        Err(_) => std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64,
    };
    println!("SMP_HEAP_SEED={seed}");
    seed
}

/// Runs `work` on that many threads at once, each with its number.
pub(crate) fn on_threads(count: usize, work: impl Fn(usize) + Sync) {
    let start = Barrier::new(count);
    std::thread::scope(|scope| {
        for index in 0..count {
            let (work, start) = (&work, &start);
            scope.spawn(move || {
                play_cpu(index);
                start.wait();
                work(index);
            });
        }
    });
}

/// Verifies, gives everything back, verifies again.
pub(crate) fn all_back<P: PageProvider + Sync, C: CpuMode + Sync, const N: usize>(
    heap: &Heap<P, C, N>,
    threads: usize,
) {
    heap.verify_all().unwrap();
    on_threads(threads, |_| heap.drain_current());
    play_cpu(0);
    heap.trim_all();
    heap.verify_all().unwrap();
    assert_eq!(heap.stats().held_len, 0, "{}", heap.stats());
}

fn churn_everywhere<P: PageProvider + Sync, C: CpuMode + Sync>(
    heap: &Heap<P, C, CPUS>,
    threads: usize,
    max_size: usize,
) {
    let seed = seed();
    on_threads(threads, |index| {
        let mut random = Random::new(seed + index as u64);
        let mut slots: Vec<Option<Filled<_>>> = (0..150).map(|_| None).collect();
        churn(heap, &mut random, &mut slots, STEPS, max_size).unwrap();
        free_all(&mut slots).unwrap();
    });
    all_back(heap, threads);
}

#[test]
fn churn_with_hints() {
    for threads in [1, 2, 8] {
        churn_everywhere(&Heap::new(Books::default(), Hint(ThreadCpu)), threads, 1 << 20);
    }
}

#[test]
fn churn_pinned() {
    for threads in [1, 2, 8] {
        churn_everywhere(&Heap::new(Books::default(), Pinned(ThreadCpu)), threads, 1 << 20);
    }
}

#[test]
fn churn_over_a_provider_that_moves_pages() {
    churn_everywhere(&Heap::new(Mmap::default(), Pinned(ThreadCpu)), 4, 4 << 20);
    churn_everywhere(&Heap::new(Mmap::default(), Hint(ThreadCpu)), 4, 4 << 20);
}

#[test]
fn churn_in_too_little_memory() {
    for limit in [64 << 10, 256 << 10, 2 << 20] {
        churn_everywhere(&Heap::new(limited(limit), Hint(ThreadCpu)), 8, 1 << 16);
        churn_everywhere(&Heap::new(limited(limit), Pinned(ThreadCpu)), 8, 1 << 16);
    }
}

#[test]
fn churn_with_lying_hints() {
    fn random() -> Option<usize> {
        static TURN: AtomicUsize = AtomicUsize::new(0);
        Some(TURN.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9) >> 5)
    }
    for lie in [random, || Some(usize::MAX), || Some(3), || None] {
        churn_everywhere(&Heap::new(Books::default(), told(lie)), 8, 1 << 16);
    }
}

#[test]
fn more_threads_than_caches_and_cpus_without_an_index() {
    churn_everywhere(&Heap::<_, _, CPUS>::new(Books::default(), Hint(ThreadCpu)), 20, 1 << 16);
    churn_everywhere(&Heap::<_, _, CPUS>::new(Books::default(), Pinned(ThreadCpu)), 20, 1 << 16);
}

/// Each thread frees what others allocated: `route(from, turn)` says who.
fn handed_over<C: CpuMode + Sync>(
    heap: &Heap<Books, C, CPUS>,
    threads: usize,
    route: impl Fn(usize, usize) -> usize + Sync,
) {
    let seed = seed();
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..threads).map(|_| mpsc::sync_channel::<Filled<_>>(64)).unzip();
    let receivers: Vec<_> = receivers.into_iter().map(std::sync::Mutex::new).collect();
    let sending = AtomicUsize::new(threads);
    on_threads(threads, |index| {
        let mut random = Random::new(seed + index as u64);
        let inbox = receivers[index].lock().unwrap();
        let senders = senders.clone();
        for turn in 0..STEPS {
            let layout = random_layout(&mut random, 1 << 14);
            let mut block = Filled::new(heap, layout, turn as u8).unwrap();
            let target = &senders[route(index, turn)];
            while let Some(held) = block.take() {
                if let Err(mpsc::TrySendError::Full(back)) = target.try_send(held) {
                    block = Some(back);
                }
                inbox.try_iter().for_each(|block| block.free().unwrap());
            }
        }
        // The others may still send.
        sending.fetch_sub(1, Ordering::Relaxed);
        while sending.load(Ordering::Relaxed) > 0 {
            inbox.try_iter().for_each(|block| block.free().unwrap());
            std::thread::yield_now();
        }
    });
    for inbox in &receivers {
        inbox.lock().unwrap().try_iter().for_each(|block| block.free().unwrap());
    }
    drop(senders);
    all_back(heap, threads);
}

#[test]
fn freed_by_the_neighbour_in_pairs_rings_and_all_to_all() {
    for threads in [2, 4, 8] {
        handed_over(&Heap::new(Books::default(), Pinned(ThreadCpu)), threads, |from, _| from ^ 1);
        handed_over(&Heap::new(Books::default(), Hint(ThreadCpu)), threads, |from, _| (from + 1) % threads);
        handed_over(&Heap::new(Books::default(), Pinned(ThreadCpu)), threads, |from, turn| (from + turn) % threads);
    }
}

/// One thread allocates, another frees: what is held stays near what is live.
fn producer_consumer<C: CpuMode + Sync>(heap: &Heap<Books, C, CPUS>, size: usize) {
    const LIVE: usize = 500;
    const ROUNDS: usize = 200;
    let (sender, receiver) = mpsc::sync_channel::<Vec<Filled<_>>>(1);
    let receiver = std::sync::Mutex::new(receiver);
    let sender = std::sync::Mutex::new(Some(sender));
    on_threads(2, |index| {
        let layout = Layout::from_size_align(size, 8).unwrap();
        if index == 0 {
            let sender = sender.lock().unwrap().take().unwrap();
            for round in 0..ROUNDS {
                let batch = (0..LIVE).map(|_| Filled::new(heap, layout, round as u8).unwrap().unwrap()).collect();
                sender.send(batch).unwrap();
            }
        } else {
            for batch in receiver.lock().unwrap().iter() {
                batch.into_iter().for_each(|block| block.free().unwrap());
            }
        }
    });
    // At most three batches are live at once: one being made, one under way, one being freed.
    let live_len = 3 * LIVE * size;
    let peak_len = heap.provider().peak_len();
    println!("{size}: peak {peak_len} live {live_len}\n{}", heap.stats());
    assert!(peak_len <= 2 * live_len + (1 << 20), "{peak_len} held for {live_len} live in blocks of {size}");
    all_back(heap, 2);
}

#[test]
fn producer_and_consumer_do_not_grow() {
    for size in [16, 48, 64, 200, 1024, 4096, 40_000] {
        producer_consumer(&Heap::new(Books::default(), Pinned(ThreadCpu)), size);
        producer_consumer(&Heap::new(Books::default(), Hint(ThreadCpu)), size);
    }
}

#[test]
fn trim_drain_and_stats_while_others_work() {
    let heap: Arc<Heap<Books, Hint<ThreadCpu>, CPUS>> = Arc::new(Heap::new(Books::default(), Hint(ThreadCpu)));
    let done = AtomicBool::new(false);
    let running = AtomicUsize::new(3);
    let seed = seed();
    on_threads(4, |index| {
        if index == 3 {
            while !done.load(Ordering::Relaxed) {
                heap.trim(0);
                heap.drain();
                let _ = heap.stats().to_string();
                heap.for_each_run(|_| ());
            }
            return;
        }
        let mut random = Random::new(seed + index as u64);
        let mut slots: Vec<Option<Filled<_>>> = (0..100).map(|_| None).collect();
        churn(&heap, &mut random, &mut slots, 2 * STEPS, 1 << 18).unwrap();
        free_all(&mut slots).unwrap();
        if running.fetch_sub(1, Ordering::Relaxed) == 1 {
            done.store(true, Ordering::Relaxed);
        }
    });
    all_back(&heap, 4);
}

#[test]
fn a_hint_may_call_itself_unknown_until_cpus_are_known() {
    static KNOWN: AtomicBool = AtomicBool::new(false);
    let hint = || KNOWN.load(Ordering::Relaxed).then(|| ThreadCpu.current_cpu()).flatten();
    let heap: Heap<Books, _, CPUS> = Heap::new(Books::default(), told(hint));
    let early = Filled::new(&heap, Layout::new::<[u64; 9]>(), 1).unwrap().unwrap();
    KNOWN.store(true, Ordering::Relaxed);
    churn_everywhere_keeping(&heap, early);
}

fn churn_everywhere_keeping<C: CpuMode + Sync>(heap: &Heap<Books, C, CPUS>, early: Filled<'_, Heap<Books, C, CPUS>>) {
    on_threads(4, |index| {
        let mut random = Random::new(index as u64);
        let mut slots: Vec<Option<Filled<_>>> = (0..50).map(|_| None).collect();
        churn(heap, &mut random, &mut slots, 1000, 1 << 14).unwrap();
        free_all(&mut slots).unwrap();
    });
    early.free().unwrap();
    all_back(heap, 4);
}

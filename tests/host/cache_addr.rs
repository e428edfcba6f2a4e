//! Pins whose CPU keeps the address of its cache: the address comes with the cache, is used by nobody else, and goes
//! before the cache does.

use std::cell::Cell;
use std::sync::Barrier;

use crate::common::{AtRest, Books, filled, play_cpu};
use crate::host_pages::HostPages;
use smp_heap::battery::Faulty;
use smp_heap::cpu::{ByAddr, CacheAddr, CpuArea, CpuHint, NO_INDEX, NeverPreempts, UnknownCpu};
use smp_heap::{Heap, Pinned};

const CPUS: usize = 4;
/// Places for addresses: one more than CPUs.
const PLACES: usize = CPUS + 1;

thread_local! {
    static PLACE: Cell<usize> = const { Cell::new(0) };
}

/// The places of test number `TEST`, which has one heap.
struct Area<const TEST: usize>;

static ADDRS: [[CacheAddr; PLACES]; 6] = [const { [const { CacheAddr::new() }; PLACES] }; 6];

// SAFETY: a thread plays one CPU at a time, at a place that no other CPU of that test has then, and which stays.
unsafe impl<const TEST: usize> CpuArea for Area<TEST> {
    fn cache_addr() -> &'static CacheAddr {
        &ADDRS[TEST][PLACE.get()]
    }

    fn index() -> usize {
        crate::common::ThreadCpu.current_cpu().unwrap()
    }
}

type Mode<const TEST: usize> = Pinned<ByAddr<NeverPreempts<UnknownCpu>, Area<TEST>>>;
type Tested<const TEST: usize> = Heap<Books, Mode<TEST>, CPUS>;

fn heap<const TEST: usize>() -> Box<Tested<TEST>> {
    // SAFETY: each thread plays a CPU of its own.
    let pin = unsafe { NeverPreempts::new(UnknownCpu) };
    // SAFETY: each test has one heap, boxed, and places of its own, which nobody uses when it is dropped.
    let pin = unsafe { ByAddr::new(pin) };
    Box::new(Heap::new(Books::default(), Pinned(pin)))
}

/// Plays a CPU whose area has its place at `place`.
fn play(cpu: usize, place: usize) {
    play_cpu(cpu);
    PLACE.set(place);
}

/// Takes 1000 blocks at once and gives them back; how many are in each CPU's cache then.
fn cached<const TEST: usize>(heap: &Tested<TEST>) -> [u64; CPUS] {
    let blocks: Vec<_> = (0..1000).map(|_| filled(heap, 64)).collect();
    blocks.into_iter().for_each(|block| block.free().unwrap());
    heap.verify_all().unwrap();
    heap.stats().cpus.map(|cpu| cpu.cached_count)
}

fn is_known<const TEST: usize>(place: usize) -> bool {
    format!("{:?}", ADDRS[TEST][place]) != format!("{:?}", CacheAddr::new())
}

fn all_back<const TEST: usize>(heap: &Tested<TEST>) {
    for cpu in 0..CPUS {
        play(cpu, cpu);
        heap.drain_current();
    }
    heap.trim_all();
    heap.verify_all().unwrap();
    assert_eq!(heap.provider().held_len(), 0);
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "looks for free blocks in a cache, and they wait in quarantine")]
fn each_cpu_is_told_where_its_cache_is() {
    let heap = heap::<0>();
    // So that there is room for the CPUs' caches.
    let ballast = filled(&heap, 8 << 20);
    for cpu in 0..CPUS {
        play(cpu, cpu);
        assert!(!is_known::<0>(cpu));
        let cached = cached(&heap);
        assert!(is_known::<0>(cpu) && cached[cpu] > 100, "CPU {cpu}: {cached:?}");
        assert!(cached[cpu + 1..].iter().all(|count| *count == 0), "CPU {cpu}: {cached:?}");
    }
    ballast.free().unwrap();
    all_back(&heap);
}

#[test]
fn a_cpu_without_an_index_is_never_told() {
    let heap = heap::<1>();
    for index in [CPUS, NO_INDEX] {
        play(index, CPUS);
        assert_eq!(cached(&heap), [0; CPUS]);
        assert!(!is_known::<1>(CPUS));
    }
    all_back(&heap);
}

/// Its area may serve another index then, and its index another area.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "looks for free blocks in a cache, and they wait in quarantine")]
fn a_cpu_that_goes_forgets_its_address() {
    let heap = heap::<2>();
    let ballast = filled(&heap, 8 << 20);
    play(1, 1);
    assert!(cached(&heap)[1] > 100 && is_known::<2>(1));
    // SAFETY: this thread plays all CPUs, and is not inside the heap.
    assert!(unsafe { heap.retire_cpu(1) });
    assert!(!is_known::<2>(1));
    play(2, 1);
    let two = cached(&heap);
    assert!(two[2] > 100 && two[1] == 0, "what was CPU 1's place is CPU 2's: {two:?}");
    play(1, CPUS);
    let back = cached(&heap);
    assert!(back[1] > 100 && back[2] == two[2], "CPU 1 is back at another place: {back:?}");
    assert!(heap.stats().cpus[1].is_used);
    play(2, 1);
    heap.drain_current();
    play(1, CPUS);
    heap.drain_current();
    ballast.free().unwrap();
    all_back(&heap);
}

#[test]
fn a_heap_at_rest_takes_addresses_back_with_caches() {
    let heap = heap::<3>();
    for _ in 0..3 {
        let ballast = filled(&heap, 8 << 20);
        for cpu in 0..CPUS {
            play(cpu, cpu);
            cached(&heap);
            heap.drain_current();
        }
        ballast.free().unwrap();
        all_back(&heap);
        assert!((1..CPUS).all(|cpu| !is_known::<3>(cpu)), "their caches went to the provider");
    }
}

/// It gets its cache by a call that tells no address; if it passed for nested from then on, its provider would not be
/// asked.
#[test]
fn a_cpu_that_only_takes_pages_is_not_nested() {
    // SAFETY: as in `heap`.
    let pin = unsafe { NeverPreempts::new(UnknownCpu) };
    // SAFETY: as in `heap`.
    let pin = unsafe { ByAddr::<_, Area<5>>::new(pin) };
    let heap: Box<Heap<_, _, CPUS>> = Box::new(Heap::new(Faulty::new(HostPages::<false>::default()), Pinned(pin)));
    play(1, 1);
    for len in [1 << 20, 64 << 20] {
        filled(&heap, len).free().unwrap();
    }
    assert!(is_known::<5>(1));
    heap.trim_all();
    assert_eq!(heap.provider().held_len(), 0);
}

/// Blocks go from CPU to CPU, each with its own address.
#[test]
fn cpus_with_addresses_share_a_heap() {
    let heap = heap::<4>();
    let start = Barrier::new(CPUS);
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..CPUS).map(|_| std::sync::mpsc::channel()).unzip();
    std::thread::scope(|scope| {
        for (cpu, receiver) in receivers.into_iter().enumerate() {
            let (heap, start, next) = (&heap, &start, senders[(cpu + 1) % CPUS].clone());
            scope.spawn(move || {
                play(cpu, cpu);
                start.wait();
                for turn in 0..200 {
                    let sizes = (0..200).map(|number| 8 + (turn * 31 + number * 17 + cpu) % 2000);
                    let blocks: Vec<_> = sizes.map(|size| filled(heap, size)).collect();
                    next.send(blocks).unwrap();
                    receiver.recv().unwrap().into_iter().for_each(|block| block.free().unwrap());
                }
            });
        }
    });
    all_back(&heap);
}

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

/// Where the CPUs of one heap have their areas.
type Places = &'static [CacheAddr; PLACES];

static NOWHERE: CacheAddr = CacheAddr::new();

thread_local! {
    static PLACE: Cell<&'static CacheAddr> = const { Cell::new(&NOWHERE) };
}

/// The area of the CPU that the thread plays.
struct Area;

// SAFETY: a thread plays one CPU at a time, at a place that no other CPU of that heap has then, and which stays.
unsafe impl CpuArea for Area {
    fn cache_addr() -> &'static CacheAddr {
        PLACE.get()
    }

    fn index() -> usize {
        crate::common::ThreadCpu.current_cpu().unwrap()
    }
}

type Mode = Pinned<ByAddr<NeverPreempts<UnknownCpu>, Area>>;
type Tested = Heap<Books, Mode, CPUS>;

fn places() -> Places {
    Box::leak(Box::new([const { CacheAddr::new() }; PLACES]))
}

fn heap() -> Box<Tested> {
    // SAFETY: each thread plays a CPU of its own.
    let pin = unsafe { NeverPreempts::new(UnknownCpu) };
    // SAFETY: each test has one heap, boxed, and places of its own, which nobody uses when it is dropped.
    let pin = unsafe { ByAddr::new(pin) };
    Box::new(Heap::new(Books::default(), Pinned(pin)))
}

/// Plays a CPU whose area is there.
fn play(cpu: usize, place: &'static CacheAddr) {
    play_cpu(cpu);
    PLACE.set(place);
}

/// Takes 1000 blocks at once and gives them back; how many are in each CPU's cache then.
fn cached(heap: &Tested) -> [u64; CPUS] {
    let blocks: Vec<_> = (0..1000).map(|_| filled(heap, 64)).collect();
    blocks.into_iter().for_each(|block| block.free().unwrap());
    heap.verify_all().unwrap();
    heap.stats().cpus.map(|cpu| cpu.cached_count)
}

fn is_known(place: &CacheAddr) -> bool {
    format!("{place:?}") != format!("{:?}", CacheAddr::new())
}

fn all_back(heap: &Tested, places: Places) {
    for (cpu, place) in places.iter().take(CPUS).enumerate() {
        play(cpu, place);
        heap.drain_current();
    }
    heap.trim_all();
    heap.verify_all().unwrap();
    assert_eq!(heap.provider().held_len(), 0);
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "looks for free blocks in a cache, and they wait in quarantine")]
fn each_cpu_is_told_where_its_cache_is() {
    let (heap, places) = (heap(), places());
    // So that there is room for the CPUs' caches.
    let ballast = filled(&heap, 8 << 20);
    for (cpu, place) in places.iter().take(CPUS).enumerate() {
        play(cpu, place);
        assert!(!is_known(place));
        let cached = cached(&heap);
        assert!(is_known(place) && cached[cpu] > 100, "CPU {cpu}: {cached:?}");
        assert!(cached[cpu + 1..].iter().all(|count| *count == 0), "CPU {cpu}: {cached:?}");
    }
    ballast.free().unwrap();
    all_back(&heap, places);
}

#[test]
fn a_cpu_without_an_index_is_never_told() {
    let (heap, places) = (heap(), places());
    for index in [CPUS, NO_INDEX] {
        play(index, &places[CPUS]);
        assert_eq!(cached(&heap), [0; CPUS]);
        assert!(!is_known(&places[CPUS]));
    }
    all_back(&heap, places);
}

/// Its area may serve another index then, and its index another area.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "looks for free blocks in a cache, and they wait in quarantine")]
fn a_cpu_that_goes_forgets_its_address() {
    let (heap, places) = (heap(), places());
    let ballast = filled(&heap, 8 << 20);
    play(1, &places[1]);
    assert!(cached(&heap)[1] > 100 && is_known(&places[1]));
    // SAFETY: this thread plays all CPUs, and is not inside the heap.
    assert!(unsafe { heap.retire_cpu(1) });
    assert!(!is_known(&places[1]));
    play(2, &places[1]);
    let two = cached(&heap);
    assert!(two[2] > 100 && two[1] == 0, "what was CPU 1's place is CPU 2's: {two:?}");
    play(1, &places[CPUS]);
    let back = cached(&heap);
    assert!(back[1] > 100 && back[2] == two[2], "CPU 1 is back at another place: {back:?}");
    assert!(heap.stats().cpus[1].is_used);
    play(2, &places[1]);
    heap.drain_current();
    play(1, &places[CPUS]);
    heap.drain_current();
    ballast.free().unwrap();
    all_back(&heap, places);
}

#[test]
fn a_heap_at_rest_takes_addresses_back_with_caches() {
    let (heap, places) = (heap(), places());
    for _ in 0..3 {
        let ballast = filled(&heap, 8 << 20);
        for (cpu, place) in places.iter().take(CPUS).enumerate() {
            play(cpu, place);
            cached(&heap);
            heap.drain_current();
        }
        ballast.free().unwrap();
        all_back(&heap, places);
        assert!((1..CPUS).all(|cpu| !is_known(&places[cpu])), "their caches went to the provider");
    }
}

/// It gets its cache by a call that tells no address; if it passed for nested from then on, its provider would not be
/// asked.
#[test]
fn a_cpu_that_only_takes_pages_is_not_nested() {
    // SAFETY: as in `heap`.
    let pin = unsafe { NeverPreempts::new(UnknownCpu) };
    // SAFETY: as in `heap`.
    let pin = unsafe { ByAddr::<_, Area>::new(pin) };
    let heap: Box<Heap<_, _, CPUS>> = Box::new(Heap::new(Faulty::new(HostPages::<false>::default()), Pinned(pin)));
    let places = places();
    play(1, &places[1]);
    for len in [1 << 20, 64 << 20] {
        filled(&heap, len).free().unwrap();
    }
    assert!(is_known(&places[1]));
    heap.trim_all();
    assert_eq!(heap.provider().held_len(), 0);
}

/// Blocks go from CPU to CPU, each with its own address.
#[test]
fn cpus_with_addresses_share_a_heap() {
    let (heap, places) = (heap(), places());
    let start = Barrier::new(CPUS);
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..CPUS).map(|_| std::sync::mpsc::channel()).unzip();
    std::thread::scope(|scope| {
        for (cpu, receiver) in receivers.into_iter().enumerate() {
            let (heap, start, next) = (&heap, &start, senders[(cpu + 1) % CPUS].clone());
            scope.spawn(move || {
                play(cpu, &places[cpu]);
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
    all_back(&heap, places);
}

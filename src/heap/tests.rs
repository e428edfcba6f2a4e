//! The heap over providers that do what a test tells them to.

use super::*;
use crate::PageRun;
use crate::base::sync::{AtomicBool, AtomicUsize, Ordering};
use crate::battery::{Call, Faulty, Filled, Moment};
use crate::contract::cpu::{CpuHint, CpuPin, UnknownCpu};
use crate::host_pages::HostPages;
use crate::pages::Use;
use crate::{Hint, Pinned};
use std::boxed::Box;
use std::vec::Vec;

/// Every caller is on CPU 0 and stays there.
#[derive(Debug)]
struct OneCpu;

// SAFETY: each heap with this pin is used by one thread.
unsafe impl CpuPin for OneCpu {
    type Guard = ();
    fn pin(&self) {}
    fn index(&self, (): &()) -> usize {
        0
    }
}

/// The host's memory with knobs and books. `MOVES`: it can move runs, and its pages come zeroed.
type Host<const MOVES: bool> = Faulty<HostPages<false, MOVES>>;

/// Calls of the provider, of all kinds.
fn calls_of<P, H>(provider: &Faulty<P, H>) -> usize {
    let kinds = [Call::Map, Call::Unmap, Call::Resize, Call::Remap, Call::Relieve];
    kinds.map(|call| provider.on(call).made()).into_iter().sum()
}

/// Takes nothing back and moves nothing, or does again.
fn set_stubborn<P, H>(provider: &Faulty<P, H>, is_stubborn: bool) {
    let count = if is_stubborn { usize::MAX } else { 0 };
    [Call::Unmap, Call::Resize, Call::Remap].into_iter().for_each(|call| provider.on(call).fail(0, count));
}

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

fn filled<P: PageProvider, C: CpuMode, const N: usize>(
    heap: &Heap<P, C, N>,
    size: usize,
) -> Option<Filled<'_, Heap<P, C, N>>> {
    Filled::new(heap, layout(size), 0x3c).unwrap()
}

fn fill<P: PageProvider, C: CpuMode, const N: usize>(
    heap: &Heap<P, C, N>,
    size: usize,
) -> Vec<Filled<'_, Heap<P, C, N>>> {
    core::iter::from_fn(|| filled(heap, size)).collect()
}

fn all_back<const MOVES: bool, C: CpuMode, const N: usize>(heap: &Heap<Host<MOVES>, C, N>) {
    heap.verify_all().unwrap();
    let held_len = heap.provider().held_len();
    assert_eq!(held_len, heap.stats().held_len, "what the provider gave is what the heap has");
    // SAFETY: the test is one thread, and in no operation.
    assert_eq!(unsafe { heap.trim_at_rest() }, held_len);
    heap.verify_all().unwrap();
    assert_eq!((heap.stats().held_len, heap.provider().held_len()), (0, 0));
}

#[test]
fn a_nested_pinned_context_never_calls_the_provider() {
    let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
    let small: Vec<_> = (0..100).map(|_| filled(&heap, 200).unwrap()).collect();
    // Their slabs are in the first chunk then.
    let sizes = [8, 64, 200, 3000, 9000, 50_000];
    sizes.into_iter().for_each(|size| filled(&heap, size).unwrap().free().unwrap());
    // Chunks of their own, all of which are empty once these are free.
    let large: Vec<_> = (0..4).map(|index| filled(&heap, 1_500_000 << index).unwrap()).collect();
    filled(&heap, 300_000).unwrap().free().unwrap();
    let before = (calls_of(heap.provider()), heap.provider().held_len());
    let interrupted = heap.enter().unwrap();
    for size in sizes {
        filled(&heap, size).unwrap().free().unwrap();
    }
    assert!(filled(&heap, 100 << 20).is_none(), "not at hand");
    small.into_iter().chain(large).for_each(|block| block.free().unwrap());
    heap.drain_current();
    heap.drain();
    drop(interrupted);
    assert_eq!((calls_of(heap.provider()), heap.provider().held_len()), before);
    assert!(heap.engine.pages.has_surplus(), "left to the next ordinary caller");
    // The first one is kept.
    [(); 2].map(|()| filled(&heap, 40_000).unwrap()).into_iter().for_each(|block| block.free().unwrap());
    assert!(heap.provider().held_len() < before.1);
    all_back(&heap);
}

/// The provider has a lock that keeps interrupts out: whoever holds it runs on another CPU, so it may be re-entered.
#[test]
fn a_nested_context_waits_for_a_lock_that_masks_interrupts() {
    let (done, is_locked) = (AtomicBool::new(false), AtomicBool::new(false));
    let lock = |_, moment| match moment {
        Moment::Before => wait_until(|| !is_locked.swap(true, Ordering::Acquire)),
        Moment::After => is_locked.store(false, Ordering::Release),
    };
    let heap = Heap::<_, _, 2>::new(Faulty::with_hook(HostPages::<true>::default(), lock), Pinned(OneCpu));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Another CPU's calls of the provider, one after the other.
            let run = PageRun::new(4096, 4096, HostPages::<true>::PAGE_LEN).unwrap();
            while !done.load(Ordering::Relaxed) {
                let start = heap.provider().map(run).unwrap();
                // SAFETY: it came from there, with this run.
                assert!(unsafe { heap.provider().unmap(start, run) });
            }
        });
        for _ in 0..200 {
            assert_eq!(heap.stats().held_len, 0, "nothing is at hand");
            let interrupted = heap.enter().unwrap();
            let block = filled(&heap, 50_000).expect("the provider has memory");
            drop(interrupted);
            block.free().unwrap();
            heap.drain_current();
            heap.trim(0);
        }
        done.store(true, Ordering::Relaxed);
    });
    heap.verify_all().unwrap();
    assert_eq!(heap.provider().held_len(), heap.stats().held_len);
}

#[test]
fn work_that_takes_locks_is_done_with_the_cache_held() {
    let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
    heap.held(|caller| {
        assert!(!caller.nested);
        assert!(heap.enter().is_err_and(|caller| caller.nested), "who interrupts here knows");
        heap.held(|caller| assert!(caller.nested));
    });
    assert!(heap.enter().is_ok());
    heap.step(&mut |may_wait| {
        assert!(may_wait);
        heap.step(&mut |may_wait| assert!(!may_wait));
    });
}

#[test]
fn a_nested_context_with_nothing_at_hand_is_refused_at_once() {
    let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
    let interrupted = heap.enter().unwrap();
    for size in [8, 200, 9000, 50_000] {
        assert!(filled(&heap, size).is_none());
    }
    drop(interrupted);
    assert_eq!((calls_of(heap.provider()), heap.stats().relief_count), (0, 0));
    filled(&heap, 200).unwrap().free().unwrap();
    all_back(&heap);
}

#[test]
#[cfg_attr(miri, ignore = "times are not those of a machine")]
fn a_nested_context_does_not_wait_for_the_lock_of_pages() {
    let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
    filled(&heap, 200).unwrap().free().unwrap();
    let shortest = |work: &dyn Fn() -> bool| {
        let time = |_| {
            let start = std::time::Instant::now();
            assert!(work(), "the lock is held");
            start.elapsed()
        };
        (0..20).map(time).min().unwrap()
    };
    let pages = &heap.engine.pages;
    let mut times = None;
    pages.for_each_run(&mut |_| {
        if times.is_none() {
            let ordinary = shortest(&|| pages.alloc(50_000, 8, Use::Large, 0, true).is_err());
            let interrupted = heap.enter().unwrap();
            times = Some((ordinary, shortest(&|| heap.alloc(layout(50_000)).is_err())));
            drop(interrupted);
        }
    });
    let (ordinary, nested) = times.unwrap();
    assert!(nested * 4 < ordinary, "a nested caller took {nested:?}, another one {ordinary:?}");
}

/// Hole 10: what nested frees emptied is still listed as partial, and found, by who needs pages and by who trims.
#[test]
fn slabs_that_nested_frees_emptied_are_found() {
    for needs_pages in [true, false] {
        let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
        let blocks: Vec<_> = (0..6000).map(|_| filled(&heap, 600).unwrap()).collect();
        let (early, late): (Vec<_>, Vec<_>) = blocks.into_iter().enumerate().partition(|(index, _)| index % 2 == 0);
        early.into_iter().for_each(|(_, block)| block.free().unwrap());
        heap.drain_current();
        heap.verify_all().unwrap();
        let interrupted = heap.enter().unwrap();
        late.into_iter().for_each(|(_, block)| block.free().unwrap());
        drop(interrupted);
        if needs_pages {
            let free_len = heap.stats().free_len;
            heap.provider().set_limit(heap.provider().held_len());
            let all = fill(&heap, 40_000);
            assert!(
                all.len() * 45_000 > heap.provider().held_len(),
                "{} blocks, {free_len} bytes were free",
                all.len()
            );
            all.into_iter().for_each(|block| block.free().unwrap());
        }
        heap.trim(0);
        assert_eq!(heap.provider().held_len(), 0);
        all_back(&heap);
    }
}

/// What a context gets that interrupted the heap, in blocks of `size` bytes, after twelve blocks of 900 KiB were freed,
/// or as many bytes in slabs.
#[cfg(not(feature = "debug-heap"))]
fn all_that_is_free_is_had<C: CpuMode>(mode: C, panics: bool, size: usize) {
    const LONG: usize = 900 << 10;
    let heap = Heap::<Host<false>, C, 2>::new(Host::default(), mode);
    heap.provider().set_limit(64 << 20);
    let free = |block: NonNull<u8>, size| {
        // SAFETY: allocated below with this Layout, and used by nobody.
        unsafe { heap.free(block, layout(size)) }
    };
    let fill = |size| {
        core::iter::from_fn({
            let heap = &heap;
            move || heap_alloc(heap, size)
        })
    };
    let small: Vec<_> = fill(1000).take(48 << 10).collect();
    let mut long: Vec<_> = fill(LONG).collect();
    let rest: Vec<_> = fill(4096).collect();
    if size < LONG / 9 {
        long.split_off(long.len() - 12).into_iter().for_each(|block| free(block, LONG));
    } else {
        small[..12 << 10].iter().for_each(|block| free(*block, 1000));
        heap.drain_current();
        assert!(heap.engine.release_empty(&|work| heap.step(work)));
    }
    let free_len = heap.engine.pages.free_len();
    assert!(free_len > 8 << 20, "{free_len}");
    let calls = calls_of(heap.provider());
    let interrupted = heap.enter();
    if panics {
        heap.enter_panic_mode();
    }
    let len = fill(size).count() * size;
    assert_eq!(calls_of(heap.provider()), calls, "the provider was left alone");
    assert!(len * 100 >= 85 * free_len, "{len} of {free_len} bytes in blocks of {size}, panic: {panics}");
    drop((interrupted, rest));
}

#[cfg(not(feature = "debug-heap"))]
fn heap_alloc<P: PageProvider, C: CpuMode, const N: usize>(heap: &Heap<P, C, N>, size: usize) -> Option<NonNull<u8>> {
    heap.alloc(layout(size)).ok().map(NonNull::cast)
}

#[test]
#[cfg_attr(miri, ignore = "too many blocks")]
#[cfg(not(feature = "debug-heap"))]
fn a_nested_context_gets_whatever_page_is_free() {
    for (panics, size) in [(false, 64), (true, 64), (false, 100 << 10), (true, 100 << 10)] {
        all_that_is_free_is_had(Pinned(OneCpu), panics, size);
    }
    all_that_is_free_is_had(Hint(UnknownCpu), true, 64);
}

#[test]
fn a_huge_block_freed_when_nested_waits_for_a_task() {
    let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Pinned(OneCpu));
    let huge = filled(&heap, 2 << 20).unwrap();
    let before = (calls_of(heap.provider()), heap.provider().held_len());
    let interrupted = heap.enter().unwrap();
    huge.free().unwrap();
    drop(interrupted);
    assert_eq!((calls_of(heap.provider()), heap.provider().held_len()), before);
    all_back(&heap);
}

/// Over memory that holds something else, with every byte of what `new` makes zero but provider and mode; and it works
/// as any.
#[test]
fn a_heap_made_in_place_is_as_a_new_one() {
    type Made = Heap<Host<false>, Hint<UnknownCpu>, 64>;
    let mut place = Box::<Made>::new_uninit();
    // SAFETY: bytes of the box.
    unsafe { place.as_mut_ptr().cast::<u8>().write_bytes(0xa5, size_of::<Made>()) };
    // SAFETY: the box is a heap's place, and nobody else's.
    unsafe { Heap::init_at(place.as_mut_ptr(), Host::default(), Hint(UnknownCpu)) };
    // SAFETY: just made.
    let heap = unsafe { place.assume_init() };
    assert!(heap.alloc(layout(isize::MAX as usize - 7)).is_err(), "an absurd request");
    let blocks: Vec<_> = [8, 100, 5000, 300_000].map(|size| filled(&heap, size).unwrap()).into();
    blocks.into_iter().for_each(|block| block.free().unwrap());
    all_back(&heap);
    static NEW: Heap<(), (), 64> = Heap::new((), ());
    // SAFETY: a static, whose padding the compiler wrote into the image as zeros.
    let bytes = unsafe { core::slice::from_raw_parts((&raw const NEW).cast::<u8>(), size_of::<Heap<(), (), 64>>()) };
    assert!(bytes.iter().all(|byte| *byte == 0), "a field that is not zero in a new heap");
}

/// What a heap takes before its first use, by the most CPUs it is for.
#[test]
#[cfg(not(any(feature = "hardened", feature = "trace", split_words, target_pointer_width = "32")))]
fn a_heap_for_many_cpus_is_small() {
    fn len<const CPUS: usize>() -> usize {
        size_of::<Heap<(), Hint<UnknownCpu>, CPUS>>()
    }
    let lens = [len::<1>(), len::<2>(), len::<8>(), len::<16>(), len::<1024>()];
    assert_eq!(size_of::<crate::cache::table::CpuState>(), 7296, "design.md says so");
    assert_eq!(lens, [30_848, 30_976, 31_104, 31_232, 56_448], "design.md and `Heap` say so");
}

/// Each kind of event as often as the heap counts what it did, and each block with the Layout that it was asked for
/// with.
#[test]
#[cfg(all(feature = "trace", not(feature = "debug-heap")))]
fn a_trace_tells_what_the_heap_did() {
    use crate::base::trace::{Trace, TraceRing, TraceSlot};
    const COUNT: usize = 3000;
    const ABSURD: usize = isize::MAX as usize >> if usize::BITS == 64 { 16 } else { 1 };
    let rings = std::vec![TraceRing::new()].leak();
    let slots: Vec<_> = (0..1 << 15).map(|_| TraceSlot::new()).collect();
    let trace: &'static Trace = &std::vec![Trace::new(rings, slots.leak(), || 0, || 0)].leak()[0];
    let heap = Heap::<Host<false>, _, 1>::new(Host::default(), Pinned(OneCpu));
    heap.trace_to(Some(trace));
    let small: Vec<_> = (0..COUNT).map(|_| filled(&heap, 100).unwrap()).collect();
    let aligned = Layout::from_size_align(5000, 64).unwrap();
    let block = heap.alloc(aligned).unwrap().cast();
    // SAFETY: just allocated, and one of its class.
    assert!(unsafe { heap.resize(block, aligned, 5100) });
    // SAFETY: its Layout now, and nobody uses it.
    unsafe { heap.free(block, Layout::from_size_align(5100, 64).unwrap()) };
    assert!(heap.alloc(layout(ABSURD)).is_err());
    small.into_iter().for_each(|block| block.free().unwrap());
    heap.trim(0);
    heap.trace_to(None);
    filled(&heap, 100).unwrap().free().unwrap();

    let text = std::format!("{trace}");
    let events: Vec<Vec<&str>> = text
        .split("list=")
        .skip(1)
        .flat_map(|line| line.lines().next().unwrap().split(','))
        .map(|event| event.split(':').collect())
        .collect();
    let number = |text: &str| usize::from_str_radix(text, 16).unwrap();
    let of = |letter: char| events.iter().filter(move |event| event[0].starts_with(letter));
    let sum = |letter| of(letter).map(|event| number(event[2])).sum::<usize>() as u64;
    let layouts = |letter| of(letter).map(|event| (number(event[2]), number(event[3]))).collect::<Vec<_>>();
    let addrs = |letter| {
        let mut addrs: Vec<_> = of(letter).map(|event| number(event[1])).collect();
        addrs.sort_unstable();
        addrs
    };
    assert_eq!(trace.dropped(), 0);
    let stats = heap.stats();
    let mut taken = std::vec![(100, 3); COUNT];
    taken.push((5000, 6));
    assert_eq!(layouts('a'), taken);
    assert_eq!(layouts('r'), [(5100, 6)]);
    assert_eq!(layouts('x'), [(ABSURD, 3)]);
    assert_eq!(layouts('f').iter().filter(|freed| **freed == (100, 3)).count(), COUNT);
    assert_eq!(layouts('f')[0], (5100, 6));
    assert_eq!(addrs('a'), addrs('f'));
    let runs = (of('m').count() as u64, of('n').count() as u64);
    assert_eq!(runs, (stats.map_count - 1, stats.unmap_count));
    assert_eq!(addrs('m'), addrs('n'));
    // The block that a chunk was asked for comes past the cache.
    assert_eq!((sum('l') + runs.0, sum('u')), (stats.cpus[0].flushed_count, stats.cpus[0].flushed_count));
    assert!(sum('u') > COUNT as u64);
}

#[test]
fn a_nested_context_gets_no_huge_block() {
    let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Pinned(OneCpu));
    let interrupted = heap.enter().unwrap();
    assert!(filled(&heap, 2 << 20).is_none());
    drop(interrupted);
    assert_eq!(heap.stats().map_count, 0);
}

#[test]
fn with_hints_every_cache_may_be_busy_and_the_lap_ends() {
    let heap = Heap::<Host<false>, _, 3>::new(Host::default(), Hint(UnknownCpu));
    filled(&heap, 64).unwrap().free().unwrap();
    // There is room for two more caches.
    let long = filled(&heap, 3 << 20).unwrap();
    assert!(heap.engine.add_cpu(1) && heap.engine.add_cpu(2));
    let held = heap.engine.cpus.iter().all(|(index, cache, _)| cache.try_lock(index));
    assert!(held);
    let blocks: Vec<_> = [8, 64, 200, 3000, 9000, 50_000, 3 << 20].map(|size| filled(&heap, size).unwrap()).into();
    blocks.into_iter().for_each(|block| block.free().unwrap());
    heap.engine.cpus.iter().for_each(|(index, cache, _)| cache.unlock(index));
    long.free().unwrap();
    all_back(&heap);
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "asks for the class of a block without a frame")]
fn a_lap_begins_where_the_last_one_succeeded() {
    let heap = Heap::<Host<false>, _, 4>::new(Host::default(), Hint(UnknownCpu));
    filled(&heap, 100).unwrap().free().unwrap();
    // There is room for three caches.
    let long = filled(&heap, 3 << 20).unwrap();
    assert!((1..4).all(|cpu| heap.engine.add_cpu(cpu)));
    let caches: Vec<_> = heap.engine.caches().collect();
    assert!(caches[0].try_lock(0) && caches[1].try_lock(1));
    let block = filled(&heap, 200).unwrap();
    let start = || caches[0].lap_start.load(Ordering::Relaxed);
    assert_eq!(start(), 2);
    caches[1].unlock(1);
    block.free().unwrap();
    assert_eq!(start(), 2, "the free went there too");
    assert!(caches[2].tally(SizeClass::of(layout(200)).unwrap()).get().0 > 0);
    assert!(caches[2].try_lock(2), "it was left open");
    filled(&heap, 200).unwrap().free().unwrap();
    assert_eq!(start(), 3);
    caches[0].unlock(0);
    caches[2].unlock(2);
    long.free().unwrap();
    all_back(&heap);
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "with a frame, 48 bytes need an alignment that 64 do not have")]
fn a_longer_block_serves_when_no_other_is_left() {
    fn serve<C: CpuMode>(heap: &Heap<Host<false>, C, 2>, nested: bool) {
        heap.provider().set_limit(256 << 10);
        let mut blocks = fill(heap, 64);
        assert!(filled(heap, 48).is_none());
        for _ in 0..3 {
            blocks.pop().unwrap().free().unwrap();
        }
        heap.drain_current();
        let interrupted = nested.then(|| heap.enter().unwrap());
        let borrowed = filled(heap, 48).unwrap();
        drop(interrupted);
        heap.verify_all().unwrap();
        blocks.into_iter().chain([borrowed]).for_each(|block| block.free().unwrap());
        all_back(heap);
    }
    serve(&Heap::new(Host::default(), Pinned(OneCpu)), true);
    serve(&Heap::new(Host::default(), Pinned(OneCpu)), false);
    serve(&Heap::new(Host::default(), Hint(UnknownCpu)), false);
}

#[test]
fn free_chunks_may_be_had_again_in_another_length() {
    let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Hint(UnknownCpu));
    heap.provider().set_limit(8 << 20);
    let blocks = fill(&heap, 1 << 20);
    blocks.into_iter().for_each(|block| block.free().unwrap());
    filled(&heap, 7 << 20).expect("the chunks went back for it").free().unwrap();
    all_back(&heap);
}

/// What a CPU keeps is free when its cache is emptied, although nothing else was ever in that.
#[test]
fn draining_frees_the_cached_run() {
    fn check<C: CpuMode>(mode: C, drain: impl Fn(&Heap<Host<false>, C, 2>)) {
        let heap = Heap::new(Host::default(), mode);
        let other = filled(&heap, 100_000).unwrap();
        let free_len = || heap.engine.pages.free_len();
        filled(&heap, 200_000).unwrap().free().unwrap();
        drain(&heap);
        let before = free_len();
        filled(&heap, 200_000).unwrap().free().unwrap();
        assert_ne!(free_len(), before, "kept");
        drain(&heap);
        assert_eq!(free_len(), before);
        other.free().unwrap();
        all_back(&heap);
    }
    check(Hint(UnknownCpu), |heap| heap.drain());
    check(Pinned(OneCpu), |heap| heap.drain_current());
}

#[test]
fn what_another_cpus_cache_holds_is_had_before_null() {
    let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Hint(UnknownCpu));
    // A chunk's granules and nothing else.
    heap.provider().set_limit(1 << 20);
    let class = SizeClass::of(layout(2048)).unwrap();
    filled(&heap, 2048).unwrap().free().unwrap();
    assert!(heap.engine.add_cpu(1));
    let blocks = fill(&heap, 2048);
    // The other CPU's cache takes a few, and then everything else is in use.
    let other = heap.engine.cache(1).unwrap();
    let caller = Caller { index: 1, nested: false };
    let mut kept = Vec::new();
    for block in blocks {
        if other.count(class) < 4 {
            block.check().unwrap();
            block.free().unwrap();
            let freed = heap.engine.obtain_one(class, Caller { index: 0, nested: true });
            let _ = freed.map(|freed| heap.engine.spill(other, class, freed, caller));
            continue;
        }
        kept.push(block);
    }
    let _ = other.is_new();
    let count = other.count(class);
    kept.extend(fill(&heap, 2048));
    assert_eq!(other.count(class), 0, "{count} were there");
    kept.into_iter().for_each(|block| block.free().unwrap());
    all_back(&heap);
}

#[test]
fn huge_blocks_that_were_not_taken_back_are_used_again() {
    let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Hint(UnknownCpu));
    let block = filled(&heap, 3 << 20).unwrap();
    set_stubborn(heap.provider(), true);
    block.free().unwrap();
    let held_len = heap.provider().held_len();
    assert_eq!(heap.stats().held_len, held_len);
    // Dirty now, although the provider gives zeros.
    let again: Vec<_> = (0..5).map(|_| Filled::zeroed(&heap, layout(500_000), 7).unwrap().unwrap()).collect();
    assert_eq!(heap.provider().held_len(), held_len, "no new pages");
    again.into_iter().for_each(|block| block.free().unwrap());
    set_stubborn(heap.provider(), false);
    all_back(&heap);
}

#[test]
fn huge_blocks_shrink_move_and_stay_with_their_content() {
    let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Hint(UnknownCpu));
    let mut block = filled(&heap, 6 << 20).unwrap();
    for (stubborn, size) in [(false, 4 << 20), (false, 9 << 20), (true, 12 << 20), (true, 2 << 20), (false, 3 << 20)] {
        set_stubborn(heap.provider(), stubborn);
        assert!(block.realloc(size).unwrap());
        heap.verify_all().unwrap();
    }
    block.free().unwrap();
    all_back(&heap);
    let mut block = filled(&heap, 6 << 20).unwrap();
    assert!(block.realloc(8 << 20).unwrap());
    block.free().unwrap();
    assert_eq!((heap.provider().held_len(), heap.stats().held_len), (0, 0), "freed means given back");
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "a frame does not fit beside a block of all that there is")]
fn a_huge_block_is_had_after_chunks_went_back_or_relief() {
    let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Hint(UnknownCpu));
    heap.provider().set_limit(8 << 20);
    let blocks = fill(&heap, 900_000);
    assert!(blocks.len() > 4);
    blocks.into_iter().for_each(|block| block.free().unwrap());
    let block = filled(&heap, 8 << 20).expect("after all chunks went back");
    assert!(filled(&heap, 7 << 20).is_none());
    heap.provider().set_relief(8 << 20, 1);
    let more = filled(&heap, 7 << 20).expect("after relief");
    [block, more].into_iter().for_each(|block| block.free().unwrap());
    all_back(&heap);
}

/// Promise 5, for the map of chunks: it is full, and there is no memory for another table of it.
#[test]
fn runs_that_cannot_be_noted_go_back_and_tables_come_and_go() {
    let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Hint(UnknownCpu));
    heap.provider().set_least(256 << 10);
    let huge = || heap.alloc(layout(1 << 20)).ok();
    let mut blocks: Vec<_> = core::iter::from_fn(huge).take(10_000).collect();
    assert!(blocks.len() < 10_000, "no table was needed");
    // Some addresses may still find a slot.
    let mut small: Vec<_> = (0..8).filter_map(|_| filled(&heap, 64)).collect();
    blocks.extend((0..50).filter_map(|_| huge()));
    assert_eq!(heap.provider().held_len(), heap.stats().held_len, "after {} blocks", blocks.len());
    heap.provider().set_least(0);
    small.push(filled(&heap, 64).expect("in a chunk that a new table has"));
    blocks.extend((0..500).map(|_| huge().expect("in a new table")));
    heap.verify_all().unwrap();
    for block in blocks {
        // SAFETY: allocated above with this Layout; nobody used it.
        unsafe { heap.free(block.cast(), layout(1 << 20)) };
    }
    small.into_iter().for_each(|block| block.free().unwrap());
    set_stubborn(heap.provider(), true);
    let held_len = heap.provider().held_len();
    assert!(held_len > 0 && heap.trim(0) == 0);
    assert_eq!((heap.provider().held_len(), heap.stats().held_len), (held_len, held_len));
    set_stubborn(heap.provider(), false);
    all_back(&heap);
}

/// Chunks need more slots than huge blocks, so that some that become chunks find none.
#[test]
fn huge_blocks_that_nobody_takes_go_back_later() {
    let heap = Heap::<Host<true>, _, 2>::new(Host::default(), Hint(UnknownCpu));
    heap.provider().set_least(256 << 10);
    let blocks: Vec<_> = core::iter::from_fn(|| heap.alloc(layout(1 << 20)).ok()).take(10_000).collect();
    assert!(blocks.len() < 10_000, "no table was needed");
    set_stubborn(heap.provider(), true);
    for block in blocks {
        // SAFETY: allocated above with this Layout; nobody used it.
        unsafe { heap.free(block.cast(), layout(1 << 20)) };
    }
    let stats = heap.stats();
    assert!(stats.held_len < heap.provider().held_len(), "every run found a slot, so nothing is shown");
    heap.verify_all().unwrap();
    set_stubborn(heap.provider(), false);
    heap.trim(0);
    assert_eq!((heap.stats().held_len, heap.provider().held_len()), (0, 0));
    all_back(&heap);
}

std::thread_local! {
    static CPU: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
}

/// Each thread is the CPU that it says.
struct ThreadCpu;

impl CpuHint for ThreadCpu {
    fn current_cpu(&self) -> Option<usize> {
        Some(CPU.get())
    }
}

/// The only free blocks are in a cache that somebody holds for a while: found when it is let go, not refused. The wait
/// has a bound, which a holder that gets no processor may outlast; so most times, not every time.
#[test]
#[cfg_attr(miri, ignore = "times are not those of a machine")]
fn blocks_in_a_cache_that_is_held_are_waited_for() {
    const ROUNDS: usize = 20;
    let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Hint(ThreadCpu));
    heap.provider().set_limit(1 << 20);
    filled(&heap, 1000).unwrap().free().unwrap();
    CPU.set(1);
    filled(&heap, 1000).unwrap().free().unwrap();
    CPU.set(0);
    assert!(heap.engine.cpus.has(1));
    let mut blocks = fill(&heap, 1000);
    let (turn, mut found) = (std::sync::Barrier::new(2), 0);
    std::thread::scope(|scope| {
        for _ in 0..ROUNDS {
            let free = blocks.split_off(blocks.len() - 2);
            scope.spawn(|| {
                CPU.set(1);
                free.into_iter().for_each(|block| block.free().unwrap());
                let held = heap.enter().ok();
                assert!(held.as_ref().is_some_and(|held| held.index == 1));
                turn.wait();
                std::thread::sleep(core::time::Duration::from_millis(8));
                drop(held);
            });
            turn.wait();
            let more = fill(&heap, 1000);
            found += usize::from(more.len() == 2);
            blocks.extend(more);
            while blocks.len() < 4 {
                blocks.extend(filled(&heap, 1000));
            }
        }
    });
    assert!(found >= ROUNDS * 3 / 4, "{found} of {ROUNDS} times");
    blocks.into_iter().for_each(|block| block.free().unwrap());
    heap.drain();
    heap.verify_all().unwrap();
}

/// A vector that outgrows the short blocks again and again takes no lock of the pages: it gets the run of the last one.
#[test]
fn what_outgrows_short_blocks_gets_the_cached_run() {
    let heap = Heap::<Host<false>, _, 2>::new(Host::default(), Pinned(OneCpu));
    let grow = |start: NonNull<u8>| {
        // SAFETY: allocated below with this Layout; nobody else uses it.
        unsafe { heap.realloc(start, layout(4096), 8192) }.unwrap().cast::<u8>()
    };
    let first = || heap.alloc(layout(4096)).unwrap().cast();
    // SAFETY: allocated by `grow` with this Layout.
    let free = |start| unsafe { heap.free(start, layout(8192)) };
    free(grow(first()));
    let (start, mut grown, calls) = (first(), None, calls_of(heap.provider()));
    heap.engine.pages.for_each_run(&mut |_| grown = grown.or_else(|| Some(grow(start))));
    assert!(grown.is_some() && calls_of(heap.provider()) == calls, "with the pages' lock held");
    grown.into_iter().for_each(free);
    all_back(&heap);
}

/// Every caller says that it is on CPU 0 and has its interrupts masked.
struct Masked;

impl CpuHint for Masked {
    fn current_cpu(&self) -> Option<usize> {
        Some(0)
    }
    fn may_wait(&self) -> bool {
        false
    }
}

/// Blocks of a class in caches and slabs, in a heap of one chunk, which has one lock, and no room for another one.
fn in_one_chunk<C: CpuMode>(heap: &Heap<Host<false>, C, 1>) -> SizeClass {
    let first = filled(heap, 900_000).unwrap();
    heap.provider().set_limit(heap.provider().held_len());
    first.free().unwrap();
    let blocks: Vec<_> = (0..1000).map(|_| filled(heap, 100).unwrap()).collect();
    blocks.into_iter().for_each(|block| block.free().unwrap());
    let class = SizeClass::of(layout(100)).unwrap();
    let (cached_count, slab_len) = kept(heap, class);
    assert!(cached_count > 0 && slab_len > 4096, "{cached_count} blocks, {slab_len} bytes");
    class
}

/// The blocks of a class in caches, and the bytes of its slabs.
fn kept<C: CpuMode>(heap: &Heap<Host<false>, C, 1>, class: SizeClass) -> (u32, usize) {
    (heap.engine.caches().map(|cache| cache.count(class)).sum(), heap.engine.slab_len(class).get())
}

/// Handlers whose requests are refused because a preempted task has the pages' lock leave what others live on: given
/// back, it would wait for that lock too.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "what is freed waits, and is in no cache")]
fn who_may_not_wait_drains_nothing_for_locked_pages() {
    let heap = Heap::<Host<false>, _, 1>::new(Host::default(), Hint(Masked));
    let class = in_one_chunk(&heap);
    let kept = || kept(&heap, class);
    let before = kept();
    let mut asked = false;
    heap.engine.pages.for_each_run(&mut |_| {
        if !core::mem::replace(&mut asked, true) {
            assert!(filled(&heap, 60_000).is_none(), "no pages");
        }
    });
    assert!(asked && kept() == before, "{before:?} and then {:?}", kept());
    assert!(filled(&heap, 2_000_000).is_none(), "there is no room for it");
    assert!(kept() < before, "asked for with the lock open, all is looked at");
    all_back(&heap);
}

/// A task, whose questions are counted; one of them has the pages' lock opened.
struct Patient;

static QUESTIONS: AtomicUsize = AtomicUsize::new(0);
static IS_LOCKED: AtomicBool = AtomicBool::new(false);
/// The question at which the lock is opened: behind the looks of who does not wait.
const OPENS: usize = 200;

impl CpuHint for Patient {
    fn current_cpu(&self) -> Option<usize> {
        if QUESTIONS.fetch_add(1, Ordering::Relaxed) + 1 == OPENS {
            wait_until(|| !IS_LOCKED.load(Ordering::Acquire));
        }
        Some(0)
    }
    fn may_wait(&self) -> bool {
        true
    }
}

fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

/// A task whose request is refused because somebody has the pages' lock waits for it, before anything is drained.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "what is freed waits, and is in no cache")]
fn who_may_wait_waits_for_locked_pages_before_it_drains() {
    let heap = Heap::<Host<false>, _, 1>::new(Host::default(), Hint(Patient));
    let class = in_one_chunk(&heap);
    let before = kept(&heap, class);
    std::thread::scope(|scope| {
        let heap = &heap;
        scope.spawn(move || {
            let mut was_locked = false;
            heap.engine.pages.for_each_run(&mut |_| {
                if !core::mem::replace(&mut was_locked, true) {
                    QUESTIONS.store(0, Ordering::Relaxed);
                    IS_LOCKED.store(true, Ordering::Release);
                    wait_until(|| QUESTIONS.load(Ordering::Relaxed) >= OPENS);
                }
            });
            IS_LOCKED.store(false, Ordering::Release);
        });
        wait_until(|| IS_LOCKED.load(Ordering::Acquire));
        let block = filled(heap, 60_000);
        // Who has the lock ends in any case.
        let questions = QUESTIONS.fetch_max(OPENS, Ordering::Relaxed);
        assert!(questions >= OPENS && kept(heap, class) == before, "{questions}: {before:?}, {:?}", kept(heap, class));
        block.unwrap().free().unwrap();
    });
    all_back(&heap);
}

/// What others have in hand is waited for with interrupts masked too, where ids were seen to lie and after a wait that
/// was in vain; not by who meets its own CPU inside a search.
#[test]
fn one_lie_does_not_end_all_waiting() {
    const WAITS: usize = 60;
    let asks = |lies: bool, waits_in_vain: usize| {
        let heap = Heap::<_, _, 2>::new(Faulty::new(HostPages::<true>::default()), Hint(Masked));
        heap.provider().on(Call::Map).fail(0, WAITS);
        let (early, other) = (heap.searches.begin(0), heap.searches.begin(0));
        if lies {
            early.watch();
        }
        (0..waits_in_vain).for_each(|_| heap.searches.waited(true));
        // Somebody joins blocks, and is in sight.
        let walk = heap.engine.in_hand.begin();
        let block = filled(&heap, 200);
        drop((other, early, walk));
        let refusals = heap.provider().on(Call::Map).failed();
        let found = block.map(|block| block.free().unwrap()).is_some();
        heap.drain_current();
        heap.trim(0);
        (found, refusals)
    };
    assert_eq!(asks(true, 0), (true, WAITS));
    assert_eq!(asks(true, 1), (true, WAITS));
    let (found, asked) = asks(true, 4);
    assert!(!found && asked > 0, "little patience is left");
    assert!(!asks(false, 0).0, "what the caller's CPU interrupted does not go on before it");
}

static PROBED: Heap<Host<false>, Pinned<OneCpu>, 1> =
    Heap::new(Faulty::with_hook(HostPages::aligned(1), probe), Pinned(OneCpu));
static DEPTH: AtomicUsize = AtomicUsize::new(0);
static DEEPEST: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicBool = AtomicBool::new(false);

/// Looks whether the provider's caller holds anything of [`PROBED`], and comes back into that.
fn probe(call: Call, moment: Moment) {
    if call == Call::Relieve {
        return;
    }
    if moment == Moment::After {
        DEPTH.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    let depth = DEPTH.fetch_add(1, Ordering::Relaxed) + 1;
    DEEPEST.fetch_max(depth, Ordering::Relaxed);
    let locked = SizeClass::all().any(|class| PROBED.engine.bins(class).any(|(_, bin)| bin.looks_busy()));
    let held = locked || PROBED.engine.pages.is_busy() || PROBED.enter().is_err();
    HELD.fetch_or(held, Ordering::Relaxed);
    if depth == 1 {
        for size in [24, 5000, 40_000, 20 << 20] {
            if let Some(block) = filled(&PROBED, size) {
                block.free().unwrap();
            }
        }
    }
}

#[test]
fn the_provider_is_called_with_nothing_held_and_once() {
    let heap = &PROBED;
    let blocks: Vec<_> = [8, 200, 4000, 30_000, 100_000, 3 << 20, 9 << 20, 20 << 20]
        .iter()
        .flat_map(|size| (0..20).map(|_| filled(heap, *size).unwrap()).collect::<Vec<_>>())
        .collect();
    let many: Vec<_> = (0..30_000).map(|_| filled(heap, 1000).unwrap()).collect();
    blocks.into_iter().chain(many).for_each(|block| block.free().unwrap());
    heap.trim(0);
    heap.verify_all().unwrap();
    assert!(calls_of(heap.provider()) > 10);
    assert!(!HELD.load(Ordering::Relaxed), "something was held while the provider was called");
    assert_eq!(DEEPEST.load(Ordering::Relaxed), 1, "the provider was entered again from within");
    assert_eq!(heap.provider().held_len(), 0);
}

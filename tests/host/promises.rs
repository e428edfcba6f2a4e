//! The promises that need no second CPU to be shown, one test or more for each, over a provider that keeps books.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::{AtRest, Books, Memory, ThreadCpu, limited, play_cpu};
use smp_heap::battery::{Call, Faulty, Filled, Moment, Random, churn, exhaust, free_all, layouts};
use smp_heap::cpu::{CpuMode, UnknownCpu};
use smp_heap::{CpuHint, Heap, Hint, PageProvider, Pinned, RegionError, RegionProvider, RunKind, SizeClass};

type Small = Heap<RegionProvider<4>, Hint<ThreadCpu>, 4>;

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

fn heap() -> Heap<Books, Hint<UnknownCpu>, 2> {
    Heap::new(Books::default(), Hint(UnknownCpu))
}

fn filled<P: PageProvider, C: CpuMode, const N: usize>(heap: &Heap<P, C, N>, size: usize) -> Filled<'_, Heap<P, C, N>> {
    Filled::new(heap, layout(size, 8), 0x3c).unwrap().expect("memory")
}

#[test]
fn no_memory_is_null_and_no_panic_before_any_region() {
    static HEAP: Small = Heap::new(RegionProvider::new(), Hint(ThreadCpu));
    for size in [1, 64, 4096, 1 << 20, isize::MAX as usize - 7] {
        assert!(HEAP.alloc(layout(size, 8)).is_err());
        // SAFETY: the size is not 0.
        assert!(unsafe { GlobalAlloc::alloc(&HEAP, layout(size, 8)) }.is_null());
    }
    HEAP.verify_all().unwrap();
    assert_eq!(HEAP.stats().held_len, 0);
}

#[test]
fn a_first_region_of_4_kib_serves_and_more_may_follow() {
    let (first, second) = (Memory::new(4096, 1), Memory::new(1 << 20, 1));
    let heap = Small::new(RegionProvider::new(), Hint(ThreadCpu));
    // SAFETY: the memory outlives the heap's use and is nobody else's.
    unsafe { heap.provider().add_region(first.start(), first.len()) }.unwrap();
    let early: Vec<_> = [8, 24, 100, 700].map(|size| filled(&heap, size)).into();
    assert!(Filled::new(&heap, layout(8192, 8), 1).unwrap().is_none(), "8 KiB do not fit");
    // SAFETY: as above.
    unsafe { heap.provider().add_region(second.start(), second.len()) }.unwrap();
    let late = filled(&heap, 300_000);
    early.into_iter().chain([late]).for_each(|block| block.free().unwrap());
    heap.trim_all();
    heap.verify_all().unwrap();
    assert_eq!((heap.stats().held_len, heap.provider().held_len()), (0, 0));
}

#[test]
fn bad_regions_are_errors_and_lose_nothing() {
    let memory = Memory::new(64 << 10, 1024);
    let heap = Small::new(RegionProvider::new(), Hint(ThreadCpu));
    let give = |start: *mut u8, len| {
        // SAFETY: what is refused is not touched, and what is taken is the memory above.
        unsafe { heap.provider().add_region(start, len) }
    };
    assert_eq!(give(std::ptr::null_mut(), 1024), Err(RegionError::TooSmall), "the first page is left out");
    assert_eq!(give(memory.start(), 100), Err(RegionError::TooSmall));
    assert_eq!(give(memory.start(), usize::MAX), Err(RegionError::Wraps));
    assert_eq!(give(memory.start(), 64 << 10), Ok(()));
    assert_eq!(give(memory.start(), 64 << 10), Err(RegionError::Overlaps));
    filled(&heap, 50_000).free().unwrap();
}

#[test]
#[cfg_attr(
    feature = "debug-heap",
    ignore = "with a frame around each block and a quarantine, that much is not always room enough"
)]
fn a_heap_of_100_kib_serves_twenty_classes_on_four_cpus() {
    fn serve<C: CpuMode>(heap: &Heap<RegionProvider<4>, C, 4>) {
        let memory = Memory::new(100 << 10, 16);
        // SAFETY: the memory outlives the heap's use and is nobody else's.
        unsafe { heap.provider().add_region(memory.start(), memory.len()) }.unwrap();
        let classes: Vec<_> = SizeClass::all().take(20).collect();
        for _ in 0..50 {
            let mut blocks = Vec::new();
            for cpu in 0..4 {
                play_cpu(cpu);
                blocks.extend(classes.iter().flat_map(|class| (0..3).map(|_| filled(heap, class.block_len()))));
            }
            blocks.into_iter().enumerate().for_each(|(index, block)| {
                play_cpu(index % 4);
                block.free().unwrap();
            });
        }
        heap.verify_all().unwrap();
        println!("{}", heap.stats());
        for cpu in 0..4 {
            play_cpu(cpu);
            heap.drain_current();
        }
        heap.trim(0);
        assert_eq!(heap.stats().held_len, 0);
    }
    serve(&Heap::new(RegionProvider::new(), Hint(ThreadCpu)));
    serve(&Heap::new(RegionProvider::new(), Pinned(ThreadCpu)));
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "frames are more than the share of short blocks that may be lost")]
fn what_one_size_used_another_size_can_have() {
    for len in [100 << 10, 1 << 20, 16 << 20] {
        let heap = Heap::<_, _, 2>::new(limited(len), Hint(UnknownCpu));
        for size in [16, 64, 700, 4096, 20_000, 40_000, 64, 16] {
            let count = exhaust(&heap, layout(size, 8), usize::MAX).unwrap();
            let used = count * size;
            assert!(used * 100 >= 70 * len || size * 8 > len, "{used} of {len} in blocks of {size}");
            heap.verify_all().unwrap();
        }
        heap.trim(0);
        assert_eq!(heap.provider().held_len(), 0);
    }
}

#[test]
fn every_layout_is_served_or_refused() {
    let heap = heap();
    layouts(&heap, 2 << 20, 4 << 20, false).unwrap();
    layouts(&heap, 64 << 20, 4096, false).unwrap();
    let longest = isize::MAX as usize;
    // Where addresses are short, half of that may well be there.
    for size in [longest, longest - 4095, if usize::BITS < 64 { longest - 1 } else { longest / 2 }] {
        assert!(heap.alloc(layout(size, 1)).is_err());
        assert!(heap.alloc_zeroed(layout(size, 1)).is_err());
    }
    assert!(heap.alloc(layout(1, 1 << (usize::BITS - 2))).is_err());
    heap.verify_all().unwrap();
    heap.trim(0);
    assert_eq!(heap.provider().held_len(), 0);
}

#[test]
fn size_zero_takes_no_memory() {
    let heap = heap();
    let nothing = heap.alloc(layout(0, 4096)).unwrap();
    assert_eq!((nothing.len(), nothing.cast::<u8>().addr().get() % 4096), (0, 0));
    // SAFETY: allocated above with this Layout; it may grow, shrink to nothing again, and be freed.
    let grown = unsafe { heap.realloc(nothing.cast(), layout(0, 4096), 100) }.unwrap();
    assert_eq!(grown.cast::<u8>().addr().get() % 4096, 0);
    // SAFETY: as above.
    let shrunk = unsafe { heap.realloc(grown.cast(), layout(100, 4096), 0) }.unwrap();
    assert_eq!(shrunk.len(), 0);
    // SAFETY: as above.
    unsafe { heap.free(shrunk.cast(), layout(0, 4096)) };
    heap.trim(0);
    assert_eq!(heap.provider().held_len(), 0);
}

#[test]
fn page_sized_blocks_waste_nothing() {
    let heap = heap();
    let blocks: Vec<_> = (0..1000).map(|_| Filled::new(&heap, layout(4096, 4096), 9).unwrap().unwrap()).collect();
    let held = heap.stats().classes.iter().find(|class| class.block_len == 4096).unwrap().held_len;
    assert!(held <= 1010 * 4096, "{held} bytes for 1000 pages");
    blocks.into_iter().for_each(|block| block.free().unwrap());
}

#[test]
fn blocks_grow_and_shrink_with_their_content() {
    let heap = heap();
    let mut block = filled(&heap, 1);
    let (mut size, mut moves) = (1, 0);
    while size < 8 << 20 {
        size += size / 3 + 1;
        moves += u32::from(!block.resize(size).unwrap());
        assert!(block.realloc(size).unwrap());
    }
    assert!(moves < 40, "{moves} times not in place");
    while size > 1 {
        size /= 2;
        assert!(block.realloc(size).unwrap());
    }
    block.free().unwrap();
    heap.verify_all().unwrap();
    heap.trim(0);
    assert_eq!(heap.provider().held_len(), 0);
}

#[cfg(target_os = "linux")]
#[test]
fn huge_blocks_move_without_a_copy_and_come_zeroed() {
    let heap = Heap::<_, _, 2>::new(crate::common::Mmap::default(), Hint(UnknownCpu));
    let mut block = Filled::zeroed(&heap, layout(2 << 20, 8), 5).unwrap().unwrap();
    let in_the_way: Vec<_> = (0..8).map(|_| filled(&heap, 2 << 20)).collect();
    for size in [4 << 20, 16 << 20, 64 << 20, 3 << 20, 5000, 6 << 20] {
        assert!(block.realloc(size).unwrap());
    }
    in_the_way.into_iter().chain([block]).for_each(|block| block.free().unwrap());
    assert!(heap.provider().moves.load(Ordering::Relaxed) > 0);
    heap.verify_all().unwrap();
    heap.trim(0);
    assert_eq!(heap.provider().held_len.load(Ordering::Relaxed), 0);
    heap.verify_all().unwrap();
}

/// A mixed run that must not break whatever the provider does; gives the calls of `map` it made.
fn mixed_run(heap: &Heap<Books, Hint<UnknownCpu>, 2>) -> usize {
    let mut random = Random::new(11);
    let mut slots: Vec<Option<Filled<_>>> = (0..60).map(|_| None).collect();
    for _ in 0..6 {
        churn(heap, &mut random, &mut slots, 400, 1 << 20).unwrap();
        heap.verify_all().unwrap();
        free_all(&mut slots).unwrap();
        heap.trim(0);
        heap.verify_all().unwrap();
        assert_eq!(heap.provider().held_len(), 0, "something leaked");
    }
    heap.provider().on(Call::Map).made()
}

#[test]
fn a_provider_that_fails_its_kth_call_leaves_the_heap_whole() {
    let calls = mixed_run(&heap());
    assert!(calls > 5, "only {calls} calls to fail");
    for call in 0..calls {
        let heap = heap();
        heap.provider().on(Call::Map).fail(call, 1);
        mixed_run(&heap);
    }
}

#[test]
fn a_provider_that_fails_at_random_leaves_the_heap_whole() {
    for share in [3, 25, 64, 128, 256] {
        let heap = heap();
        heap.provider().on(Call::Map).fail_share(share);
        mixed_run(&heap);
    }
}

#[test]
fn a_provider_that_takes_nothing_back_is_asked_for_little() {
    let heap = heap();
    heap.provider().on(Call::Unmap).fail(0, usize::MAX);
    for _ in 0..20 {
        let mut random = Random::new(3);
        let mut slots: Vec<Option<Filled<_>>> = (0..60).map(|_| None).collect();
        churn(&heap, &mut random, &mut slots, 1000, 1 << 18).unwrap();
        free_all(&mut slots).unwrap();
        assert_eq!(heap.trim(0), 0);
        heap.verify_all().unwrap();
    }
    let (held, once) = (heap.provider().held_len(), 60 << 18);
    assert!(held <= once, "{held} bytes held, though {once} are the most that was ever live");
    heap.provider().on(Call::Unmap).fail(0, 0);
    heap.trim(0);
    assert_eq!(heap.provider().held_len(), 0);
}

#[test]
fn out_of_memory_only_after_the_pressure_hook_said_no() {
    /// Adds a region at the first call for relief.
    fn add_region(call: Call, moment: Moment) {
        let provider = HEAP.provider();
        if (call, moment) == (Call::Relieve, Moment::Before) && provider.on(Call::Relieve).made() == 0 {
            let memory = Box::leak(Box::new(Memory::new(1 << 20, 4096)));
            // SAFETY: the memory is the region's from now on.
            unsafe { provider.inner().add_region(memory.start(), memory.len()) }.unwrap();
            provider.set_relief(0, 1);
        }
    }
    static HEAP: Heap<Faulty<RegionProvider<2>>, Hint<UnknownCpu>, 2> =
        Heap::new(Faulty::with_hook(RegionProvider::new(), add_region), Hint(UnknownCpu));
    let block = filled(&HEAP, 500_000);
    assert_eq!(HEAP.provider().on(Call::Relieve).made(), 1);
    assert!(HEAP.alloc(layout(600_000, 8)).is_err());
    assert_eq!(HEAP.provider().on(Call::Relieve).made(), 2);
    block.free().unwrap();
    filled(&HEAP, 600_000).free().unwrap();
}

#[test]
fn several_heaps_keep_to_themselves() {
    let heaps = [heap(), heap(), heap()];
    let mut random = Random::new(5);
    let mut slots: Vec<Vec<Option<Filled<_>>>> = (0..3).map(|_| (0..50).map(|_| None).collect()).collect();
    for round in 0..300 {
        let turn = round % 3;
        churn(&heaps[turn], &mut random, &mut slots[turn], 20, 1 << 14).unwrap();
    }
    for (heap, slots) in heaps.iter().zip(&mut slots) {
        free_all(slots).unwrap();
        heap.trim(0);
        heap.verify_all().unwrap();
        assert_eq!(heap.provider().held_len(), 0);
    }
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "counts blocks without frames")]
fn stats_are_exact_at_rest_and_print_as_a_table() {
    let heap = heap();
    let blocks: Vec<_> = [(24, 100), (64, 50), (1000, 7)]
        .iter()
        .flat_map(|(size, count)| (0..*count).map(|_| filled(&heap, *size)).collect::<Vec<_>>())
        .collect();
    let stats = heap.stats();
    let live = |block_len| stats.classes.iter().find(|class| class.block_len == block_len).unwrap().live_count;
    assert_eq!((live(24), live(64), live(1024)), (100, 50, 7));
    assert_eq!(stats.held_len, heap.provider().held_len());
    let text = stats.to_string();
    println!("{text}");
    #[cfg(not(any(feature = "hardened", feature = "guard-pages")))]
    assert!(include_str!("../../docs/looking.md").contains(text.trim_end()), "the document shows another table");
    let widths: Vec<_> = text.lines().take(4).map(str::len).collect();
    assert!(widths.iter().all(|width| *width == widths[0]), "the table is aligned");
    let mut mapped = 0;
    let mut out = 0;
    heap.for_each_run(|run| {
        mapped += run.len;
        if let RunKind::Slab { out_count, .. } = run.kind {
            out += out_count as u64;
        }
    });
    let cached: u64 = stats.classes.iter().map(|class| class.cached_count).sum();
    assert_eq!(out, 157 + cached);
    assert!(mapped <= stats.held_len && mapped * 100 >= stats.held_len * 95);
    blocks.into_iter().for_each(|block| block.free().unwrap());
    assert!(heap.stats().classes.iter().all(|class| class.live_count == 0));
}

#[test]
fn a_foreign_pointer_is_counted_and_ignored() {
    let heap = heap();
    filled(&heap, 64).free().unwrap();
    let foreign = Memory::new(1 << 16, 4096);
    // SAFETY: not what the contract asks for; the heap promises no more than to look the address up and to leave it
    // alone.
    unsafe { heap.free(NonNull::new(foreign.start()).unwrap(), layout(1 << 16, 8)) };
    assert_eq!(heap.stats().stray_count, 1);
    heap.verify_all().unwrap();
}

#[test]
fn trim_keeps_what_it_is_asked_to_keep() {
    let heap = heap();
    let blocks: Vec<_> = (0..64).map(|_| filled(&heap, 1 << 18)).collect();
    blocks.into_iter().for_each(|block| block.free().unwrap());
    heap.trim(1 << 20);
    assert!(heap.stats().free_len >= 1 << 20, "{}", heap.stats());
    heap.trim(0);
    assert_eq!(heap.stats().held_len, 0);
}

#[test]
fn a_pinned_cache_is_emptied_by_its_own_cpu_when_asked() {
    let heap = Heap::<_, _, 2>::new(Books::default(), Pinned(ThreadCpu));
    play_cpu(1);
    (0..100).map(|_| filled(&heap, 64)).collect::<Vec<_>>().into_iter().for_each(|block| block.free().unwrap());
    assert!(heap.stats().cpus[1].cached_count > 0);
    play_cpu(0);
    heap.trim(0);
    assert!(heap.stats().cpus[1].cached_count > 0, "nobody else may take it");
    play_cpu(1);
    // Its next slow path honours the request.
    filled(&heap, 3000).free().unwrap();
    let count = |class: usize| heap.stats().classes.iter().find(|stats| stats.block_len == class).unwrap().cached_count;
    assert_eq!(count(64), 0);
    heap.drain_current();
    play_cpu(0);
    heap.trim_all();
    assert_eq!(heap.provider().held_len(), 0);
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "a free gives another block back, or none")]
fn the_cpu_is_asked_once_for_each_operation() {
    let asked = AtomicUsize::new(0);
    let count = || {
        asked.fetch_add(1, Ordering::Relaxed);
        Some(0)
    };
    fn hint<F: Fn() -> Option<usize>>(f: F) -> F {
        f
    }
    let _: Option<usize> = CpuHint::current_cpu(&count);
    let heap = Heap::<_, _, 2>::new(Books::default(), Hint(hint(count)));
    let warm: Vec<_> = (0..4).map(|_| filled(&heap, 64)).collect();
    warm.into_iter().for_each(|block| block.free().unwrap());
    let before = asked.load(Ordering::Relaxed);
    filled(&heap, 64).free().unwrap();
    assert_eq!(asked.load(Ordering::Relaxed) - before, 2);
}

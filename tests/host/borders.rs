//! Sizes at the borders: of a page, of each class, of what slabs serve, of what is a run of its own; and the ends of
//! what is counted.
//!
//! Promises shown: a block that takes another size where it stands is freed as what it is then; after everything is
//! freed, the provider has every page (3).

use std::alloc::Layout;

#[cfg(target_os = "linux")]
use crate::common::Mmap;
use crate::common::{AtRest, Books, ThreadCpu, play_cpu};
use crate::stress::{all_back, seed};
use smp_heap::battery::{Filled, Random};
use smp_heap::cpu::CpuMode;
use smp_heap::{Heap, Hint, PageProvider, Pinned, SizeClass};

/// One byte around each border.
fn border_sizes() -> Vec<usize> {
    let classes = SizeClass::all().map(SizeClass::block_len);
    let borders = classes.chain([4096, 8192, 64 << 10, 1 << 20, 2 << 20]);
    let mut sizes: Vec<_> = borders.flat_map(|border| [border - 1, border, border + 1]).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// Every other size is one around a page, where blocks of slabs end and runs begin.
fn border_size(random: &mut Random, sizes: &[usize]) -> usize {
    if random.below(2) == 0 { 4095 + random.below(3) } else { sizes[random.below(sizes.len())] }
}

fn resize_around_every_border<P: PageProvider + Sync, C: CpuMode + Sync>(heap: &Heap<P, C, 8>, seed: u64) {
    play_cpu(0);
    let (mut random, sizes) = (Random::new(seed), border_sizes());
    let layout = |size| Layout::from_size_align(size, 8).unwrap();
    for round in 0..40 {
        let mut blocks: Vec<_> = (0..12_u8)
            .map(|seed| Filled::new(heap, layout(border_size(&mut random, &sizes)), seed).unwrap().unwrap())
            .collect();
        for _ in 0..150 {
            let at = random.below(blocks.len());
            let size = border_size(&mut random, &sizes);
            match random.below(4) {
                0 => assert!(blocks[at].realloc(size).unwrap(), "no memory for {size} bytes"),
                1 => {
                    let new = Filled::new(heap, layout(size), at as u8).unwrap().unwrap();
                    std::mem::replace(&mut blocks[at], new).free().unwrap();
                }
                // In place: shrinking succeeds for runs, growing where there is room.
                _ => _ = blocks[at].resize(size).unwrap(),
            }
        }
        blocks.into_iter().for_each(|block| block.free().unwrap());
        if round % 8 == 0 {
            heap.verify_all().unwrap();
        }
    }
    all_back(heap, 1);
}

#[test]
fn runs_and_blocks_are_resized_around_every_border() {
    let seed = seed();
    resize_around_every_border(&Heap::new(Books::default(), Hint(ThreadCpu)), seed);
    resize_around_every_border(&Heap::new(Books::default(), Pinned(ThreadCpu)), seed + 1);
    #[cfg(target_os = "linux")]
    resize_around_every_border(&Heap::new(Mmap::default(), Pinned(ThreadCpu)), seed + 2);
}

/// Each length that a run can take in place, from each that it can have: the only block of the heap, so that its chunk
/// is remembered.
#[test]
fn a_run_takes_every_border_length_and_goes_back() {
    play_cpu(0);
    let heap: Heap<_, _, 4> = Heap::new(Books::default(), Pinned(ThreadCpu));
    let sizes: Vec<_> = border_sizes().into_iter().filter(|size| (2000..200_000).contains(size)).collect();
    for from in sizes.iter().filter(|size| **size > 4096) {
        for to in &sizes {
            let short = Filled::new(&heap, Layout::from_size_align(100, 8).unwrap(), 1).unwrap().unwrap();
            let mut block = short;
            assert!(block.realloc(*from).unwrap());
            let used_len = heap.stats().large_len();
            let resized = block.resize(*to).unwrap();
            assert!(!resized || heap.stats().large_len() <= used_len.max(to.next_multiple_of(4096) + (64 << 10)));
            block.free().unwrap();
            heap.verify_all().unwrap();
            assert_eq!(heap.stats().large_len(), 0, "{from} to {to} bytes, resized: {resized}");
        }
    }
    all_back(&heap, 1);
}

/// Caches that are counted out twice would leave the others without any room.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "a debug header makes every length another class's")]
fn a_cpu_retired_twice_counts_once() {
    let heap: Heap<_, _, 4> = Heap::new(Books::default(), Pinned(ThreadCpu));
    let pair = |size: usize| {
        let blocks: Vec<_> = (0..1000)
            .map(|seed| Filled::new(&heap, Layout::from_size_align(size, 8).unwrap(), seed as u8).unwrap().unwrap())
            .collect();
        blocks.into_iter().for_each(|block| block.free().unwrap());
    };
    for cpu in [0, 1] {
        play_cpu(cpu);
        pair(64);
    }
    play_cpu(0);
    for _ in 0..4 {
        // SAFETY: this thread plays both CPUs, and is not inside the heap.
        assert!(unsafe { heap.retire_cpu(1) });
    }
    let class = SizeClass::of(Layout::from_size_align(256, 8).unwrap()).unwrap();
    pair(256);
    let on = heap.class_stats_on(0, class).unwrap();
    assert!(on.limit_count > 0, "no room for a class that became busy: {on:?}");
    heap.verify_all().unwrap();
    play_cpu(1);
    pair(64);
    assert!(heap.stats().cpus[1].is_used, "it came back");
    all_back(&heap, 2);
}

/// Two heaps, one of chunks with granules of 1 KiB, one with 4 KiB: what is written to a block of whole pages does not
/// reach another block, and one that asks for no alignment has that of its granule.
#[test]
#[cfg(not(feature = "debug-heap"))]
fn long_blocks_have_the_alignment_that_was_asked_for() {
    use smp_heap::{RegionProvider, cpu::UnknownCpu};

    for (len, granule) in [(240 << 10, 1 << 10), (1 << 20, 2 << 10), (4 << 20, 4 << 10)] {
        let heap: Heap<RegionProvider<4>, Hint<UnknownCpu>, 4> = Heap::new(RegionProvider::new(), Hint(UnknownCpu));
        let memory = vec![0_u8; len + 4096].leak();
        let start = memory.as_mut_ptr().wrapping_byte_add(memory.as_ptr().align_offset(4096));
        // SAFETY: leaked, so nobody else's.
        unsafe { heap.provider().add_region(start, len) }.unwrap();
        let place = |size, align| {
            let block = heap.alloc(Layout::from_size_align(size, align).unwrap()).unwrap();
            (block.cast::<u8>().addr().get(), block.len())
        };
        let loose: Vec<_> = (0..3).map(|_| place(33 << 10, 1)).collect();
        for (start, len) in &loose {
            assert_eq!((start % granule, *len), (0, (33_usize << 10).next_multiple_of(granule)));
        }
        // Somewhere a block that did not ask for pages has none of its own.
        let shares_a_page = loose.iter().any(|(start, len)| start % 4096 != 0 || len % 4096 != 0);
        assert_eq!(shares_a_page, granule < 4096, "{loose:x?}");
        let pages = [place(8 << 12, 4096), place(9 << 12, 4096)];
        for (start, len) in pages {
            assert_eq!((start % 4096, len % 4096), (0, 0));
            assert!(loose.iter().all(|(other, other_len)| start >= other + other_len || *other >= start + len));
        }
    }
}

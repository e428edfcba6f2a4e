//! The lists of holes of the region provider: how long a heap lets them become, whom a full region keeps waiting.
//!
//! Under a region's lock its list is walked, so the number of holes is how long others wait for that region.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::Memory;
use smp_heap::battery::{Filled, Random};
use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint, PageProvider, PageRun, RegionProvider};

/// Regions that know what is mapped, and so how many holes each has.
struct Watched<const REGIONS: usize> {
    regions: RegionProvider<REGIONS>,
    memory: Vec<Memory>,
    /// By start: the end.
    mapped: Mutex<BTreeMap<usize, usize>>,
    most_holes: AtomicUsize,
    calls: AtomicUsize,
}

impl<const REGIONS: usize> Watched<REGIONS> {
    fn new(len: usize) -> Self {
        let memory: Vec<_> = (0..REGIONS).map(|_| Memory::new(len, 4096)).collect();
        let regions = RegionProvider::new();
        for memory in &memory {
            // SAFETY: the memory is nobody else's and lives as long as the provider.
            unsafe { regions.add_region(memory.start(), memory.len()) }.unwrap();
        }
        let mapped = Mutex::new(BTreeMap::new());
        Self { regions, memory, mapped, most_holes: AtomicUsize::new(0), calls: AtomicUsize::new(0) }
    }

    fn note(&self, change: impl FnOnce(&mut BTreeMap<usize, usize>)) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut mapped = self.mapped.lock().unwrap();
        change(&mut mapped);
        for memory in &self.memory {
            let (start, end) = (memory.start().addr(), memory.start().addr() + memory.len());
            let (mut at, mut holes) = (start, 0);
            for (run_start, run_end) in mapped.range(start..end) {
                holes += usize::from(*run_start > at);
                at = *run_end;
            }
            holes += usize::from(end > at);
            self.most_holes.fetch_max(holes, Ordering::Relaxed);
        }
    }
}

// SAFETY: the region provider's.
unsafe impl<const REGIONS: usize> PageProvider for Watched<REGIONS> {
    const PAGE_LEN: usize = RegionProvider::<1>::PAGE_LEN;
    const REENTRANT: bool = true;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let start = self.regions.map(run)?;
        self.note(|mapped| _ = mapped.insert(start.addr().get(), start.addr().get() + run.len()));
        Some(start)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        self.note(|mapped| _ = mapped.remove(&start.addr().get()));
        // SAFETY: the contract is the same.
        unsafe { self.regions.unmap(start, run) }
    }

    fn prefer(&self, run: PageRun) -> PageRun {
        self.regions.prefer(run)
    }
}

/// Fills the regions, frees most of it at random, and goes on so; gives the most holes that a region had, and the
/// provider's calls.
fn churn<const REGIONS: usize>(len: usize) -> (usize, usize) {
    let heap = Heap::<_, _, 2>::new(Watched::<REGIONS>::new(len), Hint(UnknownCpu));
    let mut random = Random::new(3);
    let mut blocks: Vec<Filled<_>> = Vec::new();
    for round in 0..12 {
        let longest = [len / 4, 300 << 10, 100 << 10, 3000][round % 4];
        loop {
            let size = 1 + random.below(longest);
            match Filled::new(&heap, Layout::from_size_align(size, 8).unwrap(), 1).unwrap() {
                Some(block) => blocks.push(block),
                None => break,
            }
        }
        while blocks.len() > 4 && random.below(100) > 0 {
            for _ in 0..1 + blocks.len() / 20 {
                blocks.swap_remove(random.below(blocks.len())).free().unwrap();
            }
        }
        if round % 3 == 0 {
            heap.trim(0);
        }
    }
    blocks.into_iter().for_each(|block| block.free().unwrap());
    heap.trim(0);
    let watched = heap.provider();
    assert_eq!(watched.regions.held_len(), 0);
    (watched.most_holes.load(Ordering::Relaxed), watched.calls.load(Ordering::Relaxed))
}

#[test]
fn a_heap_leaves_few_holes_in_its_regions() {
    for (what, (holes, calls)) in [
        ("one region of 64 MiB", churn::<1>(64 << 20)),
        ("4 regions of 16 MiB", churn::<4>(16 << 20)),
        ("64 regions of 1 MiB", churn::<64>(1 << 20)),
        ("64 regions of 100 KiB", churn::<64>(100 << 10)),
    ] {
        println!("{what}: at most {holes} holes in a region, {calls} calls");
        assert!(holes <= 2, "{what}: {holes} holes in a region");
    }
}

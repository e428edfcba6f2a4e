//! A region is one piece of memory: one small block costs its own page, regions that touch are one, and the first use
//! costs the same at any length.

use std::alloc::Layout;

use crate::common::{Memory, ThreadCpu};
use smp_heap::cpu::{CpuMode, UnknownCpu};
use smp_heap::{Heap, Hint, Pinned, RegionProvider};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

fn layout(len: usize) -> Layout {
    Layout::from_size_align(len, 8).unwrap()
}

fn add<const REGIONS: usize>(regions: &RegionProvider<REGIONS>, memory: &Memory, from: usize, len: usize) {
    assert!(from + len <= memory.len());
    // SAFETY: part of the memory, which is nobody else's and lives longer than the heap.
    unsafe { regions.add_region(memory.start().wrapping_add(from), len) }.unwrap();
}

/// 64 KiB to 64 MiB in steps of a sixteenth.
fn lens() -> impl Iterator<Item = usize> {
    let steps = (0..10).flat_map(|order| (16..32).map(move |sixteenths| (4 * KIB * sixteenths) << order));
    steps.chain([64 * MIB])
}

fn longest_block<C: CpuMode>(mode: impl Fn() -> C) {
    let memory = Memory::new(64 * MIB, 4096);
    assert_eq!(lens().count(), 161);
    for len in lens() {
        let heap = Heap::<_, C, 4>::new(RegionProvider::<4>::new(), mode());
        add(heap.provider(), &memory, 0, len);
        heap.alloc(layout(8)).unwrap();
        let percent = if len >= MIB { 98 } else { 90 };
        assert!(heap.alloc(layout(len / 100 * percent)).is_ok(), "{percent} % of {} KiB", len / KIB);
    }
}

#[test]
fn one_small_block_leaves_nearly_all_of_a_region_in_one_piece() {
    longest_block(|| Hint(UnknownCpu));
    longest_block(|| Pinned(ThreadCpu));
    let memory = Memory::new(2 * MIB, 4096);
    let heap = Heap::<_, _, 4>::new(RegionProvider::<4>::new(), Hint(UnknownCpu));
    add(heap.provider(), &memory, 0, 2 * MIB);
    heap.alloc(layout(8)).unwrap();
    heap.alloc(layout(1228 * KIB)).unwrap();
}

#[test]
fn regions_that_touch_serve_one_block_of_their_sum() {
    let memory = Memory::new(2 * MIB, 4096);
    let heap = Heap::<_, _, 4>::new(RegionProvider::<4>::new(), Hint(UnknownCpu));
    add(heap.provider(), &memory, 0, MIB);
    add(heap.provider(), &memory, MIB, MIB);
    heap.alloc(layout(3 * MIB / 2)).unwrap();
}

/// Forty entries, of which some are holes of the map: the longest piece is two thirds of it.
#[test]
fn a_long_memory_map_serves_one_block_of_half_its_sum() {
    let memory = Memory::new(40 * 96 * KIB, 4096);
    for order in [1, 7, 11, 39] {
        let heap = Heap::<_, _, 4>::new(RegionProvider::<4>::new(), Hint(UnknownCpu));
        for index in 0..40 {
            add(heap.provider(), &memory, index * order % 40 * 96 * KIB, 96 * KIB);
        }
        assert_eq!(heap.provider().region_count(), 1);
        heap.alloc(layout(20 * 96 * KIB)).unwrap();
    }
}

#[cfg(target_os = "linux")]
mod first_use {
    use super::*;
    use std::ptr::null_mut;

    /// Address space without memory.
    fn reserve(len: usize) -> *mut u8 {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the system's choice touches nothing that exists.
        let start = unsafe { libc::mmap(null_mut(), len, protection, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        start.cast()
    }

    fn faults() -> libc::c_long {
        // SAFETY: plain numbers.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: it is filled in.
        assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) }, 0);
        usage.ru_minflt
    }

    /// Page faults of handing over a region of that length and taking the first block of it.
    fn first_use(len: usize) -> libc::c_long {
        let start = reserve(len);
        let heap = Box::new(Heap::<_, _, 4>::new(RegionProvider::<4>::new(), Hint(UnknownCpu)));
        let before = faults();
        // SAFETY: mapped above, used by this heap only.
        unsafe { heap.provider().add_region(start, len) }.unwrap();
        heap.alloc(layout(8)).unwrap();
        let faults = faults() - before;
        drop(heap);
        // SAFETY: mapped above; the heap is gone.
        unsafe { libc::munmap(start.cast(), len) };
        faults
    }

    #[test]
    #[cfg_attr(feature = "hardened", ignore = "every address may be asked for there, so all descriptors are written")]
    fn the_first_use_of_a_region_costs_the_same_at_any_length() {
        first_use(MIB);
        // As much as such a process may well have in one piece beside the other tests, and more.
        let lens = if usize::BITS < 64 { [16, 64, 256] } else { [64, 1 << 16, 1 << 20] };
        for len in lens.map(|mib| mib * MIB) {
            let faults = first_use(len);
            assert!(faults <= 8, "{faults} faults for {} MiB", len / MIB);
        }
    }
}

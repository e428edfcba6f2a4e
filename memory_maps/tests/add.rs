//! Free ranges that go into a region provider.

use core::alloc::{GlobalAlloc, Layout};

use smp_heap::cpu::UnknownCpu;
use smp_heap::provider::RegionError;
use smp_heap::{Heap, Hint, RegionProvider};
use smp_heap_maps::{Added, Entry, Free, Kind};

const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;

/// So many pages of memory for good; physical address 0 is their first byte.
fn memory(pages: usize) -> usize {
    let memory = vec![0_u8; (pages + 1) * PAGE_LEN].leak();
    memory.as_mut_ptr().expose_provenance().next_multiple_of(PAGE_LEN)
}

/// Pieces of free memory with a page in use behind each.
fn pieces(lengths: &[u64]) -> Vec<Entry> {
    let mut start = 0;
    lengths
        .iter()
        .map(|pages| {
            let entry = Entry::new(start, pages * PAGE, Kind::Free);
            start += (pages + 1) * PAGE;
            entry
        })
        .collect()
}

#[test]
fn all_ranges_are_added_at_their_offset() {
    static HEAP: Heap<RegionProvider<4>, Hint<UnknownCpu>, 1> = Heap::new(RegionProvider::new(), Hint(UnknownCpu));
    let map = pieces(&[3, 40, 7]);
    let offset = memory(60);
    // SAFETY: the pieces lie in memory of our own that nobody else uses, mapped at `offset`.
    let added = unsafe { Free::new(&map[..]).from(0).add_to(HEAP.provider(), offset) };
    assert_eq!(added, Added { regions: 3, bytes: 50 * PAGE, left: 0, error: None });

    let layout = Layout::from_size_align(30 * PAGE_LEN, 8).expect("a layout");
    // SAFETY: the layout has a size.
    let block = unsafe { GlobalAlloc::alloc(&HEAP, layout) };
    let second_piece = offset + 4 * PAGE_LEN;
    assert!(
        (second_piece..second_piece + 40 * PAGE_LEN).contains(&block.addr()),
        "{block:?} is not in {second_piece:#x}"
    );
    // SAFETY: as above, with the same layout.
    unsafe { GlobalAlloc::dealloc(&HEAP, block, layout) };
}

#[test]
fn more_ranges_than_slots_are_all_added() {
    let provider = RegionProvider::<2>::new();
    let map = pieces(&[1, 9, 2, 8, 4]);
    // SAFETY: the pieces lie in memory of our own that nobody else uses, mapped at that offset.
    let added = unsafe { Free::new(&map[..]).from(0).add_to(&provider, memory(30)) };
    assert_eq!(added, Added { regions: 5, bytes: 24 * PAGE, left: 0, error: None });
    assert_eq!(provider.free_len() as u64, 24 * PAGE - 1024, "their slots lie in one of them");
}

#[test]
fn what_cannot_be_placed_is_left_and_not_touched() {
    let provider = RegionProvider::<4>::new();
    // One page at the null pointer, and two that would wrap around the end of the address space.
    let map = [Entry::new(0, PAGE, Kind::Free)];
    // SAFETY: nothing is left of it without the page at the null pointer.
    let added = unsafe { Free::new(&map[..]).from(0).add_to(&provider, 0) };
    assert_eq!(added, Added { regions: 0, bytes: 0, left: PAGE, error: Some(RegionError::TooSmall) });

    let map = [Entry::new(1 << 20, 4 * PAGE, Kind::Free)];
    // SAFETY: the range has no place at that offset, and is refused.
    let added = unsafe { Free::new(&map[..]).add_to(&provider, 0_usize.wrapping_sub((1 << 20) + 2 * PAGE_LEN)) };
    assert_eq!(added, Added { regions: 0, bytes: 0, left: 4 * PAGE, error: Some(RegionError::Wraps) });
    assert_eq!(provider.region_count(), 0);
}

#[test]
fn ranges_added_twice_are_refused() {
    let provider = RegionProvider::<4>::new();
    let map = pieces(&[5]);
    let offset = memory(6);
    // SAFETY: memory of our own that nobody else uses, mapped at that offset.
    let first = unsafe { Free::new(&map[..]).from(0).add_to(&provider, offset) };
    assert_eq!(first.regions, 1);
    // SAFETY: the provider has it already and refuses it.
    let second = unsafe { Free::new(&map[..]).from(0).add_to(&provider, offset) };
    assert_eq!(second, Added { regions: 0, bytes: 0, left: 5 * PAGE, error: Some(RegionError::Overlaps) });
}

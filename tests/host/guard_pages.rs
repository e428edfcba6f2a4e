//! Level 3 of hardening: who is guarded, how many, and that nothing is lost.

use std::alloc::Layout;

use crate::common::{AtRest, Books, ThreadCpu, play_cpu};
use crate::hardening::corpus::Space;
use crate::stress::on_threads;
use smp_heap::battery::{Filled, Random, churn, free_all};
use smp_heap::{Fault, FaultKind, Heap, Misuse, NoGuards, Pinned};

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

#[test]
fn a_provider_without_guard_pages_is_said_to_have_none() {
    let heap: Heap<_, _, 4> = Heap::new(Books::default(), Pinned(ThreadCpu));
    assert_eq!(heap.set_guard_rate(1), Err(NoGuards));
}

/// Runs of the provider's that pairs of `alloc` and `free` of blocks of that size took, of a heap that had enough
/// before.
fn sampled(size: usize, every: u32, pairs: usize) -> u64 {
    play_cpu(0);
    let heap: Heap<_, _, 4> = Heap::new(Space, Pinned(ThreadCpu));
    let pair = || Filled::new(&heap, layout(size), 1).unwrap().unwrap().free().unwrap();
    (0..10_000).for_each(|_| pair());
    heap.set_guard_rate(every).unwrap();
    // Until the countdown of the rate before has come to its end.
    (0..5_000).for_each(|_| pair());
    let before = heap.stats();
    (0..pairs).for_each(|_| pair());
    // Blocks in quarantine count as live.
    heap.drain();
    let after = heap.stats();
    assert_eq!(after.live_len(), 0);
    assert_eq!(after.map_count - before.map_count, after.unmap_count - before.unmap_count);
    after.map_count - before.map_count
}

#[test]
fn one_allocation_in_so_many_is_guarded_and_none_if_off() {
    // One of a slab, and one that is a page run.
    for size in [40, 40_000] {
        assert_eq!(sampled(size, 0, 20_000), 0);
        assert_eq!(sampled(size, 1, 1_000), 1_000);
        let about = sampled(size, 50, 50_000);
        assert!((800..1200).contains(&about), "{about} of 50,000 at one in 50, {size} B");
    }
}

#[test]
fn a_fault_is_explained_by_the_block_it_is_at() {
    play_cpu(0);
    let heap: Heap<_, _, 4> = Heap::new(Space, Pinned(ThreadCpu));
    heap.set_guard_rate(1).unwrap();
    let block = heap.alloc(layout(100)).unwrap();
    let addr = block.cast::<u8>().addr().get();
    // SAFETY: just allocated, with this Layout.
    let usable_len = unsafe { heap.usable_len(block.cast(), layout(100)) };
    assert_eq!((usable_len, heap.stats().classes.iter().map(|class| class.live_count).sum()), (block.len(), 1));
    let kind = |addr| heap.explain_fault(addr).map(|Fault { kind, .. }| kind);
    let behind = (addr + 100).next_multiple_of(4096);
    let red_len = if cfg!(feature = "debug-heap") { 16 } else { 0 };
    assert_eq!((addr + 100 + red_len).next_multiple_of(8), behind, "its pages end there, but for its alignment");
    assert_eq!(
        [kind(behind), kind(addr & !4095), kind((addr & !4095) - 1)],
        [Some(FaultKind::Behind), None, Some(FaultKind::InFront)]
    );
    // SAFETY: allocated above.
    unsafe { heap.free(block.cast(), layout(100)) };
    assert_eq!([kind(addr), kind(behind)], [Some(FaultKind::AfterFree), None]);
    let told = heap.explain_fault(addr + 5).unwrap();
    assert_eq!((told.block, told.size), (addr, 100));
    assert!(told.to_string().contains("after the free of the 100 bytes"), "{told}");
}

#[test]
fn guarded_blocks_move_between_threads_without_a_report() {
    let heap: Heap<_, _, 4> = Heap::new(Space, Pinned(ThreadCpu));
    heap.set_guard_rate(3).unwrap();
    let left = std::sync::Mutex::new(Vec::new());
    on_threads(4, |index| {
        let mut random = Random::new(index as u64);
        let mut slots: Vec<Option<Filled<_>>> = (0..20).map(|_| None).collect();
        for _ in 0..20 {
            churn(&heap, &mut random, &mut slots, 500, 1 << 14).unwrap();
            let mut left = left.lock().unwrap();
            std::mem::swap(&mut *left, &mut slots);
            slots.resize_with(20, || None);
        }
        free_all(&mut slots).unwrap();
        heap.drain_current();
    });
    play_cpu(0);
    free_all(&mut left.lock().unwrap()).unwrap();
    let stats = heap.stats();
    assert!(stats.map_count > 1_000, "{} runs", stats.map_count);
    heap.trim(0);
    assert_eq!(Misuse::ALL.map(|misuse| heap.misuse_count(misuse)), [0; 8]);
    heap.verify_all().unwrap();
    let live: u64 = heap.stats().classes.iter().map(|class| class.live_count).sum();
    assert_eq!(live, 0);
}

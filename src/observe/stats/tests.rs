//! What is counted where a cache is busy.

use super::*;
use crate::contract::cpu::UnknownCpu;
use crate::host_pages::HostPages;
use crate::{Hint, Pinned};
use core::alloc::Layout;

/// Allocates and frees while the cache of CPU 0 is taken, with that many blocks; gives laps, nested allocations,
/// nested frees.
fn while_busy<C: CpuMode>(mode: C, blocks: usize) -> [(u64, u64, u64); 2] {
    let heap = Heap::<_, _, 2>::new(HostPages::<false>::default(), mode);
    let layout = Layout::new::<[u64; 8]>();
    // So that there is something at hand.
    let at_hand = heap.alloc(layout).unwrap();
    let entered = heap.enter().ok().unwrap();
    for _ in 0..blocks {
        let block = heap.alloc(layout).unwrap();
        // SAFETY: just allocated for that Layout, and used no more.
        unsafe { heap.free(block.cast(), layout) };
    }
    drop(entered);
    // SAFETY: as above.
    unsafe { heap.free(at_hand.cast(), layout) };
    assert_eq!(heap.verify_all(), Ok(()));
    heap.stats().cpus.map(|cpu| (cpu.lap_count, cpu.nested_alloc_count, cpu.nested_free_count))
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "frees that wait are not counted yet")]
fn what_finds_the_cache_busy_is_counted_on_its_cpu() {
    // A hint laps over the other cache for each of both.
    assert_eq!(while_busy(Hint(UnknownCpu), 5), [(10, 5, 5), (0, 0, 0)]);
    // SAFETY: the test is one thread and nothing interrupts it but its own calls.
    let pin = unsafe { crate::cpu::NeverPreempts::new(|| Some(0)) };
    assert_eq!(while_busy(Pinned(pin), 5), [(0, 5, 5), (0, 0, 0)]);
}

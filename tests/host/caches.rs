//! What caches keep: blocks of their own CPU, a share of what is held, and nothing once they were told to drain.

use crate::common::{AtRest, Books, ThreadCpu, filled, play_cpu, told};
use smp_heap::cpu::CpuMode;
use smp_heap::{Heap, Hint, Pinned, Stats};

fn cached_len<const N: usize>(stats: &Stats<N>) -> usize {
    stats.cpus.iter().map(|cpu| cpu.cached_len).sum()
}

/// Tiny blocks stay with the CPU that their slab is owned by, and with no other.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "with a frame, no block is tiny")]
fn a_tiny_block_of_another_cpu_returns_and_an_own_one_stays() {
    fn check<C: CpuMode>(heap: &Heap<Books, C, 4>) {
        let cached = |cpu: usize| heap.stats().cpus[cpu].cached_count;
        // Slabs of several granules, of a CPU that is not the first one.
        let ballast = filled(heap, 8 << 20);
        play_cpu(2);
        let mut blocks: Vec<_> = (0..3000).map(|_| filled(heap, 24)).collect();
        let before = cached(2);
        play_cpu(1);
        filled(heap, 24).free().unwrap();
        let own = cached(1);
        assert!(own > 0, "its own block stays");
        for block in blocks.drain(..2000) {
            block.free().unwrap();
        }
        assert_eq!(cached(1), own, "others' blocks do not");
        play_cpu(2);
        let mut most = 0;
        for block in blocks {
            block.free().unwrap();
            most = most.max(cached(2));
        }
        assert!(most > before, "they stay where they are at home");
        ballast.free().unwrap();
        for cpu in [1, 2] {
            play_cpu(cpu);
            heap.drain_current();
        }
        heap.trim_all();
        heap.verify_all().unwrap();
        assert_eq!(heap.provider().held_len(), 0);
    }
    check(&Heap::new(Books::default(), Hint(ThreadCpu)));
    check(&Heap::new(Books::default(), Pinned(ThreadCpu)));
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "looks for one free block in a cache, and it waits in quarantine")]
fn a_hint_out_of_range_still_means_a_cache() {
    let hints: [fn() -> Option<usize>; 5] = [|| None, || Some(3), || Some(4), || Some(7), || Some(usize::MAX)];
    for hint in hints {
        let heap = Heap::<_, _, 4>::new(Books::default(), told(hint));
        filled(&heap, 100).free().unwrap();
        let stats = heap.stats();
        assert_eq!(stats.cpus.iter().filter(|cpu| cpu.is_used && cpu.cached_count > 0).count(), 1, "{:?}", hint());
    }
}

/// Promise 3's bound: what caches keep is a share of what is held, whatever was done before.
#[test]
fn caches_together_keep_a_share_of_what_is_held() {
    fn check<C: CpuMode>(heap: &Heap<Books, C, 4>) {
        let ballast = filled(heap, 16 << 20);
        for round in 0..3 {
            for cpu in 0..4 {
                play_cpu(cpu);
                for size in [64, 100, 300, 1000, 2000, 4000] {
                    let blocks: Vec<_> = (0..600).map(|_| filled(heap, size + 8 * round)).collect();
                    blocks.into_iter().for_each(|block| block.free().unwrap());
                }
            }
        }
        let stats = heap.stats();
        let (cached, held) = (cached_len(&stats), stats.held_len);
        assert!(cached * 7 <= held, "{cached} of {held} in caches\n{stats}");
        assert!(cached * 50 >= held, "{cached} of {held}: caches that keep nothing");
        // The heap shrinks, and with it what a cache may keep.
        ballast.free().unwrap();
        heap.trim(0);
        for cpu in 0..4 {
            play_cpu(cpu);
            for _ in 0..50 {
                let blocks: Vec<_> = (0..40).map(|_| filled(heap, 4000)).collect();
                blocks.into_iter().for_each(|block| block.free().unwrap());
            }
        }
        let stats = heap.stats();
        let (cached, held) = (cached_len(&stats), stats.held_len);
        // Half, since this provider has as much as the heap wishes for.
        assert!(cached * 2 <= held, "{cached} of {held} in caches after shrinking\n{stats}");
        heap.verify_all().unwrap();
    }
    check(&Heap::new(Books::default(), Hint(ThreadCpu)));
    check(&Heap::new(Books::default(), Pinned(ThreadCpu)));
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "looks for free blocks in a cache, and they wait in quarantine")]
fn a_request_to_drain_is_honoured_by_frees_as_by_allocations() {
    for by_free in [false, true] {
        let heap = Heap::<_, _, 2>::new(Books::default(), Pinned(ThreadCpu));
        play_cpu(1);
        let blocks: Vec<_> = (0..400).map(|_| filled(&heap, 100)).collect();
        let other: Vec<_> = (0..400).map(|_| filled(&heap, 300)).collect();
        blocks.into_iter().for_each(|block| block.free().unwrap());
        let cached = || heap.stats().classes.iter().find(|class| class.block_len == 112).unwrap().cached_count;
        assert!(cached() > 0);
        play_cpu(0);
        heap.drain();
        assert!(cached() > 0, "a pinned cache is its CPU's own");
        play_cpu(1);
        if by_free {
            other.into_iter().for_each(|block| block.free().unwrap());
        } else {
            let more: Vec<_> = (0..400).map(|_| filled(&heap, 700)).collect();
            more.into_iter().chain(other).for_each(|block| block.free().unwrap());
        }
        assert_eq!(cached(), 0);
        // And only once: what is cached afterwards stays.
        filled(&heap, 100).free().unwrap();
        (0..400).map(|_| filled(&heap, 700)).collect::<Vec<_>>().into_iter().for_each(|block| block.free().unwrap());
        assert!(cached() > 0, "drained again without a request");
        heap.drain_current();
        heap.trim_all();
        assert_eq!(heap.provider().held_len(), 0);
    }
}

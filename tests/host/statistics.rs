//! The statistics against a model that keeps its own books: every number at rest, after each of many random steps; and
//! their bound while others work.

use std::alloc::Layout;
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::{AtRest, Books, ThreadCpu, filled, layout, play_cpu};
use smp_heap::battery::{Call, Random};
use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint, MAX_SMALL_LEN, RunKind, SizeClass, Stats};

const CPUS: usize = 4;

type Tested = Heap<Books, Hint<ThreadCpu>, CPUS>;

/// What the heap should say, and blocks to say it about.
#[derive(Default)]
struct Model {
    blocks: Vec<(NonNull<[u8]>, Layout)>,
    /// Blocks in use, by the length of a small block.
    live: BTreeMap<usize, u64>,
    large_len: usize,
    high_held: BTreeMap<usize, usize>,
}

impl Model {
    fn alloc(&mut self, heap: &Tested, size: usize) {
        let layout = Layout::from_size_align(size, 8).unwrap();
        let Ok(block) = heap.alloc(layout) else { return };
        self.count(block, layout, 1);
        self.blocks.push((block, layout));
    }

    fn free(&mut self, heap: &Tested, place: usize) {
        let (block, layout) = self.blocks.swap_remove(place);
        self.count(block, layout, u64::MAX);
        // SAFETY: `alloc` gave the block for that Layout, and it is out of the list.
        unsafe { heap.free(block.cast(), layout) };
    }

    /// Adds `one` (or its negative).
    fn count(&mut self, block: NonNull<[u8]>, layout: Layout, one: u64) {
        if layout.size() <= MAX_SMALL_LEN {
            let live = self.live.entry(block.len()).or_default();
            *live = live.wrapping_add(one);
        } else {
            self.large_len = self.large_len.wrapping_add(block.len().wrapping_mul(one as usize));
        }
    }

    /// Everything but what walks the heap.
    fn compare(&mut self, heap: &Tested, before: &Stats<CPUS>) -> Stats<CPUS> {
        let stats = heap.stats();
        for class in &stats.classes {
            assert_eq!(class.live_count, self.live.get(&class.block_len).copied().unwrap_or(0), "{class:?}");
            let high = self.high_held.entry(class.block_len).or_default();
            *high = class.held_len.max(*high);
            assert_eq!(class.high_held_len, *high, "{class:?}");
        }
        let small: usize = self.live.iter().map(|(len, count)| len * *count as usize).sum();
        assert_eq!((stats.large_len(), stats.live_len()), (self.large_len, (small + self.large_len) as u64));
        let called = heap.provider();
        assert_eq!((stats.held_len, stats.high_held_len), (called.held_len(), called.peak_len()));
        for (call, done, refused) in [
            (Call::Map, stats.map_count, stats.failed_map_count),
            (Call::Unmap, stats.unmap_count, stats.refused_unmap_count),
            (Call::Relieve, 0, stats.relief_count),
        ] {
            let calls = called.on(call);
            assert_eq!((done + refused, refused), (calls.made() as u64, calls.failed() as u64), "{call:?}");
        }
        assert_eq!(stats.stray_count, 0);
        for (now, then) in stats.cpus.iter().zip(&before.cpus) {
            // A step refills once at most. Several batches may return to their slabs: of the class freed, and of one
            // that gave up its limit.
            assert_eq!(now.refill_count - then.refill_count, u64::from(now.refilled_count > then.refilled_count));
            let (blocks, batches) = (now.flushed_count - then.flushed_count, now.flush_count - then.flush_count);
            assert!(batches <= blocks && (blocks < 2 || batches > 0), "{blocks} blocks in {batches} batches");
            assert_eq!((now.lap_count, now.nested_alloc_count, now.nested_free_count), (0, 0, 0));
        }
        stats
    }
}

/// Caches, slabs and pages as a walk finds them.
fn compare_with_walk(heap: &Tested, stats: &Stats<CPUS>) {
    let mut slabs: BTreeMap<usize, [u64; 4]> = BTreeMap::new();
    // Which of several parts is partial, or empty, says nothing about the slab.
    let mut parted = BTreeSet::new();
    let (mut free, mut longest, mut large) = (0, 0, 0);
    heap.for_each_run(|run| match run.kind {
        RunKind::Free => (free, longest) = (free + run.len, longest.max(run.len)),
        RunKind::Large => large += run.len,
        RunKind::Own => {}
        RunKind::SlabPart { class, out_count, .. } => {
            let [len, out, ..] = slabs.entry(class.block_len()).or_default();
            *len += run.len as u64;
            *out += out_count as u64;
            parted.insert(class.block_len());
        }
        RunKind::Slab { class, capacity, out_count } => {
            let [len, out, whole, partial] = slabs.entry(class.block_len()).or_default();
            *len += run.len as u64;
            *out += out_count as u64;
            *whole += u64::from(out_count == 0);
            *partial += u64::from(out_count > 0 && out_count < capacity);
        }
    });
    assert_eq!((stats.free_len, stats.largest_free_len, stats.large_len()), (free, longest, large));
    assert_eq!(stats.fragmentation(), ((free - longest) as u64 * 1000).checked_div(free as u64).unwrap_or(0));
    for class in &stats.classes {
        let mut found = slabs.remove(&class.block_len).unwrap_or_default();
        if parted.contains(&class.block_len) {
            [found[2], found[3]] = [class.empty_count, class.partial_count];
        }
        let out = (class.live_count + class.cached_count).wrapping_add_signed(-class.fallback_count);
        assert_eq!(found, [class.held_len as u64, out, class.empty_count, class.partial_count], "{class:?}");
    }
    let mut shares = [(0, 0, 0, 0, 0); CPUS];
    for (class, in_all) in SizeClass::all().zip(&stats.classes) {
        let on: Vec<_> = (0..CPUS).map(|cpu| heap.class_stats_on(cpu, class).unwrap()).collect();
        assert!(heap.class_stats_on(CPUS, class).is_none());
        let sum = |of: fn(&smp_heap::CpuClassStats) -> u64| on.iter().map(of).sum::<u64>();
        assert_eq!(sum(|on| on.cached_count), in_all.cached_count);
        // A CPU that has no cache yet leaves its slabs where none of them is.
        assert!(sum(|on| on.partial_count) <= in_all.partial_count && sum(|on| on.empty_count) <= in_all.empty_count);
        // The first block of a new chunk goes past the caches, and so does what a CPU asks for before it has one.
        let balance: i64 = on.iter().map(|on| on.balance()).sum();
        let past = in_all.live_count as i64 - in_all.fallback_count - balance;
        assert!(
            (0..=stats.map_count as i64 + CPUS as i64).contains(&past),
            "{past} of {in_all:?} went past the caches"
        );
        for (share, on) in shares.iter_mut().zip(&on) {
            assert!(on.cached_count <= 2 * on.limit_count);
            share.0 += on.cached_count;
            share.1 += on.cached_count as usize * on.block_len;
            share.2 += on.partial_count;
            share.3 += on.refilled_count;
            share.4 += on.flushed_count;
        }
    }
    for (cpu, share) in stats.cpus.iter().zip(shares) {
        let said = (cpu.cached_count, cpu.cached_len, cpu.partial_count, cpu.refilled_count, cpu.flushed_count);
        assert_eq!(said, share);
    }
}

/// A request that is refused, and pages that the provider does not take back.
fn refuse(model: &mut Model, heap: &Tested) {
    // Longer than any chunk, so that it has one to itself, which is then empty.
    model.alloc(heap, 40 << 20);
    heap.provider().on(Call::Map).fail(0, usize::MAX);
    heap.provider().on(Call::Unmap).fail(0, usize::MAX);
    model.free(heap, model.blocks.len() - 1);
    model.alloc(heap, 64 << 20);
    heap.trim(0);
    heap.provider().on(Call::Map).fail(0, 0);
    heap.provider().on(Call::Unmap).fail(0, 0);
}

/// Bursts up and down on CPUs in turn, so that blocks are freed where they were not allocated, caches overflow and
/// chunks come and go.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "its model has no frames")]
fn every_number_agrees_with_a_model_at_rest() {
    const STEPS: usize = 30_000;
    let heap = Tested::new(Books::default(), Hint(ThreadCpu));
    let (mut model, mut random) = (Model::default(), Random::new(0x5eed));
    // In a heap that is long enough each CPU gets its cache at once.
    model.alloc(&heap, 8 << 20);
    let mut stats = heap.stats();
    for step in 0..STEPS {
        play_cpu(random.below(CPUS));
        let grows = step / 3000 % 2 == 0;
        let bits = 3 + random.below(15);
        let size = 1 + random.below(1 << bits);
        if model.blocks.is_empty() || random.below(10) < if grows { 7 } else { 3 } {
            model.alloc(&heap, size);
        } else {
            model.free(&heap, random.below(model.blocks.len()));
        }
        stats = model.compare(&heap, &stats);
        if step % 500 == 0 {
            compare_with_walk(&heap, &stats);
        }
        if step % 3000 == 1500 {
            refuse(&mut model, &heap);
            stats = heap.stats();
        }
    }
    assert!(stats.failed_map_count > 0 && stats.relief_count > 0 && stats.refused_unmap_count > 0, "{stats}");
    while !model.blocks.is_empty() {
        model.free(&heap, 0);
    }
    // Whatever cache is drained, blocks return to their slabs in batches; so the steps' rule does not hold here.
    heap.trim(0);
    let stats = model.compare(&heap, &heap.stats());
    compare_with_walk(&heap, &stats);
    heap.trim_all();
    let stats = heap.stats();
    assert_eq!((stats.held_len, stats.own_len, stats.slab_len), (0, 0, 0));
    assert!(stats.unmap_count == stats.map_count && stats.high_held_len > 0);
}

/// What is live is read while two CPUs allocate and free batches of one class, and lies within what they had begun and
/// what they had ended, and the lists that may have been under way. The other CPU reads.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "counts in the class of a block without a frame")]
fn live_blocks_are_within_the_stated_bound_while_others_work() {
    /// Blocks of a class in a cache's two lists at most.
    const LISTS: i64 = 2 * 256;
    const ROUNDS: u64 = 4000;
    let heap = Tested::new(Books::default(), Hint(ThreadCpu));
    let layout = Layout::new::<[u64; 16]>();
    let class = SizeClass::of(layout).unwrap().index();
    // Allocations begun and ended, frees begun and ended.
    let [alloc_begun, alloc_ended, free_begun, free_ended] = [const { AtomicU64::new(0) }; 4];
    let (start, done) = (Barrier::new(CPUS), AtomicBool::new(false));
    let work = |cpu| {
        play_cpu(cpu);
        start.wait();
        let mut random = Random::new(cpu as u64);
        for _ in 0..ROUNDS {
            let count = 1 + random.below(900);
            let blocks: Vec<_> = (0..count)
                .map(|_| {
                    alloc_begun.fetch_add(1, Ordering::SeqCst);
                    let block = heap.alloc(layout).unwrap();
                    alloc_ended.fetch_add(1, Ordering::SeqCst);
                    block
                })
                .collect();
            for block in blocks {
                free_begun.fetch_add(1, Ordering::SeqCst);
                // SAFETY: just allocated for that Layout, and used no more.
                unsafe { heap.free(block.cast(), layout) };
                free_ended.fetch_add(1, Ordering::SeqCst);
            }
        }
    };
    let read = |count: &AtomicU64| count.load(Ordering::SeqCst) as i64;
    let (mut looks, mut busy, mut last) = (0, 0, heap.stats());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (1..CPUS).map(|cpu| scope.spawn(move || work(cpu))).collect();
        let watch = scope.spawn(|| {
            play_cpu(0);
            start.wait();
            while !done.load(Ordering::Relaxed) {
                let least = read(&alloc_ended);
                let freed_before = read(&free_ended);
                let stats = heap.stats();
                let (most, freed) = (read(&alloc_begun), read(&free_begun));
                let live = stats.classes[class].live_count as i64;
                let slack = LISTS * (CPUS as i64 - 1);
                let bound = (least - freed - slack).max(0)..=most - freed_before + slack;
                assert!(bound.contains(&live), "{live} live, not in {bound:?}");
                for (now, then) in stats.cpus.iter().zip(&last.cpus) {
                    assert!(now.refilled_count >= then.refilled_count && now.flushed_count >= then.flushed_count);
                    assert!(now.refill_count >= then.refill_count && now.flush_count >= then.flush_count);
                }
                assert!(stats.high_held_len >= last.high_held_len && stats.high_held_len >= stats.held_len);
                (looks, busy, last) = (looks + 1, busy + u64::from(most != least), stats);
            }
        });
        let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        done.store(true, Ordering::Relaxed);
        watch.join().unwrap();
        results.into_iter().for_each(|result| result.unwrap());
    });
    assert!(looks > 0 && busy > 0, "somebody worked while {looks} looks were taken");
    assert_eq!(heap.stats().classes[class].live_count, 0);
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "counts blocks without frames")]
fn every_number_of_the_statistics_is_right_at_rest() {
    let heap = Heap::<_, _, 4>::new(Books::default(), Hint(ThreadCpu));
    play_cpu(1);
    let blocks: Vec<_> = (0..500).map(|_| filled(&heap, 200)).collect();
    let large = filled(&heap, 100_000);
    blocks.into_iter().for_each(|block| block.free().unwrap());
    let stats = heap.stats();
    let (cpu, class) = (stats.cpus[1], stats.classes.iter().find(|class| class.block_len == 224).unwrap());
    assert!(cpu.is_used && !stats.cpus[0].is_used && cpu.cached_count > 0);
    assert_eq!((cpu.cached_count, cpu.cached_len as u64), (class.cached_count, 224 * class.cached_count));
    assert!(cpu.refilled_count >= 500 && cpu.flushed_count > 0);
    // The rest is in use, and nothing is, but that the first block of a chunk comes past the cache and goes back
    // through it.
    let kept = cpu.refilled_count - cpu.flushed_count;
    assert!((kept..kept + 5).contains(&cpu.cached_count), "{kept} kept, {} cached", cpu.cached_count);
    assert_eq!((class.live_count, stats.slab_len), (0, class.held_len));
    let (mut slabs, mut free, mut largest, mut larges, mut out) = (0, 0, 0, 0, 0);
    heap.for_each_run(|run| match run.kind {
        RunKind::Free => {
            free += run.len;
            largest = largest.max(run.len);
        }
        RunKind::Slab { capacity, out_count, .. } | RunKind::SlabPart { capacity, out_count, .. } => {
            assert!(out_count <= capacity);
            out += out_count;
            slabs += run.len;
        }
        RunKind::Large => larges += run.len,
        RunKind::Own => {}
    });
    assert_eq!((slabs, free, out as u64), (stats.slab_len, stats.free_len, class.cached_count));
    assert!(stats.largest_free_len >= largest / 2 && stats.largest_free_len <= largest);
    assert!((100_000..110_000).contains(&larges));
    // Calls of the provider.
    heap.provider().on(Call::Map).fail(0, usize::MAX);
    assert!(heap.alloc(layout(64 << 20, 8)).is_err());
    let failed = heap.stats();
    assert_eq!(failed.map_count, stats.map_count);
    assert!(failed.failed_map_count > stats.failed_map_count && failed.relief_count > stats.relief_count);
    assert_eq!(failed.map_count + failed.failed_map_count, heap.provider().on(Call::Map).made() as u64);
    large.free().unwrap();
    heap.provider().on(Call::Unmap).fail(0, usize::MAX);
    assert_eq!(heap.trim_all(), 0);
    assert!(failed.refused_unmap_count == 0 && heap.stats().refused_unmap_count > 0);
    assert_eq!(heap.stats().unmap_count, failed.unmap_count);
    heap.provider().on(Call::Unmap).fail(0, 0);
    let held = heap.stats().held_len;
    assert_eq!(heap.trim_all(), held);
    assert_eq!(heap.stats().unmap_count, heap.stats().map_count, "whatever was given went back");
}

#[test]
fn free_pages_in_several_pieces_are_counted_together() {
    let heap = Heap::<_, _, 2>::new(Books::default(), Hint(UnknownCpu));
    let blocks: Vec<_> = (0..20).map(|_| filled(&heap, 40_000)).collect();
    let mut kept = Vec::new();
    for (index, block) in blocks.into_iter().enumerate() {
        if index % 2 == 0 { block.free().unwrap() } else { kept.push(block) }
    }
    let stats = heap.stats();
    assert!(stats.largest_free_len < stats.free_len);
    kept.into_iter().for_each(|block| block.free().unwrap());
}

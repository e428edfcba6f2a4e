//! Faults, one after the other: every call of a provider fails once, regions that make no sense, no memory on any CPU.
//!
//! Promises shown: 5 (a failing provider leaves a whole heap, and nothing leaks), 3 (all memory back), 7 (errors are
//! values).

use std::alloc::Layout;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use arbitrary::{Arbitrary, Unstructured};
use smp_heap::battery::{Filled, Random};
use smp_heap::cpu::{CpuMode, UnknownCpu};
use smp_heap::{Heap, Hint, PageProvider, Pinned, RegionError, RegionProvider};

use crate::common::{AtRest, Memory, ThreadCpu, limited};
use crate::sequences::{At, Cpus, Failing, Kinds, Limit, Mode, Report, Sequence, Setup, Source, Step, run};
use crate::stress::{all_back, on_threads};

/// Steps of the long mixed run.
const STEPS: usize = 400;

/// Steps from one `trim` to the next: what went back has to be asked for again.
const TRIM_STEPS: usize = 8;

/// A long run without faults of its own; interrupts come at calls only, so that it is quick.
fn mixed(setup: Setup, seed: u64) -> Sequence {
    let mut random = Random::new(seed);
    let bytes: Vec<u8> = (0..STEPS * 64).map(|_| random.number() as u8).collect();
    let mut bytes = Unstructured::new(&bytes);
    let mut steps = Vec::new();
    while steps.len() < STEPS {
        if steps.len() % TRIM_STEPS == 0 {
            steps.push(Step::Trim(0));
        }
        match Step::arbitrary(&mut bytes).unwrap() {
            Step::Fail(_) => {}
            Step::Interrupted(op, mut interrupt) => {
                if let At::Instruction(count) = interrupt.at {
                    interrupt.at = At::Call(count as u8 % 8);
                }
                steps.push(Step::Interrupted(op, interrupt));
            }
            step => steps.push(step),
        }
    }
    Sequence { setup, steps }
}

/// Every kind of heap that such a run is done on.
fn setups() -> impl Iterator<Item = Setup> {
    let sources = [Source::Regions, Source::Plain, Source::Moving, Source::MovingReentrant];
    let modes = [Mode::Hint, Mode::Pinned];
    let setup = |(mode, source)| Setup { mode, cpus: Cpus::Two, source, limit: Limit(6) };
    modes.into_iter().flat_map(move |mode| sources.map(|source| (mode, source))).map(setup)
}

fn run_failing(mut sequence: Sequence, failing: Failing) -> Report {
    sequence.steps.insert(0, Step::Fail(failing));
    run(&sequence).unwrap_or_else(|what| panic!("{:?}, {failing:?}: {what}", sequence.setup))
}

#[test]
fn every_call_of_a_long_run_fails_once() {
    for setup in setups() {
        let sequence = mixed(setup, 3);
        let calls = run(&sequence).unwrap().calls;
        assert!(calls > 30, "{setup:?}: only {calls} calls to fail");
        let mut failed = 0;
        for call in 0..calls {
            failed += run_failing(sequence.clone(), Failing::Once(Kinds::Any, call as u16)).failed;
        }
        println!("{setup:?}: {calls} calls, {failed} of them failed");
        // Each in a run of its own; what a failure changes, the last few calls may be among.
        assert!(failed <= calls && failed * 10 >= calls * 9, "{setup:?}: {failed} of {calls} calls failed");
    }
}

#[test]
fn one_call_in_a_hundred_ten_or_two_fails() {
    for setup in setups() {
        for (share, seeds) in [(3, 0..16), (26, 0..8), (128, 0..8), (255, 0..4)] {
            let failing = Failing::Share(Kinds::Any, share);
            let failed: u64 = seeds.map(|seed| run_failing(mixed(setup, seed), failing).failed).sum();
            assert!(failed > 0, "{setup:?}, {failing:?}: nothing failed");
        }
    }
}

#[test]
fn a_region_of_any_length_is_taken_or_refused_untouched() {
    const UNTOUCHED: u8 = 0x5a;
    let memory = Memory::new(80 << 10, 4096);
    let base = memory.start();
    for skip in [0, 1, 7, 8, 512, 1023, 1024, 1025, 4095] {
        for len in 0..=64 << 10 {
            let start = base.wrapping_add(skip);
            let page = |addr: usize| addr / 1024;
            // Whole pages between the first and the last boundary in it.
            let pages = page(start.addr() + len).saturating_sub(page(start.addr() + 1023));
            // What a refused region holds must stay; a taken one is written to.
            let is_checked = pages == 0 && len > 0;
            if is_checked {
                // SAFETY: inside the memory, which is as long as the last address and the greatest length.
                unsafe { start.write_bytes(UNTOUCHED, len) };
            }
            let provider = RegionProvider::<4>::new();
            // SAFETY: the memory is nobody else's; the provider of the round before is gone.
            let added = unsafe { provider.add_region(start, len) };
            assert_eq!(added, if pages > 0 { Ok(()) } else { Err(RegionError::TooSmall) }, "{len} bytes behind {skip}");
            assert_eq!(provider.free_len(), pages * 1024, "{len} bytes behind {skip}");
            if is_checked {
                // SAFETY: just written, and refused.
                let bytes = unsafe { std::slice::from_raw_parts(start, len) };
                assert!(bytes.iter().all(|byte| *byte == UNTOUCHED));
            }
            // Now and then a heap works in it, if it is long enough for a chunk at all.
            if len % 1021 == 0 && pages > 0 {
                let heap = Heap::<_, _, 4>::new(provider, Hint(UnknownCpu));
                let block = Filled::new(&heap, Layout::new::<[u64; 8]>(), 3).unwrap();
                assert!(block.is_some() || pages < 2, "{pages} pages serve nothing");
                block.into_iter().for_each(|block| block.free().unwrap());
                heap.trim(0);
                heap.verify_all().unwrap();
                assert_eq!((heap.stats().held_len, heap.provider().held_len()), (0, 0));
            }
        }
    }
}

#[test]
fn a_region_that_overlaps_or_wraps_is_refused() {
    let memory = Memory::new(64 << 10, 1024);
    let base = memory.start();
    let heap = Heap::<_, _, 4>::new(RegionProvider::<4>::new(), Hint(UnknownCpu));
    let add = |start: *mut u8, len| {
        // SAFETY: only the region in the middle and its neighbours are taken, which is the memory above; what is
        // refused is not touched.
        unsafe { heap.provider().add_region(start, len) }
    };
    let (from, to) = (16 << 10, 48 << 10);
    assert_eq!(add(base.wrapping_add(from), to - from), Ok(()));
    let block = Filled::new(&heap, Layout::new::<[u64; 100]>(), 9).unwrap().unwrap();
    // Each start with each end, of which some page is shared.
    let edges = [0_usize, 15 << 10, (16 << 10) - 1, 16 << 10, (16 << 10) + 1, 17 << 10, 47 << 10, 48 << 10, 64 << 10];
    for (start, end) in edges.iter().flat_map(|start| edges.map(|end| (*start, end))) {
        let (first, last) = (start.next_multiple_of(1024), end / 1024 * 1024);
        if first < last && first < to && from < last {
            assert_eq!(add(base.wrapping_add(start), end - start), Err(RegionError::Overlaps), "{start}..{end}");
        }
    }
    // Lengths and ends that no address space has.
    for len in [usize::MAX, usize::MAX / 2 + 1, isize::MAX as usize + 1] {
        assert_eq!(add(base, len), Err(RegionError::Wraps), "{len}");
    }
    for below in [1, 8, 1024] {
        let high = base.with_addr(usize::MAX - below + 1);
        assert_eq!(add(high, below), Err(RegionError::TooSmall), "the last page is left out");
        assert_eq!(add(high, below + 4096), Err(RegionError::Wraps));
    }
    let half = isize::MAX as usize;
    let start = if base.addr() < half / 2 { 8 } else { half - 4095 };
    assert_eq!(add(base.with_addr(start), half), Err(RegionError::Overlaps), "around everything");
    assert_eq!(add(std::ptr::null_mut(), 2047), Err(RegionError::TooSmall), "and so is the first one");
    assert_eq!(add(std::ptr::null_mut(), usize::MAX), Err(RegionError::Wraps));
    // Both neighbours become one with it.
    assert_eq!([add(base, from), add(base.wrapping_add(to), (64 << 10) - to)], [Ok(()), Ok(())]);
    assert_eq!(heap.provider().region_count(), 1);
    block.free().unwrap();
    heap.trim(0);
    heap.verify_all().unwrap();
    assert_eq!(heap.provider().free_len(), 64 << 10);
}

/// CPUs that run out of memory together.
const CPUS: usize = 4;

/// Bytes that they have between them.
const SCARCE_LEN: usize = 4 << 20;

/// Every CPU takes what it can get of one size, until each was refused while all others hold what they got; round after
/// round.
fn run_out<P: PageProvider + Sync, C: CpuMode + Sync>(heap: &Heap<P, C, CPUS>) {
    let together = Barrier::new(CPUS);
    for size in [48, 700, 4096, 20_000, 100_000, 48] {
        let layout = Layout::from_size_align(size, 8).unwrap();
        let got_len = AtomicUsize::new(0);
        on_threads(CPUS, |cpu| {
            let mut blocks = Vec::new();
            while let Some(block) = Filled::new(heap, layout, cpu as u8).unwrap() {
                blocks.push(block);
            }
            got_len.fetch_add(blocks.len() * size, Ordering::Relaxed);
            together.wait();
            // All are out of memory now. What one of them gives up, it can have again.
            for _ in 0..20 {
                let Some(block) = blocks.pop() else { break };
                block.free().unwrap();
                blocks.extend(Filled::new(heap, layout, cpu as u8).unwrap());
            }
            together.wait();
            blocks.into_iter().for_each(|block| block.free().unwrap());
            heap.drain_current();
        });
        let got_len = got_len.into_inner();
        println!("{size}: {got_len} of {SCARCE_LEN} bytes in blocks");
        // Frames are two thirds of what the shortest blocks take.
        let share = if cfg!(feature = "debug-heap") { 20 } else { 60 };
        assert!(got_len * 100 >= share * SCARCE_LEN, "{got_len} of {SCARCE_LEN} in blocks of {size}");
        heap.verify_all().unwrap();
    }
    all_back(heap, CPUS);
}

#[test]
fn all_cpus_run_out_of_memory_at_once() {
    run_out(&Heap::new(limited(SCARCE_LEN), Hint(ThreadCpu)));
    run_out(&Heap::new(limited(SCARCE_LEN), Pinned(ThreadCpu)));
    let memory = [Memory::new(SCARCE_LEN, 4096), Memory::new(SCARCE_LEN, 4096)];
    let regions = |index: usize| {
        let provider = RegionProvider::<2>::new();
        // SAFETY: the memory outlives the heap's use, and each half is nobody else's.
        unsafe { provider.add_region(memory[index].start(), SCARCE_LEN) }.unwrap();
        provider
    };
    run_out(&Heap::new(regions(0), Hint(ThreadCpu)));
    run_out(&Heap::new(regions(1), Pinned(ThreadCpu)));
}

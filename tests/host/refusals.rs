//! Refusals: what no memory serves costs little, what can be served is, and nobody waits for what cannot go on.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use smp_heap::battery::{Call, Faulty, Filled, Moment, Random};
use smp_heap::cpu::{CpuMode, UnknownCpu};
use smp_heap::{CpuHint, Heap, Hint, Pinned, RegionProvider};
#[cfg(not(feature = "hardened"))]
use smp_heap::{MAX_SMALL_LEN, SizeClass};

use crate::common::{AtRest, Memory, ThreadCpu, play_cpu};
#[cfg(not(feature = "hardened"))]
use crate::host_pages::HostPages;

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

/// A region whose pressure hook says a thousand times that it helped.
fn pressed() -> Faulty<RegionProvider<2>> {
    let provider = Faulty::new(RegionProvider::new());
    provider.set_relief(0, 1000);
    provider
}

fn add<const REGIONS: usize>(region: &RegionProvider<REGIONS>, memory: &Memory) {
    // SAFETY: every test keeps its memory longer than it uses the heap, and gives it to one heap.
    unsafe { region.add_region(memory.start(), memory.len()) }.unwrap();
}

fn absurd_requests_touch_nothing<C: CpuMode>(mode: C) {
    let memory = Memory::new(8 << 20, 4096);
    let heap = Heap::<_, C, 4>::new(pressed(), mode);
    add(heap.provider().inner(), &memory);
    let sizes = [24, 64, 100, 1000, 4000, 20_000, 100_000];
    for size in sizes.into_iter().flat_map(|size| [size; 100]) {
        if let Ok(Some(block)) = Filled::new(&heap, layout(size), 1) {
            block.free().unwrap();
        }
    }
    let kept = Filled::new(&heap, layout(200_000), 1).unwrap().unwrap();
    kept.free().unwrap();
    let before = heap.stats();
    let longest = isize::MAX as usize;
    for len in [longest >> 18, 16 << 20, longest - 7, longest / 2, longest >> 23].map(|len| len.max(16 << 20)) {
        for _ in 0..20 {
            let hooks = || heap.provider().on(Call::Relieve).made();
            let before = hooks();
            assert!(heap.alloc(layout(len)).is_err());
            let one = hooks() - before;
            // SAFETY: the Layout has a size.
            assert!(unsafe { GlobalAlloc::alloc(&heap, layout(len)) }.is_null());
            assert!(one <= 1 && hooks() - before <= 2 * one, "{one} calls of the hook for {len} bytes");
        }
    }
    let after = heap.stats();
    assert_eq!((after.free_len, after.held_len), (before.free_len, before.held_len));
    assert_eq!((after.cpus[0].cached_count, after.unmap_count), (before.cpus[0].cached_count, before.unmap_count));
    assert_eq!(heap.provider().on(Call::Unmap).made() as u64, after.unmap_count);
    heap.verify_all().unwrap();
}

#[test]
fn an_absurd_request_drains_no_cache_and_asks_for_help_once() {
    absurd_requests_touch_nothing(Hint(ThreadCpu));
    play_cpu(0);
    absurd_requests_touch_nothing(Pinned(ThreadCpu));
}

#[test]
fn size_zero_and_null_are_the_same_at_every_level() {
    let memory = Memory::new(1 << 20, 4096);
    let heap = Heap::<_, _, 2>::new(pressed(), Hint(UnknownCpu));
    add(heap.provider().inner(), &memory);
    for align in [1, 8, 64, 4096, 1 << 30] {
        let nothing = Layout::from_size_align(0, align).unwrap();
        let expected = heap.alloc(nothing).unwrap().cast::<u8>();
        assert_eq!(expected.addr().get() % align, 0);
        // SAFETY: size 0 is served too, with a pointer to nothing.
        assert_eq!(unsafe { GlobalAlloc::alloc(&heap, nothing) }, expected.as_ptr());
        // SAFETY: as above.
        assert_eq!(unsafe { GlobalAlloc::alloc_zeroed(&heap, nothing) }, expected.as_ptr());
        // SAFETY: a block without bytes, freed as what it is.
        unsafe { GlobalAlloc::dealloc(&heap, expected.as_ptr(), nothing) };
        // SAFETY: as above.
        unsafe { heap.free(expected, nothing) };
        // SAFETY: null is no block, and nothing is freed.
        unsafe { GlobalAlloc::dealloc(&heap, null_mut(), nothing) };
    }
    for size in [8, 64, 5000, 100_000] {
        // SAFETY: nothing is freed.
        unsafe { GlobalAlloc::dealloc(&heap, null_mut(), layout(size)) };
    }
    let stats = heap.stats();
    assert_eq!(
        (stats.map_count + stats.failed_map_count, heap.provider().on(Call::Relieve).made(), stats.stray_count),
        (0, 0, 0)
    );
    heap.verify_all().unwrap();
}

/// Whether a block of `old` bytes at that address has room for one of `new` at a multiple of what its class is aligned
/// to.
#[cfg(not(feature = "hardened"))]
fn has_room(start: NonNull<u8>, old: usize, new: usize) -> bool {
    let [old, new] = [old, new].map(|size| SizeClass::of(layout(size)));
    let Some(new) = new else { return true };
    let old_len = old.map_or(MAX_SMALL_LEN + 1, SizeClass::block_len);
    start.addr().get().next_multiple_of(new.block_align()) - start.addr().get() + new.block_len() <= old_len
}

/// In a heap that is full of blocks of one length, each shrinks to each shorter length, and keeps its content.
#[test]
#[cfg(not(feature = "hardened"))]
fn a_full_heap_shrinks_every_block() {
    let sizes: Vec<usize> = SizeClass::all().map(SizeClass::block_len).chain([40_000, 100_000, 150_000]).collect();
    for (index, &old) in sizes.iter().enumerate().filter(|(index, _)| *index > 0) {
        let memory = Memory::new(1 << 20, 4096);
        let heap = Heap::<_, _, 4>::new(RegionProvider::<4>::new(), Hint(UnknownCpu));
        add(heap.provider(), &memory);
        let mut live: Vec<(NonNull<u8>, usize)> = Vec::new();
        let mut next = 0;
        for &new in &sizes[..index] {
            for _ in 0..4 {
                live.extend(std::iter::from_fn(|| heap.alloc(layout(old)).ok().map(|block| (block.cast(), old))));
                let Some(place) = (next..live.len()).find(|place| live[*place].1 == old) else { break };
                next = place + 1;
                let (start, _) = live[place];
                // SAFETY: the block is this test's and that long.
                unsafe { start.write_bytes(new as u8, new) };
                // SAFETY: a live block of that Layout.
                let shrunk = unsafe { heap.realloc(start, layout(old), new) };
                let Ok(block) = shrunk else {
                    assert!(!has_room(start, old, new), "{old} to {new} at {start:?}");
                    continue;
                };
                // SAFETY: that many bytes were written before the call.
                let bytes = unsafe { std::slice::from_raw_parts(block.cast::<u8>().as_ptr(), new) };
                assert!(block.len() >= new && bytes.iter().all(|byte| *byte == new as u8), "{old} to {new}");
                live[place] = (block.cast(), new);
            }
        }
        for (start, size) in live {
            // SAFETY: a live block of that Layout, which nobody uses.
            unsafe { heap.free(start, layout(size)) };
        }
        heap.verify_all().unwrap();
        let stats = heap.stats();
        let live: u64 = stats.classes.iter().map(|class| class.live_count).sum();
        assert_eq!((live, stats.stray_count), (0, 0), "{old}: {stats}");
        heap.trim(0);
        assert_eq!(heap.stats().held_len, 0, "{old}");
    }
}

/// Huge blocks over a provider that moves runs, but not now.
#[test]
#[cfg(not(feature = "hardened"))]
fn a_huge_block_shrinks_where_it_is() {
    let heap = Heap::<_, _, 2>::new(Faulty::new(HostPages::<true, true>::default()), Hint(UnknownCpu));
    [Call::Resize, Call::Remap].into_iter().for_each(|call| heap.provider().on(call).fail(0, usize::MAX));
    let mut start = heap.alloc(layout(4 << 20)).unwrap().cast::<u8>();
    heap.provider().set_limit(heap.provider().held_len());
    for (old, new) in [(4 << 20, 3 << 20), (3 << 20, 1 << 20), (1 << 20, 50_000)] {
        // SAFETY: a live block of that Layout.
        start = unsafe { heap.realloc(start, layout(old), new) }.unwrap().cast();
    }
    // SAFETY: as above, and nobody uses it.
    unsafe { heap.free(start, layout(50_000)) };
    heap.trim(0);
    assert_eq!((heap.provider().held_len(), heap.stats().held_len), (0, 0));
}

static HUNGRY: Heap<Faulty<RegionProvider<2>>, Hint<UnknownCpu>, 2> =
    Heap::new(Faulty::with_hook(RegionProvider::new(), allocate), Hint(UnknownCpu));
static LIVE_HOOKS: AtomicUsize = AtomicUsize::new(0);
static DEEPEST_HOOK: AtomicUsize = AtomicUsize::new(0);

/// A hook that needs memory itself.
fn allocate(call: Call, moment: Moment) {
    if (call, moment) != (Call::Relieve, Moment::Before) {
        return;
    }
    let depth = LIVE_HOOKS.fetch_add(1, Ordering::Relaxed) + 1;
    DEEPEST_HOOK.fetch_max(depth, Ordering::Relaxed);
    if depth < 100 {
        for size in [24, 5000, 100_000] {
            if let Ok(block) = HUNGRY.alloc(layout(size)) {
                // SAFETY: just allocated with this Layout.
                unsafe { HUNGRY.free(block.cast(), layout(size)) };
            }
        }
    }
    LIVE_HOOKS.fetch_sub(1, Ordering::Relaxed);
}

#[test]
fn a_pressure_hook_that_allocates_is_not_entered_again() {
    let memory = Box::leak(Box::new(Memory::new(256 << 10, 4096)));
    HUNGRY.provider().set_relief(0, 1000);
    add(HUNGRY.provider().inner(), memory);
    for size in [24, 5000, 100_000] {
        let mut blocks = Vec::new();
        while let Ok(block) = HUNGRY.alloc(layout(size)) {
            blocks.push(block.cast());
        }
        // SAFETY: allocated above with this Layout, used by nobody.
        blocks.into_iter().for_each(|block| unsafe { HUNGRY.free(block, layout(size)) });
    }
    assert!(HUNGRY.provider().on(Call::Relieve).made() > 0);
    assert_eq!(DEEPEST_HOOK.load(Ordering::Relaxed), 1);
    HUNGRY.verify_all().unwrap();
}

thread_local! {
    static IN_HANDLER: Cell<bool> = const { Cell::new(false) };
}

/// The thread's CPU; it may not wait in a handler.
struct Handled;

impl CpuHint for Handled {
    fn current_cpu(&self) -> Option<usize> {
        ThreadCpu.current_cpu()
    }

    fn may_wait(&self) -> bool {
        !IN_HANDLER.get()
    }
}

static FULL: Heap<RegionProvider<2>, Hint<Handled>, 4> = Heap::new(RegionProvider::new(), Hint(Handled));

/// The block that the handler has.
static HANDLERS_BLOCK: AtomicPtr<u8> = AtomicPtr::new(null_mut());
static HANDLER_RUNS: AtomicU64 = AtomicU64::new(0);
static LONGEST_NANOS: AtomicU64 = AtomicU64::new(0);

/// CPU time of this thread.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills in the structure.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

extern "C" fn on_signal(_: libc::c_int) {
    IN_HANDLER.set(true);
    let start = thread_time();
    let block = HANDLERS_BLOCK.swap(null_mut(), Ordering::Relaxed);
    if let Some(block) = NonNull::new(block) {
        // SAFETY: allocated below with this Layout, and taken out of the static.
        unsafe { FULL.free(block, layout(24)) };
    } else if let Ok(block) = FULL.alloc(layout(24)) {
        HANDLERS_BLOCK.store(block.cast().as_ptr(), Ordering::Relaxed);
    }
    let nanos = (thread_time() - start).as_nanos() as u64;
    LONGEST_NANOS.fetch_max(nanos, Ordering::Relaxed);
    HANDLER_RUNS.fetch_add(1, Ordering::Relaxed);
    IN_HANDLER.set(false);
}

/// The kernel `full_house` counts the instructions; here the handler's CPU time shows that it does not wait, and the
/// task's count that it goes on.
#[test]
fn a_handler_does_not_wait_for_the_search_that_it_interrupted() {
    const RUNS: u64 = 300;
    let memory = Box::leak(Box::new(Memory::new(4 << 20, 4096)));
    // SAFETY: leaked, and given once.
    unsafe { FULL.provider().add_region(memory.start(), memory.len()) }.unwrap();
    let handler: extern "C" fn(libc::c_int) = on_signal;
    // SAFETY: the handler uses atomics, thread-locals without destructors, and the heap under test.
    unsafe { libc::signal(libc::SIGUSR2, handler as libc::sighandler_t) };
    let (started, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let task_id = AtomicU64::new(0);
    let (calls, mut since) = (AtomicU64::new(0), Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            play_cpu(1);
            // SAFETY: no preconditions.
            task_id.store(unsafe { libc::pthread_self() } as u64, Ordering::Relaxed);
            while FULL.alloc(layout(24)).is_ok() {}
            started.store(true, Ordering::Release);
            while !over.load(Ordering::Relaxed) {
                let _ = FULL.alloc(layout(24));
                calls.fetch_add(1, Ordering::Relaxed);
            }
        });
        while !started.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        for period in [Duration::from_micros(200), Duration::from_millis(20)] {
            let (deadline, runs) = (Instant::now() + Duration::from_secs(10), HANDLER_RUNS.load(Ordering::Relaxed));
            let first = calls.load(Ordering::Relaxed);
            let wanted = if period < Duration::from_millis(1) { RUNS } else { RUNS / 10 };
            while HANDLER_RUNS.load(Ordering::Relaxed) < runs + wanted && Instant::now() < deadline {
                // SAFETY: the thread lives until `over`.
                unsafe { libc::pthread_kill(task_id.load(Ordering::Relaxed) as libc::pthread_t, libc::SIGUSR2) };
                std::thread::sleep(period);
            }
            since.push((HANDLER_RUNS.load(Ordering::Relaxed) - runs, calls.load(Ordering::Relaxed) - first, wanted));
        }
        over.store(true, Ordering::Relaxed);
    });
    let longest = Duration::from_nanos(LONGEST_NANOS.load(Ordering::Relaxed));
    println!("longest {longest:?}; runs of the handler, calls of the task, runs wanted: {since:?}");
    assert!(since.iter().all(|(runs, _, wanted)| runs >= wanted), "{since:?}");
    assert!(since.iter().all(|(_, calls, wanted)| calls >= wanted), "the task goes on: {since:?}");
    assert!(longest < Duration::from_millis(3), "{longest:?}");
}

/// How a CPU's number lies.
#[derive(Clone, Copy, Debug)]
enum Ids {
    Constant,
    Random,
    Changing,
    Equal,
    Unknown,
}

const ALL_IDS: [Ids; 5] = [Ids::Constant, Ids::Random, Ids::Changing, Ids::Equal, Ids::Unknown];

thread_local! {
    static OWN_ID: Cell<usize> = const { Cell::new(0) };
    static LAST_ID: Cell<usize> = const { Cell::new(0) };
}

impl CpuHint for Ids {
    fn current_cpu(&self) -> Option<usize> {
        let last = LAST_ID.get();
        match self {
            Self::Constant => Some(OWN_ID.get()),
            Self::Random => {
                let next = (last as u64).wrapping_mul(6_364_136_223_846_793_005) + OWN_ID.get() as u64 * 2 + 1;
                LAST_ID.set((next ^ next >> 32) as usize);
                Some(last >> (usize::BITS / 2 + 1))
            }
            Self::Changing => {
                LAST_ID.set(last.wrapping_add(1));
                Some(last)
            }
            Self::Equal => Some(3),
            Self::Unknown => None,
        }
    }
}

/// Threads that hold all but a sixteenth of the blocks that there are, and a block each; gives how many were refused.
fn refused(heap_len: usize, size: usize, threads: usize, ids: Ids, allocations: usize) -> (usize, usize) {
    let memory = Memory::new(heap_len, 4096);
    let provider = RegionProvider::<2>::new();
    add(&provider, &memory);
    let heap = Heap::<_, _, 8>::new(provider, Hint(ids));
    // What one context gets of an empty heap.
    let all: Vec<NonNull<u8>> = std::iter::from_fn(|| heap.alloc(layout(size)).ok().map(NonNull::cast)).collect();
    let most = (all.len() - all.len() / 16).saturating_sub(threads + 1);
    // SAFETY: allocated above with this Layout.
    all.iter().for_each(|block| unsafe { heap.free(*block, layout(size)) });
    heap.drain();
    let (live, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for index in 0..threads {
            let (heap, live, refused) = (&heap, &live, &refused);
            scope.spawn(move || {
                OWN_ID.set(index);
                LAST_ID.set(index * 77);
                let (mut random, mut blocks) = (Random::new(index as u64 + 1), Vec::<NonNull<u8>>::new());
                for _ in 0..allocations / threads {
                    let may = live.fetch_add(1, Ordering::Relaxed) < most;
                    if may {
                        match heap.alloc(layout(size)) {
                            Ok(block) => {
                                blocks.push(block.cast());
                                continue;
                            }
                            Err(_) => drop(refused.fetch_add(1, Ordering::Relaxed)),
                        }
                    }
                    live.fetch_sub(1, Ordering::Relaxed);
                    for _ in 0..1 + random.below(4) {
                        if blocks.is_empty() {
                            break;
                        }
                        let block = blocks.swap_remove(random.below(blocks.len()));
                        // SAFETY: allocated above with this Layout; nobody else has it.
                        unsafe { heap.free(block, layout(size)) };
                        live.fetch_sub(1, Ordering::Relaxed);
                    }
                }
                for block in blocks {
                    // SAFETY: as above.
                    unsafe { heap.free(block, layout(size)) };
                    live.fetch_sub(1, Ordering::Relaxed);
                }
            });
        }
    });
    heap.verify_all().unwrap();
    (refused.into_inner(), most)
}

fn refusals_of_lying_ids(allocations: usize) {
    let mut wrong = Vec::new();
    for heap_len in [100 << 10, 1 << 20, 16 << 20] {
        for (size, threads, ids) in [64, 1000, 4096]
            .into_iter()
            .flat_map(|size| [2, 4, 8].map(|threads| (size, threads)))
            .flat_map(|(size, threads)| ALL_IDS.map(|ids| (size, threads, ids)))
        {
            let (count, most) = refused(heap_len, size, threads, ids, allocations);
            if count > 0 {
                wrong.push(format!("{heap_len} bytes, {most} blocks of {size}, {threads} threads, {ids:?}: {count}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} rows with refusals of {allocations}: {wrong:#?}", wrong.len());
}

#[test]
fn no_id_costs_memory_that_can_be_had() {
    refusals_of_lying_ids(20_000);
}

#[test]
#[ignore = "takes minutes: the same with a million allocations a row"]
fn no_id_costs_memory_that_can_be_had_in_the_long_run() {
    refusals_of_lying_ids(1_000_000);
}

//! A heap for many CPUs: where its struct lies, what its statistics need of the stack, and CPUs whose cache is not made
//! yet.

use std::alloc::Layout;
use std::ptr::NonNull;

use smp_heap::battery::Filled;
use smp_heap::{CpuHint, Heap, Hint, Pinned, RegionProvider};

use crate::common::{AtRest, Books, Memory, ThreadCpu, play_cpu};

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

fn add(regions: &RegionProvider<4>, memory: &Memory) {
    // SAFETY: the memory outlives the heap, and is its alone.
    unsafe { regions.add_region(memory.start(), memory.len()) }.unwrap();
}

/// CPUs other than the first come first, and a region of 4 KiB is all there is.
#[test]
fn a_region_of_4_kib_serves_the_last_cpu() {
    fn serves<C: smp_heap::cpu::CpuMode>(mode: C) {
        let memory = Memory::new(4096, 4096);
        let heap = Heap::<_, _, 1024>::new(RegionProvider::<4>::new(), mode);
        add(heap.provider(), &memory);
        for cpu in [1023, 0, 512] {
            play_cpu(cpu);
            let blocks: Vec<_> = [8, 64, 500].map(|size| Filled::new(&heap, layout(size), 7).unwrap().unwrap()).into();
            blocks.into_iter().for_each(|block| block.free().unwrap());
            assert!(heap.cpu_stats(1023).is_none(), "there is no room for its cache");
        }
        heap.verify_all().unwrap();
        heap.trim_all();
        assert_eq!((heap.stats().held_len, heap.provider().held_len()), (0, 0));
        play_cpu(0);
    }
    serves(Hint(ThreadCpu));
    serves(Pinned(ThreadCpu));
}

/// Four CPUs in a heap of 100 KiB, of which only the first has a cache, fill it as far as the first alone does.
#[test]
fn cpus_without_a_cache_fill_a_heap_of_100_kib() {
    fn filled<C: smp_heap::cpu::CpuMode>(mode: C, cpus: usize) -> usize {
        let memory = Memory::new(100 << 10, 4096);
        let heap = Heap::<_, _, 4>::new(RegionProvider::<4>::new(), mode);
        add(heap.provider(), &memory);
        let mut blocks: Vec<NonNull<u8>> = Vec::new();
        for turn in 0.. {
            play_cpu(turn % cpus);
            let Ok(block) = heap.alloc(layout(200)) else { break };
            blocks.push(block.cast());
        }
        let count = blocks.len();
        for (turn, block) in blocks.into_iter().enumerate() {
            play_cpu((turn + 1) % cpus);
            // SAFETY: allocated above with this Layout.
            unsafe { heap.free(block, layout(200)) };
        }
        assert!((1..4).all(|cpu| heap.cpu_stats(cpu).is_none()));
        heap.verify_all().unwrap();
        heap.trim_all();
        assert_eq!(heap.provider().held_len(), 0);
        play_cpu(0);
        count
    }
    let counts = [filled(Hint(ThreadCpu), 1), filled(Hint(ThreadCpu), 4), filled(Pinned(ThreadCpu), 4)];
    assert!(counts[0] > 100 && counts.iter().all(|count| *count >= counts[0] - counts[0] / 16), "{counts:?}");
}

/// Without a run for its cache, a CPU gets all there is, and its cache once there is room.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "a quarantine keeps what is freed")]
fn a_full_heap_has_no_memory_for_a_cache_and_serves() {
    fn serves<C: smp_heap::cpu::CpuMode>(mode: C) {
        let memory = Memory::new(4 << 20, 4096);
        let heap = Heap::<_, _, 4>::new(RegionProvider::<4>::new(), mode);
        add(heap.provider(), &memory);
        let heap = &heap;
        let fill = |size| std::iter::from_fn(move || heap.alloc(layout(size)).ok().map(NonNull::<[u8]>::cast));
        let free = |blocks: &mut dyn Iterator<Item = NonNull<u8>>, size| {
            // SAFETY: each was allocated by this test with that Layout, and is freed once.
            blocks.for_each(|block| unsafe { heap.free(block, layout(size)) });
        };
        play_cpu(0);
        let mut short: Vec<NonNull<u8>> = fill(100).take(20_000).collect();
        let long: Vec<NonNull<u8>> = fill(4096).collect();
        short.extend(fill(100));
        let freed: Vec<NonNull<u8>> = (0..60).map(|_| short.swap_remove(short.len() / 2)).collect();
        free(&mut freed.into_iter(), 100);
        heap.drain_current();
        play_cpu(3);
        let late: Vec<NonNull<u8>> = fill(100).collect();
        assert!(late.len() >= 60, "{} of 60 free blocks of slabs in use", late.len());
        assert!(heap.cpu_stats(3).is_none(), "nothing is left for its cache");
        free(&mut long.into_iter(), 4096);
        free(&mut fill(100).take(1), 100);
        assert!(heap.cpu_stats(3).is_some(), "there is room");
        free(&mut short.into_iter().chain(late), 100);
        heap.verify_all().unwrap();
        heap.trim_all();
        assert_eq!((heap.stats().held_len, heap.provider().held_len()), (0, 0));
        play_cpu(0);
    }
    serves(Hint(ThreadCpu));
    serves(Pinned(ThreadCpu));
}

/// A CPU that only ever works with page runs gets its cache too.
#[test]
fn a_large_block_brings_a_cpu_its_cache() {
    let heap = Heap::<_, _, 4>::new(Books::default(), Hint(ThreadCpu));
    for _ in 0..2 {
        play_cpu(2);
        Filled::new(&heap, layout(100_000), 7).unwrap().unwrap().free().unwrap();
        play_cpu(0);
    }
    assert!(heap.cpu_stats(2).is_some());
    assert!(heap.trim(0) == 0 && heap.provider().held_len() > 0, "what is kept for it keeps its chunk");
    heap.trim_all();
    assert_eq!((heap.stats().held_len, heap.provider().held_len()), (0, 0));
}

/// An id that is another one at each look, of CPUs with and without a cache in turn.
#[test]
fn ids_that_change_between_two_looks_end() {
    struct Turns(std::cell::Cell<usize>);
    impl CpuHint for Turns {
        fn current_cpu(&self) -> Option<usize> {
            self.0.set(self.0.get() + 1);
            Some(self.0.get() % 2)
        }
    }
    let memory = Memory::new(100 << 10, 4096);
    let heap = Heap::<_, _, 2>::new(RegionProvider::<4>::new(), Hint(Turns(std::cell::Cell::new(0))));
    add(heap.provider(), &memory);
    for _ in 0..100 {
        let blocks: Vec<_> = [64, 1000, 5000].map(|size| Filled::new(&heap, layout(size), 7).unwrap().unwrap()).into();
        blocks.into_iter().for_each(|block| block.free().unwrap());
    }
    heap.verify_all().unwrap();
}

#[cfg(all(target_os = "linux", target_env = "gnu", not(miri)))]
mod linux {
    use super::*;
    use std::fmt::Write;

    // Where the linker's sections of this program begin and end.
    unsafe extern "C" {
        static __data_start: u8;
        static _edata: u8;
        static __bss_start: u8;
        static _end: u8;
    }

    use crate::host_pages::HostPages;
    use smp_heap::battery::Faulty;

    static ZERO: Heap<RegionProvider<4>, Hint<ThreadCpu>, 1024> = Heap::new(RegionProvider::new(), Hint(ThreadCpu));
    /// A heap over a provider with a state that is not zero.
    static LIMITED: Heap<Faulty<HostPages>, Hint<ThreadCpu>, 16> =
        Heap::new(Faulty::new(HostPages::aligned(1)), Hint(ThreadCpu));

    #[test]
    fn a_static_heap_is_bss_or_short() {
        let [data, bss] = [
            (&raw const __data_start).addr()..(&raw const _edata).addr(),
            (&raw const __bss_start).addr()..(&raw const _end).addr(),
        ];
        let (zero, limited) = ((&raw const ZERO).addr(), (&raw const LIMITED).addr());
        let [many, few] = if cfg!(any(feature = "hardened", feature = "trace")) { [72, 48] } else { [64, 32] };
        assert!(bss.contains(&zero) && size_of_val(&ZERO) <= many << 10, "{} bytes", size_of_val(&ZERO));
        assert!(data.contains(&limited) && size_of_val(&LIMITED) <= few << 10, "{} bytes", size_of_val(&LIMITED));
        LIMITED.provider().set_limit(0);
        assert!(LIMITED.alloc(layout(8)).is_err());
    }

    const STACK_LEN: usize = 1 << 20;
    const PAINT: u8 = 0x5c;

    struct Call<'a> {
        work: &'a mut dyn FnMut(),
        top: usize,
    }

    extern "C" fn call(argument: *mut libc::c_void) -> *mut libc::c_void {
        // SAFETY: what `stack_of` gave, which waits for this thread.
        let call = unsafe { &mut *argument.cast::<Call<'_>>() };
        call.top = (&raw const argument).addr();
        (call.work)();
        std::ptr::null_mut()
    }

    /// Bytes of stack that `work` needs, on a stack that was painted before.
    fn stack_of(mut work: impl FnMut()) -> usize {
        let stack = Memory::new(STACK_LEN, 4096);
        let start = stack.start();
        // SAFETY: bytes of the allocation.
        unsafe { start.write_bytes(PAINT, STACK_LEN) };
        let mut call_ = Call { work: &mut work, top: 0 };
        let mut attributes = std::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
        // SAFETY: a place for them.
        assert_eq!(unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) }, 0);
        // SAFETY: they were just initialised; the stack is this function's, and outlives the thread.
        let set = unsafe { libc::pthread_attr_setstack(attributes.as_mut_ptr(), start.cast(), STACK_LEN) };
        assert_eq!(set, 0);
        let mut thread = std::mem::MaybeUninit::<libc::pthread_t>::uninit();
        let argument = (&raw mut call_).cast();
        // SAFETY: the attributes are complete, and the argument outlives the thread.
        let made = unsafe { libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), call, argument) };
        assert_eq!(made, 0);
        // SAFETY: the thread was just made.
        let thread = unsafe { thread.assume_init() };
        // SAFETY: it is joined once.
        assert_eq!(unsafe { libc::pthread_join(thread, std::ptr::null_mut()) }, 0);
        // SAFETY: written above, and the thread has ended.
        let bytes = unsafe { std::slice::from_raw_parts(start, STACK_LEN) };
        let unused = bytes.iter().take_while(|byte| **byte == PAINT).count();
        call_.top - (start.addr() + unused)
    }

    /// Takes lines and keeps none.
    struct Nowhere;

    impl Write for Nowhere {
        fn write_str(&mut self, _: &str) -> std::fmt::Result {
            Ok(())
        }
    }

    fn looks_take_little<const CPUS: usize>() {
        let memory = Memory::new(16 << 20, 4096);
        let heap = Box::new(Heap::<_, _, CPUS>::new(RegionProvider::<4>::new(), Hint(ThreadCpu)));
        add(heap.provider(), &memory);
        let sizes = [8, 100, 3000, 40_000].into_iter().cycle().take(200);
        let _blocks: Vec<_> = sizes.map(|size| heap.alloc(layout(size)).unwrap()).collect();
        let mut stats = Box::new(smp_heap::Stats::<CPUS>::new());
        let lens = [
            stack_of(|| heap.stats_into(&mut stats)),
            stack_of(|| _ = std::hint::black_box(heap.totals())),
            stack_of(|| write!(Nowhere, "{}", heap.dump(0)).unwrap()),
            stack_of(|| _ = heap.verify().unwrap()),
            stack_of(|| heap.verify_all().unwrap()),
        ];
        println!("{CPUS} CPUs: stats_into, totals, dump, verify, verify_at_rest take {lens:?} bytes of stack");
        assert!(lens.iter().all(|len| *len <= 2048), "{CPUS} CPUs: {lens:?}");
        let both = stack_of(|| _ = std::hint::black_box(heap.stats()));
        assert!(both <= size_of::<smp_heap::Stats<CPUS>>() * 2 + 2048, "{CPUS} CPUs: {both}");
        assert_eq!((stats.held_len, stats.live_len()), (heap.stats().held_len, heap.stats().live_len()));
    }

    #[test]
    fn statistics_and_checks_take_2_kib_of_stack() {
        looks_take_little::<1>();
        looks_take_little::<16>();
        looks_take_little::<1024>();
    }
}

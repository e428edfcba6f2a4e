//! Memory set aside for those who must not fail: reserves for handlers, bytes for the time after a panic.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr::NonNull;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::common::{AtRest, Books, ThreadCpu, limited, play_cpu};
use smp_heap::battery::Filled;
use smp_heap::{Heap, Hint, Pinned, Reserve};

const CPUS: usize = 4;

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

/// While every other CPU finds nothing any more, a handler has its blocks, and not one more.
#[test]
fn a_reserve_gives_its_blocks_while_others_exhaust_the_heap() {
    for size in [64, 1536, 40_000] {
        let heap: Heap<Books, Pinned<ThreadCpu>, CPUS> = Heap::new(limited(4 << 20), Pinned(ThreadCpu));
        let reserve: Reserve<'_, _, 8> = Reserve::new(&heap, layout(size));
        play_cpu(0);
        reserve.fill().unwrap();
        assert_eq!(reserve.count(), 8);
        let (exhausted, freed) = (Barrier::new(CPUS), Barrier::new(CPUS));
        std::thread::scope(|scope| {
            for cpu in 1..CPUS {
                let (heap, exhausted, freed) = (&heap, &exhausted, &freed);
                scope.spawn(move || {
                    play_cpu(cpu);
                    let blocks: Vec<_> =
                        core::iter::from_fn(|| Filled::new(heap, layout(size), cpu as u8).unwrap()).collect();
                    exhausted.wait();
                    freed.wait();
                    blocks.into_iter().for_each(|block| block.free().unwrap());
                    heap.drain_current();
                });
            }
            exhausted.wait();
            let blocks: Vec<_> = core::iter::from_fn(|| reserve.take()).collect();
            assert_eq!((blocks.len(), reserve.count()), (8, 0));
            assert!(reserve.fill().is_err(), "the heap has nothing");
            for block in blocks {
                // SAFETY: taken out of the reserve, of its Layout, and as long.
                unsafe { block.write_bytes(0x5a, size) };
                // SAFETY: the block is the heap's, of that Layout, and used no more.
                unsafe { heap.dealloc(block.as_ptr(), reserve.layout()) };
            }
            freed.wait();
        });
        reserve.fill().unwrap();
        drop(reserve);
        heap.drain_current();
        heap.verify_all().unwrap();
        heap.trim_all();
        assert_eq!(heap.provider().held_len(), 0);
    }
}

/// A reserve of nothing cannot be had; a reserve of too much says so and keeps what there was.
#[test]
fn a_reserve_that_cannot_be_filled_says_so() {
    let heap: Heap<Books, Hint<ThreadCpu>, CPUS> = Heap::new(limited(1 << 20), Hint(ThreadCpu));
    play_cpu(0);
    assert!(Reserve::<_, 1>::new(&heap, layout(0)).fill().is_err());
    let reserve: Reserve<'_, _, 64> = Reserve::new(&heap, layout(100_000));
    assert!(reserve.fill().is_err());
    assert!((1..64).contains(&reserve.count()), "{} blocks", reserve.count());
    drop(reserve);
    heap.trim(0);
    assert_eq!(heap.provider().held_len(), 0);
}

/// Several fill, several take, all the time: no block is in two hands, none is lost.
#[test]
fn a_reserve_is_filled_and_emptied_by_many_at_once() {
    const TAKES: usize = 500_000;
    let heap: Heap<Books, Hint<ThreadCpu>, CPUS> = Heap::new(Books::default(), Hint(ThreadCpu));
    let reserve: Reserve<'_, _, 4> = Reserve::new(&heap, layout(48));
    let (taken, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for cpu in 0..CPUS {
            let (heap, reserve, taken, over) = (&heap, &reserve, &taken, &over);
            scope.spawn(move || {
                play_cpu(cpu);
                while !over.load(Ordering::Relaxed) {
                    if cpu < CPUS / 2 {
                        reserve.fill().unwrap();
                        std::thread::yield_now();
                        continue;
                    }
                    let Some(block) = reserve.take() else {
                        // Others fill it; on few processors they would have to wait for this thread's time to be over.
                        std::thread::yield_now();
                        continue;
                    };
                    let word: NonNull<usize> = block.cast();
                    // SAFETY: the block is this thread's alone, and longer than a word.
                    unsafe { word.write(cpu) };
                    std::thread::yield_now();
                    // SAFETY: as before.
                    assert_eq!(unsafe { word.read() }, cpu, "a block in two hands");
                    // SAFETY: the block is the heap's, of that Layout, and used no more.
                    unsafe { heap.dealloc(block.as_ptr(), reserve.layout()) };
                    over.fetch_or(taken.fetch_add(1, Ordering::Relaxed) >= TAKES, Ordering::Relaxed);
                }
            });
        }
    });
    drop(reserve);
    heap.verify_all().unwrap();
    heap.trim_all();
    assert_eq!(heap.provider().held_len(), 0);
}

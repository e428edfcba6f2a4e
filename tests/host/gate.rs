//! A provider that must not be entered twice, and takes its time: all CPUs want pages at once.
//!
//! Promises shown: the provider is called by one context at a time, and waiting for it is no false out-of-memory,
//! whatever the hints say (2).

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::common::{Books, ThreadCpu};
use crate::stress::{all_back, on_threads};
use smp_heap::battery::Filled;
use smp_heap::cpu::CpuMode;
use smp_heap::{Heap, Hint, PageProvider, PageRun, Pinned};

const THREADS: usize = 4;
const TURNS: usize = 8;

/// Not re-entrant, and slow: others run while it works.
#[derive(Default)]
struct Slow {
    books: Books,
    inside: AtomicBool,
    collisions: AtomicUsize,
    refused: AtomicUsize,
}

impl Slow {
    fn alone<T>(&self, work: impl FnOnce() -> T) -> T {
        let collides = self.inside.swap(true, Ordering::SeqCst);
        self.collisions.fetch_add(usize::from(collides), Ordering::Relaxed);
        for _ in 0..20_000 {
            std::hint::spin_loop();
        }
        let result = work();
        self.inside.store(false, Ordering::SeqCst);
        result
    }
}

// SAFETY: as `Books`.
unsafe impl PageProvider for Slow {
    const REMAPS: bool = true;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.alone(|| self.books.map(run))
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: the contract is the same.
        self.alone(|| unsafe { self.books.unmap(start, run) })
    }
}

fn all_want_pages<C: CpuMode + Sync>(heap: &Heap<Slow, C, THREADS>, size: usize) {
    on_threads(THREADS, |index| {
        let layout = Layout::from_size_align(size, 8).unwrap();
        let blocks: Vec<_> = (0..TURNS).map(|turn| Filled::new(heap, layout, (index + turn) as u8).unwrap()).collect();
        let refused = blocks.iter().filter(|block| block.is_none()).count();
        heap.provider().refused.fetch_add(refused, Ordering::Relaxed);
        blocks.into_iter().flatten().for_each(|block| block.free().unwrap());
    });
    // A wait has a bound, which a host that runs much else may exceed once or twice; who does not wait is refused
    // nearly always.
    let refused = heap.provider().refused.load(Ordering::Relaxed);
    assert!(
        4 * refused <= THREADS * TURNS,
        "{refused} of {} refused, though the provider refuses nothing",
        THREADS * TURNS
    );
    assert_eq!(heap.provider().collisions.load(Ordering::Relaxed), 0, "entered twice at once");
    all_back(heap, THREADS);
}

/// Blocks that nearly fill a chunk, and huge ones.
const SIZES: [usize; 2] = [900_000, 3 << 20];

#[test]
fn equal_hints_wait_for_their_turn() {
    for size in SIZES {
        all_want_pages(&Heap::new(Slow::default(), Hint(|| Some(0))), size);
        all_want_pages(&Heap::new(Slow::default(), Hint(|| None)), size);
    }
}

#[test]
fn right_hints_and_pins_wait_for_their_turn() {
    for size in SIZES {
        all_want_pages(&Heap::new(Slow::default(), Hint(ThreadCpu)), size);
        all_want_pages(&Heap::new(Slow::default(), Pinned(ThreadCpu)), size);
    }
}

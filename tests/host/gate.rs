//! A provider that must not be entered twice, and takes its time: all CPUs want pages at once.
//!
//! Promises shown: the provider is called by one context at a time, and waiting for it is no false out-of-memory,
//! whatever the hints say (2).

use std::alloc::Layout;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::common::{ThreadCpu, told};
use crate::host_pages::HostPages;
use crate::stress::{all_back, on_threads};
use smp_heap::battery::{Faulty, Filled, Moment};
use smp_heap::cpu::CpuMode;
use smp_heap::{Heap, Hint, Pinned};

const THREADS: usize = 4;
const TURNS: usize = 8;

/// The provider is not re-entrant, and slow: others run while it works.
fn all_want_pages<C: CpuMode + Sync>(mode: C, size: usize) {
    let (inside, collisions, refused) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let alone = |_, moment| {
        let enters = moment == Moment::Before;
        let collides = inside.swap(enters, Ordering::SeqCst) && enters;
        collisions.fetch_add(usize::from(collides), Ordering::Relaxed);
    };
    let heap = &Heap::<_, _, THREADS>::new(Faulty::with_hook(HostPages::<false, true>::default(), alone), mode);
    heap.provider().set_delay(20_000);
    on_threads(THREADS, |index| {
        let layout = Layout::from_size_align(size, 8).unwrap();
        let blocks: Vec<_> = (0..TURNS).map(|turn| Filled::new(heap, layout, (index + turn) as u8).unwrap()).collect();
        refused.fetch_add(blocks.iter().filter(|block| block.is_none()).count(), Ordering::Relaxed);
        blocks.into_iter().flatten().for_each(|block| block.free().unwrap());
    });
    // A wait has a bound, which a host that runs much else may exceed once or twice; who does not wait is refused
    // nearly always.
    let refused = refused.load(Ordering::Relaxed);
    assert!(
        4 * refused <= THREADS * TURNS,
        "{refused} of {} refused, though the provider refuses nothing",
        THREADS * TURNS
    );
    assert_eq!(collisions.load(Ordering::Relaxed), 0, "entered twice at once");
    all_back(heap, THREADS);
}

/// Blocks that nearly fill a chunk, and huge ones.
const SIZES: [usize; 2] = [900_000, 3 << 20];

#[test]
fn equal_hints_wait_for_their_turn() {
    for size in SIZES {
        all_want_pages(told(|| Some(0)), size);
        all_want_pages(told(|| None), size);
    }
}

#[test]
fn right_hints_and_pins_wait_for_their_turn() {
    for size in SIZES {
        all_want_pages(Hint(ThreadCpu), size);
        all_want_pages(Pinned(ThreadCpu), size);
    }
}

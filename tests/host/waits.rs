//! What a request waits for when memory is in somebody's hand, and that it is had then.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::common::{AtRest, ThreadCpu, filled, layout, limited, play_cpu};
use crate::host_pages::HostPages;
use smp_heap::battery::{Call, Faulty, Filled, Moment};
use smp_heap::cpu::CpuMode;
use smp_heap::{CpuHint, Heap, Hint, Pinned};

/// A thread as a CPU that has its interrupts masked.
struct Masked;

impl CpuHint for Masked {
    fn current_cpu(&self) -> Option<usize> {
        ThreadCpu.current_cpu()
    }

    fn may_wait(&self) -> bool {
        false
    }
}

/// All memory there is has left the provider and not reached the heap: others wait for it, also who may not wait, since
/// a provider that can be re-entered waits for nobody.
#[test]
fn a_chunk_that_is_just_being_given_is_waited_for() {
    wait_for_a_chunk(Pinned(ThreadCpu));
    wait_for_a_chunk(Hint(ThreadCpu));
    wait_for_a_chunk(Hint(Masked));
}

/// The provider has one run to give, which the first caller gets, but is not heard of for a while: as a virtual CPU
/// that its host stops there.
fn wait_for_a_chunk<C: CpuMode + Sync>(mode: C) {
    let asked = AtomicUsize::new(0);
    let hook = |call, moment| match (call, moment, ThreadCpu.current_cpu()) {
        (Call::Map, Moment::Before, _) => _ = asked.fetch_add(1, Ordering::Relaxed),
        (Call::Map, Moment::After, Some(0)) => {
            // Until the other one has asked in vain far more often than one search without anybody in sight takes.
            let end = std::time::Instant::now() + Duration::from_secs(20);
            while asked.load(Ordering::Relaxed) < 502 && std::time::Instant::now() < end {
                std::thread::yield_now();
            }
        }
        _ => {}
    };
    let heap = Heap::<_, _, 2>::new(Faulty::with_hook(HostPages::<true>::default(), hook), mode);
    heap.provider().on(Call::Map).fail(1, usize::MAX);
    std::thread::scope(|scope| {
        for cpu in 0..2 {
            let heap = &heap;
            scope.spawn(move || {
                play_cpu(cpu);
                while cpu == 1 && heap.provider().on(Call::Map).made() == 0 {
                    std::thread::yield_now();
                }
                filled(heap, 8).free().unwrap();
                heap.drain_current();
            });
        }
    });
    assert!(heap.provider().on(Call::Map).failed() >= 500, "the second one asked often");
    heap.trim_all();
    heap.verify_all().unwrap();
    assert_eq!(heap.provider().held_len(), 0);
}

/// The only memory is in a pool that somebody holds for a while: found when it is let go, not refused. The wait has a
/// bound, which a holder that gets no processor may outlast; so most times, not every time.
#[test]
fn memory_behind_a_lock_is_waited_for_before_null() {
    const ROUNDS: usize = 20;
    let heap = Heap::<_, _, 4>::new(limited(1 << 20), Hint(ThreadCpu));
    play_cpu(0);
    filled(&heap, 100).free().unwrap();
    heap.drain_current();
    let size = heap.stats().largest_free_len / 2;
    let (held, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut found = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let mut first = true;
                heap.for_each_run(|_| {
                    if std::mem::replace(&mut first, false) {
                        held.store(true, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(8));
                    }
                });
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        for _ in 0..ROUNDS {
            held.store(false, Ordering::Relaxed);
            while !held.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            if let Some(block) = Filled::new(&heap, layout(size, 8), 1).unwrap() {
                found += 1;
                block.free().unwrap();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(found * 2 > ROUNDS, "found {found} times of {ROUNDS}");
}

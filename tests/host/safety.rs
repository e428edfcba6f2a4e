//! Promise: no safe public call breaks memory, whatever other threads do meanwhile. Here every such call runs while others allocate, write and free.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use smp_heap::battery::{Random, churn, free_all};
use smp_heap::cpu::CpuMode;
use smp_heap::{Heap, Hint, Pinned, Skipped, Violation};

use crate::common::{AtRest, Books, ThreadCpu, play_cpu};

/// Steps of each thread.
const STEPS: usize = if cfg!(miri) { 200 } else { 150_000 };

/// Two threads work, and a third one calls `look` in a loop until they are done, at least once.
fn while_others_work<C: CpuMode + Sync>(mode: C, look: impl Fn(&Heap<Books, C, 3>) + Sync) {
    let heap = Heap::<_, _, 3>::new(Books::default(), mode);
    let working = AtomicUsize::new(2);
    std::thread::scope(|scope| {
        for cpu in 0..2 {
            let (heap, working) = (&heap, &working);
            scope.spawn(move || {
                play_cpu(cpu);
                let mut slots = [const { None }; 200];
                let mut random = Random::new(cpu as u64);
                for _ in 0..10 {
                    churn(heap, &mut random, &mut slots, STEPS / 10, 3000).unwrap();
                    free_all(&mut slots).unwrap();
                    heap.trim(0);
                }
                working.fetch_sub(1, Ordering::Release);
            });
        }
        play_cpu(2);
        loop {
            let is_over = working.load(Ordering::Acquire) == 0;
            look(&heap);
            if is_over {
                break;
            }
        }
    });
    heap.trim(0);
    heap.verify_all().unwrap();
}

/// With a pin, the caches of the two that work are theirs; with hints, at least at the end nobody has any.
#[test]
fn a_heap_at_work_can_be_verified() {
    let last = Mutex::new(Skipped::default());
    let verify = |skipped: Result<Skipped, Violation>| *last.lock().unwrap() = skipped.unwrap();
    while_others_work(Hint(ThreadCpu), |heap| verify(heap.verify()));
    assert!(last.lock().unwrap().is_nothing());
    while_others_work(Pinned(ThreadCpu), |heap| verify(heap.verify()));
    assert_eq!(last.lock().unwrap().caches, 2);
}

//! Promise: no safe public call breaks memory, whatever other threads do meanwhile. Here every such call runs while
//! others allocate, write and free.

use std::alloc::{GlobalAlloc, Layout};
use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use smp_heap::battery::{Faulty, Random, churn, free_all};
use smp_heap::cpu::{CpuMode, NeverPreempts};
use smp_heap::{CpuHint, Heap, Hint, PageProvider, Pinned, Skipped, Violation};

use crate::common::{AtRest, Books, ThreadCpu, limited, play_cpu};
use crate::host_pages::HostPages;

/// Steps of each thread.
const STEPS: usize = if cfg!(miri) { 200 } else { 150_000 };

/// Two threads work, and a third one calls `look` in a loop until they are done, at least once.
fn while_others_work<C: CpuMode + Sync>(mode: C, look: impl Fn(&Heap<Books, C, 4>) + Sync) {
    let heap = Heap::<_, _, 4>::new(Books::default(), mode);
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

/// The safe public functions of the sources, by name.
fn safe_calls() -> BTreeSet<String> {
    let (mut names, mut folders) = (BTreeSet::new(), vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")]);
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            // No caller of the crate has these: they are compiled into simulations and models only.
            if path.ends_with("sync/simulated.rs") || path.parent().unwrap().ends_with("models") {
                continue;
            }
            let text = std::fs::read_to_string(path).unwrap();
            // What is public to callers is `pub` (a lint of the crate), and what is unsafe says so in front of `fn`.
            let heads = text.lines().filter_map(|line| line.trim().strip_prefix("pub "));
            let safe = heads.filter_map(|head| head.strip_prefix("const ").unwrap_or(head).strip_prefix("fn "));
            names.extend(safe.filter_map(|head| head.split(['(', '<']).next()).map(str::to_owned));
        }
    }
    names
}

#[test]
fn every_safe_call_was_looked_at() {
    let doc = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/verification.md")).unwrap();
    let section = doc.split_once("\n## Safe calls\n").unwrap().1.split_once("\n## ").unwrap().0;
    let calls = section.lines().filter(|line| line.starts_with('|')).filter_map(|row| row.split('|').nth(1));
    let known: BTreeSet<&str> = calls.flat_map(|calls| calls.split('`').skip(1).step_by(2)).collect();
    let names = safe_calls();
    assert!(names.contains("alloc") && names.contains("verify") && !names.contains("usable_len"));
    let new: Vec<_> = names.iter().filter(|name| !known.contains(name.as_str())).collect();
    assert!(new.is_empty(), "without a row in docs/verification.md, Safe calls: {new:?}");
}

/// Runs this test again in a process of its own, with a name for what it is to do there; gives how that ended.
fn alone(test: &str, what: &str) -> ExitStatus {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([&format!("safety::{test}"), "--exact", "--nocapture"]).env(ALONE, what);
    child.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
}

const ALONE: &str = "SMP_HEAP_ALONE";

/// An allocator that unwinds is undefined behaviour, and hints are safe to write.
#[test]
#[cfg_attr(miri, ignore = "starts a process")]
fn a_panic_in_a_hint_does_not_unwind_through_the_heap() {
    const TEST: &str = "a_panic_in_a_hint_does_not_unwind_through_the_heap";
    let Ok(what) = std::env::var(ALONE) else {
        for what in ["hint", "pin", "wait", "hook"] {
            let ended = alone(TEST, what);
            assert_eq!(ended.signal(), Some(libc::SIGABRT), "{what}: {ended}");
        }
        return;
    };
    struct Panics(bool);
    impl CpuHint for Panics {
        fn current_cpu(&self) -> Option<usize> {
            if self.0 { None } else { panic!("in a hint") }
        }
        fn may_wait(&self) -> bool {
            panic!("in a hint")
        }
    }
    fn use_it<C: CpuMode>(mode: C) {
        use_heap(Heap::new(limited(1), mode));
    }
    fn use_heap<P: PageProvider, C: CpuMode>(heap: Heap<P, C, 2>) {
        // SAFETY: the size is not 0.
        drop(catch_unwind(AssertUnwindSafe(|| unsafe { GlobalAlloc::alloc(&heap, Layout::new::<u64>()) })));
    }
    match what.as_str() {
        "hint" => use_it(Hint(Panics(false))),
        "wait" => use_it(Hint(Panics(true))),
        "hook" => {
            let provider = Faulty::with_hook(HostPages::<true>::default(), |_, _| panic!("in a hook"));
            use_heap(Heap::new(provider, Hint(ThreadCpu)));
        }
        // SAFETY: it never gives a number.
        _ => use_it(Pinned(unsafe { NeverPreempts::new(Panics(false)) })),
    }
}

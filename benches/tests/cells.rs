//! Cells with allocators that do wrong, and all workloads with one that does right. One test, because a cell forks the
//! process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::time::Duration;

use smp_heap_bench::cell::{self, Failure, Outcome, Span};
use smp_heap_bench::peers::{self, Calls, Peer};
use smp_heap_bench::workloads::{self, Group, Workload};

const SPAN: Span = Span { warm_up: Duration::from_millis(2), counted: Duration::from_millis(10) };

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).expect("workloads ask for what makes sense")
}

unsafe extern "C-unwind" fn right(size: usize, align: usize) -> *mut u8 {
    // SAFETY: the contract is the same.
    unsafe { System.alloc(layout(size, align)) }
}

unsafe extern "C-unwind" fn kept(_: *mut u8, _: usize, _: usize) {}

unsafe extern "C-unwind" fn no_realloc(_: *mut u8, _: usize, _: usize, _: usize) -> *mut u8 {
    ptr::null_mut()
}

static COUNT: AtomicUsize = AtomicUsize::new(0);
static LAST: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

/// Gives each thousandth block out a second time.
unsafe extern "C-unwind" fn twice(size: usize, align: usize) -> *mut u8 {
    if COUNT.fetch_add(1, Ordering::Relaxed) % 1000 == 999 {
        return LAST.load(Ordering::Relaxed);
    }
    // As long as any block of these workloads, or a longer one that gets it too would write over what is the system's.
    // SAFETY: the contract is the same.
    let start = unsafe { right(size.max(4096), align) };
    LAST.store(start, Ordering::Relaxed);
    start
}

/// Gives blocks that overlap their neighbours' last byte.
unsafe extern "C-unwind" fn overlapping(size: usize, align: usize) -> *mut u8 {
    let next = LAST.load(Ordering::Relaxed);
    let next = if next.is_null() {
        // SAFETY: the size is not 0.
        unsafe { System.alloc(layout(64 << 20, 4096)) }
    } else {
        next
    };
    // SAFETY: a test takes less than the 64 MiB.
    LAST.store(unsafe { next.add((size - 1) & !(align - 1)) }, Ordering::Relaxed);
    next
}

/// Has no memory after a while.
unsafe extern "C-unwind" fn scarce(size: usize, align: usize) -> *mut u8 {
    if COUNT.fetch_add(1, Ordering::Relaxed) > 5000 {
        return ptr::null_mut();
    }
    // SAFETY: the contract is the same.
    unsafe { right(size, align) }
}

unsafe extern "C-unwind" fn crash(_: usize, _: usize) -> *mut u8 {
    std::process::abort()
}

fn run(peer: &Peer, name: &str, threads: usize) -> Outcome {
    let workload = workloads::all().into_iter().find(|workload| workload.name == name).expect("a workload");
    cell::run(peer, &workload, threads, SPAN).expect("a cell runs")
}

/// What a test has time for: of the rows of growth those that grow least.
fn is_short(workload: &Workload) -> bool {
    workload.group != Group::Growth || matches!(workload.name, "live-1k" | "heap-1m" | "vec-64")
}

#[test]
fn wrong_allocators_are_found_out_right_ones_pass() {
    let (all, _) = peers::all();
    let peer = |name: &str| *all.iter().find(|peer| peer.name == name).expect("an allocator");
    let with = |alloc| Peer { calls: Calls { alloc, free: kept, realloc: no_realloc }, ..peer("system") };
    assert_eq!(run(&with(twice), "lifo-64", 1).unwrap_err(), Failure::Spoilt);
    assert_eq!(run(&with(twice), "larson", 2).unwrap_err(), Failure::Spoilt);
    assert_eq!(run(&with(overlapping), "churn-1k", 1).unwrap_err(), Failure::Spoilt);
    assert_eq!(run(&with(scarce), "pair-64", 1).unwrap_err(), Failure::OutOfMemory);
    assert_eq!(run(&with(right), "realloc-double", 1).unwrap_err(), Failure::OutOfMemory);
    assert_eq!(run(&with(crash), "pair-64", 1).unwrap_err(), Failure::Crashed);
    let in_program = |path: &'static str| Peer { program: Some(Path::new(path)), ..with(crash) };
    let sample = run(&in_program(env!("CARGO_BIN_EXE_cells")), "pair-64", 1).unwrap();
    assert!(sample.operations > 0 && sample.cpu_ns > 0.0, "by a program of its own: {sample:?}");
    let workload = workloads::all()[0];
    assert!(cell::run(&in_program("/bin/false"), &workload, 1, SPAN).is_err(), "a program that fails");
    assert!(cell::run(&in_program("/bin/true"), &workload, 1, SPAN).is_err(), "a program that says nothing");
    for name in ["system", "pin", "hint", "pin-mmap", "hint-mmap"] {
        for workload in workloads::all().into_iter().filter(is_short) {
            for threads in [1, 3] {
                let sample = run(&peer(name), workload.name, threads);
                let sample = sample.unwrap_or_else(|failure| panic!("{name}, {}: {failure:?}", workload.name));
                assert!(sample.operations > 0 && sample.wall_ns > 0.0, "{name}, {}: {sample:?}", workload.name);
                assert!(!workload.holds || sample.held_len > 0, "{name}, {}: {sample:?}", workload.name);
            }
        }
    }
}

//! Hardening: the bugs of the corpus are noticed as the document says, and programs without bugs are left in peace.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(target_os = "linux")]
use crate::common::{AtRest, Mmap};
use crate::common::{Books, ThreadCpu, limited, play_cpu, told};
use crate::stress::{all_back, on_threads};
use smp_heap::battery::{Filled, Random, churn, exhaust, free_all};
use smp_heap::cpu::CpuMode;
use smp_heap::{Heap, Hint, Misuse, PageProvider, Pinned};

#[path = "../../examples/hardening/corpus.rs"]
pub(crate) mod corpus;

const LEVEL: &str = if cfg!(feature = "debug-heap") {
    "debug-heap"
} else if cfg!(feature = "guard-pages") {
    "guard-pages"
} else {
    "hardened"
};

/// The column of this build's level in the document's table: bug, and what is seen of it.
fn column() -> Vec<(String, String)> {
    let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/hardening.md")).unwrap();
    let table = docs.split_once("<!-- bugs -->\n").unwrap().1.split_once("<!-- end of bugs -->").unwrap().0;
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let mut lines = table.lines();
    let level = cells(lines.next().unwrap()).iter().position(|cell| cell == LEVEL).unwrap();
    lines
        .skip(1)
        .map(cells)
        .filter(|row| !row[1].starts_with("**"))
        .map(|row| (row[1].clone(), row[level].clone()))
        .collect()
}

#[test]
#[cfg_attr(all(feature = "debug-heap", feature = "guard-pages"), ignore = "the document has a column for each alone")]
fn each_bug_is_noticed_as_the_document_says() {
    let column = column();
    assert_eq!(column.len(), corpus::BUGS.len(), "written by: cargo run --example hardening -- table");
    for (bug, (name, promised)) in corpus::BUGS.iter().zip(column) {
        assert_eq!(bug.name, name);
        let seen = corpus::observe(bug);
        assert!(
            !corpus::is_caught(&promised) || seen.text() == promised,
            "{name}: {} instead of {promised}",
            seen.text()
        );
    }
}

fn reports<P: PageProvider, C: CpuMode, const N: usize>(heap: &Heap<P, C, N>) -> Vec<(Misuse, u64)> {
    Misuse::ALL.into_iter().map(|misuse| (misuse, heap.misuse_count(misuse))).filter(|(_, count)| *count > 0).collect()
}

/// On four threads, handing blocks over, with little memory so that blocks are lent too.
fn nothing_is_reported<C: CpuMode + Sync>(mode: C, limit_len: usize) {
    let heap: Heap<_, C, 4> = Heap::new(limited(limit_len), mode);
    let left = std::sync::Mutex::new(Vec::new());
    on_threads(4, |index| {
        let mut random = Random::new(index as u64);
        let mut slots: Vec<Option<Filled<_>>> = (0..100).map(|_| None).collect();
        for _ in 0..20 {
            churn(&heap, &mut random, &mut slots, 2_000, 1 << 14).unwrap();
            let mut left = left.lock().unwrap();
            std::mem::swap(&mut *left, &mut slots);
            slots.resize_with(100, || None);
        }
        free_all(&mut slots).unwrap();
    });
    free_all(&mut left.lock().unwrap()).unwrap();
    all_back(&heap, 4);
    assert_eq!(reports(&heap), []);
}

#[test]
fn a_program_without_bugs_is_left_in_peace() {
    nothing_is_reported(Pinned(ThreadCpu), usize::MAX);
    nothing_is_reported(Hint(ThreadCpu), usize::MAX);
    nothing_is_reported(Pinned(ThreadCpu), 256 << 10);
    nothing_is_reported(told(|| None), 256 << 10);
}

#[test]
fn blocks_of_a_fallback_class_are_no_mismatch() {
    play_cpu(0);
    let heap: Heap<_, _, 4> = Heap::new(limited(64 << 10), Hint(ThreadCpu));
    let layout = |size| Layout::from_size_align(size, 8).unwrap();
    let long: Vec<_> = std::iter::from_fn(|| heap.alloc(layout(640)).ok()).collect();
    // SAFETY: allocated above with this Layout, and used no more.
    long.iter().skip(1).step_by(2).for_each(|block| unsafe { heap.free(block.cast(), layout(640)) });
    let count = exhaust(&heap, layout(24), usize::MAX).unwrap();
    assert!(count >= long.len() / 2, "{count} short blocks for {} long ones", long.len() / 2);
    // SAFETY: as above.
    long.iter().step_by(2).for_each(|block| unsafe { heap.free(block.cast(), layout(640)) });
    heap.verify_all().unwrap();
    assert_eq!(reports(&heap), []);
}

static REPORTED: AtomicUsize = AtomicUsize::new(0);

/// In a list of a cache, and in one of a slab.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "the link is in front of the frame")]
fn a_heap_goes_on_whole_behind_an_overwritten_link() {
    play_cpu(0);
    for drained in [false, true] {
        let heap: Heap<_, _, 4> = Heap::new(Books::default(), Pinned(ThreadCpu));
        heap.set_report_hook(|report| REPORTED.store(report.addr, Ordering::Relaxed));
        let layout = Layout::new::<[u64; 8]>();
        let get = || heap.alloc(layout).unwrap().cast::<u64>();
        let blocks: Vec<_> = (0..1000).map(|_| get()).collect();
        // SAFETY: allocated above with this Layout, and used no more but for the bug below.
        blocks.iter().step_by(2).for_each(|block| unsafe { heap.free(block.cast(), layout) });
        if drained {
            heap.drain_current();
        }
        let victim = blocks[998];
        // SAFETY: none: the block is free. Its memory is still the heap's.
        unsafe { victim.write_volatile(7) };
        let again: Vec<NonNull<u64>> = (0..2000).map(|_| get()).collect();
        assert_eq!(heap.misuse_count(Misuse::CorruptLink), 1);
        assert_ne!(REPORTED.load(Ordering::Relaxed), 0);
        heap.verify_all().unwrap();
        let mut all: Vec<_> = again.iter().chain(blocks.iter().skip(1).step_by(2)).map(|block| block.addr()).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 2500, "no block is handed out twice");
        assert!(!all.contains(&victim.addr()), "what was written to is lost");
        // SAFETY: allocated above with this Layout, and used no more.
        again
            .iter()
            .chain(blocks.iter().skip(1).step_by(2))
            .for_each(|block| unsafe { heap.free(block.cast(), layout) });
        heap.trim(0);
        heap.verify_all().unwrap();
        assert_eq!(heap.misuse_count(Misuse::CorruptLink), 1, "and nothing else: {:?}", reports(&heap));
    }
}

/// A list whose blocks return to their slabs, first freed first.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "the link is in front of the frame")]
fn an_overwritten_link_in_a_list_that_leaves_is_reported() {
    play_cpu(0);
    let heap: Heap<_, _, 4> = Heap::new(Books::default(), Pinned(ThreadCpu));
    let layout = Layout::new::<[u64; 8]>();
    let get = || heap.alloc(layout).unwrap().cast::<u64>();
    let blocks: Vec<_> = (0..3000).map(|_| get()).collect();
    // SAFETY: allocated above with this Layout, and used no more but for the bug below.
    let free = |blocks: &[NonNull<u64>]| blocks.iter().for_each(|block| unsafe { heap.free(block.cast(), layout) });
    free(&blocks[..1000]);
    let victim = blocks[998];
    // SAFETY: none: the block is free. Its memory is still the heap's.
    unsafe { victim.write_volatile(7) };
    free(&blocks[1000..]);
    assert_eq!(heap.misuse_count(Misuse::CorruptLink), 1);
    heap.verify_all().unwrap();
    let mut all: Vec<_> = (0..3000).map(|_| get().addr()).collect();
    all.sort_unstable();
    all.dedup();
    assert!(all.len() == 3000 && !all.contains(&victim.addr()), "what was written to is lost");
    assert_eq!(heap.misuse_count(Misuse::CorruptLink), 1, "and nothing else: {:?}", reports(&heap));
}

#[test]
fn a_key_is_taken_before_the_first_memory_and_not_later() {
    play_cpu(0);
    let heap: Heap<_, _, 4> = Heap::new(Books::default(), Pinned(ThreadCpu));
    assert!(heap.set_key(0x1234) && !heap.set_key(0x5678), "once");
    exhaust(&heap, Layout::new::<[u64; 4]>(), 1000).unwrap();
    let other: Heap<_, _, 4> = Heap::new(Books::default(), Pinned(ThreadCpu));
    exhaust(&other, Layout::new::<[u64; 4]>(), 1000).unwrap();
    assert!(!other.set_key(0x1234), "there are links already");
    [heap, other].iter().for_each(|heap| heap.verify_all().unwrap());
}

/// A huge block is memory without a chunk, so there is no key yet when the first short blocks are asked for and freed.
#[test]
#[cfg(target_os = "linux")]
fn no_link_is_written_before_there_is_a_key() {
    play_cpu(0);
    let heap: Heap<_, _, 8> = Heap::new(Mmap::default(), Pinned(ThreadCpu));
    let huge = Layout::new::<[u8; 1 << 20]>();
    let first: NonNull<u8> = heap.alloc(huge).unwrap().cast();
    for short in [Layout::new::<[u64; 8]>(), Layout::new::<[u64; 16]>()] {
        let block = heap.alloc(short).unwrap().cast();
        // SAFETY: allocated above with this Layout, and used no more.
        unsafe { heap.free(block, short) };
        heap.verify_all().unwrap();
    }
    // SAFETY: as above.
    unsafe { heap.free(first, huge) };
    assert_eq!(reports(&heap).iter().map(|(_, count)| count).sum::<u64>(), 0, "{:?}", reports(&heap));
    heap.trim(0);
    heap.verify_all().unwrap();
}

/// Most blocks of slabs are freed, and the pages go: also what only reached into them is seen to be free.
#[test]
#[cfg(not(feature = "debug-heap"))]
fn blocks_freed_twice_are_noticed_when_their_pages_went() {
    play_cpu(0);
    let heap: Heap<_, _, 1> = Heap::new(limited(1 << 20), Pinned(ThreadCpu));
    let layout = Layout::from_size_align(1500, 8).unwrap();
    let blocks: Vec<NonNull<u8>> = (0..200).map(|_| heap.alloc(layout).unwrap().cast()).collect();
    let (kept, freed): (Vec<_>, Vec<_>) = blocks.into_iter().enumerate().partition(|(number, _)| number % 10 == 0);
    for (_, block) in &freed {
        // SAFETY: allocated with this layout.
        unsafe { heap.free(*block, layout) };
    }
    let free_len = heap.stats().free_len;
    heap.trim(0);
    assert!(heap.stats().free_len > free_len + (64 << 10), "pages inside of slabs went");
    let before = heap.stats();
    for (_, block) in &freed {
        // SAFETY: the bug that is looked for; the memory is the region's, and no block's in use.
        unsafe { heap.free(*block, layout) };
    }
    let noticed: u64 = reports(&heap).iter().map(|(_, count)| count).sum();
    assert_eq!(noticed, freed.len() as u64, "{:?}", reports(&heap));
    assert_eq!(heap.stats().live_len(), before.live_len());
    for (_, block) in kept {
        // SAFETY: allocated with this layout.
        unsafe { heap.free(block, layout) };
    }
    all_back(&heap, 1);
}

//! Heaps that are damaged on purpose, each rule broken in turn.

use super::*;
use crate::Hint;
use crate::base::sync::Ordering;
use crate::contract::cpu::UnknownCpu;
use crate::heap::depot::Caller;
use crate::host_pages::HostPages;
use crate::slab::block::{Block, List};
use crate::slab::list::tests::while_locked;
use crate::slab::word::{CARVED_SHIFT, CLAIMED, COUNT_SHIFT, IDENTITY, LISTED, OWNER_SHIFT};
use core::alloc::Layout;
use core::ptr::NonNull;
use std::boxed::Box;

type Tested = Heap<HostPages<false>, Hint<UnknownCpu>, 2>;

fn class() -> SizeClass {
    SizeClass::of(Layout::new::<[u64; 12]>()).unwrap()
}

/// A heap with blocks in use, in a cache, in a partial slab and in a large run.
fn mixed() -> Tested {
    let heap = Tested::new(HostPages::default(), Hint(UnknownCpu));
    let blocks: [_; 40] = core::array::from_fn(|_| heap.alloc(Layout::new::<[u64; 12]>()).unwrap());
    heap.alloc(Layout::new::<[u64; 9000]>()).unwrap();
    let caller = Caller { index: 0, nested: false };
    for (index, block) in blocks.into_iter().take(30).enumerate() {
        // SAFETY: just allocated for that class, and used no more.
        let block = unsafe { Block::new(block.cast()) };
        // Some straight to their slabs, so that one is partial.
        if index % 3 == 0 {
            heap.engine.give_back(class(), block, None, caller)
        } else {
            heap.free_small(block, class())
        }
    }
    heap.verify_all().unwrap();
    heap
}

/// What is found in a heap that was damaged.
fn broken(hurt: impl FnOnce(&Tested)) -> Option<(char, u8)> {
    let heap = mixed();
    hurt(&heap);
    heap.verify_all().err().map(|violation| (violation.layer, violation.rule))
}

/// The same, by the check that needs no rest.
fn broken_at_work(hurt: impl FnOnce(&Tested)) -> Option<char> {
    let heap = mixed();
    hurt(&heap);
    heap.verify().err().map(|violation| violation.layer)
}

/// Does `work` with the word of each partial slab of [`class`].
fn words(heap: &Tested, work: impl Fn(Slab<'_>, u64) -> u64) {
    let mut count = 0;
    heap.engine.pages.for_each_run(&mut |run| {
        if let Some(slab) = Slab::of(run.desc).filter(|slab| slab.is_listed() && slab.class() == class()) {
            let word = &slab.desc().word;
            word.store(work(slab, word.load(Ordering::Relaxed)), Ordering::Relaxed);
            count += 1;
        }
    });
    assert!(count > 0, "there is a partial slab");
}

/// The same with the descriptor of the large run.
fn large(heap: &Tested, work: impl Fn(&crate::pages::PageDesc)) {
    heap.engine.pages.for_each_run(&mut |run| {
        if run.kind == Kind::Large {
            work(run.desc);
        }
    });
}

/// Makes the cache forget what it has of [`class`].
fn lose_list(heap: &Tested) {
    let cache = heap.engine.cache(0).unwrap();
    assert!(cache.count(class()) > 1);
    // SAFETY: a list of no blocks.
    cache.fill(class(), unsafe { List::from_raw(core::ptr::null_mut(), 1, crate::harden::Key::NONE) });
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "gives blocks back below the frames")]
fn a_sound_heap_has_no_violation() {
    assert_eq!(broken(|_| ()), None);
}

/// Each identity between layers, and each layer's own check, broken by hand.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "gives blocks back below the frames")]
fn every_rule_broken_is_named() {
    assert_eq!(broken(|heap| heap.engine.cache(0).unwrap().count_taken(class(), 1)), Some(('E', 1)));
    let second = |heap: &Tested| assert!(heap.engine.add_cpu(1));
    assert_eq!(broken(second), None);
    let pushed = |heap: &Tested| {
        second(heap);
        heap.engine.cache(1).unwrap().count_pushed(class(), 1);
    };
    assert_eq!(broken(pushed), Some(('E', 1)));
    let longer = |heap: &Tested| heap.engine.slab_len(class()).add(1);
    assert_eq!(broken(longer), Some(('E', 2)));
    assert_eq!(broken(|heap| words(heap, |_, word| word | CLAIMED)), Some(('E', 3)), "claimed");
    assert_eq!(broken(|heap| words(heap, |_, word| word & !LISTED)), Some(('E', 3)), "linked, but not LISTED");
    assert_eq!(broken(|heap| words(heap, |_, word| word + (1 << COUNT_SHIFT))), Some(('E', 3)), "its own rules");
    let nothing_left = |slab: Slab<'_>, word: u64| {
        let carved = (slab.capacity() as u64) << CARVED_SHIFT;
        word & IDENTITY | carved
    };
    assert_eq!(broken(|heap| words(heap, nothing_left)), Some(('E', 3)), "linked, but with nothing to give");
    assert_eq!(broken(|heap| large(heap, |desc| desc.set(Kind::Large, 3, false))).map(|(layer, _)| layer), Some('P'));
    assert_eq!(broken(lose_list), Some(('C', 0)));
    assert_eq!(broken(|heap| words(heap, |_, word| word ^ 1 << OWNER_SHIFT)), Some(('B', 0)), "of another owner");
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "gives blocks back below the frames")]
fn what_one_lock_guards_is_checked_at_any_time() {
    assert_eq!(broken_at_work(|_| ()), None);
    assert_eq!(broken_at_work(|heap| words(heap, |_, word| word + (1 << COUNT_SHIFT))), Some('B'), "a slab's list");
    assert_eq!(broken_at_work(|heap| words(heap, |_, word| word ^ 1 << OWNER_SHIFT)), Some('B'), "of another owner");
    assert_eq!(broken_at_work(|heap| words(heap, |_, word| word & !LISTED)), Some('B'), "linked, but not LISTED");
    assert_eq!(broken_at_work(|heap| large(heap, |desc| desc.set(Kind::Large, 3, false))), Some('P'));
    assert_eq!(broken_at_work(lose_list), Some('C'));
    // SAFETY: a list of no blocks.
    let lost = || unsafe { List::from_raw(core::ptr::null_mut(), 1, crate::harden::Key::NONE) };
    assert_eq!(
        broken_at_work(|heap| {
            assert!(heap.engine.add_cpu(1));
            heap.engine.cache(1).unwrap().fill(class(), lost());
        }),
        Some('C'),
        "another CPU's"
    );
    assert_eq!(broken_at_work(|heap| heap.engine.slab_len(class()).add(1)), None, "a sum, which holds at rest only");
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "gives blocks back below the frames")]
fn what_others_have_is_left_out_and_told() {
    let heap = mixed();
    assert_eq!(heap.verify(), Ok(Skipped::default()));
    assert!(heap.engine.add_cpu(1));
    let cache = heap.engine.cache(1).unwrap();
    assert!(cache.try_lock(1));
    assert_eq!(heap.verify(), Ok(Skipped { caches: 1, ..Skipped::default() }));
    while_locked(heap.engine.bin(0, class()), || {
        assert_eq!(heap.verify(), Ok(Skipped { caches: 1, bins: 1, pools: 0 }));
    });
    cache.unlock(1);
    let mut once = false;
    heap.engine.pages.for_each_run(&mut |_| {
        if !core::mem::replace(&mut once, true) {
            assert_eq!(heap.verify(), Ok(Skipped { pools: 1, ..Skipped::default() }));
        }
    });
    assert!(once);
}

#[test]
fn more_cached_than_ever_left_the_slabs_is_seen() {
    let heap = Tested::new(HostPages::default(), Hint(UnknownCpu));
    let cache = heap.engine.cache(0).unwrap();
    let _ = cache.raise_limit(class(), 1 << 20);
    let memory = Box::leak(Box::new([0_u64; 12]));
    // SAFETY: memory of that length which nobody else uses, ever.
    cache.push(class(), unsafe { Block::new(NonNull::from(memory).cast()) }).unwrap();
    assert_eq!(heap.verify_all().err().map(|violation| (violation.layer, violation.rule)), Some(('E', 4)));
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "gives blocks back below the frames")]
fn many_slabs_on_their_way_are_linked_before_they_are_judged() {
    let heap = Tested::new(HostPages::default(), Hint(UnknownCpu));
    let layout = Layout::new::<[u64; 12]>();
    let blocks: std::vec::Vec<_> = (0..2000).map(|_| heap.alloc(layout).unwrap()).collect();
    let caller = Caller { index: 0, nested: false };
    for block in blocks.iter().step_by(7) {
        // SAFETY: just allocated with this Layout, and used no more.
        let block = unsafe { Block::new(block.cast()) };
        heap.engine.give_back(class(), block, None, caller);
    }
    assert_eq!(heap.verify_all(), Ok(()));
}

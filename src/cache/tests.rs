//! One cache, over blocks that belong to nobody else.

use super::*;
use crate::slab::block::Chain;
use core::alloc::Layout;
use std::boxed::Box;
use std::vec::Vec;

const BLOCKS: u32 = 64;

fn class(size: usize) -> SizeClass {
    SizeClass::of(Layout::from_size_align(size, 1).unwrap()).unwrap()
}

/// Blocks of 64 bytes that belong to nobody else.
struct Blocks {
    _memory: Vec<u64>,
    list: List,
}

impl Blocks {
    fn new() -> Self {
        let mut memory = std::vec![0_u64; BLOCKS as usize * 8];
        let start = NonNull::new(memory.as_mut_ptr()).unwrap().cast();
        let mut list = List::new();
        // SAFETY: the memory is as long as that many blocks, and used through them only.
        list.prepend(unsafe { Chain::carve(start, 64, BLOCKS, Key::NONE) });
        Self { _memory: memory, list }
    }

    fn next(&mut self) -> Block {
        self.list.pop().unwrap()
    }
}

fn cache() -> (Box<CpuCache>, SizeClass) {
    (Box::new(CpuCache::new()), class(64))
}

/// A cache whose class has that limit.
fn cache_of(limit: u32) -> (Box<CpuCache>, SizeClass) {
    let (cache, class) = cache();
    while cache.limit(class) < limit {
        assert_eq!(cache.raise_limit(class, 1 << 20), Raise::Done);
    }
    (cache, class)
}

#[test]
fn only_one_context_is_inside() {
    let (cache, _) = cache();
    assert!(cache.try_lock(0) && !cache.try_lock(0));
    cache.unlock(0);
    assert!(cache.try_lock(0));
    cache.unlock(0);
    assert!(cache.try_mark(0) && !cache.try_mark(0));
    cache.unmark(0);
    assert!(cache.try_mark(0));
    cache.unmark(0);
    assert!(cache.try_lock(0));
}

#[test]
fn two_threads_are_never_inside_together() {
    let (cache, class) = cache();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    while !cache.try_lock(0) {
                        std::thread::yield_now();
                    }
                    cache.count_taken(class, 1);
                    cache.unlock(0);
                }
            });
        }
    });
    assert_eq!(cache.tally(class).get(), (40_000, 0));
}

#[test]
fn a_request_to_drain_stays_until_it_is_done() {
    let (cache, _) = cache();
    assert!(!cache.is_drain_asked());
    cache.ask_drain();
    assert!(cache.is_drain_asked() && cache.is_drain_asked());
    cache.end_drain();
    assert!(!cache.is_drain_asked());
    assert!(!cache.is_used() && cache.is_new() && !cache.is_new() && cache.is_used());
}

#[test]
fn a_cpu_goes_once_and_comes_back_once() {
    let (cache, _) = cache();
    assert!(!cache.goes(), "it was never there");
    assert!(cache.is_new() && !cache.is_gone() && !cache.comes_back());
    assert!(cache.goes() && cache.is_gone() && !cache.is_used());
    assert!(!cache.goes() && cache.is_gone(), "it has gone already");
    assert!(cache.is_new() && cache.comes_back());
    assert!(!cache.is_gone() && !cache.comes_back() && cache.is_used());
}

#[test]
fn a_list_holds_its_limit_and_gives_the_newest_first() {
    let ((cache, class), mut blocks) = (cache(), Blocks::new());
    assert!(cache.push(class, blocks.next()).is_err(), "no limit yet");
    assert!(cache.pop(class).is_none());
    while cache.limit(class) < 8 {
        assert_eq!(cache.raise_limit(class, 1 << 20), Raise::Done);
    }
    let mut starts = Vec::new();
    for count in 0..12 {
        assert_eq!(cache.count(class), count);
        let block = blocks.next();
        starts.push(block.start());
        cache.push(class, block).unwrap();
    }
    assert!(cache.push(class, blocks.next()).is_err(), "one and a half times the limit");
    assert!(cache.verify());
    let mut older = cache.take_older(class);
    assert_eq!((older.count(), cache.count(class)), (12, 0));
    let oldest = older.pop().unwrap();
    assert_eq!(oldest.start(), starts[0]);
    cache.set_spare(class, older);
    assert_eq!(cache.count(class), 11, "in the previous magazine now");
    assert!(cache.pop(class).is_none() && cache.verify());
    cache.push(class, oldest).unwrap();
    assert!(cache.push(class, blocks.next()).is_err() && cache.verify());
    assert_eq!(cache.take_older(class).count(), 11, "the previous magazine first");
    assert_eq!(cache.take_older(class).count(), 1);
    assert!(cache.take_older(class).count() == 0 && cache.verify());
}

#[test]
fn the_previous_magazine_becomes_the_list_again() {
    let ((cache, class), mut blocks) = (cache_of(8), Blocks::new());
    let mut starts = Vec::new();
    for _ in 0..9 {
        let block = blocks.next();
        starts.push(block.start());
        cache.push(class, block).unwrap();
    }
    cache.set_spare(class, cache.take_list(class));
    cache.push(class, blocks.next()).unwrap();
    let spare = cache.take_spare(class);
    assert_eq!((spare.count(), cache.count(class)), (9, 1));
    assert!(cache.pop(class).is_some());
    cache.fill(class, spare);
    assert!(cache.verify());
    let popped: Vec<_> = core::iter::from_fn(|| cache.pop(class)).map(Block::into_start).collect();
    starts.reverse();
    assert_eq!((popped, cache.count(class)), (starts, 0));
    assert!(cache.verify());
}

#[test]
fn a_list_has_a_longest_length_however_large_the_budget_is() {
    let (cache, _) = cache();
    for class in SizeClass::all() {
        let mut steps = 0;
        while cache.raise_limit(class, usize::MAX) == Raise::Done {
            steps += 1;
            assert!(steps < 20, "a limit that is raised without an end");
        }
        let limit = cache.limit(class) as usize;
        assert!(limit >= 2 && limit <= MAX_BLOCKS as usize && limit * class.block_len() <= MAX_LIST_LEN);
        assert!(2 * limit > MAX_BLOCKS as usize || 2 * limit * class.block_len() > MAX_LIST_LEN, "and gets there");
    }
    assert!(cache.verify());
}

#[test]
fn the_sum_of_all_limits_stays_within_the_budget() {
    const BUDGET: usize = 40_000;
    let (cache, _) = cache();
    for _ in 0..20 {
        for class in SizeClass::all() {
            let before = cache.limit(class);
            match cache.raise_limit(class, BUDGET) {
                Raise::Done => assert!(cache.limit(class) > before),
                Raise::Longest => assert_eq!(cache.limit(class), before),
                Raise::Spent => {
                    assert_eq!(cache.limit(class), before);
                    let limits = || SizeClass::all().map(|class| cache.limit(class)).sum::<u32>();
                    let all = limits();
                    assert!(cache.lower_limit(class, false).is_none(), "no list is too long");
                    assert!(limits() < all, "others have what it would need");
                    assert_eq!(cache.limit(class), before, "and they give it up");
                }
            }
            assert!(!cache.is_over(BUDGET) && cache.verify());
        }
    }
    let sum: usize = SizeClass::all().map(|class| 2 * cache.limit(class) as usize * class.block_len()).sum();
    assert!(sum * 2 > BUDGET, "{sum} of {BUDGET} used");
    assert!(cache.is_over(BUDGET / 4) && cache.is_over(sum - 1) && !cache.is_over(sum));
    for _ in 0..1000 {
        let _ = cache.lower_limit(SizeClass::LONGEST, true);
    }
    let others = || SizeClass::all().filter(|class| *class != SizeClass::LONGEST);
    assert!(others().all(|class| cache.limit(class) == 0) && cache.verify());
}

/// Its blocks leave before its limit is lowered, and it is asked until they have.
#[test]
fn a_class_gives_way_once_it_has_no_blocks() {
    let ((cache, class), mut blocks) = (cache_of(8), Blocks::new());
    (0..3).for_each(|_| cache.push(class, blocks.next()).unwrap());
    for count in [2, 1, 0] {
        assert_eq!(cache.lower_limit(SizeClass::LONGEST, false), Some(class), "it has blocks");
        assert_eq!(cache.limit(class), 8);
        assert!(cache.pop(class).is_some() && cache.count(class) == count && cache.verify());
    }
    assert_eq!((cache.lower_limit(SizeClass::LONGEST, false), cache.limit(class)), (None, 4));
    assert!(cache.verify());
}

/// Classes that are all busy leave each other their room; one that is not gives up its own, and all do if the cache
/// holds too much.
#[test]
fn who_was_busy_lately_keeps_its_room() {
    let (cache, _) = cache();
    let [idle, busy, wants] = [3, 5, 7].map(|index| SizeClass::from_index(index).unwrap());
    for class in [idle, busy] {
        while cache.raise_limit(class, 1 << 20) == Raise::Done {}
    }
    let (idle_limit, busy_limit) = (cache.limit(idle), cache.limit(busy));
    (0..10).for_each(|_| {
        cache.warm(busy);
        let _ = cache.lower_limit(wants, false);
    });
    assert!(cache.limit(idle) < idle_limit && cache.limit(busy) == busy_limit);
    let turns = (0..40).take_while(|_| {
        let _ = cache.lower_limit(wants, false);
        cache.limit(busy) == busy_limit
    });
    assert!(turns.count() < 40, "lately has an end");
    let limit = cache.limit(busy);
    (0..4).for_each(|_| {
        cache.warm(busy);
        let _ = cache.lower_limit(wants, true);
    });
    assert!(cache.limit(busy) < limit && cache.verify());
}

#[test]
fn who_is_emptied_gives_up_both_lists_and_its_limit() {
    let ((cache, class), mut blocks) = (cache_of(8), Blocks::new());
    (0..5).for_each(|_| cache.push(class, blocks.next()).unwrap());
    cache.set_spare(class, cache.take_list(class));
    (0..3).for_each(|_| cache.push(class, blocks.next()).unwrap());
    assert_eq!(cache.empty(class).map(|list| list.count()), [3, 5]);
    assert_eq!((cache.count(class), cache.limit(class)), (0, 0));
    assert!(cache.verify() && cache.verify_limits() && cache.push(class, blocks.next()).is_err());
}

/// C1 to C3, broken by hand.
#[test]
fn verify_sees_each_rule_broken() {
    let broken = |hurt: &dyn Fn(&CpuCache, SizeClass)| {
        let ((cache, class), mut blocks) = (cache(), Blocks::new());
        while cache.limit(class) < 4 {
            let _ = cache.raise_limit(class, 1 << 20);
        }
        (0..4).for_each(|_| cache.push(class, blocks.next()).unwrap());
        cache.set_spare(class, cache.take_list(class));
        (0..2).for_each(|_| cache.push(class, blocks.next()).unwrap());
        assert!(cache.verify());
        hurt(&cache, class);
        !cache.verify()
    };
    let null = |place: &AtomicPtr<u8>| place.store(null_mut(), Ordering::Relaxed);
    let add = |count: &AtomicU32, more: u32| _ = count.fetch_add(more, Ordering::Relaxed);
    assert!(broken(&|cache, class| add(&cache.hot(class).room, 1)), "C1: a shorter list");
    assert!(broken(&|cache, class| add(&cache.hot(class).room, u32::MAX)), "C1: a longer list");
    assert!(broken(&|cache, class| null(&cache.hot(class).head)), "C1: no list");
    assert!(broken(&|cache, class| add(&cache.cold(class).spare_count, u32::MAX)), "C2: a shorter list");
    assert!(broken(&|cache, class| null(&cache.cold(class).spare)), "C2: no list");
    assert!(broken(&|cache, _| _ = cache.limit_len.fetch_add(64, Ordering::Relaxed)), "C3");
    let no_room_left = |cache: &CpuCache, class| {
        null(&cache.hot(class).head);
        add(&cache.hot(class).room, 3);
    };
    assert!(broken(&no_room_left), "C1: more room than the limit");
    let lower = |cache: &CpuCache, class| {
        cache.set_limit(class, 3, 0);
        add(&cache.hot(class).room, u32::MAX);
        cache.limit_len.fetch_sub(2 * 64, Ordering::Relaxed);
    };
    assert!(broken(&lower), "C2: more than the limit");
}

//! The slow paths over one chunk, with no provider to ask for more.

use super::*;
use crate::contract::provider::PageRun;
use crate::pages::{Mapping, Provided};
use crate::slab::list::tests::while_locked;
use crate::slab::word::tests::class;
use core::time::Duration;
use std::boxed::Box;
use std::time::Instant;
use std::vec::Vec;

const ORDINARY: Caller = Caller { index: 0, nested: false };
const NESTED: Caller = Caller { index: 0, nested: true };

/// Nothing to hold.
fn step(work: &mut dyn FnMut(bool)) {
    work(true);
}

/// An engine over one chunk, with no provider to ask for more.
struct Alone {
    engine: Box<Engine<2>>,
    memory: NonNull<u8>,
    run: PageRun,
}

impl Alone {
    fn new(len: usize) -> Self {
        let (engine, run) = (Box::new(Engine::new()), PageRun::new(len, 4096, 4096).unwrap());
        // SAFETY: the run's length is not 0.
        let memory = NonNull::new(unsafe { std::alloc::alloc(run.layout()) }).unwrap();
        let nothing = Want { len: 0, least_len: 0, align: 1, use_: Use::Slab };
        // SAFETY: just allocated, not zeroed; it goes when the engine goes.
        engine.pages.add_chunk(unsafe { Mapping::new(memory, run) }, nothing, 0, Provided::UNKNOWN, &step).unwrap();
        // All of it was used once, or sizes would follow what is used.
        let all = engine.pages.alloc_any(engine.pages.free_len(), 1, Use::Large, &step).unwrap();
        engine.pages.free(all.desc);
        Self { engine, memory, run }
    }

    fn fill_pages(&self, len: usize) -> Vec<Run<'_>> {
        // What was set aside, too.
        self.engine.pages.drain_deferred(&step);
        core::iter::from_fn(|| self.engine.pages.alloc_any(len, 1, Use::Large, &step).ok()).collect()
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; nothing of the engine touches it when dropped.
        unsafe { std::alloc::dealloc(self.memory.as_ptr(), self.run.layout()) };
    }
}

/// The shortest of a few times.
fn shortest(mut work: impl FnMut()) -> Duration {
    let time = |_| {
        let start = Instant::now();
        work();
        start.elapsed()
    };
    (0..20).map(time).min().unwrap()
}

#[test]
fn a_flush_brings_every_block_to_its_own_slab() {
    let alone = Alone::new(1 << 20);
    let engine = &alone.engine;
    let class = class(128);
    let mut blocks: Vec<_> = (0..1600).map(|_| engine.obtain_one(class, ORDINARY).unwrap()).collect();
    let mut list = List::new();
    // Neighbours in the list are of different slabs, and of more slabs than are gathered at a time.
    for start in 0..97 {
        let rest = core::mem::take(&mut blocks).into_iter().enumerate();
        let (now, later): (Vec<_>, Vec<_>) = rest.partition(|(index, _)| index % (97 - start) == 0);
        now.into_iter().for_each(|(_, block)| list.prepend(Chain::new(block)));
        blocks = later.into_iter().map(|(_, block)| block).collect();
    }
    assert_eq!(list.count(), 1600);
    while list.count() > 0 {
        let before = list.count();
        engine.flush(class, &mut list, None, ORDINARY);
        assert!((1..=RETURN_BATCH).contains(&(before - list.count())), "blocks in one hold");
    }
    assert!(SizeClass::all().all(|class| engine.out_count(class) == 0));
    assert!(engine.release_empty(&step));
    assert!(SizeClass::all().all(|class| engine.slab_len(class).get() == 0));
    assert_eq!((engine.pages.verify(), engine.stray_count()), (Ok(()), 0));
}

/// Hole 12: with its own shard locked underneath it, a nested caller has others.
#[test]
fn a_nested_caller_whose_shard_is_locked_works_with_a_spare_one() {
    let alone = Alone::new(1 << 20);
    let (engine, class) = (&alone.engine, class(128));
    let kept = engine.obtain_one(class, ORDINARY).unwrap();
    while_locked(engine.bin(0, class), || {
        assert_eq!(engine.owner_for(class, ORDINARY), 0);
        assert_eq!(engine.owner_for(class, NESTED), 2);
        while_locked(engine.bin(2, class), || assert_eq!(engine.owner_for(class, NESTED), 3));
        // Many nested allocations share slabs, instead of a new one for each.
        let blocks: Vec<_> = (0..4).map(|_| engine.obtain_one(class, NESTED).unwrap()).collect();
        let lens = engine.slab_len(class).get();
        assert!(lens <= 2 * engine.slab_want(class).len, "{lens} bytes in slabs");
        blocks.into_iter().for_each(|block| engine.give_back(class, block, None, NESTED));
    });
    engine.give_back(class, kept, None, ORDINARY);
    assert!(engine.release_empty(&step));
    assert_eq!(engine.slab_len(class).get(), 0);
    assert_eq!(engine.owner_for(class, Caller { index: 9, nested: false }), 2, "a CPU without a shard");
}

/// Hole 9: memory that is hidden behind a lock is not yet gone.
#[test]
fn a_locked_bin_is_reported_as_busy_not_as_empty() {
    let alone = Alone::new(1 << 20);
    let (engine, class) = (&alone.engine, class(128));
    let block = engine.obtain_one(class, ORDINARY).unwrap();
    let _pages = alone.fill_pages(2048);
    let other = Caller { index: 1, nested: false };
    let busy = while_locked(engine.bin(0, class), || engine.obtain_one(class, other).err());
    assert_eq!(busy, Some(Refused::Busy));
    let more = engine.obtain_one(class, other).unwrap();
    engine.give_back(class, more, None, other);
    engine.give_back(class, block, None, other);
}

#[test]
fn one_page_left_is_enough_for_a_small_block() {
    let alone = Alone::new(2 << 20);
    let (engine, class) = (&alone.engine, class(64));
    while engine.slab_want(class).len <= 4096 {
        assert!(engine.obtain_one(class, ORDINARY).is_ok());
    }
    while engine.slab_len(class).get() > 64 * usize::try_from(engine.out_count(class)).unwrap() {
        assert!(engine.obtain_one(class, ORDINARY).is_ok());
    }
    let pages = alone.fill_pages(2048);
    assert_eq!(engine.obtain_one(class, ORDINARY).err(), Some(Refused::Empty));
    engine.pages.free(pages[5].desc);
    assert!(engine.obtain_one(class, ORDINARY).is_ok());
}

#[test]
fn a_fallback_block_is_as_much_aligned_as_was_asked_for() {
    let alone = Alone::new(64 << 10);
    let engine = &alone.engine;
    let held: Vec<_> = (0..5).map(|_| engine.obtain_one(class(24), ORDINARY).unwrap()).collect();
    assert!(engine.borrow(class(16)).is_none(), "blocks of 24 bytes are aligned to 8 only");
    let shorter = engine.borrow(class(8)).unwrap();
    let more = engine.obtain_one(class(48), ORDINARY).unwrap();
    let borrowed = engine.borrow(class(16)).unwrap();
    assert_eq!(borrowed.start().addr().get() % 16, 0);
    assert_eq!((engine.out_count(class(48)), engine.out_count(class(16))), (2, 0), "counted where it came from");
    let served = [(8, shorter), (48, more), (16, borrowed)].into_iter().chain(held.into_iter().map(|held| (24, held)));
    for (size, block) in served {
        engine.give_back(class(size), block, None, ORDINARY);
    }
    assert!([8, 16, 24, 48].into_iter().all(|size| engine.served_count(class(size)) == 0));
    assert_eq!((engine.out_count(class(48)), engine.out_count(class(24))), (0, 0));
}

/// Taken and pushed blocks are read one after the other; what others push between is in the second only.
#[test]
fn more_pushed_than_taken_is_no_block() {
    let alone = Alone::new(8 << 20);
    let engine = &alone.engine;
    let _held = engine.obtain_one(class(4096), ORDINARY).unwrap();
    engine.loose(class(4096)).pushed_by_any(1000);
    assert_eq!((engine.out_count(class(4096)), engine.served_count(class(4096))), (0, 0));
    assert!(!engine.shrinks());
    engine.fallback(class(4096)).fetch_sub(5, Ordering::Relaxed);
    assert_eq!(engine.served_count(class(4096)), 0);
}

#[test]
fn two_caches_share_the_budget_of_one() {
    let alone = Alone::new(8 << 20);
    let engine = &alone.engine;
    assert!(engine.add_cpu(1));
    for (index, cache, _) in engine.cpus.iter() {
        let caller = Caller { index, nested: false };
        for _ in 0..50 {
            SizeClass::all().for_each(|class| engine.tune(cache, class, caller));
        }
    }
    assert_eq!(engine.used_caches.load(Ordering::Relaxed), 2);
    let budget = engine.budget();
    assert_eq!(budget, (8 << 20) / 8 / 2);
    // The first one filled its share while it was alone; its next slow paths bring it down.
    assert!(engine.cache(0).unwrap().is_over(budget));
    for _ in 0..100 {
        engine.tune(engine.cache(0).unwrap(), class(64), ORDINARY);
    }
    assert!(engine.caches().all(|cache| !cache.is_over(budget) && cache.verify()));
}

#[test]
fn a_class_that_becomes_busy_gets_room_from_the_others() {
    let alone = Alone::new(1 << 20);
    let (engine, cache) = (&alone.engine, alone.engine.cache(0).unwrap());
    for _ in 0..50 {
        (20..40).filter_map(SizeClass::from_index).for_each(|class| engine.tune(cache, class, ORDINARY));
    }
    let late = SizeClass::from_index(41).unwrap();
    assert_eq!(cache.limit(late), 0);
    (0..60).for_each(|_| engine.tune(cache, late, ORDINARY));
    assert!(cache.limit(late) > 0);
    assert!(cache.verify() && !cache.is_over(engine.budget()));
}

#[test]
fn a_bin_keeps_a_share_of_what_is_held_and_no_more() {
    let alone = Alone::new(4 << 20);
    let (engine, class) = (&alone.engine, class(1024));
    let blocks: Vec<_> = (0..2000).map(|_| engine.obtain_one(class, ORDINARY).unwrap()).collect();
    let most = engine.slab_len(class).get();
    blocks.into_iter().for_each(|block| engine.give_back(class, block, None, ORDINARY));
    let kept = engine.slab_len(class).get();
    assert!(most > 1 << 20 && kept > 0 && kept <= (4 << 20) / RESERVE_SHARE, "{kept} of {most} kept");
    assert!(engine.release_reserves(&step) && !engine.release_reserves(&step));
    assert_eq!(engine.slab_len(class).get(), 0);
}

/// Blocks that come and go in batches: from the third on, their slabs stay, until memory is asked for.
#[test]
fn slabs_that_a_batch_missed_stay() {
    let alone = Alone::new(8 << 20);
    let (engine, class) = (&alone.engine, class(4096));
    let slab_len = || engine.slab_len(class).get();
    let batch = || {
        let blocks: Vec<_> = (0..128).map(|_| engine.obtain_one(class, ORDINARY).unwrap()).collect();
        let most = slab_len();
        blocks.into_iter().for_each(|block| engine.give_back(class, block, None, ORDINARY));
        (most, slab_len())
    };
    let (most, kept) = batch();
    assert!(kept < most / 8, "{kept} of {most} bytes stay of what was used once");
    batch();
    let (most, kept) = batch();
    assert_eq!(kept, most, "what was missed stays");
    assert!(engine.release_reserves(&step));
    assert_eq!(slab_len(), 0);
    let (most, kept) = batch();
    assert!(kept < most / 8, "{kept} of {most} bytes stay after memory was asked for");
}

/// Promise 1: who may have interrupted a lock's holder does not look at it a second time.
#[test]
#[cfg_attr(miri, ignore = "times are not those of a machine")]
fn a_nested_caller_does_not_wait_where_others_do() {
    let alone = Alone::new(1 << 20);
    let (engine, class) = (&alone.engine, class(128));
    let _out = engine.obtain_one(class, ORDINARY).unwrap();
    let nested = while_locked(engine.bin(0, class), || engine.obtain_one(class, NESTED).unwrap());
    engine.give_back(class, nested, None, NESTED);
    let time = |caller| shortest(|| assert!(engine.obtain_one(class, caller).is_err()));
    let compare = |what| {
        let (ordinary, nested) = (time(ORDINARY), time(NESTED));
        assert!(nested * 4 < ordinary, "{what}: a nested caller took {nested:?}, another one {ordinary:?}");
    };
    // Every bin that has something is locked, those that a nested caller turns to among them.
    let all = |work: &dyn Fn()| {
        while_locked(engine.bin(0, class), || {
            while_locked(engine.bin(2, class), || {
                while_locked(engine.bin(3, class), || while_locked(engine.bin(4, class), work));
            });
        });
    };
    // Nothing is set aside.
    engine.pages.drain_deferred(&step);
    let mut once = false;
    engine.pages.for_each_run(&mut |_| {
        if !core::mem::replace(&mut once, true) {
            all(&|| compare("bins and pages"));
        }
    });
    let _pages = alone.fill_pages(4096);
    all(&|| compare("bins"));
    let empty = SizeClass::from_index(30).unwrap();
    let mut once = false;
    let time = |caller| shortest(|| assert!(engine.obtain_one(empty, caller).is_err()));
    engine.pages.for_each_run(&mut |_| {
        if !core::mem::replace(&mut once, true) {
            let (ordinary, nested) = (time(ORDINARY), time(NESTED));
            assert!(nested * 4 < ordinary, "pages: a nested caller took {nested:?}, another one {ordinary:?}");
        }
    });
}

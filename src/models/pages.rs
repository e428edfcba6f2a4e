//! The page heap: deferred runs, chunks that leave, hints, and the map's lookups without a lock.

use core::ptr::NonNull;
use std::vec::Vec;

use super::{Ground, Kept, Place, explore, memory, spawn};
use crate::base::sync::model::{bury, revive, together, write};
use crate::base::sync::{AtomicUsize, Ordering};
use crate::contract::provider::PageRun;
use crate::pages::{
    Change, Chunk, ChunkHints, ChunkMap, EmptyChunk, Entry, GoneChunk, Mapping, Pages, Provided, Run, Use, Want,
};

models! {
    runs_are_freed_while_the_pool_is_busy
    the_memory_of_neighbours_goes_back_at_once
    a_chunk_leaves_once_its_last_run_is_free
    a_hint_does_not_outlive_its_chunk
    a_chunk_comes_to_where_another_one_is_leaving
    a_cached_run_is_had_once
    a_remembered_run_does_not_outlive_its_chunk
    a_lookup_finds_its_chunk_while_others_come_and_go
    chunks_are_entered_at_once_and_found_by_who_is_told
    a_table_goes_while_it_is_looked_at
}

const RUN_LEN: usize = 256;

fn alloc(pages: &'static Pages<1>) -> Option<Run<'static>> {
    pages.alloc(RUN_LEN, 8, Use::Large, 0, false).ok()
}

fn check(pages: &'static Pages<1>, out: &[Run<'_>]) {
    assert_eq!(pages.verify(), Ok(()), "P1 to P9");
    let mut starts: Vec<_> = out.iter().map(|run| run.start).collect();
    starts.sort_unstable();
    assert!(starts.windows(2).all(|pair| pair[0] != pair[1]), "a run was handed out twice");
    let out_len: usize = out.iter().map(|run| run.len).sum();
    let mut len = 0;
    pages.for_each_run(&mut |run| len += run.len);
    assert_eq!(pages.free_len() + out_len, len, "a run is lost");
}

/// Two contexts free while a third one allocates: who cannot have the lock defers, and nothing is lost.
fn runs_are_freed_while_the_pool_is_busy() {
    let ground = Ground::new();
    explore(2, move || {
        let (pages, out) = (ground.renew(), Kept::new());
        let free = |run: Run<'static>| spawn(move || pages.free(run.desc));
        let mut work: Vec<_> = core::iter::from_fn(|| alloc(pages)).take(2).map(free).collect();
        work.push({
            let out = out.clone();
            spawn(move || alloc(pages).into_iter().for_each(|run| out.add(run)))
        });
        together(work);
        check(pages, &out.take());
    });
}

/// The memory of two neighbours goes back at once: who finds the lock held leaves its run to the holder, which must not
/// take it for one that is among the absent ones already.
fn the_memory_of_neighbours_goes_back_at_once() {
    const PAGE_LEN: usize = 4096;
    // Shorter chunks have granules that are no whole pages.
    const LEN: usize = 4 << 20;
    let (place, start) = (Place::new(), memory(LEN));
    explore(3, move || {
        let pages: &'static Pages<1> = place.fill(Pages::new());
        let want = Want { len: 0, least_len: 0, align: 1, use_: Use::Large };
        let run = PageRun::new(LEN, PAGE_LEN, PAGE_LEN).unwrap();
        let provided = Provided { decommits: true, ..Provided::UNKNOWN };
        // SAFETY: leaked memory of that length, which only this page heap uses in this execution.
        pages.add_chunk(unsafe { Mapping::new(start, run) }, want, 0, provided, &|work| work(true)).unwrap();
        let idle = || pages.take_idle(PAGE_LEN, pages.free_len() - PAGE_LEN, PAGE_LEN).unwrap();
        let idle = [idle(), idle()];
        together(Vec::from(idle.map(|idle| spawn(move || pages.went_back(idle)))));
        assert_eq!(pages.verify(), Ok(()), "P1 to P9");
        assert_eq!(pages.absent_len(), 2 * PAGE_LEN, "all of it is there");
    });
}

/// The last run of a chunk is freed, the chunk goes back to the provider, and another context wants a run of it.
fn a_chunk_leaves_once_its_last_run_is_free() {
    let ground = Ground::new();
    explore(2, move || {
        let (pages, out, gone) = (ground.renew(), Kept::new(), Kept::new());
        let last = alloc(pages).unwrap();
        together(Vec::from([
            spawn(move || pages.free(last.desc)),
            spawn({
                let gone = gone.clone();
                move || {
                    if let Some(empty) = pages.take_empty(0) {
                        pages.chunk_gone(taken(empty));
                        gone.add(());
                    }
                }
            }),
            spawn({
                let out = out.clone();
                move || alloc(pages).into_iter().for_each(|run| out.add(run))
            }),
        ]));
        let (gone, out) = (gone.take(), out.take());
        assert!(gone.is_empty() || out.is_empty(), "a run of a chunk that is gone");
        check(pages, &out);
    });
}

/// A CPU keeps a run and has it back while another context, refused by the pools, frees what is kept, and allocates of
/// it.
fn a_cached_run_is_had_once() {
    let ground = Ground::new();
    explore(3, move || {
        let (pages, out) = (ground.renew(), Kept::new());
        let run = pages.cut(pages.first_run_cache(), 0, RUN_LEN, 8).unwrap().into_run();
        let written = |run: Run<'static>| {
            // SAFETY: the run is whoever's that has it, and longer than 8 bytes.
            unsafe { write(run.start.cast::<u64>().as_ptr(), 0xa5) };
            run
        };
        // All there is, but for that run.
        let rest: Vec<_> = core::iter::from_fn(|| alloc(pages)).collect();
        let own = out.clone();
        together(Vec::from([
            spawn(move || {
                let desc = written(run).desc;
                assert!(pages.keep(pages.first_run_cache(), desc, desc.tag()), "as long as the one that was cut");
                let Some(run) = pages.reuse(pages.first_run_cache(), RUN_LEN, 8) else { return };
                let start = written(run.into_run()).start;
                assert!(pages.keep_again(pages.first_run_cache(), start), "the one that was kept last");
                let again = pages.reuse(pages.first_run_cache(), RUN_LEN, 8);
                again.into_iter().for_each(|run| own.add(written(run.into_run())));
            }),
            spawn({
                let out = out.clone();
                move || alloc(pages).into_iter().for_each(|run| out.add(written(run)))
            }),
        ]));
        let out: Vec<_> = out.take().into_iter().chain(rest).collect();
        check(pages, &out);
    });
}

/// The chunk of the run that a CPU kept last goes, and another one comes to the same place; a block there is not taken
/// for that run.
fn a_remembered_run_does_not_outlive_its_chunk() {
    let (ground, told) = (Ground::new(), Place::new());
    explore(3, move || {
        let (pages, told) = (ground.renew(), told.fill(AtomicUsize::new(0)));
        let start = ground.memory;
        let run = pages.cut(pages.first_run_cache(), 0, RUN_LEN, 8).unwrap().into_run().desc;
        assert!(
            pages.keep(pages.first_run_cache(), run, run.tag())
                && pages.reuse(pages.first_run_cache(), RUN_LEN, 8).is_some()
        );
        assert_eq!(Chunk::start_of(run), start);
        pages.free(run);
        together(Vec::from([
            spawn(move || replace_chunk(pages, start, Use::Large, told)),
            spawn(move || {
                if let Some(block) = block_told(told) {
                    assert!(!pages.keep_again(pages.first_run_cache(), block), "an older chunk's");
                }
            }),
        ]));
    });
}

/// Gives the chunk at `start` back, enters another one there, and tells of a run in it.
fn replace_chunk(pages: &'static Pages<1>, start: NonNull<u8>, use_: Use, told: &AtomicUsize) {
    let Some(empty) = pages.take_empty(0) else { return };
    pages.chunk_gone(taken(empty));
    told.store(enter_shorter(pages, start, use_).start.addr().get(), Ordering::Release);
}

fn block_told(told: &AtomicUsize) -> Option<NonNull<u8>> {
    NonNull::new(core::ptr::with_exposed_provenance_mut(told.load(Ordering::Acquire)))
}

fn give_back(memory: &Mapping) {
    let start = memory.start().addr().get();
    bury(start..start + memory.len());
}

/// The provider has the chunk back.
pub(super) fn taken(empty: EmptyChunk) -> GoneChunk {
    let offered = empty.offer(|memory| {
        give_back(&memory);
        Ok(())
    });
    offered.unwrap()
}

/// A chunk goes and another one comes to the same place; who is told of a block there does not take it for one of the
/// older chunk's.
fn a_hint_does_not_outlive_its_chunk() {
    let (ground, hint, told) = (Ground::new(), Place::new(), Place::new());
    explore(3, move || {
        let (pages, hint, told) = (ground.renew(), hint.fill(ChunkHints::new()), told.fill(AtomicUsize::new(0)));
        let start = ground.memory;
        assert!(pages.desc_far(hint, start).is_some() && pages.desc_near(hint, start).is_some());
        together(Vec::from([
            spawn(move || replace_chunk(pages, start, Use::Slab, told)),
            spawn(move || {
                if let Some(block) = block_told(told) {
                    assert!(pages.desc_near(hint, block).is_none(), "an older chunk's");
                    let desc = pages.desc_far(hint, block).unwrap();
                    assert_eq!(Chunk::start_of(desc), block);
                }
            }),
        ]));
    });
}

/// Another chunk, shorter, where one was that was given back, and a run in it.
fn enter_shorter(pages: &'static Pages<1>, start: NonNull<u8>, use_: Use) -> Run<'static> {
    let run = PageRun::new(Ground::LEN / 2, 1024, 1024).unwrap();
    revive(start.addr().get()..start.addr().get() + run.len());
    let want = Want { len: RUN_LEN, least_len: RUN_LEN, align: 8, use_ };
    // SAFETY: the memory is out of the page heap, and was given back.
    pages
        .add_chunk(unsafe { Mapping::new(start, run) }, want, 0, Provided::UNKNOWN, &|work| work(true))
        .unwrap()
        .unwrap()
}

/// The provider has a chunk's memory back and gives it to another context before the first one has said so: what is
/// looked up there is the new chunk.
fn a_chunk_comes_to_where_another_one_is_leaving() {
    let (ground, taken) = (Ground::new(), Place::new());
    explore(3, move || {
        let (pages, taken) = (ground.renew(), taken.fill(AtomicUsize::new(0)));
        let start = ground.memory;
        together(Vec::from([
            spawn(move || {
                let Some(empty) = pages.take_empty(0) else { return };
                let gone = self::taken(empty);
                taken.store(1, Ordering::Release);
                pages.chunk_gone(gone);
            }),
            spawn(move || {
                if taken.load(Ordering::Acquire) == 1 {
                    let block = enter_shorter(pages, start, Use::Slab).start;
                    let found = pages.lookup(block).map(|chunk| chunk.given_len());
                    assert_eq!(found, Some(Ground::LEN / 2), "the chunk that is there");
                }
            }),
        ]));
        assert_eq!(pages.verify(), Ok(()), "P1 to P9");
    });
}

/// Entries of chunks that do not exist: a lookup follows no pointer.
fn entry(start: usize, end: usize) -> Entry {
    Entry::fake(start, end)
}

fn is_found(map: &ChunkMap, entry: &Entry, addr: usize) -> bool {
    map.lookup(addr) == Some(entry.header())
}

/// The slots that a lookup passes are used anew meanwhile, first and last by chunks between which the asked-for one
/// lies: one's start with the other's end would seem to be around it.
fn a_lookup_finds_its_chunk_while_others_come_and_go() {
    let map = Place::new();
    explore(3, move || {
        let map = map.fill(ChunkMap::new());
        let [before, own, behind] = [entry(0x10000, 0x15000), entry(0x15000, 0x16000), entry(0x16000, 0x1b000)];
        map.insert(&before, true).unwrap();
        map.insert(&own, true).unwrap();
        together(Vec::from([
            spawn(move || {
                map.change(&before, Change::Leave);
                map.change(&before, Change::Forget);
                map.insert(&behind, true).unwrap();
                map.change(&behind, Change::Remove);
                map.insert(&before, true).unwrap();
            }),
            spawn(move || assert!(is_found(map, &own, 0x15800))),
        ]));
        assert!(is_found(map, &before, 0x10000) && is_found(map, &own, 0x15000) && !is_found(map, &behind, 0x16000));
        assert_eq!(map.lookup(0x16000), None);
    });
}

/// Two chunks are entered under the same section; a third context looks one up as soon as it hears of it.
fn chunks_are_entered_at_once_and_found_by_who_is_told() {
    let (map, told) = (Place::new(), Place::new());
    explore(3, move || {
        let (map, told) = (map.fill(ChunkMap::new()), told.fill(AtomicUsize::new(0)));
        let chunks = [entry(0x10000, 0x11000), entry(0x10800, 0x11800)];
        let [first, second] = chunks;
        together(Vec::from([
            spawn(move || {
                map.insert(&first, true).unwrap();
                told.store(1, Ordering::Release);
            }),
            spawn(move || map.insert(&second, true).unwrap()),
            spawn(move || assert!(told.load(Ordering::Acquire) == 0 || is_found(map, &first, 0x10400))),
        ]));
        assert!(is_found(map, &first, 0x10400) && is_found(map, &second, 0x11400));
    });
}

/// The last table is taken out, and its memory given back, while others look there.
fn a_table_goes_while_it_is_looked_at() {
    const LEN: usize = 256;
    let (map, table) = (Place::new(), memory(LEN));
    explore(3, move || {
        let map = map.fill(ChunkMap::new());
        // SAFETY: leaked memory, which only this map uses in this execution.
        map.add_table(unsafe { Mapping::new(table, PageRun::new(LEN, 64, 64).unwrap()) }).unwrap();
        let look = || spawn(move || assert_eq!(map.lookup(0x10000), None));
        together(Vec::from([
            look(),
            look(),
            spawn(move || {
                if let Some(table) = map.take_empty_table() {
                    give_back(&table);
                }
            }),
        ]));
    });
}

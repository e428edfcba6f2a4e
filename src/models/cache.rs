//! A cache under its try-lock: several CPUs have the same hint.

use core::ptr::NonNull;
use std::vec::Vec;

use super::{Kept, Place, class, explore, spawn, used};
use crate::base::sync::model::{revive, together};
use crate::cache::CpuCache;
use crate::cache::table::{CpuState, CpuTable};
use crate::pages::Run;
use crate::slab::block::{Block, List};

models! {
    two_contexts_take_turns_at_one_cache
    a_cache_is_drained_while_others_want_it
    a_state_is_made_while_others_look_for_it
    a_state_is_made_once
}

const BLOCK_LEN: usize = 64;
const BLOCKS: usize = 2;

/// A cache with room for as many blocks as there are, all of them in its list.
struct Scene {
    cache: Place<CpuCache>,
    memory: NonNull<u8>,
}

impl Scene {
    fn new() -> Self {
        Self { cache: Place::new(), memory: super::memory(BLOCK_LEN * BLOCKS) }
    }

    fn renew(&self) -> &'static CpuCache {
        let (cache, class) = (self.cache.fill(CpuCache::new()), class(BLOCK_LEN));
        while (cache.limit(class) as usize) < BLOCKS {
            let _ = cache.raise_limit(class, 1 << 20);
        }
        for index in 0..BLOCKS {
            // SAFETY: inside the memory, which has room for so many blocks.
            let start = unsafe { self.memory.add(index * BLOCK_LEN) };
            // SAFETY: leaked memory that this execution uses for one block.
            cache.push(class, unsafe { Block::new(start) }).unwrap();
        }
        cache
    }
}

/// What the fast paths do with the cache, if it is free: take a block, use it, put it back; or keep it if there is no
/// room.
fn take_and_return(cache: &'static CpuCache, out: &Kept<Block>) {
    let class = class(BLOCK_LEN);
    let Some(block) = with(cache, || cache.pop(class)).flatten() else { return };
    let block = used(block);
    let mut block = Some(block);
    with(cache, || block = block.take().and_then(|block| cache.push(class, block).err()));
    block.into_iter().for_each(|block| out.add(block));
}

fn with<R>(cache: &CpuCache, work: impl FnOnce() -> R) -> Option<R> {
    cache.try_lock(0).then(|| {
        let result = work();
        cache.unlock(0);
        result
    })
}

fn check(cache: &CpuCache, out: &[Block]) {
    assert!(cache.verify(), "C1 to C3");
    let count = cache.count(class(BLOCK_LEN)) as usize;
    assert_eq!(count + out.len(), BLOCKS, "a block is lost, or there twice");
    assert!(cache.try_lock(0), "left open");
}

fn two_contexts_take_turns_at_one_cache() {
    let scene = Scene::new();
    explore(8, move || {
        let (cache, out) = (scene.renew(), Kept::new());
        let work = || {
            let out = out.clone();
            spawn(move || take_and_return(cache, &out))
        };
        together(Vec::from([work(), work()]));
        check(cache, &out.take());
    });
}

fn a_cache_is_drained_while_others_want_it() {
    let scene = Scene::new();
    explore(3, move || {
        let (cache, out) = (scene.renew(), Kept::new());
        let work = || {
            let out = out.clone();
            spawn(move || take_and_return(cache, &out))
        };
        let drain = {
            let out = out.clone();
            spawn(move || {
                let lists = with(cache, || cache.empty(class(BLOCK_LEN)));
                let all =
                    lists.into_iter().flatten().flat_map(|mut list: List| core::iter::from_fn(move || list.pop()));
                all.for_each(|block| out.add(used(block)));
            })
        };
        together(Vec::from([work(), work(), drain]));
        check(cache, &out.take());
    });
}

/// A table of two CPUs, and memory for the second one's state.
struct Table {
    table: Place<CpuTable<2>>,
    memory: NonNull<u8>,
}

impl Table {
    fn new() -> Self {
        Self { table: Place::new(), memory: super::memory(size_of::<CpuState>()) }
    }

    fn renew(&self) -> (&'static CpuTable<2>, NonNull<u8>) {
        (self.table.fill(CpuTable::new()), self.memory)
    }
}

/// Makes the second CPU's state if nobody did, as a CPU without one does; true if it did.
fn make(table: &CpuTable<2>, memory: NonNull<u8>) -> bool {
    let Some(_mark) = table.mark(1) else { return false };
    if table.has(1) {
        return false;
    }
    revive(memory.addr().get()..memory.addr().get() + size_of::<CpuState>());
    // SAFETY: leaked memory of that length, whose only user is who has the mark and finds no state.
    table.install(1, unsafe { Run::apart(memory, size_of::<CpuState>()) }, |_| ());
    true
}

/// Who finds it finds it ready.
fn a_state_is_made_while_others_look_for_it() {
    let scene = Table::new();
    explore(3, move || {
        let (table, memory) = scene.renew();
        let look = move || {
            let cache = table.cache_to_try(1, false).unwrap();
            if table.cache(1).is_some_and(|own| core::ptr::eq(own, cache)) {
                assert!(cache.try_lock(1), "nobody else wants it");
                assert_eq!(cache.limit(class(BLOCK_LEN)), 0, "as new");
                cache.unlock(1);
            } else {
                assert!(!cache.try_lock(1), "the first CPU's");
            }
        };
        together(Vec::from([spawn(move || assert!(make(table, memory))), spawn(look)]));
        assert!(table.has(1) && table.iter().count() == 2);
    });
}

/// Two contexts with one hint want it.
fn a_state_is_made_once() {
    let scene = Table::new();
    explore(4, move || {
        let (table, memory) = scene.renew();
        let made = Kept::new();
        let work = || {
            let made = made.clone();
            spawn(move || {
                if make(table, memory) {
                    made.add(());
                }
            })
        };
        together(Vec::from([work(), work()]));
        assert_eq!(made.take().len(), 1);
        assert!(table.cache(1).is_some_and(|cache| cache.try_lock(1)));
    });
}

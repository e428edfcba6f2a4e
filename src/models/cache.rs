//! A cache under its try-lock: several CPUs have the same hint.

use core::ptr::NonNull;
use std::vec::Vec;

use super::{Kept, Place, class, explore, spawn, used};
use crate::base::sync::model::together;
use crate::cache::CpuCache;
use crate::slab::block::{Block, List};

models! {
    two_contexts_take_turns_at_one_cache
    a_cache_is_drained_while_others_want_it
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
    cache.try_lock().then(|| {
        let result = work();
        cache.unlock();
        result
    })
}

fn check(cache: &CpuCache, out: &[Block]) {
    assert!(cache.verify(), "C1 to C3");
    let count = cache.count(class(BLOCK_LEN)) as usize;
    assert_eq!(count + out.len(), BLOCKS, "a block is lost, or there twice");
    assert!(cache.try_lock(), "left open");
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
                let lists = with(cache, || cache.lower(class(BLOCK_LEN), 0));
                let all =
                    lists.into_iter().flatten().flat_map(|mut list: List| core::iter::from_fn(move || list.pop()));
                all.for_each(|block| out.add(used(block)));
            })
        };
        together(Vec::from([work(), work(), drain]));
        check(cache, &out.take());
    });
}

//! Drain and trim, against blocks that return to their slabs and blocks that are wanted.

use core::alloc::Layout;
use core::ptr::NonNull;
use std::vec::Vec;

use super::slab::{Found, Scene, all_of, give};
use super::{Ground, Kept, Place, class, explore, explore_some, memory, spawn, used};
use crate::base::sync::model::{bury, revive, together};
use crate::base::sync::{AtomicBool, Ordering, write};
use crate::cache::CpuCache;
use crate::contract::cpu::Hint;
use crate::contract::provider::{PageProvider, PageRun};
use crate::heap::Heap;
use crate::pages::{Kind, Pages};
use crate::slab::block::Block;
use crate::slab::list::{Bin, Sweep};

models! {
    a_slab_and_its_chunk_go_while_the_last_block_returns
    a_cache_is_drained_into_a_bin_that_is_trimmed
    a_heap_is_trimmed_while_a_block_is_freed
    a_heap_is_trimmed_while_a_block_is_wanted
    two_contexts_want_pages_at_once
}

const BLOCK_LEN: usize = 512;

/// Trims a bin, and gives the chunk back if it is empty then.
fn trim(bin: &'static Bin, pages: &'static Pages<1>, gone: &Kept<()>) {
    let mut left = u32::MAX;
    while bin.sweep(&mut left) == Sweep::More {}
    while let Some(slab) = bin.take_empty() {
        pages.free(slab.desc());
    }
    if let Some(empty) = pages.take_empty(0) {
        pages.chunk_gone(super::pages::taken(empty));
        gone.add(());
    }
}

/// The two blocks of a slab return to their slabs, the slab goes back to its chunk, the chunk to the provider; and
/// somebody takes blocks as long as there are any.
fn a_slab_and_its_chunk_go_while_the_last_block_returns() {
    let scene = Scene::new(BLOCK_LEN);
    explore(1, move || {
        let (bin, pages) = scene.renew();
        let (slab, mut blocks) = scene.emptied(pages);
        let (retired, gone, out) = (Kept::new(), Kept::new(), Kept::new());
        give(bin, slab, Vec::from([blocks.pop().unwrap()]), false, u32::MAX, &retired);
        together(Vec::from([
            spawn(move || {
                // As the engine does without a reserve.
                let duty = slab.push(super::slab::chain(blocks.into_iter().map(used).collect()), false);
                if duty.enlist {
                    bin.enlist(slab);
                }
                if duty.settle {
                    bin.settle(slab, &(0..=0)).into_iter().flatten().for_each(|surplus| pages.free(surplus.desc()));
                }
            }),
            spawn({
                let gone = gone.clone();
                move || trim(bin, pages, &gone)
            }),
            spawn({
                let out = out.clone();
                move || {
                    let taken = bin.take(1, false).ok().flatten();
                    taken.into_iter().flat_map(all_of).for_each(|block| out.add(used(block)));
                }
            }),
        ]));
        let (gone, out) = (gone.take(), out.take());
        assert!(gone.is_empty() || out.is_empty(), "a block of a chunk that is gone");
        assert_eq!(pages.verify(), Ok(()), "P1 to P9");
        if gone.is_empty() && slab.desc().kind() != Kind::Free {
            scene.check(bin, &[slab], &out);
        } else {
            assert!(out.is_empty(), "a block of a slab that is gone");
        }
    });
}

/// A block is in a cache, and its slab has all others. The cache's owner wants it, another context drains the cache, a
/// third one trims the bin.
fn a_cache_is_drained_into_a_bin_that_is_trimmed() {
    let (scene, cache) = (Scene::new(BLOCK_LEN), Place::new());
    explore(3, move || {
        let (bin, pages) = scene.renew();
        let cache: &'static CpuCache = cache.fill(CpuCache::new());
        let (slab, mut blocks): (Found, Vec<Block>) = scene.emptied(pages);
        let (retired, gone, out) = (Kept::new(), Kept::new(), Kept::new());
        let class = class(BLOCK_LEN);
        let _ = cache.raise_limit(class, 1 << 20);
        cache.push(class, blocks.pop().unwrap()).unwrap();
        give(bin, slab, blocks, false, u32::MAX, &retired);
        together(Vec::from([
            spawn({
                let out = out.clone();
                move || {
                    if cache.try_lock(0) {
                        cache.pop(class).into_iter().for_each(|block| out.add(used(block)));
                        cache.unlock(0);
                    }
                }
            }),
            spawn({
                let retired = retired.clone();
                move || {
                    if cache.try_lock(0) {
                        for list in cache.empty(class) {
                            let blocks: Vec<_> = all_of(list);
                            if !blocks.is_empty() {
                                give(bin, slab, blocks, false, u32::MAX, &retired);
                            }
                        }
                        cache.unlock(0);
                    }
                }
            }),
            spawn({
                let gone = gone.clone();
                move || trim(bin, pages, &gone)
            }),
        ]));
        assert!(cache.verify(), "C1 to C3");
        out.take().into_iter().chain(cache.pop(class)).for_each(|block| out.add(block));
        let (gone, out) = (gone.take(), out.take());
        assert!(gone.is_empty() || out.is_empty(), "a block of a chunk that is gone");
        assert_eq!(pages.verify(), Ok(()), "P1 to P9");
        if gone.is_empty() && slab.desc().kind() != Kind::Free {
            scene.check(bin, &[slab], &out);
        } else {
            assert!(out.is_empty(), "a block of a slab that is gone");
        }
    });
}

/// A provider with two chunks' memory.
struct Two<const REENTRANT: bool> {
    memory: NonNull<u8>,
    used: [AtomicBool; 2],
}

impl<const REENTRANT: bool> Two<REENTRANT> {
    fn new(memory: NonNull<u8>) -> Self {
        Self { memory, used: [const { AtomicBool::new(false) }; 2] }
    }

    fn used(&self) -> usize {
        self.used.iter().filter(|used| used.load(Ordering::Relaxed)).count()
    }
}

// SAFETY: each half is given out by whoever set its flag, until that is cleared.
unsafe impl<const REENTRANT: bool> PageProvider for Two<REENTRANT> {
    const PAGE_LEN: usize = 1024;
    const REENTRANT: bool = REENTRANT;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        if run.len() > Ground::LEN {
            return None;
        }
        let index = self.used.iter().position(|used| !used.swap(true, Ordering::Acquire))?;
        // SAFETY: inside the memory of two.
        let start = unsafe { self.memory.add(index * Ground::LEN) };
        revive(start.addr().get()..start.addr().get() + Ground::LEN);
        Some(start)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, _: PageRun) -> bool {
        bury(start.addr().get()..start.addr().get() + Ground::LEN);
        let index = (start.addr().get() - self.memory.addr().get()) / Ground::LEN;
        self.used.get(index).is_some_and(|used| used.swap(false, Ordering::Release))
    }

    fn prefer(&self, run: PageRun) -> PageRun {
        PageRun::new(Ground::LEN, run.align(), 1024).unwrap_or(run)
    }
}

type Small<const REENTRANT: bool> = Heap<Two<REENTRANT>, Hint<fn() -> Option<usize>>, 1>;

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

fn hint() -> Option<usize> {
    Some(0)
}

fn filled<const REENTRANT: bool>(heap: &Small<REENTRANT>, size: usize) -> Option<NonNull<u8>> {
    let block = heap.alloc(layout(size)).ok()?.cast::<u8>();
    // SAFETY: a block of at least 8 bytes, and ours.
    unsafe { write(block.cast::<u64>().as_ptr(), 0xa5) };
    Some(block)
}

fn free<const REENTRANT: bool>(heap: &Small<REENTRANT>, block: NonNull<u8>, size: usize) {
    // SAFETY: as in `filled`.
    unsafe { write(block.cast::<u64>().as_ptr(), 0x5a) };
    // SAFETY: allocated with this Layout, and used no more.
    unsafe { heap.free(block, layout(size)) };
}

fn all_back<const REENTRANT: bool>(heap: &'static Small<REENTRANT>, blocks: Vec<NonNull<u8>>) {
    heap.verify_all().unwrap();
    let count = blocks.len();
    let mut sorted = blocks.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), count, "a block was handed out twice");
    blocks.into_iter().for_each(|block| free(heap, block, BLOCK_LEN));
    heap.trim(0);
    heap.verify_all().unwrap();
    assert_eq!((heap.engine.pages.held_len(), heap.provider().used()), (0, 0), "memory is lost");
}

/// Room for a heap over memory for two chunks, and such a heap, to be copied there.
fn small<const REENTRANT: bool>() -> (Place<Small<REENTRANT>>, Place<Small<REENTRANT>>) {
    let unused = Place::new();
    unused.fill(Heap::new(Two::new(memory(2 * Ground::LEN)), Hint(hint as fn() -> Option<usize>)));
    (Place::new(), unused)
}

/// The whole heap gives back all it can while its last block is freed.
fn a_heap_is_trimmed_while_a_block_is_freed() {
    let (place, unused) = small::<true>();
    explore(1, move || {
        let heap = place.fill_from(&unused);
        let block = filled(heap, BLOCK_LEN).unwrap();
        together(Vec::from([spawn(move || free(heap, block, BLOCK_LEN)), spawn(move || _ = heap.trim(0))]));
        all_back(heap, Vec::new());
    });
}

/// The whole heap gives back all it can while a block is wanted.
fn a_heap_is_trimmed_while_a_block_is_wanted() {
    let (place, unused) = small::<true>();
    explore_some(2, 1000, move || {
        let heap = place.fill_from(&unused);
        let (block, out) = (filled(heap, BLOCK_LEN).unwrap(), Kept::new());
        free(heap, block, BLOCK_LEN);
        together(Vec::from([
            spawn({
                let out = out.clone();
                move || filled(heap, BLOCK_LEN).into_iter().for_each(|block| out.add(block))
            }),
            spawn(move || _ = heap.trim(0)),
        ]));
        let out = out.take();
        assert!(!out.is_empty(), "there is memory");
        all_back(heap, out);
    });
}

/// Two contexts come to an empty heap, over a provider that one may enter at a time.
fn two_contexts_want_pages_at_once() {
    let (place, unused) = small::<false>();
    explore_some(2, 2000, move || {
        let heap = place.fill_from(&unused);
        let out = Kept::new();
        let alloc = || {
            let out = out.clone();
            spawn(move || filled(heap, BLOCK_LEN).into_iter().for_each(|block| out.add(block)))
        };
        together(Vec::from([alloc(), alloc()]));
        let out = out.take();
        assert!(!out.is_empty(), "there is memory");
        all_back(heap, out);
    });
}

//! Slabs over a page heap, in no bin.

use super::*;
use crate::contract::provider::PageRun;
use crate::pages::{Mapping, Pages, Provided, Use, Want};
use core::alloc::Layout;
use std::boxed::Box;
use std::vec::Vec;

/// Granule of a chunk of [`Ground::LEN`] bytes.
const GRANULE: usize = 1024;

/// A page heap over a piece of host memory, to cut slabs from.
pub(crate) struct Ground {
    pub(crate) pages: Box<Pages<1>>,
    memory: NonNull<u8>,
}

impl Ground {
    const LEN: usize = 128 << 10;

    fn run() -> PageRun {
        PageRun::new(Self::LEN, 4096, 4096).unwrap()
    }

    pub(crate) fn new() -> Self {
        let pages = Box::new(Pages::new());
        // SAFETY: the run's length is not 0.
        let memory = NonNull::new(unsafe { std::alloc::alloc(Self::run().layout()) }).unwrap();
        let nothing = Want { len: 0, least_len: 0, align: 1, use_: Use::Slab };
        // SAFETY: just allocated, not zeroed; it goes when the page heap goes.
        pages
            .add_chunk(unsafe { Mapping::new(memory, Self::run()) }, nothing, 0, Provided::UNKNOWN, &|work| work(true))
            .unwrap();
        Self { pages, memory }
    }

    /// A slab that belongs to `owner`, in no list yet.
    pub(crate) fn slab(&self, class: SizeClass, len: usize, owner: usize) -> Slab<'_> {
        let run = self.pages.alloc(len, class.block_align(), Use::Slab, 0, true).unwrap();
        Slab::create(run, class, owner)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; nothing of the page heap touches it when dropped.
        unsafe { std::alloc::dealloc(self.memory.as_ptr(), Self::run().layout()) };
    }
}

pub(crate) fn class(size: usize) -> SizeClass {
    SizeClass::of(Layout::from_size_align(size, 1).unwrap()).unwrap()
}

/// The blocks of a chain, one chain each, in order.
pub(crate) fn singles(chain: Chain) -> Vec<Chain> {
    let mut list = List::new();
    list.prepend(chain);
    core::iter::from_fn(|| list.pop()).map(Chain::new).collect()
}

fn take(slab: Slab<'_>, most: u32) -> (Vec<Chain>, bool) {
    let taken = slab.take(most).unwrap();
    let (count, exhausted) = (taken.chain.count(), taken.exhausted);
    let blocks = singles(taken.chain);
    assert_eq!(blocks.len(), count as usize, "the chain is as long as it says");
    (blocks, exhausted)
}

fn addrs(blocks: &[Chain]) -> Vec<usize> {
    blocks.iter().map(|block| block.first().addr().get()).collect()
}

const NOTHING: Duty = Duty { enlist: false, settle: false };

#[test]
fn fresh_blocks_come_in_order_and_end_with_the_slab() {
    let ground = Ground::new();
    let slab = ground.slab(class(128), GRANULE, 5);
    assert_eq!((slab.capacity(), slab.owner(), slab.class()), (8, 5, class(128)));
    assert!(slab.is_listed() && slab.is_empty());
    let (mut blocks, exhausted) = take(slab, 3);
    assert!(!exhausted && slab.is_listed() && !slab.is_empty());
    let (rest, exhausted) = take(slab, 100);
    assert!(exhausted && !slab.is_listed());
    blocks.extend(rest);
    let start = slab.start().addr().get();
    assert_eq!(addrs(&blocks), (0..8).map(|index| start + 128 * index).collect::<Vec<_>>());
    assert!(slab.take(1).is_none(), "nothing is left");
    assert!(slab.verify());
}

#[test]
fn the_first_push_enlists_and_the_last_one_claims() {
    let ground = Ground::new();
    let slab = ground.slab(class(128), GRANULE, 0);
    let (mut blocks, _) = take(slab, 8);
    assert_eq!(slab.push(blocks.pop().unwrap(), false), Duty { enlist: true, settle: false });
    assert!(slab.is_listed());
    let last = blocks.pop().unwrap();
    for block in blocks {
        assert_eq!(slab.push(block, false), NOTHING);
    }
    assert_eq!(slab.push(last, false), Duty { enlist: false, settle: true });
    assert!(slab.is_claimed() && !slab.is_empty(), "a claimed slab is its claimer's to judge");
    assert!(slab.settle(), "nothing was taken meanwhile");
    assert!(!slab.is_claimed() && slab.is_empty() && slab.verify());
    assert_eq!(slab.counts(), (8, 8));
    slab.renew();
    assert_eq!((slab.counts(), slab.owner(), slab.class()), ((0, 0), 0, class(128)));
    assert!(slab.is_listed() && slab.is_empty() && slab.verify());
}

#[test]
fn renewing_keeps_what_a_slab_is() {
    let ground = Ground::new();
    let slab = ground.slab(class(96), GRANULE, 201);
    let (blocks, _) = take(slab, 4);
    for block in blocks {
        let _ = slab.push(block, true);
    }
    slab.renew();
    assert_eq!((slab.counts(), slab.owner(), slab.class()), ((0, 0), 201, class(96)));
    assert!(slab.is_listed());
}

#[test]
fn a_whole_chain_returns_by_one_push() {
    let ground = Ground::new();
    let slab = ground.slab(class(128), GRANULE, 0);
    let all = slab.take(8).unwrap();
    assert!(all.exhausted);
    assert_eq!(slab.push(all.chain, false), Duty { enlist: true, settle: true });
    assert_eq!(slab.counts(), (8, 8));
    assert!(slab.verify());
}

#[test]
fn a_nested_push_takes_on_no_duty_that_locks() {
    let ground = Ground::new();
    let slab = ground.slab(class(128), GRANULE, 0);
    let (blocks, _) = take(slab, 8);
    for (index, block) in blocks.into_iter().enumerate() {
        assert_eq!(slab.push(block, true), Duty { enlist: index == 0, settle: false });
    }
    assert!(slab.is_empty() && !slab.is_claimed(), "it is left for whoever comes next");
}

#[test]
fn there_is_one_claimer_at_a_time() {
    let ground = Ground::new();
    let slab = ground.slab(class(128), GRANULE, 0);
    let (mut blocks, _) = take(slab, 2);
    let (one, two) = (blocks.pop().unwrap(), blocks.pop().unwrap());
    assert_eq!(slab.push(one, false), NOTHING);
    assert!(slab.push(two, false).settle);
    // Before the claim is settled, the holder of the bin's lock takes a block, and it comes back.
    let (mut again, _) = take(slab, 1);
    assert_eq!(slab.push(again.pop().unwrap(), false), NOTHING, "the first claimer is still to come");
    // And once more; now the claim is settled while the block is out.
    let (mut again, _) = take(slab, 1);
    assert!(!slab.settle(), "not empty at that moment");
    assert!(slab.push(again.pop().unwrap(), false).settle, "the next one may claim");
    assert!(slab.settle());
}

#[test]
fn freed_blocks_go_out_before_fresh_ones_newest_first() {
    let ground = Ground::new();
    let slab = ground.slab(class(128), GRANULE, 0);
    let (blocks, _) = take(slab, 5);
    let order = addrs(&blocks);
    for block in blocks {
        let _ = slab.push(block, true);
    }
    let (some, exhausted) = take(slab, 2);
    assert_eq!((addrs(&some), exhausted), ([order[4], order[3]].into(), false));
    assert_eq!(slab.counts(), (3, 5));
    let (rest, exhausted) = take(slab, 100);
    assert_eq!((addrs(&rest), exhausted), ([order[2], order[1], order[0]].into(), false), "three are still fresh");
    let (fresh, exhausted) = take(slab, 100);
    assert_eq!((fresh.len(), exhausted), (3, true));
    assert!(slab.verify());
}

#[test]
fn what_may_exhaust_a_slab_is_known_before() {
    let ground = Ground::new();
    for freed in 0..=8 {
        for carved in freed..=8 {
            for most in 1..=10 {
                let slab = ground.slab(class(128), GRANULE, 0);
                if carved > 0 {
                    let (blocks, _) = take(slab, carved);
                    for block in blocks.into_iter().take(freed as usize) {
                        let _ = slab.push(block, true);
                    }
                }
                let foreseen = slab.may_exhaust(most);
                let exhausted = slab.take(most).is_none_or(|taken| taken.exhausted);
                assert_eq!(foreseen, exhausted, "{freed} of {carved} carved, {most} asked for");
                ground.pages.free(slab.desc());
            }
        }
    }
}

#[test]
fn every_granule_of_a_slab_knows_its_owner() {
    let ground = Ground::new();
    let slab = ground.slab(class(48), 5 * GRANULE, 77);
    let owners: Vec<_> = Chunk::of(slab.desc()).descs_of(slab.desc()).map(owner_at).collect();
    assert_eq!(owners, [77; 5]);
}

#[test]
fn lengths_leave_little_over_where_a_few_blocks_can_avoid_it() {
    for class in SizeClass::all() {
        for (granule, target) in [(256, 0), (1024, 4096), (4096, 16384), (4096, 65536)] {
            for (most, share) in [(0, 8), (MAX_SLAB_LEN, if granule < 1024 { 8 } else { 32 })] {
                let len = slab_len(class, granule, target, most);
                let capacity = (len / class.block_len()).min(MAX_BLOCKS);
                let left = len - capacity * class.block_len();
                assert!(capacity > 0 && len % granule == 0 && len <= MAX_SLAB_LEN);
                assert!(SPLIT || capacity < MAX_BLOCKS);
                // There is no room for a longer one.
                let share = if SPLIT && len == MAX_SLAB_LEN { 16 } else { share };
                assert!(left * share <= len, "{left} of {len} left over with blocks of {}", class.block_len());
            }
        }
    }
}

/// Each rule that `verify` executes, broken by hand.
#[test]
fn verify_sees_each_rule_broken() {
    let broken = |hurt: &dyn Fn(Slab<'_>, u64)| {
        let ground = Ground::new();
        let slab = ground.slab(class(128), GRANULE, 0);
        let (blocks, _) = take(slab, 6);
        for block in blocks.into_iter().take(4) {
            let _ = slab.push(block, true);
        }
        assert!(slab.verify());
        hurt(slab, slab.load().0);
        !slab.verify()
    };
    let write = |slab: Slab<'_>, word| slab.desc.word.store(word, Ordering::Relaxed);
    let field = |shift| if shift == HEAD_SHIFT { HEAD } else { COUNT };
    let with = |word: u64, shift: u32, value: u64| word & !(field(shift) << shift) | value << shift;
    let link = |slab: Slab<'_>, index: usize, to: *mut u8| {
        // SAFETY: the block is inside the slab, and nobody uses the ones hurt here.
        let block = unsafe { slab.start().add(index * 128) };
        // SAFETY: as above.
        unsafe { crate::slab::block::set_next(block, to, slab.key()) };
    };
    assert!(broken(&|slab, word| write(slab, with(word, CARVED_SHIFT, 3))), "S1: more free than carved");
    assert!(broken(&|slab, word| write(slab, with(word, CARVED_SHIFT, 9))), "S1: more carved than fit");
    assert!(broken(&|slab, word| write(slab, with(word, COUNT_SHIFT, 3))), "S2: a longer list");
    assert!(broken(&|slab, word| write(slab, with(word, COUNT_SHIFT, 5))), "S2: a shorter list");
    assert!(broken(&|slab, word| write(slab, with(word, HEAD_SHIFT, 0))), "S2: no list");
    // Blocks 3, 2, 1, 0 hang on the head; 4 and 5 are out; 6 and 7 are fresh.
    let start = |slab: Slab<'_>, index: usize| slab.start().as_ptr().wrapping_add(index * 128);
    assert!(broken(&|slab, _| link(slab, 1, start(slab, 0).wrapping_add(8))), "S2: not the start of a block");
    assert!(
        broken(&|slab, _| {
            link(slab, 1, start(slab, 6));
            link(slab, 6, null_mut());
        }),
        "S2: a block that was never handed out"
    );
}

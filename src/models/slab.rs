//! Slab word, duties, inbox, and the giving away of empty slabs.

use core::ptr::{self, NonNull};
use std::vec::Vec;

use super::{Ground, Kept, Place, class, explore, spawn, used};
use crate::base::sync::model::{bury, together};
use crate::pages::{Chunk, Kind, PageDesc, Pages, Use};
use crate::slab::block::{Block, Chain, List};
use crate::slab::free_blocks::Places;
use crate::slab::list::{Bin, Shard, Sweep};
use crate::slab::word::Slab;

models! {
    the_first_push_enlists_whoever_is_first
    a_chain_is_pushed_while_blocks_are_taken
    the_last_pushes_against_a_taker
    an_empty_slab_goes_while_its_enlister_is_still_to_come
    a_slab_is_unlinked_against_pushes_in_flight
    a_claim_against_a_taker_and_a_trimmer
    who_takes_gives_back_while_a_claim_is_pending
    two_slabs_arrive_while_one_is_received
    a_slab_gives_pages_while_its_blocks_return_and_are_taken
}

const OWNER: usize = 3;
const SLAB_LEN: usize = 1024;

pub(super) type Found = Slab<'static>;

/// A bin and slabs of its owner, made anew in each execution.
pub(super) struct Scene {
    ground: Ground,
    shard: Place<Shard>,
    block_len: usize,
}

impl Scene {
    pub(super) fn new(block_len: usize) -> Self {
        Self { ground: Ground::new(), shard: Place::new(), block_len }
    }

    pub(super) fn renew(&self) -> (&'static Bin, &'static Pages<1>) {
        let shard = self.shard.fill(Shard::new());
        (shard.bin(class(self.block_len)), self.ground.renew())
    }

    /// A slab that somebody has taken all of: in no list.
    pub(super) fn emptied(&self, pages: &'static Pages<1>) -> (Found, Vec<Block>) {
        let class = class(self.block_len);
        let run = pages.alloc(SLAB_LEN, class.block_align(), Use::Slab, 0, true).unwrap();
        let slab = Slab::create(run, class, OWNER);
        let taken = slab.take(u32::MAX).unwrap();
        assert!(taken.exhausted);
        (slab, blocks(taken.chain))
    }

    /// All is at rest: each slab is found in the bin, and has all its blocks but those that are `out`.
    pub(super) fn check(&self, bin: &Bin, slabs: &[Found], out: &[Block]) {
        let mut starts: Vec<_> = out.iter().map(Block::start).collect();
        starts.sort_unstable();
        assert!(starts.windows(2).all(|pair| pair[0] != pair[1]), "a block was handed out twice");
        assert!(bin.receive_all() && bin.verify(class(self.block_len), OWNER), "B1 to B3");
        for slab in slabs {
            assert!(slab.verify() && !slab.is_claimed(), "S1, S2, S4");
            let (count, carved) = slab.counts();
            let (desc, rest) = (slab.desc(), count + slab.capacity() - carved);
            let within =
                |start: &&NonNull<u8>| Chunk::of(desc).head_of(**start).is_some_and(|head| ptr::eq(head, desc));
            assert_eq!(rest + starts.iter().filter(within).count(), slab.capacity(), "a block is lost");
            assert_eq!(slab.is_listed(), rest > 0, "S3");
            assert_eq!(slab.is_listed(), desc.kind() != Kind::Slab, "S5: in a list if LISTED");
        }
    }
}

pub(super) fn blocks(chain: Chain) -> Vec<Block> {
    let mut list = List::new();
    list.prepend(chain);
    all_of(list)
}

pub(super) fn all_of(mut list: List) -> Vec<Block> {
    core::iter::from_fn(|| list.pop()).collect()
}

pub(super) fn chain(blocks: Vec<Block>) -> Chain {
    let mut blocks = blocks.into_iter();
    let mut chain = Chain::new(blocks.next().unwrap());
    blocks.for_each(|block| chain.push(block));
    chain
}

/// Gives blocks back as the engine does, and gives a slab away that the reserve has no place for.
pub(super) fn give(bin: &'static Bin, slab: Found, blocks: Vec<Block>, nested: bool, keep: u32, retired: &Kept<Found>) {
    let duty = slab.push(chain(blocks.into_iter().map(used).collect()), nested);
    if duty.enlist {
        bin.enlist(slab);
    }
    if duty.settle {
        for surplus in bin.settle(slab, &(keep..=keep)).into_iter().flatten() {
            retire(surplus, retired);
        }
    }
}

/// An empty slab goes, its pages with it: nobody may touch either any more.
fn retire(slab: Found, retired: &Kept<Found>) {
    let (start, len) = (Chunk::start_of(slab.desc()).addr().get(), Chunk::run_len(slab.desc()));
    let desc = ptr::from_ref::<PageDesc>(slab.desc()).addr();
    bury(start..start + len);
    bury(desc..desc + size_of::<PageDesc>());
    retired.add(slab);
}

/// Takes once, and uses what it got.
fn take(bin: &'static Bin, most: u32, out: &Kept<Block>) {
    if let Ok(Some(list)) = bin.take(most, false) {
        all_of(list).into_iter().for_each(|block| out.add(used(block)));
    }
}

/// Trims: sweeps once around and gives away what is empty.
fn trim(bin: &'static Bin, retired: &Kept<Found>) {
    let mut left = u32::MAX;
    while bin.sweep(&mut left) == Sweep::More {}
    while let Some(slab) = bin.take_empty() {
        retire(slab, retired);
    }
}

/// Two blocks return to their slabs to a slab in no list at once: one of them enlists it, at most one settles.
fn the_first_push_enlists_whoever_is_first() {
    let scene = Scene::new(512);
    explore(3, move || {
        let (bin, pages) = scene.renew();
        let (slab, blocks) = scene.emptied(pages);
        let retired = Kept::new();
        let give = |block| {
            let retired = retired.clone();
            spawn(move || give(bin, slab, Vec::from([block]), false, u32::MAX, &retired))
        };
        together(blocks.into_iter().map(give).collect());
        assert!(retired.take().is_empty());
        scene.check(bin, &[slab], &[]);
    });
}

/// A chain returns to its slab while blocks are taken: what is taken is whole, and its links and contents are the
/// taker's.
fn a_chain_is_pushed_while_blocks_are_taken() {
    let scene = Scene::new(256);
    explore(3, move || {
        let (bin, pages) = scene.renew();
        let (slab, mut blocks) = scene.emptied(pages);
        let (retired, out) = (Kept::new(), Kept::new());
        out.add(blocks.pop().unwrap());
        let last = blocks.split_off(2);
        give(bin, slab, last, false, u32::MAX, &retired);
        together(Vec::from([
            spawn({
                let retired = retired.clone();
                move || give(bin, slab, blocks, false, u32::MAX, &retired)
            }),
            spawn({
                let out = out.clone();
                move || (0..2).for_each(|_| take(bin, 2, &out))
            }),
        ]));
        scene.check(bin, &[slab], &out.take());
    });
}

/// The last blocks of a slab in a list return to their slabs at once while another context takes one.
fn the_last_pushes_against_a_taker() {
    let scene = Scene::new(512);
    explore(2, move || {
        let (bin, pages) = scene.renew();
        let (slab, blocks) = scene.emptied(pages);
        let (retired, out) = (Kept::new(), Kept::new());
        let give = |block| {
            let retired = retired.clone();
            spawn(move || give(bin, slab, Vec::from([block]), false, u32::MAX, &retired))
        };
        let mut work: Vec<_> = blocks.into_iter().map(give).collect();
        work.push({
            let out = out.clone();
            spawn(move || take(bin, 1, &out))
        });
        together(work);
        assert!(retired.take().is_empty());
        scene.check(bin, &[slab], &out.take());
    });
}

/// Both blocks of a slab return to their slabs at once, and there is no reserve: who settles gives the slab away, and
/// the other one is done with it.
fn an_empty_slab_goes_while_its_enlister_is_still_to_come() {
    let scene = Scene::new(512);
    explore(3, move || {
        let (bin, pages) = scene.renew();
        let (slab, blocks) = scene.emptied(pages);
        let retired = Kept::new();
        let give = |block| {
            let retired = retired.clone();
            spawn(move || give(bin, slab, Vec::from([block]), false, 0, &retired))
        };
        together(blocks.into_iter().map(give).collect());
        let retired = retired.take();
        assert!(retired.len() <= 1, "given away twice");
        let left = if retired.is_empty() { Vec::from([slab]) } else { Vec::new() };
        scene.check(bin, &left, &[]);
    });
}

/// A slab in a list becomes empty by two pushes, one of them a nested context's, while another context trims: it is
/// given away once, or is found.
fn a_slab_is_unlinked_against_pushes_in_flight() {
    let scene = Scene::new(512);
    explore(2, move || {
        let (bin, pages) = scene.renew();
        let (slab, mut blocks) = scene.emptied(pages);
        let retired = Kept::new();
        give(bin, slab, Vec::from([blocks.pop().unwrap()]), false, u32::MAX, &retired);
        let mut out = Vec::new();
        // One more is out, so that two return to their slabs.
        bin.take(1, false).unwrap().into_iter().for_each(|list| out.extend(all_of(list)));
        blocks.extend(out);
        let give = |(index, block)| {
            let retired = retired.clone();
            spawn(move || give(bin, slab, Vec::from([block]), index == 0, 0, &retired))
        };
        let mut work: Vec<_> = blocks.into_iter().enumerate().map(give).collect();
        work.push({
            let retired = retired.clone();
            spawn(move || trim(bin, &retired))
        });
        together(work);
        let retired = retired.take();
        assert!(retired.len() <= 1, "given away twice");
        let left = if retired.is_empty() { Vec::from([slab]) } else { Vec::new() };
        scene.check(bin, &left, &[]);
    });
}

/// A slab of which one block is out, in the list of partial ones: the block returns to its slab, a claim is made, while
/// another context takes and a third one trims.
fn a_claim_against_a_taker_and_a_trimmer() {
    let scene = Scene::new(512);
    explore(2, move || {
        let (bin, pages) = scene.renew();
        let (slab, mut blocks) = scene.emptied(pages);
        let (retired, out) = (Kept::new(), Kept::new());
        give(bin, slab, Vec::from([blocks.pop().unwrap()]), false, u32::MAX, &retired);
        assert!(bin.receive_all());
        together(Vec::from([
            spawn({
                let retired = retired.clone();
                move || give(bin, slab, blocks, false, 0, &retired)
            }),
            spawn({
                let out = out.clone();
                move || take(bin, 1, &out)
            }),
            spawn({
                let retired = retired.clone();
                move || trim(bin, &retired)
            }),
        ]));
        let (retired, out) = (retired.take(), out.take());
        assert!(retired.len() <= 1 && (retired.is_empty() || out.is_empty()), "given away with a block out");
        let left = if retired.is_empty() { Vec::from([slab]) } else { Vec::new() };
        scene.check(bin, &left, &out);
    });
}

/// The last block returns to its slab, and before its claim is settled another context takes a block and brings it
/// back.
fn who_takes_gives_back_while_a_claim_is_pending() {
    let scene = Scene::new(512);
    explore(4, move || {
        let (bin, pages) = scene.renew();
        let (slab, mut blocks) = scene.emptied(pages);
        let retired = Kept::new();
        give(bin, slab, Vec::from([blocks.pop().unwrap()]), false, u32::MAX, &retired);
        assert!(bin.receive_all());
        together(Vec::from([
            spawn({
                let retired = retired.clone();
                move || give(bin, slab, blocks, false, 0, &retired)
            }),
            spawn({
                let retired = retired.clone();
                move || {
                    let taken = bin.take(1, false).ok().flatten();
                    taken.into_iter().for_each(|list| give(bin, slab, all_of(list), false, 0, &retired));
                }
            }),
        ]));
        let retired = retired.take();
        assert!(retired.len() <= 1, "given away twice");
        let left = if retired.is_empty() { Vec::from([slab]) } else { Vec::new() };
        scene.check(bin, &left, &[]);
    });
}

/// Two slabs arrive in the inbox while the bin's holder receives.
fn two_slabs_arrive_while_one_is_received() {
    let scene = Scene::new(512);
    explore(2, move || {
        let (bin, pages) = scene.renew();
        let (retired, out) = (Kept::new(), Kept::new());
        let slabs = [scene.emptied(pages), scene.emptied(pages)];
        let found = slabs.each_ref().map(|(slab, _)| *slab);
        let mut work = Vec::new();
        for (slab, mut blocks) in slabs {
            out.add(blocks.pop().unwrap());
            let retired = retired.clone();
            work.push(spawn(move || give(bin, slab, blocks, false, u32::MAX, &retired)));
        }
        work.push({
            let out = out.clone();
            spawn(move || (0..2).for_each(|_| take(bin, 1, &out)))
        });
        together(work);
        assert!(retired.take().is_empty());
        scene.check(bin, &found, &out.take());
    });
}

/// Gives the pages of the bin's slabs that no block in use lies in away, as the engine does.
fn punch(bin: &'static Bin, pages: &'static Pages<1>) {
    let (mut left, mut sweep) = (u32::MAX, Sweep::More);
    while sweep == Sweep::More {
        let (seen, sparse) = bin.take_sparse(&mut left);
        sweep = seen;
        let Some((slab, free)) = sparse else { continue };
        // SAFETY: they are blocks of the slab, which has a few.
        let mut places = unsafe { Places::of(slab.start(), slab.class(), free) };
        let lost = slab.punch(&mut places, true, |hole| pages.punch(slab.desc(), hole, false));
        if slab.restore(places.into_chain(), lost) {
            bin.enlist(slab);
        }
    }
}

/// Of four blocks of a granule each, the last one is out, and returns while somebody gives the slab's free granules
/// away and a third one takes.
fn a_slab_gives_pages_while_its_blocks_return_and_are_taken() {
    let scene = Scene::new(256);
    explore(2, move || {
        let (bin, pages) = scene.renew();
        let (slab, mut blocks) = scene.emptied(pages);
        let (retired, out) = (Kept::new(), Kept::new());
        let last = blocks.pop().unwrap();
        give(bin, slab, blocks, false, u32::MAX, &retired);
        assert!(bin.receive_all());
        together(Vec::from([
            spawn({
                let retired = retired.clone();
                move || give(bin, slab, Vec::from([last]), false, 0, &retired)
            }),
            spawn(move || punch(bin, pages)),
            spawn({
                let out = out.clone();
                move || take(bin, 1, &out)
            }),
        ]));
        let (retired, out) = (retired.take(), out.take());
        assert!(retired.len() <= 1 && (retired.is_empty() || out.is_empty()), "given away with a block out");
        let left = if retired.is_empty() { Vec::from([slab]) } else { Vec::new() };
        scene.check(bin, &left, &out);
    });
}

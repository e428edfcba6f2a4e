//! Slabs that are punched, over a page heap.

use super::*;
use crate::slab::block::{Block, List};
use crate::slab::word::tests::{Ground, class, singles};
use proptest::prelude::*;
use std::vec::Vec;

const GRANULE: usize = 1024;

/// A slab of which blocks with those numbers are out.
struct Punched<'a> {
    ground: &'a Ground,
    slab: Slab<'a>,
    out: Vec<Block>,
    given: usize,
}

impl<'a> Punched<'a> {
    fn new(ground: &'a Ground, size: usize, granules: usize, is_out: impl Fn(usize) -> bool) -> Self {
        let slab = ground.slab(class(size), granules * GRANULE, 0);
        let all = singles(slab.take(u32::MAX).unwrap().chain);
        let mut punched = Self { ground, slab, out: Vec::new(), given: 0 };
        for (index, chain) in all.into_iter().enumerate() {
            let mut list = List::new();
            list.prepend(chain);
            punched.out.extend(list.pop());
            if !is_out(index) {
                punched.free_last();
            }
        }
        punched
    }

    fn free_last(&mut self) {
        let chain = crate::slab::block::Chain::new(self.out.pop().unwrap());
        let duty = self.slab.push(chain, true);
        assert!(!duty.settle, "nested");
    }

    fn punch(&mut self, spares: bool) -> usize {
        let (slab, pages) = (self.slab, &self.ground.pages);
        let free = slab.take_all().unwrap();
        // SAFETY: the slab's blocks, of which there are fewer than places.
        let mut places = unsafe { Places::of(slab.start(), slab.class(), free) };
        let mut given = 0;
        let lost = slab.punch(&mut places, spares, |hole| {
            given += hole.len();
            pages.punch(slab.desc(), hole, true)
        });
        let _ = slab.restore(places.into_chain(), lost);
        self.given += given;
        given
    }

    fn check(&self) {
        assert!(self.slab.verify());
        self.ground.pages.verify().unwrap();
        let (count, carved) = self.slab.counts();
        assert_eq!(carved - count, self.out.len());
        assert_eq!(self.slab.is_listed(), count > 0);
        for block in &self.out {
            let head = self.ground.pages.lookup(block.start()).unwrap().head_of(block.start()).unwrap();
            assert!(core::ptr::eq(head, self.slab.desc()), "a block in use finds its slab");
        }
    }

    fn free_len(&self) -> usize {
        self.ground.pages.free_len()
    }

    /// Frees what is out, then the slab.
    fn dissolve(mut self) -> usize {
        while !self.out.is_empty() {
            self.free_last();
            self.check();
        }
        assert!(self.slab.is_empty());
        for part in self.slab.further_parts() {
            self.ground.pages.free_part(self.slab.desc(), part);
        }
        self.ground.pages.free(self.slab.desc());
        self.ground.pages.verify().unwrap();
        self.free_len()
    }
}

#[test]
fn granules_between_blocks_in_use_go_and_the_slab_works_on() {
    let ground = Ground::new();
    let before = ground.pages.free_len();
    let mut punched = Punched::new(&ground, 512, 8, |index| index == 4 || index == 11);
    assert_eq!(punched.punch(true), 5, "all but the first one and two with a block in use");
    punched.check();
    assert!(punched.slab.has_parts());
    assert_eq!(punched.slab.further_parts().collect::<Vec<_>>(), [2..3, 5..6]);
    assert_eq!(punched.free_len(), before - 3 * GRANULE);
    let start = punched.slab.start().addr().get();
    let rest = singles(punched.slab.take(100).unwrap().chain);
    let mut offsets: Vec<_> = rest.iter().map(|block| block.first().addr().get() - start).collect();
    offsets.sort_unstable();
    assert_eq!(offsets, [0, 512, 2560, 5120], "what shares a granule with a block in use");
    assert!(punched.slab.take(1).is_none() && !punched.slab.is_listed());
    rest.into_iter().for_each(|chain| _ = punched.slab.push(chain, true));
    assert_eq!(punched.dissolve(), before);
}

#[test]
fn a_slab_that_was_empty_since_is_not_all_fresh_again() {
    let ground = Ground::new();
    let mut punched = Punched::new(&ground, 512, 8, |index| index == 11);
    punched.punch(true);
    punched.free_last();
    punched.slab.renew();
    punched.check();
    let taken = punched.slab.take(100).unwrap().chain;
    assert_eq!(taken.count(), 4, "two parts of a granule");
    let _ = punched.slab.push(taken, true);
    punched.dissolve();
}

#[test]
fn an_end_that_goes_leaves_a_shorter_slab() {
    let ground = Ground::new();
    let mut punched = Punched::new(&ground, 512, 8, |index| index == 3);
    punched.punch(true);
    assert!(!punched.slab.has_parts());
    assert_eq!((punched.slab.desc().len(), punched.slab.capacity()), (2, 4));
    punched.check();
    punched.dissolve();
}

/// Three blocks of 384 bytes reach into a granule and out of it.
#[test]
fn no_more_is_lost_than_goes_where_that_is_asked_for() {
    let ground = Ground::new();
    let mut punched = Punched::new(&ground, 384, 8, |index| [1, 6].contains(&index));
    let whole = punched.slab.capacity();
    punched.punch(true);
    punched.check();
    let spared = whole - punched.slab.capacity();
    assert!(spared * 384 <= punched.given * GRANULE, "{spared} blocks for {} granules", punched.given);
    assert!(punched.punch(false) > 0, "one between the two goes at a loss");
    punched.check();
    punched.dissolve();
}

#[test]
fn a_pool_whose_lock_is_held_leaves_the_slab_as_it_is() {
    let ground = Ground::new();
    let mut punched = Punched::new(&ground, 512, 8, |index| index == 11);
    let slab = punched.slab;
    // SAFETY: the slab's blocks, of which there are fewer than places.
    let mut places = unsafe { Places::of(slab.start(), slab.class(), slab.take_all().unwrap()) };
    assert_eq!(slab.punch(&mut places, true, |_| false), 0);
    let _ = slab.restore(places.into_chain(), 0);
    assert_eq!((slab.capacity(), slab.counts()), (16, (15, 16)));
    punched.check();
    punched.punch(true);
    punched.dissolve();
}

proptest! {
    /// Any blocks in use, punched twice, with some freed between and others' runs in the holes.
    #[test]
    fn any_slab_can_be_punched_again_and_again(
        size in prop::sample::select(&[24usize, 48, 128, 384, 640, 1000, 1536, 3072, 5120]),
        granules in 1usize..24,
        out in prop::collection::vec(prop::bool::weighted(0.2), 1024),
        spares in any::<bool>(),
    ) {
        let granules = granules.max(class(size).block_len().div_ceil(GRANULE));
        if granules * GRANULE / class(size).block_len() > Places::MOST {
            return Ok(());
        }
        let ground = Ground::new();
        let before = ground.pages.free_len();
        let mut punched = Punched::new(&ground, size, granules, |index| index == 0 || out[index]);
        for _ in 0..3 {
            if punched.slab.counts().0 > 0 && punched.slab.may_have_hole() {
                punched.punch(spares);
                punched.check();
            }
            let others: Vec<_> = core::iter::from_fn(|| {
                ground.pages.alloc(2 * GRANULE, 1, crate::pages::Use::Slab, 0, true).ok()
            }).take(4).map(|run| Slab::create(run, class(64), 1)).collect();
            punched.check();
            others.iter().for_each(|other| ground.pages.free(other.desc()));
            for _ in 0..punched.out.len() / 2 {
                punched.free_last();
            }
            punched.check();
        }
        prop_assert_eq!(punched.dissolve(), before);
    }
}

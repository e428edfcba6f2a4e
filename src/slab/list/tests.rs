//! Bins of partial slabs, without caches.

use super::*;
use crate::slab::word::tests::{Ground, class, singles};
use std::sync::Mutex;
use std::sync::mpsc;
use std::vec::Vec;

const OWNER: usize = 3;
const LEN: usize = 1024;
const ALL: RangeInclusive<u32> = u32::MAX..=u32::MAX;

/// Does `work` while somebody holds the bin's lock.
pub(crate) fn while_locked<R>(bin: &Bin, work: impl FnOnce() -> R) -> R {
    let _held = bin.lock.try_lock().unwrap();
    work()
}

/// A slab of eight blocks that somebody has taken all of: in no list.
fn emptied(ground: &Ground) -> (Slab<'_>, Vec<Chain>) {
    let slab = ground.slab(class(128), LEN, OWNER);
    let taken = slab.take(8).unwrap();
    assert!(taken.exhausted);
    (slab, singles(taken.chain))
}

/// A slab with nothing taken, enlisted.
fn listed<'a>(ground: &'a Ground, bin: &Bin) -> Slab<'a> {
    let slab = ground.slab(class(128), LEN, OWNER);
    bin.enlist(slab);
    slab
}

/// Gives blocks back, and does what that obliges to.
fn give(bin: &Bin, slab: Slab<'_>, chain: Chain) {
    let duty = slab.push(chain, false);
    if duty.enlist {
        bin.enlist(slab);
    }
    assert!(!duty.settle || bin.settle(slab, &ALL)[0].is_none());
}

/// One take, all of it as chains of one.
fn take(bin: &Bin, most: u32) -> Vec<Chain> {
    let mut list = bin.take(most, false).unwrap().unwrap();
    core::iter::from_fn(|| list.pop()).map(Chain::new).collect()
}

fn counts(bin: &Bin) -> (u32, u32) {
    (bin.partial.count(), bin.empty.count())
}

fn is_sound(bin: &Bin) -> bool {
    bin.receive_all() && bin.verify(class(128), OWNER)
}

#[test]
fn one_hold_receives_a_bounded_number_and_none_is_lost() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let mut out = Vec::new();
    for _ in 0..20 {
        let (slab, mut blocks) = emptied(&ground);
        give(&bin, slab, blocks.pop().unwrap());
        out.push((slab, blocks));
    }
    for received in [INBOX_BATCH, 2 * INBOX_BATCH, 20] {
        let block = take(&bin, 1).pop().unwrap();
        let emptied = out.iter().position(|(slab, _)| !slab.is_listed()).unwrap();
        let (slab, blocks) = out.swap_remove(emptied);
        let gone = 20 - u32::try_from(out.len()).unwrap();
        assert_eq!(counts(&bin).0 + gone, received, "slabs linked by holds of the lock");
        core::mem::forget((slab, blocks, block));
    }
    assert!(is_sound(&bin) && counts(&bin) == (17, 0));
}

#[test]
fn one_hold_takes_from_a_bounded_number_of_slabs() {
    let (ground, bin) = (Ground::new(), Bin::new());
    for _ in 0..7 {
        let (slab, mut blocks) = emptied(&ground);
        give(&bin, slab, blocks.pop().unwrap());
    }
    assert_eq!(take(&bin, 100).len(), TAKE_SLABS as usize);
    assert_eq!(take(&bin, 2).len(), 2, "no more than asked for");
    assert_eq!((take(&bin, 100).len(), counts(&bin)), (1, (0, 0)));
    assert!(bin.take(1, false).unwrap().is_none() && bin.looks_empty());
}

#[test]
fn one_hold_sweeps_a_bounded_number_and_a_sweep_ends() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let mut partial = Vec::new();
    for index in 0..40 {
        let (slab, mut blocks) = emptied(&ground);
        let kept = blocks.pop();
        blocks.into_iter().for_each(|block| give(&bin, slab, block));
        if index % 2 == 0 {
            // Became empty by a nested free, which left it listed.
            assert_eq!(slab.push(kept.unwrap(), true), crate::slab::word::Duty { enlist: false, settle: false });
        } else {
            partial.push((slab, kept));
        }
    }
    assert!(bin.receive_all());
    // Whole ones have gone to the reserve when they were received; the others were not.
    assert_eq!(counts(&bin), (20, 20));
    while bin.take_empty().is_some() {}
    for (slab, kept) in partial.iter_mut().skip(1).step_by(2) {
        let _ = slab.push(kept.take().unwrap(), true);
    }
    let mut left = u32::MAX;
    assert_eq!(bin.sweep(&mut left), Sweep::More);
    assert_eq!(left, 20 - SWEEP_SLABS);
    assert_eq!(bin.sweep(&mut left), Sweep::Done);
    assert_eq!(counts(&bin), (10, 10), "wherever in the list they are");
    assert!(is_sound(&bin));
}

#[test]
fn a_sweep_receives_first_and_an_empty_one_is_done() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let mut left = u32::MAX;
    assert_eq!(bin.sweep(&mut left), Sweep::Done);
    for _ in 0..=INBOX_BATCH {
        listed(&ground, &bin);
    }
    assert_eq!(bin.sweep(&mut left), Sweep::More);
    while bin.sweep(&mut left) == Sweep::More {}
    assert_eq!(counts(&bin), (0, INBOX_BATCH + 1));
}

#[test]
fn an_exhausted_slab_is_in_no_list_until_the_first_push() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let slab = listed(&ground, &bin);
    assert_eq!(take(&bin, 5).len(), 5);
    assert_eq!((slab.desc().kind(), counts(&bin)), (Kind::SlabPartial, (1, 0)));
    let mut rest = take(&bin, 5);
    assert_eq!((rest.len(), slab.desc().kind(), slab.is_listed()), (3, Kind::Slab, false));
    assert!(bin.looks_empty() && bin.take(1, false).unwrap().is_none());
    give(&bin, slab, rest.pop().unwrap());
    assert_eq!(take(&bin, 5).len(), 1);
    assert!(is_sound(&bin));
}

#[test]
fn fresh_blocks_are_taken_to_be_joined_at_last() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let slab = ground.slab(class(128), LEN, OWNER);
    let mut blocks = singles(slab.take(3).unwrap().chain);
    bin.enlist(slab);
    give(&bin, slab, blocks.pop().unwrap());
    assert!(bin.take_free(2, true).is_none() && bin.take_free(7, false).is_none(), "one was freed, five are fresh");
    let (_, mut list) = bin.take_free(6, false).unwrap();
    assert_eq!((list.count(), slab.is_listed(), counts(&bin)), (6, false, (0, 0)));
    core::iter::from_fn(|| list.pop()).for_each(|block| give(&bin, slab, Chain::new(block)));
    assert_eq!(slab.counts(), (6, 8));
    assert!(is_sound(&bin) && slab.verify() && counts(&bin) == (1, 0));
}

/// Between the unlinking and the taking, others push: the slab is not exhausted then, and is linked again.
#[test]
fn a_push_between_unlink_and_take_is_found_afterwards() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let (slab, mut blocks) = emptied(&ground);
    give(&bin, slab, blocks.pop().unwrap());
    assert!(bin.receive_all());
    let held = bin.lock.try_lock().unwrap();
    assert!(slab.may_exhaust(1));
    bin.unlink(&held, slab);
    let duty = slab.push(blocks.pop().unwrap(), false);
    assert!(!duty.enlist, "it is LISTED, so its taker puts it back");
    let taken = slab.take(1).unwrap();
    assert!(!taken.exhausted);
    bin.link(&held, slab, Kind::SlabPartial);
    drop(held);
    assert!(is_sound(&bin));
    assert_eq!(take(&bin, 9).len(), 1);
    // And the other order: the take exhausts it, a push enlists it while the taker still holds the lock.
    give(&bin, slab, blocks.pop().unwrap());
    assert!(bin.receive_all());
    let held = bin.lock.try_lock().unwrap();
    let chain = bin.take_from(&held, slab, 1).unwrap();
    assert_eq!(slab.desc().kind(), Kind::Slab);
    give(&bin, slab, chain);
    drop(held);
    assert!(is_sound(&bin) && counts(&bin) == (1, 0));
}

/// Hole 2 of the protocol: the enlister stands between its publishing step and the inbox, the claimer comes first.
#[test]
fn a_claimer_leaves_a_slab_to_its_enlister() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let (slab, mut blocks) = emptied(&ground);
    let first = slab.push(blocks.pop().unwrap(), false);
    assert!(first.enlist);
    let last = blocks.pop().unwrap();
    blocks.into_iter().for_each(|block| give(&bin, slab, block));
    assert!(slab.push(last, false).settle);
    assert!(bin.settle(slab, &(0..=0))[0].is_none(), "not to be given away: the enlister will touch it");
    assert!(!slab.is_claimed() && slab.is_empty() && slab.desc().kind() == Kind::Slab && counts(&bin) == (0, 0));
    bin.enlist(slab);
    assert!(is_sound(&bin) && counts(&bin) == (0, 1), "found empty when it is received");
}

/// The same, the enlister first, and the slab received while the claim is pending.
#[test]
fn a_claimed_slab_is_received_as_partial_and_settled_then() {
    for keep in [0, 1] {
        let (ground, bin) = (Ground::new(), Bin::new());
        let (slab, mut blocks) = emptied(&ground);
        give(&bin, slab, blocks.pop().unwrap());
        let last = blocks.pop().unwrap();
        blocks.into_iter().for_each(|block| give(&bin, slab, block));
        assert!(slab.push(last, false).settle);
        assert!(bin.receive_all());
        assert_eq!((slab.desc().kind(), counts(&bin)), (Kind::SlabPartial, (1, 0)));
        let [surplus, _] = bin.settle(slab, &(keep..=keep));
        assert_eq!((surplus.is_some(), counts(&bin)), (keep == 0, (0, keep)));
        assert_eq!(slab.desc().kind(), if keep == 0 { Kind::Slab } else { Kind::SlabEmpty });
        assert!(bin.verify(class(128), OWNER));
    }
}

/// Holes 1 and 4: whoever trims while a claim is pending must leave the slab to the claimer.
#[test]
fn a_sweep_passes_by_what_a_claimer_is_still_to_settle() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let slab = listed(&ground, &bin);
    let mut blocks = take(&bin, 2);
    give(&bin, slab, blocks.pop().unwrap());
    assert!(slab.push(blocks.pop().unwrap(), false).settle);
    let mut left = u32::MAX;
    while bin.sweep(&mut left) == Sweep::More {}
    assert_eq!(counts(&bin), (1, 0));
    assert!(bin.take_empty().is_none());
    // The claimer comes, finds blocks taken meanwhile, and leaves it too.
    let mut again = take(&bin, 1);
    assert!(bin.settle(slab, &(0..=0))[0].is_none() && slab.is_listed() && counts(&bin) == (1, 0));
    give(&bin, slab, again.pop().unwrap());
    assert_eq!(counts(&bin), (0, 1));
}

/// Hole 10: a claimer that finds the lock busy must not wait; the slab is found empty later.
#[test]
fn a_claim_under_a_busy_lock_is_left_to_the_next_sweep() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let slab = listed(&ground, &bin);
    let mut blocks = take(&bin, 1);
    assert!(slab.push(blocks.pop().unwrap(), false).settle);
    let held = bin.lock.try_lock().unwrap();
    assert!(bin.settle(slab, &(0..=0))[0].is_none());
    assert!(!slab.is_claimed() && slab.is_empty(), "the claim is over, or the slab would be lost");
    drop(held);
    assert_eq!(counts(&bin), (1, 0));
    let mut left = u32::MAX;
    assert_eq!(bin.sweep(&mut left), Sweep::Done);
    assert_eq!(counts(&bin), (0, 1));
    let empty = bin.take_empty().unwrap();
    assert_eq!((empty.desc().kind(), counts(&bin)), (Kind::Slab, (0, 0)));
}

#[test]
fn nobody_waits_for_a_lock_unless_told_to() {
    let (ground, bin) = (Ground::new(), Bin::new());
    listed(&ground, &bin);
    assert!(is_sound(&bin) && counts(&bin) == (0, 1));
    let held = bin.lock.try_lock().unwrap();
    assert!(bin.looks_busy());
    assert_eq!(bin.take(1, false).err(), Some(Busy));
    assert_eq!(bin.take(1, true).err(), Some(Busy), "the wait has a bound");
    assert!(bin.take_empty().is_none());
    assert_eq!(bin.sweep(&mut 1), Sweep::Busy);
    assert!(!bin.receive_all());
    drop(held);
    assert!(bin.take_empty().is_some());
}

#[test]
fn the_reserve_gives_blocks_when_no_partial_slab_has_any() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let empty = listed(&ground, &bin);
    let (partial, mut blocks) = emptied(&ground);
    give(&bin, partial, blocks.pop().unwrap());
    assert!(is_sound(&bin) && counts(&bin) == (1, 1));
    assert_eq!(take(&bin, 1).len(), 1);
    assert_eq!((counts(&bin), empty.counts()), ((0, 1), (0, 0)), "the partial one first");
    let mut blocks = take(&bin, 3);
    assert_eq!((counts(&bin), empty.counts(), empty.desc().kind()), ((1, 0), (0, 3), Kind::SlabPartial));
    // It comes back, and is handed out in order again, from its start.
    blocks.drain(..).for_each(|block| give(&bin, empty, block));
    assert_eq!((counts(&bin), empty.counts()), ((0, 1), (0, 0)));
    assert!(is_sound(&bin));
}

#[test]
fn the_reserve_is_as_long_as_it_is_told_to_be() {
    let (ground, bin) = (Ground::new(), Bin::new());
    let mut surplus = 0;
    for _ in 0..5 {
        let slab = ground.slab(class(128), LEN, OWNER);
        let taken = slab.take(1).unwrap();
        bin.enlist(slab);
        assert!(bin.receive_all());
        assert!(slab.push(taken.chain, false).settle);
        surplus += u32::from(bin.settle(slab, &(3..=3))[0].is_some());
    }
    assert_eq!((counts(&bin), surplus), ((0, 3), 2));
}

/// One context takes, others give back what it took, all on a few slabs: B1 to B3, S1 to S3 hold at the end, and
/// each block is where it belongs.
#[test]
fn one_taker_and_two_pushers_lose_nothing() {
    const SLABS: u32 = 3;
    let (ground, bin) = (Ground::new(), Bin::new());
    let slabs: Vec<_> = (0..SLABS).map(|_| listed(&ground, &bin)).collect();
    let slab_of = |chain: &Chain| {
        let desc = ground.pages.lookup(chain.first()).and_then(|chunk| chunk.head_of(chain.first()));
        desc.and_then(Slab::of).unwrap()
    };
    struct Parcel(Chain);
    // SAFETY: blocks in a chain belong to whoever has the chain.
    unsafe impl Send for Parcel {}
    let (sender, receiver) = mpsc::channel::<Parcel>();
    let receiver = Mutex::new(receiver);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Ok(Parcel(chain)) = { receiver.lock().unwrap().recv() } {
                    let slab = slab_of(&chain);
                    let duty = slab.push(chain, false);
                    if duty.enlist {
                        bin.enlist(slab);
                    }
                    if duty.settle {
                        assert!(bin.settle(slab, &ALL)[0].is_none());
                    }
                }
            });
        }
        for round in 0..20_000_u32 {
            if let Ok(Some(mut list)) = bin.take(1 + round % 8, true) {
                core::iter::from_fn(|| list.pop()).for_each(|block| sender.send(Parcel(Chain::new(block))).unwrap());
            }
        }
        drop(sender);
    });
    assert!(is_sound(&bin));
    let mut left = u32::MAX;
    while bin.sweep(&mut left) == Sweep::More {}
    assert_eq!(counts(&bin), (0, SLABS), "every block is back, every slab is found");
    assert!(is_sound(&bin) && slabs.iter().all(|slab| slab.verify() && !slab.is_claimed()));
}

/// B2 and B3, broken by hand.
#[test]
fn verify_sees_each_rule_broken() {
    let broken = |hurt: &dyn Fn(Slab<'_>, Slab<'_>)| {
        let (ground, bin) = (Ground::new(), Bin::new());
        let empty = listed(&ground, &bin);
        let (partial, mut blocks) = emptied(&ground);
        give(&bin, partial, blocks.pop().unwrap());
        assert!(is_sound(&bin) && counts(&bin) == (1, 1));
        hurt(empty, partial);
        !bin.verify(class(128), OWNER)
    };
    assert!(broken(&|_, partial| partial.desc().set_kind(Kind::Slab)), "B2: kind");
    assert!(broken(&|_, partial| partial.desc().set_kind(Kind::SlabEmpty)), "B2: kind");
    assert!(broken(&|empty, _| empty.desc().set_kind(Kind::SlabPartial)), "B2: kind");
    assert!(broken(&|empty, _| _ = empty.take(1)), "B3: a block is out");
    assert!(!broken(&|_, partial| _ = partial.take(1)), "that is no matter of the bin's");
    let (ground, bin) = (Ground::new(), Bin::new());
    listed(&ground, &bin);
    assert!(is_sound(&bin) && !bin.verify(class(128), OWNER + 1) && !bin.verify(class(64), OWNER), "B2: owner, class");
    let (ground, bin) = (Ground::new(), Bin::new());
    let (partial, mut blocks) = emptied(&ground);
    give(&bin, partial, blocks.pop().unwrap());
    assert!(is_sound(&bin) && !bin.verify(class(128), OWNER + 1) && !bin.verify(class(64), OWNER), "B2: owner, class");
}

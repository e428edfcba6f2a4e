//! Partial slabs: slabs with blocks to give that no cache holds, in bins by class, in shards by CPU.
//!
//! ```text
//! Shard ── Bin (one per class): lock
//!           ├─ partial   slabs with something to give
//!           ├─ empty     slabs that nothing is missing from: the reserve
//!           └─ inbox     slabs that became partial, pushed by anybody without the lock
//! ```
//! A slab always belongs to its owner's bin. Deciding so costs that what others free strands at an idle owner until
//! somebody looks there; in return no slab is handed from CPU to CPU, whose cache lines would follow it, and a claimer
//! knows which lock to take from the slab's word alone.
//!
//! The lock is only ever tried. One hold links at most [`INBOX_BATCH`] slabs and takes from at most [`TAKE_SLABS`],
//! whatever the heap's size.
//!
//! Invariants (executed by `verify`): B1 the links of both lists agree in both directions; B2 each slab in a list has
//! the kind of the list, and class and owner of the bin; B3 every slab in `empty` is empty; B4 at rest
//! each LISTED slab is in exactly one list or the inbox.

use core::ptr::null_mut;

use crate::base::size_class::{CLASS_COUNT, SizeClass};
use crate::base::sync::{AtomicPtr, Held, Ordering, TryLock};
use crate::harden::Damage;
use crate::pages::{Kind, PageDesc};
use crate::slab::block::{Chain, List};
use crate::slab::free_blocks::Places;
use crate::slab::ring::{Ring, pop_inbox};
use crate::slab::word::{Slab, Taken};

/// Slabs moved from the inbox to the lists in one hold of the lock.
pub(crate) const INBOX_BATCH: u32 = 8;

/// Slabs looked at for blocks in one hold of the lock.
const TAKE_SLABS: u32 = 4;

/// Holds of the lock that one count of a bin's slabs may take.
const COUNT_HOLDS: u32 = 64;

/// Slabs looked at in one hold of the lock when one with many free blocks is searched for.
const JOIN_LOOKS: u32 = 4;

/// A slab is dense with free blocks if this share of its blocks is free: then most of them have neighbours.
const JOIN_DENSITY: usize = 4;

/// Slabs looked at in one hold of the lock when empty ones are searched for.
const SWEEP_SLABS: u32 = 16;

/// Slabs whose lists are walked in one hold of the lock.
const VERIFY_SLABS: u32 = 4;

/// One CPU's partial slabs. All zero is the valid empty state.
#[derive(Debug)]
pub(crate) struct Shard {
    bins: [Bin; CLASS_COUNT],
}

/// Partial slabs of one class of one owner.
#[derive(Debug)]
pub(crate) struct Bin {
    lock: TryLock,
    partial: Ring,
    empty: Ring,
    inbox: AtomicPtr<PageDesc>,
    /// Blocks lost out of the slabs' lists.
    pub(crate) damage: Damage,
}

/// Somebody was in the way; what was asked for may be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Busy;

/// What [`Bin::sweep`] got done in one hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sweep {
    /// The lock was busy.
    Busy,
    /// More to look at.
    More,
    /// Everything in the bin was looked at.
    Done,
}

impl Shard {
    pub(crate) const fn new() -> Self {
        Self { bins: [const { Bin::new() }; CLASS_COUNT] }
    }

    #[expect(clippy::indexing_slicing, reason = "a class's index is below CLASS_COUNT")]
    pub(crate) fn bin(&self, class: SizeClass) -> &Bin {
        &self.bins[class.index()]
    }
}

impl Bin {
    const fn new() -> Self {
        Self {
            lock: TryLock::new(),
            partial: Ring::new(),
            empty: Ring::new(),
            inbox: AtomicPtr::new(null_mut()),
            damage: Damage::new(),
        }
    }

    /// Whether there seems to be nothing to take. A guess, without the lock.
    pub(crate) fn looks_empty(&self) -> bool {
        self.partial.is_empty() && self.empty.is_empty() && self.inbox.load(Ordering::Relaxed).is_null()
    }

    /// Whether somebody holds the lock. A guess.
    pub(crate) fn looks_busy(&self) -> bool {
        self.lock.is_held()
    }

    /// Makes a slab known here: the duty `enlist`. Lock-free, callable from any context; the slab is not touched after
    /// the exchange that publishes it.
    pub(crate) fn enlist(&self, slab: Slab<'_>) {
        let link = slab.desc().as_link();
        let mut head = self.inbox.load(Ordering::Relaxed);
        loop {
            slab.desc().next.store(head, Ordering::Relaxed);
            match self.inbox.compare_exchange_weak(head, link, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes up to `most` blocks out of a few slabs. `Err`: there may be blocks, but somebody was in the way, and
    /// stayed there within the spin limit if `wait`.
    pub(crate) fn take(&self, most: u32, wait: bool) -> Result<Option<List>, Busy> {
        if self.looks_empty() {
            return Ok(None);
        }
        let held = if wait { self.lock.lock_bounded() } else { self.lock.try_lock() };
        let held = held.ok_or(Busy)?;
        self.receive(&held);
        let mut list = List::new();
        let mut busy = false;
        for _ in 0..TAKE_SLABS {
            let Some(slab) = self.first(&held).filter(|_| list.count() < most) else { break };
            match self.take_from(&held, slab, most - list.count()) {
                Some(chain) => list.prepend(chain),
                None => {
                    busy = true;
                    self.partial.turn();
                }
            }
        }
        match list.count() {
            0 if busy => Err(Busy),
            0 => Ok(None),
            _ => Ok(Some(list)),
        }
    }

    /// Takes all free blocks out of the first of the next few partial slabs that has `least` of them: if `dense`, freed
    /// ones only, of a slab of which a quarter was freed; else fresh ones too. The next call goes on behind it. Never
    /// waits.
    pub(crate) fn take_free(&self, least: usize, dense: bool) -> Option<(Slab<'_>, List)> {
        if self.looks_empty() {
            return None;
        }
        let held = self.lock.try_lock()?;
        self.receive(&held);
        for _ in 0..JOIN_LOOKS.min(self.partial.count()) {
            // From the back, since what is put back comes to the front.
            self.partial.turn_back();
            let slab = self.partial.first().and_then(Slab::of)?;
            let ((freed, carved), capacity) = (slab.counts(), slab.capacity());
            let (free, enough) =
                if dense { (freed, least.max(capacity / JOIN_DENSITY)) } else { (capacity - carved + freed, least) };
            if free >= enough && capacity <= Places::MOST {
                let mut list = List::new();
                list.prepend(self.take_from(&held, slab, u32::MAX)?);
                // Freed ones came first. A slab that is out of the list now may be on its way back by the inbox.
                if !dense && slab.desc().kind() == Kind::SlabPartial {
                    self.take_from(&held, slab, u32::MAX).into_iter().for_each(|fresh| list.prepend(fresh));
                }
                return Some((slab, list));
            }
        }
        None
    }

    /// Takes from one slab and leaves it in the list where it belongs afterwards. `None`: pushers came in between too
    /// often.
    fn take_from(&self, held: &Held<'_>, slab: Slab<'_>, most: u32) -> Option<Chain> {
        let stays = slab.desc().kind() == Kind::SlabPartial && !slab.may_exhaust(most);
        if stays {
            match slab.take(most) {
                None if slab.is_damaged() => {}
                taken => return taken.map(|taken| taken.chain),
            }
        }
        self.unlink(held, slab);
        match slab.take(most) {
            Some(Taken { chain, exhausted: true }) => Some(chain),
            None if slab.is_damaged() => {
                let (at, count, exhausted) = slab.give_up();
                self.damage.note(at, count);
                if !exhausted {
                    self.link(held, slab, Kind::SlabPartial);
                }
                None
            }
            taken => {
                self.link(held, slab, Kind::SlabPartial);
                taken.map(|taken| taken.chain)
            }
        }
    }

    /// Settles the claim on `slab`, whose owner this is. If the slab stayed empty it joins the reserve; gives a slab
    /// that the reserve, of `keep` slabs, has no place for: the caller owns it. Never waits.
    pub(crate) fn settle<'a>(&self, slab: Slab<'a>, keep: u32) -> Option<Slab<'a>> {
        let Some(held) = self.lock.try_lock() else {
            // It stays among the partial ones: who takes from the bin, or sweeps it, finds it.
            slab.settle();
            return None;
        };
        self.receive(&held);
        // Read while the claim still keeps the slab alive.
        let linked = slab.desc().kind() == Kind::SlabPartial;
        if !slab.settle() || !linked {
            return None;
        }
        self.unlink(&held, slab);
        if self.empty.count() >= keep {
            return Some(slab);
        }
        self.reserve(&held, slab);
        None
    }

    /// Whether the reserve has a slab. A guess.
    pub(crate) fn has_whole(&self) -> bool {
        !self.empty.is_empty()
    }

    /// Takes one slab out of the reserve: the caller owns it. Never waits.
    pub(crate) fn take_empty(&self) -> Option<Slab<'_>> {
        self.take_surplus(0)
    }

    /// Takes one slab out of the reserve if more than `keep` are there: the caller owns it. Never waits.
    pub(crate) fn take_surplus(&self, keep: u32) -> Option<Slab<'_>> {
        let held = self.lock.try_lock().filter(|_| self.empty.count() > keep)?;
        let slab = Slab::of(self.empty.first()?)?;
        self.unlink(&held, slab);
        Some(slab)
    }

    /// Looks at the next few partial slabs and moves empty ones into the reserve, turning the ring so that the
    /// next call goes on behind them. `left` counts down over the calls of one sweep; start it with [`u32::MAX`].
    pub(crate) fn sweep(&self, left: &mut u32) -> Sweep {
        let Some(held) = self.lock.try_lock() else {
            return Sweep::Busy;
        };
        if self.receive(&held) {
            return Sweep::More;
        }
        *left = self.partial.count().min(*left);
        for _ in 0..SWEEP_SLABS.min(*left) {
            let Some(slab) = self.partial.first().and_then(Slab::of) else {
                return Sweep::Done;
            };
            *left -= 1;
            if slab.is_empty() {
                self.unlink(&held, slab);
                self.reserve(&held, slab);
            } else {
                self.partial.turn();
            }
        }
        if *left == 0 { Sweep::Done } else { Sweep::More }
    }

    /// Checks B1 to B3 of all slabs in one hold. False also if the lock is busy.
    pub(crate) fn verify(&self, class: SizeClass, owner: usize) -> bool {
        let Some(_held) = self.lock.try_lock() else { return false };
        [(&self.partial, Kind::SlabPartial), (&self.empty, Kind::SlabEmpty)]
            .iter()
            .all(|(ring, kind)| ring.verify(|desc| belongs(desc, *kind, class, owner)))
    }

    /// Checks B1 to B3 and what each slab tells of itself for the next few slabs, and turns the lists so that the next
    /// call goes on behind them. `left` counts down over the calls, for partial and for empty slabs; start it with
    /// [`u32::MAX`]. `None`: some rule does not hold.
    pub(crate) fn verify_next(&self, class: SizeClass, owner: usize, left: &mut [u32; 2], wait: bool) -> Option<Sweep> {
        let held = if wait { self.lock.lock_bounded() } else { self.lock.try_lock() };
        let Some(held) = held else { return Some(Sweep::Busy) };
        self.receive(&held);
        let mut steps = VERIFY_SLABS;
        let lists = [(&self.partial, Kind::SlabPartial), (&self.empty, Kind::SlabEmpty)];
        for ((ring, kind), left) in lists.into_iter().zip(left.iter_mut()) {
            *left = ring.count().min(*left);
            while *left > 0 && steps > 0 {
                let slab = ring.first().filter(|desc| belongs(desc, kind, class, owner)).and_then(Slab::of)?;
                if !ring.is_first_linked() || !slab.is_listed() || !slab.verify() {
                    return None;
                }
                ring.turn();
                *left -= 1;
                steps -= 1;
            }
        }
        Some(if left.iter().all(|left| *left == 0) { Sweep::Done } else { Sweep::More })
    }

    /// Links everything out of the inbox, at rest only: so that [`verify`](Self::verify) sees all. False if the lock
    /// was busy.
    pub(crate) fn receive_all(&self) -> bool {
        let Some(held) = self.lock.try_lock() else { return false };
        while self.receive(&held) {}
        true
    }

    /// Slabs with something to give, and empty ones in the reserve. Links first what it finds in the inbox, up to
    /// [`COUNT_HOLDS`] batches; if the lock is taken, what is there is not counted. Never waits.
    pub(crate) fn counts(&self) -> (u32, u32) {
        for _ in 0..COUNT_HOLDS {
            if self.inbox.load(Ordering::Relaxed).is_null() {
                break;
            }
            let Some(held) = self.lock.try_lock() else { break };
            self.receive(&held);
        }
        (self.partial.count(), self.empty.count())
    }

    /// Moves a few slabs from the inbox to the lists; true if some may be left.
    fn receive(&self, held: &Held<'_>) -> bool {
        for _ in 0..INBOX_BATCH {
            let Some(slab) = pop_inbox(&self.inbox).and_then(Slab::of) else {
                return false;
            };
            if slab.is_empty() { self.reserve(held, slab) } else { self.link(held, slab, Kind::SlabPartial) }
        }
        !self.inbox.load(Ordering::Relaxed).is_null()
    }

    /// The slab to take from next.
    fn first(&self, _: &Held<'_>) -> Option<Slab<'_>> {
        self.partial.first().or_else(|| self.empty.first()).and_then(Slab::of)
    }

    /// Puts an empty slab, in no list, into the reserve, and makes it all fresh.
    fn reserve(&self, held: &Held<'_>, slab: Slab<'_>) {
        slab.renew();
        self.link(held, slab, Kind::SlabEmpty);
    }

    fn link(&self, _: &Held<'_>, slab: Slab<'_>, kind: Kind) {
        slab.desc().set_kind(kind);
        let ring = if kind == Kind::SlabEmpty { &self.empty } else { &self.partial };
        ring.push(slab.desc());
    }

    fn unlink(&self, _: &Held<'_>, slab: Slab<'_>) {
        let ring = if slab.desc().kind() == Kind::SlabEmpty { &self.empty } else { &self.partial };
        ring.remove(slab.desc());
        slab.desc().set_kind(Kind::Slab);
    }
}

/// B2 and B3 of one slab in the list of that kind.
fn belongs(desc: &PageDesc, kind: Kind, class: SizeClass, owner: usize) -> bool {
    let is_of = |slab: Slab<'_>| {
        (slab.class(), slab.owner()) == (class, owner) && (kind == Kind::SlabPartial || slab.is_empty())
    };
    desc.kind() == kind && Slab::of(desc).is_some_and(is_of)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::slab::word::tests::{Ground, class, singles};
    use std::sync::Mutex;
    use std::sync::mpsc;
    use std::vec::Vec;

    const OWNER: usize = 3;
    const LEN: usize = 1024;

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
        assert!(!duty.settle || bin.settle(slab, u32::MAX).is_none());
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
        assert!(bin.settle(slab, 0).is_none(), "not to be given away: the enlister will touch it");
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
            let surplus = bin.settle(slab, keep);
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
        assert!(bin.settle(slab, 0).is_none() && slab.is_listed() && counts(&bin) == (1, 0));
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
        assert!(bin.settle(slab, 0).is_none());
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
            surplus += u32::from(bin.settle(slab, 3).is_some());
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
                            assert!(bin.settle(slab, u32::MAX).is_none());
                        }
                    }
                });
            }
            for round in 0..20_000_u32 {
                if let Ok(Some(mut list)) = bin.take(1 + round % 8, true) {
                    core::iter::from_fn(|| list.pop())
                        .for_each(|block| sender.send(Parcel(Chain::new(block))).unwrap());
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
        assert!(
            is_sound(&bin) && !bin.verify(class(128), OWNER + 1) && !bin.verify(class(64), OWNER),
            "B2: owner, class"
        );
        let (ground, bin) = (Ground::new(), Bin::new());
        let (partial, mut blocks) = emptied(&ground);
        give(&bin, partial, blocks.pop().unwrap());
        assert!(
            is_sound(&bin) && !bin.verify(class(128), OWNER + 1) && !bin.verify(class(64), OWNER),
            "B2: owner, class"
        );
    }
}

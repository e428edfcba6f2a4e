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

use core::ops::RangeInclusive;

use crate::base::link::Link;
use crate::base::size_class::{CLASS_COUNT, SizeClass};
use crate::base::sync::{Held, Ordering, TryLock};
use crate::base::tuning::{COUNT_HOLDS, INBOX_BATCH, JOIN_DENSITY, JOIN_LOOKS, SWEEP_SLABS, TAKE_SLABS, VERIFY_SLABS};
use crate::harden::Damage;
use crate::pages::{Kind, PageDesc};
use crate::slab::block::{Chain, List};
use crate::slab::free_blocks::Places;
use crate::slab::missed::Missed;
use crate::slab::ring::Ring;
use crate::slab::word::{Slab, Taken};

/// One CPU's partial slabs. All zero is the valid empty state.
#[derive(Debug)]
pub(crate) struct Shard {
    bins: [Bin; CLASS_COUNT],
}

/// Partial slabs of one class of one owner.
#[derive(Debug)]
pub(crate) struct Bin {
    lock: TryLock,
    /// How many slabs the reserve keeps beyond its least.
    pub(crate) missed: Missed,
    partial: Ring,
    empty: Ring,
    inbox: Link<PageDesc>,
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
            missed: Missed::new(),
            partial: Ring::new(),
            empty: Ring::new(),
            inbox: Link::new(),
            damage: Damage::new(),
        }
    }

    /// Whether there seems to be nothing to take. A guess, without the lock.
    pub(crate) fn looks_empty(&self) -> bool {
        self.partial.is_empty() && self.empty.is_empty() && self.inbox.is_empty()
    }

    /// Whether somebody holds the lock. A guess.
    pub(crate) fn looks_busy(&self) -> bool {
        self.lock.is_held()
    }

    /// Makes a slab known here: the duty `enlist`. Lock-free, callable from any context; the slab is not touched after
    /// the exchange that publishes it.
    pub(crate) fn enlist(&self, slab: Slab<'_>) {
        self.inbox.push(slab.desc(), &slab.desc().next, Ordering::AcqRel);
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

    /// Settles the claim on `slab`, whose owner this is. If the slab stayed empty it joins the reserve, which has the
    /// least of `keep` slabs, and within its most as many more as were missed; gives up to two slabs that it has no
    /// place for: the caller owns them. Never waits.
    pub(crate) fn settle<'a>(&'a self, slab: Slab<'a>, keep: &RangeInclusive<u32>) -> [Option<Slab<'a>>; 2] {
        let Some(held) = self.lock.try_lock() else {
            // It stays among the partial ones: who takes from the bin, or sweeps it, finds it.
            slab.settle();
            return [None; 2];
        };
        self.receive(&held);
        // Read while the claim still keeps the slab alive.
        let linked = slab.desc().kind() == Kind::SlabPartial;
        if !slab.settle() || !linked {
            return [None; 2];
        }
        self.unlink(&held, slab);
        let count = self.empty.count();
        if count >= keep.start().saturating_add(self.missed.places()).min(*keep.end()) {
            let spare = if self.missed.full(count) { self.empty.first().and_then(Slab::of) } else { None };
            spare.inspect(|spare| self.unlink(&held, *spare));
            return [Some(slab), spare];
        }
        self.reserve(&held, slab);
        [None; 2]
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

    /// Takes one of the next few partial slabs out that may have a hole, with all its free blocks: it is the caller's,
    /// in no list. `left` counts down as for [`sweep`](Self::sweep).
    pub(crate) fn take_sparse(&self, left: &mut u32) -> (Sweep, Option<(Slab<'_>, List)>) {
        let Some(held) = self.lock.try_lock() else { return (Sweep::Busy, None) };
        if self.receive(&held) {
            return (Sweep::More, None);
        }
        *left = self.partial.count().min(*left);
        for _ in 0..SWEEP_SLABS.min(*left) {
            // From the back, since what is put back comes to the front.
            self.partial.turn_back();
            *left -= 1;
            let Some(slab) = self.partial.first().and_then(Slab::of).filter(|slab| slab.may_have_hole()) else {
                continue;
            };
            self.unlink(&held, slab);
            if let Some(free) = slab.take_all() {
                return (Sweep::More, Some((slab, free)));
            }
            self.link(&held, slab, Kind::SlabPartial);
        }
        (if *left == 0 { Sweep::Done } else { Sweep::More }, None)
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
            if self.inbox.is_empty() {
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
            let Some(slab) = self.inbox.pop(|desc| &desc.next, u32::MAX).and_then(Slab::of) else {
                return false;
            };
            if slab.is_empty() { self.reserve(held, slab) } else { self.link(held, slab, Kind::SlabPartial) }
        }
        !self.inbox.is_empty()
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
        let is_kept = slab.desc().kind() == Kind::SlabEmpty;
        let ring = if is_kept { &self.empty } else { &self.partial };
        ring.remove(slab.desc());
        if is_kept {
            self.missed.used(ring.count());
        }
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
pub(crate) mod tests;

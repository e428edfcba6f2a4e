//! Partial slabs: slabs with blocks to give that no cache holds, in bins by class, in shards by CPU.
//!
//! ```text
//! Shard ── Bin (one per class): lock
//!           ├─ partial   slabs with something to give
//!           ├─ whole     slabs that nothing is missing from: the reserve
//!           └─ inbox     slabs that became partial, pushed by anybody without the lock
//! ```
//! A slab always belongs to its home bin. Deciding so costs that what others free strands at an idle home until
//! somebody looks there; in return no slab is handed from CPU to CPU, whose cache lines would follow it, and a claimer knows
//! which lock to take from the slab's word alone.
//!
//! The lock is only ever tried. One hold links at most [`INBOX_BATCH`] slabs and takes from at most [`TAKE_SLABS`],
//! whatever the heap's size.
//!
//! Invariants (executed by `verify`): B1 the links of both lists agree in both directions; B2 each slab in a list has the kind of the list, and class and
//! home of the bin; B3 every slab in `whole` is whole; B4 at rest
//! each LISTED slab is in exactly one list or the inbox.

use core::ptr::null_mut;

use crate::block::{Chain, List};
use crate::pages::{Kind, PageDesc};
use crate::ring::{Ring, pop_inbox};
use crate::size_class::{CLASS_COUNT, SizeClass};
use crate::slab::{Slab, Taken};
use crate::sync::{AtomicPtr, Held, Ordering, TryLock};

/// Slabs moved from the inbox to the lists in one hold of the lock.
pub(crate) const INBOX_BATCH: u32 = 8;

/// Slabs looked at for blocks in one hold of the lock.
const TAKE_SLABS: u32 = 4;

/// Slabs looked at in one hold of the lock when whole ones are searched for.
const SWEEP_SLABS: u32 = 16;

/// One CPU's partial slabs. All zero is the valid empty state.
#[derive(Debug)]
pub(crate) struct Shard {
    bins: [Bin; CLASS_COUNT],
}

/// Partial slabs of one class at one home.
#[derive(Debug)]
pub(crate) struct Bin {
    lock: TryLock,
    partial: Ring,
    whole: Ring,
    inbox: AtomicPtr<PageDesc>,
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
        Self { lock: TryLock::new(), partial: Ring::new(), whole: Ring::new(), inbox: AtomicPtr::new(null_mut()) }
    }

    /// Whether there seems to be nothing to take. A guess, without the lock.
    pub(crate) fn looks_empty(&self) -> bool {
        self.partial.is_empty() && self.whole.is_empty() && self.inbox.load(Ordering::Relaxed).is_null()
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

    /// Takes up to `most` blocks out of a few slabs. `Err`: there may be blocks, but somebody was in the way, and stayed there within the
    /// spin limit if `wait`.
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

    /// Takes from one slab and leaves it in the list where it belongs afterwards. `None`: pushers came in between too often.
    fn take_from(&self, held: &Held<'_>, slab: Slab<'_>, most: u32) -> Option<Chain> {
        let stays = slab.desc().kind() == Kind::SlabPartial && !slab.may_exhaust(most);
        if stays {
            return slab.take(most).map(|taken| taken.chain);
        }
        self.unlink(held, slab);
        match slab.take(most) {
            Some(Taken { chain, exhausted: true }) => Some(chain),
            taken => {
                self.link(held, slab, Kind::SlabPartial);
                taken.map(|taken| taken.chain)
            }
        }
    }

    /// Settles the claim on `slab`, whose home this is. If the slab stayed whole it joins the reserve; gives a slab that the reserve,
    /// of `keep` slabs, has no place for: the caller owns it. Never waits.
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
        if self.whole.count() >= keep {
            return Some(slab);
        }
        self.reserve(&held, slab);
        None
    }

    /// Whether the reserve has a slab. A guess.
    pub(crate) fn has_whole(&self) -> bool {
        !self.whole.is_empty()
    }

    /// Takes one slab out of the reserve: the caller owns it. Never waits.
    pub(crate) fn take_whole(&self) -> Option<Slab<'_>> {
        let held = self.lock.try_lock()?;
        let slab = Slab::of(self.whole.first()?)?;
        self.unlink(&held, slab);
        Some(slab)
    }

    /// Looks at the next few partial slabs and moves whole ones into the reserve, turning the ring so that the
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
            if slab.is_whole() {
                self.unlink(&held, slab);
                self.reserve(&held, slab);
            } else {
                self.partial.turn();
            }
        }
        if *left == 0 { Sweep::Done } else { Sweep::More }
    }

    /// Checks B1 to B3. At rest.
    pub(crate) fn verify(&self, class: SizeClass, home: usize) -> bool {
        let belongs = |desc: &PageDesc, kind: Kind| {
            Slab::of(desc).is_some_and(|slab| desc.kind() == kind && (slab.class(), slab.home()) == (class, home))
        };
        self.partial.verify(|desc| belongs(desc, Kind::SlabPartial))
            && self.whole.verify(|desc| belongs(desc, Kind::SlabWhole) && Slab::of(desc).is_some_and(Slab::is_whole))
    }

    /// Links everything out of the inbox, at rest only: so that [`verify`](Self::verify) sees all. False if the lock was busy.
    pub(crate) fn receive_all(&self) -> bool {
        let Some(held) = self.lock.try_lock() else { return false };
        while self.receive(&held) {}
        true
    }

    /// Moves a few slabs from the inbox to the lists; true if some may be left.
    fn receive(&self, held: &Held<'_>) -> bool {
        for _ in 0..INBOX_BATCH {
            let Some(slab) = pop_inbox(&self.inbox).and_then(Slab::of) else {
                return false;
            };
            if slab.is_whole() { self.reserve(held, slab) } else { self.link(held, slab, Kind::SlabPartial) }
        }
        !self.inbox.load(Ordering::Relaxed).is_null()
    }

    /// The slab to take from next.
    fn first(&self, _: &Held<'_>) -> Option<Slab<'_>> {
        self.partial.first().or_else(|| self.whole.first()).and_then(Slab::of)
    }

    /// Puts a whole slab, in no list, into the reserve, and makes it all fresh.
    fn reserve(&self, held: &Held<'_>, slab: Slab<'_>) {
        slab.renew();
        self.link(held, slab, Kind::SlabWhole);
    }

    fn link(&self, _: &Held<'_>, slab: Slab<'_>, kind: Kind) {
        slab.desc().set_kind(kind);
        let ring = if kind == Kind::SlabWhole { &self.whole } else { &self.partial };
        ring.push(slab.desc());
    }

    fn unlink(&self, _: &Held<'_>, slab: Slab<'_>) {
        let ring = if slab.desc().kind() == Kind::SlabWhole { &self.whole } else { &self.partial };
        ring.remove(slab.desc());
        slab.desc().set_kind(Kind::Slab);
    }
}

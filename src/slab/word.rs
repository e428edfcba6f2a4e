//! A slab: a page run cut into blocks of one class, and the one word that says everything about it.
//!
//! ```text
//! bit 63       62      56..62  40..56  28..40  16..28  0..16
//! CLAIMED  LISTED      class   owner   carved  count   head
//! ```
//! Where atomics have 32 bits, what changes is the lower half, and slabs are shorter:
//! ```text
//!       bit 48..54  32..48   31       30      21..30  12..21  0..12
//!           class   owner    CLAIMED  LISTED  carved  count   head
//! ```
//! `head` heads the list of freed blocks (offset in steps of 8 bytes, plus one; 0: none), `count` is that list's
//! length; `carved` says how many blocks were ever handed out, the rest are *fresh*; `class` and `owner` (the shard it
//! belongs to) never change while the run is a slab.
//!
//! # Protocol
//! Anybody who owns blocks may push them; only the holder of the owner's lock takes blocks out. Each is one
//! read-modify-write of the word. A push publishes: from then on the slab may be taken, emptied and unmapped by others,
//! so the pusher touches neither blocks nor descriptor again, unless its own step gave it a [`Duty`]:
//!
//! - It set LISTED: the slab had nothing to give and was in no list. Until the pusher enlists it, nobody else can find
//!   it.
//! - It set CLAIMED: its push made the slab *empty* (every carved block is back). The claim keeps the slab from being
//!   given back until the claimer has cleared it. There is one claimer at a time, since the bit is set by
//!   read-modify-write.
//!
//! A nested context never claims: to settle a claim means to take a lock. It leaves the slab listed; whoever takes from
//! the bin next, or trims, finds it there.
//!
//! Invariants (those numbered S are executed by `verify`):
//! - S1: `count <= carved <= capacity`.
//! - S2: the list from `head` has `count` blocks, each inside the slab at a multiple of the block length, none twice.
//! - S3: a slab that is not LISTED has `count = 0` and nothing fresh, or one context owns it alone.
//! - S4: at rest no slab is CLAIMED.
//! - S5: at rest a slab is in its owner's lists exactly if it is LISTED.
//!
//! There is one popper at a time and the word changes by read-modify-write only, so a list cannot change under its
//! popper except in front, which changes `head`: no ABA tag is needed. The release sequence carries every earlier
//! pusher's links to the popper.

#![expect(unsafe_code, reason = "blocks by their place in a slab")]

use core::ops::Range;
use core::ptr::{NonNull, null_mut};

use crate::base::size_class::SizeClass;
use crate::base::sync::{Ordering, SPLIT};
use crate::base::tuning::TAKE_TRIES;
use crate::harden::Key;
use crate::pages::{Chunk, Kind, PageDesc, Run};
use crate::slab::block::{Chain, List, peek};

const HEAD_SHIFT: u32 = 0;
const HEAD_BITS: u32 = if SPLIT { 12 } else { 16 };
pub(crate) const COUNT_SHIFT: u32 = HEAD_SHIFT + HEAD_BITS;
const COUNT_BITS: u32 = if SPLIT { 9 } else { 12 };
pub(crate) const CARVED_SHIFT: u32 = COUNT_SHIFT + COUNT_BITS;
pub(crate) const OWNER_SHIFT: u32 = if SPLIT { 32 } else { CARVED_SHIFT + COUNT_BITS };
const OWNER_BITS: u32 = 16;
const CLASS_SHIFT: u32 = PageDesc::CLASS_SHIFT;
const _: () = assert!(CLASS_SHIFT == OWNER_SHIFT + OWNER_BITS);
const CLASS_BITS: u32 = 6;
pub(crate) const LISTED: u64 = 1 << if SPLIT { CARVED_SHIFT + COUNT_BITS } else { CLASS_SHIFT + CLASS_BITS };
pub(crate) const CLAIMED: u64 = LISTED << 1;
const _: () = assert!(CLAIMED == 1 << if SPLIT { 31 } else { 63 }, "what changes is changed by one instruction");
/// Class and owner: what never changes.
pub(crate) const IDENTITY: u64 = ((1 << (CLASS_BITS + OWNER_BITS)) - 1) << OWNER_SHIFT;
const HEAD: u64 = (1 << HEAD_BITS) - 1;
/// `count` and `carved`.
const COUNT: u64 = (1 << COUNT_BITS) - 1;
const OWNER: u64 = (1 << OWNER_BITS) - 1;
const CLASS: u64 = (1 << CLASS_BITS) - 1;
const HEAD_UNIT: usize = 8;

/// The most shards there can be.
pub(crate) const MAX_OWNERS: usize = 1 << OWNER_BITS;

/// The most blocks in a slab.
const MAX_BLOCKS: usize = (1 << COUNT_BITS) - 1;

/// The longest slab in bytes.
pub(crate) const MAX_SLAB_LEN: usize = if SPLIT { 32 } else { 256 } << 10;
const _: () = assert!(
    MAX_SLAB_LEN / HEAD_UNIT <= 1 << HEAD_BITS && HEAD_UNIT * MAX_BLOCKS < MAX_SLAB_LEN,
    "an offset plus one fits, also of the last block: either has a length of two units, or is one of so many"
);
const _: () = assert!(MAX_SLAB_LEN >= SizeClass::LONGEST.block_len(), "a block of every class has a slab");

/// What a push made the pusher responsible for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a forgotten duty hides the slab for good"]
pub(crate) struct Duty {
    /// Put the slab into its owner's inbox.
    pub(crate) enlist: bool,
    /// Afterwards, settle the claim at the owner's bin.
    pub(crate) settle: bool,
}

/// What came out of a slab.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) chain: Chain,
    /// Nothing is left in the slab and it is no longer LISTED. From that moment a pusher may enlist it again, so a
    /// taker unlinks it *before* it takes what [may be](Slab::may_exhaust) all.
    pub(crate) exhausted: bool,
}

/// The slab that a descriptor describes. Holding one says nothing about who owns the slab.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slab<'a> {
    desc: &'a PageDesc,
}

/// The word, unpacked by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word(u64);

impl Word {
    fn head(self) -> u64 {
        self.0 >> HEAD_SHIFT & HEAD
    }
    fn count(self) -> u64 {
        self.0 >> COUNT_SHIFT & COUNT
    }
    fn carved(self) -> u64 {
        self.0 >> CARVED_SHIFT & COUNT
    }
    fn is(self, flag: u64) -> bool {
        self.0 & flag != 0
    }
    fn is_empty(self) -> bool {
        self.count() == self.carved()
    }
    fn with_head(self, head: u64) -> Self {
        Self(self.0 & !(HEAD << HEAD_SHIFT) | head << HEAD_SHIFT)
    }
}

/// How long a slab of a class should be, in bytes: a multiple of `granule` that holds at least one block and comes
/// close to `target`. A few blocks are added if less is then left over behind the last one: up to `most` bytes until
/// that is at most a 32nd, else an eighth. At most [`MAX_BLOCKS`] blocks fit.
pub(crate) fn slab_len(class: SizeClass, granule: usize, target: usize, most: usize) -> usize {
    let block_len = class.block_len();
    // Half of what there is room for leaves some to add.
    let target = if SPLIT { target.min(MAX_SLAB_LEN / 2) } else { target };
    let mut used_len = target.checked_div(block_len).unwrap_or(0).clamp(1, MAX_BLOCKS / 2) * block_len;
    for _ in 0..16 {
        let len = round_up(used_len, granule);
        if len - used_len <= len / if len <= most { 32 } else { 8 } {
            break;
        }
        used_len += block_len;
    }
    round_up(used_len, granule).min(MAX_SLAB_LEN)
}

/// `len` rounded up to a multiple of `granule`, a power of two.
fn round_up(len: usize, granule: usize) -> usize {
    len.wrapping_add(granule.wrapping_sub(1)) & granule.wrapping_neg()
}

/// The word of a descriptor that belongs to no slab: no class has that number.
#[cfg(feature = "hardened")]
pub(crate) const NO_SLAB: u64 = CLASS << CLASS_SHIFT;

/// The class of the slab that a granule belongs to, as an index: any granule's descriptor will do. None's, if there is
/// no slab.
#[cfg(feature = "hardened")]
#[inline]
pub(crate) fn class_index_at(desc: &PageDesc) -> usize {
    (desc.word.load(Ordering::Relaxed) >> CLASS_SHIFT & CLASS) as usize
}

/// The owner of the slab that a granule belongs to: any granule's descriptor will do.
#[inline]
pub(crate) fn owner_at(desc: &PageDesc) -> usize {
    (desc.word.load(Ordering::Relaxed) >> OWNER_SHIFT & OWNER) as usize
}

impl<'a> Slab<'a> {
    /// The slab whose first granule `desc` describes, `None` if that is no slab.
    pub(crate) fn of(desc: &'a PageDesc) -> Option<Self> {
        match desc.kind() {
            Kind::Slab | Kind::SlabPartial | Kind::SlabEmpty => Some(Self { desc }),
            _ => None,
        }
    }

    /// Makes a run that was taken for this purpose a slab: all fresh, LISTED, in no list yet.
    #[expect(clippy::needless_pass_by_value, reason = "the run is the slab's from now on")]
    pub(crate) fn create(run: Run<'a>, class: SizeClass, owner: usize) -> Self {
        let desc = run.desc;
        let slab = Self { desc };
        // Zeroed or not: there are no parts.
        desc.set(Kind::Slab, desc.len(), false);
        let word = (class.index() as u64) << CLASS_SHIFT | (owner as u64 & OWNER) << OWNER_SHIFT;
        for rest in Chunk::of(desc).descs_of(desc).skip(1) {
            rest.word.store(word, Ordering::Relaxed);
        }
        desc.word.store(word | LISTED, Ordering::Release);
        slab
    }

    pub(crate) fn desc(self) -> &'a PageDesc {
        self.desc
    }

    pub(crate) fn owner(self) -> usize {
        owner_at(self.desc)
    }

    pub(crate) fn class(self) -> SizeClass {
        let index = (self.load().0 >> CLASS_SHIFT & CLASS) as usize;
        SizeClass::from_index(index).unwrap_or(SizeClass::LONGEST)
    }

    /// The addresses in it.
    pub(crate) fn addrs(self) -> Range<usize> {
        let start = self.start().as_ptr().addr();
        start..start + Chunk::run_len(self.desc)
    }

    /// How many blocks fit into its first part, and can be counted.
    pub(crate) fn fit(self) -> usize {
        let fit = Chunk::run_len(self.desc) / self.class().block_len();
        if SPLIT { fit.min(MAX_BLOCKS) } else { fit }
    }

    /// How many blocks it has.
    pub(crate) fn capacity(self) -> usize {
        self.fit().max(self.counts().1)
    }

    /// Blocks in the free list and blocks ever handed out, at one moment.
    #[expect(clippy::cast_possible_truncation, reason = "a few bits each")]
    pub(crate) fn counts(self) -> (usize, usize) {
        let word = self.load();
        (word.count() as usize, word.carved() as usize)
    }

    pub(crate) fn is_listed(self) -> bool {
        self.load().is(LISTED)
    }

    pub(crate) fn is_claimed(self) -> bool {
        self.load().is(CLAIMED)
    }

    /// Whether every block is here and nobody has a claim: then the holder of the bin's lock owns the slab.
    pub(crate) fn is_empty(self) -> bool {
        let word = self.load();
        word.is_empty() && !word.is(CLAIMED)
    }

    fn load(self) -> Word {
        Word(self.desc.word.load(Ordering::Acquire))
    }

    /// What the links of its blocks are written under.
    pub(crate) fn key(self) -> Key {
        Chunk::of(self.desc).key()
    }

    pub(crate) fn start(self) -> NonNull<u8> {
        Chunk::start_of(self.desc)
    }

    fn replace(self, old: Word, new: Word) -> bool {
        self.desc.word.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The first free block, by the word's `head`.
    fn head_of(self, word: Word) -> *mut u8 {
        #[expect(clippy::cast_possible_truncation, reason = "an offset in a slab")]
        match word.head() as usize {
            0 => null_mut(),
            steps => self.start().as_ptr().wrapping_add((steps - 1) * HEAD_UNIT),
        }
    }

    /// `head` for a block of this slab, or 0 for null.
    fn head_for(self, block: *mut u8) -> u64 {
        if block.is_null() {
            return 0;
        }
        let offset = block.addr().wrapping_sub(self.start().addr().get());
        (offset / HEAD_UNIT + 1) as u64 & HEAD
    }

    /// Gives blocks of this slab back to it. Callable from any context, always succeeds, needs no memory; lock-free.
    ///
    /// `nested`: the caller may have interrupted the heap, so it takes on no duty that needs a lock.
    pub(crate) fn push(self, mut chain: Chain, nested: bool) -> Duty {
        let head = self.head_for(chain.first().as_ptr());
        loop {
            let old = self.load();
            chain.set_end(self.head_of(old), self.key());
            let mut new = old.with_head(head);
            new.0 = new.0.wrapping_add(u64::from(chain.count()) << COUNT_SHIFT) | LISTED;
            let settle = !nested && new.is_empty() && !old.is(CLAIMED);
            if settle {
                new.0 |= CLAIMED;
            }
            if self.replace(old, new) {
                return Duty { enlist: !old.is(LISTED), settle };
            }
        }
    }

    /// Whether [`take`](Self::take) of `most` blocks could leave nothing. If not, it cannot do so later either: pushers
    /// only add. The caller holds the owner's lock.
    pub(crate) fn may_exhaust(self, most: u32) -> bool {
        let word = self.load();
        let fresh = (self.fit() as u64).saturating_sub(word.carved());
        if word.count() > 0 { fresh == 0 && word.count() <= u64::from(most) } else { fresh <= u64::from(most) }
    }

    /// Takes up to `most` blocks (at least 1 is asked for): freed ones if there are any, else fresh ones. The caller
    /// holds the owner's lock, or owns the slab alone. `None`: nothing there, or pushers came in between too often.
    pub(crate) fn take(self, most: u32) -> Option<Taken> {
        let capacity = self.fit() as u64;
        let most = u64::from(most.max(1));
        for _ in 0..TAKE_TRIES {
            let word = self.load();
            let taken = if word.count() > 0 {
                self.take_freed(word, most.min(word.count()), capacity)
            } else if word.carved() < capacity {
                self.take_fresh(word, most.min(capacity - word.carved()), capacity)
            } else {
                return None;
            };
            if taken.is_some() {
                return taken;
            }
        }
        None
    }

    #[expect(clippy::cast_possible_truncation, reason = "counts are short")]
    fn take_freed(self, old: Word, count: u64, capacity: u64) -> Option<Taken> {
        let head = NonNull::new(self.head_of(old))?;
        // SAFETY: the word says that `count` blocks and maybe more hang on `head`; the bin's lock makes us the only
        // popper.
        let (last, rest) = unsafe { peek(head, count as u32, self.key()) }?;
        let exhausted = count == old.count() && old.carved() >= capacity;
        let mut new = Word(old.0 - (count << COUNT_SHIFT)).with_head(self.head_for(rest));
        if exhausted {
            new.0 &= !LISTED;
        }
        if !self.replace(old, new) {
            return None;
        }
        // SAFETY: the exchange unhooked exactly these blocks: `head` had not moved, and behind it nobody else takes.
        let chain = unsafe { Chain::from_raw(head, last, count as u32, self.key()) };
        Some(Taken { chain, exhausted })
    }

    #[expect(clippy::cast_possible_truncation, reason = "counts are short")]
    fn take_fresh(self, old: Word, count: u64, capacity: u64) -> Option<Taken> {
        let exhausted = old.carved() + count == capacity;
        let mut new = Word(old.0 + (count << CARVED_SHIFT));
        if exhausted {
            new.0 &= !LISTED;
        }
        if !self.replace(old, new) {
            return None;
        }
        Some(Taken { chain: self.carve(old.carved() as usize, count as u32), exhausted })
    }

    /// Fresh blocks from that one on, which the caller's exchange has just made carved ones.
    #[inline]
    fn carve(self, from: usize, count: u32) -> Chain {
        let block_len = self.class().block_len();
        // SAFETY: `from + count` blocks fit the first part, so the offset is inside it.
        let start = unsafe { self.start().add(from * block_len) };
        // SAFETY: blocks from `carved` on were never handed out, and the exchange made `count` of them the caller's.
        unsafe { Chain::carve(start, block_len, count, self.key()) }
    }

    /// Takes all its blocks that are free, fresh ones too, and leaves it LISTED, in no list. The caller holds the bin's
    /// lock and has unlinked it. `None`: it is empty, or its list is damaged, or pushers came in between too often.
    #[expect(clippy::cast_possible_truncation, reason = "counts are short")]
    #[cold]
    #[inline(never)]
    pub(crate) fn take_all(self) -> Option<List> {
        let fit = self.fit() as u64;
        for _ in 0..TAKE_TRIES {
            let old = self.load();
            if old.is_empty() || old.is(CLAIMED) {
                return None;
            }
            let fresh = fit.saturating_sub(old.carved());
            let freed = match NonNull::new(self.head_of(old)) {
                // SAFETY: the word says that `count` blocks hang on `head`; the bin's lock makes us the only popper.
                Some(head) => Some((head, unsafe { peek(head, old.count() as u32, self.key()) }?.0)),
                None => None,
            };
            let new = Word(old.0 - (old.count() << COUNT_SHIFT) + (fresh << CARVED_SHIFT)).with_head(0);
            if !self.replace(old, new) {
                continue;
            }
            let mut list = List::new();
            if fresh > 0 {
                list.prepend(self.carve(old.carved() as usize, fresh as u32));
            }
            if let Some((head, last)) = freed {
                // SAFETY: the exchange unhooked exactly these blocks: `head` had not moved.
                list.prepend(unsafe { Chain::from_raw(head, last, old.count() as u32, self.key()) });
            }
            return Some(list);
        }
        None
    }

    /// Gives blocks that [`take_all`](Self::take_all) took back, but for `lost` ones, which are no blocks of it any
    /// more. True: it has something to give, so it is LISTED, and the caller enlists it. If all its blocks are back it
    /// is left to who takes from the bin next, or sweeps it, as by a nested [`push`](Self::push).
    #[cold]
    #[inline(never)]
    pub(crate) fn restore(self, mut chain: Option<Chain>, lost: usize) -> bool {
        let count = chain.as_ref().map_or(0, |chain| u64::from(chain.count()));
        loop {
            let old = self.load();
            let mut new = Word(old.0 + (count << COUNT_SHIFT) - ((lost as u64) << CARVED_SHIFT));
            if let Some(chain) = &mut chain {
                chain.set_end(self.head_of(old), self.key());
                new = new.with_head(self.head_for(chain.first().as_ptr()));
            }
            let has_some = new.count() > 0;
            new.0 = new.0 & !LISTED | (LISTED * u64::from(has_some));
            if self.replace(old, new) {
                return has_some;
            }
        }
    }

    /// Makes an empty slab all fresh again, so that its blocks are next handed out in order, unless it has several
    /// parts. The caller holds the bin's lock and saw
    /// [`is_empty`](Self::is_empty): no block is out, so nobody pushes.
    pub(crate) fn renew(self) {
        if !self.has_parts() {
            self.desc.word.fetch_and(IDENTITY | LISTED, Ordering::AcqRel);
        }
    }

    /// Clears the claim; true if the slab was empty at that moment. The caller is the claimer and holds the bin's lock.
    pub(crate) fn settle(self) -> bool {
        Word(self.desc.word.fetch_and(!CLAIMED, Ordering::AcqRel)).is_empty()
    }

    /// Whether the free list has a link that somebody has overwritten. The caller holds the bin's lock.
    #[cfg(not(feature = "hardened"))]
    pub(crate) fn is_damaged(self) -> bool {
        false
    }

    /// Whether the free list has a link that somebody has overwritten. The caller holds the bin's lock.
    #[cfg(feature = "hardened")]
    pub(crate) fn is_damaged(self) -> bool {
        let word = self.load();
        let head = NonNull::new(self.head_of(word));
        #[expect(clippy::cast_possible_truncation, reason = "counts are short")]
        // SAFETY: the word says that `count` blocks hang on `head`; the bin's lock makes us the only popper.
        head.is_some_and(|head| unsafe { peek(head, word.count() as u32, self.key()) }.is_none())
    }

    /// Loses the free list, whose blocks count as handed out from now on: where it began, how many they were, and
    /// whether nothing is left in the slab, which then is no longer LISTED. The caller holds the bin's lock and has
    /// unlinked the slab.
    #[expect(clippy::cast_possible_truncation, reason = "counts are short")]
    pub(crate) fn give_up(self) -> (NonNull<u8>, u32, bool) {
        loop {
            let old = self.load();
            let exhausted = old.carved() >= self.fit() as u64;
            let mut new = Word(old.0 - (old.count() << COUNT_SHIFT)).with_head(0);
            if exhausted {
                new.0 &= !LISTED;
            }
            if self.replace(old, new) {
                return (NonNull::new(self.head_of(old)).unwrap_or(self.start()), old.count() as u32, exhausted);
            }
        }
    }

    /// Makes the run's descriptors say that it is no slab. The caller owns the slab and gives its pages back.
    #[cfg(feature = "hardened")]
    pub(crate) fn dissolve(self) {
        for rest in Chunk::of(self.desc).descs_of(self.desc).skip(1) {
            rest.word.store(NO_SLAB, Ordering::Relaxed);
            rest.set(Kind::Inside, 0, false);
        }
        self.desc.word.store(NO_SLAB, Ordering::Relaxed);
    }

    /// Makes its blocks forget that they were ever handed out. The caller owns the slab and gives its pages back.
    #[cfg(feature = "debug-heap")]
    pub(crate) fn wipe(self) {
        for index in 0..self.capacity() {
            if let Some(start) = self.frame_place(index) {
                // SAFETY: the block is the caller's, with room for a frame.
                unsafe { crate::harden::debug::wipe(start) };
            }
        }
    }

    /// The start of a block that is long enough for a frame.
    #[cfg(feature = "debug-heap")]
    pub(crate) fn frame_place(self, index: usize) -> Option<NonNull<u8>> {
        let len = self.class().block_len();
        let start = self.start().as_ptr().wrapping_add(index * len);
        if len >= crate::harden::debug::SHORTEST_LEN && index < self.capacity() { NonNull::new(start) } else { None }
    }

    /// Which block an address in the slab lies in.
    #[cfg(feature = "debug-heap")]
    pub(crate) fn index_around(self, place: NonNull<u8>) -> Option<usize> {
        place.as_ptr().addr().checked_sub(self.start().as_ptr().addr())?.checked_div(self.class().block_len())
    }

    /// Which block begins at `place`, if one can.
    #[cfg(feature = "hardened")]
    pub(crate) fn block_index(self, place: NonNull<u8>) -> Option<usize> {
        let offset = place.as_ptr().addr().checked_sub(self.start().as_ptr().addr())?;
        let index = offset / self.class().block_len();
        (offset % self.class().block_len() == 0 && (index < self.fit() || self.has_parts())).then_some(index)
    }

    /// Whether that block was ever handed out, and is one still.
    #[inline(never)]
    pub(crate) fn was_out(self, index: usize) -> bool {
        if self.has_parts() { self.has_block(index) } else { index < self.counts().1 }
    }

    /// Walks the free list as it is at one moment and checks S1, S2. The caller holds the owner's lock, or owns the
    /// slab alone.
    #[expect(clippy::cast_possible_truncation, reason = "a few bits each")]
    pub(crate) fn verify(self) -> bool {
        let word = self.load();
        let (count, carved) = (word.count() as usize, word.carved() as usize);
        let is_sound = if self.has_parts() { self.is_parted_whole() } else { carved <= self.fit() };
        if count > carved || !is_sound {
            return false;
        }
        let block_len = self.class().block_len();
        let start = self.start().addr().get();
        let mut block = self.head_of(word);
        for _ in 0..count {
            let offset = block.addr().wrapping_sub(start);
            let Some(here) = NonNull::new(block) else { return false };
            if offset % block_len != 0 || !self.was_out(offset / block_len) {
                return false;
            }
            // SAFETY: the bin's lock, which the caller holds, makes it the only popper, and pushers change nothing
            // behind the head that was read: the block is in the list, one of the slab's, as was just checked.
            let Some(next) = (unsafe { crate::slab::block::next(here, self.key()) }) else { return false };
            block = next;
        }
        block.is_null()
    }
}

#[cfg(test)]
pub(crate) mod tests;

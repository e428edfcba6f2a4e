//! A slab: a page run cut into blocks of one class, and the one word that says everything about it.
//!
//! ```text
//! bit 63       62      56..62  48..56  32..48  16..32  0..16
//! CLAIMED  LISTED      class   home    carved  count   head
//! ```
//! `head` heads the list of freed blocks (offset in steps of 8 bytes, plus one; 0: none), `count` is that list's length;
//! `carved` says how many blocks were ever handed out, the rest are *fresh*; `class` and `home` (the shard it
//! belongs to) never change while the run is a slab.
//!
//! # Protocol
//! Anybody who owns blocks may push them; only the holder of the home bin's lock takes blocks out. Each is one
//! read-modify-write of the word. A push publishes: from then on the slab may be taken, emptied and unmapped by others,
//! so the pusher touches neither blocks nor descriptor again, unless its own step gave it a [`Duty`]:
//!
//! - It set LISTED: the slab had nothing to give and was in no list. Until the pusher enlists it, nobody else can find it.
//! - It set CLAIMED: its push made the slab *whole* (every carved block is back). The claim keeps the slab from being given back
//!   until the claimer has cleared it. There is one claimer at a time, since the bit is set by read-modify-write.
//!
//! A nested context never claims: to settle a claim means to take a lock. It leaves the slab listed; whoever takes from
//! the bin next, or trims, finds it there.
//!
//! Invariants (those numbered S are executed by `verify`):
//! - S1: `count <= carved <= capacity`.
//! - S2: the list from `head` has `count` blocks, each inside the slab at a multiple of the block length, none twice.
//! - S3: a slab that is not LISTED has `count = 0` and nothing fresh, or one context owns it alone.
//! - S4: at rest no slab is CLAIMED.
//! - S5: at rest a slab is in its home bin's lists exactly if it is LISTED.
//!
//! There is one popper at a time and the word changes by read-modify-write only, so a list cannot change under its popper except in
//! front, which changes `head`: no ABA tag is needed. The release sequence carries every earlier pusher's links to the popper.

use core::ptr::{NonNull, null_mut};

use crate::block::{Chain, peek};
use crate::pages::{Chunk, Kind, PageDesc};
use crate::size_class::SizeClass;
use crate::sync::Ordering;

const HEAD_SHIFT: u32 = 0;
const COUNT_SHIFT: u32 = 16;
const CARVED_SHIFT: u32 = 32;
const HOME_SHIFT: u32 = 48;
const CLASS_SHIFT: u32 = 56;
const LISTED: u64 = 1 << 62;
const CLAIMED: u64 = 1 << 63;
/// Class and home: what never changes.
const IDENTITY: u64 = 0x3fff << HOME_SHIFT;
const FIELD: u64 = 0xffff;
const HEAD_UNIT: usize = 8;

/// The most shards there can be: `home` is 8 bits wide.
pub(crate) const MAX_HOMES: usize = 256;

/// The longest slab in bytes: offsets and counts are 16 bits wide.
const MAX_SLAB_LEN: usize = 256 * 1024;
const _: () = assert!(MAX_SLAB_LEN / HEAD_UNIT < u16::MAX as usize, "an offset plus one fits 16 bits");

/// How often a popper tries again when pushers come in between. Each lost try is a push that succeeded.
const TAKE_TRIES: u32 = 8;

/// What a push made the pusher responsible for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a forgotten duty hides the slab for good"]
pub(crate) struct Duty {
    /// Put the slab into its home bin's inbox.
    pub(crate) enlist: bool,
    /// Afterwards, settle the claim at the home bin.
    pub(crate) settle: bool,
}

/// What came out of a slab.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) chain: Chain,
    /// Nothing is left in the slab and it is no longer LISTED. From that moment a pusher may enlist it again, so a taker
    /// unlinks it *before* it takes what [may be](Slab::may_exhaust) all.
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
    fn field(self, shift: u32) -> u64 {
        self.0 >> shift & FIELD
    }
    fn count(self) -> u64 {
        self.field(COUNT_SHIFT)
    }
    fn carved(self) -> u64 {
        self.field(CARVED_SHIFT)
    }
    fn is(self, flag: u64) -> bool {
        self.0 & flag != 0
    }
    fn is_whole(self) -> bool {
        self.count() == self.carved()
    }
    fn with_head(self, head: u64) -> Self {
        Self(self.0 & !(FIELD << HEAD_SHIFT) | head << HEAD_SHIFT)
    }
}

/// How long a slab of a class should be, in bytes: a multiple of `granule` that holds at least one block and comes close to `target`,
/// with at most an eighth left over behind the last block if a few blocks more can achieve that.
pub(crate) fn slab_len(class: SizeClass, granule: usize, target: usize) -> usize {
    let block_len = class.block_len();
    let mut count = (target / block_len).max(1);
    for _ in 0..8 {
        let len = (count * block_len).next_multiple_of(granule);
        if (len - count * block_len) * 8 <= len {
            break;
        }
        count += 1;
    }
    (count * block_len).next_multiple_of(granule).min(MAX_SLAB_LEN)
}

/// The home of the slab that a granule belongs to: any granule's descriptor will do.
#[inline]
pub(crate) fn home_at(desc: &PageDesc) -> usize {
    (desc.word.load(Ordering::Relaxed) >> HOME_SHIFT & 0xff) as usize
}

impl<'a> Slab<'a> {
    /// The slab whose first granule `desc` describes, `None` if that is no slab.
    pub(crate) fn of(desc: &'a PageDesc) -> Option<Self> {
        match desc.kind() {
            Kind::Slab | Kind::SlabPartial | Kind::SlabWhole => Some(Self { desc }),
            _ => None,
        }
    }

    /// Makes a run that the caller got for this purpose a slab: all fresh, LISTED, in no list yet.
    pub(crate) fn found(desc: &'a PageDesc, class: SizeClass, home: usize) -> Self {
        let slab = Self { desc };
        let word = (class.index() as u64) << CLASS_SHIFT | (home as u64 & 0xff) << HOME_SHIFT;
        for rest in Chunk::of(desc).descs_of(desc).skip(1) {
            rest.word.store(word, Ordering::Relaxed);
        }
        desc.word.store(word | LISTED, Ordering::Release);
        slab
    }

    pub(crate) fn desc(self) -> &'a PageDesc {
        self.desc
    }

    pub(crate) fn home(self) -> usize {
        home_at(self.desc)
    }

    pub(crate) fn class(self) -> SizeClass {
        let index = (self.load().0 >> CLASS_SHIFT) as usize & 0x3f;
        SizeClass::from_index(index).unwrap_or(SizeClass::LONGEST)
    }

    /// How many blocks fit.
    pub(crate) fn capacity(self) -> usize {
        Chunk::run_len(self.desc) / self.class().block_len()
    }

    /// Blocks in the free list and blocks ever handed out, at one moment.
    #[expect(clippy::cast_possible_truncation, reason = "16 bits each")]
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
    pub(crate) fn is_whole(self) -> bool {
        let word = self.load();
        word.is_whole() && !word.is(CLAIMED)
    }

    fn load(self) -> Word {
        Word(self.desc.word.load(Ordering::Acquire))
    }

    fn start(self) -> NonNull<u8> {
        Chunk::start_of(self.desc)
    }

    fn replace(self, old: Word, new: Word) -> bool {
        self.desc.word.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The first free block, by the word's `head`.
    fn head_of(self, word: Word) -> *mut u8 {
        #[expect(clippy::cast_possible_truncation, reason = "16 bits")]
        match word.field(HEAD_SHIFT) as usize {
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
        (offset / HEAD_UNIT + 1) as u64 & FIELD
    }

    /// Gives blocks of this slab back to it. Callable from any context, always succeeds, needs no memory; lock-free.
    ///
    /// `nested`: the caller may have interrupted the heap, so it takes on no duty that needs a lock.
    pub(crate) fn push(self, mut chain: Chain, nested: bool) -> Duty {
        let head = self.head_for(chain.first().as_ptr());
        loop {
            let old = self.load();
            chain.set_end(self.head_of(old));
            let mut new = old.with_head(head);
            new.0 = new.0.wrapping_add(u64::from(chain.count()) << COUNT_SHIFT) | LISTED;
            let settle = !nested && new.is_whole() && !old.is(CLAIMED);
            if settle {
                new.0 |= CLAIMED;
            }
            if self.replace(old, new) {
                return Duty { enlist: !old.is(LISTED), settle };
            }
        }
    }

    /// Whether [`take`](Self::take) of `most` blocks could leave nothing. If not, it cannot do so later either: pushers only add.
    /// The caller holds the home bin's lock.
    pub(crate) fn may_exhaust(self, most: u32) -> bool {
        let word = self.load();
        let fresh = (self.capacity() as u64).saturating_sub(word.carved());
        if word.count() > 0 { fresh == 0 && word.count() <= u64::from(most) } else { fresh <= u64::from(most) }
    }

    /// Takes up to `most` blocks (at least 1 is asked for): freed ones if there are any, else fresh ones. The caller
    /// holds the home bin's lock, or owns the slab alone. `None`: nothing there, or pushers came in between too often.
    pub(crate) fn take(self, most: u32) -> Option<Taken> {
        let capacity = self.capacity() as u64;
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

    #[expect(clippy::cast_possible_truncation, reason = "counts are 16 bits")]
    fn take_freed(self, old: Word, count: u64, capacity: u64) -> Option<Taken> {
        let head = NonNull::new(self.head_of(old))?;
        // SAFETY: the word says that `count` blocks and maybe more hang on `head`; the bin's lock makes us the only popper.
        let (last, rest) = unsafe { peek(head, count as u32) };
        let exhausted = count == old.count() && old.carved() == capacity;
        let mut new = Word(old.0 - (count << COUNT_SHIFT)).with_head(self.head_for(rest));
        if exhausted {
            new.0 &= !LISTED;
        }
        if !self.replace(old, new) {
            return None;
        }
        // SAFETY: the exchange unhooked exactly these blocks: `head` had not moved, and behind it nobody else takes.
        let chain = unsafe { Chain::from_raw(head, last, count as u32) };
        Some(Taken { chain, exhausted })
    }

    #[expect(clippy::cast_possible_truncation, reason = "counts are 16 bits")]
    fn take_fresh(self, old: Word, count: u64, capacity: u64) -> Option<Taken> {
        let exhausted = old.carved() + count == capacity;
        let mut new = Word(old.0 + (count << CARVED_SHIFT));
        if exhausted {
            new.0 &= !LISTED;
        }
        if !self.replace(old, new) {
            return None;
        }
        let block_len = self.class().block_len();
        let offset = old.carved() as usize * block_len;
        // SAFETY: `carved + count <= capacity` blocks fit the run, so the offset is inside it.
        let start = unsafe { self.start().add(offset) };
        // SAFETY: blocks from `carved` on were never handed out, and the exchange made `count` of them ours.
        let chain = unsafe { Chain::carve(start, block_len, count as u32) };
        Some(Taken { chain, exhausted })
    }

    /// Makes a whole slab all fresh again, so that its blocks are next handed out in order. The caller holds the bin's lock and saw
    /// [`is_whole`](Self::is_whole): no block is out, so nobody pushes.
    pub(crate) fn renew(self) {
        self.desc.word.fetch_and(IDENTITY | LISTED, Ordering::AcqRel);
    }

    /// Clears the claim; true if the slab was whole at that moment. The caller is the claimer and holds the bin's lock.
    pub(crate) fn settle(self) -> bool {
        Word(self.desc.word.fetch_and(!CLAIMED, Ordering::AcqRel)).is_whole()
    }

    /// Walks the free list and checks S1, S2. At rest only.
    pub(crate) fn verify(self) -> bool {
        let (count, carved) = self.counts();
        if count > carved || carved > self.capacity() {
            return false;
        }
        let block_len = self.class().block_len();
        let start = self.start().addr().get();
        let mut block = self.head_of(self.load());
        for _ in 0..count {
            let offset = block.addr().wrapping_sub(start);
            let Some(here) = NonNull::new(block) else { return false };
            if offset % block_len != 0 || offset / block_len >= carved {
                return false;
            }
            // SAFETY: at rest nobody takes from this list.
            block = unsafe { crate::block::next(here) };
        }
        block.is_null()
    }
}

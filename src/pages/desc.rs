//! The page descriptor: 32 bytes (with words of 32 bits, 24) for each granule of a chunk, dense, out of line.
//!
//! Decision: nothing is written into the pages themselves, not into free ones either. Headers inside slabs stand
//! at equal offsets and share cache sets; out of line, a 4096-byte block is a page, and fresh pages stay zeroed.
//! Price: a pointer must be looked up to find its descriptor, on slow paths only.
//!
//! Every field is an atomic, so that a descriptor may be read by anybody who holds a reference. Who may *write*:
//! - `word`: by read-modify-write by anybody while the run is a slab (see `slab`); unused otherwise.
//! - `next`, `prev`: whoever holds the list that the run is in (the pool's lock, the bin's lock), or the one
//!   context that owns the run while it is in none.
//! - `tag` and `index`: whoever owns the run: its pool's lock for free runs, its bin's lock for a linked slab, its only
//!   owner otherwise.
//!
//! *A descriptor is written when a run begins or ends there, and in slabs, and not before*: so the first use of a
//! region costs the same at any length, and a long block has two. What lies between is as the provider's memory was,
//! and nobody reads it. With `hardened` any address may be asked for, so there all are written when the chunk is made.
//! Price: a store each time a run is cut.

use crate::base::link::{Link, Listed};
use crate::base::sync::{AtomicU32, AtomicWord, Ordering, SPLIT};

/// What a granule is, written in the descriptors of a run's first granule, of its last one, and, in slabs, of all of
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Inside a run, nothing to be learned here.
    Inside = 0,
    /// First and last granule of a free run; `len` is the run's length.
    Free = 1,
    /// First granule of a slab that no list of slabs holds; `len` is the run's length.
    Slab = 2,
    /// First granule of a slab in its bin's list of partial slabs.
    SlabPartial = 3,
    /// First granule of a slab in its bin's list of empty slabs.
    SlabEmpty = 4,
    /// Any further granule of a slab; `len` is the distance to the first one.
    SlabRest = 5,
    /// First granule of a large block; `len` is the run's length.
    Large = 6,
    /// Last granule of a used run that is not a slab and longer than one granule.
    Tail = 7,
    /// First granule of a run on its pool's deferred list; `len` is the run's length.
    Deferred = 8,
    /// First granule of a run that the heap itself uses; `len` is the run's length.
    Own = 9,
    /// First granule of a chunk on its way back to the provider: in no list, merges with nothing.
    Leaving = 10,
    /// First and last granule of a run whose memory the provider has back; `len` is the run's length.
    Absent = 11,
    /// First granule of a run whose memory the provider got just now, on its way to the absent ones: in no list of
    /// theirs, merges with nothing; `len` is the run's length.
    Emptied = 12,
    /// First granule of a chunk on its way back that is absent as a whole. [`PageDesc::kind`] gives `Inside` for it.
    LeavingAbsent = 13,
}

/// The word of a granule that was in no slab yet: `slab`'s `NO_SLAB` where that is looked at.
const FIRST_WORD: u64 = if cfg!(feature = "hardened") { 0x3f << PageDesc::CLASS_SHIFT } else { 0 };

const KIND_SHIFT: u32 = 28;
/// Of a run: its pages hold zeros. Of a slab: there are parts of it behind the first one.
const ZEROED: u32 = 1 << 27;
const PARTED: u32 = ZEROED;
const LEN_MASK: u32 = ZEROED - 1;

/// The longest run, in granules.
pub(crate) const MAX_LEN: usize = LEN_MASK as usize;

/// Describes one granule. See the file's head for who may write what.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct PageDesc {
    /// The slab's word: free list, counts and state.
    pub(crate) word: AtomicWord,
    /// The next run in whatever list holds this one.
    pub(crate) next: Link<PageDesc>,
    /// The previous run in that list, where it is doubly linked.
    pub(crate) prev: Link<PageDesc>,
    /// Kind, zeroed flag and length in one word, so that a reader sees all of one moment.
    tag: AtomicU32,
    /// Position in the chunk's table, known from when a run first began here on.
    index: AtomicU32,
}

const _: () =
    assert!(size_of::<PageDesc>() == 16 + 2 * size_of::<usize>(), "with words of 64 bits, two fill a cache line");

/// What a descriptor said at one moment. Loads of atomics are not merged by the compiler, so who needs more than one
/// part reads it once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tag(u32);

impl Tag {
    #[inline]
    pub(crate) const fn new(kind: Kind, len: usize, zeroed: bool) -> Self {
        debug_assert!(len <= MAX_LEN);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a run is at most MAX_LEN granules long, which fits 27 bits"
        )]
        let len = len as u32 & LEN_MASK;
        Self((kind as u32) << KIND_SHIFT | (zeroed as u32) << ZEROED.trailing_zeros() | len)
    }

    #[inline]
    pub(crate) const fn is(self, kind: Kind) -> bool {
        self.0 >> KIND_SHIFT == kind as u32
    }

    /// Whether it is of none of the kinds that a run has which was in use.
    #[inline]
    pub(crate) const fn is_apart(self) -> bool {
        self.0 >> KIND_SHIFT >= Kind::Leaving as u32
    }

    /// As [`PageDesc::len`].
    #[inline]
    pub(crate) const fn len(self) -> usize {
        (self.0 & LEN_MASK) as usize
    }

    /// As [`PageDesc::is_zeroed`].
    #[inline]
    pub(crate) const fn is_zeroed(self) -> bool {
        self.0 & ZEROED != 0
    }
}

impl PageDesc {
    /// Where a slab's word has its class, of 6 bits: above its owner, and in the upper half if words are split.
    pub(crate) const CLASS_SHIFT: u32 = if SPLIT { 48 } else { 56 };

    pub(crate) const fn new(index: u32) -> Self {
        Self {
            word: AtomicWord::new(FIRST_WORD),
            next: Link::new(),
            prev: Link::new(),
            tag: AtomicU32::new(0),
            index: AtomicU32::new(index),
        }
    }

    /// Position in the chunk's table, where a run begins, and in slabs.
    #[inline]
    pub(crate) fn index(&self) -> usize {
        self.index.load(Ordering::Relaxed) as usize
    }

    /// Says so, when a run is about to begin here.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "a chunk has at most MAX_LEN granules")]
    pub(crate) fn set_index(&self, index: usize) {
        self.index.store(index as u32, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn kind(&self) -> Kind {
        match self.tag.load(Ordering::Relaxed) >> KIND_SHIFT {
            1 => Kind::Free,
            2 => Kind::Slab,
            3 => Kind::SlabPartial,
            4 => Kind::SlabEmpty,
            5 => Kind::SlabRest,
            6 => Kind::Large,
            7 => Kind::Tail,
            8 => Kind::Deferred,
            9 => Kind::Own,
            10 => Kind::Leaving,
            11 => Kind::Absent,
            12 => Kind::Emptied,
            // One more takes two to seven instructions more of each path that asks.
            _ => Kind::Inside,
        }
    }

    /// Kind, length and zeroed flag of one moment.
    #[inline]
    pub(crate) fn tag(&self) -> Tag {
        Tag(self.tag.load(Ordering::Relaxed))
    }

    /// Granules: the run's length, or the distance to the slab's first granule.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.tag().len()
    }

    /// Granules from the slab's first one to this one.
    #[cfg(feature = "hardened")]
    #[inline]
    pub(crate) fn distance(&self) -> usize {
        let tag = self.tag.load(Ordering::Relaxed);
        if tag >> KIND_SHIFT == Kind::SlabRest as u32 { (tag & LEN_MASK) as usize } else { 0 }
    }

    /// Whether the run's pages are known to hold zeros only (first granule of a run).
    #[inline]
    pub(crate) fn is_zeroed(&self) -> bool {
        self.tag().is_zeroed()
    }

    /// Whether the slab has parts behind the first one (first granule of a slab).
    #[inline]
    pub(crate) fn is_parted(&self) -> bool {
        self.tag().0 & PARTED != 0
    }

    /// Writes kind, length in granules and zeroed flag.
    #[inline]
    pub(crate) fn set(&self, kind: Kind, len: usize, zeroed: bool) {
        self.put(Tag::new(kind, len, zeroed));
    }

    /// [`set`](Self::set) of all that a tag says.
    #[inline]
    pub(crate) fn put(&self, tag: Tag) {
        self.tag.store(tag.0, Ordering::Relaxed);
    }

    /// The granule is no slab's any more, but of that kind, and so long.
    pub(crate) fn leave_slab(&self, kind: Kind, len: usize) {
        #[cfg(feature = "hardened")]
        self.word.store(FIRST_WORD, Ordering::Relaxed);
        self.set(kind, len, false);
    }

    /// Changes the kind alone.
    #[inline]
    pub(crate) fn set_kind(&self, kind: Kind) {
        self.set(kind, self.len(), self.is_zeroed());
    }
}

impl Listed for PageDesc {
    fn next(&self) -> &Link<Self> {
        &self.next
    }
    fn prev(&self) -> &Link<Self> {
        &self.prev
    }
}

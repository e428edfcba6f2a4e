//! What is one context's alone, as values: memory of the provider's, runs, chunks on their way.
//!
//! Decision: what the provider gives is a [`Mapping`] from then until it goes back or is taken in, and a run is a
//! [`Run`] from when it is handed out until it is a slab, a CPU's state or a block. Neither is `Copy` or `Clone`, and
//! only the page heap makes runs ([`hand_out`]): whoever takes one in takes the value, and hands it out again if that
//! fails. So the compiler checks who owns memory between provider, page heap and slabs.
//! Price: a failure carries two words more; on cold paths only.

#![expect(unsafe_code, reason = "the promise that memory is the heap's")]

use core::ptr::NonNull;

use super::chunk::{Chunk, Descs};
use super::chunk_map::Entry;
use super::desc::{Kind, PageDesc};
use crate::contract::provider::PageRun;

/// A run as the provider gave it, which no chunk or table is in, nor a block but one that its holder decides about.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the memory is lost"]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    run: PageRun,
}

impl Mapping {
    /// # Safety
    /// The provider gave `run` at `start` and has not got it back; no chunk or table is in it, nor a block but one that
    /// the caller may free, resize and move; and nothing else says that it has it.
    pub(crate) unsafe fn new(start: NonNull<u8>, run: PageRun) -> Self {
        Self { start, run }
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// As the provider gave it.
    pub(crate) fn run(&self) -> PageRun {
        self.run
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.run.len()
    }

    /// One block, as long as all of it.
    pub(crate) fn into_block(self) -> NonNull<[u8]> {
        NonNull::slice_from_raw_parts(self.start, self.len())
    }
}

/// A run handed out, which is its holder's alone: only [`hand_out`] makes one.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    pub(crate) desc: &'a PageDesc,
    pub(crate) start: NonNull<u8>,
    /// Bytes; a multiple of the chunk's granule, at least what was asked for.
    pub(crate) len: usize,
    /// The run holds zeros only.
    pub(crate) zeroed: bool,
    _sealed: (),
}

#[cfg(any(test, loom))]
impl Run<'static> {
    /// A run of no page heap.
    ///
    /// # Safety
    /// The bytes are nobody else's.
    pub(crate) unsafe fn apart(start: NonNull<u8>, len: usize) -> Self {
        static NO_DESC: PageDesc = PageDesc::new(0);
        Self { desc: &NO_DESC, start, len, zeroed: false, _sealed: () }
    }
}

/// An empty chunk on its way to the provider. It belongs to nobody else, and is [offered](Self::offer) next.
#[derive(Debug)]
#[must_use = "the chunk is lost unless it is offered or put back"]
pub(crate) struct EmptyChunk {
    pub(super) memory: Mapping,
    /// Bytes of it that the provider has back already.
    pub(super) absent_len: usize,
    pub(super) entry: Entry,
}

/// A chunk that the provider has back, which [`super::Pages::chunk_gone`] is told.
#[derive(Debug)]
#[must_use = "its entry is lost unless chunk_gone is called"]
pub(crate) struct GoneChunk {
    /// Bytes.
    pub(crate) len: usize,
    pub(super) absent_len: usize,
    pub(super) entry: Entry,
}

impl EmptyChunk {
    /// Offers its memory. `Err`: it was not taken; the chunk is as it was, for [`super::Pages::put_back`].
    pub(crate) fn offer(self, take: impl FnOnce(Mapping) -> Result<(), Mapping>) -> Result<GoneChunk, Self> {
        let Self { memory, absent_len, entry } = self;
        let len = memory.len();
        match take(memory) {
            Ok(()) => Ok(GoneChunk { len, absent_len, entry }),
            Err(memory) => Err(Self { memory, absent_len, entry }),
        }
    }
}

/// Free pages that are the caller's, who gives their memory back and calls [`super::Pages::went_back`], or frees them
/// by [`super::Pages::stayed`].
#[derive(Debug)]
#[must_use = "the pages are lost"]
pub(crate) struct Idle<'a>(pub(super) Run<'a>);

impl Idle<'_> {
    /// Where they start, and bytes.
    pub(crate) fn pages(&self) -> (NonNull<u8>, usize) {
        (self.0.start, self.0.len)
    }
}

/// Absent pages that are about to be committed. They are the caller's, who calls [`super::Pages::came_back`] or
/// [`super::Pages::stayed_away`].
#[derive(Debug)]
#[must_use = "the pages are lost"]
pub(crate) struct Recalled<'a> {
    pub(super) start: NonNull<u8>,
    pub(super) len: usize,
    /// What is wanted of them, and what comes with it.
    pub(super) run: &'a PageDesc,
    pub(super) rest: Option<&'a PageDesc>,
}

impl Recalled<'_> {
    /// Where they start, and bytes.
    pub(crate) fn pages(&self) -> (NonNull<u8>, usize) {
        (self.start, self.len)
    }
}

/// A large block's run that lay at hand: its holder's alone, as a [`Run`] is, at a fraction of the instructions for who
/// wants no more than its start.
#[derive(Debug)]
pub(crate) struct AtHand<'a> {
    desc: &'a PageDesc,
    /// Where it starts, if that is known already.
    start: Option<NonNull<u8>>,
}

impl<'a> AtHand<'a> {
    #[inline(always)]
    pub(super) fn new(desc: &'a PageDesc, start: Option<NonNull<u8>>) -> Self {
        Self { desc, start }
    }

    #[inline(always)]
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start.unwrap_or_else(|| Chunk::start_of(self.desc))
    }

    #[inline(always)]
    pub(crate) fn into_run(self) -> Run<'a> {
        Run { start: self.start(), ..hand_out(self.desc) }
    }
}

/// Finishes a run that its pool has marked at both ends: the further granules of a slab lead to its first one.
/// Needs no lock, as the run is the caller's.
#[inline]
pub(super) fn hand_out(desc: &PageDesc) -> Run<'_> {
    let (chunk, len) = (Chunk::of(desc), desc.len());
    if desc.kind() == Kind::Slab {
        let descs = Descs::of(chunk);
        for distance in 1..len {
            if let Some(rest) = descs.begin(desc.index() + distance) {
                rest.set(Kind::SlabRest, distance, false);
            }
        }
    }
    Run { desc, start: Chunk::start_of(desc), len: len << chunk.shift(), zeroed: desc.is_zeroed(), _sealed: () }
}

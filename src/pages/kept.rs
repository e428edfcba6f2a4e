//! A CPU's kept run: a large block's run that was just freed, for the next block of its length.
//!
//! Kernels ask for the same lengths again: buffers, stacks, rings. So a run that is as long as the one that its CPU cut last is not merged, and
//! such a pair of calls opens no pool. Decisions, and what pays for each:
//! - *One run for each CPU, which its cache's holder fills by a plain store and anybody empties by an exchange*: one locked instruction for both calls, where a pool's lock takes
//!   two. Nobody but the holder fills it, so a run that an exchange finds is the one that was read. Price: 64 bytes for each CPU.
//! - *The memory is everybody's.* A request that the pools refuse frees kept runs before it is refused, and so do a block that would grow into one, draining,
//!   trimming and the statistics. Price: these look at each CPU's; and a chunk that only a kept run is in is not seen to be empty until then.
//! - *Its holder frees it when it cuts a run of another length*: what is not asked for again does not wait.

use super::chunk::{Chunk, Descs};
use super::desc::{Kind, PageDesc, Tag};
use crate::sync::{AtomicPtr, AtomicUsize, Ordering, Ordering::Relaxed};

/// All zero is the empty state. But for `run`, only the holder of the CPU's cache reads and writes it.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Kept {
    /// The kept run, of kind `Deferred`, or null.
    run: AtomicPtr<PageDesc>,
    /// Its address.
    start: AtomicUsize,
    /// The longest block it is for, less a byte; and how many lengths, from that on downwards.
    last: AtomicUsize,
    granule: AtomicUsize,
    /// How many granules the run has that was cut last. Another one is not kept.
    recent_len: AtomicUsize,
}

impl Kept {
    pub(super) const fn new() -> Self {
        Self {
            run: AtomicPtr::new(core::ptr::null_mut()),
            start: AtomicUsize::new(0),
            last: AtomicUsize::new(0),
            granule: AtomicUsize::new(0),
            recent_len: AtomicUsize::new(0),
        }
    }

    /// Whether no run is kept. A guess, but for the holder, to whom it may only become true.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.run.load(Relaxed).is_null()
    }

    /// A run was cut by the holder.
    #[inline]
    pub(super) fn note_cut(&self, run: &PageDesc) {
        self.recent_len.store(run.len(), Relaxed);
    }

    /// Keeps a large block's run, whose tag this is, by the holder, if none is kept and the next block is likely to be as long. False: unchanged.
    #[inline(always)]
    pub(super) fn keep(&self, run: &PageDesc, tag: Tag) -> bool {
        let descs = Descs::around(run);
        let is_likely = tag.len() == self.recent_len.load(Relaxed) && tag.len() != descs.count();
        if !is_likely || !self.is_empty() {
            return false;
        }
        run.put(Tag::new(Kind::Deferred, tag.len(), false));
        self.start.store(Chunk::start_of(run).addr().get(), Relaxed);
        self.last.store((tag.len() << descs.shift()).wrapping_sub(1), Relaxed);
        self.granule.store(1 << descs.shift(), Relaxed);
        self.run.store(run.as_link(), Ordering::Release);
        true
    }

    /// The kept run for a large block of `last + 1` bytes at a multiple of `align`, a power of two, by the holder, if it is as long as that takes.
    #[inline(always)]
    pub(super) fn reuse<'a>(&self, last: usize, align: usize) -> Option<&'a PageDesc> {
        let link = self.run.load(Relaxed);
        let fits = self.last.load(Relaxed).wrapping_sub(last) < self.granule.load(Relaxed)
            && self.start.load(Relaxed) & align.wrapping_sub(1) == 0;
        if link.is_null() || !fits {
            return None;
        }
        let run = self.take_link(link)?;
        run.put(Tag::new(Kind::Large, run.len(), false));
        Some(run)
    }

    /// The kept run, which is the caller's then. Any context.
    pub(super) fn take<'a>(&self) -> Option<&'a PageDesc> {
        let link = self.run.load(Relaxed);
        if link.is_null() { None } else { self.take_link(link) }
    }

    /// Whether it is this one. A guess.
    pub(super) fn is_keeping(&self, run: &PageDesc) -> bool {
        core::ptr::eq(self.run.load(Relaxed), run)
    }

    #[inline(always)]
    fn take_link<'a>(&self, link: *mut PageDesc) -> Option<&'a PageDesc> {
        let link = self.run.compare_exchange(link, core::ptr::null_mut(), Ordering::Acquire, Relaxed).ok()?;
        // SAFETY: null, or a run that `keep` was given; its chunk cannot leave the heap while the run is not free.
        unsafe { PageDesc::from_link(link) }
    }
}

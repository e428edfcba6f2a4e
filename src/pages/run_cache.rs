//! A CPU's cached run: a large block's run that was just freed, for the next block of its length.
//!
//! Kernels ask for the same lengths again: buffers, stacks, rings. So a run that is as long as the one that its CPU cut
//! last is not merged, and such a pair of calls opens no pool. Decisions, and what pays for each:
//! - *One run for each CPU, which its cache's holder fills by a plain store and anybody empties by an exchange*: one
//!   locked instruction for both calls, where a pool's lock takes two. Nobody but the holder fills it, so a run that an
//!   exchange finds is the one that was read. Price: 64 bytes for each CPU.
//! - *The memory is everybody's.* A request that the pools refuse frees cached runs before it is refused, and so do a
//!   block that would grow into one, draining, trimming and the statistics. Price: these look at each CPU's; and a
//!   chunk that only a cached run is in is not seen to be empty until then.
//! - *Its holder frees it when it cuts a run of another length*: what is not asked for again does not wait.
//! - *The place remembers the run that was in it last*: freed again, as such a block mostly is, it is known by its
//!   address alone, without the look-up that other frees take. As with [`ChunkHints`](super::ChunkHints), a chunk's
//!   removal makes that void.

#![expect(unsafe_code, reason = "a run that may be gone is remembered")]

use core::ptr::{NonNull, null_mut};

use super::chunk::{Chunk, Descs};
use super::desc::{Kind, PageDesc, Tag};
use super::owned::AtHand;
use crate::base::link::{Link, Linked};
use crate::base::sync::{AtomicPtr, AtomicUsize, Ordering, Ordering::Relaxed};

/// All zero is the empty state. But for `run` and `next`, only the holder of the CPU's cache reads and writes it.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct RunCache {
    /// The cached run, of kind `Deferred`, or null.
    run: Link<PageDesc>,
    /// How many granules the run has that was cut last. Another one is not kept.
    recent_len: AtomicUsize,
    /// The run that is cached, or was last, if none was cut since; its address, or null.
    last_run: AtomicPtr<PageDesc>,
    start: AtomicPtr<u8>,
    /// The longest block it is for, less a byte; and how many lengths, from that on downwards.
    last: AtomicUsize,
    granule: AtomicUsize,
    /// Chunks that had left when it was kept.
    removals: AtomicUsize,
    /// The next one in the page heap's list.
    next: Link<RunCache>,
}

const _: () = assert!(size_of::<RunCache>() == 64, "a cache line for each CPU");

// SAFETY: the first CPU's is part of the page heap. The others' are in states that stay until `CpuTable::take_out`, and
// the list forgets them before.
unsafe impl Linked for RunCache {}

/// Every CPU's but the first one's: a list that only grows. All zero is empty.
#[derive(Debug)]
pub(super) struct RunCacheList {
    newest: Link<RunCache>,
}

impl RunCacheList {
    pub(super) const fn new() -> Self {
        Self { newest: Link::new() }
    }

    /// Adds one, which is in no list. Lock-free, any context.
    pub(super) fn add(&self, kept: &RunCache) {
        self.newest.push(kept, &kept.next, Ordering::AcqRel);
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        self.newest.set(None);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &RunCache> {
        core::iter::successors(self.newest.get_published(), |kept: &&RunCache| kept.next.get_published())
    }
}

impl RunCache {
    pub(crate) const fn new() -> Self {
        Self {
            run: Link::new(),
            recent_len: AtomicUsize::new(0),
            last_run: AtomicPtr::new(null_mut()),
            start: AtomicPtr::new(null_mut()),
            last: AtomicUsize::new(0),
            granule: AtomicUsize::new(0),
            removals: AtomicUsize::new(0),
            next: Link::new(),
        }
    }

    /// Whether no run is kept. A guess, but for the holder, to whom it may only become true.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.run.is_empty()
    }

    /// A run was cut by the holder, while none is kept.
    #[inline]
    pub(super) fn note_cut(&self, run: &PageDesc) {
        self.recent_len.store(run.len(), Relaxed);
        self.start.store(null_mut(), Relaxed);
    }

    /// Keeps a large block's run, whose tag this is, by the holder, if none is kept and the next block is likely to be
    /// as long. False: unchanged. So many chunks have left ever.
    #[inline(always)]
    pub(super) fn keep(&self, run: &PageDesc, tag: Tag, removals: usize) -> bool {
        let descs = Descs::around(run);
        let is_likely = tag.len() == self.recent_len.load(Relaxed) && tag.len() != descs.count();
        if !is_likely || !self.is_empty() {
            return false;
        }
        self.last_run.store(core::ptr::from_ref(run).cast_mut(), Relaxed);
        self.start.store(Chunk::start_of(run).as_ptr(), Relaxed);
        self.last.store((tag.len() << descs.shift()).wrapping_sub(1), Relaxed);
        self.granule.store(1 << descs.shift(), Relaxed);
        self.removals.store(removals, Relaxed);
        self.fill(run, tag);
        true
    }

    /// Keeps the run of the large block at `start`, which is the caller's, by the holder, if it is the one that was
    /// kept last. False: unchanged. So many chunks have left ever. Fast.
    #[cfg(not(feature = "hardened"))]
    #[inline(always)]
    pub(super) fn keep_again(&self, start: NonNull<u8>, removals: usize) -> bool {
        let is_known = self.start.load(Relaxed) == start.as_ptr() && self.removals.load(Relaxed) == removals;
        if !is_known {
            return false;
        }
        // SAFETY: `keep` set it together with the address. A chunk's removal is counted before its memory can come to
        // anybody else, so with equal counts the caller's block at that address is in the very chunk that the run was
        // in, which cannot leave before the block is free.
        let Some(run) = (unsafe { self.last_run.load(Relaxed).as_ref() }) else { return false };
        let tag = run.tag();
        // While a run is kept, it is the known one, and deferred.
        let is_same = tag.is(Kind::Large) && tag.len() == self.recent_len.load(Relaxed);
        if is_same {
            self.fill(run, tag);
        }
        is_same
    }

    #[inline(always)]
    fn fill(&self, run: &PageDesc, tag: Tag) {
        run.put(Tag::new(Kind::Deferred, tag.len(), false));
        self.run.publish(Some(run));
    }

    /// The cached run for a large block of `last + 1` bytes at a multiple of `align`, a power of two, by the holder, if
    /// it is as long as that takes.
    #[inline(always)]
    pub(super) fn reuse<'a>(&self, last: usize, align: usize) -> Option<AtHand<'a>> {
        let start = NonNull::new(self.start.load(Relaxed))?;
        let fits = self.last.load(Relaxed).wrapping_sub(last) < self.granule.load(Relaxed)
            && start.as_ptr().addr() & align.wrapping_sub(1) == 0;
        let run = if fits { self.run.take() } else { None }?;
        run.put(Tag::new(Kind::Large, run.len(), false));
        Some(AtHand::new(run, Some(start)))
    }

    /// The cached run, which is the caller's then. Any context.
    pub(super) fn take<'a>(&self) -> Option<&'a PageDesc> {
        self.run.take()
    }

    /// Whether it is this one. A guess.
    pub(super) fn is_keeping(&self, run: &PageDesc) -> bool {
        self.run.leads_to(run)
    }
}

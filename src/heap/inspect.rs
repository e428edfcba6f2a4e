//! Is what is freed what was given? The inspection that every free passes with the feature `hardened`.
//!
//! ```text
//! free ─ fast check (in view of the fast path)
//!          │    chunk by the cache's hints; class and block boundary by the descriptor; first word no link
//!          └─ no ─ inspect                        looked up: whose memory, whose class, which block, free already?
//! ```
//! A fast check accepts or knows nothing; only the inspection refuses, and what it refuses is reported and left as it
//! is.
//!
//! *A double free is told by the block itself.* Its first word is a link under the heap's key at that very place, and
//! leads to nothing or to the start of another block of the heap: by chance, that is one word in 2^19, times the share
//! of all addresses at which a block of this heap starts. So no list is walked and no lock taken, and it does not
//! matter where the block waits: in this cache, another CPU's, a slab, or a slab that has become empty and all fresh
//! since. The obvious way, a walk over the lists, cannot look into another CPU's pinned cache. Price: a block that is
//! freed, its first word *written*, and freed again passes here, and is reported as a write to a free block when the
//! list comes to a link that is broken.
//!
//! *Every free is looked at, not only batches on their way back to slabs.* A pointer into the middle of a block that
//! reached a list would be the next block handed out. What that costs is in `docs/hardening.md`.

#![expect(unsafe_code, reason = "links of free blocks are read")]

use core::alloc::Layout;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use crate::base::size_class::SizeClass;
use crate::cache::CpuCache;
use crate::harden::Misuse;
use crate::heap::depot::Engine;
use crate::pages::{Chunk, ChunkHints, Kind, PageDesc};
use crate::slab::block::Block;
use crate::slab::word::{Slab, class_index_at, owner_at};

impl<const CPUS: usize> Engine<CPUS> {
    /// Whether what is freed certainly is a block of that class that is in use, and, if tiny, owned by the cache's
    /// index. Fast.
    #[inline]
    pub(crate) fn is_plain(&self, cache: &CpuCache, index: usize, block: &Block, class: SizeClass) -> bool {
        let start = block.start();
        let Some((desc, offset)) = self.pages.place_near(&cache.chunk_hints, start) else { return false };
        let is_own = class_index_at(desc) == class.index() && (!class.is_tiny() || owner_at(desc) == index);
        // SAFETY: the address is in a chunk of this heap, and in a slab if it has the class; and the token says that
        // the memory is the caller's, or that the contract of `free` was broken.
        is_own && class.divides(offset) && !unsafe { cache.key().suspects(start) }
    }

    /// Finds out what it is that is freed as a block of `class`: the slab that it goes back to.
    pub(crate) fn inspect(
        &self,
        cache: Option<&CpuCache>,
        start: NonNull<u8>,
        class: SizeClass,
    ) -> Result<Slab<'_>, Misuse> {
        let (slab, index) = self.block_at(start, cache.map(|cache| &cache.chunk_hints))?;
        if !slab.was_out(index) || self.is_free(start) {
            return Err(Misuse::DoubleFree);
        }
        let is_fallback = slab.class() > class && self.fallback_count.load(Ordering::Relaxed) > 0;
        if slab.class() == class || is_fallback { Ok(slab) } else { Err(Misuse::LayoutMismatch) }
    }

    /// The block that starts at an address: its slab, and which one it is there. The hints then know the chunk.
    fn block_at(&self, start: NonNull<u8>, hints: Option<&ChunkHints>) -> Result<(Slab<'_>, usize), Misuse> {
        let Some(desc) = self.pages.chunk_far(hints, start).and_then(|chunk| chunk.head_of(start)) else {
            let is_huge = self.pages.huge_run(start).is_some();
            return Err(if is_huge { Misuse::LayoutMismatch } else { Misuse::ForeignPointer });
        };
        match Slab::of(desc) {
            Some(slab) => slab.block_index(start).map(|index| (slab, index)).ok_or(Misuse::InteriorPointer),
            None => Err(no_block(desc, start)),
        }
    }

    /// Whether the block in a slab has a link where its user's first bytes would be.
    fn is_free(&self, start: NonNull<u8>) -> bool {
        // SAFETY: the address is that of a block in a slab, so 8 bytes long and aligned to 8; who frees it does not
        // write it meanwhile.
        match unsafe { self.pages.key.get().read(start) }.map(NonNull::new) {
            None => false,
            Some(None) => true,
            Some(Some(next)) => self.block_at(next, None).is_ok(),
        }
    }

    /// Whether `start` is a page run that a block of that Layout has: its descriptor.
    pub(crate) fn inspect_run(&self, start: NonNull<u8>, layout: Layout) -> Result<&PageDesc, Misuse> {
        let Some(desc) = self.pages.lookup(start).and_then(|chunk| chunk.head_of(start)) else {
            return Err(Misuse::ForeignPointer);
        };
        if desc.kind() != Kind::Large {
            let inside = Slab::of(desc).map(|slab| slab.block_index(start));
            return Err(match inside {
                Some(Some(_)) => Misuse::LayoutMismatch,
                Some(None) => Misuse::InteriorPointer,
                None => no_block(desc, start),
            });
        }
        if start != Chunk::start_of(desc) {
            return Err(Misuse::InteriorPointer);
        }
        let (len, granule) = (Chunk::run_len(desc), 1 << Chunk::of(desc).shift());
        let fits = layout.size() <= len && len - layout.size() < granule;
        if fits && start.as_ptr().addr() % layout.align() == 0 { Ok(desc) } else { Err(Misuse::LayoutMismatch) }
    }
}

/// What it means to free an address that is in no slab.
fn no_block(desc: &PageDesc, start: NonNull<u8>) -> Misuse {
    let chunk = Chunk::of(desc);
    // The run that the granule is in: the nearest first granule in front of it that reaches so far.
    let heads = (0..=desc.index()).rev().filter_map(|index| chunk.desc(index));
    let head = heads.into_iter().find(|head| !matches!(head.kind(), Kind::Inside | Kind::Tail | Kind::SlabRest));
    match head.filter(|head| head.index() + head.len() > desc.index()).map(|head| (head.kind(), head)) {
        Some((Kind::Large, head)) if start == Chunk::start_of(head) => Misuse::LayoutMismatch,
        Some((Kind::Large, _)) => Misuse::InteriorPointer,
        _ => Misuse::DoubleFree,
    }
}

//! Blocks that become shorter where they are, when there is no memory to move them to.
//!
//! A slab's block serves a shorter class as one that was borrowed does: it returns to its slab by its address. Blocks
//! of the shorter class may have a larger alignment, so the content moves up within the block if it has to. A page run
//! that becomes a short block stays a run, without the granules in front of where the content is then, and is freed as
//! one when it returns to its slab.
//!
//! Price: where the next multiple of the alignment lies too far up (a class of five times a power of two, cut down to
//! four times), the block stays as long as it is. With `hardened`, where a block is told by its slab's class and its
//! place, content does not move and runs do not become short blocks.

#![expect(unsafe_code, reason = "bytes move inside a block")]

use core::alloc::Layout;
use core::ptr::NonNull;

use crate::base::size_class::{SHORT_LEN, SizeClass};
use crate::base::sync::Ordering;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
use crate::heap::Heap;
use crate::heap::depot::{Caller, Engine, Group};
use crate::slab::block::Block;
use crate::slab::free_blocks::{cut, touched};
use crate::slab::word::Slab;

impl<const CPUS: usize> Engine<CPUS> {
    /// How many bytes up the content of a slab's block moves that serves `old` and shall serve `new`; `None` if that
    /// has no room in it.
    fn slide(start: NonNull<u8>, old: SizeClass, new: SizeClass) -> Option<usize> {
        let slide = start.addr().get().wrapping_neg() & (new.block_align() - 1);
        let fits = slide + new.block_len() <= old.block_len() && !(cfg!(feature = "hardened") && slide > 0);
        fits.then_some(slide)
    }

    /// Counts a block at `offset` in a slab that served `old` as one that serves `new` at `new_offset`; gives the
    /// slab's blocks that are left over, in front and behind.
    fn recount(
        &self,
        slab: Slab<'_>,
        (offset, old): (usize, SizeClass),
        (new_offset, new): (usize, SizeClass),
    ) -> [core::ops::Range<usize>; 2] {
        let own = slab.class();
        let (before, after) = (touched(offset, old.block_len(), own), touched(new_offset, new.block_len(), own));
        if own != old {
            self.fallback(old).fetch_sub(1, Ordering::Relaxed);
            self.fallback(own).fetch_add(before.len() as u64, Ordering::Relaxed);
        }
        if own != new {
            self.fallback(new).fetch_add(1, Ordering::Relaxed);
            self.fallback(own).fetch_sub(after.len() as u64, Ordering::Relaxed);
        }
        #[cfg(feature = "hardened")]
        self.fallback_count.fetch_add(1, Ordering::Relaxed);
        [before.start..after.start, after.end..before.end]
    }
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// Makes a live block shorter without other memory; gives it where it is then. `None`: unchanged.
    ///
    /// # Safety
    /// `start` is a block of this heap, of Layout `old`, and the caller's alone; `new` is shorter, with the same
    /// alignment. After success the block has Layout `new`.
    pub(crate) unsafe fn shrink_in_place(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        let Some(class) = SizeClass::of(new) else { return self.keep_long(start, new) };
        match self.engine.slab_of(start, None) {
            // SAFETY: the contract is the same.
            Some(slab) => unsafe { self.shrink_in_slab(slab, start, SizeClass::of(old)?, class, new.size()) },
            None if class.block_len() > SHORT_LEN => self.run_of(start).and_then(|_| self.keep_long(start, new)),
            // SAFETY: the contract is the same.
            None => unsafe { self.shrink_run(start, old, class, new.size()) },
        }
    }

    /// A run that stays as long as it is: what frees it asks for its length.
    fn keep_long(&self, start: NonNull<u8>, new: Layout) -> Option<NonNull<[u8]>> {
        if cfg!(feature = "hardened") {
            return None;
        }
        Some(NonNull::slice_from_raw_parts(start, self.large_len(start, new)?))
    }

    /// # Safety
    /// As for [`shrink_in_place`](Self::shrink_in_place); the block is in that slab and served class `old`.
    unsafe fn shrink_in_slab(
        &self,
        slab: Slab<'_>,
        start: NonNull<u8>,
        old: SizeClass,
        new: SizeClass,
        size: usize,
    ) -> Option<NonNull<[u8]>> {
        let slide = Engine::<CPUS>::slide(start, old, new)?;
        // SAFETY: the block reaches beyond that (`slide`).
        let place = unsafe { start.add(slide) };
        // SAFETY: both ranges lie in the block, which is the caller's.
        unsafe { start.copy_to(place, size) };
        let offset = start.addr().get() - slab.start().addr().get();
        for parts in self.engine.recount(slab, (offset, old), (offset + slide, new)) {
            if parts.is_empty() {
                continue;
            }
            // SAFETY: the block touched these blocks of the slab, and its content does so no more.
            let first = unsafe { slab.start().add(parts.start * slab.class().block_len()) };
            // SAFETY: as above; a slab's blocks are at least 8 bytes long.
            let block = unsafe { Block::new(first) };
            #[expect(clippy::cast_possible_truncation, reason = "at most as many as a slab has blocks")]
            let count = parts.len() as u32;
            // SAFETY: the block was joined out of them, side by side.
            let chain = unsafe { cut(block, 0, slab.class(), count, slab.key()) };
            self.held(|caller| self.engine.return_blocks(Group { slab, chain }, None, caller));
        }
        Some(NonNull::slice_from_raw_parts(place, new.block_len()))
    }

    /// A page run that becomes a short block.
    ///
    /// # Safety
    /// As for [`shrink_in_place`](Self::shrink_in_place).
    unsafe fn shrink_run(
        &self,
        start: NonNull<u8>,
        old: Layout,
        class: SizeClass,
        size: usize,
    ) -> Option<NonNull<[u8]>> {
        let desc = self.run_of(start)?;
        let slide = start.addr().get().wrapping_neg() & (class.block_align() - 1);
        if cfg!(feature = "hardened") || slide + class.block_len() > self.engine.pages.usable_len(desc) {
            return None;
        }
        // SAFETY: inside the run (above).
        let place = unsafe { start.add(slide) };
        let may_wait = |caller: Caller| !(C::PINNED && caller.nested);
        let desc = if slide > 0 {
            // SAFETY: both ranges lie in the run, which is the caller's.
            let slide_up = || unsafe { start.copy_to(place, size) };
            self.held(|caller| self.engine.pages.cut_front(desc, slide, may_wait(caller), slide_up))?
        } else {
            desc
        };
        // Where the lock is busy it stays as long as it is.
        let _ = self.held(|caller| self.engine.pages.resize(desc, class.block_len(), may_wait(caller)));
        if let Some(old) = SizeClass::of(old).filter(|old| old.block_len() <= SHORT_LEN) {
            self.engine.fallback(old).fetch_sub(1, Ordering::Relaxed);
        }
        self.engine.fallback(class).fetch_add(1, Ordering::Relaxed);
        Some(NonNull::slice_from_raw_parts(place, class.block_len()))
    }
}

//! Level 2 in the heap: every request with a frame around it, as `faces` calls it with the feature `debug-heap`.
//!
//! ```text
//! alloc ─ outer Layout ─ the heap below ─ was it written to while it was free? ─ frame
//! free  ─ whose block? ─ state, Layout, red zones ─ claim ─ poison ─ quarantine ─ (another block) was it written to?
//!       ─ the heap below
//! ```
//! The frame is found by the heap's own descriptors (the slab's block around an address, the start of a run) before a
//! byte of it is read, so that whatever is freed, nothing is read but the heap's memory. What is damaged is reported
//! and, where the frame is whole, freed all the same; what cannot be told is left alone, and lost.

use core::alloc::Layout;
use core::ptr::NonNull;

use crate::base::size_class::SizeClass;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
use crate::harden::debug::{BlockInfo, Frame, HELD_LEN, Site, State, Words, front_len, outer};
use crate::harden::{Misuse, Report};
use crate::heap::Heap;
use crate::pages::{Chunk, Kind};
use crate::slab::word::Slab;

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// Has `hook` say where a block is allocated or freed: an address of code, such as the return address of whoever
    /// called the heap's face. Without a hook the crate's own methods note their caller's line, and `GlobalAlloc`
    /// nothing.
    ///
    /// # Context
    /// The hook runs in every `alloc` and `free`, in whatever context that is, and must not use this heap.
    pub fn set_site_hook(&self, hook: fn() -> usize) {
        self.debugging.set_hook(hook);
    }

    /// The frame of an outer block.
    ///
    /// # Safety
    /// As for [`Frame::at`].
    pub(crate) unsafe fn frame(&self, start: NonNull<u8>) -> Frame<'_> {
        // SAFETY: the contract is the same.
        unsafe { Frame::at(start, self.engine.pages.key.get()) }
    }

    pub(crate) fn alloc_with_header(&self, layout: Layout, site: Site) -> Option<NonNull<[u8]>> {
        if layout.size() == 0 {
            return self.alloc_plain(layout);
        }
        let outer = outer(layout)?;
        let start = self.alloc_outer(|| self.alloc_plain(outer))?;
        Some(self.enframe(start.cast(), layout, site))
    }

    pub(crate) fn alloc_zeroed_with_header(&self, layout: Layout, site: Site) -> Option<NonNull<[u8]>> {
        let outer = outer(layout)?;
        if layout.size() > 0 && SizeClass::of(outer).is_none() {
            let start = self.alloc_outer(|| self.alloc_zeroed_plain(outer))?;
            return Some(self.enframe(start.cast(), layout, site));
        }
        let block = self.alloc_with_header(layout, site)?;
        // SAFETY: the block was just allocated, for that many bytes.
        unsafe { block.cast::<u8>().write_bytes(0, layout.size()) };
        Some(block)
    }

    /// Before there is no memory, what waits in quarantine is memory.
    fn alloc_outer(&self, alloc: impl Fn() -> Option<NonNull<[u8]>>) -> Option<NonNull<[u8]>> {
        alloc().or_else(|| if self.empty_quarantine() { alloc() } else { None })
    }

    /// Makes an outer block that was just allocated one with a debug header.
    pub(crate) fn enframe(&self, start: NonNull<u8>, layout: Layout, site: Site) -> NonNull<[u8]> {
        // The first block may come before the first chunk, which else would bring the key.
        self.engine.pages.key.begin(start.addr().get());
        // SAFETY: the outer block was just allocated, so it is ours, longer than a frame and aligned to 8.
        let frame = unsafe { self.frame(start) };
        if frame.read().state() == State::Free {
            self.check_poison(frame, Misuse::WriteAfterFree);
        }
        let age = self.debugging.tick();
        // SAFETY: as above; it was allocated for the outer Layout.
        let block = unsafe { frame.begin(layout, age, self.debugging.site(site)) };
        NonNull::slice_from_raw_parts(block, layout.size())
    }

    /// # Safety
    /// As for [`Heap::free`].
    pub(crate) unsafe fn free_with_header(&self, block: NonNull<u8>, layout: Layout, site: Site) {
        if layout.size() == 0 || self.emergency.owns(block) {
            return;
        }
        let start = match self.outer_start(block, layout) {
            Ok(start) => start,
            Err(misuse) => return self.report_block(misuse, block.as_ptr(), None),
        };
        // SAFETY: `outer_start` found a block or a run of this heap there, longer than a frame.
        let frame = unsafe { self.frame(start) };
        let seen = frame.read();
        let info = seen.info(self.debugging.now());
        if let Err(misuse) = self.check_free(&seen, start, block, layout) {
            return self.report_block(misuse, block.as_ptr(), info);
        }
        if !frame.claim(&seen, self.debugging.site(site)) {
            return self.report_block(Misuse::DoubleFree, block.as_ptr(), info);
        }
        // SAFETY: `check_free` found the frame whole, and the claim made the block ours.
        let damage = unsafe { frame.red_damage() };
        for (place, misuse) in damage.into_iter().zip([Misuse::Underrun, Misuse::Overrun]) {
            if let Some(place) = place {
                self.report_block(misuse, place, info);
            }
        }
        // SAFETY: as above.
        unsafe { frame.poison() };
        self.hold(start, layout);
    }

    /// Puts an outer block that was claimed into quarantine, or straight back where it is too long for that.
    fn hold(&self, start: NonNull<u8>, layout: Layout) {
        let is_short = outer(layout).is_some_and(|outer| outer.size() <= HELD_LEN);
        let key = self.engine.pages.key.get();
        let leaving =
            if is_short && self.is_in_chunk(start) { self.debugging.exchange(start, key) } else { Some(start) };
        if let Some(leaving) = leaving {
            self.release(leaving);
        }
    }

    /// Guarded blocks do not wait: their pages shall fault.
    fn is_in_chunk(&self, start: NonNull<u8>) -> bool {
        self.engine.pages.lookup(start).is_some()
    }

    /// Whether a block in that state may be freed like that.
    fn check_free(&self, seen: &Words, start: NonNull<u8>, block: NonNull<u8>, layout: Layout) -> Result<(), Misuse> {
        match seen.state() {
            State::Live if seen.block() != block.as_ptr() => Err(Misuse::InteriorPointer),
            State::Live if seen.layout() != layout => Err(Misuse::LayoutMismatch),
            State::Live => Ok(()),
            State::Held | State::Free => Err(Misuse::DoubleFree),
            State::Unknown => Err(self.why_unknown(start)),
        }
    }

    /// Why a block has no frame: it is free as the heap below sees it, or somebody has overwritten the frame.
    fn why_unknown(&self, start: NonNull<u8>) -> Misuse {
        let slab = self.engine.pages.lookup(start).and_then(|chunk| Slab::of(chunk.head_of(start)?));
        let inspected = slab.map(|slab| self.engine.inspect(None, start, slab.class()));
        inspected.and_then(Result::err).unwrap_or(Misuse::Underrun)
    }

    /// The start of the outer block that an address lies in.
    fn outer_start(&self, block: NonNull<u8>, layout: Layout) -> Result<NonNull<u8>, Misuse> {
        let pages = &self.engine.pages;
        let front =
            NonNull::new(block.as_ptr().wrapping_sub(front_len(layout.align()))).ok_or(Misuse::ForeignPointer)?;
        let Some(chunk) = pages.lookup(block) else {
            let is_own = pages.huge_run(front).is_some() || self.is_guarded(front);
            return if is_own { Ok(front) } else { Err(Misuse::ForeignPointer) };
        };
        if let Some(slab) = chunk.head_of(block).and_then(Slab::of) {
            let (_, carved) = slab.counts();
            let index = slab.index_around(block).filter(|index| *index < carved);
            return index.and_then(|index| slab.frame_place(index)).ok_or(Misuse::DoubleFree);
        }
        let run = chunk.head_of(front).filter(|desc| desc.kind() == Kind::Large && Chunk::start_of(desc) == front);
        match run {
            Some(_) => Ok(front),
            None => Err(self.engine.inspect_run(block, layout).err().unwrap_or(Misuse::InteriorPointer)),
        }
    }

    /// Gives a held block, which nobody else has, back to the heap below.
    fn release(&self, start: NonNull<u8>) {
        // SAFETY: who held the block had found its frame, and gives it to us.
        let frame = unsafe { self.frame(start) };
        let seen = frame.read();
        if seen.state() != State::Held {
            // Its Layout is not known any more: lost.
            return self.report_block(Misuse::WriteAfterFree, start.as_ptr(), None);
        }
        self.check_poison(frame, Misuse::WriteAfterFree);
        let Some(outer) = outer(seen.layout()) else { return };
        frame.end(SizeClass::of(outer).is_some() && self.run_of(start).is_none() && self.is_in_chunk(start));
        // SAFETY: the block is ours, was allocated for this outer Layout, and is used by nobody.
        unsafe { self.free_sized(start, outer) };
    }

    fn check_poison(&self, frame: Frame<'_>, misuse: Misuse) {
        // SAFETY: the state, known, says that the frame is whole and the block was poisoned; the caller owns it.
        if let Some(place) = unsafe { frame.poison_damage() } {
            self.report_block(misuse, place, frame.read().info(self.debugging.now()));
        }
    }

    /// Gives back what waits; true if there was anything.
    pub(crate) fn empty_quarantine(&self) -> bool {
        self.debugging.take_all().map(|start| self.release(start)).count() > 0
    }

    fn report_block(&self, misuse: Misuse, place: *mut u8, block: Option<BlockInfo>) {
        if misuse == Misuse::ForeignPointer {
            self.engine.count_stray();
        }
        self.engine.watch.report(Report { block, ..Report::new(misuse, place.addr()) });
    }

    /// The outer block and its Layout of a block in use that was allocated for `layout`; `None` if there is no such
    /// block.
    fn live_frame(&self, block: NonNull<u8>, layout: Layout) -> Option<(NonNull<u8>, Layout)> {
        let outer = outer(layout)?;
        let start = match self.emergency.owns(block) {
            true => NonNull::new(block.as_ptr().wrapping_sub(front_len(layout.align())))?,
            false => self.outer_start(block, layout).ok()?,
        };
        // SAFETY: a block or a run of this heap starts there, or memory set aside that has a debug header.
        let seen = unsafe { self.frame(start) }.read();
        (self.check_free(&seen, start, block, layout) == Ok(())).then_some((start, outer))
    }

    /// # Safety
    /// As for [`Heap::resize`].
    pub(crate) unsafe fn resize_with_header(&self, block: NonNull<u8>, old: Layout, new_size: usize) -> bool {
        let Ok(new) = Layout::from_size_align(new_size, old.align()) else { return false };
        if old.size() == 0 || new_size == 0 {
            return old.size() == new_size;
        }
        let (Some((start, old_outer)), Some(new_outer)) = (self.live_frame(block, old), outer(new)) else {
            return false;
        };
        // SAFETY: the outer block was allocated for that Layout, and the contract is the same.
        if !unsafe { self.resize_plain(start, old_outer, new_outer.size()) } {
            return false;
        }
        // SAFETY: `live_frame` found it there.
        let frame = unsafe { self.frame(start) };
        // SAFETY: the outer block is now that long.
        unsafe { frame.renew(new) };
        true
    }

    /// # Safety
    /// As for [`Heap::remap`].
    pub(crate) unsafe fn remap_with_header(
        &self,
        block: NonNull<u8>,
        old: Layout,
        new_size: usize,
    ) -> Option<NonNull<[u8]>> {
        // SAFETY: the contract is the same.
        if unsafe { self.resize_with_header(block, old, new_size) } {
            return Some(NonNull::slice_from_raw_parts(block, new_size));
        }
        let new = Layout::from_size_align(new_size, old.align()).ok().filter(|new| new.size() > 0)?;
        let (start, old_outer) = self.live_frame(block, old)?;
        // SAFETY: the outer block was allocated for that Layout, and the contract is the same.
        let moved = unsafe { self.remap_plain(start, old_outer, outer(new)?) }?;
        // SAFETY: the outer block is there now, with the frame as its content.
        let frame = unsafe { self.frame(moved.cast()) };
        // SAFETY: it is that long.
        let block = unsafe { frame.renew(new) };
        Some(NonNull::slice_from_raw_parts(block, new_size))
    }
}

#[cfg(not(feature = "guard-pages"))]
impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// No block is.
    fn is_guarded(&self, _: NonNull<u8>) -> bool {
        false
    }
}

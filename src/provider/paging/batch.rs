//! Frames on their way back: out of the page tables, but perhaps still in some CPU's TLB.
//!
//! They wait on the stack of whoever unmaps, so that no memory is needed to give memory back. Price: about 2 KiB of
//! stack, and one shootdown for each
//! [`FRAMES`] of them.

#![expect(unsafe_code, reason = "page tables and frames")]

use core::mem::MaybeUninit;

use x86_64::PhysAddr;
use x86_64::structures::paging::{FrameDeallocator, PageSize, PhysFrame, Size2MiB, Size4KiB};

/// Frames of pages in a batch.
const FRAMES: usize = 256;
/// Page tables that one hold may add to them: it unmaps at most [`HOLD_PAGES`](super::HOLD_PAGES) pages in a row, so it
/// meets at most three tables of level 1, since one that is left to huge pages or wholly ours has more pages than that,
/// and three of level 2.
const TABLES: usize = 8;

const _: () = assert!(super::HOLD_PAGES < 512, "one hold cannot empty a table of level 1 from end to end");

/// In a frame's address: it is one of 2 MiB.
const HUGE: u64 = 1;

/// See the file's head.
#[derive(Debug)]
pub(super) struct Batch {
    /// Written up to `count`.
    frames: [MaybeUninit<u64>; FRAMES + TABLES],
    count: usize,
}

impl Batch {
    pub(super) const fn new() -> Self {
        Self { frames: [const { MaybeUninit::uninit() }; FRAMES + TABLES], count: 0 }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether another page's frame, and what tables become empty by it, have room.
    pub(super) fn has_room(&self) -> bool {
        self.count < FRAMES
    }

    /// Adds a frame that no table leads to any more.
    pub(super) fn push<S: PageSize>(&mut self, frame: PhysFrame<S>) {
        if let Some(place) = self.frames.get_mut(self.count) {
            place.write(frame.start_address().as_u64() | if S::SIZE == Size2MiB::SIZE { HUGE } else { 0 });
            self.count += 1;
        }
    }

    /// Gives all frames back.
    ///
    /// # Safety
    /// No CPU has a translation to any of them, and nobody uses them.
    pub(super) unsafe fn give_to(&self, frames: &mut (impl FrameDeallocator<Size4KiB> + FrameDeallocator<Size2MiB>)) {
        for frame in self.frames.iter().take(self.count) {
            // SAFETY: `push` wrote those before `count`, which it alone changes.
            let frame = unsafe { frame.assume_init_read() };
            let addr = PhysAddr::new_truncate(frame & !HUGE);
            if frame & HUGE == 0 {
                // SAFETY: the caller's promise.
                unsafe { frames.deallocate_frame(PhysFrame::<Size4KiB>::containing_address(addr)) };
            } else {
                // SAFETY: the caller's promise.
                unsafe { frames.deallocate_frame(PhysFrame::<Size2MiB>::containing_address(addr)) };
            }
        }
    }
}

/// Takes the page tables that the mapper cleans up.
impl FrameDeallocator<Size4KiB> for Batch {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame<Size4KiB>) {
        self.push(frame);
    }
}

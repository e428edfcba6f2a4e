//! The kernel's frame allocator, by the traits of the `x86_64` crate.

use core::ops::Range;
use core::ptr::with_exposed_provenance_mut;

use x86_64::PhysAddr;
use x86_64::structures::paging::{FrameAllocator, FrameDeallocator, PhysFrame, Size2MiB, Size4KiB};

/// Frames: those that came back, linked through themselves, then those that were never taken.
pub(crate) struct Frames {
    fresh: Range<u64>,
    free: Option<u64>,
    free_count: u64,
}

impl Frames {
    /// Those of a range of memory that is mapped where it is.
    pub(crate) fn new(memory: Range<u64>) -> Self {
        Self { fresh: memory, free: None, free_count: 0 }
    }

    /// How many are free.
    pub(crate) fn count(&self) -> u64 {
        self.free_count + (self.fresh.end - self.fresh.start) / 4096
    }
}

// SAFETY: a frame is taken out of the list or off the fresh ones, so that it is given once until it comes back.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let address = match self.free {
            Some(frame) => {
                // SAFETY: `deallocate_frame` left the next one's address there; the frame is free.
                self.free = unsafe { with_exposed_provenance_mut::<Option<u64>>(frame as usize).read() };
                self.free_count -= 1;
                frame
            }
            None => {
                let frame = self.fresh.start;
                self.fresh.start = (frame + 4096 <= self.fresh.end).then_some(frame + 4096)?;
                frame
            }
        };
        PhysFrame::from_start_address(PhysAddr::new(address)).ok()
    }
}

impl FrameDeallocator<Size4KiB> for Frames {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
        let address = frame.start_address().as_u64();
        // SAFETY: nobody uses the frame any more, as our caller promises, and it is mapped where it is.
        unsafe { with_exposed_provenance_mut::<Option<u64>>(address as usize).write(self.free) };
        self.free = Some(address);
        self.free_count += 1;
    }
}

// SAFETY: this kernel has no huge frames to give.
unsafe impl FrameAllocator<Size2MiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame<Size2MiB>> {
        None
    }
}

impl FrameDeallocator<Size2MiB> for Frames {
    unsafe fn deallocate_frame(&mut self, _: PhysFrame<Size2MiB>) {}
}

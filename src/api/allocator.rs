//! `Allocator` for `&Heap`: one text for each of the traits of that name.
//!
//! The trait is unstable in `core`. Until it is not, collections take it from versions of the crate `allocator-api2`,
//! which are different traits to the compiler: hashbrown from 0.2, others from 0.4. So a feature chooses each.

use core::alloc::Layout;
use core::ptr::NonNull;

use crate::api::AllocError;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
use crate::heap::Heap;

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// `realloc` where the alignment may change too.
    ///
    /// # Safety
    /// As for [`realloc`](Heap::realloc).
    unsafe fn change(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if old.align() == new.align() {
            // SAFETY: the contract is the same.
            return unsafe { self.realloc(start, old, new.size()) };
        }
        let block = self.alloc(new)?;
        let count = old.size().min(new.size());
        self.count_copied(old.size(), count);
        // SAFETY: both blocks are at least that long, and the new one is nobody else's, so they do not overlap.
        unsafe { start.copy_to_nonoverlapping(block.cast(), count) };
        // SAFETY: the contract is the same, and the content has moved.
        unsafe { self.free(start, old) };
        Ok(block)
    }
}

/// Implements the `Allocator` of that module.
macro_rules! allocator {
    ($trait:path, $error:path) => {
        // SAFETY: blocks stay valid until freed, wherever the reference to the heap goes: the heap is borrowed, and its
        // memory is the provider's. Copies of the reference are the same heap.
        unsafe impl<P: PageProvider, C: CpuMode, const CPUS: usize> $trait for &Heap<P, C, CPUS> {
            fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, $error> {
                self.alloc(layout).map_err(|AllocError| $error)
            }

            fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, $error> {
                let block = self.alloc_zeroed(layout).map_err(|AllocError| $error)?;
                // The whole slice must be zero here, not only what was asked for.
                Ok(NonNull::slice_from_raw_parts(block.cast(), layout.size()))
            }

            unsafe fn deallocate(&self, start: NonNull<u8>, layout: Layout) {
                // SAFETY: by the contract of `Allocator` the block is ours, of a Layout that fits it, and unused.
                unsafe { self.free(start, layout) };
            }

            unsafe fn grow(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Result<NonNull<[u8]>, $error> {
                // SAFETY: the contract is the same.
                unsafe { self.change(start, old, new) }.map_err(|AllocError| $error)
            }

            unsafe fn shrink(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Result<NonNull<[u8]>, $error> {
                // SAFETY: the contract is the same.
                unsafe { self.change(start, old, new) }.map_err(|AllocError| $error)
            }
        }
    };
}

#[cfg(feature = "allocator-api2-02")]
allocator!(allocator_api2_02::alloc::Allocator, allocator_api2_02::alloc::AllocError);
#[cfg(feature = "allocator-api2-04")]
allocator!(allocator_api2_04::alloc::Allocator, allocator_api2_04::alloc::AllocError);
#[cfg(has_allocator)]
allocator!(core::alloc::Allocator, core::alloc::AllocError);

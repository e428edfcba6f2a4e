//! Places where blocks are left for others.

use core::alloc::GlobalAlloc;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicPtr, Ordering};

use super::block::Block;

/// Places that hold a block each, or none. All operations are one exchange: any context may use any of them at any
/// time.
#[derive(Debug)]
pub(crate) struct Slots<const COUNT: usize>([AtomicPtr<u64>; COUNT]);

impl<const COUNT: usize> Slots<COUNT> {
    /// All empty.
    pub(crate) const fn new() -> Self {
        Self([const { AtomicPtr::new(null_mut()) }; COUNT])
    }

    /// Leaves `block` in a place and takes what was there.
    pub(crate) fn swap(&self, place: usize, block: Option<Block>) -> Option<Block> {
        let new = block.map_or(null_mut(), |block| block.into_start().as_ptr());
        let slot = self.0.get(place % COUNT)?;
        // SAFETY: what is in a place came from `into_start`, and the exchange took it out.
        NonNull::new(slot.swap(new, Ordering::AcqRel)).map(|start| unsafe { Block::from_start(start) })
    }

    /// Frees what is in every `parts`-th place from `part` on; gives the number of blocks.
    pub(crate) fn free_part(&self, heap: &(impl GlobalAlloc + ?Sized), part: usize, parts: usize) -> usize {
        let blocks = (part..COUNT).step_by(parts).filter_map(|place| self.swap(place, None));
        blocks.map(|block| block.free(heap)).count()
    }
}

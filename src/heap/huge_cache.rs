//! Huge blocks that were freed and will be asked for again: they stay noted as what they are, and are taken back by
//! length.
//!
//! Only what went back to the provider and was missed then is kept (the source's `Recent`), so a huge block
//! that is used once goes at once. Price: such a run serves nothing but a huge block of its length, until the provider
//! has nothing more, or somebody trims or maintains the heap.

use core::ptr::{NonNull, null_mut};

use crate::base::sync::{AtomicPtr, Ordering};

/// Blocks that may be kept at once.
const PLACES: usize = 4;

/// All zero is the empty state. Lock-free, callable from any context.
#[derive(Debug)]
pub(crate) struct HugeCache {
    starts: [AtomicPtr<u8>; PLACES],
}

impl HugeCache {
    pub(crate) const fn new() -> Self {
        Self { starts: [const { AtomicPtr::new(null_mut()) }; PLACES] }
    }

    /// Keeps a block that the caller owns. False: there is no room.
    pub(crate) fn put(&self, start: NonNull<u8>) -> bool {
        let put = |place: &AtomicPtr<u8>| {
            place.compare_exchange(null_mut(), start.as_ptr(), Ordering::Release, Ordering::Relaxed).is_ok()
        };
        self.starts.iter().any(put)
    }

    /// Takes a block out that fits: it is the caller's then, who asks again whether it fits.
    pub(crate) fn take(&self, fits: impl Fn(NonNull<u8>) -> bool) -> Option<NonNull<u8>> {
        self.starts.iter().find_map(|place| {
            let start = NonNull::new(place.load(Ordering::Relaxed)).filter(|start| fits(*start))?;
            let taken = place.compare_exchange(start.as_ptr(), null_mut(), Ordering::Acquire, Ordering::Relaxed);
            taken.is_ok().then_some(start)
        })
    }

    /// The blocks that are kept. A guess.
    pub(crate) fn starts(&self) -> impl Iterator<Item = NonNull<u8>> {
        self.starts.iter().filter_map(|place| NonNull::new(place.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_kept_once_and_taken_once() {
        let mut memory = [0_u8; PLACES + 1];
        let cache = HugeCache::new();
        let starts: [_; PLACES + 1] = core::array::from_fn(|at| NonNull::from(&mut memory[at]));
        assert!(starts[..PLACES].iter().all(|start| cache.put(*start)));
        assert!(!cache.put(starts[PLACES]), "there is no room");
        assert_eq!(cache.take(|start| start == starts[2]), Some(starts[2]));
        assert_eq!(cache.take(|start| start == starts[2]), None);
        assert_eq!(cache.starts().count(), PLACES - 1);
    }
}

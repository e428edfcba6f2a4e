//! Links as plain pointers: nothing to know, nothing to check.

#![expect(unsafe_code, reason = "links of free blocks")]

use core::ptr::NonNull;

use crate::base::sync::{read, write};

/// What links are written under: nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key;

/// Where a key is kept: no bytes.
#[derive(Debug)]
pub(crate) struct KeyCell;

/// Blocks lost behind damaged links: there is no telling, so none.
#[derive(Debug)]
pub(crate) struct Damage;

impl Key {
    pub(crate) const NONE: Self = Self;

    /// Links may always be written.
    #[inline]
    pub(crate) fn is_some(self) -> bool {
        true
    }

    /// Reads the link at `place`: always good.
    ///
    /// # Safety
    /// As for [`block::next`](crate::slab::block).
    #[inline]
    pub(crate) unsafe fn read(self, place: NonNull<u8>) -> Option<*mut u8> {
        // SAFETY: by the contract the word is a link, in 8 bytes aligned to 8 that stand still.
        Some(unsafe { read(place.cast::<*mut u8>().as_ptr()) })
    }

    /// Writes the link at `place`.
    ///
    /// # Safety
    /// The 8 bytes at `place`, aligned to 8, are the caller's alone.
    #[inline]
    pub(crate) unsafe fn write(self, place: NonNull<u8>, next: *mut u8) {
        // SAFETY: the contract says so.
        unsafe { write(place.cast::<*mut u8>().as_ptr(), next) }
    }

    /// What is done to the link of a block that leaves its list: nothing.
    ///
    /// # Safety
    /// As for [`write`](Self::write).
    #[inline]
    pub(crate) unsafe fn clear(self, _: NonNull<u8>) {}
}

impl KeyCell {
    pub(crate) const fn new() -> Self {
        Self
    }

    #[inline]
    pub(crate) fn get(&self) -> Key {
        Key
    }

    #[inline]
    pub(crate) fn set(&self, _: Key) {}

    pub(crate) fn begin(&self, _: usize) {}
}

impl Damage {
    pub(crate) const fn new() -> Self {
        Self
    }

    #[inline]
    pub(crate) fn note(&self, _: NonNull<u8>, _: u32) {}

    /// Blocks that were lost here, ever.
    pub(crate) fn lost_count(&self) -> u64 {
        0
    }
}

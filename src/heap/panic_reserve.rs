//! Memory for the time after a panic.
//!
//! A panic may strike inside the heap: a cache is then busy and locks are held for good. The handler still wants to
//! format and to print. So a kernel may set some bytes aside in good time; in panic mode they are handed out one after
//! the other by moving one number, without a lock, and what is freed of them is not used again. Price: the bytes, which
//! are nobody else's meanwhile, and one look at a flag on paths that are slow anyway: the fast paths do not know, since
//! panic mode makes every cache look busy.

#![expect(unsafe_code, reason = "a block is cut off what was set aside")]

use core::ptr::{NonNull, null_mut};

use crate::base::sync::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// What is left free in front: no block lies in the first granule, whose descriptor says that all of it is one.
pub(crate) const GAP_LEN: usize = 4096;

/// One run of bytes and how much of it is out. All zero: none, and no panic.
#[derive(Debug)]
pub(crate) struct Emergency {
    on: AtomicBool,
    start: AtomicPtr<u8>,
    len: AtomicUsize,
    /// Bytes handed out from the start, the gap included; 0 before the first.
    used: AtomicUsize,
}

impl Emergency {
    pub(crate) const fn new() -> Self {
        Self {
            on: AtomicBool::new(false),
            start: AtomicPtr::new(null_mut()),
            len: AtomicUsize::new(0),
            used: AtomicUsize::new(0),
        }
    }

    /// Keeps a block for the emergency, for good. Gives it back if there is one already.
    pub(crate) fn provide(&self, block: NonNull<[u8]>) -> Result<(), NonNull<[u8]>> {
        let start = block.cast::<u8>().as_ptr();
        self.start.compare_exchange(null_mut(), start, Ordering::Relaxed, Ordering::Relaxed).map_err(|_| block)?;
        // Until then nothing of it is handed out.
        self.len.store(block.len(), Ordering::Release);
        Ok(())
    }

    pub(crate) fn begin(&self) {
        self.on.store(true, Ordering::Release);
    }

    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// Bytes of it for good; `None` if no panic has begun, or so many are not left. Lock-free, callable from any
    /// context.
    pub(crate) fn take(&self, len: usize, align: usize) -> Option<NonNull<[u8]>> {
        if !self.is_on() {
            return None;
        }
        let all = self.len.load(Ordering::Acquire);
        let start = NonNull::new(self.start.load(Ordering::Relaxed))?;
        let mut used = self.used.load(Ordering::Relaxed);
        loop {
            let from = start.addr().get().checked_add(used.max(GAP_LEN))?;
            let offset = from.checked_next_multiple_of(align)? - start.addr().get();
            let end = offset.checked_add(len).filter(|end| *end <= all)?;
            match self.used.compare_exchange_weak(used, end, Ordering::Relaxed, Ordering::Relaxed) {
                // SAFETY: `offset + len <= all`, so the sum stays in the block.
                Ok(_) => return Some(NonNull::slice_from_raw_parts(unsafe { start.add(offset) }, len)),
                Err(now) => used = now,
            }
        }
    }

    /// Whether a block is of the emergency's bytes: not to be freed.
    pub(crate) fn owns(&self, block: NonNull<u8>) -> bool {
        let start = self.start.load(Ordering::Relaxed).addr();
        block.addr().get().wrapping_sub(start) < self.used.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests;

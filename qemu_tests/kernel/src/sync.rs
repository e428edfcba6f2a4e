//! A spin lock that masks interrupts while it is held.

use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::interrupts;

/// A value behind a spin lock. Whoever holds it runs with interrupts off: neither a handler nor another thread of this
/// CPU can wait for it. Not for NMI handlers.
pub struct Lock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `with` gives access to one CPU at a time, so sharing the lock moves the value between CPUs and no more.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// A free lock around `value`.
    pub const fn new(value: T) -> Self {
        Self { held: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Runs `f` on the value. Nesting deadlocks.
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        interrupts::without(|| {
            while self.held.swap(true, Ordering::Acquire) {
                core::hint::spin_loop();
            }
            // SAFETY: `held` was false and is true now by this CPU's swap; nobody else enters before the store below.
            let result = f(unsafe { &mut *self.value.get() });
            self.held.store(false, Ordering::Release);
            result
        })
    }
}

impl<T> fmt::Debug for Lock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lock").finish_non_exhaustive()
    }
}

/// A value that the boot code sets once, before anybody reads it.
pub struct Once<T> {
    ready: AtomicBool,
    value: UnsafeCell<Option<T>>,
}

// SAFETY: after `set` nothing is written any more, and only shared references to the value are given out.
unsafe impl<T: Send + Sync> Sync for Once<T> {}

impl<T> Once<T> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { ready: AtomicBool::new(false), value: UnsafeCell::new(None) }
    }

    /// Sets the value.
    ///
    /// # Safety
    /// Called once, and not at the same time as [`get`](Self::get).
    pub unsafe fn set(&self, value: T) -> &T {
        // SAFETY: the caller promises that nobody else is here.
        let slot = unsafe { &mut *self.value.get() };
        let value = slot.insert(value);
        self.ready.store(true, Ordering::Release);
        value
    }

    /// The value, once it is set.
    pub fn get(&self) -> Option<&T> {
        if !self.ready.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: `ready` was set after the only write.
        unsafe { &*self.value.get() }.as_ref()
    }
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for Once<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Once").finish_non_exhaustive()
    }
}

//! The seam under `cfg(simulated)`: the machine's own atomics, with each access told to an observer first.
//!
//! So that what CPUs do to each other's cache lines can be counted for more CPUs than a host has: the observer keeps
//! the books, and lets another CPU go on where it likes (`tests/scaling`). Everything else of the crate is compiled as
//! it ships. Price: a call for each access.

#![expect(unsafe_code, reason = "memory whose accesses are counted")]
#![expect(dead_code, reason = "every atomic has the same methods, used or not")]

use core::sync::atomic as plain;
pub(crate) use core::sync::atomic::{Ordering, compiler_fence, fence};
use std::sync::OnceLock;

/// What happens to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is read.
    Load,
    /// It is written.
    Store,
    /// It is changed by one locked instruction.
    Update,
    /// A flag, and so perhaps a lock, is changed by one locked instruction.
    UpdateFlag,
    /// Nothing: somebody waits.
    Wait,
}

/// Is told the address and what is about to happen there.
pub type Observer = fn(usize, Access);

static OBSERVER: OnceLock<Observer> = OnceLock::new();

/// Has every access of every heap told to that observer. The first call counts.
pub fn observe_with(observer: Observer) {
    OBSERVER.get_or_init(|| observer);
}

fn tell<T>(place: *const T, access: Access) {
    if let Some(observer) = OBSERVER.get() {
        observer(place.addr(), access);
    }
}

/// Reads memory that only this context writes.
///
/// # Safety
/// As for [`core::ptr::read`].
pub(crate) unsafe fn read<T>(from: *const T) -> T {
    tell(from, Access::Load);
    // SAFETY: the contract is the same.
    unsafe { from.read() }
}

/// Writes memory that only this context uses.
///
/// # Safety
/// As for [`core::ptr::write`].
pub(crate) unsafe fn write<T>(to: *mut T, value: T) {
    tell(to, Access::Store);
    // SAFETY: the contract is the same.
    unsafe { to.write(value) }
}

pub(crate) fn spin_loop() {
    tell(core::ptr::null::<u8>(), Access::Wait);
}

macro_rules! atomic {
    ($name:ident $(<$of:ident>)?, $value:ty, $update:ident) => {
        #[repr(transparent)]
        pub(crate) struct $name $(<$of>)? (plain::$name $(<$of>)?);

        impl $(<$of>)? core::fmt::Debug for $name $(<$of>)? {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl $(<$of>)? Default for $name $(<$of>)? {
            fn default() -> Self {
                Self(plain::$name::default())
            }
        }

        impl $(<$of>)? $name $(<$of>)? {
            pub(crate) const fn new(value: $value) -> Self {
                Self(plain::$name::new(value))
            }

            pub(crate) fn load(&self, order: Ordering) -> $value {
                tell(self, Access::Load);
                self.0.load(order)
            }

            pub(crate) fn store(&self, value: $value, order: Ordering) {
                tell(self, Access::Store);
                self.0.store(value, order);
            }

            pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                tell(self, Access::$update);
                self.0.swap(value, order)
            }

            pub(crate) fn compare_exchange(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                tell(self, Access::$update);
                self.0.compare_exchange(old, new, success, failure)
            }

            /// Fails only where another value is: a schedule is the same each time.
            pub(crate) fn compare_exchange_weak(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.compare_exchange(old, new, success, failure)
            }
        }
    };
}

macro_rules! arithmetic {
    ($name:ident, $value:ty, $($method:ident)*) => {
        impl $name {
            $(pub(crate) fn $method(&self, value: $value, order: Ordering) -> $value {
                tell(self, Access::Update);
                self.0.$method(value, order)
            })*
        }
    };
}

atomic!(AtomicBool, bool, UpdateFlag);
atomic!(AtomicU32, u32, Update);
atomic!(AtomicU64, u64, Update);
atomic!(AtomicUsize, usize, Update);
atomic!(AtomicPtr<T>, *mut T, Update);
arithmetic!(AtomicU32, u32, fetch_add fetch_sub fetch_and fetch_or fetch_max);
arithmetic!(AtomicU64, u64, fetch_add fetch_sub fetch_and fetch_or fetch_max);
arithmetic!(AtomicUsize, usize, fetch_add fetch_sub fetch_and fetch_or fetch_max);

//! As which integer a kernel keeps the CPU's number in its per-CPU area.

#![expect(unsafe_code, reason = "contracts of the kernel")]

/// An integer as which a per-CPU area may hold the CPU's number: `u16`, `u32`, `u64` or `usize`.
///
/// It is loaded as wide as it is, and filled up with zeros. So the greatest value of each type is above any heap's CPU
/// count: `u32::MAX` says in an area with a `u32` what [`NO_INDEX`](super::NO_INDEX) says in one with a `usize`.
pub trait Number: Load {}

/// How the type is loaded from this architecture's area. Out of reach, so that nobody else implements [`Number`].
pub trait Load: Copy + core::fmt::Debug {
    /// Loads the number that lies `OFFSET` bytes into this CPU's area. May not be reused by the compiler: the code may
    /// have moved to another CPU in between.
    ///
    /// # Safety
    /// The bytes are aligned and readable, on whichever CPU this runs.
    unsafe fn load<const OFFSET: usize>() -> usize;
}

impl<T: Load> Number for T {}

//! Handing free ranges over to a heap's region provider: the one file with `unsafe` in it.

#![expect(unsafe_code, reason = "a region is handed over here, and nowhere else")]

use core::ops::Range;
use core::ptr::with_exposed_provenance_mut;

use smp_heap::RegionProvider;
use smp_heap::provider::RegionError;

use crate::{Free, MemoryMap};

/// What became of the free ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "memory that was left out is worth a line in the kernel's log"]
pub struct Added {
    /// How many regions were added.
    pub regions: usize,
    /// Bytes in them.
    pub bytes: u64,
    /// Bytes in free ranges that were not added. They are still the caller's.
    pub left: u64,
    /// Why the first of those was not.
    pub error: Option<RegionError>,
}

impl<M: MemoryMap> Free<'_, M> {
    /// Adds every free range to `provider`, the longest first, each at its physical address plus `offset`.
    ///
    /// A range that would begin at the null pointer is added without its first page. One that would not fit into the
    /// virtual address space, or is refused, is counted in [`Added::left`]. The heap may be in use meanwhile; the map
    /// must not lie in what is added.
    ///
    /// # Safety
    /// Every free range is RAM that is mapped, readable and writable, at its physical address plus `offset` (wrapping),
    /// and nobody uses it through any mapping, from this call on for as long as the provider or anything it gave is
    /// used.
    pub unsafe fn add_to<const REGIONS: usize>(&self, provider: &RegionProvider<REGIONS>, offset: usize) -> Added {
        let mut added = Added::default();
        for range in self.longest_first() {
            let whole = range.end - range.start;
            let (start, len) = match placed(range, offset, self.page_len()) {
                Ok(place) => place,
                Err(error) => {
                    added.leave(whole, error);
                    continue;
                }
            };
            // SAFETY: the bytes from `start` on are those of a free range at its address plus `offset`: mapped, and
            // used by nobody else from now on, as our caller promises. No pointer to them has existed in this program,
            // so that exposed provenance, as for all memory the program did not allocate, is what they have.
            match unsafe { provider.add_region(with_exposed_provenance_mut(start), len) } {
                Ok(()) => {
                    added.regions += 1;
                    added.bytes += len as u64;
                    added.left += whole - len as u64;
                }
                Err(error) => added.leave(whole, error),
            }
        }
        added
    }
}

impl Added {
    fn leave(&mut self, len: u64, error: RegionError) {
        self.left += len;
        self.error.get_or_insert(error);
    }
}

/// Virtual start and length of a physical range, without the page that would begin at the null pointer.
fn placed(range: Range<u64>, offset: usize, page_len: u64) -> Result<(usize, usize), RegionError> {
    let place = |physical: u64| usize::try_from(physical).map(|address| address.wrapping_add(offset));
    let mut physical = range.start;
    if place(physical) == Ok(0) {
        physical += page_len;
    }
    let start = place(physical).map_err(|_| RegionError::Wraps)?;
    let len = usize::try_from(range.end.saturating_sub(physical)).map_err(|_| RegionError::Wraps)?;
    Ok((start, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    #[test]
    fn a_range_is_placed_at_its_offset() {
        assert_eq!(placed(0x1000..0x3000, 0x10_0000, PAGE), Ok((0x10_1000, 0x2000)));
        // The upper half, as kernels map physical memory.
        let upper = usize::MAX << 47;
        assert_eq!(placed(0x1000..0x3000, upper, PAGE), Ok((upper + 0x1000, 0x2000)));
    }

    #[test]
    fn the_page_at_the_null_pointer_is_left_out() {
        assert_eq!(placed(0..0x3000, 0, PAGE), Ok((0x1000, 0x2000)));
        assert_eq!(placed(0x5000..0x8000, 0_usize.wrapping_sub(0x5000), PAGE), Ok((0x1000, 0x2000)));
        assert_eq!(placed(0..0x1000, 0, PAGE), Ok((0x1000, 0)));
    }
}

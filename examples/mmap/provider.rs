//! A provider over the host's address space: runs are anonymous mappings.
//!
//! - `map` asks for more than it needs if the alignment says so, and gives the ends back: the system aligns to pages
//!   only.
//! - `decommit` is `MADV_DONTNEED`: the system takes the pages, and the next touch finds a page of zeros. So `commit`
//!   has nothing to do.
//! - `resize` and `remap` are `mremap`, which moves page-table entries and copies nothing.

use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicUsize, Ordering};
use std::io::Error;

use smp_heap::{PageProvider, PageRun};

/// Runs of the operating system's pages.
#[derive(Debug, Default)]
pub(crate) struct Mmap {
    mapped_len: AtomicUsize,
}

impl Mmap {
    /// A provider that has given nothing yet.
    pub(crate) const fn new() -> Self {
        Self { mapped_len: AtomicUsize::new(0) }
    }

    /// Bytes of addresses that are mapped, with memory behind them or without.
    pub(crate) fn mapped_len(&self) -> usize {
        self.mapped_len.load(Ordering::Relaxed)
    }

    fn change_len(&self, old: usize, new: usize) {
        self.mapped_len.fetch_add(new.wrapping_sub(old), Ordering::Relaxed);
    }
}

/// `mremap` failed, as did `mmap`, if it gives this.
fn address(answer: *mut libc::c_void) -> Option<NonNull<u8>> {
    if answer == libc::MAP_FAILED { None } else { NonNull::new(answer.cast()) }
}

/// Unmaps pages; `len` may be 0.
///
/// # Safety
/// The pages are mapped by this file, and nobody uses them.
unsafe fn unmap_pages(start: NonNull<u8>, len: usize) -> bool {
    // SAFETY: the contract is the same.
    len == 0 || unsafe { libc::munmap(start.as_ptr().cast(), len) } == 0
}

// SAFETY: a new anonymous mapping is nobody else's, and stays until it is unmapped. `MADV_DONTNEED` leaves it mapped.
unsafe impl PageProvider for Mmap {
    const ZEROED: bool = true;
    // The system's calls may be made by several threads at once, and inside a signal handler.
    const REENTRANT: bool = true;
    const REMAPS: bool = true;
    const DECOMMITS: bool = true;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let spare = run.align() - Self::PAGE_LEN;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the system's choice touches nothing that exists.
        let answer = unsafe { libc::mmap(null_mut(), run.len() + spare, protection, flags, -1, 0) };
        let first = address(answer)?;
        let skip = first.addr().get().wrapping_neg() & (run.align() - 1);
        // SAFETY: `skip <= spare`, so inside the mapping.
        let start = unsafe { first.add(skip) };
        // SAFETY: `skip + run.len()` is at most the mapping's length.
        let end = unsafe { start.add(run.len()) };
        // SAFETY: the pages in front of the run, which nobody knows yet.
        unsafe { unmap_pages(first, skip) };
        // SAFETY: the pages behind it, as above.
        unsafe { unmap_pages(end, spare - skip) };
        self.change_len(0, run.len());
        Some(start)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: by the contract the run came from `map`, and is not used.
        let gone = unsafe { unmap_pages(start, run.len()) };
        if gone {
            self.change_len(run.len(), 0);
        }
        gone
    }

    unsafe fn decommit(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: by the contract the pages are of a run of this provider's, and their content is not needed.
        unsafe { libc::madvise(start.as_ptr().cast(), run.len(), libc::MADV_DONTNEED) == 0 }
    }

    unsafe fn commit(&self, _: NonNull<u8>, _: PageRun) -> bool {
        true
    }

    unsafe fn resize(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> bool {
        // SAFETY: by the contract the run is one of ours; without a flag it stays where it is.
        let answer = unsafe { libc::mremap(start.as_ptr().cast(), old.len(), new.len(), 0) };
        let changed = address(answer).is_some();
        if changed {
            self.change_len(old.len(), new.len());
        }
        changed
    }

    unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
        if new.align() > Self::PAGE_LEN {
            return None;
        }
        // SAFETY: by the contract the run is one of ours, and only its new place is used afterwards.
        let answer = unsafe { libc::mremap(start.as_ptr().cast(), old.len(), new.len(), libc::MREMAP_MAYMOVE) };
        let place = address(answer)?;
        self.change_len(old.len(), new.len());
        Some(place)
    }
}

/// Bytes of memory that the process has: the second number in `/proc/self/statm`, in pages.
///
/// # Errors
/// If there is no such file, or something else is in it.
pub(crate) fn resident_len() -> Result<usize, Error> {
    let numbers = std::fs::read_to_string("/proc/self/statm")?;
    let pages = numbers.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok());
    pages.map(|pages| pages * Mmap::PAGE_LEN).ok_or_else(|| Error::other("no number of pages"))
}

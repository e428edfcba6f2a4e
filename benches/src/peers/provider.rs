//! Pages from the operating system as this crate's page provider, with its calls counted and timed.

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use smp_heap::{PageProvider, PageRun};

use super::ProviderCost;
use crate::memory;

#[derive(Debug)]
pub(super) struct SystemPages {
    calls: AtomicU64,
    nanos: AtomicU64,
}

impl SystemPages {
    pub(super) const fn new() -> Self {
        Self { calls: AtomicU64::new(0), nanos: AtomicU64::new(0) }
    }

    pub(super) fn cost(&self) -> ProviderCost {
        ProviderCost { calls: self.calls.load(Ordering::Relaxed), nanos: self.nanos.load(Ordering::Relaxed) }
    }

    fn timed<R>(&self, call: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = call();
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        result
    }
}

fn unmap(start: NonNull<u8>, len: usize) -> bool {
    // SAFETY: callers own these pages and use them no more.
    unsafe { libc::munmap(start.as_ptr().cast(), len) == 0 }
}

fn map_aligned(run: PageRun) -> Option<NonNull<u8>> {
    let spare = run.align() - SystemPages::PAGE_LEN;
    let start = memory::map(run.len() + spare)?;
    let before = start.addr().get().wrapping_neg() & (run.align() - 1);
    // SAFETY: at most `spare` bytes in, so in the mapping.
    let aligned = unsafe { start.add(before) };
    if before > 0 {
        unmap(start, before);
    }
    if spare > before {
        // SAFETY: `before + run.len()` is less than the mapping's length.
        unmap(unsafe { aligned.add(run.len()) }, spare - before);
    }
    Some(aligned)
}

fn change(start: NonNull<u8>, old: PageRun, new: PageRun, flags: libc::c_int) -> Option<NonNull<u8>> {
    // SAFETY: the run is the caller's, who goes by the answer.
    let place = unsafe { libc::mremap(start.as_ptr().cast(), old.len(), new.len(), flags) };
    if ptr::eq(place, libc::MAP_FAILED) { None } else { NonNull::new(place.cast()) }
}

// SAFETY: anonymous private mappings are nobody else's and stay until unmapped; the system takes calls from everywhere
// at once.
unsafe impl PageProvider for SystemPages {
    const ZEROED: bool = true;
    const REENTRANT: bool = true;
    const REMAPS: bool = true;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.timed(|| map_aligned(run))
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        self.timed(|| unmap(start, run.len()))
    }

    unsafe fn resize(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> bool {
        self.timed(|| change(start, old, new, 0).is_some())
    }

    unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
        if new.align() > Self::PAGE_LEN {
            return None;
        }
        self.timed(|| change(start, old, new, libc::MREMAP_MAYMOVE))
    }
}

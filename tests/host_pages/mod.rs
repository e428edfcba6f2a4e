//! The host's allocator as a page provider, for the unit tests and the host tests alike: checks that every run comes
//! back as it was given. What fails, is short or is counted, `battery::Faulty` adds.

use core::alloc::Layout;
use core::ptr::NonNull;
use std::collections::BTreeMap;
use std::sync::Mutex;

use super::{PageProvider, PageRun};

/// Every run is remembered until it comes back. `MOVES`: pages come zeroed, and runs can be resized and moved; else
/// they come dirty.
#[derive(Debug, Default)]
pub(crate) struct HostPages<const REENTRANT: bool = true, const MOVES: bool = false> {
    /// By address: what the heap has, and what the host's allocator gave for it.
    runs: Mutex<BTreeMap<usize, (PageRun, Layout)>>,
    /// Runs lie at multiples of this too; 0: of what is asked for only.
    least_align: usize,
}

impl<const REENTRANT: bool, const MOVES: bool> HostPages<REENTRANT, MOVES> {
    /// Every run lies at a multiple of `least_align`, so that nothing depends on where the host's memory is.
    pub(crate) const fn aligned(least_align: usize) -> Self {
        Self { runs: Mutex::new(BTreeMap::new()), least_align }
    }

    fn take(&self, start: NonNull<u8>, run: PageRun) {
        let (given, layout) = self.runs.lock().unwrap().remove(&start.addr().get()).expect("a run comes back once");
        assert_eq!(given, run, "a run goes back as it came");
        // SAFETY: the host's allocator gave it with this layout, and the heap uses it no more.
        unsafe { std::alloc::dealloc(start.as_ptr(), layout) };
    }
}

// SAFETY: runs come from the host's allocator, are remembered until they are given back, and given back once. The mutex
// is held for moments and never across a call of the heap; contexts that interrupt its holder use no such provider.
unsafe impl<const REENTRANT: bool, const MOVES: bool> PageProvider for HostPages<REENTRANT, MOVES> {
    const ZEROED: bool = MOVES;
    const REENTRANT: bool = REENTRANT;
    const REMAPS: bool = MOVES;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let layout = run.layout().align_to(self.least_align.max(1)).unwrap();
        let alloc = if MOVES { std::alloc::alloc_zeroed } else { std::alloc::alloc };
        // SAFETY: a run's length is not 0.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        if !MOVES {
            // The heap must not rely on zeros from a provider that does not promise them.
            // SAFETY: just allocated, that long.
            unsafe { start.write_bytes(0xa5, run.len()) };
        }
        assert!(self.runs.lock().unwrap().insert(start.addr().get(), (run, layout)).is_none());
        Some(start)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        self.take(start, run);
        true
    }

    unsafe fn resize(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> bool {
        let mut runs = self.runs.lock().unwrap();
        let (given, _) = runs.get_mut(&start.addr().get()).expect("a run of this provider");
        assert_eq!(*given, old, "a run is resized as it is");
        let shrinks = MOVES && new.len() <= old.len();
        if shrinks {
            *given = new;
        }
        shrinks
    }

    unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
        let place = if MOVES { self.map(new)? } else { return None };
        // SAFETY: both runs are at least that long, and the new one is nobody else's.
        unsafe { start.copy_to_nonoverlapping(place, old.len().min(new.len())) };
        self.take(start, old);
        Some(place)
    }
}

//! What the host tests share: providers over the host's memory that keep books, and CPU identities over threads.

use std::alloc::Layout;
use std::cell::Cell;
use std::ptr::NonNull;
#[cfg(target_os = "linux")]
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::host_pages::HostPages;
#[cfg(target_os = "linux")]
use smp_heap::PageRun;
use smp_heap::battery::{Faulty, Filled};
use smp_heap::cpu::CpuMode;
use smp_heap::{CpuHint, CpuPin, Heap, Hint, PageProvider, Violation};

/// The host's memory, with knobs and books; every run is checked when it comes back.
pub(crate) type Books = Faulty<HostPages>;

/// A hint that a function tells, of one type whichever function that is: each type of heap is compiled anew.
pub(crate) type Told = Hint<fn() -> Option<usize>>;

pub(crate) fn told(hint: fn() -> Option<usize>) -> Told {
    Hint(hint)
}

/// So many bytes of it.
pub(crate) fn limited(len: usize) -> Books {
    let books = Books::default();
    books.set_limit(len);
    books
}

/// A provider over the host's address space: zeroed pages, growth in place and by moving pages.
#[cfg(target_os = "linux")]
#[derive(Debug, Default)]
pub(crate) struct Mmap {
    pub(crate) held_len: AtomicUsize,
    pub(crate) moves: AtomicU64,
}

#[cfg(target_os = "linux")]
mod mmap {
    use super::*;

    fn map_pages(len: usize) -> Option<NonNull<u8>> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping at an address of the system's choice touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) }
    }

    // SAFETY: anonymous private mappings are nobody else's and stay until unmapped.
    unsafe impl PageProvider for Mmap {
        const ZEROED: bool = true;
        const REENTRANT: bool = true;
        const REMAPS: bool = true;

        fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
            let spare = run.align() - Self::PAGE_LEN;
            let start = map_pages(run.len() + spare)?;
            let skip = start.addr().get().wrapping_neg() & (run.align() - 1);
            // SAFETY: `skip <= spare`, so this stays in the mapping.
            let aligned = unsafe { start.add(skip) };
            // SAFETY: `skip + run.len()` is at most the mapping's length.
            let behind = unsafe { aligned.add(run.len()) };
            for (from, len) in [(start, skip), (behind, spare - skip)] {
                if len > 0 {
                    // SAFETY: the pages before and behind the run are in the mapping just made and unused.
                    unsafe { libc::munmap(from.as_ptr().cast(), len) };
                }
            }
            self.held_len.fetch_add(run.len(), Ordering::Relaxed);
            Some(aligned)
        }

        unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
            self.held_len.fetch_sub(run.len(), Ordering::Relaxed);
            // SAFETY: the run came from `map` and is unused by the caller's contract.
            unsafe { libc::munmap(start.as_ptr().cast(), run.len()) == 0 }
        }

        unsafe fn resize(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> bool {
            // SAFETY: the run is ours; without MAYMOVE it stays where it is.
            let place = unsafe { libc::mremap(start.as_ptr().cast(), old.len(), new.len(), 0) };
            if place == libc::MAP_FAILED {
                return false;
            }
            self.held_len.fetch_add(new.len().wrapping_sub(old.len()), Ordering::Relaxed);
            true
        }

        unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
            if new.align() > Self::PAGE_LEN {
                return None;
            }
            // SAFETY: the run is ours, and the caller uses only the new place afterwards.
            let place = unsafe { libc::mremap(start.as_ptr().cast(), old.len(), new.len(), libc::MREMAP_MAYMOVE) };
            if place == libc::MAP_FAILED {
                return None;
            }
            self.moves.fetch_add(1, Ordering::Relaxed);
            self.held_len.fetch_add(new.len().wrapping_sub(old.len()), Ordering::Relaxed);
            NonNull::new(place.cast())
        }
    }
}

/// What asks for a heap at rest, for tests that know that it is.
pub(crate) trait AtRest {
    /// As `Heap::verify_at_rest`. Called when every thread that used the heap has ended, or waits for the caller.
    fn verify_all(&self) -> Result<(), Violation>;
    /// As `Heap::trim_at_rest`, likewise.
    fn trim_all(&self) -> usize;
}

impl<P: PageProvider, C: CpuMode, const N: usize> AtRest for Heap<P, C, N> {
    fn verify_all(&self) -> Result<(), Violation> {
        // SAFETY: nobody else is in the heap where tests call this, as it says above.
        unsafe { self.verify_at_rest() }
    }
    fn trim_all(&self) -> usize {
        // SAFETY: as above.
        unsafe { self.trim_at_rest() }
    }
}

thread_local! {
    static CPU: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Says which CPU the calling thread plays.
pub(crate) fn play_cpu(index: usize) {
    CPU.set(index);
}

/// Threads as CPUs: each knows its number.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ThreadCpu;

impl CpuHint for ThreadCpu {
    fn current_cpu(&self) -> Option<usize> {
        Some(CPU.get())
    }
}

// SAFETY: a thread keeps its number, `play_cpu` is called once in each thread with numbers of its own, and a signal
// handler that interrupts it finishes before it goes on.
unsafe impl CpuPin for ThreadCpu {
    type Guard = ();
    fn pin(&self) {}
    fn index(&self, (): &()) -> usize {
        CPU.get()
    }
}

/// Memory for regions, given back when dropped. Drop the heap's use of it first.
pub(crate) struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

impl Memory {
    pub(crate) fn new(len: usize, align: usize) -> Self {
        let layout = Layout::from_size_align(len, align).unwrap();
        // SAFETY: tests ask for more than 0 bytes.
        let start = NonNull::new(unsafe { std::alloc::alloc(layout) }).unwrap();
        Self { start, layout }
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

pub(crate) fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

pub(crate) fn filled<P: PageProvider, C: CpuMode, const N: usize>(
    heap: &Heap<P, C, N>,
    size: usize,
) -> Filled<'_, Heap<P, C, N>> {
    Filled::new(heap, layout(size, 8), 0x3c).unwrap().expect("memory")
}

//! The page provider: where the heap's memory comes from.
//!
//! The heap asks for whole *runs* of pages at consecutive virtual addresses and gives them back whole. A kernel
//! implements [`PageProvider`] over whatever it has: a static array, the boot loader's memory map, a frame
//! allocator and page tables, `mmap` on a host. Two methods are required; everything else has a default.
//!
//! Decisions, and what pays for each:
//! - *The trait is `unsafe`*, since the heap hands out the memory it gets: a provider that gives the same page
//!   twice breaks memory safety, whatever the heap does.
//! - *A run is a type* ([`PageRun`]), checked for overflow and rounded once, so that no provider repeats that
//!   arithmetic and no heap code forgets it.
//! - *The provider is called with nothing of the heap locked*, in the caller's own interrupt state, and by one
//!   context at a time unless it says [`REENTRANT`](PageProvider::REENTRANT). It may therefore take its own
//!   locks, log, allocate from this very heap, or send a TLB-shootdown interrupt and wait. Price: a context that
//!   needs new pages while another one is inside the provider waits for it, within a bound, and is refused when
//!   the bound is over.

#![expect(unsafe_code, reason = "contracts of the kernel")]

use core::alloc::Layout;
use core::ptr::NonNull;

/// Length and alignment of a run of pages: `len` is a non-zero multiple of the page length, `align` a power of
/// two of at least the page length, and `len` rounded up to `align` does not exceed `isize::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    len: usize,
    align: usize,
}

impl PageRun {
    /// The smallest run of pages of `page_len` bytes that holds `len` bytes at a multiple of `align`.
    /// `None` if `len` is 0, `align` or `page_len` is not a power of two, or the sum overflows `isize`.
    pub const fn new(len: usize, align: usize, page_len: usize) -> Option<Self> {
        if len == 0 || !align.is_power_of_two() || !page_len.is_power_of_two() {
            return None;
        }
        let align = if align < page_len { page_len } else { align };
        let Some(padded) = len.checked_add(page_len - 1) else {
            return None;
        };
        let len = padded & !(page_len - 1);
        if Layout::from_size_align(len, align).is_err() {
            return None;
        }
        Some(Self { len, align })
    }

    /// Bytes; a multiple of the page length, never 0.
    pub const fn len(self) -> usize {
        self.len
    }

    /// Always false: a run has at least one page.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Bytes; a power of two, at least the page length.
    pub const fn align(self) -> usize {
        self.align
    }

    /// The run as a [`Layout`].
    pub const fn layout(self) -> Layout {
        // SAFETY: `new`, the only constructor, made the same Layout out of the same two numbers successfully.
        unsafe { Layout::from_size_align_unchecked(self.len, self.align) }
    }
}

/// A source of page runs.
///
/// # Context
/// Every method is called by the heap with no lock of the heap held, in the interrupt state of the code that called the
/// heap. Unless [`REENTRANT`](Self::REENTRANT) is set, one context at a time is inside `map`, `unmap`, `resize`,
/// `remap`, `decommit` and `commit` of one heap; so an interrupt handler that allocates while the provider runs never
/// re-enters it.
/// [`relieve`](Self::relieve) and
/// [`is_busy`](Self::is_busy) are outside that rule. A method may use this very heap; such an allocation is served from
/// what the heap holds.
///
/// # Safety
/// - A successful [`map`](Self::map) returns the start of `run.len()` bytes at a multiple of `run.align()` that
///   are mapped, readable and writable, that nothing else uses, and that stay so until the same range is given
///   to `unmap` (and that returns true), `resize` or `remap`. The pointer's provenance covers the whole run. Pages that
///   were decommitted are so again after a successful [`commit`](Self::commit), and stay the heap's meanwhile.
/// - No method unwinds into the heap.
pub unsafe trait PageProvider {
    /// Bytes in a page: a power of two from 1 KiB to 64 KiB. Runs are multiples of it.
    const PAGE_LEN: usize = 4096;

    /// Whether pages come zeroed from `map`. Lets `alloc_zeroed` skip clearing what was never used.
    const ZEROED: bool = false;

    /// Whether every method may be entered by several contexts at once, and by a context that interrupted the
    /// same method on the same CPU, without waiting for the other one. The heap then asks without exclusion, and in
    /// nested contexts too; those are then refused only when the provider has nothing.
    const REENTRANT: bool = false;

    /// Whether `resize` and `remap` can change a run that this provider gave. Very large blocks (1 MiB and more), and
    /// those that `realloc` makes outgrow what slabs serve (32 KiB), then become runs of their own, so that they grow
    /// without copying. Such a run may be as short as 36 KiB.
    const REMAPS: bool = false;

    /// Whether the page behind each run, and the one in front of it, is never mapped, and `unmap` really unmaps, so
    /// that an access to what was given back faults. Lets the feature `guard-pages` work.
    const GUARDS: bool = false;

    /// Whether [`decommit`](Self::decommit) and [`commit`](Self::commit) work: the memory behind free pages then goes
    /// back page by page, while their addresses stay with the heap, so that one block in use keeps its own page and not
    /// the whole run.
    const DECOMMITS: bool = false;

    /// Gives a new run of pages, or `None` if there is none now.
    fn map(&self, run: PageRun) -> Option<NonNull<u8>>;

    /// Asked instead of [`map`](Self::map) by a context that must not wait. If the provider is
    /// [`REENTRANT`](Self::REENTRANT), that context may have interrupted one of its calls. The default is `map`, for
    /// providers that never wait.
    fn try_map(&self, run: PageRun) -> Option<NonNull<u8>> {
        self.map(run)
    }

    /// Takes a run back. False: it cannot be taken (now, or ever); the heap keeps it and uses it again.
    ///
    /// # Safety
    /// `start` and `run` are those of an earlier `map` (or of the last successful `resize` or `remap`) of this
    /// provider, not yet taken back, and the caller uses the memory no more if the answer is true.
    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool;

    /// Takes back the memory behind some pages, and leaves the addresses to the heap, which does not touch them before
    /// [`commit`](Self::commit) gives them memory again. What was in them is lost. False: nothing has changed. Asked
    /// only if [`DECOMMITS`](Self::DECOMMITS), by who may wait, and for pieces of at least 16 KiB but for
    /// [`trim(0)`](crate::Heap::trim).
    ///
    /// # Safety
    /// `start` and `run` are pages inside a run of this provider, and the caller uses them no more.
    unsafe fn decommit(&self, start: NonNull<u8>, run: PageRun) -> bool {
        let _ = (start, run);
        false
    }

    /// Gives memory to those of these pages that have none; the others keep theirs. What is in them then is anything.
    /// False: there is not enough now, and none of the pages is used before another call succeeds. The ranges need not
    /// be those of [`decommit`](Self::decommit), and a run may be given to [`unmap`](Self::unmap) while some of its
    /// pages have no memory.
    ///
    /// # Safety
    /// `start` and `run` are pages inside a run of this provider, all of which were decommitted.
    unsafe fn commit(&self, start: NonNull<u8>, run: PageRun) -> bool {
        let _ = (start, run);
        false
    }

    /// Changes the length of a run where it stands, growing or shrinking at its end. False: unchanged.
    ///
    /// # Safety
    /// As for [`unmap`](Self::unmap) with `old`; `new` has the same alignment; the caller uses nothing behind
    /// `new.len()` any more if the answer is true.
    unsafe fn resize(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> bool {
        let _ = (start, old, new);
        false
    }

    /// Changes the length of a run and may move its pages to other addresses, without copying their content.
    /// `None`: unchanged.
    ///
    /// # Safety
    /// As for [`unmap`](Self::unmap) with `old`; `new` has the same alignment; after success the caller uses only the
    /// new range.
    unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
        let _ = (start, old, new);
        None
    }

    /// Whether this provider could ever give such a run, if all that it gave came back. A no spares the heap the search
    /// for memory that cannot make `run` possible. Fast, and callable like [`is_busy`](Self::is_busy). The default:
    /// yes.
    fn could_give(&self, run: PageRun) -> bool {
        let _ = run;
        true
    }

    /// The run that this provider would rather give when the heap needs `run`: at least as long and as much
    /// aligned. A hint; the heap may ask `map` for either. The default follows the heap's wish.
    fn prefer(&self, run: PageRun) -> PageRun {
        run
    }

    /// Whether somebody is in the way of a call at this moment, so that a refusal may not be the last word: the heap
    /// then asks again, within a bound, before it reports that there is no memory. For providers that only try their
    /// locks.
    fn is_busy(&self) -> bool {
        false
    }

    /// Asked when an allocation would fail, before it does: can the kernel free memory, or add some? True if it
    /// is worth another try. Called with nothing locked; may free, may add a region. `need` is the run that
    /// could not be had.
    fn relieve(&self, need: PageRun) -> bool {
        let _ = need;
        false
    }
}

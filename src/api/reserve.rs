//! Blocks set aside for a context that must not fail.
//!
//! An interrupt handler that needs a block now cannot wait for memory, and a heap that others have exhausted has none.
//! A reserve is filled where failing and waiting are possible, and emptied where they are not: `take` is a swap for
//! each place it looks at, without a lock, a loop without an end or a call of the heap. A place is a pointer, so there
//! is no list, and no ABA to guard against. Price: `take` looks at up to `N` places, and what lies in them is nobody
//! else's.
//!
//! Source of the idea: `mempool_t` of Linux, without its waiting.

use core::alloc::{GlobalAlloc, Layout};
use core::fmt;
use core::ptr::NonNull;

use crate::api::AllocError;
use crate::base::sync::{AtomicPtr, Ordering};

/// Up to `N` blocks of one Layout, taken out of a heap beforehand.
///
/// A kernel keeps one in a `static` beside the heap for each kind of block that a handler cannot do without, fills it
/// in a task, and
/// [fills](Self::fill) it again whenever a handler has taken from it.
///
/// ```
/// # #[cfg(feature = "region")] {
/// use core::alloc::{GlobalAlloc, Layout};
/// use smp_heap::{Heap, Hint, RegionProvider, Reserve, cpu::UnknownCpu};
///
/// type KernelHeap = Heap<RegionProvider<1>, Hint<UnknownCpu>, 4>;
/// static HEAP: KernelHeap = Heap::new(RegionProvider::new(), Hint(UnknownCpu));
/// static PACKETS: Reserve<KernelHeap, 8> = Reserve::new(&HEAP, Layout::new::<[u8; 1536]>());
///
/// # let memory = Box::leak(vec![0_u8; 64 << 10].into_boxed_slice());
/// # unsafe { HEAP.provider().add_region(memory.as_mut_ptr(), memory.len()) }?;
/// // In a task: all eight places, or an error.
/// PACKETS.fill()?;
/// // In the handler, whatever state the heap is in.
/// let packet = PACKETS.take().ok_or("more than eight packets")?;
/// // Anywhere, as any block.
/// unsafe { HEAP.dealloc(packet.as_ptr(), PACKETS.layout()) };
/// # }
/// # Ok::<(), Box<dyn core::error::Error>>(())
/// ```
pub struct Reserve<'a, H: GlobalAlloc, const N: usize> {
    heap: &'a H,
    layout: Layout,
    /// Null, or a block of `heap` for `layout` that is the reserve's alone.
    places: [AtomicPtr<u8>; N],
}

impl<'a, H: GlobalAlloc, const N: usize> Reserve<'a, H, N> {
    /// An empty reserve. Usable in a `static`. Size 0 needs no reserve: [`fill`](Self::fill) refuses it.
    pub const fn new(heap: &'a H, layout: Layout) -> Self {
        Self { heap, layout, places: [const { AtomicPtr::new(core::ptr::null_mut()) }; N] }
    }

    /// What each block is for.
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// Blocks in it. Exact while nobody fills or takes.
    pub fn count(&self) -> usize {
        self.places.iter().filter(|place| !place.load(Ordering::Relaxed).is_null()).count()
    }

    /// Allocates a block for each empty place. Callable from any context, from several at once; meant for tasks, since
    /// it asks the heap.
    ///
    /// # Errors
    /// [`AllocError`] if the heap has not enough; what it had is in the reserve.
    pub fn fill(&self) -> Result<(), AllocError> {
        for place in self.places.iter().filter(|place| place.load(Ordering::Relaxed).is_null()) {
            let block = self.alloc().ok_or(AllocError)?;
            let filled =
                place.compare_exchange(core::ptr::null_mut(), block.as_ptr(), Ordering::Release, Ordering::Relaxed);
            if filled.is_err() {
                // SAFETY: just allocated from this heap with this Layout, and the place was taken: nobody else has the
                // block.
                unsafe { self.heap.dealloc(block.as_ptr(), self.layout) };
            }
        }
        Ok(())
    }

    /// Takes a block out; `None` if there is none left. The caller's from then on, to be freed to the heap as any block
    /// of this Layout.
    ///
    /// Callable from any context, NMIs included; lock-free, at most `N` swaps; does not touch the heap.
    pub fn take(&self) -> Option<NonNull<u8>> {
        let taken = |place: &AtomicPtr<u8>| {
            // Looks before it writes, so that empty places stay shared.
            let full = !place.load(Ordering::Relaxed).is_null();
            full.then(|| place.swap(core::ptr::null_mut(), Ordering::Acquire)).and_then(NonNull::new)
        };
        self.places.iter().find_map(taken)
    }

    fn alloc(&self) -> Option<NonNull<u8>> {
        if self.layout.size() == 0 {
            return None;
        }
        // SAFETY: the size is not 0.
        NonNull::new(unsafe { self.heap.alloc(self.layout) })
    }
}

impl<H: GlobalAlloc, const N: usize> Drop for Reserve<'_, H, N> {
    fn drop(&mut self) {
        while let Some(block) = self.take() {
            // SAFETY: what lies in a place came from this heap with this Layout, and it is out of the reserve now.
            unsafe { self.heap.dealloc(block.as_ptr(), self.layout) };
        }
    }
}

impl<H: GlobalAlloc, const N: usize> fmt::Debug for Reserve<'_, H, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reserve").field("layout", &self.layout).field("count", &self.count()).finish_non_exhaustive()
    }
}

//! What callers see: `alloc`, `resize`, `remap`, `free` in terms of [`Layout`], and the [`GlobalAlloc`] over them.
//!
//! The four are those of Zig's `Allocator`: `resize` never moves, `remap` may move without copying, and both may say
//! no. `realloc` tries them in that order before it copies. Sizes and alignments are checked once, here; below, a
//! request is a size class or a run.

#![expect(unsafe_code, reason = "the entry points, whose callers promise what they free")]

#[cfg(any(feature = "allocator-api2-02", feature = "allocator-api2-04", has_allocator))]
mod allocator;
#[cfg(feature = "c-heap")]
mod c;
#[cfg(feature = "debug-heap")]
mod debug_header;
#[cfg(feature = "guard-pages")]
mod guarded;
#[cfg(feature = "debug-heap")]
mod leaks;
mod reserve;

#[cfg(feature = "debug-heap")]
pub use leaks::{LeakSite, Leaks};
pub use reserve::Reserve;

use core::alloc::{GlobalAlloc, Layout};
use core::fmt;
#[cfg(feature = "debug-heap")]
use core::panic::Location;
use core::ptr::NonNull;

use crate::base::size_class::{MAX_SMALL_LEN, SizeClass};
use crate::base::sync::Ordering;
use crate::base::trace::{Event, Kind};
use crate::cache::CpuCache;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
#[cfg(feature = "debug-heap")]
use crate::harden::debug::{Site, outer};
use crate::heap::Heap;
use crate::heap::large::{dangling, may_be_run};
use crate::heap::panic_reserve::GAP_LEN;
use crate::slab::block::Block;

/// There was no memory for the request, or it can never be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocError;

impl fmt::Display for AllocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the heap has no memory for this request")
    }
}

impl core::error::Error for AllocError {}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// Allocates a block for `layout`. The slice is as long as may be used, at least `layout.size()` bytes,
    /// uninitialised.
    ///
    /// Size 0 gives a dangling, aligned pointer and length 0, and takes no memory.
    ///
    /// # On a static
    /// `HEAP.alloc(layout)` is this method, not [`GlobalAlloc`]'s of the same name, which gives a pointer. Code that
    /// called another allocator so ends in `error[E0308]: mismatched types`, "expected `*mut u8`, found
    /// `Result<NonNull<[u8]>, AllocError>`":
    ///
    /// ```compile_fail
    /// # use core::alloc::{GlobalAlloc, Layout};
    /// # use smp_heap::{Heap, Hint, RegionProvider, cpu::UnknownCpu};
    /// # type Small = Heap<RegionProvider<1>, Hint<UnknownCpu>, 1>;
    /// # static HEAP: Small = Heap::new(RegionProvider::new(), Hint(UnknownCpu));
    /// let start: *mut u8 = unsafe { HEAP.alloc(Layout::new::<u64>()) };
    /// ```
    ///
    /// There are three cures: `alloc::alloc::alloc(layout)`, where the heap is the `#[global_allocator]`; the trait's
    /// name, `GlobalAlloc::alloc(&HEAP, layout)`; or, for many calls, a function that shows no more than the trait:
    ///
    /// ```
    /// # use core::alloc::{GlobalAlloc, Layout};
    /// # use smp_heap::{Heap, Hint, RegionProvider, cpu::UnknownCpu};
    /// # type Small = Heap<RegionProvider<1>, Hint<UnknownCpu>, 1>;
    /// # static HEAP: Small = Heap::new(RegionProvider::new(), Hint(UnknownCpu));
    /// fn heap() -> &'static impl GlobalAlloc {
    ///     &HEAP
    /// }
    ///
    /// // SAFETY: the size is not 0.
    /// let start: *mut u8 = unsafe { heap().alloc(Layout::new::<u64>()) };
    /// # assert!(start.is_null(), "there is no memory yet");
    /// ```
    ///
    /// So with [`alloc_zeroed`](Self::alloc_zeroed) and [`realloc`](Self::realloc); `dealloc` is the trait's alone.
    ///
    /// # Errors
    /// [`AllocError`] if there is no memory after everything was tried: reserves, the provider, reachable caches,
    /// longer blocks, the provider's [`relieve`](PageProvider::relieve). In a context that interrupted the heap on its
    /// own CPU, if there is none at hand.
    ///
    /// # Context
    /// Any: task, interrupt, exception, NMI, before CPU ids work. Never waits for a context that it interrupted.
    ///
    /// # Cost
    /// Up to 32 KiB: a list's first element and some arithmetic, without a loop or a division, while the CPU's cache
    /// has a block; no locked instruction with a [pin](crate::CpuPin), one with a [hint](crate::CpuHint). Longer: one
    /// lock and constant time while the page heap has a run.
    #[cfg_attr(feature = "debug-heap", track_caller)]
    pub fn alloc(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        #[cfg(feature = "debug-heap")]
        let block = self.alloc_with_header(layout, Site::Line(Location::caller()));
        #[cfg(not(feature = "debug-heap"))]
        let block = self.alloc_plain(layout);
        block.ok_or(AllocError)
    }

    /// `alloc`, as the heap below it sees it.
    #[inline]
    pub(crate) fn alloc_plain(&self, layout: Layout) -> Option<NonNull<[u8]>> {
        if layout.size() == 0 {
            return Some(NonNull::slice_from_raw_parts(dangling(layout), 0));
        }
        let block = match SizeClass::of(layout) {
            Some(class) => {
                let start = self.alloc_small(class, layout);
                start.map(|start| NonNull::slice_from_raw_parts(start, self.small_len(start, class, layout)))
            }
            None => self.alloc_large(layout).map(|large| large.block),
        };
        self.trace_alloc(block.map(NonNull::cast), layout);
        block
    }

    /// How many bytes may be used of a block that a class serves and that is no run.
    #[cfg(feature = "guard-pages")]
    fn small_len(&self, start: NonNull<u8>, class: SizeClass, layout: Layout) -> usize {
        if self.is_guarded(start) { layout.size() } else { class.block_len() }
    }

    /// How many bytes may be used of a block that a class serves and that is no run.
    #[cfg(not(feature = "guard-pages"))]
    #[inline]
    fn small_len(&self, _: NonNull<u8>, class: SizeClass, _: Layout) -> usize {
        class.block_len()
    }

    /// [`alloc`](Self::alloc), with the first `layout.size()` bytes zero. Pages that the provider gave zeroed and
    /// nobody used are not cleared again.
    ///
    /// # Errors
    /// As for [`alloc`](Self::alloc).
    #[cfg_attr(feature = "debug-heap", track_caller)]
    pub fn alloc_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        #[cfg(feature = "debug-heap")]
        let block = self.alloc_zeroed_with_header(layout, Site::Line(Location::caller()));
        #[cfg(not(feature = "debug-heap"))]
        let block = self.alloc_zeroed_plain(layout);
        block.ok_or(AllocError)
    }

    /// `alloc_zeroed`, as the heap below it sees it.
    pub(crate) fn alloc_zeroed_plain(&self, layout: Layout) -> Option<NonNull<[u8]>> {
        if layout.size() > 0 && SizeClass::of(layout).is_none() {
            let large = self.alloc_large(layout);
            self.trace_alloc(large.as_ref().map(|large| large.block.cast()), layout);
            let large = large?;
            if !large.zeroed {
                clear(large.block, layout.size());
            }
            return Some(large.block);
        }
        let block = self.alloc_plain(layout)?;
        clear(block, layout.size());
        Some(block)
    }

    /// Frees a block. Size 0: nothing to do.
    ///
    /// Always succeeds, needs no memory, and waits for no lock of the heap. Callable from any context, on any CPU.
    /// Where it leaves more free than the heap wants to keep, it calls the provider's [`unmap`](PageProvider::unmap),
    /// but in a nested context never.
    ///
    /// # Safety
    /// `start` came from this heap, for a Layout of the same size and alignment (or was last resized, remapped or
    /// reallocated to it), and nobody uses the block any more.
    #[cfg_attr(feature = "debug-heap", track_caller)]
    pub unsafe fn free(&self, start: NonNull<u8>, layout: Layout) {
        #[cfg(feature = "debug-heap")]
        // SAFETY: the contract is the same.
        unsafe {
            self.free_with_header(start, layout, Site::Line(Location::caller()));
        }
        #[cfg(not(feature = "debug-heap"))]
        if layout.size() > 0 {
            // SAFETY: the contract is the same.
            unsafe { self.free_sized(start, layout) };
        }
    }

    /// Records an allocation, after it was done.
    #[inline(always)]
    fn trace_alloc(&self, start: Option<NonNull<u8>>, layout: Layout) {
        let kind = if start.is_some() { Kind::Alloc } else { Kind::Refused };
        let addr = start.map_or(0, |start| start.as_ptr().addr());
        self.engine.trace.record(|| Event { kind, addr, len: layout.size(), align: layout.align() });
    }

    /// Records a free before it is done, or a resize after.
    #[inline(always)]
    fn trace_block(&self, kind: Kind, start: NonNull<u8>, len: usize, align: usize) {
        self.engine.trace.record(|| Event { kind, addr: start.as_ptr().addr(), len, align });
    }

    /// [`free`](Self::free) of a block, short ones in line.
    ///
    /// # Safety
    /// As for [`free`](Self::free).
    #[inline]
    pub(crate) unsafe fn free_sized(&self, start: NonNull<u8>, layout: Layout) {
        self.trace_block(Kind::Free, start, layout.size(), layout.align());
        match SizeClass::of_short(layout) {
            // SAFETY: by the contract the block is unused; this is the class that served the Layout, whose blocks are
            // at least 8 bytes long.
            Some(class) => self.free_small(unsafe { Block::new(start) }, class),
            // SAFETY: the contract is the same.
            None => unsafe { self.free_long(start, layout) },
        }
    }

    /// Frees a block out of a slab.
    ///
    /// # Safety
    /// `start` is a block that a slab gave for this class, and nobody uses it any more.
    #[inline]
    unsafe fn free_classed(&self, start: NonNull<u8>, class: SizeClass) {
        // SAFETY: by the contract the block is unused; a class's blocks are at least 8 bytes long.
        let block = unsafe { Block::new(start) };
        self.free_small(block, class);
    }

    /// [`free_sized`](Self::free_sized) of what is not short. Out of line, as are the two behind it, so that the path
    /// in front of each saves no registers.
    ///
    /// # Safety
    /// As for [`free_sized`](Self::free_sized).
    #[inline(never)]
    unsafe fn free_long(&self, start: NonNull<u8>, layout: Layout) {
        match SizeClass::of_long(layout) {
            // SAFETY: the contract is the same.
            Some(class) => unsafe { self.free_by_kind(start, layout, class) },
            // SAFETY: the contract is the same, and what has no class is no slab's.
            None => unsafe { self.free_large(start, layout) },
        }
    }

    /// Frees what may be a page run, or else is a slab's block of that class.
    ///
    /// # Safety
    /// As for [`free_sized`](Self::free_sized); the Layout is not short.
    #[inline(always)]
    unsafe fn free_by_kind(&self, start: NonNull<u8>, layout: Layout, class: SizeClass) {
        if let Ok(entered) = self.enter() {
            if self.is_in_slab(&entered, start) {
                // SAFETY: by the contract the block is unused; a class's blocks are at least 8 bytes long.
                return self.free_entered(entered, unsafe { Block::new(start) }, class);
            }
        }
        // SAFETY: the contract is the same.
        unsafe { self.free_far_by_kind(start, layout, class) };
    }

    /// [`free_by_kind`](Self::free_by_kind) of what the own cache's hint does not know, or of a page run.
    ///
    /// # Safety
    /// As for [`free_by_kind`](Self::free_by_kind).
    #[inline(never)]
    unsafe fn free_far_by_kind(&self, start: NonNull<u8>, layout: Layout, class: SizeClass) {
        if self.run_of(start).is_none() {
            // SAFETY: the contract is the same, and what has a class and is no run is in a slab.
            unsafe { self.free_classed(start, class) };
        } else {
            // SAFETY: the contract is the same.
            unsafe { self.free_large(start, layout) };
        }
    }

    /// [`realloc`](Self::realloc) as `GlobalAlloc` wants it. Out of line for the same reason.
    ///
    /// # Safety
    /// As for [`realloc`](Self::realloc).
    #[inline(never)]
    unsafe fn realloc_block(&self, start: NonNull<u8>, old: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the contract is the same.
        or_null(unsafe { self.realloc(start, old, new_size) }.ok().map(NonNull::cast))
    }

    /// `alloc` of what is not short.
    #[cfg(not(feature = "debug-heap"))]
    #[inline(never)]
    fn alloc_long(&self, layout: Layout) -> Option<NonNull<u8>> {
        match SizeClass::of_long(layout) {
            Some(class) => self.alloc_small(class, layout),
            None => self.alloc_pages(layout),
        }
    }

    #[cfg(not(feature = "debug-heap"))]
    #[inline(never)]
    fn alloc_pages(&self, layout: Layout) -> Option<NonNull<u8>> {
        self.alloc_large_start(layout)
    }

    /// Changes a block's size where it stands, growing or shrinking. False: unchanged.
    ///
    /// A block in a slab can take any size of its class. A large one shrinks to what it needs, and grows if the pages
    /// behind it are free.
    ///
    /// # Safety
    /// As for [`free`](Self::free); after success the block's Layout is `new_size` with the old alignment.
    pub unsafe fn resize(&self, start: NonNull<u8>, old: Layout, new_size: usize) -> bool {
        #[cfg(feature = "debug-heap")]
        // SAFETY: the contract is the same.
        return unsafe { self.resize_with_header(start, old, new_size) };
        #[cfg(not(feature = "debug-heap"))]
        // SAFETY: the contract is the same.
        unsafe {
            self.resize_plain(start, old, new_size)
        }
    }

    /// `resize`, as the heap below it sees it.
    ///
    /// # Safety
    /// As for [`resize`](Self::resize).
    pub(crate) unsafe fn resize_plain(&self, start: NonNull<u8>, old: Layout, new_size: usize) -> bool {
        let Ok(new) = Layout::from_size_align(new_size, old.align()) else {
            return false;
        };
        if old.size() == 0 || new_size == 0 {
            return old.size() == new_size;
        }
        // SAFETY: the contract is the same.
        unsafe { self.resize_sized(start, old, new) }.is_some()
    }

    /// [`resize`](Self::resize), which tells how many bytes may be used if it was done; the sizes are not 0, the
    /// alignments equal.
    ///
    /// # Safety
    /// As for [`resize`](Self::resize).
    #[inline]
    unsafe fn resize_sized(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Option<usize> {
        #[cfg(feature = "guard-pages")]
        if self.is_guarded(start) {
            return (old.size() == new.size()).then_some(new.size());
        }
        let len = match SizeClass::of(old) {
            Some(class) if !may_be_run(class) => (SizeClass::of(new) == Some(class)).then(|| class.block_len()),
            // SAFETY: the contract is the same.
            class => unsafe { self.resize_by_kind(start, old, new, class) },
        };
        if len.is_some() {
            self.trace_block(Kind::Resize, start, new.size(), old.align());
        }
        len
    }

    /// [`resize_sized`](Self::resize_sized) of what may be a page run, or else is of that class.
    ///
    /// # Safety
    /// As for [`resize`](Self::resize).
    #[inline]
    unsafe fn resize_by_kind(
        &self,
        start: NonNull<u8>,
        old: Layout,
        new: Layout,
        class: Option<SizeClass>,
    ) -> Option<usize> {
        // SAFETY: the contract is the same.
        if let Some(resized) = unsafe { self.resize_near(start, old, new.size()) } {
            return resized;
        }
        match class {
            Some(class) if self.run_of(start).is_none() => {
                (SizeClass::of(new) == Some(class)).then(|| class.block_len())
            }
            // SAFETY: the contract is the same.
            _ if unsafe { self.resize_large(start, old, new.size()) } => self.large_len(start, new),
            _ => None,
        }
    }

    /// Changes a block's size and may move it, but never copies. `None`: unchanged, where it was. The slice is as long
    /// as may be used.
    ///
    /// # Safety
    /// As for [`resize`](Self::resize); after success the block is only at the new place.
    pub unsafe fn remap(&self, start: NonNull<u8>, old: Layout, new_size: usize) -> Option<NonNull<[u8]>> {
        let new = Layout::from_size_align(new_size, old.align()).ok()?;
        // SAFETY: the contract is the same.
        unsafe { self.remap_to(start, old, new) }
    }

    /// [`remap`](Self::remap) between Layouts of one alignment.
    ///
    /// # Safety
    /// As for [`remap`](Self::remap).
    #[cfg(feature = "debug-heap")]
    unsafe fn remap_to(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        // SAFETY: the contract is the same.
        unsafe { self.remap_with_header(start, old, new.size()) }
    }

    /// [`remap`](Self::remap) between Layouts of one alignment.
    ///
    /// # Safety
    /// As for [`remap`](Self::remap).
    #[cfg(not(feature = "debug-heap"))]
    #[inline]
    unsafe fn remap_to(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        // SAFETY: the contract is the same.
        unsafe { self.remap_plain(start, old, new) }
    }

    /// `remap`, as the heap below it sees it, between Layouts of one alignment.
    ///
    /// # Safety
    /// As for [`remap`](Self::remap).
    #[inline]
    pub(crate) unsafe fn remap_plain(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        if old.size() == 0 || new.size() == 0 {
            return (old.size() == new.size()).then_some(NonNull::slice_from_raw_parts(start, 0));
        }
        // SAFETY: the contract is the same.
        if let Some(len) = unsafe { self.resize_sized(start, old, new) } {
            return Some(NonNull::slice_from_raw_parts(start, len));
        }
        // SAFETY: the contract is the same.
        let moved = unsafe { self.remap_huge(start, old, new.size()) }?;
        self.trace_block(Kind::Free, start, old.size(), old.align());
        self.trace_block(Kind::Alloc, moved.cast(), new.size(), old.align());
        Some(moved)
    }

    /// Changes a block's size: in place, else by moving its pages, else by copying. The slice is as long as may be
    /// used.
    ///
    /// # Errors
    /// [`AllocError`] as for [`alloc`](Self::alloc), or if `new_size` is too large for the alignment; the block is then
    /// unchanged.
    ///
    /// # Safety
    /// As for [`resize`](Self::resize); after success the block is only at the new place.
    #[cfg_attr(feature = "debug-heap", track_caller)]
    pub unsafe fn realloc(
        &self,
        start: NonNull<u8>,
        old: Layout,
        new_size: usize,
    ) -> Result<NonNull<[u8]>, AllocError> {
        let new = Layout::from_size_align(new_size, old.align()).map_err(|_| AllocError)?;
        #[cfg(not(feature = "hardened"))]
        // SAFETY: the contract is the same.
        if let Some(block) = unsafe { self.realloc_short(start, old, new) } {
            return Ok(block);
        }
        let block = match self.outgrown(old, new) {
            Some(block) => block,
            None => {
                // SAFETY: the contract is the same.
                if let Some(block) = unsafe { self.remap_to(start, old, new) } {
                    return Ok(block);
                }
                match self.moved(old, new) {
                    Ok(block) => block,
                    // SAFETY: the contract is the same.
                    Err(refused) => return unsafe { self.shrunk(start, old, new) }.ok_or(refused),
                }
            }
        };
        let count = old.size().min(new_size);
        self.count_copied(old.size(), count);
        // SAFETY: both blocks are at least `count` bytes long, and the new one is nobody else's, so they do not
        // overlap.
        unsafe { start.copy_to_nonoverlapping(block.cast(), count) };
        // SAFETY: the contract is the same, and the content has moved.
        unsafe { self.free(start, old) };
        Ok(block)
    }

    /// [`realloc`](Self::realloc) of a short block that becomes one of another short class, as a vector's does that
    /// grows, if the CPU's cache has one. `None`: unchanged.
    ///
    /// # Safety
    /// As for [`realloc`](Self::realloc).
    #[cfg(not(feature = "hardened"))]
    #[inline]
    unsafe fn realloc_short(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        let (from, to) = (SizeClass::of_short(old)?, SizeClass::of_short(new)?);
        if from == to {
            return None;
        }
        let entered = self.enter().ok()?;
        let block = entered.cache.pop(to)?.into_start();
        let count = old.size().min(new.size());
        entered.cache.add_copied(false, count as u64);
        drop(entered);
        self.trace_alloc(Some(block), new);
        // SAFETY: both blocks are at least `count` bytes long, and the new one is nobody else's, so they do not
        // overlap.
        unsafe { start.copy_to_nonoverlapping(block, count) };
        self.trace_block(Kind::Free, start, old.size(), old.align());
        // SAFETY: the contract is the same, the content has moved, and this is the class that served the Layout.
        unsafe { self.free_classed(start, from) };
        Some(NonNull::slice_from_raw_parts(block, to.block_len()))
    }

    /// A run of its own for content that outgrows the slab sizes, if the provider can move that later on. Even if the
    /// block could grow where it is: when it no longer can, it is longer.
    fn alloc_outgrown(&self, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        if !P::REMAPS || old.size() == 0 || old.size() > MAX_SMALL_LEN || new.size() <= MAX_SMALL_LEN {
            return None;
        }
        let block = self.alloc_own(new)?.block;
        self.trace_alloc(Some(block.cast()), new);
        Some(block)
    }

    /// A block for content that outgrows the slab sizes.
    #[cfg(not(feature = "debug-heap"))]
    fn outgrown(&self, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        self.alloc_outgrown(old, new)
    }

    /// The same with a frame.
    #[cfg(feature = "debug-heap")]
    #[track_caller]
    fn outgrown(&self, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        // A block of size 0 has no frame, and is none of the heap's.
        if old.size() == 0 {
            return None;
        }
        let block = self.alloc_outgrown(outer(old)?, outer(new)?)?;
        Some(self.enframe(block.cast(), new, Site::Line(Location::caller())))
    }

    /// A block that becomes shorter, where there is no memory to move it to.
    ///
    /// # Safety
    /// As for [`resize`](Self::resize); after success the block is where it is given.
    #[cfg(not(feature = "debug-heap"))]
    #[cold]
    unsafe fn shrunk(&self, start: NonNull<u8>, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        if new.size() >= old.size() || self.is_apart(start) {
            return None;
        }
        // SAFETY: the contract is the same, and it is shorter.
        let block = unsafe { self.shrink_in_place(start, old, new) }?;
        self.trace_block(Kind::Free, start, old.size(), old.align());
        self.trace_block(Kind::Alloc, block.cast(), new.size(), old.align());
        Some(block)
    }

    /// Not with a frame, which has no room to move in.
    ///
    /// # Safety
    /// None.
    #[cfg(feature = "debug-heap")]
    unsafe fn shrunk(&self, _: NonNull<u8>, _: Layout, _: Layout) -> Option<NonNull<[u8]>> {
        None
    }

    /// Whether a block is on pages of its own beside unmapped ones, or was set aside for a panic.
    #[cfg(not(feature = "debug-heap"))]
    fn is_apart(&self, start: NonNull<u8>) -> bool {
        #[cfg(feature = "guard-pages")]
        if self.is_guarded(start) {
            return true;
        }
        self.emergency.owns(start)
    }

    /// Counts `count` bytes that are copied out of a block of `size` bytes.
    fn count_copied(&self, size: usize, count: usize) {
        let is_long = size > MAX_SMALL_LEN;
        match self.enter() {
            Ok(entered) => entered.cache.add_copied(is_long, count as u64),
            Err(_) => {
                let [short, long] = &self.copied;
                (if is_long { long } else { short }).fetch_add(count as u64, Ordering::Relaxed);
            }
        }
    }

    /// A block for content that has to move.
    #[cfg(not(feature = "debug-heap"))]
    fn moved(&self, old: Layout, new: Layout) -> Result<NonNull<[u8]>, AllocError> {
        self.alloc_moved(old, new).map_or_else(|| self.alloc(new), Ok)
    }

    /// The same with a frame.
    #[cfg(feature = "debug-heap")]
    #[track_caller]
    fn moved(&self, old: Layout, new: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if new.size() == 0 {
            return self.alloc(new);
        }
        let grown = outer(old).zip(outer(new)).and_then(|(old, new)| self.alloc_moved(old, new));
        match grown {
            Some(block) => Ok(self.enframe(block.cast(), new, Site::Line(Location::caller()))),
            None => self.alloc(new),
        }
    }

    /// Pages for content that has to move, if it grows beyond what a slab serves well.
    fn alloc_moved(&self, old: Layout, new: Layout) -> Option<NonNull<[u8]>> {
        let grows = new.size() > old.size() && SizeClass::of(new).is_none_or(may_be_run);
        let block = if grows { self.alloc_grown(new)?.block } else { return None };
        self.trace_alloc(Some(block.cast()), new);
        Some(block)
    }

    /// Records what happens from now on, or nothing more. What is recorded meanwhile, and how it is printed and
    /// replayed, stands at
    /// [`Trace`](crate::base::trace::Trace) and at the head of `trace.rs`.
    #[cfg(feature = "trace")]
    pub fn trace_to(&self, trace: Option<&'static crate::base::trace::Trace>) {
        self.engine.trace.set(trace);
    }

    /// Sets memory aside for [`enter_panic_mode`](Self::enter_panic_mode): about `len` bytes, in use from now on and
    /// for good. Once, when there is memory; 64 KiB are plenty for a report.
    ///
    /// # Errors
    /// [`AllocError`] if the heap has not so much, or some was set aside before.
    pub fn reserve_for_panic(&self, len: usize) -> Result<(), AllocError> {
        let layout = len.checked_add(GAP_LEN).and_then(|len| Layout::from_size_align(len, GAP_LEN).ok());
        let block = self.alloc_alone(layout.ok_or(AllocError)?).ok_or(AllocError)?;
        self.emergency.provide(block).map_err(|block| {
            if let Some(desc) = self.run_of(block.cast()) {
                self.held(|_| self.engine.pages.free(desc));
            }
            AllocError
        })
    }

    /// From now on, and for good, memory comes from what was [set aside](Self::reserve_for_panic), in whatever state
    /// the heap is: call it first thing in a panic handler, which may have interrupted the heap in the middle of a
    /// step. Blocks are handed out one after the other and not used again; when all are out, there is what a nested
    /// context gets. No wait is longer than for one lock, and the provider is not called any more.
    ///
    /// Other CPUs may go on with their own caches; a heap in panic mode is whole as long as the panic left it whole.
    ///
    /// Callable from any context; touches each cache's flag.
    pub fn enter_panic_mode(&self) {
        self.emergency.begin();
        self.engine.caches().for_each(CpuCache::close);
    }

    /// How many bytes of a block may be used.
    ///
    /// # Context
    /// Any. A look at the block's descriptor where its length may be that of a page run, else some arithmetic.
    ///
    /// # Safety
    /// `start` is a block in use that this heap gave for `layout`. (Where a block was, memory may be on its way to the
    /// provider.)
    ///
    /// ```compile_fail,E0133
    /// # use core::{alloc::Layout, ptr::NonNull};
    /// # use smp_heap::{Heap, Hint, RegionProvider, cpu::UnknownCpu};
    /// # let heap = Heap::<_, _, 1>::new(RegionProvider::<1>::new(), Hint(UnknownCpu));
    /// heap.usable_len(NonNull::dangling(), Layout::new::<u64>());
    /// ```
    pub unsafe fn usable_len(&self, start: NonNull<u8>, layout: Layout) -> usize {
        if cfg!(feature = "debug-heap") { layout.size() } else { self.usable_plain(start, layout) }
    }

    /// `usable_len`, as the heap below it sees it.
    fn usable_plain(&self, start: NonNull<u8>, layout: Layout) -> usize {
        if layout.size() == 0 {
            return 0;
        }
        match SizeClass::of(layout) {
            Some(class) if !may_be_run(class) || self.run_of(start).is_none() => self.small_len(start, class, layout),
            _ => self.large_len(start, layout).unwrap_or(layout.size()),
        }
    }
}

fn clear(block: NonNull<[u8]>, len: usize) {
    // SAFETY: the block was just allocated for at least `len` bytes and nobody else has it.
    unsafe { block.cast::<u8>().write_bytes(0, len) };
}

// SAFETY: `alloc` gives blocks of at least the Layout's size and alignment, disjoint from each other until they are
// freed (the invariants of `slab`, `cache` and `pages`); nothing unwinds.
unsafe impl<P: PageProvider, C: CpuMode, const CPUS: usize> GlobalAlloc for Heap<P, C, CPUS> {
    #[cfg(feature = "debug-heap")]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        or_null(self.alloc_with_header(layout, Site::Unknown).map(NonNull::cast))
    }

    #[cfg(not(feature = "debug-heap"))]
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let start = match SizeClass::of_short(layout) {
            Some(class) => self.alloc_small(class, layout),
            None => self.alloc_long(layout),
        };
        self.trace_alloc(start, layout);
        or_null(start)
    }

    #[inline]
    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        let Some(start) = NonNull::new(start) else { return };
        #[cfg(feature = "debug-heap")]
        // SAFETY: by the contract of `GlobalAlloc` the block is ours, of that Layout and unused.
        unsafe {
            self.free_with_header(start, layout, Site::Unknown);
        }
        #[cfg(not(feature = "debug-heap"))]
        // SAFETY: by the contract of `GlobalAlloc` the block is ours, of that Layout and unused.
        unsafe {
            self.free_sized(start, layout);
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        #[cfg(feature = "debug-heap")]
        let block = self.alloc_zeroed_with_header(layout, Site::Unknown);
        #[cfg(not(feature = "debug-heap"))]
        let block = self.alloc_zeroed_plain(layout);
        or_null(block.map(NonNull::cast))
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let Some(block) = NonNull::new(start) else {
            return core::ptr::null_mut();
        };
        // A block in a frame is longer than its Layout, and the frame knows how long.
        let is_run = layout.size() > MAX_SMALL_LEN && !cfg!(feature = "debug-heap");
        // SAFETY: by the contract of `GlobalAlloc` the block is ours and of that Layout.
        if is_run && unsafe { self.resize_near(block, layout, new_size) }.flatten().is_some() {
            self.trace_block(Kind::Resize, block, new_size, layout.align());
            return start;
        }
        // SAFETY: as above, and nothing has changed.
        unsafe { self.realloc_block(block, layout, new_size) }
    }
}

#[inline]
fn or_null(start: Option<NonNull<u8>>) -> *mut u8 {
    start.map_or(core::ptr::null_mut(), NonNull::as_ptr)
}

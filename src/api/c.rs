//! What C wants of a heap: blocks that are freed by their address alone.
//!
//! No header stands in front of a block. *What an address is, the heap's descriptors say*: a block of a slab has the
//! slab's class, a page run its length. Where a class has no block of its own and another one's serves, its address
//! would not tell; such a block goes back, and a page run serves instead. Price: a look at the descriptor in `malloc`
//! too, and in the last corner of a full heap a refusal where Rust is still served.
//!
//! With `debug-heap`, these blocks have no frame: level 1 looks at them, level 2 does not.

use core::alloc::Layout;
use core::ffi::c_void;
use core::ptr::{NonNull, null_mut};

use crate::base::size_class::SizeClass;
use crate::contract::CpuMode;
use crate::contract::provider::{PageProvider, PageRun};
use crate::heap::Heap;
use crate::heap::large::may_be_run;
use crate::pages::{Chunk, Kind, PageDesc};
use crate::slab::word::Slab;

/// Every block is at a multiple of this: as for `max_align_t` on 64-bit machines.
const ALIGN: usize = 16;

/// What a block in use is.
enum Place<'a> {
    Block(SizeClass),
    Run(&'a PageDesc),
    Huge(PageRun),
    #[cfg(feature = "guard-pages")]
    Guarded(Layout),
    /// Of the memory set aside for a panic, which is not freed.
    SetAside,
    /// None of this heap's.
    Stray,
}

impl Place<'_> {
    /// Bytes that may be used.
    fn len(&self) -> usize {
        match self {
            Self::Block(class) => class.block_len(),
            Self::Run(desc) => Chunk::run_len(desc),
            Self::Huge(run) => run.len(),
            #[cfg(feature = "guard-pages")]
            Self::Guarded(layout) => layout.size(),
            Self::SetAside | Self::Stray => 0,
        }
    }
}

/// The Layout of `size` bytes for C: size 0 is a byte, so that each block has an address of its own.
fn layout(size: usize, align: usize) -> Option<Layout> {
    Layout::from_size_align(size.max(1), align.max(ALIGN)).ok()
}

fn or_null(block: Option<NonNull<u8>>) -> *mut c_void {
    block.map_or(null_mut(), |block| block.as_ptr().cast())
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// C's `malloc`: `size` bytes at a multiple of 16, uninitialised; null if there are none. Size 0 gives a block too.
    ///
    /// # Context
    /// As [`alloc`](Self::alloc); a look at the block's descriptor more.
    pub fn c_malloc(&self, size: usize) -> *mut c_void {
        self.c_aligned_alloc(ALIGN, size)
    }

    /// C's `aligned_alloc`: [`c_malloc`](Self::c_malloc) at a multiple of `align`, a power of two; null also if it is
    /// none.
    pub fn c_aligned_alloc(&self, align: usize, size: usize) -> *mut c_void {
        if !align.is_power_of_two() {
            return null_mut();
        }
        or_null(layout(size, align).and_then(|layout| self.alloc_for_c(layout)))
    }

    /// C's `calloc`: [`c_malloc`](Self::c_malloc) of `count * size` bytes that are zero; null also if that overflows.
    pub fn c_calloc(&self, count: usize, size: usize) -> *mut c_void {
        let len = count.checked_mul(size);
        let block = len.and_then(|len| self.alloc_for_c(layout(len, ALIGN)?).map(|block| (block, len)));
        if let Some((block, len)) = block {
            // SAFETY: the block was just allocated, for at least that many bytes.
            unsafe { block.write_bytes(0, len) };
        }
        or_null(block.map(|(block, _)| block))
    }

    /// C's `free`. Null: nothing to do.
    ///
    /// # Safety
    /// `start` is null, or a block in use that one of the `c_` functions of this heap gave, and nobody uses it any
    /// more.
    pub unsafe fn c_free(&self, start: *mut c_void) {
        let Some(start) = NonNull::new(start.cast::<u8>()) else { return };
        match self.place_of(start) {
            // SAFETY: by the contract the block is unused, and its slab is of this class.
            Place::Block(class) => unsafe { self.free_classed(start, class) },
            Place::Run(desc) => {
                let layout = Layout::from_size_align(Chunk::run_len(desc), 1).unwrap_or(Layout::new::<u8>());
                // SAFETY: by the contract the block is unused; it is this run, as long as that.
                unsafe { self.free_large(start, layout) };
            }
            // SAFETY: by the contract the block is unused; it is this run of the provider's.
            Place::Huge(run) => unsafe { self.free_large(start, run.layout()) },
            #[cfg(feature = "guard-pages")]
            // SAFETY: by the contract the block is unused; it was allocated for this Layout.
            Place::Guarded(layout) => unsafe { self.free_sized(start, layout) },
            Place::SetAside => {}
            Place::Stray => self.engine.count_stray(),
        }
    }

    /// C's `realloc`: in place, else by moving its pages, else by copying. Null: the block is unchanged. Of null it is
    /// [`c_malloc`](Self::c_malloc); with size 0 it frees the block and gives null.
    ///
    /// # Safety
    /// As for [`c_free`](Self::c_free); if the answer is not null, the block is only there.
    pub unsafe fn c_realloc(&self, start: *mut c_void, size: usize) -> *mut c_void {
        let Some(block) = NonNull::new(start.cast::<u8>()) else { return self.c_malloc(size) };
        if size == 0 {
            // SAFETY: the contract is the same.
            unsafe { self.c_free(start) };
            return null_mut();
        }
        let place = self.place_of(block);
        let len = place.len();
        if size <= len && size > len / 2 {
            return start;
        }
        // SAFETY: the contract is the same, and this is what the block is.
        if let Some(moved) = unsafe { self.move_pages(block, &place, size) } {
            return moved.as_ptr().cast();
        }
        let Some(new) = NonNull::new(self.c_malloc(size).cast::<u8>()) else { return null_mut() };
        // SAFETY: both blocks are at least that long, and the new one is nobody else's, so they do not overlap.
        unsafe { block.copy_to_nonoverlapping(new, size.min(len)) };
        // SAFETY: the contract is the same, and the content has moved.
        unsafe { self.c_free(start) };
        new.as_ptr().cast()
    }

    /// C's `malloc_usable_size`: bytes of a block that may be used; 0 of null.
    ///
    /// # Safety
    /// `start` is null, or a block in use that one of the `c_` functions of this heap gave.
    pub unsafe fn c_usable_size(&self, start: *mut c_void) -> usize {
        NonNull::new(start.cast::<u8>()).map_or(0, |start| self.place_of(start).len())
    }

    /// Changes a page run's length without copying. `None`: unchanged.
    ///
    /// # Safety
    /// As for [`c_realloc`](Self::c_realloc); the place is the block's.
    unsafe fn move_pages(&self, block: NonNull<u8>, place: &Place<'_>, size: usize) -> Option<NonNull<u8>> {
        let old = match place {
            // A run so short that its length is a class's, as a slab's block is, could not be told from one.
            Place::Run(desc) => Layout::from_size_align(Chunk::run_len(desc), ALIGN)
                .ok()
                .filter(|layout| SizeClass::of(*layout).is_none_or(may_be_run))?,
            Place::Huge(run) => run.layout(),
            _ => return None,
        };
        let new = Layout::from_size_align(size, old.align()).ok()?;
        // SAFETY: by the contract the block is in use, and it is the run of this Layout.
        unsafe { self.remap_plain(block, old, new) }.map(NonNull::cast)
    }

    /// A block that its address tells all about.
    fn alloc_for_c(&self, layout: Layout) -> Option<NonNull<u8>> {
        let start: NonNull<u8> = self.alloc_plain(layout)?.cast();
        let is_own = SizeClass::of(layout).is_none_or(|class| match self.place_of(start) {
            Place::Block(own) => own == class,
            _ => true,
        });
        if is_own {
            return Some(start);
        }
        // SAFETY: just allocated for this Layout.
        unsafe { self.free_sized(start, layout) };
        self.alloc_large(layout).map(|large| large.block.cast())
    }

    /// What the block in use is that starts there.
    fn place_of(&self, start: NonNull<u8>) -> Place<'_> {
        if self.emergency.owns(start) {
            return Place::SetAside;
        }
        #[cfg(feature = "guard-pages")]
        if let Some(layout) = self.guards.layout_of(start) {
            return Place::Guarded(layout);
        }
        if let Some(run) = if P::REMAPS { self.engine.pages.huge_run(start) } else { None } {
            return Place::Huge(run);
        }
        let Some(head) = self.desc_at(start).and_then(Chunk::head) else { return Place::Stray };
        match Slab::of(head) {
            Some(slab) => Place::Block(slab.class()),
            None if head.kind() == Kind::Large => Place::Run(head),
            None => Place::Stray,
        }
    }
}

/// Defines C's `malloc`, `calloc`, `aligned_alloc`, `realloc`, `free` and `malloc_usable_size` over a heap in a
/// `static`.
///
/// Once in a program, and in a crate that no other one takes for Rust's: their names are global.
///
/// ```ignore
/// static HEAP: Heap<Provider, Hint<ThisCpu>, 16> = Heap::new(Provider, Hint(ThisCpu));
/// smp_heap::export_c_heap!(HEAP);
/// ```
#[macro_export]
macro_rules! export_c_heap {
    ($heap:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn malloc(size: usize) -> *mut ::core::ffi::c_void {
            $heap.c_malloc(size)
        }

        #[unsafe(no_mangle)]
        extern "C" fn calloc(count: usize, size: usize) -> *mut ::core::ffi::c_void {
            $heap.c_calloc(count, size)
        }

        #[unsafe(no_mangle)]
        extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut ::core::ffi::c_void {
            $heap.c_aligned_alloc(align, size)
        }

        /// # Safety
        /// As C says.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn realloc(start: *mut ::core::ffi::c_void, size: usize) -> *mut ::core::ffi::c_void {
            // SAFETY: C's contract is the same.
            unsafe { $heap.c_realloc(start, size) }
        }

        /// # Safety
        /// As C says.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn free(start: *mut ::core::ffi::c_void) {
            // SAFETY: C's contract is the same.
            unsafe { $heap.c_free(start) }
        }

        /// # Safety
        /// As C says.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn malloc_usable_size(start: *mut ::core::ffi::c_void) -> usize {
            // SAFETY: C's contract is the same.
            unsafe { $heap.c_usable_size(start) }
        }
    };
}

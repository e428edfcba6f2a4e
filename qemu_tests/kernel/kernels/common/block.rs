//! Blocks that know what their bytes must be.
//!
//! The first word says size, alignment and seed, and carries a check sum; the words behind it follow from it and from
//! the address. So a block can be handed on as a bare pointer, from any context to any other, without memory of its
//! own, and whoever frees it finds out whether somebody else wrote to it. Of long blocks every 32nd word and the last
//! are written: the test is about the heap, not about memory.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;

use smp_heap_kernel::test;

/// Blocks up to this length are written in full.
const FULL_LEN: usize = 4096;
const WORD: usize = size_of::<u64>();

/// A filled block in use.
#[derive(Debug)]
pub(crate) struct Block {
    start: NonNull<u64>,
}

/// The first word.
#[derive(Clone, Copy)]
struct Head(u64);

impl Head {
    fn new(layout: Layout, seed: u8) -> Self {
        let fields = layout.size() as u64 | u64::from(layout.align().trailing_zeros()) << 40 | u64::from(seed) << 48;
        Self(fields | Self::sum(fields) << 56)
    }

    fn sum(fields: u64) -> u64 {
        (fields & 0xff_ffff_ffff_ffff).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56
    }

    fn layout(self) -> Option<Layout> {
        if Self::sum(self.0) != self.0 >> 56 {
            return None;
        }
        let align = 1_usize.checked_shl((self.0 >> 40) as u32 & 0xff)?;
        Layout::from_size_align((self.0 & 0xff_ffff_ffff) as usize, align).ok()
    }

    /// What the word `index` of a block at `addr` must be.
    fn word(self, addr: usize, index: usize) -> u64 {
        self.0.rotate_left(index as u32) ^ (addr as u64).wrapping_add(index as u64).wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

impl Block {
    /// Allocates and fills a block of at least one word. `None`: no memory.
    pub(crate) fn new(heap: &(impl GlobalAlloc + ?Sized), size: usize, align: usize, seed: u8) -> Option<Self> {
        let Ok(layout) = Layout::from_size_align(size.max(WORD), align.max(WORD)) else {
            test::fail(format_args!("a test asked for {size} bytes at a multiple of {align}"));
        };
        // SAFETY: the size is not 0.
        let start = NonNull::new(unsafe { heap.alloc(layout) })?.cast();
        // SAFETY: just allocated with this Layout, of at least a word.
        Some(unsafe { Self::filled(start, layout, seed) })
    }

    /// Fills a block.
    ///
    /// # Safety
    /// It is a heap's, of that Layout, the caller's alone, and at least a word long.
    pub(crate) unsafe fn filled(start: NonNull<u64>, layout: Layout, seed: u8) -> Self {
        if start.addr().get() % layout.align() != 0 {
            test::fail(format_args!("{layout:?} at {start:p}"));
        }
        let (block, head) = (Self { start }, Head::new(layout, seed));
        block.write(0, head.0);
        let addr = block.addr();
        each_word(layout.size(), |index| block.write(index, head.word(addr, index)));
        block
    }

    /// The bare pointer, for whoever is to have the block.
    pub(crate) fn into_start(self) -> NonNull<u64> {
        self.start
    }

    /// The block of an [`into_start`](Self::into_start).
    ///
    /// # Safety
    /// The pointer came from there, and nobody else makes a block of it.
    pub(crate) unsafe fn from_start(start: NonNull<u64>) -> Self {
        Self { start }
    }

    fn addr(&self) -> usize {
        self.start.addr().get()
    }

    fn write(&self, index: usize, word: u64) {
        // SAFETY: callers stay inside the block.
        let place = unsafe { self.start.add(index) };
        // SAFETY: the block is this value's alone.
        unsafe { place.write_volatile(word) };
    }

    fn read(&self, index: usize) -> u64 {
        // SAFETY: callers stay inside the block.
        let place = unsafe { self.start.add(index) };
        // SAFETY: the block is this value's alone, and they read what was written.
        unsafe { place.read_volatile() }
    }

    /// Checks every word that was written; a wrong one fails the test.
    pub(crate) fn check(&self) -> Layout {
        let (addr, head) = (self.addr(), Head(self.read(0)));
        let Some(layout) = head.layout() else {
            test::fail(format_args!("the block at {addr:#x} begins with {:#x}: it was overwritten", head.0));
        };
        each_word(layout.size(), |index| {
            let (is, must) = (self.read(index), head.word(addr, index));
            if is != must {
                test::fail(format_args!(
                    "word {index} of the block at {addr:#x}, {layout:?}, is {is:#x}, not {must:#x}"
                ));
            }
        });
        layout
    }

    /// Checks the block and frees it.
    pub(crate) fn free(self, heap: &(impl GlobalAlloc + ?Sized)) {
        let layout = self.check();
        // Whoever believes to have it still will see.
        self.write(0, 0xdead);
        // SAFETY: the block is that heap's, of that Layout as `new` noted it, and its only user ends here.
        unsafe { heap.dealloc(self.start.as_ptr().cast(), layout) };
    }
}

/// The indices of the words behind the first that are written in a block of `size` bytes.
pub(crate) fn each_word(size: usize, mut visit: impl FnMut(usize)) {
    let count = size / WORD;
    let step = if size <= FULL_LEN { 1 } else { 32 };
    (1..count).step_by(step).for_each(&mut visit);
    if step > 1 {
        visit(count - 1);
    }
}

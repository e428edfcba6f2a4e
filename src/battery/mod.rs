//! A battery of checks that any heap over any provider must pass: run here on the host and in the test kernels, and in
//! your kernel over your provider.
//!
//! Each function fills every block it gets with a pattern of its own and checks it before the block goes, so that two
//! blocks that overlap, or one that is shorter than it said, cannot pass. Nothing is kept but in the blocks themselves
//! and in the caller's slots, so the battery needs no other heap, and little stack. [`Faulty`] takes memory away from
//! what is tested.

#![expect(unsafe_code, reason = "blocks are written and freed")]

mod faulty;
mod run;

pub use faulty::{Call, Faults, Faulty, Moment};
pub use run::{Failed, run};

use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;

use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
use crate::heap::Heap;

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A block is not at a multiple of its alignment, or shorter than it was asked for.
    Misplaced {
        /// Where it is.
        addr: usize,
        /// What was asked for, bytes.
        size: usize,
        /// What was asked for, bytes.
        align: usize,
    },
    /// A byte of a block changed while the block was in use, or a zeroed block is not zero.
    Damaged {
        /// The byte's address.
        addr: usize,
    },
    /// No memory where there must be some.
    OutOfMemory {
        /// What was asked for, bytes.
        size: usize,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Misplaced { addr, size, align } => {
                write!(f, "the block at {addr:#x} does not fit {size} bytes at a multiple of {align}")
            }
            Self::Damaged { addr } => write!(f, "the byte at {addr:#x} is not what was written there"),
            Self::OutOfMemory { size } => write!(f, "no memory for {size} bytes"),
        }
    }
}

impl core::error::Error for Failure {}

/// A small fast random number generator (xorshift64*, Vigna 2016), so that a run is repeated by its seed.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// Any seed will do.
    pub const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`; 0 if `end` is.
    pub fn below(&mut self, end: usize) -> usize {
        let number = (self.number() >> 16).checked_rem(end as u64).unwrap_or(0);
        usize::try_from(number).unwrap_or(0)
    }
}

/// A block in use of a heap `H`, with what its bytes must be. It knows its heap, and goes back to no other. Dropped, it
/// is lost to the heap.
///
/// It does not outlive the heap, whose memory it is:
/// ```compile_fail,E0505
/// # use core::alloc::Layout;
/// # use smp_heap::{Heap, Hint, RegionProvider, battery::Filled, cpu::UnknownCpu};
/// let heap = Heap::<_, _, 1>::new(RegionProvider::<1>::new(), Hint(UnknownCpu));
/// let block = Filled::new(&heap, Layout::new::<u64>(), 1).unwrap();
/// drop(heap);
/// block.map(Filled::free);
/// ```
pub struct Filled<'h, H> {
    heap: &'h H,
    start: NonNull<u8>,
    layout: Layout,
    seed: u8,
}

// SAFETY: a block is memory that only this value's owner uses, on whatever CPU; and the heap is used through a shared
// reference.
unsafe impl<H: Sync> Send for Filled<'_, H> {}

impl<H> fmt::Debug for Filled<'_, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, layout, seed, .. } = self;
        f.debug_struct("Filled")
            .field("start", start)
            .field("layout", layout)
            .field("seed", seed)
            .finish_non_exhaustive()
    }
}

impl<'h, P: PageProvider, C: CpuMode, const CPUS: usize> Filled<'h, Heap<P, C, CPUS>> {
    /// Allocates a block and fills it. `Ok(None)`: the heap has no memory.
    ///
    /// # Errors
    /// [`Failure::Misplaced`].
    pub fn new(heap: &'h Heap<P, C, CPUS>, layout: Layout, seed: u8) -> Result<Option<Self>, Failure> {
        let Ok(block) = heap.alloc(layout) else { return Ok(None) };
        check_place(block, layout)?;
        let filled = Self { heap, start: block.cast(), layout, seed };
        filled.fill(0);
        Ok(Some(filled))
    }

    /// As [`new`](Self::new) by way of `alloc_zeroed`, checking the zeros before filling.
    ///
    /// # Errors
    /// [`Failure::Misplaced`], [`Failure::Damaged`].
    pub fn zeroed(heap: &'h Heap<P, C, CPUS>, layout: Layout, seed: u8) -> Result<Option<Self>, Failure> {
        let Ok(block) = heap.alloc_zeroed(layout) else {
            return Ok(None);
        };
        check_place(block, layout)?;
        let filled = Self { heap, start: block.cast(), layout, seed };
        filled.check_with(layout.size(), |_| 0)?;
        filled.fill(0);
        Ok(Some(filled))
    }

    /// Checks the pattern and frees the block.
    ///
    /// # Errors
    /// [`Failure::Damaged`].
    pub fn free(self) -> Result<(), Failure> {
        self.check()?;
        // SAFETY: the block is this heap's, of that Layout, and this value, its only user, ends.
        unsafe { self.heap.free(self.start, self.layout) };
        Ok(())
    }

    /// Gives the block another size by `realloc`, and checks that the content came along. False: no memory, and nothing
    /// has changed.
    ///
    /// # Errors
    /// [`Failure::Misplaced`], [`Failure::Damaged`].
    pub fn realloc(&mut self, new_size: usize) -> Result<bool, Failure> {
        // SAFETY: the block is this heap's and of that Layout, and is used through this value only.
        let Ok(block) = (unsafe { self.heap.realloc(self.start, self.layout, new_size) }) else {
            return Ok(false);
        };
        self.moved(block, new_size).map(|()| true)
    }

    /// Gives the block another size by `resize`, where it stands. False: nothing has changed.
    ///
    /// # Errors
    /// [`Failure::Damaged`].
    pub fn resize(&mut self, new_size: usize) -> Result<bool, Failure> {
        // SAFETY: the block is this heap's and of that Layout, and is used through this value only.
        if !unsafe { self.heap.resize(self.start, self.layout, new_size) } {
            return Ok(false);
        }
        let block = NonNull::slice_from_raw_parts(self.start, new_size);
        self.moved(block, new_size).map(|()| true)
    }
}

impl<H> Filled<'_, H> {
    /// What the block was allocated for.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    #[expect(clippy::cast_possible_truncation, reason = "a pattern takes the low byte")]
    fn pattern(&self, index: usize) -> u8 {
        self.seed ^ (index as u8).wrapping_mul(31) ^ (index >> 8) as u8
    }

    fn fill(&self, from: usize) {
        for index in from..self.layout.size() {
            // SAFETY: the index is inside the block.
            let byte = unsafe { self.start.add(index) };
            // SAFETY: the block is this value's alone.
            unsafe { byte.write_volatile(self.pattern(index)) };
        }
    }

    fn check_with(&self, len: usize, expected: impl Fn(usize) -> u8) -> Result<(), Failure> {
        for index in 0..len {
            // SAFETY: the index is inside the block.
            let byte = unsafe { self.start.add(index) };
            // SAFETY: `fill`, or the heap in a zeroed block, has written it, and the block is this value's alone.
            if unsafe { byte.read_volatile() } != expected(index) {
                return Err(Failure::Damaged { addr: byte.as_ptr().addr() });
            }
        }
        Ok(())
    }

    /// Checks the pattern.
    ///
    /// # Errors
    /// [`Failure::Damaged`].
    pub fn check(&self) -> Result<(), Failure> {
        self.check_with(self.layout.size(), |index| self.pattern(index))
    }

    fn moved(&mut self, block: NonNull<[u8]>, new_size: usize) -> Result<(), Failure> {
        let old_size = self.layout.size();
        let Ok(layout) = Layout::from_size_align(new_size, self.layout.align()) else {
            return Err(Failure::OutOfMemory { size: new_size });
        };
        self.start = block.cast();
        self.layout = layout;
        check_place(block, layout)?;
        self.check_with(old_size.min(new_size), |index| self.pattern(index))?;
        self.fill(old_size);
        Ok(())
    }
}

fn check_place(block: NonNull<[u8]>, layout: Layout) -> Result<(), Failure> {
    let addr = block.cast::<u8>().as_ptr().addr();
    let (size, align) = (layout.size(), layout.align());
    if addr & (align - 1) != 0 || block.len() < size {
        return Err(Failure::Misplaced { addr, size, align });
    }
    Ok(())
}

/// A size and alignment as programs ask for them: mostly small, now and then up to `max_size`, a few with a large
/// alignment.
pub fn random_layout(random: &mut Random, max_size: usize) -> Layout {
    let bits = match random.below(16) {
        0..=11 => 8,
        12..=14 => 13,
        _ => 23,
    };
    let size = (random.below(1 << bits) >> random.below(bits)).clamp(1, max_size.max(1));
    let align = if random.below(8) == 0 { 1 << random.below(8) } else { 8 };
    Layout::from_size_align(size, align).unwrap_or(Layout::new::<u64>())
}

/// `steps` random steps on `slots`: allocate, free, reallocate, resize. Running out of memory is allowed; blocks stay
/// in the slots.
///
/// # Errors
/// The first [`Failure`].
pub fn churn<'h, P: PageProvider, C: CpuMode, const CPUS: usize>(
    heap: &'h Heap<P, C, CPUS>,
    random: &mut Random,
    slots: &mut [Option<Filled<'h, Heap<P, C, CPUS>>>],
    steps: usize,
    max_size: usize,
) -> Result<(), Failure> {
    for step in 0..steps {
        let count = slots.len();
        let Some(slot) = slots.get_mut(random.below(count)) else {
            return Ok(());
        };
        let layout = random_layout(random, max_size);
        #[expect(clippy::cast_possible_truncation, reason = "a seed takes the low byte")]
        let seed = step as u8;
        match (slot.take(), random.below(8)) {
            (None, 0) => *slot = Filled::zeroed(heap, layout, seed)?,
            (None, _) => *slot = Filled::new(heap, layout, seed)?,
            (Some(mut block), 0) => {
                block.realloc(layout.size())?;
                *slot = Some(block);
            }
            (Some(mut block), 1) => {
                block.resize(layout.size())?;
                *slot = Some(block);
            }
            (Some(block), _) => block.free()?,
        }
    }
    Ok(())
}

/// Frees what is in the slots.
///
/// # Errors
/// [`Failure::Damaged`].
pub fn free_all<P: PageProvider, C: CpuMode, const CPUS: usize>(
    slots: &mut [Option<Filled<'_, Heap<P, C, CPUS>>>],
) -> Result<(), Failure> {
    slots.iter_mut().filter_map(Option::take).try_for_each(Filled::free)
}

/// Every power-of-two alignment up to `max_align` against sizes up to `max_size`, each a power of two, one less and one
/// more. What fails for want of memory is skipped if `may_fail`.
///
/// # Errors
/// The first [`Failure`].
pub fn layouts<P: PageProvider, C: CpuMode, const CPUS: usize>(
    heap: &Heap<P, C, CPUS>,
    max_align: usize,
    max_size: usize,
    may_fail: bool,
) -> Result<(), Failure> {
    let powers = |max: usize| (0..usize::BITS - 1).map(|bit| 1usize << bit).take_while(move |power| *power <= max);
    for align in powers(max_align) {
        for size in powers(max_size).flat_map(|power| [power - 1, power, power + 1]) {
            let Ok(layout) = Layout::from_size_align(size, align) else {
                continue;
            };
            match Filled::new(heap, layout, 0x5a)? {
                Some(block) => block.free()?,
                None if may_fail => {}
                None => return Err(Failure::OutOfMemory { size }),
            }
        }
    }
    Ok(())
}

/// Allocates blocks of one Layout until there is no memory, `most` at most, linking each to the one before by its first
/// bytes; checks and frees them all; gives their number. The Layout must be able to hold a pointer and a number.
///
/// # Errors
/// The first [`Failure`].
pub fn exhaust<P: PageProvider, C: CpuMode, const CPUS: usize>(
    heap: &Heap<P, C, CPUS>,
    layout: Layout,
    most: usize,
) -> Result<usize, Failure> {
    let (link, _) = Layout::new::<Link>().extend(layout).unwrap_or((Layout::new::<Link>(), 0));
    let layout = Layout::from_size_align(layout.size().max(size_of::<Link>()), link.align()).unwrap_or(link);
    let mut newest: Option<NonNull<Link>> = None;
    let mut count = 0;
    while count < most {
        let Ok(block) = heap.alloc(layout) else { break };
        check_place(block, layout)?;
        let place = block.cast::<Link>();
        // SAFETY: the block was just allocated, is long enough and aligned for a link.
        unsafe { place.write(Link { older: newest, check: count ^ place.as_ptr().addr() }) };
        newest = Some(place);
        count += 1;
    }
    let mut left = count;
    while let Some(place) = newest {
        left = left.wrapping_sub(1);
        // SAFETY: the loop above wrote it, and the block is ours.
        let link = unsafe { place.read() };
        if link.check != left ^ place.as_ptr().addr() {
            return Err(Failure::Damaged { addr: place.as_ptr().addr() });
        }
        newest = link.older;
        // SAFETY: the block is this heap's, of that Layout, and used no more.
        unsafe { heap.free(place.cast(), layout) };
    }
    Ok(count)
}

/// What a block of [`exhaust`] holds.
struct Link {
    older: Option<NonNull<Link>>,
    check: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_out_of_place_or_too_short_is_seen() {
        let layout = Layout::from_size_align(24, 16).unwrap_or(Layout::new::<u8>());
        let place = |addr: usize, len: usize| {
            let start = NonNull::new(core::ptr::without_provenance_mut::<u8>(addr)).unwrap_or(NonNull::dangling());
            check_place(NonNull::slice_from_raw_parts(start, len), layout)
        };
        let misplaced = |addr| Err(Failure::Misplaced { addr, size: 24, align: 16 });
        assert_eq!([place(4096, 24), place(4112, 32)], [Ok(()), Ok(())]);
        assert_eq!([place(4104, 24), place(4096, 23)], [misplaced(4104), misplaced(4096)]);
    }
}

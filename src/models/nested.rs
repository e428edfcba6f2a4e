//! Nested contexts: an interrupt at every access of an operation, one after the other, and in one model an NMI at every
//! access of that.
//!
//! Not loom: one CPU runs, so nothing is reordered for it, and what a nested context can see changes only by an access.
//! Each run starts with a new heap and ends with everything freed, given back, and verified on the way. Other CPUs, and
//! what a compiler might move over the pinned flag, are not here.

use core::alloc::Layout;
use core::ptr::NonNull;
use std::println;
use std::vec::Vec;

use super::{Kept, Place, memory};
use crate::base::sync::model::{interrupted, reset};
use crate::battery::Filled;
use crate::contract::CpuMode;
use crate::contract::cpu::{CpuPin, Hint, Pinned};
use crate::contract::provider::{PageProvider, PageRun};
use crate::heap::Heap;
use crate::provider::RegionProvider;

models! {
    a_pinned_fast_path_is_interrupted
    a_pinned_refill_is_interrupted
    a_pinned_flush_is_interrupted
    a_pinned_large_block_is_interrupted
    a_pinned_drain_and_trim_are_interrupted
    a_hinted_refill_is_interrupted
    a_hinted_flush_is_interrupted
    a_hinted_drain_and_trim_are_interrupted
    a_cpu_without_a_cache_is_interrupted
    a_cpu_gets_its_cache_while_interrupted
    a_provider_that_must_not_be_entered_twice
    an_interrupt_is_interrupted
}

/// Each region's length, in most models. There are so many that a nested context finds one that is not on its way into
/// the heap or out of it.
const LEN: usize = 64 << 10;
const REGIONS: usize = 4;
/// So long that the heap has room for a second CPU's cache.
const LONG_LEN: usize = 512 << 10;
/// Regions that touch would be one.
const GAP_LEN: usize = 1024;
/// The class of the interrupted work and of its handlers.
const SIZE: usize = 100;

/// All on the CPU with that index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OneCpu(pub(crate) usize);

// SAFETY: each heap with this pin is used by one context and what interrupts it.
unsafe impl CpuPin for OneCpu {
    type Guard = ();
    fn pin(&self) {}
    fn index(&self, (): &()) -> usize {
        self.0
    }
}

fn hint() -> Option<usize> {
    Some(0)
}

/// Regions, but one context at a time.
struct Single(RegionProvider<REGIONS>);

// SAFETY: the regions' provider's.
unsafe impl PageProvider for Single {
    const PAGE_LEN: usize = RegionProvider::<REGIONS>::PAGE_LEN;
    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        assert!(!self.0.is_busy(), "entered twice");
        self.0.map(run)
    }
    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        assert!(!self.0.is_busy(), "entered twice");
        // SAFETY: the contract is the same.
        unsafe { self.0.unmap(start, run) }
    }
    fn prefer(&self, run: PageRun) -> PageRun {
        self.0.prefer(run)
    }
}

trait Regions: PageProvider + 'static {
    fn with(regions: RegionProvider<REGIONS>) -> Self;
    fn regions(&self) -> &RegionProvider<REGIONS>;
}

impl Regions for RegionProvider<REGIONS> {
    fn with(regions: RegionProvider<REGIONS>) -> Self {
        regions
    }
    fn regions(&self) -> &RegionProvider<REGIONS> {
        self
    }
}

impl Regions for Single {
    fn with(regions: RegionProvider<REGIONS>) -> Self {
        Self(regions)
    }
    fn regions(&self) -> &RegionProvider<REGIONS> {
        &self.0
    }
}

type Any<P, C> = Heap<P, C, 2>;
type Block<P, C> = Filled<'static, Any<P, C>>;

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

fn filled<P: PageProvider, C: CpuMode>(heap: &'static Any<P, C>, size: usize) -> Option<Block<P, C>> {
    Filled::new(heap, layout(size), 0x5a).unwrap()
}

fn free_all<P: PageProvider, C: CpuMode>(blocks: Vec<Block<P, C>>) {
    blocks.into_iter().for_each(|block| block.free().unwrap());
}

/// A heap that is made anew for each run, over the same memory.
struct Scene<P, C: 'static> {
    heap: Place<Any<P, C>>,
    memory: NonNull<u8>,
    len: usize,
    mode: C,
}

impl<P: Regions, C: CpuMode + Copy> Scene<P, C> {
    fn new(mode: C) -> Self {
        Self::with_regions(LEN, mode)
    }

    fn with_regions(len: usize, mode: C) -> Self {
        Self { heap: Place::new(), memory: memory((len + GAP_LEN) * REGIONS), len, mode }
    }

    fn renew(&self) -> &'static Any<P, C> {
        reset();
        let heap = self.heap.fill(Heap::new(P::with(RegionProvider::new()), self.mode));
        for region in 0..REGIONS {
            let start = self.memory.as_ptr().wrapping_add(region * (self.len + GAP_LEN));
            // SAFETY: leaked memory of that length, which only this heap uses until the next one is made.
            unsafe { heap.provider().regions().add_region(start, self.len) }.unwrap();
        }
        heap
    }

    /// What an interrupt's handler does: allocate in the same and in another class and a page run; free what it got
    /// before, and some of it. It keeps the rest. Nothing is refused, unless the provider must not be entered.
    fn handle(heap: &'static Any<P, C>, earlier: Option<Block<P, C>>, kept: &Kept<Block<P, C>>) {
        for size in [SIZE, 24, 5000] {
            match filled(heap, size) {
                Some(block) => kept.add(block),
                None => assert!(!P::REENTRANT, "{size} bytes refused"),
            }
        }
        let again = filled(heap, SIZE);
        free_all(earlier.into_iter().chain(again).collect());
    }

    /// Interrupts `work` at every access. `before` makes the heap what it is then, and gives the blocks that `work` is
    /// about.
    fn explore(
        &self,
        before: impl Fn(&'static Any<P, C>) -> Vec<Block<P, C>>,
        work: impl Fn(&'static Any<P, C>, Vec<Block<P, C>>) -> Vec<Block<P, C>>,
    ) {
        for step in 0.. {
            let (heap, kept) = (self.renew(), Kept::new());
            let mut blocks = before(heap);
            let earlier = blocks.pop();
            let handler = {
                let kept = kept.clone();
                move || Self::handle(heap, earlier, &kept)
            };
            let mut rest = Vec::new();
            let came = interrupted(step, handler, || rest = work(heap, blocks));
            if !came {
                println!("{step} interrupts");
                return;
            }
            self.check(heap, rest.into_iter().chain(kept.take()).collect());
        }
    }

    fn check(&self, heap: &'static Any<P, C>, blocks: Vec<Block<P, C>>) {
        heap.verify_all().unwrap();
        free_all(blocks);
        heap.verify_all().unwrap();
        // SAFETY: every context has ended.
        unsafe { heap.trim_at_rest() };
        heap.verify_all().unwrap();
        assert_eq!((heap.stats().held_len, heap.provider().regions().held_len()), (0, 0), "memory is lost");
    }
}

fn many<P: PageProvider, C: CpuMode>(heap: &'static Any<P, C>, size: usize, count: usize) -> Vec<Block<P, C>> {
    (0..count).map(|_| filled(heap, size).unwrap()).collect()
}

/// Some blocks have come and gone, so that the cache has a few and a slab too.
fn warm<P: PageProvider, C: CpuMode>(heap: &'static Any<P, C>) -> Vec<Block<P, C>> {
    let mut blocks = many(heap, SIZE, 12);
    free_all(blocks.split_off(6));
    blocks
}

fn fast<P: PageProvider, C: CpuMode>(heap: &'static Any<P, C>, mut blocks: Vec<Block<P, C>>) -> Vec<Block<P, C>> {
    blocks.pop().unwrap().free().unwrap();
    blocks.extend(filled(heap, SIZE));
    blocks
}

fn refill<P: PageProvider, C: CpuMode>(heap: &'static Any<P, C>, mut blocks: Vec<Block<P, C>>) -> Vec<Block<P, C>> {
    blocks.extend((0..20).filter_map(|index| filled(heap, if index % 2 == 0 { SIZE } else { 40 })));
    blocks
}

fn flush<P: PageProvider, C: CpuMode>(_: &'static Any<P, C>, blocks: Vec<Block<P, C>>) -> Vec<Block<P, C>> {
    free_all(blocks);
    Vec::new()
}

fn large<P: PageProvider, C: CpuMode>(heap: &'static Any<P, C>, mut blocks: Vec<Block<P, C>>) -> Vec<Block<P, C>> {
    let mut block = blocks.pop().unwrap();
    block.realloc(9000).unwrap();
    block.realloc(50_000).unwrap();
    block.free().unwrap();
    blocks.extend(filled(heap, 40_000));
    blocks
}

fn drain_and_trim<P: PageProvider, C: CpuMode>(heap: &'static Any<P, C>, blocks: Vec<Block<P, C>>) -> Vec<Block<P, C>> {
    free_all(blocks);
    heap.drain_current();
    heap.trim(0);
    Vec::new()
}

type Pins = Scene<RegionProvider<REGIONS>, Pinned<OneCpu>>;
type Hints = Scene<RegionProvider<REGIONS>, Hint<fn() -> Option<usize>>>;

fn pins() -> Pins {
    Scene::new(Pinned(OneCpu(0)))
}

fn hints() -> Hints {
    Scene::new(Hint(hint))
}

fn a_pinned_fast_path_is_interrupted() {
    pins().explore(warm, fast);
}

/// From the very first block, whose pages the provider is asked for.
fn a_pinned_refill_is_interrupted() {
    pins().explore(|_| Vec::new(), refill);
}

fn a_pinned_flush_is_interrupted() {
    pins().explore(|heap| many(heap, SIZE, 40), flush);
}

fn a_pinned_large_block_is_interrupted() {
    pins().explore(|heap| many(heap, 5000, 2), large);
}

fn a_pinned_drain_and_trim_are_interrupted() {
    pins().explore(|heap| many(heap, SIZE, 10), drain_and_trim);
}

fn a_hinted_refill_is_interrupted() {
    hints().explore(|_| Vec::new(), refill);
}

fn a_hinted_flush_is_interrupted() {
    hints().explore(|heap| many(heap, SIZE, 40), flush);
}

fn a_hinted_drain_and_trim_are_interrupted() {
    hints().explore(|heap| many(heap, SIZE, 10), drain_and_trim);
}

/// It takes single blocks from the slabs.
fn a_cpu_without_a_cache_is_interrupted() {
    let scene = Pins::new(Pinned(OneCpu(1)));
    scene.explore(|_| Vec::new(), refill);
    scene.explore(|heap| many(heap, SIZE, 10), drain_and_trim);
    scene.explore(|heap| many(heap, 5000, 2), large);
}

/// An interrupt at every access of the operation that makes the cache.
fn a_cpu_gets_its_cache_while_interrupted() {
    let scene = Pins::with_regions(LONG_LEN, Pinned(OneCpu(1)));
    let without = |heap: &'static Any<_, _>| {
        assert!(heap.engine.cache(1).is_none(), "nobody asked for pages yet");
        Vec::new()
    };
    scene.explore(without, |heap, blocks| {
        let blocks = refill(heap, blocks);
        assert!(heap.engine.cache(1).is_some(), "it got none");
        blocks
    });
}

/// The gate keeps nested callers out.
fn a_provider_that_must_not_be_entered_twice() {
    let scene = Scene::<Single, _>::new(Pinned(OneCpu(0)));
    scene.explore(|_| Vec::new(), refill);
    scene.explore(|heap| many(heap, SIZE, 10), drain_and_trim);
}

/// An interrupt at every access of a few operations, and for each of these an NMI at every access of its handler.
fn an_interrupt_is_interrupted() {
    let scene = pins();
    let mut count = 0;
    for step in 0.. {
        for nested_step in 0.. {
            let (heap, kept, nested_came) = (scene.renew(), Kept::new(), Kept::new());
            let mut blocks = warm(heap);
            let [earlier, earliest] = [(); 2].map(|()| blocks.pop().unwrap());
            let handler = {
                let (kept, nested_came) = (kept.clone(), nested_came.clone());
                move || {
                    let nested = kept.clone();
                    let nmi = move || Pins::handle(heap, Some(earliest), &nested);
                    let irq = || {
                        kept.add(filled(heap, SIZE).unwrap());
                        earlier.free().unwrap();
                    };
                    if interrupted(nested_step, nmi, irq) {
                        nested_came.add(());
                    }
                }
            };
            let mut rest = Vec::new();
            let came = interrupted(step, handler, || rest = fast(heap, blocks));
            if !came {
                println!("{count} pairs of interrupts");
                return;
            }
            if nested_came.take().is_empty() {
                break;
            }
            scene.check(heap, rest.into_iter().chain(kept.take()).collect());
            count += 1;
        }
    }
}

//! A heap that goes back to its first state, over the same memory: what is tried many times starts from the same each
//! time.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;

use smp_heap::Heap;
use smp_heap::cpu::CpuMode;
use smp_heap_kernel::{Boot, Region, sync::Once, test};

use super::heaps::{OverRegions, give};

/// Memory comes in so many regions, so that one whose lock was interrupted is not all there is.
const REGIONS: usize = 4;

/// Regions that touch would be one.
const GAP_LEN: usize = 4096;

/// A heap, and one like it that nobody uses.
pub(crate) struct Renewable<H> {
    heap: UnsafeCell<H>,
    first: H,
}

// SAFETY: `renew` is the only code that writes past the heap's own methods, and its caller promises to be alone.
unsafe impl<H: Sync> Sync for Renewable<H> {}

impl<H> Renewable<H> {
    /// Two equal heaps.
    pub(crate) const fn new(heap: H, first: H) -> Self {
        Self { heap: UnsafeCell::new(heap), first }
    }

    /// The heap.
    pub(crate) fn get(&self) -> &H {
        // SAFETY: never moved or freed; written to by `renew` alone, when nobody uses it.
        unsafe { &*self.heap.get() }
    }
}

/// Which of its slow paths a heap has been on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Blocks from slabs into caches.
    pub(crate) refilled: u64,
    /// Blocks from caches into slabs.
    pub(crate) flushed: u64,
    /// Chunks from the provider.
    pub(crate) maps: u64,
    /// Chunks back to it.
    pub(crate) unmaps: u64,
}

/// What can be made new, and looked at by who interrupted it.
pub(crate) trait Renew: Sync {
    /// Puts the first state in place of the present one.
    ///
    /// # Safety
    /// Nobody uses the heap meanwhile, nor a block of it afterwards.
    unsafe fn renew(&self);

    /// Whether a context holds a cache.
    fn is_held(&self) -> bool;

    /// Sets memory aside for a panic; then the panic is there.
    fn set_aside(&self, len: usize) -> bool;
    fn panics(&self);

    /// What it did so far.
    fn counts(&self) -> Counts;
}

impl<P: OverRegions + Sync, C: CpuMode + Sync, const N: usize> Renew for Renewable<Heap<P, C, N>> {
    fn is_held(&self) -> bool {
        self.get().is_any_cache_held()
    }

    fn set_aside(&self, len: usize) -> bool {
        self.get().reserve_for_panic(len).is_ok()
    }

    fn panics(&self) {
        self.get().enter_panic_mode();
    }

    fn counts(&self) -> Counts {
        let stats = self.get().stats();
        Counts {
            refilled: stats.cpus.iter().map(|cpu| cpu.refilled_count).sum(),
            flushed: stats.cpus.iter().map(|cpu| cpu.flushed_count).sum(),
            maps: stats.map_count,
            unmaps: stats.unmap_count,
        }
    }

    unsafe fn renew(&self) {
        let first = (&raw const self.first).cast::<MaybeUninit<u8>>();
        let heap = self.heap.get().cast::<MaybeUninit<u8>>();
        // SAFETY: both are as long, one is not the other, and by the contract nobody else is at the heap. It was never
        // used, so its bytes are a heap wherever they lie.
        unsafe { first.copy_to_nonoverlapping(heap, size_of::<Heap<P, C, N>>()) };
    }
}

static CHOSEN: Once<&'static dyn Renew> = Once::new();
static MEMORY: Once<[Region; REGIONS]> = Once::new();

/// Makes `heap` the one that is renewed. Once, on CPU 0, before anybody wants it.
pub(crate) fn set_chosen(boot: &Boot, heap: &'static dyn Renew, region_limit: usize) {
    let all = boot.largest_region();
    let distance = (all.len / REGIONS) & !0xfff;
    let len = (distance - GAP_LEN).min(region_limit);
    let memory = core::array::from_fn(|part| Region { start: all.start + part * distance, len });
    // SAFETY: called once, while CPU 0 is alone or the others wait for a job.
    unsafe { CHOSEN.set(heap) };
    // SAFETY: as above.
    unsafe { MEMORY.set(memory) };
}

fn chosen() -> &'static dyn Renew {
    match CHOSEN.get() {
        Some(heap) => *heap,
        None => test::fail(format_args!("no heap was chosen")),
    }
}

/// The chosen heap in its first state, with all memory. At rest, with no block in use.
pub(crate) fn renew() {
    // SAFETY: kernels call this between two trials, when nothing of the last one is left.
    unsafe { chosen().renew() };
    MEMORY.get().into_iter().flatten().for_each(|region| give(*region));
}

/// Whether a context holds a cache of the chosen heap.
pub(crate) fn is_held() -> bool {
    chosen().is_held()
}

/// What the chosen heap did since it was new.
pub(crate) fn counts() -> Counts {
    chosen().counts()
}

/// Has the chosen heap set memory aside for a panic.
pub(crate) fn set_aside(len: usize) {
    assert!(chosen().set_aside(len), "no memory to set aside");
}

/// Puts the chosen heap into panic mode, until it is renewed.
pub(crate) fn panics() {
    chosen().panics();
}

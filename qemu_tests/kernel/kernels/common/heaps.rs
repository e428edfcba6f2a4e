//! The heap that a kernel tests, behind one interface, whatever its type.
//!
//! So interrupt handlers, which are plain functions, and helpers need not be generic. The heap's fast paths are
//! inlined behind the interface as they would be in a kernel.

use core::alloc::GlobalAlloc;
use core::fmt;

use smp_heap::battery::{Call, Faults, Faulty, Moment};
use smp_heap::cpu::CpuMode;
use smp_heap::{Heap, PageProvider, RegionError, RegionProvider, Violation};
use smp_heap_kernel::{Region, smp, sync::Once, test, time};

/// The most CPUs that a kernel of these is booted with.
pub(crate) const CPUS: usize = 8;

/// Where all memory comes from in the end.
pub(crate) type Regions = RegionProvider<8>;

/// A provider that has its memory from regions.
pub(crate) trait OverRegions: PageProvider {
    /// The regions.
    fn regions(&self) -> &Regions;
    /// What calls of this kind are told, if it can be told.
    fn faults(&self, _: Call) -> Option<&Faults> {
        None
    }
}

impl OverRegions for Regions {
    fn regions(&self) -> &Regions {
        self
    }
}

impl<H: Fn(Call, Moment)> OverRegions for Faulty<Regions, H> {
    fn regions(&self) -> &Regions {
        self.inner()
    }

    fn faults(&self, call: Call) -> Option<&Faults> {
        Some(self.on(call))
    }
}

/// What tests do with a heap, whatever its type.
pub(crate) trait AnyHeap: GlobalAlloc + Sync {
    fn regions(&self) -> &Regions;
    /// What calls of its provider are told, and their counts: over a `Faulty`.
    #[allow(dead_code, clippy::allow_attributes, reason = "most kernels have a provider that works")]
    fn faults(&self, call: Call) -> &Faults;
    /// Bytes held that are not free pages.
    #[allow(dead_code, clippy::allow_attributes, reason = "not every kernel asks how much is used")]
    fn used_len(&self) -> usize;
    /// Checks every invariant. At rest.
    fn verify_all(&self) -> Result<(), Violation>;
    fn drain_current(&self);
    #[allow(dead_code, clippy::allow_attributes, reason = "most kernels trim at rest")]
    fn trim(&self);
    /// Gives everything back. At rest.
    fn trim_all(&self);
    #[allow(dead_code, clippy::allow_attributes, reason = "not every kernel has idle times")]
    fn maintain(&self) -> usize;
    /// # Safety
    /// As for `Heap::retire_cpu`.
    #[allow(dead_code, clippy::allow_attributes, reason = "not in every kernel do CPUs go")]
    unsafe fn retire_cpu(&self, index: usize) -> bool;
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;
}

impl<P: OverRegions + Sync, C: CpuMode + Sync, const N: usize> AnyHeap for Heap<P, C, N> {
    fn regions(&self) -> &Regions {
        self.provider().regions()
    }

    fn faults(&self, call: Call) -> &Faults {
        match self.provider().faults(call) {
            Some(faults) => faults,
            None => test::fail(format_args!("a provider without knobs")),
        }
    }

    fn verify_all(&self) -> Result<(), Violation> {
        smp::expect_rest();
        // SAFETY: the other CPUs wait for a job, and no interrupt handler of theirs uses the heap between jobs.
        unsafe { self.verify_at_rest() }
    }

    fn drain_current(&self) {
        self.drain_current();
    }

    fn used_len(&self) -> usize {
        let stats = self.stats();
        stats.held_len - stats.free_len
    }

    fn trim(&self) {
        self.trim(0);
    }

    fn trim_all(&self) {
        smp::expect_rest();
        // SAFETY: as above.
        unsafe { self.trim_at_rest() };
    }

    fn maintain(&self) -> usize {
        self.maintain(usize::MAX)
    }

    unsafe fn retire_cpu(&self, index: usize) -> bool {
        // SAFETY: the contract is the same.
        unsafe { self.retire_cpu(index) }
    }

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.stats(), f)
    }
}

/// A reference to a heap that is always there.
pub(crate) type HeapRef = &'static dyn AnyHeap;

static CHOSEN: Once<HeapRef> = Once::new();

/// Makes `heap` the chosen one. Once, on CPU 0, before anybody wants it.
pub(crate) fn set_chosen(heap: HeapRef) {
    // SAFETY: called once, while CPU 0 is alone or the others wait for a job.
    unsafe { CHOSEN.set(heap) };
}

/// The chosen heap.
pub(crate) fn heap() -> HeapRef {
    match CHOSEN.get() {
        Some(heap) => *heap,
        None => test::fail(format_args!("no heap was chosen")),
    }
}

/// Gives the chosen heap memory that nobody else uses. Each byte once. Another CPU may be in a region that touches it
/// for as long as the host stops that CPU.
pub(crate) fn give(region: Region) {
    time::wait_for("the provider", time::SOON, || {
        // SAFETY: RAM that the boot code left to this kernel, and that the kernel gives away here; nothing was taken if
        // the provider was busy.
        match unsafe { heap().regions().add_region(region.as_ptr(), region.len) } {
            Err(RegionError::Busy) => false,
            Err(error) => test::fail(format_args!("{region:?}: {error}")),
            Ok(()) => true,
        }
    });
}

/// Checks every invariant of the chosen heap. At rest.
pub(crate) fn verify() {
    if let Err(violation) = heap().verify_all() {
        test::fail(format_args!("{violation}"));
    }
}

/// Everything was freed: checks the heap, has it give its memory back, and checks that at most `len` bytes are left:
/// with 0, that its provider has every page.
pub(crate) fn expect_left(len: usize) {
    verify();
    expect_back(len);
    verify();
}

/// Has the chosen heap give its memory back, and checks that at most `len` bytes are left.
pub(crate) fn expect_back(len: usize) {
    smp::on_all(|_| heap().drain_current());
    heap().trim_all();
    let held_len = heap().regions().held_len();
    if held_len > len {
        test::fail(format_args!("{held_len} bytes did not come back\n{}", Shown));
    }
}

/// The chosen heap's statistics.
#[derive(Debug)]
pub(crate) struct Shown;

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        heap().show(f)
    }
}

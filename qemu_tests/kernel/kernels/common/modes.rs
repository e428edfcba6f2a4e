//! The ways to know a CPU; a kernel names those that it can run with, and the command line chooses one of them.

#[cfg(target_arch = "aarch64")]
pub(crate) use smp_heap::cpu::aarch64::InterruptsMasked;
#[cfg(target_arch = "riscv64")]
pub(crate) use smp_heap::cpu::riscv64::InterruptsMasked;
#[cfg(target_arch = "x86_64")]
pub(crate) use smp_heap::cpu::x86_64::InterruptsMasked;
use smp_heap::cpu::{ByAddr, CacheAddr, CpuArea, CpuMode, NeverPreempts, PreemptionCounter, PreemptionPin, UnknownCpu};
use smp_heap::{CpuHint, Hint, Pinned};
use smp_heap_kernel::{cpu, interrupts};

use super::heaps::CPUS;

/// The index in the CPU's own area: right from the moment it is set up, and above any CPU count before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Index;

impl CpuHint for Index {
    fn current_cpu(&self) -> Option<usize> {
        Some(cpu::index())
    }

    fn may_wait(&self) -> bool {
        interrupts::are_enabled()
    }
}

/// Preemption as this kernel's scheduler knows it.
#[derive(Debug)]
pub(crate) enum Pins {}

// SAFETY: a thread is switched by a timer interrupt that finds no pin on its CPU, or where it yields, and nowhere else;
// `pin` and `unpin` change the count by one instruction of the CPU they run on, and contain compiler fences.
unsafe impl PreemptionCounter for Pins {
    fn disable() {
        cpu::pin();
    }

    fn enable() {
        cpu::unpin();
    }
}

/// A place for each CPU's cache address, chosen by the index in the CPU's own area.
#[derive(Debug)]
pub(crate) enum Places {}

/// The last one is that of all CPUs without an index.
static PLACES: [CacheAddr; CPUS + 1] = [const { CacheAddr::new() }; CPUS + 1];

// SAFETY: areas have their own indices; the place of those that have none stays empty, since their index is above the
// heap's CPU count.
unsafe impl CpuArea for Places {
    fn cache_addr() -> &'static CacheAddr {
        &PLACES[cpu::index().min(CPUS)]
    }

    fn index() -> usize {
        cpu::index()
    }

    fn may_wait() -> bool {
        interrupts::are_enabled()
    }
}

/// One of the ways to know a CPU.
pub(crate) trait Mode: CpuMode + Sync {
    /// What the command line calls it: `mode=hint`.
    const NAME: &'static str;
    /// The one value.
    const NEW: Self;
}

impl Mode for Hint<Index> {
    const NAME: &'static str = "hint";
    const NEW: Self = Hint(Index);
}

/// Only for kernels that start no threads.
impl Mode for Pinned<NeverPreempts<Index>> {
    const NAME: &'static str = "pinned";
    // SAFETY: a kernel without threads runs one task on each CPU, and what interrupts it and returns; areas have their
    // own indices, and before there is one the index is above the heap's CPU count.
    const NEW: Self = Pinned(unsafe { NeverPreempts::new(Index) });
}

impl Mode for Pinned<PreemptionPin<Pins, Index>> {
    const NAME: &'static str = "counted";
    // SAFETY: areas have their own indices, and before there is one the index is above the heap's CPU count.
    const NEW: Self = Pinned(unsafe { PreemptionPin::new(Index) });
}

/// Only for kernels that start no threads.
impl Mode for Pinned<ByAddr<NeverPreempts<UnknownCpu>, Places>> {
    const NAME: &'static str = "addr";
    const NEW: Self = {
        // SAFETY: as for `NeverPreempts<Index>`.
        let pin = unsafe { NeverPreempts::new(UnknownCpu) };
        // SAFETY: a kernel uses one of its heaps, each of which is a static.
        Pinned(unsafe { ByAddr::new(pin) })
    };
}

impl Mode for Pinned<ByAddr<PreemptionPin<Pins, UnknownCpu>, Places>> {
    const NAME: &'static str = "counted_addr";
    const NEW: Self = {
        // SAFETY: its source gives no CPU a number.
        let pin = unsafe { PreemptionPin::new(UnknownCpu) };
        // SAFETY: a kernel uses one of its heaps, each of which is a static.
        Pinned(unsafe { ByAddr::new(pin) })
    };
}

impl Mode for Pinned<InterruptsMasked<Index>> {
    const NAME: &'static str = "masked";
    // SAFETY: NMI and exception handlers return to what they interrupted; the indices as above.
    const NEW: Self = Pinned(unsafe { InterruptsMasked::new(Index) });
}

/// Declares `choose(boot)`, which chooses the heap that the command line names, out of one for each mode; `renewable 2
/// within LEN` ones have two caches and regions of at most so many bytes, and go back to their first state when told
/// to.
macro_rules! heaps {
    (renewable $cpus:literal within $len:ident over $provider:ty = $new:expr; $($mode:ty),+ $(,)?) => {
        fn choose(boot: &smp_heap_kernel::Boot) {
            let name = boot.arg("mode").unwrap_or_default();
            $(
                if name == <$mode as $crate::common::modes::Mode>::NAME {
                    const { assert!($cpus <= $crate::common::heaps::CPUS, "no kernel is booted with more") };
                    type Chosen = smp_heap::Heap<$provider, $mode, $cpus>;
                    static HEAP: $crate::common::renew::Renewable<Chosen> = $crate::common::renew::Renewable::new(
                        Chosen::new($new, <$mode as $crate::common::modes::Mode>::NEW),
                        Chosen::new($new, <$mode as $crate::common::modes::Mode>::NEW),
                    );
                    $crate::common::heaps::set_chosen(HEAP.get());
                    return $crate::common::renew::set_chosen(boot, &HEAP, $len);
                }
            )+
            smp_heap_kernel::test::fail(format_args!("mode={name} is not a mode of this kernel"));
        }
    };
    (over $provider:ty = $new:expr; $($mode:ty),+ $(,)?) => {
        fn choose(boot: &smp_heap_kernel::Boot) {
            let name = boot.arg("mode").unwrap_or_default();
            $(
                if name == <$mode as $crate::common::modes::Mode>::NAME {
                    static HEAP: smp_heap::Heap<$provider, $mode, { $crate::common::heaps::CPUS }> =
                        smp_heap::Heap::new($new, <$mode as $crate::common::modes::Mode>::NEW);
                    return $crate::common::heaps::set_chosen(&HEAP);
                }
            )+
            smp_heap_kernel::test::fail(format_args!("mode={name} is not a mode of this kernel"));
        }
    };
}
pub(crate) use heaps;

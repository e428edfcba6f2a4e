//! The part of the start that is the same for all architectures: memory for all CPUs, the early hook, the other CPUs,
//! `main`.

use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::memory::{Ram, Stacks, own};
use crate::{Boot, Kernel, Region, arch, cpu, interrupts, smp, sync::Once, test};

/// The most CPUs that the kernel starts.
pub const MAX_CPUS: usize = 16;

static STACKS: Once<Stacks> = Once::new();
static BOOT: Once<Boot> = Once::new();
/// How many CPUs have been started and have come up.
static ONLINE: AtomicUsize = AtomicUsize::new(0);

unsafe extern "Rust" {
    safe static SMP_HEAP_KERNEL: Kernel;
}

/// What `kernel!` declared.
#[must_use]
pub fn kernel() -> &'static Kernel {
    &SMP_HEAP_KERNEL
}

/// How many CPUs there are.
#[must_use]
pub fn cpu_count() -> usize {
    BOOT.get().map_or(1, |boot| boot.cpu_count)
}

/// Shares out the memory that is left: per-CPU areas, then everything else, which is the kernel's.
///
/// # Safety
/// Called once, on CPU 0, while the other CPUs do not run.
pub(crate) unsafe fn share_out(ram: &mut Ram, stacks: Stacks, cpu_count: usize, args: &'static str) {
    let areas = ram.take(cpu_count * arch::AREA.size());
    let regions = own::<[Region; 64]>(ram.take(size_of::<[Region; 64]>()));
    let regions = &mut regions[..ram.regions().len()];
    regions.copy_from_slice(ram.regions());
    // SAFETY: as the caller promises.
    unsafe { STACKS.set(stacks) };
    // SAFETY: as above.
    unsafe { BOOT.set(Boot { cpu_count, regions, args, areas }) };
}

/// CPU 0, on its own stack and the final page tables, its interrupt controller set up; `start_cpu` starts another one
/// and waits until it
/// [`is_online`].
pub(crate) fn run(start_cpu: impl Fn(usize)) -> ! {
    let boot = boot();
    if let Some(early) = kernel().hooks.early {
        early(boot);
    }
    set_up_cpu(boot, 0);
    (1..boot.cpu_count).for_each(start_cpu);
    interrupts::enable();
    kernel().run(boot)
}

/// Another CPU, on its own stack and the final page tables, its interrupt controller set up.
pub(crate) fn join(index: usize) -> ! {
    set_up_cpu(boot(), index);
    interrupts::enable();
    smp::work_loop()
}

/// Whether the CPU has come up. They come in the order of their indices.
pub(crate) fn is_online(index: usize) -> bool {
    ONLINE.load(Ordering::Acquire) > index
}

/// Gives this CPU its index and its own tables.
fn set_up_cpu(boot: &Boot, index: usize) {
    let area = match kernel().hooks.per_cpu_area {
        Some(allocate) => allocate(arch::AREA),
        None => Region { start: boot.areas + index * arch::AREA.size(), len: 0 }.as_ptr(),
    };
    if area.is_null() || area.addr() % arch::AREA.align() != 0 {
        test::fail(format_args!("the kernel gave {area:p} as the area of CPU {index}"));
    }
    // SAFETY: boot memory that is this CPU's alone, or what the kernel allocated for it.
    unsafe { arch::set_up_cpu(area, index) };
    ONLINE.fetch_add(1, Ordering::Release);
}

fn boot() -> &'static Boot {
    BOOT.get().unwrap_or_else(|| test::fail(format_args!("the boot order is wrong")))
}

/// The stacks of all CPUs and threads.
pub(crate) fn stacks() -> Stacks {
    STACKS.get().copied().unwrap_or_else(|| test::fail(format_args!("the boot order is wrong")))
}

/// What a report of a page fault at `address` ends with.
pub(crate) fn remark(address: usize) -> &'static str {
    let overrun = STACKS.get().is_some_and(|stacks| stacks.hits_guard(address));
    if overrun { ": a stack ran over" } else { "" }
}

/// Prints as `cpu 3`.
#[derive(Clone, Copy, Debug)]
pub struct Name;

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match cpu::index() {
            usize::MAX => f.write_str("cpu ?"),
            index => write!(f, "cpu {index}"),
        }
    }
}

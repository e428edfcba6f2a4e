//! Every source of a CPU's number that comes with the crate, asked on every CPU.
//!
//! Would catch: a source that reads the wrong bytes, or the right ones with the wrong width; two CPUs with one number;
//! a source that knows a CPU before it is set up; a source with bytes, which takes the heap out of `.bss`.
#![no_std]
#![no_main]

mod common;

use core::alloc::Layout;

use common::area::{Area, source};
use common::heaps::{CPUS, Regions, expect_left, give, heap, set_chosen};
use smp_heap::cpu::{FromOne, NO_INDEX, NeverPreempts, OnlyCpu};
use smp_heap::{CpuHint, Heap, Pinned};
use smp_heap_kernel::{Boot, Hooks, kernel, smp, test};

/// Over a number of 4 bytes in the area.
static HEAP: Heap<Regions, Pinned<NeverPreempts<Area<u32>>>, CPUS> = Heap::new(
    Regions::new(),
    // SAFETY: this kernel has no threads; areas have their own indices, and before there is one the number is above the
    // heap's CPU count.
    Pinned(unsafe { NeverPreempts::new(source()) }),
);

const _: () = assert!(size_of::<Area<u16>>() == 0 && size_of::<FromOne<OnlyCpu>>() == 0, "a heap stays zeros");

kernel! {
    hooks = Hooks { early: Some(early), ..Hooks::none() };
    fn main(boot: &Boot) {
        give(boot.largest_region());
        smp::on_all(|index| {
            assert_eq!(numbers(), [Some(index); 4]);
            by_register(index);
            use_heap();
            test::did(1, "cpus");
        });
        assert_eq!(OnlyCpu.current_cpu(), Some(0));
        expect_left(0);
    }
}

fn use_heap() {
    let layout = Layout::new::<[u64; 8]>();
    // SAFETY: a Layout of 64 bytes.
    let start = unsafe { heap().alloc(layout) };
    assert!(!start.is_null(), "no memory");
    // SAFETY: allocated above, with this Layout.
    unsafe { heap().dealloc(start, layout) };
}

/// Before CPU 0 has an area of its own.
fn early(_: &Boot) {
    set_chosen(&HEAP);
    let unknown = [usize::from(u16::MAX), u32::MAX as usize, NO_INDEX, NO_INDEX];
    assert_eq!(numbers(), unknown.map(Some));
    const { assert!(u16::MAX as usize >= CPUS) };
}

/// What the area has, by width.
fn numbers() -> [Option<usize>; 4] {
    [
        source::<u16>().current_cpu(),
        source::<u32>().current_cpu(),
        source::<u64>().current_cpu(),
        source::<usize>().current_cpu(),
    ]
}

/// QEMU numbers APICs as its CPUs, and this kernel starts them in that order. (It emulates no `rdpid`.)
#[cfg(target_arch = "x86_64")]
fn by_register(index: usize) {
    use smp_heap::cpu::x86_64::InitialApicId;

    assert_eq!(InitialApicId::new().current_cpu(), Some(index));
}

/// The board's CPUs are at the lowest level, 8 in a cluster.
#[cfg(target_arch = "aarch64")]
fn by_register(index: usize) {
    use smp_heap::cpu::aarch64::{Mpidr, TpidrEl1Number};

    assert_eq!(Mpidr::<8, 1>.current_cpu(), Some(index));
    let area = TpidrEl1Number.current_cpu();
    assert_eq!(FromOne(TpidrEl1Number).current_cpu(), area.map(|area| area - 1));
}

/// `tp` holds the area's address, whatever that is.
#[cfg(target_arch = "riscv64")]
fn by_register(_: usize) {
    use smp_heap::cpu::riscv64::TpNumber;

    let area = TpNumber.current_cpu();
    assert!(area.is_some_and(|area| area % 64 == 0 && area != 0));
    assert_eq!(FromOne(TpNumber).current_cpu(), area.map(|area| area - 1));
}

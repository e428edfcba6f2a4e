//! A kernel that QEMU's `-kernel` starts on aarch64, without firmware, on every CPU, with the heap as global allocator.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use core::arch::global_asm;
use core::fmt::Write;
use core::ops::Range;
use core::panic::PanicInfo;
use core::ptr::{NonNull, with_exposed_provenance};
use core::sync::atomic::{AtomicUsize, Ordering};

use aarch64_cpu::registers::{MAIR_EL1, SCTLR_EL1, TCR_EL1};
use arm_pl011_uart::{PL011Registers, Uart, UniqueMmioPointer};
use fdt::Fdt;
use qemu_exit::{AArch64, QEMUExit};
use smccc::{Hvc, psci};
use smp_heap::cpu::aarch64::{InterruptsMasked, TpidrEl1Number};
use smp_heap::{Heap, Pinned, RegionProvider};
use smp_heap_maps::fdt::Map;
use smp_heap_maps::{Free, MemoryMap};
use spin::Mutex;

/// CPUs that have a stack and a cache.
const CPUS: usize = 8;
/// Where QEMU puts the device tree.
const TREE: usize = 0x4000_0000;

/// Memory by attribute 0, devices by attribute 1, in entries of the page table that stand for 1 GiB each.
const MEMORY: u64 = 1 | 3 << 8 | 1 << 10;
const DEVICE: u64 = 1 | 1 << 2 | 1 << 10 | 3 << 53;
/// Addresses of 39 bits in the lower half alone, so that one table is enough; it is read through the caches.
const TRANSLATION: u64 = TCR_EL1::T0SZ.val(25).value
    | TCR_EL1::IRGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable.value
    | TCR_EL1::ORGN0::WriteBack_ReadAlloc_WriteAlloc_Cacheable.value
    | TCR_EL1::SH0::Inner.value
    | TCR_EL1::EPD1::DisableTTBR1Walks.value
    | TCR_EL1::IPS::Bits_40.value;

global_asm!(
    include_str!("boot.s"),
    attributes = const MAIR_EL1::Attr0_Normal_Outer::WriteBack_NonTransient_ReadWriteAlloc.value
        | MAIR_EL1::Attr0_Normal_Inner::WriteBack_NonTransient_ReadWriteAlloc.value
        | MAIR_EL1::Attr1_Device::nonGathering_nonReordering_EarlyWriteAck.value,
    translation = const TRANSLATION,
    caches_and_mmu = const SCTLR_EL1::M::Enable.value | SCTLR_EL1::C::Cacheable.value | SCTLR_EL1::I::Cacheable.value,
    device = const DEVICE,
    memory = const MEMORY,
    cpus = const CPUS,
);

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
    fn start_other();
}

/// Up to 8 ranges of memory. `TPIDR_EL1` has the CPU's number: `boot.s` writes it before a CPU comes here.
#[global_allocator]
static HEAP: Heap<RegionProvider<8>, Pinned<InterruptsMasked<TpidrEl1Number>>, CPUS> = Heap::new(
    RegionProvider::new(),
    // SAFETY: this kernel switches no tasks and opens no interrupts, and each CPU has a number of its own.
    Pinned(unsafe { InterruptsMasked::new(TpidrEl1Number) }),
);

/// CPUs that are done.
static DONE: AtomicUsize = AtomicUsize::new(0);
/// What one CPU leaves for the next to free.
static LEFT: Mutex<BTreeMap<usize, String>> = Mutex::new(BTreeMap::new());
static SERIAL: Mutex<()> = Mutex::new(());

macro_rules! say {
    ($($arg:tt)*) => {{
        let _one_at_a_time = SERIAL.lock();
        let registers = NonNull::with_exposed_provenance(const { core::num::NonZero::new(0x900_0000).unwrap() });
        // SAFETY: the serial port of QEMU's board is there, and this kernel uses it here alone, one CPU at a time.
        let mut serial = Uart::new(unsafe { UniqueMmioPointer::<PL011Registers>::new(registers) });
        let _ = writeln!(serial, $($arg)*);
    }};
}

#[unsafe(no_mangle)]
extern "C" fn main(number: usize) {
    if number == 0 { first() } else { work(number) }
}

fn first() -> ! {
    // SAFETY: the loader put a device tree there, which the page table maps where it is.
    let tree = unsafe { Fdt::from_ptr(with_exposed_provenance(TREE)) }.expect("a device tree");
    say!("device tree at {TREE:#x}, {} bytes", tree.total_size());
    let map = Map::new(&tree, TREE as u64, image()).expect("a memory map");
    map.entries().for_each(|entry| say!("map {entry:x?}"));
    // SAFETY: what the map calls free, the loader and this kernel do not use, and it is mapped where it is.
    let added = unsafe { Free::new(map).add_to(HEAP.provider(), 0) };
    say!("heap: {} MiB in {} regions, {} bytes left out", added.bytes >> 20, added.regions, added.left);

    let cpus = tree.cpus().count();
    assert!(cpus <= CPUS, "{cpus} CPUs, and stacks for {CPUS}");
    // The hardware's own numbers may have gaps, those of the kernel have none.
    for (number, cpu) in tree.cpus().enumerate().skip(1) {
        let entry = start_other as unsafe extern "C" fn() as *const ();
        psci::cpu_on::<Hvc>(cpu.ids().first() as u64, entry.addr() as u64, number as u64).expect("a CPU that starts");
    }
    work(0);
    while DONE.load(Ordering::Acquire) < cpus {
        core::hint::spin_loop();
    }
    LEFT.lock().clear();
    // SAFETY: the other CPUs are done.
    unsafe { HEAP.verify_at_rest() }.expect("a whole heap");
    say!("PASS virt_aarch64, {cpus} CPUs, {} bytes live", HEAP.stats().live_len());
    AArch64::new().exit_success()
}

/// What every CPU does: half of what it makes, another one frees.
fn work(cpu: usize) {
    for round in 0..200 {
        let word = |key: usize| format!("CPU {cpu}, round {round}, word {key}");
        let words: BTreeMap<usize, String> = (0..50).map(|key| (key, word(key))).collect();
        assert!(words.iter().all(|(key, text)| *text == word(*key)));
        let others = core::mem::replace(&mut *LEFT.lock(), words);
        drop(others);
    }
    DONE.fetch_add(1, Ordering::Release);
}

/// The kernel itself.
fn image() -> Range<u64> {
    (&raw const image_start).addr() as u64..(&raw const image_end).addr() as u64
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("FAIL {info}");
    AArch64::new().exit_failure()
}

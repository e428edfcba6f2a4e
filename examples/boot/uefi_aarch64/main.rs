//! A kernel that is a UEFI application on aarch64, with the heap as global allocator: on the first CPU while the
//! firmware's boot services are there, and with all memory on every CPU after it has left them.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::{format, vec};
use core::arch::{asm, global_asm};
use core::fmt::Write;
use core::panic::PanicInfo;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

use aarch64_cpu::registers::{MAIR_EL1, Readable, SCTLR_EL1, TCR_EL1, TPIDR_EL1, TTBR0_EL1, Writeable};
use arm_pl011_uart::{PL011Registers, Uart, UniqueMmioPointer};
use qemu_exit::{AArch64, QEMUExit};
use smccc::Hvc;
use smccc::psci::{LowestAffinityLevel, affinity_info, cpu_on};
use smp_heap::cpu::aarch64::TpidrEl1Number;
use smp_heap::{Heap, Hint, RegionProvider};
use smp_heap_maps::Free;
use smp_heap_maps::uefi::Map;
use spin::Mutex;
use uefi::boot::{self, AllocateType, MemoryType};
use uefi::mem::memory_map::MemoryMap;
use uefi::{Status, entry};

global_asm!(include_str!("boot.s"));

unsafe extern "C" {
    fn start_other();
}

/// Up to 16 ranges of memory, 4 CPUs with caches of their own; `TPIDR_EL1` has the CPU's number.
#[global_allocator]
static HEAP: Heap<RegionProvider<16>, Hint<TpidrEl1Number>, 4> = Heap::new(RegionProvider::new(), Hint(TpidrEl1Number));

/// CPUs that are done.
static DONE: AtomicUsize = AtomicUsize::new(0);
/// What one CPU leaves for the next to free.
static LEFT: Mutex<BTreeMap<usize, String>> = Mutex::new(BTreeMap::new());

macro_rules! say {
    ($($arg:tt)*) => {{
        let registers = NonNull::with_exposed_provenance(const { core::num::NonZero::new(0x900_0000).unwrap() });
        // SAFETY: the serial port of QEMU's board is there, and one CPU at a time uses it.
        let mut serial = Uart::new(unsafe { UniqueMmioPointer::<PL011Registers>::new(registers) });
        let _ = writeln!(serial, $($arg)*);
    }};
}

#[entry]
fn main() -> Status {
    const PAGES: usize = 1024;
    let pages = boot::allocate_pages(AllocateType::AnyPages, MemoryType::LOADER_DATA, PAGES).expect("4 MiB");
    // SAFETY: the pages are ours, and stay so when the firmware leaves, as they are the loader's data.
    unsafe { HEAP.provider().add_region(pages.as_ptr(), PAGES << 12) }.expect("a region");
    TPIDR_EL1.set(0);
    work(0);
    say!("before: {} bytes live", HEAP.stats().live_len());

    // SAFETY: nothing of this kernel uses the boot services from here on.
    let map = unsafe { boot::exit_boot_services(None) };
    for range in map.entries() {
        say!("map {:#x} {:#x} {}", range.phys_start, range.page_count << 12, range.ty.0);
    }
    // SAFETY: what the map calls free nobody uses, and the firmware's page tables, which stay in use, map all of it.
    // They and this stack are in the boot services' memory, which is not counted as free.
    let added = unsafe { Free::new(Map::new(map.entries())).add_to(HEAP.provider(), 0) };
    say!("heap: {} MiB in {} regions, {} bytes left out", added.bytes >> 20, added.regions, added.left);
    // What was allocated before is still there, and is freed by others.
    assert!(!LEFT.lock().is_empty());
    let is_there = |number: &u64| affinity_info::<Hvc>(*number, LowestAffinityLevel::All).is_ok();
    let cpus = (0..).take_while(is_there).inspect(|number| start(*number)).count();
    work(0);
    while DONE.load(Ordering::Acquire) < cpus + 1 {
        core::hint::spin_loop();
    }
    LEFT.lock().clear();
    assert!(HEAP.verify().expect("a whole heap").is_nothing());
    say!("PASS uefi_aarch64, {cpus} CPUs, {} bytes live", HEAP.stats().live_len());
    AArch64::new().exit_success()
}

/// What `start_other` reads, with its caches off.
#[repr(C, align(64))]
struct Start {
    ttbr0: u64,
    tcr: u64,
    mair: u64,
    sctlr: u64,
    stack_end: *mut u128,
    number: u64,
}

/// Starts a CPU, unless it is this one.
fn start(number: u64) {
    if number == TPIDR_EL1.get() {
        return;
    }
    let (ttbr0, tcr, mair, sctlr) = (TTBR0_EL1.get(), TCR_EL1.get(), MAIR_EL1.get(), SCTLR_EL1.get());
    let stack_end = vec![0_u128; 8192].leak().as_mut_ptr_range().end;
    let start = Box::leak(Box::new(Start { ttbr0, tcr, mair, sctlr, stack_end, number }));
    // SAFETY: writes one line of the cache to memory, which is where the other CPU reads it.
    unsafe { asm!("dc cvac, {}", "dsb sy", in(reg) &raw const *start) };
    let entry = start_other as unsafe extern "C" fn() as *const ();
    cpu_on::<Hvc>(number, entry.addr() as u64, (&raw const *start).addr() as u64).expect("a CPU that starts");
}

#[unsafe(no_mangle)]
extern "C" fn other_main(number: usize) {
    TPIDR_EL1.set(number as u64);
    work(number);
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

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("FAIL {info}");
    AArch64::new().exit_failure()
}

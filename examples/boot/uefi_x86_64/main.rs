//! A kernel that is a UEFI application, with the heap as global allocator: on every CPU while the firmware's boot
//! services are there, and on the first one, with all memory, after it has left them.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use core::ffi::c_void;
use core::fmt::Write;
use core::panic::PanicInfo;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicUsize, Ordering};

use qemu_exit::{QEMUExit, X86};
use smp_heap::cpu::x86_64::InitialApicId;
use smp_heap::{Heap, Hint, RegionProvider};
use smp_heap_maps::Free;
use smp_heap_maps::uefi::Map;
use spin::Mutex;
use uart_16550::{Config, Uart16550Tty, backend::PioBackend};
use uefi::boot::{self, AllocateType, MemoryType};
use uefi::mem::memory_map::MemoryMap;
use uefi::proto::pi::mp::MpServices;
use uefi::{Status, entry};

/// Up to 16 ranges of memory, 4 CPUs with caches of their own; a CPU is known by its APIC's number.
#[global_allocator]
static HEAP: Heap<RegionProvider<16>, Hint<InitialApicId>, 4> =
    Heap::new(RegionProvider::new(), Hint(InitialApicId::new()));

/// CPUs that came to work.
static CPUS: AtomicUsize = AtomicUsize::new(0);
/// What one CPU leaves for the next to free.
static LEFT: Mutex<BTreeMap<usize, String>> = Mutex::new(BTreeMap::new());
static SERIAL: Mutex<Option<Uart16550Tty<PioBackend>>> = Mutex::new(None);

macro_rules! say {
    ($($arg:tt)*) => {{
        let mut serial = SERIAL.lock();
        // SAFETY: the first serial port of a PC is there. The firmware writes to it too, but not at the same time.
        let open = || unsafe { Uart16550Tty::new_port(0x3f8, Config::default()) }.expect("a serial port");
        let _ = writeln!(serial.get_or_insert_with(open), $($arg)*);
    }};
}

#[entry]
fn main() -> Status {
    with_boot_services();
    say!("before: {} CPUs, {} bytes live", CPUS.load(Ordering::Acquire), HEAP.stats().live_len());

    // SAFETY: nothing of this kernel uses the boot services from here on.
    let map = unsafe { boot::exit_boot_services(None) };
    for range in map.entries() {
        say!("map {:#x} {:#x} {}", range.phys_start, range.page_count << 12, range.ty.0);
    }
    // SAFETY: what the map calls free nobody uses, and the firmware's page tables, which stay in use, map all of it.
    // They and this stack are in the boot services' memory, which is not counted as free.
    let added = unsafe { Free::new(Map::new(map.entries())).add_to(HEAP.provider(), 0) };
    say!("heap: {} MiB in {} regions, {} bytes left out", added.bytes >> 20, added.regions, added.left);
    // What was allocated before is still there, and is freed now.
    assert!(!LEFT.lock().is_empty());
    work(0);
    LEFT.lock().clear();
    assert!(HEAP.verify().expect("a whole heap").is_nothing());
    say!("PASS uefi_x86_64, {} CPUs, {} bytes live", CPUS.load(Ordering::Acquire), HEAP.stats().live_len());
    exit().exit_success()
}

/// Memory of the firmware's for the time being, and all CPUs at work on it.
fn with_boot_services() {
    const PAGES: usize = 1024;
    let pages = boot::allocate_pages(AllocateType::AnyPages, MemoryType::LOADER_DATA, PAGES).expect("4 MiB");
    // SAFETY: the pages are ours, and stay so when the firmware leaves, as they are the loader's data.
    unsafe { HEAP.provider().add_region(pages.as_ptr(), PAGES << 12) }.expect("a region");

    CPUS.store(1, Ordering::Release);
    let handle = boot::get_handle_for_protocol::<MpServices>().expect("multi-processor services");
    let services = boot::open_protocol_exclusive::<MpServices>(handle).expect("multi-processor services");
    if services.get_number_of_processors().expect("a number").enabled > 1 {
        // Comes back when all of them have.
        services.startup_all_aps(false, other_main, null_mut(), None, None).expect("other CPUs that work");
    }
    work(0);
}

extern "efiapi" fn other_main(_: *mut c_void) {
    work(CPUS.fetch_add(1, Ordering::AcqRel));
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
}

fn exit() -> X86 {
    // SAFETY: QEMU's exit device is at this port.
    unsafe { X86::new(0xf4, 33) }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("FAIL {info}");
    exit().exit_failure()
}

//! A kernel that QEMU's `-kernel` starts by its PVH entry, on every CPU, with the heap as global allocator.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use core::arch::global_asm;
use core::fmt::Write;
use core::ops::Range;
use core::panic::PanicInfo;
use core::ptr::{copy_nonoverlapping, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicUsize, Ordering};

use pvh::start_info::reader::StartInfoReader;
use qemu_exit::QEMUExit;
use smp_heap::cpu::{NeverPreempts, x86_64::GsBase};
use smp_heap::{Heap, Pinned, RegionProvider};
use smp_heap_maps::Free;
use smp_heap_maps::pvh::Map;
use spin::Mutex;
use uart_16550::{Config, Uart16550Tty, backend::PioBackend};
use x86_64::registers::model_specific::GsBase as GsRegister;
use x86_64::{VirtAddr, instructions::port::Port};

global_asm!(include_str!("../x86_64.s"), options(att_syntax));
pvh::xen_elfnote_phys32_entry!(start32);

unsafe extern "C" {
    fn start32() -> !;
    static image_start: u8;
    static image_end: u8;
    static ap_start: u8;
    static ap_end: u8;
}

/// A CPU's own area, to which its GS base points: here no more than its number.
type Area = u32;
/// What the GS base of a CPU points to until it has an area: a number that is no CPU's.
static STARTING: Area = Area::MAX;
// SAFETY: each CPU points its GS base to an `Area` before it uses the heap.
const THIS_CPU: GsBase<0, u32> = unsafe { GsBase::new() };

/// Up to 8 ranges of memory, 4 CPUs with caches of their own, which no locked instruction takes.
#[global_allocator]
static HEAP: Heap<RegionProvider<8>, Pinned<NeverPreempts<GsBase<0, u32>>>, 4> = Heap::new(
    RegionProvider::new(),
    // SAFETY: each CPU has one task, and in its area a number of its own or, while it starts, none.
    Pinned(unsafe { NeverPreempts::new(THIS_CPU) }),
);

/// CPUs that are done.
static DONE: AtomicUsize = AtomicUsize::new(0);
/// What one CPU leaves for the next to free.
static LEFT: Mutex<BTreeMap<usize, String>> = Mutex::new(BTreeMap::new());
static SERIAL: Mutex<Option<Uart16550Tty<PioBackend>>> = Mutex::new(None);

macro_rules! say {
    ($($arg:tt)*) => {{
        let mut serial = SERIAL.lock();
        // SAFETY: the first serial port of a PC is there, and this kernel uses it here alone.
        let open = || unsafe { Uart16550Tty::new_port(0x3f8, Config::default()) }.expect("a serial port");
        let _ = writeln!(serial.get_or_insert_with(open), $($arg)*);
    }};
}

#[unsafe(no_mangle)]
extern "C" fn main(start_info: u32) -> ! {
    GsRegister::write(VirtAddr::from_ptr(&STARTING));
    // SAFETY: the loader put a start info there, and the lowest 4 GiB are mapped where they are.
    let info = unsafe { StartInfoReader::from_paddr_identity(start_info) }.expect("not started by a PVH loader");
    for entry in info.memmap() {
        say!("map {:#x} {:#x} {}", entry.addr, entry.size, entry.ty);
    }
    let map = Map::new(&info, start_info.into(), image()).expect("a memory map");
    // SAFETY: what the map calls free, the loader and this kernel do not use, and it is mapped as far as 4 GiB.
    let added = unsafe { Free::new(map).below(4 << 30).add_to(HEAP.provider(), 0) };
    say!("heap: {} MiB in {} regions, {} bytes left out", added.bytes >> 20, added.regions, added.left);

    let line = info.cmdline().and_then(|line| line.to_str().ok()).unwrap_or("");
    let cpus = line.split_once("cpus=").and_then(|(_, count)| count.trim().parse().ok()).unwrap_or(1);
    GsRegister::write(VirtAddr::from_ptr(Box::leak(Box::<Area>::new(0))));
    start_others();
    work(0);
    while DONE.load(Ordering::Acquire) < cpus {
        core::hint::spin_loop();
    }
    LEFT.lock().clear();
    // SAFETY: the other CPUs are done.
    unsafe { HEAP.verify_at_rest() }.expect("a whole heap");
    say!("PASS pvh_x86_64, {cpus} CPUs, {} bytes live", HEAP.stats().live_len());
    exit(0x10)
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

#[unsafe(no_mangle)]
extern "C" fn ap_main(number: u32) {
    GsRegister::write(VirtAddr::from_ptr(&STARTING));
    // The heap serves this CPU before it knows its number.
    GsRegister::write(VirtAddr::from_ptr(Box::leak(Box::<Area>::new(number))));
    work(number as usize);
}

/// INIT and start-up interrupts to all CPUs but this one.
fn start_others() {
    const PAGE: usize = 0x8000;
    let code = &raw const ap_start;
    // SAFETY: the page is RAM below 1 MiB, which neither the heap nor the loader uses.
    unsafe { copy_nonoverlapping(code, with_exposed_provenance_mut(PAGE), (&raw const ap_end).addr() - code.addr()) };
    let interrupt_command = with_exposed_provenance_mut::<u32>(0xfee0_0300);
    for (command, microseconds) in [(0xc4500, 10_000), (0xc4600 | PAGE as u32 >> 12, 200)] {
        // SAFETY: the local APIC's register is mapped there; what is sent makes the other CPUs start at the page.
        unsafe { interrupt_command.write_volatile(command) };
        for _ in 0..microseconds {
            // SAFETY: nothing listens at this port; a write takes about a microsecond.
            unsafe { Port::new(0x80).write(0_u8) };
        }
    }
}

/// The kernel itself.
fn image() -> Range<u64> {
    (&raw const image_start).addr() as u64..(&raw const image_end).addr() as u64
}

fn exit(code: u32) -> ! {
    // SAFETY: QEMU's exit device is at this port.
    unsafe { qemu_exit::X86::new(0xf4, 33) }.exit(code)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("FAIL {info}");
    exit(0x11)
}

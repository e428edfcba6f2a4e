//! A kernel that GRUB starts by Multiboot2, on every CPU, with the heap as global allocator.

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
use core::ptr::{copy_nonoverlapping, with_exposed_provenance, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicUsize, Ordering};

use multiboot2::{BootInformation, BootInformationHeader};
use qemu_exit::QEMUExit;
use smp_heap::cpu::x86_64::InitialApicId;
use smp_heap::{Heap, Hint, RegionProvider};
use smp_heap_maps::Free;
use smp_heap_maps::multiboot2::Map;
use spin::Mutex;
use uart_16550::{Config, Uart16550Tty, backend::PioBackend};
use x86_64::instructions::port::Port;

global_asm!(include_str!("../x86_64.s"), options(att_syntax));

/// What GRUB looks for: magic number, architecture (x86 in 32-bit mode), length, a sum that makes 0, and the end tag.
#[used]
#[unsafe(link_section = ".multiboot2")]
static HEADER: [u32; 6] = [MAGIC, 0, 24, 0_u32.wrapping_sub(MAGIC + 24), 0, 8];
const MAGIC: u32 = 0xe852_50d6;

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
    static ap_start: u8;
    static ap_end: u8;
}

/// Up to 8 ranges of memory, 4 CPUs with caches of their own; a CPU is known by its APIC's number.
#[global_allocator]
static HEAP: Heap<RegionProvider<8>, Hint<InitialApicId>, 4> =
    Heap::new(RegionProvider::new(), Hint(InitialApicId::new()));

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
extern "C" fn main(information: u32) -> ! {
    let start = with_exposed_provenance::<BootInformationHeader>(information as usize);
    // SAFETY: the loader put a boot information there, and the lowest 4 GiB are mapped where they are.
    let info = unsafe { BootInformation::load(start) }.expect("not started by a Multiboot2 loader");
    let map = Map::new(&info, information.into(), image()).expect("a memory map");
    for area in info.memory_map_tag().into_iter().flat_map(|tag| tag.memory_areas()) {
        say!("map {:#x} {:#x} {}", area.start_address(), area.size(), area.typ().val());
    }
    // SAFETY: what the map calls free, the loader and this kernel do not use, and it is mapped as far as 4 GiB.
    let added = unsafe { Free::new(map).below(4 << 30).add_to(HEAP.provider(), 0) };
    say!("heap: {} MiB in {} regions, {} bytes left out", added.bytes >> 20, added.regions, added.left);

    let line = info.command_line_tag().and_then(|tag| tag.cmdline().ok()).unwrap_or("");
    let cpus = line.split_once("cpus=").and_then(|(_, count)| count.trim().parse().ok()).unwrap_or(1);
    start_others();
    work(0);
    while DONE.load(Ordering::Acquire) < cpus {
        core::hint::spin_loop();
    }
    LEFT.lock().clear();
    assert!(HEAP.verify().expect("a whole heap").is_nothing());
    say!("PASS multiboot2_x86_64, {cpus} CPUs, {} bytes live", HEAP.stats().live_len());
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

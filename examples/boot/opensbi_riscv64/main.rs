//! A kernel that OpenSBI starts (or U-Boot), on every hart, with the heap as global allocator.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use core::arch::global_asm;
use core::fmt::Write;
use core::num::NonZero;
use core::ops::Range;
use core::panic::PanicInfo;
use core::ptr::{NonNull, null_mut, with_exposed_provenance};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use fdt::Fdt;
use qemu_exit::{QEMUExit, RISCV64};
use smp_heap::cpu::riscv64::{InterruptsMasked, TpNumber};
use smp_heap::{Heap, Pinned, RegionProvider};
use smp_heap_maps::fdt::Map;
use smp_heap_maps::{Free, MemoryMap};
use spin::Mutex;
use uart_16550::{Config, Uart16550Tty, backend::MmioBackend};

global_asm!(include_str!("boot.s"));

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
    fn start();
}

/// Up to 8 ranges of memory, 4 harts with caches of their own; `tp` has the hart's number: `boot.s` writes it before a
/// hart comes here.
#[global_allocator]
static HEAP: Heap<RegionProvider<8>, Pinned<InterruptsMasked<TpNumber>>, 4> = Heap::new(
    RegionProvider::new(),
    // SAFETY: this kernel runs in S-mode, switches no tasks and opens no interrupts; each hart has a number of its own.
    Pinned(unsafe { InterruptsMasked::new(TpNumber) }),
);

/// The ends of the other harts' stacks, by the harts' numbers.
#[unsafe(no_mangle)]
static STACKS: [AtomicPtr<u128>; 8] = [const { AtomicPtr::new(null_mut()) }; 8];
/// Harts that are done.
static DONE: AtomicUsize = AtomicUsize::new(0);
/// What one hart leaves for the next to free.
static LEFT: Mutex<BTreeMap<usize, String>> = Mutex::new(BTreeMap::new());
static SERIAL: Mutex<Option<Uart16550Tty<MmioBackend>>> = Mutex::new(None);

macro_rules! say {
    ($($arg:tt)*) => {{
        let mut serial = SERIAL.lock();
        let registers = NonNull::with_exposed_provenance(const { NonZero::new(0x1000_0000).unwrap() });
        // SAFETY: the serial port of QEMU's board is there, and this kernel uses it here alone.
        let open = || unsafe { Uart16550Tty::new_mmio(registers, 1, Config::default()) }.expect("a serial port");
        let _ = writeln!(serial.get_or_insert_with(open), $($arg)*);
    }};
}

#[unsafe(no_mangle)]
extern "C" fn main(hart: usize, tree_at: usize) -> ! {
    // SAFETY: the loader put a device tree there; without paging it lies where it lies.
    let tree = unsafe { Fdt::from_ptr(with_exposed_provenance(tree_at)) }.expect("a device tree");
    say!("device tree at {tree_at:#x}, {} bytes", tree.total_size());
    let map = Map::new(&tree, tree_at as u64, image()).expect("a memory map");
    map.entries().for_each(|entry| say!("map {entry:x?}"));
    let cpus = tree.cpus().count();
    // SAFETY: what the map calls free, the loader and this kernel do not use; there is no paging.
    let added = unsafe { Free::new(map).add_to(HEAP.provider(), 0) };
    say!("heap: {} MiB in {} regions, {} bytes left out", added.bytes >> 20, added.regions, added.left);

    for other in (0..cpus).filter(|other| *other != hart) {
        let stack = vec![0_u128; 8192].leak().as_mut_ptr_range().end;
        STACKS[other].store(stack, Ordering::Release);
        let entry = start as unsafe extern "C" fn() as *const ();
        let started = sbi_rt::hart_start(other, entry.addr(), 0);
        assert!(started.is_ok(), "hart {other}: {started:?}");
    }
    work(hart);
    while DONE.load(Ordering::Acquire) < cpus {
        core::hint::spin_loop();
    }
    LEFT.lock().clear();
    // SAFETY: the other harts are done.
    unsafe { HEAP.verify_at_rest() }.expect("a whole heap");
    say!("PASS opensbi_riscv64, {cpus} CPUs, {} bytes live", HEAP.stats().live_len());
    exit().exit_success()
}

/// What every hart does: half of what it makes, another one frees.
fn work(hart: usize) {
    for round in 0..200 {
        let word = |key: usize| format!("hart {hart}, round {round}, word {key}");
        let words: BTreeMap<usize, String> = (0..50).map(|key| (key, word(key))).collect();
        assert!(words.iter().all(|(key, text)| *text == word(*key)));
        let others = core::mem::replace(&mut *LEFT.lock(), words);
        drop(others);
    }
    DONE.fetch_add(1, Ordering::Release);
}

#[unsafe(no_mangle)]
extern "C" fn other_main(hart: usize) {
    work(hart);
}

/// The kernel itself.
fn image() -> Range<u64> {
    (&raw const image_start).addr() as u64..(&raw const image_end).addr() as u64
}

fn exit() -> RISCV64 {
    // SAFETY: the test device of QEMU's board is there.
    unsafe { RISCV64::new(0x10_0000) }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("FAIL {info}");
    exit().exit_failure()
}

//! The battery on a 32-bit processor whose atomics have 32 bits, on every hart at once, without any firmware.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};
use core::num::NonZero;
use core::panic::PanicInfo;
use core::ptr::{NonNull, with_exposed_provenance, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicUsize, Ordering};

use fdt::Fdt;
use smp_heap::{CpuHint, Heap, Hint, RegionProvider, battery};
use spin::Mutex;
use uart_16550::{Config, Uart16550Tty, backend::MmioBackend};

global_asm!(include_str!("boot.s"));

unsafe extern "C" {
    static mut image_end: u8;
}

/// Of memory behind the kernel, the heap's.
const HEAP_LEN: usize = 64 << 20;

/// The harts' numbers.
struct Hart;

fn hart() -> usize {
    let hart;
    // SAFETY: reads a register of machine mode, in which this kernel runs.
    unsafe { asm!("csrr {}, mhartid", out(reg) hart, options(nomem, nostack, preserves_flags)) };
    hart
}

impl CpuHint for Hart {
    fn current_cpu(&self) -> Option<usize> {
        Some(hart())
    }
}

static HEAP: Heap<RegionProvider<1>, Hint<Hart>, 4> = Heap::new(RegionProvider::new(), Hint(Hart));

/// What every hart does next, how often there was something, and how many of the others are done with it.
static WORK: Mutex<Option<&'static (dyn Fn() + Sync)>> = Mutex::new(None);
static TURN: AtomicUsize = AtomicUsize::new(0);
static ENDED: AtomicUsize = AtomicUsize::new(0);
/// The others.
static OTHERS: AtomicUsize = AtomicUsize::new(0);

#[unsafe(no_mangle)]
extern "C" fn main(hart: usize, tree_at: usize) -> ! {
    if hart > 0 {
        follow();
    }
    // SAFETY: the board puts a device tree there, far behind the heap's memory.
    let tree = unsafe { Fdt::from_ptr(with_exposed_provenance(tree_at)) }.expect("a device tree");
    let harts = tree.cpus().count();
    assert!(harts <= 4, "there are stacks and caches for 4 harts");
    OTHERS.store(harts - 1, Ordering::Relaxed);
    let start = &raw mut image_end;
    // SAFETY: the board has 128 MiB of memory, and what lies behind the kernel is the heap's alone.
    unsafe { HEAP.provider().add_region(start, HEAP_LEN) }.expect("a region");
    let passed = battery::run(&HEAP, on_all, &mut Console);
    let verdict = if passed.is_ok() { "PASS" } else { "FAIL" };
    let _ = writeln!(Console, "{verdict} battery_riscv32, {harts} CPUs, {} bits", usize::BITS);
    exit(passed.is_ok())
}

/// Does `work` on each hart at once.
fn on_all(work: &(dyn Fn() + Sync)) {
    // SAFETY: nobody has it any more when this returns.
    let work = unsafe { core::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(work) };
    *WORK.lock() = Some(work);
    ENDED.store(0, Ordering::Relaxed);
    TURN.fetch_add(1, Ordering::Release);
    work();
    while ENDED.load(Ordering::Acquire) < OTHERS.load(Ordering::Relaxed) {
        core::hint::spin_loop();
    }
    *WORK.lock() = None;
}

/// What harts but the first do.
fn follow() -> ! {
    let mut turn = 0;
    loop {
        while TURN.load(Ordering::Acquire) == turn {
            core::hint::spin_loop();
        }
        turn += 1;
        let work = *WORK.lock();
        if let Some(work) = work {
            work();
        }
        ENDED.fetch_add(1, Ordering::Release);
    }
}

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        static SERIAL: Mutex<Option<Uart16550Tty<MmioBackend>>> = Mutex::new(None);
        let registers = NonNull::with_exposed_provenance(const { NonZero::new(0x1000_0000).unwrap() });
        // SAFETY: the serial port of QEMU's board is there, and this kernel uses it here alone.
        let open = || unsafe { Uart16550Tty::new_mmio(registers, 1, Config::default()) }.expect("a serial port");
        SERIAL.lock().get_or_insert_with(open).write_str(text)
    }
}

fn exit(passed: bool) -> ! {
    let device = with_exposed_provenance_mut::<u32>(0x10_0000);
    // SAFETY: the test device of QEMU's board, which ends the emulator.
    unsafe { device.write_volatile(if passed { 0x5555 } else { 0x1_3333 }) };
    loop {
        core::hint::spin_loop();
    }
}

#[unsafe(no_mangle)]
extern "C" fn trapped(cause: usize, address: usize) -> ! {
    panic!("trap {cause:#x} at {address:#x}, hart {}", hart())
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "FAIL {info}");
    exit(false)
}

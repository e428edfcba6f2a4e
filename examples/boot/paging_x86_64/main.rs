//! A kernel whose heap takes frames as it grows: a provider over the `x86_64` crate's page tables and a frame
//! allocator.
//!
//! One CPU, started by QEMU's `-kernel` as `pvh_x86_64` is.

#![no_std]
#![no_main]

extern crate alloc;

mod frames;

use alloc::vec::Vec;
use core::arch::global_asm;
use core::fmt::Write;
use core::panic::PanicInfo;
use core::ptr::with_exposed_provenance_mut;

use frames::Frames;
use pvh::start_info::reader::StartInfoReader;
use qemu_exit::QEMUExit;
use smp_heap::cpu::UnknownCpu;
use smp_heap::provider::{Paging, PagingProvider, Stale};
use smp_heap::{Heap, Hint};
use smp_heap_maps::Free;
use smp_heap_maps::pvh::Map;
use spin::Mutex;
use uart_16550::{Config, Uart16550Tty};
use x86_64::VirtAddr;
use x86_64::registers::control::{Cr3, Efer, EferFlags};
use x86_64::structures::paging::{FrameAllocator, OffsetPageTable, PageTable, PageTableFlags, PhysFrame};

global_asm!(include_str!("../x86_64.s"), options(att_syntax));
pvh::xen_elfnote_phys32_entry!(start32);

unsafe extern "C" {
    fn start32() -> !;
    static image_start: u8;
    static image_end: u8;
}

/// Physical memory is mapped where it is, this far; the window's level-4 entry is the first of the upper half.
const MAPPED: u64 = 4 << 30;
const WINDOW: u64 = 0xffff_8000_0000_0000;

#[global_allocator]
static HEAP: Heap<PagingProvider<&Kernel, 64>, Hint<UnknownCpu>, 1> =
    Heap::new(PagingProvider::new(&KERNEL), Hint(UnknownCpu));
static KERNEL: Kernel = Kernel(Mutex::new(None));

/// The page tables and the frames, for everybody who maps pages.
struct Kernel(Mutex<Option<(OffsetPageTable<'static>, Frames)>>);

// SAFETY: these are the tables that the one CPU uses; nothing else maps in the window; the frames are nobody else's.
unsafe impl Paging for &'static Kernel {
    type Mapper = OffsetPageTable<'static>;
    type Frames = Frames;
    const GUARDS: bool = true;

    fn with<R>(&self, work: impl FnOnce(&mut Self::Mapper, &mut Frames) -> R) -> R {
        let mut kernel = self.0.lock();
        let (mapper, frames) = kernel.as_mut().expect("the tables, which come first");
        work(mapper, frames)
    }

    fn shoot_down(&self, stale: Stale) {
        stale.flush_here();
    }
}

macro_rules! say {
    ($($arg:tt)*) => {{
        // SAFETY: the first serial port of a PC is there, and this kernel has one CPU, which uses it here alone.
        let mut serial = unsafe { Uart16550Tty::new_port(0x3f8, Config::default()) }.expect("a serial port");
        let _ = writeln!(serial, $($arg)*);
    }};
}

#[unsafe(no_mangle)]
extern "C" fn main(start_info: u32) -> ! {
    // SAFETY: the loader put a start info there, and the lowest 4 GiB are mapped where they are.
    let info = unsafe { StartInfoReader::from_paddr_identity(start_info) }.expect("not started by a PVH loader");
    let image = (&raw const image_start).addr() as u64..(&raw const image_end).addr() as u64;
    let free = Free::new(Map::new(&info, start_info.into(), image).expect("a memory map")).below(MAPPED);
    let mut frames = Frames::new(free.longest_first().next().expect("memory"));
    let total = frames.count();

    // SAFETY: this processor has the no-execute bit, which the provider sets.
    unsafe { Efer::update(|flags| flags.insert(EferFlags::NO_EXECUTE_ENABLE)) };
    let root: *mut PageTable = with_exposed_provenance_mut(Cr3::read().0.start_address().as_u64() as usize);
    // SAFETY: the tables that are in use lie there, for good, and only `KERNEL` has them from here on.
    let root = unsafe { &mut *root };
    let table: PhysFrame = frames.allocate_frame().expect("a frame");
    let address = table.start_address().as_u64() as usize;
    // SAFETY: the frame is ours and mapped where it is.
    unsafe { with_exposed_provenance_mut::<PageTable>(address).write(PageTable::new()) };
    root[256].set_frame(table, PageTableFlags::PRESENT | PageTableFlags::WRITABLE);
    // SAFETY: physical memory is mapped at offset 0, as far as there are frames.
    let mapper = unsafe { OffsetPageTable::new(root, VirtAddr::zero()) };
    *KERNEL.0.lock() = Some((mapper, frames));
    // SAFETY: nothing else is mapped behind that entry.
    unsafe { HEAP.provider().open(VirtAddr::new(WINDOW), 64 << 30) }.expect("a window");

    // Grows by new pages at its end, or by moving pages: nothing of it is copied.
    let mut numbers = Vec::new();
    numbers.extend(0..8_000_000_u64);
    say!("{:?} has {} MiB, {} MiB mapped", numbers.as_ptr(), numbers.len() >> 17, HEAP.provider().mapped_len() >> 20);
    assert!(numbers.iter().enumerate().all(|(at, number)| at as u64 == *number));
    drop(numbers);
    HEAP.drain_current();
    HEAP.trim(0);
    let count = KERNEL.0.lock().as_ref().map(|(_, frames)| frames.count());
    say!("{count:?} of {total} frames are free, {} bytes mapped", HEAP.provider().mapped_len());
    assert_eq!(count, Some(total - 3), "the window keeps three tables");
    assert_eq!(HEAP.provider().mapped_len(), 0);
    say!("PASS paging_x86_64, 1 CPUs, {} bytes live", HEAP.stats().live_len());
    exit(0x10)
}

/// The other CPUs are not started.
#[unsafe(no_mangle)]
extern "C" fn ap_main(_: u32) {}

fn exit(code: u32) -> ! {
    // SAFETY: QEMU's exit device is at this port.
    unsafe { qemu_exit::X86::new(0xf4, 33) }.exit(code)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("FAIL {info}");
    exit(0x11)
}

//! `cargo demo` with the heap that small kernels start from: `linked_list_allocator` behind one lock.
//!
//! Its `LockedHeap` alone would not survive the demonstration: a timer interrupt that allocates while the CPU it
//! interrupted holds the lock waits for ever. So interrupts are masked around every call, as kernels that use it do;
//! the price of that is part of what is measured.
#![no_std]
#![no_main]

#[path = "demo_common.rs"]
mod common;

use core::alloc::{GlobalAlloc, Layout};

use linked_list_allocator::LockedHeap;
use smp_heap_kernel::{Boot, Hooks, interrupts, kernel, println};

/// A locked heap that no interrupt comes into.
struct Masked(LockedHeap);

// SAFETY: every call is the inner heap's own, with the same arguments; masking interrupts changes no memory.
unsafe impl GlobalAlloc for Masked {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the same as the one asked for here.
        interrupts::without(|| unsafe { self.0.alloc(layout) })
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as above.
        interrupts::without(|| unsafe { self.0.dealloc(start, layout) });
    }
}

#[global_allocator]
static HEAP: Masked = Masked(LockedHeap::empty());

kernel! {
    hooks = Hooks { early: Some(give_memory), ..Hooks::none() };
    fn main(boot: &Boot) {
        println!("LockedHeap, interrupts masked around each call: without that, the first tick inside the heap hangs.");
        common::run(boot, &HEAP);
    }
}

impl common::Demonstrated for Masked {
    fn report(&self) {
        let (used, free) = interrupts::without(|| {
            let heap = self.0.lock();
            (heap.used(), heap.free())
        });
        println!("@stats LockedHeap: {} KiB used, {} KiB free", used / 1024, free / 1024);
    }
}

/// The largest region, as the other heap gets.
fn give_memory(boot: &Boot) {
    let region = boot.largest_region();
    // SAFETY: usable memory that nobody else uses, given once, before the first allocation.
    unsafe { HEAP.0.lock().init(region.as_ptr(), region.len) };
}

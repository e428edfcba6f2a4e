//! NMIs on every CPU but the first, 100 us after the last one came, whose handlers allocate and free.
//!
//! No pin and no masking keeps an NMI out of the heap. Would catch breaking: alloc and free never deadlock in any
//! context, and never wait for what they interrupted; nothing is handed out twice; everything freed comes back.
#![no_std]
#![no_main]

mod common;

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::heaps::{Regions, expect_left, give};
use common::modes::{Index, InterruptsMasked, heaps};
use smp_heap::cpu::NeverPreempts;
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::{Boot, kernel, nmi, smp, time};

heaps! {
    over Regions = Regions::new();
    Hint<Index>,
    Pinned<NeverPreempts<Index>>,
    Pinned<InterruptsMasked<Index>>,
}

/// NMIs that came.
static CAME: AtomicUsize = AtomicUsize::new(0);

kernel! {
    fn main(boot: &Boot) {
        assert!(boot.cpu_count() > 1, "the CPU that sends the NMIs gets none");
        choose(boot);
        give(boot.largest_region());
        let others = boot.cpu_count() - 1;
        // As many handlers altogether on many CPUs as on two.
        let count = boot.number("nmis", 60_usize.div_ceil(others));
        nmi::set_handler(|_| {
            common::storm::strike();
            CAME.fetch_add(1, Ordering::Relaxed);
        });
        for _ in 0..boot.rounds(3) {
            let done = AtomicBool::new(false);
            common::storm::begin();
            smp::on_all(|cpu| {
                if cpu > 0 {
                    while !done.load(Ordering::Relaxed) {
                        common::storm::work(100);
                    }
                } else {
                    for _ in 0..count {
                        let all = CAME.load(Ordering::Relaxed) + others;
                        nmi::broadcast();
                        time::wait_for("an NMI on each CPU", time::SOON, || CAME.load(Ordering::Relaxed) == all);
                        time::spin(100);
                    }
                    common::storm::end();
                    done.store(true, Ordering::Relaxed);
                }
                smp::barrier();
            });
            common::heaps::verify();
        }
        common::storm::judge(5, 5);
        expect_left(0);
    }
}

//! Timer interrupts every 100 us on every CPU, whose handlers allocate and free, nothing masked around the heap.
//!
//! Would catch breaking: alloc and free never deadlock, also in an interrupt that came inside them; nothing is handed
//! out twice (each block is filled, and checked when it is freed, by the task or by a handler, whoever gets to it); a
//! request that was not nested is never refused while there is memory, of handlers' at most five in a hundred;
//! everything freed comes back, also what handlers freed.
#![no_std]
#![no_main]

mod common;

use common::heaps::{Regions, expect_left, give};
use common::modes::{Index, InterruptsMasked, Mode, Pins, heaps};
use smp_heap::cpu::{NeverPreempts, OnlyCpu, PreemptionPin};
use smp_heap::{Hint, Pinned};
use smp_heap_kernel::{Boot, kernel, smp, timer};

/// On one CPU, which needs no number.
impl Mode for Pinned<NeverPreempts<OnlyCpu>> {
    const NAME: &'static str = "only";
    // SAFETY: this kernel has no threads, and is booted with one CPU in this mode.
    const NEW: Self = Pinned(unsafe { NeverPreempts::new(OnlyCpu) });
}

heaps! {
    over Regions = Regions::new();
    Hint<Index>,
    Pinned<NeverPreempts<Index>>,
    Pinned<NeverPreempts<OnlyCpu>>,
    Pinned<PreemptionPin<Pins, Index>>,
    Pinned<InterruptsMasked<Index>>,
}

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        assert!(boot.arg("mode") != Some("only") || boot.cpu_count() == 1, "one CPU was promised");
        give(boot.largest_region());
        // As much altogether on many CPUs as on two.
        let ticks = boot.number("ticks", (200 / boot.cpu_count()).min(100)) as u64;
        timer::set_handler(|_| common::storm::strike());
        for _ in 0..boot.rounds(3) {
            common::storm::begin();
            smp::on_all(|cpu| {
                let enough = timer::ticks(cpu) + ticks;
                timer::start(100);
                smp::barrier();
                while timer::ticks(cpu) < enough {
                    common::storm::work(100);
                }
                timer::stop();
                smp::barrier();
                common::storm::end();
            });
            common::heaps::verify();
        }
        common::storm::judge(5, 5);
        expect_left(0);
    }
}

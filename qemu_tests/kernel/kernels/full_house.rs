//! No memory is left. A task asks for a block, and a handler comes at every so many instructions of the search, and
//! asks and frees too.
//!
//! Would catch: a handler that waits for the search that it interrupted, which cannot go on before it returns (its id
//! says that it may not wait; with a pin it knows that it is nested, with a hint it searches everything by itself); a
//! search that never ends because handlers come. Instructions are counted by single steps, so exactly.
#![no_std]
#![no_main]

mod common;

use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::block::Block;
use common::heaps::{Regions, expect_left, give, heap};
use common::modes::{Mode, heaps};
use common::slots::Slots;
use smp_heap::cpu::NeverPreempts;
use smp_heap::{CpuHint, Hint, Pinned};
use smp_heap_kernel::step::{self, Next};
use smp_heap_kernel::{Boot, Region, cpu, kernel, println, smp, test};

/// The most instructions of a handler's call that interrupted a search.
const BUDGET: usize = 20_000;
/// And of one that came just before the search began, or after it ended: the handler itself then searches everything.
const SEARCH_BUDGET: usize = 110_000;
/// A call of more instructions than this is a search of everything.
const LONG: usize = 10_000;
/// One of so many handlers may come when its task does not search yet, or no more.
const OUTSIDE: usize = 50;

const LEN: usize = 4 << 20;
const SIZE: usize = 24;

/// The CPU's number, of a kernel whose handlers have interrupts masked and do not wait.
#[derive(Clone, Copy, Debug)]
struct Number;

impl CpuHint for Number {
    fn current_cpu(&self) -> Option<usize> {
        Some(cpu::index())
    }
}

impl Mode for Hint<Number> {
    const NAME: &'static str = "hint";
    const NEW: Self = Hint(Number);
}

impl Mode for Pinned<NeverPreempts<Number>> {
    const NAME: &'static str = "pinned";
    // SAFETY: this kernel has no threads; areas have their own indices.
    const NEW: Self = Pinned(unsafe { NeverPreempts::new(Number) });
}

heaps! {
    over Regions = Regions::new();
    Hint<Number>,
    Pinned<NeverPreempts<Number>>,
}

/// As many as the region can have, and the handler's.
static BLOCKS: Slots<{ LEN / SIZE }> = Slots::new();
static HANDLERS: Slots<1> = Slots::new();

kernel! {
    fn main(boot: &Boot) {
        choose(boot);
        give(Region { len: LEN, ..boot.largest_region() });
        let taken = AtomicUsize::new(0);
        let take_all = || {
            while let Some(block) = Block::new(heap(), SIZE, 8, 1) {
                BLOCKS.swap(taken.fetch_add(1, Relaxed), Some(block));
            }
        };
        smp::on_all(|_| take_all());
        take_all();
        let stride = boot.number("stride", 197);
        let (mut longest, mut calls, mut steps) = (0, 0, 0);
        for round in 0..boot.rounds(2) {
            // In the second round there is one block, which handlers free and take in turns.
            if round > 0 {
                BLOCKS.swap(0, HANDLERS.swap(0, BLOCKS.swap(0, None)));
            }
            let (mut got, first, before, mut long) = (None, steps, calls, 0);
            step::through(
                || got = Block::new(heap(), SIZE, 8, 2),
                |_, _| {
                    steps += 1;
                    if steps % stride == 0 {
                        let count = handle();
                        longest = longest.max(count);
                        calls += 1;
                        long += usize::from(count > BUDGET);
                    }
                    Next::Step
                },
            );
            let (len, calls) = (steps - first, calls - before);
            println!("a call of {len} instructions, {calls} handlers, {long} of more than {BUDGET} instructions");
            let knows = boot.arg("mode") == Some("pinned");
            assert!(!knows || len < LONG || long * OUTSIDE <= calls, "handlers searched everything inside a search");
            assert!(round > 0 || len > LONG, "there was memory");
            if let Some(block) = got {
                block.free(heap());
            }
        }
        println!("{calls} handlers, the longest of {longest} instructions");
        test::did(calls, "handlers");
        assert!(longest <= SEARCH_BUDGET, "a handler took {longest} instructions");
        HANDLERS.free_part(heap(), 0, 1);
        BLOCKS.free_part(heap(), 0, 1);
        common::heaps::verify();
        expect_left(0);
    }
}

/// What a handler does: frees its block if it has one, else asks for one. Gives the number of instructions.
fn handle() -> usize {
    let mut count = 0;
    let held = HANDLERS.swap(0, None);
    let mut got = None;
    step::through(
        || match held {
            Some(block) => block.free(heap()),
            None => got = Block::new(heap(), SIZE, 8, 3),
        },
        |_, _| {
            count += 1;
            Next::Step
        },
    );
    HANDLERS.swap(0, got);
    count
}

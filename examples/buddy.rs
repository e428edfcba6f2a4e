//! A page provider over a buddy frame allocator in a linear map.
//!
//! `cargo run --example buddy` does with some memory of this program what a kernel does with physical memory: a frame
//! allocator that keeps its free lists in the free frames, all of it mapped at one offset, and a heap on top.

#![expect(clippy::indexing_slicing, reason = "orders are checked where they come from: `order` and `map`")]

use core::alloc::Layout;
use core::error::Error;
use core::ptr::{NonNull, with_exposed_provenance_mut};
use std::sync::Mutex;

use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint, PageProvider, PageRun};

const FRAME: usize = 4096;
/// Blocks of 1, 2, 4 and so on up to 4096 frames: 16 MiB.
const ORDERS: usize = 13;
const MEMORY: usize = FRAME << (ORDERS - 1);

/// Free blocks of each order, by physical address; a free block's first word is the address of the next one.
struct Buddy {
    heads: [Option<usize>; ORDERS],
    offset: usize,
}

impl Buddy {
    /// A free block's link. In a kernel this is memory, by the linear map.
    fn next(&self, block: usize) -> *mut Option<usize> {
        with_exposed_provenance_mut(self.offset + block)
    }

    fn push(&mut self, order: usize, block: usize) {
        // SAFETY: the block is free, so that nobody else uses it, and as long as a frame.
        unsafe { self.next(block).write(self.heads[order]) };
        self.heads[order] = Some(block);
    }

    fn pop(&mut self, order: usize) -> Option<usize> {
        let block = self.heads[order]?;
        // SAFETY: `push` wrote it, and nobody has used the block since.
        self.heads[order] = unsafe { self.next(block).read() };
        Some(block)
    }

    /// Takes a block out of the middle of its list; false if it is not there.
    fn remove(&mut self, order: usize, block: usize) -> bool {
        let mut others = Vec::new();
        let found = loop {
            match self.pop(order) {
                Some(head) if head == block => break true,
                Some(head) => others.push(head),
                None => break false,
            }
        };
        others.into_iter().rev().for_each(|head| self.push(order, head));
        found
    }

    fn take(&mut self, order: usize) -> Option<usize> {
        let from = (order..ORDERS).find(|from| self.heads[*from].is_some())?;
        let block = self.pop(from)?;
        // The upper halves stay.
        (order..from).for_each(|half| self.push(half, block + (FRAME << half)));
        Some(block)
    }

    fn give(&mut self, mut order: usize, mut block: usize) {
        while order + 1 < ORDERS && self.remove(order, block ^ (FRAME << order)) {
            block &= !(FRAME << order);
            order += 1;
        }
        self.push(order, block);
    }
}

/// The order of the shortest block that holds a run; a block is aligned to its length.
fn order(run: PageRun) -> usize {
    run.len().max(run.align()).div_ceil(FRAME).next_power_of_two().trailing_zeros() as usize
}

struct Frames(Mutex<Option<Buddy>>);

// SAFETY: a block is in no list while it is out, so that its frames are given once; it is mapped at the offset, which
// is a multiple of all there is, so that it is aligned to its length there too.
unsafe impl PageProvider for Frames {
    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let mut buddy = self.0.lock().ok()?;
        let buddy = buddy.as_mut()?;
        let block = if order(run) < ORDERS { buddy.take(order(run))? } else { return None };
        NonNull::new(with_exposed_provenance_mut(buddy.offset + block))
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        let Ok(mut buddy) = self.0.lock() else { return false };
        let Some(buddy) = buddy.as_mut() else { return false };
        buddy.give(order(run), start.addr().get() - buddy.offset);
        true
    }

    /// All of a block's frames, as they are taken anyway.
    fn prefer(&self, run: PageRun) -> PageRun {
        PageRun::new(FRAME << order(run), run.align(), Self::PAGE_LEN).unwrap_or(run)
    }
}

static HEAP: Heap<Frames, Hint<UnknownCpu>, 1> = Heap::new(Frames(Mutex::new(None)), Hint(UnknownCpu));

fn main() -> Result<(), Box<dyn Error>> {
    let memory = vec![0_u8; 2 * MEMORY].leak().as_mut_ptr().expose_provenance();
    let mut buddy = Buddy { heads: [None; ORDERS], offset: memory.next_multiple_of(MEMORY) };
    buddy.give(ORDERS - 1, 0);
    *HEAP.provider().0.lock()? = Some(buddy);

    let layouts: Vec<Layout> =
        (0..4000).map(|at| Layout::from_size_align(1 + at * 37 % 9000, 8)).collect::<Result<_, _>>()?;
    let mut blocks = Vec::new();
    for layout in &layouts {
        let Ok(block) = HEAP.alloc(*layout) else { break };
        // SAFETY: the block is as long as its Layout at least.
        unsafe { block.cast::<u8>().write_bytes(0xa5, layout.size()) };
        blocks.push((block.cast::<u8>(), *layout));
    }
    println!("{} blocks, {} KiB held of {} KiB", blocks.len(), HEAP.stats().held_len >> 10, MEMORY >> 10);
    for (block, layout) in blocks {
        // SAFETY: the block came from this heap with this Layout and is used no more.
        unsafe { HEAP.free(block, layout) };
    }
    HEAP.drain_current();
    HEAP.trim(0);
    let buddy = HEAP.provider().0.lock()?;
    let is_whole = buddy.as_ref().is_some_and(|buddy| buddy.heads[ORDERS - 1] == Some(0));
    println!(
        "{} KiB held; the memory is {}",
        HEAP.stats().held_len >> 10,
        if is_whole { "whole" } else { "in pieces" }
    );
    if is_whole { Ok(()) } else { Err("frames are missing".into()) }
}

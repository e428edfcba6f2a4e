//! A page provider that gives memory back to whoever lies below, as a guest with a balloon device does.
//!
//! `cargo run --example balloon` (Linux): a window of addresses that is never given up, and frames that the host takes
//! back as soon as the heap unmaps a run. What a balloon driver tells the host by its queue, this tells Linux by
//! `madvise`; the program's own resident memory shows that it works.

use core::alloc::Layout;
use core::error::Error;
use core::ptr::{NonNull, null_mut, with_exposed_provenance_mut};
use std::fs;
use std::sync::Mutex;

use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint, PageProvider, PageRun};

const WINDOW: usize = 256 << 20;

/// Free pieces of the window, start and end, by address. In a kernel: a list that needs no memory of the heap's.
struct Balloon(Mutex<Vec<(usize, usize)>>);

impl Balloon {
    /// Cuts the first piece that is long enough.
    fn take(&self, len: usize, align: usize) -> Option<usize> {
        let mut free = self.0.lock().ok()?;
        let start_in = |piece: &(usize, usize)| piece.0.checked_next_multiple_of(align);
        let fits = |piece: &(usize, usize)| start_in(piece).is_some_and(|start| start + len <= piece.1);
        let at = free.iter().position(fits)?;
        let piece = *free.get(at)?;
        let start = start_in(&piece)?;
        let rests = [(piece.0, start), (start + len, piece.1)];
        free.splice(at..=at, rests.into_iter().filter(|rest| rest.0 < rest.1));
        Some(start)
    }

    fn give(&self, start: usize, len: usize) -> bool {
        let Ok(mut free) = self.0.lock() else { return false };
        free.push((start, start + len));
        free.sort_unstable();
        free.dedup_by(|next, piece| {
            let touches = piece.1 == next.0;
            if touches {
                piece.1 = next.1;
            }
            touches
        });
        true
    }
}

// SAFETY: a run is cut out of the free pieces and put back by `unmap`, so that it is given once at a time. Its
// addresses stay mapped all along; what the host took comes back as zeros at the next access.
unsafe impl PageProvider for Balloon {
    const ZEROED: bool = true;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        NonNull::new(with_exposed_provenance_mut(self.take(run.len(), run.align())?))
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // Inflate: the frames are the host's, the addresses stay ours. First the frames, so that nobody writes to the
        // run before. SAFETY: the heap uses the run no more, as our caller promises, and it lies in the window.
        let answer = unsafe { libc::madvise(start.as_ptr().cast(), run.len(), libc::MADV_DONTNEED) };
        answer == 0 && self.give(start.addr().get(), run.len())
    }
}

static HEAP: Heap<Balloon, Hint<UnknownCpu>, 1> = Heap::new(Balloon(Mutex::new(Vec::new())), Hint(UnknownCpu));

/// This program's memory that is really there, in MiB.
fn resident() -> Result<usize, Box<dyn Error>> {
    let pages = fs::read_to_string("/proc/self/statm")?;
    Ok((pages.split(' ').nth(1).ok_or("no second number")?.parse::<usize>()? * 4096) >> 20)
}

fn main() -> Result<(), Box<dyn Error>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: new addresses, which nobody has yet.
    let window = unsafe { libc::mmap(null_mut(), WINDOW, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if window == libc::MAP_FAILED {
        return Err("no window".into());
    }
    HEAP.provider().give(window.expose_provenance(), WINDOW);

    let before = resident()?;
    let layout = Layout::from_size_align(100_000, 8)?;
    let mut blocks = Vec::new();
    for _ in 0..1000 {
        let block = HEAP.alloc(layout).map_err(|_| "no memory")?.cast::<u8>();
        // SAFETY: the block is as long as its Layout at least.
        unsafe { block.write_bytes(0xa5, layout.size()) };
        blocks.push(block);
    }
    let full = resident()?;
    for block in blocks {
        // SAFETY: the block came from this heap with this Layout and is used no more.
        unsafe { HEAP.free(block, layout) };
    }
    HEAP.drain_current();
    HEAP.trim(0);
    let after = resident()?;
    println!("resident: {before} MiB, with 1000 blocks of 100 KB {full} MiB, after their free {after} MiB");
    if full < before + 90 || after > before + 5 {
        return Err("the host did not get its memory back".into());
    }
    Ok(())
}

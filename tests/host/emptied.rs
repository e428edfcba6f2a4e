//! Heaps that were emptied, and queues that shrank: what stays of their memory without `trim`, and what goes with it.

use std::alloc::Layout;
use std::collections::BTreeSet;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::{AtRest, Books};
use smp_heap::battery::{Call, Faulty, Random};
use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint, PageProvider, PageRun, SizeClass, worst_case_overhead};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;
/// What is in a page that has no memory.
const ABSENT: u8 = 0xde;

/// The books' memory, with pages that may have none: these are filled, and must still be so when they have memory
/// again.
#[derive(Default)]
pub(crate) struct FramePages {
    books: Books,
    absent: Mutex<BTreeSet<usize>>,
    /// The most bytes that had memory at once.
    peak_len: AtomicUsize,
}

pub(crate) type Frames = Faulty<FramePages>;

fn pages(start: NonNull<u8>, run: PageRun) -> impl Iterator<Item = NonNull<u8>> {
    // SAFETY: inside the run.
    (0..run.len() / PAGE).map(move |page| unsafe { start.add(page * PAGE) })
}

impl FramePages {
    /// Bytes that have memory.
    fn resident_len(&self) -> usize {
        self.books.held_len() - self.absent.lock().unwrap().len() * PAGE
    }

    fn note_peak(&self) {
        self.peak_len.fetch_max(self.resident_len(), Ordering::Relaxed);
    }

    /// Some pages have memory from now on, or go: nobody wrote there.
    fn leave(&self, start: NonNull<u8>, run: PageRun) {
        let mut absent = self.absent.lock().unwrap();
        for page in pages(start, run).filter(|page| absent.remove(&page.addr().get())) {
            // SAFETY: a page of a run of the books', which nobody uses meanwhile.
            let content = unsafe { core::slice::from_raw_parts(page.as_ptr(), PAGE) };
            assert!(content.iter().all(|byte| *byte == ABSENT), "a page without memory was written to");
        }
    }
}

// SAFETY: the books'; a page without memory stays readable and writable here, so that it can be watched.
unsafe impl PageProvider for FramePages {
    const REENTRANT: bool = true;
    const DECOMMITS: bool = true;

    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let start = self.books.map(run)?;
        self.note_peak();
        Some(start)
    }

    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        self.leave(start, run);
        // SAFETY: the contract is the same.
        unsafe { self.books.unmap(start, run) }
    }

    unsafe fn decommit(&self, start: NonNull<u8>, run: PageRun) -> bool {
        // SAFETY: by the contract the pages are in a run of the books', and nobody uses them.
        unsafe { start.write_bytes(ABSENT, run.len()) };
        let mut absent = self.absent.lock().unwrap();
        pages(start, run).for_each(|page| assert!(absent.insert(page.addr().get()), "it has none"));
        true
    }

    unsafe fn commit(&self, start: NonNull<u8>, run: PageRun) -> bool {
        self.leave(start, run);
        // SAFETY: as in `decommit`.
        unsafe { start.write_bytes(0xa5, run.len()) };
        self.note_peak();
        true
    }
}

type Host<P> = Heap<P, Hint<UnknownCpu>, 2>;
type Blocks = Vec<(NonNull<u8>, Layout)>;

fn host<P: Default>() -> Box<Host<P>> {
    Box::new(Heap::new(P::default(), Hint(UnknownCpu)))
}

#[derive(Clone, Copy, Debug)]
enum Order {
    FirstFirst,
    LastFirst,
    Random,
}

const ORDERS: [Order; 3] = [Order::FirstFirst, Order::LastFirst, Order::Random];

/// The block lengths of a load; of all up to 8 KiB if it is `None`.
#[derive(Clone, Copy, Debug)]
struct Sizes(Option<usize>);

const SIZES: [Sizes; 4] = [Sizes(Some(64)), Sizes(Some(1000)), Sizes(Some(4096)), Sizes(None)];

impl Sizes {
    /// As many short ones as long ones, by doubling.
    fn next(self, random: &mut Random) -> Layout {
        let size = self.0.unwrap_or_else(|| {
            let from = 8 << random.below(10);
            from + random.below(from + 1)
        });
        Layout::from_size_align(size, 8).unwrap()
    }

    fn classes(self) -> Vec<SizeClass> {
        match self.0 {
            Some(size) => SizeClass::of(Layout::from_size_align(size, 8).unwrap()).into_iter().collect(),
            None => SizeClass::all().filter(|class| class.block_len() <= 8192).collect(),
        }
    }
}

fn fill<P: PageProvider>(heap: &Host<P>, len: usize, sizes: Sizes) -> Blocks {
    let mut random = Random::new(7);
    let (mut blocks, mut sum) = (Blocks::new(), 0);
    while sum < len {
        let layout = sizes.next(&mut random);
        let block = heap.alloc(layout).unwrap().cast::<u8>();
        // SAFETY: a block of that length, just allocated.
        unsafe { block.write_bytes(1, layout.size()) };
        blocks.push((block, layout));
        sum += layout.size();
    }
    blocks
}

fn put_in(order: Order, blocks: &mut Blocks) {
    match order {
        Order::FirstFirst => {}
        Order::LastFirst => blocks.reverse(),
        Order::Random => {
            let mut random = Random::new(8);
            for end in (1..blocks.len()).rev() {
                blocks.swap(end, random.below(end + 1));
            }
        }
    }
}

fn free<P: PageProvider>(heap: &Host<P>, (block, layout): (NonNull<u8>, Layout)) {
    // SAFETY: `fill` allocated it with this layout, and it is in no list any more.
    unsafe { heap.free(block, layout) };
}

/// What stays when everything is freed, and at most how much had memory.
fn emptied(len: usize, order: Order, sizes: Sizes, maintained: bool) -> (usize, usize) {
    let heap = host::<Frames>();
    let mut blocks = fill(&heap, len, sizes);
    put_in(order, &mut blocks);
    for (number, block) in blocks.into_iter().enumerate() {
        free(&heap, block);
        if maintained && number % 1000 == 0 {
            heap.maintain(60);
        }
    }
    if maintained {
        (0..60).for_each(|_| _ = heap.maintain(usize::MAX));
    }
    let (left_len, stats) = (heap.provider().inner().resident_len(), heap.stats());
    assert_eq!(stats.held_len, left_len, "the heap knows");
    heap.verify_all().unwrap();
    let peak_len = heap.provider().inner().peak_len.load(Ordering::Relaxed);
    println!(
        "{} MiB of {sizes:?}, {order:?}, maintained: {maintained}: {left_len} of {peak_len}; slabs {}, free {}",
        len / MIB,
        stats.slab_len,
        stats.free_len
    );
    heap.trim(0);
    heap.verify_all().unwrap();
    assert_eq!(heap.provider().held_len(), 0, "everything goes with a trim");
    assert!(heap.provider().inner().absent.lock().unwrap().is_empty());
    (left_len, peak_len)
}

fn all_emptied(len: usize) {
    for (order, sizes) in ORDERS.into_iter().flat_map(|order| SIZES.map(|sizes| (order, sizes))) {
        let (left_len, peak_len) = emptied(len, order, sizes, false);
        assert!(left_len <= peak_len / 8 + 2 * MIB, "{left_len} of {peak_len}");
        let (left_len, _) = emptied(len, order, sizes, true);
        let most = worst_case_overhead(1, sizes.classes(), 0);
        // Each block in quarantine may keep a slab.
        assert!(left_len <= most || cfg!(feature = "debug-heap"), "{left_len}, promised {most}");
    }
}

#[test]
fn an_emptied_heap_keeps_an_eighth_without_trim() {
    all_emptied(64 * MIB);
}

#[test]
#[ignore = "takes minutes: half a GiB"]
fn a_long_emptied_heap_keeps_an_eighth_without_trim() {
    all_emptied(512 * MIB);
}

/// Nine of ten blocks freed at random.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "what is told of a free block keeps its page")]
fn a_trim_leaves_pages_of_blocks_in_use() {
    let heap = host::<Frames>();
    let mut blocks = fill(&heap, 64 * MIB, Sizes(None));
    put_in(Order::Random, &mut blocks);
    let kept = blocks.split_off(blocks.len() / 10 * 9);
    blocks.into_iter().for_each(|block| free(&heap, block));
    heap.trim(0);
    let live_len: usize = kept.iter().map(|(_, layout)| layout.size()).sum();
    let resident_len = heap.provider().inner().resident_len();
    println!("{resident_len} bytes for {live_len}: {:.1} times", resident_len as f64 / live_len as f64);
    assert!(resident_len <= 4 * live_len, "{resident_len} for {live_len}");
    heap.verify_all().unwrap();
    let mut others = fill(&heap, 4 * MIB, Sizes(None));
    heap.verify_all().unwrap();
    others.drain(..).for_each(|block| free(&heap, block));
    for (block, layout) in &kept {
        // SAFETY: `fill` wrote it, and it is in use.
        let content = unsafe { core::slice::from_raw_parts(block.as_ptr(), layout.size()) };
        assert!(content.iter().all(|byte| *byte == 1), "a block in use has its memory");
    }
    kept.into_iter().for_each(|block| free(&heap, block));
    heap.trim(0);
    heap.verify_all().unwrap();
    assert_eq!(heap.provider().held_len(), 0, "everything goes with a trim");
}

/// Sixteen MiB of which most have no memory, and the blocks that are left.
fn mostly_absent() -> (Box<Host<Frames>>, Blocks) {
    let heap = host::<Frames>();
    let mut blocks = fill(&heap, 16 * MIB, Sizes(Some(1000)));
    let rest = blocks.split_off(1000);
    rest.into_iter().for_each(|block| free(&heap, block));
    (heap, blocks)
}

#[test]
fn pages_that_have_no_memory_serve_before_new_addresses() {
    let (heap, mut blocks) = mostly_absent();
    let absent_len = heap.stats().absent_len;
    assert!(absent_len > 0, "{}", heap.stats());
    let before = heap.stats();
    blocks.extend(fill(&heap, absent_len / 2, Sizes(Some(1000))));
    let after = heap.stats();
    assert!(after.commit_count > before.commit_count && after.map_count == before.map_count, "{after}");
    heap.verify_all().unwrap();
    blocks.into_iter().for_each(|block| free(&heap, block));
}

#[test]
fn memory_that_cannot_be_had_again_is_a_null_and_no_more() {
    let (heap, mut blocks) = mostly_absent();
    let provider = heap.provider();
    provider.on(Call::Commit).fail(0, usize::MAX);
    provider.set_limit(1);
    let absent_len = heap.stats().absent_len;
    let layout = Layout::from_size_align(1000, 8).unwrap();
    while let Ok(block) = heap.alloc(layout) {
        blocks.push((block.cast(), layout));
    }
    heap.verify_all().unwrap();
    assert_eq!(heap.stats().absent_len, absent_len, "none of it came back");
    provider.on(Call::Commit).fail(0, 0);
    blocks.extend(fill(&heap, MIB, Sizes(Some(1000))));
    assert!(heap.stats().absent_len < absent_len);
    heap.verify_all().unwrap();
    blocks.into_iter().for_each(|block| free(&heap, block));
}

#[test]
fn a_provider_that_refuses_to_decommit_loses_nothing() {
    let heap = host::<Frames>();
    let provider = heap.provider();
    provider.on(Call::Decommit).fail(0, usize::MAX);
    provider.on(Call::Unmap).fail(0, usize::MAX);
    let blocks = fill(&heap, 16 * MIB, Sizes(None));
    blocks.into_iter().for_each(|block| free(&heap, block));
    assert_eq!(heap.trim(0), 0);
    assert!(provider.inner().absent.lock().unwrap().is_empty());
    heap.verify_all().unwrap();
    // Decommitted as a whole, and not taken back at first.
    provider.on(Call::Decommit).fail(0, 0);
    heap.trim(0);
    heap.verify_all().unwrap();
    provider.on(Call::Unmap).fail(0, 0);
    heap.trim(0);
    heap.verify_all().unwrap();
    assert_eq!((heap.stats().held_len, provider.held_len()), (0, 0));
}

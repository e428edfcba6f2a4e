//! Queues that grow, shrink and go on: what is held stays within `worst_case_overhead`.

use std::alloc::Layout;
use std::collections::VecDeque;
use std::ptr::NonNull;

use crate::common::{AtRest, Books, Memory, ThreadCpu, play_cpu};
use crate::emptied::Frames;
use crate::random_sequences::cases;
use proptest::prelude::{Strategy, any};
use proptest::prop_assert;
use proptest::test_runner::{Config, TestRunner};
use smp_heap::{Heap, PageProvider, Pinned, RegionProvider, SizeClass, worst_case_overhead, worst_case_overhead_after};

const MIB: usize = 1 << 20;
const CPUS: usize = 4;

type Host<P> = Heap<P, Pinned<ThreadCpu>, CPUS>;

/// A queue of blocks of one length that some CPUs put into, and others take from.
#[derive(Clone, Copy, Debug)]
struct Hourglass {
    size: usize,
    wide_len: usize,
    narrow_len: usize,
    cpus: usize,
    /// Who frees is another CPU than who made it.
    hands_over: bool,
    /// The turn of the first block: CPUs follow each other every 32 turns.
    first_turn: usize,
}

struct Queue<'a, P> {
    heap: &'a Host<P>,
    shape: Hourglass,
    layout: Layout,
    class: SizeClass,
    blocks: VecDeque<NonNull<u8>>,
    turn: usize,
}

impl<'a, P: PageProvider> Queue<'a, P> {
    fn new(heap: &'a Host<P>, shape: Hourglass) -> Self {
        let layout = Layout::from_size_align(shape.size, 8).unwrap();
        let class = SizeClass::of(layout).unwrap();
        Self { heap, shape, layout, class, blocks: VecDeque::new(), turn: shape.first_turn }
    }

    fn len(&self) -> usize {
        self.blocks.len() * self.class.block_len()
    }

    fn put(&mut self) {
        self.turn += 1;
        play_cpu(self.turn / 32 % self.shape.cpus);
        self.blocks.push_back(self.heap.alloc(self.layout).unwrap().cast());
    }

    fn take(&mut self) {
        self.turn += 1;
        play_cpu((self.turn / 32 + usize::from(self.shape.hands_over)) % self.shape.cpus);
        // SAFETY: allocated with this layout, and in the queue no more.
        unsafe { self.heap.free(self.blocks.pop_front().unwrap(), self.layout) };
    }

    /// Bytes that the heap may have taken at this moment.
    fn most(&self) -> usize {
        let (cpus, len) = (self.shape.cpus, self.len());
        len + if P::DECOMMITS {
            worst_case_overhead(cpus, [self.class], len)
        } else {
            worst_case_overhead_after(cpus, [self.class], len, self.shape.wide_len)
        }
    }

    /// Wide, narrow, and on: the most that was in use beyond what may be, by `used`, when it is wide, when it has
    /// become narrow, and while it goes on.
    fn breach(mut self, used: impl Fn(&Host<P>) -> usize) -> Option<String> {
        let mut breaches = String::new();
        let mut look = |queue: &Self, when: &str| {
            let (used_len, most) = (used(queue.heap), queue.most());
            if used_len > most {
                breaches += &format!("{:?}, {when}: {used_len} of {most}\n", queue.shape);
            }
        };
        while self.len() < self.shape.wide_len {
            self.put();
        }
        look(&self, "wide");
        while self.len() > self.shape.narrow_len {
            self.take();
        }
        look(&self, "narrow");
        for step in 0..50_000 {
            self.put();
            self.take();
            if step % 5000 == 0 {
                look(&self, "going on");
            }
        }
        look(&self, "gone on");
        self.heap.verify_all().unwrap();
        while !self.blocks.is_empty() {
            self.take();
        }
        (!breaches.is_empty()).then_some(breaches)
    }
}

fn over<P: PageProvider + Default>(shape: Hourglass) -> Option<String> {
    let heap = Box::new(Host::new(P::default(), Pinned(ThreadCpu)));
    let breach = Queue::new(&heap, shape).breach(|heap| heap.stats().held_len);
    heap.trim_all();
    breach
}

/// Over one region, what was ever used of it, since it goes back as a whole only.
fn over_region(shape: Hourglass, len: usize) -> Option<String> {
    let memory = Memory::new(len, 4096);
    let heap: Box<Host<RegionProvider<4>>> = Box::new(Host::new(RegionProvider::new(), Pinned(ThreadCpu)));
    // SAFETY: the memory is the heap's until it is dropped, which is behind it.
    unsafe { heap.provider().add_region(memory.start(), memory.len()) }.unwrap();
    let breach = Queue::new(&heap, shape).breach(|heap| heap.stats().touched_len);
    drop(heap);
    breach
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "the formula knows no debug headers and no quarantine")]
fn a_queue_that_shrinks_stays_within_the_formula() {
    let shape =
        Hourglass { size: 1000, wide_len: 256 * MIB, narrow_len: MIB, cpus: 1, hands_over: false, first_turn: 0 };
    assert_eq!(over::<Frames>(shape), None);
    assert_eq!(over::<Books>(shape), None);
}

/// Blocks of 56 bytes and chunks of 1 MiB are such that one CPU's cache keeps a few blocks of each chunk.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "the formula knows no debug headers and no quarantine")]
fn a_few_cached_blocks_keep_no_chunk_for_long() {
    for (hands_over, first_turn) in [(false, 0), (true, 0), (true, 7), (true, 21)] {
        let (wide_len, narrow_len) = (64 * MIB, 4 * MIB);
        let shape = Hourglass { size: 49, wide_len, narrow_len, cpus: CPUS, hands_over, first_turn };
        assert_eq!(over::<Books>(shape), None);
    }
}

#[test]
#[cfg_attr(feature = "debug-heap", ignore = "the formula knows no debug headers and no quarantine")]
fn producer_and_consumer_over_a_region_stay_within_the_formula() {
    let shape = Hourglass { size: 64, wide_len: MIB, narrow_len: MIB, cpus: 2, hands_over: true, first_turn: 0 };
    assert_eq!(over_region(shape, 512 * MIB), None);
}

fn any_shape() -> impl Strategy<Value = (Hourglass, usize)> {
    let sizes = (3_u32..15).prop_flat_map(|doubling| 1_usize << doubling..2 << doubling);
    // A 32-bit process has no room for regions of 1.7 GiB beside the other tests.
    let spares = if usize::BITS < 64 { 0..2_u32 } else { 0..4 };
    let shapes = (sizes, 0..4_u32, 0..6_u32, 1..=CPUS, any::<bool>(), 0..128_usize, spares);
    shapes.prop_map(|(size, narrow, wide, cpus, hands_over, first_turn, spare)| {
        let narrow_len = MIB << narrow;
        let wide_len = (narrow_len << wide).min(96 * MIB);
        (Hourglass { size, wide_len, narrow_len, cpus, hands_over, first_turn }, (2 * wide_len + 16 * MIB) << spare)
    })
}

/// Looks for a queue, and over regions for their length, that breaks the formula.
#[test]
#[cfg_attr(feature = "debug-heap", ignore = "the formula knows no debug headers and no quarantine")]
fn no_queue_breaks_the_formula() {
    let config = Config { failure_persistence: None, ..cases(24) };
    let outcome = TestRunner::new(config).run(&any_shape(), |(shape, region_len)| {
        let steady = Hourglass { narrow_len: shape.wide_len, ..shape };
        let breaches = [over::<Frames>(shape), over::<Books>(shape), over_region(steady, region_len)];
        let breaches: Vec<_> = breaches.into_iter().flatten().collect();
        prop_assert!(breaches.is_empty(), "{}", breaches.concat());
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

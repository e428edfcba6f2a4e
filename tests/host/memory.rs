//! Memory that returns to its slab: what is held over what is live, when loads change, stop, and move between CPUs.
//!
//! One thread plays all CPUs in turn, and chunks lie at multiples of every block's alignment, so every figure is the
//! same in each run, but for a table of chunks that some addresses need. `-- memory:: --nocapture` prints them. With
//! `hardened` no neighbours are joined, so what depends on that is left out.

use std::alloc::Layout;
use std::collections::VecDeque;
use std::ptr::NonNull;

use crate::common::{AtRest, Books, ThreadCpu, limited, play_cpu};
use crate::host_pages::HostPages;
use crate::stress::all_back;
#[cfg(not(feature = "hardened"))]
use smp_heap::battery::Random;
use smp_heap::battery::{Call, Faulty};
use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint, Pinned, SizeClass, worst_case_overhead};

const CPUS: usize = 8;
const MIB: usize = 1 << 20;

/// What a cache may hold whatever the heap's size.
const CPU_LEN: usize = MIB;

/// What a CPU may keep beside what is live, where all classes are in use: its cache, and at its home two slabs of each
/// class, as `worst_case_overhead` counts.
#[cfg(not(feature = "hardened"))]
fn cpu_constant() -> usize {
    CPU_LEN + SizeClass::all().map(|class| 2 * (64 << 10).max(4 * class.block_len())).sum::<usize>()
}

type Tested = Heap<Books, Pinned<ThreadCpu>, CPUS>;

fn heap() -> Tested {
    Heap::new(Books::new(HostPages::aligned(64 << 10)), Pinned(ThreadCpu))
}

/// A block with its first and last word written, by its Layout.
struct Piece(NonNull<u8>, Layout);

impl Piece {
    fn new(heap: &Tested, len: usize) -> Option<Self> {
        let layout = Layout::from_size_align(len, 8).unwrap();
        let piece = Self(heap.alloc(layout).ok()?.cast(), layout);
        piece.words().into_iter().for_each(|word| {
            // SAFETY: inside the block, which is this value's alone.
            unsafe { word.write(word.addr().get()) }
        });
        Some(piece)
    }

    fn words(&self) -> [NonNull<usize>; 2] {
        // SAFETY: sizes in these tests are multiples of 8, and not 0.
        [self.0, unsafe { self.0.add(self.1.size() - 8) }].map(NonNull::cast)
    }

    fn free(self, heap: &Tested) {
        for word in self.words() {
            // SAFETY: inside the block, written when it was made.
            assert_eq!(unsafe { word.read() }, word.addr().get(), "somebody else wrote here");
        }
        // SAFETY: allocated from this heap with this Layout, and used no more.
        unsafe { heap.free(self.0, self.1) };
    }

    fn len(&self) -> usize {
        SizeClass::of(self.1).map_or(self.1.size(), SizeClass::block_len)
    }
}

/// A live set, its bytes, and the most that was held for it since the last look.
struct Live<'a> {
    heap: &'a Tested,
    pieces: VecDeque<Piece>,
    len: usize,
    worst: f64,
    /// CPUs that take turns.
    cpus: usize,
    turn: usize,
}

impl<'a> Live<'a> {
    fn new(heap: &'a Tested, cpus: usize) -> Self {
        Self { heap, pieces: VecDeque::new(), len: 0, worst: 0.0, cpus, turn: 0 }
    }

    /// Each CPU works for a while before the next one does.
    fn next_cpu(&mut self) {
        self.turn += 1;
        play_cpu(self.turn / 64 % self.cpus);
    }

    fn add(&mut self, len: usize) {
        self.next_cpu();
        let piece = Piece::new(self.heap, len).unwrap();
        self.len += piece.len();
        self.pieces.push_back(piece);
    }

    fn free_oldest(&mut self) {
        self.next_cpu();
        let piece = self.pieces.pop_front().unwrap();
        self.len -= piece.len();
        piece.free(self.heap);
    }

    fn held_len(&self) -> usize {
        self.heap.provider().held_len()
    }

    fn ratio(&self) -> f64 {
        self.held_len() as f64 / self.len as f64
    }

    fn look(&mut self) {
        self.worst = self.worst.max(self.ratio());
    }

    fn end(mut self) {
        while !self.pieces.is_empty() {
            self.free_oldest();
        }
        (0..self.cpus).for_each(|cpu| {
            play_cpu(cpu);
            self.heap.drain_current();
        });
        all_back(self.heap, 1);
    }
}

/// Block lengths in an order that goes up and down, up to 24 KiB.
const LENS: [usize; 8] = [64, 512, 4096, 128, 24 << 10, 1024, 8192, 256];

/// The live set of one class is replaced by that of the next, block by block, the oldest first: what is held stays near
/// what is live.
fn replaced(cpus: usize, live_len: usize) -> f64 {
    let heap = heap();
    let mut live = Live::new(&heap, cpus);
    for round in 0..3 {
        for len in LENS {
            while live.pieces.front().is_some_and(|oldest| oldest.len() != len) {
                while live.len > live_len {
                    live.free_oldest();
                }
                live.add(len);
                if live.pieces.front().is_none_or(|oldest| oldest.1.size() == len) {
                    break;
                }
            }
            while live.len < live_len {
                live.add(len);
            }
            if round > 0 {
                live.look();
            }
        }
    }
    let worst = live.worst;
    live.end();
    println!("replaced, {cpus} CPUs, {} MiB live: {worst:.3}", live_len / MIB);
    worst
}

#[test]
fn a_live_set_that_changes_its_class_holds_little_more() {
    assert!(replaced(1, 64 * MIB) <= 1.15);
    for live_len in [64 * MIB, 8 * MIB] {
        assert!(replaced(CPUS, live_len) <= 1.15 + (CPUS * CPU_LEN) as f64 / live_len as f64);
    }
}

/// Eight phases of another length each; every fiftieth block of a phase stays for good.
#[cfg(not(feature = "hardened"))]
fn survivors(cpus: usize) -> f64 {
    const LIVE_LEN: usize = 64 * MIB;
    let heap = heap();
    let mut live = Live::new(&heap, cpus);
    let mut kept: Vec<Piece> = Vec::new();
    for len in [16, 48, 128, 384, 1024, 3 << 10, 8 << 10, 24 << 10] {
        while live.len < LIVE_LEN {
            live.add(len);
        }
        live.look();
        for (number, piece) in core::mem::take(&mut live.pieces).into_iter().enumerate() {
            live.next_cpu();
            if number % 50 == 49 {
                kept.push(piece);
            } else {
                live.len -= piece.len();
                piece.free(&heap);
            }
        }
    }
    live.pieces.extend(kept);
    let peak = heap.provider().peak_len();
    heap.verify_all().unwrap();
    live.end();
    let ratio = peak as f64 / LIVE_LEN as f64;
    println!("every fiftieth survives, {cpus} CPUs: peak {ratio:.3}");
    ratio
}

#[test]
#[cfg(not(feature = "hardened"))]
fn survivors_keep_little_from_other_classes() {
    assert!(survivors(1) <= 3.5);
    assert!(survivors(CPUS) <= 3.5 + (CPUS * CPU_LEN) as f64 / (64 * MIB) as f64);
}

/// Blocks of random lengths, one freed at random for each one that comes.
#[cfg(not(feature = "hardened"))]
fn churned(cpus: usize, shortest: usize, longest: usize, live_len: usize) -> f64 {
    let heap = heap();
    let mut live = Live::new(&heap, cpus);
    let mut random = Random::new(1);
    // As many short ones as long ones, by doubling.
    let mut len = move || {
        let doublings = (longest / shortest).ilog2() as usize;
        let from = shortest << random.below(doublings);
        (from + random.below(from)).next_multiple_of(8)
    };
    let mut picks = Random::new(2);
    while live.len < live_len {
        live.add(len());
    }
    for step in 0..400_000 {
        while live.len > live_len {
            let last = live.pieces.len() - 1;
            live.pieces.swap(0, picks.below(last));
            live.free_oldest();
        }
        live.add(len());
        if step % 1000 == 0 {
            live.look();
        }
    }
    let worst = live.worst;
    live.end();
    println!("churn of {shortest} to {longest} B, {cpus} CPUs, {} MiB live: {worst:.3}", live_len / MIB);
    worst
}

#[test]
#[cfg(not(feature = "hardened"))]
fn long_random_churn_holds_little_more_than_is_live() {
    const LIVE_LEN: usize = 32 * MIB;
    for cpus in [1, CPUS] {
        let constant = (cpus * CPU_LEN) as f64 / LIVE_LEN as f64;
        assert!(churned(cpus, 16, 1024, LIVE_LEN) <= 1.08 + constant);
        // Longer blocks leave more over, in slabs of few blocks at each CPU's home: within what is written for them,
        // and far from all of it.
        let longer = churned(cpus, 16, 32 << 10, LIVE_LEN);
        assert!(longer <= 1.15 + (cpus * cpu_constant()) as f64 / LIVE_LEN as f64);
        // Sixty classes: each of them has slabs that are half used at each CPU.
        assert!(longer <= 1.35 + constant);
    }
}

/// How much of a heap of 1 MiB can be live at once, when all CPUs ask for lengths in turn.
fn filled(cpus: usize, lens: &[usize], by_cpu: bool) -> f64 {
    let heap: Tested = Heap::new(limited(MIB), Pinned(ThreadCpu));
    let mut pieces = Vec::new();
    let mut refused = vec![false; lens.len()];
    let mut turn = 0_usize;
    while refused.contains(&false) {
        let (cpu, class) =
            if by_cpu { (turn % cpus, turn % lens.len()) } else { (turn / 100 % cpus, turn % lens.len()) };
        turn += 1;
        play_cpu(cpu);
        match Piece::new(&heap, lens[class]) {
            Some(piece) => pieces.push((cpu, piece)),
            None => refused[class] = true,
        }
    }
    let live: usize = pieces.iter().map(|(_, piece)| piece.len()).sum();
    heap.verify_all().unwrap();
    for (cpu, piece) in pieces {
        play_cpu(cpu);
        piece.free(&heap);
    }
    (0..cpus).for_each(|cpu| {
        play_cpu(cpu);
        heap.drain_current();
    });
    all_back(&heap, 1);
    let share = live as f64 / MIB as f64;
    println!(
        "1 MiB on {cpus} CPUs, {} lengths, {}: {share:.3} live",
        lens.len(),
        if by_cpu { "in turn" } else { "in runs" }
    );
    share
}

#[test]
fn a_small_heap_can_be_nearly_full_whichever_cpu_asks() {
    let all: Vec<_> = SizeClass::all().map(SizeClass::block_len).collect();
    for by_cpu in [true, false] {
        for lens in [all.as_slice(), &[64], &[24, 200, 3000], &[16, 24 << 10], &[4096], &[8]] {
            assert!(filled(CPUS, lens, by_cpu) >= 0.8);
        }
    }
}

/// Who makes blocks, and who frees them.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Pairs,
    FanIn,
    FanOut,
    Ring,
    Bursts,
    /// One CPU does both.
    OneOwner,
}

/// Peak of what is held, and what is live at most, for queues between CPUs.
fn handed_over(shape: Shape, len: usize) -> (usize, usize) {
    const QUEUE: usize = 2000;
    let heap = heap();
    let mut queues: Vec<VecDeque<Piece>> = (0..CPUS).map(|_| VecDeque::new()).collect();
    let (mut live, mut peak) = (0, 0);
    for step in 0..300_000 {
        let (from, to) = match shape {
            Shape::Pairs => (step % (CPUS / 2) * 2, step % (CPUS / 2) * 2 + 1),
            Shape::FanIn => (1 + step % (CPUS - 1), 0),
            Shape::FanOut => (0, 1 + step % (CPUS - 1)),
            Shape::Ring => (step % CPUS, (step + 1) % CPUS),
            // One CPU produces for a while and is idle from then on.
            Shape::Bursts => (step / 30_000 % CPUS, CPUS - 1 - step / 30_000 % CPUS),
            Shape::OneOwner => (0, 0),
        };
        play_cpu(from);
        let piece = Piece::new(&heap, len).unwrap();
        live += piece.len();
        queues[to].push_back(piece);
        peak = peak.max(live);
        if queues[to].len() > QUEUE {
            play_cpu(to);
            for piece in queues[to].drain(..QUEUE / 2) {
                live -= piece.len();
                piece.free(&heap);
            }
        }
    }
    let held = heap.provider().peak_len();
    for (cpu, queue) in queues.into_iter().enumerate() {
        play_cpu(cpu);
        queue.into_iter().for_each(|piece| piece.free(&heap));
        heap.drain_current();
    }
    all_back(&heap, 1);
    (held, peak)
}

/// Within the formula; and of what is live, whoever frees it, a quarter more than a CPU that makes and frees all of it,
/// and a constant for each CPU.
#[test]
fn what_is_handed_over_stays_within_the_formula() {
    for len in [64, 1024, 16 << 10] {
        let (held, live) = handed_over(Shape::OneOwner, len);
        let share = held as f64 / live as f64;
        for shape in [Shape::Pairs, Shape::FanIn, Shape::FanOut, Shape::Ring, Shape::Bursts] {
            let (held, live) = handed_over(shape, len);
            let class = SizeClass::of(Layout::from_size_align(len, 8).unwrap());
            let most = live + worst_case_overhead(CPUS, class, live);
            let near = (1.25 * share * live as f64) as usize + CPUS * CPU_LEN;
            let [live_kib, held_kib, most_kib, near_kib] = [live, held, most, near].map(|len| len >> 10);
            println!(
                "{shape:?} of {len} B: {live_kib} KiB live, {held_kib} KiB held, formula {most_kib}, near {near_kib}"
            );
            assert!(held <= most && held <= near, "{shape:?} of {len} B");
            assert!(most <= 4 * live + 32 * MIB, "a formula that allows anything says nothing");
        }
    }
}

/// A load that comes and goes, with `maintain` in between.
#[test]
fn maintain_keeps_what_is_used_and_returns_the_rest_in_steps() {
    const LOAD_LEN: usize = 12 * MIB;
    play_cpu(0);
    let heap = heap();
    let load = || {
        let pieces: Vec<_> = (0..LOAD_LEN / 4096).map(|_| Piece::new(&heap, 4096).unwrap()).collect();
        pieces.into_iter().for_each(|piece| piece.free(&heap));
    };
    load();
    heap.maintain(1000);
    load();
    let calls = || heap.stats().map_count + heap.stats().unmap_count;
    let before = calls();
    for _ in 0..25 {
        load();
        heap.maintain(1000);
    }
    let busy_calls = calls() - before;
    println!("25 busy rounds: {busy_calls} calls of the provider");
    assert!(busy_calls <= 25, "{busy_calls} calls for a load that comes again and again");
    heap.drain_current();
    let mut held = vec![heap.provider().held_len()];
    for calls in [5, 15, 180] {
        (0..calls).for_each(|_| _ = heap.maintain(1000));
        held.push(heap.provider().held_len());
    }
    println!("idle: {held:?} bytes after 0, 5, 20, 200 calls");
    assert!(held.windows(2).all(|pair| pair[1] <= pair[0]) && held[2] < held[1], "in steps: {held:?}");
    assert!(held[1] > LOAD_LEN / 4, "not all at once: {held:?}");
    assert!(held[3] <= 2 * MIB, "nearly everything in the end: {held:?}");
    all_back(&heap, 1);
}

#[test]
fn maintain_looks_at_as_many_bins_as_it_may() {
    play_cpu(0);
    let heap = heap();
    let mut pieces: Vec<_> = (0..32 << 10).map(|_| Piece::new(&heap, 1024).unwrap()).collect();
    // So few that nothing goes to the provider.
    pieces.drain(28 << 10..).for_each(|piece| piece.free(&heap));
    heap.drain_current();
    let wholes = || heap.stats().classes.iter().map(|class| class.empty_count).sum::<u64>();
    let before = wholes();
    assert!(before > 2, "there is a reserve: {before}");
    heap.maintain(0);
    assert_eq!(wholes(), before, "no bin was looked at");
    heap.maintain(usize::MAX);
    assert_eq!(wholes(), before.saturating_sub(16).max(1), "16 slabs of a bin, but for one");
    (0..10).for_each(|_| _ = heap.maintain(usize::MAX));
    assert_eq!(wholes(), 1, "one stays");
    pieces.into_iter().for_each(|piece| piece.free(&heap));
    all_back(&heap, 1);
}

/// What a CPU that has gone held serves the others before new pages do; when it comes back it counts again.
#[test]
fn a_cpu_that_goes_leaves_everything_to_the_others() {
    let heap = heap();
    play_cpu(1);
    let pieces: Vec<_> = (0..20_000).map(|_| Piece::new(&heap, 256).unwrap()).collect();
    let (kept, freed): (Vec<_>, Vec<_>) = pieces.into_iter().enumerate().partition(|(number, _)| number % 2 == 0);
    freed.into_iter().for_each(|(_, piece)| piece.free(&heap));
    play_cpu(0);
    Piece::new(&heap, 256).unwrap().free(&heap);
    assert!(heap.stats().cpus[1].cached_count > 0);
    let (held, slabs) = (heap.provider().held_len(), heap.stats().slab_len);
    // SAFETY: this thread plays both CPUs, and is not inside the heap.
    assert!(unsafe { heap.retire_cpu(1) });
    let stats = heap.stats();
    assert!(stats.cpus[1].cached_count == 0 && !stats.cpus[1].is_used);
    let more: Vec<_> = (0..9000).map(|_| Piece::new(&heap, 256).unwrap()).collect();
    assert_eq!(heap.stats().slab_len, slabs, "no new slab while the one that went has blocks");
    assert_eq!(heap.provider().held_len(), held);
    heap.verify_all().unwrap();
    play_cpu(1);
    let back: Vec<_> = (0..100).map(|_| Piece::new(&heap, 256).unwrap()).collect();
    assert!(heap.stats().cpus[1].is_used, "it came back");
    play_cpu(0);
    more.into_iter().chain(back).chain(kept.into_iter().map(|(_, piece)| piece)).for_each(|piece| piece.free(&heap));
    // SAFETY: as above.
    assert!(!unsafe { heap.retire_cpu(CPUS) }, "there is none");
    // SAFETY: as above.
    assert!(unsafe { heap.retire_cpu(5) }, "it has never used the heap");
    all_back(&heap, 2);
}

/// Joined and lent blocks: each is whole, disjoint, counted, and returns to its slab as what it was.
#[test]
#[cfg(not(feature = "hardened"))]
fn free_neighbours_serve_a_longer_class_and_return_as_they_were() {
    play_cpu(0);
    let heap: Tested = Heap::new(limited(MIB), Pinned(ThreadCpu));
    let short: Vec<_> = core::iter::from_fn(|| Piece::new(&heap, 32)).collect();
    let (count, full) = (short.len(), heap.stats());
    // Every tenth stays, in each slab; so there is no page for another class.
    let (kept, freed): (Vec<_>, Vec<_>) = short.into_iter().enumerate().partition(|(number, _)| number % 10 == 0);
    let kept: Vec<_> = kept.into_iter().map(|(_, piece)| piece).collect();
    freed.into_iter().for_each(|(_, piece)| piece.free(&heap));
    heap.drain_current();
    let long: Vec<_> = core::iter::from_fn(|| Piece::new(&heap, 128)).collect();
    heap.verify_all().unwrap();
    let live = |len: usize| {
        let stats = heap.stats();
        stats.classes.iter().find(|class| class.block_len == len).unwrap().live_count as usize
    };
    println!("{} of {count} blocks of 32 B stay; {} of 128 B where they were", kept.len(), long.len());
    assert!(long.len() > count / 8, "{} blocks of 128 bytes beside {} of 32", long.len(), kept.len());
    assert_eq!((live(32), live(128)), (kept.len(), long.len()));
    assert_eq!(heap.stats().held_len, full.held_len);
    long.into_iter().for_each(|piece| piece.free(&heap));
    assert_eq!((live(32), live(128)), (kept.len(), 0));
    heap.verify_all().unwrap();
    let again: Vec<_> = core::iter::from_fn(|| Piece::new(&heap, 32)).collect();
    assert!(again.len() + kept.len() + 64 >= count, "{} and {} of {count}", again.len(), kept.len());
    again.into_iter().chain(kept).for_each(|piece| piece.free(&heap));
    all_back(&heap, 1);
}

/// A heap that is full of short blocks of which every 100th stays: pages inside of slabs serve what is longer than any
/// slab's blocks, and the slabs work on.
#[test]
#[cfg(not(feature = "debug-heap"))]
fn free_pages_inside_slabs_serve_long_blocks() {
    play_cpu(0);
    let heap: Tested = Heap::new(limited(32 * MIB), Pinned(ThreadCpu));
    let short: Vec<_> = core::iter::from_fn(|| Piece::new(&heap, 512)).collect();
    let (count, full_len) = (short.len(), heap.stats().slab_len);
    let (kept, freed): (Vec<_>, Vec<_>) = short.into_iter().enumerate().partition(|(number, _)| number % 100 == 0);
    freed.into_iter().for_each(|(_, piece)| piece.free(&heap));
    heap.drain_current();
    let before = heap.stats();
    let long: Vec<_> = core::iter::from_fn(|| Piece::new(&heap, 40 << 10)).collect();
    heap.verify_all().unwrap();
    let after = heap.stats();
    println!("{} of {count} blocks stay, {} of 40 KiB between them; slabs {}", kept.len(), long.len(), after.slab_len);
    assert!(long.len() * (40 << 10) > full_len / 4, "{} blocks in {full_len} bytes of slabs", long.len());
    assert_eq!(after.held_len, before.held_len);
    long.into_iter().for_each(|piece| piece.free(&heap));
    let again: Vec<_> = core::iter::from_fn(|| Piece::new(&heap, 512)).collect();
    heap.verify_all().unwrap();
    assert!(again.len() + kept.len() > count / 10 * 9, "{} and {} of {count}", again.len(), kept.len());
    let kept = kept.into_iter().map(|(_, piece)| piece);
    again.into_iter().chain(kept).for_each(|piece| piece.free(&heap));
    all_back(&heap, 1);
}

#[test]
fn a_huge_block_asks_for_relief_as_long_as_it_helps() {
    let provider = Faulty::new(HostPages::<true, true>::default());
    provider.set_limit(MIB);
    provider.set_relief(256 << 10, usize::MAX);
    let heap: Heap<_, _, 2> = Heap::new(provider, Hint(UnknownCpu));
    play_cpu(0);
    let layout = Layout::from_size_align(4 * MIB, 4096).unwrap();
    let block = heap.alloc(layout).expect("after it was asked for relief often enough");
    assert_eq!(heap.provider().on(Call::Relieve).made(), 12, "a quarter of a MiB each time");
    // SAFETY: just allocated with this Layout, and never used.
    unsafe { heap.free(block.cast(), layout) };
    all_back(&heap, 1);
}

//! A heap for each zone of memory: ordinary memory, memory that 32-bit devices reach, memory that is not cached.
//!
//! Would catch breaking: heaps keep to themselves, whatever their providers; a block of a zone has the zone's
//! properties, page by page; one zone that is out of memory leaves the others alone; each gets its own back.
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits; addresses have 64 bits")]

mod common;

use core::alloc::GlobalAlloc;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::block::Block;
use common::paging::{Provider, free_frames, translate};
use common::sizes::random_size;
use common::slots::Slots;
use smp_heap::battery::Random;
use smp_heap::{CpuHint, Heap, Hint, RegionProvider};
use smp_heap_kernel::arch::cpu_count;
use smp_heap_kernel::{Boot, Region, cpu, interrupts, kernel, println, smp, test};
use x86_64::structures::paging::PageTableFlags;

const CPUS: usize = 8;
const FOUR_GIB: usize = 4 << 30;
const DMA_LEN: usize = 16 << 20;
const UNCACHED_LEN: usize = 64 << 20;

#[derive(Debug)]
struct Index;

impl CpuHint for Index {
    fn current_cpu(&self) -> Option<usize> {
        Some(cpu::index())
    }

    fn may_wait(&self) -> bool {
        interrupts::are_enabled()
    }
}

/// Which memory.
#[derive(Clone, Copy, Debug)]
enum Zone {
    Normal,
    /// Below 4 GiB, and each block in one piece, as its region is.
    Dma32,
    Uncached,
}

static NORMAL: Heap<RegionProvider<4>, Hint<Index>, CPUS> = Heap::new(RegionProvider::new(), Hint(Index));
static DMA32: Heap<RegionProvider<1>, Hint<Index>, CPUS> = Heap::new(RegionProvider::new(), Hint(Index));
static UNCACHED: Heap<Provider<false, true>, Hint<Index>, CPUS> =
    Heap::new(Provider::new(common::paging::Pages), Hint(Index));

impl Zone {
    const ALL: [Self; 3] = [Self::Normal, Self::Dma32, Self::Uncached];

    /// The zone's heap, whatever its type.
    fn heap(self) -> &'static dyn GlobalAlloc {
        match self {
            Self::Normal => &NORMAL,
            Self::Dma32 => &DMA32,
            Self::Uncached => &UNCACHED,
        }
    }

    /// Checks a block's memory: every page of it.
    fn check(self, addr: usize, len: usize) {
        let physical = |addr| match translate(addr) {
            Some(found) => found,
            None => test::fail(format_args!("{addr:#x} of {self:?} is not mapped")),
        };
        let (first, _) = physical(addr);
        for page in (addr..addr + len).step_by(4096).chain([addr + len - 1]) {
            let (place, flags) = physical(page);
            let right = match self {
                Self::Normal => place >= FOUR_GIB,
                Self::Dma32 => place < FOUR_GIB && place - first == page - addr,
                Self::Uncached => place < FOUR_GIB,
            };
            let cached = !flags.contains(PageTableFlags::NO_CACHE);
            assert!(right && cached != matches!(self, Self::Uncached), "{self:?}: {page:#x} is {place:#x}, {flags:?}");
        }
    }
}

static BLOCKS: [Slots<64>; 3] = [const { Slots::new() }; 3];
static MADE: AtomicUsize = AtomicUsize::new(0);

kernel! {
    fn main(boot: &Boot) {
        let all = give_memory(boot);
        for round in 0..boot.rounds(3) {
            smp::on_all(|cpu| work(&mut Random::new((round * CPUS + cpu) as u64)));
        }
        test::did(MADE.load(Relaxed), "blocks");
        dma_is_out(all);
        smp::on_all(|cpu| {
            for (zone, blocks) in Zone::ALL.iter().zip(&BLOCKS) {
                blocks.free_part(zone.heap(), cpu, cpu_count());
            }
        });
        // SAFETY: the other CPUs wait for a job, and no interrupt handler uses the heaps.
        assert!(unsafe { NORMAL.verify_at_rest() }.is_ok());
        // SAFETY: as above.
        assert!(unsafe { DMA32.verify_at_rest() }.is_ok());
        // SAFETY: as above.
        assert!(unsafe { UNCACHED.verify_at_rest() }.is_ok());
        // SAFETY: as above.
        _ = unsafe { NORMAL.trim_at_rest() };
        // SAFETY: as above.
        _ = unsafe { DMA32.trim_at_rest() };
        // SAFETY: as above.
        _ = unsafe { UNCACHED.trim_at_rest() };
        let held = [NORMAL.provider().held_len(), DMA32.provider().held_len(), UNCACHED.provider().mapped_len()];
        assert_eq!((held, DMA32.provider().free_len(), free_frames()), ([0; 3], DMA_LEN, all));
        let strays = [NORMAL.stats().stray_count, DMA32.stats().stray_count, UNCACHED.stats().stray_count];
        assert_eq!(strays, [0; 3]);
    }
}

/// Memory above 4 GiB for the ordinary heap; below it, a region in one piece and frames. Gives the number of frames.
fn give_memory(boot: &Boot) -> usize {
    let largest = |above: bool| {
        let regions = boot.regions().iter().filter(|region| (region.start >= FOUR_GIB) == above);
        match regions.max_by_key(|region| region.len) {
            Some(region) => *region,
            None => test::fail(format_args!("no memory {} 4 GiB: {boot:?}", if above { "above" } else { "below" })),
        }
    };
    let (high, low) = (largest(true), largest(false));
    println!("{} MiB above 4 GiB, {} below", high.len >> 20, low.len >> 20);
    let dma = Region { len: DMA_LEN, ..low };
    // SAFETY: RAM that the boot code left to this kernel, and that the kernel gives away here; likewise below.
    let normal = unsafe { NORMAL.provider().add_region(high.as_ptr(), high.len) };
    // SAFETY: as above.
    let dma = unsafe { DMA32.provider().add_region(dma.as_ptr(), dma.len) };
    assert_eq!((normal, dma), (Ok(()), Ok(())));
    common::paging::set_up(Region { start: low.start + DMA_LEN, len: UNCACHED_LEN });
    common::paging::open(UNCACHED.provider(), 0, 4 << 30);
    free_frames()
}

/// Blocks of every zone, freed by whoever comes upon them.
fn work(random: &mut Random) {
    smp::barrier();
    for step in 0..100 {
        let turn = random.below(3);
        let (Some(zone), Some(blocks)) = (Zone::ALL.get(turn), BLOCKS.get(turn)) else { return };
        let size = if random.below(8) == 0 { random.below(200 << 10) } else { random_size(random) };
        let Some(block) = Block::new(zone.heap(), size, 8, step as u8) else {
            test::fail(format_args!("{zone:?} has no memory for {size} bytes"));
        };
        MADE.fetch_add(1, Relaxed);
        let start = block.into_start();
        // SAFETY: just taken out of the block.
        let block = unsafe { Block::from_start(start) };
        zone.check(start.addr().get(), block.check().size());
        if let Some(old) = blocks.swap(random.below(64), Some(block)) {
            old.free(zone.heap());
        }
    }
}

/// When one zone has nothing left, the others serve.
fn dma_is_out(frames: usize) {
    static TAKEN: Slots<32> = Slots::new();
    let count = AtomicUsize::new(0);
    while let Some(block) = Block::new(Zone::Dma32.heap(), 1 << 20, 4096, 1) {
        TAKEN.swap(count.fetch_add(1, Relaxed), Some(block));
    }
    let count = count.into_inner();
    println!("{count} MiB of {} for devices", DMA_LEN >> 20);
    assert!((6..DMA_LEN >> 20).contains(&count), "{count} blocks of 1 MiB");
    for zone in [Zone::Normal, Zone::Uncached] {
        let block = Block::new(zone.heap(), 5 << 20, 4096, 2);
        assert!(block.is_some(), "{zone:?} serves no more");
        block.into_iter().for_each(|block| block.free(zone.heap()));
    }
    assert!(free_frames() <= frames);
    TAKEN.free_part(Zone::Dma32.heap(), 0, 1);
}

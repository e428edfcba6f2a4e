//! Unit tests of the region provider.

use super::*;
use core::alloc::Layout;
use core::time::Duration;
use std::sync::{Arc, mpsc};
use std::vec::Vec;
use std::{format, thread};

const KIB: usize = 1024;

/// Host memory that starts `odd` bytes behind a multiple of 2 MiB. Declared before the provider that uses it.
struct Area {
    base: NonNull<u8>,
    layout: Layout,
    odd: usize,
    len: usize,
}

// SAFETY: The area is plain memory of its owner's.
unsafe impl Send for Area {}
// SAFETY: As above; the methods hand out a pointer only.
unsafe impl Sync for Area {}

impl Area {
    fn new(odd: usize, len: usize) -> Self {
        let layout = Layout::from_size_align(odd + len + 1, 2 << 20).unwrap();
        // SAFETY: The layout has at least one byte.
        let base = NonNull::new(unsafe { std::alloc::alloc(layout) }).unwrap();
        Self { base, layout, odd, len }
    }

    fn start(&self) -> *mut u8 {
        self.base.as_ptr().wrapping_add(self.odd)
    }

    fn add_to<const N: usize>(&self, provider: &RegionProvider<N>) -> Result<(), RegionError> {
        // SAFETY: The area is ours, and the tests drop it after the provider.
        unsafe { provider.add_region(self.start(), self.len) }
    }

    fn holds(&self, run: &Mapped) -> bool {
        let start = run.start.as_ptr().addr();
        start >= self.start().addr() && start + run.run.len() <= self.start().addr() + self.len
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: Allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// A run that is full of its own tag, so that an overlap cannot pass.
struct Mapped {
    start: NonNull<u8>,
    run: PageRun,
    tag: u64,
}

impl Mapped {
    fn map<const N: usize>(provider: &RegionProvider<N>, run: PageRun, tag: u64) -> Option<Self> {
        let start = provider.map(run)?;
        assert_eq!(start.as_ptr().addr() % run.align(), 0);
        let mapped = Self { start, run, tag };
        for word in 0..run.len() / 8 {
            // SAFETY: Inside the run, which the provider just gave.
            unsafe { start.as_ptr().cast::<u64>().wrapping_add(word).write(tag ^ word as u64) };
        }
        Some(mapped)
    }

    fn check(&self) {
        for word in 0..self.run.len() / 8 {
            // SAFETY: Inside the run, written by `map`.
            let found = unsafe { self.start.as_ptr().cast::<u64>().wrapping_add(word).read() };
            assert_eq!(found, self.tag ^ word as u64, "another run wrote into this one");
        }
    }

    fn unmap_untouched<const N: usize>(self, provider: &RegionProvider<N>) {
        // SAFETY: Mapped, given back here once, not used after.
        assert!(unsafe { provider.unmap(self.start, self.run) });
    }

    fn unmap<const N: usize>(self, provider: &RegionProvider<N>) {
        self.check();
        // SAFETY: Mapped by `map`, given back here once (tried again when refused), not used after.
        while !unsafe { provider.unmap(self.start, self.run) } {
            thread::yield_now();
        }
    }
}

fn run(len: usize, align: usize) -> PageRun {
    PageRun::new(len, align, PAGE_LEN).unwrap()
}

fn random(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 16) as usize
}

/// Fails, instead of hanging, when `work` waits for ever.
fn ends(work: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let worker = thread::spawn(move || {
        work();
        done.send(()).unwrap();
    });
    if ended.recv_timeout(Duration::from_secs(20)) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("waited for ever");
    }
    worker.join().unwrap();
}

#[test]
fn a_region_serves_exactly_its_whole_pages() {
    // (bytes behind a multiple of 2 MiB, length, pages)
    let cases = [
        (0, 0, 0),
        (0, 1, 0),
        (0, 1023, 0),
        (1, 1024, 0),
        (1, 2046, 0),
        (0, 1024, 1),
        (1023, 1025, 1),
        (0, 4096, 4),
        (1, 4096, 3),
        (1016, 4096, 3),
        (8, 4095, 3),
        (0, 100 * KIB, 100),
        (77, 100 * KIB, 99),
    ];
    for (odd, len, pages) in cases {
        let area = Area::new(odd, len);
        let provider = RegionProvider::<2>::new();
        if pages == 0 {
            assert_eq!(area.add_to(&provider), Err(RegionError::TooSmall), "{odd} {len}");
            assert_eq!((provider.region_count(), provider.free_len()), (0, 0));
            continue;
        }
        area.add_to(&provider).unwrap();
        assert_eq!(provider.free_len(), pages * KIB, "{odd} {len}");
        let mut held = Vec::new();
        while let Some(mapped) = Mapped::map(&provider, run(1, 1), held.len() as u64) {
            assert!(area.holds(&mapped));
            held.push(mapped);
        }
        assert_eq!(held.len(), pages, "{odd} {len}");
        assert_eq!((provider.held_len(), provider.free_len()), (pages * KIB, 0));
        held.into_iter().for_each(|mapped| mapped.unmap(&provider));
        assert_eq!((provider.held_len(), provider.free_len()), (0, pages * KIB));
        Mapped::map(&provider, run(pages * KIB, KIB), 0).unwrap().unmap(&provider);
    }
}

#[test]
fn without_a_region_everything_is_refused() {
    let provider = RegionProvider::<3>::new();
    assert_eq!(provider.map(run(1, 1)), None);
    assert_eq!(provider.prefer(run(5000, 1)), run(5000, 1));
    // SAFETY: Not a run of the provider, which is what the test shows to be refused; nothing is touched.
    assert!(!unsafe { provider.unmap(NonNull::dangling(), run(1, 1)) });
}

/// Also at the ends of the address space, of which nothing is touched here.
#[test]
fn the_first_and_the_last_page_are_left_out() {
    let last = usize::MAX - (KIB - 1);
    assert_eq!(Span::of_pages(0, KIB - 1), None);
    assert_eq!(Span::of_pages(0, 9 * KIB - 1), Some(Span { start: KIB, end: 9 * KIB }));
    assert_eq!(Span::of_pages(last, usize::MAX), None);
    assert_eq!(Span::of_pages(last - 4 * KIB, usize::MAX), Some(Span { start: last - 4 * KIB, end: last }));
    let provider = RegionProvider::<1>::new();
    for start in [0, last] {
        // SAFETY: refused before it is touched.
        let added = unsafe { provider.add_region(core::ptr::without_provenance_mut(start), KIB) };
        assert_eq!(added, Err(RegionError::TooSmall));
    }
}

/// Pieces of one area, in random orders, while runs of those that are there are out.
#[test]
fn regions_that_touch_are_one_in_any_order() {
    const PIECE_LEN: usize = 8 * KIB;
    for seed in 1..60 {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed);
        let count = 2 + random(&mut state) % 99;
        let area = Area::new(KIB, count * PIECE_LEN);
        let provider = RegionProvider::<1>::new();
        let mut left: Vec<usize> = (0..count).collect();
        let mut held: Vec<Mapped> = Vec::new();
        while !left.is_empty() {
            let at = left.swap_remove(random(&mut state) % left.len()) * PIECE_LEN;
            // SAFETY: a piece of the area, once.
            unsafe { provider.add_region(area.start().wrapping_add(at), PIECE_LEN) }.unwrap();
            let len = KIB + random(&mut state) % (12 * KIB);
            held.extend(Mapped::map(&provider, run(len, 1), left.len() as u64));
            if random(&mut state) % 2 == 0 && !held.is_empty() {
                held.swap_remove(random(&mut state) % held.len()).unmap(&provider);
            }
        }
        assert_eq!(provider.region_count(), 1, "seed {seed}");
        let sum: usize = held.iter().map(|mapped| mapped.run.len()).sum();
        assert_eq!((provider.held_len(), provider.free_len()), (sum, count * PIECE_LEN - sum), "seed {seed}");
        held.into_iter().for_each(|mapped| mapped.unmap(&provider));
        Mapped::map(&provider, run(count * PIECE_LEN, 1), 1).unwrap().unmap(&provider);
    }
}

/// While somebody looks there, or is in a region that is to move, the page stays.
#[test]
fn a_table_is_not_given_back_while_it_is_looked_at() {
    let area = Area::new(0, 12 * KIB);
    let provider = RegionProvider::<1>::new();
    // SAFETY: parts of the area, once each.
    let add =
        |start: usize, len: usize| unsafe { provider.add_region(area.start().wrapping_add(start * KIB), len * KIB) };
    add(0, 4).unwrap();
    add(8, 4).unwrap();
    assert_eq!((provider.region_count(), provider.free_len()), (2, 7 * KIB));
    provider.readers.fetch_add(1, Ordering::Relaxed);
    add(4, 2).unwrap();
    add(6, 2).unwrap();
    assert_eq!((provider.region_count(), provider.free_len()), (1, 11 * KIB));
    provider.readers.fetch_sub(1, Ordering::Relaxed);
    provider.drop_tables();
    assert_eq!(provider.free_len(), 12 * KIB);
    Mapped::map(&provider, run(12 * KIB, 1), 1).unwrap().unmap(&provider);
}

/// A page holds the slots of a dozen, and is part of the first of them.
#[test]
fn more_regions_than_slots_take_a_page_for_their_slots() {
    let area = Area::new(0, 400 * KIB);
    let provider = RegionProvider::<2>::new();
    for index in 0..100 {
        // SAFETY: pieces of the area that do not touch.
        unsafe { provider.add_region(area.start().wrapping_add(index * 4 * KIB), 2 * KIB) }.unwrap();
    }
    assert_eq!(provider.region_count(), 100);
    let tables = 98_usize.div_ceil(TABLE_SLOTS);
    assert_eq!(provider.free_len(), 200 * KIB - tables * KIB);
    let held: Vec<_> = (0..100).filter_map(|tag| Mapped::map(&provider, run(2 * KIB, 1), tag)).collect();
    assert_eq!(held.len(), 100 - tables);
    held.into_iter().for_each(|mapped| mapped.unmap(&provider));
    for index in (0..100).rev() {
        // SAFETY: what lies between.
        unsafe { provider.add_region(area.start().wrapping_add(index * 4 * KIB + 2 * KIB), 2 * KIB) }.unwrap();
    }
    assert_eq!((provider.region_count(), provider.free_len()), (1, 400 * KIB), "the pages of slots have gone back");
    Mapped::map(&provider, run(400 * KIB, 1), 1).unwrap().unmap(&provider);
}

#[test]
fn what_cannot_be_a_region_is_refused_and_costs_nothing() {
    let area = Area::new(0, 64 * KIB);
    let provider = RegionProvider::<2>::new();
    let add = |start, len| {
        // SAFETY: Inside the area, or refused before it is touched.
        unsafe { provider.add_region(start, len) }
    };
    let at = |offset| area.start().wrapping_add(offset);
    assert_eq!(add(core::ptr::null_mut(), 1000), Err(RegionError::TooSmall));
    assert_eq!(add(at(0), usize::MAX), Err(RegionError::Wraps));
    assert_eq!(add(at(0), isize::MAX as usize + 1), Err(RegionError::Wraps));
    assert_eq!(add(core::ptr::without_provenance_mut(usize::MAX - 4095), 4097), Err(RegionError::Wraps));
    assert_eq!(add(at(0), 0), Err(RegionError::TooSmall));
    assert_eq!(add(core::ptr::without_provenance_mut(usize::MAX - 10), 4), Err(RegionError::TooSmall));
    add(at(8 * KIB), 8 * KIB).unwrap();
    let held = Mapped::map(&provider, run(8 * KIB, 1), 1).unwrap();
    for (start, len) in [(8, 8), (0, 64), (0, 9), (15, 1), (15, 9), (10, 2), (7, 2)] {
        assert_eq!(add(at(start * KIB), len * KIB), Err(RegionError::Overlaps), "{start} {len}");
    }
    held.check();
    // Neighbours on both sides overlap nothing.
    add(at(0), 8 * KIB).unwrap();
    add(at(16 * KIB), 8 * KIB).unwrap();
    assert_eq!((provider.region_count(), provider.free_len()), (1, 16 * KIB));
    held.unmap(&provider);
    assert_eq!(provider.free_len(), 24 * KIB);
    assert!(format!("{provider:?} {}", RegionError::Overlaps).contains("free_len: 24576"));
}

#[test]
fn a_second_adder_is_told_that_the_first_is_busy() {
    ends(|| {
        let area = Area::new(0, 4096);
        let provider = RegionProvider::<2>::new();
        let adding = provider.adding.try_lock();
        assert_eq!(area.add_to(&provider), Err(RegionError::Busy));
        drop(adding);
        area.add_to(&provider).unwrap();
    });
}

#[test]
fn mixed_runs_are_disjoint_aligned_and_all_come_back() {
    for (odd, len) in [(0, 8 << 20), (1, (8 << 20) - 3), (777, 100 * KIB), (9000, 3 << 20)] {
        let mut seed = 0x9e37_79b9_7f4a_7c15 ^ (odd + len) as u64;
        let areas = [Area::new(odd, len), Area::new(odd + 5, len)];
        let provider = RegionProvider::<2>::new();
        areas.iter().for_each(|area| area.add_to(&provider).unwrap());
        let free_len = provider.free_len();
        let mut held: Vec<Mapped> = Vec::new();
        for step in 0..2000 {
            let align = KIB << (random(&mut seed) % 12);
            let len = 1 + random(&mut seed) % (KIB << (random(&mut seed) % 10));
            if random(&mut seed) % 3 > 0 {
                if let Some(mapped) = Mapped::map(&provider, run(len, align), step) {
                    assert!(areas.iter().any(|area| area.holds(&mapped)));
                    held.push(mapped);
                }
            } else if !held.is_empty() {
                held.swap_remove(random(&mut seed) % held.len()).unmap(&provider);
            }
            let sum: usize = held.iter().map(|mapped| mapped.run.len()).sum();
            assert_eq!((provider.held_len(), provider.free_len()), (sum, free_len - sum));
        }
        held.into_iter().for_each(|mapped| mapped.unmap(&provider));
        let whole = [(); 2].map(|()| Mapped::map(&provider, provider.prefer(run(1, 1)), 1).unwrap());
        assert_eq!(provider.free_len(), 0);
        whole.into_iter().for_each(|mapped| mapped.unmap(&provider));
    }
}

#[test]
fn padding_in_front_of_an_aligned_run_stays_usable() {
    let mut align = KIB;
    while align <= 2 << 20 {
        // Starts one page behind a multiple of 2 MiB: as much padding as there can be.
        let area = Area::new(KIB, 4 << 20);
        let provider = RegionProvider::<1>::new();
        area.add_to(&provider).unwrap();
        let aligned = Mapped::map(&provider, run(align, align), 1).unwrap();
        let mut rest = Vec::new();
        while let Some(mapped) = Mapped::map(&provider, run(1, 1), 2) {
            rest.push(mapped);
        }
        assert_eq!(rest.len() * KIB + align, 4 << 20);
        aligned.unmap(&provider);
        rest.into_iter().for_each(|mapped| mapped.unmap(&provider));
        Mapped::map(&provider, run(4 << 20, KIB), 3).unwrap().unmap(&provider);
        align *= 2;
    }
}

#[test]
fn a_lock_that_stays_held_is_not_waited_for() {
    ends(|| {
        let areas = [Area::new(0, 4096), Area::new(0, 4096)];
        let provider = RegionProvider::<2>::new();
        areas[0].add_to(&provider).unwrap();
        let first = Mapped::map(&provider, run(1, 1), 1).unwrap();
        // As if this context had interrupted the holder.
        let guard = provider.first[0].list.try_lock().unwrap();
        assert_eq!(provider.map(run(1, 1)), None);
        // SAFETY: Mapped above; it is refused, so it stays ours.
        assert!(!unsafe { provider.unmap(first.start, first.run) });
        // The others go on, old and new, and so do the questions.
        areas[1].add_to(&provider).unwrap();
        let second = Mapped::map(&provider, run(1, 1), 2).unwrap();
        assert!(areas[1].holds(&second));
        second.unmap(&provider);
        assert_eq!(areas[0].add_to(&provider), Err(RegionError::Overlaps));
        assert_eq!((provider.held_len(), provider.free_len()), (KIB, 7 * KIB));
        drop(guard);
        first.unmap(&provider);
        assert_eq!(provider.held_len(), 0);
    });
}

#[test]
fn a_lock_is_looked_at_a_bounded_number_of_times() {
    let areas = [Area::new(0, 4096), Area::new(0, 4096), Area::new(0, 4096)];
    let provider = RegionProvider::<3>::new();
    areas.iter().for_each(|area| area.add_to(&provider).unwrap());
    let held = Mapped::map(&provider, run(1, 1), 1).unwrap();
    let lock = |index: usize| provider.first[index].list.try_lock();
    let mut looks = 0;
    // An open region serves at once, whoever holds the others.
    let guards = [lock(0), lock(1)];
    let start = provider.map_with(run(1, 1), SPIN_LIMIT, &mut || looks += 1).unwrap();
    Mapped { start, run: run(1, 1), tag: held.tag }.unmap_untouched(&provider);
    assert_eq!(looks, 0);
    // Three held ones cost no more than one, and an open one is not forgotten because of them.
    let mut guard = lock(2);
    assert_eq!(provider.map_with(run(1, 1), SPIN_LIMIT, &mut || looks += 1), None);
    assert_eq!(looks, SPIN_LIMIT);
    looks = 0;
    let mut open_late = || {
        looks += 1;
        if looks == SPIN_LIMIT / 2 {
            guard = None;
        }
    };
    let start = provider.map_with(run(1, 1), SPIN_LIMIT, &mut open_late).unwrap();
    Mapped { start, run: run(1, 1), tag: held.tag }.unmap_untouched(&provider);
    // Giving back waits as long, then refuses.
    looks = 0;
    // SAFETY: Mapped above; it is refused, so it stays ours.
    let taken = unsafe { provider.unmap_with(held.start, held.run, &mut || looks += 1) };
    assert_eq!((taken, looks), (false, SPIN_LIMIT));
    let mut guards = Some(guards);
    // SAFETY: Mapped above, not used after.
    let taken = unsafe { provider.unmap_with(held.start, held.run, &mut || guards = None) };
    assert!(taken);
    assert_eq!(provider.held_len(), 0);
}

#[test]
fn what_lies_in_no_region_is_not_taken_back() {
    let area = Area::new(0, 64 * KIB);
    let provider = RegionProvider::<1>::new();
    // SAFETY: The middle of the area.
    unsafe { provider.add_region(area.start().wrapping_add(16 * KIB), 32 * KIB) }.unwrap();
    let held = Mapped::map(&provider, run(16 * KIB, 1), 1).unwrap();
    for (offset, len, align) in [
        (0, KIB, KIB),
        (8 * KIB, 9 * KIB, KIB),
        (48 * KIB, KIB, KIB),
        (40 * KIB, 9 * KIB, KIB),
        (16 * KIB, 32 * KIB, KIB),
        (17 * KIB, KIB, 2 * KIB),
        (16 * KIB + 8, KIB, KIB),
    ] {
        let start = NonNull::new(area.start().wrapping_add(offset)).unwrap();
        // SAFETY: No run of the provider; the test shows that it is refused before anything is touched.
        let taken = unsafe { provider.unmap(start, run(len, align)) };
        assert!(!taken, "{offset} {len} {align}");
    }
    held.unmap(&provider);
    Mapped::map(&provider, run(32 * KIB, 1), 1).unwrap().unmap(&provider);
}

#[test]
fn a_run_made_with_shorter_pages_is_rounded_up() {
    let area = Area::new(0, 8 * KIB);
    let provider = RegionProvider::<1>::new();
    area.add_to(&provider).unwrap();
    let odd = PageRun::new(24, 8, 8).unwrap();
    let held: Vec<_> = (0..8).map(|tag| Mapped::map(&provider, odd, tag).unwrap()).collect();
    assert_eq!(provider.map(odd), None);
    held.into_iter().for_each(|mapped| mapped.unmap(&provider));
    Mapped::map(&provider, run(8 * KIB, 1), 1).unwrap().unmap(&provider);
}

#[test]
fn no_address_passes_the_end_of_the_address_space() {
    let top = usize::MAX - (KIB - 1);
    let span = Span { start: top - 100 * KIB, end: top };
    assert!(span.serves(run(100 * KIB, KIB)));
    assert!(Span { start: top - (9 << 20), end: top - (1 << 20) }.serves(run(KIB, 512 * KIB)));
    assert!(!span.serves(run(101 * KIB, KIB)));
    // A hole above the last multiple of 2 MiB there is would be aligned to address 0.
    let span = Span { start: usize::MAX - (4 << 20) + 1, end: top };
    assert_eq!(span.room(2 << 20), (4 << 20) - KIB);
    assert!(!span.serves(run(KIB, 2 << 20)));
    assert!(!span.serves(run(KIB, 1 << (usize::BITS - 2))));
    assert!(span.serves(run((4 << 20) - KIB, KIB)));
}

#[test]
fn the_longest_run_is_preferred() {
    let (small, large) = (Area::new(3, 100 * KIB), Area::new(1, 24 << 20));
    let provider = RegionProvider::<2>::new();
    small.add_to(&provider).unwrap();
    assert_eq!(provider.prefer(run(1, 1)), run(99 * KIB, 1));
    let whole = provider.prefer(run(4096, 4096));
    assert_eq!(whole, run(96 * KIB, 4096));
    let held = Mapped::map(&provider, whole, 1).unwrap();
    // Three pages are left in front of it: what is asked, or all of them.
    assert_eq!(provider.prefer(run(1, 1)), run(3 * KIB, 1));
    assert_eq!(provider.prefer(run(4096, 1)), run(4096, 1));
    held.unmap(&provider);
    // Two holes: the longer one.
    let below = Mapped::map(&provider, run(40 * KIB, 1), 1).unwrap();
    let held = Mapped::map(&provider, run(10 * KIB, 1), 1).unwrap();
    below.unmap(&provider);
    assert_eq!(provider.prefer(run(4096, 1)), run(49 * KIB, 1));
    assert_eq!(provider.prefer(run(70 * KIB, 1)), run(70 * KIB, 1));
    held.unmap(&provider);

    large.add_to(&provider).unwrap();
    assert_eq!(provider.prefer(run(4096, 1)), run((24 << 20) - KIB, 1));
    let held = Mapped::map(&provider, provider.prefer(run(16 * KIB, 16 * KIB)), 1).unwrap();
    assert_eq!(held.run.len(), (24 << 20) - 16 * KIB);
    held.unmap(&provider);
    assert_eq!(provider.held_len(), 0);
}

#[test]
fn threads_share_regions_that_are_added_meanwhile() {
    ends(|| {
        let areas: Arc<Vec<Area>> = Arc::new((0..4).map(|i| Area::new(i * 100, 256 * KIB)).collect());
        let provider = RegionProvider::<4>::new();
        areas[0].add_to(&provider).unwrap();
        let added = AtomicUsize::new(1);
        thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (provider, areas, added) = (&provider, &areas, &added);
                scope.spawn(move || {
                    let mut seed = 77 + thread;
                    let mut held: Vec<Mapped> = Vec::new();
                    for step in 0..2000 {
                        if step % 100 == 0 {
                            let area = &areas[random(&mut seed) % 4];
                            match area.add_to(provider) {
                                Ok(()) => _ = added.fetch_add(1, Ordering::Relaxed),
                                Err(error) => {
                                    assert!([RegionError::Overlaps, RegionError::Busy].contains(&error));
                                }
                            }
                        }
                        let wish = run(1 + random(&mut seed) % (16 * KIB), KIB << (random(&mut seed) % 5));
                        if held.len() < 8 {
                            held.extend(Mapped::map(provider, wish, thread << 32 | step));
                        } else {
                            held.swap_remove(random(&mut seed) % 8).unmap(provider);
                        }
                    }
                    held.into_iter().for_each(|mapped| mapped.unmap(provider));
                });
            }
        });
        assert_eq!(provider.region_count(), added.into_inner());
        assert_eq!(provider.held_len(), 0);
        let count = provider.region_count();
        let whole: Vec<_> =
            (0..count).map(|tag| Mapped::map(&provider, run(255 * KIB, 1), tag as u64).unwrap()).collect();
        whole.into_iter().for_each(|mapped| mapped.unmap(&provider));
    });
}

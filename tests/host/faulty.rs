//! The provider with faults on demand: each knob does what it says, and the books are right whatever fails.

use std::ptr::NonNull;
use std::sync::{Barrier, Mutex};

use smp_heap::battery::{Call, Faulty, Moment};
use smp_heap::{PageProvider, PageRun, RegionProvider};

use crate::common::{Books, Memory, limited};
use crate::host_pages::HostPages;

const PAGE: usize = 4096;

fn run(pages: usize) -> PageRun {
    PageRun::new(pages * PAGE, PAGE, PAGE).unwrap()
}

/// Maps so many pages, and gives back at once what there is; whether there was any.
fn comes<P: PageProvider>(provider: &P, pages: usize) -> bool {
    // SAFETY: just mapped, and used by nobody.
    provider.map(run(pages)).is_some_and(|start| unsafe { provider.unmap(start, run(pages)) })
}

/// Which of ten calls of `map` succeed, as ones.
fn ten(provider: &Books) -> String {
    (0..10).map(|_| if comes(provider, 1) { '1' } else { '0' }).collect()
}

#[test]
fn the_kth_calls_fail_and_no_others() {
    let provider = Books::default();
    let map = provider.on(Call::Map);
    assert_eq!(ten(&provider), "1111111111");
    for (skip, count, expected) in [
        (0, 1, "0111111111"),
        (3, 1, "1110111111"),
        (2, 4, "1100001111"),
        (6, usize::MAX, "1111110000"),
        (usize::MAX, 1, "1111111111"),
        (1, usize::MAX, "1000000000"),
        (0, 0, "1111111111"),
    ] {
        let (made, failed) = (map.made(), map.failed());
        map.fail(skip, count);
        assert_eq!(ten(&provider), expected, "({skip}, {count})");
        let zeros = expected.matches('0').count();
        assert_eq!((map.made() - made, map.failed() - failed), (10, zeros), "({skip}, {count})");
    }
    let unmap = provider.on(Call::Unmap);
    assert_eq!((unmap.made(), unmap.failed()), (map.made() - map.failed(), 0));
    assert_eq!((provider.held_len(), provider.peak_len()), (0, PAGE));
}

#[test]
fn a_share_of_calls_fails_spread_and_the_same_each_time() {
    let outcome = |share| {
        let provider = Books::default();
        provider.on(Call::Map).fail_share(share);
        (0..1000).map(|_| comes(&provider, 1)).collect::<Vec<_>>()
    };
    for (share, expected) in [(0, 0), (1, 4), (64, 250), (128, 500), (255, 996), (256, 1000)] {
        let (first, second) = (outcome(share), outcome(share));
        assert_eq!(first, second, "{share} of 256");
        let failed = first.iter().filter(|came| !**came).count();
        assert!(failed.abs_diff(expected) <= 3, "{failed} of 1000 with {share} of 256");
        // Neither half has them all.
        let early = first[..500].iter().filter(|came| !**came).count();
        assert!(early.abs_diff(expected / 2) <= 3, "{early} of 500 with {share} of 256");
    }
}

#[test]
fn the_limit_is_on_all_bytes_held_and_relief_adds_to_it() {
    let provider = limited(4 * PAGE);
    let held = provider.map(run(3)).unwrap();
    assert!(!comes(&provider, 2) && comes(&provider, 1) && provider.try_map(run(2)).is_none());
    assert_eq!((provider.held_len(), provider.peak_len()), (3 * PAGE, 4 * PAGE));
    assert!(!provider.relieve(run(2)), "nobody helps");
    provider.set_relief(PAGE, 2);
    for pages in [2, 3] {
        assert!(!comes(&provider, pages) && provider.relieve(run(pages)) && comes(&provider, pages));
    }
    assert!(!provider.relieve(run(4)) && !comes(&provider, 4));
    assert_eq!((provider.on(Call::Relieve).made(), provider.on(Call::Relieve).failed()), (4, 2));
    provider.set_limit(0);
    assert!(!comes(&provider, 1));
    provider.set_limit(5 * PAGE);
    provider.set_relief(usize::MAX, 1);
    assert!(provider.relieve(run(1)) && comes(&provider, 100), "a limit does not overflow");
    // SAFETY: mapped above, and used by nobody.
    assert!(unsafe { provider.unmap(held, run(3)) });
    assert_eq!((provider.held_len(), provider.peak_len()), (0, 103 * PAGE));
}

#[test]
fn short_runs_are_refused_below_the_least() {
    let provider = Books::default();
    provider.set_least(3 * PAGE);
    assert_eq!([1, 2, 3, 4].map(|pages| comes(&provider, pages)), [false, false, true, true]);
    assert_eq!((provider.on(Call::Map).failed(), provider.held_len(), provider.peak_len()), (2, 0, 4 * PAGE));
}

#[test]
fn a_provider_that_keeps_all_takes_it_back_later() {
    let provider = Books::default();
    let start = provider.map(run(2)).unwrap();
    provider.on(Call::Unmap).fail(0, usize::MAX);
    // SAFETY: mapped above, and used by nobody.
    let unmap = || unsafe { provider.unmap(start, run(2)) };
    assert!(!unmap() && !unmap());
    assert_eq!(provider.held_len(), 2 * PAGE);
    provider.on(Call::Unmap).fail(0, 0);
    assert!(unmap());
    assert_eq!((provider.held_len(), provider.on(Call::Unmap).failed()), (0, 2));
}

#[test]
fn books_follow_a_run_that_changes_its_length() {
    let provider = Faulty::new(HostPages::<true, true>::default());
    provider.set_limit(6 * PAGE);
    let start = provider.map(run(4)).unwrap();
    // SAFETY: mapped above, as long as said, and used by nobody; so are the others below.
    let resize = |old, new| unsafe { provider.resize(start, run(old), run(new)) };
    provider.on(Call::Resize).fail(0, 1);
    assert!(!resize(4, 3));
    assert_eq!(provider.held_len(), 4 * PAGE);
    assert!(resize(4, 3) && !resize(3, 5), "the host grows nothing in place");
    assert_eq!(provider.held_len(), 3 * PAGE);
    // SAFETY: as above.
    let remap = |new| unsafe { provider.remap(start, run(3), run(new)) };
    provider.on(Call::Remap).fail(0, 1);
    assert!(remap(5).is_none() && remap(7).is_none(), "by order, and beyond the limit");
    assert_eq!((provider.held_len(), provider.peak_len()), (3 * PAGE, 4 * PAGE));
    let moved = remap(6).unwrap();
    assert_eq!((provider.held_len(), provider.peak_len()), (6 * PAGE, 6 * PAGE));
    assert_eq!((provider.on(Call::Resize).failed(), provider.on(Call::Remap).failed()), (2, 2));
    // SAFETY: as above.
    assert!(unsafe { provider.unmap(moved, run(6)) });
    assert_eq!(provider.held_len(), 0);
}

#[test]
fn a_hook_runs_around_each_call_and_turns_knobs_for_it() {
    static SEEN: Mutex<Vec<(Call, Moment)>> = Mutex::new(Vec::new());
    static PROVIDER: Faulty<HostPages> = Faulty::with_hook(HostPages::aligned(1), |call, moment| {
        SEEN.lock().unwrap().push((call, moment));
        if SEEN.lock().unwrap().len() == 1 {
            PROVIDER.on(Call::Map).fail(0, 1);
        }
        if moment == Moment::After {
            assert!(PROVIDER.on(call).made() > 0, "counted");
        }
    });
    assert!(PROVIDER.map(run(1)).is_none(), "the hook said so");
    assert!(comes(&PROVIDER, 1));
    PROVIDER.relieve(run(1));
    let both = |call| [(call, Moment::Before), (call, Moment::After)];
    let expected = [Call::Map, Call::Map, Call::Unmap, Call::Relieve].map(both).concat();
    assert_eq!(*SEEN.lock().unwrap(), expected);
}

#[test]
#[cfg_attr(miri, ignore = "times are not those of a machine")]
fn a_slow_provider_takes_its_time() {
    let provider = Books::default();
    let shortest = || {
        let time = |_| {
            let start = std::time::Instant::now();
            assert!(comes(&provider, 1));
            start.elapsed()
        };
        (0..20).map(time).min().unwrap()
    };
    let quick = shortest();
    provider.set_delay(100_000);
    let slow = shortest();
    assert!(slow > 2 * quick, "{slow:?} and {quick:?}");
}

/// What each method of a provider was asked with.
#[derive(Default)]
struct Asked(Mutex<Vec<&'static str>>);

impl Asked {
    fn note<T>(&self, what: &'static str, answer: T) -> T {
        self.0.lock().unwrap().push(what);
        answer
    }
}

// SAFETY: it gives nothing.
unsafe impl PageProvider for Asked {
    const PAGE_LEN: usize = 2048;
    const ZEROED: bool = true;
    const REENTRANT: bool = true;
    const REMAPS: bool = true;
    const GUARDS: bool = true;
    const DECOMMITS: bool = true;

    fn map(&self, _: PageRun) -> Option<NonNull<u8>> {
        self.note("map", None)
    }
    fn try_map(&self, _: PageRun) -> Option<NonNull<u8>> {
        self.note("try_map", None)
    }
    unsafe fn unmap(&self, _: NonNull<u8>, _: PageRun) -> bool {
        self.note("unmap", false)
    }
    unsafe fn decommit(&self, _: NonNull<u8>, _: PageRun) -> bool {
        self.note("decommit", true)
    }
    unsafe fn commit(&self, _: NonNull<u8>, _: PageRun) -> bool {
        self.note("commit", true)
    }
    unsafe fn resize(&self, _: NonNull<u8>, _: PageRun, _: PageRun) -> bool {
        self.note("resize", false)
    }
    unsafe fn remap(&self, _: NonNull<u8>, _: PageRun, _: PageRun) -> Option<NonNull<u8>> {
        self.note("remap", None)
    }
    fn could_give(&self, _: PageRun) -> bool {
        self.note("could_give", false)
    }
    fn prefer(&self, _: PageRun) -> PageRun {
        self.note("prefer", PageRun::new(1 << 20, 4096, 2048).unwrap())
    }
    fn is_busy(&self) -> bool {
        self.note("is_busy", true)
    }
    fn relieve(&self, _: PageRun) -> bool {
        self.note("relieve", true)
    }
}

/// Every method and every constant is the provider's below, and a call that fails does not get there.
#[test]
fn all_of_a_provider_shows_through() {
    type Over = Faulty<Asked>;
    const CONSTANTS: [bool; 5] = [Over::ZEROED, Over::REENTRANT, Over::REMAPS, Over::GUARDS, Over::DECOMMITS];
    assert_eq!((Over::PAGE_LEN, CONSTANTS), (2048, [true; 5]));
    let (of_regions, regions) = (<Faulty<RegionProvider<2>>>::PAGE_LEN, RegionProvider::<2>::PAGE_LEN);
    assert_eq!((of_regions, <Faulty<RegionProvider<2>>>::ZEROED), (regions, false));
    let memory = Memory::new(PAGE, PAGE);
    let start = NonNull::new(memory.start()).unwrap();
    let provider = Over::default();
    let ask = || {
        let run = run(1);
        assert!(provider.map(run).is_none() && provider.try_map(run).is_none());
        // SAFETY: the provider takes and does nothing.
        assert!(!unsafe { provider.unmap(start, run) });
        // SAFETY: as above.
        let decommitted = unsafe { provider.decommit(start, run) };
        // SAFETY: as above.
        let committed = unsafe { provider.commit(start, run) };
        // SAFETY: as above.
        assert!(!unsafe { provider.resize(start, run, run) });
        // SAFETY: as above.
        assert!(unsafe { provider.remap(start, run, run) }.is_none());
        (decommitted, committed, provider.relieve(run))
    };
    assert_eq!(ask(), (true, true, true));
    let asked = || std::mem::take(&mut *provider.inner().0.lock().unwrap());
    assert_eq!(asked(), ["map", "try_map", "unmap", "decommit", "commit", "resize", "remap", "relieve"]);
    let calls = [Call::Map, Call::Unmap, Call::Decommit, Call::Commit, Call::Resize, Call::Remap, Call::Relieve];
    let counts = || calls.map(|call| (provider.on(call).made(), provider.on(call).failed()));
    assert_eq!(counts(), [(2, 2), (1, 1), (1, 0), (1, 0), (1, 1), (1, 1), (1, 0)]);
    calls.into_iter().for_each(|call| provider.on(call).fail(0, usize::MAX));
    assert_eq!(ask(), (false, false, false));
    assert!(asked().is_empty(), "they failed on the way");
    assert_eq!(counts(), [(4, 4), (2, 2), (2, 1), (2, 1), (2, 2), (2, 2), (2, 1)]);
    let preferred = PageRun::new(1 << 20, 4096, 2048);
    assert_eq!(
        (provider.could_give(run(1)), Some(provider.prefer(run(1))), provider.is_busy()),
        (false, preferred, true)
    );
    assert_eq!(asked(), ["could_give", "prefer", "is_busy"]);
    assert_eq!(counts()[0], (4, 4), "these are not counted");
    assert_eq!((provider.held_len(), provider.peak_len()), (0, 0));
}

/// Callers at once on four threads: the limit is never passed, and the sums are right.
#[test]
fn books_are_right_when_many_call_at_once() {
    const TURNS: usize = if cfg!(miri) { 50 } else { 2000 };
    let (provider, start) = (limited(8 * PAGE), Barrier::new(4));
    let place = provider.map(run(1)).unwrap().as_ptr().expose_provenance();
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (provider, start) = (&provider, &start);
            scope.spawn(move || {
                let place = NonNull::new(std::ptr::with_exposed_provenance_mut(place)).unwrap();
                start.wait();
                for turn in 0..TURNS {
                    comes(provider, 1 + (number + turn) % 5);
                    for _ in 0..20 {
                        // Counted and discounted at once.
                        // SAFETY: the run mapped above, which this provider does not move.
                        assert!(unsafe { provider.remap(place, run(1), run(2)) }.is_none());
                    }
                }
            });
        }
    });
    let (map, unmap) = (provider.on(Call::Map), provider.on(Call::Unmap));
    assert_eq!((map.made(), unmap.made(), unmap.failed()), (4 * TURNS + 1, 4 * TURNS - map.failed(), 0));
    assert_eq!(provider.held_len(), PAGE);
    assert!((6 * PAGE..=8 * PAGE).contains(&provider.peak_len()), "{}", provider.peak_len());
    assert!(comes(&provider, 7) && !comes(&provider, 8));
}

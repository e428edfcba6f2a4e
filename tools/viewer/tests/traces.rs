//! Traces of real work, recorded in the test kernel and in Linux (`traces/`, whose README says how), replayed on heaps
//! of this machine.
#![expect(clippy::unwrap_used, reason = "a failed check ends a test, which is what a test is for")]

use std::{fs, path::Path};

use smp_heap::{Heap, Hint, RegionProvider};
use smp_heap_view::{PlayedCpu, Step, Trace, parse_trace, replay, unpack};

fn traces() -> Vec<(String, Trace)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("traces");
    let mut traces: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "gz"))
        .map(|path| {
            let bytes = fs::read(&path).unwrap();
            assert!(bytes.len() < 1 << 20, "{} is too long to keep", path.display());
            (path.display().to_string(), parse_trace(&unpack(&bytes).unwrap()).unwrap())
        })
        .collect();
    traces.sort_by(|(one, _), (other, _)| one.cmp(other));
    traces
}

/// Of another kernel, whose slabs are not told of.
fn is_linux(name: &str) -> bool {
    name.contains("/linux-")
}

type Tested = Heap<RegionProvider<1>, Hint<PlayedCpu>, 8>;

fn heap(len: usize) -> Tested {
    let heap = Tested::new(RegionProvider::new(), Hint(PlayedCpu));
    let memory = vec![0_u64; len / 8].leak();
    // SAFETY: leaked, so nobody else uses it.
    unsafe { heap.provider().add_region(memory.as_mut_ptr().cast(), len) }.unwrap();
    heap
}

/// The most in use at once: after what was freed, and what grew.
fn the_peak_counts_frees_and_growth() {
    let log = "smp-heap v1 events cpu=0 time=1 dropped=0 list=a0:1000:100:3,f1:1000:100:3,a1:2000:90:3,r1:2000:a0:3,r1:2000:10:3";
    let seen = replay(&parse_trace(log).unwrap(), &heap(1 << 20), true).unwrap();
    assert_eq!((seen.allocs, seen.peak_live_len), (2, 0x100));
    let log = log.replace("r1:2000:a0:3", "r1:2000:108:3");
    assert_eq!(replay(&parse_trace(&log).unwrap(), &heap(1 << 20), true).unwrap().peak_live_len, 0x108);
}

/// Replays play one CPU at a time by a number that all of them share, so they take turns: one test does them all.
#[test]
fn recorded_work_replays_whole_twice_over_and_leaves_nothing() {
    the_peak_counts_frees_and_growth();
    let traces = traces();
    let linux = traces.iter().filter(|(name, _)| is_linux(name)).count();
    assert!(linux >= 2 && traces.len() - linux >= 3, "{} traces", traces.len());
    for (name, trace) in &traces {
        let cpus = if is_linux(name) { 1 } else { 2 };
        assert!(trace.steps.len() > 3_000 && trace.cpu_count == cpus, "{name}: {} steps", trace.steps.len());
        assert_eq!(trace.overlaps, 0, "{name}: an address was given twice, or the clocks disagree");
        let kinds = |kind: fn(&Step) -> bool| trace.steps.iter().filter(|(_, step)| kind(step)).count();
        assert!(kinds(|step| matches!(step, Step::Free { .. })) > 1000, "{name}");
        assert!(trace.unknown == 0 || !is_linux(name), "{name}: frees of what was not allocated");
        let has_slabs = "lu".chars().all(|kind| trace.others.contains_key(&kind));
        assert!(has_slabs != is_linux(name), "{name}: {:?}", trace.others);
        let heap = heap(256 << 20);
        let first = replay(trace, &heap, true).unwrap();
        // SAFETY: the replay has ended, and its threads with it.
        assert_eq!(unsafe { heap.verify_at_rest() }, Ok(()), "{name}");
        let stats = heap.stats();
        assert_eq!((stats.live_len(), stats.stray_count), (0, 0), "{name}\n{stats}");
        let again = replay(trace, &heap, true).unwrap();
        assert_eq!((first.allocs, first.peak_live_len), (again.allocs, again.peak_live_len));
        // SAFETY: as above.
        unsafe { heap.trim_at_rest() };
        assert_eq!(heap.stats().held_len, 0, "{name}");
        println!("{name}: {} steps, {first:?}", trace.steps.len());
    }
}

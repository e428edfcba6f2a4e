//! Free ranges against a model that has a flag for each byte of a small piece of the address space.

use core::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;
use smp_heap_maps::{Entry, Free, Kind};

/// So many bytes of address space are looked at.
const WINDOW: u64 = 160;

/// Where they lie: at the bottom, across 4 GiB, and at the very top.
const BASES: [u64; 3] = [0, (1 << 32) - 64, u64::MAX - (WINDOW - 1)];

#[derive(Clone, Debug)]
struct Case {
    base: u64,
    /// Start, length and kind of each entry.
    entries: Vec<(u64, u64, Kind)>,
    map: Vec<Entry>,
    without: Vec<Range<u64>>,
    from: u64,
    below: Option<u64>,
    page_len: u64,
    and: Option<Kind>,
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![4 => Just(Kind::Free), 1 => Just(Kind::Loader), 1 => Just(Kind::Acpi), 2 => Just(Kind::Used)]
}

/// A start in the window and a length that mostly stays in it, sometimes is 0, sometimes leaves the address space.
fn piece() -> impl Strategy<Value = (u64, u64)> {
    (0..WINDOW, prop_oneof![1 => Just(0), 20 => 1..48_u64, 1 => Just(u64::MAX)])
}

fn case() -> impl Strategy<Value = Case> {
    (
        (prop::sample::select(&BASES[..]), vec((piece(), kind()), 0..24), vec(piece(), 0..4)),
        (0..WINDOW / 2, prop::option::of(0..WINDOW), 0..5_u32, prop::option::of(kind())),
    )
        .prop_map(|((base, entries, without), (from, below, shift, and))| Case {
            base,
            entries: entries.iter().map(|((start, len), kind)| (base + start, *len, *kind)).collect(),
            map: entries.iter().map(|((start, len), kind)| Entry::new(base + start, *len, *kind)).collect(),
            without: without.into_iter().map(|(start, len)| base + start..(base + start).saturating_add(len)).collect(),
            from: if base == 0 { from } else { base.saturating_sub(8) + from },
            below: below.map(|offset| base + offset),
            page_len: 1 << shift,
            and,
        })
}

impl Case {
    fn free(&self) -> Free<'_, &[Entry]> {
        let free = Free::new(&self.map[..]).without(&self.without).from(self.from).pages(self.page_len);
        let free = self.below.map_or(free, |address| free.below(address));
        self.and.map_or(free, |kind| free.and(kind))
    }

    /// Whether the byte may be given, by the words of the documentation.
    fn byte(&self, address: u64) -> bool {
        let is_free = |kind: Kind| kind == Kind::Free || (self.and == Some(kind) && kind != Kind::Used);
        let said = || {
            let holds = |start: u64, len: u64| {
                (u128::from(start)..u128::from(start) + u128::from(len)).contains(&address.into())
            };
            self.entries.iter().filter(move |(start, len, _)| holds(*start, *len)).map(|(_, _, kind)| *kind)
        };
        said().any(is_free)
            && said().all(is_free)
            && address >= self.from
            && self.below.is_none_or(|below| address < below)
            && !self.without.iter().any(|range| range.contains(&address))
    }

    fn page(&self, start: u64) -> bool {
        start.checked_add(self.page_len).is_some_and(|end| (start..end).all(|address| self.byte(address)))
    }

    /// The free ranges that have a page in the window, cut at its ends.
    fn model(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let window = self.base..self.base.saturating_add(WINDOW);
        for start in window.step_by(1).filter(|start| start % self.page_len == 0) {
            if !self.page(start) {
                continue;
            }
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end += self.page_len,
                _ => ranges.push(start..start + self.page_len),
            }
        }
        ranges
    }
}

/// Cuts what an endless entry gives above the window.
fn in_window(case: &Case, range: Range<u64>) -> Option<Range<u64>> {
    let end = case.base.saturating_add(WINDOW);
    let end = if end == u64::MAX { u64::MAX } else { end.next_multiple_of(case.page_len) };
    let cut = range.start..range.end.min(end);
    (cut.start < cut.end).then_some(cut)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn ranges_are_the_models(case in case()) {
        let found: Vec<_> = case.free().ranges().filter_map(|range| in_window(&case, range)).collect();
        prop_assert_eq!(found, case.model());
    }

    #[test]
    fn longest_first_is_the_same_set_sorted(case in case()) {
        let free = case.free();
        let mut by_len: Vec<_> = free.ranges().collect();
        by_len.sort_by_key(|range| (u64::MAX - (range.end - range.start), range.start));
        prop_assert_eq!(free.longest_first().collect::<Vec<_>>(), by_len);
        prop_assert_eq!(free.ranges().map(|range| range.end - range.start).sum::<u64>(), free.total_len());
    }
}

//! A window's addresses, page by page.

use super::*;
use crate::battery::Random;
use std::vec::Vec;

const START: usize = 0x7000_0000_0000;

fn open(len: usize) -> Window<4> {
    let mut window = Window::new();
    window.open(START, START + len).unwrap();
    window
}

#[test]
fn a_longer_window_has_longer_slots_and_loses_no_more_than_one() {
    for (len, slot_len) in [(PAGE, PAGE), (256 * PAGE, PAGE), (257 * PAGE, 2 * PAGE), (1 << 30, 4 << 20)] {
        let window = open(len);
        assert_eq!(window.slot_len(), slot_len, "{len}");
        assert!(window.len() <= len && window.len() + slot_len > len, "{len}");
        assert_eq!(window.free_len(), window.len());
    }
    let mut odd = Window::<4>::new();
    odd.open(START + PAGE, START + PAGE + (1 << 20) + PAGE).unwrap();
    assert_eq!(odd.start % odd.slot_len(), 0);
    assert!(odd.start + odd.len() <= START + (1 << 20) + 2 * PAGE);
}

#[test]
fn a_window_without_a_slot_is_refused_and_changes_nothing() {
    let mut window = open(1 << 20);
    assert!(window.open(START, START + PAGE - 1).is_none());
    assert!(window.open(START, START - 1).is_none());
    assert!(window.open(usize::MAX - PAGE, usize::MAX).is_none());
    assert!(Window::<0>::new().open(START, START + PAGE).is_none());
    assert_eq!((window.start, window.len()), (START, 1 << 20));
    assert!(Window::<4>::new().reserve(PAGE, PAGE, Place::Lowest).is_none(), "not open yet");
}

#[test]
fn lowest_fills_from_below_and_roomy_goes_to_the_middle() {
    let mut window = open(256 * PAGE);
    assert_eq!(window.reserve(10 * PAGE, PAGE, Place::Lowest), Some(START));
    assert_eq!(window.reserve(1, PAGE, Place::Lowest), Some(START + 10 * PAGE));
    let middle = window.reserve(5 * PAGE, PAGE, Place::Roomy).unwrap();
    assert_eq!(middle, START + (11 + (245 - 5) / 2) * PAGE);
    assert!(window.extend(middle, middle + 5 * PAGE, middle + 100 * PAGE), "there is room to grow");
    // Too long for any middle: from the hole's start.
    let long = window.reserve(100 * PAGE, PAGE, Place::Roomy).unwrap();
    assert_eq!(long, START + 11 * PAGE);
}

#[test]
fn alignment_beyond_the_slot_is_kept_or_refused() {
    let mut window = open(256 * PAGE);
    window.reserve(PAGE, PAGE, Place::Lowest).unwrap();
    for place in [Place::Lowest, Place::Roomy] {
        let start = window.reserve(PAGE, 64 * PAGE, place).unwrap();
        assert_eq!(start % (64 * PAGE), 0);
    }
    assert!(window.reserve(PAGE, 1 << 62, Place::Lowest).is_none());
    assert!(window.reserve(256 * PAGE, PAGE, Place::Lowest).is_none());
    assert!(window.reserve(usize::MAX, PAGE, Place::Lowest).is_none());
    assert!(window.reserve(0, PAGE, Place::Lowest).is_none());
}

#[test]
fn a_run_grows_up_to_its_neighbour_and_shrinks_by_whole_slots() {
    let mut window = open(512 * PAGE);
    assert_eq!(window.slot_len(), 2 * PAGE);
    let (first, second) = (START, START + 8 * PAGE);
    assert_eq!(window.reserve(3 * PAGE, PAGE, Place::Lowest), Some(first));
    assert!(window.extend(first, first + 3 * PAGE, first + 4 * PAGE), "inside its slot");
    assert!(window.extend(first, first + 4 * PAGE, first + 8 * PAGE));
    assert_eq!(window.reserve(PAGE, PAGE, Place::Lowest), Some(second));
    let free_len = window.free_len();
    assert!(!window.extend(first, first + 8 * PAGE, first + 9 * PAGE), "a neighbour's");
    assert!(!window.extend(second, second + PAGE, START + 513 * PAGE), "behind the window");
    assert_eq!(window.free_len(), free_len);
    window.release(first, first + 3 * PAGE, first + 8 * PAGE);
    assert_eq!(window.free_len(), free_len + 4 * PAGE);
    assert!(window.holds(first, first + 4 * PAGE) && !window.holds(first, first + 5 * PAGE));
    window.release(first, first, first + 3 * PAGE);
    assert!(!window.holds(first, first + 1) && window.holds(second, second + 2 * PAGE));
    assert!(!window.holds(second + PAGE, second + 2 * PAGE), "no slot starts there");
    assert!(!window.holds(START - PAGE, START) && !window.holds(second, second));
}

/// A model of one bool a slot beside the window.
#[test]
fn random_runs_never_overlap_and_all_come_back() {
    let mut random = Random::new(7);
    let mut window = open(250 * PAGE);
    let all = window.free_len();
    let mut model = [false; 250];
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let span = |start: usize, len: usize| {
        let first = (start - START) / PAGE;
        first..first + len / PAGE
    };
    for _ in 0..20_000 {
        let len = PAGE * (1 + random.below(30));
        match random.below(4) {
            0 | 1 => {
                let (align, place) = (PAGE << random.below(4), [Place::Lowest, Place::Roomy][random.below(2)]);
                let Some(start) = window.reserve(len, align, place) else { continue };
                assert_eq!(start % align, 0);
                for slot in &mut model[span(start, len)] {
                    assert!(!core::mem::replace(slot, true), "given twice");
                }
                runs.push((start, len));
            }
            2 if !runs.is_empty() => {
                let (start, len) = runs.swap_remove(random.below(runs.len()));
                assert!(window.holds(start, start + len));
                window.release(start, start, start + len);
                model[span(start, len)].fill(false);
            }
            _ if !runs.is_empty() => {
                let index = random.below(runs.len());
                let (start, old) = runs[index];
                if len > old {
                    let free = model.get(span(start, len)).is_some_and(|s| !s[old / PAGE..].contains(&true));
                    assert_eq!(window.extend(start, start + old, start + len), free);
                    if !free {
                        continue;
                    }
                    model[span(start, len)].fill(true);
                } else {
                    window.release(start, start + len, start + old);
                    model[span(start, old)].fill(false);
                    model[span(start, len)].fill(true);
                }
                runs[index].1 = len;
            }
            _ => {}
        }
        let taken = model.iter().filter(|slot| **slot).count();
        assert_eq!(window.free_len(), all - taken * PAGE);
    }
    for (start, len) in runs {
        window.release(start, start, start + len);
    }
    assert_eq!(window.free_len(), all);
}

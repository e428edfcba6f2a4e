//! The heap as `#[global_allocator]`: the collections of `alloc` on every CPU at once, some of them shared between
//! CPUs.
//!
//! Would catch breaking: any Layout that the collections ask for is served, by alloc, realloc and alloc_zeroed, and
//! keeps its content; what one CPU allocated another may free (the last owner of an `Arc` is whoever comes last);
//! everything freed comes back. Timer interrupts allocate too, through `Vec`.
#![no_std]
#![no_main]

extern crate alloc;

mod common;

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use alloc::{format, vec};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use common::heaps::{CPUS, Regions, expect_left, give};
use smp_heap::battery::Random;
use smp_heap::cpu::NeverPreempts;
use smp_heap::{CpuHint, Heap, Pinned};
use smp_heap_kernel::{Boot, Hooks, cpu, interrupts, kernel, smp, test, timer};

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

// SAFETY: this kernel starts no threads, so a CPU runs one task and what interrupts it; each area has its own index.
const PIN: NeverPreempts<Index> = unsafe { NeverPreempts::new(Index) };

#[global_allocator]
static HEAP: Heap<Regions, Pinned<NeverPreempts<Index>>, CPUS> = Heap::new(Regions::new(), Pinned(PIN));

/// What CPUs share.
struct Text {
    words: Vec<String>,
    sum: usize,
}

static MADE: AtomicUsize = AtomicUsize::new(0);
static DROPPED: AtomicUsize = AtomicUsize::new(0);
/// One reference for each: whoever swaps it out owns it.
static SHELF: [AtomicPtr<Text>; 32] = [const { AtomicPtr::new(null_mut()) }; 32];
static TICKS: AtomicUsize = AtomicUsize::new(0);

impl Text {
    fn new(words: Vec<String>) -> Self {
        MADE.fetch_add(1, Ordering::Relaxed);
        let sum = words.iter().map(String::len).sum();
        Self { words, sum }
    }
}

impl Drop for Text {
    fn drop(&mut self) {
        assert_eq!(self.words.iter().map(String::len).sum::<usize>(), self.sum, "a shared text changed");
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

kernel! {
    hooks = Hooks { early: Some(early), ..Hooks::none() };
    fn main(boot: &Boot) {
        let rounds = boot.rounds(12);
        timer::set_handler(|_| {
            let count = TICKS.fetch_add(1, Ordering::Relaxed);
            let mut numbers = Vec::new();
            // In the middle of the heap there may be nothing at hand.
            if numbers.try_reserve_exact(9).is_ok() {
                numbers.extend([count; 9]);
                assert_eq!(numbers.iter().sum::<usize>(), 9 * count, "a handler's vector changed");
            }
        });
        smp::on_all(|cpu| {
            timer::start(500);
            smp::barrier();
            let mut random = Random::new(cpu as u64 + 1);
            for _ in 0..rounds {
                numbers(&mut random);
                map_of_strings(&mut random);
                queue(&mut random);
                shared(cpu, &mut random);
            }
            timer::stop();
        });
        SHELF.iter().for_each(|place| drop(swap(place, None)));
        let (made, dropped) = (MADE.load(Ordering::Relaxed), DROPPED.load(Ordering::Relaxed));
        test::did(made, "shared_texts");
        test::did(TICKS.load(Ordering::Relaxed), "interrupts");
        assert_eq!(made, dropped, "each text is dropped once");
        expect_left(0);
    }
}

fn early(boot: &Boot) {
    common::heaps::set_chosen(&HEAP);
    give(boot.largest_region());
}

/// Vectors that grow, shrink and become boxes.
fn numbers(random: &mut Random) {
    let count = 1 + random.below(20_000);
    let mut numbers: Vec<usize> = (0..count).collect();
    numbers.extend_from_within(..count / 2);
    numbers.truncate(count);
    numbers.shrink_to_fit();
    let boxed = numbers.into_boxed_slice();
    assert_eq!(boxed.iter().sum::<usize>(), count * (count - 1) / 2, "a vector of {count} numbers");
    assert!(vec![0_u8; count].iter().all(|byte| *byte == 0), "zeroed memory is not zero");
}

fn map_of_strings(random: &mut Random) {
    let mut map = BTreeMap::new();
    for _ in 0..300 {
        let key = random.below(1000);
        map.insert(key, format!("{key} in words of {}", "some length ".repeat(key % 7)));
        if key % 3 == 0 {
            map.remove(&random.below(1000));
        }
    }
    for (key, text) in map {
        assert!(
            text.starts_with(&key.to_string()) && text.len() == key.to_string().len() + 13 + key % 7 * 12,
            "{text}"
        );
    }
}

/// First in, first out, at both ends.
fn queue(random: &mut Random) {
    let mut queue = VecDeque::new();
    let mut next = 0;
    for number in 0..2000_usize {
        queue.push_back(Box::new(number));
        if random.below(3) == 0 {
            assert_eq!(queue.pop_front().as_deref(), Some(&next), "a queue lost its order");
            next += 1;
        }
    }
    assert!(queue.into_iter().map(|number| *number).eq(next..2000), "a queue lost its order");
}

fn swap(place: &AtomicPtr<Text>, new: Option<Arc<Text>>) -> Option<Arc<Text>> {
    let new = new.map_or(null_mut(), |text| Arc::into_raw(text).cast_mut());
    let old = place.swap(new, Ordering::AcqRel);
    // SAFETY: each pointer here came from `into_raw`, and the exchange took it out, so its reference is ours.
    (!old.is_null()).then(|| unsafe { Arc::from_raw(old) })
}

/// Puts references to one text everywhere, and drops those to other CPUs' texts.
fn shared(cpu: usize, random: &mut Random) {
    let words = (0..random.below(40)).map(|word| format!("word {word} of {cpu}")).collect();
    let text = Arc::new(Text::new(words));
    for place in &SHELF {
        let old = swap(place, Some(text.clone()));
        assert!(old.is_none_or(|old| old.sum < 40 * 20), "a shared text changed");
    }
}

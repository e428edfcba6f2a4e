//! Blocks that one thread takes and another gives back, and blocks that lie next to each other.

use std::collections::VecDeque;
use std::hint::black_box;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::{Group, Plan, Sizes, Slot, Work, Workload, apart, give_all, live_len, slots};
use crate::block::{give, size_in, take};
use crate::peers::Calls;

/// Blocks of one thread in `larson`.
const LARSON_LEN: usize = 5000;

/// Replacements before `larson` hands its blocks on.
const LARSON_TURN: usize = 10_000;

/// `larson`: a server's threads replace random blocks, and hand all of them to another thread from time to time.
struct Larson {
    slots: Box<Box<[Slot]>>,
    others: Arc<[Mailbox]>,
    sizes: Sizes,
    random: fastrand::Rng,
    first: bool,
    done: usize,
}

/// Where a thread leaves its blocks and takes another's.
struct Mailbox(AtomicPtr<Box<[Slot]>>);

impl Mailbox {
    fn holding(slots: Box<[Slot]>) -> Self {
        Self(AtomicPtr::new(Box::into_raw(Box::new(slots))))
    }

    fn exchange(&self, own: &mut Box<Box<[Slot]>>) {
        let mine = std::mem::replace(own, Box::new(Box::default()));
        let theirs = self.0.swap(Box::into_raw(mine), Ordering::AcqRel);
        // SAFETY: what is in a mailbox was a box, and who swaps it out has it alone.
        *own = unsafe { Box::from_raw(theirs) };
    }
}

impl Work for Larson {
    fn prepare(&mut self, calls: &Calls) {
        for slot in self.slots.iter_mut() {
            *slot = Slot::take(calls, self.sizes.next());
        }
    }

    fn round(&mut self, calls: &Calls) -> u64 {
        const ROUND: usize = 1000;
        for _ in 0..ROUND {
            let index = self.random.usize(..LARSON_LEN);
            let slot = &mut self.slots[index];
            slot.give_if_any(calls);
            *slot = Slot::take(calls, self.sizes.next());
        }
        self.done += ROUND;
        if self.done % LARSON_TURN == 0 {
            let index = self.random.usize(..self.others.len());
            self.others[index].exchange(&mut self.slots);
        }
        ROUND as u64
    }

    fn live_len(&self) -> usize {
        let others = if self.first { &self.others[..] } else { &[] };
        let between = others.iter().map(|mailbox| {
            let mut slots = Box::new(Box::default());
            mailbox.exchange(&mut slots);
            let len = live_len(&slots);
            mailbox.exchange(&mut slots);
            len
        });
        live_len(&self.slots) + between.sum::<usize>()
    }

    fn clear(&mut self, calls: &Calls) {
        give_all(&mut self.slots, calls);
        for mailbox in self.others.iter() {
            let mut empty = Box::new(Box::default());
            mailbox.exchange(&mut empty);
            give_all(&mut empty, calls);
        }
    }
}

fn larson(threads: usize) -> Plan {
    let others: Arc<[Mailbox]> = (0..threads).map(|_| Mailbox::holding(slots(LARSON_LEN))).collect();
    apart(threads, move |seed| Larson {
        slots: Box::new(slots(LARSON_LEN)),
        others: others.clone(),
        sizes: Sizes::new(seed, |random| random.usize(8..=1000)),
        random: fastrand::Rng::with_seed(seed),
        first: seed == 1,
        done: 0,
    })
}

/// Blocks in a crate of `xmalloc`.
const CRATE_LEN: usize = 120;

/// Crates on their way at most.
const CRATES: usize = 64;

type Crate = Box<[Slot]>;

/// Full crates one way, empty ones back.
#[derive(Default)]
struct Belt {
    state: Mutex<BeltState>,
    moved: Condvar,
}

#[derive(Default)]
struct BeltState {
    full: VecDeque<Crate>,
    empty: Vec<Crate>,
    closed: bool,
}

impl Belt {
    fn new() -> Self {
        let empty = (0..CRATES).map(|_| slots(CRATE_LEN)).collect();
        let state = BeltState { full: VecDeque::with_capacity(CRATES), empty, closed: false };
        Self { state: Mutex::new(state), moved: Condvar::new() }
    }

    /// Waits until `take` finds something. `None`: closed.
    fn wait(&self, take: impl Fn(&mut BeltState) -> Option<Crate>) -> Option<Crate> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.closed {
                return None;
            }
            if let Some(found) = take(&mut state) {
                return Some(found);
            }
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn put(&self, put: impl FnOnce(&mut BeltState)) {
        put(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.moved.notify_all();
    }

    fn close(&self) {
        self.put(|state| state.closed = true);
    }
}

/// `xmalloc`: threads that only take blocks, and threads that only give them back. Alone, a thread does both.
struct Xmalloc {
    belt: Arc<Belt>,
    takes: bool,
    gives: bool,
    first: bool,
    sizes: Sizes,
}

impl Work for Xmalloc {
    fn round(&mut self, calls: &Calls) -> u64 {
        if self.takes {
            let Some(mut load) = self.belt.wait(|state| state.empty.pop()) else { return 0 };
            for slot in &mut load {
                *slot = Slot::take(calls, self.sizes.next());
            }
            self.belt.put(|state| state.full.push_back(load));
        }
        if !self.gives {
            return 0;
        }
        let Some(mut load) = self.belt.wait(|state| state.full.pop_front()) else { return 0 };
        for slot in &mut load {
            slot.give(calls);
            *slot = Slot::EMPTY;
        }
        self.belt.put(|state| state.empty.push(load));
        CRATE_LEN as u64
    }

    fn live_len(&self) -> usize {
        if !self.first {
            return 0;
        }
        let state = self.belt.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.full.iter().map(|load| live_len(load)).sum()
    }

    fn clear(&mut self, calls: &Calls) {
        let mut state = self.belt.state.lock().unwrap_or_else(PoisonError::into_inner);
        for load in &mut state.full {
            give_all(load, calls);
        }
    }
}

fn xmalloc(threads: usize) -> Plan {
    let belt = Arc::new(Belt::new());
    let takers = threads / 2;
    let works = (0..threads).map(|index| {
        Box::new(Xmalloc {
            belt: belt.clone(),
            takes: threads == 1 || index < takers,
            gives: index >= takers,
            first: index == 0,
            sizes: Sizes::new(index as u64 + 1, |random| 8 << random.u32(..7)),
        }) as Box<dyn Work>
    });
    let works = works.collect();
    Plan { works, close: Box::new(move || belt.close()) }
}

/// The size that shares a cache line with its neighbours.
const LINE_SIZE: usize = 8;

/// How often a block is written before it is given back.
const WRITES: usize = 32;

/// `cache-scratch` and `cache-thrash`: a small block is taken, written again and again, given back. If two threads'
/// blocks lie in one cache line, they take it from each other with each write.
struct Scratch {
    /// A block that thread 0 took, next to those of the others.
    given: Arc<[AtomicPtr<u8>]>,
    index: usize,
    passive: bool,
}

impl Work for Scratch {
    fn prepare(&mut self, calls: &Calls) {
        if self.passive && self.index == 0 {
            for place in self.given.iter() {
                place.store(take(calls, LINE_SIZE), Ordering::Release);
            }
        }
    }

    fn round(&mut self, calls: &Calls) -> u64 {
        const ROUND: usize = 256;
        let given = self.given[self.index].swap(ptr::null_mut(), Ordering::AcqRel);
        if !given.is_null() {
            give(calls, given, LINE_SIZE);
        }
        for _ in 0..ROUND {
            let start = take(calls, LINE_SIZE);
            let place = start.cast::<usize>();
            for _ in 0..WRITES {
                // SAFETY: the block is this thread's, a word long.
                let value = unsafe { place.read_volatile() };
                // SAFETY: the block is this thread's, a word long.
                unsafe { place.write_volatile(black_box(value)) };
            }
            give(calls, start, LINE_SIZE);
        }
        ROUND as u64
    }
}

fn scratch(threads: usize, passive: bool) -> Plan {
    let given: Arc<[AtomicPtr<u8>]> = (0..threads).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
    let works = (0..threads).map(|index| Box::new(Scratch { given: given.clone(), index, passive }) as Box<dyn Work>);
    Plan { works: works.collect(), close: Box::new(|| ()) }
}

/// Blocks that a thread of `mstress` works with, and those it keeps for long.
const STRESS_LEN: usize = 1000;
const KEPT_LEN: usize = 1000;

/// Places where threads exchange blocks.
const EXCHANGE_LEN: usize = 500;

struct Mstress {
    slots: Box<[Slot]>,
    kept: Box<[Slot]>,
    exchange: Arc<[AtomicPtr<u8>]>,
    first: bool,
    sizes: Sizes,
    random: fastrand::Rng,
}

impl Work for Mstress {
    fn round(&mut self, calls: &Calls) -> u64 {
        const ROUND: usize = 500;
        for _ in 0..ROUND {
            let index = self.random.usize(..STRESS_LEN);
            let slot = &mut self.slots[index];
            slot.give_if_any(calls);
            *slot = Slot::take(calls, self.sizes.next());
            match self.random.u32(..8) {
                0 => {
                    let kept = &mut self.kept[self.random.usize(..KEPT_LEN)];
                    std::mem::swap(kept, slot);
                }
                1 | 2 => {
                    let place = &self.exchange[self.random.usize(..EXCHANGE_LEN)];
                    let start = place.swap(slot.start, Ordering::AcqRel);
                    *slot = if start.is_null() { Slot::EMPTY } else { Slot { start, size: size_in(start) } };
                }
                _ => (),
            }
        }
        ROUND as u64
    }

    fn live_len(&self) -> usize {
        let exchange = if self.first { &self.exchange[..] } else { &[] };
        let between = exchange.iter().map(|place| match place.load(Ordering::Acquire) {
            start if start.is_null() => 0,
            start => size_in(start),
        });
        live_len(&self.slots) + live_len(&self.kept) + between.sum::<usize>()
    }

    fn clear(&mut self, calls: &Calls) {
        give_all(&mut self.slots, calls);
        give_all(&mut self.kept, calls);
        for place in self.exchange.iter() {
            let start = place.swap(ptr::null_mut(), Ordering::AcqRel);
            if !start.is_null() {
                give(calls, start, size_in(start));
            }
        }
    }
}

pub(super) fn mstress(threads: usize) -> Plan {
    let exchange: Arc<[AtomicPtr<u8>]> = (0..EXCHANGE_LEN).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
    apart(threads, move |seed| Mstress {
        slots: slots(STRESS_LEN),
        kept: slots(KEPT_LEN),
        exchange: exchange.clone(),
        first: seed == 1,
        sizes: Sizes::new(seed, |random| match random.u32(..100) {
            0 => random.usize(1024..=16384),
            1..10 => random.usize(128..=1024),
            _ => random.usize(8..=128),
        }),
        random: fastrand::Rng::with_seed(seed),
    })
}

pub(super) const WORKLOADS: [Workload; 4] = [
    Workload {
        name: "larson",
        about: "5000 blocks of 8 to 1000 B a thread, random ones replaced, all handed on (Larson, Krishnan); per replacement",
        group: Group::Remote,
        plan: larson,
        shares: false,
        holds: true,
    },
    Workload {
        name: "xmalloc",
        about: "half of the threads only take blocks of 8 to 512 B, half only give them back (Lever, Boreham); per block",
        group: Group::Remote,
        plan: xmalloc,
        shares: true,
        holds: true,
    },
    Workload {
        name: "cache-scratch",
        about: "8 B blocks that one thread took are given back and taken by all, then written 32 times (Hoard); per pair",
        group: Group::FalseSharing,
        plan: |threads| scratch(threads, true),
        shares: true,
        holds: false,
    },
    Workload {
        name: "cache-thrash",
        about: "8 B blocks are taken, written 32 times, given back (Hoard); per pair",
        group: Group::FalseSharing,
        plan: |threads| scratch(threads, false),
        shares: false,
        holds: false,
    },
];

//! Every invariant of the heap, executed.
//!
//! The invariants stand where the state is: P1 to P9 beside the fields of `pages::pool`, S and B at the head of `slab`
//! and `partial`, C of `cache`. What belongs to one lock is checked at any time, by whoever has that lock. The sums
//! over all locks hold at rest only: between two locks a block is on its way, and no lock says so. Price of checking at
//! any time: a bin's slabs are turned in their list, and a pool is closed to others while its runs are walked.
//!
//! Here are the identities between layers, checked at rest:
//! - E1: for each class, the blocks that slabs count as out are the blocks that were ever taken less those pushed.
//! - E2: for each class, the bytes in slabs are the sum of their runs.
//! - E3: a slab is LISTED exactly if it is in a list, and one that is not has nothing to give.
//! - E4: what caches hold of all classes together is not more than what slabs count as out.

use core::fmt;

use crate::base::size_class::{CLASS_COUNT, SizeClass};
use crate::cache::CpuCache;
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
use crate::heap::Heap;
use crate::pages::{Kind, PageFault};
use crate::slab::list::{Bin, Sweep};
use crate::slab::word::Slab;

/// An invariant that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant's layer: `P` pages, `B` bins and the slabs in them, `C` caches, `E` between layers.
    pub layer: char,
    /// Its number there; 0 if the layer's check does not tell.
    pub rule: u8,
    /// The address, class or CPU that it was seen at.
    pub at: usize,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invariant {}{} does not hold at {:#x}", self.layer, self.rule, self.at)
    }
}

impl core::error::Error for Violation {}

/// What [`Heap::verify`] left out, since somebody else had it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "what was busy was not checked"]
#[non_exhaustive]
pub struct Skipped {
    /// Caches that others held. With a pin, all but the running CPU's own: have each CPU call [`Heap::verify`].
    pub caches: usize,
    /// Lists of partial slabs, of a size class and a CPU each.
    pub bins: usize,
    /// Pools of page runs.
    pub pools: usize,
}

impl Skipped {
    /// Whether everything was checked.
    pub const fn is_nothing(self) -> bool {
        self.caches == 0 && self.bins == 0 && self.pools == 0
    }
}

fn check(holds: bool, layer: char, rule: u8, at: usize) -> Result<(), Violation> {
    if holds { Ok(()) } else { Err(Violation { layer, rule, at }) }
}

/// What the slabs of each class add up to.
struct Sums {
    out_counts: [u64; CLASS_COUNT],
    lens: [usize; CLASS_COUNT],
    fault: Option<usize>,
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// Checks the invariants of each cache, bin and pool of pages, one after the other, whatever others do meanwhile.
    /// For a kernel that suspects damage.
    ///
    /// Takes what it looks at, and leaves out what it cannot have: see [`Skipped`]. It changes nothing but the order of
    /// slabs in their lists.
    ///
    /// # Errors
    /// The first [`Violation`] found: the heap's memory was damaged, or the heap is wrong.
    ///
    /// # Context
    /// Any. Takes as long as the heap is large. A cache is held for one class at a time, a bin for four slabs; a pool
    /// of pages for as long as it has chunks and runs, while others look elsewhere.
    pub fn verify(&self) -> Result<Skipped, Violation> {
        let mut skipped = Skipped::default();
        for class in SizeClass::all() {
            for (owner, bin) in self.engine.bins(class) {
                skipped.bins += usize::from(!self.verify_bin(bin, class, owner)?);
            }
        }
        let pools = self.engine.pages.verify_pools(&|work| self.step(work));
        skipped.pools = pools.map_err(page_violation)?;
        for (index, ..) in self.engine.cpus.iter() {
            skipped.caches += usize::from(!self.verify_cache(index)?);
        }
        Ok(skipped)
    }

    /// [`verify`](Self::verify) of everything, and of the sums over all of it, which hold at rest only. For tests.
    ///
    /// # Errors
    /// The first [`Violation`] found: the heap's memory was damaged, or the heap is wrong.
    ///
    /// # Safety
    /// From the call to the return nobody else uses the heap: no other thread or CPU, no interrupt handler; and what
    /// they did before happened before this call.
    #[expect(unsafe_code, reason = "a promise that nobody else is in the heap")]
    pub unsafe fn verify_at_rest(&self) -> Result<(), Violation> {
        for class in SizeClass::all() {
            for (owner, bin) in self.engine.bins(class) {
                check(bin.receive_all(), 'B', 4, class.index())?;
                check(bin.verify(class, owner), 'B', 0, class.index())?;
            }
        }
        self.engine.pages.verify().map_err(page_violation)?;
        for (index, cache, _) in self.engine.cpus.iter() {
            // Whoever the cache belongs to is outside of the heap, by the contract: so the cache is the caller's.
            check(cache.verify(), 'C', 0, index)?;
        }
        self.verify_sums()
    }

    /// [`verify_at_rest`](Self::verify_at_rest), for tests that know.
    #[cfg(any(test, loom))]
    pub(crate) fn verify_all(&self) -> Result<(), Violation> {
        // SAFETY: the tests of this crate call it when the contexts that they started have ended, or are stopped.
        unsafe { self.verify_at_rest() }
    }

    /// False: somebody else has the bin's lock.
    fn verify_bin(&self, bin: &Bin, class: SizeClass, owner: usize) -> Result<bool, Violation> {
        let (mut left, mut seen) = ([u32::MAX; 2], Some(Sweep::More));
        while seen == Some(Sweep::More) && !bin.looks_empty() {
            self.step(&mut |wait| seen = bin.verify_next(class, owner, &mut left, wait));
        }
        check(seen.is_some(), 'B', 0, class.index())?;
        Ok(seen != Some(Sweep::Busy))
    }

    /// False: somebody else has the cache.
    fn verify_cache(&self, index: usize) -> Result<bool, Violation> {
        for class in SizeClass::all() {
            let seen = self.with_cache(index, |cache| cache.verify_class(class) && cache.verify_limits());
            let Some(holds) = seen else { return Ok(false) };
            check(holds, 'C', 0, index)?;
        }
        Ok(true)
    }

    /// Does `work` with that cache held. `None`: somebody else has it, or with a pin it is another CPU's.
    fn with_cache<T>(&self, index: usize, work: impl FnOnce(&CpuCache) -> T) -> Option<T> {
        if C::PINNED {
            let entered = self.enter().ok().filter(|entered| entered.index == index)?;
            return Some(work(entered.cache));
        }
        let cache = self.engine.cache(index).filter(|cache| cache.try_lock(index))?;
        let result = work(cache);
        cache.unlock(index);
        Some(result)
    }

    fn verify_sums(&self) -> Result<(), Violation> {
        let mut sums = Sums { out_counts: [0; CLASS_COUNT], lens: [0; CLASS_COUNT], fault: None };
        self.engine.pages.for_each_run(&mut |run| {
            if let Some(slab) = Slab::of(run.desc) {
                sums.add(slab, run.len);
            }
        });
        check(sums.fault.is_none(), 'E', 3, sums.fault.unwrap_or(0))?;
        for ((class, out_count), len) in SizeClass::all().zip(&sums.out_counts).zip(&sums.lens) {
            check(*out_count == self.engine.out_count(class), 'E', 1, class.index())?;
            check(*len == self.engine.slab_len(class).get(), 'E', 2, class.index())?;
        }
        let cached = |class| self.engine.caches().map(move |cache| u64::from(cache.count(class))).sum::<u64>();
        let cached_count: u64 = SizeClass::all().map(cached).sum();
        check(cached_count <= sums.out_counts.iter().sum(), 'E', 4, 0)
    }
}

fn page_violation(fault: PageFault) -> Violation {
    Violation { layer: 'P', rule: fault.rule, at: fault.at }
}

impl Sums {
    fn add(&mut self, slab: Slab<'_>, len: usize) {
        let (count, carved) = slab.counts();
        let index = slab.class().index();
        if let (Some(out_count), Some(sum)) = (self.out_counts.get_mut(index), self.lens.get_mut(index)) {
            *out_count += carved.saturating_sub(count) as u64;
            *sum += len;
        }
        let is_linked = slab.desc().kind() != Kind::Slab;
        let has_some = count > 0 || carved < slab.capacity();
        if !slab.verify() || slab.is_claimed() || slab.is_listed() != is_linked || has_some != is_linked {
            self.fault = Some(core::ptr::from_ref(slab.desc()).addr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hint;
    use crate::base::sync::Ordering;
    use crate::contract::cpu::UnknownCpu;
    use crate::contract::provider::PageRun;
    use crate::heap::depot::Caller;
    use crate::slab::block::{Block, List};
    use crate::slab::list::tests::while_locked;
    use crate::slab::word::{CARVED_SHIFT, CLAIMED, COUNT_SHIFT, IDENTITY, LISTED, OWNER_SHIFT};
    use core::alloc::Layout;
    use core::ptr::NonNull;
    use std::boxed::Box;

    /// The host's memory; what is not given back is leaked.
    struct Host;

    // SAFETY: runs come from the host's allocator and are nobody else's.
    unsafe impl PageProvider for Host {
        fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
            // SAFETY: a run's length is not 0.
            NonNull::new(unsafe { std::alloc::alloc(run.layout()) })
        }

        unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
            // SAFETY: it came from `map` with this layout.
            unsafe { std::alloc::dealloc(start.as_ptr(), run.layout()) };
            true
        }
    }

    type Tested = Heap<Host, Hint<UnknownCpu>, 2>;

    fn class() -> SizeClass {
        SizeClass::of(Layout::new::<[u64; 12]>()).unwrap()
    }

    /// A heap with blocks in use, in a cache, in a partial slab and in a large run.
    fn mixed() -> Tested {
        let heap = Tested::new(Host, Hint(UnknownCpu));
        let blocks: [_; 40] = core::array::from_fn(|_| heap.alloc(Layout::new::<[u64; 12]>()).unwrap());
        heap.alloc(Layout::new::<[u64; 9000]>()).unwrap();
        let caller = Caller { index: 0, nested: false };
        for (index, block) in blocks.into_iter().take(30).enumerate() {
            // SAFETY: just allocated for that class, and used no more.
            let block = unsafe { Block::new(block.cast()) };
            // Some straight to their slabs, so that one is partial.
            if index % 3 == 0 {
                heap.engine.give_back(class(), block, None, caller)
            } else {
                heap.free_small(block, class())
            }
        }
        heap.verify_all().unwrap();
        heap
    }

    /// What is found in a heap that was damaged.
    fn broken(hurt: impl FnOnce(&Tested)) -> Option<(char, u8)> {
        let heap = mixed();
        hurt(&heap);
        heap.verify_all().err().map(|violation| (violation.layer, violation.rule))
    }

    /// The same, by the check that needs no rest.
    fn broken_at_work(hurt: impl FnOnce(&Tested)) -> Option<char> {
        let heap = mixed();
        hurt(&heap);
        heap.verify().err().map(|violation| violation.layer)
    }

    /// Does `work` with the word of each partial slab of [`class`].
    fn words(heap: &Tested, work: impl Fn(Slab<'_>, u64) -> u64) {
        let mut count = 0;
        heap.engine.pages.for_each_run(&mut |run| {
            if let Some(slab) = Slab::of(run.desc).filter(|slab| slab.is_listed() && slab.class() == class()) {
                let word = &slab.desc().word;
                word.store(work(slab, word.load(Ordering::Relaxed)), Ordering::Relaxed);
                count += 1;
            }
        });
        assert!(count > 0, "there is a partial slab");
    }

    /// The same with the descriptor of the large run.
    fn large(heap: &Tested, work: impl Fn(&crate::pages::PageDesc)) {
        heap.engine.pages.for_each_run(&mut |run| {
            if run.kind == Kind::Large {
                work(run.desc);
            }
        });
    }

    /// Makes the cache forget what it has of [`class`].
    fn lose_list(heap: &Tested) {
        let cache = heap.engine.cache(0).unwrap();
        assert!(cache.count(class()) > 1);
        // SAFETY: a list of no blocks.
        cache.fill(class(), unsafe { List::from_raw(core::ptr::null_mut(), 1, crate::harden::Key::NONE) });
    }

    #[test]
    #[cfg_attr(feature = "debug-heap", ignore = "gives blocks back below the frames")]
    fn a_sound_heap_has_no_violation() {
        assert_eq!(broken(|_| ()), None);
    }

    /// Each identity between layers, and each layer's own check, broken by hand.
    #[test]
    #[cfg_attr(feature = "debug-heap", ignore = "gives blocks back below the frames")]
    fn every_rule_broken_is_named() {
        assert_eq!(broken(|heap| heap.engine.cache(0).unwrap().count_taken(class(), 1)), Some(('E', 1)));
        let second = |heap: &Tested| assert!(heap.engine.add_cpu(1));
        assert_eq!(broken(second), None);
        let pushed = |heap: &Tested| {
            second(heap);
            heap.engine.cache(1).unwrap().count_pushed(class(), 1);
        };
        assert_eq!(broken(pushed), Some(('E', 1)));
        let longer = |heap: &Tested| heap.engine.slab_len(class()).add(1);
        assert_eq!(broken(longer), Some(('E', 2)));
        assert_eq!(broken(|heap| words(heap, |_, word| word | CLAIMED)), Some(('E', 3)), "claimed");
        assert_eq!(broken(|heap| words(heap, |_, word| word & !LISTED)), Some(('E', 3)), "linked, but not LISTED");
        assert_eq!(broken(|heap| words(heap, |_, word| word + (1 << COUNT_SHIFT))), Some(('E', 3)), "its own rules");
        let nothing_left = |slab: Slab<'_>, word: u64| {
            let carved = (slab.capacity() as u64) << CARVED_SHIFT;
            word & IDENTITY | carved
        };
        assert_eq!(broken(|heap| words(heap, nothing_left)), Some(('E', 3)), "linked, but with nothing to give");
        assert_eq!(
            broken(|heap| large(heap, |desc| desc.set(Kind::Large, 3, false))).map(|(layer, _)| layer),
            Some('P')
        );
        assert_eq!(broken(lose_list), Some(('C', 0)));
        assert_eq!(broken(|heap| words(heap, |_, word| word ^ 1 << OWNER_SHIFT)), Some(('B', 0)), "of another owner");
    }

    #[test]
    #[cfg_attr(feature = "debug-heap", ignore = "gives blocks back below the frames")]
    fn what_one_lock_guards_is_checked_at_any_time() {
        assert_eq!(broken_at_work(|_| ()), None);
        assert_eq!(broken_at_work(|heap| words(heap, |_, word| word + (1 << COUNT_SHIFT))), Some('B'), "a slab's list");
        assert_eq!(
            broken_at_work(|heap| words(heap, |_, word| word ^ 1 << OWNER_SHIFT)),
            Some('B'),
            "of another owner"
        );
        assert_eq!(broken_at_work(|heap| words(heap, |_, word| word & !LISTED)), Some('B'), "linked, but not LISTED");
        assert_eq!(broken_at_work(|heap| large(heap, |desc| desc.set(Kind::Large, 3, false))), Some('P'));
        assert_eq!(broken_at_work(lose_list), Some('C'));
        // SAFETY: a list of no blocks.
        let lost = || unsafe { List::from_raw(core::ptr::null_mut(), 1, crate::harden::Key::NONE) };
        assert_eq!(
            broken_at_work(|heap| {
                assert!(heap.engine.add_cpu(1));
                heap.engine.cache(1).unwrap().fill(class(), lost());
            }),
            Some('C'),
            "another CPU's"
        );
        assert_eq!(
            broken_at_work(|heap| heap.engine.slab_len(class()).add(1)),
            None,
            "a sum, which holds at rest only"
        );
    }

    #[test]
    #[cfg_attr(feature = "debug-heap", ignore = "gives blocks back below the frames")]
    fn what_others_have_is_left_out_and_told() {
        let heap = mixed();
        assert_eq!(heap.verify(), Ok(Skipped::default()));
        assert!(heap.engine.add_cpu(1));
        let cache = heap.engine.cache(1).unwrap();
        assert!(cache.try_lock(1));
        assert_eq!(heap.verify(), Ok(Skipped { caches: 1, ..Skipped::default() }));
        while_locked(heap.engine.bin(0, class()), || {
            assert_eq!(heap.verify(), Ok(Skipped { caches: 1, bins: 1, pools: 0 }));
        });
        cache.unlock(1);
        let mut once = false;
        heap.engine.pages.for_each_run(&mut |_| {
            if !core::mem::replace(&mut once, true) {
                assert_eq!(heap.verify(), Ok(Skipped { pools: 1, ..Skipped::default() }));
            }
        });
        assert!(once);
    }

    #[test]
    fn more_cached_than_ever_left_the_slabs_is_seen() {
        let heap = Tested::new(Host, Hint(UnknownCpu));
        let cache = heap.engine.cache(0).unwrap();
        let _ = cache.raise_limit(class(), 1 << 20);
        let memory = Box::leak(Box::new([0_u64; 12]));
        // SAFETY: memory of that length which nobody else uses, ever.
        cache.push(class(), unsafe { Block::new(NonNull::from(memory).cast()) }).unwrap();
        assert_eq!(heap.verify_all().err().map(|violation| (violation.layer, violation.rule)), Some(('E', 4)));
    }

    #[test]
    #[cfg_attr(feature = "debug-heap", ignore = "gives blocks back below the frames")]
    fn many_slabs_on_their_way_are_linked_before_they_are_judged() {
        let heap = Tested::new(Host, Hint(UnknownCpu));
        let layout = Layout::new::<[u64; 12]>();
        let blocks: std::vec::Vec<_> = (0..2000).map(|_| heap.alloc(layout).unwrap()).collect();
        let caller = Caller { index: 0, nested: false };
        for block in blocks.iter().step_by(7) {
            // SAFETY: just allocated with this Layout, and used no more.
            let block = unsafe { Block::new(block.cast()) };
            heap.engine.give_back(class(), block, None, caller);
        }
        assert_eq!(heap.verify_all(), Ok(()));
    }
}

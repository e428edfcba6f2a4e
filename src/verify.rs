//! Every invariant of the heap, executed.
//!
//! The invariants stand where the state is: P1 to P8 beside the fields of `pages::pool`, S and B at the head of `slab` and `partial`, C of
//! `cache`. Here are the identities between layers:
//! - E1: for each class, the blocks that slabs count as out are the blocks that were ever taken less those pushed.
//! - E2: for each class, the bytes in slabs are the sum of their runs.
//! - E3: a slab is LISTED exactly if it is in a list, and one that is not has nothing to give.
//! - E4: what caches hold of all classes together is not more than what slabs count as out.

use core::fmt;

use crate::cpu::CpuMode;
use crate::heap::Heap;
use crate::pages::Kind;
use crate::provider::PageProvider;
use crate::size_class::{CLASS_COUNT, SizeClass};
use crate::slab::Slab;
use crate::sync::Ordering;

/// An invariant that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant's layer: `P` pages, `B` bins (and the slabs in them), `C` caches, `E` between layers.
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
    /// Checks every invariant.
    ///
    /// Only at rest: while nobody else uses the heap, interrupts included. It then changes nothing but where slabs are listed. Takes as long as the
    /// heap is large; for tests, and for a kernel that suspects damage.
    ///
    /// # Errors
    /// The first [`Violation`] found: the heap's memory was damaged, or the heap is wrong, or not at rest.
    pub fn verify(&self) -> Result<(), Violation> {
        self.verify_bins()?;
        let pages = self.engine.pages.verify();
        pages.map_err(|fault| Violation { layer: 'P', rule: fault.rule, at: fault.at })?;
        for (index, cache) in self.engine.caches().iter().enumerate() {
            check(cache.verify(), 'C', 0, index)?;
        }
        self.verify_sums()
    }

    fn verify_bins(&self) -> Result<(), Violation> {
        for class in SizeClass::all() {
            for (home, bin) in self.engine.bins(class) {
                check(bin.receive_all(), 'B', 4, class.index())?;
                check(bin.verify(class, home), 'B', 0, class.index())?;
            }
        }
        Ok(())
    }

    fn verify_sums(&self) -> Result<(), Violation> {
        let mut sums = Sums { out_counts: [0; CLASS_COUNT], lens: [0; CLASS_COUNT], fault: None };
        self.engine.pages.for_each_run(&mut |run| {
            if let Some(slab) = Slab::of(run.desc) {
                sums.add(slab, run.len);
            }
        });
        check(sums.fault.is_none(), 'E', 3, sums.fault.unwrap_or(0))?;
        for ((class, out_count), len) in SizeClass::all().zip(sums.out_counts).zip(sums.lens) {
            check(out_count == self.engine.out_count(class), 'E', 1, class.index())?;
            check(len == self.engine.slab_len(class).load(Ordering::Relaxed), 'E', 2, class.index())?;
        }
        let cached = |class| self.engine.caches().iter().map(move |cache| u64::from(cache.count(class))).sum::<u64>();
        let cached_count: u64 = SizeClass::all().map(cached).sum();
        check(cached_count <= sums.out_counts.iter().sum(), 'E', 4, 0)
    }
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
            self.fault = Some(slab.desc().as_link().addr());
        }
    }
}

//! Who has what in use: the blocks of a heap by class and by the place that allocated them, from their frames.
//!
//! A walk over the runs of every chunk, a look at each block's frame: nothing is kept beside the blocks, and nothing
//! allocated. Price: a lock of the page heap is held while its chunks are walked, and places beyond the [`SITES`] met
//! first are counted together.

use core::fmt;
use core::ptr::NonNull;

use crate::base::size_class::{CLASS_COUNT, SizeClass};
use crate::contract::CpuMode;
use crate::contract::provider::PageProvider;
use crate::harden::debug::{BlockInfo, Site, State};
use crate::heap::Heap;
use crate::pages::{Chunk, Kind};
use crate::slab::word::Slab;

/// Places that are told apart.
pub(crate) const SITES: usize = 32;

/// What one place in the code has allocated and not freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeakSite {
    /// Who allocated.
    pub site: Site,
    /// Blocks in use.
    pub count: u64,
    /// Bytes that were asked for.
    pub len: u64,
    /// Allocations from this heap since the oldest of them, and since the youngest.
    pub age: (u64, u64),
}

/// The blocks in use, as [`Heap::leaks`] found them. Prints as a table, without allocating.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Leaks {
    /// Blocks in use by the class of the block with its frame, shortest first; last, those that are page runs.
    pub classes: [u64; CLASS_COUNT + 1],
    sites: [Option<LeakSite>; SITES],
    /// Blocks of places that found no room.
    pub other_count: u64,
}

impl Leaks {
    /// By place, in no order.
    pub fn sites(&self) -> impl Iterator<Item = &LeakSite> {
        self.sites.iter().flatten()
    }

    /// Blocks in all.
    pub fn count(&self) -> u64 {
        self.classes.iter().sum()
    }

    fn add(&mut self, class: Option<SizeClass>, block: &BlockInfo) {
        if let Some(count) = self.classes.get_mut(class.map_or(CLASS_COUNT, SizeClass::index)) {
            *count += 1;
        }
        let own = |place: &&mut Option<LeakSite>| place.is_none_or(|known| known.site == block.allocated);
        let Some(place) = self.sites.iter_mut().find(own) else {
            self.other_count += 1;
            return;
        };
        let known =
            place.get_or_insert(LeakSite { site: block.allocated, count: 0, len: 0, age: (block.age, block.age) });
        known.count += 1;
        known.len += block.size as u64;
        known.age = (known.age.0.max(block.age), known.age.1.min(block.age));
    }
}

impl<P: PageProvider, C: CpuMode, const CPUS: usize> Heap<P, C, CPUS> {
    /// The blocks in use that were allocated at least `min_age` allocations ago: 0 for all. What waits in quarantine is
    /// not in use. Guarded blocks and those of 1 MiB or more over a provider that moves runs are not seen.
    ///
    /// Takes as long as the heap is large, and holds a lock as [`for_each_run`](Self::for_each_run) does; callable
    /// while others work, and then of no one moment. About 3 KiB of stack.
    pub fn leaks(&self, min_age: u64) -> Leaks {
        let mut leaks = Leaks { classes: [0; CLASS_COUNT + 1], sites: [None; SITES], other_count: 0 };
        let now = self.debugging.now();
        let mut look = |start: NonNull<u8>, class| {
            // SAFETY: the lock that `for_each_run` holds keeps the run what it is, with blocks longer than a frame.
            let seen = unsafe { self.frame(start) }.read();
            let block = if seen.state() == State::Live { seen.info(now) } else { None };
            if let Some(block) = block.filter(|block| block.age >= min_age) {
                leaks.add(class, &block);
            }
        };
        self.engine.pages.for_each_run(&mut |run| match Slab::of(run.desc) {
            Some(slab) => {
                let (_, carved) = slab.counts();
                (0..carved)
                    .filter_map(|index| slab.frame_place(index))
                    .for_each(|start| look(start, Some(slab.class())));
            }
            None if run.kind == Kind::Large => look(Chunk::start_of(run.desc), None),
            None => {}
        });
        leaks
    }
}

impl fmt::Display for Leaks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>8} {:>10}", "block", "live")?;
        for (class, count) in SizeClass::all().zip(&self.classes).filter(|(_, count)| **count > 0) {
            writeln!(f, "{:>8} {count:>10}", class.block_len())?;
        }
        if let Some(runs) = self.classes.last().filter(|count| **count > 0) {
            writeln!(f, "{:>8} {runs:>10}", "pages")?;
        }
        writeln!(f, "{:>8} {:>12} {:>10} {:>10}  allocated by", "blocks", "bytes", "oldest", "youngest")?;
        for LeakSite { site, count, len, age: (oldest, youngest) } in self.sites() {
            writeln!(f, "{count:>8} {len:>12} {oldest:>10} {youngest:>10}  {site}")?;
        }
        write!(f, "{:>8} blocks of other places", self.other_count)
    }
}

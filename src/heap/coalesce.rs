//! Memory that moves between classes without being free as pages: coalesced neighbours, and longer blocks.
//!
//! A slab that one block stays in is no use to other classes as pages. So before new pages are asked for, neighbours
//! among the free blocks of a *shorter* class's slab are handed out as one block each; before an allocation fails,
//! fresh blocks are joined with them; and at last a block of a *longer* class serves. The slab keeps its class: such a
//! block returns to its slab by its address, as the blocks that it was.
//!
//! *Fresh blocks only at last*: while the provider has more, they are what the shorter class is about to use. But in a
//! heap of 1 MiB that is full, a quarter of the region is fresh.
//!
//! The obvious way, to merge free blocks as they return to their slabs, is what coalescing heaps do at every free. Here
//! only who finds no pages pays: a walk over one slab's list. Price: a class that takes a slow path counts what it
//! serves to others; slabs have at most [`Places::MOST`] blocks; and who takes a block of a shorter class next finds it
//! gone.
//!
//! Not with `hardened`: there a block is told by its slab's class when it is freed.

#![expect(unsafe_code, reason = "free blocks become one of another class")]

use crate::base::size_class::{CLASS_COUNT, SizeClass};
use crate::base::sync::Ordering;
use crate::base::tuning::{BARREN_WALKS, COALESCED_OWNERS};
use crate::cache::CpuCache;
use crate::heap::depot::{Caller, Engine, Group};
use crate::slab::block::{Block, Chain, List};
use crate::slab::free_blocks::{Places, cut, touched};
use crate::slab::word::Slab;

impl<const CPUS: usize> Engine<CPUS> {
    /// Up to `most` blocks of the class, joined out of the free blocks of one slab of shorter ones (if `dense`, one
    /// where that is likely to succeed): the longest of those first, at the own shard first. At most one slab's list is
    /// walked; where it was in vain, [`is_joining`](Self::is_joining) says whether to try again.
    pub(crate) fn join(
        &self,
        class: SizeClass,
        most: u32,
        caller: Caller,
        cache: Option<&CpuCache>,
        dense: bool,
    ) -> Option<List> {
        if cfg!(feature = "hardened") {
            return None;
        }
        let position = self.join_position(class).load(Ordering::Relaxed);
        let last = if position == 0 { class.index() * BARREN_WALKS } else { position }.wrapping_sub(1);
        let from = (last / BARREN_WALKS).min(class.index().wrapping_sub(1));
        let _walk = self.in_hand.begin();
        let own = self.owner_for(class, caller);
        let turn = self.join_turn.fetch_add(1, Ordering::Relaxed);
        let owners = self.owner_count();
        let at = |step| self.owner(turn.wrapping_add(step).checked_rem(owners).unwrap_or(0));
        let others = (0..COALESCED_OWNERS.min(owners)).map(at);
        let mut found = [own].into_iter().chain(others).filter_map(|owner| self.take_free(class, from, owner, dense));
        let Some((slab, free)) = found.next() else {
            self.join_position(class).store(0, Ordering::Relaxed);
            return None;
        };
        let walked = slab.class().index();
        let list = self.join_in(slab, free, class, most, caller, cache);
        if list.is_none() {
            self.join_position(class).store(last.min((walked + 1) * BARREN_WALKS - 1), Ordering::Relaxed);
        }
        list
    }

    /// Whether the last attempt found free blocks without neighbours, and shorter classes or other slabs were not
    /// looked at yet.
    pub(crate) fn is_joining(&self, class: SizeClass) -> bool {
        self.join_position(class).load(Ordering::Relaxed) != 0
    }

    /// One joined block past the caches, wherever it may be.
    pub(crate) fn join_one(&self, class: SizeClass, caller: Caller) -> Option<Block> {
        self.join(class, 1, caller, None, false)?.pop()
    }

    /// The free blocks of one slab at that owner that may have neighbours enough, of the class with that index or
    /// shorter.
    fn take_free(&self, class: SizeClass, from: usize, owner: usize, dense: bool) -> Option<(Slab<'_>, List)> {
        let shorter = (0..class.index()).rev().filter(|index| *index <= from).filter_map(SizeClass::from_index);
        shorter
            .map(|shorter| (shorter, class.block_len().div_ceil(shorter.block_len())))
            .take_while(|(_, count)| *count <= Places::MOST)
            .filter(|(shorter, _)| self.has_slabs(*shorter))
            .find_map(|(shorter, count)| self.bin(owner, shorter).take_free(count, dense))
    }

    fn join_in(
        &self,
        slab: Slab<'_>,
        free: List,
        class: SizeClass,
        most: u32,
        caller: Caller,
        cache: Option<&CpuCache>,
    ) -> Option<List> {
        let cut = slab.class();
        let free_count = free.count();
        // SAFETY: the blocks are this slab's, and it has no more than that many (`Bin::take_free`).
        let mut places = unsafe { Places::of(slab.start(), cut, free) };
        let mut list = List::new();
        while list.count() < most {
            let Some((block, parts)) = places.join(class.block_len(), class.block_align()) else { break };
            list.prepend(Chain::new(block));
            self.count_fallback(class, cut, parts);
        }
        let rest = places.into_chain();
        let rest_count = rest.as_ref().map_or(0, Chain::count);
        // What only passed by is counted past the cache.
        self.count_taken(cache, cut, free_count - rest_count);
        self.count_taken(None, cut, rest_count);
        if let Some(chain) = rest {
            self.return_blocks(Group { slab, chain }, None, caller);
        }
        Some(list).filter(|list| list.count() > 0)
    }

    /// A block of a longer class, when nothing else is left. It is freed as the shorter class that it serves, and goes
    /// back by its address.
    pub(crate) fn borrow(&self, class: SizeClass) -> Option<Block> {
        let longer = (class.index() + 1..CLASS_COUNT).filter_map(SizeClass::from_index);
        longer.filter(|longer| longer.block_align() >= class.block_align() && self.has_slabs(*longer)).find_map(
            |longer| {
                let mut bins = self.bins(longer).filter(|(_, bin)| !bin.looks_empty());
                let mut list = bins.find_map(|(_, bin)| bin.take(1, false).ok().flatten())?;
                self.count_taken(None, longer, list.count());
                self.count_fallback(class, longer, 1);
                #[cfg(feature = "hardened")]
                self.fallback_count.fetch_add(1, Ordering::Relaxed);
                list.pop()
            },
        )
    }

    /// Counts a block of a class that is made of `parts` blocks of another's slab.
    fn count_fallback(&self, class: SizeClass, cut: SizeClass, parts: u32) {
        self.fallback(class).fetch_add(1, Ordering::Relaxed);
        self.fallback(cut).fetch_sub(u64::from(parts), Ordering::Relaxed);
    }

    /// A block that served `class`, as what it is in its slab.
    pub(crate) fn group_of<'a>(&self, slab: Slab<'a>, class: SizeClass, block: Block) -> Group<'a> {
        let own = slab.class();
        if own == class {
            return Group { slab, chain: Chain::new(block) };
        }
        let offset = block.start().addr().get().wrapping_sub(slab.start().addr().get());
        let parts = touched(offset, class.block_len(), own);
        #[expect(clippy::cast_possible_truncation, reason = "at most as many as a slab has blocks")]
        let count = parts.len() as u32;
        self.fallback(class).fetch_sub(1, Ordering::Relaxed);
        self.fallback(own).fetch_add(u64::from(count), Ordering::Relaxed);
        // SAFETY: a block that serves a longer class than its slab's was joined out of the slab's blocks that it
        // touches (`join_in`), one that serves a shorter class is one of them (`borrow`), and nothing else brings a
        // block to a class that is not its slab's.
        let chain = unsafe { cut(block, offset - parts.start * own.block_len(), own, count, slab.key()) };
        Group { slab, chain }
    }
}

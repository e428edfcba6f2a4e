//! The reach of one call.

use super::*;
use crate::Hint;
use crate::battery::Filled;
use crate::contract::cpu::UnknownCpu;
use crate::heap::depot::Caller;
use crate::host_pages::HostPages;
use crate::slab::list::tests::while_locked;
use core::alloc::Layout;
use std::vec::Vec;

/// Two slabs of the longest class become empty in the last of all bins; one call frees one of them.
#[test]
fn the_last_bin_is_reached() {
    let heap: Heap<HostPages<false>, Hint<UnknownCpu>, 1> = Heap::new(HostPages::default(), Hint(UnknownCpu));
    // It brings a chunk.
    let first = Filled::new(&heap, Layout::new::<u64>(), 1).unwrap().unwrap();
    let (engine, class) = (&heap.engine, SizeClass::LONGEST);
    let bins: Vec<_> = engine.bins(class).map(|(_, bin)| bin).collect();
    let [.., spare, next, last] = &*bins else { return };
    // Without a cache of its own, and with the other spare bins locked.
    let caller = Caller { index: usize::MAX, nested: true };
    let blocks =
        while_locked(spare, || while_locked(next, || [(); 2].map(|()| engine.obtain_one(class, caller).unwrap())));
    blocks.into_iter().for_each(|block| engine.give_back(class, block, None, caller));
    assert_eq!(last.counts(), (0, 2));
    heap.maintain(usize::MAX);
    assert_eq!(last.counts(), (0, 1), "the last bin of all");
    first.free().unwrap();
    heap.trim(0);
    heap.verify_all().unwrap();
}

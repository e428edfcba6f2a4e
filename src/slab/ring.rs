//! A ring of descriptors: the doubly linked list that bins keep their slabs in.
//!
//! Circular, so that turning it (first becomes last) moves one pointer, and a slab is unlinked without a look at the
//! others. Links live in the descriptors. Every method is called under the lock of the list's owner; the fields are
//! atomics only so that a guess from outside is no data race. All zero is the empty ring.

use crate::base::link::Link;
use crate::base::sync::{AtomicU32, Ordering};
use crate::pages::PageDesc;

#[derive(Debug)]
pub(crate) struct Ring {
    first: Link<PageDesc>,
    count: AtomicU32,
}

impl Ring {
    pub(crate) const fn new() -> Self {
        Self { first: Link::new(), count: AtomicU32::new(0) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    pub(crate) fn count(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }

    pub(crate) fn first(&self) -> Option<&PageDesc> {
        self.first.get()
    }

    fn add(&self, count: u32) {
        self.count.store(self.count().wrapping_add(count), Ordering::Relaxed);
    }

    /// Puts a descriptor that is in no list first.
    pub(crate) fn push(&self, desc: &PageDesc) {
        let (next, prev) = match self.first() {
            Some(first) => (Some(first), first.prev.get()),
            None => (Some(desc), Some(desc)),
        };
        desc.next.set(next);
        desc.prev.set(prev);
        if let Some(next) = next {
            next.prev.set(Some(desc));
        }
        if let Some(prev) = prev {
            prev.next.set(Some(desc));
        }
        self.first.set(Some(desc));
        self.add(1);
    }

    /// Takes a descriptor out that is in this ring.
    pub(crate) fn remove(&self, desc: &PageDesc) {
        let (next, prev) = (desc.next.get(), desc.prev.get());
        if let Some(next) = next {
            next.prev.set(prev);
        }
        if let Some(prev) = prev {
            prev.next.set(next);
        }
        let alone = next.is_some_and(|next: &PageDesc| core::ptr::eq(next, desc));
        if alone || self.first.leads_to(desc) {
            self.first.set(if alone { None } else { next });
        }
        self.add(u32::MAX);
    }

    /// Makes the first one the last.
    pub(crate) fn turn(&self) {
        if let Some(first) = self.first() {
            self.first.set(first.next.get());
        }
    }

    /// Makes the last one the first.
    pub(crate) fn turn_back(&self) {
        if let Some(first) = self.first() {
            self.first.set(first.prev.get());
        }
    }

    /// Whether the links around the first one agree.
    pub(crate) fn is_first_linked(&self) -> bool {
        let Some(first) = self.first() else {
            return self.count() == 0;
        };
        let (next, prev): (Option<&PageDesc>, Option<&PageDesc>) = (first.next.get(), first.prev.get());
        next.is_some_and(|next| next.prev.leads_to(first)) && prev.is_some_and(|prev| prev.next.leads_to(first))
    }

    /// Whether links agree in both directions all the way round, `count` is right, and `good` holds for each.
    pub(crate) fn verify(&self, mut good: impl FnMut(&PageDesc) -> bool) -> bool {
        let Some(first) = self.first() else {
            return self.count() == 0;
        };
        let mut desc = first;
        for step in 1..=self.count() {
            let Some(next): Option<&PageDesc> = desc.next.get() else {
                return false;
            };
            if !next.prev.leads_to(desc) || !good(desc) {
                return false;
            }
            if core::ptr::eq(next, first) {
                return step == self.count();
            }
            desc = next;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn descs() -> Vec<PageDesc> {
        (0..4).map(PageDesc::new).collect()
    }

    fn order(ring: &Ring) -> Vec<usize> {
        let mut order = Vec::new();
        assert!(ring.verify(|desc| {
            order.push(desc.index());
            true
        }));
        order
    }

    #[test]
    fn push_turn_and_remove_keep_the_order() {
        let (ring, descs) = (Ring::new(), descs());
        assert!(ring.is_empty() && ring.verify(|_| false));
        for (count, desc) in descs.iter().enumerate() {
            assert_eq!(ring.count() as usize, count);
            ring.push(desc);
        }
        assert_eq!(order(&ring), [3, 2, 1, 0]);
        ring.turn();
        assert_eq!(order(&ring), [2, 1, 0, 3]);
        ring.turn_back();
        assert_eq!(order(&ring), [3, 2, 1, 0]);
        ring.turn();
        // The first, one in the middle, the last, the only one.
        for (gone, left) in [(2, [1, 0, 3].as_slice()), (0, &[1, 3]), (3, &[1]), (1, &[])] {
            ring.remove(&descs[gone]);
            assert_eq!(order(&ring), left);
        }
        assert!(ring.is_empty() && ring.count() == 0 && ring.first().is_none());
        ring.turn();
        ring.push(&descs[2]);
        assert_eq!(order(&ring), [2]);
    }

    /// B1 and what the bin asks of each, broken by hand.
    #[test]
    fn verify_sees_each_rule_broken() {
        let broken = |hurt: &dyn Fn(&Ring, &[PageDesc]), good: &dyn Fn(&PageDesc) -> bool| {
            let (ring, descs) = (Ring::new(), descs());
            descs.iter().take(3).for_each(|desc| ring.push(desc));
            assert!(ring.verify(|_| true));
            hurt(&ring, &descs);
            !ring.verify(good)
        };
        let all = |_: &PageDesc| true;
        assert!(broken(&|_, descs| descs[2].prev.set(Some(&descs[2])), &all));
        assert!(broken(&|_, descs| descs[1].next.set(None), &all));
        assert!(broken(&|ring, _| ring.add(1), &all), "counted twice");
        assert!(broken(&|ring, _| ring.add(u32::MAX), &all), "not counted");
        assert!(broken(&|ring, _| ring.first.set(None), &all), "counted, but not there");
        assert!(broken(&|_, _| (), &|desc| desc.index() != 0), "one that does not belong");
    }
}

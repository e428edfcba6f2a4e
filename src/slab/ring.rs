//! A ring of descriptors: the doubly linked list that bins keep their slabs in.
//!
//! Circular, so that turning it (first becomes last) moves one pointer, and a slab is unlinked without a look at the
//! others. Links live in the descriptors. Every method is called under the lock of the list's owner; the fields are
//! atomics only so that a guess from outside is no data race. All zero is the empty ring.

use core::ptr::null_mut;

use crate::base::sync::{AtomicPtr, AtomicU32, Ordering};
use crate::pages::PageDesc;

#[derive(Debug)]
pub(crate) struct Ring {
    first: AtomicPtr<PageDesc>,
    count: AtomicU32,
}

/// The descriptor behind a link of a ring or of an inbox.
fn follow<'a>(link: *mut PageDesc) -> Option<&'a PageDesc> {
    // SAFETY: links are null or come from `PageDesc::as_link` of a slab in the list. A slab leaves its list before its
    // run is freed, and its chunk goes only when all its runs are free; so the descriptor lives while a list leads to
    // it.
    unsafe { PageDesc::from_link(link) }
}

/// Takes the newest descriptor off an inbox. Only one context at a time may do so: the holder of the bin's lock.
pub(crate) fn pop_inbox(inbox: &AtomicPtr<PageDesc>) -> Option<&PageDesc> {
    loop {
        let head = inbox.load(Ordering::Acquire);
        let desc = follow(head)?;
        // Nobody else takes off, so while `head` is the head its link stands still.
        let next = desc.next.load(Ordering::Relaxed);
        if inbox.compare_exchange(head, next, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            return Some(desc);
        }
    }
}

impl Ring {
    pub(crate) const fn new() -> Self {
        Self { first: AtomicPtr::new(null_mut()), count: AtomicU32::new(0) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.first.load(Ordering::Relaxed).is_null()
    }

    pub(crate) fn count(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }

    pub(crate) fn first(&self) -> Option<&PageDesc> {
        follow(self.first.load(Ordering::Relaxed))
    }

    fn add(&self, count: u32) {
        self.count.store(self.count().wrapping_add(count), Ordering::Relaxed);
    }

    /// Puts a descriptor that is in no list first.
    pub(crate) fn push(&self, desc: &PageDesc) {
        let (next, prev) = match self.first() {
            Some(first) => (first.as_link(), first.prev.load(Ordering::Relaxed)),
            None => (desc.as_link(), desc.as_link()),
        };
        desc.next.store(next, Ordering::Relaxed);
        desc.prev.store(prev, Ordering::Relaxed);
        if let Some(next) = follow(next) {
            next.prev.store(desc.as_link(), Ordering::Relaxed);
        }
        if let Some(prev) = follow(prev) {
            prev.next.store(desc.as_link(), Ordering::Relaxed);
        }
        self.first.store(desc.as_link(), Ordering::Relaxed);
        self.add(1);
    }

    /// Takes a descriptor out that is in this ring.
    pub(crate) fn remove(&self, desc: &PageDesc) {
        let next = desc.next.load(Ordering::Relaxed);
        let prev = desc.prev.load(Ordering::Relaxed);
        if let Some(next) = follow(next) {
            next.prev.store(prev, Ordering::Relaxed);
        }
        if let Some(prev) = follow(prev) {
            prev.next.store(next, Ordering::Relaxed);
        }
        let alone = next == desc.as_link();
        if alone || self.first.load(Ordering::Relaxed) == desc.as_link() {
            self.first.store(if alone { null_mut() } else { next }, Ordering::Relaxed);
        }
        self.add(u32::MAX);
    }

    /// Makes the first one the last.
    pub(crate) fn turn(&self) {
        if let Some(first) = self.first() {
            self.first.store(first.next.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Makes the last one the first.
    pub(crate) fn turn_back(&self) {
        if let Some(first) = self.first() {
            self.first.store(first.prev.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Whether the links around the first one agree.
    pub(crate) fn is_first_linked(&self) -> bool {
        let Some(first) = self.first() else {
            return self.count() == 0;
        };
        let (next, prev) = (follow(first.next.load(Ordering::Relaxed)), follow(first.prev.load(Ordering::Relaxed)));
        let leads_here = |link: &AtomicPtr<PageDesc>| link.load(Ordering::Relaxed) == first.as_link();
        next.is_some_and(|next| leads_here(&next.prev)) && prev.is_some_and(|prev| leads_here(&prev.next))
    }

    /// Whether links agree in both directions all the way round, `count` is right, and `good` holds for each.
    pub(crate) fn verify(&self, mut good: impl FnMut(&PageDesc) -> bool) -> bool {
        let Some(first) = self.first() else {
            return self.count() == 0;
        };
        let mut desc = first;
        for step in 1..=self.count() {
            let Some(next) = follow(desc.next.load(Ordering::Relaxed)) else {
                return false;
            };
            if next.prev.load(Ordering::Relaxed) != desc.as_link() || !good(desc) {
                return false;
            }
            if next.as_link() == first.as_link() {
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

    #[test]
    fn an_inbox_gives_the_newest_first() {
        let (inbox, descs) = (AtomicPtr::new(null_mut()), descs());
        for desc in &descs {
            desc.next.store(inbox.load(Ordering::Relaxed), Ordering::Relaxed);
            inbox.store(desc.as_link(), Ordering::Relaxed);
        }
        let popped: Vec<_> = core::iter::from_fn(|| pop_inbox(&inbox)).map(PageDesc::index).collect();
        assert_eq!(popped, [3, 2, 1, 0]);
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
        assert!(broken(&|_, descs| descs[2].prev.store(descs[2].as_link(), Ordering::Relaxed), &all));
        assert!(broken(&|_, descs| descs[1].next.store(null_mut(), Ordering::Relaxed), &all));
        assert!(broken(&|ring, _| ring.add(1), &all), "counted twice");
        assert!(broken(&|ring, _| ring.add(u32::MAX), &all), "not counted");
        assert!(broken(&|ring, _| ring.first.store(null_mut(), Ordering::Relaxed), &all), "counted, but not there");
        assert!(broken(&|_, _| (), &|desc| desc.index() != 0), "one that does not belong");
    }
}

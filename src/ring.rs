//! A ring of descriptors: the doubly linked list that bins keep their slabs in.
//!
//! Circular, so that turning it (first becomes last) moves one pointer, and a slab is unlinked without a look at the others.
//! Links live in the descriptors. Every method is called under the lock of the list's owner; the fields are atomics only so
//! that a guess from outside is no data race. All zero is the empty ring.

use core::ptr::null_mut;

use crate::pages::PageDesc;
use crate::sync::{AtomicPtr, AtomicU32, Ordering};

#[derive(Debug)]
pub(crate) struct Ring {
    first: AtomicPtr<PageDesc>,
    count: AtomicU32,
}

/// The descriptor behind a link of a ring or of an inbox.
fn follow<'a>(link: *mut PageDesc) -> Option<&'a PageDesc> {
    // SAFETY: links are null or come from `PageDesc::as_link` of a slab in the list. A slab leaves its list before its run is freed, and its
    // chunk goes only when all its runs are free; so the descriptor lives while a list leads to it.
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

    /// Whether links agree in both directions all the way round, `count` is right, and `good` holds for each. At rest.
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

//! Links: the pointers that lists of descriptors, chunks and run caches are made of.
//!
//! Decision: a link is written from a reference and read as one, so that no list needs unsafe code. What is left to
//! prove stands once for each type that is linked ([`Linked`]), not at each step of each list.
//! Price: none at run time; the proof is about all lists of a type at once.
//!
//! The lock-free lists here are stacks (Treiber, "Systems Programming: Coping with Parallelism", IBM RJ 5118, 1986).
//! One context at a time takes from them, so that an item cannot go and come back between a look at the head and its
//! exchange.

#![expect(unsafe_code, reason = "what a link leads to is read")]

use core::ptr::{from_ref, null_mut};

use crate::base::sync::{AtomicPtr, Ordering, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

/// What links lead to.
///
/// # Safety
/// A value that a link leads to stays where it is and is shared by reference only, from when the link is written until
/// nobody reads that link any more, or what was read from it.
pub(crate) unsafe trait Linked {}

/// What has links of its own for a list in both directions, whose lock is held.
pub(crate) trait Listed: Linked + Sized {
    fn next(&self) -> &Link<Self>;
    fn prev(&self) -> &Link<Self>;
}

/// A link to a `T`, or to nothing. All zero leads to nothing.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Link<T> {
    to: AtomicPtr<T>,
}

fn pointer<T>(to: Option<&T>) -> *mut T {
    to.map_or(null_mut(), |to| from_ref(to).cast_mut())
}

impl<T> Link<T> {
    pub(crate) const fn new() -> Self {
        Self { to: AtomicPtr::new(null_mut()) }
    }

    /// Whether it leads to nothing. Without the list's lock: a guess.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.to.load(Relaxed).is_null()
    }

    /// Whether it leads to `item`. Without the list's lock: a guess.
    #[inline]
    pub(crate) fn leads_to(&self, item: &T) -> bool {
        core::ptr::eq(self.to.load(Relaxed), item)
    }
}

impl<T: Linked> Link<T> {
    #[inline(always)]
    fn follow<'a>(to: *mut T) -> Option<&'a T> {
        // SAFETY: only the functions below write links: null, or a reference to a value that stays where it is as long
        // as anybody uses what he read here (`Linked`).
        unsafe { to.as_ref() }
    }

    /// Where it leads, to the holder of the list's lock.
    #[inline(always)]
    pub(crate) fn get<'a>(&self) -> Option<&'a T> {
        Self::follow(self.to.load(Relaxed))
    }

    /// Where it leads, with all that was written before [`publish`](Self::publish) or [`push`](Self::push).
    #[inline(always)]
    pub(crate) fn get_published<'a>(&self) -> Option<&'a T> {
        Self::follow(self.to.load(Acquire))
    }

    /// Makes it lead elsewhere, by the holder of the list's lock.
    #[inline(always)]
    pub(crate) fn set(&self, to: Option<&T>) {
        self.to.store(pointer(to), Relaxed);
    }

    /// [`set`](Self::set) for who reads it without a lock.
    #[inline(always)]
    pub(crate) fn publish(&self, to: Option<&T>) {
        self.to.store(pointer(to), Release);
    }

    /// Fills an empty place that any context takes from. False: it was not empty.
    pub(crate) fn fill(&self, item: &T) -> bool {
        self.to.compare_exchange(null_mut(), pointer(Some(item)), Release, Relaxed).is_ok()
    }

    /// Empties a place, for any context: the item is the caller's alone. `None`: it was empty, or others came between.
    #[inline]
    pub(crate) fn take<'a>(&self) -> Option<&'a T> {
        let seen = self.to.load(Relaxed);
        if seen.is_null() {
            return None;
        }
        // Writes nothing where nothing is taken.
        Self::follow(self.to.compare_exchange(seen, null_mut(), Acquire, Relaxed).ok()?)
    }

    /// Puts an item on a stack, linked by its own link `next`, with `order` as the exchange's. Lock-free; the item is
    /// not touched once it is there.
    #[inline]
    pub(crate) fn push(&self, item: &T, next: &Self, order: Ordering) {
        let mut head = self.to.load(Relaxed);
        loop {
            next.to.store(head, Relaxed);
            match self.to.compare_exchange_weak(head, pointer(Some(item)), order, Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes the newest item off a stack, by the one context that may; gives up when more than `limit` others came
    /// between.
    #[inline]
    pub(crate) fn pop<'a>(&self, next: impl Fn(&'a T) -> &'a Self, limit: u32) -> Option<&'a T>
    where
        Self: 'a,
    {
        let (mut head, mut left) = (self.to.load(Acquire), limit);
        loop {
            // Nobody else takes off, so while `head` is the head its link stands still.
            let item = Self::follow(head)?;
            match self.to.compare_exchange(head, next(item).to.load(Relaxed), Acquire, Acquire) {
                Ok(_) => return Some(item),
                Err(now) => head = now,
            }
            left = left.checked_sub(1)?;
        }
    }
}

/// A list in both directions that ends with null at both ends. Its lock is held.
impl<T: Listed> Link<T> {
    /// Puts an item that is in no list first.
    #[inline]
    pub(crate) fn link(&self, item: &T) {
        let first = self.get();
        item.prev().set(None);
        item.next().set(first);
        if let Some(first) = first {
            first.prev().set(Some(item));
        }
        self.set(Some(item));
    }

    /// Takes an item out that is in this list.
    #[inline]
    pub(crate) fn unlink(&self, item: &T) {
        let (next, prev) = (item.next().get(), item.prev().get());
        prev.map_or(self, |prev: &T| prev.next()).set(next);
        if let Some(next) = next {
            next.prev().set(prev);
        }
    }

    /// The first `limit` items.
    #[inline]
    pub(crate) fn iter<'a>(&self, limit: usize) -> impl Iterator<Item = &'a T> + use<'a, T>
    where
        T: 'a,
    {
        core::iter::successors(self.get(), |item: &&'a T| item.next().get()).take(limit)
    }
}

/// A link to what is there for ever, or to nothing. All zero leads to nothing.
#[cfg(feature = "trace")]
#[derive(Debug)]
pub(crate) struct StaticLink<T> {
    to: AtomicPtr<T>,
}

#[cfg(feature = "trace")]
impl<T: Sync> StaticLink<T> {
    pub(crate) const fn new() -> Self {
        Self { to: AtomicPtr::new(null_mut()) }
    }

    pub(crate) fn set(&self, to: Option<&'static T>) {
        self.to.store(pointer(to), Release);
    }

    #[inline]
    pub(crate) fn get(&self) -> Option<&'static T> {
        // SAFETY: null, or what `set` was given, which is there for ever and may be shared.
        unsafe { self.to.load(Acquire).as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    struct Item(Link<Item>);

    // SAFETY: the test's items outlive its links.
    unsafe impl Linked for Item {}

    #[test]
    fn a_stack_gives_the_newest_first() {
        let items = [const { Item(Link::new()) }; 3];
        let stack = Link::new();
        items.iter().for_each(|item| stack.push(item, &item.0, Release));
        assert!(stack.leads_to(&items[2]));
        let popped: Vec<_> = core::iter::from_fn(|| stack.pop(|item: &Item| &item.0, 0)).map(from_ref).collect();
        assert_eq!(popped, [2, 1, 0].map(|at| from_ref(&items[at])));
        assert!(stack.is_empty());
    }

    #[test]
    fn a_place_is_filled_once_and_emptied_once() {
        let items = [const { Item(Link::new()) }; 2];
        let place = Link::new();
        assert!(place.fill(&items[0]) && !place.fill(&items[1]) && place.leads_to(&items[0]));
        assert!(place.take().is_some_and(|item| core::ptr::eq(item, &items[0])));
        assert!(place.take().is_none() && place.fill(&items[1]));
    }
}

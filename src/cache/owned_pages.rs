//! Pages whose tiny blocks are known to be owned by a cache's CPU: a fast check in `free`, where the way over the
//! slab's descriptor takes four times as many instructions. The check gives a difference, not a yes or no: each class's
//! list says which of its bits count ([`Hot`](super::Hot)), none unless blocks are tiny. So there is one branch for all
//! sizes, and a mix of them makes it no harder to predict.
//!
//! A page is noted when a block of it was looked up, in a place by its number. Nothing takes it out when its slab is
//! given up and another CPU cuts the page anew: then blocks of that CPU's stay in this cache, which costs a shared
//! cache line, not more, until one of them takes a slow path here, which forgets its page. So whoever asks trusts the
//! answer with speed alone.

use core::ptr::NonNull;

use crate::base::sync::{AtomicU32, Ordering::Relaxed};

/// Places; a power of two. 512 KiB in tiny blocks fit. Few where each atomic is modelled.
const COUNT: usize = if cfg!(loom) { 4 } else { 128 };

/// The shortest slab of a heap that is not tiny.
const PAGE_SHIFT: u32 = 12;

/// All zero is valid: it knows pages whose number's low half is zero, which are one in four thousand million.
#[derive(Debug)]
pub(crate) struct OwnedPages(/* the low half of a page's number */ [AtomicU32; COUNT]);

impl OwnedPages {
    pub(crate) const fn new() -> Self {
        Self([const { AtomicU32::new(0) }; COUNT])
    }

    #[inline]
    #[expect(clippy::indexing_slicing, reason = "taken modulo the length")]
    #[expect(clippy::cast_possible_truncation, reason = "the low half will do: a false answer costs speed")]
    fn place(&self, block: NonNull<u8>) -> (&AtomicU32, u32) {
        let page = block.addr().get() >> PAGE_SHIFT;
        (&self.0[page & (COUNT - 1)], page as u32)
    }

    /// In which bits the page that was noted in the block's place differs from its page: none, if that was noted. Fast.
    #[inline]
    pub(crate) fn difference(&self, block: NonNull<u8>) -> u32 {
        let (place, page) = self.place(block);
        place.load(Relaxed) ^ page
    }

    /// Whether the block's page was noted.
    fn has(&self, block: NonNull<u8>) -> bool {
        self.difference(block) == 0
    }

    /// Notes the page of a block that is owned by this CPU.
    #[inline]
    pub(crate) fn note(&self, block: NonNull<u8>) {
        let (place, page) = self.place(block);
        place.store(page, Relaxed);
    }

    /// Forgets the page of a block, if it was noted.
    pub(crate) fn forget(&self, block: NonNull<u8>) {
        if self.has(block) {
            self.place(block).0.store(0, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use core::ptr::without_provenance_mut;

    use super::*;

    fn block(addr: usize) -> NonNull<u8> {
        NonNull::new(without_provenance_mut(addr)).unwrap()
    }

    #[test]
    fn a_noted_page_is_known_until_forgotten_or_displaced() {
        let pages = OwnedPages::new();
        let (first, last, next) = (block(0x1234_5000), block(0x1234_5ff8), block(0x1234_6000));
        assert!(!pages.has(first));
        pages.note(last);
        assert!(pages.has(first) && pages.has(last) && !pages.has(next));
        pages.note(next);
        assert!(pages.has(first) && pages.has(next), "neighbours have places of their own");
        pages.forget(block(0x1234_5000 + (COUNT << PAGE_SHIFT)));
        assert!(pages.has(first), "another page of the same place");
        pages.forget(first);
        assert!(!pages.has(first) && pages.has(next));
        pages.note(block(0x1234_6000 + (COUNT << PAGE_SHIFT)));
        assert!(!pages.has(next));
    }
}

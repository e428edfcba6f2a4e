//! Free pages inside of slabs in use go to the pages: what a heap that shrank, or is full, still has.
//!
//! See [`parts`](crate::slab::parts) for what a slab is then. Done by a trim of everything, and before a request is
//! refused: a walk over the free list of each partial slab that has a page's worth of free blocks, one slab a hold.
//! Price: such a slab has fewer blocks until it was empty; so it is not done while there are other pages.
//!
//! Not with `debug-heap`: what it tells of a free block stands in the block.

#![expect(unsafe_code, reason = "free blocks by their place in a slab")]

use crate::heap::depot::Engine;
use crate::pages::{Chunk, Step};
use crate::slab::free_blocks::Places;
use crate::slab::list::Sweep;
use crate::slab::word::Slab;

impl<const CPUS: usize> Engine<CPUS> {
    /// Looks at every partial slab, one a step; gives the bytes that went to the pages.
    #[cold]
    #[inline(never)]
    pub(crate) fn punch_slabs(&self, spares: bool, step: Step<'_>) -> usize {
        if cfg!(feature = "debug-heap") {
            return 0;
        }
        let mut len = 0;
        for bin in self.classes().flat_map(|class| self.bins(class)).map(|(_, bin)| bin) {
            let (mut left, mut sweep) = (u32::MAX, Sweep::More);
            while sweep == Sweep::More && !bin.looks_empty() {
                let _in_hand = self.in_hand.begin();
                step(&mut |wait| {
                    let (seen, sparse) = bin.take_sparse(&mut left);
                    sweep = seen;
                    let Some((slab, free)) = sparse else { return };
                    // SAFETY: they are all free blocks of this slab, and it has no more than that many
                    // (`Slab::may_have_hole`).
                    let places = unsafe { Places::of(slab.start(), slab.class(), free) };
                    len += self.punch_slab(slab, places, spares, wait);
                });
            }
        }
        len
    }

    fn punch_slab(&self, slab: Slab<'_>, mut free: Places, spares: bool, wait: bool) -> usize {
        let (bin, class) = (self.bin(slab.owner(), slab.class()), slab.class());
        let mut len = 0;
        let lost = slab.punch(&mut free, spares, |hole| {
            let hole_len = hole.len() << Chunk::of(slab.desc()).shift();
            let given = self.pages.punch(slab.desc(), hole, wait);
            if given {
                len += hole_len;
                self.slab_len(class).sub(hole_len);
            }
            given
        });
        if slab.restore(free.into_chain(), lost) {
            bin.enlist(slab);
        }
        len
    }

    /// Frees the parts of a slab behind its first one.
    #[cold]
    #[inline(never)]
    pub(crate) fn free_parts(&self, slab: Slab<'_>) {
        for part in slab.further_parts() {
            self.slab_len(slab.class()).sub(part.len() << Chunk::of(slab.desc()).shift());
            self.pages.free_part(slab.desc(), part);
        }
    }
}

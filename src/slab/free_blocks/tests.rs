//! Free blocks as bits.

use super::*;
use std::vec::Vec;

const LEN: usize = 16;

fn class(size: usize) -> SizeClass {
    SizeClass::of(core::alloc::Layout::from_size_align(size, 8).unwrap()).unwrap()
}

/// Memory of that many blocks.
struct Ground(Vec<u128>);

impl Ground {
    fn new(count: usize) -> Self {
        Self(std::vec![0; count])
    }

    fn start(&mut self) -> NonNull<u8> {
        NonNull::new(self.0.as_mut_ptr()).unwrap().cast()
    }

    /// The places in that order.
    fn places(&mut self, order: &[usize]) -> Places {
        let start = self.start();
        let mut list = List::new();
        for place in order {
            // SAFETY: inside the memory.
            let block = unsafe { start.add(place * LEN) };
            // SAFETY: each place is given once.
            list.prepend(Chain::new(unsafe { Block::new(block) }));
        }
        // SAFETY: the blocks lie in the memory from `start` on.
        unsafe { Places::of(start, class(LEN), list) }
    }

    fn place(&mut self, block: &Block) -> usize {
        (block.start().addr().get() - self.start().addr().get()) / LEN
    }
}

fn rest(ground: &mut Ground, places: Places) -> Vec<usize> {
    let mut list = List::new();
    places.into_chain().into_iter().for_each(|chain| list.prepend(chain));
    let mut rest: Vec<_> = core::iter::from_fn(|| list.pop()).map(|block| ground.place(&block)).collect();
    rest.sort_unstable();
    rest
}

#[test]
fn neighbours_are_found_in_any_order_and_the_rest_is_left() {
    let mut ground = Ground::new(200);
    let mut places = ground.places(&[9, 3, 130, 5, 4, 7, 64, 63, 128, 65, 129]);
    let joined: Vec<_> = core::iter::from_fn(|| places.join(3 * LEN - 7, 1))
        .map(|(block, count)| (ground.place(&block), count))
        .collect();
    assert_eq!(joined, [(3, 3), (63, 3), (128, 3)]);
    assert_eq!(rest(&mut ground, places), [7, 9]);
}

#[test]
fn a_coalesced_block_is_aligned_and_takes_all_it_touches() {
    for align in [32, 64, 256] {
        let mut ground = Ground::new(128);
        let order: Vec<_> = (1..101).collect();
        let mut places = ground.places(&order);
        let (mut taken, mut before) = (0, 0);
        while let Some((block, count)) = places.join(40, align) {
            assert_eq!(block.start().addr().get() % align, 0);
            assert!(ground.place(&block) >= before);
            before = ground.place(&block) + count as usize;
            taken += count as usize;
        }
        assert!(
            taken >= 3 * (100 * LEN / 48_usize.next_multiple_of(align) - 2),
            "{taken} of 100 at multiples of {align}"
        );
        assert_eq!(rest(&mut ground, places).len(), 100 - taken);
    }
}

#[test]
fn what_reaches_beyond_the_last_place_is_not_joined() {
    let mut ground = Ground::new(Places::MOST);
    let mut places = ground.places(&[Places::MOST - 2, Places::MOST - 1]);
    assert!(places.join(3 * LEN, 1).is_none() && places.join(LEN, 1).is_none(), "searched once");
    assert_eq!(rest(&mut ground, places), [Places::MOST - 2, Places::MOST - 1]);
}

/// Blocks of 48 bytes, a joined one that begins in the middle of one.
#[test]
fn a_joined_block_returns_as_what_it_was() {
    const LONG: usize = 3 * LEN;
    let mut ground = Ground::new(64);
    let start = ground.start();
    let skip = (start.addr().get() + LONG).wrapping_neg() % 128;
    let mut list = List::new();
    for place in 1..16 {
        // SAFETY: inside the memory.
        let block = unsafe { start.add(place * LONG) };
        // SAFETY: each place is given once.
        list.prepend(Chain::new(unsafe { Block::new(block) }));
    }
    // SAFETY: the blocks lie in the memory from `start` on.
    let mut places = unsafe { Places::of(start, class(LONG), list) };
    let (block, count) = places.join(128, 128).unwrap();
    let offset = block.start().addr().get() - start.addr().get();
    assert_eq!(offset, LONG + skip);
    let parts = touched(offset, 128, class(LONG));
    assert_eq!((parts.len(), parts.start), (count as usize, offset / LONG));
    let mut list = List::new();
    // SAFETY: just joined out of these.
    list.prepend(unsafe { cut(block, offset - parts.start * LONG, class(LONG), count, Key::NONE) });
    let owner = core::iter::from_fn(|| list.pop()).map(|block| block.into_start().addr().get() - start.addr().get());
    assert!(owner.eq(parts.map(|part| part * LONG)));
    assert_eq!(places.into_chain().map(|chain| chain.count()), Some(15 - count));
}

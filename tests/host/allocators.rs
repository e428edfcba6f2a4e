//! Collections over a heap, by the `Allocator` traits that they are written for.

#![cfg(any(feature = "allocator-api2-02", feature = "allocator-api2-04"))]

use std::alloc::Layout;

use smp_heap::{Heap, Hint, cpu::UnknownCpu};

use crate::common::{AtRest, Books};

type Tested = Heap<Books, Hint<UnknownCpu>, 2>;

/// Does `work` with a heap, in which nothing is left then.
fn with_heap(work: impl FnOnce(&Tested)) {
    let heap = Tested::new(Books::default(), Hint(UnknownCpu));
    work(&heap);
    heap.verify_all().unwrap();
    heap.trim(0);
    assert_eq!(heap.provider().held_len(), 0);
}

/// A vector and a box: grown, shrunk, zeroed, of more than one alignment.
#[cfg(any(feature = "allocator-api2-02", feature = "allocator-api2-04"))]
macro_rules! collections {
    ($name:ident, $api:ident) => {
        #[test]
        fn $name() {
            use $api::alloc::Allocator;
            with_heap(|heap| {
                let mut numbers = $api::vec::Vec::new_in(heap);
                (0..50_000_u64).for_each(|number| numbers.push(number));
                numbers.truncate(10);
                numbers.shrink_to_fit();
                assert!(numbers.iter().copied().eq(0..10) && numbers.capacity() == 10);
                assert_eq!(*$api::boxed::Box::new_in([7_u8; 100], heap), [7; 100]);
                let (narrow, wide) = (Layout::new::<[u64; 9]>(), Layout::from_size_align(300, 128).unwrap());
                let zeroed = heap.allocate_zeroed(narrow).unwrap();
                // SAFETY: just allocated, zeroed, as long as the slice.
                assert!(unsafe { zeroed.as_ref() }.iter().all(|byte| *byte == 0));
                // SAFETY: it is of that Layout, and used here only.
                let wider = unsafe { heap.grow(zeroed.cast(), narrow, wide) }.unwrap();
                assert_eq!(wider.cast::<u8>().addr().get() % 128, 0);
                // SAFETY: as above.
                let narrower = unsafe { heap.shrink(wider.cast(), wide, narrow) }.unwrap();
                // SAFETY: what was zeroed at first was moved twice.
                assert!(unsafe { narrower.as_ref() }.iter().take(narrow.size()).all(|byte| *byte == 0));
                // SAFETY: as above; its last use.
                unsafe { heap.deallocate(narrower.cast(), narrow) };
            });
        }
    };
}

#[cfg(feature = "allocator-api2-02")]
collections!(collections_of_allocator_api2_0_2, allocator_api2_02);
#[cfg(feature = "allocator-api2-04")]
collections!(collections_of_allocator_api2_0_4, allocator_api2_04);

#[test]
#[cfg(feature = "allocator-api2-02")]
fn a_hash_map_lives_in_the_heap() {
    with_heap(|heap| {
        let mut map = hashbrown::HashMap::new_in(heap);
        (0..10_000_u64).for_each(|number| _ = map.insert(number, number.to_string()));
        assert_eq!(map.get(&77).map(String::as_str), Some("77"));
        assert!(heap.stats().live_len() > 10_000 * 32, "the table is the heap's");
        map.retain(|number, _| *number < 10);
        map.shrink_to_fit();
        assert_eq!(map.len(), 10);
    });
}

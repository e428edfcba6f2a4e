//! Blocks that grow: what is copied, over a provider that can move pages and over one that cannot.

use std::alloc::Layout;
use std::ptr::NonNull;

#[cfg(target_os = "linux")]
use crate::common::Mmap;
use crate::common::{AtRest, Books};
use crate::host_pages::HostPages;
use smp_heap::battery::{Call, Faulty};
use smp_heap::cpu::UnknownCpu;
use smp_heap::{Heap, Hint, MAX_SMALL_LEN, PageProvider};

type Grown<P> = Heap<P, Hint<UnknownCpu>, 2>;

#[cfg(target_os = "linux")]
const LAST: usize = 64 << 20;

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 1).unwrap()
}

/// A block that knows its content by a few places: enough to see that it moved whole.
struct Bytes<'a, P: PageProvider> {
    heap: &'a Grown<P>,
    start: NonNull<u8>,
    size: usize,
}

impl<'a, P: PageProvider> Bytes<'a, P> {
    fn new(heap: &'a Grown<P>, size: usize) -> Self {
        let start = heap.alloc(layout(size)).unwrap().cast();
        let bytes = Self { heap, start, size };
        bytes.write_from(0);
        bytes
    }

    fn places(from: usize, to: usize) -> impl Iterator<Item = usize> {
        (from.next_multiple_of(4099)..to).step_by(4099).chain([from, to - 1])
    }

    fn write_from(&self, from: usize) {
        for place in Self::places(from, self.size) {
            // SAFETY: inside the block, which is this value's alone.
            unsafe { self.start.as_ptr().wrapping_add(place).write(place as u8) };
        }
    }

    fn realloc(&mut self, new: usize) {
        // SAFETY: the block is this heap's, of that size.
        self.start = unsafe { self.heap.realloc(self.start, layout(self.size), new) }.unwrap().cast();
        let (old, kept) = (self.size, self.size.min(new));
        self.size = new;
        for place in (0..kept).step_by(4099) {
            // SAFETY: inside the block, and written when the block became that long.
            let byte = unsafe { self.start.as_ptr().wrapping_add(place).read() };
            assert_eq!(byte, place as u8, "the byte at {place} of {new}");
        }
        if new > old {
            self.write_from(old);
        }
    }
}

impl<P: PageProvider> Drop for Bytes<'_, P> {
    fn drop(&mut self) {
        // SAFETY: the block is this heap's, of that size, and its only user ends here.
        unsafe { self.heap.free(self.start, layout(self.size)) };
    }
}

/// As `Vec` grows when it is pushed to, or its room is doubled.
#[cfg(target_os = "linux")]
fn double<P: PageProvider>(bytes: &mut Bytes<'_, P>) {
    while bytes.size < LAST {
        bytes.realloc(2 * bytes.size);
    }
}

/// As `Vec` grows when exactly so much room is asked for as is needed.
#[cfg(target_os = "linux")]
fn step<P: PageProvider>(bytes: &mut Bytes<'_, P>) {
    while bytes.size < LAST {
        bytes.realloc((bytes.size + bytes.size.clamp(100, 300_000)).min(LAST));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn no_large_block_is_copied_if_the_provider_moves_pages() {
    for grow in [double::<Mmap>, step::<Mmap>] {
        let heap = Grown::new(Mmap::default(), Hint(UnknownCpu));
        let mut several: Vec<_> = (0..3).map(|_| Bytes::new(&heap, 8)).collect();
        // In turns, so that they are in each other's way.
        while several.iter().any(|bytes| bytes.size < 1 << 20) {
            several.iter_mut().for_each(|bytes| bytes.realloc(bytes.size + bytes.size / 2 + 1));
        }
        several.iter_mut().for_each(grow);
        let stats = heap.stats();
        assert_eq!(stats.copied_long_len, 0, "{stats}");
        let most = (3 * 3 * MAX_SMALL_LEN) as u64;
        assert!((1..=most).contains(&stats.copied_short_len), "{} bytes", stats.copied_short_len);
        // What shrinks gives pages back, and is not copied either while it is long.
        several.iter_mut().for_each(|bytes| bytes.realloc(100 << 10));
        let stats = heap.stats();
        assert_eq!(stats.copied_long_len, 0, "{stats}");
        assert!(stats.held_len < 4 << 20, "{stats}");
        drop(several);
        heap.verify_all().unwrap();
        heap.trim(0);
        assert_eq!(heap.stats().held_len, 0);
    }
}

#[test]
fn a_block_that_is_copied_is_counted_by_its_length() {
    let heap = Grown::new(Books::default(), Hint(UnknownCpu));
    let mut bytes = Bytes::new(&heap, 1000);
    let _in_the_way = Bytes::new(&heap, 1000);
    bytes.realloc(3000);
    let stats = heap.stats();
    assert_eq!((stats.copied_short_len, stats.copied_long_len), (1000, 0));
    bytes.realloc(500);
    assert_eq!(heap.stats().copied_short_len, 1500, "to a shorter block");
    let mut long = Bytes::new(&heap, 100 << 10);
    let behind = Bytes::new(&heap, 100 << 10);
    long.realloc(500 << 10);
    let stats = heap.stats();
    assert_eq!((stats.copied_short_len, stats.copied_long_len), (1500, 100 << 10), "there was no room behind it");
    drop(behind);
    long.realloc(501 << 10);
    assert_eq!(heap.stats().copied_long_len, 100 << 10, "in place");
}

/// A block may outgrow the slab sizes when there are no pages for a run of its own.
#[test]
fn growth_in_place_is_taken_when_there_are_no_pages() {
    // It can move pages, and never has any to do it with.
    let heap = Grown::new(Faulty::new(HostPages::<true, true>::default()), Hint(UnknownCpu));
    [Call::Resize, Call::Remap].into_iter().for_each(|call| heap.provider().on(call).fail(0, usize::MAX));
    let mut bytes = Bytes::new(&heap, 3000);
    bytes.realloc(30_000);
    heap.provider().set_limit(heap.stats().held_len);
    let held_len = heap.stats().held_len;
    bytes.realloc(400_000);
    bytes.realloc(600_000);
    assert_eq!((heap.stats().held_len, heap.stats().copied_long_len), (held_len, 0), "in place, in its chunk");
}

/// A block of size 0 is none of the heap's, so nothing moves out of it.
#[test]
#[cfg(target_os = "linux")]
fn what_grows_from_nothing_is_freed_again() {
    let heap = Grown::new(Mmap::default(), Hint(UnknownCpu));
    for size in [1, MAX_SMALL_LEN - 60, MAX_SMALL_LEN + 1, 2 << 20] {
        let nothing = heap.alloc(layout(0)).unwrap().cast();
        // SAFETY: just allocated with this Layout.
        let block = unsafe { heap.realloc(nothing, layout(0), size) }.unwrap().cast();
        // SAFETY: just reallocated to this size, and used no more.
        unsafe { heap.free(block, layout(size)) };
    }
    heap.drain();
    heap.trim(0);
    assert_eq!(heap.stats().held_len, 0);
}

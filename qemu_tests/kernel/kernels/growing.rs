//! `Vec<u8>` that grows, over the paging provider: blocks that are longer than slabs serve get longer in place or by
//! moving their page-table entries.
//!
//! Would catch breaking: no byte of such a block is copied; a vector that shrinks gives its pages back, and one that is
//! dropped all of them.
#![no_std]
#![no_main]
#![expect(clippy::cast_possible_truncation, reason = "patterns take the low bits; addresses have 64 bits")]

extern crate alloc;

mod common;

use alloc::vec::Vec;

use common::paging::{Provider, free_frames, shootdowns};
use smp_heap::{CpuHint, Heap, Hint, MAX_SMALL_LEN};
use smp_heap_kernel::arch::cpu_count;
use smp_heap_kernel::{Boot, cpu, interrupts, kernel, println, smp, test};

#[derive(Debug)]
struct Index;

impl CpuHint for Index {
    fn current_cpu(&self) -> Option<usize> {
        Some(cpu::index())
    }

    fn may_wait(&self) -> bool {
        interrupts::are_enabled()
    }
}

#[global_allocator]
static HEAP: Heap<Provider<false, false>, Hint<Index>, 8> =
    Heap::new(Provider::new(common::paging::Pages), Hint(Index));

const PIECE: usize = 4096;

kernel! {
    fn main(boot: &Boot) {
        common::paging::set_up(boot.largest_region());
        common::paging::open(HEAP.provider(), 0, 16 << 30);
        let all = free_frames();
        for (what, len, grow) in [
            ("pushes", 24 << 20, push as fn(usize) -> Vec<u8>),
            ("doubling", 24 << 20, double),
            ("room for each piece", 8 << 20, exact),
        ] {
            let before = shootdowns();
            let mut bytes = grow(len);
            tell(what, before);
            check(&bytes, len);
            let held_len = HEAP.stats().held_len;
            bytes.truncate(100 << 10);
            bytes.shrink_to_fit();
            check(&bytes, 100 << 10);
            assert!(HEAP.stats().held_len <= held_len - len + (1 << 20), "the pages stay\n{}", HEAP.stats());
        }
        let before = shootdowns();
        smp::on_all(|_| {
            smp::barrier();
            // As many vectors on few CPUs as on many.
            for _ in 0..boot.rounds(3_usize.div_ceil(cpu_count())) {
                for grow in [push, double, exact] {
                    check(&grow(3 << 20), 3 << 20);
                    test::did(1, "vectors");
                }
            }
        });
        tell("all CPUs at once", before);
        smp::on_all(|_| HEAP.drain_current());
        // SAFETY: the other CPUs wait for a job, and no interrupt handler uses the heap.
        unsafe { HEAP.trim_at_rest() };
        // SAFETY: as above.
        let verified = unsafe { HEAP.verify_at_rest() };
        assert!(verified.is_ok() && HEAP.stats().held_len == 0, "{}", HEAP.stats());
        assert_eq!(free_frames(), all, "frames are missing");
    }
}

/// Nothing long was ever copied; each vector was at most once as long as a slab's longest block when it was, and half
/// of that before, and so on.
fn tell(what: &str, shootdowns_before: usize) {
    let stats = HEAP.stats();
    let (short, long, shot) = (stats.copied_short_len, stats.copied_long_len, shootdowns() - shootdowns_before);
    println!("{what}: {short} bytes copied of blocks up to {MAX_SMALL_LEN}, {long} of longer ones; {shot} shootdowns");
    assert_eq!(long, 0, "{what}\n{stats}");
    test::did(shot, "shootdowns");
    assert!(short > 0, "nothing was counted");
}

fn byte(index: usize) -> u8 {
    (index ^ index >> 8 ^ index >> 16) as u8
}

fn piece(from: usize) -> [u8; PIECE] {
    core::array::from_fn(|index| byte(from + index))
}

/// Single bytes up to 1 MiB, then pages.
fn push(len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    (0..1 << 20).for_each(|index| bytes.push(byte(index)));
    while bytes.len() < len {
        bytes.extend_from_slice(&piece(bytes.len()));
    }
    bytes
}

/// Always room for twice as much, and no more.
fn double(len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        if bytes.len() == bytes.capacity() {
            bytes.reserve_exact(bytes.len().max(PIECE));
        }
        bytes.extend_from_slice(&piece(bytes.len()));
    }
    bytes
}

/// Always room for the next piece, and no more.
fn exact(len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        bytes.reserve_exact(PIECE);
        bytes.extend_from_slice(&piece(bytes.len()));
    }
    bytes
}

fn check(bytes: &[u8], len: usize) {
    assert_eq!(bytes.len(), len);
    let places = (0..len).step_by(509).chain([len - 1]);
    let wrong = places.into_iter().find(|index| bytes.get(*index) != Some(&byte(*index)));
    assert_eq!(wrong, None, "a byte is not what was written there");
}

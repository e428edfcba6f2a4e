//! The most that a heap holds beside what is live, as a formula.

use crate::base::size_class::SizeClass;
use crate::base::tuning::{
    AMPLE_CACHE_LEN, CACHED_SHARES, CHUNK_SHARE, KEPT_CHUNKS, KEPT_SHARE, LONG_BLOCKS, MAX_CHUNK_LEN,
    MAX_LONG_SLAB_LEN, MIN_CHUNK_LEN, RESERVE_SHARE,
};
use crate::heap::depot::SPARE_SHARDS;

/// Two slabs of a class at each owner: the one that is being used up, and the one empty slab that is always kept.
const SLABS: usize = 2;
/// Chunks that may be empty but for a little at each end of the size range: one of slabs, one of large blocks.
const CHUNK_LEN: usize = 2 * MIN_CHUNK_LEN;

/// Shares of the bytes held, in parts of `WHOLE`: free pages, caches, chunks on their way in.
const SHARES: usize = {
    let [_, cached_share] = CACHED_SHARES;
    WHOLE / KEPT_SHARE + WHOLE / cached_share + WHOLE / CHUNK_SHARE
};
/// Each class's empty slabs are one such part.
const WHOLE: usize = RESERVE_SHARE;
const _: () = {
    let [_, cached_share] = CACHED_SHARES;
    assert!(WHOLE % KEPT_SHARE + WHOLE % cached_share + WHOLE % CHUNK_SHARE == 0, "shares are whole parts");
};

/// The most bytes that a heap holds beside `live_len` bytes of live blocks, as long as blocks die in about the order
/// they were born: producer and consumer, queues, bursts. `classes` are those in use, `cpus` how many CPUs use the
/// heap. Blocks count with their class's [`block_len`](SizeClass::block_len).
///
/// What is held is at most `(live + fixed) / (1 - shares)`. *Fixed*: a full cache for each CPU (1 MiB), two slabs for
/// each class and owner, two chunks of 1 MiB that a little use keeps. *Shares*: free pages stay up to 1/4 of the bytes
/// held, caches up to 1/8, a new chunk is up to 1/8, empty slabs of each class up to 1/128. Saturates. It is a bound
/// for provision, not an estimate: the queues in `tests/host/memory.rs` hold less than an eighth of it.
///
/// *Held* is [`Totals::held_len`](crate::Totals::held_len) over a provider that
/// [decommits](crate::PageProvider::DECOMMITS), also when much more was live before. Over regions it is
/// [`Totals::touched_len`](crate::Totals::touched_len), with the most that was ever live: a region goes back as a
/// whole. For other providers see [`worst_case_overhead_after`].
///
/// A live set whose survivors lie far apart may hold more, whatever the allocator: as much as one block for each slab's
/// length. So may a queue that took and gave in turn while it grew, and then shrank: its blocks lie where there was
/// room. With `debug-heap` there is no such bound: blocks have headers, and each one in quarantine may keep a chunk.
pub fn worst_case_overhead(cpus: usize, classes: impl IntoIterator<Item = SizeClass>, live_len: usize) -> usize {
    let owners = cpus.saturating_add(SPARE_SHARDS);
    let (mut shares, mut fixed) = (SHARES, CHUNK_LEN.saturating_add(cpus.saturating_mul(AMPLE_CACHE_LEN)));
    for class in classes {
        let slab_len = MAX_LONG_SLAB_LEN.max(LONG_BLOCKS * class.block_len());
        fixed = fixed.saturating_add(owners.saturating_mul(SLABS * slab_len));
        shares += 1;
    }
    let rest = WHOLE.saturating_sub(shares).max(1);
    let held_len = (live_len.saturating_add(fixed) / rest).saturating_mul(WHOLE);
    held_len.saturating_sub(live_len)
}

/// [`worst_case_overhead`] of a heap in which `peak_len` bytes were live before, over a provider that takes whole
/// chunks back only: a chunk stays for a single block, and there may be two of the longest that were made for the peak,
/// an eighth of what was held and 32 MiB at most. A CPU that frees no more keeps the chunks that its cached blocks lie
/// in, unless its idle loop calls [`drain_current`](crate::Heap::drain_current).
pub fn worst_case_overhead_after(
    cpus: usize,
    classes: impl IntoIterator<Item = SizeClass> + Clone,
    live_len: usize,
    peak_len: usize,
) -> usize {
    let peak_held_len = peak_len.saturating_add(worst_case_overhead(cpus, classes.clone(), peak_len));
    let chunk_len = (peak_held_len / CHUNK_SHARE).min(MAX_CHUNK_LEN);
    let chunks_len = if peak_len > live_len { KEPT_CHUNKS * chunk_len } else { 0 };
    worst_case_overhead(cpus, classes, live_len).saturating_add(chunks_len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_of_anything_is_never_less() {
        let some = |cpus, count, live_len| worst_case_overhead(cpus, SizeClass::all().take(count), live_len);
        let base = some(2, 3, 1 << 20);
        assert!(some(3, 3, 1 << 20) > base && some(2, 4, 1 << 20) > base && some(2, 3, 2 << 20) > base);
        assert!(base >= 2 << 20, "two full caches at least");
        assert_eq!(some(8, 44, usize::MAX), 0, "nothing is left beside everything");
        let classes: std::vec::Vec<_> = SizeClass::all().take(3).collect();
        let after = |live_len, peak_len| worst_case_overhead_after(2, classes.iter().copied(), live_len, peak_len);
        assert_eq!(after(1 << 20, 1 << 20), base, "nothing was longer");
        assert!(after(1 << 20, 64 << 20) > base && after(1 << 20, 128 << 20) > after(1 << 20, 64 << 20));
        assert_eq!(after(1 << 20, usize::MAX), base + 2 * MAX_CHUNK_LEN);
        assert!(some(usize::MAX, 44, 0) > usize::MAX / 2);
    }
}

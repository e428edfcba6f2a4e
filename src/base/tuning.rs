//! Tuning constants: numbers that could be others without breaking anything, chosen for speed, memory, or the length of
//! a hold.
//!
//! Layouts of words, formats, and lengths that a struct has stay in the file that they belong to. Each group says what
//! measures it: tests by their file in `tests/host` (`cargo test --test host -- NAME`), kernels by their name (`cargo
//! test --test qemu -- NAME`), the benchmark by `cd benches && cargo run --release`. Whoever changes one runs these
//! before and after, and `cargo run -p smp-heap-qemu --bin budgets`, which shows each row of instructions that changes.
//! A share is a divisor: so many times less than the bytes named.

use crate::base::sync::looks;

// Caches. How much blocks wait in caches, and how many leave at once: `instructions` (the longest calls), `memory` and
// `hourglass` (what is held), the benchmark.

/// The most blocks in one list.
pub(crate) const MAX_BLOCKS: u32 = 256;

/// The most bytes in one list.
pub(crate) const MAX_LIST_LEN: usize = 256 * 1024;

/// A list's first limit in bytes: a cache line's worth.
pub(crate) const FIRST_LIST_LEN: usize = 64;

/// So many turns to give up room a class passes after a slow path of its own. Without, classes that are all busy take
/// room from each other at every slow path (329 instructions a replacement of `churn-1k` instead of 164); with more,
/// room stays longer where it is not needed any more.
pub(crate) const HEAT: u32 = 3;

/// From this many bytes held on, memory is spent on speed.
pub(crate) const LARGER_HEAP_LEN: usize = 1 << 20;

/// All caches together may hold this share of the bytes held: of a small heap, of a larger one.
pub(crate) const CACHED_SHARES: [usize; 2] = [16, 8];

/// A cache may hold up to this many bytes, within half of the bytes held, while there is more to be had: blocks that
/// wait in caches are then nobody's loss, and a cache that is too short for what its CPU works with is the heap's
/// greatest cost. With an eighth of the bytes held a replacement of `churn-1k` takes 409 instructions, with half 329.
pub(crate) const AMPLE_CACHE_LEN: usize = 1 << 20;

/// Slabs are sparse if less than this share of their bytes is out of them.
pub(crate) const SPARSE_SHARE: usize = 4;

/// All caches together may then hold this share of what is out: each block in a cache may keep a slab.
pub(crate) const SPARSE_CACHED_SHARE: usize = 64;

/// The most blocks that one flush returns: each is looked up. With whole lists `phases` takes 8 % fewer instructions
/// and a fifth less time, and the longest call up to 15,800 instructions.
pub(crate) const RETURN_BATCH: u32 = 48;

/// Of long blocks one flush returns as many as have so many bytes together, since each slab that they empty may go to
/// the pages.
pub(crate) const RETURN_LEN: usize = 16 << 10;

/// The least that one flush returns of a list that has as many.
pub(crate) const LEAST_BATCH: u32 = 8;

/// The most slabs that one flush sends blocks to while it gathers; those of the last groups come on top. Each may then
/// be empty and go to the pages, which takes as long as thirty look-ups.
pub(crate) const RETURN_SLABS: u32 = 6;

/// CPUs' states that are looked beside for room for another one.
pub(crate) const STATES_LOOK: usize = 16;

/// States take at most this share of the bytes held.
pub(crate) const STATES_SHARE: usize = 64;

/// So many calls in vain later a state may part the free memory.
pub(crate) const STATE_WAITS: usize = 1 << 16;

// Slabs. Their lengths and how many empty ones stay: `fullness`, `memory`, and the benchmark's batches.

/// A slab takes at most this share of the bytes held, where it needs no more for one block: of a small heap, of a
/// larger one.
pub(crate) const SLAB_SHARES: [usize; 2] = [256, 64];

/// A slab takes at most this share of the bytes in slabs of its class, where it needs no more for one block: what is
/// free in it is then little beside what the class uses.
pub(crate) const CLASS_SHARE: usize = 4;

/// Up to this share of the class's bytes a slab is made longer if little is then left over behind its last block.
pub(crate) const TIGHT_SHARE: usize = 2;

/// No slab is longer, in bytes, but on big heaps, or where one block needs more.
pub(crate) const MAX_SLAB_LEN: usize = 16 * 1024;

/// On big heaps slabs are up to four times as long: this share of the bytes held.
pub(crate) const LONG_SLAB_SHARE: usize = 512;

/// No slab on a big heap is longer, in bytes, where one block does not need more.
pub(crate) const MAX_LONG_SLAB_LEN: usize = 64 * 1024;

/// A long block's slab holds this many on a big heap.
pub(crate) const LONG_BLOCKS: usize = 4;

/// Up to so many bytes held no slab is made longer to be tight: classes need each other's memory more.
pub(crate) const SMALL_HEAP_LEN: usize = 256 * 1024;

/// The length of a slab is a multiple of this where memory is short.
pub(crate) const MIN_SLAB_LEN: usize = 256;

/// Reserves of empty slabs: all bins of a class together keep this share of the bytes held.
pub(crate) const RESERVE_SHARE: usize = 128;

/// With those that were missed, all bins of a class keep this share. They are found again in constant time, without the
/// pages' lock, and are everybody's when memory is short; beyond, a class that was busy once would keep too much, and
/// scatter what is in use over it.
pub(crate) const MISSED_SHARE: usize = 4;

/// One bin keeps so many bytes of missed slabs: about as much as a batch has that a cache has no room for. With 8 MiB,
/// what caches keep was scattered over 9 of 16 MiB; with none, batches of 4 KiB took 4 to 17 times rpmalloc's time.
pub(crate) const MAX_MISSED_LEN: usize = 1 << 20;

/// Slabs of one bin's reserve that one call of `maintain` gives to the pages.
pub(crate) const RELEASED_SLABS: u32 = 16;

/// Of the places that were not used one in so many goes. Without, churn on 8 CPUs held 1.63 times what is live.
pub(crate) const UNUSED_SHARE: u32 = 8;

/// Slabs moved from the inbox to the lists in one hold of the lock.
pub(crate) const INBOX_BATCH: u32 = 8;

/// Slabs looked at for blocks in one hold of the lock.
pub(crate) const TAKE_SLABS: u32 = 4;

/// Holds of the lock that one count of a bin's slabs may take.
pub(crate) const COUNT_HOLDS: u32 = 64;

/// Slabs looked at in one hold of the lock when one with many free blocks is searched for.
pub(crate) const JOIN_LOOKS: u32 = 4;

/// A slab is dense with free blocks if this share of its blocks is free: then most of them have neighbours.
pub(crate) const JOIN_DENSITY: usize = 4;

/// Slabs looked at in one hold of the lock when empty ones are searched for.
pub(crate) const SWEEP_SLABS: u32 = 16;

/// Slabs whose lists are walked in one hold of the lock.
pub(crate) const VERIFY_SLABS: u32 = 4;

/// How often a popper tries again when pushers come in between. Each lost try is a push that succeeded.
pub(crate) const TAKE_TRIES: u32 = 8;

/// Owners beside the own one whose slabs are searched for neighbours in one attempt.
pub(crate) const COALESCED_OWNERS: usize = 8;

/// Walks over slabs of one class that find no neighbours, before a search goes on with shorter ones.
pub(crate) const BARREN_WALKS: usize = 4;

// Pages. How long a pool's lock is held, and what is set aside: `instructions`, `set_aside`, `one_piece`.

/// Deferred runs freed in one hold.
pub(crate) const DRAIN_LIMIT: usize = 4;

/// Runs of the bin in which all are long enough that are tested for alignment.
pub(crate) const ALIGNED_LOOK: usize = 8;

/// Runs of a bin that are tested for length.
pub(crate) const LENGTH_LOOK: usize = 16;

/// Attempts to pop one deferred run; each fails only because another context pushed one.
pub(crate) const POP_LIMIT: u32 = 8;

/// Empty chunks tested for not being too long to be given back.
pub(crate) const EMPTY_LOOK: usize = 8;

/// A free run must be longer than this many times the block to have the block placed in its middle.
pub(crate) const MIDDLE_RATIO: usize = 8;

/// More than one part in so many of a pool must be free to have a CPU's state placed where it parts memory.
pub(crate) const END_RATIO: usize = 4;

/// Granules that the mark of what was used moves by at least.
pub(crate) const TOUCH_STEP: usize = 64;

/// Bytes held for each active shard. Below it, slabs and large blocks share chunks when one kind is out.
pub(crate) const SHARD_LEN: usize = 16 << 20;

/// What is held is thought to be used up to this length.
pub(crate) const FIRST_LEN: usize = 1 << 20;

/// Rounds a pool is searched in by `Pages::alloc_any`: 16 runs each. More only than there are bins to look at.
/// With 64, a fit behind 500 shorter runs of its bin is found.
pub(crate) const ROUND_LIMIT: usize = 64;

/// A run is set aside in a heap that used so many times as much.
pub(crate) const SPARE_SHARE: usize = 128;

/// One of so many is set aside in any heap; the others only in one of one chunk, as a region is, while as much of that
/// was never used: elsewhere each might keep a chunk, and later classes have slabs.
pub(crate) const SPARE_STEP: usize = 4;

/// Below so many bytes held, nothing is set aside: a small heap is filled to the brim.
pub(crate) const SPARE_HEAP_LEN: usize = 2 << 20;

/// Cached runs that an allocation frees before it is refused.
pub(crate) const RELEASED_RUNS: usize = 4;

/// Most holds that `Pages::drain_deferred` takes of a pool: 1024 runs.
pub(crate) const DRAIN_HOLDS: usize = 256;

// Growth, and what goes back. How much is asked for at once, and when it goes back: `giving_back`, `emptied`, `memory`.

/// The shortest chunk worth asking a provider for that has as much.
pub(crate) const MIN_CHUNK_LEN: usize = 1024 * 1024;

/// The longest chunk that is wished for.
pub(crate) const MAX_CHUNK_LEN: usize = 32 * 1024 * 1024;

/// A new chunk is this share of the bytes held, so that the number of chunks grows with the logarithm of the heap's
/// size.
pub(crate) const CHUNK_SHARE: usize = 8;

/// Up to so many bytes held, a chunk for slabs is a smaller share of them: what is held then stays closer to what is
/// used. On longer heaps that would be more chunks than the first table of their map holds.
pub(crate) const FINE_HEAP_LEN: usize = 64 * 1024 * 1024;

/// The share that a chunk for slabs is of a heap up to [`FINE_HEAP_LEN`]. With [`CHUNK_SHARE`] there, 1.125 times what
/// is live was held instead of 1.063; on every heap, 666 instructions instead of 367 are spent.
pub(crate) const FINE_CHUNK_SHARE: usize = 32;

/// Free pages up to this share of the bytes held stay with the heap.
pub(crate) const KEPT_SHARE: usize = 4;

/// So many bytes of free pages keep their memory, whatever the heap's size, unless somebody asks.
pub(crate) const KEPT_LEN: usize = 1024 * 1024;

/// Memory goes back after a free when this share more than what stays is free.
pub(crate) const RETURN_STEP: usize = 8;

/// Pages whose memory goes back are at least so many bytes in one piece, if some may stay.
pub(crate) const RETURN_PIECE_LEN: usize = 16 * 1024;

/// How often `search` asks for its turn at the provider, or for its chunk to be noted. The gate is not fair, so that
/// who comes while several others are with the provider all the time loses many turns; without one turn, "none" would
/// say nothing.
pub(crate) const GROW_TRIES: u32 = 64;

/// Each call of `maintain` forgets this share of what was in use once and is not now.
pub(crate) const DECAY_SHARE: usize = 8;

/// Each free that might give pages back forgets this share of what was asked for again after it had gone back.
pub(crate) const REGRET_SHARE: usize = 1 << 16;

/// So many chunks may stay although little is used of each. Of a provider that takes whole chunks back only, more are
/// looked at: after 64 MiB of blocks on 4 CPUs, of which 4 MiB stayed, 20 blocks a chunk that waited in caches kept 65
/// chunks of 1 MiB.
pub(crate) const KEPT_CHUNKS: usize = 2;

/// Free pages are looked at when they are more than this share of the bytes held.
pub(crate) const LOOK_SHARE: usize = 4;

/// Free pages are looked at when they are more than so many bytes.
pub(crate) const LOOK_LEN: usize = 1 << 20;

/// Free pages are looked at when they are this share more than at the last look.
pub(crate) const LOOK_STEP: usize = 8;

/// How many turns a run may miss that is given back, resized or moved. Else it would become a chunk, or be copied.
pub(crate) const PROVIDER_TURNS: u32 = 64;

/// From this length on a fresh block is a run of its own, if the provider can move runs.
pub(crate) const HUGE_LEN: usize = 1024 * 1024;

/// A huge block is kept even if this share of its length was not missed lately: what was missed is forgotten slowly.
pub(crate) const HUGE_SLACK: usize = 4;

/// How often a huge block is asked for while others are with the provider, and noted while others write to the same
/// table.
pub(crate) const NOTE_TRIES: u32 = 64;

/// How often a cache that has to be empty is drained, where others may put blocks into it meanwhile.
pub(crate) const RETIRE_TRIES: u32 = 64;

// Out of memory, and waits. How long somebody looks before it is told that there is none: `refusals`, `waits`, `gate`,
// and the kernels `exhaustion` and `every_storm`.

/// How often `search` looks again because a lock was busy, before it asks for pages it may not need. Each look waits
/// within the spin limit, so the sum is about a millisecond: more than any holder takes that runs, less than a time
/// slice of one that does not.
pub(crate) const BUSY_TRIES: u32 = 16;

/// The same for a context that may have interrupted the heap on its own CPU, which is not certain: what other CPUs held
/// in one moment they may have given up in the next.
pub(crate) const NESTED_TRIES: u32 = 4;

/// How often `search` looks again before it gives up, while it sees a lock held: a context that was preempted in the
/// middle of a step, here or in the provider, or a virtual CPU that its host does not run, hides what it holds for a
/// time slice. Each look waits within the spin limit.
pub(crate) const LAST_TRIES: u32 = 4096;

/// One part in so many of these looks goes to a holder of the pages' lock alone, before anything is drained: it may be
/// a preempted task, and those that wait for it meanwhile would give away what handlers live on.
pub(crate) const HOLDER_SHARE: u32 = 2;

/// So many looks in a row without a lock in sight end the search: during a single one somebody may have come and gone
/// unseen.
pub(crate) const QUIET_LOOKS: u32 = 2;

/// Looks for neighbours to join, a slab each, when there are no pages for a short block.
pub(crate) const JOIN_TRIES: u32 = 64;

/// How often the kernel is asked to relieve the pressure for one allocation.
pub(crate) const RELIEF_TRIES: u32 = 64;

/// A request that is longer than so many times what the heap holds is not made possible by what the heap could give
/// back.
pub(crate) const HELD_TIMES: usize = 16;

/// Up to this length the heap tries everything, whatever it holds.
pub(crate) const TRIED_LEN: usize = 16 << 20;

/// A wait that was in vain leaves one of so many looks to the next, as a shift.
pub(crate) const VAIN_SHIFT: usize = 3;

/// From so many waits in vain on, no more looks are taken away.
pub(crate) const VAIN_LIMIT: usize = 4;

/// How often a waiter looks while another CPU is inside: some tenths of a second, more than several calls of a provider
/// take that sends interrupts to all CPUs and waits for them. Only who says that it may wait comes here.
pub(crate) const WAIT_LIMIT: u32 = looks(1 << 24);

/// How often one looks whose hint is the holder's too: it may be inside itself, or have interrupted the holder.
pub(crate) const EQUAL_LIMIT: u32 = looks(1 << 20);

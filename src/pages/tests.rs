//! Host tests of the page heap. Blocks are written with a pattern that is checked before they are freed, so that
//! runs which overlap cannot pass; random tests print their seed.

use super::chunk_map::{Change, ChunkMap, Entry};
use super::*;
use core::sync::atomic::Ordering::SeqCst;
use std::alloc::{alloc, alloc_zeroed, dealloc};
use std::boxed::Box;
use std::sync::Mutex;
use std::thread;
use std::vec::Vec;

/// Single pages may be given back, so granules are no shorter.
const COARSE: Provided = Provided { zeroed: false, decommits: true };
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// A page provider's stand-in: what it gave and has not got back is freed when it is dropped.
#[derive(Default)]
struct Given(Mutex<Vec<(usize, PageRun)>>);

/// A step that holds nothing and may wait.
const WAITING: Step<'static> = &|work| work(true);

/// A chunk that nothing is to be cut from at once.
fn nothing(use_: Use) -> Want {
    Want { len: 0, least_len: 0, align: 1, use_ }
}

impl Given {
    fn map(&self, run: PageRun) -> Mapping {
        // SAFETY: a run's length is not 0.
        let start = NonNull::new(unsafe { alloc(run.layout()) }).unwrap();
        // SAFETY: the run was just allocated.
        unsafe { start.write_bytes(0xa5, run.len()) };
        self.0.lock().unwrap().push((start.as_ptr().expose_provenance(), run));
        // SAFETY: just allocated, and nobody else's.
        unsafe { Mapping::new(start, run) }
    }

    fn unmap(&self, memory: Mapping) {
        let (start, run) = (memory.start(), memory.run());
        let mut runs = self.0.lock().unwrap();
        let at = runs.iter().position(|given| *given == (start.as_ptr().addr(), run));
        runs.remove(at.expect("the heap gave back a run that it was not given"));
        // SAFETY: given by `map`, and found in the list.
        unsafe { start.write_bytes(0x5a, run.len()) };
        // SAFETY: as above.
        unsafe { dealloc(start.as_ptr(), run.layout()) };
    }

    /// The provider has the chunk back.
    fn take(&self, chunk: EmptyChunk) -> GoneChunk {
        let taken = chunk.offer(|memory| {
            self.unmap(memory);
            Ok(())
        });
        taken.unwrap()
    }

    fn chunk<const N: usize>(&self, pages: &Pages<N>, len: usize, align: usize, use_: Use, shard: usize) {
        self.chunk_of(COARSE, pages, len, align, use_, shard);
    }

    fn chunk_of<const N: usize>(
        &self,
        provided: Provided,
        pages: &Pages<N>,
        len: usize,
        align: usize,
        use_: Use,
        shard: usize,
    ) {
        let run = PageRun::new(len, align, KIB).unwrap();
        let mut memory = self.map(run);
        loop {
            // `Busy` when a thread was preempted in the map's lock.
            let refused;
            (refused, memory) = match pages.add_chunk(memory, nothing(use_), shard, provided, WAITING) {
                Ok(_) => return,
                Err(refused) => refused,
            };
            match refused {
                AddError::Full => {
                    let table = self.map(PageRun::new(pages.next_table_len(), 4096, 4096).unwrap());
                    let _ = pages.add_table(table).map_err(|(_, table)| self.unmap(table));
                }
                _ => assert_eq!(refused, AddError::Busy),
            }
            thread::yield_now();
        }
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        for (start, run) in self.0.lock().unwrap().drain(..) {
            // SAFETY: given by `map` and not unmapped.
            unsafe { dealloc(core::ptr::with_exposed_provenance_mut(start), run.layout()) };
        }
    }
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 33) as usize % end
    }

    /// Any order of magnitude up to `max` is equally likely.
    fn length(&mut self, max: usize) -> usize {
        let top = 1 << self.below(max.ilog2() as usize + 1);
        1 + self.below(top)
    }
}

/// Seeds of a test: from `SEED` if set, else `count` fixed ones. Prints the seed when the test fails.
fn seeds(count: u64, test: impl Fn(u64)) {
    if let Ok(seed) = std::env::var("SEED") {
        return test(seed.parse().expect("SEED is a number"));
    }
    for seed in 1..=count {
        let result = std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| test(seed)));
        if let Err(cause) = result {
            std::eprintln!("failed with SEED={seed}");
            std::panic::resume_unwind(cause);
        }
    }
}

/// A run in use, with a pattern of its own.
struct Block {
    desc: *const PageDesc,
    start: NonNull<u8>,
    len: usize,
    use_: Use,
    id: u64,
}

// SAFETY: a block belongs to whoever has it.
unsafe impl Send for Block {}

impl Block {
    fn new(run: &Run<'_>, use_: Use, id: u64) -> Self {
        let block = Block { desc: run.desc, start: run.start, len: run.len, use_, id };
        block.write(0);
        block
    }

    fn desc(&self) -> &PageDesc {
        // SAFETY: the run is in use, so its descriptor is there.
        unsafe { &*self.desc }
    }

    fn words(&self, from: usize) -> impl Iterator<Item = (NonNull<u64>, u64)> {
        (from..self.len).step_by(512).map(move |at| {
            // SAFETY: `at` is inside the block.
            let word = unsafe { self.start.add(at) };
            (word.cast(), self.id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at as u64)
        })
    }

    fn write(&self, from: usize) {
        for (word, value) in self.words(from) {
            // SAFETY: inside the block, aligned to 512.
            unsafe { word.write(value) };
        }
    }

    fn check(&self) {
        for (word, value) in self.words(0) {
            // SAFETY: inside the block, aligned to 512.
            assert_eq!(unsafe { word.read() }, value, "block {} was overwritten", self.id);
        }
    }

    /// The descriptor is found again from any address in a slab, and from a large block's start.
    fn check_lookup<const N: usize>(&self, pages: &Pages<N>, at: usize) {
        let at = if self.use_ == Use::Slab { at % self.len } else { 0 };
        // SAFETY: `at` is inside the block.
        let addr = unsafe { self.start.add(at) };
        let chunk = pages.lookup(addr).expect("the map does not know the chunk of a live block");
        assert!(core::ptr::eq(chunk.head_of(addr).unwrap(), self.desc), "{at} leads to another head");
    }
}

fn get<const N: usize>(
    pages: &Pages<N>,
    len: usize,
    align: usize,
    use_: Use,
    shard: usize,
    id: u64,
) -> Result<Block, Refused> {
    let run = pages.alloc(len, align, use_, shard, true)?;
    Ok(new_block(pages, &run, (len, align), use_, id))
}

fn new_block<const N: usize>(
    pages: &Pages<N>,
    run: &Run<'_>,
    (len, align): (usize, usize),
    use_: Use,
    id: u64,
) -> Block {
    assert!(run.len >= len, "too short");
    assert_eq!(run.start.as_ptr().addr() % align, 0, "not aligned");
    assert_eq!(pages.usable_len(run.desc), run.len);
    Block::new(run, use_, id)
}

fn give<const N: usize>(pages: &Pages<N>, block: Block) {
    block.check();
    pages.free(block.desc());
}

/// Frees what may be a large block's run as that CPU does, which may keep it. False: it is none.
fn free_large<const N: usize>(pages: &Pages<N>, cpu: usize, desc: &PageDesc) -> bool {
    let (tag, kept) = (desc.tag(), kept_of(pages, cpu));
    let is_large = tag.is(Kind::Large);
    #[cfg(not(feature = "hardened"))]
    if pages.keep_again(kept, Chunk::start_of(desc)) {
        return is_large;
    }
    if is_large && !pages.keep(kept, desc, tag) {
        pages.free(desc);
    }
    is_large
}

/// What one of three CPUs keeps.
fn kept_of<const N: usize>(pages: &Pages<N>, cpu: usize) -> &RunCache {
    const OTHERS: usize = 2;
    if pages.kept.iter().next().is_none() {
        for _ in 0..OTHERS {
            pages.add_run_cache(Box::leak(Box::new(RunCache::new())));
        }
    }
    [pages.first_run_cache()].into_iter().chain(pages.kept.iter()).nth(cpu).unwrap()
}

/// A large block's run, as that CPU allocates it.
fn alloc_large<const N: usize>(pages: &Pages<N>, cpu: usize, len: usize, align: usize) -> Option<Run<'_>> {
    let kept = kept_of(pages, cpu);
    let at_hand = pages.reuse(kept, len, align).or_else(|| pages.cut(kept, cpu, len, align))?;
    let (start, run) = (at_hand.start(), at_hand.into_run());
    assert_eq!(start, Chunk::start_of(run.desc));
    Some(run)
}

/// Random allocations, frees, deferred frees, cached runs and resizes over chunks of the given lengths, verified after
/// every other step.
fn mix(seed: u64, chunks: &[usize], steps: usize) {
    let (given, pages, mut rng) = (Given::default(), Box::new(Pages::<3>::new()), Rng(seed * 77 + 1));
    for (at, len) in chunks.iter().enumerate() {
        given.chunk(&pages, *len, KIB, if at % 2 == 0 { Use::Large } else { Use::Slab }, at);
    }
    let longest = chunks.iter().copied().max().unwrap();
    let mut blocks: Vec<Block> = Vec::new();
    let mut last_len = 1;
    for step in 0..steps {
        let fill = rng.below(100) < if step / 200 % 2 == 0 { 60 } else { 40 };
        if fill || blocks.is_empty() {
            let use_ = [Use::Slab, Use::Large, Use::Grown][rng.below(3)];
            let len = rng.length(if use_ == Use::Slab { longest.min(64 * KIB) } else { longest / 2 });
            let len = if rng.below(3) == 0 { last_len } else { len };
            last_len = len;
            let far = rng.below(8) == 0;
            let align = 1 << rng.below(if far { 22 } else { 14 });
            let own = if use_ == Use::Large { alloc_large(&pages, rng.below(3), len, align) } else { None };
            let run = own.or_else(|| pages.alloc(len, align, use_, rng.below(9), true).ok());
            if let Some(run) = run {
                let block = new_block(&pages, &run, (len, align), use_, step as u64);
                block.check_lookup(&pages, rng.below(MIB));
                blocks.push(block);
            }
        } else {
            let at = rng.below(blocks.len());
            let mut block = blocks.swap_remove(at);
            block.check_lookup(&pages, rng.below(MIB));
            match rng.below(4) {
                0 => {
                    let locks: Vec<_> = pages.pools().filter_map(|pool| pages.open(pool, false)).collect();
                    give(&pages, block);
                    drop(locks);
                }
                1 if block.use_ != Use::Slab => {
                    block.check();
                    let (len, old) = (rng.length(2 * block.len), block.len);
                    if pages.resize(block.desc(), len, false).is_some() {
                        block.len = pages.usable_len(block.desc());
                        assert!(block.len >= len);
                        block.write(old.min(block.len) / 512 * 512);
                    }
                    blocks.push(block);
                }
                2 if block.use_ != Use::Slab => {
                    block.check();
                    assert!(free_large(&pages, rng.below(3), block.desc()));
                }
                _ => give(&pages, block),
            }
        }
        // It frees what is kept.
        if rng.below(2) == 0 {
            assert_eq!(pages.verify(), Ok(()), "step {step}");
        }
    }
    blocks.drain(..).for_each(|block| give(&pages, block));
    assert_eq!(pages.verify(), Ok(()));
    assert_eq!(pages.pools().map(Pool::empty_count).sum::<usize>(), chunks.len(), "not all merged again");
}

#[test]
fn random_mixes_keep_every_invariant() {
    seeds(6, |seed| {
        mix(seed, &[4 * KIB], 300);
        mix(seed, &[100 * KIB], 1500);
        mix(seed, &[MIB, 100 * KIB, 4 * KIB, 8 * KIB], 1500);
        mix(seed, &[64 * MIB, 3 * MIB], 1500);
        mix(seed, &[5 * KIB + MIB; 12], 1500);
    });
}

/// The short way asks one pool, which must be open, and looks at one run; and leaves the rest to the search.
#[test]
fn what_lies_at_hand_is_had_from_the_own_pool_alone() {
    let (given, pages) = (Given::default(), Box::new(Pages::<2>::new()));
    given.chunk(&pages, 20 * MIB, 4 * KIB, Use::Large, 0);
    given.chunk(&pages, 64 * KIB, 4 * KIB, Use::Slab, 0);
    pages.set_ample(true);
    let near = |len, align, use_| pages.alloc_near(len, align, use_, 0);
    let first = near(MIB, 4 * KIB, Use::Large).unwrap();
    assert_eq!((first.kind(), pages.usable_len(first)), (Kind::Large, MIB));
    let rest = near(19 * MIB, 1, Use::Large);
    assert!(rest.is_none(), "its descriptors are in the way");
    for (len, align, use_) in
        [(MIB, 8 * KIB, Use::Large), (MIB, 1, Use::Slab), (MIB, 1, Use::Grown), (0, 1, Use::Large)]
    {
        assert!(near(len, align, use_).is_none(), "{len} at a multiple of {align} for {use_:?}");
    }
    pages.set_ample(false);
    pages.free(near(MIB, 1, Use::Slab).expect("kinds mix when the provider gives less than wished for"));
    pages.set_ample(true);
    let pool = pages.pool_of(Chunk::of(first)).unwrap();
    let open = pages.open(pool, false).unwrap();
    assert!(near(MIB, 1, Use::Large).is_none(), "busy");
    pages.free(first);
    assert_eq!(first.kind(), Kind::Deferred);
    drop(open);
    assert_eq!(pages.usable_len(near(MIB, 1, Use::Large).unwrap()), MIB);
    assert_eq!(pages.verify(), Ok(()));
}

/// A chunk of 8 MiB for large blocks of two CPUs, and its free bytes.
fn large_chunk() -> (Given, Box<Pages<2>>, usize) {
    let (given, pages) = (Given::default(), Box::new(Pages::<2>::new()));
    given.chunk(&pages, 8 * MIB, 4 * KIB, Use::Large, 0);
    let whole = pages.free_len();
    (given, pages, whole)
}

/// A run that is as long as the one cut last waits for the next block of that length, unmerged, and no lock is taken;
/// who cuts another length frees it.
#[test]
fn a_freed_run_is_kept_for_a_block_of_its_length() {
    let (_given, pages, whole) = large_chunk();
    let near = |len| alloc_large(&pages, 0, len, 1).unwrap().desc;
    let free = |desc| assert!(free_large(&pages, 0, desc));
    let settled = |used: usize| {
        assert_eq!(pages.verify(), Ok(()));
        assert_eq!(pages.free_len(), whole - used);
    };
    let [first, second] = [near(MIB), near(MIB)];
    free(first);
    assert_eq!((first.kind(), pages.free_len()), (Kind::Deferred, whole - 2 * MIB), "kept");
    assert!(!free_large(&pages, 0, first), "no large block any more");
    free(second);
    assert_eq!(second.kind(), Kind::Free, "one is kept, not two");
    let granule = 1 << Chunk::of(first).shift();
    for (len, align) in [(MIB + 1, 1), (MIB - granule, 1), (MIB, 16 * MIB), (0, 1)] {
        assert!(pages.reuse(pages.first_run_cache(), len, align).is_none(), "{len} at a multiple of {align}");
    }
    assert_eq!(first.kind(), Kind::Deferred);
    settled(0);
    let [first, second] = [near(MIB), near(MIB)];
    free(first);
    let open: Vec<_> = pages.pools().filter_map(|pool| pages.open(pool, false)).collect();
    assert!(core::ptr::eq(near(MIB - 1), first), "handed out again, without a lock");
    free(first);
    drop(open);
    let longer = near(MIB + 4 * KIB);
    assert_eq!((pages.free_len(), pages.pools().any(Pool::has_deferred)), (whole - 2 * MIB - 4 * KIB, false), "freed");
    free(longer);
    assert_eq!(longer.kind(), Kind::Deferred);
    free(second);
    settled(0);
}

/// By its address alone, as long as it is what it was and no other run came between.
#[cfg(not(feature = "hardened"))]
#[test]
fn the_run_that_was_kept_last_is_kept_again() {
    let (given, pages, whole) = large_chunk();
    given.chunk(&pages, MIB, 4 * KIB, Use::Large, 1);
    let again = |run: &PageDesc| pages.keep_again(pages.first_run_cache(), Chunk::start_of(run));
    let taken = || pages.reuse(pages.first_run_cache(), MIB, 1).map(|run| run.into_run().desc);
    let settled = |run: &PageDesc| {
        pages.free(run);
        assert_eq!((pages.verify(), pages.free_len() > whole), (Ok(()), true));
    };
    let cut = || pages.cut(pages.first_run_cache(), 0, MIB, 1).unwrap().into_run().desc;
    let kept = || {
        let run = cut();
        assert!(!again(run), "known only when it was kept");
        assert!(pages.keep(pages.first_run_cache(), run, run.tag()));
        let had = taken().unwrap();
        assert!(core::ptr::eq(had, run));
        had
    };
    let run = kept();
    for _ in 0..3 {
        assert!(again(run) && run.kind() == Kind::Deferred && !again(run), "once");
        assert!(core::ptr::eq(taken().unwrap(), run));
    }
    let other = cut();
    assert!(!again(run) && !again(other), "another one was cut since");
    pages.free(other);
    settled(run);

    let run = kept();
    assert_eq!(pages.resize(run, 2 * MIB, false), Some(2 * MIB));
    assert!(!again(run), "longer now");
    settled(run);

    let run = kept();
    let start = Chunk::start_of(run);
    pages.free(run);
    assert!(!pages.keep_again(pages.first_run_cache(), start), "free");
    let slab = pages.alloc(MIB, 1, Use::Slab, 0, false).unwrap().desc;
    assert!(core::ptr::eq(slab, run) && !pages.keep_again(pages.first_run_cache(), start), "no large block");
    settled(slab);

    let run = kept();
    let gone = pages.take_empty(0).unwrap();
    assert!(!again(run), "a chunk has left since, which may be this one");
    pages.chunk_gone(gone.offer(|_| Ok(())).unwrap());
    pages.free(run);
    assert!(again(kept()), "none has left since");
    assert_eq!((pages.verify(), pages.free_len()), (Ok(()), whole));
}

/// Whoever is refused by the pools has what others keep; and so has a block that grows into it.
#[test]
fn what_one_cpu_keeps_serves_every_other() {
    let (_given, pages, whole) = large_chunk();
    let keeps = |len| {
        let run = alloc_large(&pages, 1, len, 1).unwrap().desc;
        assert!(free_large(&pages, 1, run));
        assert_eq!((run.kind(), pages.free_len()), (Kind::Deferred, whole - len));
        run
    };
    keeps(4 * MIB);
    let all = pages.alloc(whole, 1, Use::Large, 0, false).unwrap();
    pages.free(all.desc);
    let behind = keeps(MIB);
    let middle = alloc_large(&pages, 1, MIB, 1).unwrap().desc;
    assert!(core::ptr::eq(middle, behind));
    let front = middle;
    let behind = alloc_large(&pages, 1, MIB, 1).unwrap().desc;
    assert!(free_large(&pages, 1, behind));
    assert_eq!(behind.kind(), Kind::Deferred);
    assert_eq!(pages.resize(front, 2 * MIB, false), Some(2 * MIB));
    assert!(free_large(&pages, 0, front));
    assert_eq!(front.kind(), Kind::Free, "nothing is kept of a length that was not cut");
    keeps(MIB);
    assert_eq!((pages.verify(), pages.free_len()), (Ok(()), whole), "verifying frees what is kept");
    keeps(MIB);
    assert!(pages.drain_deferred(WAITING) && pages.free_len() == whole && !pages.drain_deferred(WAITING));
}

/// A chunk all of which is one run becomes empty at once.
#[test]
fn a_run_that_is_its_whole_chunk_is_not_kept() {
    let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
    given.chunk(&pages, 256 * KIB, 4 * KIB, Use::Large, 0);
    let len = pages.free_len();
    let run = pages.alloc(len, 1, Use::Large, 0, false).unwrap().desc;
    pages.first_run_cache().note_cut(run);
    assert!(free_large(&pages, 0, run));
    assert_eq!(run.kind(), Kind::Free);
    assert_eq!(pages.pools().map(Pool::empty_count).sum::<usize>(), 1);
}

/// Free runs of one bin, first, between others, last and alone there, lose a granule to the used run in front of each
/// and stay in the bin.
#[test]
fn a_free_run_that_gets_shorter_within_its_bin_keeps_its_place() {
    for (count, at) in [(3, 0), (3, 1), (3, 2), (1, 0)] {
        let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
        given.chunk(&pages, MIB, 4 * KIB, Use::Large, 0);
        let take = |len, id| get(&pages, len, 1, Use::Large, 0, id).unwrap();
        let pairs: Vec<_> = (0..3).map(|id| (take(4 * KIB, id), take(144 * KIB, id + 3))).collect();
        let _guard = take(4 * KIB, 6);
        let (used, free): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        free.into_iter().take(count).for_each(|run| give(&pages, run));
        assert_eq!(pages.resize(used[at].desc(), 8 * KIB, false), Some(8 * KIB), "run {at} of {count}");
        assert_eq!(pages.verify(), Ok(()), "run {at} of {count}");
    }
}

#[test]
fn a_small_chunk_has_as_many_granules_as_fit() {
    // In units of 256 bytes; the third is where descriptors are shorter, as pointers are.
    for (len, usable, usable_32) in [
        (1, 3, 3),
        (4, 14, 14),
        (8, 28, 29),
        (16, 56, 58),
        (17, 64, 64),
        (100, 384, 388),
        (512, 1984, 2000),
        (513, 2016, 2024),
        (1024, 4032, 4048),
        (2049, 8128, 8144),
    ] {
        let usable = if usize::BITS < 64 { usable_32 } else { usable };
        let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
        given.chunk_of(Provided::UNKNOWN, &pages, len * KIB, 4 * KIB, Use::Large, 0);
        assert_eq!(pages.free_len(), usable * 256, "chunk of {len} KiB");
        assert_eq!(pages.largest_free(), usable * 256);
        let block = get(&pages, usable * 256, 1, Use::Large, 0, 1).unwrap();
        assert_eq!(pages.alloc(1, 1, Use::Slab, 0, true).err(), Some(Refused::Empty));
        give(&pages, block);
    }
    let (given, pages, run) = (Given::default(), Pages::<1>::new(), PageRun::new(256, KIB, 256).unwrap());
    let refused = pages.add_chunk(given.map(run), nothing(Use::Large), 0, Provided::UNKNOWN, WAITING);
    assert!(refused.is_err_and(|(error, memory)| error == AddError::TooSmall && memory.run() == run));
}

#[test]
fn the_run_computed_for_a_length_fits_it() {
    // Also where one granule's descriptors still fit into the length up to which granules are shorter, and the other's
    // do not.
    let lens = (0..64).map(|i| 1 + i * 1021).chain((236..264).map(|kib| kib * KIB - 5)).chain([MIB, 3 * MIB + 1]);
    let lens = lens.chain((488..516).chain(2000..2048).map(|kib| kib * KIB - 5));
    for (at, len) in lens.enumerate() {
        let pages = [(1, KIB), (64, 4 * KIB), (4 * KIB, 16 * KIB), (256 * KIB, 4 * KIB)];
        for ((align, page_len), provided) in
            pages.into_iter().flat_map(|page| [(page, Provided::UNKNOWN), (page, COARSE)])
        {
            let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
            let run = chunk_len_for(len, align, page_len).unwrap();
            given.chunk_of(provided, &pages, run.len(), run.align(), Use::Large, 0);
            give(&pages, get(&pages, len, align, Use::Large, 0, at as u64).unwrap());
        }
    }
    let run = chunk_len_for(2 * MIB, 2 * MIB, 4 * KIB).unwrap();
    assert!(run.len() < 2 * MIB + 32 * KIB, "the end holds the header, so alignment costs no second 2 MiB");
    assert_eq!((chunk_len_for(0, 1, 4096), chunk_len_for(usize::MAX / 2, 1, 4096)), (None, None));
    assert_eq!(chunk_len_for(1, 3, 4096), None);
}

/// Or a nested caller gets a chunk, and nothing of it: the chunk waits at the lock that the caller interrupted.
#[test]
fn whoever_asked_for_a_chunk_is_served_before_it_is_entered() {
    for len in (0..64).map(|i| 1 + i * 1021).chain((1..12).map(|i| MIB * i / 4)) {
        let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
        let run = chunk_len_for(len, 8, 4 * KIB).unwrap();
        let want = Want { len, least_len: len, align: 8, use_: Use::Large };
        let served = pages.add_chunk(given.map(run), want, 0, Provided::UNKNOWN, WAITING).unwrap();
        assert!(served.is_some_and(|served| served.len >= len), "{len} bytes of a chunk of {}", run.len());
    }
}

/// A chunk of 1 MiB that is known to hold zeros.
fn with_zeroed_chunk(test: impl FnOnce(&Pages<1>)) {
    let run = PageRun::new(MIB, 4096, 4096).unwrap();
    // SAFETY: a run's length is not 0.
    let start = NonNull::new(unsafe { alloc_zeroed(run.layout()) }).unwrap();
    let pages = Box::new(Pages::<1>::new());
    // SAFETY: just allocated, zeroed.
    pages
        .add_chunk(
            unsafe { Mapping::new(start, run) },
            nothing(Use::Large),
            0,
            Provided { zeroed: true, ..COARSE },
            WAITING,
        )
        .unwrap();
    test(&pages);
    // SAFETY: allocated above; the test has ended.
    unsafe { dealloc(start.as_ptr(), run.layout()) };
}

#[test]
fn a_used_run_in_front_of_a_zeroed_one_makes_it_no_zeros() {
    with_zeroed_chunk(|pages| {
        let first = pages.alloc(8 * KIB, 1, Use::Large, 0, true).unwrap();
        assert!(first.zeroed && first.desc.index() == 0);
        pages.free(first.desc);
        assert!(!pages.alloc(9 * KIB, 1, Use::Large, 0, true).unwrap().zeroed);
    });
}

#[test]
fn a_fresh_zeroed_chunk_stays_zeroed_until_used() {
    with_zeroed_chunk(zeroed_until_used);
}

fn zeroed_until_used(pages: &Pages<1>) {
    let take = |len| {
        let run = pages.alloc(len, 8192, Use::Large, 0, true).unwrap();
        if run.zeroed {
            // SAFETY: the run is `len` bytes long, and initialised since its chunk was zeroed.
            let bytes = unsafe { core::slice::from_raw_parts(run.start.as_ptr(), run.len) };
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
        (Block::new(&run, Use::Large, 7), run.zeroed)
    };
    let (first, second) = (take(5 * KIB), take(8 * KIB));
    assert!(first.1 && second.1, "splitting keeps the flag");
    give(pages, first.0);
    let (again, rest) = (take(5 * KIB), take(200 * KIB));
    assert!(!again.1 && rest.1, "a used run is not zeroed, the rest is");
    assert_eq!(pages.verify(), Ok(()));
    give(pages, rest.0);
    assert!(!take(400 * KIB).1, "merged with a used run");
}

/// The first run of a chunk is handed out, used and freed before the rest of the chunk comes into the pool.
#[test]
fn a_run_handed_out_first_may_be_freed_before_its_chunk_arrives() {
    let run = PageRun::new(MIB, 4096, 4096).unwrap();
    // SAFETY: a run's length is not 0.
    let start = NonNull::new(unsafe { alloc_zeroed(run.layout()) }).unwrap();
    let pages = Box::new(Pages::<1>::new());
    let want = Want { len: 100 * KIB, least_len: KIB, align: 4096, use_: Use::Large };
    {
        let _locks: Vec<_> = pages.pools().filter_map(|pool| pages.open(pool, false)).collect();
        // SAFETY: just allocated, zeroed.
        let first = pages
            .add_chunk(unsafe { Mapping::new(start, run) }, want, 0, Provided { zeroed: true, ..COARSE }, WAITING)
            .unwrap()
            .unwrap();
        assert!(first.zeroed && first.len == 100 * KIB && first.start == start);
        give(&pages, Block::new(&first, Use::Large, 1));
    }
    assert_eq!(pages.verify(), Ok(()));
    assert_eq!(pages.pools().map(Pool::empty_count).sum::<usize>(), 1);
    let all = pages.alloc(1016 * KIB, 1, Use::Large, 0, true).unwrap();
    assert!(!all.zeroed, "its start was used");
    // SAFETY: allocated above; not touched any more.
    unsafe { dealloc(start.as_ptr(), run.layout()) };
}

#[test]
fn a_busy_pool_is_passed_by_and_its_frees_are_deferred() {
    let (given, pages) = (Given::default(), Box::new(Pages::<2>::new()));
    given.chunk(&pages, 20 * MIB, 4 * KIB, Use::Large, 0);
    let block = get(&pages, MIB, 4 * KIB, Use::Large, 0, 1).unwrap();
    let pool = pages.pools().nth(Chunk::of(block.desc()).pool()).unwrap();
    {
        let _open = pages.open(pool, false).unwrap();
        assert_eq!(pages.alloc(4096, 1, Use::Large, 0, false).err(), Some(Refused::Busy));
        assert_eq!(pages.alloc(4096, 1, Use::Large, 0, true).err(), Some(Refused::Busy), "waits within a bound");
        given.chunk(&pages, 8 * MIB, 4 * KIB, Use::Large, 1);
        let moved_on = get(&pages, 4096, 1, Use::Large, 0, 2).expect("the other shard is open");
        assert_eq!(pages.resize(block.desc(), 2 * MIB, true), None);
        let before = pages.free_len();
        give(&pages, block);
        assert_eq!(pages.free_len(), before, "nobody may touch the pool's lists now");
        give(&pages, moved_on);
    }
    assert!(pages.drain_deferred(WAITING));
    assert!(!pages.drain_deferred(WAITING));
    assert_eq!(pages.verify(), Ok(()));
    assert!(pages.has_surplus() || pages.pools().map(Pool::empty_count).sum::<usize>() == 2);
}

#[test]
fn one_hold_drains_a_few_deferred_runs_only() {
    let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
    given.chunk(&pages, MIB, 4 * KIB, Use::Slab, 0);
    let blocks: Vec<_> = (0..20).map(|id| get(&pages, 4096, 4096, Use::Slab, 0, id).unwrap()).collect();
    let pool = pages.pools().nth(Chunk::of(blocks[0].desc()).pool()).unwrap();
    {
        let _open = pages.open(pool, false);
        blocks.into_iter().for_each(|block| give(&pages, block));
    }
    let before = pages.free_len();
    drop(pages.open(pool, false));
    assert_eq!(pages.free_len() - before, crate::base::tuning::DRAIN_LIMIT * 4096);
    assert_eq!(pages.verify(), Ok(()));
}

#[test]
fn an_empty_chunk_is_taken_put_back_and_given_back() {
    let (given, pages) = (Given::default(), Box::new(Pages::<2>::new()));
    let run = PageRun::new(MIB, MIB, 4096).unwrap();
    for _ in 0..3 {
        given.chunk(&pages, run.len(), run.align(), Use::Large, 0);
    }
    assert!(pages.has_surplus());
    let block = get(&pages, 600 * KIB, 1, Use::Large, 0, 1).unwrap();
    let (held_len, free_len) = (pages.held_len(), pages.free_len());
    assert!(pages.take_empty(free_len - KIB).is_none(), "keep is a floor");
    assert_eq!(pages.verify(), Ok(()));

    let first = pages.take_empty(0).unwrap();
    assert_eq!(first.memory.run(), run);
    assert!(pages.lookup(first.memory.start()).is_none(), "a leaving chunk is not found");
    let second = pages.take_empty(0).unwrap();
    assert!(pages.take_empty(0).is_none(), "the third one is in use");
    assert_eq!(pages.alloc(700 * KIB, 1, Use::Large, 0, true).err(), Some(Refused::Empty));
    pages.put_back(first.offer(Err).unwrap_err());
    give(&pages, get(&pages, 700 * KIB, 1, Use::Large, 0, 2).unwrap());
    pages.chunk_gone(given.take(second));
    assert_eq!((pages.held_len(), pages.free_len()), (held_len - MIB, free_len - 1016 * KIB));
    assert_eq!(pages.verify(), Ok(()));

    // Putting back while the pool's lock is taken.
    let third = pages.take_empty(0).unwrap();
    {
        let _locks: Vec<_> = pages.pools().filter_map(|pool| pages.open(pool, false)).collect();
        pages.put_back(third);
    }
    assert_eq!(pages.verify(), Ok(()));
    give(&pages, block);
    while let Some(chunk) = pages.take_empty(0) {
        pages.chunk_gone(given.take(chunk));
    }
    assert_eq!((pages.held_len(), pages.free_len(), pages.map.used()), (0, 0, 0));
    assert_eq!(given.0.lock().unwrap().len(), 0, "page for page");
    assert_eq!(pages.verify(), Ok(()));
}

#[test]
fn the_chunk_emptied_last_is_kept() {
    let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
    given.chunk(&pages, MIB, 4096, Use::Large, 0);
    assert!(!pages.has_surplus());
    let block = get(&pages, 900 * KIB, 1, Use::Large, 0, 1).unwrap();
    given.chunk(&pages, MIB, 4096, Use::Large, 0);
    assert!(!pages.has_surplus());
    let last = pages.lookup(block.start).unwrap().addr();
    give(&pages, block);
    assert!(pages.has_surplus());
    let taken = pages.take_empty(0).unwrap();
    assert_ne!(taken.memory.start().as_ptr().addr(), last);
    assert!(!pages.has_surplus());
    pages.chunk_gone(given.take(taken));
}

#[test]
fn a_grown_block_has_room_on_both_sides() {
    let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
    given.chunk(&pages, 64 * MIB, 2 * MIB, Use::Large, 0);
    let low = get(&pages, MIB, 4096, Use::Large, 0, 1).unwrap();
    let block = get(&pages, MIB, 4096, Use::Grown, 0, 2).unwrap();
    assert!(block.start.as_ptr().addr() - low.start.as_ptr().addr() > 16 * MIB);
    assert_eq!(pages.resize(block.desc(), 16 * MIB, false), Some(16 * MIB), "grows where it is");
    block.check();
    assert_eq!(pages.verify(), Ok(()));
    give(&pages, block);
    let tight = get(&pages, 12 * MIB, 4096, Use::Grown, 0, 3).unwrap();
    assert_eq!(tight.start.as_ptr().addr(), low.start.as_ptr().addr() + MIB, "no room to waste");
    assert_eq!(pages.verify(), Ok(()));
}

#[test]
fn a_fit_behind_many_shorter_runs_is_found_under_pressure() {
    let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
    given.chunk(&pages, 48 * MIB, 4096, Use::Large, 0);
    // Of one bin (128 to 159 KiB): one run of 156 KiB, then many of 128 KiB in front of it.
    let longer = get(&pages, 180 * KIB, 1, Use::Large, 0, 0).unwrap();
    let (mut blocks, mut filler) = (Vec::from([get(&pages, 4 * KIB, 1, Use::Large, 0, 0).unwrap()]), Vec::new());
    for len in core::iter::once(156).chain([128; 300]) {
        blocks.push(get(&pages, len * KIB, 1, Use::Large, 0, 0).unwrap());
        blocks.push(get(&pages, 4 * KIB, 1, Use::Large, 0, 0).unwrap());
    }
    while let Ok(rest) = get(&pages, 4 * KIB, 1, Use::Large, 0, 0) {
        filler.push(rest);
    }
    for block in blocks.into_iter().skip(1).step_by(2) {
        give(&pages, block);
    }
    assert_eq!(pages.alloc(150 * KIB, 1, Use::Large, 0, true).err(), Some(Refused::Empty), "the quick search");
    assert!(pages.alloc_any(150 * KIB, 1, Use::Large, WAITING).is_ok());
    assert_eq!(pages.verify(), Ok(()));
    // A long enough run of a later bin is found at once, however many short ones are in the own bin.
    give(&pages, longer);
    assert!(pages.alloc(150 * KIB, 1, Use::Large, 0, true).is_ok());
    assert_eq!(pages.alloc_any(200 * KIB, 1, Use::Large, WAITING).err(), Some(Refused::Empty));
}

#[test]
fn absurd_requests_are_refused() {
    let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
    given.chunk(&pages, MIB, 4096, Use::Large, 0);
    for (len, align) in
        [(0, 1), (1, 3), (1, 0), (usize::MAX, 1), (usize::MAX / 2, 4096), (1, 1 << (usize::BITS - 1)), (2 * MIB, 1)]
    {
        assert_eq!(pages.alloc(len, align, Use::Large, 0, true).err(), Some(Refused::Empty), "{len} {align}");
    }
    let none = Pages::<0>::new();
    assert_eq!(none.alloc(1, 1, Use::Slab, 5, true).err(), Some(Refused::Empty));
    let block = get(&pages, KIB, 1, Use::Large, usize::MAX, 1).unwrap();
    assert_eq!([usize::MAX, 0].map(|len| pages.resize(block.desc(), len, true)), [None; 2]);
    let desc = block.desc;
    give(&pages, block);
    // SAFETY: the chunk is still there.
    pages.free(unsafe { &*desc });
    assert_eq!(pages.verify(), Ok(()), "a second free does nothing");
}

#[test]
fn threads_share_a_page_heap() {
    seeds(3, |seed| {
        let (given, pages) = (Given::default(), Box::new(Pages::<4>::new()));
        for shard in 0..4 {
            given.chunk(&pages, 16 * MIB, 2 * MIB, Use::Large, shard);
            given.chunk(&pages, 4 * MIB, 4 * KIB, Use::Slab, shard);
        }
        let parcel: Mutex<Vec<Block>> = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for me in 0..8usize {
                let (pages, parcel, given) = (&pages, &parcel, &given);
                scope.spawn(move || work(seed * 8 + me as u64, me, pages, parcel, given));
            }
        });
        parcel.into_inner().unwrap().into_iter().for_each(|block| give(&pages, block));
        assert_eq!(pages.verify(), Ok(()));
        assert_eq!(
            pages.free_len(),
            pages.pools().flat_map(|p| pages.open(p, true).unwrap().chunks()).map(Chunk::len).sum()
        );
    });
}

fn work(seed: u64, me: usize, pages: &Pages<4>, parcel: &Mutex<Vec<Block>>, given: &Given) {
    let (mut rng, mut blocks) = (Rng(seed + 99), Vec::new());
    for step in 0..4000u64 {
        match rng.below(16) {
            0..7 => {
                let use_ = [Use::Slab, Use::Slab, Use::Large, Use::Grown][rng.below(4)];
                let len = rng.length(if use_ == Use::Slab { 64 * KIB } else { MIB });
                let shard = if rng.below(8) == 0 { rng.below(4) } else { me };
                if let Ok(block) = get(pages, len, 1 << rng.below(14), use_, shard, seed << 32 | step) {
                    block.check_lookup(pages, rng.below(MIB));
                    blocks.push(block);
                }
            }
            7..13 if !blocks.is_empty() => give(pages, blocks.swap_remove(rng.below(blocks.len()))),
            13 if !blocks.is_empty() => {
                let mut others = parcel.lock().unwrap();
                others.push(blocks.swap_remove(rng.below(blocks.len())));
                let at = rng.below(others.len());
                blocks.push(others.swap_remove(at));
            }
            14 if !blocks.is_empty() => {
                let at = rng.below(blocks.len());
                let block: &mut Block = &mut blocks[at];
                if block.use_ != Use::Slab {
                    block.check();
                    let old = block.len;
                    if pages.resize(block.desc(), rng.length(2 * old), step % 2 == 0).is_some() {
                        block.len = pages.usable_len(block.desc());
                        block.write(old.min(block.len) / 512 * 512);
                    }
                }
            }
            15 if step % 8 == 0 => match pages.take_empty(0) {
                Some(chunk) if rng.below(2) == 0 => pages.chunk_gone(given.take(chunk)),
                Some(chunk) => pages.put_back(chunk),
                None => given.chunk(pages, MIB + rng.below(64) * 4096, 4096, [Use::Slab, Use::Large][me % 2], me),
            },
            _ => {}
        }
    }
    blocks.into_iter().for_each(|block| give(pages, block));
}

#[test]
fn huge_blocks_are_found_by_their_start() {
    let pages = Pages::<1>::new();
    let at = |addr: usize| NonNull::new(core::ptr::without_provenance_mut::<u8>(addr)).unwrap();
    let run = |len, align| PageRun::new(len, align, 4096).unwrap();
    for index in 1..=40 {
        pages.insert_huge(at(index * 16 * MIB), run(index * 4096, 4096 << (index % 9)), false).unwrap();
    }
    for index in 1..=40 {
        assert_eq!(pages.huge_run(at(index * 16 * MIB)), Some(run(index * 4096, 4096 << (index % 9))));
        assert_eq!(pages.huge_run(at(index * 16 * MIB + 4096)), None);
        assert!(pages.lookup(at(index * 16 * MIB)).is_none());
    }
    assert!(pages.update_huge(at(16 * MIB), run(MIB, 8192)));
    assert_eq!(pages.huge_run(at(16 * MIB)), Some(run(MIB, 8192)));
    assert_eq!(pages.verify(), Ok(()));
    let left = pages.leave_huge(at(16 * MIB)).unwrap();
    assert_eq!(pages.huge_run(at(16 * MIB)), None);
    pages.huge_stays(at(16 * MIB), left);
    assert_eq!(pages.leave_huge(at(16 * MIB)), Some(run(MIB, 8192)));
    pages.huge_gone(at(16 * MIB), left);
    assert_eq!((pages.huge_run(at(16 * MIB)), pages.map.used()), (None, 39));
    assert_eq!(pages.verify(), Ok(()));
    assert_eq!(pages.insert_huge(at(100), run(4096, 4096), false), Err(AddError::TooSmall));
}

fn fake(start: usize, len: usize) -> Entry {
    Entry::fake(start, start + len)
}

fn add_table(map: &ChunkMap, given: &Given) {
    let run = PageRun::new(map.next_table_len(), 4096, 4096).unwrap();
    map.add_table(given.map(run)).unwrap();
}

/// Chunks side by side with lengths from 4 KiB to 4 MiB (1 MiB, where addresses are short), some with gaps between.
fn neighbours(rng: &mut Rng, count: usize) -> Vec<(usize, usize)> {
    let mut start = if usize::BITS < 64 { 0x234 } else { 0x1234 } * MIB;
    let doublings = if usize::BITS < 64 { 9 } else { 11 };
    core::iter::repeat_with(|| {
        let len = KIB * (4 << rng.below(doublings)) - KIB * rng.below(3);
        start += rng.below(2) * 7 * KIB + len;
        (start - len, len)
    })
    .take(count)
    .collect()
}

#[test]
fn thousands_of_chunks_are_found_and_leave_no_trace() {
    seeds(3, |seed| {
        let (given, map, mut rng) = (Given::default(), Box::new(ChunkMap::new()), Rng(seed));
        let chunks = neighbours(&mut rng, 5000);
        let mut tables = 0;
        for (start, len) in &chunks {
            while let Err(refused) = map.insert(&fake(*start, *len), false) {
                assert_eq!(refused, AddError::Full);
                assert!(tables < 16, "tables are used badly");
                tables += 1;
                add_table(&map, &given);
            }
        }
        let found = |addr| map.lookup(addr).map(|header| header.addr());
        for (start, len) in &chunks {
            let end = start + len;
            assert_eq!([*start, start + len / 2, end - 1].map(found), [Some(end); 3], "{start:x}");
        }
        assert!(map.take_empty_table().is_none());
        for (at, (start, len)) in chunks.iter().enumerate() {
            if at % 2 == 0 {
                map.change(&fake(*start, *len), Change::Remove);
            } else {
                map.change(&fake(*start, *len), Change::Leave);
                assert_eq!(found(*start), None);
                map.change(&fake(*start, *len), Change::Stay);
                assert_eq!(found(*start), Some(start + len));
                map.change(&fake(*start, *len), Change::Leave);
                map.change(&fake(*start, *len), Change::Forget);
            }
            assert_eq!(found(*start), None);
        }
        assert_eq!(map.used(), 0);
        while let Some(table) = map.take_empty_table() {
            given.unmap(table);
            tables -= 1;
        }
        assert_eq!(tables, 0);
    });
}

/// Readers look up chunks that stay while a writer enters and takes out others around them, in all tables, and adds
/// tables and gives them back (overwriting them).
#[test]
fn lookups_are_right_while_the_map_changes() {
    seeds(2, |seed| {
        let (given, map, mut rng) = (Given::default(), Box::new(ChunkMap::new()), Rng(seed));
        let chunks = neighbours(&mut rng, 1200);
        let (stay, go): (Vec<_>, Vec<_>) = chunks.into_iter().enumerate().partition(|(at, _)| at % 4 == 0);
        let enter = |start, len| {
            while map.insert(&fake(start, len), true).is_err() {
                add_table(&map, &given);
            }
        };
        stay.iter().for_each(|(_, (start, len))| enter(*start, *len));
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let readers: Vec<_> = (0..3)
                .map(|reader| {
                    let (map, stay, done) = (&map, &stay, &done);
                    scope.spawn(move || {
                        let mut rng = Rng(seed * 10 + reader);
                        while !done.load(SeqCst) {
                            for _ in 0..200 {
                                let (_, (start, len)) = stay[rng.below(stay.len())];
                                let found = map.lookup(start + rng.below(len)).map(|header| header.addr());
                                assert_eq!(found, Some(start + len), "{start:x}");
                            }
                            thread::sleep(core::time::Duration::from_micros(100));
                        }
                    })
                })
                .collect();
            let mut returned = 0;
            for _ in 0..60 {
                go.iter().for_each(|(_, (start, len))| enter(*start, *len));
                go.iter().for_each(|(_, (start, len))| map.change(&fake(*start, *len), Change::Remove));
                for _ in 0..1000 {
                    if let Some(table) = map.take_empty_table() {
                        given.unmap(table);
                        returned += 1;
                    }
                }
            }
            done.store(true, SeqCst);
            assert!(returned > 0, "no table was ever given back");
            readers.into_iter().for_each(|reader| reader.join().unwrap());
        });
    });
}

#[test]
fn a_table_is_not_given_back_under_a_reader() {
    let (given, map) = (Given::default(), Box::new(ChunkMap::new()));
    add_table(&map, &given);
    map.for_test_with_reader(|| assert!(map.take_empty_table().is_none()));
    assert!(map.take_empty_table().is_some());
}

#[test]
fn every_run_is_shown_once() {
    let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
    given.chunk(&pages, MIB, 4096, Use::Large, 0);
    let _large = get(&pages, 20 * KIB, 1, Use::Large, 0, 1).unwrap();
    let _slab = get(&pages, 8 * KIB, 8 * KIB, Use::Slab, 0, 2).unwrap();
    let mut seen = Vec::new();
    pages.for_each_run(&mut |run| {
        assert_eq!(run.chunk_start + run.offset, Chunk::start_of(run.desc).as_ptr().addr());
        seen.push((run.kind, run.len));
    });
    assert_eq!(seen.iter().map(|(_, len)| len).sum::<usize>(), 1016 * KIB);
    assert!(seen.contains(&(Kind::Large, 20 * KIB)) && seen.contains(&(Kind::Slab, 8 * KIB)));
}

/// What `verify` is for: each invariant, broken by hand, is named.
#[test]
fn verify_names_what_is_broken() {
    let broken = |hurt: &dyn Fn(&Pages<1>, &Block, &Block)| {
        let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
        given.chunk(&pages, MIB, 4096, Use::Large, 0);
        let blocks = [0, 1, 2].map(|id| get(&pages, 20 * KIB, 1, Use::Large, 0, id).unwrap());
        pages.free(blocks[1].desc());
        assert_eq!(pages.verify(), Ok(()));
        hurt(&pages, &blocks[0], &blocks[1]);
        pages.verify().unwrap_err().rule
    };
    fn inside(block: &Block, at: usize) -> &PageDesc {
        Chunk::of(block.desc()).desc(block.desc().index() + at).unwrap()
    }
    assert_eq!(broken(&|_, used, _| used.desc().set(Kind::Large, 3, false)), 2);
    assert_eq!(broken(&|_, used, _| used.desc().set(Kind::Large, 500, false)), 1);
    assert_eq!(broken(&|_, used, _| inside(used, 4).set(Kind::Free, 5, false)), 2);
    let free_unmerged = |_: &Pages<1>, used: &Block, _: &Block| {
        used.desc().set(Kind::Free, 5, false);
        used.desc().next.set(Some(used.desc()));
        used.desc().prev.set(Some(used.desc()));
        inside(used, 4).set(Kind::Free, 5, false);
    };
    assert_eq!(broken(&free_unmerged), 3);
    assert_eq!(broken(&|_, _, free| free.desc().prev.set(None)), 4);
    assert_eq!(broken(&|_, _, free| free.desc().next.set(Some(free.desc()))), 4);
    let chunk = |block: &Block| Entry::of(Chunk::of(block.desc()));
    assert_eq!(broken(&|pages, used, _| pages.map.change(&chunk(used), Change::Remove)), 7);
    assert_eq!(broken(&|pages, _, _| pages.held_len.add(1)), 8);
    assert_eq!(broken(&|pages, _, _| _ = pages.own_len.fetch_add(1, Relaxed)), 8);
}

#[test]
fn all_zero_is_the_empty_state() {
    let layout = core::alloc::Layout::new::<Pages<2>>();
    // SAFETY: the layout is not of size 0.
    let pages = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap().cast::<Pages<2>>();
    {
        // SAFETY: zeroed memory of the right layout; every field of `Pages` is valid as zeros.
        let pages: &Pages<2> = unsafe { pages.as_ref() };
        let given = Given::default();
        given.chunk(pages, 4 * KIB, 4 * KIB, Use::Slab, 0);
        give(pages, get(pages, 2 * KIB, 1, Use::Large, 0, 1).unwrap());
        assert_eq!(pages.held_len(), 4 * KIB, "the map's own table is usable");
        assert_eq!(pages.verify(), Ok(()));
    }
    // SAFETY: allocated above with this layout.
    unsafe { dealloc(pages.as_ptr().cast(), layout) };
}

/// Each lock is held, as by a context that was interrupted: runs that were set aside serve, each once, until ordinary
/// callers set others aside.
#[test]
fn who_finds_every_lock_held_has_what_was_set_aside() {
    let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
    given.chunk(&pages, 64 * MIB, 4 * KIB, Use::Large, 0);
    // Some of it was used.
    let used = pages.alloc(16 * MIB, 1, Use::Large, 0, true).unwrap();
    pages.free(used.desc);
    let slab = |id| get(&pages, 4 * KIB, 1, Use::Slab, 0, id).unwrap();
    let all = SPARE_LENS.len() as u64;
    let mut blocks: Vec<_> = (0..all).map(slab).collect();
    let free_len = pages.free_len();
    {
        let _open: Vec<_> = pages.pools().filter_map(|pool| pages.open(pool, false)).collect();
        for (id, len) in SPARE_LENS.into_iter().enumerate().rev() {
            let use_ = if len > 16 * KIB { Use::Large } else { Use::Slab };
            let run = pages.alloc(len - KIB, 1, use_, 0, false).unwrap();
            blocks.push(new_block(&pages, &run, (len, 1), use_, id as u64 + 100));
        }
        assert_eq!(pages.alloc(KIB, 1, Use::Slab, 0, false).err(), Some(Refused::Busy));
        assert_eq!(pages.free_len(), free_len);
    }
    assert_eq!(pages.verify(), Ok(()));
    blocks.extend((0..all).map(slab));
    assert!(pages.drain_deferred(WAITING), "others were set aside");
    blocks.into_iter().for_each(|block| give(&pages, block));
    assert_eq!(pages.verify(), Ok(()));
    assert_eq!(pages.pools().map(Pool::empty_count).sum::<usize>(), 1);
}

/// With `hardened`, who frees a block whose run is longer than it is would be told that its Layout is wrong.
#[test]
fn a_large_block_of_what_was_set_aside_is_no_longer_than_others() {
    let (given, pages) = (Given::default(), Box::new(Pages::<1>::new()));
    given.chunk(&pages, 64 * MIB, 4 * KIB, Use::Large, 0);
    pages.free(pages.alloc(16 * MIB, 1, Use::Large, 0, true).unwrap().desc);
    let slabs: Vec<_> = SPARE_LENS.iter().map(|_| pages.alloc(4 * KIB, 1, Use::Slab, 0, true).unwrap()).collect();
    let free_len = pages.free_len();
    let blocks: Vec<_> = {
        let _open: Vec<_> = pages.pools().filter_map(|pool| pages.open(pool, false)).collect();
        [KIB, 5000, 9 * KIB, 20 * KIB].map(|len| (len, pages.alloc(len, 1, Use::Large, 0, false).unwrap())).into()
    };
    for (len, run) in &blocks {
        assert!(run.len - len < 1 << Chunk::of(run.desc).shift(), "{} bytes for {len}", run.len);
    }
    assert_eq!(pages.verify(), Ok(()));
    assert!(pages.free_len() > free_len, "the rests, which whoever opens a pool frees");
    slabs.iter().chain(blocks.iter().map(|(_, run)| run)).for_each(|run| pages.free(run.desc));
    assert_eq!(pages.verify(), Ok(()));
    assert_eq!(pages.pools().map(Pool::empty_count).sum::<usize>(), 1);
}

/// Free pages that go back leave as many bytes as are to be kept.
#[test]
fn idle_pages_leave_what_is_to_be_kept() {
    let (_given, pages, whole) = large_chunk();
    let block = pages.alloc(64 * KIB, 1, Use::Large, 0, false).unwrap();
    let (free_len, keep) = (pages.free_len(), 256 * KIB);
    assert!(pages.take_idle(4 * KIB, free_len, 4 * KIB).is_none(), "all are to be kept");
    let idle = pages.take_idle(4 * KIB, keep, 4 * KIB).unwrap();
    let (start, len) = idle.pages();
    assert_eq!((start.addr().get() % (4 * KIB), len % (4 * KIB)), (0, 0));
    assert!((keep..keep + 8 * KIB).contains(&pages.free_len()), "{} of {free_len} are left", pages.free_len());
    assert_eq!(pages.verify(), Ok(()));
    pages.stayed(idle);
    pages.free(block.desc);
    assert_eq!((pages.verify(), pages.free_len()), (Ok(()), whole));
}

/// CPUs' states lie side by side at the end of a chunk, unless there was no place for long.
#[test]
fn a_run_of_the_heaps_own_parts_nothing() {
    let (_given, pages, whole) = large_chunk();
    let (part, own_len) = (whole / 8, pages.own_len());
    let own = |others: &[NonNull<u8>], may_part| pages.alloc_own(6000, 128, others.iter().copied(), may_part);
    let blocks: Vec<_> = (0..7).map(|_| pages.alloc(part, 1, Use::Large, 0, false).unwrap()).collect();
    let last = own(&[], false).expect("before the chunk's end");
    let rest = pages.alloc(pages.free_len(), 1, Use::Large, 0, false).unwrap();
    pages.free(blocks[1].desc);
    assert!(own(&[last.start], false).is_none() && own(&[last.start], true).is_none(), "in a full chunk");
    pages.free(blocks[3].desc);
    pages.free(blocks[5].desc);
    assert!(own(&[last.start], false).is_none() && own(&[], false).is_none(), "in the middle");
    let parting = own(&[last.start], true).expect("there is plenty");
    let behind = own(&[last.start, parting.start], false).expect("beside it");
    assert_eq!(behind.start.addr().get() + behind.len, parting.start.addr().get());
    pages.free(rest.desc);
    let next = own(&[behind.start, last.start], false).unwrap();
    assert_eq!(next.start.addr().get() + next.len, behind.start.addr().get());
    let other = own(&[last.start], false).expect("before it");
    assert_eq!(other.start.addr().get() + other.len, last.start.addr().get());
    for block in [0, 2, 4, 6].map(|index| &blocks[index]) {
        pages.free(block.desc);
    }
    [last, next, parting, behind, other].iter().for_each(|run| pages.free_own(run.desc));
    assert_eq!((pages.verify(), pages.free_len(), pages.own_len()), (Ok(()), whole, own_len));
}

/// What the heap itself needs is neither a block nor free, and counts as the page heap's own.
#[test]
fn a_run_of_the_heaps_own_is_no_block() {
    let (_given, pages, whole) = large_chunk();
    let (own_len, held_len) = (pages.own_len(), pages.held_len());
    let first = pages.alloc(64 * KIB, 1, Use::Large, 0, false).unwrap();
    let run = pages.alloc_own(6000, 128, core::iter::empty(), false).unwrap();
    pages.free(first.desc);
    assert_eq!((run.start.addr().get() % 128, run.len), (0, 8 * KIB));
    assert_eq!((pages.free_len(), pages.own_len()), (whole - run.len, own_len + run.len));
    assert_eq!((pages.verify(), pages.held_len()), (Ok(()), held_len));
    let worked_len = pages.worked_len();
    let next = pages.alloc_own(6000, 128, core::iter::empty(), false).unwrap();
    let rest = pages.alloc(whole - 2 * run.len, 1, Use::Large, 0, false).expect("what stays parts nothing");
    pages.free(rest.desc);
    pages.free_own(next.desc);
    assert_eq!((pages.verify(), pages.worked_len() >= worked_len), (Ok(()), true));
    pages.free(run.desc);
    assert_eq!((run.desc.kind(), pages.resize(run.desc, 1, false)), (Kind::Own, None), "nobody's to free");
    assert!(pages.take_empty(0).is_none());
    pages.free_own(run.desc);
    assert_eq!((pages.verify(), pages.free_len(), pages.own_len()), (Ok(()), whole, own_len));
}

/// The memory of two neighbours goes back on two CPUs. One of them finds the pool's lock held, by the other.
#[test]
fn a_run_on_its_way_to_the_absent_ones_is_not_taken_for_one() {
    let (_given, pages, whole) = large_chunk();
    let [behind, front] = [1, 2].map(|count| pages.take_idle(4 * KIB, whole - count * MIB, 4 * KIB).unwrap());
    assert_eq!(front.pages().0.as_ptr().wrapping_add(MIB), behind.pages().0.as_ptr(), "neighbours");
    let run = front.0.desc;
    let pool = pages.pool_of(Chunk::of(run)).unwrap();
    let open = pages.open(pool, false).unwrap();
    pages.went_back(behind);
    pages.held_len.sub(MIB);
    open.release(Descs::around(run), run, pool::mark_emptied(run, run.len()));
    assert_eq!(pages.absent_len(), MIB, "the other one waits");
    drop(open);
    assert_eq!(pages.verify(), Ok(()));
    assert_eq!((pages.absent_len(), run.len() << Chunk::of(run).shift()), (2 * MIB, 2 * MIB), "one run");
}

//! A chunk: one run of the provider's pages, cut into granules that are described one by one.
//!
//! ```text
//! [ granule 0 | granule 1 | ...              | header | descriptor of granule 0, 1, ... | unused ]
//! ^ start, as much aligned as the run        ^ one cache line
//! ```
//!
//! Decisions, and what pays for each:
//! - *Header and descriptors stand at the end*, so that the chunk's start keeps the alignment that the provider
//!   gave: a block of 2 MiB at a multiple of 2 MiB wastes no second 2 MiB. Price: a chunk is a little longer than
//!   the power of two it may have been asked for; [`chunk_len_for`] does that sum.
//! - *The granule is 256 bytes in chunks up to 16 KiB, 1 KiB up to 512 KiB, else 4 KiB, or 2 KiB while the heap holds
//!   no more than 2 MiB.* With it a first chunk of 4 KiB has 14 granules, one of 100 KiB gives 96 KiB, one of 1 MiB can
//!   be had in one piece but for 1.6 %, and the descriptors of a large heap stay below 1 % of it. Price: run lengths of
//!   different chunks compare only in bytes (or units of 256), so every descriptor's length is shifted by its chunk's.
//! - *A descriptor leads back to its chunk by its index*, not by a pointer: 4 bytes instead of 8, and a descriptor
//!   stays half a cache line. Price: that step leaves the reference's provenance, so the chunk's pointer is
//!   exposed once, when it is created; [`Chunk::of`] and, the other way, [`Chunk::table`] are the only places that pick
//!   it up again.

#![expect(unsafe_code, reason = "headers and descriptors in the provider's memory")]

use core::ptr::{NonNull, with_exposed_provenance, with_exposed_provenance_mut};

use super::desc::{Kind, MAX_LEN, PageDesc};
use super::owned::Mapping;
use crate::base::link::{Link, Linked, Listed};
use crate::base::sync::{AtomicU32, Ordering};
use crate::base::tuning::TOUCH_STEP;
use crate::contract::provider::PageRun;
use crate::harden::{Key, KeyCell};

/// The finest granule, as a shift: the unit that lengths are compared in.
pub(crate) const UNIT_SHIFT: u32 = 8;
/// The longest chunk, in bytes, with each of the finest granules, and that granule as a shift.
const GRANULES: [(usize, u32); 2] = [(16 << 10, UNIT_SHIFT), (512 << 10, 10)];
/// The granule of longer chunks, as a shift, while the heap holds no more than so many bytes.
const SMALL_HEAP: (usize, u32) = (2 << 20, 11);
/// Granule of all other chunks, as a shift.
pub(crate) const COARSE_SHIFT: u32 = 12;

const HEADER_LEN: usize = size_of::<Chunk>();
const DESC_LEN: usize = size_of::<PageDesc>();

/// Header of a chunk. All but the links is written once, before anybody else can see the chunk.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct Chunk {
    /// First granule; with the provenance of the whole run.
    start: NonNull<u8>,
    /// What the provider gave.
    run: PageRun,
    /// Granules, at least one; the table behind this header has as many descriptors.
    count: u32,
    /// What lies from this granule on was never used; written under the pool's lock.
    touched: AtomicU32,
    /// Granule length as a shift.
    shift: u16,
    pool: u16,
    /// Bytes between what the provider gave and `start`, where its run was less aligned than the granule.
    skip: u16,
    /// Links of the one list of its pool that the chunk is in; written under the pool's lock.
    next: Link<Chunk>,
    prev: Link<Chunk>,
    /// What the links of free blocks in this chunk are written under: the heap's.
    key: KeyCell,
}

const _: () = assert!(HEADER_LEN == 64, "one cache line");
const _: () = assert!(HEADER_LEN % align_of::<PageDesc>() == 0, "the table follows the header at once");
const _: () = assert!(1 << UNIT_SHIFT >= align_of::<Chunk>(), "a header can stand behind any granule");

/// A chunk's descriptors, with what the header says of them read once: to the compiler, the header might change with
/// every store.
#[derive(Clone, Copy)]
pub(crate) struct Descs<'a> {
    chunk: &'a Chunk,
    count: usize,
    shift: u32,
}

impl<'a> Descs<'a> {
    /// Those around a descriptor.
    #[inline]
    pub(crate) fn around(desc: &'a PageDesc) -> Self {
        Self::of(Chunk::of(desc))
    }

    /// Those of a chunk.
    #[inline]
    pub(crate) fn of(chunk: &'a Chunk) -> Self {
        Self { chunk, count: chunk.count(), shift: chunk.shift() }
    }

    #[inline]
    pub(crate) fn chunk(&self) -> &'a Chunk {
        self.chunk
    }

    /// As [`Chunk::count`].
    #[inline]
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// As [`Chunk::shift`], known to be less than a word's bits.
    #[inline]
    pub(crate) fn shift(&self) -> u32 {
        self.shift & (usize::BITS - 1)
    }

    /// As [`Chunk::desc`].
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<&'a PageDesc> {
        if index >= self.count {
            return None;
        }
        // SAFETY: `index` is less than the chunk's count, and the table has as many descriptors inside the run.
        let desc = unsafe { self.chunk.table().add(index) };
        // SAFETY: in the run and aligned (`create`), shared by reference only, alive as long as the header; every value
        // of its fields is valid, and none is read before a run that begins or ends here, or a slab, wrote it.
        Some(unsafe { desc.as_ref() })
    }

    /// The same for a granule that a run is about to begin at.
    #[inline]
    pub(crate) fn begin(&self, index: usize) -> Option<&'a PageDesc> {
        let desc = self.get(index)?;
        desc.set_index(index);
        Some(desc)
    }

    /// Length of a run of `len` granules in units.
    #[inline]
    pub(crate) fn units(&self, len: usize) -> usize {
        len << (self.shift().wrapping_sub(UNIT_SHIFT) & (usize::BITS - 1))
    }
}

impl Chunk {
    /// Writes the header at the end of a run, and one run of kind `Leaving` over all granules, which are as long as
    /// [`granule_shift`] said for a run of that length: nobody knows it yet. `None` if there is no room for one. Takes
    /// the same time at any length, but with `hardened`; nothing is locked. If `zeroed`, the memory is all zeros.
    pub(crate) fn create<'a>(memory: Mapping, shift: u32, pool: u16, zeroed: bool) -> Result<NewChunk<'a>, Mapping> {
        match Self::write(&memory, shift, pool, zeroed) {
            Some(chunk) => Ok(NewChunk { chunk, memory }),
            None => Err(memory),
        }
    }

    fn write<'a>(memory: &Mapping, shift: u32, pool: u16, zeroed: bool) -> Option<&'a Chunk> {
        let (base, run) = (memory.start(), memory.run());
        let granule = 1usize << shift;
        let skip = base.as_ptr().expose_provenance().wrapping_neg() & (granule - 1);
        let room = run.len().checked_sub(skip + HEADER_LEN)?;
        let count = u32::try_from((room / (granule + DESC_LEN)).min(MAX_LEN)).ok()?;
        if count == 0 {
            return None;
        }
        // SAFETY: `skip <= run.len()`, from the subtraction above.
        let start = unsafe { base.add(skip) };
        // SAFETY: `count * (granule + DESC_LEN) + HEADER_LEN <= run.len() - skip`, so the sum stays in the run.
        let header = unsafe { start.add((count as usize) << shift) }.cast::<Chunk>();
        // SAFETY: as above; the header ends inside the run.
        let table = unsafe { header.add(1) }.cast::<PageDesc>();
        for index in 0..if cfg!(feature = "hardened") { count } else { 1 } {
            // SAFETY: `index < count`, and `count` descriptors fit behind the header (sum above).
            let desc = unsafe { table.add(index as usize) };
            // SAFETY: in the run, which is ours (`Mapping`), and aligned: the header is at a multiple of the granule
            // and `HEADER_LEN` and `DESC_LEN` are multiples of a descriptor's alignment.
            unsafe { desc.write(PageDesc::new(index)) };
        }
        let chunk = Chunk {
            start,
            run,
            count,
            touched: AtomicU32::new(0),
            shift: u16::try_from(shift).ok()?,
            pool,
            skip: u16::try_from(skip).ok()?,
            next: Link::new(),
            prev: Link::new(),
            key: KeyCell::new(),
        };
        // SAFETY: in the run, which is ours (`Mapping`), at a multiple of the granule, so of `align_of::<Chunk>()`.
        unsafe { header.write(chunk) };
        // SAFETY: just initialised; from here on shared by reference only; `NewChunk` gives it out for as long as it
        // has the memory, then for as long as the page heap has it.
        let chunk: &'a Chunk = unsafe { header.as_ref() };
        chunk.desc(0)?.set(Kind::Leaving, chunk.count(), zeroed);
        Some(chunk)
    }

    /// The chunk that a descriptor belongs to.
    #[inline]
    pub(crate) fn of(desc: &PageDesc) -> &Chunk {
        let addr = core::ptr::from_ref(desc).addr() - desc.index() * DESC_LEN - HEADER_LEN;
        let header = with_exposed_provenance::<Chunk>(addr);
        // SAFETY: a `PageDesc` that a run begins at is element `index` of the table that stands right behind its header
        // (`begin`), and `create` exposed the run's provenance. The header lives as long as its descriptors.
        unsafe { &*header }
    }

    /// What the links of free blocks in this chunk are written under.
    #[inline]
    pub(crate) fn key(&self) -> Key {
        self.key.get()
    }

    /// Says so, before anybody else can see the chunk.
    pub(crate) fn set_key(&self, key: Key) {
        self.key.set(key);
    }

    /// Its memory, once a run on its way back covers all of it.
    pub(crate) fn leave(&self) -> Option<Mapping> {
        let tag = self.desc(0)?.tag();
        let is_leaving = tag.is(Kind::Leaving) || tag.is(Kind::LeavingAbsent);
        if !is_leaving || tag.len() != self.count() {
            return None;
        }
        // SAFETY: `start` is so many bytes behind the run's start (`write`).
        let base = unsafe { self.start.sub(usize::from(self.skip)) };
        // SAFETY: what it was made of. Whoever makes a chunk's run one that leaves took it out of its lists, with the
        // lock held, and is the only one who asks for its memory.
        Some(unsafe { Mapping::new(base, self.run) })
    }

    /// Bytes that the provider gave for it.
    pub(crate) fn given_len(&self) -> usize {
        self.run.len()
    }

    /// Granules.
    #[inline]
    pub(crate) fn count(&self) -> usize {
        self.count as usize
    }

    /// What lies from this granule on was never used.
    #[inline]
    pub(crate) fn touched(&self) -> usize {
        self.touched.load(Ordering::Relaxed) as usize
    }

    /// Granules up to `end` are used from now on, and some more, so that this is seldom; gives the bytes that the mark
    /// moves by.
    #[expect(clippy::cast_possible_truncation, reason = "at most `count`")]
    pub(crate) fn touch(&self, end: usize) -> usize {
        let old = self.touched();
        let new = end.max(old.saturating_add(TOUCH_STEP)).min(self.count());
        self.touched.store(new as u32, Ordering::Relaxed);
        (new - old) << self.shift()
    }

    /// Bytes that were never used.
    pub(crate) fn untouched_len(&self) -> usize {
        (self.count() - self.touched()) << self.shift()
    }

    /// Granule length as a shift.
    #[inline]
    pub(crate) fn shift(&self) -> u32 {
        u32::from(self.shift)
    }

    /// Index of the pool that the chunk belongs to.
    #[inline]
    pub(crate) fn pool(&self) -> usize {
        usize::from(self.pool)
    }

    /// Bytes in all granules.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.count() << self.shift()
    }

    /// Bytes of the provider's run that are no granules.
    pub(crate) fn own_len(&self) -> usize {
        self.run.len() - self.len()
    }

    /// Address of granule 0.
    #[inline]
    pub(crate) fn addr(&self) -> usize {
        self.start.as_ptr().addr()
    }

    /// The descriptor of a granule; `None` behind the last one.
    #[inline]
    pub(crate) fn desc(&self, index: usize) -> Option<&PageDesc> {
        Descs::of(self).get(index)
    }

    /// The descriptor of granule 0, with the provenance of the whole chunk.
    #[inline]
    pub(crate) fn table(&self) -> NonNull<PageDesc> {
        let addr = core::ptr::from_ref(self).addr() + HEADER_LEN;
        // SAFETY: the table stands right behind the header, so not at address 0; `create` exposed the run's provenance.
        unsafe { NonNull::new_unchecked(with_exposed_provenance_mut(addr)) }
    }

    /// Bytes in the run whose first descriptor this is.
    #[inline]
    pub(crate) fn run_len(desc: &PageDesc) -> usize {
        desc.len() << Self::of(desc).shift()
    }

    /// The descriptors of a run of this chunk, from its first one on.
    pub(crate) fn descs_of(&self, run: &PageDesc) -> impl Iterator<Item = &PageDesc> {
        let first = run.index();
        (first..first.saturating_add(run.len())).filter_map(|index| self.desc(index))
    }

    /// Where a descriptor's granule starts, with the provenance of the whole chunk.
    #[inline]
    pub(crate) fn start_of(desc: &PageDesc) -> NonNull<u8> {
        let chunk = Self::of(desc);
        // SAFETY: a descriptor's index is below its chunk's count, so its granule lies in the run.
        unsafe { chunk.start.add(desc.index() << chunk.shift()) }
    }

    /// The first descriptor of the run that `addr` lies in: any address inside a slab, or the start of a large
    /// block. `None` outside of the chunk.
    #[inline]
    pub(crate) fn head_of(&self, addr: NonNull<u8>) -> Option<&PageDesc> {
        let index = addr.as_ptr().addr().checked_sub(self.addr())? >> self.shift();
        Self::head(self.desc(index)?)
    }

    /// The descriptor that tells of the empty slab, if `desc` is one of any of its granules; else `desc`.
    #[inline]
    pub(crate) fn head(desc: &PageDesc) -> Option<&PageDesc> {
        if desc.kind() == Kind::SlabRest {
            Self::of(desc).desc(desc.index().checked_sub(desc.len())?)
        } else {
            Some(desc)
        }
    }
}

/// A chunk that nobody else knows.
#[derive(Debug)]
#[must_use = "its memory is lost"]
pub(crate) struct NewChunk<'a> {
    chunk: &'a Chunk,
    memory: Mapping,
}

impl<'a> NewChunk<'a> {
    pub(crate) fn chunk(&self) -> &Chunk {
        self.chunk
    }

    /// It is the page heap's: its memory comes back by [`Chunk::leave`].
    pub(crate) fn enter(self) -> &'a Chunk {
        self.chunk
    }

    /// It is none.
    pub(crate) fn give_up(self) -> Mapping {
        self.memory
    }
}

impl Listed for Chunk {
    fn next(&self) -> &Link<Self> {
        &self.next
    }
    fn prev(&self) -> &Link<Self> {
        &self.prev
    }
}

// SAFETY: a chunk's memory goes back to the provider only while it is empty, in no list and out of the map, and whoever
// reads a link to it holds the lock of the list that it is in.
unsafe impl Linked for Chunk {}

// SAFETY: a descriptor is memory of its chunk, which stays as long as a run of it is in use, cached, set aside,
// deferred, absent or in a bin: so as long as any link leads to one of its descriptors that is read.
unsafe impl Linked for PageDesc {}

/// The granule of a chunk of `run_len` bytes in a heap that holds `held_len` with it, as a shift.
#[expect(clippy::indexing_slicing, reason = "the loop ends at the table's length")]
pub(crate) const fn granule_shift(run_len: usize, held_len: usize) -> u32 {
    let mut level = 0;
    while level < GRANULES.len() {
        let (limit, shift) = GRANULES[level];
        if run_len <= limit {
            return shift;
        }
        level += 1;
    }
    if held_len <= SMALL_HEAP.0 { SMALL_HEAP.1 } else { COARSE_SHIFT }
}

/// The run to ask the provider for, so that its chunk certainly has room for a run of `len` bytes at a multiple
/// of `align`, and for a granule more: a run that is the whole chunk could not be handed out before the chunk is in its
/// pool ([`add_chunk`](super::Pages::add_chunk)), whose lock a nested caller may have interrupted. `None` if `len` is
/// 0, an argument that should be a power of two is not, or the sum overflows.
#[expect(clippy::indexing_slicing, reason = "the loop ends at the table's length")]
pub(crate) const fn chunk_len_for(len: usize, align: usize, page_len: usize) -> Option<PageRun> {
    if len == 0 || !align.is_power_of_two() {
        return None;
    }
    let (mut level, mut at_least) = (0, 0);
    while level < GRANULES.len() {
        let (limit, shift) = GRANULES[level];
        let run = if len <= limit { chunk_run(len, align, page_len, shift, at_least) } else { None };
        match run {
            Some(run) if run.len() <= limit => return Some(run),
            _ => at_least = limit + 1,
        }
        level += 1;
    }
    let coarse = chunk_run(len, align, page_len, COARSE_SHIFT, at_least);
    match coarse {
        // Whichever of the two granules it gets.
        Some(run) if run.len() <= SMALL_HEAP.0 => match chunk_run(len, align, page_len, SMALL_HEAP.1, at_least) {
            Some(fine) if fine.len() > run.len() => Some(fine),
            _ => coarse,
        },
        _ => coarse,
    }
}

/// `at_least`: a run short enough for the fine granule would be given it, and have longer tables.
const fn chunk_run(len: usize, align: usize, page_len: usize, shift: u32, at_least: usize) -> Option<PageRun> {
    let granule = 1usize << shift;
    let Some(tables) = (len.div_ceil(granule) + 1).checked_mul(granule + DESC_LEN) else {
        return None;
    };
    let Some(total) = tables.checked_add(HEADER_LEN) else {
        return None;
    };
    let total = if total < at_least { at_least } else { total };
    PageRun::new(total, if align < granule { granule } else { align }, page_len)
}

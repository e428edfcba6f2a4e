//! From an address to the chunk it lies in, and from a huge block's start to its run, without a lock.
//!
//! A hash table of two-word slots, four to a cache line (a *bucket*):
//! ```text
//! key:   start address (a multiple of 1 KiB) | reuse count (3 bits) | leaving (1 bit) | order (6 bits)
//! value: the chunk's header, which stands where its granules end; or length | log2 of alignment of a huge block
//! ```
//! A chunk of up to `2^order` bytes touches at most two *sections* of `2^order` bytes and is entered once for each;
//! an address is looked up in its own section of every order in use. Orders of chunks are few, so that is a
//! few cache lines. Each section has two buckets that its entries may be in.
//!
//! Decisions, and what pays for each:
//! - *Readers write nothing and follow no chunk's pointer but the one they return.* The value is the end of the
//!   granules, so start and value alone decide whether an address is inside; the headers of other chunks may be
//!   unmapped at that moment.
//! - *Inserted entries never move*, so a reader cannot miss one. Price: no cuckoo moves, so a table counts as full
//!   when one section's two buckets are; the next table, twice as long, is then chained behind it.
//! - *An entry leaves in two steps*: first it is marked and no reader sees it, then, when the provider has the pages
//!   back, its slot is freed. If the provider refuses, the mark is taken off; that needs no lock and cannot fail.
//!   Price: a slot stays used while the provider works.
//! - *Table 0 is part of the map* (2 KiB, 64 chunks or so); later ones live in the provider's runs and can be given
//!   back when empty. Readers that must look behind table 0 announce themselves in a shared counter. Price: large
//!   heaps with very many chunks pay two atomic additions a lookup.
//! - *The mask of orders in use only grows.* Clearing a bit would race with insertion; the price is a needless
//!   bucket or two a lookup.
//!
//! Why a lookup is right: the asked-for chunk is live, so its slot does not change meanwhile, and what happened
//! before the address was handed out (older chunks there left, this one was entered) is visible. Chunks do not overlap,
//! so no other one has the address between its start and its end. A slot that is being used anew may for a
//! moment pair one chunk's key with another's value; the key is therefore read before and after the value, and
//! counts the slot's uses. To be misled, a reader would have to stand still between two loads while the provider
//! gives and takes chunks until that very slot was used eight times more, the last time for the same start.

#![expect(unsafe_code, reason = "tables in the provider's memory, chunks by their address")]

use core::ptr::{NonNull, without_provenance_mut};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use super::chunk::Chunk;
use super::owned::Mapping;
use super::want::AddError;
use crate::base::sync::{AtomicPtr, AtomicUsize, AtomicWord, TryLock, fence};
use crate::contract::provider::PageRun;

/// Slots in a bucket: one cache line on 64-bit machines.
const WAYS: usize = 4;
/// Buckets of table 0.
const FIRST_BUCKETS: usize = 32;
/// Tables in the chain behind table 0, at most.
const MAX_TABLES: u32 = 16;
/// Length of the first table behind table 0; each later one should be twice as long.
const FIRST_OVERFLOW_LEN: usize = 4096;

const ORDER: usize = 63;
const LEAVING: usize = 1 << 6;
const REUSE: usize = 7 << 7;
const REUSE_ONE: usize = 1 << 7;
/// The order of huge blocks, which are asked for by their exact start.
const HUGE: u32 = 63;
/// The smallest order: smaller chunks need no finer sections.
const MIN_ORDER: u32 = 12;
/// Sections of huge blocks, and the alignment that starts have at least.
const KEY_SHIFT: u32 = 10;

const _: () = assert!(ORDER | LEAVING | REUSE == (1 << KEY_SHIFT) - 1, "the bits below an aligned start");

#[repr(C, align(64))]
#[derive(Debug)]
struct Bucket {
    keys: [AtomicUsize; WAYS],
    values: [AtomicPtr<u8>; WAYS],
}

const BUCKET_LEN: usize = size_of::<Bucket>();

/// Header of a table behind table 0, in the first bucket's place of its run.
#[repr(C, align(64))]
#[derive(Debug)]
struct Table {
    start: NonNull<u8>,
    run: PageRun,
    buckets: NonNull<Bucket>,
    count: usize,
    /// Slots in use, those that are leaving included.
    used: AtomicUsize,
    next: AtomicPtr<Table>,
}

const _: () = assert!(size_of::<Table>() <= BUCKET_LEN, "the header takes one bucket's place");

/// What was entered for a chunk, so that it can be marked and taken out without asking the chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    start: usize,
    /// The chunk's last granule's last byte; the start itself for a huge block.
    last: usize,
    order: u32,
    value: *mut u8,
}

impl Entry {
    /// A chunk's entry.
    pub(crate) fn of(chunk: &Chunk) -> Self {
        Self::ending(chunk.addr(), core::ptr::from_ref(chunk).cast_mut().cast())
    }

    /// The entry of a chunk that does not exist, which nobody may ask the map for.
    #[cfg(any(test, loom))]
    pub(crate) fn fake(start: usize, end: usize) -> Self {
        Self::ending(start, without_provenance_mut(end))
    }

    /// `header` stands where the granules end.
    fn ending(start: usize, header: *mut u8) -> Self {
        let last = header.addr().wrapping_sub(1);
        let order = usize::BITS - last.wrapping_sub(start).leading_zeros();
        Self { start, last, order: order.max(MIN_ORDER), value: header }
    }

    fn huge(start: usize, run: PageRun) -> Self {
        let value = run.len() | run.align().trailing_zeros() as usize;
        Self { start, last: start, order: HUGE, value: without_provenance_mut(value) }
    }

    /// The chunk in that memory, of which this is the entry, and which is its own again.
    pub(super) fn chunk_in<'a>(&self, memory: Mapping) -> Option<&'a Chunk> {
        let offset = self.value.addr().checked_sub(memory.start().addr().get())?;
        if offset >= memory.len() {
            return None;
        }
        // SAFETY: an entry's value is the header of its chunk (`of`), which lies in memory that the provider gave and
        // has not got back (`Mapping`). From here on that is the page heap's.
        unsafe { self.value.cast::<Chunk>().as_ref() }
    }

    /// The header's address.
    #[cfg(loom)]
    pub(crate) fn header(&self) -> *mut u8 {
        self.value
    }

    fn key(&self) -> usize {
        self.start | self.order as usize
    }

    /// The one or two sections the entry is under.
    fn sections(&self) -> impl Iterator<Item = usize> {
        let shift = section_shift(self.order);
        let (first, last) = (self.start >> shift, self.last >> shift);
        core::iter::once(first).chain((last != first).then_some(last))
    }
}

fn section_shift(order: u32) -> u32 {
    if order == HUGE { KEY_SHIFT } else { order }
}

/// See the file's head.
#[derive(Debug)]
pub(crate) struct ChunkMap {
    first: [Bucket; FIRST_BUCKETS],
    first_used: AtomicUsize,
    /// Bit `n`: entries of order `n` have been inserted.
    orders: AtomicWord,
    /// Excludes those who insert behind table 0 and those who change the chain of tables from each other.
    writer: TryLock,
    next: AtomicPtr<Table>,
    /// Contexts that are looking behind table 0.
    readers: AtomicUsize,
}

/// One table: its buckets and its count of used slots.
#[derive(Clone, Copy)]
struct View<'a> {
    buckets: &'a [Bucket],
    used: &'a AtomicUsize,
}

impl ChunkMap {
    pub(crate) const fn new() -> Self {
        Self {
            first: [const { Bucket::new() }; FIRST_BUCKETS],
            first_used: AtomicUsize::new(0),
            orders: AtomicWord::new(0),
            writer: TryLock::new(),
            next: AtomicPtr::new(core::ptr::null_mut()),
            readers: AtomicUsize::new(0),
        }
    }

    /// The header of the chunk in whose granules `addr` lies. Never waits; any context. `None` if there is none;
    /// which is certain only if `addr` is in a live block, or in memory that the caller owns.
    pub(crate) fn lookup(&self, addr: usize) -> Option<*mut u8> {
        self.each_table(|table| table.around(addr, self.orders.load(Relaxed) & !(1 << HUGE)))
    }

    /// The chunk around `addr`, an address in a live block or in memory that the caller owns.
    #[inline]
    pub(crate) fn chunk(&self, addr: usize) -> Option<&Chunk> {
        // SAFETY: the values of chunks' entries are their headers (`Entry::of`), which stand where they are while the
        // chunk has a block that is live.
        self.lookup(addr).and_then(|header| unsafe { header.cast::<Chunk>().as_ref() })
    }

    /// The run of a huge block that starts at `start`. Never waits; any context. The caller owns the block, or
    /// some other block at that address.
    pub(crate) fn huge_run(&self, start: usize) -> Option<PageRun> {
        if self.orders.load(Relaxed) >> HUGE == 0 || start & (ORDER | LEAVING | REUSE) != 0 {
            return None;
        }
        let key = start | HUGE as usize;
        let value = self.each_table(|table| {
            table.slots(start >> KEY_SHIFT, HUGE).find(|slot| slot.key() == key).map(|slot| slot.value.load(Relaxed))
        })?;
        let bits = value.addr();
        PageRun::new(bits >> KEY_SHIFT << KEY_SHIFT, 1usize.checked_shl(u32::try_from(bits & ORDER).ok()?)?, 1)
    }

    /// Changes the run of a huge block that does not move. The caller owns the block.
    pub(crate) fn update_huge(&self, start: usize, run: PageRun) -> bool {
        let Some(old) = self.huge_run(start).map(|old| Entry::huge(start, old)) else {
            return false;
        };
        let new = Entry::huge(start, run);
        self.each_table(|table| {
            let slot = table.find(start >> KEY_SHIFT, HUGE, old.key(), old.value)?;
            slot.value.store(new.value, Relaxed);
            Some(())
        })
        .is_some()
    }

    /// Enters a huge block. Waits within [`SPIN_LIMIT`](crate::base::sync::SPIN_LIMIT) if `wait`. `TooSmall`:
    /// start or length are no multiples of 1 KiB.
    pub(crate) fn insert_huge(&self, start: usize, run: PageRun, wait: bool) -> Result<(), AddError> {
        if (start | run.len()) & (ORDER | LEAVING | REUSE) != 0 {
            return Err(AddError::TooSmall);
        }
        self.insert(&Entry::huge(start, run), wait)
    }

    /// Takes a huge block out for good, or marks it as leaving, or takes the mark off.
    pub(crate) fn change_huge(&self, start: usize, run: PageRun, change: Change) {
        self.change(&Entry::huge(start, run), change);
    }

    /// Enters a chunk under each section it touches. The caller owns it and it stays mapped until the entry has
    /// left. Bounded: two buckets a section and table. Waits within the spin limit if `wait`.
    pub(crate) fn insert(&self, entry: &Entry, wait: bool) -> Result<(), AddError> {
        self.orders.fetch_or(1 << entry.order, Relaxed);
        for (done, section) in entry.sections().enumerate() {
            if let Err(error) = self.put(section, entry, wait) {
                for section in entry.sections().take(done) {
                    self.each_table(|table| table.change(section, entry, Change::Remove));
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Enters `entry` for a section: into table 0, without a lock, or behind it, where the lock keeps the table from
    /// being unlinked meanwhile.
    fn put(&self, section: usize, entry: &Entry, wait: bool) -> Result<(), AddError> {
        if self.first_view().put(section, entry).is_some() {
            return Ok(());
        }
        if self.next.load(Acquire).is_null() {
            return Err(AddError::Full);
        }
        let held = if wait { self.writer.lock_bounded() } else { self.writer.try_lock() };
        let Some(_held) = held else { return Err(AddError::Busy) };
        self.tables().find_map(|table| table.view().put(section, entry)).ok_or(AddError::Full)
    }

    fn first_view(&self) -> View<'_> {
        View { buckets: &self.first, used: &self.first_used }
    }

    /// Marks or takes out what [`insert`](Self::insert) entered. Lock-free; the caller owns the entry.
    pub(crate) fn change(&self, entry: &Entry, change: Change) {
        for section in entry.sections() {
            self.each_table(|table| table.change(section, entry, change));
        }
    }

    /// The first success of `visit` over the tables, table 0 first. A table behind it is visited only between
    /// an addition to and a subtraction from `readers`; see [`take_empty_table`](Self::take_empty_table).
    fn each_table<R>(&self, mut visit: impl FnMut(View<'_>) -> Option<R>) -> Option<R> {
        let found = visit(self.first_view());
        if found.is_some() || self.next.load(Acquire).is_null() {
            return found;
        }
        self.readers.fetch_add(1, SeqCst);
        let found = self.tables().find_map(|table| visit(table.view()));
        self.readers.fetch_sub(1, Release);
        found
    }

    /// The chain behind table 0. The caller holds `writer` or is counted in `readers`.
    fn tables(&self) -> impl Iterator<Item = &Table> {
        let first = follow(&self.next);
        core::iter::successors(first, |table| follow(&table.next)).take(MAX_TABLES as usize)
    }

    /// How long the next table should be, in bytes.
    pub(crate) fn next_table_len(&self) -> usize {
        self.readers.fetch_add(1, SeqCst);
        let count = self.tables().count();
        self.readers.fetch_sub(1, Release);
        FIRST_OVERFLOW_LEN << count
    }

    /// Chains a table behind the others. The clearing of its slots is done before anything is locked.
    pub(crate) fn add_table(&self, memory: Mapping) -> Result<(), (AddError, Mapping)> {
        let (start, run) = (memory.start(), memory.run());
        let count = (run.len() / BUCKET_LEN).saturating_sub(1);
        if count == 0 || run.align() < BUCKET_LEN {
            return Err((AddError::TooSmall, memory));
        }
        let header = start.cast::<Table>();
        // SAFETY: the run has at least two buckets' length.
        let buckets = unsafe { start.add(BUCKET_LEN) }.cast::<Bucket>();
        for index in 0..count {
            // SAFETY: `count` buckets and the header's bucket fit in the run.
            let bucket = unsafe { buckets.add(index) };
            // SAFETY: in the run, which is ours (`Mapping`), aligned as the run is.
            unsafe { bucket.write(Bucket::new()) };
        }
        let table = Table { start, run, buckets, count, used: AtomicUsize::new(0), next: AtomicPtr::default() };
        // SAFETY: in the run, which is ours (`Mapping`), aligned as the run is.
        unsafe { header.write(table) };
        let Some(_held) = self.writer.lock_bounded() else {
            return Err((AddError::Busy, memory));
        };
        let (mut link, mut length) = (&self.next, 0);
        while let Some(table) = follow(link) {
            link = &table.next;
            length += 1;
            if length == MAX_TABLES {
                return Err((AddError::Full, memory));
            }
        }
        link.store(header.as_ptr(), Release);
        Ok(())
    }

    /// Takes the last table out of the chain if it is empty and nobody is looking behind table 0. Never waits.
    ///
    /// An order of all sequentially consistent steps exists. A reader adds itself, then reads the link; this reads
    /// the count after it has cleared the link. If it reads 0, a later reader finds the link cleared, and an
    /// earlier one has subtracted itself, after its last look. No entry can be missed while the link is cleared:
    /// the table is empty and the lock excludes insertion.
    pub(crate) fn take_empty_table(&self) -> Option<Mapping> {
        let _held = self.writer.try_lock()?;
        let mut link = &self.next;
        let mut table = follow(link)?;
        for _ in 0..MAX_TABLES {
            let Some(next) = follow(&table.next) else { break };
            link = &table.next;
            table = next;
        }
        if table.used.load(Acquire) != 0 {
            return None;
        }
        let (start, run, old) = (table.start, table.run, link.load(Relaxed));
        link.store(core::ptr::null_mut(), SeqCst);
        if self.readers.load(SeqCst) != 0 {
            link.store(old, Release);
            return None;
        }
        // SAFETY: what `add_table` was given; no entry is in it, and nobody looks or will look there (see above).
        Some(unsafe { Mapping::new(start, run) })
    }

    /// Bytes in huge blocks and in tables. At rest.
    pub(crate) fn outside_len(&self) -> usize {
        let mut sum = 0;
        self.each_table(|table| {
            let slots = table.buckets.iter().flat_map(Bucket::slots);
            sum += slots.filter_map(|slot| slot.huge_len()).sum::<usize>();
            None::<()>
        });
        sum + self.tables_len()
    }

    /// Bytes in added tables. At rest.
    pub(crate) fn tables_len(&self) -> usize {
        self.tables().map(|table| table.run.len()).sum()
    }

    /// Does `work` as a context that is looking behind table 0.
    #[cfg(test)]
    pub(crate) fn for_test_with_reader(&self, work: impl Fn()) {
        self.readers.fetch_add(1, SeqCst);
        work();
        self.readers.fetch_sub(1, Release);
    }

    /// Slots in use, in all tables. At rest.
    #[cfg(test)]
    pub(crate) fn used(&self) -> usize {
        self.tables().fold(self.first_used.load(Relaxed), |sum, table| sum + table.used.load(Relaxed))
    }
}

/// What [`ChunkMap::change`] does to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// In use: now leaving, no reader sees it.
    Leave,
    /// Leaving: in use again.
    Stay,
    /// Leaving: its slots are free.
    Forget,
    /// In use: its slots are free.
    Remove,
}

impl Table {
    fn view(&self) -> View<'_> {
        // SAFETY: `add_table` initialised `count` buckets there; they stay until the table is unlinked, and who
        // calls this keeps it from being unlinked (see `ChunkMap::tables`).
        let buckets = unsafe { core::slice::from_raw_parts(self.buckets.as_ptr(), self.count) };
        View { buckets, used: &self.used }
    }
}

/// The table that a link of the chain leads to; the caller holds `writer` or is counted in `readers`.
fn follow(link: &AtomicPtr<Table>) -> Option<&Table> {
    let table = link.load(SeqCst);
    // SAFETY: null, or initialised by `add_table` and shared by reference only; `take_empty_table` hands it out
    // only when no one is counted in `readers`, and holds `writer` meanwhile.
    unsafe { table.as_ref() }
}

impl<'a> View<'a> {
    /// The two buckets of a section; none in a table without buckets.
    #[inline]
    fn buckets(self, section: usize, order: u32) -> [Option<&'a Bucket>; 2] {
        let mixed = (section as u64 ^ u64::from(order) << 58).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let again = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        [mixed, again].map(|hash| self.buckets.get(self.scale(hash)))
    }

    /// Their slots.
    fn slots(self, section: usize, order: u32) -> impl Iterator<Item = Slot<'a>> {
        self.buckets(section, order).into_iter().flatten().flat_map(Bucket::slots)
    }

    /// A hash's high half, scaled to the number of buckets.
    fn scale(self, hash: u64) -> usize {
        usize::try_from((hash >> 32).wrapping_mul(self.buckets.len() as u64) >> 32).unwrap_or(0)
    }

    /// The slot of this table that holds exactly `key` and `value` for a section.
    fn find(self, section: usize, order: u32, key: usize, value: *mut u8) -> Option<Slot<'a>> {
        self.slots(section, order).find(|slot| slot.key() == key && slot.value.load(Relaxed) == value)
    }

    /// Enters `entry` for a section, if one of its slots here is free. A slot is first taken by marking it as leaving,
    /// with no start, which no reader takes for anything; so inserters need no lock against each other.
    fn put(self, section: usize, entry: &Entry) -> Option<()> {
        let (slot, reuse) = self.slots(section, entry.order).find_map(Slot::take)?;
        self.used.fetch_add(1, Relaxed);
        fence(Release);
        slot.value.store(entry.value, Relaxed);
        slot.key.store(entry.key() | reuse, Release);
        Some(())
    }

    /// Changes `entry` for a section, if this table has it. Its owner calls this. The count goes down last.
    fn change(self, section: usize, entry: &Entry, change: Change) -> Option<()> {
        let (from, to) = match change {
            Change::Leave => (0, entry.key() | LEAVING),
            Change::Stay => (LEAVING, entry.key()),
            Change::Forget => (LEAVING, 0),
            Change::Remove => (0, 0),
        };
        let slot = self.find(section, entry.order, entry.key() | from, entry.value)?;
        let reuse = slot.key.load(Relaxed) & REUSE;
        slot.key.store(to | reuse, Release);
        if to == 0 {
            self.used.fetch_sub(1, Release);
        }
        Some(())
    }

    /// The header of the chunk here that has `addr` between its start and its end. The greatest order comes first: most
    /// memory is in long chunks. Bounded: two buckets for each of the `orders` in use.
    fn around(self, addr: usize, orders: u64) -> Option<*mut u8> {
        let mut rest = orders;
        while let Some(order) = rest.checked_ilog2() {
            rest ^= 1 << order;
            let [one, other] = self.buckets(addr >> order, order);
            let found = one.and_then(|bucket| bucket.chunk_around(addr, order));
            let found = found.or_else(|| other.and_then(|bucket| bucket.chunk_around(addr, order)));
            if found.is_some() {
                return found;
            }
        }
        None
    }
}

impl Bucket {
    const fn new() -> Self {
        Self {
            keys: [const { AtomicUsize::new(0) }; WAYS],
            values: [const { AtomicPtr::new(core::ptr::null_mut()) }; WAYS],
        }
    }

    fn slots(&self) -> impl Iterator<Item = Slot<'_>> {
        self.keys.iter().zip(&self.values).map(|(key, value)| Slot { key, value })
    }

    /// The header of the chunk here that has the given order and `addr` between its start and its end.
    #[inline]
    fn chunk_around(&self, addr: usize, order: u32) -> Option<*mut u8> {
        self.slots().find_map(|slot| slot.chunk_around(addr, order))
    }
}

/// A key and its value.
struct Slot<'a> {
    key: &'a AtomicUsize,
    value: &'a AtomicPtr<u8>,
}

impl Slot<'_> {
    /// Takes the slot if it is free; gives the reuse count that its entry will have.
    fn take(self) -> Option<(Self, usize)> {
        let old = self.key.load(Relaxed);
        let reuse = old.wrapping_add(REUSE_ONE) & REUSE;
        let is_free = old & !REUSE == 0;
        (is_free && self.key.compare_exchange(old, LEAVING | reuse, Acquire, Relaxed).is_ok()).then_some((self, reuse))
    }

    /// The key without its reuse count; 0 in a free slot.
    fn key(&self) -> usize {
        self.key.load(Acquire) & !REUSE
    }

    /// The header of the chunk here, if it has the given order and `addr` is between its start and its end.
    #[inline]
    fn chunk_around(&self, addr: usize, order: u32) -> Option<*mut u8> {
        let key = self.key.load(Acquire);
        let start = key & !(ORDER | LEAVING | REUSE);
        if key & (ORDER | LEAVING) != order as usize || addr.checked_sub(start)? >> order != 0 {
            return None;
        }
        let value = self.value.load(Relaxed);
        fence(Acquire);
        (self.key.load(Relaxed) == key && addr < value.addr()).then_some(value)
    }

    fn huge_len(&self) -> Option<usize> {
        let is_huge = self.key() & ORDER == HUGE as usize;
        is_huge.then(|| self.value.load(Relaxed).addr() >> KEY_SHIFT << KEY_SHIFT)
    }
}

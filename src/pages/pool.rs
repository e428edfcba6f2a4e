//! A pool: the free runs of some chunks behind one lock.
//!
//! Decisions, and what pays for each:
//! - *What needs the lock is a method of [`Open`]*, the token that shows it is held; taking the lock also frees a few
//!   deferred runs, so no holder can forget it. Price: up to [`DRAIN_LIMIT`] more runs a hold.
//! - *A free that cannot have the lock pushes the run onto a lock-free stack inside the run's descriptor* and is done.
//!   Only lock holders pop, so the stack has no ABA. Price: such a run is free only when somebody next takes the lock.
//! - *Free runs are merged with free neighbours*, found in constant time since first and last descriptor of
//!   a run tell its kind and length. Price: four descriptors written where lazy merging would write one.
//! - *Wholly free chunks have a list of their own*, newest first, so that giving one back is constant time.
//! - *A block that had to move because it grew goes to the middle of the longest free run*, when memory is plentiful:
//!   it then grows in place from there on. Price: packing, which is why it must be plentiful.
//!
//! Hold bound: [`DRAIN_LIMIT`] + 2 runs freed, or as many less one and one allocated, each with at most three
//! insertions or removals in bins and at most one move of a chunk between two lists; an allocation looks at 49
//! candidates at most ([`Open::alloc`]), under pressure at 16 more ([`Open::alloc_round`]).

use core::ops::Range;
use core::ptr::NonNull;

use super::bins::{self, Bins};
use super::chunk::{COARSE_SHIFT, Chunk, Descs, UNIT_SHIFT};
use super::desc::{Kind, PageDesc, Tag};
use super::want::{Use, Want};
use crate::base::link::Link;
use crate::base::sync::{AtomicBool, AtomicUsize, Ordering, TryLock, fence};
use crate::base::tuning::{ALIGNED_LOOK, DRAIN_LIMIT, EMPTY_LOOK, END_RATIO, LENGTH_LOOK, MIDDLE_RATIO, POP_LIMIT};
use Ordering::{Acquire, Relaxed, Release};

/// A request for a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) len: usize,
    align: usize,
    /// `len` in units, rounded up.
    units: usize,
    /// What a run may lose before an aligned start, in units.
    slack: usize,
    kind: Kind,
    where_: Where,
}

/// Where in a free run a request is placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    Start,
    /// In the middle of the longest run, if that is long enough for it to be worth it.
    Middle,
    /// At the end of a run, where what stays for ever parts nothing.
    End,
    /// There, or else at the end of the longest run.
    AnyEnd,
}

/// A free run that serves a request: `len` granules, `skip` granules behind the run's start.
struct Place<'a> {
    chunk: &'a Chunk,
    run: &'a PageDesc,
    skip: usize,
    len: usize,
    /// It says nothing of how much of the chunk was ever used.
    is_end: bool,
}

impl Place<'_> {
    /// Whether the chunk's end or a run of the heap's own follows.
    fn is_last(&self) -> bool {
        let next = Descs::of(self.chunk).get(self.run.index() + self.run.len());
        next.is_none_or(|next| next.kind() == Kind::Own)
    }
}

/// See the file's head. All zero is the empty state. Invariants, executed by [`Open::verify`] at rest:
/// - P1: from granule 0 on, the runs of each chunk tile it exactly.
/// - P2: a run's first and last descriptor agree on what it is.
/// - P3: no two free runs are neighbours.
/// - P4: each free run is in the bin of its length, and nothing else is in a bin; B1 and B2 hold.
/// - P5: a chunk is in `empty` exactly if one free run covers it, else in `used`; and it belongs to this pool.
/// - P6: `free_len` is the bytes in free runs, `held_len` the bytes in the chunks' provider runs but for absent ones,
///   `chunk_count` and `empty_count` the chunks in both lists and in `empty`.
/// - P9: the absent runs, no two of which are neighbours, are in `absent`, linked in both directions, and are
///   `absent_len` bytes.
/// - P7: the map leads from the chunk's first and last byte to it (checked by `Pages::verify`, as
/// - P8: the heap's `held_len` is the sum over pools, huge blocks and tables, its `own_len` over what of them is no
///   granule, its `untouched_len` over what of chunks lies behind the mark that no used run ever passed).
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct Pool {
    lock: TryLock,
    deferred: Link<PageDesc>,
    free_len: AtomicUsize,
    held_len: AtomicUsize,
    chunk_count: AtomicUsize,
    empty_count: AtomicUsize,
    /// Runs whose memory the provider has back.
    absent: Link<PageDesc>,
    absent_len: AtomicUsize,
    used: Link<Chunk>,
    empty: Link<Chunk>,
    bins: Bins,
}

/// What all pools tell of.
#[derive(Debug)]
pub(crate) struct Told {
    /// Some pool may have two empty chunks or more.
    pub(crate) surplus: AtomicBool,
    /// Bytes in chunks that were never used.
    pub(crate) untouched_len: AtomicUsize,
}

impl Told {
    pub(crate) const fn new() -> Self {
        Self { surplus: AtomicBool::new(false), untouched_len: AtomicUsize::new(0) }
    }
}

/// A pool whose lock is held.
pub(crate) struct Open<'a> {
    pool: &'a Pool,
    told: &'a Told,
}

impl Drop for Open<'_> {
    #[inline]
    fn drop(&mut self) {
        self.pool.lock.open();
    }
}

/// A broken invariant: its number, and the address of the descriptor, chunk or field it was seen at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageFault {
    /// Which of P1 to P9, beside the fields of `Pool`.
    pub(crate) rule: u8,
    /// Where.
    pub(crate) at: usize,
}

impl Request {
    /// `None` if `len` is 0, `align` no power of two, or no chunk can be that long.
    pub(crate) fn new(len: usize, align: usize, use_: Use, plenty: bool) -> Option<Self> {
        if len == 0 || !align.is_power_of_two() || len.checked_add(align)? > isize::MAX.unsigned_abs() {
            return None;
        }
        let kind = if use_.is_large() { Kind::Large } else { Kind::Slab };
        let where_ = match use_ {
            Use::Grown if plenty => Where::Middle,
            Use::Own => Where::End,
            Use::OwnAnywhere => Where::AnyEnd,
            _ => Where::Start,
        };
        let slack = (align.saturating_sub(1 << UNIT_SHIFT) >> UNIT_SHIFT).min(bins::MAX_UNITS);
        Some(Self { len, align, units: len.div_ceil(1 << UNIT_SHIFT).min(bins::MAX_UNITS), slack, kind, where_ })
    }

    /// How many bins may have runs that fit but are not searched at once.
    pub(crate) fn bins_between(&self) -> usize {
        bins::good_index(self.units + self.slack) + 1 - bins::index(self.units)
    }

    /// The place in `run` with the lowest address.
    fn place<'a>(&self, run: &'a PageDesc) -> Option<Place<'a>> {
        self.place_from(run, |_, _| 0)
    }

    /// The place in the middle of `run`, if that is long enough for it to be worth it.
    fn place_middle<'a>(&self, run: &'a PageDesc) -> Option<Place<'a>> {
        self.place_from(run, |all, len| (all - len) / 2).filter(|place| run.len() / MIDDLE_RATIO > place.len)
    }

    /// The place at the end of `run`.
    fn place_end<'a>(&self, run: &'a PageDesc) -> Option<Place<'a>> {
        let (chunk, free) = (Chunk::of(run), run.len());
        let len = granules(chunk, self.len);
        let start = chunk.addr() + (run.index() << chunk.shift());
        let aligned = (start + (free.checked_sub(len)? << chunk.shift())) & !(self.align - 1);
        let skip = aligned.checked_sub(start)? >> chunk.shift();
        Some(Place { chunk, run, skip, len, is_end: true })
    }

    fn place_from<'a>(&self, run: &'a PageDesc, from: impl Fn(usize, usize) -> usize) -> Option<Place<'a>> {
        let chunk = Chunk::of(run);
        let len = granules(chunk, self.len);
        if len > run.len() {
            return None;
        }
        let start = chunk.addr() + (run.index() << chunk.shift());
        let aligned = (start + (from(run.len(), len) << chunk.shift())).checked_next_multiple_of(self.align)?;
        let skip = (aligned - start) >> chunk.shift();
        (skip + len <= run.len()).then_some(Place { chunk, run, skip, len, is_end: false })
    }
}

/// Bytes as granules of a chunk, rounded up.
#[inline]
pub(crate) fn granules(chunk: &Chunk, len: usize) -> usize {
    len.div_ceil(1 << chunk.shift())
}

/// Cuts `len` bytes off the start of a new chunk that nobody else knows, and gives the rest, still `Leaving`: the first
/// granule's descriptor if the run would be the whole chunk, and is not cut. `None` if the chunk is too short, or less
/// aligned than wanted.
pub(crate) fn split_new(chunk: &Chunk, want: Want, len: usize) -> Option<&PageDesc> {
    let (head, count) = (chunk.desc(0)?, chunk.count());
    let len = granules(chunk, len);
    if len > count || chunk.addr() & (want.align - 1) != 0 {
        return None;
    }
    if len == 0 || len == count {
        return Some(head);
    }
    let (rest, zeroed) = (Descs::of(chunk).begin(len)?, head.is_zeroed());
    rest.set(Kind::Leaving, count - len, zeroed);
    mark_used(Descs::around(head), head, if want.use_ == Use::Slab { Kind::Slab } else { Kind::Large }, len, zeroed);
    Some(rest)
}

/// Length of a run of `len` granules in units.
#[inline]
fn units(chunk: &Chunk, len: usize) -> usize {
    len << (chunk.shift() - UNIT_SHIFT)
}

impl Pool {
    pub(crate) const fn new() -> Self {
        Self {
            lock: TryLock::new(),
            deferred: Link::new(),
            free_len: AtomicUsize::new(0),
            held_len: AtomicUsize::new(0),
            chunk_count: AtomicUsize::new(0),
            empty_count: AtomicUsize::new(0),
            absent: Link::new(),
            absent_len: AtomicUsize::new(0),
            used: Link::new(),
            empty: Link::new(),
            bins: Bins::new(),
        }
    }

    /// Takes the lock, within the spin limit if `wait`, else only if it is open; then frees up to [`DRAIN_LIMIT`]
    /// deferred runs. Tells of a surplus when that makes a chunk empty beside another one.
    #[inline(always)]
    pub(crate) fn open<'a>(&'a self, told: &'a Told, wait: bool) -> Option<Open<'a>> {
        if !(self.lock.try_take() || wait && self.lock.take_bounded()) {
            return None;
        }
        let open = Open { pool: self, told };
        open.settle();
        Some(open)
    }

    /// Leaves a run to the next holder of the lock. Lock-free; any context, also one that interrupted the holder.
    /// A push is repeated only when another context's push or pop came between. The run is not touched once it is
    /// on the stack.
    pub(crate) fn defer(&self, run: &PageDesc) {
        if !run.tag().is_apart() {
            run.set(Kind::Deferred, run.len(), false);
        }
        self.deferred.push(run, &run.next, Release);
    }

    /// Whether a run waits for somebody who takes the lock.
    #[inline]
    pub(crate) fn has_deferred(&self) -> bool {
        !self.deferred.is_empty()
    }

    #[inline]
    pub(crate) fn is_busy(&self) -> bool {
        self.lock.is_held()
    }

    #[inline]
    pub(crate) fn free_len(&self) -> usize {
        self.free_len.load(Relaxed)
    }

    /// Whether a run of `len` bytes may be free here, or may become free, as somebody has the lock or left a run to who
    /// takes it. A guess, without the lock: a small heap's pools are often empty.
    #[inline]
    pub(crate) fn may_have(&self, len: usize) -> bool {
        self.free_len() >= len || self.has_deferred() || self.is_busy()
    }

    pub(crate) fn held_len(&self) -> usize {
        self.held_len.load(Relaxed)
    }

    pub(crate) fn empty_count(&self) -> usize {
        self.empty_count.load(Relaxed)
    }

    /// Bytes in runs whose memory the provider has back.
    pub(crate) fn absent_len(&self) -> usize {
        self.absent_len.load(Relaxed)
    }
}

/// Adds to a counter that only holders of the pool's lock change: no locked instruction.
#[inline]
fn add(counter: &AtomicUsize, change: usize) {
    counter.store(counter.load(Relaxed).wrapping_add(change), Relaxed);
}

#[inline]
fn sub(counter: &AtomicUsize, change: usize) {
    counter.store(counter.load(Relaxed).wrapping_sub(change), Relaxed);
}

impl<'a> Open<'a> {
    /// A run of `last + 1` bytes off the start of the first run of the first bin whose runs all are long enough, if
    /// that does: what
    /// [`alloc`](Self::alloc) nearly always finds. `align` is a power of two.
    #[inline(always)]
    pub(crate) fn alloc_first(&self, last: usize, align: usize, kind: Kind) -> Option<&'a PageDesc> {
        let bins = &self.pool.bins;
        let bin = bins.first_from(bins::good_index((last >> UNIT_SHIFT) + 1))?;
        let run = bins.head(bin)?;
        let (descs, tag) = (Descs::around(run), run.tag());
        let len = (last >> descs.shift()) + 1;
        if align >> descs.shift() > 1 || len > tag.len() {
            return None;
        }
        self.take_start(descs, (run, tag, bin), len, kind);
        Some(run)
    }

    /// A run for a request, or `None`. Looks at no more than `1 + 2 * ALIGNED_LOOK + 2 * LENGTH_LOOK` candidates.
    pub(crate) fn alloc(&self, want: &Request) -> Option<&'a PageDesc> {
        if self.pool.free_len() < want.len {
            return None;
        }
        Some(self.take(&self.find(want)?, want.kind))
    }

    /// Like [`alloc`](Self::alloc), and if that fails looks at [`LENGTH_LOOK`] runs of one more bin: in later
    /// rounds at other runs. A run that fits is found, if nothing changes meanwhile, within as many rounds as
    /// the request has [`bins_between`](Request::bins_between) times the runs of the fullest of these bins
    /// divided by `LENGTH_LOOK`.
    pub(crate) fn alloc_round(&self, want: &Request, round: usize) -> Option<&'a PageDesc> {
        let found = self.alloc(want);
        if found.is_some() {
            return found;
        }
        let bin = bins::index(want.units) + round % want.bins_between().max(1);
        let place = self.pool.bins.look(bin, LENGTH_LOOK, |run| want.place(run));
        if place.is_none() {
            self.pool.bins.turn(bin, LENGTH_LOOK);
        }
        Some(self.take(&place?, want.kind))
    }

    fn find(&self, want: &Request) -> Option<Place<'a>> {
        let bins = &self.pool.bins;
        let good = |units, look| {
            bins.first_from(bins::good_index(units)).and_then(|bin| bins.look(bin, look, |run| want.place(run)))
        };
        let near = |units| bins.look(bins::index(units), LENGTH_LOOK, |run| want.place(run));
        let special = match want.where_ {
            Where::Start => None,
            Where::Middle => self.find_middle(want),
            Where::End | Where::AnyEnd => return self.find_end(want),
        };
        special
            .or_else(|| good(want.units, ALIGNED_LOOK))
            .or_else(|| if want.slack > 0 { good(want.units + want.slack, ALIGNED_LOOK) } else { None })
            .or_else(|| near(want.units))
            .or_else(|| if want.slack > 0 { near(want.units + want.slack) } else { None })
    }

    /// A place at the end of one of the longest runs, before what is the heap's own too or before the chunk's end,
    /// where it parts nothing. If it may, at the end of the longest one, unless the pool is nearly full.
    fn find_end(&self, want: &Request) -> Option<Place<'a>> {
        let last = self.pool.bins.last()?;
        let fits = |run| want.place_end(run);
        let parts_nothing = self.pool.bins.look(last, LENGTH_LOOK, |run| fits(run).filter(Place::is_last));
        let may_part = want.where_ == Where::AnyEnd && self.pool.free_len() > self.pool.held_len() / END_RATIO;
        parts_nothing.or_else(|| if may_part { self.pool.bins.look(last, 1, fits) } else { None })
    }

    /// A run for what the heap itself needs, beside one that it has, whose pool this is.
    pub(crate) fn alloc_beside(&self, own: &'a PageDesc, want: &Request) -> Option<&'a PageDesc> {
        let descs = Descs::around(own);
        let before = run_before(descs, own.index(), Kind::Free).and_then(|(run, _)| want.place_end(run));
        let next = || descs.get(own.index() + own.len()).filter(|next| next.tag().is(Kind::Free));
        let place = before.or_else(|| want.place(next()?))?;
        Some(self.take(&place, want.kind))
    }

    /// A place in the middle of a run of the last bin, if more than half of the pool is free.
    fn find_middle(&self, want: &Request) -> Option<Place<'a>> {
        if self.pool.free_len() <= self.pool.held_len() / 2 {
            return None;
        }
        self.pool.bins.look(self.pool.bins.last()?, 1, |run| want.place_middle(run))
    }

    /// Cuts a place out of its free run; what is left in front and behind stays free, and zeroed if it was.
    fn take(&self, place: &Place<'a>, kind: Kind) -> &'a PageDesc {
        let Place { chunk, run, skip, len, is_end } = *place;
        let (first, all, zeroed) = (run.index(), run.len(), run.is_zeroed());
        let descs = Descs::around(run);
        let head = match descs.get(first + skip) {
            Some(head) if skip > 0 => head,
            _ => {
                let bin = bins::index(units(chunk, all));
                self.take_start(descs, (run, run.tag(), bin), len, kind);
                return run;
            }
        };
        self.unbin(chunk, run);
        if all == chunk.count() {
            self.note_used(chunk);
        }
        head.set_index(first + skip);
        if !is_end {
            self.note_touched(descs, first + skip + len);
        }
        self.bin(chunk, first, skip, zeroed);
        self.bin(chunk, first + skip + len, all - skip - len, zeroed);
        mark_used(descs, head, kind, len, zeroed);
        head
    }

    /// [`take`](Self::take) of a place that begins where its run does, which is in that bin and at least `len` granules
    /// long.
    #[inline(always)]
    fn take_start(&self, descs: Descs<'a>, from: (&'a PageDesc, Tag, usize), len: usize, kind: Kind) {
        let (run, tag, _) = from;
        if tag.len() == descs.count() {
            self.note_used(descs.chunk());
        }
        self.shorten(descs, from, len);
        mark_used(descs, run, kind, len, tag.is_zeroed());
    }

    /// Takes `len` granules, as many as there are at most, off the start of a free run. Its first descriptor is then
    /// the caller's to write.
    #[inline(always)]
    fn shorten(&self, descs: Descs<'a>, (run, tag, bin): (&'a PageDesc, Tag, usize), len: usize) {
        sub(&self.pool.free_len, len << descs.shift());
        self.note_touched(descs, run.index() + len);
        let rest = tag.len().wrapping_sub(len);
        match descs.get(run.index() + len) {
            Some(head) if rest > 0 => {
                head.set_index(run.index() + len);
                mark_free(descs, head, rest, tag.is_zeroed());
                self.pool.bins.replace(run, bin, head, bins::index(descs.units(rest)));
            }
            _ => self.pool.bins.remove(run, bin),
        }
    }

    /// Granules up to `end` are used from now on.
    #[inline(always)]
    fn note_touched(&self, descs: Descs<'_>, end: usize) {
        if end > descs.chunk().touched() {
            self.touch(descs.chunk(), end);
        }
    }

    #[cold]
    fn touch(&self, chunk: &Chunk, end: usize) {
        self.told.untouched_len.fetch_sub(chunk.touch(end), Relaxed);
    }

    /// Frees some deferred runs, if any wait.
    #[inline(always)]
    fn settle(&self) {
        if self.pool.has_deferred() {
            self.drain();
        }
    }

    /// Frees a run that the caller owns, whose tag this is: merges it with free neighbours. A run of kind `Leaving`
    /// brings its chunk into the pool; the run in front of it, handed out first, may be free by then. One of kind
    /// `Emptied` merges with absent neighbours. Tells of a surplus if the chunk is empty now and another one was
    /// before.
    #[inline(always)]
    pub(crate) fn release(&self, descs: Descs<'a>, run: &'a PageDesc, tag: Tag) {
        if tag.is_apart() {
            return self.arrive(run);
        }
        if self.merge(descs, run, tag.len(), false) == descs.count() {
            self.note_empty(descs.chunk());
        }
    }

    #[cold]
    fn arrive(&self, run: &'a PageDesc) {
        let (descs, tag) = (Descs::around(run), run.tag());
        let chunk = descs.chunk();
        if !tag.is(Kind::Emptied) {
            add(&self.pool.held_len, chunk.given_len());
            add(&self.pool.chunk_count, 1);
            self.pool.used.link(chunk);
        }
        if !tag.is(Kind::Leaving) {
            sub(&self.pool.held_len, tag.len() << chunk.shift());
            return self.merge_absent(descs, run.index(), tag.len());
        }
        if self.merge(descs, run, tag.len(), tag.is_zeroed()) == chunk.count() {
            self.note_empty(chunk);
        }
    }

    /// Makes granules an absent run, one with its absent neighbours.
    fn merge_absent(&self, descs: Descs<'a>, mut index: usize, mut len: usize) {
        let shift = descs.shift();
        add(&self.pool.absent_len, len << shift);
        if let Some((prev, tag)) = run_before(descs, index, Kind::Absent) {
            self.pool.absent.unlink(prev);
            (index, len) = (index - tag.len(), len + tag.len());
        }
        if let Some(next) = descs.get(index + len).filter(|next| next.tag().is(Kind::Absent)) {
            self.pool.absent.unlink(next);
            len += next.len();
        }
        if let Some(head) = descs.begin(index) {
            mark_ends(descs, head, Tag::new(Kind::Absent, len, false));
            self.pool.absent.link(head);
        }
    }

    /// Takes whole pages of `page_len` bytes out of the free run that comes last by length: `least` bytes or more, at
    /// most `spare`, off its end. They are a large block's run then.
    pub(crate) fn take_idle(&self, least: usize, spare: usize, page_len: usize) -> Option<&'a PageDesc> {
        let pages_of = |run: &'a PageDesc| {
            let (chunk, start) = (Chunk::of(run), Chunk::start_of(run).as_ptr().addr());
            let step = page_len.max(1 << chunk.shift());
            let end = (start + Chunk::run_len(run)) & !(step - 1);
            let first = start.max(end.saturating_sub(spare)).checked_next_multiple_of(step)?;
            let is_worth = chunk.shift() >= COARSE_SHIFT && end.saturating_sub(first) >= least;
            let (skip, len) = ((first - start) >> chunk.shift(), end.saturating_sub(first) >> chunk.shift());
            is_worth.then_some(Place { chunk, run, skip, len, is_end: false })
        };
        let place = self.pool.bins.look(self.pool.bins.last()?, LENGTH_LOOK, pages_of)?;
        Some(self.take(&place, Kind::Large))
    }

    /// Takes absent granules that have what is wanted, up to `wish` bytes of them, off the start of an absent run: two
    /// runs that are the caller's, what is wanted and the rest, if any. Looks at no more than [`LENGTH_LOOK`] runs.
    pub(crate) fn take_absent(&self, want: Want, wish: usize) -> Option<(&'a PageDesc, Option<&'a PageDesc>)> {
        let fits = |run: &&PageDesc| {
            Chunk::run_len(run) >= want.least_len && Chunk::start_of(run).as_ptr().addr() & (want.align - 1) == 0
        };
        let run = self.pool.absent.iter(LENGTH_LOOK).find(fits)?;
        let (descs, all) = (Descs::around(run), run.len());
        let chunk = descs.chunk();
        let need = if granules(chunk, want.len) <= all { want.len } else { want.least_len };
        let need = granules(chunk, need).max(1);
        let len = granules(chunk, wish).clamp(need, all);
        self.pool.absent.unlink(run);
        sub(&self.pool.absent_len, len << chunk.shift());
        add(&self.pool.held_len, len << chunk.shift());
        if let Some(left) = descs.begin(run.index() + len).filter(|_| len < all) {
            mark_ends(descs, left, Tag::new(Kind::Absent, all - len, false));
            self.pool.absent.link(left);
        }
        mark_used(descs, run, if want.use_ == Use::Slab { Kind::Slab } else { Kind::Large }, need, false);
        let rest = descs.begin(run.index() + need).filter(|_| need < len);
        rest.inspect(|rest| mark_used(descs, rest, Kind::Large, len - need, false));
        Some((run, rest))
    }

    /// Takes a chunk out that is absent as a whole. Its run is of kind `LeavingAbsent`.
    pub(crate) fn take_absent_chunk(&self) -> Option<&'a Chunk> {
        let is_whole = |run: &&PageDesc| run.len() == Chunk::of(run).count();
        let run = self.pool.absent.iter(EMPTY_LOOK).find(is_whole)?;
        let chunk = Chunk::of(run);
        self.pool.absent.unlink(run);
        sub(&self.pool.absent_len, chunk.len());
        run.set(Kind::LeavingAbsent, chunk.count(), false);
        self.pool.used.unlink(chunk);
        sub(&self.pool.chunk_count, 1);
        sub(&self.pool.held_len, chunk.own_len());
        Some(chunk)
    }

    /// Makes a run free, one with its free neighbours; gives the length of what it is then. Zeroed if all of it is.
    #[inline(always)]
    fn merge(&self, descs: Descs<'a>, run: &'a PageDesc, len: usize, zeroed: bool) -> usize {
        let (index, bins) = (run.index(), &self.pool.bins);
        let bin = |len| bins::index(descs.units(len));
        add(&self.pool.free_len, len << descs.shift());
        let next = descs.get(index + len).filter(|next| next.tag().is(Kind::Free));
        match run_before(descs, index, Kind::Free) {
            Some((prev, tag)) => {
                let (mut all, mut zeroed) = (tag.len() + len, zeroed && tag.is_zeroed());
                if let Some(next) = next {
                    let tag = next.tag();
                    bins.remove(next, bin(tag.len()));
                    all += tag.len();
                    zeroed &= tag.is_zeroed();
                }
                run.set(Kind::Inside, 0, false);
                mark_free(descs, prev, all, zeroed);
                bins.replace(prev, bin(tag.len()), prev, bin(all));
                all
            }
            None => match next {
                Some(next) => {
                    let tag = next.tag();
                    let all = len + tag.len();
                    mark_free(descs, run, all, zeroed && tag.is_zeroed());
                    bins.replace(next, bin(tag.len()), run, bin(all));
                    all
                }
                None => {
                    mark_free(descs, run, len, zeroed);
                    bins.insert(run, bin(len));
                    len
                }
            },
        }
    }

    /// Makes a used run longer where it stands, to `len` granules. False: unchanged.
    #[inline(always)]
    pub(crate) fn grow(&self, descs: Descs<'a>, run: &'a PageDesc, old: usize, len: usize) -> bool {
        let Some(next) = descs.get(run.index() + old) else { return false };
        let tag = next.tag();
        if !tag.is(Kind::Free) || tag.len() < len - old {
            return false;
        }
        self.shorten(descs, (next, tag, bins::index(descs.units(tag.len()))), len - old);
        mark_used(descs, run, Kind::Large, len, false);
        true
    }

    /// Makes a used run shorter, to `len` granules, of which there are fewer than before but some. False: unchanged.
    #[inline(never)]
    pub(crate) fn shrink(&self, descs: Descs<'a>, run: &'a PageDesc, old: usize, len: usize) -> bool {
        let Some(rest) = descs.begin(run.index() + len) else { return false };
        mark_used(descs, run, Kind::Large, len, false);
        mark_used(descs, rest, Kind::Large, old - len, false);
        self.release(descs, rest, rest.tag());
        true
    }

    /// Makes granules of a slab, not its first one, a run of their own, whose first descriptor it gives.
    pub(crate) fn punch(&self, descs: Descs<'a>, slab: &'a PageDesc, hole: Range<usize>) -> Option<&'a PageDesc> {
        let first = descs.get(slab.index() + hole.start)?;
        if hole.start < slab.len() {
            slab.set(slab.kind(), hole.start, slab.is_parted() || hole.end < slab.len());
        }
        let granules = hole.clone().filter_map(|granule| descs.get(slab.index() + granule));
        granules.for_each(|granule| granule.leave_slab(Kind::Inside, 0));
        mark_used(descs, first, Kind::Large, hole.len(), false);
        Some(first)
    }

    /// Frees the first `skip` granules of a used run, of which there are more; gives what is left.
    #[cfg(not(feature = "debug-heap"))]
    pub(crate) fn cut_front(&self, descs: Descs<'a>, run: &'a PageDesc, skip: usize) -> Option<&'a PageDesc> {
        let (old, rest) = (run.len(), descs.begin(run.index() + skip)?);
        mark_used(descs, rest, Kind::Large, old - skip, false);
        mark_used(descs, run, Kind::Large, skip, false);
        self.release(descs, run, run.tag());
        Some(rest)
    }

    /// Takes an empty chunk of at most `spare` bytes out of the pool: preferably not the one that became empty
    /// last. Its run is of kind `Leaving`.
    pub(crate) fn take_empty(&self, spare: usize) -> Option<&'a Chunk> {
        let newest = self.pool.empty.iter(1).next()?;
        let chunk = self
            .pool
            .empty
            .iter(EMPTY_LOOK)
            .skip(1)
            .find(|chunk| chunk.len() <= spare)
            .or_else(|| (newest.len() <= spare).then_some(newest))?;
        let run = chunk.desc(0)?;
        self.unbin(chunk, run);
        run.set(Kind::Leaving, chunk.count(), false);
        self.pool.empty.unlink(chunk);
        sub(&self.pool.empty_count, 1);
        sub(&self.pool.chunk_count, 1);
        sub(&self.pool.held_len, chunk.given_len());
        Some(chunk)
    }

    /// Length in bytes of the longest of the first [`LENGTH_LOOK`] runs of the last bin.
    pub(crate) fn largest_free(&self) -> usize {
        let longest = core::cell::Cell::new(0);
        if let Some(bin) = self.pool.bins.last() {
            self.pool.bins.look(bin, LENGTH_LOOK, |run| {
                longest.set(longest.get().max(run.len() << Chunk::of(run).shift()));
                None::<()>
            });
        }
        longest.get()
    }

    /// Frees up to [`DRAIN_LIMIT`] deferred runs.
    #[cold]
    fn drain(&self) {
        for run in core::iter::from_fn(|| self.pop_deferred()).take(DRAIN_LIMIT) {
            self.release(Descs::around(run), run, run.tag());
        }
    }

    /// Pops a deferred run. Only lock holders pop, so `next` of the head cannot change between load and exchange.
    fn pop_deferred(&self) -> Option<&'a PageDesc> {
        self.pool.deferred.pop(|run| &run.next, POP_LIMIT)
    }

    /// Makes `len` granules from `first` on a free run; nothing if `len` is 0.
    fn bin(&self, chunk: &Chunk, first: usize, len: usize, zeroed: bool) {
        if len == 0 {
            return;
        }
        let descs = Descs::of(chunk);
        let Some(head) = descs.begin(first) else { return };
        mark_free(descs, head, len, zeroed);
        self.pool.bins.insert(head, bins::index(units(chunk, len)));
        add(&self.pool.free_len, len << chunk.shift());
    }

    /// Takes a free run out of its bin.
    fn unbin(&self, chunk: &Chunk, head: &PageDesc) {
        self.pool.bins.remove(head, bins::index(units(chunk, head.len())));
        sub(&self.pool.free_len, head.len() << chunk.shift());
    }

    /// A chunk was taken from that was empty.
    #[cold]
    fn note_used(&self, chunk: &Chunk) {
        self.pool.empty.unlink(chunk);
        self.pool.used.link(chunk);
        sub(&self.pool.empty_count, 1);
    }

    /// A chunk became empty. If it is not the only one, that is a surplus.
    #[cold]
    fn note_empty(&self, chunk: &Chunk) {
        self.pool.used.unlink(chunk);
        self.pool.empty.link(chunk);
        add(&self.pool.empty_count, 1);
        if self.pool.empty_count() > 1 {
            self.told.surplus.store(true, Relaxed);
        }
    }
}

/// The free run, or absent one, that ends in front of a granule, and the tag that its ends have.
#[inline(always)]
fn run_before(descs: Descs<'_>, index: usize, kind: Kind) -> Option<(&PageDesc, Tag)> {
    let tag = descs.get(index.wrapping_sub(1))?.tag();
    if tag.is(kind) { Some((descs.get(index.wrapping_sub(tag.len()))?, tag)) } else { None }
}

/// Marks a run that the caller owns, `len` granules from that one on, as emptied. Not as absent: until it is in their
/// list, which takes the lock, whoever releases its neighbour must not take it out of there.
pub(crate) fn mark_emptied(run: &PageDesc, len: usize) -> Tag {
    let tag = Tag::new(Kind::Emptied, len, false);
    if let Some(tail) = Descs::around(run).get(run.index() + len - 1) {
        tail.put(Tag::new(Kind::Tail, 0, false));
    }
    run.put(tag);
    tag
}

/// Marks first and last granule of a free run, which is not empty.
#[inline(always)]
fn mark_free(descs: Descs<'_>, head: &PageDesc, len: usize, zeroed: bool) {
    mark_ends(descs, head, Tag::new(Kind::Free, len, zeroed));
}

/// Gives first and last granule of a run the same tag.
#[inline(always)]
fn mark_ends(descs: Descs<'_>, head: &PageDesc, tag: Tag) {
    if let Some(tail) = descs.get(head.index() + tag.len() - 1) {
        tail.put(tag);
    }
    head.put(tag);
}

/// Marks first and last granule of a used run, which may be one. What lies between is the owner's affair.
#[inline(always)]
pub(super) fn mark_used(descs: Descs<'_>, head: &PageDesc, kind: Kind, len: usize, zeroed: bool) {
    if let Some(tail) = descs.get(head.index() + len - 1) {
        let (kind, len) = if kind == Kind::Slab { (Kind::SlabRest, len - 1) } else { (Kind::Tail, 0) };
        tail.set(kind, len, false);
    }
    head.set(kind, len, zeroed);
}

/// The runs of a chunk, and the parts of slabs that are no runs of their own: as `(head, granules)`. Ends behind the
/// first one that is not whole.
pub(crate) fn runs(chunk: &Chunk) -> impl Iterator<Item = (&PageDesc, usize)> {
    let whole = |index: usize| {
        let head = chunk.desc(index)?;
        Some((head, run_len(chunk, head))).filter(|(_, len)| *len > 0)
    };
    core::iter::successors(whole(0), move |(head, len)| whole(head.index() + len))
}

/// Granules of the run that begins there, or of the part of a slab. By who has the lock, so that nobody parts a slab
/// further meanwhile; but its owner may free it.
#[inline(never)]
fn run_len(chunk: &Chunk, head: &PageDesc) -> usize {
    let first = head.tag();
    if !first.is(Kind::SlabRest) {
        return first.len();
    }
    let tags = (head.index()..).map_while(|index| chunk.desc(index)).map(PageDesc::tag);
    let len = tags.zip(first.len()..).take_while(|(tag, at)| tag.is(Kind::SlabRest) && tag.len() == *at).count();
    // If some granule was no longer the slab's, the first one tells of the run that it is.
    fence(Acquire);
    let now = head.tag();
    if now.is(Kind::SlabRest) { len } else { now.len() }
}

/// What is for diagnosis only: the hold is as long as there are chunks and runs, at rest.
impl<'a> Open<'a> {
    /// All chunks of the pool.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = &'a Chunk> + use<'a> {
        self.pool.used.iter(self.limit()).chain(self.pool.empty.iter(self.limit()))
    }

    /// One more than the chunks there should be, so that a list that is too long, or a ring, shows and ends.
    fn limit(&self) -> usize {
        self.pool.chunk_count.load(Relaxed).saturating_add(1)
    }

    /// Checks P1 to P6; `pool` is this pool's index.
    pub(crate) fn verify(&self, pool: usize) -> Result<(), PageFault> {
        let (mut free_count, mut free_len, mut held_len) = (0, 0, 0);
        let (mut absent_count, mut absent_len) = (0, 0);
        for chunk in self.chunks() {
            let (runs, len) = verify_chunk(chunk)?;
            check(5, chunk.pool() == pool, chunk)?;
            free_count += runs;
            free_len += len;
            held_len += chunk.given_len();
            absent_len += absent_runs(chunk).map(Chunk::run_len).sum::<usize>();
            absent_count += absent_runs(chunk).count();
        }
        for (list, empty) in [(&self.pool.used, false), (&self.pool.empty, true)] {
            for chunk in list.iter(self.limit()) {
                let is_empty = chunk.desc(0).is_some_and(|run| run.kind() == Kind::Free && run.len() == chunk.count());
                check(5, is_empty == empty, chunk)?;
            }
        }
        let at = NonNull::from(self.pool).as_ptr();
        check(4, self.verify_bins()? == free_count, at)?;
        check(6, self.pool.free_len() == free_len && self.pool.held_len() + absent_len == held_len, at)?;
        check(9, self.pool.absent_len() == absent_len, at)?;
        let mut before = None;
        let mut listed = self.pool.absent.iter(absent_count + 1);
        let linked = |run: &'a PageDesc| {
            let is_linked = before.map_or(run.prev.is_empty(), |before| run.prev.leads_to(before));
            before = Some(run);
            run.tag().is(Kind::Absent) && is_linked
        };
        check(9, listed.by_ref().map(linked).filter(|linked| *linked).count() == absent_count, at)?;
        check(6, self.pool.chunk_count.load(Relaxed) == self.chunks().count(), at)?;
        check(6, self.pool.empty_count() == self.pool.empty.iter(self.limit()).count(), at)
    }

    /// Checks B1 to B3 and counts the runs in all bins.
    fn verify_bins(&self) -> Result<usize, PageFault> {
        let mut count = 0;
        for bin in 0..bins::BIN_COUNT {
            let head = self.pool.bins.head(bin);
            check(4, self.pool.bins.is_filled(bin) == head.is_some(), &raw const *self.pool)?;
            let mut next = head;
            while let Some(run) = next {
                let right = run.kind() == Kind::Free && bins::index(units(Chunk::of(run), run.len())) == bin;
                let behind = run.next.get().or(head);
                let linked = behind.is_some_and(|behind: &PageDesc| behind.prev.leads_to(run));
                check(4, right && linked, run)?;
                count += 1;
                check(4, count <= self.pool.free_len() >> UNIT_SHIFT, run)?;
                next = run.next.get();
            }
        }
        Ok(count)
    }
}

/// The absent runs of a chunk.
fn absent_runs(chunk: &Chunk) -> impl Iterator<Item = &PageDesc> {
    runs(chunk).map(|(run, _)| run).filter(|run| run.tag().is(Kind::Absent))
}

/// Checks P1 to P3, and of P9 that absent runs are no neighbours; counts free runs, and bytes in them.
fn verify_chunk(chunk: &Chunk) -> Result<(usize, usize), PageFault> {
    let (mut count, mut len, mut end, mut was) = (0, 0, 0, Kind::Inside);
    for (head, granules) in runs(chunk) {
        let tail = chunk.desc(head.index() + granules - 1);
        check(1, tail.is_some(), head)?;
        check(2, head.tag().is(Kind::SlabRest) || tail.is_some_and(|tail| agree(head, tail)), head)?;
        let is_free = head.kind() == Kind::Free;
        check(3, !(was == Kind::Free && is_free), head)?;
        check(9, !(was == Kind::Absent && head.kind() == Kind::Absent), head)?;
        if is_free {
            count += 1;
            len += head.len() << chunk.shift();
        }
        was = head.kind();
        end = head.index() + granules;
    }
    check(1, end == chunk.count(), chunk)?;
    Ok((count, len))
}

/// Whether first and last descriptor of a run tell the same. A used run's owner changes them meanwhile, without the
/// lock.
fn agree(head: &PageDesc, tail: &PageDesc) -> bool {
    let (len, end) = (head.len(), tail.tag());
    let is_single = len == 1;
    // With hardening, a slab's descriptors forget that they are one before its run is free.
    let is_forgotten = end.is(Kind::Inside) && cfg!(feature = "hardened");
    match head.kind() {
        Kind::Free => end.is(Kind::Free) && end.len() == len && end.is_zeroed() == head.is_zeroed(),
        Kind::Absent => end.is(Kind::Absent) && end.len() == len,
        Kind::Large => is_single || end.is(Kind::Tail),
        Kind::Slab | Kind::SlabPartial | Kind::SlabEmpty => {
            is_single || end.is(Kind::SlabRest) && end.len() == len - 1 || is_forgotten
        }
        Kind::Deferred | Kind::Own | Kind::Emptied => {
            is_single || end.is(Kind::Tail) || end.is(Kind::SlabRest) || is_forgotten
        }
        Kind::Inside | Kind::SlabRest | Kind::Tail | Kind::Leaving | Kind::LeavingAbsent => false,
    }
}

/// An error naming `rule` unless `holds`.
pub(crate) fn check<T>(rule: u8, holds: bool, at: *const T) -> Result<(), PageFault> {
    if holds { Ok(()) } else { Err(PageFault { rule, at: at.addr() }) }
}

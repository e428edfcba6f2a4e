//! Level 2: what stands around each block, and where freed blocks wait.
//!
//! ```text
//! outer block, as the heap below knows it
//! ├ link │ seal │ size │ shape │ age │ allocated by │ freed by │ red ... red │ the caller's block │ red 16 B ┤
//! └─────────────────────── 56 B ─────────────────────────────┘  8 B or more ^ a multiple of the alignment
//! ```
//! *A frame inside the block, not a table beside it*: the heap below stays as it is and only sees longer Layouts.
//! Price: 80 bytes a block (more where the alignment is more than 64), and what is found out about a block is as good
//! as its frame.
//!
//! *The seal* is a hash of the frame's words, its place and the heap's key: it tells whether the frame is whole, and
//! what state the block is in. Going from live to freed is one compare-and-exchange of it, so that of two frees at once
//! exactly one succeeds.
//!
//! *Freed blocks wait* in a fixed number of places, each an atomic pointer: a free swaps its block into a random place
//! and gives back whichever was there. No lock, nobody waits, and a context that interrupts another one in the middle
//! finds every place whole. Random, not first in first out, so that the order in which blocks are used again cannot be
//! foreseen. Price: a block waits for as many frees as there are places only on average.
//!
//! Sources of the ideas: the red zones and the quarantine of AddressSanitizer, the poison and the user tracking of
//! Linux's SLUB.

#![expect(unsafe_code, reason = "headers, red zones and poison in blocks")]

use core::alloc::Layout;
use core::fmt;
use core::panic::Location;
use core::ptr::{NonNull, null_mut};

use super::Key;
use crate::base::sync::{
    AtomicPtr, AtomicWord, Counter,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
    fence,
};
use crate::contract::unwind::never_unwinding;

/// Bytes of a frame's words.
const HEAD_LEN: usize = 56;
/// Bytes in front of a block that needs no larger alignment.
const FRONT_LEN: usize = 64;
/// Bytes behind a block that must stay as they are.
const BACK_LEN: usize = 16;
/// Bytes in front of a block, at most, that must stay as they are.
const FRONT_RED_LEN: usize = 64;
/// Bytes of a freed block, at most, that are poisoned: so that a free takes bounded time.
const POISON_LEN: usize = 4096;
/// Longer outer blocks do not wait: the bytes that wait are bounded.
pub(crate) const HELD_LEN: usize = 4096;
/// Blocks that wait at most.
const PLACES: usize = 128;

/// What freed bytes are: as a pointer, no address of any machine of 48 or 57 bits.
const POISON: u8 = 0xd5;
const RED: u8 = 0xb9;

const SEAL: usize = 1;
const SIZE: usize = 2;
const SHAPE: usize = 3;
const AGE: usize = 4;
const ALLOCATED: usize = 5;
const FREED: usize = 6;
/// `SHAPE`: log2 of the alignment, then the kinds of two sites.
const ALLOCATED_SHIFT: u32 = 8;
const FREED_SHIFT: u32 = 16;

/// Where a block was allocated or freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Site {
    /// Through `GlobalAlloc` or `allocator-api2`, without a [hook](crate::Heap::set_site_hook).
    Unknown,
    /// By the crate's own methods.
    Line(&'static Location<'static>),
    /// What the kernel's hook said.
    Code(usize),
}

impl Site {
    fn pack(self) -> (u64, u64) {
        match self {
            Self::Unknown => (0, 0),
            Self::Line(line) => (1, core::ptr::from_ref(line).expose_provenance() as u64),
            Self::Code(addr) => (2, addr as u64),
        }
    }

    /// # Safety
    /// Both came from [`pack`](Self::pack).
    #[expect(clippy::cast_possible_truncation, reason = "the crate is for 64-bit addresses")]
    unsafe fn unpack(kind: u64, word: u64) -> Self {
        match kind & 0xff {
            // SAFETY: by the contract the word is the address of a reference that lives for ever.
            1 => Self::Line(unsafe { &*core::ptr::with_exposed_provenance(word as usize) }),
            2 => Self::Code(word as usize),
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("an unknown place"),
            Self::Line(line) => write!(f, "{}:{}", line.file(), line.line()),
            Self::Code(addr) => write!(f, "{addr:#x}"),
        }
    }
}

/// What a frame tells of a block. Prints without allocating.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockInfo {
    /// Bytes that were asked for.
    pub size: usize,
    /// The alignment that was asked for.
    pub align: usize,
    /// Allocations from this heap since this one.
    pub age: u64,
    /// Who allocated it.
    pub allocated: Site,
    /// Who freed it; [`Site::Unknown`] while it is in use.
    pub freed: Site,
}

impl fmt::Display for BlockInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { size, age, allocated, freed, .. } = self;
        write!(f, "{size} B allocated by {allocated} {age} allocations ago")?;
        if *freed == Site::Unknown { Ok(()) } else { write!(f, ", freed by {freed}") }
    }
}

/// What a block's frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// In use.
    Live,
    /// Freed; the caller's of the free that made it so, then in quarantine.
    Held,
    /// Back in the heap, and not used since.
    Free,
    /// Nothing: no frame, or a damaged one.
    Unknown,
}

/// The seal of a frame whose words are about to change.
const CLAIMED: u64 = 1;

/// What the seal is made of.
const SEALED: [usize; 5] = [SIZE, SHAPE, AGE, ALLOCATED, FREED];

/// How often a frame is read while somebody writes it.
const READ_TRIES: u32 = 8;

/// The frame at the start of an outer block.
#[derive(Clone, Copy)]
pub(crate) struct Frame<'a> {
    words: &'a [AtomicWord; HEAD_LEN / 8],
    key: Key,
}

/// Bytes from an outer block's start to the block inside.
pub(crate) fn front_len(align: usize) -> usize {
    align.max(FRONT_LEN)
}

/// The Layout of the outer block; `None` if there is none so long.
pub(crate) fn outer(layout: Layout) -> Option<Layout> {
    let len = layout.size().checked_add(front_len(layout.align()) + BACK_LEN)?;
    Layout::from_size_align(len, layout.align().max(8)).ok()
}

/// Where in an outer block of that Layout the block begins, and how long it is.
#[cfg(feature = "guard-pages")]
pub(crate) fn inner(outer: Layout) -> (usize, usize) {
    let front = front_len(outer.align());
    (front, outer.size().saturating_sub(front + BACK_LEN))
}

#[expect(clippy::indexing_slicing, reason = "the indexes are constants below the length")]
impl<'a> Frame<'a> {
    /// # Safety
    /// The 56 bytes at `start`, aligned to 8, are memory of the heap that stays mapped, and are written by the heap
    /// only.
    pub(crate) unsafe fn at(start: NonNull<u8>, key: Key) -> Self {
        // SAFETY: by the contract; atomics need no initialised value and may be shared.
        Self { words: unsafe { start.cast().as_ref() }, key }
    }

    fn start(self) -> NonNull<u8> {
        NonNull::from(self.words).cast()
    }

    fn get(self, word: usize) -> u64 {
        self.words[word].load(Relaxed)
    }

    fn set(self, word: usize, value: u64) {
        self.words[word].store(value, Relaxed);
    }

    /// Seals words that nobody else writes.
    fn seal(self, state: State) {
        let hash = self.key.hash(self.start(), SEALED.map(|word| self.get(word)));
        self.words[SEAL].store(sealed(hash, state), Release);
    }

    /// Says that the words are about to change.
    fn open(self) {
        self.set(SEAL, CLAIMED);
        fence(Release);
    }

    /// The words as they were at one moment, whoever changes them meanwhile.
    pub(crate) fn read(self) -> Words {
        let mut words = [0; HEAD_LEN / 8];
        for _ in 0..READ_TRIES {
            let seal = self.words[SEAL].load(Acquire);
            // Not the link, which is the heap's below, and not always atomic.
            words = core::array::from_fn(|word| if word < SEAL { 0 } else { self.get(word) });
            fence(Acquire);
            if self.get(SEAL) == seal {
                words[SEAL] = seal;
                return Words { words, start: self.start(), key: self.key };
            }
        }
        words[SEAL] = CLAIMED;
        Words { words, start: self.start(), key: self.key }
    }

    /// Writes the frame of a block that was just allocated, and the red zones around it; gives the block.
    ///
    /// # Safety
    /// The outer block is the caller's alone, and as long as [`outer`] says.
    pub(crate) unsafe fn begin(self, layout: Layout, age: u64, site: Site) -> NonNull<u8> {
        let (kind, word) = site.pack();
        self.open();
        self.set(0, 0);
        self.set(SIZE, layout.size() as u64);
        self.set(SHAPE, u64::from(layout.align().trailing_zeros()) | kind << ALLOCATED_SHIFT);
        self.set(AGE, age);
        self.set(ALLOCATED, word);
        self.set(FREED, 0);
        self.seal(State::Live);
        let front = front_len(layout.align());
        let red = (front - HEAD_LEN).min(FRONT_RED_LEN);
        let start = self.start().as_ptr();
        // SAFETY: the contract says so: `red <= front - HEAD_LEN`, so this is behind the frame's words and in front of
        // the block.
        unsafe { start.wrapping_add(front - red).write_bytes(RED, red) };
        // SAFETY: as above: the outer block ends `BACK_LEN` bytes behind the block.
        unsafe { start.wrapping_add(front + layout.size()).write_bytes(RED, BACK_LEN) };
        // SAFETY: the block is inside the outer one.
        unsafe { NonNull::new_unchecked(start.wrapping_add(front)) }
    }

    /// Changes the size of a live block, whose outer block was changed before.
    ///
    /// # Safety
    /// As for [`begin`](Self::begin), with `layout` as it is now; the frame is that of the block, here or before it was
    /// moved here.
    pub(crate) unsafe fn renew(self, layout: Layout) -> NonNull<u8> {
        // SAFETY: whoever wrote these words packed them, and the contract says that they are whole.
        let site = unsafe { Site::unpack(self.get(SHAPE) >> ALLOCATED_SHIFT, self.get(ALLOCATED)) };
        // SAFETY: the contract is the same.
        unsafe { self.begin(layout, self.get(AGE), site) }
    }

    fn layout(self) -> Layout {
        layout_of(self.get(SIZE), self.get(SHAPE))
    }

    fn block(self) -> *mut u8 {
        self.start().as_ptr().wrapping_add(front_len(self.layout().align()))
    }

    /// Makes a live block, as it was `seen`, a held one; of two that try, one succeeds.
    pub(crate) fn claim(self, seen: &Words, site: Site) -> bool {
        if seen.state() != State::Live {
            return false;
        }
        if self.words[SEAL].compare_exchange(seen.words[SEAL], CLAIMED, Acquire, Relaxed).is_err() {
            return false;
        }
        fence(Release);
        let (kind, word) = site.pack();
        self.set(SHAPE, self.get(SHAPE) | kind << FREED_SHIFT);
        self.set(FREED, word);
        self.seal(State::Held);
        true
    }

    /// Makes a held block a free one, on its way back into the heap; `false` for one whose slab is not kept in mind.
    pub(crate) fn end(self, in_slab: bool) {
        if in_slab { self.seal(State::Free) } else { self.set(SEAL, 0) }
    }

    /// The first byte of the red zones that is not as it was: in front of the block, behind it.
    ///
    /// # Safety
    /// The frame is whole, and the block is the caller's.
    pub(crate) unsafe fn red_damage(self) -> [Option<*mut u8>; 2] {
        let (layout, block) = (self.layout(), self.block());
        let red = (front_len(layout.align()) - HEAD_LEN).min(FRONT_RED_LEN);
        // SAFETY: `begin` wrote these bytes, which are inside the outer block.
        let front = unsafe { first_other(block.wrapping_sub(red), red, RED) };
        // SAFETY: as above.
        let back = unsafe { first_other(block.wrapping_add(layout.size()), BACK_LEN, RED) };
        [front, back]
    }

    /// Fills the block's beginning with poison.
    ///
    /// # Safety
    /// The frame is whole, and the block is the caller's, in use by nobody.
    pub(crate) unsafe fn poison(self) {
        // SAFETY: inside the block, which is the caller's.
        unsafe { self.block().write_bytes(POISON, self.layout().size().min(POISON_LEN)) };
    }

    /// The first byte of the poison that is not as it was.
    ///
    /// # Safety
    /// The frame is whole, and the block was poisoned and is still free or the caller's.
    pub(crate) unsafe fn poison_damage(self) -> Option<*mut u8> {
        // SAFETY: inside the block.
        unsafe { first_other(self.block(), self.layout().size().min(POISON_LEN), POISON) }
    }
}

/// A frame's words as they were at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words {
    words: [u64; HEAD_LEN / 8],
    start: NonNull<u8>,
    key: Key,
}

#[expect(clippy::indexing_slicing, reason = "the indexes are constants below the length")]
impl Words {
    pub(crate) fn state(&self) -> State {
        let seal = self.words[SEAL];
        if seal == CLAIMED {
            return State::Held;
        }
        let hash = self.key.hash(self.start, SEALED.map(|word| self.words[word]));
        let known = [State::Live, State::Held, State::Free].into_iter().find(|state| sealed(hash, *state) == seal);
        known.unwrap_or(State::Unknown)
    }

    /// The Layout that the block was allocated for. Of a state that is known.
    pub(crate) fn layout(&self) -> Layout {
        layout_of(self.words[SIZE], self.words[SHAPE])
    }

    /// The caller's block. Of a state that is known.
    pub(crate) fn block(&self) -> *mut u8 {
        self.start.as_ptr().wrapping_add(front_len(self.layout().align()))
    }

    /// What the frame tells, at `now` on the heap's clock; `None` if it was not whole.
    pub(crate) fn info(&self, now: u64) -> Option<BlockInfo> {
        if self.state() == State::Unknown || self.words[SEAL] == CLAIMED {
            return None;
        }
        let (layout, shape) = (self.layout(), self.words[SHAPE]);
        // SAFETY: the seal is that of these very words, so they are as they were packed.
        let allocated = unsafe { Site::unpack(shape >> ALLOCATED_SHIFT, self.words[ALLOCATED]) };
        // SAFETY: as above.
        let freed = unsafe { Site::unpack(shape >> FREED_SHIFT, self.words[FREED]) };
        let age = now.wrapping_sub(self.words[AGE]);
        Some(BlockInfo { size: layout.size(), align: layout.align(), age, allocated, freed })
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the crate is for 64-bit addresses")]
fn layout_of(size: u64, shape: u64) -> Layout {
    Layout::from_size_align(size as usize, 1 << (shape & 63)).unwrap_or(Layout::new::<u8>())
}

/// Forgets what state the block at `start` was in: its memory becomes something else.
///
/// # Safety
/// As for [`Frame::at`], and nobody uses the block.
pub(crate) unsafe fn wipe(start: NonNull<u8>) {
    // SAFETY: the contract is the same; no key is used.
    unsafe { Frame::at(start, Key::NONE) }.set(SEAL, 0);
}

/// The length of the shortest outer block.
pub(crate) const SHORTEST_LEN: usize = FRONT_LEN + BACK_LEN;

fn sealed(hash: u64, state: State) -> u64 {
    // No state is `CLAIMED`, nor what a wiped frame has.
    hash.wrapping_add(state as u64) | 1 << 63
}

/// The first of `len` bytes that is not `byte`.
///
/// # Safety
/// The bytes are mapped memory of the heap.
unsafe fn first_other(start: *mut u8, len: usize, byte: u8) -> Option<*mut u8> {
    let (mut at, end) = (start, start.wrapping_add(len));
    let word = u64::from_ne_bytes([byte; 8]);
    while at < end {
        let rest = end.addr() - at.addr();
        // SAFETY: 8 bytes are left, aligned; volatile, since who writes there now breaks the contract.
        if rest >= 8 && at.addr() % 8 == 0 && unsafe { at.cast::<u64>().read_volatile() } == word {
            at = at.wrapping_add(8);
            continue;
        }
        // SAFETY: as above, for a byte.
        if unsafe { at.read_volatile() } != byte {
            return Some(at);
        }
        at = at.wrapping_add(1);
    }
    None
}

/// A heap's part in level 2: the clock, the hook, and the blocks that wait.
#[derive(Debug)]
pub(crate) struct Debugging {
    clock: Counter,
    hook: AtomicPtr<()>,
    turn: Counter,
    places: [AtomicPtr<u8>; PLACES],
}

impl Debugging {
    pub(crate) const fn new() -> Self {
        Self {
            clock: Counter::new(0),
            hook: AtomicPtr::new(null_mut()),
            turn: Counter::new(0),
            places: [const { AtomicPtr::new(null_mut()) }; PLACES],
        }
    }

    /// Allocations so far.
    pub(crate) fn now(&self) -> u64 {
        self.clock.load(Relaxed)
    }

    pub(crate) fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Relaxed)
    }

    pub(crate) fn set_hook(&self, hook: fn() -> usize) {
        self.hook.store(hook as *mut (), Release);
    }

    /// What the hook says, or what is known without it.
    pub(crate) fn site(&self, known: Site) -> Site {
        let hook = self.hook.load(Acquire);
        if hook.is_null() {
            return known;
        }
        // SAFETY: `set_hook`, the only writer of what is not null, stored a function of this type.
        let hook = unsafe { core::mem::transmute::<*mut (), fn() -> usize>(hook) };
        Site::Code(never_unwinding(hook))
    }

    /// Keeps a freed block; gives the one that was kept in its place, for good.
    #[expect(clippy::indexing_slicing, reason = "taken modulo the length")]
    #[expect(clippy::cast_possible_truncation, reason = "a random number")]
    pub(crate) fn exchange(&self, outer: NonNull<u8>, key: Key) -> Option<NonNull<u8>> {
        let place = key.hash(outer, [self.turn.fetch_add(1, Relaxed)]) as usize % PLACES;
        NonNull::new(self.places[place].swap(outer.as_ptr(), AcqRel))
    }

    /// Takes out the blocks that wait, one by one.
    pub(crate) fn take_all(&self) -> impl Iterator<Item = NonNull<u8>> {
        let taken = |place: &AtomicPtr<u8>| {
            let full = !place.load(Relaxed).is_null();
            full.then(|| place.swap(null_mut(), AcqRel)).and_then(NonNull::new)
        };
        self.places.iter().filter_map(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn with_header(size: usize, align: usize, test: impl FnOnce(Frame<'_>, NonNull<u8>)) {
        let layout = Layout::from_size_align(size, align).unwrap();
        let outer = outer(layout).unwrap();
        // SAFETY: the size is not 0.
        let start = NonNull::new(unsafe { std::alloc::alloc(outer) }).unwrap();
        // SAFETY: just allocated, that long.
        let frame = unsafe { Frame::at(start, Key::of(7)) };
        // SAFETY: as above.
        let block = unsafe { frame.begin(layout, 3, Site::Code(0x1234)) };
        test(frame, block);
        // SAFETY: allocated above with this Layout.
        unsafe { std::alloc::dealloc(start.as_ptr(), outer) };
    }

    #[test]
    fn a_frame_tells_what_it_was_told_and_holds_the_alignment() {
        for (size, align) in [(1, 1), (58, 8), (64, 64), (5, 128), (100, 4096), (4096, 16)] {
            with_header(size, align, |frame, block| {
                assert_eq!((block.addr().get() % align, frame.block()), (0, block.as_ptr()));
                let info = frame.read().info(10).unwrap();
                assert_eq!((info.size, info.align, info.age, info.allocated), (size, align, 7, Site::Code(0x1234)));
                // SAFETY: the block is that long.
                unsafe { block.write_bytes(1, size) };
                // SAFETY: the block is this test's.
                assert_eq!((frame.read().state(), unsafe { frame.red_damage() }), (State::Live, [None, None]));
            });
        }
    }

    #[test]
    fn one_byte_outside_of_a_block_is_seen() {
        for (size, align) in [(1, 1), (58, 8), (5, 128)] {
            let len = isize::try_from(size).unwrap();
            for offset in (-64..0).chain(len..len + 16) {
                with_header(size, align, |frame, block| {
                    let place = block.as_ptr().wrapping_offset(offset);
                    // The link's place is nobody's.
                    if place.addr() - frame.start().addr().get() < 8 {
                        return;
                    }
                    // SAFETY: inside the outer block: at least 64 bytes in front, 16 behind.
                    let byte = unsafe { place.read() };
                    // SAFETY: as above.
                    unsafe { place.write(!byte) };
                    let known = frame.read().state() == State::Live;
                    // SAFETY: the frame is whole if its state is known.
                    let seen = !known || unsafe { frame.red_damage() } != [None, None];
                    assert!(seen, "a byte at {offset} of a block of {size} bytes at a multiple of {align}");
                });
            }
        }
    }

    #[test]
    fn a_block_is_claimed_once_and_its_poison_watched() {
        with_header(100, 8, |frame, block| {
            let seen = frame.read();
            assert!(frame.claim(&seen, Site::Unknown) && !frame.claim(&seen, Site::Unknown));
            assert_eq!(frame.read().state(), State::Held);
            // SAFETY: the block is this test's.
            unsafe { frame.poison() };
            // SAFETY: as above.
            assert_eq!(unsafe { frame.poison_damage() }, None);
            for offset in [0, 7, 8, 50, 99] {
                let place = block.as_ptr().wrapping_add(offset);
                // SAFETY: inside the block.
                unsafe { place.write(0) };
                // SAFETY: as above.
                assert_eq!(unsafe { frame.poison_damage() }, Some(place));
                // SAFETY: as above.
                unsafe { place.write(POISON) };
            }
            frame.end(true);
            assert_eq!(frame.read().state(), State::Free);
            frame.end(false);
            assert_eq!(frame.read().state(), State::Unknown);
        });
    }

    #[test]
    fn what_waits_comes_out_once_in_an_order_of_its_own() {
        let debugging = Debugging::new();
        let block = |number: usize| NonNull::new(core::ptr::without_provenance_mut::<u8>(64 * number)).unwrap();
        let out: Vec<_> = (1..=1000).filter_map(|number| debugging.exchange(block(number), Key::of(1))).collect();
        let rest: Vec<_> = debugging.take_all().collect();
        assert!(rest.len() <= PLACES && out.len() + rest.len() == 1000 && debugging.take_all().next().is_none());
        assert!(!out.is_sorted(), "first in, first out");
        let mut all: Vec<_> = out.into_iter().chain(rest).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq((1..=1000).map(block)));
    }
}

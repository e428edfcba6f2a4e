//! Sequences of heap operations, and the one interpreter that runs them: for the property tests beside this folder and,
//! included by its path, for the fuzz target in `fuzz/`.
//!
//! ```text
//! mod        what a sequence is: plain data, made by `arbitrary` (fuzzing, seeds) or by proptest's strategies
//! world      runs one sequence on one kind of heap, and holds every answer against the shadow
//! shadow     what must be true of every block: where it is, how long, and each of its bytes
//! machine    the CPU that the operations run on: its number, true or lying, and what interrupts it, and where
//! pages      providers that keep books, fail on demand, and are places to be interrupted at
//! ```
//! A sequence runs on one thread, so that it is repeated exactly by its bytes. Other contexts come *into the middle* of
//! an operation instead of beside it: at any question to the CPU identity, at any call of the provider, or (x86_64
//! Linux) behind any instruction, by the processor's trap flag. What comes is either a handler on the same CPU (a
//! nested context) or another CPU's turn while this one stands still. Price: two CPUs never run truly at once; that is
//! left to the stress tests and the model checker.

mod machine;
mod pages;
mod shadow;
mod world;

use arbitrary::{Arbitrary, Result, Unstructured};

pub(crate) use world::{Report, run};

/// A heap of some kind, and what is done to it.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    pub(crate) setup: Setup,
    pub(crate) steps: Vec<Step>,
}

/// The kind of heap.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) mode: Mode,
    pub(crate) cpus: Cpus,
    pub(crate) source: Source,
    pub(crate) limit: Limit,
}

/// How CPUs are known.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Mode {
    Hint,
    Pinned,
}

/// How many caches the heap has.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Cpus {
    One,
    Two,
    Five,
}

/// Where pages come from.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Source {
    /// The region provider, without a region to begin with.
    Regions,
    /// The host's memory; one context at a time; nothing else promised.
    Plain,
    /// The host's memory, zeroed; runs can be resized and moved; one context at a time.
    Moving,
    /// The same, and any context may enter at any time.
    MovingReentrant,
}

/// How much a host provider gives.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Limit(pub(crate) u8);

impl Limit {
    /// 16 KiB to 32 MiB.
    pub(crate) fn bytes(self) -> usize {
        (16 << 10) << (self.0 % 12)
    }
}

/// One step of a sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// One operation, not interrupted.
    Do(Op),
    /// One operation with something coming in between, if it gets that far.
    Interrupted(Op, Interrupt),
    /// From now on on that CPU.
    MoveTo(Cpu),
    /// `trim`, keeping this many KiB.
    Trim(u8),
    /// `verify`, and every block's bytes.
    Verify,
    /// Another region (region provider), or more to give when asked for relief (host).
    AddMemory { pages: u8, skew: u16 },
    /// From now on the provider fails like this.
    Fail(Failing),
}

/// One operation of the heap.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Alloc { size: Size, align: Align, face: Face },
    Free(Pick),
    Realloc(Pick, Size),
    Resize(Pick, Size),
    Remap(Pick, Size),
    DrainCurrent,
    Drain,
    Stats,
}

/// By which face a block is asked for.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Face {
    Plain,
    Zeroed,
    /// `GlobalAlloc`.
    Global,
}

/// What comes into the middle of an operation.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Interrupt {
    pub(crate) at: At,
    /// Another CPU's turn; `None`: a handler on the CPU that is interrupted.
    pub(crate) cpu: Option<Cpu>,
    pub(crate) ops: [Op; 3],
}

/// Where an operation is interrupted.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum At {
    /// At the n-th question to CPU identity or provider.
    Call(u8),
    /// Behind the n-th instruction; modulo [`At::LONGEST`].
    Instruction(u16),
}

impl At {
    /// Instructions counted at most: longer than the common paths, short enough to be walked one by one.
    pub(crate) const LONGEST: u16 = 2048;
}

/// A block in use: the next one in the table from here on.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Pick(pub(crate) u8);

/// A size in bytes: mostly small, up to 2 MiB, and some that nobody can have.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Size(pub(crate) u16);

impl Size {
    pub(crate) fn bytes(self) -> usize {
        let value = usize::from(self.0 & 0x1fff);
        match (self.0, self.0 >> 13) {
            (u16::MAX, _) => usize::MAX,
            (0xfffe, _) => isize::MAX as usize - 7,
            (_, 0..=2) => value & 0xff,
            (_, 3) => value & 0x3ff,
            (_, 4) => value,
            (_, 5) => value * 8,
            (_, 6) => value * 64,
            _ => value * 256,
        }
    }
}

/// An alignment: mostly small, up to 2 MiB.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Align(pub(crate) u8);

impl Align {
    pub(crate) fn bytes(self) -> usize {
        match self.0 {
            0..=127 => 8,
            128..=239 => 1 << (self.0 % 8),
            240..=254 => 1 << (self.0 - 240),
            255 => 2 << 20,
        }
    }
}

/// What a CPU says of itself.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) struct Cpu(pub(crate) u8);

/// How a provider fails.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(crate) enum Failing {
    Never,
    /// The k-th call from now on.
    Once(Kinds, u16),
    /// This many of 256 calls.
    Share(Kinds, u8),
}

/// Which calls of a provider fail.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kinds {
    Map,
    Unmap,
    Change,
    Any,
}

/// Steps as long as there are bytes. `arbitrary`'s own lists ask before each element whether another one comes, and
/// random bytes say no every other time: almost every sequence would be two steps long.
impl<'a> Arbitrary<'a> for Sequence {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> Result<Self> {
        let (setup, mut steps) = (bytes.arbitrary()?, Vec::new());
        while !bytes.is_empty() {
            steps.push(bytes.arbitrary()?);
        }
        Ok(Self { setup, steps })
    }
}

/// Most steps are operations. `arbitrary`'s own choice would make every kind as frequent as the others.
impl<'a> Arbitrary<'a> for Step {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match bytes.int_in_range(0..=31)? {
            0..=17 => Self::Do(bytes.arbitrary()?),
            18..=23 => Self::Interrupted(bytes.arbitrary()?, bytes.arbitrary()?),
            24..=26 => Self::MoveTo(bytes.arbitrary()?),
            27 => Self::Trim(bytes.arbitrary()?),
            28 => Self::Verify,
            29..=30 => Self::AddMemory { pages: bytes.arbitrary()?, skew: bytes.arbitrary()? },
            _ => Self::Fail(bytes.arbitrary()?),
        })
    }
}

impl<'a> Arbitrary<'a> for Op {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match bytes.int_in_range(0..=31)? {
            0..=12 => Self::Alloc { size: bytes.arbitrary()?, align: bytes.arbitrary()?, face: bytes.arbitrary()? },
            13..=21 => Self::Free(bytes.arbitrary()?),
            22..=24 => Self::Realloc(bytes.arbitrary()?, bytes.arbitrary()?),
            25..=26 => Self::Resize(bytes.arbitrary()?, bytes.arbitrary()?),
            27..=28 => Self::Remap(bytes.arbitrary()?, bytes.arbitrary()?),
            29 => Self::DrainCurrent,
            30 => Self::Drain,
            _ => Self::Stats,
        })
    }
}

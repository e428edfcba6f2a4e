//! What is reported, and to whom.

#![expect(unsafe_code, reason = "a hook of the kernel is kept as a pointer")]

use core::fmt;
use core::ptr::null_mut;

#[cfg(feature = "debug-heap")]
use super::debug::BlockInfo;
use crate::base::sync::{AtomicPtr, Counter, Ordering};
use crate::contract::unwind::never_unwinding;

/// What a caller did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Misuse {
    /// A block was freed that is free.
    DoubleFree,
    /// What was freed is no memory of this heap.
    ForeignPointer,
    /// What was freed is inside a block, not its start.
    InteriorPointer,
    /// A block was freed with a Layout that is not its own.
    LayoutMismatch,
    /// The first word of a free block was overwritten. The block, and what the list led to behind it, is lost to the
    /// heap.
    CorruptLink,
    /// A byte in front of a block was overwritten (levels 2 and 3). Seen when the block is freed, which it is.
    Underrun,
    /// A byte behind a block was overwritten (levels 2 and 3). Seen when the block is freed, which it is.
    Overrun,
    /// A free block was written to behind its first word (level 2).
    WriteAfterFree,
}

impl Misuse {
    /// Every kind, in the order of their indexes.
    pub const ALL: [Self; 8] = [
        Self::DoubleFree,
        Self::ForeignPointer,
        Self::InteriorPointer,
        Self::LayoutMismatch,
        Self::CorruptLink,
        Self::Underrun,
        Self::Overrun,
        Self::WriteAfterFree,
    ];

    fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DoubleFree => "double free",
            Self::ForeignPointer => "free of a foreign pointer",
            Self::InteriorPointer => "free of an interior pointer",
            Self::LayoutMismatch => "free with a wrong Layout",
            Self::CorruptLink => "write to a free block",
            Self::Underrun => "write in front of a block",
            Self::Overrun => "write behind a block",
            Self::WriteAfterFree => "write to a block after its free",
        })
    }
}

/// One bug as the heap saw it. Prints without allocating.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// What was done.
    pub misuse: Misuse,
    /// The address that was freed, or where the damage is.
    pub addr: usize,
    /// What is known of the block: level 2 only.
    #[cfg(feature = "debug-heap")]
    pub block: Option<BlockInfo>,
}

impl Report {
    pub(crate) const fn new(misuse: Misuse, addr: usize) -> Self {
        Self {
            misuse,
            addr,
            #[cfg(feature = "debug-heap")]
            block: None,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}", self.misuse, self.addr)?;
        #[cfg(feature = "debug-heap")]
        if let Some(block) = self.block {
            write!(f, ": {block}")?;
        }
        Ok(())
    }
}

const KINDS: usize = Misuse::ALL.len();

/// Counts misuse and passes it on. All zero: no hook.
#[derive(Debug)]
pub(crate) struct Watch {
    hook: AtomicPtr<()>,
    counts: [Counter; KINDS],
}

impl Watch {
    pub(crate) const fn new() -> Self {
        Self { hook: AtomicPtr::new(null_mut()), counts: [const { Counter::new(0) }; KINDS] }
    }

    pub(crate) fn set_hook(&self, hook: fn(&Report)) {
        self.hook.store(hook as *mut (), Ordering::Release);
    }

    pub(crate) fn count(&self, misuse: Misuse) -> u64 {
        self.counts.get(misuse.index()).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    #[cold]
    pub(crate) fn report(&self, report: Report) {
        if let Some(count) = self.counts.get(report.misuse.index()) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let hook = self.hook.load(Ordering::Acquire);
        if !hook.is_null() {
            // SAFETY: `set_hook`, the only writer of what is not null, stored a function of this type.
            let hook = unsafe { core::mem::transmute::<*mut (), fn(&Report)>(hook) };
            never_unwinding(|| hook(&report));
        }
    }
}

//! What is asked of the page heap, and why it may say no.

/// What a run is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// To be cut into blocks.
    Slab,
    /// A block of its own.
    Large,
    /// A block of its own that had to move because it grew.
    Grown,
    /// What the heap itself keeps, among the slabs, where it parts no free memory.
    Own,
    /// The same, wherever there is room while memory is plentiful.
    OwnAnywhere,
}

impl Use {
    pub(crate) fn is_large(self) -> bool {
        matches!(self, Self::Large | Self::Grown)
    }
}

/// What new pages are wanted for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Want {
    /// Bytes.
    pub(crate) len: usize,
    /// Bytes that will do.
    pub(crate) least_len: usize,
    pub(crate) align: usize,
    pub(crate) use_: Use,
}

/// What is known of the provider's pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Provided {
    /// They come as zeros.
    pub(crate) zeroed: bool,
    /// Single ones may be given back meanwhile, so that granules are at least as long as they.
    pub(crate) decommits: bool,
}

#[cfg(any(test, loom))]
impl Provided {
    /// Nothing is known.
    pub(crate) const UNKNOWN: Self = Self { zeroed: false, decommits: false };
}

/// Why there is no run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// A lock could not be had, so there may be memory.
    Busy,
    /// All locks were had.
    Empty,
}

/// Why something of the provider's could not be taken in; the caller still owns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AddError {
    /// The map has no free slot for it: add a table and try again.
    Full,
    /// The map's lock could not be had.
    Busy,
    /// There is no room for a single granule, or its address or length is no multiple of 1 KiB.
    TooSmall,
}

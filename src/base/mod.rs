//! What every room needs: the seam of all atomics, Layout to class, and the record of what the heap did.

pub(crate) mod size_class;
pub(crate) mod sync;
pub(crate) mod trace;

//! What every room needs: the seam of all atomics, links of lists, Layout to class, and the record of what the heap
//! did.

pub(crate) mod link;
pub(crate) mod size_class;
pub(crate) mod sync;
pub(crate) mod trace;

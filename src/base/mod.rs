//! What every room needs: the seam of all atomics, links of lists, Layout to class, the record of what the heap did,
//! and the numbers that were chosen by measuring.

pub(crate) mod link;
pub(crate) mod size_class;
pub(crate) mod sync;
pub(crate) mod trace;
pub(crate) mod tuning;

//! Page providers that come with the crate, and the contract that they fulfil.

#[cfg(all(feature = "paging", target_arch = "x86_64"))]
mod paging;
#[cfg(feature = "region")]
mod region;

pub use crate::contract::provider::{PageProvider, PageRun};
#[cfg(all(feature = "paging", target_arch = "x86_64"))]
pub use paging::{Paging, PagingProvider, Stale, WindowError};
#[cfg(feature = "region")]
pub use region::{RegionError, RegionProvider};

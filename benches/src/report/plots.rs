//! Plots.

use std::error::Error;
use std::path::Path;

use super::Report;

impl Report {
    pub(super) fn plot(&self, _folder: &Path) -> Result<(), Box<dyn Error>> {
        Ok(())
    }
}

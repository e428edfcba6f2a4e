//! What is searched for when memory is short, and how hard.

use crate::heap::depot::Caller;
use crate::pages::{Refused, Run, Want};

/// How hard an attempt looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    Quick,
    /// Also where the quick search may overlook a run; waits for locks, within the spin limit, if `wait`.
    Thorough {
        wait: bool,
    },
}

/// Who searches for memory, and what would do.
pub(crate) trait Seek {
    type Found;

    /// What a run for it must be.
    fn want(&self) -> Want;

    /// Looks once among what the heap has.
    fn attempt(&self, depth: Depth) -> Result<Self::Found, Refused>;

    /// Whether another attempt would look at more.
    fn has_more(&self) -> bool {
        false
    }

    /// Whether somebody holds a lock that an attempt takes, beside those of the pages. A guess.
    fn is_held_up(&self) -> bool {
        false
    }

    /// Makes a run, wanted like this and owned, what is searched for.
    fn adopt(&self, run: Run<'_>, caller: Caller) -> Option<Self::Found>;

    /// What serves when nothing else is left; `hurried` if the caller must not take long.
    fn last_resort(&self, hurried: bool) -> Option<Self::Found> {
        let _ = hurried;
        None
    }
}

//! Levels of hardening, which are features of the heap: each is a build of `cells` of its own, beside the one that
//! runs, whose column `pin` is this column. Their cells are started as programs, and print what they measured.

use std::env;
use std::path::Path;

use super::{Peer, ours};

/// The column that a level's program runs.
pub const COLUMN: &str = "pin";

/// One level.
#[derive(Clone, Copy, Debug)]
pub struct Level {
    /// The column's name, and the feature's.
    pub name: &'static str,
    about: &'static str,
}

pub const LEVELS: [Level; 3] = [
    Level { name: "level-1", about: "pin with the feature hardened" },
    Level { name: "level-2", about: "pin with the feature debug-heap" },
    Level { name: "level-3", about: "pin with the feature guard-pages, no block sampled: a region has no guards" },
];

impl Level {
    /// The program's file name.
    pub fn program_name(self) -> String {
        format!("cells-{}", self.name)
    }
}

/// The column, or why it is not there.
pub(super) fn load(level: Level) -> Result<Peer, String> {
    let program = env::current_exe().map_err(|error| error.to_string())?.with_file_name(level.program_name());
    if !program.is_file() {
        return Err("its program is built by `cargo run --release`, without --bin".into());
    }
    let program: &'static Path = Box::leak(program.into_boxed_path());
    let [pin, ..] = ours::PEERS;
    Ok(Peer { name: level.name, about: level.about, program: Some(program), ..pin })
}

//! Slabs: page runs cut into blocks of one class, each described by one word.

pub(crate) mod block;
pub(crate) mod free_blocks;
pub(crate) mod list;
pub(crate) mod missed;
mod parts;
pub(crate) mod ring;
pub(crate) mod word;

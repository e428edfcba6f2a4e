//! Real work for a kernel heap, each piece small enough to repeat and honest enough to be checked.
//!
//! Synthetic allocation loops flatter an allocator: sizes come from one formula, lifetimes from another, and nobody
//! looks at the bytes. So the work here is what programs do: five well-known `no_std` crates that allocate hard, over
//! documents that real tools wrote (`data/README.md`). What it costs: the image carries half a megabyte of documents,
//! and a unit of work is never *only* allocation, so that differences between heaps look smaller here than in a bare
//! loop.
//!
//! A [`Workload`] makes a [`Product`] out of one of its inputs. The product keeps the live structures (the parsed tree,
//! the index, the compiled patterns, the interpreter) so that the demonstration can show a heap that is in use; its
//! checksum must equal the golden one, whatever CPU made it and whatever interrupted it. Golden values depend on the
//! documents and the meaning of the work only, never on a crate's version: the DEFLATE workload, for one, sums what
//! comes back, not the compressed bytes.
//!
//! Everything runs on the host as well: `cargo test -p smp-heap-work` recomputes each golden value with a second crate
//! that shares no code with the first.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod deflate;
pub mod documents;
mod index;
pub mod interrupt;
mod json;
mod markdown;
mod search;
#[cfg(test)]
mod second_opinion;
mod sum;

use alloc::boxed::Box;
use core::{any::Any, fmt};

pub use sum::Sum;

/// What one unit of a workload's yield is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A byte of input.
    Byte,
    /// A word of input.
    Word,
}

impl Unit {
    /// The name used on the serial line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Byte => "byte",
            Self::Word => "word",
        }
    }
}

/// What a workload made of one input.
pub struct Product {
    /// How many [units](Workload::unit) of input went in.
    pub units: u64,
    /// The sum of the result.
    pub checksum: u64,
    /// The live structures: dropping them gives their memory back.
    pub keep: Box<dyn Any + Send>,
}

impl fmt::Debug for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Product")
            .field("units", &self.units)
            .field("checksum", &format_args!("{:#018x}", self.checksum))
            .finish_non_exhaustive()
    }
}

/// A result that is not the golden one: memory was lost, mixed up or written by somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// The workload.
    pub name: &'static str,
    /// Which of its inputs.
    pub input: usize,
    /// The golden sum.
    pub expected: u64,
    /// The sum that came out; none where the work itself failed (a document that no longer parses, say).
    pub found: Option<u64>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of input {}: expected {:#018x}, found ", self.name, self.input, self.expected)?;
        match self.found {
            Some(sum) => write!(f, "{sum:#018x}"),
            None => f.write_str("no result"),
        }
    }
}

impl core::error::Error for Mismatch {}

/// A kind of work.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// A short name, one word.
    pub name: &'static str,
    /// What is done, and by which crate, in a line.
    pub about: &'static str,
    /// What is counted.
    pub unit: Unit,
    /// The sum of each input's result; there are as many inputs as sums.
    pub golden: &'static [u64],
    make: fn(input: usize) -> Option<Product>,
}

impl Workload {
    /// Does the work of round `round` (the inputs take turns) and checks the result.
    ///
    /// # Errors
    /// A [`Mismatch`] where the result is not the golden one.
    pub fn run(&self, round: usize) -> Result<Product, Mismatch> {
        let input = round.checked_rem(self.golden.len()).unwrap_or(0);
        let expected = self.golden.get(input).copied().unwrap_or(0);
        let product = (self.make)(input);
        match product {
            Some(product) if product.checksum == expected => Ok(product),
            other => Err(Mismatch { name: self.name, input, expected, found: other.map(|product| product.checksum) }),
        }
    }
}

/// All workloads, in the order in which the demonstration runs them.
pub static ALL: [Workload; 5] = [
    Workload {
        name: "json",
        about: "serde_json: parse, write, parse again, compare",
        unit: Unit::Byte,
        golden: &json::GOLDEN,
        make: json::make,
    },
    Workload {
        name: "deflate",
        about: "miniz_oxide: compress, inflate, compare",
        unit: Unit::Byte,
        golden: &deflate::GOLDEN,
        make: deflate::make,
    },
    Workload {
        name: "index",
        about: "hashbrown, BTreeMap: where each word stands",
        unit: Unit::Word,
        golden: &index::GOLDEN,
        make: index::make,
    },
    Workload {
        name: "search",
        about: "regex: compile eight patterns, collect all matches",
        unit: Unit::Byte,
        golden: &search::GOLDEN,
        make: search::make,
    },
    Workload {
        name: "wasm",
        about: "wasmi: load a Markdown renderer, render pages with it",
        unit: Unit::Byte,
        golden: &markdown::GOLDEN,
        make: markdown::make,
    },
];

//! JSON there and back: thousands of small strings, vectors and map nodes that live together and die together.
//!
//! The big document is taken in parts. A heap whose `free` walks a list that all CPUs make longer needs a minute for
//! 200 KiB at a time on four CPUs; parts keep the demonstration's steps short, whatever the heap.

use crate::{
    Product, Sum,
    documents::{CARGO_METADATA, QMP_SCHEMA, TARGET_SPECS},
};
use alloc::{boxed::Box, string::String, vec::Vec};
use serde_json::Value;

/// How many parts the schema is taken in.
const PARTS: usize = 8;

/// The sums of the compact text, per input.
pub(crate) const GOLDEN: [u64; PARTS + 2] = [
    0x04e7_a77a_94c6_10fb,
    0x98f0_1e31_58f1_6b6a,
    0xdf20_a283_c3b6_9d55,
    0xfc2e_a628_6bf7_b25d,
    0x9483_7fa2_c289_8545,
    0xe814_151d_a60b_ae11,
    0x040e_aadb_b1e2_bdac,
    0xb874_8259_2032_af0c,
    0x1957_8482_efcf_1a7b,
    0xed4d_87d8_1a98_f018,
];

/// The lines of an input, each a document: a part of the schema, or a whole file.
pub(crate) fn documents(input: usize) -> impl Iterator<Item = &'static str> {
    let (text, skip, take) = match input {
        0..PARTS => {
            let lines = QMP_SCHEMA.text.lines().count().div_ceil(PARTS);
            (QMP_SCHEMA.text, input * lines, lines)
        }
        PARTS => (CARGO_METADATA.text, 0, 1),
        _ => (TARGET_SPECS.text, 0, 1),
    };
    // A file that is one document is not cut at its line ends.
    let whole = (input >= PARTS).then_some(text);
    let lines = text.lines().skip(skip).take(if whole.is_some() { 0 } else { take });
    lines.chain(whole)
}

/// Parses, writes and parses again; the trees must be equal.
pub(crate) fn make(input: usize) -> Option<Product> {
    let mut sum = Sum::new();
    let mut units = 0;
    let mut keep: Vec<(Value, String, Value)> = Vec::new();
    for document in documents(input) {
        let tree: Value = serde_json::from_str(document).ok()?;
        let text = serde_json::to_string(&tree).ok()?;
        let again: Value = serde_json::from_str(&text).ok()?;
        units += document.len() as u64;
        keep.push((tree, text, again));
    }
    for (tree, text, again) in &keep {
        if again != tree {
            return None;
        }
        sum.bytes(text.as_bytes());
    }
    Some(Product { units, checksum: sum.get(), keep: Box::new(keep) })
}

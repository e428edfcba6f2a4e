//! Regular expressions: compiling builds and drops several automata of many small parts, searching grows a lazy table.

use crate::{
    Product, Sum,
    documents::{CARGO_METADATA, Document, QEMU_DEVICES, QEMU_HELP, RUSTC_ERRORS},
};
use alloc::{boxed::Box, string::String, vec::Vec};
use regex::Regex;

/// The documents.
pub(crate) const INPUTS: [Document; 4] = [QEMU_DEVICES, CARGO_METADATA, QEMU_HELP, RUSTC_ERRORS];

/// The patterns, each looked for in each document.
pub(crate) const PATTERNS: [&str; 8] = [
    r"https?://[A-Za-z0-9./_#-]+",
    r#""([a-z_]+)":"#,
    r"\bE\d{4}\b",
    r"\b(?:[Vv]irtio|[Uu][Ss][Bb]|[Pp][Cc][Ii])[-_A-Za-z0-9]*",
    r"\b[a-z_]+::[A-Za-z_:]+",
    r"(?m)^-[a-z-]+ ",
    r"\b0x[0-9a-fA-F]+\b|\b\d+(?:\.\d+)+\b",
    r"\b(\w+) (?:the|an?) (\w+)\b",
];

/// The sums over all matches, per document.
pub(crate) const GOLDEN: [u64; 4] =
    [0xd0c6_4e38_a538_f706, 0x126b_8715_469b_a6da, 0xbe9f_3919_4634_396c, 0xb9cf_6ee0_1a18_c158];

/// Compiles the patterns and collects all that they match, groups included.
pub(crate) fn make(input: usize) -> Option<Product> {
    let document = INPUTS.get(input)?;
    let mut sum = Sum::new();
    let mut keep: Vec<(Regex, Vec<Vec<String>>)> = Vec::new();
    for pattern in PATTERNS {
        let regex = Regex::new(pattern).ok()?;
        let matches: Vec<Vec<String>> = regex
            .captures_iter(document.text)
            .map(|found| found.iter().flatten().map(|group| String::from(group.as_str())).collect())
            .collect();
        keep.push((regex, matches));
    }
    for (_, matches) in &keep {
        sum.number(matches.len() as u64);
        for group in matches.iter().flatten() {
            sum.bytes(group.as_bytes());
        }
    }
    Some(Product { units: document.text.len() as u64, checksum: sum.get(), keep: Box::new(keep) })
}

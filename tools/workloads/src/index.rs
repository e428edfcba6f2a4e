//! A word index: a hash map that grows by doubling, a B-tree, and a vector per word that grows a little at a time, all
//! at once; then everything is freed in another order than it was made in.

use crate::{
    Product, Sum,
    documents::{CARGO_MAN, Document, LICENCES, QEMU_HELP, RUSTC_ERRORS},
};
use alloc::{boxed::Box, collections::BTreeMap, string::String, vec::Vec};
use hashbrown::HashMap;

/// The documents.
pub(crate) const INPUTS: [Document; 4] = [LICENCES, RUSTC_ERRORS, CARGO_MAN, QEMU_HELP];

/// The sums of the sorted index, per document.
pub(crate) const GOLDEN: [u64; 4] =
    [0x3e8b_7d4a_bda3_a364, 0xde3f_66a7_e927_6792, 0xe277_6cb8_a668_658f, 0xb403_bedb_d1f8_9db7];

/// Indexes a document by lower-cased word and line number, first hashed, then sorted by word.
pub(crate) fn make(input: usize) -> Option<Product> {
    let document = INPUTS.get(input)?;
    let mut words = 0;
    let mut hashed: HashMap<String, Vec<u32>> = HashMap::new();
    for (line, text) in (1..).zip(document.text.lines()) {
        for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
            words += 1;
            hashed.entry(word.to_lowercase()).or_default().push(line);
        }
    }
    let sorted: BTreeMap<String, Vec<u32>> = hashed.iter().map(|(word, lines)| (word.clone(), lines.clone())).collect();
    let mut sum = Sum::new();
    for (word, lines) in &sorted {
        sum.bytes(word.as_bytes());
        for line in lines {
            sum.number(u64::from(*line));
        }
        // The hashed original must still hold what was copied from it.
        if hashed.get(word) != Some(lines) {
            return None;
        }
    }
    Some(Product { units: words, checksum: sum.get(), keep: Box::new((hashed, sorted)) })
}

//! DEFLATE there and back: large tables that come and go with every document, and output that grows by reallocation.
//!
//! The sum is that of the text that came back, not of the compressed bytes: those may change with the crate's version.

use crate::{
    Product, Sum,
    documents::{CARGO_MAN, CARGO_METADATA, Document, LICENCES, QEMU_HELP, RUSTDOC_CELL},
};
use alloc::boxed::Box;
use miniz_oxide::{deflate::compress_to_vec_zlib, inflate::decompress_to_vec_zlib};

/// The documents and the level each is compressed at: quick, usual and thorough take different paths.
pub(crate) const INPUTS: [(Document, u8); 5] =
    [(CARGO_METADATA, 1), (LICENCES, 6), (CARGO_MAN, 6), (QEMU_HELP, 9), (RUSTDOC_CELL, 3)];

/// The sums of the documents themselves.
pub(crate) const GOLDEN: [u64; 5] =
    [0x21c5_f058_46e9_9f94, 0xe079_0184_8ea2_a952, 0x8204_b458_e155_504e, 0x651a_0d69_a973_3d52, 0x2a19_db2e_5582_131d];

/// Compresses, inflates and compares; the result must also be under half of what went in.
pub(crate) fn make(input: usize) -> Option<Product> {
    let (document, level) = INPUTS.get(input)?;
    let plain = document.text.as_bytes();
    let packed = compress_to_vec_zlib(plain, *level);
    let back = decompress_to_vec_zlib(&packed).ok()?;
    if back != plain || packed.len() > plain.len() / 2 {
        return None;
    }
    let mut sum = Sum::new();
    sum.bytes(&back);
    Some(Product { units: plain.len() as u64, checksum: sum.get(), keep: Box::new((packed, back)) })
}

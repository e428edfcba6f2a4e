//! Which block is replaced, by which size.

use crate::workloads::{Sizes, log_uniform};

/// A row: how many blocks are in use, and how long they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub name: &'static str,
    pub live: usize,
    /// The least and the greatest size, in bytes.
    pub sizes: (usize, usize),
}

/// All rows.
pub const ROWS: [Row; 4] = [
    Row { name: "64-1k", live: 1_000, sizes: (64, 64) },
    Row { name: "64-100k", live: 100_000, sizes: (64, 64) },
    Row { name: "random-1k", live: 1_000, sizes: (16, 1024) },
    Row { name: "random-100k", live: 100_000, sizes: (16, 1024) },
];

/// The replacements of a row, the same ones each time.
pub struct Sequence {
    live: usize,
    sizes: Sizes,
    random: fastrand::Rng,
}

impl Sequence {
    const SEED: u64 = 1;

    pub fn new(row: Row) -> Self {
        let (from, to) = row.sizes;
        Self {
            live: row.live,
            sizes: Sizes::new(Self::SEED, |random| log_uniform(random, from, to)),
            random: fastrand::Rng::with_seed(Self::SEED),
        }
    }

    /// The size of the next block.
    #[inline(always)]
    pub fn size(&mut self) -> usize {
        self.sizes.next()
    }

    /// Whose turn it is to be replaced.
    #[inline(always)]
    pub fn index(&mut self) -> usize {
        self.random.usize(..self.live)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_is_the_same_each_time_and_within_its_row() {
        for row in ROWS {
            let mut sequences = [Sequence::new(row), Sequence::new(row)];
            let mut seen = (usize::MAX, 0);
            for _ in 0..10_000 {
                let [(index, size), other] = sequences.each_mut().map(|sequence| (sequence.index(), sequence.size()));
                assert_eq!((index, size), other);
                assert!(index < row.live);
                seen = (seen.0.min(size), seen.1.max(size));
            }
            assert_eq!(seen, row.sizes, "{}", row.name);
        }
    }
}

//! A running sum of a result: eight bytes a step, so that summing costs little beside the work that it checks.
//!
//! Not a cryptographic hash: it stands against lost, swapped and overwritten bytes, and nobody chooses those on
//! purpose.

/// The sum of the bytes so far.
#[derive(Debug, Clone, Copy)]
pub struct Sum(u64);

/// An odd multiplier with its bits well spread (2^64 over the golden ratio).
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl Sum {
    /// The sum of nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self(0)
    }

    /// Adds one number; unlike for bytes, its place counts.
    pub const fn number(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(23) ^ number).wrapping_mul(SPREAD);
    }

    /// Adds a run of bytes and its length, so that `ab`, `c` and `a`, `bc` differ.
    pub fn bytes(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.number(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        self.number(u64::from_le_bytes(last));
        self.number(bytes.len() as u64);
    }

    /// The sum.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl Default for Sum {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::Sum;

    fn of(parts: &[&[u8]]) -> u64 {
        let mut sum = Sum::new();
        for part in parts {
            sum.bytes(part);
        }
        sum.get()
    }

    #[test]
    fn every_byte_and_its_place_count() {
        let text = b"the quick brown fox jumps".to_vec();
        let whole = of(&[&text]);
        for place in 0..text.len() {
            let mut other = text.clone();
            other[place] ^= 1;
            assert_ne!(of(&[&other]), whole, "byte {place}");
        }
        assert_ne!(of(&[b"ab", b"c"]), of(&[b"a", b"bc"]));
        assert_ne!(of(&[b"a"]), of(&[b"a\0"]));
    }
}

//! What a timer interrupt does to the heap: takes a block, fills it, and lets go of one that an *earlier* interrupt
//! filled, after a look whether its pattern still stands.
//!
//! So the handler holds memory across interrupts, as a driver's handler does with its buffers, and a block that the
//! heap handed out twice is noticed by either of its owners. Each block grows once before it is kept, so that
//! allocation, reallocation and release all happen inside an interrupt. A heap may refuse a nested request (it must
//! not wait for what it interrupted); then the handler does without, as a real one would drop a packet, and counts it.

use alloc::vec::Vec;

/// How many blocks a [`Ring`] holds.
const HELD_COUNT: usize = 16;

/// What one CPU's interrupt handler holds.
#[derive(Debug)]
pub struct Ring {
    held: [Held; HELD_COUNT],
    ticks: u64,
    refused: u64,
}

/// One block and what each word of it is.
#[derive(Debug)]
struct Held {
    word: u64,
    block: Vec<u64>,
}

/// A block that no longer held the pattern it was filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overwritten;

impl Ring {
    /// Nothing held yet; allocates nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { held: [const { Held::nothing() }; HELD_COUNT], ticks: 0, refused: 0 }
    }

    /// One interrupt's work on CPU `cpu`.
    ///
    /// # Errors
    /// [`Overwritten`] where a held block lost its pattern.
    pub fn tick(&mut self, cpu: u64) -> Result<(), Overwritten> {
        self.ticks += 1;
        let word = (cpu << 48) ^ self.ticks.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // 1 to 128 words, short ones as often as long ones; then half as long again.
        let len = 1_usize << (word >> 61);
        let place = usize::try_from(self.ticks).unwrap_or(0) % HELD_COUNT;
        let Some(held) = self.held.get_mut(place) else {
            return Ok(());
        };
        let old = core::mem::replace(held, Held::nothing());
        match filled(word, len) {
            Some(block) => *held = Held { word, block },
            None => self.refused += 1,
        }
        old.check()
    }

    /// How many interrupts there were.
    #[must_use]
    pub const fn ticks(&self) -> u64 {
        self.ticks
    }

    /// How many of them got no memory.
    #[must_use]
    pub const fn refused(&self) -> u64 {
        self.refused
    }

    /// Lets go of everything held, checked; the counts stay.
    ///
    /// # Errors
    /// [`Overwritten`] where a held block lost its pattern.
    pub fn release(&mut self) -> Result<(), Overwritten> {
        for held in &mut self.held {
            core::mem::replace(held, Held::nothing()).check()?;
        }
        Ok(())
    }
}

impl Default for Ring {
    fn default() -> Self {
        Self::new()
    }
}

impl Held {
    const fn nothing() -> Self {
        Self { word: 0, block: Vec::new() }
    }

    fn check(&self) -> Result<(), Overwritten> {
        if self.block.iter().all(|word| *word == self.word) { Ok(()) } else { Err(Overwritten) }
    }
}

/// A block of `len` words and half as many more, all `word`, or none where the heap has none.
fn filled(word: u64, len: usize) -> Option<Vec<u64>> {
    let mut block = Vec::new();
    block.try_reserve_exact(len).ok()?;
    block.resize(len, word);
    let more = len.div_ceil(2);
    block.try_reserve_exact(more).ok()?;
    block.resize(len + more, word);
    Some(block)
}

#[cfg(test)]
mod tests {
    use super::{HELD_COUNT, Overwritten, Ring};

    #[test]
    fn a_thousand_ticks_hold_a_bounded_number_of_blocks() {
        let mut ring = Ring::new();
        for _ in 0..1_000 {
            assert_eq!(ring.tick(3), Ok(()));
        }
        assert_eq!((ring.ticks(), ring.refused()), (1_000, 0));
        assert_eq!(ring.held.iter().filter(|held| !held.block.is_empty()).count(), HELD_COUNT);
        assert_eq!(ring.release(), Ok(()));
        assert!(ring.held.iter().all(|held| held.block.is_empty()));
    }

    #[test]
    fn one_changed_word_is_noticed_at_the_next_turn() {
        let mut ring = Ring::new();
        for _ in 0..HELD_COUNT {
            assert_eq!(ring.tick(0), Ok(()));
        }
        ring.held[1].block[0] ^= 1;
        assert_eq!(ring.tick(0), Err(Overwritten));
        ring.held[5].block[0] ^= 1;
        assert_eq!(ring.release(), Err(Overwritten));
    }
}

//! What the times of several passes say.

/// The least, the greatest, and what lies between, of the cycles of many calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    pub p50: u32,
    pub p99: u32,
    pub p99_9: u32,
    pub p99_99: u32,
    pub max: u32,
}

impl Figures {
    /// Reorders `cycles`, which is not empty.
    pub fn of(cycles: &mut [u32]) -> Self {
        Self {
            p50: at(cycles, 5_000),
            p99: at(cycles, 9_900),
            p99_9: at(cycles, 9_990),
            p99_99: at(cycles, 9_999),
            max: at(cycles, 10_000),
        }
    }
}

/// The least figure that at least `of_10_000` ten-thousandths of all do not exceed. Reorders `cycles`, which is not
/// empty.
pub fn at(cycles: &mut [u32], of_10_000: usize) -> u32 {
    let rank = (cycles.len() * of_10_000).div_ceil(10_000).max(1);
    *cycles.select_nth_unstable(rank - 1).1
}

/// Keeps the lesser of each two.
pub fn keep_least(least: &mut [u32], cycles: &[u32]) {
    for (least, cycles) in least.iter_mut().zip(cycles) {
        *least = (*least).min(*cycles);
    }
}

/// The greatest `count`, greatest first, with their places.
pub fn slowest(cycles: &[u32], count: usize) -> Vec<(usize, u32)> {
    let mut places: Vec<_> = cycles.iter().copied().enumerate().collect();
    places.sort_unstable_by_key(|&(place, cycles)| (std::cmp::Reverse(cycles), place));
    places.truncate(count);
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_nearest_rank() {
        let mut cycles: Vec<u32> = (1..=100_000).rev().collect();
        let figures = Figures { p50: 50_000, p99: 99_000, p99_9: 99_900, p99_99: 99_990, max: 100_000 };
        assert_eq!(Figures::of(&mut cycles), figures);
        assert_eq!(at(&mut cycles, 0), 1);
    }

    #[test]
    fn percentiles_of_few_calls_are_one_of_them() {
        let figures = |cycles: &[u32]| Figures::of(&mut cycles.to_vec());
        assert_eq!(figures(&[7]), Figures { p50: 7, p99: 7, p99_9: 7, p99_99: 7, max: 7 });
        assert_eq!(figures(&[9, 1, 5]), Figures { p50: 5, p99: 9, p99_9: 9, p99_99: 9, max: 9 });
    }

    #[test]
    fn one_slow_call_in_ten_thousand_is_the_greatest_only() {
        let mut cycles = vec![50; 9_999];
        cycles.push(9_000);
        let figures = Figures::of(&mut cycles);
        assert_eq!((figures.p99_99, figures.max), (50, 9_000));
        cycles.push(9_000);
        assert_eq!(Figures::of(&mut cycles).p99_99, 9_000);
    }

    #[test]
    fn what_comes_in_one_pass_only_is_taken_out() {
        let mut least = vec![u32::MAX; 4];
        keep_least(&mut least, &[50, 9_000, 700, 50]);
        keep_least(&mut least, &[8_000, 50, 710, 50]);
        assert_eq!(least, [50, 50, 700, 50]);
        assert_eq!(slowest(&least, 2), [(2, 700), (0, 50)]);
    }
}

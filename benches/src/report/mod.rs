//! What the samples say: medians with spread, ratios to the best peer of a row, geometric means.
//!
//! A ratio is the median over the repetitions of *this column's figure over the best peer's in the same repetition*, so
//! that what slows the whole machine for a while cancels out. The best peer of a row is the one with the least median.

mod facts;
mod json;
mod plots;
mod table;

use std::path::Path;
use std::{fs, io};

use crate::args::Metric;
use crate::cell::{Failure, Outcome, Sample};
use crate::peers::{Kind, Missing, Peer};
use crate::run::Row;
use crate::workloads::Group;

pub use facts::Facts;

/// A finished run.
#[derive(Clone)]
pub struct Report {
    pub facts: Facts,
    pub peers: Vec<Peer>,
    pub missing: Vec<Missing>,
    pub rows: Vec<Row>,
    pub metric: Metric,
}

/// A column's figure in a row.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    pub median: f64,
    /// Half of the distance between the quartiles.
    pub spread: f64,
}

/// The median of figures, if there are any.
pub fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    quantile(&figures, 0.5)
}

fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = share * last as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(below + (above - below) * place.fract())
}

/// The geometric mean of figures, if there are any.
pub fn geometric_mean(figures: impl IntoIterator<Item = f64>) -> Option<f64> {
    let logs: Vec<f64> = figures.into_iter().map(f64::ln).collect();
    (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

impl Metric {
    /// The figure of a sample.
    pub fn of(self, sample: &Sample) -> f64 {
        match self {
            Self::Wall => sample.wall_ns,
            Self::Cpu => sample.cpu_ns,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Wall => Self::Cpu,
            Self::Cpu => Self::Wall,
        }
    }

    /// Where a table goes that is not the one asked for.
    fn file(self) -> &'static str {
        match self {
            Self::Wall => "table-wall.txt",
            Self::Cpu => "table-cpu.txt",
        }
    }

    /// In words.
    pub fn title(self) -> &'static str {
        match self {
            Self::Wall => "ns of time over the operations of all threads",
            Self::Cpu => "ns of processor time for an operation",
        }
    }
}

impl Row {
    /// The samples of a column; the reason if it has none.
    pub fn samples(&self, column: usize) -> Option<Result<Vec<Sample>, Failure>> {
        self.outcomes[column].as_ref().map(|outcomes| outcomes.iter().copied().collect::<Outcomes>().0)
    }

    /// A figure of a column.
    pub fn figure(&self, column: usize, of: impl Fn(&Sample) -> f64) -> Option<Figure> {
        let samples = self.samples(column)?.ok()?;
        let mut figures: Vec<f64> = samples.iter().map(of).collect();
        figures.sort_by(f64::total_cmp);
        let spread = (quantile(&figures, 0.75)? - quantile(&figures, 0.25)?) / 2.0;
        Some(Figure { median: quantile(&figures, 0.5)?, spread })
    }

    /// The column with the least median among those that `counts`.
    pub fn best(&self, counts: impl Fn(usize) -> bool, metric: Metric) -> Option<usize> {
        let figures = (0..self.outcomes.len()).filter(|&column| counts(column));
        let figures =
            figures.filter_map(|column| Some((self.figure(column, |sample| metric.of(sample))?.median, column)));
        figures.min_by(|left, right| left.0.total_cmp(&right.0)).map(|(_, column)| column)
    }

    /// The median of a column's ratios to another, repetition by repetition.
    pub fn ratio(&self, column: usize, to: usize, metric: Metric) -> Option<f64> {
        let (left, right) = (self.samples(column)?.ok()?, self.samples(to)?.ok()?);
        median(left.iter().zip(&right).map(|(left, right)| metric.of(left) / metric.of(right)).collect())
    }
}

/// All samples, or the first failure.
struct Outcomes(Result<Vec<Sample>, Failure>);

impl FromIterator<Outcome> for Outcomes {
    fn from_iter<I: IntoIterator<Item = Outcome>>(outcomes: I) -> Self {
        Self(outcomes.into_iter().collect())
    }
}

impl Report {
    /// The best peer of a row.
    pub fn best_peer(&self, row: &Row) -> Option<usize> {
        row.best(|column| self.peers[column].kind == Kind::Peer, self.metric)
    }

    /// A column's ratio to the best peer of a row.
    pub fn ratio(&self, row: &Row, column: usize) -> Option<f64> {
        row.ratio(column, self.best_peer(row)?, self.metric)
    }

    /// The geometric mean of a column's ratios over the rows that `counts`, and how many those are.
    pub fn mean_ratio(&self, column: usize, counts: impl Fn(&Row) -> bool) -> Option<(f64, usize)> {
        let ratios: Vec<f64> =
            self.rows.iter().filter(|row| counts(row)).filter_map(|row| self.ratio(row, column)).collect();
        let count = ratios.len();
        geometric_mean(ratios).map(|mean| (mean, count))
    }

    /// The groups that have rows.
    pub fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = self.rows.iter().map(|row| row.workload.group).collect();
        groups.sort();
        groups.dedup();
        groups
    }

    /// Writes the tables of both metrics, JSON and plots into a folder, which is made.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("table.txt"), self.table())?;
        let other = Self { metric: self.metric.other(), ..self.clone() };
        fs::write(folder.join(other.metric.file()), other.table())?;
        fs::write(folder.join("results.json"), self.json()?)?;
        self.plot(folder).map_err(|error| io::Error::other(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_means_are_those_of_the_textbook() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.25), Some(2.0));
        assert_eq!(geometric_mean([]), None);
        let mean = geometric_mean([0.5, 2.0, 8.0]).unwrap();
        assert!((mean - 2.0).abs() < 1e-12, "{mean}");
    }
}

//! Which cells, in which order: row by row, in each row repetition by repetition, in each repetition column by column,
//! beginning with another column each time. So the cells of a row that are compared lie next to each other in time, and
//! none has a fixed place.

use std::io;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::args::span;
use crate::cell::{self, Outcome};
use crate::peers::{Kind, Peer};
use crate::workloads::Workload;

/// One workload with one number of threads.
#[derive(Clone)]
pub struct Row {
    pub workload: Workload,
    pub threads: usize,
    /// By column, then by repetition; `None` where the column has no such cell.
    pub outcomes: Vec<Option<Vec<Outcome>>>,
}

/// What is to be run.
pub struct Runs {
    pub peers: Vec<Peer>,
    pub workloads: Vec<Workload>,
    pub threads: Vec<usize>,
    pub counted: Duration,
    pub repetitions: u32,
}

impl Runs {
    /// Runs all cells; `on_row` sees each row as it is done.
    pub fn run(&self, mut on_row: impl FnMut(&Row, &ProgressBar) -> io::Result<()>) -> io::Result<()> {
        let cells = self.workloads.len() * self.threads.len() * self.peers.len() * self.repetitions as usize;
        let bar = ProgressBar::new(cells as u64);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} cells, {eta} left: {msg}");
        bar.set_style(style.map_err(io::Error::other)?);
        for workload in &self.workloads {
            for &threads in &self.threads {
                let row = self.row(workload, threads, &bar)?;
                on_row(&row, &bar)?;
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn row(&self, workload: &Workload, threads: usize, bar: &ProgressBar) -> io::Result<Row> {
        let span = span(self.counted);
        let has = |peer: &Peer| !(workload.shares && peer.kind == Kind::Floor);
        let mut outcomes: Vec<_> = self.peers.iter().map(|peer| has(peer).then(Vec::new)).collect();
        for repetition in 0..self.repetitions as usize {
            for column in 0..self.peers.len() {
                let column = (column + repetition * 5) % self.peers.len();
                let peer = &self.peers[column];
                bar.set_message(format!("{} on {threads}, {}", workload.name, peer.name));
                if let Some(outcomes) = &mut outcomes[column] {
                    // A column that failed would fail again, after as long a wait.
                    let failed = outcomes.iter().find(|outcome: &&Outcome| outcome.is_err()).copied();
                    outcomes.push(match failed {
                        Some(failed) => failed,
                        None => cell::run(peer, workload, threads, span)?,
                    });
                }
                bar.inc(1);
            }
        }
        Ok(Row { workload: *workload, threads, outcomes })
    }
}

//! All samples, for other programs.

use std::io;

use serde::Serialize;

use super::{Facts, Report};
use crate::args::Metric;
use crate::cell::{Failure, Sample};
use crate::workloads::Group;

#[derive(Serialize)]
struct Document<'a> {
    facts: &'a Facts,
    metric: Metric,
    allocators: Vec<Named<'a>>,
    missing: Vec<Named<'a>>,
    rows: Vec<RowEntry<'a>>,
}

#[derive(Serialize)]
struct Named<'a> {
    name: &'a str,
    about: &'a str,
}

#[derive(Serialize)]
struct RowEntry<'a> {
    workload: &'a str,
    about: &'a str,
    group: Group,
    threads: usize,
    best_peer: Option<&'a str>,
    cells: Vec<CellEntry<'a>>,
}

#[derive(Serialize)]
struct CellEntry<'a> {
    allocator: &'a str,
    median: Option<f64>,
    spread: Option<f64>,
    ratio_to_best_peer: Option<f64>,
    failure: Option<Failure>,
    samples: Vec<Sample>,
}

impl Report {
    pub(super) fn json(&self) -> io::Result<String> {
        let rows = self.rows.iter().map(|row| RowEntry {
            workload: row.workload.name,
            about: row.workload.about,
            group: row.workload.group,
            threads: row.threads,
            best_peer: self.best_peer(row).map(|column| self.peers[column].name),
            cells: (0..self.peers.len())
                .filter_map(|column| {
                    let samples = row.samples(column)?;
                    let figure = row.figure(column, |sample| self.metric.of(sample));
                    Some(CellEntry {
                        allocator: self.peers[column].name,
                        median: figure.map(|figure| figure.median),
                        spread: figure.map(|figure| figure.spread),
                        ratio_to_best_peer: self.ratio(row, column),
                        failure: samples.as_ref().err().copied(),
                        samples: samples.unwrap_or_default(),
                    })
                })
                .collect(),
        });
        let document = Document {
            facts: &self.facts,
            metric: self.metric,
            allocators: self.peers.iter().map(|peer| Named { name: peer.name, about: peer.about }).collect(),
            missing: self.missing.iter().map(|missing| Named { name: missing.name, about: &missing.why }).collect(),
            rows: rows.collect(),
        };
        serde_json::to_string(&document).map_err(io::Error::other)
    }
}

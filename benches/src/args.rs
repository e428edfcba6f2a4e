//! What the command can be told.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::cell::Span;
use crate::peers::{MAX_THREADS, Missing, Peer};
use crate::workloads::{Group, Workload};

/// smp-heap beside its peers: every workload with every allocator, each cell in a process of its own, columns
/// interleaved.
#[derive(Clone, Debug, Parser)]
#[command(version, name = "bench")]
pub struct Args {
    /// Short cells and few repetitions: figures to look at, not to quote
    #[arg(long)]
    pub quick: bool,

    /// Workloads, by name or by the beginning of names; if none is named, all but `live` and `heap`
    #[arg(long, short, value_delimiter = ',', value_name = "NAMES")]
    pub workloads: Vec<String>,

    /// Allocators, by name; all if none is named
    #[arg(long, short, value_delimiter = ',', value_name = "NAMES")]
    pub allocators: Vec<String>,

    /// Numbers of threads
    #[arg(long, short, value_delimiter = ',', default_values_t = [1, 2, 8], value_parser = threads)]
    pub threads: Vec<usize>,

    /// How long a cell is counted, in seconds; it warms up for half as long [default: 0.2, quick: 0.05]
    #[arg(long, short, value_parser = seconds)]
    pub seconds: Option<Duration>,

    /// How often each cell is run [default: 5, quick: 3]
    #[arg(long, short, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repetitions: Option<u32>,

    /// What the figures are
    #[arg(long, value_enum, default_value_t = Metric::Wall)]
    pub metric: Metric,

    /// Where the table, the JSON and the plots are written
    #[arg(long, short, default_value = "target/bench", value_name = "FOLDER")]
    pub out: PathBuf,

    /// Name the workloads and the allocators, and run nothing
    #[arg(long)]
    pub list: bool,

    /// Run this many rounds of one workload with one allocator and one number of threads in this very process: for
    /// profilers
    #[arg(long, value_name = "ROUNDS")]
    pub rounds: Option<u64>,

    /// Run one cell and print what it measured: for columns that are programs of their own
    #[arg(long, hide = true, conflicts_with = "rounds")]
    pub cell: bool,
}

/// How long cells run.
pub fn span(counted: Duration) -> Span {
    Span { warm_up: counted / 2, counted }
}

/// What the figures of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Time over the operations of all threads: scaling shows, and so does everything else that runs on the machine
    Wall,
    /// Processor time of an operation: what waits without turning does not show
    Cpu,
}

impl Args {
    /// How long a cell is counted.
    pub fn counted(&self) -> Duration {
        self.seconds.unwrap_or(Duration::from_millis(if self.quick { 50 } else { 200 }))
    }

    /// How often each cell is run.
    pub fn repetitions(&self) -> u32 {
        self.repetitions.unwrap_or(if self.quick { 3 } else { 5 })
    }
}

fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if (1..=MAX_THREADS).contains(&count) => Ok(count),
        _ => Err(format!("a number from 1 to {MAX_THREADS} is wanted")),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.001..=600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or("a number from 0.001 to 600 is wanted".into())
}

/// The workloads that are asked for, in the order of the list.
pub fn choose_workloads(all: Vec<Workload>, asked: &[String]) -> Result<Vec<Workload>, String> {
    for name in asked {
        if !all.iter().any(|workload| workload.name.starts_with(name.as_str())) {
            let names: Vec<_> = all.iter().map(|workload| workload.name).collect();
            return Err(format!("there is no workload {name:?}; there are {}", names.join(", ")));
        }
    }
    let wanted = |workload: &Workload| {
        asked.is_empty() && workload.group != Group::Growth
            || asked.iter().any(|name| workload.name == name)
            || asked.iter().any(|name| {
                workload.name.starts_with(name.as_str()) && !all.iter().any(|exact| exact.name == name.as_str())
            })
    };
    Ok(all.iter().copied().filter(wanted).collect())
}

/// The allocators that are asked for, in the order of the list.
pub fn choose_peers(all: Vec<Peer>, missing: &[Missing], asked: &[String]) -> Result<Vec<Peer>, String> {
    for name in asked {
        if let Some(missing) = missing.iter().find(|missing| missing.name == name) {
            return Err(format!("{name} is left out: {}", missing.why));
        }
        if !all.iter().any(|peer| peer.name == name) {
            let names: Vec<_> = all.iter().map(|peer| peer.name).collect();
            return Err(format!("there is no allocator {name:?}; there are {}", names.join(", ")));
        }
    }
    Ok(all.into_iter().filter(|peer| asked.is_empty() || asked.iter().any(|name| peer.name == name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{peers, workloads};

    fn names(asked: &str) -> Result<Vec<&'static str>, String> {
        let asked: Vec<String> = asked.split(',').map(str::to_owned).collect();
        choose_workloads(workloads::all(), &asked).map(|chosen| chosen.iter().map(|workload| workload.name).collect())
    }

    #[test]
    fn a_name_means_one_workload_and_a_prefix_all_with_it() {
        assert_eq!(names("pair-64").unwrap(), ["pair-64"]);
        assert_eq!(names("pair-8,larson").unwrap(), ["pair-8", "larson"]);
        assert_eq!(names("churn").unwrap(), ["churn-1k", "churn-100k"]);
        assert!(names("pear-64").unwrap_err().contains("no workload"));
    }

    #[test]
    fn rows_of_growth_are_run_when_they_are_named() {
        let rows = |asked: &[String]| choose_workloads(workloads::all(), asked).unwrap();
        assert!(rows(&[]).iter().all(|workload| workload.group != Group::Growth));
        assert!(rows(&["live".to_owned()]).iter().all(|workload| workload.group == Group::Growth));
    }

    #[test]
    fn an_unknown_or_missing_allocator_is_a_clear_error() {
        let (all, _) = peers::all();
        let missing = Missing { name: "absent", why: "no compiler".into() };
        let choose = |name: &str| choose_peers(all.clone(), &[missing.clone()], &[name.to_owned()]);
        assert_eq!(choose("pin").unwrap().len(), 1);
        assert!(choose("pine").unwrap_err().contains("no allocator"));
        assert!(choose("absent").unwrap_err().contains("no compiler"));
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for bad in ["--threads=0", "--threads=17", "--seconds=0", "--repetitions=0", "--metric=fast", "--nonsense"] {
            assert!(Args::try_parse_from(["bench", bad]).is_err(), "{bad}");
        }
        assert_eq!(Args::try_parse_from(["bench", "--threads=1,16"]).unwrap().threads, [1, 16]);
    }
}

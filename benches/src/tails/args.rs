//! What the command can be told.

use clap::Parser;

use super::sequence::{ROWS, Row};

/// How long single calls take: cycles of each `alloc` and each `free` at the tail, one thread, each call's figure the
/// least of several passes, each pass in a process of its own.
#[derive(Clone, Debug, Parser)]
#[command(version, name = "tails")]
pub struct Args {
    /// Allocators, by name, as `bench --list` has them
    #[arg(long, short, value_delimiter = ',', value_name = "NAMES",
          default_values_t = ["pin", "hint", "mimalloc", "snmalloc", "talc"].map(str::to_owned))]
    pub allocators: Vec<String>,

    /// Rows, by name: 64-1k, 64-100k, random-1k, random-100k; all if none is named
    #[arg(long, short, value_delimiter = ',', value_name = "NAMES", value_parser = row)]
    pub workloads: Vec<Row>,

    /// How many blocks are replaced in each pass, after as many without the clock
    #[arg(long, short, default_value_t = 10_000_000,
          value_parser = clap::value_parser!(u32).range(10_000..=100_000_000))]
    pub operations: u32,

    /// How many passes each column makes
    #[arg(long, short, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub passes: u32,

    /// Show so many of the slowest calls too: which operation, which size
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    pub slowest: usize,
}

impl Args {
    pub fn rows(&self) -> Vec<Row> {
        if self.workloads.is_empty() { ROWS.to_vec() } else { self.workloads.clone() }
    }
}

fn row(name: &str) -> Result<Row, String> {
    let names = ROWS.map(|row| row.name).join(", ");
    ROWS.into_iter().find(|row| row.name == name).ok_or_else(|| format!("the rows are {names}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in ["--passes=0", "--operations=9", "--operations=many", "-w=64-2k", "--slowest=-1", "--nonsense"] {
            assert!(Args::try_parse_from(["tails", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn all_rows_are_run_unless_some_are_named() {
        let rows = |args: &[&str]| Args::try_parse_from(args).unwrap().rows();
        assert_eq!(rows(&["tails"]), ROWS);
        assert_eq!(rows(&["tails", "-w", "64-1k,random-1k"]), [ROWS[0], ROWS[2]]);
    }
}

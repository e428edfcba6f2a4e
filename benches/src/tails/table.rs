//! The figures as text.

use super::figures::{Figures, slowest};
use super::pass::{Pass, Passes};
use super::sequence::{Row, Sequence};
use crate::cell::Failure;
use crate::peers::{Kind, Peer};

/// The calls, in the order of the passes' arrays.
pub const CALLS: [&str; 2] = ["alloc", "free"];

/// One allocator in one row.
pub type Column = (Peer, Result<([Figures; 2], Pass), Failure>);

/// The heading of all lines.
pub fn heading() -> String {
    format!(
        "{:11} {:5} {:12} {:>7} {:>7} {:>7} {:>7} {:>9} {:>8} {:>9} {:>7}",
        "row", "call", "allocator", "p50", "p99", "p99.9", "p99.99", "max", "to best", "one pass", "faults"
    )
}

/// The lines of a row: for each call, each allocator.
pub fn lines(row: Row, columns: &[Column]) -> String {
    let mut lines = String::new();
    for (call, name) in CALLS.iter().enumerate() {
        let best = best_peer(columns, call);
        for (peer, outcome) in columns {
            lines += &format!("{:11} {name:5} {:12} ", row.name, peer.name);
            lines += &match outcome {
                Err(failure) => failure.word().to_owned(),
                Ok((figures, pass)) => line(figures[call], pass, call, best),
            };
            lines.push('\n');
        }
    }
    lines
}

fn line(figures: Figures, pass: &Pass, call: usize, best: Option<u32>) -> String {
    let Figures { p50, p99, p99_9, p99_99, max } = figures;
    let ratio = best.map_or("-".into(), |best| format!("{:.2}", f64::from(p99_99) / f64::from(best)));
    format!("{p50:>7} {p99:>7} {p99_9:>7} {p99_99:>7} {max:>9} {ratio:>8} {:>9} {:>7}", pass.p99_99[call], pass.faults)
}

/// The least p99.99 of the peers.
fn best_peer(columns: &[Column], call: usize) -> Option<u32> {
    let peers = columns.iter().filter(|(peer, _)| peer.kind == Kind::Peer);
    peers.filter_map(|(_, outcome)| outcome.as_ref().ok()).map(|(figures, _)| figures[call].p99_99.max(1)).min()
}

/// The slowest calls of a column: which operation, which size.
pub fn slowest_calls(row: Row, passes: &Passes, count: usize) -> String {
    let sizes = sizes(row, passes.cycles()[0].len());
    let mut lines = String::new();
    for ((call, cycles), sizes) in CALLS.iter().zip(passes.cycles()).zip(sizes) {
        for (operation, cycles) in slowest(cycles, count) {
            lines += &format!("  {call:5} of {:4} bytes, operation {operation}: {cycles} cycles\n", sizes[operation]);
        }
    }
    lines
}

/// The sizes of all blocks that are taken, and of those that are freed for them.
fn sizes(row: Row, operations: usize) -> [Vec<usize>; 2] {
    let mut sequence = Sequence::new(row);
    let mut blocks: Vec<_> = (0..row.live).map(|_| sequence.size()).collect();
    let mut replace = |_| {
        let block = &mut blocks[sequence.index()];
        let new = sequence.size();
        (new, std::mem::replace(block, new))
    };
    (0..operations).for_each(|operation| {
        replace(operation);
    });
    let (taken, freed) = (0..operations).map(replace).unzip();
    [taken, freed]
}

#[cfg(test)]
mod tests {
    use super::super::sequence::ROWS;
    use super::*;
    use crate::peers;

    fn column(name: &str, p99_99: u32) -> Column {
        let (all, _) = peers::all();
        let peer = all.into_iter().find(|peer| peer.name == name).unwrap();
        let figures = Figures { p50: 1, p99: 2, p99_9: 3, p99_99, max: 1_000_000 };
        (peer, Ok(([figures; 2], Pass { p99_99: [7_777, 8_888], faults: 3 })))
    }

    #[test]
    fn the_ratio_is_to_the_best_peer_not_to_a_failed_one() {
        let mut columns = vec![column("pin", 300), column("talc", 200), column("rlsf", 400), column("system", 100)];
        columns[3].1 = Err(Failure::Crashed);
        let text = lines(ROWS[0], &columns);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 8);
        let cells = |line: usize| lines[line].split_whitespace().collect::<Vec<_>>();
        assert_eq!(cells(0), ["64-1k", "alloc", "pin", "1", "2", "3", "300", "1000000", "1.50", "7777", "3"]);
        assert_eq!(cells(6)[6..9], ["400", "1000000", "2.00"]);
        assert_eq!(cells(7)[2..], ["system", "crash"]);
    }

    #[test]
    fn a_freed_size_is_the_one_that_was_taken_there() {
        let [taken, freed] = sizes(ROWS[2], 20_000);
        assert!(taken.iter().chain(&freed).all(|size| (16..=1024).contains(size)));
        let sum = |sizes: &[usize]| sizes.iter().sum::<usize>();
        assert!(sum(&taken).abs_diff(sum(&freed)) < 1_000 * 1024, "they differ by what is in use at most");
    }
}

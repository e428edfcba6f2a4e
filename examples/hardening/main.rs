//! What each level of hardening catches, and what it costs.
//!
//! ```sh
//! cargo run --example hardening -- table     # every bug against every level; writes the table into docs/hardening.md
//! cargo run --example hardening -- price     # every workload at every level: instructions (valgrind), time; the same
//! ```
//! A level is a feature, so both build this example again for each one, and run those. What they then call: `corpus`,
//! `clean OPERATIONS` (a program without a bug: any report ends it) and `work NAME OPERATIONS GUARDED` (one block
//! guarded in so many).

#![expect(
    clippy::std_instead_of_core,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "this runs on a host, and a failed check ends it"
)]

mod corpus;
mod work;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use corpus::{BUGS, observe};

/// Each level: its name in the tables, and its feature.
const LEVELS: [(&str, &str); 4] =
    [("off", ""), ("hardened", "hardened"), ("debug-heap", "debug-heap"), ("guard-pages", "guard-pages")];

/// What has a price: name, level, one block guarded in how many, and the column that it is compared with.
const PRICED: [(&str, usize, &str, usize); 5] = [
    ("off", 0, "0", 0),
    ("hardened", 1, "0", 0),
    ("debug-heap", 2, "0", 0),
    ("guard-pages, none", 3, "0", 1),
    ("guard-pages, 1 in 1,000", 3, "1000", 1),
];

const ROUNDS: usize = 11;
const DOCS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/hardening.md");

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["table"] => table(),
        ["price"] => price(),
        ["corpus"] => {
            BUGS.iter().for_each(|bug| println!("{}\t{}", bug.name, observe(bug).text()));
            Ok(())
        }
        ["clean", operations] => number(operations).and_then(work::clean),
        ["work", name, operations, rate] => {
            number(operations).and_then(|count| work::run(name, count, number(rate)? as u32))
        }
        _ => Err("expected: table | price | corpus | clean OPERATIONS | work NAME OPERATIONS GUARDED".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("not a number: {text}"))
}

/// This example, built for a level.
fn build((name, feature): (&str, &str)) -> Result<PathBuf, String> {
    // One folder, so that what the levels share is built once.
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/hardening");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "smp-heap",
            "--example",
            "hardening",
            "--features",
            feature,
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .arg("--target-dir")
        .arg(&target)
        .status();
    match status {
        Ok(status) if status.success() => {
            let program = target.join(format!("level-{name}"));
            let copied = fs::copy(target.join("release/examples/hardening"), &program);
            copied.map(|_| program).map_err(|error| format!("level {name}: {error}"))
        }
        Ok(_) => Err(format!("the example does not build for level {name}")),
        Err(error) => Err(format!("cargo cannot be started: {error}")),
    }
}

fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?} cannot be started: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

/// Puts text between two marks of the document.
fn write_docs(mark: &str, text: &str) -> Result<(), String> {
    let old = fs::read_to_string(DOCS).map_err(|error| format!("{DOCS}: {error}"))?;
    let (begin, end) = (format!("<!-- {mark} -->\n"), format!("<!-- end of {mark} -->"));
    let parts = old.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let Some((before, after)) = parts else { return Err(format!("{DOCS} has no place for {mark}")) };
    println!("{text}");
    fs::write(DOCS, format!("{before}{begin}{text}{end}{after}")).map_err(|error| format!("{DOCS}: {error}"))
}

fn header<'a>(first: &str, names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.map(|name| format!(" {name} |")).collect();
    format!("| {first} |{}\n|---|{}\n", names.concat(), "---|".repeat(names.len()))
}

/// Runs the corpus at each level.
fn table() -> Result<(), String> {
    let mut columns = Vec::new();
    for level in LEVELS {
        let text = output(Command::new(build(level)?).arg("corpus"))?;
        let seen: Vec<String> = text.lines().filter_map(|line| Some(line.split_once('\t')?.1.to_owned())).collect();
        if seen.len() != BUGS.len() {
            return Err(format!("{} results for {} bugs:\n{text}", seen.len(), BUGS.len()));
        }
        columns.push(seen);
    }
    let mut text = header("bug", LEVELS.into_iter().map(|(name, _)| name));
    for (row, bug) in BUGS.iter().enumerate() {
        let cells: String = columns.iter().map(|column| format!(" {} |", column[row])).collect();
        text += &format!("| {} |{cells}\n", bug.name);
    }
    let caught = |column: &Vec<String>| column.iter().filter(|cell| corpus::is_caught(cell)).count();
    let sums: String = columns.iter().map(|column| format!(" **{}** |", caught(column))).collect();
    text += &format!("| **reported, of {}** |{sums}\n", BUGS.len());
    write_docs("bugs", &text)
}

/// Runs each workload at each level, levels in turn.
fn price() -> Result<(), String> {
    let programs = LEVELS.map(build).into_iter().collect::<Result<Vec<_>, _>>()?;
    let names = || PRICED.into_iter().map(|(name, ..)| name);
    let mut text = header("instructions an operation", names());
    for name in work::NAMES {
        let count = |(_, level, rate, _): (&str, usize, &str, usize)| {
            instructions(&programs[level], name, 300_000 / slowness(level), rate)
        };
        text += &row(name, &PRICED.into_iter().map(count).collect::<Result<Vec<f64>, _>>()?);
    }
    text += &format!("\n{}", header("ns an operation", names()));
    for name in work::NAMES {
        let mut times = PRICED.map(|_| Vec::new());
        for _ in 0..ROUNDS {
            for ((_, level, rate, _), times) in PRICED.into_iter().zip(&mut times) {
                let text = output(Command::new(&programs[level]).args([
                    "work",
                    name,
                    &(4_000_000 / slowness(level)).to_string(),
                    rate,
                ]))?;
                times.push(text.trim().parse::<f64>().map_err(|_| format!("no time: {text}"))?);
            }
        }
        text += &row(name, &times.map(median));
    }
    write_docs("price", &text)
}

/// By how much fewer operations do at a level: where each takes so much longer.
fn slowness(level: usize) -> usize {
    if LEVELS[level].1 == "debug-heap" { 10 } else { 1 }
}

fn row(name: &str, values: &[f64]) -> String {
    let cell = |(value, (_, level, _, base)): (&f64, (&str, usize, &str, usize))| match level {
        0 => format!(" {value:.1} |"),
        _ => format!(" {value:.1} ({:+.1} %) |", (value / values[base] - 1.0) * 100.0),
    };
    format!("| {name} |{}\n", values.iter().zip(PRICED).map(cell).collect::<String>())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Instructions of one operation: what twice as many take more.
fn instructions(program: &Path, name: &str, operations: usize, rate: &str) -> Result<f64, String> {
    let count = |operations: usize| {
        let mut command = Command::new("valgrind");
        command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(program);
        let text = output(command.args(["work", name, &operations.to_string(), rate]))?;
        let sum = text.lines().find_map(|line| line.split_once("Collected :")).map(|(_, sum)| sum.trim().to_owned());
        sum.and_then(|sum| sum.parse::<f64>().ok()).ok_or(format!("no count in: {text}"))
    };
    Ok((count(2 * operations)? - count(operations)?) / operations as f64)
}

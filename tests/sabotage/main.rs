//! Realistic bugs, one at a time, and the test that notices each: `cargo test --test sabotage`.
//!
//! The table's bugs are written into a copy of the tree under `target`, all of them at once, each behind a condition
//! that is true only if the environment names its number. So one build of each kind of test serves all. First every
//! test of the table passes without a bug; then each bug is switched on alone, and its test has to fail, or has to be
//! ended by its time limit. `-- --write` writes the table into `docs/verification.md`; what was not tried is in it as
//! it was noticed last.
//!
//! `cargo test --test sabotage -- fits` only checks that every bug's place is still there; the gate does that.

mod table;
mod tree;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::{env, fs};

use libtest_mimic::{Arguments, Failed, Trial};
use table::{BUGS, Bug, Suite};

/// The environment variable that names the bug. Number 0 is none.
const VARIABLE: &str = "SMP_HEAP_SABOTAGE";

/// What a test that runs too long is ended after, in seconds of processor time: see `tests/watchdog`.
const SECONDS: &str = "60";

/// How a bug was noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Noticed {
    /// The test failed.
    Failed,
    /// The program died: by a signal, most often.
    Died,
    /// The test did not end within its time.
    TimeOut,
}

impl Noticed {
    fn word(self) -> &'static str {
        match self {
            Self::Failed => "fails",
            Self::Died => "dies",
            Self::TimeOut => "runs out of time",
        }
    }
}

/// How the bugs were noticed, by their names; kept in a file, so that some can be tried again.
type Outcomes = Arc<Mutex<BTreeMap<String, String>>>;

fn outcomes_file() -> PathBuf {
    tree::target().join("noticed")
}

/// Those of earlier runs.
fn read_outcomes() -> BTreeMap<String, String> {
    let text = fs::read_to_string(outcomes_file()).unwrap_or_default();
    text.lines().filter_map(|line| line.split_once('\t')).map(|(name, how)| (name.to_owned(), how.to_owned())).collect()
}

/// Notes how a bug was noticed, or that it was not.
fn note(outcomes: &Outcomes, name: &str, noticed: Option<Noticed>) -> std::io::Result<()> {
    let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
    match noticed {
        Some(noticed) => outcomes.insert(name.to_owned(), noticed.word().to_owned()),
        None => outcomes.remove(name),
    };
    let lines: String = outcomes.iter().map(|(name, how)| format!("{name}\t{how}\n")).collect();
    fs::write(outcomes_file(), lines)
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Cargo's arguments for a kind of tests.
fn arguments(suite: Suite) -> &'static [&'static str] {
    match suite {
        Suite::Lib => &["--package", "smp-heap", "--lib", "--features", "paging,trace"],
        Suite::Host => &["--package", "smp-heap", "--test", "host", "--features", "paging,trace"],
        Suite::Level2Host => &["--package", "smp-heap", "--test", "host", "--features", "debug-heap"],
        Suite::Level3Host => &["--package", "smp-heap", "--test", "host", "--features", "guard-pages"],
        Suite::Driver => &["--package", "smp-heap-qemu", "--lib"],
        Suite::Qemu => &["--package", "smp-heap-qemu", "--test", "qemu"],
        Suite::View => &["--package", "smp-heap-view", "--lib"],
        Suite::Traces => &["--package", "smp-heap-view", "--test", "traces"],
    }
}

/// Cargo in the copy of the tree, with a bug switched on. Whether it succeeded, and what it said.
fn cargo(suite: Suite, bug: usize, rest: &[&str]) -> Result<(bool, String), Failed> {
    let output = Command::new(env!("CARGO"))
        .args(["test", "--quiet"])
        .args(arguments(suite))
        // Compiling takes longer than finding.
        .args(["--config", "profile.dev.debug=0", "--config", "profile.dev.package.smp-heap.opt-level=1"])
        .args(["--config", "profile.dev.lto='off'"])
        .arg("--target-dir")
        .arg(tree::target().join("build"))
        .args(rest)
        .current_dir(tree::target().join("tree"))
        .env(VARIABLE, bug.to_string())
        .env("SMP_HEAP_TEST_SECONDS", SECONDS)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.success(), text))
}

/// Runs one test with a bug switched on.
fn run(suite: Suite, bug: usize, test: &str) -> Result<(bool, String), Failed> {
    cargo(suite, bug, &["--", "--exact", test])
}

/// Makes the copy, and builds one kind of tests, each once.
fn prepared(suite: Suite) -> Result<(), Failed> {
    static DONE: Mutex<BTreeMap<Option<Suite>, Result<(), String>>> = Mutex::new(BTreeMap::new());
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    done.entry(None).or_insert_with(tree::make).clone()?;
    let build = || match cargo(suite, 0, &["--no-run"]) {
        Ok((true, _)) => Ok(()),
        Ok((false, said)) => Err(format!("the sabotaged tree does not compile:\n{said}")),
        Err(failed) => Err(failed.message().unwrap_or("cargo does not run").to_owned()),
    };
    Ok(done.entry(Some(suite)).or_insert_with(build).clone()?)
}

/// Without a bug the test passes, or else noticing means nothing.
fn passes_without(bug: &Bug) -> Result<(), Failed> {
    static DONE: Mutex<BTreeMap<(Suite, &str), bool>> = Mutex::new(BTreeMap::new());
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(passed) = done.get(&(bug.suite, bug.test)) {
        return if *passed { Ok(()) } else { Err(format!("{} fails without a bug", bug.test).into()) };
    }
    let (passed, said) = run(bug.suite, 0, bug.test)?;
    let passed = passed && said.contains("1 passed");
    done.insert((bug.suite, bug.test), passed);
    if passed { Ok(()) } else { Err(format!("{} does not pass without a bug:\n{said}", bug.test).into()) }
}

/// Switches a bug on and sees it noticed.
fn is_noticed(number: usize, bug: &Bug, outcomes: &Outcomes) -> Result<(), Failed> {
    prepared(bug.suite)?;
    let noticed = passes_without(bug).and_then(|()| try_one(number, bug));
    note(outcomes, bug.name, noticed.as_ref().ok().copied())?;
    noticed.map(drop)
}

fn try_one(number: usize, bug: &Bug) -> Result<Noticed, Failed> {
    let (passed, said) = run(bug.suite, number, bug.test)?;
    if passed {
        return Err(format!("{} did not notice:\n{said}", bug.test).into());
    }
    let noticed = if said.contains("one of these hangs") {
        Noticed::TimeOut
    } else if said.contains("signal: ") {
        Noticed::Died
    } else if said.contains("1 failed") {
        Noticed::Failed
    } else {
        return Err(format!("{} neither passed nor failed:\n{said}", bug.test).into());
    };
    let why = said.lines().skip_while(|line| !line.contains("panicked at ")).nth(1).unwrap_or_default();
    println!("{}: {} {}: {why}", bug.name, bug.test, noticed.word());
    Ok(noticed)
}

const BEGIN: &str = "<!-- made by `cargo test --test sabotage -- --write`: -->\n";
const END: &str = "<!-- end -->\n";

/// The table of the document.
fn document(outcomes: &BTreeMap<String, String>) -> String {
    let (gaps, tried): (Vec<&Bug>, Vec<&Bug>) = BUGS.iter().partition(|bug| bug.gap.is_some());
    let noticed = tried.iter().filter(|bug| outcomes.contains_key(bug.name)).count();
    let open = tried.len() - noticed;
    let mut text = format!(
        "Of {} bugs {noticed} were seen to be noticed by the test beside them, {open} are still to be tried, {} are gaps.\n\n\
         | layer | bug | test | how |\n|---|---|---|---|\n",
        BUGS.len(),
        gaps.len()
    );
    for bug in &tried {
        let how = outcomes.get(bug.name).map_or("not seen yet", String::as_str);
        text += &format!("| {} | {} | `{}` | {how} |\n", bug.layer(), bug.name, bug.test);
    }
    for bug in &gaps {
        text += &format!("| {} | {} | nothing | {} |\n", bug.layer(), bug.name, bug.gap.unwrap_or_default());
    }
    text
}

/// Writes the table into the document.
fn write(outcomes: &BTreeMap<String, String>) -> std::io::Result<()> {
    let path = root().join("docs/verification.md");
    let text = fs::read_to_string(&path)?;
    let Some((before, rest)) = text.split_once(BEGIN) else {
        return Err(std::io::Error::other("docs/verification.md has no place for the table"));
    };
    let after = rest.split_once(END).map_or("", |(_, after)| after);
    fs::write(path, [before, BEGIN, &document(outcomes), END, after].concat())
}

fn main() -> ExitCode {
    let (flags, words): (Vec<String>, Vec<String>) = env::args().partition(|word| word == "--write");
    let mut arguments = Arguments::from_iter(words);
    // Two bugs at a time: more would only wait for each other.
    arguments.test_threads.get_or_insert(2);
    let outcomes: Outcomes = Arc::new(Mutex::new(read_outcomes()));
    let mut trials = vec![Trial::test("fits", || tree::fits().map_err(Failed::from))];
    for (number, bug) in (1..).zip(BUGS).filter(|(_, bug)| bug.gap.is_none()) {
        let outcomes = outcomes.clone();
        trials.push(Trial::test(format!("{}/{}", bug.layer(), bug.test_name()), move || {
            is_noticed(number, bug, &outcomes)
        }));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !flags.is_empty() {
        let outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = write(&outcomes) {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    }
    conclusion.exit_code()
}

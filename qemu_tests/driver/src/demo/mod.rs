//! What `cargo demo` does, in order: boot twice, show how it goes on, print the tables, draw the heap.

mod progress;
mod protocol;
mod report;

use std::{fmt, fs, io, io::IsTerminal, path::PathBuf, time::Duration};

use clap::Parser;
use smp_heap_qemu::{Arch, Boot, Failure, Profile};
use smp_heap_view::{Dump, map_text, overview, pack, page, parse, parse_trace};

use progress::Progress;
use protocol::{Event, Recording};

/// Runs real work (JSON, DEFLATE, a word index, regular expressions, WebAssembly) in the test kernel, on 1, 2, 4, ...
/// CPUs at once while timer interrupts allocate too, with smp-heap and with a heap behind one lock; then compares the
/// two and draws smp-heap's memory.
#[derive(Parser, Debug, Clone)]
#[command(bin_name = "cargo demo", max_term_width = 100)]
pub(crate) struct Options {
    /// The most CPUs that work at once.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=8))]
    cpus: u32,
    /// How long to measure in all, in seconds: shared out to both heaps, every CPU count and every kind of work. Each
    /// CPU finishes the document it has begun, so a very short run takes longer than asked for.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Where the page with the pictures (heap.html) and the guests' own words (*.log) go.
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    out: PathBuf,
    /// The processor architecture of the emulated machine.
    #[arg(long, value_enum, default_value_t = Arch::X86_64)]
    arch: Arch,
    /// Instead of all that: records what the heap is asked for by one kind of work on two CPUs (json, deflate, index,
    /// search, wasm), into WORK.events.gz, for `cargo view --replay`.
    #[arg(long, value_name = "WORK")]
    record: Option<String>,
}

/// The two boots: the kernel's name, and what its heap is called in the tables.
const HEAPS: [(&str, &str); 2] = [("demo", "smp-heap"), ("demo_locked", "LockedHeap")];

/// The kinds of work that the guest knows; it says so itself, this only shares out the time before it has spoken.
const WORKLOAD_COUNT: u32 = 5;

/// RAM of the guest: the word index of eight CPUs at once fits many times over.
const MEMORY_MIB: u32 = 512;

/// Why there is no demonstration to see.
#[derive(Debug)]
pub(crate) enum Error {
    /// The guest did not build, boot or pass.
    Guest { kernel: &'static str, failure: Failure, last: Vec<String> },
    /// The guest passed, but did not say what it should have.
    Silent { kernel: &'static str, what: String },
    /// A file could not be written.
    File { path: PathBuf, error: io::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest { kernel, failure, last } => {
                write!(f, "kernel `{kernel}`: {failure}")?;
                if !last.is_empty() {
                    write!(f, "\nThe guest's last lines:")?;
                }
                last.iter().try_for_each(|line| write!(f, "\n  | {line}"))
            }
            Self::Silent { kernel, what } => write!(f, "kernel `{kernel}` ended well, but {what}"),
            Self::File { path, error } => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for Error {}

/// The numbers of CPUs that work at once, one phase each: powers of two, then all of them.
fn phases(cpus: u32) -> Vec<u32> {
    let mut phases: Vec<u32> = (0..).map(|power| 1 << power).take_while(|count| *count < cpus).collect();
    phases.push(cpus);
    phases
}

/// Does it all.
pub(crate) fn run(options: &Options) -> Result<(), Error> {
    let file_error = |path: &PathBuf| {
        let path = path.clone();
        move |error| Error::File { path, error }
    };
    fs::create_dir_all(&options.out).map_err(file_error(&options.out))?;
    if let Some(work) = &options.record {
        let path = options.out.join(format!("{work}.events.gz"));
        let lines = record_events(work, options.arch)?;
        return fs::write(&path, pack(&lines)).map_err(file_error(&path)).map(|()| println!("{}", path.display()));
    }
    let phases = phases(options.cpus);
    let slots = u32::try_from(HEAPS.len() * phases.len()).unwrap_or(1) * WORKLOAD_COUNT;
    let slot = Duration::from_secs(options.seconds.into()) / slots;

    let load = report::load();
    let mut recordings = Vec::new();
    for (kernel, heap) in HEAPS {
        let (recording, log) = record(kernel, heap, options, &phases, slot);
        let path = options.out.join(format!("{kernel}.log"));
        fs::write(&path, &log).map_err(file_error(&path))?;
        recordings.push((recording?, log));
    }
    let [(ours, log), (locked, _)] = recordings.as_slice() else {
        return Ok(());
    };
    let dumps = dumps(log)?;

    println!("{}", report::comparison(ours, locked, &phases));
    if let Some(remark) = report::remark(load) {
        println!("{remark}\n");
    }
    println!("{}", report::statistics(ours));
    let width = report::terminal_width();
    println!("{}", overview(&dumps, width));
    println!("{}", map_text(&dumps, width, io::stdout().is_terminal()).unwrap_or_default());
    let path = options.out.join("heap.html");
    fs::write(&path, page(&dumps, &report::caption(ours))).map_err(file_error(&path))?;
    println!("The heap as pictures, for a browser: {}", path.display());
    Ok(())
}

/// What the heap said of itself: at the least the dump with the map.
fn dumps(log: &str) -> Result<Vec<Dump>, Error> {
    let silent = |what| Error::Silent { kernel: HEAPS[0].0, what };
    let dumps = parse(log).map_err(|error| silent(format!("its dumps are not understood: {error}")))?;
    if dumps.iter().all(|dump| dump.runs.is_empty()) {
        return Err(silent("it named no page run of its heap".to_owned()));
    }
    Ok(dumps)
}

/// The heap's events while two CPUs do one kind of work once.
fn record_events(work: &str, arch: Arch) -> Result<String, Error> {
    let (kernel, _) = HEAPS[0];
    let mut lines = String::new();
    let mut last = Vec::new();
    let outcome = Boot::new(kernel)
        .profile(Profile::Traced)
        .machine(arch.machine())
        .cpus(2)
        .memory_mib(MEMORY_MIB)
        .arg("phases", 2)
        .arg("slot_us", 0)
        .arg("record", work)
        .time_limit(Duration::from_secs(300))
        .run(|line| {
            if line.contains("smp-heap v1 events") {
                lines.push_str(line);
                lines.push('\n');
            } else {
                last.push(line.to_owned());
            }
        });
    outcome.map_err(|failure| Error::Guest { kernel, failure, last: last.split_off(last.len().saturating_sub(12)) })?;
    match parse_trace(&lines) {
        Ok(trace) if !trace.steps.is_empty() => Ok(lines),
        Ok(_) => Err(Error::Silent { kernel, what: format!("no kind of work is called `{work}`") }),
        Err(error) => Err(Error::Silent { kernel, what: format!("of the work `{work}`: {error}") }),
    }
}

/// Boots one kernel and notes what it says; the log is all of that, also when the boot fails.
fn record(
    kernel: &'static str,
    heap: &'static str,
    options: &Options,
    phases: &[u32],
    slot: Duration,
) -> (Result<Recording, Error>, String) {
    let mut recording = Recording::new(heap);
    let mut log = String::new();
    let mut progress = Progress::new(heap, phases, slot);
    let measured = slot * WORKLOAD_COUNT * u32::try_from(phases.len()).unwrap_or(1);
    let mut misread = None;
    let list: Vec<String> = phases.iter().map(u32::to_string).collect();
    let outcome = Boot::new(kernel)
        .profile(Profile::Fast)
        .machine(options.arch.machine())
        // Never fewer than two: see the head of `bin/demo.rs`.
        .cpus(options.cpus.max(2))
        .memory_mib(MEMORY_MIB)
        .arg("phases", list.join(","))
        .arg("slot_us", slot.as_micros())
        .time_limit(measured * 3 + Duration::from_secs(120))
        .run(|line| {
            log.push_str(line);
            log.push('\n');
            match Event::parse(line) {
                Ok(Some(event)) => {
                    progress.show(&event);
                    recording.add(event);
                }
                Ok(None) => {}
                Err(error) => misread = misread.take().or(Some(format!("`{line}` is not understood: {error}"))),
            }
        });
    progress.finish();
    let result = match outcome {
        Err(failure) => {
            let speaks = matches!(failure, Failure::Reported(_) | Failure::TimeOut(_) | Failure::Reset);
            let lines: Vec<&str> = log.lines().collect();
            let last = lines.iter().rev().take(if speaks { 12 } else { 0 }).rev();
            Err(Error::Guest { kernel, failure, last: last.map(|line| (*line).to_owned()).collect() })
        }
        Ok(_) => match misread.or_else(|| recording.gap(phases)) {
            Some(what) => Err(Error::Silent { kernel, what }),
            None => Ok(recording),
        },
    };
    (result, log)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, error::ErrorKind};

    #[test]
    fn phases_double_and_end_with_all_cpus() {
        assert_eq!(phases(1), [1]);
        assert_eq!(phases(3), [1, 2, 3]);
        assert_eq!(phases(4), [1, 2, 4]);
        assert_eq!(phases(8), [1, 2, 4, 8]);
    }

    #[test]
    fn wrong_arguments_are_refused_by_name() {
        let kind = |args: &[&str]| {
            let args = ["demo"].iter().chain(args);
            Options::try_parse_from(args).map_err(|error| (error.kind(), error.exit_code()))
        };
        assert_eq!(kind(&["--cpu", "2"]).err(), Some((ErrorKind::UnknownArgument, 2)));
        assert_eq!(kind(&["--cpus", "9"]).err(), Some((ErrorKind::ValueValidation, 2)));
        assert_eq!(kind(&["--cpus", "0"]).err(), Some((ErrorKind::ValueValidation, 2)));
        assert_eq!(kind(&["--help"]).err(), Some((ErrorKind::DisplayHelp, 0)));
        assert_eq!(kind(&[]).map(|options| (options.cpus, options.seconds)).ok(), Some((4, 60)));
        Options::command().debug_assert();
    }
}

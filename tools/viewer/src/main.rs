//! `cargo view LOG`: draws the heap that a kernel's log tells of.

use std::{
    fs,
    io::{self, IsTerminal, Read},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use clap::Parser;
use console::Term;
use smp_heap::{Heap, Hint, RegionProvider};
use smp_heap_view::{PlayedCpu, Trace, bytes, map_text, overview, page, parse, parse_trace, replay, unpack};

/// Draws the heap of a kernel: a map of its pages, its classes and CPUs, and how they changed, from what it printed
/// with `heap.dump(time)`. The lines are found anywhere in a log, whatever else is in it.
#[derive(Parser, Debug)]
#[command(name = "heap-view", bin_name = "cargo view", max_term_width = 100)]
struct Options {
    /// The log: a captured serial line, say; `-` for standard input.
    log: PathBuf,
    /// Write a page for a browser there: one file, which needs no other.
    #[arg(long, short, value_name = "FILE.html")]
    out: Option<PathBuf>,
    /// What stands at the head of the page; the log's name if nothing else.
    #[arg(long)]
    caption: Option<String>,
    /// Replay the recorded events instead, that often; the log may be packed with gzip.
    #[arg(long, value_name = "ROUNDS", conflicts_with_all = ["out", "caption"])]
    replay: Option<usize>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Replays a trace once with every check, then so many times for the clock.
fn benchmark(trace: &Trace, rounds: usize) -> Result<(), String> {
    const MEMORY: usize = 1 << 30;
    let new = || {
        let heap: Heap<RegionProvider<1>, Hint<PlayedCpu>, 64> = Heap::new(RegionProvider::new(), Hint(PlayedCpu));
        let memory = vec![0_u64; MEMORY / 8].leak();
        // SAFETY: leaked, so nobody else uses it.
        let added = unsafe { heap.provider().add_region(memory.as_mut_ptr().cast(), MEMORY) };
        added.map_err(|error| error.to_string()).map(|()| heap)
    };
    let heap = new()?;
    let seen = replay(trace, &heap, true).map_err(|error| error.to_string())?;
    // SAFETY: the replay has ended, and its threads with it.
    unsafe { heap.verify_at_rest() }.map_err(|error| error.to_string())?;
    println!(
        "{} steps on {} CPUs, {} allocations; {} events dropped, {} of unknown blocks, {} overlaps",
        trace.steps.len(),
        trace.cpu_count,
        seen.allocs,
        trace.dropped,
        trace.unknown,
        trace.overlaps
    );
    println!(
        "at most {} asked for, {} held; every block was whole",
        bytes(seen.peak_live_len as f64),
        bytes(seen.peak_held_len as f64)
    );
    let mut nanos = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        replay(trace, &heap, false).map_err(|error| error.to_string())?;
        nanos.push(start.elapsed().as_nanos() as f64 / trace.steps.len().max(1) as f64);
    }
    nanos.sort_by(f64::total_cmp);
    let at = |share: usize| nanos.get((nanos.len() - 1) * share / 2).copied().unwrap_or(0.0);
    println!("{rounds} rounds: {:.1} ns a step (least {:.1}, most {:.1})", at(1), at(0), at(2));
    Ok(())
}

fn run(options: &Options) -> Result<(), String> {
    let name = options.log.display().to_string();
    let bytes = if name == "-" {
        let mut bytes = Vec::new();
        io::stdin().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        fs::read(&options.log)
    };
    let log = bytes.map_err(|error| format!("{name}: {error}"))?;
    if let Some(rounds) = options.replay {
        let log = unpack(&log).map_err(|error| format!("{name}: {error}"))?;
        let trace = parse_trace(&log).map_err(|error| format!("{name}: {error}"))?;
        return benchmark(&trace, rounds.max(1)).map_err(|error| format!("{name}: {error}"));
    }
    // A serial line may carry anything; what is no text is not ours.
    let dumps = parse(&String::from_utf8_lossy(&log)).map_err(|error| format!("{name}: {error}"))?;
    if let Some(out) = &options.out {
        let caption = options.caption.as_deref().unwrap_or(&name);
        fs::write(out, page(&dumps, caption)).map_err(|error| format!("{}: {error}", out.display()))?;
        println!("{}: {} dumps", out.display(), dumps.len());
        return Ok(());
    }
    let width = Term::stdout().size_checked().map_or(100, |(_, width)| usize::from(width)).clamp(40, 200);
    println!("{}", overview(&dumps, width));
    if let Some(map) = map_text(&dumps, width, io::stdout().is_terminal()) {
        println!("{map}");
    }
    Ok(())
}

//! `cargo view LOG`: draws the heap that a kernel's log tells of.

use std::{
    fs,
    io::{self, IsTerminal, Read},
    path::PathBuf,
    process::ExitCode,
};

use clap::Parser;
use console::Term;
use smp_heap_view::{map_text, overview, page, parse};

/// Draws the heap of a kernel: a map of its pages, its classes and CPUs, and how they changed, from what it printed with
/// `heap.dump(time)`. The lines are found anywhere in a log, whatever else is in it.
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

fn run(options: &Options) -> Result<(), String> {
    let name = options.log.display().to_string();
    let bytes = if name == "-" {
        let mut bytes = Vec::new();
        io::stdin().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        fs::read(&options.log)
    };
    let log = bytes.map_err(|error| format!("{name}: {error}"))?;
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

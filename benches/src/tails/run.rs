//! The run: row by row, pass by pass, the columns side by side.

use std::io;
use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use super::args::Args;
use super::pass::{Passes, empty_call};
use super::sequence::Row;
use super::table::{Column, heading, lines, slowest_calls};
use crate::args::choose_peers;
use crate::cell::Failure;
use crate::peers::{self, Peer};

/// Runs what the command line asks for.
pub fn main() -> ExitCode {
    match start(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("tails: {message}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: &Args) -> Result<(), String> {
    let (all, missing) = peers::all();
    let peers = choose_peers(all, &missing, &args.allocators)?;
    if let Some(Peer { name, program: Some(_), .. }) = peers.iter().find(|peer| peer.program.is_some()) {
        return Err(format!("{name} is another build: `cargo run --release --bin tails --features {name} -- -a pin`"));
    }
    let bar = ProgressBar::new((args.rows().len() * peers.len()) as u64 * u64::from(args.passes));
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} passes, {eta} left: {msg}");
    bar.set_style(style.map_err(|error| error.to_string())?);
    println!("cycles of one call; an empty call is {}\n\n{}", empty_call(), heading());
    for row in args.rows() {
        let (columns, slow) = measure(args, row, &peers, &bar).map_err(|error| error.to_string())?;
        bar.suspend(|| print!("{}{slow}", lines(row, &columns)));
    }
    bar.finish_and_clear();
    Ok(())
}

/// The columns of a row, in turns, and their slowest calls.
fn measure(args: &Args, row: Row, peers: &[Peer], bar: &ProgressBar) -> io::Result<(Vec<Column>, String)> {
    let mut columns = Vec::new();
    for peer in peers {
        columns.push((*peer, Passes::new(args.operations as usize)?, None));
    }
    for pass in 0..args.passes as usize {
        let first = pass % columns.len();
        columns.rotate_left(first);
        for (peer, passes, failure) in &mut columns {
            bar.set_message(format!("{}, {}", row.name, peer.name));
            // A column that failed would fail again.
            if failure.is_none() {
                *failure = passes.add(peer, row)?;
            }
            bar.inc(1);
        }
        columns.rotate_right(first);
    }
    let slow = columns.iter().filter(|(_, _, failure)| args.slowest > 0 && failure.is_none());
    let slow = slow.map(|(peer, passes, _)| format!("{}\n{}", peer.name, slowest_calls(row, passes, args.slowest)));
    let slow = slow.collect();
    let outcome = |(peer, passes, failure): (Peer, Passes, Option<Failure>)| {
        let outcome = failure.map_or_else(|| Ok(passes.figures()), Err);
        (peer, outcome)
    };
    Ok((columns.into_iter().map(outcome).collect(), slow))
}

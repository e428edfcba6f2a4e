//! The run: every workload with every allocator.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use smp_heap_bench::args::{Args, choose_peers, choose_workloads, span};
use smp_heap_bench::peers::Peer;
use smp_heap_bench::peers::levels::COLUMN;
use smp_heap_bench::report::{Facts, Report};
use smp_heap_bench::run::Runs;
use smp_heap_bench::workloads::Workload;
use smp_heap_bench::{cell, peers, workloads};

fn main() -> ExitCode {
    match start(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: &Args) -> Result<(), String> {
    let (all, missing) = peers::all();
    if args.list {
        list(&all, &missing);
        return Ok(());
    }
    let is_single = args.cell || args.rounds.is_some();
    for missing in missing.iter().filter(|_| !is_single) {
        eprintln!("left out: {}: {}", missing.name, missing.why);
    }
    let peers = choose_peers(all, &missing, &args.allocators)?;
    let workloads = choose_workloads(workloads::all(), &args.workloads)?;
    if is_single {
        let ([peer], [workload], [threads]) = (&peers[..], &workloads[..], &args.threads[..]) else {
            return Err("a single cell needs one workload, one allocator and one number of threads".into());
        };
        return match args.rounds {
            Some(rounds) => run_here(peer, workload, *threads, rounds),
            None => print_cell(peer, workload, *threads, args.counted()),
        };
    }
    run(
        args,
        Runs {
            peers,
            workloads,
            threads: args.threads.clone(),
            counted: args.counted(),
            repetitions: args.repetitions(),
        },
        missing,
    )
}

fn run_here(peer: &Peer, workload: &Workload, threads: usize, rounds: u64) -> Result<(), String> {
    if let Some(program) = peer.program {
        return Err(format!("{} runs in a program of its own: {} -a {COLUMN}", peer.name, program.display()));
    }
    println!("{}", cell::run_here(peer, workload, threads, rounds));
    if let Some(describe) = peer.describe {
        eprintln!("{}", describe());
    }
    Ok(())
}

fn print_cell(peer: &Peer, workload: &Workload, threads: usize, counted: Duration) -> Result<(), String> {
    let outcome = cell::run(peer, workload, threads, span(counted)).map_err(|error| error.to_string())?;
    println!("{}", serde_json::to_string(&outcome).map_err(|error| error.to_string())?);
    Ok(())
}

fn run(args: &Args, runs: Runs, missing: Vec<peers::Missing>) -> Result<(), String> {
    let facts = Facts::gather(runs.counted.as_secs_f64(), runs.repetitions);
    let mut report = Report { facts, peers: runs.peers.clone(), missing, rows: Vec::new(), metric: args.metric };
    let rows = runs.run(|row, bar| {
        bar.suspend(|| eprintln!("{}", report.progress_line(row)));
        // A run that is interrupted leaves what it has.
        report.rows.push(row.clone());
        report.write(&args.out)
    });
    rows.map_err(|error| format!("{}: {error}", args.out.display()))?;
    report.facts.close();
    print!("{}", report.table());
    report.write(&args.out).map_err(|error| format!("{}: {error}", args.out.display()))?;
    eprintln!("written to {}: tables, results.json and plots", args.out.display());
    Ok(())
}

fn list(peers: &[peers::Peer], missing: &[peers::Missing]) {
    println!("workloads");
    for workload in workloads::all() {
        println!("  {:15} {}", workload.name, workload.about);
    }
    println!("allocators");
    for peer in peers {
        println!("  {:15} {}", peer.name, peer.about);
    }
    for missing in missing {
        println!("  {:15} left out: {}", missing.name, missing.why);
    }
}

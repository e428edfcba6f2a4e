//! The run: every workload with every allocator.

use std::process::ExitCode;

use clap::Parser;
use smp_heap_bench::args::{Args, choose_peers, choose_workloads};
use smp_heap_bench::report::{Facts, Report};
use smp_heap_bench::run::Runs;
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
    for missing in &missing {
        eprintln!("left out: {}: {}", missing.name, missing.why);
    }
    let peers = choose_peers(all, &missing, &args.allocators)?;
    let workloads = choose_workloads(workloads::all(), &args.workloads)?;
    if let Some(rounds) = args.rounds {
        let ([peer], [workload], [threads]) = (&peers[..], &workloads[..], &args.threads[..]) else {
            return Err("--rounds needs one workload, one allocator and one number of threads".into());
        };
        println!("{}", cell::run_here(peer, workload, *threads, rounds));
        if let Some(describe) = peer.describe {
            eprintln!("{}", describe());
        }
        return Ok(());
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

//! `cargo demo`: real work on every CPU of the test kernel, with this heap and with a locked one, and a picture of it.
//!
//! The two heaps run in two boots of the same kernel source, on the same machine, so that nothing but the
//! `#[global_allocator]` differs. Both boots have all CPUs from the start and use some of them: under TCG a machine
//! with one CPU would run without the locked instructions that the others pay for, and "1 CPU" would flatter the lock.
#![expect(clippy::std_instead_of_core, reason = "a host program: std is what it is made of")]

#[path = "../demo/mod.rs"]
mod demo;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match demo::run(&demo::Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

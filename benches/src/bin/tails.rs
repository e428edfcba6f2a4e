//! How long single calls take, at the tail.

use std::process::ExitCode;

#[cfg(target_arch = "x86_64")]
fn main() -> ExitCode {
    smp_heap_bench::tails::run::main()
}

#[cfg(not(target_arch = "x86_64"))]
fn main() -> ExitCode {
    eprintln!("tails: it reads the time-stamp counter of x86-64");
    ExitCode::FAILURE
}

//! Cargo for a bare-metal target, by whichever toolchain this machine has for it:
//! `cargo run -q -p smp-heap-qemu --bin bare -- build -p smp-heap --target riscv64gc-unknown-none-elf`.
//!
//! The tests find their toolchain in the library; this gives the same choice to scripts and people.

use std::env;
use std::process::ExitCode;

use smp_heap_qemu::{Arch, BareMetal};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let asked = arguments.iter().skip_while(|argument| *argument != "--target").nth(1);
    let target = asked.map_or(Arch::X86_64.target(), String::as_str);
    let toolchain = match BareMetal::find(target) {
        Ok(toolchain) => toolchain,
        Err(failure) => {
            eprintln!("{failure}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("{target}: {}", toolchain.describe());
    let mut cargo = toolchain.cargo();
    if asked.is_none() {
        // Behind the subcommand: at the end it might stand behind a `--`.
        cargo.args(arguments.iter().take(1)).args(["--target", target]);
        cargo.args(arguments.iter().skip(1));
    } else {
        cargo.args(&arguments);
    }
    match cargo.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

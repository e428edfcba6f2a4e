//! Compiles and runs a test of this package again, with another `--cfg`, in a target folder of that name. Arguments and
//! environment are passed on.

use std::path::Path;
use std::process::{Command, ExitCode};

pub(crate) fn with_cfg(cfg: &str, test: &str) -> ExitCode {
    let mut command = Command::new(env!("CARGO"));
    command
        .args(["test", "--quiet", "--release", "--package", "smp-heap", "--test", test])
        .args(if cfg == "loom" { &["--features", "model-checker"][..] } else { &[] })
        .arg("--target-dir")
        .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name(cfg))
        .arg("--")
        .args(std::env::args_os().skip(1))
        .env("RUSTFLAGS", format!("--cfg {cfg}"));
    match command.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cannot run cargo: {error}");
            ExitCode::FAILURE
        }
    }
}

//! One command for the whole benchmark: builds what this machine can build, says what it cannot, and starts the run.
//!
//! The peers written in C and C++ are features of this package, because their build scripts end the build where there
//! is no compiler. So this program, which needs none, looks for the compilers first. Levels of hardening become
//! programs beside it. Zig's allocator becomes a shared library, which `cells` loads.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use smp_heap_bench::peers::levels::LEVELS;
use smp_heap_bench::peers::zig::{LIBRARY_VARIABLE, VERSION_VARIABLE};

fn main() -> ExitCode {
    match start() {
        Ok(code) => code,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<ExitCode, String> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cells = env::current_exe().map_err(|error| error.to_string())?.with_file_name("cells");
    for level in LEVELS {
        build_cells(package, &[level.name])?;
        let program = cells.with_file_name(level.program_name());
        std::fs::copy(&cells, &program).map_err(|error| format!("{}: {error}", program.display()))?;
    }
    build_cells(package, &features())?;
    let mut run = Command::new(&cells);
    run.args(env::args_os().skip(1));
    if let Some(zig) = Zig::find() {
        match zig.build(package) {
            Ok(library) => {
                run.env(LIBRARY_VARIABLE, library).env(VERSION_VARIABLE, &zig.version);
            }
            Err(why) => eprintln!("bench: Zig {}: {why}", zig.version),
        }
    }
    let status = run.status().map_err(|error| format!("{}: {error}", cells.display()))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The features that this machine has compilers for.
fn features() -> Vec<&'static str> {
    let has = |variable: &str, default: &str| answers(&env::var_os(variable).unwrap_or(default.into()), "--version");
    let mut features = Vec::new();
    if has("CC", "cc") && has("MAKE", "make") {
        features.push("c");
        if has("CXX", "c++") {
            features.push("cxx");
        }
    }
    features
}

fn build_cells(package: &Path, features: &[&str]) -> Result<(), String> {
    let cargo = env::var_os("CARGO").unwrap_or("cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--bin", "cells", "--features", &features.join(","), "--manifest-path"])
        .arg(package.join("Cargo.toml"))
        .status()
        .map_err(|error| format!("cargo: {error}"))?;
    if status.success() { Ok(()) } else { Err("the cells could not be built".into()) }
}

fn answers(program: &OsStr, flag: &str) -> bool {
    let status = Command::new(program).arg(flag).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Zig's compiler.
struct Zig {
    command: Vec<OsString>,
    version: String,
}

impl Zig {
    /// `ZIG`, else `zig`, else the Python package `ziglang`.
    fn find() -> Option<Self> {
        let named = env::var_os("ZIG").map(|zig| vec![zig]);
        let module = ["python3", "-m", "ziglang"].map(OsString::from).to_vec();
        named.into_iter().chain([vec!["zig".into()], module]).find_map(|command| {
            let output = Command::new(&command[0]).args(&command[1..]).arg("version").output().ok()?;
            let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            output.status.success().then_some(Self { command, version })
        })
    }

    /// Builds the shared library; where it is.
    fn build(&self, package: &Path) -> Result<PathBuf, String> {
        let library = package.join("target").join(format!("libzig_smp-{}.so", self.version));
        let source = package.join("zig").join("smp.zig");
        std::fs::create_dir_all(package.join("target")).map_err(|error| error.to_string())?;
        if is_newer(&library, &source) {
            return Ok(library);
        }
        let mut emit = OsString::from("-femit-bin=");
        emit.push(&library);
        let output = Command::new(&self.command[0])
            .args(&self.command[1..])
            .args(["build-lib", "-dynamic", "-O", "ReleaseFast", "-lc", "--name", "zig_smp"])
            .args([emit.as_os_str(), source.as_os_str()])
            .output()
            .map_err(|error| error.to_string())?;
        if output.status.success() { Ok(library) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }
}

fn is_newer(file: &Path, than: &Path) -> bool {
    let changed = |path: &Path| path.metadata().and_then(|data| data.modified()).ok();
    changed(file).is_some_and(|file| changed(than).is_some_and(|than| file >= than))
}

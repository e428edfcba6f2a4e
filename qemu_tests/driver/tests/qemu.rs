//! Every QEMU test: each kernel of the table on each of its machines and CPU counts, then the harness itself.
//!
//! `cargo test --test qemu -- cpus=4/boot` runs those whose names contain the text. Kernels are built when the first
//! one is booted, so that listing needs no toolchain. Two guests run at a time, whatever the host: their CPUs are
//! threads that spin, and a host with more to do than cores makes every one of them wait.

use core::time::Duration;
use std::collections::BTreeSet;
use std::env;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use libtest_mimic::{Arguments, Failed, Trial};
use smp_heap_qemu::{BareMetal, Boot, Failure, KERNELS, Passed, Profile, TARGET, Table, find_qemu, sizes};

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(2);
    let show = arguments.nocapture;

    let mut trials = Vec::new();
    for kernel in KERNELS {
        for &machine in kernel.machines {
            for &cpus in kernel.cpus {
                let name = format!("x86_64/{machine}/cpus={cpus}/{}", kernel.name);
                let boot = kernel.boot(machine, cpus).arg("cpus", cpus);
                trials.push(Trial::test(name, move || match kernel.budgets {
                    Some(mode) => keeps_budgets(&boot, mode, show),
                    None => passes(&boot, show).map(drop),
                }));
            }
        }
    }
    trials.push(Trial::test("x86_64/size", keeps_sizes));
    trials.extend(harness(show));
    libtest_mimic::run(&arguments, trials).exit();
}

/// Boots a kernel that has to pass.
fn passes(boot: &Boot, show: bool) -> Result<Passed, Failed> {
    let mut output = String::new();
    let result = boot.run(|line| {
        if show {
            println!("{line}");
        }
        output.push_str(line);
        output.push('\n');
    });
    result.map_err(|failure| format!("{failure}\n--- the guest's output:\n{output}").into())
}

/// Boots a kernel that measures, and holds what it says against the table.
fn keeps_budgets(boot: &Boot, mode: &str, show: bool) -> Result<(), Failed> {
    let toolchain = BareMetal::find(TARGET).map_err(|failure| failure.to_string())?;
    let mut measured = Table::new(toolchain.version());
    if measured.add(mode, &passes(boot, show)?.output) < 20 {
        return Err("the kernel measured next to nothing".into());
    }
    Ok(Table::read()?.judge(&measured)?)
}

/// Holds the heap's bytes in a release kernel against the table.
fn keeps_sizes() -> Result<(), Failed> {
    let toolchain = BareMetal::find(TARGET).map_err(|failure| failure.to_string())?;
    let mut measured = Table::new(toolchain.version());
    measured.add_sizes(&sizes().map_err(|failure| failure.to_string())?);
    Ok(Table::read()?.judge(&measured)?)
}

/// A test of the harness: boots the kernel that misbehaves and looks at how that was judged.
fn judged(mode: &'static str, boot: Boot, show: bool, right: fn(&Failure) -> bool) -> Trial {
    Trial::test(format!("harness/{mode}"), move || {
        let started = Instant::now();
        let result = boot.arg("mode", mode).run(|line| {
            if show {
                println!("{line}");
            }
        });
        match result {
            Err(failure) if right(&failure) && started.elapsed() < Duration::from_secs(60) => Ok(()),
            other => Err(format!("a kernel in mode {mode} was judged {other:?}").into()),
        }
    })
}

fn harness(show: bool) -> Vec<Trial> {
    let boot = || Boot::new("misbehave").cpus(2);
    vec![
        judged("triple_fault", boot(), show, |f| *f == Failure::TripleFault),
        judged("hang", boot().time_limit(Duration::from_secs(3)), show, |f| matches!(f, Failure::TimeOut(_))),
        judged("panic", boot(), show, |f| reports(f, "PANIC cpu 0")),
        judged("exception", boot(), show, |f| reports(f, "EXCEPTION cpu 0: page fault")),
        judged("stack_overflow", boot(), show, |f| reports(f, "a stack ran over")),
        judged("exit_code", boot(), show, |f| *f == Failure::WrongExit("code 65".to_owned())),
        judged("silent_exit", boot(), show, |f| *f == Failure::NoPassLine),
        judged("late_output", boot(), show, |f| *f == Failure::NoPassLine),
        Trial::test("harness/refused_argument", || {
            match Boot::new("misbehave").qemu_args(["-no-such-option"]).run(|_| ()) {
                Err(Failure::Emulator(why)) if why.contains("no-such-option") => Ok(()),
                other => Err(format!("judged {other:?}").into()),
            }
        }),
        Trial::test("harness/unknown_kernel", || match Boot::new("no_such_kernel").run(|_| ()) {
            Err(Failure::Build(why)) if why.contains("no_such_kernel") => Ok(()),
            other => Err(format!("judged {other:?}").into()),
        }),
        Trial::test("harness/release_profile", || {
            passes(&Boot::new("misbehave").profile(Profile::Fast).arg("mode", "pass"), false).map(drop)
        }),
        Trial::test("harness/missing_qemu", || without("qemu-system-x86_64 is not in PATH", false)),
        Trial::test("harness/missing_target", || without("builds for x86_64-unknown-none", true)),
        Trial::test("harness/every_kernel_is_in_the_table", every_kernel_is_in_the_table),
    ]
}

fn reports(failure: &Failure, what: &str) -> bool {
    matches!(failure, Failure::Reported(why) if why.contains(what))
}

/// Runs this very test program where something is missing: it has to fail, and to say what to do.
///
/// `PATH` holds nothing, or QEMU and a compiler that knows the host alone.
fn without(missing: &str, with_qemu: bool) -> Result<(), Failed> {
    static DIRECTORY: Mutex<()> = Mutex::new(());
    let _alone = DIRECTORY.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("path");
    if directory.exists() {
        std::fs::remove_dir_all(&directory)?;
    }
    std::fs::create_dir_all(&directory)?;
    let mut command = Command::new(env::current_exe()?);
    command.args(["--exact", "x86_64/microvm/cpus=1/boot"]).env("PATH", &directory);
    if with_qemu {
        symlink(find_qemu().map_err(|failure| failure.to_string())?, directory.join("qemu-system-x86_64"))?;
        let compiler = directory.join("rustc");
        let script = "#!/bin/sh\ncase $1 in --version) echo 'rustc 1.99.0' ;; *) echo /nonexistent ;; esac\n";
        std::fs::write(&compiler, script)?;
        std::fs::set_permissions(&compiler, PermissionsExt::from_mode(0o755))?;
        command.env_remove("CARGO").env_remove("RUSTC");
    }
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    if output.status.success() {
        Err("it passed".into())
    } else if !said.contains(missing) || !said.contains("./setup") {
        Err(format!("it failed, but did not say how to help that {missing}:\n{said}").into())
    } else {
        Ok(())
    }
}

/// A kernel that nobody boots tests nothing.
fn every_kernel_is_in_the_table() -> Result<(), Failed> {
    let booted: BTreeSet<&str> = KERNELS.iter().filter_map(|kernel| kernel.name.split('+').next()).collect();
    for file in Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel/kernels").read_dir()? {
        let path = file?.path();
        // Directories hold what several kernels share.
        if path.is_dir() {
            continue;
        }
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
        // The first is what the tests of the harness boot; the others are booted by `cargo demo`.
        if !booted.contains(name) && name != "misbehave" && !name.starts_with("demo") {
            return Err(format!("kernels/{name}.rs has no row in driver/src/kernels.rs").into());
        }
    }
    Ok(())
}

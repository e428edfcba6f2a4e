//! Every QEMU test: each kernel of the table on each of its machines and CPU counts, then the harness itself.
//!
//! `cargo test --test qemu -- cpus=4/boot` runs those whose names contain the text. Kernels are built when the first
//! one is booted, so that listing needs no toolchain. `-- --loaded` instead runs all of `cargo test` ten times in a row
//! on one busy core. Two guests run at a time, whatever the host: their CPUs are threads that spin, and a host with
//! more to do than cores makes every one of them wait.

use core::time::Duration;
use std::collections::BTreeSet;
use std::env;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};

use libtest_mimic::{Arguments, Failed, Trial};
use smp_heap_qemu::{
    Arch, BareMetal, Boot, Failure, KERNELS, Kernel, Passed, Profile, Rows, Soak, Table, find_qemu, loaded, sizes,
};

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    if let Some((flag, rest)) = words.split_first().filter(|(flag, _)| flag.starts_with("--loaded")) {
        return loaded_runs(flag, rest);
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(2);
    match trials(arguments.nocapture).and_then(|trials| expect_a_match(&arguments, trials)) {
        Ok(trials) => libtest_mimic::run(&arguments, trials).exit_code(),
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::from(2)
        }
    }
}

/// `--loaded`, or `--loaded=3` for three runs instead of ten: `cargo test` with the other words, on one busy core.
fn loaded_runs(flag: &str, words: &[String]) -> ExitCode {
    let times = match flag.strip_prefix("--loaded") {
        Some("") => Some(10),
        Some(number) => number.strip_prefix('=').and_then(|number| number.parse().ok()).filter(|times| *times > 0),
        None => None,
    };
    let Some(times) = times else {
        eprintln!("error: `{flag}`: `--loaded` or `--loaded=N`, for N runs of `cargo test`");
        return ExitCode::from(2);
    };
    let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let command: Vec<&str> = [cargo.as_str(), "test"].into_iter().chain(words.iter().map(String::as_str)).collect();
    match loaded(&command, times) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Every row of the table, and the tests of the harness.
fn trials(show: bool) -> Result<Vec<Trial>, String> {
    if let Some(fault) = KERNELS.iter().find_map(Kernel::fault) {
        return Err(fault);
    }
    let (soak, rows) = (Soak::from_env()?, Rows::from_env()?);
    let mut trials = Vec::new();
    for kernel in KERNELS {
        for (machine, cpus) in kernel.rows(rows) {
            let arch = machine.arch();
            let boot = kernel.boot(machine, cpus, soak);
            trials.push(Trial::test(format!("{arch}/{machine}/cpus={cpus}/{}", kernel.name), move || {
                match kernel.budgets {
                    Some(mode) => keeps_budgets(arch, &boot, mode, cpus, show),
                    None => passes(&boot, show).map(drop),
                }
            }));
        }
    }
    for arch in Arch::ALL.into_iter().filter(|arch| *arch == Arch::X86_64 || rows == Rows::All) {
        trials.push(Trial::test(format!("{arch}/size"), move || keeps_sizes(arch)));
    }
    trials.extend(harness(show));
    Ok(trials)
}

/// A filter that matches nothing is a mistake, not a success.
fn expect_a_match(arguments: &Arguments, trials: Vec<Trial>) -> Result<Vec<Trial>, String> {
    let Some(filter) = &arguments.filter else { return Ok(trials) };
    let matches = |name: &str| if arguments.exact { name == filter } else { name.contains(filter) };
    if trials.iter().any(|trial| matches(trial.name())) {
        return Ok(trials);
    }
    Err(format!(
        "no QEMU test matches `{filter}`: `cargo test --test qemu -- --list` shows their names. \
         (A test that does not boot a kernel is in `cargo test --lib {filter}` or `cargo test --test host {filter}`.)"
    ))
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
    let passed = result.map_err(|failure| format!("{failure}\n--- the guest's output:\n{output}"))?;
    if show {
        println!("{:?} in {:.1} s", passed.did, passed.time.as_secs_f32());
    }
    Ok(passed)
}

/// Boots a kernel that measures, and holds what it says against the table.
fn keeps_budgets(arch: Arch, boot: &Boot, mode: &str, cpus: u32, show: bool) -> Result<(), Failed> {
    let toolchain = BareMetal::find(arch.target()).map_err(|failure| failure.to_string())?;
    let mut measured = Table::new(toolchain.version());
    measured.add(mode, &passes(boot, show)?.output);
    Ok(Table::read(arch)?.judge(&measured, mode, cpus)?)
}

/// Holds the heap's bytes in a release kernel against the table.
fn keeps_sizes(arch: Arch) -> Result<(), Failed> {
    let toolchain = BareMetal::find(arch.target()).map_err(|failure| failure.to_string())?;
    let mut measured = Table::new(toolchain.version());
    measured.add_sizes(&sizes(arch).map_err(|failure| failure.to_string())?);
    Ok(Table::read(arch)?.judge(&measured, "size", 1)?)
}

/// A test of the harness, of that name: boots the kernel that misbehaves and looks at how that was judged.
fn judged(name: &str, mode: &'static str, boot: Boot, show: bool, right: fn(&Failure) -> bool) -> Trial {
    Trial::test(format!("harness/{name}"), move || {
        let result = boot.arg("mode", mode).run(|line| {
            if show {
                println!("{line}");
            }
        });
        match result {
            Err(failure) if right(&failure) => Ok(()),
            other => Err(format!("a kernel in mode {mode} was judged {other:?}").into()),
        }
    })
}

fn harness(show: bool) -> Vec<Trial> {
    let boot = || Boot::new("misbehave").cpus(2);
    let elsewhere = |arch: Arch| boot().machine(arch.machine());
    let asleep = |arch: Arch| elsewhere(arch).time_limit(Duration::from_secs(3));
    vec![
        judged("reset", "reset", boot(), show, |f| *f == Failure::Reset),
        judged("hang", "hang", boot().time_limit(Duration::from_secs(3)), show, |f| times_out(f, "used 3 s")),
        judged("sleep", "sleep", boot().time_limit(Duration::from_secs(3)), show, |f| times_out(f, "asleep")),
        judged("panic", "panic", boot(), show, |f| reports(f, "PANIC cpu 0")),
        judged("exception", "exception", boot(), show, |f| reports(f, "EXCEPTION cpu 0: page fault")),
        judged("stack_overflow", "stack_overflow", boot(), show, overran),
        judged("exit_code", "exit_code", boot(), show, |f| *f == Failure::WrongExit("code 65".to_owned())),
        judged("silent_exit", "silent_exit", boot(), show, |f| *f == Failure::NoPassLine),
        judged("late_output", "late_output", boot(), show, |f| *f == Failure::NoPassLine),
        judged("aarch64_reset", "reset", elsewhere(Arch::Aarch64), show, |f| *f == Failure::Reset),
        judged("aarch64_sleep", "sleep", asleep(Arch::Aarch64), show, |f| times_out(f, "asleep")),
        judged("aarch64_exception", "exception", elsewhere(Arch::Aarch64), show, |f| reports(f, "cpu 0: page fault")),
        judged("aarch64_stack_overflow", "stack_overflow", elsewhere(Arch::Aarch64), show, overran),
        judged("riscv64_reset", "reset", elsewhere(Arch::Riscv64), show, |f| *f == Failure::Reset),
        judged("riscv64_sleep", "sleep", asleep(Arch::Riscv64), show, |f| times_out(f, "asleep")),
        judged("riscv64_exception", "exception", elsewhere(Arch::Riscv64), show, |f| reports(f, "cpu 0: page fault")),
        judged("riscv64_stack_overflow", "stack_overflow", elsewhere(Arch::Riscv64), show, overran),
        judged("early_return", "early_return", boot(), show, |f| reports(f, "of no work")),
        judged("no_rounds", "rounds", boot().arg("rounds", 0), show, |f| reports(f, "0 rounds")),
        judged("unknown_word", "pass", boot().args(["smal"]), show, |f| reports(f, "`smal`")),
        judged("wrong_cpu_count", "pass", boot().arg("cpus", 3), show, |f| reports(f, "2 CPUs came up, not 3")),
        judged("too_little_work", "pass", boot().least(&[("steps", 2)]), show, |f| too_little(f, "1 steps")),
        judged("no_shootdowns", "pass", boot().least(&[("shootdowns", 1)]), show, |f| too_little(f, "0 shootdowns")),
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
        Trial::test("harness/filter_without_a_match", || {
            refuses(&["shotdown"], None, "no QEMU test matches `shotdown`")
        }),
        Trial::test("harness/exact_filter_without_a_match", || refuses(&["--exact", "boot"], None, "matches `boot`")),
        Trial::test("harness/bad_rows", || refuses(&["--list"], Some((Rows::VARIABLE, "al")), "SMP_HEAP_ROWS=al is")),
        Trial::test("harness/bad_soak", || {
            refuses(&["--list"], Some((Soak::VARIABLE, "1O")), "SMP_HEAP_SOAK=1O is not a number")
        }),
        Trial::test("harness/no_soak", || {
            refuses(&["--list"], Some((Soak::VARIABLE, "0")), "SMP_HEAP_SOAK=0 is not a number")
        }),
        Trial::test("harness/bad_loaded", || refuses(&["--loaded=1O"], None, "`--loaded=1O`")),
        Trial::test("harness/every_kernel_is_in_the_table", every_kernel_is_in_the_table),
        Trial::test("harness/every_budget_belongs_to_a_row", every_budget_belongs_to_a_row),
    ]
}

fn reports(failure: &Failure, what: &str) -> bool {
    matches!(failure, Failure::Reported(why) if why.contains(what))
}

fn overran(failure: &Failure) -> bool {
    reports(failure, "a stack ran over")
}

fn times_out(failure: &Failure, what: &str) -> bool {
    matches!(failure, Failure::TimeOut(why) if why.contains(what))
}

fn too_little(failure: &Failure, what: &str) -> bool {
    matches!(failure, Failure::TooLittle(why) if why.starts_with(what))
}

/// Runs this very test program with arguments, or a variable, that it has to refuse before it boots anything.
fn refuses(arguments: &[&str], variable: Option<(&str, &str)>, why: &str) -> Result<(), Failed> {
    let mut command = Command::new(env::current_exe()?);
    command.args(arguments).env_remove(Soak::VARIABLE).env_remove(Rows::VARIABLE).envs(variable);
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(2) && said.contains(why) {
        Ok(())
    } else {
        Err(format!("{arguments:?} with {variable:?} ended with {}:\n{said}", output.status).into())
    }
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
        symlink(find_qemu(Arch::X86_64).map_err(|failure| failure.to_string())?, directory.join("qemu-system-x86_64"))?;
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

/// A budget that no row measures holds nothing.
fn every_budget_belongs_to_a_row() -> Result<(), Failed> {
    for arch in Arch::ALL {
        let budgets = Table::read(arch)?;
        let has_rows = |kernel: &&Kernel| kernel.rows(Rows::All).any(|(machine, _)| machine.arch() == arch);
        let modes = KERNELS.iter().filter(has_rows).filter_map(|kernel| kernel.budgets);
        let measured: BTreeSet<&str> = modes.chain(["size"]).collect();
        let budgeted = budgets.modes();
        if budgeted != measured {
            return Err(format!("{arch}: the table has budgets for {budgeted:?}, rows measure {measured:?}").into());
        }
    }
    Ok(())
}

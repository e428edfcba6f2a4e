//! The kernels of `examples/boot`: built with whatever toolchain there is for their targets, started by their own
//! `run`, which is how people start them.
//!
//! `cargo test --test examples` boots what QEMU alone can start. The others are shown as ignored; after
//! `./setup --firmware`, `cargo test -p smp-heap-qemu --features firmware --test examples` boots all of them.

use core::time::Duration;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use libtest_mimic::{Arguments, Failed, Trial};
use smp_heap_qemu::BareMetal;

/// A firmware takes its time on a loaded host; one that hangs does so for ever.
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// One folder of `examples/boot`.
#[derive(Clone, Copy)]
struct Example {
    name: &'static str,
    target: &'static str,
    /// Its file behind the name.
    ending: &'static str,
    /// How many CPUs it is booted with.
    cpus: &'static [u32],
    /// Whether `./setup` alone brings what it needs.
    is_plain: bool,
}

const EXAMPLES: [Example; 8] = [
    Example {
        name: "battery_riscv32",
        target: "riscv32imac-unknown-none-elf",
        ending: "",
        cpus: &[1, 4],
        is_plain: false,
    },
    Example { name: "paging_x86_64", target: "x86_64-unknown-none", ending: "", cpus: &[1], is_plain: true },
    Example { name: "pvh_x86_64", target: "x86_64-unknown-none", ending: "", cpus: &[1, 4], is_plain: true },
    Example { name: "multiboot2_x86_64", target: "x86_64-unknown-none", ending: "", cpus: &[1, 4], is_plain: false },
    Example { name: "uefi_x86_64", target: "x86_64-unknown-uefi", ending: ".efi", cpus: &[1, 4], is_plain: false },
    Example { name: "uefi_aarch64", target: "aarch64-unknown-uefi", ending: ".efi", cpus: &[1, 4], is_plain: false },
    Example {
        name: "opensbi_riscv64",
        target: "riscv64gc-unknown-none-elf",
        ending: "",
        cpus: &[1, 4],
        is_plain: true,
    },
    Example {
        name: "virt_aarch64",
        target: "aarch64-unknown-none-softfloat",
        ending: "",
        cpus: &[1, 4],
        is_plain: true,
    },
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(1);
    let mut trials = Vec::new();
    for example in EXAMPLES {
        for &cpus in example.cpus {
            let trial = Trial::test(format!("{}/cpus={cpus}", example.name), move || example.boots(cpus));
            trials.push(trial.with_ignored_flag(!example.is_plain && !cfg!(feature = "firmware")));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

impl Example {
    fn folder(self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/boot").join(self.name)
    }

    fn build(self) -> Result<PathBuf, Failed> {
        static BUILDING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cargo = BareMetal::find(self.target)?.cargo();
        // The folder decides the target directory, whatever the outer cargo has in its environment.
        let target_dir = self.folder().join("../target");
        cargo.args(["build", "--quiet", "--locked", "--target", self.target]).current_dir(self.folder());
        let output = cargo.env("CARGO_TARGET_DIR", &target_dir).output()?;
        if !output.status.success() {
            return Err(format!("does not build\n{}", String::from_utf8_lossy(&output.stderr)).into());
        }
        Ok(target_dir.join(self.target).join("debug").join(format!("{}{}", self.name, self.ending)))
    }

    fn boots(self, cpus: u32) -> Result<(), Failed> {
        let kernel = self.build()?;
        let child = Command::new("./run")
            .arg(&kernel)
            .current_dir(self.folder())
            .env("CPUS", cpus.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let (lines, is_success) = Running(child).output()?;
        let pass = format!("PASS {}, {cpus} CPUs, ", self.name);
        if is_success && lines.last().is_some_and(|line| line.starts_with(&pass)) {
            return Ok(());
        }
        let how = if is_success { "success without its pass line" } else { "failure" };
        Err(format!("`run` ended with {how}; its output:\n{}", lines.join("\n")).into())
    }
}

/// A `run` at work, with the emulator that it started; neither outlives this.
struct Running(Child);

impl Running {
    /// All lines, and whether `run` says that all is well.
    fn output(mut self) -> Result<(Vec<String>, bool), Failed> {
        let (sender, incoming) = mpsc::channel();
        let stdout = self.0.stdout.take().ok_or("no output")?;
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                // Nobody listens any more once the time is over.
                let _ = sender.send(String::from_utf8_lossy(&line).trim().to_owned());
            }
        });
        let end = Instant::now() + TIME_LIMIT;
        let mut lines = Vec::new();
        loop {
            match incoming.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => lines.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = TIME_LIMIT.as_secs();
                    return Err(format!("still running after {seconds} s; its output:\n{}", lines.join("\n")).into());
                }
            }
        }
        lines.retain(|line| !line.is_empty());
        Ok((lines, self.0.wait()?.success()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The whole group: `run` is a shell. It is gone already if all went well.
        let group = format!("-{}", self.0.id());
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
            let _ = self.0.wait();
        }
    }
}

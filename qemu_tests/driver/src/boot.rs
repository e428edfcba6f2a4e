//! One run of one kernel: start QEMU, stream its lines, judge how it ended.
//!
//! The verdict is strict on purpose. Success takes two things that only a kernel which reached its end can give: exit
//! code 33 (on x86-64, it wrote 0x10 to the exit device) and a last line `PASS <kernel>`. Everything else is a
//! [`Failure`] whose variant says what happened.

use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use crate::patience::{self, Patience, Used};
use crate::{Machine, Profile, build, qemu};

/// QEMU's exit codes, the same on all architectures. On x86-64 a kernel that writes `v` to the exit device makes it `2
/// v + 1`.
const EXIT_PASS: i32 = 33;
const EXIT_FAIL: i32 = 35;

/// How often a guest that says nothing is looked after.
const LOOK: Duration = Duration::from_millis(250);

/// How many of the guest's last lines a [`Failure`] of it is shown with.
const TAIL: usize = 200;

/// One boot: which kernel, on what machine, for how long at most.
#[derive(Clone, Debug)]
#[must_use = "a boot does nothing until it is `run`"]
pub struct Boot {
    pub(crate) kernel: String,
    pub(crate) profile: Profile,
    pub(crate) machine: Machine,
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) args: Vec<String>,
    pub(crate) qemu_args: Vec<String>,
    pub(crate) counting: bool,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) time_limit: Duration,
    pub(crate) least: Vec<(&'static str, u64)>,
}

/// A guest that reached its end.
#[derive(Clone, Debug)]
pub struct Passed {
    /// Wall time from starting QEMU to its exit.
    pub time: Duration,
    /// The guest's last lines.
    pub output: Vec<String>,
    /// What it did, by kinds of work.
    pub did: Work,
}

/// How much was done, by kinds of work. A kernel tells it in lines `DID <count> <what>`.
pub type Work = BTreeMap<String, u64>;

/// Why a boot did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// Something is not installed; the text says what.
    Missing(String),
    /// The kernels did not build; the text is the compiler's.
    Build(String),
    /// QEMU did not start, or refused its arguments.
    Emulator(String),
    /// QEMU left with code 0, which no kernel asks for: a reset that `-no-reboot` turned into an exit.
    Reset,
    /// The guest was still running when its time was over, and was killed; the text says by which measure.
    TimeOut(String),
    /// The kernel reported failure itself: a panic, a failed check, an unexpected exception.
    Reported(String),
    /// QEMU left with a code that means nothing here, or died by a signal.
    WrongExit(String),
    /// The success code came without the line that belongs to it.
    NoPassLine,
    /// The kernel passed, but says of less work than its row demands; the text says of which.
    TooLittle(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(what) => {
                write!(f, "{what}\nRun `./setup` at the top of the repository: it installs what the QEMU tests need.")
            }
            Self::Build(text) => write!(f, "the test kernels do not build\n{text}"),
            Self::Emulator(text) => write!(f, "QEMU did not run: {text}"),
            Self::Reset => f.write_str("the guest reset itself, as by a triple fault (QEMU left with code 0)"),
            Self::TimeOut(why) => write!(f, "time-out: the guest is still running, and {why}"),
            Self::Reported(line) => write!(f, "the kernel reported failure: {line}"),
            Self::WrongExit(what) => write!(f, "wrong exit: QEMU left with {what}"),
            Self::NoPassLine => {
                f.write_str("the guest left with the code for success, but its last line was not its pass line")
            }
            Self::TooLittle(what) => write!(f, "the kernel passed, but did too little: {what}"),
        }
    }
}

impl std::error::Error for Failure {}

impl Boot {
    /// A boot of `kernel` (a file in `qemu_tests/kernel/kernels`, without `.rs`): one CPU, 256 MiB, one minute.
    pub fn new(kernel: impl Into<String>) -> Self {
        Self {
            kernel: kernel.into(),
            profile: Profile::Checked,
            machine: Machine::Microvm,
            cpus: 1,
            memory_mib: 256,
            args: Vec::new(),
            qemu_args: Vec::new(),
            counting: false,
            initrd: None,
            time_limit: Duration::from_secs(60),
            least: Vec::new(),
        }
    }

    /// With how much optimisation and checking the kernel is built.
    pub fn profile(mut self, profile: Profile) -> Self {
        self.profile = profile;
        self
    }

    /// The board.
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = machine;
        self
    }

    /// How many CPUs.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// How much RAM, in MiB.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Adds `key=value` to the kernel's command line.
    pub fn arg(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.args.push(format!("{key}={value}"));
        self
    }

    /// Adds words to the kernel's command line as they are.
    pub fn args<I: IntoIterator<Item: Into<String>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds arguments to QEMU's own command line.
    pub fn qemu_args<I: IntoIterator<Item: Into<String>>>(mut self, args: I) -> Self {
        self.qemu_args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Whether QEMU counts instructions, and time passes with them: a run is the same each time.
    pub fn counting(mut self, counting: bool) -> Self {
        self.counting = counting;
        self
    }

    /// A file that QEMU loads as the first boot module.
    pub fn initrd(mut self, file: impl Into<PathBuf>) -> Self {
        self.initrd = Some(file.into());
        self
    }

    /// When a guest that is still running counts as hung and is killed: by the processor time that it used on a CPU.
    /// One that uses none is killed sooner, one that uses hardly any when it took twenty times as long by the clock.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    /// What the kernel has to tell that it did, at least.
    pub fn least(mut self, least: &[(&'static str, u64)]) -> Self {
        self.least.extend(least);
        self
    }

    /// Threads of QEMU that run the guest's CPUs. Where it counts instructions, that is one for all of them.
    pub(crate) fn threads(&self) -> u32 {
        if self.counting { 1 } else { self.cpus }
    }

    /// Builds the kernel (once per process, architecture and [`Profile`]), boots it and calls `on_line` for each line
    /// the guest prints, as it comes. The time limit counts from QEMU's start, not from the build's.
    ///
    /// # Errors
    /// Whatever kept the kernel from reaching its end, see [`Failure`].
    pub fn run(&self, mut on_line: impl FnMut(&str)) -> Result<Passed, Failure> {
        let qemu = qemu::find_qemu(self.machine.arch())?;
        let elf = build::kernel_elf(&self.kernel, self.machine.arch(), self.profile)?;
        let started = Instant::now();
        let mut child = qemu::command(&qemu, &elf, self)
            .spawn()
            .map(Guest)
            .map_err(|error| Failure::Emulator(format!("{}: {error}", qemu.display())))?;

        let (sender, lines) = mpsc::channel();
        if let Some(stdout) = child.0.stdout.take() {
            thread::spawn(move || {
                for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                    let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        let mut stderr = child.0.stderr.take();
        let complaints = thread::spawn(move || {
            let mut text = String::new();
            if let Some(pipe) = &mut stderr {
                // Whatever of QEMU's complaints cannot be read is not worth failing for.
                let _ = pipe.read_to_string(&mut text);
            }
            text
        });

        let mut output = VecDeque::new();
        let mut did = Work::new();
        let mut patience = Patience::new(self.time_limit);
        let mut next_look = LOOK;
        loop {
            match lines.recv_timeout(LOOK) {
                Ok(line) => {
                    patience.heard(started.elapsed());
                    on_line(&line);
                    if let Some((count, what)) = work(&line) {
                        *did.entry(what.to_owned()).or_default() += count;
                    }
                    if output.len() == TAIL {
                        output.pop_front();
                    }
                    output.push_back(line);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let elapsed = started.elapsed();
            if elapsed < next_look {
                continue;
            }
            next_look = elapsed + LOOK;
            let used = patience::used(&child.0, self.threads()).unwrap_or(Used { time: elapsed, runs: true });
            if let Some(why) = patience.hung(elapsed, used) {
                return Err(Failure::TimeOut(why));
            }
        }
        let status = child.0.wait().map_err(|error| Failure::Emulator(error.to_string()))?;
        let complaints = complaints.join().unwrap_or_default();
        self.judge(status, output.make_contiguous(), &complaints)?;
        self.demand(&did)?;
        Ok(Passed { time: started.elapsed(), output: output.into(), did })
    }

    /// Holds what was done against what has to be done at least.
    fn demand(&self, did: &Work) -> Result<(), Failure> {
        let done = |what: &str| did.get(what).copied().unwrap_or_default();
        let mut lacks = self.least.iter().filter(|(what, least)| done(what) < *least);
        match lacks.next() {
            None => Ok(()),
            Some((what, least)) => Err(Failure::TooLittle(format!("{} {what}, at least {least} are due", done(what)))),
        }
    }

    fn judge(&self, status: ExitStatus, output: &[String], complaints: &str) -> Result<(), Failure> {
        let mut spoken = output.iter().filter(|line| !line.is_empty());
        let last = spoken.next_back().map_or("", String::as_str);
        match status.code() {
            Some(EXIT_PASS) if last == format!("PASS {}", self.kernel) => Ok(()),
            Some(EXIT_PASS) => Err(Failure::NoPassLine),
            Some(EXIT_FAIL) => {
                // The line that says why, rather than the last one: other CPUs go on printing for a moment.
                let why = output
                    .iter()
                    .find(|line| ["PANIC ", "EXCEPTION ", "FAIL "].iter().any(|word| line.starts_with(word)));
                Err(Failure::Reported(why.map_or(last, String::as_str).to_owned()))
            }
            Some(0) => Err(Failure::Reset),
            Some(1) if !complaints.is_empty() => Err(Failure::Emulator(complaints.to_owned())),
            Some(code) => Err(Failure::WrongExit(format!("code {code}"))),
            None => Err(Failure::WrongExit(status.to_string())),
        }
    }
}

/// What a line tells of the work that was done, if it does.
fn work(line: &str) -> Option<(u64, &str)> {
    let (count, what) = line.strip_prefix("DID ")?.split_once(' ')?;
    Some((count.parse().ok()?, what))
}

/// A running QEMU that does not outlive the boot it belongs to.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only if the process is gone already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

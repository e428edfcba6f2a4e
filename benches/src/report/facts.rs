//! Where and how a run was made.

use std::process::Command;
use std::time::SystemTime;
use std::{env, fs, thread};

use serde::Serialize;

use crate::peers::zig::VERSION_VARIABLE;

/// What must be known of a run to make it again.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    pub date: String,
    pub command: String,
    pub processor: String,
    pub cores: usize,
    pub system: String,
    /// Of this crate.
    pub commit: String,
    /// Of the peers, as the lock file has them, and of the compilers.
    pub versions: Vec<(String, String)>,
    /// How many programs wanted to run, on average over the last minute: before and after.
    pub load: [String; 2],
    pub counted_seconds: f64,
    pub repetitions: u32,
}

const CRATES: [&str; 11] = [
    "ax-sync",
    "buddy-slab-allocator",
    "buddy_system_allocator",
    "libmimalloc-sys",
    "linked_list_allocator",
    "rlsf",
    "rpmalloc-sys",
    "snmalloc-sys",
    "talc",
    "tikv-jemalloc-sys",
    "wf_alloc",
];

impl Facts {
    /// What can be said before the run.
    pub fn gather(counted_seconds: f64, repetitions: u32) -> Self {
        let arguments: Vec<String> = env::args().skip(1).collect();
        let command = format!("cargo run --release -- {}", arguments.join(" ")).trim_end_matches([' ', '-']).to_owned();
        Self {
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            command: format!("cd benches && {command}"),
            processor: processor().unwrap_or("unknown".into()),
            cores: thread::available_parallelism().map_or(1, usize::from),
            system: output("uname", &["-srm"]).unwrap_or("unknown".into()),
            commit: output("git", &["describe", "--always", "--dirty"]).unwrap_or("unknown".into()),
            versions: versions(),
            load: [load(), String::new()],
            counted_seconds,
            repetitions,
        }
    }

    /// Notes what can be said only afterwards.
    pub fn close(&mut self) {
        self.load[1] = load();
    }

    /// For the foot of a plot.
    pub fn line(&self) -> String {
        let Self { processor, cores, date, commit, .. } = self;
        format!("{processor}, {cores} cores; {date}; smp-heap {commit}")
    }
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
}

fn versions() -> Vec<(String, String)> {
    let lock = include_str!("../../Cargo.lock");
    let mut versions = Vec::new();
    let mut name = None;
    for line in lock.lines() {
        let value = |key: &str| line.strip_prefix(key).map(|value| value.trim_matches('"').to_owned());
        if let Some(value) = value("name = ") {
            name = CRATES.contains(&value.as_str()).then_some(value);
        } else if let (Some(version), Some(name)) = (value("version = "), name.take()) {
            versions.push((name, version));
        }
    }
    let tools = [("rustc", "rustc", "-V"), ("cc", "cc", "--version"), ("libc", "ldd", "--version")];
    let tools = tools.iter().filter_map(|(name, tool, flag)| Some(((*name).to_owned(), output(tool, &[flag])?)));
    versions.extend(tools);
    if let Ok(version) = env::var(VERSION_VARIABLE) {
        versions.push(("zig".into(), version));
    }
    versions
}

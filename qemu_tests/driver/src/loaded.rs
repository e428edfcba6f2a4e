//! The whole of `cargo test`, again and again on one core that is busy with something else.
//!
//! A test that fails now and then fails there: CPUs of a guest are stopped in the middle of a step for a time slice and
//! more, in every place. Everything runs on one core (`taskset`), beside three loops that never end.

use std::fs::{self, File};
use std::io::{self, Error, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// Loops beside the tests.
const BUSY: usize = 3;

/// What a run that failed is told with: its lines that contain one of these.
const TELLING: [&str; 5] = ["FAILED", "panicked at", "test result: F", "error: ", "hangs"];

/// A process that does not outlive this value.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Both fail only if the process is gone already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `command` so many times in a row on one busy core, tells of each run, and gives how many failed. Their whole
/// output is kept in files, which are named.
///
/// # Errors
/// What kept a run from being started.
pub fn loaded(command: &[&str], times: u32) -> io::Result<u32> {
    let core = first_core()?;
    let on_core = |words: &[&str]| {
        let mut taskset = Command::new("taskset");
        taskset.args(["-c", &core]).args(words).stdin(Stdio::null());
        taskset
    };
    // The loops end by themselves if this process is killed.
    let watch = format!("while kill -0 {}; do :; done 2>/dev/null", std::process::id());
    let busy = (0..BUSY).map(|_| on_core(&["sh", "-c", &watch]).spawn().map(Ended));
    let _busy = busy.collect::<io::Result<Vec<_>>>()?;
    let logs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/loaded");
    fs::create_dir_all(&logs)?;
    let mut failed = 0;
    for turn in 1..=times {
        let (log, started) = (logs.join(format!("run-{turn}.log")), Instant::now());
        let output = File::create(&log)?;
        let status = on_core(command).stdout(output.try_clone()?).stderr(output).status()?;
        let secs = started.elapsed().as_secs();
        if status.success() {
            println!("run {turn} of {times} on core {core} beside {BUSY} busy loops: ok, {secs} s");
            continue;
        }
        failed += 1;
        println!("run {turn} of {times}: FAILED after {secs} s ({status}), see {}", log.display());
        let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let telling = said.lines().filter(|line| TELLING.iter().any(|word| line.contains(word)));
        telling.for_each(|line| println!("  {line}"));
        io::stdout().flush()?;
    }
    println!("{failed} of {times} runs failed");
    Ok(failed)
}

/// The first core that this process may run on.
fn first_core() -> io::Result<String> {
    let status = fs::read_to_string("/proc/self/status")?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let first = list.and_then(|list| list.trim().split([',', '-']).next());
    first.map(str::to_owned).ok_or_else(|| Error::other("/proc/self/status names no core"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_fails_is_counted() -> io::Result<()> {
        assert_eq!(loaded(&["sh", "-c", "exit 3"], 2)?, 2);
        assert_eq!(loaded(&["sh", "-c", "test $(nproc) = 1"], 1)?, 0, "it runs on one core");
        Ok(())
    }
}

//! When a guest counts as hung.
//!
//! Not by the clock on the wall alone: a machine that has other things to do makes every guest take longer, and none of
//! them hangs. What counts is the processor time that QEMU was given. A loaded machine gives it later, but no guest
//! needs more of it, so a limit with some room for slower processors holds under any load; and a guest that spins for
//! ever uses its limit up at the speed at which it is let run. A guest that uses none and says nothing is asleep for
//! ever. A guest that is neither, as it wakes now and then for nothing, is ended by the wall's clock, late.
//!
//! The price: processor time is known on Linux only. Elsewhere a guest is taken to run all the time.

use core::time::Duration;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::{fs, thread};

/// A guest that used less than a hundredth of so much time, and said nothing in it, sleeps for ever.
const ASLEEP: Duration = Duration::from_secs(20);
/// How many times its limit a guest may take by the clock on the wall.
const WALL: u32 = 20;
/// Ticks of `/proc` in a second: Linux tells times to programs in these, whatever its own are.
const TICKS: u64 = 100;

/// What a guest has used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    /// Processor time on a processor.
    pub(crate) time: Duration,
    /// It could use more at this moment: a machine that does not let it run is no sleep.
    pub(crate) runs: bool,
}

/// Watches one guest.
#[derive(Debug)]
pub(crate) struct Patience {
    limit: Duration,
    /// When the guest was last seen to do something: by the wall's clock, and how much processor time it had used.
    awake: (Duration, Duration),
}

impl Patience {
    /// For a guest that may use so much processor time on each CPU.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, awake: (Duration::ZERO, Duration::ZERO) }
    }

    /// The guest has said something.
    pub(crate) fn heard(&mut self, elapsed: Duration) {
        self.awake.0 = elapsed;
    }

    /// Why the guest counts as hung, if it does: it was started `elapsed` ago and has `used` so much processor time.
    pub(crate) fn hung(&mut self, elapsed: Duration, used: Used) -> Option<String> {
        let asleep = ASLEEP.min(self.limit);
        let Used { time: used, runs } = used;
        if runs || used.saturating_sub(self.awake.1) >= asleep / 100 {
            self.awake = (elapsed, used);
        }
        let silent = elapsed.saturating_sub(self.awake.0);
        let (elapsed, secs) = (elapsed.as_secs_f32(), self.limit.as_secs_f32());
        if used >= self.limit {
            Some(format!("it has used {secs} s of processor time on a CPU, {elapsed:.1} s by the clock"))
        } else if silent >= asleep {
            Some(format!("it has been asleep for {:.1} s", silent.as_secs_f32()))
        } else if elapsed >= self.limit.as_secs_f32() * WALL as f32 {
            Some(format!("it runs for {elapsed:.1} s by the clock, with {:.1} s of processor time", used.as_secs_f32()))
        } else {
            None
        }
    }
}

/// The processor time that a child with so many busy threads has used on each processor: the most of what one thread
/// has used, and of what all have used, shared among those that can run at once. `None`: the system does not tell.
pub(crate) fn used(child: &Child, threads: u32) -> Option<Used> {
    let processors = thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
    let process = Path::new("/proc").join(child.id().to_string());
    let all = ticks(&process)? / u64::from(processors.min(threads).max(1));
    let tasks: Vec<PathBuf> = fs::read_dir(process.join("task")).ok()?.flatten().map(|task| task.path()).collect();
    let most = tasks.iter().filter_map(|task| ticks(task)).max().unwrap_or(0);
    let time = Duration::from_millis(all.max(most) * 1000 / TICKS);
    Some(Used { time, runs: tasks.iter().any(|task| runs(task)) })
}

/// Whether a thread runs, or would if the machine let it.
fn runs(directory: &Path) -> bool {
    let stat = fs::read_to_string(directory.join("stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with('R'))
}

/// User and system time of a process or thread, whose name may have any character in it.
fn ticks(directory: &Path) -> Option<u64> {
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// When a guest is given up that gets `share` hundredths of a processor, looked at each quarter of a second.
    fn given_up(share: u32, speaks: bool) -> (f32, String) {
        let mut patience = Patience::new(LIMIT);
        let mut elapsed = Duration::ZERO;
        loop {
            elapsed += Duration::from_millis(250);
            if speaks {
                patience.heard(elapsed);
            }
            // What is not given a processor is not seen to want one here; what is, sleeps half of the time.
            let used = Used { time: elapsed * share / 100, runs: false };
            if let Some(why) = patience.hung(elapsed, used) {
                return (elapsed.as_secs_f32(), why);
            }
        }
    }

    #[test]
    fn the_limit_follows_the_load() {
        assert_eq!(given_up(100, false).0, 60.0);
        assert_eq!(given_up(25, false).0, 240.0);
        // A guest gets a sixth of the machine's speed: six times as long.
        let (secs, why) = given_up(16, false);
        assert!((360.0..380.0).contains(&secs) && why.contains("used 60 s"), "{secs} {why}");
    }

    #[test]
    fn a_guest_that_sleeps_is_given_up_soon() {
        let (secs, why) = given_up(0, false);
        assert!(secs == 20.0 && why.contains("asleep"), "{secs} {why}");
        let (secs, why) = given_up(0, true);
        assert!(secs == 1200.0 && why.contains("by the clock"), "{secs} {why}");
    }

    #[test]
    fn a_guest_that_is_not_let_run_does_not_sleep() {
        let mut patience = Patience::new(LIMIT);
        let starved = Used { time: Duration::ZERO, runs: true };
        assert_eq!(patience.hung(Duration::from_secs(100), starved), None);
        assert_eq!(patience.hung(Duration::from_secs(110), Used { runs: false, ..starved }), None, "it wanted to run");
        assert!(patience.hung(Duration::from_secs(121), Used { runs: false, ..starved }).is_some());
    }

    #[test]
    fn processor_time_is_read_of_a_process_that_spins() {
        let spawned = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn();
        let Ok(mut child) = spawned else { panic!("no shell") };
        let enough = |used: Option<Used>| used.is_none_or(|used| used.runs && used.time >= Duration::from_millis(50));
        while !enough(used(&child, 1)) {
            thread::sleep(Duration::from_millis(10));
        }
        let ended = child.kill().and_then(|()| child.wait());
        assert!(ended.is_ok());
    }
}

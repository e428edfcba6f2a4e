//! Ends a test program in which a test hangs, and names the test.
//!
//! `cargo test` waits for a test for ever. Here a thread that is started before `main` watches the others: the harness
//! runs each test on a thread of its own that carries the test's name. A thread that is over its limit is sent a
//! signal, whose handler writes the name; then the program is aborted.
//!
//! The limit is processor time of the whole program, shared among the processors, so that a loaded machine gives a test
//! longer. A program that uses next to none is asleep for ever and is ended sooner. `SMP_HEAP_TEST_SECONDS` sets
//! another limit.
//!
//! The price: the time that the tests beside it take counts too, so the limit is generous; and it works on Linux only.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::borrow::ToOwned;
use std::collections::BTreeMap;
use std::string::String;
use std::time::Instant;
use std::vec::Vec;
use std::{env, format, fs, process, thread};

/// Processor time, shared among the processors, after which a test counts as hung.
const LIMIT_SECONDS: u32 = 180;
const VARIABLE: &str = "SMP_HEAP_TEST_SECONDS";
/// A program that used less than a hundredth of so much time sleeps for ever.
const ASLEEP: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(250);
/// Linux tells times to programs in hundredths of a second.
const TICK: Duration = Duration::from_millis(10);

/// The loader calls what stands here before `main`: the section is a list of pointers to functions of this type.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

extern "C" fn start() {
    let limit = match env::var(VARIABLE) {
        Err(_) => LIMIT_SECONDS,
        Ok(text) => text.parse().unwrap_or_else(|_| {
            write(&[VARIABLE, "=", &text, " is not a number\n"]);
            process::exit(2)
        }),
    };
    let handler = write_name as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler has the type of one, and nobody else uses this signal.
    unsafe { libc::signal(signal(), handler) };
    let watcher = thread::Builder::new().name("watchdog".to_owned());
    let started = watcher.spawn(move || watch(Duration::from_secs(u64::from(limit))));
    assert!(started.is_ok(), "the watchdog does not start");
}

fn signal() -> libc::c_int {
    libc::SIGRTMAX() - 1
}

/// A thread was seen for the first time: when, and how much processor time the program had used.
type Since = (Instant, Duration);

fn watch(limit: Duration) {
    let processors = thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
    // SAFETY: asks for the number of this thread.
    let own = [process::id(), unsafe { libc::gettid() }.unsigned_abs()];
    let mut seen: BTreeMap<u32, Since> = BTreeMap::new();
    let mut awake = (Instant::now(), Duration::ZERO);
    let asleep = ASLEEP.min(limit);
    loop {
        thread::sleep(LOOK);
        let (now, used) = (Instant::now(), used());
        let threads: Vec<u32> = threads().filter(|thread| !own.contains(thread)).collect();
        seen.retain(|thread, _| threads.contains(thread));
        threads.iter().for_each(|thread| _ = seen.entry(*thread).or_insert((now, used)));
        let used_by_all = used_by_all();
        // A thread that could run and is not let run does not sleep.
        let busy = used_by_all.saturating_sub(awake.1) >= asleep / 100 || threads.iter().any(|thread| runs(*thread));
        if seen.is_empty() || busy {
            awake = (now, used_by_all);
        }
        if now - awake.0 >= asleep {
            end("sleeps for ever", seen.keys());
        }
        let over = |(_, since): &(&u32, &Since)| (used.saturating_sub(since.1)) / processors >= limit;
        if seen.iter().any(|thread| over(&thread)) {
            end("is over its time", seen.iter().filter(over).map(|(thread, _)| thread));
        }
    }
}

fn threads() -> impl Iterator<Item = u32> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    tasks.filter_map(|task| task.file_name().to_str()?.parse().ok())
}

/// Processor time of this program.
fn used() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_ascii_whitespace();
    TICK * fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<u32>().ok()).sum()
}

/// Processor time of this program, of those that it started and waits for, a compiler say, and of those that they
/// started; also of those that have ended.
fn used_by_all() -> Duration {
    let programs: Vec<_> = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(times).collect();
    let (mut own, mut all) = (Vec::from([process::id()]), 0);
    while let Some(parent) = own.pop() {
        for (number, started_by, ticks) in &programs {
            all += if *number == parent { *ticks } else { 0 };
            if *started_by == parent {
                own.push(*number);
            }
        }
    }
    TICK * all
}

/// A program's number, that of the program that started it, and the ticks that it and the children that ended have
/// used.
fn times(program: fs::DirEntry) -> Option<(u32, u32, u32)> {
    let number = program.file_name().to_str()?.parse().ok()?;
    let stat = fs::read_to_string(program.path().join("stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let ticks = fields.get(11..15)?.iter().filter_map(|ticks| ticks.parse::<u32>().ok()).sum();
    Some((number, fields.get(1)?.parse().ok()?, ticks))
}

/// Whether a thread runs, or would if the machine let it.
fn runs(thread: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with('R'))
}

/// Has these threads write their names, and ends the program.
fn end<'a>(what: &str, threads: impl Iterator<Item = &'a u32>) -> ! {
    write(&["a test ", what, ": one of these hangs, most often the first\n"]);
    for thread in threads {
        WRITTEN.store(false, Ordering::Release);
        // SAFETY: a thread of this program that is there, or was; its handler writes and returns.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, process::id(), *thread, signal()) };
        // A thread that masks the signal says nothing; then the others do.
        let start = Instant::now();
        while sent == 0 && !WRITTEN.load(Ordering::Acquire) && start.elapsed() < Duration::from_secs(5) {
            thread::yield_now();
        }
    }
    process::abort()
}

static WRITTEN: AtomicBool = AtomicBool::new(false);

/// The handler.
extern "C" fn write_name(_: libc::c_int) {
    match thread::current().name() {
        Some(name) => write(&["  test ", name, "\n"]),
        None => write(&["  a thread without a name\n"]),
    }
    WRITTEN.store(true, Ordering::Release);
}

/// To standard error, past every lock.
fn write(parts: &[&str]) {
    for part in parts {
        // SAFETY: the bytes are a string's. What cannot be written is not worth failing for.
        unsafe { libc::write(2, part.as_ptr().cast(), part.len()) };
    }
}

mod tests {
    use super::*;

    /// Hangs if it is run by one of the tests below.
    #[test]
    #[ignore = "hangs, for the tests of the watchdog"]
    fn a_test_that_spins() {
        while env::var_os(VARIABLE).is_some() {
            core::hint::spin_loop();
        }
    }

    #[test]
    #[ignore = "hangs, for the tests of the watchdog"]
    fn a_test_that_sleeps() {
        while env::var_os(VARIABLE).is_some() {
            thread::park();
        }
    }

    /// Runs this very program with one of the tests above: it has to be ended, and to name the test.
    fn is_ended(test: &str) {
        let name = format!("{}::{test}", module_path!().split_once("::").map_or("", |(_, path)| path));
        let program = env::current_exe().unwrap_or_default();
        let mut command = process::Command::new(program);
        let ended = command.args(["--ignored", "--exact", &name]).env(VARIABLE, "1").output();
        let named = |output: &process::Output| {
            String::from_utf8_lossy(&output.stderr).contains(&format!("test {name}\n")) && !output.status.success()
        };
        assert!(ended.as_ref().is_ok_and(named), "{name}: {ended:?}");
    }

    #[test]
    fn a_test_that_spins_for_ever_is_named_and_ended() {
        is_ended("a_test_that_spins");
    }

    #[test]
    fn a_test_that_sleeps_for_ever_is_named_and_ended() {
        is_ended("a_test_that_sleeps");
    }

    #[test]
    fn a_limit_that_is_no_number_is_refused() {
        let program = env::current_exe().unwrap_or_default();
        let output = process::Command::new(program).arg("--list").env(VARIABLE, "1O").output();
        let said = output.as_ref().map(|output| String::from_utf8_lossy(&output.stderr));
        assert!(said.as_ref().is_ok_and(|said| said.contains("1O is not a number")), "{said:?}");
        assert!(output.is_ok_and(|output| !output.status.success()), "it went on");
    }
}

//! Runs the models of `src/models`, which exist only where the whole crate is compiled with `--cfg loom`: without it,
//! this test compiles and runs itself again, with it. Arguments and `LOOM_MAX_PREEMPTIONS` are passed on.
//! `MODEL_SECONDS` ends it, as a failure, when that much time is over.

#[cfg(loom)]
fn main() {
    let arguments = libtest_mimic::Arguments::from_args();
    if let Ok(seconds) = std::env::var("MODEL_SECONDS") {
        let Ok(seconds) = seconds.parse() else {
            eprintln!("MODEL_SECONDS={seconds} is not a number");
            std::process::exit(2);
        };
        std::thread::spawn(move || {
            std::thread::sleep(core::time::Duration::from_secs(seconds));
            eprintln!("panicked at the end of its time:\nno end after {seconds} s");
            std::process::exit(1);
        });
    }
    let trial = |(name, model): smp_heap::models::Model| {
        let name = name.trim_start_matches("smp_heap::models::");
        libtest_mimic::Trial::test(name, move || {
            model();
            Ok(())
        })
    };
    libtest_mimic::run(&arguments, smp_heap::models::all().map(trial).collect()).exit();
}

#[cfg(not(loom))]
#[path = "../again/mod.rs"]
mod again;

#[cfg(not(loom))]
fn main() -> std::process::ExitCode {
    again::with_cfg("loom", "models")
}

//! What the shared structures cost on 1 to 64 CPUs: the shipped heap on a simulated machine that counts locked
//! instructions, lines that go from CPU to CPU, and tries of locks.
//!
//! Would catch breaking: no count for an operation grows with the CPUs. Compiles itself again with `--cfg simulated`.

#![cfg_attr(
    simulated,
    expect(
        clippy::std_instead_of_core,
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "this runs on a host, and a failed check ends a test"
    )
)]

#[cfg(simulated)]
mod machine;
#[cfg(simulated)]
mod work;

#[cfg(simulated)]
fn main() -> std::process::ExitCode {
    work::run()
}

#[cfg(not(simulated))]
#[path = "../again/mod.rs"]
mod again;

#[cfg(not(simulated))]
fn main() -> std::process::ExitCode {
    again::with_cfg("simulated", "scaling")
}

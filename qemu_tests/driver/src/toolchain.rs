//! Which cargo and rustc build for bare metal.
//!
//! Three machines have to work: one where rustup brought the target; one whose toolchain holds the library's sources
//! and builds `core` and `alloc` from them; one where rustup has neither and the distribution's own toolchain, next in
//! `PATH`, has the sources. They are tried in that order, each `rustc` in turn, and if none fits the run fails with
//! the command that would help. Building `core` from sources on a stable compiler takes two environment variables;
//! they are given to the nested cargo alone, because in a configuration file they would rebuild the host's tests too.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Failure, qemu::in_path};

/// A toolchain that can build for a bare-metal target.
#[derive(Clone, Debug)]
pub struct BareMetal {
    target: String,
    cargo: PathBuf,
    rustc: PathBuf,
    route: Route,
}

#[derive(Clone, Debug)]
enum Route {
    /// The target's `core` and `alloc` came with the toolchain.
    Installed,
    /// They are built from the toolchain's library sources.
    FromSource(Linker),
}

#[derive(Clone, Debug)]
enum Linker {
    /// The toolchain finds its own.
    Own,
    /// `rust-lld` of another toolchain, by its directory.
    RustLld(PathBuf),
    /// The system's `ld.lld`.
    System,
}

impl BareMetal {
    /// Looks for a toolchain that can build for `target`.
    ///
    /// # Errors
    /// [`Failure::Missing`] with what was looked at.
    pub fn find(target: &str) -> Result<Self, Failure> {
        let mut looked_at = Vec::new();
        let candidates: Vec<Candidate> = candidates().collect();
        for candidate in &candidates {
            if candidate.has_target(target) {
                return Ok(candidate.take(target, Route::Installed));
            }
        }
        for candidate in &candidates {
            let why = match candidate.why_not_from_source() {
                None => match candidate.linker(&candidates) {
                    Some(linker) => return Ok(candidate.take(target, Route::FromSource(linker))),
                    None => "has the library sources but no linker (rust-lld or ld.lld)".to_owned(),
                },
                Some(why) => why,
            };
            looked_at.push(format!("  {} {why}", candidate.rustc.display()));
        }
        if looked_at.is_empty() {
            looked_at.push("  no rustc at all".to_owned());
        }
        Err(Failure::Missing(format!("no Rust toolchain here builds for {target}:\n{}", looked_at.join("\n"))))
    }

    /// The nested cargo, its environment freed of what the outer one put there for the host's build.
    #[must_use]
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        for name in [
            "RUSTUP_TOOLCHAIN",
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_BUILD_RUSTFLAGS",
            "LD_LIBRARY_PATH",
            "CARGO_BUILD_TARGET",
            "RUSTC_BOOTSTRAP",
        ] {
            command.env_remove(name);
        }
        command.env("RUSTC", &self.rustc);
        // Subcommands such as clippy are looked for in PATH, and have to belong to the same compiler.
        let mut in_front = Vec::new();
        if let Some(bin) = self.rustc.parent() {
            in_front.push(bin.to_owned());
            let rustdoc = bin.join("rustdoc");
            if rustdoc.is_file() {
                command.env("RUSTDOC", rustdoc);
            }
        }
        if let Route::FromSource(linker) = &self.route {
            command.env("RUSTC_BOOTSTRAP", "1").env("CARGO_UNSTABLE_BUILD_STD", "core,alloc");
            match linker {
                Linker::Own => {}
                Linker::RustLld(dir) => in_front.push(dir.clone()),
                Linker::System => {
                    let target = self.target.to_uppercase().replace('-', "_");
                    command.env(format!("CARGO_TARGET_{target}_LINKER"), "ld.lld");
                }
            }
        }
        command.env("PATH", with_path_behind(in_front));
        command
    }

    /// What the compiler calls itself, without the date.
    #[must_use]
    pub fn version(&self) -> String {
        let said = output(&self.rustc, &["--version"]).unwrap_or_default();
        said.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
    }

    /// One line that says which toolchain was chosen.
    #[must_use]
    pub fn describe(&self) -> String {
        let how = match &self.route {
            Route::Installed => "the target is installed",
            Route::FromSource(_) => "builds core and alloc from source",
        };
        format!("{} ({how})", self.rustc.display())
    }
}

struct Candidate {
    rustc: PathBuf,
    sysroot: PathBuf,
    /// Minor version of Rust 1.x.
    minor: u32,
}

/// The toolchain that runs this process, if cargo did start it, then every other one in `PATH`.
fn candidates() -> impl Iterator<Item = Candidate> {
    let beside_cargo = env::var_os("CARGO").map(|cargo| Path::new(&cargo).with_file_name("rustc"));
    let mut seen = Vec::new();
    env::var_os("RUSTC")
        .map(PathBuf::from)
        .into_iter()
        .chain(beside_cargo)
        .chain(in_path("rustc"))
        .filter_map(|rustc| Candidate::ask(&rustc))
        .filter(move |candidate| {
            let new = !seen.contains(&candidate.sysroot);
            seen.push(candidate.sysroot.clone());
            new
        })
}

impl Candidate {
    fn ask(rustc: &Path) -> Option<Self> {
        let sysroot = PathBuf::from(output(rustc, &["--print", "sysroot"])?);
        let version = output(rustc, &["--version"])?;
        let minor = version.split('.').nth(1)?.parse().ok()?;
        // A rustup proxy chooses anew in every call; the compiler it stands for does not.
        let own = sysroot.join("bin/rustc");
        let rustc = if own.is_file() { own } else { rustc.to_owned() };
        Some(Self { rustc, sysroot, minor })
    }

    fn has_target(&self, target: &str) -> bool {
        self.cargo().is_some() && self.sysroot.join("lib/rustlib").join(target).join("lib").is_dir()
    }

    fn why_not_from_source(&self) -> Option<String> {
        let oldest =
            env!("CARGO_PKG_RUST_VERSION").split('.').nth(1).and_then(|minor| minor.parse().ok()).unwrap_or(u32::MAX);
        let sources = self.sysroot.join("lib/rustlib/src/rust/library");
        if self.minor < oldest {
            Some(format!("is too old (1.{}, needs 1.{oldest})", self.minor))
        } else if self.cargo().is_none() {
            Some("has no cargo beside it".to_owned())
        } else if !sources.join("core/Cargo.toml").is_file() {
            Some("has neither the target nor the library sources".to_owned())
        } else {
            None
        }
    }

    fn cargo(&self) -> Option<PathBuf> {
        let cargo = self.rustc.with_file_name("cargo");
        cargo.is_file().then_some(cargo)
    }

    /// Directories of the toolchain that may hold `rust-lld`.
    fn rust_lld(&self) -> Option<PathBuf> {
        let dirs = self.sysroot.join("lib/rustlib").read_dir().ok()?;
        dirs.flatten().map(|dir| dir.path().join("bin")).find(|bin| bin.join("rust-lld").is_file())
    }

    fn linker(&self, all: &[Self]) -> Option<Linker> {
        if self.rust_lld().is_some() {
            return Some(Linker::Own);
        }
        all.iter()
            .find_map(Self::rust_lld)
            .map(Linker::RustLld)
            .or_else(|| in_path("ld.lld").next().map(|_| Linker::System))
    }

    fn take(&self, target: &str, route: Route) -> BareMetal {
        BareMetal {
            target: target.to_owned(),
            cargo: self.cargo().unwrap_or_else(|| "cargo".into()),
            rustc: self.rustc.clone(),
            route,
        }
    }
}

fn output(program: &Path, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

fn with_path_behind(mut dirs: Vec<PathBuf>) -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    dirs.extend(env::split_paths(&path));
    env::join_paths(dirs).unwrap_or(path)
}

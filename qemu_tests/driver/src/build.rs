//! Building the test kernels by a nested cargo, once per process, architecture and profile.
//!
//! A kernel is a `[[test]]` without harness of the kernel crate, so that plain cargo builds it; which file each became
//! is read from cargo's own messages. The profile is passed on the command line, not kept in the workspace's manifest:
//! the kernels want optimisation *with* checks, host tests want quick builds, and neither should have to agree.

use core::fmt::Write as _;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::{Arch, BareMetal, Failure, KERNELS, Kernel, Needs, Rows};

/// With how much optimisation and checking kernels are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Profile {
    /// Optimised, debug assertions and overflow checks on: the tests.
    Checked,
    /// Optimised as a release is: measurements and demonstrations.
    Fast,
    /// As [`Fast`](Self::Fast), with what records the heap's events.
    Traced,
    /// As [`Fast`](Self::Fast), with one allocation in many on pages of its own.
    Guarded,
    /// As [`Fast`](Self::Fast), with words in two halves, as processors without atomics of 64 bits have them.
    Halves,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Self::Checked => "kernel-checked",
            Self::Fast | Self::Traced | Self::Guarded | Self::Halves => "kernel-fast",
        }
    }

    /// The kernels' feature that it takes, beside none.
    fn feature(self) -> Option<&'static str> {
        match self {
            Self::Checked | Self::Fast | Self::Halves => None,
            Self::Traced => Some("trace"),
            Self::Guarded => Some("guard-pages"),
        }
    }

    fn config(self) -> &'static [&'static str] {
        match self {
            // Made at once, from nothing or because the heap has changed: nothing to keep, nor to inline across units.
            Self::Checked => &["inherits='dev'", "opt-level=2", "incremental=false", "lto='off'"],
            Self::Fast | Self::Traced | Self::Guarded | Self::Halves => {
                &["inherits='release'", "opt-level=3", "codegen-units=1"]
            }
        }
    }
}

/// What one nested cargo made, or why it made nothing; whoever comes while it works waits for it.
type Built = Arc<OnceLock<Result<BTreeMap<String, PathBuf>, Failure>>>;

/// The ELF file of `kernel`, built first if this process has not done so yet.
///
/// The checked profile builds at once all kernels that have rows, because a test run wants most of them; the fast one
/// builds the asked one alone, and kernels that are there boot meanwhile.
///
/// # Errors
/// [`Failure::Missing`] without a toolchain for the target, [`Failure::Build`] with the compiler's messages.
pub fn kernel_elf(kernel: &str, arch: Arch, profile: Profile) -> Result<PathBuf, Failure> {
    static DONE: Mutex<BTreeMap<(Arch, Profile, String), Built>> = Mutex::new(BTreeMap::new());
    let only = match profile {
        Profile::Checked => "",
        Profile::Fast | Profile::Traced | Profile::Guarded | Profile::Halves => kernel,
    };
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    let built = done.entry((arch, profile, only.to_owned())).or_default().clone();
    drop(done);
    match built.get_or_init(|| build(arch, profile, only)) {
        Err(failure) => Err(failure.clone()),
        Ok(elfs) => elfs
            .get(kernel)
            .cloned()
            .ok_or_else(|| Failure::Build(format!("no kernel is called `{kernel}`; there are: {:?}", elfs.keys()))),
    }
}

fn build(arch: Arch, profile: Profile, only: &str) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel/Cargo.toml");
    let toolchain = BareMetal::find(arch.target())?;
    let mut cargo = toolchain.cargo();
    cargo
        .args(["test", "--no-run", "--quiet", "--target", arch.target()])
        .args(["--message-format", "json-render-diagnostics"])
        .args(["--profile", profile.name()])
        .arg("--manifest-path")
        .arg(manifest);
    for setting in profile.config() {
        cargo.arg("--config").arg(format!("profile.{}.{setting}", profile.name()));
    }
    if profile == Profile::Halves {
        cargo.arg("--config").arg(format!("target.{}.rustflags=['--cfg', 'split_words']", arch.target()));
    }
    // Kernels over page tables of their own are behind a feature, as there are none for other architectures.
    if arch.has(Needs::PageTables) {
        cargo.args(["--features", "paging"]);
    }
    if only.is_empty() && arch == Arch::X86_64 {
        cargo.arg("--tests");
    } else if only.is_empty() {
        for kernel in booted(arch) {
            cargo.args(["--test", kernel]);
        }
    } else {
        cargo.args(["--test", only]);
        // The demonstration's kernels are behind a feature, as the tests can do without what they need.
        if only.starts_with("demo") {
            cargo.args(["--features", "demo"]);
        }
        if let Some(feature) = profile.feature() {
            cargo.args(["--features", feature]);
        }
    }
    let output = cargo.output().map_err(|error| Failure::Build(format!("{}: {error}", toolchain.describe())))?;
    if !output.status.success() {
        let mut text = format!("with {}\n", toolchain.describe());
        // Writing to a string does not fail.
        let _ = write!(text, "{}", String::from_utf8_lossy(&output.stderr));
        return Err(Failure::Build(text));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(executable).collect())
}

/// The kernels that have rows on an architecture, and the one that the tests of the harness boot.
fn booted(arch: Arch) -> BTreeSet<&'static str> {
    // What the environment says wrong, the test program has refused.
    let rows = Rows::from_env().unwrap_or(Rows::All);
    let has_rows = |kernel: &&Kernel| kernel.rows(rows).any(|(machine, _)| machine.arch() == arch);
    let checked = KERNELS.iter().filter(|kernel| kernel.profile == Profile::Checked);
    checked.filter(has_rows).map(Kernel::file).chain(["misbehave"]).collect()
}

/// Name and file of the kernel that one message of cargo is about, if it is about one.
///
/// Two strings are all that is wanted of the JSON, and cargo writes it without spaces: that is not worth a parser.
fn executable(message: &str) -> Option<(String, PathBuf)> {
    let file = string_after(message, "\"executable\":\"")?;
    let target = message.split_once("\"target\":{")?.1;
    let name = string_after(target, "\"name\":\"")?;
    Some((name, PathBuf::from(file)))
}

fn string_after(text: &str, key: &str) -> Option<String> {
    let mut found = String::new();
    let mut chars = text.split_once(key)?.1.chars();
    loop {
        match chars.next()? {
            '"' => return Some(found),
            '\\' => found.push(chars.next()?),
            other => found.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_executable_in_a_message() {
        let message = r#"{"reason":"compiler-artifact","package_id":"p","target":{"kind":["test"],"name":"boot"},"executable":"/a \"b\"/boot-1","fresh":true}"#;
        assert_eq!(executable(message), Some(("boot".to_owned(), PathBuf::from("/a \"b\"/boot-1"))));
        let library = r#"{"reason":"compiler-artifact","target":{"name":"core"},"executable":null}"#;
        assert_eq!(executable(library), None);
    }
}

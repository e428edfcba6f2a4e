//! The copy of the tree that has every bug in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::root;
use crate::table::{BUGS, Bug};

/// In a planted text: the condition that the bug is switched on.
const MARK: &str = "@bug";

/// What is no source.
const LEFT_OUT: [&str; 2] = ["target", ".git"];

/// The end of the library's `lib.rs`: which bug is switched on. None in the kernels that the driver's tests boot.
const SWITCH: &str = r#"
#[cfg(target_os = "none")]
pub(crate) mod sabotage {
    pub(crate) const fn is(_: usize) -> bool {
        false
    }
}
#[cfg(not(target_os = "none"))]
extern crate std as sabotage_std;
#[cfg(not(target_os = "none"))]
pub(crate) mod sabotage {
    use core::sync::atomic::{AtomicUsize, Ordering};
    static BUG: AtomicUsize = AtomicUsize::new(0);
    #[used]
    #[allow(unsafe_code)]
    #[unsafe(link_section = ".init_array")]
    static START: extern "C" fn() = start;
    extern "C" fn start() {
        let named = sabotage_std::env::var("SMP_HEAP_SABOTAGE").ok().and_then(|number| number.parse().ok());
        BUG.store(named.unwrap_or(0), Ordering::Relaxed);
    }
    use super::sabotage_std;
    pub(crate) fn is(number: usize) -> bool {
        BUG.load(Ordering::Relaxed) == number
    }
}
"#;

pub(crate) fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("sabotage")
}

/// Writes a file if that changes it, so that what depends on an unchanged one is not compiled again.
fn write(path: &Path, new: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|old| old == new) { Ok(()) } else { fs::write(path, new) }
}

fn copy(from: &Path, to: &Path, changed: &BTreeMap<PathBuf, String>) -> io::Result<()> {
    if from.is_dir() {
        fs::create_dir_all(to)?;
        return fs::read_dir(from)?.try_for_each(|entry| {
            let entry = entry?;
            let name = entry.file_name();
            if LEFT_OUT.iter().any(|left_out| name == *left_out) {
                return Ok(());
            }
            copy(&entry.path(), &to.join(name), changed)
        });
    }
    match changed.get(from) {
        Some(text) => write(to, text.as_bytes()),
        None => write(to, &fs::read(from)?),
    }
}

/// The condition, as the bug's file can ask for it.
fn condition(number: usize, bug: &Bug) -> String {
    if bug.file.starts_with("src/") {
        format!("crate::sabotage::is({number})")
    } else {
        format!("(std::env::var(\"SMP_HEAP_SABOTAGE\").as_deref() == Ok(\"{number}\"))")
    }
}

/// The files that have bugs, with all of them.
fn sabotaged() -> Result<BTreeMap<PathBuf, String>, String> {
    let mut files: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut faults = String::new();
    for (number, bug) in (1..).zip(BUGS).filter(|(_, bug)| bug.gap.is_none()) {
        let path = root().join(bug.file);
        if !files.contains_key(&path) {
            let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            files.insert(path.clone(), text);
        }
        let Some(text) = files.get_mut(&path) else { continue };
        if text.matches(bug.shipped).count() != 1 || !bug.planted.contains(MARK) {
            faults += &format!("{}: `{}` must be in {} exactly once\n", bug.name, bug.shipped, bug.file);
            continue;
        }
        *text = text.replacen(bug.shipped, &bug.planted.replace(MARK, &condition(number, bug)), 1);
    }
    if faults.is_empty() { Ok(files) } else { Err(faults) }
}

/// Every source that a test of the table may stand in, one behind the other.
fn sources(folder: &Path, text: &mut String) -> io::Result<()> {
    fs::read_dir(folder)?.try_for_each(|entry| {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, text)
        } else {
            text.push_str(&fs::read_to_string(&path).unwrap_or_default());
            Ok(())
        }
    })
}

/// Whether every bug's place is still there, and every test.
pub(crate) fn fits() -> Result<(), String> {
    sabotaged()?;
    let mut text = String::new();
    for folder in ["src", "tests/host", "qemu_tests/driver", "tools/viewer"] {
        sources(&root().join(folder), &mut text).map_err(|error| format!("{folder}: {error}"))?;
    }
    let stands = |test: &str| {
        let name = test.rsplit("::").next().unwrap_or(test);
        let quoted = |name: &str| text.contains(&format!("\"{name}\""));
        text.contains(&format!("fn {name}(")) || test.strip_prefix("harness/").is_some_and(quoted) || quoted(test)
    };
    let gone: Vec<&str> = BUGS.iter().map(|bug| bug.test).filter(|test| !stands(test)).collect();
    if gone.is_empty() { Ok(()) } else { Err(format!("there are no such tests: {gone:?}")) }
}

/// Makes the copy, or brings it up to date.
pub(crate) fn make() -> Result<(), String> {
    let mut files = sabotaged()?;
    let lib = root().join("src/lib.rs");
    let text = fs::read_to_string(&lib).map_err(|error| error.to_string())?;
    files.entry(lib).or_insert(text).push_str(SWITCH);
    copy(root(), &target().join("tree"), &files).map_err(|error| format!("the copy of the tree: {error}"))
}

//! Breaks the shipped code, one line at a time, and expects a model to notice: `cargo test --test plants`.
//!
//! Each plant of the table is a test. It replaces a piece of text, which must be there exactly once, in a copy of the
//! tree under `target`, compiles that, and runs the one model that should find it. The test fails if the model passes,
//! or if the plant does not compile.

#![expect(
    clippy::std_instead_of_core,
    clippy::unwrap_used,
    reason = "this runs on a host, and a failed check ends a test"
)]

mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use libtest_mimic::{Arguments, Failed, Trial};
use table::{PLANTS, Plant};

/// What a copy of the tree needs.
const PARTS: [&str; 11] = [
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    "README.md",
    "docs",
    "examples",
    "src",
    "tests",
    "memory_maps",
    "qemu_tests",
    "tools",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("plants")
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    if !from.is_dir() {
        // An unchanged file keeps its time, so that what depends on it is not compiled again.
        let (new, old) = (fs::read(from)?, fs::read(to).ok());
        return if old.as_ref() == Some(&new) { Ok(()) } else { fs::write(to, new) };
    }
    fs::create_dir_all(to)?;
    fs::read_dir(from)?.try_for_each(|entry| {
        let entry = entry?;
        if entry.file_name() == "target" { Ok(()) } else { copy(&entry.path(), &to.join(entry.file_name())) }
    })
}

/// What the plant's file is compiled with.
fn flags(plant: &Plant) -> &'static str {
    if plant.file.ends_with("sync/split.rs") { "--cfg loom --cfg split_words" } else { "--cfg loom" }
}

fn cargo(tree: &Path, flags: &str, arguments: &[&str]) -> Result<(bool, String), Failed> {
    let output = Command::new(env!("CARGO"))
        .args(["test", "--quiet", "--package", "smp-heap", "--test", "models"])
        // Compiling takes longer than finding.
        .args([
            "--config",
            "profile.dev.package.smp-heap.opt-level=0",
            "--config",
            "profile.dev.package.smp-heap.debug=0",
        ])
        .args(["--features", "model-checker", "--target-dir"])
        .arg(target().join("build"))
        .args(arguments)
        .current_dir(tree)
        .env("RUSTFLAGS", flags)
        .env("RUST_BACKTRACE", "0")
        .env("MODEL_SECONDS", "100")
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.success(), text))
}

/// The shipped file, which must have the plant's place exactly once.
fn shipped(plant: &Plant) -> Result<String, Failed> {
    let text = fs::read_to_string(root().join("src").join(plant.file))?;
    if text.matches(plant.shipped).count() != 1 {
        return Err(format!("`{}` must be in src/{} exactly once", plant.shipped, plant.file).into());
    }
    Ok(text)
}

/// Every plant's place is there.
fn fits() -> Result<(), Failed> {
    let missing: Vec<String> = PLANTS
        .iter()
        .filter_map(|plant| shipped(plant).err())
        .filter_map(|failed| failed.message().map(str::to_owned))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(missing.join("\n").into()) }
}

/// Plants a bug, sees it found, and takes it out again.
fn plant(plant: &Plant) -> Result<(), Failed> {
    let tree = target().join("tree");
    fs::create_dir_all(&tree)?;
    for part in PARTS {
        copy(&root().join(part), &tree.join(part))?;
    }
    let text = shipped(plant)?;
    fs::write(tree.join("src").join(plant.file), text.replacen(plant.shipped, plant.planted, 1))?;
    let (compiled, errors) = cargo(&tree, flags(plant), &["--no-run"])?;
    if !compiled {
        return Err(format!("does not compile:\n{errors}").into());
    }
    let (passed, output) = cargo(&tree, flags(plant), &["--", "--exact", plant.model])?;
    if passed {
        return Err(format!("{} did not notice:\n{output}", plant.model).into());
    }
    let mut said = output.lines().skip_while(|line| !line.contains("panicked at "));
    let why = said.nth(1).or_else(|| output.lines().last()).unwrap_or_default();
    println!("{}: {} says: {why}", plant.name, plant.model);
    Ok(())
}

fn main() {
    let mut arguments = Arguments::from_args();
    // One tree.
    arguments.test_threads = Some(1);
    let mut trials = vec![Trial::test("fits", fits)];
    trials.extend(PLANTS.iter().map(|one| Trial::test(one.name, || plant(one))));
    libtest_mimic::run(&arguments, trials).exit();
}

//! The table of instruction budgets: what a kernel measured, held against what is committed.
//!
//! A kernel prints `MEASURED <instructions> <locked> <held> <name>` for each operation; the table is a text file beside
//! the kernels for each architecture, a line for each mode and operation. One number serves all CPU counts: the most
//! that any of them needs. More than the budget is a failure, and so is an operation that has no budget. The compiler
//! decides how many instructions a path has, so the table names the one it belongs to; under another one each number
//! may be exceeded by [`TOLERANCE`] in a hundred and [`SLACK`], except locked instructions, which no compiler adds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use crate::Arch;

/// What another compiler may make worse, in a hundred.
const TOLERANCE: u32 = 15;
/// And in instructions.
const SLACK: u32 = 5;
/// What the names of operations have in them that one CPU alone cannot do.
const TWO_CPUS: &str = "of another CPU";

/// Where the table of an architecture is.
fn file(arch: Arch) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(match arch {
        Arch::X86_64 => "../kernel/budgets.txt",
        Arch::Aarch64 => "../kernel/budgets-aarch64.txt",
        Arch::Riscv64 => "../kernel/budgets-riscv64.txt",
    })
}

/// One operation's figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Instructions from the call to the return.
    pub instructions: u32,
    /// Of these, how many lock memory.
    pub locked: u32,
    /// The longest stretch in which a cache is held.
    pub held: u32,
}

/// Figures by mode and operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The compiler they belong to.
    pub compiler: String,
    rows: BTreeMap<(String, String), Figures>,
}

impl Table {
    /// An empty table for the kernels that `compiler` builds.
    #[must_use]
    pub fn new(compiler: String) -> Self {
        Self { compiler, rows: BTreeMap::new() }
    }

    /// The committed one.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn read(arch: Arch) -> Result<Self, String> {
        let file = file(arch);
        let text = std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut table = Self::default();
        for (line, number) in text.lines().zip(1..) {
            if let Some(compiler) = line.strip_prefix("compiler: ") {
                compiler.clone_into(&mut table.compiler);
            } else if !line.is_empty() && !line.starts_with('#') {
                let wrong =
                    || format!("line {number} of the budgets is not `mode instructions locked held name`: {line}");
                let (mode, rest) = line.trim().split_once(' ').ok_or_else(wrong)?;
                let (figures, name) = figures(rest).ok_or_else(wrong)?;
                table.rows.insert((mode.to_owned(), name.to_owned()), figures);
            }
        }
        if table.compiler.is_empty() { Err("the budgets name no compiler".to_owned()) } else { Ok(table) }
    }

    /// Takes in what a kernel said: the most of what is there already and this. Gives the number of operations.
    pub fn add(&mut self, mode: &str, output: &[String]) -> usize {
        let measured = output.iter().filter_map(|line| figures(line.strip_prefix("MEASURED ")?));
        measured
            .map(|(new, name)| {
                let row = self.rows.entry((mode.to_owned(), name.to_owned())).or_default();
                row.instructions = row.instructions.max(new.instructions);
                row.locked = row.locked.max(new.locked);
                row.held = row.held.max(new.held);
            })
            .count()
    }

    /// The modes that have budgets.
    #[must_use]
    pub fn modes(&self) -> BTreeSet<&str> {
        self.rows.keys().map(|(mode, _)| mode.as_str()).collect()
    }

    /// Takes in how long things are; they stand as a mode of their own, bytes where others have instructions.
    pub fn add_sizes(&mut self, sizes: &[(&str, u32)]) {
        for &(name, len) in sizes {
            let figures = Figures { instructions: len, ..Figures::default() };
            self.rows.insert(("size".to_owned(), name.to_owned()), figures);
        }
    }

    /// Writes the table to its file.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, arch: Arch) -> std::io::Result<()> {
        std::fs::write(file(arch), self.text(arch))
    }

    /// The table as its file has it.
    #[must_use]
    pub fn text(&self, arch: Arch) -> String {
        let cpus = match arch {
            Arch::X86_64 | Arch::Aarch64 => "The most on 1, 2, 4 and 8 CPUs",
            Arch::Riscv64 => "On one CPU: QEMU 7.2 starts no second one while it counts",
        };
        let locks = match arch {
            Arch::X86_64 => "those that lock memory",
            Arch::Aarch64 => "exclusive stores, each of which ends an atomic change of memory",
            Arch::Riscv64 => "AMOs and conditional stores, each of which is or ends an atomic change of memory",
        };
        let mut text = format!(
            "# Instructions of each operation of the heap; of these \"locked\",\n\
             # {locks};\n\
             # and the longest stretch in which a cache is held. {cpus}.\n\
             # By kernel `instructions`. What is over its budget fails the test of that name.\n\
             # Rows of `size` are bytes of a release kernel.\n\
             # Made by `cargo run -p smp-heap-qemu --bin budgets -- --arch {arch} --write`.\n\
             compiler: {}\n\n# {:<6} {:>12} {:>6} {:>7} operation\n",
            self.compiler, "mode", "instructions", "locked", "held"
        );
        for ((mode, name), figures) in &self.rows {
            text +=
                &format!("{mode:<8} {:>12} {:>6} {:>7} {name}\n", figures.instructions, figures.locked, figures.held);
        }
        text
    }

    /// Holds what was measured in one mode, on so many CPUs, against these budgets.
    ///
    /// # Errors
    /// A table of what is over its budget, has none, or has one and was not measured.
    pub fn judge(&self, measured: &Self, mode: &str, cpus: u32) -> Result<(), String> {
        let may = |budget: u32| {
            if self.compiler == measured.compiler { budget } else { budget + budget * TOLERANCE / 100 + SLACK }
        };
        let mut over = String::new();
        for ((mode, name), is) in &measured.rows {
            let verdict = match self.rows.get(&(mode.clone(), name.clone())) {
                None => "no budget".to_owned(),
                Some(budget) => {
                    let fits = is.instructions <= may(budget.instructions)
                        && is.locked <= budget.locked
                        && is.held <= may(budget.held);
                    if fits {
                        continue;
                    }
                    format!("{:>9} {:>6} {:>7}", budget.instructions, budget.locked, budget.held)
                }
            };
            over += &format!("{:>9} {:>6} {:>7} | {verdict} | {mode}: {name}\n", is.instructions, is.locked, is.held);
        }
        let due = self.rows.iter().filter(|((of, name), _)| of == mode && (cpus > 1 || !name.contains(TWO_CPUS)));
        for (key, budget) in due.filter(|(key, _)| !measured.rows.contains_key(*key)) {
            over += &format!(
                "{:>24} | {:>9} {:>6} {:>7} | {mode}: {}\n",
                "not measured", budget.instructions, budget.locked, budget.held, key.1
            );
        }
        if over.is_empty() {
            return Ok(());
        }
        Err(format!(
            "not within the budgets (they are for {}, this is {})\n   measured: instructions, locked, held | budget | operation\n{over}\
             `cargo run -p smp-heap-qemu --bin budgets -- --arch ARCH` shows all, with --write it makes them the budgets",
            self.compiler, measured.compiler
        ))
    }
}

/// Three numbers and a name.
fn figures(text: &str) -> Option<(Figures, &str)> {
    let mut rest = text.trim_start();
    let mut next = || {
        let (number, behind) = rest.split_once(' ')?;
        rest = behind.trim_start();
        number.parse().ok()
    };
    let figures = Figures { instructions: next()?, locked: next()?, held: next()? };
    Some((figures, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(compiler: &str, line: &str) -> Table {
        let mut table = Table::new(compiler.to_owned());
        assert_eq!(table.add("pinned", &["hello".to_owned(), format!("MEASURED {line}")]), 1);
        table
    }

    #[test]
    fn a_table_is_read_as_it_is_written() {
        let table = measured("rustc 1.0", "41 0 7 alloc 64, hit");
        for arch in Arch::ALL {
            assert_eq!(Table::parse(&table.text(arch)), Ok(table.clone()));
        }
        assert!(Table::parse("compiler: x\npinned 1 2 alloc").is_err());
        assert!(Table::parse("").is_err());
    }

    #[test]
    fn more_than_the_budget_fails_but_for_another_compiler() {
        let budgets = measured("rustc 1.0", "100 1 40 free");
        let judge = |compiler, line| budgets.judge(&measured(compiler, line), "pinned", 2).is_ok();
        assert!(judge("rustc 1.0", "100 1 40 free") && judge("rustc 1.0", "90 0 30 free"));
        for line in ["101 1 40 free", "100 2 40 free", "100 1 41 free", "1 0 0 unknown"] {
            assert!(!judge("rustc 1.0", line), "{line}");
        }
        assert!(judge("rustc 2.0", "120 1 51 free"));
        for line in ["121 1 40 free", "100 2 40 free", "100 1 52 free"] {
            assert!(!judge("rustc 2.0", line), "{line}");
        }
    }
    #[test]
    fn a_budget_that_was_not_measured_fails() {
        let mut budgets = measured("rustc 1.0", "100 1 40 free");
        let _ = budgets.add("pinned", &["MEASURED 50 1 40 free 24 of another CPU".to_owned()]);
        let only = measured("rustc 1.0", "100 1 40 free");
        assert_eq!(budgets.judge(&only, "pinned", 1), Ok(()), "one CPU has no other");
        let judged = budgets.judge(&only, "pinned", 2);
        assert!(judged.as_ref().is_err_and(|why| why.contains("not measured")), "{judged:?}");
        assert!(budgets.judge(&Table::new("rustc 1.0".to_owned()), "pinned", 1).is_err(), "nothing was measured");
    }
}

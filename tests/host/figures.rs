//! Figures in documents, held against what makes them: the budgets that a kernel is counted against, the constants in
//! the sources, and the heap itself. A figure that changes in one place fails here until it is written anew.

use std::fs;
use std::path::Path;

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

/// A row of the budgets: instructions, of these the locked ones, and those with a cache held.
fn budget(mode: &str, operation: &str) -> [u64; 3] {
    let text = read("qemu_tests/kernel/budgets.txt");
    let row = text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let is_mode = words.next() == Some(mode);
        let figures = [(); 3].map(|()| words.next().and_then(|word| word.parse().ok()));
        (is_mode && words.eq(operation.split(' '))).then_some(figures)
    });
    row.unwrap_or_else(|| panic!("no budget of `{mode}` for `{operation}`")).map(Option::unwrap)
}

/// The value of a constant in a source, which is a sum of products of numbers.
fn constant(file: &str, name: &str) -> u64 {
    let text = read(file);
    let start = text.split_once(&format!("const {name}: ")).unwrap_or_else(|| panic!("no {name} in {file}")).1;
    let value = start.split_once('=').unwrap().1.split_once(';').unwrap().0;
    let digits = |factor: &str| factor.chars().filter(char::is_ascii_digit).collect::<String>().parse::<u64>().unwrap();
    if let Some((base, shift)) = value.split_once("<<") {
        return digits(base) << digits(shift);
    }
    value.split('+').map(|product| product.split('*').map(digits).product::<u64>()).sum()
}

/// A number as documents write it.
fn written(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap()).collect();
    groups.join(",")
}

#[track_caller]
fn says(file: &str, sentence: &str) {
    // A sentence may go on in the next line of a comment.
    let text = read(file).replace("\n    /// ", " ").replace("\n/// ", " ").replace("\n//! ", " ");
    assert!(text.contains(sentence), "{file} should say: {sentence}");
}

#[test]
fn the_cost_of_a_pair_is_the_budgets() {
    let [alloc, free] = ["alloc 64, hit", "free 64, hit"].map(|operation| budget("pinned", operation));
    assert_eq!((alloc[1], free[1]), (0, 0), "locked instructions under a pin");
    let pair = format!("take {} and {} instructions with no locked one", alloc[0], free[0]);
    says("README.md", &pair);
    for (mode, name) in [("hint", "hint"), ("masked", "interrupts masked"), ("pinned", "never preempts")] {
        let [alloc, free] = ["alloc 64, hit", "free 64, hit"].map(|operation| budget(mode, operation));
        let locked = if alloc[1] + free[1] == 0 { "0".to_owned() } else { format!("{} and {}", alloc[1], free[1]) };
        says("docs/identity.md", &format!("| {name} | {} | {} | {locked} |", alloc[0], free[0]));
    }
}

#[test]
fn the_longest_holds_are_the_budgets() {
    let held = [5, 20, 80].map(|mib| {
        let operation = format!("free of each slab's last block, {mib} MiB held");
        ["hint", "masked", "pinned"].into_iter().map(|mode| budget(mode, &operation)[2]).max().unwrap()
    });
    let [few, some, many] = held.map(written);
    says("docs/verification.md", &format!("is {few} instructions with 5 MiB in slabs, {some} with 20, {many} with 80"));
    let bound = constant("qemu_tests/kernel/kernels/instructions.rs", "LONGEST_HOLD");
    says("docs/verification.md", &format!("Asserted: {},", written(bound)));
    assert!(held.into_iter().all(|held| held <= bound), "{held:?} are above {bound}");
}

#[test]
fn waits_are_bounded_as_they_say() {
    let lock = written(constant("src/base/sync/mod.rs", "SPIN_LIMIT"));
    let gate = constant("src/heap/gate.rs", "WAIT_LIMIT") / 1_000_000;
    let wait =
        format!("A wait for a lock of the heap is at most {lock} looks, a wait at the gate some {gate} million.");
    says("docs/contexts.md", &wait);
}

/// Lengths of the blocks that serve every size up to the longest class.
#[cfg(not(feature = "debug-heap"))]
#[test]
fn there_are_as_many_classes_as_they_say() {
    use crate::common::{Books, layout};
    use smp_heap::{Heap, Hint, cpu::UnknownCpu};

    let heap = Heap::<_, _, 1>::new(Books::default(), Hint(UnknownCpu));
    let mut lengths = std::collections::BTreeSet::new();
    for size in 1..=32 << 10 {
        let layout = layout(size, 1);
        let block = heap.alloc(layout).unwrap();
        lengths.insert(block.len());
        // SAFETY: just allocated, with this Layout.
        unsafe { heap.free(block.cast(), layout) };
    }
    assert_eq!(lengths.last(), Some(&(32 << 10)));
    says("README.md", &format!("has powers of two where this has {} classes", lengths.len()));
    says("src/lib.rs", &format!("{} classes, four to a doubling", lengths.len()));
}

#[test]
fn the_declared_rust_version_is_the_same_everywhere() {
    let version = env!("CARGO_PKG_RUST_VERSION");
    says("README.md", &format!("Rust {version} or newer."));
}

#[test]
fn the_debugging_levels_keep_what_they_say() {
    let [places, longest, poison, back] =
        ["PLACES", "HELD_LEN", "POISON_LEN", "BACK_LEN"].map(|name| constant("src/harden/debug.rs", name));
    let (kib, all) = (longest / 1024, places * longest / 1024);
    says(
        "docs/hardening.md",
        &format!("up to {places} blocks of up to {kib} KiB with their frames (so at most {all} KiB)"),
    );
    says("docs/hardening.md", &format!("the first {} KiB of a freed block are `0xd5`", poison / 1024));
    says("docs/hardening.md", &format!("and {back} bytes behind it"));
}

/// The functions of a table in the design's *Two ways through the code*, with their files.
fn hops(design: &str, from: &str) -> Vec<(String, String)> {
    let table = design.split_once(from).unwrap().1.split_once("|---|---|---|\n").unwrap().1;
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    let cells = rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    let name = |cell: &str| cell.trim_matches('`').to_owned();
    cells.flat_map(|cells| cells[2].split(", ").map(|hop| (name(cells[1]), name(hop))).collect::<Vec<_>>()).collect()
}

#[test]
fn the_ways_through_the_code_are_there_and_as_long_as_said() {
    let design = read("docs/design.md");
    for from in ["From `dealloc` of the last", "From `alloc` in an empty heap"] {
        let hops = hops(&design, from);
        for (file, hop) in &hops {
            assert!(read(&format!("src/{file}")).contains(&format!("fn {hop}")), "no {hop} in {file}");
        }
        let files: std::collections::BTreeSet<&String> = hops.iter().map(|(file, _)| file).collect();
        let said = design.split_once(from).unwrap().1.split_once(".\n").unwrap().0;
        assert!(said.ends_with(&format!("{} functions in {} files", hops.len(), files.len())), "{from}{said}");
    }
}

/// Lines of code in a folder, without comments, blank lines and tests.
fn lines_of_code(folder: &Path) -> usize {
    let mut count = 0;
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let is_test = ["tests.rs", "model.rs"].iter().any(|name| path.ends_with(name));
        if path.is_dir() {
            count += lines_of_code(&path);
        } else if !is_test {
            let text = fs::read_to_string(path).unwrap();
            let lines = text.lines().take_while(|line| !line.contains("mod tests {")).map(str::trim);
            count += lines.filter(|line| !line.is_empty() && !line.starts_with("//")).count();
        }
    }
    count
}

#[test]
fn the_rooms_are_as_long_as_they_say() {
    let design = read("docs/design.md");
    let table = design.split_once("| room | lines |").unwrap().1.split_once("\n\n").unwrap().0;
    let rows: Vec<_> = table.lines().filter(|row| row.starts_with("| `")).collect();
    assert!(rows.len() > 10, "{rows:?}");
    for row in rows {
        let cells: Vec<_> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        let (said, is) = (
            cells[2].parse::<usize>().unwrap(),
            lines_of_code(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(cells[1])),
        );
        assert!(said.abs_diff(is) * 20 <= is, "{} has {is} lines, not {said}", cells[1]);
    }
}

//! Figures in documents, held against what makes them: the budgets that a kernel is counted against, the constants in
//! the sources, and the heap itself. A figure that changes in one place fails here until it is written anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

/// Of each architecture, its name and the file that has its budgets.
const BUDGETS: [(&str, &str); 3] = [
    ("x86_64", "qemu_tests/kernel/budgets.txt"),
    ("aarch64", "qemu_tests/kernel/budgets-aarch64.txt"),
    ("riscv64", "qemu_tests/kernel/budgets-riscv64.txt"),
];

/// By mode and operation: instructions, of these the locked ones, and those with a cache held.
type Budgets = BTreeMap<(String, String), [u64; 3]>;

fn budgets(file: &str) -> Budgets {
    let text = read(file);
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#') && !line.contains("compiler: "));
    lines
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let figures = [1, 2, 3].map(|at: usize| words[at].parse().unwrap());
            ((words[0].to_owned(), words[4..].join(" ")), figures)
        })
        .collect()
}

/// A row of the budgets on x86-64.
fn budget(mode: &str, operation: &str) -> [u64; 3] {
    row(&budgets(BUDGETS[0].1), mode, operation)
}

fn row(budgets: &Budgets, mode: &str, operation: &str) -> [u64; 3] {
    let key = (mode.to_owned(), operation.to_owned());
    *budgets.get(&key).unwrap_or_else(|| panic!("no budget of `{mode}` for `{operation}`"))
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
        let pairs = BUDGETS.map(|(_, file)| {
            let of_arch = budgets(file);
            ["alloc 64, hit", "free 64, hit"].map(|operation| row(&of_arch, mode, operation))
        });
        let locked = pairs[0].map(|figures| figures[1]);
        assert!(pairs.iter().all(|pair| pair.map(|figures| figures[1]) == locked), "{mode}: locked on some only");
        let cells = pairs.map(|[alloc, free]| format!("{} and {}", alloc[0], free[0])).join(" | ");
        let locked = if locked == [0, 0] { "0".to_owned() } else { format!("{} and {}", locked[0], locked[1]) };
        says("docs/identity.md", &format!("| {name} | {cells} | {locked} |"));
    }
}

#[test]
fn the_time_of_masking_in_an_emulator_is_the_kernels() {
    let [least, most] =
        ["LEAST", "MOST"].map(|name| constant("qemu_tests/kernel/kernels/pin_times.rs", name) as f64 / 100.0);
    says(
        "docs/identity.md",
        &format!("and fails if masking takes less than {least} times the hint's time, or more than {most}"),
    );
}

/// The table of the budgets, as a document has it.
fn table_of_budgets() -> String {
    let all = BUDGETS.map(|(_, file)| budgets(file));
    let operations: BTreeSet<&String> =
        all.iter().flat_map(BTreeMap::keys).filter(|(mode, _)| mode != "size").map(|(_, name)| name).collect();
    let mut table = "| instructions, locked | x86_64 pinned | hint | aarch64 pinned | hint | riscv64 pinned | hint |\n\
                     |---|---:|---:|---:|---:|---:|---:|\n"
        .to_owned();
    for operation in operations {
        table += &format!("| {operation} |");
        for (of_arch, mode) in all.iter().flat_map(|of_arch| ["pinned", "hint"].map(|mode| (of_arch, mode))) {
            table += &match of_arch.get(&(mode.to_owned(), operation.clone())) {
                Some([instructions, locked, _]) => format!(" {}, {} |", written(*instructions), written(*locked)),
                None => " - |".to_owned(),
            };
        }
        table.push('\n');
    }
    table
}

#[test]
fn the_table_of_the_guest_is_the_budgets() {
    says("docs/performance.md", &table_of_budgets());
    let [one, four] = ["", " in each of 4 regions"]
        .map(|more| [16, 128].map(|holes| written(budget("hint", &format!("map past {holes} holes{more}"))[0])));
    says("docs/performance.md", &format!("with every hole too short: {} instructions past the 16 holes", one[0]));
    says(
        "docs/performance.md",
        &format!("and {} past those of four regions; {} and {} past 128 holes", four[0], one[1], four[1]),
    );
    let [all, repeated] = ["alloc 40000", "alloc 40000, hit"].map(|operation| budget("pinned", operation)[0]);
    says("docs/performance.md", &format!("takes {all}, or {repeated} of a length just freed"));
    let sizes = BUDGETS.map(|(arch, file)| {
        let of_arch = budgets(file);
        let [code, bss] = ["code, in bytes", ".bss for 8 CPUs, in bytes"].map(|what| row(&of_arch, "size", what)[0]);
        format!("| {arch} | {} | {} |", written(code), written(bss))
    });
    says("docs/performance.md", &sizes.join("\n"));
}

/// What words in two halves cost, by operations whose figures are the same on any number of CPUs.
fn table_of_halves() -> String {
    let all = [BUDGETS[0], BUDGETS[1]].map(|(_, file)| budgets(file));
    let operations = [
        "alloc 64, hit",
        "free 64, hit",
        "alloc 24, longest",
        "free 24, longest",
        "free 24 of another CPU, shortest",
        "alloc 40000",
        "free of each slab's last block, 20 MiB held",
    ];
    let mut table = "| instructions, locked | x86_64 whole | in halves | aarch64 whole | in halves |\n\
                     |---|---:|---:|---:|---:|\n"
        .to_owned();
    for operation in operations {
        table += &format!("| {operation} |");
        for (of_arch, mode) in all.iter().flat_map(|of_arch| ["pinned", "halves"].map(|mode| (of_arch, mode))) {
            let [instructions, locked, _] = row(of_arch, mode, operation);
            table += &format!(" {}, {} |", written(instructions), written(locked));
        }
        table.push('\n');
    }
    table
}

#[test]
fn the_price_of_halves_is_the_budgets() {
    says("docs/performance.md", &table_of_halves());
}

/// What a hit takes under each pin.
fn table_of_pins() -> String {
    let all = BUDGETS.map(|(_, file)| budgets(file));
    let pins = [
        ("none", "bare"),
        ("never preempts", "pinned"),
        ("preemption counter", "counted"),
        ("interrupts masked", "masked"),
        ("hint", "hint"),
    ];
    let mut table = "| instructions, locked | x86_64 alloc | free | aarch64 alloc | free | riscv64 alloc | free |\n\
                     |---|---:|---:|---:|---:|---:|---:|\n"
        .to_owned();
    for (pin, mode) in pins {
        table += &format!("| {pin} |");
        for (of_arch, call) in all.iter().flat_map(|of_arch| ["alloc", "free"].map(|call| (of_arch, call))) {
            let [instructions, locked, _] = row(of_arch, mode, &format!("{call} 64, hit"));
            table += &format!(" {instructions}, {locked} |");
        }
        table.push('\n');
    }
    table
}

#[test]
fn the_price_of_each_pin_is_the_budgets() {
    says("docs/performance.md", &table_of_pins());
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
    let gate = constant("src/base/tuning.rs", "WAIT_LIMIT") / 1_000_000;
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

    let heap = Heap::<_, _, 2>::new(Books::default(), Hint(UnknownCpu));
    let mut lengths = BTreeSet::new();
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

/// How long a heap is, before it has memory and without what it takes of that for each CPU later.
#[cfg(all(target_pointer_width = "64", not(any(feature = "hardened", feature = "trace"))))]
#[test]
fn a_heap_is_as_long_as_they_say() {
    use smp_heap::{Heap, Hint, RegionProvider, cpu::UnknownCpu};

    type Of<const CPUS: usize> = Heap<RegionProvider<4>, Hint<UnknownCpu>, CPUS>;
    let lens = [size_of::<Of<1>>(), size_of::<Of<2>>(), size_of::<Of<8>>(), size_of::<Of<16>>()];
    let cells = lens.map(|len| written(len as u64)).join(" | ");
    says(
        "docs/performance.md",
        &format!("| CPUs | 1 | 2 | 8 | 16 |\n|---|---:|---:|---:|---:|\n| bytes | {cells} |\n"),
    );
    let mut codes = BUDGETS.map(|(_, file)| row(&budgets(file), "size", "code, in bytes")[0] / 1000);
    codes.sort_unstable();
    let [least, _, most] = codes;
    let len = lens[3] / 1000;
    says("README.md", &format!("A heap has {len} KB of `.bss`, and {least} to {most} KB of code"));
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
        let files: BTreeSet<&String> = hops.iter().map(|(file, _)| file).collect();
        let said = design.split_once(from).unwrap().1.split_once(".\n").unwrap().0;
        assert!(said.ends_with(&format!("{} functions in {} files", hops.len(), files.len())), "{from}{said}");
    }
}

/// Lines of code in a folder, without comments, blank lines and tests: all, and those of files without unsafe code.
fn lines_of_code(folder: &Path) -> [usize; 2] {
    let mut counts = [0, 0];
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let is_test = ["tests.rs", "model.rs"].iter().any(|name| path.ends_with(name));
        if path.is_dir() {
            let inside = lines_of_code(&path);
            counts.iter_mut().zip(inside).for_each(|(count, inside)| *count += inside);
        } else if !is_test {
            let text = fs::read_to_string(path).unwrap();
            let lines = text.lines().take_while(|line| !line.contains("mod tests {")).map(str::trim);
            let lines: Vec<&str> = lines.filter(|line| !line.is_empty() && !line.starts_with("//")).collect();
            let is_word = |c: char| c.is_alphanumeric() || c == '_';
            let is_unsafe = lines.iter().any(|line| line.split(|c| !is_word(c)).any(|word| word == "unsafe"));
            counts[0] += lines.len();
            counts[1] += if is_unsafe { 0 } else { lines.len() };
        }
    }
    counts
}

/// Of the engine's rooms, at least half of the lines. The compiler refuses unsafe code where a file does not expect it.
#[test]
fn half_of_the_engine_has_no_unsafe_code() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    assert!(read("src/lib.rs").contains("deny(unsafe_code))]"));
    let rooms = ["base", "pages", "slab", "cache", "heap"].map(|room| lines_of_code(&src.join(room)));
    let [all, safe] = [0, 1].map(|at| rooms.iter().map(|room| room[at]).sum::<usize>());
    assert!(safe * 2 >= all, "{safe} of {all} lines");
}

#[test]
fn the_rooms_are_as_long_as_they_say() {
    let design = read("docs/design.md");
    let table = design
        .split_once("| room | lines | of them in files without unsafe code |")
        .unwrap()
        .1
        .split_once("\n\n")
        .unwrap()
        .0;
    let rows: Vec<_> = table.lines().filter(|row| row.starts_with("| `")).collect();
    assert!(rows.len() > 10, "{rows:?}");
    for row in rows {
        let cells: Vec<_> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        let counts = lines_of_code(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(cells[1]));
        for (said, is) in cells[2..4].iter().zip(counts) {
            let said: usize = said.parse().unwrap();
            assert!(said.abs_diff(is) * 20 <= is, "{} has {is} lines, not {said}", cells[1]);
        }
    }
}

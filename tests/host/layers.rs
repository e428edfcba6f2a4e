//! The layers that the crate's documentation lists, held against the sources: a module imports only from lines below its own.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The lines of the list, top first, each with the modules that stand side by side there.
fn layers() -> Vec<Vec<String>> {
    let docs = fs::read_to_string(src().join("lib.rs")).unwrap();
    let section = docs.split_once("//! # Layers\n").unwrap().1;
    let list = section.split_once("//! ```text\n").unwrap().1.split_once("//! ```\n").unwrap().0;
    let names = |line: &str| {
        let (names, _) = line.trim_start_matches("//! ").split_once("  ").unwrap();
        names.split(", ").map(str::to_owned).collect()
    };
    list.lines().map(names).collect()
}

/// Every source file with the top-level module it belongs to, but for `lib.rs`.
fn files() -> Vec<(String, PathBuf)> {
    let (mut files, mut folders) = (Vec::new(), vec![src()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let inside = path.strip_prefix(src()).unwrap().with_extension("");
            let module = inside.iter().next().unwrap().to_str().unwrap().to_owned();
            if module != "lib" {
                files.push((module, path));
            }
        }
    }
    files
}

/// The modules behind every `crate::` of a file, but for comments and the part that is compiled for tests only.
fn imports(text: &str) -> BTreeSet<String> {
    let shipped = text.split_once("#[cfg(test)]\nmod tests {").map_or(text, |(before, _)| before);
    let code = shipped.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code));
    let ends = |c: char| !c.is_alphanumeric() && c != '_';
    let module = |rest: &str| rest.split(ends).next().unwrap_or_default().to_owned();
    code.flat_map(|line| line.split("crate::").skip(1).map(module).collect::<Vec<_>>()).collect()
}

#[test]
fn modules_import_only_downward() {
    let layers = layers();
    let line_of = |module: &str| layers.iter().position(|line| line.iter().any(|name| name == module));
    let mut wrong = Vec::new();
    for (module, path) in files() {
        // The tests of a module may look wherever they like.
        if path.ends_with("tests.rs") {
            continue;
        }
        let own = line_of(&module);
        for import in imports(&fs::read_to_string(&path).unwrap()) {
            if import != module && line_of(&import) <= own {
                wrong.push(format!("{} imports {import}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "not downward, by the list in src/lib.rs: {wrong:#?}");
}

#[test]
fn the_list_of_layers_names_every_module_once() {
    let listed: Vec<String> = layers().into_iter().flatten().collect();
    let modules: BTreeSet<String> = files().into_iter().map(|(module, _)| module).collect();
    let once: BTreeSet<String> = listed.iter().cloned().collect();
    assert_eq!(once, modules);
    assert_eq!(once.len(), listed.len(), "a module stands in two lines");
}

//! The rooms that the crate's documentation lists, held against the sources: a file imports only from rows below its
//! own, and from files of its own row that stand further right.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// A row of the list: a folder of `src`, and the order of its files, if the row gives one.
struct Room {
    name: String,
    files: Vec<String>,
}

/// The rows of the list, top first.
fn rooms() -> Vec<Room> {
    let docs = fs::read_to_string(src().join("lib.rs")).unwrap();
    let section = docs.split_once("//! # Rooms\n").unwrap().1;
    let list = section.split_once("//! ```text\n").unwrap().1.split_once("//! ```\n").unwrap().0;
    // A row that is too long goes on in the next line.
    let list = list.replace(&format!("\n//!{:12}", ""), " ").replace(&format!("{:53}", ""), "  ");
    list.lines().map(|line| room(line.trim_start_matches("//! "))).collect()
}

fn room(row: &str) -> Room {
    let (name, rest) = row.split_once(' ').unwrap();
    let files = rest.trim_start().split("  ").next().unwrap();
    let exists =
        |file: &&str| src().join(name).join(file).with_extension("rs").exists() || src().join(name).join(file).is_dir();
    let files: Vec<&str> = files.split(", ").collect();
    let all = files.iter().all(exists);
    Room { name: name.to_owned(), files: if all { files.into_iter().map(str::to_owned).collect() } else { Vec::new() } }
}

/// A source file: its room and its name there (`mod`, a file, or the folder it lies in).
struct Source {
    room: String,
    name: String,
    path: PathBuf,
}

/// Every source file but `lib.rs`.
fn sources() -> Vec<Source> {
    let (mut sources, mut folders) = (Vec::new(), vec![src()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let inside = path.strip_prefix(src()).unwrap().with_extension("");
            let mut parts = inside.iter().map(|part| part.to_str().unwrap().to_owned());
            if let (Some(room), Some(name)) = (parts.next(), parts.next()) {
                sources.push(Source { room, name, path });
            } else {
                assert_eq!(path.file_name().unwrap(), "lib.rs", "a file outside of all rooms");
            }
        }
    }
    sources
}

/// The first two names behind every `crate::` of a file, but for comments and the part that is compiled for tests only.
fn imports(text: &str) -> BTreeSet<(String, String)> {
    let shipped = text.split_once("#[cfg(test)]\nmod tests {").map_or(text, |(before, _)| before);
    let code = shipped.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code));
    let ends = |c: char| !c.is_alphanumeric() && c != '_';
    let name = |rest: &str| rest.split(ends).next().unwrap_or_default().to_owned();
    let both = |rest: &str| {
        let room = name(rest);
        let inner = rest[room.len()..].strip_prefix("::").map(name).unwrap_or_default();
        (room, inner)
    };
    code.flat_map(|line| line.split("crate::").skip(1).map(both).collect::<Vec<_>>()).collect()
}

#[test]
fn rooms_import_only_downward() {
    let rooms = rooms();
    let row_of = |name: &str| rooms.iter().position(|room| room.name == name);
    let mut wrong = Vec::new();
    for Source { room, name, path } in sources() {
        // The tests of a room may look wherever they like.
        if path.ends_with("tests.rs") {
            continue;
        }
        let own = row_of(&room);
        let order = own.map(|row| &rooms[row].files).unwrap();
        let place = |name: &str| order.iter().position(|file| file == name);
        for (import, inner) in imports(&fs::read_to_string(&path).unwrap()) {
            let is_upward = if import == room {
                // What a room says of itself in `mod.rs` is no file's name.
                let inner = if place(&inner).is_some() { inner.as_str() } else { "mod" };
                inner != name && place(inner) <= place(&name) && !order.is_empty()
            } else {
                row_of(&import) <= own
            };
            if is_upward {
                wrong.push(format!("{} imports {import}::{inner}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "not downward, by the list in src/lib.rs: {wrong:#?}");
}

#[test]
fn the_list_of_rooms_names_every_folder_once() {
    let listed: Vec<String> = rooms().into_iter().map(|room| room.name).collect();
    let folders: BTreeSet<String> = sources().into_iter().map(|source| source.room).collect();
    let once: BTreeSet<String> = listed.iter().cloned().collect();
    assert_eq!(once, folders);
    assert_eq!(once.len(), listed.len(), "a folder stands in two rows");
}

#[test]
fn the_list_of_rooms_names_every_file_of_its_rows() {
    for room in rooms().into_iter().filter(|room| !room.files.is_empty()) {
        let mut files: BTreeSet<String> =
            sources().into_iter().filter(|source| source.room == room.name).map(|source| source.name).collect();
        files.remove("tests");
        // A `mod.rs` that only declares files stands in no order.
        let has_code = room.files.iter().any(|file| file == "mod");
        if !has_code {
            files.remove("mod");
        }
        assert_eq!(room.files.into_iter().collect::<BTreeSet<_>>(), files, "{}", room.name);
    }
}

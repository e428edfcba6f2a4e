//! The documents, held against the tree: links lead somewhere, a sentence has a line of its own, code is at most 120
//! columns wide, and no word stands where the glossary has another one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const COLUMNS: usize = 120;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files of the repository that end so, below the package; from `git`, or by walking where there is none.
fn files(ending: &str) -> Vec<PathBuf> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    let mut files: Vec<PathBuf> = match listed {
        Ok(output) if output.status.success() => {
            String::from_utf8(output.stdout).unwrap().split_terminator('\0').map(|name| root().join(name)).collect()
        }
        _ => walk(root()),
    };
    files.retain(|path| path.to_str().unwrap().ends_with(ending) && path.exists());
    assert!(!files.is_empty(), "no file ends in {ending}");
    files
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = entry.file_name().unwrap().to_str().unwrap();
        if entry.is_dir() && name != "target" && name != ".git" {
            files.extend(walk(&entry));
        } else if entry.is_file() {
            files.push(entry);
        }
    }
    files
}

/// The Markdown that people read: what the demonstration works on is data.
fn documents() -> Vec<PathBuf> {
    files(".md").into_iter().filter(|path| !path.components().any(|part| part.as_os_str() == "data")).collect()
}

/// The lines of a document outside of its code blocks, counted from 1.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let mut is_code = false;
    let mut lines = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        } else if !is_code {
            lines.push((at + 1, line));
        }
    }
    lines
}

/// A heading's anchor, as the common renderers make it.
fn anchor(heading: &str) -> String {
    let kept = |c: char| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c.to_ascii_lowercase()),
        _ => None,
    };
    heading.trim_start_matches('#').trim().chars().filter_map(kept).collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    prose(text).into_iter().filter(|(_, line)| line.starts_with('#')).map(|(_, line)| anchor(line)).collect()
}

/// The targets of a line's links.
fn links(line: &str) -> Vec<&str> {
    line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target).collect()
}

#[test]
fn links_of_documents_lead_somewhere() {
    let mut broken = Vec::new();
    for path in documents() {
        let text = fs::read_to_string(&path).unwrap();
        for (at, line) in prose(&text) {
            for link in links(line).into_iter().filter(|link| !link.starts_with("http")) {
                let (file, part) = link.split_once('#').unwrap_or((link, ""));
                let target = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
                let has_part = || part.is_empty() || anchors(&fs::read_to_string(&target).unwrap()).contains(part);
                if !target.exists() || !has_part() {
                    broken.push(format!("{}:{at}: {link}", path.display()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// Whether a sentence ends inside of a line of prose and another one begins.
fn has_two_sentences(line: &str) -> bool {
    let is_prose = !line.trim_start().starts_with(['|', '#', '<', '!']);
    // What stands between backticks is a name, whatever its characters.
    // A list's number ends no sentence.
    let line = line.trim_start_matches(|c: char| c.is_ascii_digit());
    let line = line.strip_prefix(". ").unwrap_or(line);
    let words: String = line.split('`').enumerate().map(|(at, part)| if at % 2 == 0 { part } else { "x" }).collect();
    let begins = |rest: &str| rest.trim_start_matches(['*', '"', '(', '[']).starts_with(|c: char| c.is_uppercase());
    is_prose && [". ", "? ", "! "].iter().any(|end| words.split(end).skip(1).any(begins))
}

#[test]
fn a_sentence_has_a_line_of_its_own() {
    let mut wrong = Vec::new();
    for path in documents() {
        let text = fs::read_to_string(&path).unwrap();
        let lines = prose(&text);
        wrong.extend(
            lines.iter().filter(|(_, line)| has_two_sentences(line)).map(|(at, _)| format!("{}:{at}", path.display())),
        );
    }
    assert!(wrong.is_empty(), "more than one sentence a line: {wrong:#?}");
}

/// A row of a table, a dump's line, and what is inside of one string cannot go on in the next line.
fn is_wide(line: &str) -> bool {
    let is_row = ["//! |", "/// |"].iter().any(|mark| line.trim_start().starts_with(mark));
    let is_data = line.contains("smp-heap v1 ") || line.trim_start().starts_with("r#\"");
    let outside: String = line.replace("\\\"", "'").split('"').step_by(2).collect();
    !is_row && !is_data && outside.chars().count() > COLUMNS
}

#[test]
fn code_is_at_most_120_columns_wide() {
    let mut wide = Vec::new();
    for path in files(".rs") {
        let text = fs::read_to_string(&path).unwrap();
        let wide_here = text.lines().enumerate().filter(|(_, line)| is_wide(line));
        wide.extend(wide_here.map(|(at, _)| format!("{}:{}", path.display(), at + 1)));
    }
    assert!(wide.is_empty(), "{} lines: {wide:#?}", wide.len());
}

#[test]
fn names_of_functions_have_at_most_60_characters() {
    let mut long = Vec::new();
    for path in files(".rs") {
        let text = fs::read_to_string(&path).unwrap();
        let names =
            text.split("fn ").skip(1).filter_map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next());
        long.extend(names.filter(|name| name.len() > 60).map(str::to_owned));
    }
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn the_readme_is_read_in_a_minute() {
    let lines = fs::read_to_string(root().join("README.md")).unwrap().lines().count();
    assert!(lines <= 120, "{lines} lines");
}

/// The glossary's rows: a word, what it means, where it is owned, and the words that it stands for.
fn glossary() -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("docs/words.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| word"));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

#[test]
fn the_glossary_gives_each_word_one_meaning_and_a_room() {
    let rows = glossary();
    let words: BTreeSet<&String> = rows.iter().map(|row| &row[0]).collect();
    assert_eq!(words.len(), rows.len(), "a word stands twice");
    for row in &rows {
        assert_eq!(row.len(), 5, "{row:?}");
        assert!(root().join("src").join(&row[2]).is_dir(), "{} is no room", row[2]);
    }
}

/// A text in lower case, its words one blank apart: names in code come apart at `_`, a phrase goes on in the next line.
fn plain_words(text: &str) -> String {
    let words: Vec<&str> = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    format!(" {} ", words.join(" ").to_lowercase())
}

#[test]
fn no_word_stands_where_the_glossary_has_another() {
    let mut replaced = Vec::new();
    for row in glossary() {
        replaced.extend(row[4].split(", ").filter(|old| *old != "-").map(|old| (format!(" {old} "), row[0].clone())));
    }
    let sources = files(".rs").into_iter().filter(|path| path.starts_with(root().join("src")));
    let mut wrong = Vec::new();
    for path in sources.chain(documents()).filter(|path| !path.ends_with("docs/words.md")) {
        let text = plain_words(&fs::read_to_string(&path).unwrap());
        let here = replaced.iter().filter(|(old, _)| text.contains(old));
        wrong.extend(here.map(|(old, new)| format!("{}:{old}is {new}", path.display())));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

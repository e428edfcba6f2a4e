//! Each golden sum, worked out again on the host: the workload must meet it, and a crate (or a few lines) that shares
//! no code with the workload must come to the same result. A sum that only its own workload ever computed would prove
//! that the work is repeatable, not that it is right.

use crate::{ALL, Product, Sum, Workload, deflate, index, json, markdown, search};
use std::{
    collections::HashMap,
    io::Read,
    string::{String, ToString},
    vec::Vec,
};

fn workload(name: &str) -> &'static Workload {
    ALL.iter().find(|workload| workload.name == name).expect("a workload of that name")
}

/// The product of one input, checked against its golden sum, and its live structures.
fn product<T: 'static>(workload: &Workload, input: usize) -> (Product, T) {
    let mut product = workload.run(input).unwrap_or_else(|mismatch| panic!("{mismatch}"));
    let keep = core::mem::replace(&mut product.keep, std::boxed::Box::new(()));
    let keep = keep.downcast().unwrap_or_else(|_| panic!("{} keeps another type", workload.name));
    (product, *keep)
}

#[test]
fn every_workload_meets_its_golden_sums_in_any_order() {
    for workload in &ALL {
        for input in (0..workload.golden.len()).rev() {
            let product = workload.run(input + workload.golden.len()).unwrap_or_else(|mismatch| panic!("{mismatch}"));
            assert!(product.units > 1_000, "{} does little", workload.name);
        }
    }
}

#[test]
fn a_wrong_sum_is_a_mismatch() {
    let mut workload = *workload("deflate");
    workload.golden = &[1];
    let mismatch = workload.run(7).expect_err("the sum is wrong");
    assert_eq!((mismatch.input, mismatch.expected, mismatch.found), (0, 1, Some(deflate::GOLDEN[0])));
    assert!(mismatch.to_string().starts_with("deflate of input 0: expected 0x0000000000000001, found 0x"));
}

#[test]
fn json_reads_the_same_to_another_parser() {
    let mut count = 0;
    for input in 0..json::GOLDEN.len() {
        let (_, keep) = product::<Vec<(serde_json::Value, String, serde_json::Value)>>(workload("json"), input);
        assert_eq!(keep.len(), json::documents(input).count());
        for (document, (_, text, _)) in json::documents(input).zip(&keep) {
            let ours: tinyjson::JsonValue = text.parse().expect("our text parses");
            let theirs: tinyjson::JsonValue = document.parse().expect("the document parses");
            assert_eq!(ours, theirs, "input {input}");
            assert!(text.len() <= document.len(), "input {input}: compact");
            count += 1;
        }
    }
    assert_eq!(count, crate::documents::QMP_SCHEMA.text.lines().count() + 2, "no part is left out");
}

#[test]
fn deflate_is_inflated_by_another_crate() {
    for (input, (document, _)) in deflate::INPUTS.iter().enumerate() {
        let (product, (packed, _)) = product::<(Vec<u8>, Vec<u8>)>(workload("deflate"), input);
        let mut back = String::new();
        flate2::read::ZlibDecoder::new(packed.as_slice()).read_to_string(&mut back).expect("a zlib stream");
        assert!(back == document.text, "{}", document.name);
        let mut sum = Sum::new();
        sum.bytes(document.text.as_bytes());
        assert_eq!(sum.get(), product.checksum, "{}", document.name);
    }
}

#[test]
fn the_index_is_the_same_by_another_way() {
    for (input, document) in index::INPUTS.iter().enumerate() {
        let (product, _) = product::<(
            hashbrown::HashMap<String, Vec<u32>>,
            std::collections::BTreeMap<String, Vec<u32>>,
        )>(workload("index"), input);
        let (mut words, mut line, mut word) = (0, 1, String::new());
        let mut found: HashMap<String, Vec<u32>> = HashMap::new();
        for c in document.text.chars().chain(['\n']) {
            if c.is_alphanumeric() {
                word.extend(c.to_lowercase());
            } else if !word.is_empty() {
                words += 1;
                found.entry(core::mem::take(&mut word)).or_default().push(line);
            }
            line += u32::from(c == '\n');
        }
        let mut found: Vec<_> = found.into_iter().collect();
        found.sort();
        let mut sum = Sum::new();
        for (word, lines) in &found {
            sum.bytes(word.as_bytes());
            lines.iter().for_each(|line| sum.number(u64::from(*line)));
        }
        assert_eq!((words, sum.get()), (product.units, product.checksum), "{}", document.name);
    }
}

#[test]
fn searches_match_the_same_in_another_engine() {
    for (input, document) in search::INPUTS.iter().enumerate() {
        let (product, _) = product::<Vec<(regex::Regex, Vec<Vec<String>>)>>(workload("search"), input);
        let mut sum = Sum::new();
        for pattern in search::PATTERNS {
            let regex = regex_lite::Regex::new(pattern).expect("a pattern");
            let matches: Vec<_> = regex.captures_iter(document.text).collect();
            sum.number(matches.len() as u64);
            for found in &matches {
                found.iter().flatten().for_each(|group| sum.bytes(group.as_str().as_bytes()));
            }
        }
        assert_eq!(sum.get(), product.checksum, "{}", document.name);
    }
}

#[test]
fn pages_render_the_same_without_the_interpreter() {
    let mut whole = 0;
    for input in 0..markdown::PARTS {
        let page = markdown::part(input).expect("a page");
        let (product, (_, _, html)) = product::<(wasmi::Store<()>, wasmi::Module, Vec<u8>)>(workload("wasm"), input);
        let mut native = String::new();
        let parser = pulldown_cmark::Parser::new_ext(page, pulldown_cmark::Options::all());
        pulldown_cmark::html::push_html(&mut native, parser);
        assert!(native.as_bytes() == html, "part {input}");
        let mut sum = Sum::new();
        sum.bytes(native.as_bytes());
        assert_eq!(sum.get(), product.checksum);
        whole += page.len();
    }
    assert_eq!(whole, crate::documents::RUSTC_ERRORS.text.len(), "the parts are the document");
}

//! Sequences of heap operations against a shadow heap, driven by coverage. The interpreter is that of the property
//! tests: `tests/host/sequences`.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/host/sequences/mod.rs"]
#[expect(unused, reason = "the property tests count what was done")]
mod sequences;

fuzz_target!(|sequence: sequences::Sequence| {
    if let Err(what) = sequences::run(&sequence) {
        panic!("{what}");
    }
});

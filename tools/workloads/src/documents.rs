//! The documents: what real tools printed, as they printed it. `data/README.md` says which command made which.

/// A document and the file it came from.
#[derive(Debug, Clone, Copy)]
pub struct Document {
    /// The file's name under `data/`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! documents {
    ($($(#[$doc:meta])* $constant:ident = $file:literal;)*) => {
        $($(#[$doc])* pub const $constant: Document =
            Document { name: $file, text: include_str!(concat!("../data/", $file)) };)*
    };
}

documents! {
    /// QEMU's description of its own control protocol, an entity a line.
    QMP_SCHEMA = "qmp-schema.jsonl";
    /// What `cargo metadata` says of a small package.
    CARGO_METADATA = "cargo-metadata.json";
    /// How rustc describes five of its targets.
    TARGET_SPECS = "target-specs.json";
    /// rustc's own explanations of its errors, in Markdown.
    RUSTC_ERRORS = "rustc-errors.md";
    /// Four of cargo's manual pages as text.
    CARGO_MAN = "cargo-man.txt";
    /// Four licences.
    LICENCES = "licences.txt";
    /// QEMU's help.
    QEMU_HELP = "qemu-help.txt";
    /// QEMU's list of devices.
    QEMU_DEVICES = "qemu-devices.txt";
    /// A page of rustdoc's HTML.
    RUSTDOC_CELL = "rustdoc-cell.html";
}

/// A Markdown renderer compiled to WebAssembly (its source stands in `wasm/`).
pub const MARKDOWN_WASM: &[u8] = include_bytes!("../data/markdown.wasm");

#!/bin/sh
# Builds `../data/markdown.wasm` from this folder. Needs Rust's library sources (`rustup component add rust-src`).
set -eu
cd "$(dirname "$0")"
: "${CARGO_TARGET_DIR:=$PWD/../../../target/wasm}"
export CARGO_TARGET_DIR RUSTC_BOOTSTRAP=1
export RUSTFLAGS="--remap-path-prefix=$HOME=~ -Zlocation-detail=none"
cargo build --release --locked --target wasm32-unknown-unknown \
    -Zbuild-std=std,panic_abort -Zbuild-std-features=optimize_for_size
cp "$CARGO_TARGET_DIR/wasm32-unknown-unknown/release/markdown_wasm.wasm" ../data/markdown.wasm

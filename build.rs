//! Finds out whether the compiler has `core::alloc::Allocator`, if the feature `nightly` asks for it.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_NIGHTLY").is_none() {
        return;
    }
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    if version.contains("nightly") || version.contains("-dev") {
        println!("cargo:rustc-cfg=has_allocator");
    } else {
        println!("cargo:warning=smp-heap's feature `nightly` does nothing on this compiler: {}", version.trim());
    }
}

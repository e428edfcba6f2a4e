fn main() {
    println!("cargo:rerun-if-changed=linker.ld");
    println!("cargo:rustc-link-arg-bins=-T{}/linker.ld", env!("CARGO_MANIFEST_DIR"));
    println!("cargo:rustc-link-arg-bins=--no-pie");
}

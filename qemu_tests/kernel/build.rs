//! Links each kernel by its architecture's linker script, as an image at fixed addresses.
//!
//! The one for x86-64 lies at the top of the repository, as an example for kernels of others. As arguments from here
//! they need no `RUSTFLAGS`, so nothing that is built for the host is built again.

use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    if !env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none") {
        return Ok(());
    }
    let script = match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("aarch64") => "src/arch/aarch64/linker.ld",
        Ok("riscv64") => "src/arch/riscv64/linker.ld",
        _ => "../../linker.ld",
    };
    let script = fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join(script))?;
    println!("cargo:rerun-if-changed={}", script.display());
    println!("cargo:rustc-link-arg-tests=-T{}", script.display());
    for arg in ["--no-pie", "-zmax-page-size=4096", "--no-dynamic-linker"] {
        println!("cargo:rustc-link-arg-tests={arg}");
    }
    Ok(())
}

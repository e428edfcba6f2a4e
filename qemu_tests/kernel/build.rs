//! Links each kernel by the linker script at the top of the repository, as an image at fixed addresses.
//!
//! As arguments from here they need no `RUSTFLAGS`, so nothing that is built for the host is built again.

use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    let bare_metal = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "none");
    let script = fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../linker.ld"))?;
    println!("cargo:rerun-if-changed={}", script.display());
    if bare_metal {
        println!("cargo:rustc-link-arg-tests=-T{}", script.display());
        for arg in ["--no-pie", "-zmax-page-size=4096", "--no-dynamic-linker"] {
            println!("cargo:rustc-link-arg-tests={arg}");
        }
    }
    Ok(())
}

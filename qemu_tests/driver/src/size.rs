//! How long the heap is in a release kernel: its code, and the memory that it takes before it has any.
//!
//! Counted by the symbols of kernel `collections`, where it is the one global allocator: every function of the library,
//! with the allocator's entry points, into which the fast paths are inlined, and the static that is the heap. Code that
//! the compiler inlines into callers of the entry points is not.

use std::collections::BTreeMap;
use std::path::Path;

use object::{Object as _, ObjectSymbol as _, SymbolKind};

use crate::{Arch, Failure, Profile, kernel_elf};

/// The kernel that is looked at: one heap, as `#[global_allocator]`, for eight CPUs.
const KERNEL: &str = "collections";

/// Bytes, by what takes them.
///
/// # Errors
/// As for [`kernel_elf`]; [`Failure::Build`] if its file has no symbols that say so.
pub fn sizes(arch: Arch) -> Result<[(&'static str, u32); 2], Failure> {
    let elf = kernel_elf(KERNEL, arch, Profile::Fast)?;
    measured(&elf).map_err(|why| Failure::Build(format!("{}: {why}", elf.display())))
}

fn measured(elf: &Path) -> Result<[(&'static str, u32); 2], String> {
    let bytes = std::fs::read(elf).map_err(|error| error.to_string())?;
    let file = object::File::parse(&*bytes).map_err(|error| error.to_string())?;
    // By address, as several names may be one function.
    let (mut code, mut statics) = (BTreeMap::new(), BTreeMap::new());
    for symbol in file.symbols() {
        let name = format!("{:#}", rustc_demangle::demangle(symbol.name().unwrap_or_default()));
        match symbol.kind() {
            SymbolKind::Text if is_heap(&name) => code.insert(symbol.address(), symbol.size()),
            SymbolKind::Data if name.ends_with("::HEAP") => statics.insert(symbol.address(), symbol.size()),
            _ => None,
        };
    }
    let sum = |sizes: &BTreeMap<u64, u64>| u32::try_from(sizes.values().sum::<u64>()).unwrap_or(u32::MAX);
    let (code, statics) = (sum(&code), sum(&statics));
    if code == 0 || statics == 0 {
        return Err("no symbols of the heap".to_owned());
    }
    Ok([("code, in bytes", code), (".bss for 8 CPUs, in bytes", statics)])
}

/// Whether a function is the library's, or an entry point of the global allocator.
fn is_heap(name: &str) -> bool {
    name.contains("smp_heap::") || name.contains("__rust_")
}

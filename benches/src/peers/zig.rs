//! Zig's `std.heap.smp_allocator`, from a shared library that `bin/bench` builds where it finds Zig's compiler.

use std::env;

use libloading::Library;

use super::{Calls, Kind, Peer, no_entry, nothing};

pub(super) const NAME: &str = "zig";

/// Where the library is.
pub const LIBRARY_VARIABLE: &str = "SMP_HEAP_BENCH_ZIG";

/// The version of the compiler that made it.
pub const VERSION_VARIABLE: &str = "SMP_HEAP_BENCH_ZIG_VERSION";

fn symbol<T: Copy>(library: &Library, name: &[u8]) -> Result<T, String> {
    // SAFETY: `zig/smp.zig` exports these names with the types of `Calls`.
    let symbol = unsafe { library.get::<T>(name) };
    symbol.map(|symbol| *symbol).map_err(|error| error.to_string())
}

/// The column, or why there is none.
pub(super) fn load() -> Result<Peer, String> {
    let path = env::var_os(LIBRARY_VARIABLE)
        .ok_or("no Zig compiler: `pip install ziglang`, or put `zig` into the PATH".to_owned())?;
    // SAFETY: the library has no initialisers beyond those of Zig's own run time.
    let library = unsafe { Library::new(&path) }.map_err(|error| format!("{}: {error}", path.display()))?;
    let calls = Calls {
        alloc: symbol(&library, b"zig_alloc")?,
        free: symbol(&library, b"zig_free")?,
        realloc: symbol(&library, b"zig_realloc")?,
    };
    // The calls point into it for as long as the process runs.
    std::mem::forget(library);
    Ok(Peer {
        name: NAME,
        about: "Zig's std.heap.smp_allocator, ReleaseFast",
        kind: Kind::Peer,
        calls,
        open: nothing,
        enter: no_entry,
        provider_cost: None,
        describe: None,
        program: None,
    })
}

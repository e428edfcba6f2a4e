//! What a kernel that depends on the crate gets into its lock file.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// Nothing but what is compiled into it: no package for tests, models or other targets.
#[test]
#[cfg_attr(miri, ignore = "starts a process")]
fn a_lock_file_has_only_what_is_compiled() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("lock_file_{}", std::process::id()));
    std::fs::create_dir_all(folder.join("src")).unwrap();
    std::fs::write(folder.join("src/lib.rs"), "").unwrap();
    let manifest = format!(
        "[package]\nname = \"kernel\"\nedition = \"2024\"\n[workspace]\n[dependencies]\nsmp-heap.path = {:?}\n",
        env!("CARGO_MANIFEST_DIR")
    );
    std::fs::write(folder.join("Cargo.toml"), manifest).unwrap();
    // The lock file of this workspace says which versions are there without asking a registry.
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    let locked = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--format-version=1", "--manifest-path"])
        .arg(folder.join("Cargo.toml"))
        .output()
        .unwrap();
    assert!(locked.status.success(), "{}", String::from_utf8_lossy(&locked.stderr));
    let text = std::fs::read_to_string(folder.join("Cargo.lock")).unwrap();
    let names: BTreeSet<&str> = text.lines().filter_map(|line| line.strip_prefix("name = ")).collect();
    let compiled = ["\"kernel\"", "\"linked_list_allocator\"", "\"smp-heap\"", "\"spin\""];
    assert_eq!(names, BTreeSet::from(compiled));
    std::fs::remove_dir_all(&folder).unwrap();
}

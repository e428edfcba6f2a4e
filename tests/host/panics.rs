//! The heap as a kernel builds it, which has no panics to spare.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What the heap looks like to a kernel that has no panics to spare.
const NO_PANIC_KERNEL: &str = r#"
#![no_std]
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use smp_heap::{CpuHint, CpuPin, Heap, Hint, PageProvider, PageRun, Pinned};

unsafe extern "C" {
    fn kernel_map(len: usize, align: usize) -> *mut u8;
    fn kernel_unmap(start: *mut u8, len: usize) -> bool;
    fn kernel_move(start: *mut u8, old: usize, new: usize) -> *mut u8;
    fn kernel_cpu() -> usize;
    fn kernel_panicked() -> !;
}

struct Kernel;
unsafe impl PageProvider for Kernel {
    const REMAPS: bool = true;
    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        NonNull::new(unsafe { kernel_map(run.len(), run.align()) })
    }
    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        unsafe { kernel_unmap(start.as_ptr(), run.len()) }
    }
    unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
        NonNull::new(unsafe { kernel_move(start.as_ptr(), old.len(), new.len()) })
    }
}

struct Cpu;
impl CpuHint for Cpu {
    fn current_cpu(&self) -> Option<usize> {
        Some(unsafe { kernel_cpu() })
    }
}
unsafe impl CpuPin for Cpu {
    type Guard = ();
    fn pin(&self) {}
    fn index(&self, _: &()) -> usize {
        unsafe { kernel_cpu() }
    }
}

static HINTED: Heap<Kernel, Hint<Cpu>, 7> = Heap::new(Kernel, Hint(Cpu));
static PINNED: Heap<Kernel, Pinned<Cpu>, 8> = Heap::new(Kernel, Pinned(Cpu));

macro_rules! face {
    ($heap:ident, $name:ident) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            what: usize,
            start: *mut u8,
            size: usize,
            align: usize,
            new_size: usize,
        ) -> *mut u8 {
            let Ok(layout) = Layout::from_size_align(size, align) else { return core::ptr::null_mut() };
            unsafe {
                match what {
                    0 => return GlobalAlloc::alloc(&$heap, layout),
                    1 => return GlobalAlloc::alloc_zeroed(&$heap, layout),
                    2 => return GlobalAlloc::realloc(&$heap, start, layout, new_size),
                    3 => GlobalAlloc::dealloc(&$heap, start, layout),
                    4 => drop($heap.trim(size)),
                    5 => $heap.drain(),
                    6 => $heap.drain_current(),
                    7 => return core::ptr::without_provenance_mut($heap.stats().held_len),
                    8 => {
                        let holds = $heap.verify().is_ok() && $heap.verify_at_rest().is_ok();
                        return core::ptr::without_provenance_mut(usize::from(holds));
                    }
                    9 => $heap.for_each_run(|run| drop(kernel_map(run.len, 1))),
                    _ => {
                        let Some(start) = NonNull::new(start) else { return core::ptr::null_mut() };
                        let _ = $heap.resize(start, layout, new_size);
                        let _ = $heap.remap(start, layout, new_size);
                        let _ = $heap.usable_len(start, layout);
                        let _ = $heap.alloc(layout).is_ok();
                    }
                }
            }
            core::ptr::null_mut()
        }
    };
}
face!(HINTED, hinted);
face!(PINNED, pinned);

#[cfg(can_panic)]
#[unsafe(no_mangle)]
pub extern "C" fn may_panic(index: usize) -> u8 {
    [1, 2, 3][index]
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    unsafe { kernel_panicked() }
}
"#;

/// Promise 7: built as a kernel would, optimised, no code of `core` that panics is linked in.
#[test]
#[cfg_attr(feature = "hardened", ignore = "builds the library by itself, with the same features each time")]
fn nothing_of_the_heap_can_panic() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("no_panic_{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let source = folder.join("kernel.rs");
    std::fs::write(&source, NO_PANIC_KERNEL).unwrap();
    let rustc = || {
        let beside = std::env::var_os("CARGO").map(|cargo| Path::new(&cargo).with_file_name("rustc"));
        let mut rustc = Command::new(beside.filter(|path| path.exists()).unwrap_or(PathBuf::from("rustc")));
        rustc.args(["--edition=2024", "-Copt-level=3", "-Cpanic=abort", "-Ccodegen-units=1", "--cap-lints=allow"]);
        rustc.arg("--out-dir").arg(&folder);
        rustc
    };
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs");
    run(rustc().args(["--crate-name=smp_heap", "--crate-type=rlib"]).arg(lib));
    let panics = |cfg: &[&str]| {
        let mut build = rustc();
        build.args(["--crate-name=kernel", "--crate-type=staticlib", "-Clto=fat"]).args(cfg);
        run(build.arg("--extern").arg(format!("smp_heap={}", folder.join("libsmp_heap.rlib").display())).arg(&source));
        let object = std::fs::read(folder.join("libkernel.a")).unwrap();
        let has = |name: &str| object.windows(name.len()).any(|window| window == name.as_bytes());
        assert!(has("hinted") && has("pinned") && has("kernel_unmap"), "the heap is in there");
        ["4core9panicking", "13unwrap_failed", "13expect_failed"]
            .into_iter()
            .filter(|name| has(name))
            .collect::<Vec<_>>()
    };
    assert_eq!(panics(&[]), [""; 0], "something in the heap can panic");
    assert!(!panics(&["--cfg=can_panic"]).is_empty(), "and if something could, this would be seen");
    std::fs::remove_dir_all(&folder).unwrap();
}

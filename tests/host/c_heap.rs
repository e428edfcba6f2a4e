//! C's face of the heap, under a C program that is linked with it: also the C library's own `malloc` is then this heap.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A static library that exports a heap over the system's mappings as `malloc` and its like.
const LIBRARY: &str = r#"
#![no_std]
use core::ffi::c_void;
use core::ptr::NonNull;
use smp_heap::{CpuHint, Heap, Hint, PageProvider, PageRun};

unsafe extern "C" {
    fn mmap(start: *mut c_void, len: usize, protection: i32, flags: i32, file: i32, offset: isize) -> *mut c_void;
    fn munmap(start: *mut c_void, len: usize) -> i32;
    fn mremap(start: *mut c_void, old: usize, new: usize, flags: i32, ...) -> *mut c_void;
    fn abort() -> !;
}

struct System;
unsafe impl PageProvider for System {
    const REMAPS: bool = true;
    const ZEROED: bool = true;
    const REENTRANT: bool = true;
    fn map(&self, run: PageRun) -> Option<NonNull<u8>> {
        let spare = run.align() - Self::PAGE_LEN;
        let start = unsafe { mmap(core::ptr::null_mut(), run.len() + spare, 3, 0x22, -1, 0) };
        if start.addr() == usize::MAX { return None }
        let skip = start.addr().wrapping_neg() & (run.align() - 1);
        let aligned = start.wrapping_byte_add(skip);
        for (from, len) in [(start, skip), (aligned.wrapping_byte_add(run.len()), spare - skip)] {
            if len > 0 { unsafe { munmap(from, len) }; }
        }
        NonNull::new(aligned.cast())
    }
    unsafe fn unmap(&self, start: NonNull<u8>, run: PageRun) -> bool {
        unsafe { munmap(start.as_ptr().cast(), run.len()) == 0 }
    }
    unsafe fn resize(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> bool {
        unsafe { mremap(start.as_ptr().cast(), old.len(), new.len(), 0) }.addr() != usize::MAX
    }
    unsafe fn remap(&self, start: NonNull<u8>, old: PageRun, new: PageRun) -> Option<NonNull<u8>> {
        if new.align() > Self::PAGE_LEN { return None }
        let place = unsafe { mremap(start.as_ptr().cast(), old.len(), new.len(), 1) };
        if place.addr() == usize::MAX { None } else { NonNull::new(place.cast()) }
    }
}

/// The thread's own stack tells threads apart.
struct Thread;
impl CpuHint for Thread {
    fn current_cpu(&self) -> Option<usize> {
        let here = 0_u8;
        Some((&raw const here).addr() >> 20)
    }
}

static HEAP: Heap<System, Hint<Thread>, 4> = Heap::new(System, Hint(Thread));
smp_heap::export_c_heap!(HEAP);

#[unsafe(no_mangle)]
extern "C" fn heap_live_len() -> usize { HEAP.stats().live_len() as usize }
#[unsafe(no_mangle)]
extern "C" fn heap_strays() -> usize { HEAP.stats().stray_count as usize }
#[unsafe(no_mangle)]
extern "C" fn heap_is_sound() -> i32 { HEAP.verify().is_ok() as i32 }

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! { unsafe { abort() } }
"#;

const PROGRAM: &str = r#"
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <malloc.h>

size_t heap_live_len(void);
size_t heap_strays(void);
int heap_is_sound(void);

#define CHECK(what) do { if (!(what)) { fprintf(stderr, "line %d: %s\n", __LINE__, #what); exit(1); } } while (0)

/* Every byte of short blocks, ever fewer of long ones. */
static size_t after(size_t at) { return at + 1 + at / 64; }

static void fill(unsigned char *block, size_t len, unsigned seed) {
    for (size_t at = 0; at < len; at = after(at)) block[at] = (unsigned char)(seed ^ at * 31);
}

static void check(const unsigned char *block, size_t len, unsigned seed) {
    for (size_t at = 0; at < len; at = after(at)) CHECK(block[at] == (unsigned char)(seed ^ at * 31));
}

/* Blocks of many sizes, kept, changed and freed in no order. */
static void *churn(void *argument) {
    enum { SLOTS = 200, STEPS = 20000 };
    static const size_t longest[] = {64, 64, 512, 512, 4096, 40000, 40000, 3000000};
    unsigned char *blocks[SLOTS] = {0};
    size_t lens[SLOTS] = {0};
    uint64_t random = (uintptr_t)argument * 0x9e3779b97f4a7c15u | 1;
    for (int step = 0; step < STEPS; step++) {
        random ^= random >> 12, random ^= random << 25, random ^= random >> 27;
        int slot = (int)(random >> 8) & 0xff;
        if (slot >= SLOTS) continue;
        size_t len = (size_t)(random >> 20) % longest[random >> 61];
        check(blocks[slot], lens[slot], slot);
        switch (random >> 16 & 3) {
        case 0:
            free(blocks[slot]);
            blocks[slot] = NULL, lens[slot] = 0;
            continue;
        case 1:
            free(blocks[slot]);
            blocks[slot] = malloc(len);
            break;
        default: {
            unsigned char *block = realloc(blocks[slot], len + 1);
            CHECK(block);
            blocks[slot] = block;
            check(block, lens[slot] < len ? lens[slot] : len, slot);
        }
        }
        CHECK(blocks[slot] && (uintptr_t)blocks[slot] % 16 == 0 && malloc_usable_size(blocks[slot]) >= len);
        lens[slot] = len;
        fill(blocks[slot], malloc_usable_size(blocks[slot]), slot);
    }
    for (int slot = 0; slot < SLOTS; slot++) free(blocks[slot]);
    return NULL;
}

int main(void) {
    for (size_t len = 0; len < 70000; len += len / 8 + 1) {
        unsigned char *block = malloc(len);
        CHECK(block && malloc_usable_size(block) >= len);
        fill(block, malloc_usable_size(block), 1);
        free(block);
        block = calloc(len, 3);
        CHECK(block);
        for (size_t at = 0; at < 3 * len; at++) CHECK(block[at] == 0);
        free(block);
    }
    for (size_t align = 1; align <= 1 << 21; align *= 2) {
        for (size_t len = 1; len < 10000; len = 3 * len + 1) {
            unsigned char *block = aligned_alloc(align, len);
            CHECK(block && (uintptr_t)block % align == 0);
            fill(block, len, 2);
            block = realloc(block, 2 * len);
            CHECK(block);
            check(block, len, 2);
            free(block);
        }
    }
    CHECK(!aligned_alloc(3, 8) && !malloc(SIZE_MAX) && !malloc(PTRDIFF_MAX) && !calloc(SIZE_MAX / 2, 3));
    free(NULL);
    CHECK(malloc_usable_size(NULL) == 0);
    char *grown = realloc(NULL, 10);
    CHECK(grown && !realloc(grown, 0));

    churn((void *)1);
    size_t before = heap_live_len();
    pthread_t threads[4];
    for (uintptr_t index = 0; index < 4; index++) {
        CHECK(!pthread_create(&threads[index], NULL, churn, (void *)(index + 2)));
    }
    for (int index = 0; index < 4; index++) CHECK(!pthread_join(threads[index], NULL));
    /* What the C library keeps for its threads is a few KiB. */
    CHECK(heap_live_len() < before + 65536);
    CHECK(heap_strays() == 0 && heap_is_sound());
    printf("ok\n");
    return 0;
}
"#;

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}

/// Builds the library in each of its levels as a kernel would, links the program with it, and runs that.
#[test]
#[cfg_attr(feature = "hardened", ignore = "builds the library by itself, in each level")]
fn a_c_program_allocates_from_the_heap() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("c_heap_{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (library, program) = (folder.join("library.rs"), folder.join("program.c"));
    std::fs::write(&library, LIBRARY).unwrap();
    std::fs::write(&program, PROGRAM).unwrap();
    let beside = std::env::var_os("CARGO").map(|cargo| Path::new(&cargo).with_file_name("rustc"));
    let rustc = beside.filter(|path| path.exists()).unwrap_or(PathBuf::from("rustc"));
    let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs");
    for level in [&[][..], &["hardened"], &["hardened", "debug-heap"]] {
        let features = ["c-heap"].iter().chain(level).map(|feature| format!("--cfg=feature=\"{feature}\""));
        let rustc = || {
            let mut command = Command::new(&rustc);
            command.args(["--edition=2024", "-Copt-level=1", "-Cpanic=abort", "--cap-lints=allow", "--out-dir"]);
            command.arg(&folder);
            command
        };
        run(rustc().args(["--crate-name=smp_heap", "--crate-type=rlib"]).args(features).arg(&lib));
        let heap = format!("smp_heap={}", folder.join("libsmp_heap.rlib").display());
        run(rustc().args(["--crate-type=staticlib", "-Clto=fat", "--extern", &heap]).arg(&library));
        let executable = folder.join("program");
        // The names that the program overrides are not the compiler's to know about.
        run(Command::new("cc").args(["-O1", "-fno-builtin", "-pthread", "-o"]).args([
            &executable,
            &program,
            &folder.join("liblibrary.a"),
        ]));
        assert_eq!(run(&mut Command::new(&executable)), "ok\n", "{level:?}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

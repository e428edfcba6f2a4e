//! Memory straight from the operating system, and what the kernel says of the memory a process has.

use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::{fs, io, mem};

/// What each heap that wants its memory at once gets: address space, filled with pages as they are touched.
pub const REGION_LEN: usize = 2 << 30;

/// Anonymous memory, page-aligned; pages come as they are touched. `None`: the system has none.
pub fn map(len: usize) -> Option<NonNull<u8>> {
    let (protection, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new anonymous mapping where the system likes touches nothing that exists.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) }
}

/// Memory of at least `len` bytes, aligned to 2 MiB, for a heap that lives as long as the process.
pub fn region(len: usize) -> NonNull<u8> {
    const ALIGN: usize = 2 << 20;
    let start = map(len + ALIGN).expect("address space for a region");
    let skip = start.addr().get().wrapping_neg() & (ALIGN - 1);
    // SAFETY: `skip` is less than the spare `ALIGN`.
    unsafe { start.add(skip) }
}

/// Bytes of memory this process has in RAM that are no file's. Walks the page tables, so it is exact.
pub fn resident_len() -> u64 {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Memory that a process shares with those that it forks, zeroed at first.
pub(crate) struct Shared<T> {
    start: *mut T,
    len: usize,
    owned: PhantomData<T>,
}

impl<T> Shared<T> {
    /// Room for `count` values.
    pub(crate) fn new(count: usize) -> io::Result<Self> {
        let len = count * mem::size_of::<T>();
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping touches nothing that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len, owned: PhantomData })
    }

    pub(crate) fn start(&self) -> *mut T {
        self.start
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` and used no more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

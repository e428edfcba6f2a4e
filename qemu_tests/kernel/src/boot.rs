//! What a kernel is told when it starts, and what it may hook into before that.

use core::alloc::Layout;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::test;

/// A range of RAM that is the kernel's to use: mapped where it lies, writable, not executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its first byte; physical and virtual address are the same.
    pub start: usize,
    /// Its length in bytes.
    pub len: usize,
}

impl Region {
    /// The address after the last byte.
    #[must_use]
    pub const fn end(self) -> usize {
        self.start + self.len
    }

    /// The first byte as a pointer, with the right to the whole region.
    #[must_use]
    pub fn as_ptr(self) -> *mut u8 {
        core::ptr::with_exposed_provenance_mut(self.start)
    }
}

/// The machine as the kernel finds it.
#[derive(Clone, Copy)]
pub struct Boot {
    pub(crate) cpu_count: usize,
    pub(crate) regions: &'static [Region],
    pub(crate) args: &'static str,
    /// Boot memory for the per-CPU areas.
    pub(crate) areas: usize,
}

impl Boot {
    /// How many CPUs there are; all of them run when `main` starts.
    #[must_use]
    pub fn cpu_count(&self) -> usize {
        self.cpu_count
    }

    /// The usable RAM: none of it is the image, a page table, a stack of this crate or the firmware's.
    #[must_use]
    pub fn regions(&self) -> &'static [Region] {
        self.regions
    }

    /// The largest usable region.
    #[must_use]
    pub fn largest_region(&self) -> Region {
        let largest = self.regions.iter().max_by_key(|region| region.len);
        *largest.unwrap_or(&Region { start: 0, len: 0 })
    }

    /// The words of the command line, split at the first `=`.
    fn words(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let words = self.args.split_ascii_whitespace();
        words.map(|word| word.split_once('=').unwrap_or((word, "")))
    }

    /// The value of `key` on the command line.
    #[must_use]
    pub fn arg(&self, key: &str) -> Option<&'static str> {
        let (place, (_, value)) = self.words().enumerate().find(|(_, (name, _))| *name == key)?;
        ASKED.fetch_or(1_u64.checked_shl(place as u32).unwrap_or(0), Relaxed);
        Some(value)
    }

    /// Whether `key` stands on the command line, as a word without a value.
    ///
    /// # Panics
    /// If it has a value.
    #[must_use]
    pub fn flag(&self, key: &str) -> bool {
        match self.arg(key) {
            None => false,
            Some("") => true,
            Some(value) => test::fail(format_args!("{key}={value}: `{key}` takes no value")),
        }
    }

    /// The value of `key` as a number, or `default` if the command line does not name it.
    ///
    /// # Panics
    /// If it is there and no number: a test must not run with other settings than it was asked for.
    #[must_use]
    pub fn number(&self, key: &str, default: usize) -> usize {
        self.arg(key).map_or(default, |value| match value.parse() {
            Ok(number) => number,
            Err(_) => test::fail(format_args!("{key}={value} is not a number")),
        })
    }

    /// How often a test goes round: `rounds` on the command line or `default`, times `soak` if that is there too.
    ///
    /// # Panics
    /// If that is 0: a test that goes no round tests nothing.
    #[must_use]
    pub fn rounds(&self, default: usize) -> usize {
        match self.number("rounds", default) * self.number("soak", 1) {
            0 => test::fail(format_args!("the command line asks for 0 rounds")),
            rounds => rounds,
        }
    }

    /// Fails if the machine is not the one that the command line tells of.
    fn check(&self) {
        let cpus = self.number("cpus", self.cpu_count);
        if cpus != self.cpu_count {
            test::fail(format_args!("{} CPUs came up, not {cpus}", self.cpu_count));
        }
        // Whoever goes in rounds looks at it; to the others it means nothing.
        _ = self.number("soak", 1);
    }

    /// Fails if there are words on the command line that nobody has asked for: a misspelt one would run another test.
    fn expect_all_asked(&self) {
        let asked = ASKED.load(Relaxed);
        let is_asked = |place: usize| 1_u64.checked_shl(place as u32).is_some_and(|bit| asked & bit != 0);
        if let Some((_, (key, _))) = self.words().enumerate().find(|(place, _)| !is_asked(*place)) {
            test::fail(format_args!("this kernel knows no `{key}`, or has it twice: `{}`", self.args));
        }
    }
}

/// The words of the command line that somebody has asked for, by place.
static ASKED: AtomicU64 = AtomicU64::new(0);

impl fmt::Debug for Boot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} CPUs, arguments `{}`", self.cpu_count, self.args)?;
        for region in self.regions {
            writeln!(f, "  RAM {:#x}..{:#x} ({} KiB)", region.start, region.end(), region.len / 1024)?;
        }
        Ok(())
    }
}

/// What `kernel!` makes.
#[derive(Debug)]
pub struct Kernel {
    /// The name in the pass line.
    pub name: &'static str,
    /// Runs on CPU 0 when everything is up.
    pub main: fn(&Boot),
    /// Run before that.
    pub hooks: Hooks,
}

impl Kernel {
    /// Runs the test, on CPU 0 when everything is up, and ends the machine.
    pub(crate) fn run(&self, boot: &Boot) -> ! {
        boot.check();
        (self.main)(boot);
        boot.expect_all_asked();
        test::pass()
    }
}

/// Code of a kernel that runs before its CPUs are set up: no interrupts, no per-CPU area, `cpu::index()` unknown.
#[derive(Clone, Copy, Debug)]
pub struct Hooks {
    /// On CPU 0, as soon as memory is mapped: the moment at which kernels give their heap its first region.
    pub early: Option<fn(&Boot)>,
    /// On each CPU, to allocate its own per-CPU area (zeroed by the caller); `None` takes it from boot memory.
    pub per_cpu_area: Option<fn(Layout) -> *mut u8>,
}

impl Hooks {
    /// Nothing is hooked.
    #[must_use]
    pub const fn none() -> Self {
        Self { early: None, per_cpu_area: None }
    }
}

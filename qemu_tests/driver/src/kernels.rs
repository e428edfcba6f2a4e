//! Which kernel boots on which machines: one line per kernel makes it a row of `cargo test`.

use core::time::Duration;

use crate::{Boot, Machine};

use Machine::{Microvm, Q35};

/// How one test kernel is booted.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// The name of its test: that of its file, or file and variant (`storm+pinned`).
    pub name: &'static str,
    /// The boards it runs on.
    pub machines: &'static [Machine],
    /// The CPU counts it runs with.
    pub cpus: &'static [u32],
    /// RAM in MiB.
    pub memory_mib: u32,
    /// After how many seconds it counts as hung. Generous: a loaded two-core host is slow, a hang is for ever.
    pub seconds: u64,
    /// Its command line.
    pub args: &'static [&'static str],
    /// More arguments of QEMU.
    pub qemu_args: &'static [&'static str],
}

impl Kernel {
    /// The defaults that a row of the table starts from.
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            machines: &[Microvm],
            cpus: &[1, 2, 4, 8],
            memory_mib: 256,
            seconds: 120,
            args: &[],
            qemu_args: &[],
        }
    }

    /// The boot of this kernel on one machine with so many CPUs.
    pub fn boot(&self, machine: Machine, cpus: u32) -> Boot {
        let file = self.name.split_once('+').map_or(self.name, |(file, _)| file);
        Boot::new(file)
            .machine(machine)
            .cpus(cpus)
            .memory_mib(self.memory_mib)
            .time_limit(Duration::from_secs(self.seconds))
            .args(self.args.iter().copied())
            .qemu_args(self.qemu_args.iter().copied())
    }
}

/// Every test kernel. What differs from [`Kernel::new`]'s defaults stands in its row.
#[rustfmt::skip]
pub const KERNELS: &[Kernel] = &[
    Kernel { machines: &[Microvm, Q35], ..Kernel::new("boot") },
    Kernel::new("tasks"),
];

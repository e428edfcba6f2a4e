//! Processor architectures: what differs between them on the host's side.

use std::fmt;

use clap::ValueEnum;

use crate::Machine;

/// What the test kernels are built for and QEMU emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Arch {
    /// PCs.
    #[value(name = "x86_64")]
    X86_64,
    /// 64-bit Arm.
    Aarch64,
    /// 64-bit RISC-V.
    Riscv64,
}

/// What a kernel needs that not every architecture has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// Interrupts that the kernel's own masking lets through: NMIs, or FIQs beside masked IRQs.
    Nmi,
    /// Interrupts that the heap's masking pin lets through. On aarch64 it masks FIQs too.
    NmiPastPin,
    /// The paging provider, which is for the page tables of x86-64.
    PageTables,
}

impl Arch {
    /// The name that stands in test names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
            Self::Riscv64 => "riscv64",
        }
    }

    /// The target that the test kernels are built for.
    #[must_use]
    pub fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-none",
            // The kernel's interrupt handlers save no vector registers.
            Self::Aarch64 => "aarch64-unknown-none-softfloat",
            Self::Riscv64 => "riscv64gc-unknown-none-elf",
        }
    }

    /// The emulator.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86_64",
            Self::Aarch64 => "qemu-system-aarch64",
            Self::Riscv64 => "qemu-system-riscv64",
        }
    }

    /// The board that boots fastest.
    #[must_use]
    pub fn machine(self) -> Machine {
        match self {
            Self::X86_64 => Machine::Microvm,
            Self::Aarch64 => Machine::VirtAarch64,
            Self::Riscv64 => Machine::VirtRiscv64,
        }
    }

    /// Whether kernels that need something find it.
    #[must_use]
    pub fn has(self, needs: Needs) -> bool {
        match self {
            Self::X86_64 => true,
            Self::Aarch64 => matches!(needs, Needs::Nothing | Needs::Nmi),
            Self::Riscv64 => needs == Needs::Nothing,
        }
    }

    /// QEMU's arguments by which an instruction takes one count of the guest's timer or a little more, and time passes
    /// with the instructions: a run is the same each time. The timer of riscv64 counts every 100 ns.
    pub(crate) fn counting(self) -> &'static [&'static str] {
        match self {
            Self::X86_64 | Self::Aarch64 => &["-icount", "shift=0,sleep=off"],
            Self::Riscv64 => &["-icount", "shift=7,sleep=off"],
        }
    }

    /// With how many CPUs a kernel boots while QEMU counts instructions: QEMU 7.2's riscv64 then starts no second one.
    pub(crate) fn max_counting_cpus(self) -> u32 {
        match self {
            Self::X86_64 | Self::Aarch64 => u32::MAX,
            Self::Riscv64 => 1,
        }
    }

    /// All of them.
    pub const ALL: [Self; 3] = [Self::X86_64, Self::Aarch64, Self::Riscv64];
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

//! Where QEMU is and how its command line looks.
//!
//! The emulator is always TCG, said explicitly: some hosts offer hardware virtualisation that runs guest kernels a
//! thousand times slower, and a test that depends on the host's CPU cannot be repeated. Several CPUs run on several
//! host threads (`thread=multi`), so that races are real ones.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fmt};

use crate::{Arch, Boot, Failure};

/// The board that QEMU emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// The smallest PC: boots several times faster than the others, which is why most tests use it.
    Microvm,
    /// A PC as kernels meet it: PCI Express, more firmware, holes in the memory map.
    Q35,
    /// The board of virtual devices for aarch64: GICv3, and a call for the debugger that ends a run.
    VirtAarch64,
    /// That for riscv64, over OpenSBI.
    VirtRiscv64,
}

impl Machine {
    /// The name that stands in test names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Microvm => "microvm",
            Self::Q35 => "q35",
            Self::VirtAarch64 | Self::VirtRiscv64 => "virt",
        }
    }

    /// The architecture of its processor.
    #[must_use]
    pub fn arch(self) -> Arch {
        match self {
            Self::Microvm | Self::Q35 => Arch::X86_64,
            Self::VirtAarch64 => Arch::Aarch64,
            Self::VirtRiscv64 => Arch::Riscv64,
        }
    }

    /// The board, its processor, and the device by which a kernel ends a run with an exit code.
    fn options(self) -> &'static [&'static str] {
        const EXIT: &str = "isa-debug-exit,iobase=0xf4,iosize=0x04";
        match self {
            // A kernel finds its CPUs in the ACPI tables.
            Self::Microvm => &["-machine", "microvm,acpi=on", "-cpu", "max", "-device", EXIT],
            Self::Q35 => &["-machine", "q35", "-cpu", "max", "-device", EXIT],
            // A count of the timer is a nanosecond.
            Self::VirtAarch64 => &[
                "-machine",
                "virt,gic-version=3",
                "-cpu",
                "max,cntfrq=1000000000",
                "-semihosting-config",
                "enable=on,target=native",
            ],
            Self::VirtRiscv64 => &["-machine", "virt", "-cpu", "rv64"],
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Looks for the QEMU of an architecture in `PATH`.
///
/// # Errors
/// [`Failure::Missing`] with the command that installs it.
pub fn find_qemu(arch: Arch) -> Result<PathBuf, Failure> {
    let program = arch.program();
    in_path(program).next().ok_or_else(|| Failure::Missing(format!("{program} is not in PATH")))
}

/// Every file called `program` in the directories of `PATH`, in their order.
pub(crate) fn in_path(program: &str) -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = env::split_paths(&path).collect();
    let program = program.to_owned();
    dirs.into_iter().filter(|dir| dir.is_absolute()).map(move |dir| dir.join(&program)).filter(|file| file.is_file())
}

/// The command that boots `elf` as `boot` says, its output on a pipe and its input closed.
pub(crate) fn command(qemu: &Path, elf: &Path, boot: &Boot) -> Command {
    let mut command = Command::new(qemu);
    let threads = if boot.threads() > 1 { "multi" } else { "single" };
    command
        .args(boot.machine.options())
        .args(["-accel", &format!("tcg,thread={threads}")])
        .args(["-smp", &boot.cpus.to_string()])
        .args(["-m", &format!("{}M", boot.memory_mib)])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .args([OsStr::new("-kernel"), elf.as_os_str()]);
    if !boot.args.is_empty() {
        command.args(["-append", &boot.args.join(" ")]);
    }
    if let Some(initrd) = &boot.initrd {
        command.args([OsStr::new("-initrd"), initrd.as_os_str()]);
    }
    if boot.counting {
        command.args(boot.machine.arch().counting());
    }
    command.args(&boot.qemu_args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

//! Measures the instructions of each operation of the heap, and its size, and prints the table or makes it the
//! committed one.

use std::process::ExitCode;

use clap::Parser;
use smp_heap_qemu::{Arch, BareMetal, KERNELS, Rows, Soak, Table, sizes};

/// Counts the instructions of each operation of the heap in QEMU, on 1 to 8 CPUs in each mode (on riscv64 on one), and
/// the heap's bytes in a kernel.
#[derive(Debug, Parser)]
struct Options {
    /// The architecture whose budgets they are.
    #[arg(long, value_enum, default_value_t = Arch::X86_64)]
    arch: Arch,
    /// Make what is measured the budgets.
    #[arg(long)]
    write: bool,
}

fn main() -> ExitCode {
    match measure(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<(), String> {
    let toolchain = BareMetal::find(options.arch.target()).map_err(|failure| failure.to_string())?;
    let soak = Soak::from_env()?;
    let mut table = Table::new(toolchain.version());
    for kernel in KERNELS {
        let Some(mode) = kernel.budgets else { continue };
        let rows = kernel.rows(Rows::All);
        for (machine, cpus) in rows.filter(|(machine, _)| machine.arch() == options.arch) {
            eprintln!("{} on {cpus} CPUs", kernel.name);
            let passed = kernel.boot(machine, cpus, soak).run(|_| ()).map_err(|failure| failure.to_string())?;
            table.add(mode, &passed.output);
        }
    }
    table.add_sizes(&sizes(options.arch).map_err(|failure| failure.to_string())?);
    if options.write {
        return table.write(options.arch).map_err(|error| format!("the budgets cannot be written: {error}"));
    }
    print!("{}", table.text(options.arch));
    let budgets = Table::read(options.arch)?;
    budgets.modes().into_iter().try_for_each(|mode| budgets.judge(&table, mode, u32::MAX))
}

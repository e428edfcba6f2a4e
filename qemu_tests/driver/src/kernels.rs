//! Which kernel boots on which machines: one line per kernel makes it a row of `cargo test`.

use core::time::Duration;
use std::env;

use crate::{Boot, Machine, Profile};

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
    /// How it is built.
    pub profile: Profile,
    /// The mode under which the table of budgets has what it measures, if it does.
    pub budgets: Option<&'static str>,
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
            profile: Profile::Checked,
            budgets: None,
            args: &[],
            qemu_args: &[],
        }
    }

    /// The boot of this kernel on one machine with so many CPUs.
    ///
    /// `SMP_HEAP_SOAK=10` in the environment makes every kernel that goes in rounds go ten times as many, and gives it ten
    /// times as long.
    pub fn boot(&self, machine: Machine, cpus: u32) -> Boot {
        let file = self.name.split_once('+').map_or(self.name, |(file, _)| file);
        let soak = env::var("SMP_HEAP_SOAK").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1_u32);
        Boot::new(file)
            .profile(self.profile)
            .machine(machine)
            .cpus(cpus)
            .memory_mib(self.memory_mib)
            .time_limit(soak.max(1) * Duration::from_secs(self.seconds))
            .args(self.args.iter().copied())
            .arg("soak", soak.max(1))
            .qemu_args(self.qemu_args.iter().copied())
    }
}

/// QEMU counts instructions, one a nanosecond, and time passes with them: a run is the same each time.
const COUNTING: &[&str] = &["-icount", "shift=0,sleep=off"];

impl Kernel {
    /// The defaults of a kernel that looks at single instructions.
    const fn counting(name: &'static str) -> Self {
        Self { cpus: &[1], seconds: 600, qemu_args: COUNTING, ..Self::new(name) }
    }

    /// The defaults of the kernel that measures, in a mode.
    const fn measuring(name: &'static str, mode: &'static str) -> Self {
        Self { cpus: &[1, 2, 4, 8], profile: Profile::Fast, budgets: Some(mode), ..Self::counting(name) }
    }
}

/// Every test kernel. What differs from [`Kernel::new`]'s defaults stands in its row.
#[rustfmt::skip]
pub const KERNELS: &[Kernel] = &[
    Kernel { machines: &[Microvm, Q35], ..Kernel::new("boot") },
    Kernel::new("tasks"),
    Kernel::new("collections"),
    Kernel { cpus: &[2, 4, 8], args: &["mode=hint"], ..Kernel::new("cpus_that_go+hint") },
    Kernel { cpus: &[2, 4, 8], args: &["mode=pinned"], ..Kernel::new("cpus_that_go+pinned") },
    Kernel { cpus: &[2, 4, 8], args: &["mode=hint"], ..Kernel::new("cross_free+hint") },
    Kernel { cpus: &[2, 4, 8], args: &["mode=pinned"], ..Kernel::new("cross_free+pinned") },
    Kernel { args: &["mode=unsure"], ..Kernel::new("early_boot+unsure") },
    Kernel { args: &["mode=pinned"], ..Kernel::new("early_boot+pinned") },
    Kernel { args: &["mode=hint", "raise=interrupt"], ..Kernel::counting("every_instruction+hint_interrupt") },
    Kernel { args: &["mode=hint", "raise=nmi"], ..Kernel::counting("every_instruction+hint_nmi") },
    Kernel { args: &["mode=hint", "raise=panic"], ..Kernel::counting("every_instruction+hint_panic") },
    Kernel { args: &["mode=pinned", "raise=interrupt"], ..Kernel::counting("every_instruction+pinned_interrupt") },
    Kernel { args: &["mode=pinned", "raise=nmi"], ..Kernel::counting("every_instruction+pinned_nmi") },
    Kernel { args: &["mode=pinned", "raise=panic"], ..Kernel::counting("every_instruction+pinned_panic") },
    Kernel { args: &["mode=masked", "raise=interrupt"], ..Kernel::counting("every_instruction+masked_interrupt") },
    Kernel { args: &["mode=masked", "raise=nmi"], ..Kernel::counting("every_instruction+masked_nmi") },
    Kernel { args: &["mode=masked", "raise=panic"], ..Kernel::counting("every_instruction+masked_panic") },
    Kernel { cpus: &[2, 4, 8], seconds: 600, args: &["mode=hint"], ..Kernel::new("every_storm+hint") },
    Kernel { cpus: &[2, 4, 8], seconds: 600, args: &["mode=counted"], ..Kernel::new("every_storm+counted") },
    Kernel { cpus: &[2, 4, 8], seconds: 600, args: &["mode=masked"], ..Kernel::new("every_storm+masked") },
    Kernel { args: &["mode=hint"], ..Kernel::new("exhaustion+hint") },
    Kernel { args: &["mode=pinned"], ..Kernel::new("exhaustion+pinned") },
    Kernel { cpus: &[1, 2, 4], args: &["mode=hint", "small"], ..Kernel::new("exhaustion+small_hint") },
    Kernel { cpus: &[1, 2, 4], args: &["mode=pinned", "small"], ..Kernel::new("exhaustion+small_pinned") },
    Kernel { args: &["mode=hint"], ..Kernel::new("failing_provider+hint") },
    Kernel { args: &["mode=pinned"], ..Kernel::new("failing_provider+pinned") },
    Kernel { args: &["mode=hint"], ..Kernel::new("fresh_start+hint") },
    Kernel { args: &["mode=pinned"], ..Kernel::new("fresh_start+pinned") },
    Kernel::new("growing"),
    Kernel { cpus: &[1, 2, 4], profile: Profile::Guarded, ..Kernel::new("guarded") },
    Kernel { profile: Profile::Guarded, args: &["price"], ..Kernel::counting("guarded+price") },
    Kernel { args: &["mode=hint"], ..Kernel::measuring("instructions+hint", "hint") },
    Kernel { args: &["mode=pinned"], ..Kernel::measuring("instructions+pinned", "pinned") },
    Kernel { args: &["mode=masked"], ..Kernel::measuring("instructions+masked", "masked") },
    Kernel { memory_mib: 512, args: &["mode=hint"], ..Kernel::new("layouts+hint") },
    Kernel { memory_mib: 512, args: &["mode=pinned"], ..Kernel::new("layouts+pinned") },
    Kernel::new("lying_ids"),
    Kernel { args: &["mode=hint"], ..Kernel::new("migration+hint") },
    Kernel { args: &["mode=counted"], ..Kernel::new("migration+counted") },
    Kernel { args: &["mode=masked"], ..Kernel::new("migration+masked") },
    Kernel { cpus: &[2, 4, 8], args: &["mode=hint"], ..Kernel::new("nmi_storm+hint") },
    Kernel { cpus: &[2, 4, 8], args: &["mode=pinned"], ..Kernel::new("nmi_storm+pinned") },
    Kernel { cpus: &[2, 4, 8], args: &["mode=masked"], ..Kernel::new("nmi_storm+masked") },
    Kernel { seconds: 600, args: &["mode=hint"], ..Kernel::new("paging+hint") },
    Kernel { seconds: 600, args: &["mode=pinned"], ..Kernel::new("paging+pinned") },
    Kernel { args: &["mode=hint"], ..Kernel::new("provider_calls_heap+hint") },
    Kernel { args: &["mode=pinned"], ..Kernel::new("provider_calls_heap+pinned") },
    Kernel { args: &["mode=masked"], ..Kernel::new("provider_calls_heap+masked") },
    Kernel { args: &["mode=hint", "shootdown"], ..Kernel::new("provider_calls_heap+shootdown_hint") },
    Kernel { args: &["mode=pinned", "shootdown"], ..Kernel::new("provider_calls_heap+shootdown_pinned") },
    Kernel { args: &["mode=hint"], ..Kernel::new("timer_storm+hint") },
    Kernel { args: &["mode=pinned"], ..Kernel::new("timer_storm+pinned") },
    Kernel { args: &["mode=counted"], ..Kernel::new("timer_storm+counted") },
    Kernel { args: &["mode=masked"], ..Kernel::new("timer_storm+masked") },
    // So much that some of it lies above 4 GiB. The host has to back only what is written to.
    Kernel { memory_mib: 3584, ..Kernel::new("zones") },
];

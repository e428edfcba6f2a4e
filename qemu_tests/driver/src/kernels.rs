//! Which kernel boots on which machines: one line per kernel makes it a row of `cargo test`.

use core::num::NonZeroU32;
use core::time::Duration;
use std::env;

use crate::{Arch, Boot, Machine, Needs, Profile};

use Machine::{Microvm, Q35};
use Needs::{Nmi, NmiPastPin, PageTables};

/// How one test kernel is booted.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// The name of its test: that of its file, or file and variant (`storm+pinned`).
    pub name: &'static str,
    /// The boards for x86-64 that it runs on.
    pub machines: &'static [Machine],
    /// The CPU counts it runs with.
    pub cpus: &'static [u32],
    /// Those of them that it runs with on the boards for other architectures too, unless [all rows](Rows::All) are
    /// wanted.
    pub elsewhere: &'static [u32],
    /// What it needs that not every architecture has.
    pub needs: Needs,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// How many seconds of processor time it may use on a CPU before it counts as hung: six times what it was seen to
    /// use, or more.
    pub seconds: u64,
    /// How it is built.
    pub profile: Profile,
    /// The mode under which the table of budgets has what it measures, if it does.
    pub budgets: Option<&'static str>,
    /// Its command line.
    pub args: &'static [&'static str],
    /// Whether QEMU counts instructions: a run is the same each time.
    pub counting: bool,
    /// What it has to tell that it did, at least, on every machine and CPU count: kinds of work, and how much of each.
    pub least: Least,
}

/// Kinds of work, and how much of each.
pub type Least = &'static [(&'static str, u64)];

impl Kernel {
    /// The defaults that a row of the table starts from.
    const fn new(name: &'static str, least: Least) -> Self {
        Self {
            name,
            machines: &[Microvm],
            cpus: &[1, 2, 4, 8],
            elsewhere: &[],
            needs: Needs::Nothing,
            memory_mib: 256,
            seconds: 60,
            profile: Profile::Checked,
            budgets: None,
            args: &[],
            counting: false,
            least,
        }
    }

    /// The name of its file.
    pub(crate) fn file(&self) -> &'static str {
        self.name.split_once('+').map_or(self.name, |(file, _)| file)
    }

    /// The boot of this kernel on one machine with so many CPUs.
    pub fn boot(&self, machine: Machine, cpus: u32, soak: Soak) -> Boot {
        Boot::new(self.file())
            .profile(self.profile)
            .machine(machine)
            .cpus(cpus)
            .memory_mib(self.memory_mib)
            .time_limit(soak.0.get() * Duration::from_secs(self.seconds))
            .args(self.args.iter().copied())
            .arg("cpus", cpus)
            .arg("soak", soak.0)
            .least(&self.due(machine.arch()))
            .counting(self.counting)
    }

    /// What it has to do at least on an architecture: nobody counts NMIs where there are none.
    fn due(&self, arch: Arch) -> Vec<(&'static str, u64)> {
        self.least.iter().copied().filter(|(what, _)| *what != "nmis" || arch.has(Nmi)).collect()
    }

    /// Each machine and CPU count that it is booted with.
    pub fn rows(&self, which: Rows) -> impl Iterator<Item = (Machine, u32)> {
        let elsewhere = if which == Rows::All { self.cpus } else { self.elsewhere };
        let others = [Arch::Aarch64, Arch::Riscv64].into_iter().filter(|arch| arch.has(self.needs));
        let machines = self.machines.iter().map(|machine| (*machine, self.cpus));
        let machines = machines.chain(others.map(move |arch| (arch.machine(), elsewhere)));
        let rows = machines.flat_map(|(machine, cpus)| cpus.iter().map(move |cpus| (machine, *cpus)));
        rows.filter(|(machine, cpus)| !self.counting || *cpus <= machine.arch().max_counting_cpus())
    }

    /// What is wrong with this row, if it could pass without a kernel that did something.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        let without = |what: &str| Some(format!("the row `{}` of the test kernels has no {what}", self.name));
        match self {
            Self { machines: [], .. } => without("machine"),
            Self { cpus: [], .. } => without("CPU count"),
            Self { cpus, elsewhere, .. } if !elsewhere.iter().all(|count| cpus.contains(count)) => {
                without("CPU count that it has elsewhere")
            }
            _ if self.least.is_empty() || self.least.iter().any(|(_, count)| *count == 0) => {
                without("work that it has to do at least")
            }
            _ => None,
        }
    }
}

/// Which rows there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// On x86-64 all; on other architectures those that show what is different there.
    Chosen,
    /// All on every architecture that has what they need.
    All,
}

impl Rows {
    /// The environment variable that says it.
    pub const VARIABLE: &'static str = "SMP_HEAP_ROWS";

    /// What the environment says; the chosen ones without it.
    ///
    /// # Errors
    /// If it says something else than `chosen` or `all`.
    pub fn from_env() -> Result<Self, String> {
        match env::var(Self::VARIABLE) {
            Err(env::VarError::NotPresent) => Ok(Self::Chosen),
            Err(error) => Err(format!("{}: {error}", Self::VARIABLE)),
            Ok(text) => match text.as_str() {
                "chosen" => Ok(Self::Chosen),
                "all" => Ok(Self::All),
                _ => Err(format!("{}={text} is neither `chosen` nor `all`", Self::VARIABLE)),
            },
        }
    }
}

/// How many times as much every kernel does that goes in rounds, and how many times as long it may take for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Soak(NonZeroU32);

impl Soak {
    /// The environment variable that says it.
    pub const VARIABLE: &'static str = "SMP_HEAP_SOAK";

    /// What the environment says; once without it.
    ///
    /// # Errors
    /// If it says something else than a number above 0.
    pub fn from_env() -> Result<Self, String> {
        match env::var(Self::VARIABLE) {
            Err(env::VarError::NotPresent) => Ok(Self(NonZeroU32::MIN)),
            Err(error) => Err(format!("{}: {error}", Self::VARIABLE)),
            Ok(text) => Self::parse(&text),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|error| format!("{}={text} is not a number above 0: {error}", Self::VARIABLE))
    }
}

impl Kernel {
    /// The defaults of a kernel that looks at single instructions.
    const fn counting(name: &'static str, least: Least) -> Self {
        Self { cpus: &[1], seconds: 180, counting: true, ..Self::new(name, least) }
    }

    /// The defaults of the kernel that measures, in a mode.
    const fn measuring(name: &'static str, mode: &'static str) -> Self {
        let least = &[("measured", 25)];
        Self { cpus: &[1, 2, 4, 8], profile: Profile::Fast, budgets: Some(mode), ..Self::counting(name, least) }
    }
}

const RAISED: Least = &[("places", 2_000), ("nested_requests", 20_000)];
const PANICS: Least = &[("places", 4_000), ("panics", 4_000)];
const NMIS: Least = &[("interrupts", 150), ("interrupts_inside", 8), ("nested_requests", 450)];
const TICKS: Least = &[("interrupts", 250), ("interrupts_inside", 12), ("nested_requests", 750)];
const EVERY_STORM: Least = &[("operations", 100_000), ("migrations", 500), ("interrupts", 200)];
const GONE: Least = &[("retired", 3), ("served", 15_000)];
const ELSEWHERE: Least = &[("freed_elsewhere", 8_000)];
const EARLY: Least = &[("areas", 1), ("blocks", 2_000)];
const FULL: Least = &[("blocks", 500_000)];
const SMALL: Least = &[("blocks", 1_000)];
const FAILURES: Least = &[("failures", 1_000), ("cached_runs", 1)];
const FRESH: Least = &[("blocks", 160)];
const GUARDED: Least = &[("faults", 6), ("guarded", 5)];
const PRICE: Least = &[("steps", 800_000), ("guarded", 1_000)];
const PAGING: Least = &[("blocks", 5_000), ("shootdowns", 300), ("refused_maps", 5)];
const CALLS: Least = &[("provider_calls", 30), ("blocks", 100), ("interrupts", 50)];
const SHOOTDOWNS: Least = &[("shootdowns", 30), ("blocks", 100), ("interrupts", 50)];
const HANDLERS: Least = &[("handlers", 100)];
const ANSWERS: Least = &[("answers", 4)];
const MIGRATION: Least = &[("blocks", 120_000), ("preemptions", 20)];

/// Every test kernel. What differs from [`Kernel::new`]'s defaults stands in its row.
#[rustfmt::skip]
pub const KERNELS: &[Kernel] = &[
    Kernel {
        elsewhere: &[1, 2, 4, 8], machines: &[Microvm, Q35],
        ..Kernel::new("boot", &[("cpus", 1), ("faults", 1), ("nmis", 1)])
    },
    Kernel { elsewhere: &[4], ..Kernel::new("tasks", &[("threads", 80), ("preemptions", 17)]) },
    Kernel { elsewhere: &[4], ..Kernel::new("collections", &[("shared_texts", 12), ("interrupts", 10)]) },
    Kernel { elsewhere: &[4], cpus: &[2, 4, 8], args: &["mode=hint"], ..Kernel::new("cpus_that_go+hint", GONE) },
    Kernel { cpus: &[2, 4, 8], args: &["mode=pinned"], ..Kernel::new("cpus_that_go+pinned", GONE) },
    Kernel { cpus: &[4], args: &["mode=addr"], ..Kernel::new("cpus_that_go+addr", GONE) },
    Kernel { cpus: &[2, 4, 8], args: &["mode=hint"], ..Kernel::new("cross_free+hint", ELSEWHERE) },
    Kernel { elsewhere: &[4], cpus: &[2, 4, 8], args: &["mode=pinned"], ..Kernel::new("cross_free+pinned", ELSEWHERE) },
    Kernel { cpus: &[4], args: &["mode=addr"], ..Kernel::new("early_boot+addr", EARLY) },
    Kernel { args: &["mode=unsure"], ..Kernel::new("early_boot+unsure", EARLY) },
    Kernel { args: &["mode=pinned"], ..Kernel::new("early_boot+pinned", EARLY) },
    Kernel { elsewhere: &[4], args: &["mode=area"], ..Kernel::new("early_boot+area", EARLY) },
    Kernel {
        elsewhere: &[1], args: &["mode=hint", "raise=interrupt"],
        ..Kernel::counting("every_instruction+hint_interrupt", RAISED)
    },
    Kernel { needs: Nmi, args: &["mode=hint", "raise=nmi"], ..Kernel::counting("every_instruction+hint_nmi", RAISED) },
    Kernel { args: &["mode=hint", "raise=panic"], ..Kernel::counting("every_instruction+hint_panic", PANICS) },
    Kernel {
        elsewhere: &[1], args: &["mode=pinned", "raise=interrupt"],
        ..Kernel::counting("every_instruction+pinned_interrupt", RAISED)
    },
    Kernel {
        elsewhere: &[1], needs: Nmi, args: &["mode=pinned", "raise=nmi"],
        ..Kernel::counting("every_instruction+pinned_nmi", RAISED)
    },
    Kernel { args: &["mode=pinned", "raise=panic"], ..Kernel::counting("every_instruction+pinned_panic", PANICS) },
    Kernel {
        args: &["mode=addr", "raise=interrupt"],
        ..Kernel::counting("every_instruction+addr_interrupt", RAISED)
    },
    Kernel {
        args: &["mode=masked", "raise=interrupt"],
        ..Kernel::counting("every_instruction+masked_interrupt", RAISED)
    },
    Kernel {
        needs: NmiPastPin, args: &["mode=masked", "raise=nmi"],
        ..Kernel::counting("every_instruction+masked_nmi", RAISED)
    },
    Kernel {
        needs: NmiPastPin, args: &["mode=masked", "raise=panic"],
        ..Kernel::counting("every_instruction+masked_panic", PANICS)
    },
    Kernel { elsewhere: &[4], cpus: &[2, 4, 8], args: &["mode=hint"], ..Kernel::new("every_storm+hint", EVERY_STORM) },
    Kernel {
        elsewhere: &[4], cpus: &[2, 4, 8], args: &["mode=counted"],
        ..Kernel::new("every_storm+counted", EVERY_STORM)
    },
    Kernel {
        cpus: &[4], args: &["mode=counted_addr"],
        ..Kernel::new("every_storm+counted_addr", EVERY_STORM)
    },
    Kernel { cpus: &[2, 4, 8], args: &["mode=masked"], ..Kernel::new("every_storm+masked", EVERY_STORM) },
    Kernel { args: &["mode=hint"], ..Kernel::new("exhaustion+hint", FULL) },
    Kernel { args: &["mode=pinned"], ..Kernel::new("exhaustion+pinned", FULL) },
    Kernel {
        elsewhere: &[4], cpus: &[1, 2, 4], args: &["mode=hint", "small"],
        ..Kernel::new("exhaustion+small_hint", SMALL)
    },
    Kernel { cpus: &[1, 2, 4], args: &["mode=pinned", "small"], ..Kernel::new("exhaustion+small_pinned", SMALL) },
    Kernel { args: &["mode=hint"], ..Kernel::new("failing_provider+hint", FAILURES) },
    Kernel { args: &["mode=pinned"], ..Kernel::new("failing_provider+pinned", FAILURES) },
    Kernel { args: &["mode=hint"], ..Kernel::new("fresh_start+hint", FRESH) },
    Kernel { elsewhere: &[4], args: &["mode=pinned"], ..Kernel::new("fresh_start+pinned", FRESH) },
    Kernel {
        cpus: &[1, 4], args: &["mode=hint"], profile: Profile::Fast,
        ..Kernel::counting("full_house+hint", HANDLERS)
    },
    Kernel {
        cpus: &[1, 4], args: &["mode=pinned"], profile: Profile::Fast,
        ..Kernel::counting("full_house+pinned", HANDLERS)
    },
    Kernel { needs: PageTables, seconds: 120, ..Kernel::new("growing", &[("vectors", 9), ("shootdowns", 10)]) },
    Kernel { needs: PageTables, cpus: &[1, 2, 4], profile: Profile::Guarded, ..Kernel::new("guarded", GUARDED) },
    Kernel {
        needs: PageTables, profile: Profile::Guarded, args: &["price"],
        ..Kernel::counting("guarded+price", PRICE)
    },
    Kernel { elsewhere: &[4], ..Kernel::new("identities", &[("cpus", 1)]) },
    Kernel { args: &["mode=hint"], ..Kernel::measuring("instructions+hint", "hint") },
    Kernel { elsewhere: &[1], args: &["mode=pinned"], ..Kernel::measuring("instructions+pinned", "pinned") },
    Kernel { args: &["mode=masked"], ..Kernel::measuring("instructions+masked", "masked") },
    Kernel { cpus: &[1], args: &["mode=bare"], ..Kernel::measuring("instructions+bare", "bare") },
    Kernel { cpus: &[1], args: &["mode=counted"], ..Kernel::measuring("instructions+counted", "counted") },
    Kernel {
        cpus: &[2], profile: Profile::Halves, args: &["mode=pinned"],
        ..Kernel::measuring("instructions+halves", "halves")
    },
    Kernel { memory_mib: 512, args: &["mode=hint"], ..Kernel::new("layouts+hint", &[("batteries", 1)]) },
    Kernel { memory_mib: 512, args: &["mode=pinned"], ..Kernel::new("layouts+pinned", &[("batteries", 1)]) },
    Kernel { elsewhere: &[4], ..Kernel::new("lying_ids", &[("blocks", 28_000), ("interrupts", 50)]) },
    Kernel {
        elsewhere: &[2], cpus: &[2, 4], seconds: 180, args: &["mode=hint"],
        ..Kernel::new("masked_request+hint", ANSWERS)
    },
    Kernel {
        cpus: &[2, 4], seconds: 180, args: &["mode=pinned"],
        ..Kernel::new("masked_request+pinned", ANSWERS)
    },
    Kernel {
        cpus: &[2, 4], seconds: 180, args: &["mode=counted"],
        ..Kernel::new("masked_request+counted", ANSWERS)
    },
    Kernel {
        elsewhere: &[2], cpus: &[2, 4], seconds: 180, args: &["mode=masked"],
        ..Kernel::new("masked_request+masked", ANSWERS)
    },
    Kernel { args: &["mode=hint"], ..Kernel::new("migration+hint", MIGRATION) },
    Kernel { elsewhere: &[4], args: &["mode=counted"], ..Kernel::new("migration+counted", MIGRATION) },
    Kernel { elsewhere: &[4], args: &["mode=masked"], ..Kernel::new("migration+masked", MIGRATION) },
    Kernel {
        elsewhere: &[4], needs: Nmi, cpus: &[2, 4, 8], args: &["mode=hint"],
        ..Kernel::new("nmi_storm+hint", NMIS)
    },
    Kernel { needs: Nmi, cpus: &[2, 4, 8], args: &["mode=pinned"], ..Kernel::new("nmi_storm+pinned", NMIS) },
    Kernel { needs: NmiPastPin, cpus: &[2, 4, 8], args: &["mode=masked"], ..Kernel::new("nmi_storm+masked", NMIS) },
    Kernel { needs: PageTables, seconds: 180, args: &["mode=hint"], ..Kernel::new("paging+hint", PAGING) },
    Kernel { needs: PageTables, seconds: 180, args: &["mode=pinned"], ..Kernel::new("paging+pinned", PAGING) },
    Kernel {
        elsewhere: &[1, 4], cpus: &[1, 4], profile: Profile::Fast,
        ..Kernel::new("pin_times", &[("stretches", 300)])
    },
    Kernel { args: &["mode=hint"], ..Kernel::new("provider_calls_heap+hint", CALLS) },
    Kernel { args: &["mode=pinned"], ..Kernel::new("provider_calls_heap+pinned", CALLS) },
    Kernel { args: &["mode=masked"], ..Kernel::new("provider_calls_heap+masked", CALLS) },
    Kernel { args: &["mode=hint", "shootdown"], ..Kernel::new("provider_calls_heap+shootdown_hint", SHOOTDOWNS) },
    Kernel {
        elsewhere: &[4], args: &["mode=pinned", "shootdown"],
        ..Kernel::new("provider_calls_heap+shootdown_pinned", SHOOTDOWNS)
    },
    Kernel {
        elsewhere: &[1], cpus: &[1], memory_mib: 512, args: &["mode=hint"],
        ..Kernel::counting("steady+hint", &[("replacements", 150_000)])
    },
    Kernel {
        elsewhere: &[1], cpus: &[1], memory_mib: 512, args: &["mode=pinned"],
        ..Kernel::counting("steady+pinned", &[("replacements", 150_000)])
    },
    Kernel { elsewhere: &[4], args: &["mode=hint"], ..Kernel::new("timer_storm+hint", TICKS) },
    Kernel { elsewhere: &[4], args: &["mode=pinned"], ..Kernel::new("timer_storm+pinned", TICKS) },
    Kernel { args: &["mode=counted"], ..Kernel::new("timer_storm+counted", TICKS) },
    Kernel { elsewhere: &[1], cpus: &[1], args: &["mode=only"], ..Kernel::new("timer_storm+only", TICKS) },
    Kernel { elsewhere: &[4], args: &["mode=masked"], ..Kernel::new("timer_storm+masked", TICKS) },
    // So much that some of it lies above 4 GiB. The host has to back only what is written to.
    Kernel { needs: PageTables, memory_mib: 3584, ..Kernel::new("zones", &[("blocks", 300)]) },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_boots_nothing_is_a_fault() {
        let row = Kernel::new("row", &[("blocks", 1)]);
        assert_eq!(row.fault(), None);
        for (row, what) in [
            (Kernel { cpus: &[], ..row }, "CPU count"),
            (Kernel { machines: &[], ..row }, "machine"),
            (Kernel { least: &[], ..row }, "work"),
            (Kernel { least: &[("blocks", 0)], ..row }, "work"),
        ] {
            assert!(row.fault().is_some_and(|fault| fault.contains("`row`") && fault.contains(what)), "{row:?}");
        }
    }

    #[test]
    fn a_soak_factor_is_a_number_above_0() {
        assert_eq!(Soak::parse("10").map(|soak| soak.0.get()), Ok(10));
        for wrong in ["1O", "0", "", "-1", "1.5", " 2"] {
            assert!(Soak::parse(wrong).is_err_and(|why| why.contains("SMP_HEAP_SOAK")), "{wrong}");
        }
    }
}

//! The tables.

use std::{fmt::Write as _, fs};

use console::Term;
use smp_heap_view::bytes;

use super::protocol::{Recording, Work};

/// `1 CPU`, `2 CPUs`.
pub(crate) fn cpus(count: u32) -> String {
    if count == 1 { "1 CPU".to_owned() } else { format!("{count} CPUs") }
}

/// Units per second.
pub(crate) fn rate(per_second: f64, unit: &str) -> String {
    if unit == "byte" {
        format!("{}/s", bytes(per_second))
    } else {
        let (value, scale) = match per_second {
            ..999.5 => (per_second, ""),
            ..999_500.0 => (per_second / 1e3, "k"),
            _ => (per_second / 1e6, "M"),
        };
        format!("{} {scale}{unit}s/s", digits(value))
    }
}

/// A factor: how many times as much.
fn times(factor: f64) -> String {
    format!("{}x", digits(factor))
}

/// Three significant digits, or all before the point.
fn digits(value: f64) -> String {
    let places = match value {
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{value:.places$}")
}

/// The mean of factors, as factors are averaged; none of none.
fn geometric_mean(factors: &[f64]) -> Option<f64> {
    (!factors.is_empty()).then(|| (factors.iter().map(|factor| factor.ln()).sum::<f64>() / factors.len() as f64).exp())
}

/// How many times the work of one CPU `cpus` CPUs did, on the mean over all kinds of work.
fn growth(recording: &Recording, cpus: u32) -> Option<f64> {
    let factor = |work: &Work| Some(recording.rate(cpus, &work.name)? / recording.rate(1, &work.name)?);
    geometric_mean(&recording.works.iter().filter_map(factor).collect::<Vec<_>>())
}

/// How wide the terminal is, as far as there is one.
pub(crate) fn terminal_width() -> usize {
    let width = Term::stdout().size_checked().map_or(100, |(_, width)| usize::from(width));
    width.clamp(40, 200)
}

/// Work per second of both heaps on each number of CPUs.
pub(crate) fn comparison(ours: &Recording, other: &Recording, phases: &[u32]) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = comparison_into(&mut text, ours, other, phases);
    text
}

fn comparison_into(text: &mut String, ours: &Recording, other: &Recording, phases: &[u32]) -> std::fmt::Result {
    let last = phases.last().copied().unwrap_or(1);
    writeln!(text, "Work per second, {} against {}", ours.heap, other.heap)?;
    writeln!(text)?;
    for Work { name, about, .. } in &ours.works {
        writeln!(text, "  {name:<8} {about}")?;
    }
    writeln!(text)?;
    writeln!(text, "  {:<8} {:<7} {:>16} {:>16} {:>8}", "", "", ours.heap, other.heap, "ratio")?;
    for count in phases {
        let mut ratios = Vec::new();
        let mut label = cpus(*count);
        for Work { name, unit, .. } in &ours.works {
            let (Some(mine), Some(its)) = (ours.rate(*count, name), other.rate(*count, name)) else {
                continue;
            };
            ratios.push(mine / its);
            writeln!(
                text,
                "  {label:<8} {name:<7} {:>16} {:>16} {:>8}",
                rate(mine, unit),
                rate(its, unit),
                times(mine / its)
            )?;
            label.clear();
        }
        if let Some(mean) = geometric_mean(&ratios) {
            writeln!(text, "  {:<8} {:<7} {:>16} {:>16} {:>8}", "", "mean", "", "", times(mean))?;
        }
        for heap in [ours, other] {
            let (count, refused) = heap.ticks.get(count).copied().unwrap_or_default();
            let refused = if refused == 0 { "none refused".to_owned() } else { format!("{refused} refused") };
            writeln!(text, "  {:<8} {:<7} timer interrupts that allocated: {count}, {refused}", "", heap.heap)?;
        }
        writeln!(text)?;
    }
    if let (Some(mine), Some(its), true) = (growth(ours, last), growth(other, last), last > 1) {
        writeln!(
            text,
            "  {} did {} of the work of 1 CPU with {}, {} with {} (geometric means).",
            cpus(last),
            times(mine),
            ours.heap,
            times(its),
            other.heap
        )?;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    writeln!(
        text,
        "  Measured in an emulator (TCG) on {cores} host core{}: more virtual CPUs than that take turns, so the best that\n  \
         any heap can do there is {cores}x, and a CPU that is not running may be the one that holds the lock.",
        if cores == 1 { "" } else { "s" },
    )
}

/// How many other programs want a core, on the mean over the last minute, where the system tells; to be asked before
/// anything is started.
pub(crate) fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// A remark for a host that was not idle.
pub(crate) fn remark(load: Option<f64>) -> Option<String> {
    let load = load.filter(|load| *load > 0.5)?;
    Some(format!(
        "  The host was busy before this began (load {load:.1}): the numbers are lower and less even than they could be."
    ))
}

/// The heap's own statistics, as it printed them.
pub(crate) fn statistics(ours: &Recording) -> String {
    let mut text = format!("{} in numbers, while all CPUs hold what they made:\n\n", ours.heap);
    for line in &ours.stats {
        text.push_str("  ");
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// What stands over the picture.
pub(crate) fn caption(ours: &Recording) -> String {
    let works: Vec<&str> = ours.works.iter().map(|work| work.name.as_str()).collect();
    let widest = ours.ticks.keys().max().copied().unwrap_or(1);
    format!(
        "{} holds its part of: {}",
        if widest == 1 { "1 CPU".to_owned() } else { format!("each of {widest} CPUs") },
        works.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::protocol::Event;

    fn recording(heap: &'static str, rates: [u64; 2]) -> Recording {
        let mut recording = Recording::new(heap);
        let mut say = |line: String| recording.add(Event::parse(&line).expect("understood").expect("one of ours"));
        say("@work name=json unit=byte about=parse and write".to_owned());
        say("@work name=index unit=word about=where words stand".to_owned());
        for (cpus, rate) in [(1_u64, rates[0]), (2, rates[1])] {
            for cpu in 0..cpus {
                say(format!("@result cpus={cpus} work=json cpu={cpu} units={} micros=1000000", rate / cpus));
                say(format!("@result cpus={cpus} work=index cpu={cpu} units={} micros=2000000", rate / cpus));
            }
            say(format!("@ticks cpus={cpus} count={} refused={}", cpus * 1000, cpus - 1));
        }
        recording
    }

    #[test]
    fn the_comparison_has_a_row_for_each_work_and_cpu_count() {
        let text = comparison(&recording("smp-heap", [2048, 4096]), &recording("LockedHeap", [1024, 512]), &[1, 2]);
        let expected = "\
Work per second, smp-heap against LockedHeap

  json     parse and write
  index    where words stand

                           smp-heap       LockedHeap    ratio
  1 CPU    json          2.00 KiB/s       1.00 KiB/s    2.00x
           index      1.02 kwords/s      512 words/s    2.00x
           mean                                         2.00x
           smp-heap timer interrupts that allocated: 1000, none refused
           LockedHeap timer interrupts that allocated: 1000, none refused

  2 CPUs   json          4.00 KiB/s        512 B/s      8.00x
";
        let head: Vec<&str> = expected.lines().take(8).collect();
        assert_eq!(text.lines().take(8).collect::<Vec<_>>(), head, "{text}");
        assert!(text.contains("8.00x"), "{text}");
        assert!(text.contains("2 CPUs did 2.00x of the work of 1 CPU with smp-heap, 0.50x with LockedHeap"), "{text}");
        assert!(text.contains("2000, 1 refused"), "{text}");
    }

    #[test]
    fn a_busy_host_is_remarked_on() {
        assert_eq!([None, Some(0.2)].map(remark), [None, None]);
        assert!(remark(Some(3.07)).is_some_and(|text| text.contains("(load 3.1)")));
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(
            [0.0, 999.0, 999.9, 1.2345e6].map(|words| rate(words, "word")),
            ["0.00 words/s", "999 words/s", "1.00 kwords/s", "1.23 Mwords/s"]
        );
    }
}

//! What the guest says, line by line: `@word key=value ...`. Lines without `@` are for people, or dumps of the heap,
//! and pass unread.
//!
//! A text protocol costs the serial line more bytes than a binary one would, but it stays readable in the log, and a
//! line that two CPUs mixed up is noticed as such instead of being taken for numbers.

use std::{collections::BTreeMap, error::Error, fmt, num::ParseIntError, str::FromStr};

/// One line of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// A kind of work that will be done: its name, what it counts, what it is.
    Work { name: String, unit: String, about: String },
    /// The work of one kind begins on so many CPUs.
    Slot { cpus: u32, work: String },
    /// How far it is.
    Progress { cpus: u32, work: String, units: u64, micros: u64 },
    /// What one CPU did.
    Result { cpus: u32, work: String, cpu: u32, units: u64, micros: u64 },
    /// The timer interrupts of a phase: how many, how many allocations the heap refused them.
    Ticks { cpus: u32, count: u64, refused: u64 },
    /// A line of the heap's own statistics.
    Stats(String),
}

/// A line that begins as one of ours and goes on as something else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Misread {
    /// No such event.
    Word(String),
    /// The event has no such key.
    Missing(&'static str),
    /// The key's value is no number.
    Number(&'static str, ParseIntError),
}

impl fmt::Display for Misread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Word(word) => write!(f, "no event is called `{word}`"),
            Self::Missing(key) => write!(f, "`{key}=` is missing"),
            Self::Number(key, error) => write!(f, "`{key}`: {error}"),
        }
    }
}

impl Error for Misread {}

/// The `key=value` words of a line.
struct Fields<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Fields<'a> {
    fn text(&self, key: &'static str) -> Result<&'a str, Misread> {
        self.0.get(key).copied().ok_or(Misread::Missing(key))
    }

    fn number<T: FromStr<Err = ParseIntError>>(&self, key: &'static str) -> Result<T, Misread> {
        self.text(key)?.parse().map_err(|error| Misread::Number(key, error))
    }
}

impl Event {
    /// Reads a line; none where it is not one of ours.
    pub(crate) fn parse(line: &str) -> Result<Option<Self>, Misread> {
        let Some(line) = line.strip_prefix('@') else {
            return Ok(None);
        };
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if word == "stats" {
            return Ok(Some(Self::Stats(rest.to_owned())));
        }
        // The last field of a line may be free text with spaces.
        let (fields, about) = rest.split_once("about=").unwrap_or((rest, ""));
        let fields = Fields(fields.split_ascii_whitespace().filter_map(|word| word.split_once('=')).collect());
        let work = || fields.text("work").map(str::to_owned);
        Ok(Some(match word {
            "work" => Self::Work {
                name: fields.text("name")?.to_owned(),
                unit: fields.text("unit")?.to_owned(),
                about: about.to_owned(),
            },
            "slot" => Self::Slot { cpus: fields.number("cpus")?, work: work()? },
            "progress" => Self::Progress {
                cpus: fields.number("cpus")?,
                work: work()?,
                units: fields.number("units")?,
                micros: fields.number("micros")?,
            },
            "result" => Self::Result {
                cpus: fields.number("cpus")?,
                work: work()?,
                cpu: fields.number("cpu")?,
                units: fields.number("units")?,
                micros: fields.number("micros")?,
            },
            "ticks" => Self::Ticks {
                cpus: fields.number("cpus")?,
                count: fields.number("count")?,
                refused: fields.number("refused")?,
            },
            other => return Err(Misread::Word(other.to_owned())),
        }))
    }
}

/// A kind of work as the guest introduced it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Work {
    /// Its name.
    pub(crate) name: String,
    /// What it counts: `byte` or `word`.
    pub(crate) unit: String,
    /// What it is.
    pub(crate) about: String,
}

/// All that one guest said.
#[derive(Debug, Clone)]
pub(crate) struct Recording {
    /// What its heap is called.
    pub(crate) heap: &'static str,
    /// The kinds of work, in the guest's order.
    pub(crate) works: Vec<Work>,
    /// Units per second of all CPUs together, by CPU count and kind of work.
    rates: BTreeMap<(u32, String), Vec<f64>>,
    /// Interrupts and refusals, by CPU count.
    pub(crate) ticks: BTreeMap<u32, (u64, u64)>,
    /// The statistics, line by line.
    pub(crate) stats: Vec<String>,
}

impl Recording {
    /// Nothing said yet.
    pub(crate) fn new(heap: &'static str) -> Self {
        Self { heap, works: Vec::new(), rates: BTreeMap::new(), ticks: BTreeMap::new(), stats: Vec::new() }
    }

    /// Notes an event.
    pub(crate) fn add(&mut self, event: Event) {
        match event {
            Event::Work { name, unit, about } => self.works.push(Work { name, unit, about }),
            Event::Result { cpus, work, cpu: _, units, micros } => {
                // Each CPU's own rate over its own time: nobody's tail is counted against the others.
                let rate = units as f64 * 1e6 / micros.max(1) as f64;
                self.rates.entry((cpus, work)).or_default().push(rate);
            }
            Event::Ticks { cpus, count, refused } => {
                self.ticks.insert(cpus, (count, refused));
            }
            Event::Stats(line) => self.stats.push(line),
            Event::Slot { .. } | Event::Progress { .. } => {}
        }
    }

    /// Units per second of all CPUs together.
    pub(crate) fn rate(&self, cpus: u32, work: &str) -> Option<f64> {
        self.rates.get(&(cpus, work.to_owned())).map(|rates| rates.iter().sum())
    }

    /// What is missing for a comparison over `phases`.
    pub(crate) fn gap(&self, phases: &[u32]) -> Option<String> {
        if self.works.is_empty() {
            return Some("it named no work".to_owned());
        }
        for cpus in phases {
            for Work { name, .. } in &self.works {
                let found = self.rates.get(&(*cpus, name.clone())).map_or(0, Vec::len);
                if found != *cpus as usize {
                    return Some(format!("{found} of {cpus} CPUs told their result of `{name}`"));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Event {
        Event::parse(line).expect("understood").expect("one of ours")
    }

    #[test]
    fn every_event_is_read() {
        assert_eq!(
            parse("@work name=json unit=byte about=serde_json: there = back"),
            Event::Work { name: "json".into(), unit: "byte".into(), about: "serde_json: there = back".into() }
        );
        assert_eq!(parse("@slot cpus=2 work=json"), Event::Slot { cpus: 2, work: "json".into() });
        assert_eq!(
            parse("@progress cpus=2 work=json units=10 micros=11"),
            Event::Progress { cpus: 2, work: "json".into(), units: 10, micros: 11 }
        );
        assert_eq!(
            parse("@result cpus=2 work=json cpu=1 units=10 micros=2000000"),
            Event::Result { cpus: 2, work: "json".into(), cpu: 1, units: 10, micros: 2_000_000 }
        );
        assert_eq!(parse("@ticks cpus=4 count=9000 refused=1"), Event::Ticks { cpus: 4, count: 9000, refused: 1 });
        assert_eq!(parse("@stats   class  live"), Event::Stats("  class  live".into()));
        assert_eq!(parse("@stats"), Event::Stats(String::new()));
    }

    #[test]
    fn other_lines_pass_unread() {
        assert_eq!(Event::parse("PASS demo"), Ok(None));
        assert_eq!(Event::parse(""), Ok(None));
        assert_eq!(Event::parse("cpu 1: @result"), Ok(None));
    }

    #[test]
    fn broken_lines_say_what_is_wrong() {
        assert_eq!(Event::parse("@reslt cpus=1"), Err(Misread::Word("reslt".into())));
        assert_eq!(Event::parse("@slot work=json"), Err(Misread::Missing("cpus")));
        assert!(matches!(Event::parse("@slot cpus=two work=json"), Err(Misread::Number("cpus", _))));
        assert!(matches!(Event::parse("@slot cpus=-1 work=json"), Err(Misread::Number("cpus", _))));
    }

    #[test]
    fn rates_are_the_sum_of_each_cpus_own() {
        let mut recording = Recording::new("heap");
        assert_eq!(recording.gap(&[2]).as_deref(), Some("it named no work"));
        recording.add(parse("@work name=json unit=byte about=x"));
        recording.add(parse("@result cpus=2 work=json cpu=0 units=100 micros=1000000"));
        assert_eq!(recording.gap(&[2]).as_deref(), Some("1 of 2 CPUs told their result of `json`"));
        recording.add(parse("@result cpus=2 work=json cpu=1 units=100 micros=2000000"));
        assert_eq!(recording.gap(&[2]), None);
        assert_eq!(recording.rate(2, "json"), Some(150.0));
        assert_eq!(recording.rate(1, "json"), None);
    }
}

//! How it goes on: a bar where there is a terminal, a line per step where there is none.

use std::{collections::BTreeMap, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};

use super::{protocol::Event, report};

/// The display of one boot.
#[derive(Debug)]
pub(crate) struct Progress {
    heap: &'static str,
    bar: ProgressBar,
    slot: Duration,
    /// The slots that have begun.
    begun: u32,
    units: BTreeMap<String, String>,
    /// The slot's results so far: how many CPUs, and their rate together.
    results: (u32, f64),
}

impl Progress {
    /// Says what begins.
    pub(crate) fn new(heap: &'static str, phases: &[u32], slot: Duration) -> Self {
        let slots = super::WORKLOAD_COUNT * u32::try_from(phases.len()).unwrap_or(1);
        let bar = ProgressBar::new(millis(slot * slots));
        // A template that does not parse is a mistake in this line; the default style then shows as much.
        if let Ok(style) = ProgressStyle::with_template("{prefix:>11} {bar:32} {percent:>3} %  {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(heap);
        bar.set_message("building and booting");
        bar.enable_steady_tick(Duration::from_millis(200));
        if bar.is_hidden() {
            eprintln!("{heap}: building and booting");
        }
        Self { heap, bar, slot, begun: 0, units: BTreeMap::new(), results: (0, 0.0) }
    }

    /// Shows an event.
    pub(crate) fn show(&mut self, event: &Event) {
        match event {
            Event::Work { name, unit, .. } => {
                self.units.insert(name.clone(), unit.clone());
            }
            Event::Slot { cpus, work } => {
                self.begun += 1;
                self.results = (0, 0.0);
                self.advance(0);
                self.bar.set_message(format!("{} {work}", report::cpus(*cpus)));
            }
            Event::Progress { cpus, work, units, micros } => {
                self.advance(*micros);
                let rate = *units as f64 * 1e6 / (*micros).max(1) as f64;
                self.bar.set_message(format!("{} {work}: {}", report::cpus(*cpus), self.rate(work, rate)));
            }
            Event::Result { cpus, work, units, micros, .. } => {
                self.results.0 += 1;
                self.results.1 += *units as f64 * 1e6 / (*micros).max(1) as f64;
                if self.results.0 == *cpus && self.bar.is_hidden() {
                    let rate = self.rate(work, self.results.1);
                    eprintln!("{}: {} {work}: {rate}, every result right", self.heap, report::cpus(*cpus));
                }
            }
            Event::Ticks { .. } | Event::Stats(_) => {}
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
    }

    fn advance(&self, micros: u64) {
        let into = Duration::from_micros(micros).min(self.slot);
        self.bar.set_position(millis(self.slot * self.begun.saturating_sub(1) + into));
    }

    fn rate(&self, work: &str, rate: f64) -> String {
        report::rate(rate, self.units.get(work).map_or("", String::as_str))
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

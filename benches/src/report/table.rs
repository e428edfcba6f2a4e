//! The table: a line for each row, a column for each allocator.

use std::fmt::Write;

use super::{Figure, Report};
use crate::cell::Sample;
use crate::peers::Kind;
use crate::run::Row;

/// Three digits that say something.
fn short(figure: f64) -> String {
    match figure {
        figure if figure >= 9_950_000.0 => format!("{:.0}M", figure / 1e6),
        figure if figure >= 999_500.0 => format!("{:.1}M", figure / 1e6),
        figure if figure >= 9950.0 => format!("{:.0}k", figure / 1e3),
        figure if figure >= 999.5 => format!("{:.1}k", figure / 1e3),
        figure if figure >= 99.5 => format!("{figure:.0}"),
        figure if figure >= 9.95 => format!("{figure:.1}"),
        figure => format!("{figure:.2}"),
    }
}

fn with_spread(figure: Figure) -> String {
    format!("{}±{:.0}", short(figure.median), 100.0 * figure.spread / figure.median.max(1e-9))
}

/// Lines of cells, made equally wide.
#[derive(Default)]
struct Grid(Vec<Vec<String>>);

impl Grid {
    fn print(&self, out: &mut String) {
        let count = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let len = |cell: &String| cell.chars().count();
        let widths: Vec<usize> = (0..count)
            .map(|column| self.0.iter().filter_map(|line| line.get(column)).map(len).max().unwrap_or(0))
            .collect();
        for line in &self.0 {
            let mut text = String::new();
            for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
                let pad = " ".repeat(width - len(cell));
                text += &if column == 0 { format!("{cell}{pad}") } else { format!("  {pad}{cell}") };
            }
            out.push_str(text.trim_end());
            out.push('\n');
        }
    }
}

impl Report {
    /// The line of a row, while the run goes on.
    pub fn progress_line(&self, row: &Row) -> String {
        let name = |column: Option<usize>| column.map_or("-", |column| self.peers[column].name);
        let value = |column: usize| {
            let figure = row.figure(column, |sample| self.metric.of(sample));
            figure.map_or("-".into(), |figure| short(figure.median))
        };
        let best = self.best_peer(row);
        let mut line = format!("{:15} {}", row.workload.name, row.threads);
        for column in (0..self.peers.len()).filter(|&column| self.peers[column].kind == Kind::Ours) {
            let ratio = self.ratio(row, column).map_or(String::new(), |ratio| format!(" ({ratio:.2}x)"));
            line += &format!("  {} {}{ratio}", self.peers[column].name, value(column));
        }
        line + &format!("  best peer {} {}", name(best), best.map_or(String::new(), value))
    }

    /// The whole report as text.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let facts = &self.facts;
        let _ = writeln!(out, "{}", self.metric.title());
        let _ = writeln!(
            out,
            "median of {} repetitions of {} s; ± half the distance between the quartiles, in % of the median",
            facts.repetitions, facts.counted_seconds
        );
        let _ = writeln!(out, "ratios: to the best peer of the row, median over the repetitions\n");
        self.figures(&mut out);
        self.means(&mut out);
        self.held(&mut out);
        self.system_costs(&mut out);
        self.foot(&mut out);
        out
    }

    fn ours(&self) -> impl Iterator<Item = usize> {
        (0..self.peers.len()).filter(|&column| self.peers[column].kind == Kind::Ours)
    }

    fn heading(&self, first: &str) -> Vec<String> {
        let names = self.peers.iter().map(|peer| peer.name.to_owned());
        [first.to_owned(), "threads".into()].into_iter().chain(names).collect()
    }

    fn figures(&self, out: &mut String) {
        let mut grid = Grid::default();
        let mut heading = self.heading("workload");
        heading.push("best peer".into());
        heading.extend(self.ours().map(|column| format!("{}/best", self.peers[column].name)));
        grid.0.push(heading);
        for row in &self.rows {
            let best = self.best_peer(row);
            let mut line = vec![row.workload.name.to_owned(), row.threads.to_string()];
            line.extend((0..self.peers.len()).map(|column| match row.samples(column) {
                None => "-".into(),
                Some(Err(failure)) => failure.word().into(),
                Some(Ok(_)) => row.figure(column, |sample| self.metric.of(sample)).map_or("-".into(), with_spread),
            }));
            line.push(best.map_or("-", |column| self.peers[column].name).into());
            line.extend(
                self.ours().map(|column| self.ratio(row, column).map_or("-".into(), |ratio| format!("{ratio:.2}"))),
            );
            grid.0.push(line);
        }
        grid.print(out);
    }

    fn means(&self, out: &mut String) {
        let _ = writeln!(out, "\ngeometric means of the ratios to the best peer of each row\n");
        let mut grid = Grid::default();
        let mut heading = self.heading("rows");
        heading[1] = "rows".into();
        grid.0.push(heading);
        let cores = self.facts.cores;
        let mut lines: Vec<(String, Box<dyn Fn(&Row) -> bool>)> = Vec::new();
        for group in self.groups() {
            lines.push((
                format!("{}, up to {cores} threads", group.title()),
                Box::new(move |row: &Row| row.workload.group == group && row.threads <= cores),
            ));
            lines.push((
                format!("{}, more threads", group.title()),
                Box::new(move |row: &Row| row.workload.group == group && row.threads > cores),
            ));
        }
        lines.push((format!("all, up to {cores} threads"), Box::new(move |row: &Row| row.threads <= cores)));
        lines.push(("all".into(), Box::new(|_: &Row| true)));
        for (title, counts) in &lines {
            let all = self.rows.iter().filter(|row| counts(row)).count();
            if all == 0 {
                continue;
            }
            let mut line = vec![title.clone(), all.to_string()];
            line.extend((0..self.peers.len()).map(|column| match self.mean_ratio(column, counts) {
                None => "-".into(),
                Some((mean, count)) if count == all => short(mean),
                // Not over the same rows as the others.
                Some((mean, _)) => format!("({})", short(mean)),
            }));
            grid.0.push(line);
        }
        grid.print(out);
        let _ = writeln!(out, "(in brackets: over fewer rows, because others have no figure)");
    }

    fn held(&self, out: &mut String) {
        let left = |sample: &Sample| (!sample.left_len.is_nan()).then_some(sample.left_len / 1_048_576.0);
        self.of_samples(
            out,
            "memory held over memory in use, when the threads stopped",
            |row| row.workload.holds,
            Sample::held_over_live,
        );
        self.of_samples(out, "MiB of memory left after everything was freed", |row| row.workload.holds, left);
    }

    fn system_costs(&self, out: &mut String) {
        let system = |sample: &Sample| Some(sample.system_ns);
        self.of_samples(
            out,
            "ns of these in the operating system, for an operation: pages come and go",
            |_| true,
            system,
        );
        let provider = |sample: &Sample| (sample.provider_calls > 0.0).then_some(sample.provider_ns);
        self.of_samples(out, "ns in calls of the page provider, for an operation", |_| true, provider);
    }

    fn of_samples(
        &self,
        out: &mut String,
        title: &str,
        rows: impl Fn(&Row) -> bool,
        of: impl Fn(&Sample) -> Option<f64>,
    ) {
        let mut grid = Grid(vec![self.heading("workload")]);
        for row in self.rows.iter().filter(|row| rows(row)) {
            let figures: Vec<Option<f64>> = (0..self.peers.len())
                .map(|column| super::median(row.samples(column)?.ok()?.iter().filter_map(&of).collect()))
                .collect();
            if figures.iter().flatten().any(|&figure| figure >= 0.005) {
                let mut line = vec![row.workload.name.to_owned(), row.threads.to_string()];
                line.extend(figures.iter().map(|figure| figure.map_or("-".into(), short)));
                grid.0.push(line);
            }
        }
        if grid.0.len() > 1 {
            let _ = writeln!(out, "\n{title}\n");
            grid.print(out);
        }
    }

    fn foot(&self, out: &mut String) {
        let facts = &self.facts;
        let _ = writeln!(out);
        for missing in &self.missing {
            let _ = writeln!(out, "left out: {}: {}", missing.name, missing.why);
        }
        for peer in &self.peers {
            let _ = writeln!(out, "{:12} {}", peer.name, peer.about);
        }
        let versions: Vec<_> = facts.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        let _ = writeln!(out, "\nmachine   {}, {} cores, {}", facts.processor, facts.cores, facts.system);
        let _ = writeln!(out, "load      {} before, {} after", facts.load[0], facts.load[1]);
        let _ = writeln!(out, "date      {}", facts.date);
        let _ = writeln!(out, "smp-heap  {}", facts.commit);
        let _ = writeln!(out, "versions  {}", versions.join("\n          "));
        let _ = writeln!(out, "command   {}", facts.command);
    }
}

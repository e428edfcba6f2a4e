//! Plots, as SVG: ratios to the best peer by row, throughput over threads, memory held over memory in use. Each says
//! where its figures come from.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Report, median};
use crate::args::Metric;
use crate::cell::Sample;
use crate::peers::Kind;
use crate::run::Row;

type Drawn = Result<(), Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FAINT: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

/// Longer commands are cut in plots; table and JSON have all of them.
const COMMAND_LEN: usize = 140;

/// A colour for each column; columns beyond these are drawn in grey.
const COLOURS: [(&str, RGBColor); 17] = [
    ("pin", RGBColor(0xd6, 0x1a, 0x1a)),
    ("hint", RGBColor(0xf2, 0x8c, 0x1d)),
    ("pin-mmap", RGBColor(0x8c, 0x10, 0x45)),
    ("hint-mmap", RGBColor(0xe0, 0x7f, 0xb0)),
    ("level-1", RGBColor(0xb8, 0xb0, 0xe6)),
    ("level-2", RGBColor(0x80, 0x74, 0xc4)),
    ("level-3", RGBColor(0xd9, 0xc8, 0x9e)),
    ("floor", RGBColor(0x00, 0x00, 0x00)),
    ("snmalloc", RGBColor(0x1f, 0x5f, 0xbf)),
    ("mimalloc", RGBColor(0x35, 0xa8, 0xe0)),
    ("rpmalloc", RGBColor(0x2b, 0x9c, 0x8a)),
    ("jemalloc", RGBColor(0x5b, 0x3f, 0xa0)),
    ("zig", RGBColor(0x8f, 0xb3, 0x1c)),
    ("talc", RGBColor(0x8a, 0x62, 0x3a)),
    ("buddy-slab", RGBColor(0x3f, 0x7a, 0x2e)),
    ("wf_alloc", RGBColor(0xb8, 0x9c, 0x10)),
    ("linked_list", RGBColor(0x77, 0x88, 0x99)),
];

fn colour(name: &str) -> RGBColor {
    COLOURS.iter().find(|(known, _)| *known == name).map_or(RGBColor(0xaa, 0xaa, 0xaa), |(_, colour)| *colour)
}

fn style(size: i32, colour: RGBColor, h: HPos) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour).pos(Pos::new(h, VPos::Center))
}

/// A logarithmic axis of pixels.
#[derive(Clone, Copy)]
struct LogAxis {
    from: f64,
    to: f64,
    pixels: (i32, i32),
}

impl LogAxis {
    /// Spans all of `figures`, within `limits`.
    fn over(figures: impl Iterator<Item = f64>, limits: (f64, f64), pixels: (i32, i32)) -> Self {
        let (mut from, mut to) = (f64::MAX, f64::MIN);
        for figure in figures {
            from = from.min(figure / 1.15);
            to = to.max(figure * 1.15);
        }
        let from = from.clamp(limits.0, limits.1 / 2.0);
        Self { from, to: to.clamp(from * 2.0, limits.1), pixels }
    }

    fn at(&self, figure: f64) -> i32 {
        let share = (figure / self.from).ln() / (self.to / self.from).ln();
        self.pixels.0 + (f64::from(self.pixels.1 - self.pixels.0) * share.clamp(0.0, 1.0)).round() as i32
    }

    /// 1, 2 and 5 of each power of ten, or only 1 if those are many.
    fn ticks(&self) -> Vec<f64> {
        let steps: &[f64] = if self.to / self.from > 3000.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let powers = self.from.log10().floor() as i32..=self.to.log10().ceil() as i32;
        let ticks = powers.flat_map(|power| steps.iter().map(move |step| step * 10_f64.powi(power)));
        ticks.filter(|tick| (self.from..=self.to).contains(tick)).collect()
    }
}

fn number(figure: f64) -> String {
    if figure >= 1000.0 { format!("{:.0}k", figure / 1000.0) } else { format!("{figure}") }
}

/// A line of a dot plot.
struct DotLine {
    label: String,
    /// Column, figure.
    dots: Vec<(usize, f64)>,
}

impl Report {
    pub(super) fn plot(&self, folder: &Path) -> Drawn {
        let mut threads: Vec<usize> = self.rows.iter().map(|row| row.threads).collect();
        threads.sort_unstable();
        threads.dedup();
        for &threads in &threads {
            self.plot_ratios(&folder.join(format!("ratios-{threads}.svg")), threads)?;
        }
        if threads.len() > 1 {
            self.plot_scaling(&folder.join("scaling.svg"))?;
        }
        self.plot_held(&folder.join("held.svg"))
    }

    fn plot_ratios(&self, file: &Path, threads: usize) -> Drawn {
        let rows = self.rows.iter().filter(|row| row.threads == threads);
        let lines = rows.map(|row| DotLine {
            label: row.workload.name.to_owned(),
            dots: self.columns().filter_map(|column| Some((column, self.ratio(row, column)?))).collect(),
        });
        let many = if threads == 1 { "thread".to_owned() } else { format!("threads, {} cores", self.facts.cores) };
        let time = match self.metric {
            Metric::Wall => "Time",
            Metric::Cpu => "Processor time",
        };
        let title = format!("{time} over the best peer's, {threads} {many} (left is faster)");
        self.plot_dots(file, &title, lines.collect(), (0.1, 30.0))
    }

    fn plot_held(&self, file: &Path) -> Drawn {
        let held = |sample: &Sample| sample.held_over_live();
        let lines: Vec<DotLine> = self
            .rows
            .iter()
            .filter(|row| row.workload.holds)
            .map(|row| DotLine {
                label: format!("{}, {}", row.workload.name, row.threads),
                dots: self
                    .columns()
                    .filter_map(|column| {
                        let samples = row.samples(column)?.ok()?;
                        Some((column, median(samples.iter().filter_map(held).collect())?))
                    })
                    .collect(),
            })
            .collect();
        if lines.is_empty() {
            return Ok(());
        }
        self.plot_dots(
            file,
            "Memory held over memory in use, by workload and threads (left is less)",
            lines,
            (0.9, 20.0),
        )
    }

    /// The columns in the order in which they are drawn: ours last and the first of them at the very end, so that it
    /// lies on top.
    fn columns(&self) -> impl Iterator<Item = usize> {
        let of =
            |ours: bool| (0..self.peers.len()).filter(move |&column| (self.peers[column].kind == Kind::Ours) == ours);
        of(false).chain(of(true).rev())
    }

    fn plot_dots(&self, file: &Path, title: &str, lines: Vec<DotLine>, limits: (f64, f64)) -> Drawn {
        const LINE: i32 = 22;
        const TOP: i32 = 84;
        let (width, bottom) = (1000, TOP + LINE * lines.len() as i32);
        let root = SVGBackend::new(file, (width as u32, bottom as u32 + 62)).into_drawing_area();
        root.fill(&WHITE)?;
        root.draw(&Text::new(title.to_owned(), (20, 22), style(19, INK, HPos::Left)))?;
        self.draw_legend(&root, 52, width)?;
        let figures = lines.iter().flat_map(|line| line.dots.iter().map(|dot| dot.1)).chain([1.0]);
        let axis = LogAxis::over(figures, limits, (150, width - 30));
        for tick in axis.ticks() {
            let x = axis.at(tick);
            let ink = if tick == 1.0 { INK } else { FAINT };
            root.draw(&PathElement::new([(x, TOP - 8), (x, bottom)], ink))?;
            root.draw(&Text::new(number(tick), (x, bottom + 12), style(13, INK, HPos::Center)))?;
        }
        for (index, line) in lines.iter().enumerate() {
            let y = TOP + LINE * index as i32 + LINE / 2;
            root.draw(&Text::new(line.label.clone(), (138, y), style(13, INK, HPos::Right)))?;
            root.draw(&PathElement::new([(150, y), (width - 30, y)], FAINT))?;
            for &(column, figure) in &line.dots {
                let peer = &self.peers[column];
                let ours = peer.kind == Kind::Ours;
                let at = (axis.at(figure), y);
                let colour = colour(peer.name);
                // What lies beyond the axis stands at its end, as an arrow.
                if figure > axis.to {
                    let (x, size) = (at.0 + 4, 4);
                    root.draw(&Polygon::new(
                        [(x - size, y - size), (x + size, y), (x - size, y + size)],
                        colour.filled(),
                    ))?;
                } else if ours {
                    root.draw(&Rectangle::new([(at.0 - 5, y - 5), (at.0 + 5, y + 5)], colour.filled()))?;
                } else {
                    root.draw(&Circle::new(at, 4, colour.mix(0.85).filled()))?;
                }
            }
        }
        self.draw_foot(&root, bottom + 36)?;
        root.present()?;
        Ok(())
    }

    fn draw_legend(&self, root: &Area<'_>, y: i32, width: i32) -> Drawn {
        let (mut x, mut y) = (24, y);
        for peer in &self.peers {
            let len = 24 + 8 * peer.name.len() as i32;
            if x + len > width {
                (x, y) = (24, y + 17);
            }
            let colour = colour(peer.name);
            if peer.kind == Kind::Ours {
                root.draw(&Rectangle::new([(x - 5, y - 5), (x + 5, y + 5)], colour.filled()))?;
            } else {
                root.draw(&Circle::new((x, y), 4, colour.filled()))?;
            }
            root.draw(&Text::new(peer.name, (x + 10, y), style(13, INK, HPos::Left)))?;
            x += len;
        }
        Ok(())
    }

    fn draw_foot(&self, root: &Area<'_>, y: i32) -> Drawn {
        let ink = RGBColor(0x66, 0x66, 0x66);
        root.draw(&Text::new(self.facts.line(), (20, y), style(11, ink, HPos::Left)))?;
        let mut command = self.facts.command.clone();
        if command.len() > COMMAND_LEN {
            command.truncate(COMMAND_LEN);
            command += " ...";
        }
        root.draw(&Text::new(command, (20, y + 15), style(11, ink, HPos::Left)))?;
        Ok(())
    }

    /// One small chart for each workload, over the number of threads: operations in a microsecond by all threads
    /// together; or, if the metric is processor time, the same for one processor.
    fn plot_scaling(&self, file: &Path) -> Drawn {
        const ACROSS: usize = 5;
        const SIZE: (i32, i32) = (230, 190);
        let mut names: Vec<&str> = self.rows.iter().map(|row| row.workload.name).collect();
        names.dedup();
        let down = names.len().div_ceil(ACROSS) as i32;
        let width = SIZE.0 * ACROSS as i32 + 20;
        let bottom = 84 + SIZE.1 * down;
        let root = SVGBackend::new(file, (width as u32, bottom as u32 + 44)).into_drawing_area();
        root.fill(&WHITE)?;
        let whose = match self.metric {
            Metric::Wall => "all threads together",
            Metric::Cpu => "of processor time",
        };
        let cores = self.facts.cores;
        let title = format!("Operations in a microsecond, {whose}, over threads on {cores} cores (up is faster)");
        root.draw(&Text::new(title, (20, 22), style(19, INK, HPos::Left)))?;
        self.draw_legend(&root, 52, width)?;
        for (index, name) in names.iter().enumerate() {
            let rows: Vec<&Row> = self.rows.iter().filter(|row| row.workload.name == *name).collect();
            let corner = (10 + SIZE.0 * (index % ACROSS) as i32, 84 + SIZE.1 * (index / ACROSS) as i32);
            self.draw_scaling(&root, corner, SIZE, name, &rows)?;
        }
        self.draw_foot(&root, bottom + 14)?;
        root.present()?;
        Ok(())
    }

    fn draw_scaling(&self, root: &Area<'_>, corner: (i32, i32), size: (i32, i32), name: &str, rows: &[&Row]) -> Drawn {
        let (left, right) = (corner.0 + 40, corner.0 + size.0 - 14);
        let (top, bottom) = (corner.1 + 22, corner.1 + size.1 - 24);
        let throughput =
            |row: &Row, column: usize| Some(1000.0 / row.figure(column, |sample| self.metric.of(sample))?.median);
        let figures = rows.iter().flat_map(|row| self.columns().filter_map(|column| throughput(row, column)));
        let axis = LogAxis::over(figures, (1e-4, 1e5), (bottom, top));
        root.draw(&Text::new(name.to_owned(), ((left + right) / 2, corner.1 + 12), style(13, INK, HPos::Center)))?;
        for tick in axis.ticks() {
            let y = axis.at(tick);
            root.draw(&PathElement::new([(left, y), (right, y)], FAINT))?;
            root.draw(&Text::new(number(tick), (left - 5, y), style(10, INK, HPos::Right)))?;
        }
        let step = (right - left) / (rows.len() as i32 - 1).max(1);
        let x = |index: usize| left + step * index as i32;
        for (index, row) in rows.iter().enumerate() {
            root.draw(&Text::new(row.threads.to_string(), (x(index), bottom + 11), style(10, INK, HPos::Center)))?;
        }
        for column in self.columns() {
            let peer = &self.peers[column];
            let points =
                rows.iter().enumerate().filter_map(|(index, row)| Some((x(index), axis.at(throughput(row, column)?))));
            let ours = peer.kind == Kind::Ours;
            let line = colour(peer.name).stroke_width(if ours { 3 } else { 1 });
            let points: Vec<(i32, i32)> = points.collect();
            for &point in &points {
                root.draw(&Circle::new(point, if ours { 3 } else { 2 }, colour(peer.name).filled()))?;
            }
            root.draw(&PathElement::new(points, line))?;
        }
        Ok(())
    }
}

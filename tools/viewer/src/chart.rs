//! Numbers over time, as pictures: what held bytes are made of, and single values.
//!
//! Every dump has a strip to point at (`data-go`), and a line that shows which dump is looked at (`data-d`); the page
//! makes both work.

use std::fmt::{self, Write as _};

use crate::{
    Dump,
    units::{digits, time},
};

/// A factor above this is cut off: while next to nothing is in use, it says nothing and would flatten the rest.
const MOST_TIMES: f64 = 8.0;

/// The room around the curves.
const LEFT: f64 = 58.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;

/// One kind of the bytes held: style class, name, and how many a dump has of it.
pub(crate) type Layer = (&'static str, &'static str, fn(&Dump) -> u64);

/// What the bytes held are made of, from below.
pub(crate) const LAYERS: [Layer; 5] = [
    ("l-live", "in use", |dump| dump.totals.live_len),
    ("l-cached", "in caches", Dump::cached_len),
    ("l-slack", "free in slabs", |dump| {
        let live = dump.totals.live_len.saturating_sub(dump.totals.large_len);
        dump.totals.slab_len.saturating_sub(live).saturating_sub(dump.cached_len())
    }),
    ("l-free", "free pages", |dump| dump.totals.free_len),
    ("l-own", "the heap's own", |dump| dump.totals.own_len),
];

/// A frame with axes: pixels for times and values.
struct Frame {
    width: f64,
    height: f64,
    times: (f64, f64),
    top_value: f64,
}

impl Frame {
    fn new(dumps: &[Dump], width: f64, height: f64, most: f64) -> Self {
        let times = dumps.iter().map(|dump| dump.time as f64);
        let (first, last) = (times.clone().fold(f64::MAX, f64::min), times.fold(0.0, f64::max));
        Self { width, height, times: (first, last), top_value: nice_above(most) }
    }

    fn x(&self, dump: &Dump) -> f64 {
        let (first, last) = self.times;
        let share = if last > first { (dump.time as f64 - first) / (last - first) } else { 0.5 };
        LEFT + share * (self.width - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        let room = self.height - TOP - BOTTOM;
        TOP + room - (value / self.top_value).clamp(0.0, 1.0) * room
    }

    /// The beginning of the picture: frame, four lines across, their values, first and last time.
    fn open(&self, out: &mut String, title: &str, label: &dyn Fn(f64) -> String) -> fmt::Result {
        let Self { width, height, .. } = self;
        writeln!(
            out,
            r#"<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">"#
        )?;
        for step in 0..=4 {
            let value = self.top_value * f64::from(step) / 4.0;
            let y = self.y(value);
            writeln!(out, r#"<path d="M{LEFT} {y:.1}H{}" class="grid"/>"#, width - RIGHT)?;
            writeln!(out, r#"<text x="{}" y="{:.1}" class="tick">{}</text>"#, LEFT - 6.0, y + 4.0, label(value))?;
        }
        let y = height - 7.0;
        writeln!(out, r#"<text x="{LEFT}" y="{y}" class="dim">{}</text>"#, time_of(self.times.0))?;
        writeln!(out, r#"<text x="{}" y="{y}" class="tick">{}</text>"#, width - RIGHT, time_of(self.times.1))
    }

    /// The end of the picture: for each dump a strip to point at and a line that marks it.
    fn close(&self, out: &mut String, dumps: &[Dump]) -> fmt::Result {
        let places: Vec<f64> = dumps.iter().map(|dump| self.x(dump)).collect();
        let (top, height) = (TOP, self.height - TOP - BOTTOM);
        for (index, x) in places.iter().enumerate() {
            let middle = |other: Option<&f64>, edge: f64| other.map_or(edge, |other| f64::midpoint(*other, *x));
            let from = middle(index.checked_sub(1).and_then(|before| places.get(before)), LEFT);
            let to = middle(places.get(index + 1), self.width - RIGHT);
            writeln!(out, r#"<path d="M{x:.1} {top}v{height}" class="mark" data-d="{index}"/>"#)?;
            writeln!(
                out,
                r#"<rect x="{from:.1}" y="{top}" width="{:.1}" height="{height}" class="strip" data-go="{index}"/>"#,
                (to - from).max(0.0)
            )?;
        }
        writeln!(out, "</svg>")
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it was a u64 before")]
fn time_of(micros: f64) -> String {
    time(micros as u64)
}

/// A round number at or above: 1, 1.25 or 1.5 times a power of two, so that quarters are round too, bytes above all.
fn nice_above(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let below = 2_f64.powf(value.log2().floor());
    [1.0, 1.25, 1.5].map(|step| step * below).into_iter().find(|top| *top >= value).unwrap_or(2.0 * below)
}

/// What the bytes held are made of.
pub(crate) fn memory(dumps: &[Dump], width: f64, height: f64) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = memory_into(&mut text, dumps, width, height);
    text
}

fn memory_into(out: &mut String, dumps: &[Dump], width: f64, height: f64) -> fmt::Result {
    let most = dumps.iter().map(|dump| dump.totals.held_len as f64).fold(0.0, f64::max);
    let frame = Frame::new(dumps, width, height, most);
    frame.open(out, "What the bytes held are made of", &|value| crate::bytes(value))?;
    let mut below: Vec<f64> = vec![0.0; dumps.len()];
    for (class, name, part) in LAYERS {
        let above: Vec<f64> = below.iter().zip(dumps).map(|(below, dump)| below + part(dump) as f64).collect();
        let mut path = String::new();
        for (index, (dump, value)) in dumps.iter().zip(&above).enumerate() {
            write!(path, "{}{:.1} {:.1}", if index == 0 { 'M' } else { 'L' }, frame.x(dump), frame.y(*value))?;
        }
        for (dump, value) in dumps.iter().zip(&below).rev() {
            write!(path, "L{:.1} {:.1}", frame.x(dump), frame.y(*value))?;
        }
        writeln!(out, r#"<path d="{path}Z" class="{class}"><title>{name}</title></path>"#)?;
        below = above;
    }
    frame.close(out, dumps)
}

/// One value over time.
pub(crate) fn line(
    dumps: &[Dump],
    width: f64,
    height: f64,
    title: &str,
    unit: Unit,
    value: impl Fn(&Dump) -> Option<f64>,
) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = line_into(&mut text, dumps, (width, height), title, unit, &value);
    text
}

/// How a value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// A factor.
    Times,
    /// A share of 1.
    Percent,
}

fn line_into(
    out: &mut String,
    dumps: &[Dump],
    (width, height): (f64, f64),
    title: &str,
    unit: Unit,
    value: &dyn Fn(&Dump) -> Option<f64>,
) -> fmt::Result {
    let most = dumps.iter().filter_map(value).fold(0.0, f64::max);
    let frame = Frame::new(dumps, width, height, if unit == Unit::Percent { 1.0 } else { most.min(MOST_TIMES) });
    frame.open(out, title, &|value| match unit {
        Unit::Times => format!("{}x", digits(value)),
        Unit::Percent => format!("{:.0} %", value * 100.0),
    })?;
    let points: Vec<(f64, f64)> =
        dumps.iter().filter_map(|dump| value(dump).map(|value| (frame.x(dump), frame.y(value)))).collect();
    let mut path = String::new();
    for (index, (x, y)) in points.iter().enumerate() {
        write!(path, "{}{x:.1} {y:.1}", if index == 0 { 'M' } else { 'L' })?;
    }
    writeln!(out, r#"<path d="{path}" class="curve"/>"#)?;
    for (x, y) in points.iter().filter(|_| points.len() < 60) {
        writeln!(out, r#"<circle cx="{x:.1}" cy="{y:.1}" r="2.5" class="dot"/>"#)?;
    }
    frame.close(out, dumps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dump::tests::sample;

    fn dumps() -> Vec<Dump> {
        let at = |time, times: u64| {
            let mut dump = sample();
            dump.time = time;
            dump.totals.held_len *= times;
            dump.totals.free_len += (times - 1) * 131_072;
            dump
        };
        vec![at(100, 1), at(200, 2), at(400, 1)]
    }

    #[test]
    fn layers_add_up_to_what_is_held() {
        for dump in dumps() {
            let sum: u64 = LAYERS.iter().map(|(_, _, part)| part(&dump)).sum();
            assert_eq!(sum, dump.totals.held_len);
        }
    }

    #[test]
    fn charts_have_a_strip_and_a_mark_for_each_dump() {
        let dumps = dumps();
        let ratio = line(&dumps, 400.0, 200.0, "x", Unit::Times, Dump::held_over_live);
        for svg in [memory(&dumps, 400.0, 200.0), ratio] {
            let document = roxmltree::Document::parse(&svg).expect("well-formed XML");
            let with = |name| document.descendants().filter(|node| node.attribute(name).is_some()).count();
            assert_eq!((with("data-go"), with("data-d")), (3, 3));
        }
    }

    /// Time runs to the right in proportion, values upward.
    #[test]
    fn points_are_where_they_belong() {
        let dumps = dumps();
        let svg = line(&dumps, 58.0 + 10.0 + 300.0, 10.0 + 24.0 + 100.0, "x", Unit::Times, |dump| {
            Some(dump.totals.held_len as f64 / 65536.0)
        });
        let expected = "M58.0 60.0L158.0 10.0L358.0 60.0";
        // 4 is the top, 2 the middle; times 100, 200, 400 are 0, 1/3 and 1 of the way.
        assert!(svg.contains(expected), "{svg}");
    }

    #[test]
    fn tops_are_round() {
        assert_eq!([0.0, 1.0, 1.2, 4.0, 5.0, 3e6].map(nice_above), [1.0, 1.0, 1.25, 4.0, 5.0, 3145728.0]);
    }
}

//! A log for a terminal: how the numbers went, the last dump's classes, its map.

use std::fmt::{self, Write as _};

use crate::{
    Dump, Map,
    units::{bytes, digits, time},
};

/// From least to most.
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The last dump that shows its page runs.
fn last_with_runs(dumps: &[Dump]) -> Option<&Dump> {
    dumps.iter().rev().find(|dump| !dump.runs.is_empty())
}

/// The map of the last dump that has one, for a terminal `width` columns wide.
pub fn map_text(dumps: &[Dump], width: usize, colour: bool) -> Option<String> {
    last_with_runs(dumps).map(|dump| Map::new(&dump.runs).text(width, colour))
}

/// All dumps in some lines.
pub fn overview(dumps: &[Dump], width: usize) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = overview_into(&mut text, dumps, width);
    text
}

fn overview_into(text: &mut String, dumps: &[Dump], width: usize) -> fmt::Result {
    let (Some(first), Some(last)) = (dumps.first(), dumps.last()) else { return Ok(()) };
    let plural = if dumps.len() == 1 { "" } else { "s" };
    writeln!(text, "{} dump{plural}, {} to {}", dumps.len(), time(first.time), time(last.time))?;
    if dumps.len() > 1 {
        let room = width.saturating_sub(46).clamp(8, 64);
        let mut row = |name: &str, unit: &dyn Fn(f64) -> String, values: Vec<f64>| {
            let (least, most) =
                (values.iter().copied().fold(f64::MAX, f64::min), values.iter().copied().fold(0.0, f64::max));
            writeln!(text, "  {name:<14} {}  {} to {}", sparkline(&values, room), unit(least), unit(most))
        };
        row("held", &bytes, dumps.iter().map(|dump| dump.totals.held_len as f64).collect())?;
        row("live", &bytes, dumps.iter().map(|dump| dump.totals.live_len as f64).collect())?;
        row(
            "held over live",
            &|ratio| format!("{}x", digits(ratio)),
            dumps.iter().filter_map(Dump::held_over_live).collect(),
        )?;
        row(
            "fragmentation",
            &|share| format!("{:.0} %", share * 100.0),
            dumps.iter().map(Dump::fragmentation).collect(),
        )?;
    }
    let totals = &last.totals;
    writeln!(
        text,
        "  at the end: {} held (at most {}), {} live; {} of {} free in the longest run",
        bytes(totals.held_len as f64),
        bytes(totals.high_held_len as f64),
        bytes(totals.live_len as f64),
        bytes(totals.longest_free_len as f64),
        bytes(totals.free_len as f64),
    )?;
    writeln!(
        text,
        "\n{:>8} {:>10} {:>10} {:>8} {:>8} {:>10} {:>10}  of the bytes held",
        "block", "live", "cached", "partial", "empty", "held", "at most"
    )?;
    for class in &last.classes {
        let share = |blocks: u64| blocks as f64 * class.block_len as f64 / class.held_len.max(1) as f64;
        writeln!(
            text,
            "{:>8} {:>10} {:>10} {:>8} {:>8} {:>10} {:>10}  {}",
            class.block_len,
            class.live,
            class.cached,
            class.partial,
            class.empty,
            bytes(class.held_len as f64),
            bytes(class.high_held_len as f64),
            bar(share(class.live), share(class.cached), 20),
        )?;
    }
    Ok(())
}

/// Values as one line of at most `room` columns, from 0 to their maximum: where there are more values than columns, the
/// largest of each column.
fn sparkline(values: &[f64], room: usize) -> String {
    let most = values.iter().copied().fold(0.0, f64::max);
    let level = |value: f64| {
        let above = (1..8).take_while(|eighth| most > 0.0 && value / most * 8.0 > f64::from(*eighth)).count();
        LEVELS.get(above).copied().unwrap_or('█')
    };
    let per_column = values.len().div_ceil(room.max(1)).max(1);
    values.chunks(per_column).map(|column| level(column.iter().copied().fold(0.0, f64::max))).collect()
}

/// Live blocks as full, cached ones as half full, of `room` columns.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of some columns")]
fn bar(live: f64, cached: f64, room: usize) -> String {
    let columns = |share: f64| ((share.clamp(0.0, 1.0) * room as f64).round() as usize).min(room);
    let (full, both) = (columns(live), columns(live + cached));
    let half = both - full.min(both);
    format!("{}{}{}", "█".repeat(full), "▒".repeat(half), "·".repeat(room - full - half))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dump::tests::sample;

    #[test]
    fn the_overview_tells_ranges_and_classes() {
        let mut later = sample();
        later.time = 2_000_000;
        later.totals.held_len *= 2;
        let text = overview(&[sample(), later], 100);
        assert!(text.starts_with("2 dumps, 100 ms to 2000 ms\n"), "{text}");
        assert!(text.contains("held           ▄█  128 KiB to 256 KiB"), "{text}");
        assert!(text.contains("held over live ▄█  2.67x to 5.33x"), "{text}");
        assert!(text.contains("fragmentation  ██  27 % to 27 %"), "{text}");
        assert!(text.contains("32.0 KiB of 44.0 KiB free in the longest run"), "{text}");
        let row = "      32        700         68        1        0   32.0 KiB   32.0 KiB  ██████████████▒·····";
        assert!(text.contains(row), "{text}");
        let one = overview(&[sample()], 100);
        assert!(one.starts_with("1 dump, ") && !one.contains('▄'), "{one}");
    }

    #[test]
    fn a_line_has_as_many_columns_as_there_is_room() {
        let values: Vec<f64> = (0..1000).map(f64::from).collect();
        assert_eq!(sparkline(&values, 50).chars().count(), 50);
        assert_eq!(sparkline(&[0.0, 0.0], 50), "▁▁");
        assert_eq!(sparkline(&[0.0, 4.0, 8.0], 50), "▁▄█");
    }

    #[test]
    fn bars_never_have_more_than_their_room() {
        assert_eq!(bar(0.5, 0.25, 8), "████▒▒··");
        assert_eq!(bar(2.0, 3.0, 8), "████████");
        assert_eq!(bar(0.0, 0.0, 8), "········");
    }
}

//! The heap as a picture, to scale: runs in order of addresses, hue by block size, height of the dark part by the
//! share in use. One file, no script, no font of its own; each run says what it is when pointed at.
//!
//! A long free run is drawn up to the end of its first whole row, and then only told in words: half a picture of nothing
//! would push the rest out of sight.
//!
//! Hues go by the logarithm of the size, so that classes that are close in size look alike: forty colours that a reader
//! had to tell apart by name would tell him less.

use std::fmt::{self, Write as _};

use super::{
    map::Map,
    protocol::{Kind, Run},
    report::bytes,
};

/// Bytes in a row.
const ROW_LEN: u64 = 512 << 10;
/// The width of a row in pixels.
const ROW_WIDTH: f64 = 1024.0;
/// The height of a row, the gap to the next one included, and that gap.
const ROW_HEIGHT: f64 = 16.0;
const GAP: f64 = 3.0;
/// The gap between chunks.
const CHUNK_GAP: f64 = 8.0;
/// Where the map begins.
const LEFT: f64 = 96.0;
const TOP: f64 = 84.0;
/// The width of a legend entry, and how many stand side by side.
const ENTRY: f64 = 252.0;
const ENTRIES: usize = 4;
/// The height of a legend row.
const LEGEND_ROW: f64 = 22.0;

/// Stops of the colour scale, from the smallest blocks to the largest: hue and lightness both change on the way, so that
/// neighbouring doublings differ also to an eye that does not tell red from green.
const STOPS: [(u8, u8, u8); 10] = [
    (0x3b, 0x2f, 0x8f),
    (0x44, 0x66, 0xd8),
    (0x3f, 0x9b, 0xfe),
    (0x1f, 0xc8, 0xd8),
    (0x2f, 0xd8, 0x84),
    (0x8f, 0xe0, 0x3c),
    (0xdc, 0xcf, 0x32),
    (0xfb, 0x96, 0x2b),
    (0xe4, 0x50, 0x14),
    (0xa0, 0x14, 0x05),
];

/// The colour of a block size, by its logarithm: from 8 B to 32 KiB and more.
pub(crate) fn colour(size: u64) -> (u8, u8, u8) {
    let mut position = ((size.clamp(8, 32 << 10) as f64).log2() - 3.0) / 12.0 * (STOPS.len() - 1) as f64;
    for pair in STOPS.windows(2) {
        let [from, to] = pair else { continue };
        if position <= 1.0 {
            return mix(*from, *to, position);
        }
        position -= 1.0;
    }
    STOPS.last().copied().unwrap_or_default()
}

/// Between two colours, `share` of the way.
#[expect(clippy::cast_possible_truncation, reason = "between two bytes, and rounded")]
fn mix(from: (u8, u8, u8), to: (u8, u8, u8), share: f64) -> (u8, u8, u8) {
    let mix = |from: u8, to: u8| (f64::from(from) + (f64::from(to) - f64::from(from)) * share).round() as u8;
    (mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}

/// The colours of a run: of the part in use, and of the rest.
fn colours(kind: Kind) -> (String, String) {
    let hex = |(red, green, blue): (u8, u8, u8)| format!("#{red:02x}{green:02x}{blue:02x}");
    match kind {
        Kind::Slab { size, .. } => (hex(colour(size)), hex(mix(colour(size), (255, 255, 255), 0.78))),
        Kind::Large => ("#5f6673".to_owned(), "#5f6673".to_owned()),
        Kind::Own => ("#1d1f24".to_owned(), "#1d1f24".to_owned()),
        Kind::Free => ("#f4f4f2".to_owned(), "#f4f4f2".to_owned()),
    }
}

fn name(run: &Run) -> String {
    let place = format!("{:#x}, {}", run.chunk + run.offset, bytes(run.len as f64));
    match run.kind {
        Kind::Free => format!("free: {place}"),
        Kind::Large => format!("large block: {place}"),
        Kind::Own => format!("the heap's own: {place}"),
        Kind::Slab { size, blocks, free } => {
            format!("slab of {size}-byte blocks: {place}, {} of {blocks} blocks out", blocks.saturating_sub(free))
        }
    }
}

/// The picture of a heap; `caption` says what it was doing.
pub(crate) fn render(map: &Map, caption: &str) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = render_into(&mut text, map, caption);
    text
}

fn render_into(out: &mut String, map: &Map, caption: &str) -> fmt::Result {
    let width = LEFT + ROW_WIDTH + 24.0;
    let row_count: usize = map.chunks().map(|chunk| rows(chunk).len()).sum();
    let map_bottom = TOP + row_count as f64 * ROW_HEIGHT + map.chunks().count() as f64 * CHUNK_GAP;
    let entries = map.classes().count() + 3;
    let height = map_bottom + 70.0 + entries.div_ceil(ENTRIES) as f64 * LEGEND_ROW + 20.0;

    writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="12" fill="#222">"##
    )?;
    writeln!(out, r##"<rect width="100%" height="100%" fill="#ffffff"/>"##)?;
    writeln!(out, r#"<text x="24" y="32" font-size="20" font-weight="bold">Heap map: {}</text>"#, escape(caption))?;
    writeln!(out, r##"<text x="24" y="54" fill="#555">{}</text>"##, escape(&map.summary()))?;
    writeln!(
        out,
        r##"<text x="{LEFT}" y="{}" fill="#777" font-size="11">a row is {}, a box is a page run</text>"##,
        TOP - 8.0,
        bytes(ROW_LEN as f64),
    )?;
    let mut top = TOP;
    for chunk in map.chunks() {
        let Some(first) = chunk.first() else { continue };
        let rows = rows(chunk);
        for (place, row) in rows.iter().enumerate() {
            let address = first.chunk + row * ROW_LEN;
            let y = top + place as f64 * ROW_HEIGHT + ROW_HEIGHT - GAP - 3.0;
            let shade = if place == 0 { "#222" } else { "#999" };
            writeln!(
                out,
                r#"<text x="{}" y="{y}" text-anchor="end" font-family="DejaVu Sans Mono, monospace" font-size="10" fill="{shade}">{address:#x}</text>"#,
                LEFT - 8.0
            )?;
        }
        for run in chunk {
            draw_run(out, run, &rows, top)?;
        }
        for (place, pair) in rows.windows(2).enumerate() {
            let [row, next] = pair else { continue };
            if next - row > 1 {
                let y = top + place as f64 * ROW_HEIGHT + ROW_HEIGHT - GAP - 3.0;
                let len = bytes(((next - row - 1) * ROW_LEN) as f64);
                writeln!(
                    out,
                    r##"<text x="{}" y="{y}" text-anchor="middle" font-size="10" fill="#999">and {len} more of it</text>"##,
                    LEFT + ROW_WIDTH / 2.0
                )?;
            }
        }
        top += rows.len() as f64 * ROW_HEIGHT + CHUNK_GAP;
    }
    legend(out, map, map_bottom + 24.0)?;
    writeln!(out, "</svg>")
}

/// The rows of a chunk that are drawn: all but those inside a free run that follow a row inside the same run. The last
/// row always is, so that two drawn rows enclose what is left out.
fn rows(chunk: &[Run]) -> Vec<u64> {
    let end = chunk.iter().map(|run| run.offset + run.len).max().unwrap_or(0);
    let count = end.div_ceil(ROW_LEN);
    let hidden = |row: u64| {
        let (from, to) = (row.saturating_sub(1) * ROW_LEN, (row + 1) * ROW_LEN);
        let inside = |run: &Run| run.kind == Kind::Free && run.offset <= from && run.offset + run.len >= to;
        row > 0 && row + 1 < count && chunk.iter().any(inside)
    };
    (0..count).filter(|row| !hidden(*row)).collect()
}

/// A run, in as many pieces as it touches rows.
fn draw_run(out: &mut String, run: &Run, rows: &[u64], top: f64) -> fmt::Result {
    let (used, unused) = colours(run.kind);
    let (mut at, end) = (run.offset, run.offset + run.len);
    writeln!(out, "<g><title>{}</title>", escape(&name(run)))?;
    let scale = ROW_WIDTH / ROW_LEN as f64;
    while at < end {
        let (row, column) = (at / ROW_LEN, at % ROW_LEN);
        let len = (end - at).min(ROW_LEN - column);
        at += len;
        let Ok(place) = rows.binary_search(&row) else { continue };
        let (x, y) = (LEFT + column as f64 * scale, top + place as f64 * ROW_HEIGHT);
        let (width, height) = (len as f64 * scale, ROW_HEIGHT - GAP);
        writeln!(out, r#"<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{unused}"/>"#)?;
        let full = height * run.fill();
        if full > 0.0 && used != unused {
            writeln!(
                out,
                r#"<rect x="{x}" y="{:.2}" width="{width}" height="{full:.2}" fill="{used}"/>"#,
                y + height - full
            )?;
        }
        // Where a run begins, a line; a free run needs an outline to be seen at all.
        if run.kind == Kind::Free && width > 2.0 {
            writeln!(
                out,
                r##"<rect x="{}" y="{}" width="{}" height="{}" fill="none" stroke="#d5d5d0"/>"##,
                x + 0.5,
                y + 0.5,
                width - 1.0,
                height - 1.0
            )?;
        }
        if at - len == run.offset {
            writeln!(out, r##"<rect x="{x}" y="{y}" width="1" height="{height}" fill="#ffffff"/>"##)?;
        }
    }
    writeln!(out, "</g>")
}

/// What each colour means, how many blocks of it there are, and how to read the fill.
fn legend(out: &mut String, map: &Map, top: f64) -> fmt::Result {
    writeln!(
        out,
        r#"<text x="24" y="{top}" font-weight="bold">Colour: size of the blocks. Height of the full colour: share of them that is out of the slab, in use or in a CPU's cache.</text>"#
    )?;
    let mut entries: Vec<(Kind, f64, String)> = map
        .classes()
        .map(|(size, class)| {
            let used = class.blocks.saturating_sub(class.free);
            let text = format!("{size} B: {used} of {} in {}", class.blocks, bytes(class.len as f64));
            (Kind::Slab { size, blocks: 1, free: 0 }, used as f64 / class.blocks.max(1) as f64, text)
        })
        .collect();
    for (kind, name) in [(Kind::Large, "large blocks"), (Kind::Own, "the heap's own"), (Kind::Free, "free")] {
        let (count, len) = map.total(|other| other == kind);
        if count > 0 {
            entries.push((kind, 1.0, format!("{name}: {count}, {}", bytes(len as f64))));
        }
    }
    // Sizes run down the columns.
    let rows = entries.len().div_ceil(ENTRIES).max(1);
    for (place, (kind, fill, text)) in entries.into_iter().enumerate() {
        let (x, y) = (24.0 + ENTRY * (place / rows) as f64, top + 14.0 + LEGEND_ROW * (place % rows) as f64);
        let (used, unused) = colours(kind);
        let height = 14.0;
        let full = height * fill;
        writeln!(out, r##"<rect x="{x}" y="{y}" width="24" height="{height}" fill="{unused}" stroke="#d5d5d0"/>"##)?;
        writeln!(out, r#"<rect x="{x}" y="{:.2}" width="24" height="{full:.2}" fill="{used}"/>"#, y + height - full)?;
        writeln!(out, r#"<text x="{}" y="{}">{}</text>"#, x + 32.0, y + 11.0, escape(&text))?;
    }
    Ok(())
}

/// Text as XML has it.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::map::tests::sample;

    #[test]
    fn the_picture_is_well_formed_and_has_every_run() {
        let runs = sample();
        let svg = render(&Map::new(&runs), "a < b & \"c\"");
        let document = roxmltree::Document::parse(&svg).expect("well-formed XML");
        assert_eq!(document.root_element().tag_name().name(), "svg");
        let titles: Vec<&str> =
            document.descendants().filter(|node| node.has_tag_name("title")).filter_map(|node| node.text()).collect();
        assert_eq!(titles.len(), runs.len());
        assert!(titles.contains(&"slab of 32-byte blocks: 0x205000, 16.0 KiB, 256 of 512 blocks out"), "{titles:?}");
        assert!(document.descendants().any(|node| node.text() == Some("Heap map: a < b & \"c\"")));
    }

    #[test]
    fn everything_lies_inside_the_picture_and_runs_do_not_overlap() {
        let svg = render(&Map::new(&sample()), "x");
        let document = roxmltree::Document::parse(&svg).expect("well-formed XML");
        let number =
            |node: &roxmltree::Node<'_, '_>, name: &str| node.attribute(name).and_then(|n| n.parse::<f64>().ok());
        let (width, height) = (
            number(&document.root_element(), "width").expect("a width"),
            number(&document.root_element(), "height").expect("a height"),
        );
        let mut first_rects: Vec<[f64; 4]> = Vec::new();
        for node in document.descendants().filter(|node| node.has_tag_name("rect")) {
            let Some([x, y, w, h]) = ["x", "y", "width", "height"]
                .map(|name| number(&node, name))
                .into_iter()
                .collect::<Option<Vec<_>>>()
                .and_then(|all| <[f64; 4]>::try_from(all).ok())
            else {
                continue;
            };
            assert!(x >= 0.0 && y >= 0.0 && x + w <= width && y + h <= height, "{node:?}");
            if node.prev_sibling_element().is_some_and(|before| before.has_tag_name("title")) {
                for [ox, oy, ow, oh] in &first_rects {
                    assert!(
                        x >= ox + ow || ox + ow > width || x + w <= *ox || y >= oy + oh || y + h <= *oy,
                        "{node:?}"
                    );
                }
                first_rects.push([x, y, w, h]);
            }
        }
        assert_eq!(first_rects.len(), sample().len());
    }

    #[test]
    fn a_long_run_goes_on_in_the_next_row() {
        let run = Run { chunk: 0x10_0000, offset: 100 * 4096, len: 100 * 4096, kind: Kind::Large };
        let mut out = String::new();
        draw_run(&mut out, &run, &[0, 1], 0.0).expect("strings take everything");
        assert!(out.contains(r#"x="896" y="0" width="224""#), "{out}");
        assert!(out.contains(r#"x="96" y="16" width="576""#), "{out}");
    }

    #[test]
    fn the_middle_of_a_long_free_run_is_left_out() {
        let run = |rows: core::ops::Range<u64>, kind| Run {
            chunk: 0,
            offset: rows.start * ROW_LEN,
            len: (rows.end - rows.start) * ROW_LEN,
            kind,
        };
        let runs = [run(0..2, Kind::Large), run(2..9, Kind::Free), run(9..10, Kind::Large), run(10..20, Kind::Free)];
        assert_eq!(rows(&runs), [0, 1, 2, 9, 10, 19]);
        let svg = render(&Map::new(&runs), "x");
        assert_eq!(
            (svg.matches("and 3.00 MiB more").count(), svg.matches("and 4.00 MiB more").count()),
            (1, 1),
            "{svg}"
        );
    }

    #[test]
    fn colours_go_from_blue_to_red_in_small_steps() {
        let (red, _, blue) = colour(8);
        assert!(blue > 2 * red, "{red} {blue}");
        let (red, _, blue) = colour(32768);
        assert!(red > 2 * blue, "{red} {blue}");
        assert_eq!(colour(1 << 40), colour(32768));
        assert_eq!([8, 128, 2048, 32768].map(colour), [STOPS[0], STOPS[3], STOPS[6], STOPS[9]]);
        for power in 3..15 {
            let ((r0, g0, b0), (r1, g1, b1)) = (colour(1 << power), colour(2 << power));
            let step = r0.abs_diff(r1).max(g0.abs_diff(g1)).max(b0.abs_diff(b1));
            assert!((25..130).contains(&step), "{step} at {}", 1 << power);
        }
    }
}

//! The heap map to scale: runs in order of addresses, hue by block size, height of the full colour by the share in use.
//!
//! Colours are classes (`b32` for blocks of 32 bytes), so that the page around it chooses them for light and dark, and
//! can fade all but one. Each run carries what it is in `data-t`, for the page to show.
//!
//! A row is a power of two of bytes, chosen so that small heaps fill a picture and large ones fit one. A long free run
//! is drawn up to the end of its first whole row, and then only told in words: half a picture of nothing would push the
//! rest out of sight.
//!
//! Hues go by the logarithm of the size, so that classes that are close in size look alike: forty colours that a reader
//! had to tell apart by name would tell him less.

use std::fmt::{self, Write as _};

use crate::{
    Kind, Map, Run,
    units::{bytes, count, escape},
};

/// The width of a row in pixels.
const ROW_WIDTH: f64 = 1024.0;
/// The height of a row, the gap to the next one included, and that gap.
const ROW_HEIGHT: f64 = 18.0;
const GAP: f64 = 3.0;
/// The gap between chunks.
const CHUNK_GAP: f64 = 8.0;
/// Where the rows begin, and how wide all is.
const LEFT: f64 = 104.0;
const WIDTH: f64 = LEFT + ROW_WIDTH + 2.0;

/// Bytes in a row, at least and at most, and how many rows are too many.
const SHORTEST_ROW: u64 = 16 << 10;
const LONGEST_ROW: u64 = 4 << 20;
const MANY_ROWS: usize = 64;

/// Stops of the colour scale, from the smallest blocks to the largest: hue and lightness both change on the way, so
/// that neighbouring doublings differ also to an eye that does not tell red from green.
const STOPS: [(u8, u8, u8); 10] = [
    (0x4b, 0x3f, 0xa8),
    (0x44, 0x66, 0xd8),
    (0x3f, 0x9b, 0xfe),
    (0x1f, 0xbc, 0xcc),
    (0x2f, 0xc8, 0x7c),
    (0x8f, 0xd0, 0x3c),
    (0xdc, 0xc0, 0x2a),
    (0xfb, 0x96, 0x2b),
    (0xe4, 0x50, 0x14),
    (0xb0, 0x1c, 0x1c),
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
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two bytes, and rounded")]
fn mix(from: (u8, u8, u8), to: (u8, u8, u8), share: f64) -> (u8, u8, u8) {
    let mix = |from: u8, to: u8| (f64::from(from) + (f64::from(to) - f64::from(from)) * share).round() as u8;
    (mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}

/// The colour as a style sheet has it.
pub(crate) fn hex(size: u64) -> String {
    let (red, green, blue) = colour(size);
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// The style class of what is in a run.
fn class(kind: Kind) -> String {
    match kind {
        Kind::Slab { block_len, .. } => format!("b{block_len}"),
        Kind::Large => "large".to_owned(),
        Kind::Free => "free".to_owned(),
    }
}

/// What a run is, and where.
fn tip(run: &Run) -> String {
    let place = format!("{:#x}, {}", run.chunk.wrapping_add(run.offset), bytes(run.len as f64));
    match run.kind {
        Kind::Free => format!("Free pages|{place}"),
        Kind::Large => format!("Large block|{place}"),
        Kind::Slab { block_len, blocks, out } => {
            format!("Slab of {block_len}-byte blocks|{place}|{} of {} blocks out of it", count(out), count(blocks))
        }
    }
}

/// Bytes in a row: as few as give no more than so many rows.
fn row_len(map: &Map) -> u64 {
    let mut len = SHORTEST_ROW;
    while len < LONGEST_ROW && map.chunks().map(|chunk| rows(chunk, len).len()).sum::<usize>() > MANY_ROWS {
        len *= 2;
    }
    len
}

/// The picture of a heap.
pub(crate) fn render(map: &Map) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = render_into(&mut text, map);
    text
}

fn render_into(out: &mut String, map: &Map) -> fmt::Result {
    let row_len = row_len(map);
    let row_count: usize = map.chunks().map(|chunk| rows(chunk, row_len).len()).sum();
    let height = 22.0 + row_count as f64 * ROW_HEIGHT + map.chunks().count() as f64 * CHUNK_GAP;
    writeln!(out, r#"<svg xmlns="http://www.w3.org/2000/svg" class="map" viewBox="0 0 {WIDTH} {height}">"#)?;
    let about = format!("a row is {}, a box is a run of pages", bytes(row_len as f64));
    writeln!(out, r#"<text x="{LEFT}" y="12" class="dim">{about}</text>"#)?;
    let mut top = 22.0;
    for chunk in map.chunks() {
        let Some(first) = chunk.first() else { continue };
        let rows = rows(chunk, row_len);
        for (place, row) in rows.iter().enumerate() {
            let address = first.chunk.wrapping_add(row * row_len);
            let y = top + place as f64 * ROW_HEIGHT + ROW_HEIGHT - GAP - 4.0;
            let class = if place == 0 { "addr first" } else { "addr" };
            writeln!(out, r#"<text x="{}" y="{y}" class="{class}">{address:#x}</text>"#, LEFT - 8.0)?;
        }
        for run in chunk {
            draw_run(out, run, &rows, row_len, top)?;
        }
        for (place, pair) in rows.windows(2).enumerate() {
            let [row, next] = pair else { continue };
            if next - row > 1 {
                let y = top + place as f64 * ROW_HEIGHT + ROW_HEIGHT - GAP - 4.0;
                let len = bytes(((next - row - 1) * row_len) as f64);
                let x = LEFT + ROW_WIDTH / 2.0;
                writeln!(out, r#"<text x="{x}" y="{y}" class="more">and {len} more of it</text>"#)?;
            }
        }
        top += rows.len() as f64 * ROW_HEIGHT + CHUNK_GAP;
    }
    writeln!(out, "</svg>")
}

/// The rows of a chunk that are drawn: all but those inside a free run that follow a row inside the same run. The last
/// row always is, so that two drawn rows enclose what is left out.
fn rows(chunk: &[Run], row_len: u64) -> Vec<u64> {
    let end = chunk.iter().map(|run| run.offset.saturating_add(run.len)).max().unwrap_or(0);
    let last = end.div_ceil(row_len).saturating_sub(1);
    let mut rows = vec![last];
    for run in chunk {
        let end = run.offset.saturating_add(run.len);
        let (first, behind) = (run.offset / row_len, end.div_ceil(row_len));
        if run.kind == Kind::Free {
            // Those that it shares with others, and the first that it does not.
            let shared = if end % row_len == 0 { first } else { behind - 1 };
            rows.extend([first, run.offset.div_ceil(row_len), shared].into_iter().filter(|row| *row < behind));
        } else {
            rows.extend(first..behind.min(first.saturating_add(MAX_RUN_ROWS)));
        }
    }
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// Rows of one run that are drawn; a longer one is cut short in the picture.
const MAX_RUN_ROWS: u64 = 512;

/// A run, in as many pieces as it touches rows.
fn draw_run(out: &mut String, run: &Run, rows: &[u64], row_len: u64, top: f64) -> fmt::Result {
    let (first, end) = (run.offset, run.offset.saturating_add(run.len));
    writeln!(out, r#"<g class="r {}" data-t="{}">"#, class(run.kind), escape(&tip(run)))?;
    let scale = ROW_WIDTH / row_len as f64;
    let from = rows.partition_point(|row| *row < first / row_len);
    for (place, row) in rows.iter().enumerate().skip(from).take_while(|(_, row)| **row * row_len < end) {
        let (at, to) = (first.max(row * row_len), end.min((row + 1).saturating_mul(row_len)));
        let (x, y) = (LEFT + (at - row * row_len) as f64 * scale, top + place as f64 * ROW_HEIGHT);
        // A hair of space between neighbours, where there is room for it.
        let (width, height) = ((to - at) as f64 * scale, ROW_HEIGHT - GAP);
        let inner = if width > 3.0 { width - 0.8 } else { width };
        writeln!(out, r#"<rect x="{x:.2}" y="{y}" width="{inner:.2}" height="{height}" class="e"/>"#)?;
        let full = height * run.fill();
        if full > 0.0 {
            let y = y + height - full;
            writeln!(out, r#"<rect x="{x:.2}" y="{y:.2}" width="{inner:.2}" height="{full:.2}" class="u"/>"#)?;
        }
    }
    writeln!(out, "</g>")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::tests::sample;

    fn number(node: &roxmltree::Node<'_, '_>, name: &str) -> Option<f64> {
        node.attribute(name).and_then(|n| n.parse().ok())
    }

    #[test]
    fn the_picture_is_well_formed_and_has_every_run() {
        let runs = sample();
        let svg = render(&Map::new(&runs));
        let document = roxmltree::Document::parse(&svg).expect("well-formed XML");
        assert_eq!(document.root_element().tag_name().name(), "svg");
        let tips: Vec<&str> = document.descendants().filter_map(|node| node.attribute("data-t")).collect();
        assert_eq!(tips.len(), runs.len());
        assert!(tips.contains(&"Slab of 32-byte blocks|0x204000, 16.0 KiB|256 of 512 blocks out of it"), "{tips:?}");
    }

    #[test]
    fn everything_lies_inside_the_picture_and_runs_do_not_overlap() {
        let svg = render(&Map::new(&sample()));
        let document = roxmltree::Document::parse(&svg).expect("well-formed XML");
        let view: Vec<f64> = document
            .root_element()
            .attribute("viewBox")
            .expect("a size")
            .split(' ')
            .filter_map(|n| n.parse().ok())
            .collect();
        let mut boxes: Vec<[f64; 4]> = Vec::new();
        for node in document.descendants().filter(|node| node.attribute("class") == Some("e")) {
            let [x, y, w, h] = ["x", "y", "width", "height"].map(|name| number(&node, name).expect("a number"));
            assert!(x >= 0.0 && y >= 0.0 && x + w <= view[2] && y + h <= view[3], "{node:?}");
            for [ox, oy, ow, oh] in &boxes {
                assert!(x >= ox + ow || x + w <= *ox || y >= oy + oh || y + h <= *oy, "{node:?}");
            }
            boxes.push([x, y, w, h]);
        }
        assert!(boxes.len() >= sample().len());
    }

    /// The full colour of a slab is as high as the share of its blocks that is out.
    #[test]
    fn the_height_of_the_full_colour_is_the_share_in_use() {
        let svg = render(&Map::new(&sample()));
        let document = roxmltree::Document::parse(&svg).expect("well-formed XML");
        let share = |tip: &str| {
            let run = document
                .descendants()
                .find(|node| node.attribute("data-t").is_some_and(|t| t.contains(tip)))
                .expect(tip);
            let sum = |class| {
                run.children()
                    .filter(|node| node.attribute("class") == Some(class))
                    .filter_map(|node| number(&node, "height"))
                    .sum::<f64>()
            };
            sum("u") / sum("e")
        };
        assert_eq!(["512 of 512", "256 of 512", "0 of 4", "Large", "Free"].map(share), [1.0, 0.5, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn a_long_run_goes_on_in_the_next_row() {
        let run = Run { chunk: 0x10_0000, offset: 12 << 10, len: 16 << 10, kind: Kind::Large };
        let mut out = String::new();
        draw_run(&mut out, &run, &[0, 1], 16 << 10, 0.0).expect("strings take everything");
        assert!(out.contains(r#"x="872.00" y="0" width="255.20""#), "{out}");
        assert!(out.contains(r#"x="104.00" y="18" width="767.20""#), "{out}");
    }

    #[test]
    fn the_middle_of_a_long_free_run_is_left_out() {
        const ROW: u64 = SHORTEST_ROW;
        let run = |rows: core::ops::Range<u64>, kind| Run {
            chunk: 0,
            offset: rows.start * ROW,
            len: (rows.end - rows.start) * ROW,
            kind,
        };
        let runs = [run(0..2, Kind::Large), run(2..9, Kind::Free), run(9..10, Kind::Large), run(10..20, Kind::Free)];
        assert_eq!(rows(&runs, ROW), [0, 1, 2, 9, 10, 19]);
        let svg = render(&Map::new(&runs));
        assert_eq!(
            (svg.matches("and 96.0 KiB more").count(), svg.matches("and 128 KiB more").count()),
            (1, 1),
            "{svg}"
        );
    }

    #[test]
    fn rows_are_longer_for_longer_heaps() {
        let heap = |len| Map::new(&[Run { chunk: 0, offset: 0, len, kind: Kind::Large }]);
        assert_eq!(
            [64 << 10, 1 << 20, 16 << 20, 1 << 30].map(|len| row_len(&heap(len))),
            [16 << 10, 16 << 10, 256 << 10, 4 << 20]
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

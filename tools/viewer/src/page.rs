//! One HTML file for all dumps of a log: it needs no network and no other file, and without its script it still shows
//! the last dump.
//!
//! Everything is drawn here, for every dump, and the page's script only chooses what is shown: a page that draws
//! nothing itself can be looked at, printed, and tested without it. Price: its size grows with the number of dumps,
//! some 20 KB each, and some 250 bytes for each run of pages.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};

use crate::{
    Class, Dump, Kind, Map, chart,
    chart::Unit,
    svg,
    units::{bytes, count, digits, escape, time},
};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The page; `caption` says whose heap it is and what it was doing.
pub fn page(dumps: &[Dump], caption: &str) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = page_into(&mut text, dumps, caption);
    text
}

fn page_into(out: &mut String, dumps: &[Dump], caption: &str) -> fmt::Result {
    let caption = escape(caption);
    writeln!(out, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>")?;
    writeln!(out, r#"<meta name="viewport" content="width=device-width, initial-scale=1"/>"#)?;
    writeln!(out, "<title>smp-heap: {caption}</title>\n<style>\n{STYLE}")?;
    let sizes: BTreeSet<u64> = dumps.iter().flat_map(sizes).collect();
    for size in &sizes {
        writeln!(out, ".b{size} {{ --c: {}; }}", svg::hex(*size))?;
    }
    writeln!(out, "</style>\n</head>\n<body>\n<main>\n<header><h1>Heap of smp-heap</h1><p>{caption}</p></header>")?;
    if dumps.len() > 1 {
        steer(out, dumps)?;
    }
    for (index, dump) in dumps.iter().enumerate() {
        let shown = if index + 1 == dumps.len() { "on" } else { "" };
        writeln!(out, r#"<section data-d="{index}" class="{shown}" data-when="{}">"#, when(dumps, index))?;
        tiles(out, dump)?;
        writeln!(out, "</section>")?;
    }
    if dumps.len() > 1 {
        charts(out, dumps)?;
    }
    for (index, dump) in dumps.iter().enumerate() {
        let shown = if index + 1 == dumps.len() { "part on" } else { "part" };
        writeln!(out, r#"<section data-d="{index}" class="{shown}" data-when="{}">"#, when(dumps, index))?;
        map_card(out, dump)?;
        classes_card(out, dump)?;
        cpus_card(out, dump)?;
        writeln!(out, "</section>")?;
    }
    writeln!(
        out,
        "<footer>Drawn from lines of <code>heap.dump(time)</code>. Slabs, caches, partial and empty: see the words in the crate's documentation.</footer>"
    )?;
    writeln!(out, "</main>\n<div class=\"tip\"></div>\n<script>\n{SCRIPT}</script>\n</body>\n</html>")
}

fn when(dumps: &[Dump], index: usize) -> String {
    let dump = dumps.get(index);
    format!("{} of {}, at {}", index + 1, dumps.len(), time(dump.map_or(0, |dump| dump.time)))
}

/// Block lengths that need a colour.
fn sizes(dump: &Dump) -> Vec<u64> {
    let runs = dump.runs.iter().filter_map(|run| match run.kind {
        Kind::Slab { block_len, .. } => Some(block_len),
        _ => None,
    });
    dump.classes.iter().map(|class| class.block_len).chain(runs).collect()
}

fn steer(out: &mut String, dumps: &[Dump]) -> fmt::Result {
    let last = dumps.len() - 1;
    writeln!(
        out,
        r#"<div class="steer"><label for="dump">Dump</label><input id="dump" type="range" min="0" max="{last}" value="{last}"/><output>{}</output></div>"#,
        when(dumps, last)
    )
}

fn tiles(out: &mut String, dump: &Dump) -> fmt::Result {
    let totals = &dump.totals;
    let of = |len: u64| bytes(len as f64);
    let ratio = dump.held_over_live().map_or("—".to_owned(), |ratio| format!("{}×", digits(ratio)));
    let tiles = [
        (of(totals.held_len), format!("held, at most {}", of(totals.high_held_len))),
        (of(totals.live_len), format!("in use, {} of it large", of(totals.large_len))),
        (ratio, "held for each byte in use".to_owned()),
        (
            format!("{:.0} %", dump.fragmentation() * 100.0),
            format!("of {} free pages outside the longest run", of(totals.free_len)),
        ),
        (count(totals.maps), format!("runs mapped, {} failed", count(totals.failed_maps))),
        (count(totals.unmaps), format!("given back, {} refused", count(totals.refused_unmaps))),
    ];
    writeln!(out, r#"<div class="tiles">"#)?;
    for (value, name) in tiles {
        writeln!(out, r#"<div class="tile"><b>{value}</b><span>{name}</span></div>"#)?;
    }
    writeln!(out, "</div>")
}

fn charts(out: &mut String, dumps: &[Dump]) -> fmt::Result {
    writeln!(out, "<div class=\"card\"><h2>Over time</h2>\n<div class=\"key\">")?;
    for (class, name, _) in chart::LAYERS.iter().rev() {
        let colour = class.trim_start_matches("l-");
        writeln!(out, r#"<span><i style="background: var(--{colour})"></i>{name}</span>"#)?;
    }
    writeln!(out, "</div>\n<div class=\"charts\">")?;
    writeln!(
        out,
        r#"<figure class="tall"><figcaption><b>What the bytes held are made of</b></figcaption>{}</figure>"#,
        chart::memory(dumps, 640.0, 330.0)
    )?;
    let ratio = chart::line(dumps, 470.0, 150.0, "Bytes held for each byte in use", Unit::Times, Dump::held_over_live);
    writeln!(
        out,
        "<figure><figcaption><b>Held over live</b>: bytes held for each byte in use, up to 8</figcaption>{ratio}</figure>"
    )?;
    let share = chart::line(dumps, 470.0, 150.0, "Fragmentation", Unit::Percent, |dump| Some(dump.fragmentation()));
    writeln!(
        out,
        "<figure><figcaption><b>Fragmentation</b>: free pages outside the longest free run</figcaption>{share}</figure>"
    )?;
    writeln!(out, "</div></div>")
}

fn map_card(out: &mut String, dump: &Dump) -> fmt::Result {
    writeln!(out, r#"<div class="card"><h2>Heap map</h2>"#)?;
    if dump.runs.is_empty() {
        return writeln!(out, "<p>This dump is a brief one, without the runs of pages.</p></div>");
    }
    let map = Map::new(&dump.runs);
    writeln!(
        out,
        "<p>{}. Colour: the size of a slab's blocks. Height of the full colour: the share of them that is out of the slab, in use or in a CPU's cache.</p>",
        escape(&map.summary())
    )?;
    writeln!(out, "{}<div class=\"chips\">", svg::render(&map))?;
    for (size, class) in map.classes() {
        writeln!(
            out,
            r#"<button class="chip b{size}" data-c="b{size}"><span class="swatch"></span>{size} B<em>{} of {}</em></button>"#,
            count(class.out),
            count(class.blocks)
        )?;
    }
    for (kind, class, name) in [(Kind::Large, "large", "large blocks"), (Kind::Free, "free", "free pages")] {
        let (number, len) = map.total(|other| other == kind);
        if number > 0 {
            let colour = if kind == Kind::Free { "freebox" } else { "large" };
            writeln!(
                out,
                r#"<button class="chip" style="--c: var(--{colour})" data-c="{class}"><span class="swatch"></span>{name}<em>{}</em></button>"#,
                bytes(len as f64)
            )?;
        }
    }
    writeln!(out, "</div></div>")
}

/// A cell of a table; a zero steps back.
fn cell(out: &mut String, value: u64) -> fmt::Result {
    write!(out, "<td{}>{}</td>", if value == 0 { r#" class="zero""# } else { "" }, count(value))
}

fn classes_card(out: &mut String, dump: &Dump) -> fmt::Result {
    writeln!(
        out,
        "<div class=\"card\"><h2>Size classes</h2>\n<p>The bar: bytes of the class's slabs in use, in caches, free, by the class that holds most; the tick is the most it ever held. Blocks of its slabs may serve other classes, and the other way round: the bar and <i>used</i> are about slabs.</p>"
    )?;
    writeln!(
        out,
        "<table class=\"classes\"><tr><th>block</th><th>in use</th><th>cached</th><th>partial slabs</th><th>empty slabs</th><th>held</th><th>at most</th><th>used</th><th></th></tr>"
    )?;
    let most = dump.classes.iter().map(|class| class.high_held_len).max().unwrap_or(0);
    for class in &dump.classes {
        write!(
            out,
            r#"<tr class="b{}"><td><span class="swatch"></span>{}</td>"#,
            class.block_len,
            bytes_exact(class.block_len)
        )?;
        for value in [class.live, class.cached, class.partial, class.empty] {
            cell(out, value)?;
        }
        let used = 100.0 * used_len(class) / class.held_len.max(1) as f64;
        write!(
            out,
            "<td>{}</td><td>{}</td><td>{used:.0} %</td>",
            bytes(class.held_len as f64),
            bytes(class.high_held_len as f64)
        )?;
        let width = |len: f64| 99.0 * len / most.max(1) as f64;
        let cached_len = class.cached as f64 * class.block_len as f64;
        writeln!(
            out,
            r#"<td class="wide"><span class="bar"><u class="b1" style="width: {:.2}%"></u><u class="b2" style="width: {:.2}%"></u><u style="width: {:.2}%"></u><s style="left: {:.2}%"></s></span></td></tr>"#,
            width(class.held_len as f64),
            width((used_len(class) + cached_len).min(class.held_len as f64)),
            width(used_len(class)),
            width(class.high_held_len as f64)
        )?;
    }
    writeln!(out, "</table></div>")
}

/// Bytes of the class's own slabs that are in use, whichever class they serve.
fn used_len(class: &Class) -> f64 {
    (class.live + class.to_others).saturating_sub(class.from_others) as f64 * class.block_len as f64
}

/// A block's length: exact, since classes are told apart by it.
fn bytes_exact(len: u64) -> String {
    if len >= 1024 && len % 1024 == 0 { format!("{} KiB", len / 1024) } else { format!("{len} B") }
}

fn cpus_card(out: &mut String, dump: &Dump) -> fmt::Result {
    writeln!(
        out,
        "<div class=\"card\"><h2>CPUs</h2>\n<p>What each cache has, and what went between it and the slabs. Nested calls found the cache busy.</p>"
    )?;
    writeln!(
        out,
        "<table class=\"cpus\"><tr><th>CPU</th><th>cached</th><th>bytes</th><th>partial slabs</th><th>refills</th><th>blocks</th><th>flushes</th><th>blocks</th><th>laps</th><th>nested allocs</th><th>nested frees</th></tr>"
    )?;
    for cpu in &dump.cpus {
        write!(out, "<tr><td>{}</td>", cpu.index)?;
        cell(out, cpu.cached)?;
        write!(out, "<td>{}</td>", bytes(cpu.cached_len as f64))?;
        for value in [
            cpu.partial,
            cpu.refills,
            cpu.refilled,
            cpu.flushes,
            cpu.flushed,
            cpu.laps,
            cpu.nested_allocs,
            cpu.nested_frees,
        ] {
            cell(out, value)?;
        }
        writeln!(out, "</tr>")?;
    }
    writeln!(out, "</table>")?;
    if !dump.shares.is_empty() {
        shares(out, dump)?;
    }
    writeln!(out, "</div>")
}

/// CPUs by classes: who takes more than he gives back, and what lies in his cache.
fn shares(out: &mut String, dump: &Dump) -> fmt::Result {
    let sizes: BTreeSet<u64> = dump.shares.iter().map(|share| share.block_len).collect();
    let cpus: BTreeSet<u64> = dump.shares.iter().map(|share| share.cpu).collect();
    let most = dump.shares.iter().map(|share| share.balance().unsigned_abs()).max().unwrap_or(0);
    writeln!(
        out,
        "<p style=\"margin-top: 18px\">By class: the number is the blocks in the cache. Blue CPUs took more blocks than they gave back; orange ones free what others allocate.</p>"
    )?;
    write!(out, "<table class=\"heat\"><tr><th></th>")?;
    for size in &sizes {
        write!(out, "<th>{}</th>", if *size >= 1024 { format!("{}K", digits_short(*size)) } else { size.to_string() })?;
    }
    writeln!(out, "</tr>")?;
    for cpu in cpus {
        write!(out, "<tr><td>CPU {cpu}</td>")?;
        for size in &sizes {
            match dump.shares.iter().find(|share| (share.cpu, share.block_len) == (cpu, *size)) {
                None => write!(out, "<td></td>")?,
                Some(share) => {
                    let balance = share.balance();
                    let strength =
                        ((balance.unsigned_abs() as f64).ln_1p() / (most as f64).ln_1p().max(1.0) * 78.0).round();
                    let colour = if balance < 0 { "warm" } else { "accent" };
                    let number = if share.cached == 0 { String::new() } else { share.cached.to_string() };
                    write!(
                        out,
                        r#"<td style="background: color-mix(in srgb, var(--{colour}) {strength}%, var(--faint))" data-t="CPU {cpu}, {size}-byte blocks|{} cached, lists of at most {}|{} blocks got, {} given back|balance {balance:+}|{} partial slabs, {} whole">{number}</td>"#,
                        count(share.cached),
                        share.limit,
                        count(share.refilled),
                        count(share.flushed),
                        share.partial,
                        share.empty
                    )?;
                }
            }
        }
        writeln!(out, "</tr>")?;
    }
    writeln!(out, "</table>")
}

/// KiB with at most one place.
fn digits_short(len: u64) -> String {
    let kib = len as f64 / 1024.0;
    if kib.fract() == 0.0 { format!("{kib:.0}") } else { format!("{kib:.1}").trim_start_matches('0').to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dump::tests::sample;

    fn parsed(page: &str) -> roxmltree::Document<'_> {
        // An XML reader takes everything but the doctype, style and script, which may hold anything.
        let (head, rest) = page.split_once("<body>").expect("a body");
        assert!(head.starts_with("<!DOCTYPE html>"));
        let (body, _) = rest.split_once("<script>").expect("a script");
        let body = body.strip_suffix("\n<div class=\"tip\"></div>\n").expect("the tip");
        roxmltree::Document::parse(body).unwrap_or_else(|error| panic_with(error))
    }

    fn panic_with(error: roxmltree::Error) -> ! {
        panic!("not well-formed: {error}")
    }

    #[test]
    fn the_page_needs_nothing_else_and_is_well_formed() {
        let mut brief = sample();
        brief.runs.clear();
        brief.time += 1_000_000;
        let page = page(&[sample(), brief], "a < b & \"c\"");
        let document = parsed(&page);
        for word in ["src=", "href=", "url(", "@import", "fetch("] {
            assert!(!page.contains(word), "{word}");
        }
        assert!(page.contains("a &lt; b &amp; &quot;c&quot;"));
        let with = |name, value| document.descendants().filter(|node| node.attribute(name) == Some(value)).count();
        assert_eq!(
            (with("data-d", "0"), with("data-d", "1")),
            (5, 5),
            "two sections and a mark in each of three charts"
        );
        assert_eq!(document.descendants().filter(|node| node.attribute("class") == Some("map")).count(), 1);
        assert!(page.contains("This dump is a brief one"));
    }

    /// A class that other classes' slabs serve too does not use more than it holds; one whose slabs serve others uses
    /// what they have.
    #[test]
    fn used_is_what_is_used_of_the_own_slabs() {
        let mut dump = sample();
        let class = &mut dump.classes[0];
        let own = used_len(class);
        (class.live, class.from_others) = (class.live + 5000, 5000);
        assert_eq!(used_len(class), own);
        (class.live, class.from_others, class.to_others) = (0, 0, 700);
        assert_eq!(used_len(class), own);
    }

    /// What is in the dump is in the page: each class with its numbers, each CPU, each share.
    #[test]
    fn every_number_is_there() {
        let page = page(&[sample()], "x");
        let document = parsed(&page);
        let rows = |table: &str| {
            let table = document.descendants().find(|node| node.attribute("class") == Some(table)).expect(table);
            let row = |row: roxmltree::Node<'_, '_>| {
                row.descendants()
                    .filter(|node| node.is_text())
                    .filter_map(|node| node.text())
                    .map(str::trim)
                    .filter(|text| !text.is_empty())
                    .collect::<Vec<_>>()
                    .join(" ")
            };
            table.children().filter(|node| node.has_tag_name("tr")).skip(1).map(row).collect::<Vec<_>>()
        };
        let classes = rows("classes");
        assert_eq!(classes, ["32 B 700 68 1 0 32.0 KiB 32.0 KiB 68 %", "4 KiB 0 0 0 1 16.0 KiB 64.0 KiB 0 %"]);
        assert_eq!(rows("cpus"), ["0 68 2.12 KiB 1 9 800 1 32 0 3 2"]);
        assert_eq!(rows("heat"), ["CPU 0 68"]);
        assert!(page.contains("balance +700"));
        for tile in ["128 KiB", "2.67×", "27 %"] {
            assert!(page.contains(&format!("<b>{tile}</b>")), "{tile}");
        }
        assert!(!page.contains("Over time"), "one dump has no course");
    }
}

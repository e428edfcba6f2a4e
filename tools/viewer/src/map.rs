//! The heap map: which page runs there are, what is in them, how full they are; and the same as text.
//!
//! In the text a cell is a page *run*, whatever its length, so that a heap of many mebibytes fits a terminal; the
//! picture (`svg.rs`) is to scale.

use std::{collections::BTreeMap, fmt, fmt::Write as _};

use crate::{Kind, Run, units::bytes};

/// The page runs of a heap by address.
#[derive(Debug, Clone)]
pub struct Map {
    runs: Vec<Run>,
    classes: BTreeMap<u64, Class>,
}

/// The slabs of one block size, together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Class {
    /// Its number among the sizes in use, from the smallest.
    pub(crate) rank: usize,
    /// How many slabs.
    pub(crate) slabs: u64,
    /// Their length in bytes.
    pub(crate) len: u64,
    /// How many blocks they have.
    pub(crate) blocks: u64,
    /// How many of those are not in the slabs.
    pub(crate) out: u64,
}

/// The letters of the classes, in order of size.
const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKMNOPQRSTUVWXYZ";

/// The letter of a large block, which no class has.
const LARGE: char = 'L';

/// From nearly empty to full.
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

impl Run {
    /// The share that is out of the slab: in use, or in a CPU's cache.
    pub(crate) fn fill(&self) -> f64 {
        match self.kind {
            Kind::Free => 0.0,
            Kind::Large => 1.0,
            Kind::Slab { blocks, out, .. } => out as f64 / blocks.max(1) as f64,
        }
    }
}

impl Map {
    /// The map of these runs.
    pub fn new(runs: &[Run]) -> Self {
        let mut runs = runs.to_vec();
        runs.sort();
        let mut classes: BTreeMap<u64, Class> = BTreeMap::new();
        for run in &runs {
            if let Kind::Slab { block_len, blocks, out } = run.kind {
                let class = classes.entry(block_len).or_default();
                class.slabs += 1;
                class.len += run.len;
                class.blocks += blocks;
                class.out += out;
            }
        }
        for (rank, class) in classes.values_mut().enumerate() {
            class.rank = rank;
        }
        Self { runs, classes }
    }

    /// Whether there is nothing to draw.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The block sizes in use.
    pub(crate) fn classes(&self) -> impl Iterator<Item = (u64, Class)> {
        self.classes.iter().map(|(size, class)| (*size, *class))
    }

    /// The chunks, each with its runs.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = &[Run]> {
        self.runs.chunk_by(|one, other| one.chunk == other.chunk)
    }

    /// Count and bytes of the runs of one kind.
    pub(crate) fn total(&self, of: impl Fn(Kind) -> bool) -> (usize, u64) {
        let runs = self.runs.iter().filter(|run| of(run.kind));
        runs.fold((0, 0), |(count, len), run| (count + 1, len + run.len))
    }

    /// One line that sums it up.
    pub fn summary(&self) -> String {
        let (slabs, slab_len) = self.total(|kind| matches!(kind, Kind::Slab { .. }));
        let (large, large_len) = self.total(|kind| kind == Kind::Large);
        let (free, free_len) = self.total(|kind| kind == Kind::Free);
        let chunks = self.chunks().count();
        format!(
            "{} in {chunks} chunk{}: {slabs} slabs ({}), {large} large blocks ({}), {free} free runs ({})",
            bytes(self.total(|_| true).1 as f64),
            if chunks == 1 { "" } else { "s" },
            bytes(slab_len as f64),
            bytes(large_len as f64),
            bytes(free_len as f64),
        )
    }

    /// The map for a terminal `width` columns wide.
    pub fn text(&self, width: usize, colour: bool) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.text_into(&mut text, width, colour);
        text
    }

    fn text_into(&self, text: &mut String, width: usize, colour: bool) -> fmt::Result {
        writeln!(text, "Heap map: {}", self.summary())?;
        writeln!(
            text,
            "A cell is a page run: a letter for the size of its blocks, a bar for the share that is out (in use or cached).\n"
        )?;
        let per_row = (width.saturating_sub(2) / 2).max(1);
        for chunk in self.chunks() {
            let Some(first) = chunk.first() else { continue };
            let len: u64 = chunk.iter().map(|run| run.len).sum();
            let used: f64 = chunk.iter().map(|run| run.fill() * run.len as f64).sum();
            let percent = 100.0 * used / len.max(1) as f64;
            writeln!(text, "  chunk {:#x}, {}, {percent:.0} % out", first.chunk, bytes(len as f64))?;
            for row in chunk.chunks(per_row) {
                text.push_str("  ");
                for run in row {
                    let (letter, colour_code) = self.cell(run.kind);
                    if colour {
                        write!(text, "\x1b[{colour_code}m{letter}{}\x1b[0m", level(run))?;
                    } else {
                        write!(text, "{letter}{}", level(run))?;
                    }
                }
                text.push('\n');
            }
        }
        text.push('\n');
        self.legend(text, width, colour)
    }

    fn legend(&self, text: &mut String, width: usize, colour: bool) -> fmt::Result {
        let paint = |kind, entry: String| match colour {
            true => format!("\x1b[{}m{entry}\x1b[0m", self.cell(kind).1),
            false => entry,
        };
        let mut entries = Vec::new();
        for (size, class) in self.classes() {
            let kind = Kind::Slab { block_len: size, blocks: 0, out: 0 };
            let entry = format!("{} {size} B: {} of {}", self.cell(kind).0, class.out, class.blocks);
            entries.push(paint(kind, format!("{entry:<25}")));
        }
        for (kind, name) in [(Kind::Large, "large block"), (Kind::Free, "free")] {
            let (count, len) = self.total(|other| other == kind);
            if count > 0 {
                let entry = format!("{} {name}: {}", self.cell(kind).0, bytes(len as f64));
                entries.push(paint(kind, format!("{entry:<25}")));
            }
        }
        writeln!(text, "  blocks out by size:")?;
        for row in entries.chunks((width.saturating_sub(2) / 26).max(1)) {
            writeln!(text, "  {}", row.join(" ").trim_end())?;
        }
        Ok(())
    }

    /// The letter and the terminal's colour for what is in a run.
    fn cell(&self, kind: Kind) -> (char, String) {
        match kind {
            Kind::Free => ('.', "38;5;244".to_owned()),
            Kind::Large => (LARGE, "38;5;250".to_owned()),
            Kind::Slab { block_len, .. } => {
                let rank = self.classes.get(&block_len).map_or(0, |class| class.rank);
                let letter = LETTERS.get(rank).map_or('?', |letter| char::from(*letter));
                let (red, green, blue) = crate::svg::colour(block_len);
                (letter, format!("38;2;{red};{green};{blue}"))
            }
        }
    }
}

fn level(run: &Run) -> char {
    match run.kind {
        Kind::Free => ' ',
        _ if run.fill() == 0.0 => '_',
        _ => {
            let above = (1..8).take_while(|eighth| run.fill() * 8.0 > f64::from(*eighth)).count();
            LEVELS.get(above).copied().unwrap_or('█')
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two chunks with a little of everything.
    pub(crate) fn sample() -> Vec<Run> {
        crate::dump::tests::sample().runs
    }

    #[test]
    fn text_shows_each_run_in_order_of_addresses() {
        let expected = "\
Heap map: 124 KiB in 2 chunks: 3 slabs (48.0 KiB), 1 large blocks (32.0 KiB), 2 free runs (44.0 KiB)
A cell is a page run: a letter for the size of its blocks, a bar for the share that is out (in use or cached).

  chunk 0x200000, 60.0 KiB, 40 % out
  a█a▄b_. 
  chunk 0x400000, 64.0 KiB, 50 % out
  L█. 

  blocks out by size:
  a 32 B: 768 of 1024       b 4096 B: 0 of 4          L large block: 32.0 KiB
  . free: 44.0 KiB
";
        assert_eq!(Map::new(&sample()).text(80, false), expected);
    }

    #[test]
    fn a_narrow_terminal_gets_more_rows() {
        let text = Map::new(&sample()).text(6, false);
        assert!(text.contains("\n  a█a▄\n  b_. \n"), "{text}");
    }

    #[test]
    fn colours_enclose_each_cell_and_change_nothing_else() {
        let map = Map::new(&sample());
        let coloured = map.text(80, true);
        let mut plain = String::new();
        let mut parts = coloured.split("\x1b[");
        plain.push_str(parts.next().unwrap_or_default());
        parts.for_each(|part| plain.push_str(part.split_once('m').map_or(part, |(_, rest)| rest)));
        let trimmed = |text: &str| text.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>();
        assert_eq!(trimmed(&plain), trimmed(&map.text(80, false)));
        assert_eq!(coloured.matches("\x1b[0m").count() * 2, coloured.matches("\x1b[").count());
    }

    #[test]
    fn levels_rise_from_empty_to_full() {
        let at = |out| {
            let kind = Kind::Slab { block_len: 8, blocks: 512, out };
            level(&Run { chunk: 0, offset: 0, len: 4096, kind })
        };
        assert_eq!([0, 1, 64, 256, 511, 512].map(at), ['_', '▁', '▁', '▄', '█', '█']);
    }
}

//! The lines of `Heap::dump`, version 1 (described at the head of the library's `dump.rs`), found anywhere in a log.
//!
//! A line is ours from `smp-heap v` and a digit on, whatever stands before it. Unknown words and keys are passed over,
//! as the form's rules for additions demand; everything else that is not as it should be is an error with its line.

use std::{collections::BTreeMap, error::Error, fmt, num::ParseIntError};

/// What our lines begin with, up to the version.
const MARK: &str = "smp-heap v";
/// The version that is understood.
const VERSION: &str = "1";

/// One dump of one heap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dump {
    /// The number of its first line in the log, from 1.
    pub line: usize,
    /// The kernel's time, in microseconds.
    pub time: u64,
    /// How many caches the heap has.
    pub cpu_count: u64,
    /// The heap as a whole.
    pub totals: Totals,
    /// The size classes that were ever used, shortest blocks first.
    pub classes: Vec<Class>,
    /// The CPUs that used the heap.
    pub cpus: Vec<Cpu>,
    /// Classes on CPUs.
    pub shares: Vec<Share>,
    /// Page runs; none in a brief dump.
    pub runs: Vec<Run>,
}

macro_rules! record {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident = $key:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: u64,)*
        }

        impl $name {
            fn read(fields: &Fields<'_>) -> Result<Self, What> {
                Ok(Self { $($field: fields.number($key)?,)* })
            }
        }
    };
}

record! {
    /// The heap as a whole: bytes, then calls.
    Totals {
        /// Given by the provider.
        held_len = "held",
        /// The most ever given at once.
        high_held_len = "high",
        /// In blocks in use.
        live_len = "live",
        /// In slabs.
        slab_len = "slabs",
        /// In large blocks.
        large_len = "large",
        /// In free page runs.
        free_len = "free",
        /// In the longest of them.
        longest_free_len = "longest",
        /// Of the page heap's own.
        own_len = "own",
        /// Calls of `map` that gave a run.
        maps = "maps",
        /// Calls of `map` that gave none.
        failed_maps = "failed",
        /// Runs given back.
        unmaps = "unmaps",
        /// Runs not taken back.
        refused_unmaps = "refused",
        /// Calls of the pressure hook.
        reliefs = "reliefs",
        /// Frees of what was never allocated.
        strays = "strays",
    }
}

record! {
    /// A size class.
    Class {
        /// Bytes in a block.
        block_len = "block",
        /// Blocks in use.
        live = "live",
        /// Blocks in caches.
        cached = "cached",
        /// Blocks of other classes' slabs that serve this one, less the other way round.
        from_others = "from_others",
        /// Blocks of its own slabs that serve other classes, less the other way round.
        to_others = "to_others",
        /// Slabs with blocks to give.
        partial = "partial",
        /// Slabs in reserve.
        empty = "empty",
        /// Bytes in slabs.
        held_len = "held",
        /// The most bytes ever in slabs at once.
        high_held_len = "high",
    }
}

record! {
    /// A CPU.
    Cpu {
        /// Its number.
        index = "cpu",
        /// Blocks in its cache.
        cached = "cached",
        /// Bytes in them.
        cached_len = "bytes",
        /// Partial slabs owned there.
        partial = "partial",
        /// Blocks ever got from slabs.
        refilled = "refilled",
        /// Blocks ever given back.
        flushed = "flushed",
        /// Batches got.
        refills = "refills",
        /// Batches given back.
        flushes = "flushes",
        /// Laps over other caches.
        laps = "laps",
        /// Allocations that found the cache busy.
        nested_allocs = "nested_allocs",
        /// Frees that found it busy.
        nested_frees = "nested_frees",
    }
}

record! {
    /// A size class on a CPU.
    Share {
        /// The CPU.
        cpu = "cpu",
        /// Bytes in a block.
        block_len = "block",
        /// Blocks in the cache.
        cached = "cached",
        /// The most that a list may have.
        limit = "limit",
        /// Blocks ever got from slabs.
        refilled = "refilled",
        /// Blocks ever given back.
        flushed = "flushed",
        /// Partial slabs owned there.
        partial = "partial",
        /// Slabs in reserve there.
        empty = "empty",
    }
}

impl Share {
    /// Blocks that the CPU took less those it gave back: negative where it frees what others allocate.
    pub fn balance(&self) -> i64 {
        self.refilled.wrapping_sub(self.flushed).wrapping_sub(self.cached) as i64
    }
}

/// A page run: where it is and what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// Where the chunk begins that the run is part of.
    pub chunk: u64,
    /// Where the run begins in it.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// What is in it.
    pub kind: Kind,
}

/// What is in a page run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Nothing.
    Free,
    /// Blocks of one size.
    Slab {
        /// Bytes in a block.
        block_len: u64,
        /// How many there are.
        blocks: u64,
        /// How many are not in the slab: in use, or in a cache.
        out: u64,
    },
    /// One large block.
    Large,
}

/// A log that cannot be understood, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misread {
    /// The line's number, from 1; 0 for the log as a whole.
    pub line: usize,
    /// What is wrong with it.
    pub what: What,
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// The line is of another version.
    Version(String),
    /// There is no such key.
    Missing(&'static str),
    /// The key's value is no number.
    Number(&'static str, ParseIntError),
    /// The key's value cannot be.
    Value(&'static str, String),
    /// The line belongs to a dump, but none has begun.
    Outside(String),
    /// A dump begins before the last one has ended; the last one began in that line.
    Unended(usize),
    /// The log ends in the middle of the dump that begins here.
    CutOff,
    /// The dump has another number of lines than it should have.
    Lost {
        /// As many as it says it has.
        said: u64,
        /// As many as were found.
        found: u64,
    },
    /// There is no dump.
    Nothing,
    /// There is no line of events.
    NoEvents,
}

impl fmt::Display for Misread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}: ", self.line)?;
        }
        match &self.what {
            What::Version(version) => {
                write!(f, "this is version {version} of the form; only version {VERSION} is understood")
            }
            What::Missing(key) => write!(f, "`{key}=` is missing"),
            What::Number(key, error) => write!(f, "`{key}`: {error}"),
            What::Value(key, value) => write!(f, "`{key}` cannot be `{value}`"),
            What::Outside(word) => write!(f, "`{word}` belongs to a dump, but no `dump` line came before it"),
            What::Unended(line) => {
                write!(f, "a dump begins, but the one that began in line {line} has no `end` line")
            }
            What::CutOff => write!(f, "the dump that begins here has no `end` line: the log was cut off"),
            What::Lost { said, found } => {
                write!(
                    f,
                    "the dump should have {said} lines up to here, but {found} were found: some are lost or mixed up"
                )
            }
            What::NoEvents => write!(f, "there are no events in this log: no line with `{MARK}{VERSION} events`"),
            What::Nothing => write!(
                f,
                "there is no dump in this log: no line with `{MARK}{VERSION} dump`; print `heap.dump(time)` in the kernel"
            ),
        }
    }
}

impl Error for Misread {}

/// The `key=value` words of a line.
pub(crate) struct Fields<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Fields<'a> {
    pub(crate) fn text(&self, key: &'static str) -> Result<&'a str, What> {
        self.0.get(key).copied().ok_or(What::Missing(key))
    }

    fn number(&self, key: &'static str) -> Result<u64, What> {
        self.text(key)?.parse().map_err(|error| What::Number(key, error))
    }

    pub(crate) fn hex(&self, key: &'static str) -> Result<u64, What> {
        u64::from_str_radix(self.text(key)?, 16).map_err(|error| What::Number(key, error))
    }

    fn address(&self, key: &'static str) -> Result<u64, What> {
        let text = self.text(key)?;
        let digits = text.strip_prefix("0x").ok_or_else(|| What::Value(key, text.to_owned()))?;
        u64::from_str_radix(digits, 16).map_err(|error| What::Number(key, error))
    }

    fn run(&self) -> Result<Run, What> {
        let run = Run {
            chunk: self.address("chunk")?,
            offset: self.number("offset")?,
            len: self.number("len")?,
            kind: match self.text("kind")? {
                "free" => Kind::Free,
                // What the heap itself needs is drawn as a block.
                "large" | "own" => Kind::Large,
                // A further part of a slab is drawn as one.
                "slab" | "part" => Kind::Slab {
                    block_len: self.number("block")?,
                    blocks: self.number("blocks")?,
                    out: self.number("out")?,
                },
                other => return Err(What::Value("kind", other.to_owned())),
            },
        };
        let end = run.chunk.checked_add(run.offset).and_then(|start| start.checked_add(run.len));
        if run.len == 0 || end.is_none() {
            return Err(What::Value("len", run.len.to_string()));
        }
        match run.kind {
            Kind::Slab { blocks, out, .. } if out > blocks => Err(What::Value("out", format!("{out} of {blocks}"))),
            Kind::Slab { block_len, blocks, .. } if block_len.checked_mul(blocks).is_none_or(|len| len > run.len) => {
                Err(What::Value("blocks", format!("{blocks} of {block_len} bytes in {}", run.len)))
            }
            _ => Ok(run),
        }
    }
}

/// The part of a line that is ours: its word, and what follows.
pub(crate) fn ours(line: &str) -> Result<Option<(&str, Fields<'_>)>, What> {
    let found = line.match_indices(MARK).find_map(|(at, _)| {
        let rest = line.get(at + MARK.len()..)?;
        let (version, rest) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len()));
        // Colours and carriage returns at a line's end belong to the console.
        let rest = rest.split(|c: char| c.is_control()).next()?;
        (!version.is_empty() && rest.starts_with(' ')).then_some((version, rest.trim()))
    });
    let Some((version, rest)) = found else { return Ok(None) };
    if version != VERSION {
        return Err(What::Version(version.to_owned()));
    }
    let (word, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let fields = rest.split_ascii_whitespace().filter_map(|word| word.split_once('='));
    Ok(Some((word, Fields(fields.collect()))))
}

/// All dumps of a log, in its order.
///
/// # Errors
/// The first [`Misread`] line. A log without a dump is an error too.
pub fn parse(log: &str) -> Result<Vec<Dump>, Misread> {
    let mut dumps: Vec<Dump> = Vec::new();
    // The dump that has begun, and its lines so far.
    let mut open: Option<(Dump, u64)> = None;
    for (index, text) in log.lines().enumerate() {
        let line = index + 1;
        let misread = |what| Misread { line, what };
        let Some((word, fields)) = ours(text).map_err(misread)? else { continue };
        if word == "dump" {
            if let Some((dump, _)) = &open {
                return Err(misread(What::Unended(dump.line)));
            }
            let (time, cpus) = (fields.number("time").map_err(misread)?, fields.number("cpus").map_err(misread)?);
            open = Some((Dump { line, time, cpu_count: cpus, ..Dump::default() }, 1));
            continue;
        }
        if word == "events" {
            continue;
        }
        let Some((dump, found)) = &mut open else {
            return Err(misread(What::Outside(word.to_owned())));
        };
        if word == "end" {
            let said = fields.number("lines").map_err(misread)?;
            if said != *found {
                return Err(misread(What::Lost { said, found: *found }));
            }
            dumps.extend(open.take().map(|(dump, _)| dump));
            continue;
        }
        *found += 1;
        dump.add(word, &fields).map_err(misread)?;
    }
    match open {
        Some((dump, _)) => Err(Misread { line: dump.line, what: What::CutOff }),
        None if dumps.is_empty() => Err(Misread { line: 0, what: What::Nothing }),
        None => Ok(dumps),
    }
}

impl Dump {
    fn add(&mut self, word: &str, fields: &Fields<'_>) -> Result<(), What> {
        match word {
            "heap" => self.totals = Totals::read(fields)?,
            "class" => self.classes.push(Class::read(fields)?),
            "cpu" => self.cpus.push(Cpu::read(fields)?),
            "share" => self.shares.push(Share::read(fields)?),
            "run" => self.runs.push(fields.run()?),
            _ => {}
        }
        Ok(())
    }

    /// Bytes held for each byte live; none while nothing is live.
    pub fn held_over_live(&self) -> Option<f64> {
        (self.totals.live_len > 0).then(|| self.totals.held_len as f64 / self.totals.live_len as f64)
    }

    /// The share of the free pages that is not in the longest free run.
    pub fn fragmentation(&self) -> f64 {
        let elsewhere = self.totals.free_len.saturating_sub(self.totals.longest_free_len);
        elsewhere as f64 / self.totals.free_len.max(1) as f64
    }

    /// Bytes of free blocks in caches.
    pub fn cached_len(&self) -> u64 {
        self.classes.iter().map(|class| class.cached.saturating_mul(class.block_len)).fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::alloc::Layout;

    use smp_heap::{Heap, Hint, RegionProvider, cpu::UnknownCpu};

    use super::*;

    /// A dump with a little of everything, as a kernel with its own line prefixes would say it.
    pub(crate) const SAMPLE: &str = "\
booting
[    0.10] smp-heap v1 dump time=100000 cpus=4
[    0.10] smp-heap v1 heap held=131072 high=262144 live=49152 slabs=49152 large=32768 free=45056 longest=32768 own=4096 maps=2 failed=0 unmaps=1 refused=0 reliefs=0 strays=0
[    0.10] smp-heap v1 class block=32 live=700 cached=68 from_others=0 to_others=0 partial=1 empty=0 held=32768 high=32768 colour=red
[    0.10] smp-heap v1 class block=4096 live=0 cached=0 from_others=0 to_others=0 partial=0 empty=1 held=16384 high=65536
another CPU: smp-heap v? is not a line of it, nor is smp-heap v1
[    0.10] smp-heap v1 cpu cpu=0 cached=68 bytes=2176 partial=1 refilled=800 flushed=32 refills=9 flushes=1 laps=0 nested_allocs=3 nested_frees=2\r
[    0.10] smp-heap v1 share cpu=0 block=32 cached=68 limit=128 refilled=800 flushed=32 partial=1 empty=0
[    0.10] smp-heap v1 weather sun=yes
[    0.10] smp-heap v1 run chunk=0x400000 offset=32768 len=32768 kind=free\u{1b}[0m
[    0.10] smp-heap v1 run chunk=0x200000 offset=0 len=16384 kind=slab block=32 blocks=512 out=512
[    0.10] smp-heap v1 run chunk=0x200000 offset=16384 len=16384 kind=slab block=32 blocks=512 out=256
[    0.10] smp-heap v1 run chunk=0x200000 offset=32768 len=16384 kind=slab block=4096 blocks=4 out=0
[    0.10] smp-heap v1 run chunk=0x200000 offset=49152 len=12288 kind=free
[    0.10] smp-heap v1 run chunk=0x400000 offset=0 len=32768 kind=large
[    0.10] smp-heap v1 end lines=13
going on
";

    /// The sample's dump.
    pub(crate) fn sample() -> Dump {
        parse(SAMPLE).expect("understood").remove(0)
    }

    #[test]
    fn a_dump_is_found_among_other_lines() {
        let dump = sample();
        assert_eq!((dump.line, dump.time, dump.cpu_count), (2, 100_000, 4));
        assert_eq!((dump.totals.held_len, dump.totals.high_held_len, dump.totals.strays), (131_072, 262_144, 0));
        assert_eq!((dump.classes.len(), dump.cpus.len(), dump.shares.len(), dump.runs.len()), (2, 1, 1, 6));
        assert_eq!((dump.cpus[0].nested_allocs, dump.cpus[0].nested_frees), (3, 2));
        assert_eq!(dump.shares[0].balance(), 700);
        let kind = Kind::Slab { block_len: 32, blocks: 512, out: 256 };
        assert!(dump.runs.contains(&Run { chunk: 0x20_0000, offset: 16384, len: 16384, kind }));
        assert_eq!(dump.held_over_live().map(|ratio| (ratio * 100.0).round()), Some(267.0));
        assert_eq!((dump.fragmentation() * 100.0).round(), 27.0);
    }

    #[test]
    fn several_dumps_come_in_order() {
        let later = SAMPLE.replace("time=100000", "time=200000");
        let dumps = parse(&format!("{SAMPLE}{later}")).expect("understood");
        assert_eq!(dumps.iter().map(|dump| (dump.line, dump.time)).collect::<Vec<_>>(), [(2, 100_000), (19, 200_000)]);
    }

    /// Each way to damage a log, and the line and words that the error has.
    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        let told = |from: &str, to: &str| {
            assert!(SAMPLE.contains(from), "{from}");
            parse(&SAMPLE.replacen(from, to, 1)).expect_err("damaged").to_string()
        };
        assert_eq!(told("held=131072 ", ""), "line 3: `held=` is missing");
        assert_eq!(told("held=131072", "held=lots"), "line 3: `held`: invalid digit found in string");
        assert_eq!(told("live=700", "live=-1"), "line 4: `live`: invalid digit found in string");
        assert_eq!(
            told("live=700", "live=99999999999999999999"),
            "line 4: `live`: number too large to fit in target type"
        );
        assert_eq!(told("kind=large", "kind=hole"), "line 15: `kind` cannot be `hole`");
        assert_eq!(told("chunk=0x400000", "chunk=400000"), "line 10: `chunk` cannot be `400000`");
        assert_eq!(told("len=12288", "len=0"), "line 14: `len` cannot be `0`");
        assert_eq!(told("len=12288", "len=18446744073709551615"), "line 14: `len` cannot be `18446744073709551615`");
        assert_eq!(told("out=512", "out=513"), "line 11: `out` cannot be `513 of 512`");
        assert_eq!(
            told("block=4096 blocks=4 ", "block=4096 blocks=5 "),
            "line 13: `blocks` cannot be `5 of 4096 bytes in 16384`"
        );
        assert!(told("smp-heap v1 class", "smp-heap v2 class").starts_with("line 4: this is version 2"));
        let lost = "[    0.10] smp-heap v1 weather sun=yes\n";
        assert!(told(lost, "").starts_with("line 15: the dump should have 13 lines up to here, but 12 were found"));
        assert!(
            told("[    0.10] smp-heap v1 end lines=13\n", "").starts_with("line 2: the dump that begins here has no")
        );
        assert!(told("smp-heap v1 dump time=100000 cpus=4", "").starts_with("line 3: `heap` belongs to a dump"));
        let twice = format!("{}{SAMPLE}", SAMPLE.replace("smp-heap v1 end", ""));
        let unended = parse(&twice).expect_err("damaged").to_string();
        assert_eq!(unended, "line 19: a dump begins, but the one that began in line 2 has no `end` line");
        assert!(parse("PASS\n").expect_err("nothing").to_string().contains("there is no dump in this log"));
    }

    /// Whatever bytes are lost or changed, reading ends with an answer.
    #[test]
    fn no_damage_makes_it_panic() {
        for at in 0..SAMPLE.len() {
            let mut bytes = SAMPLE.as_bytes().to_vec();
            bytes[at] = b'0' + u8::try_from(at % 70).unwrap_or(0);
            let _ = parse(&String::from_utf8_lossy(&bytes)).map(|dumps| crate::page(&dumps, "x"));
            let _ = parse(&String::from_utf8_lossy(&SAMPLE.as_bytes()[..at]));
        }
    }

    /// Not a log by hand: what a heap prints, read again, is what its statistics say.
    #[test]
    fn the_dump_of_a_heap_says_what_its_statistics_say() {
        let heap: Heap<RegionProvider<1>, Hint<UnknownCpu>, 2> = Heap::new(RegionProvider::new(), Hint(UnknownCpu));
        let memory = Box::leak(vec![0_u8; 4 << 20].into_boxed_slice());
        // SAFETY: leaked, so nobody else uses it.
        unsafe { heap.provider().add_region(memory.as_mut_ptr(), memory.len()) }.expect("a region");
        let layouts = [24, 24, 200, 5000, 70_000].map(|size| Layout::from_size_align(size, 8).expect("a Layout"));
        let take = |layout: Layout| (heap.alloc(layout).expect("memory"), layout);
        for (number, (block, layout)) in layouts.repeat(20).into_iter().map(take).enumerate() {
            if number % 3 > 0 {
                // SAFETY: allocated above with this Layout, and used no more.
                unsafe { heap.free(block.cast(), layout) };
            }
        }
        let stats = heap.stats();
        let dump = parse(&heap.dump(7).to_string()).expect("a dump").pop().expect("one dump");
        let said =
            |class: &Class| [class.block_len, class.live, class.cached, class.partial, class.empty, class.held_len];
        let known = stats.classes.iter().filter(|class| class.high_held_len > 0).map(|class| {
            let [block_len, held_len] = [class.block_len, class.held_len].map(|len| len as u64);
            [block_len, class.live_count, class.cached_count, class.partial_count, class.empty_count, held_len]
        });
        assert!(dump.classes.iter().any(|class| class.cached > 0 && class.cached != class.live));
        assert_eq!(dump.classes.iter().map(said).collect::<Vec<_>>(), known.collect::<Vec<_>>());
        let cached: Vec<_> = dump.cpus.iter().map(|cpu| (cpu.index, cpu.cached, cpu.cached_len)).collect();
        assert_eq!(cached, [(0, stats.cpus[0].cached_count, stats.cpus[0].cached_len as u64)]);
    }
}

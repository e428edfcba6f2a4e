//! Draws what a heap said of itself.
//!
//! ```text
//! page, text    one HTML file that needs nothing else; the same for a terminal
//! chart, svg    numbers over time; the map, to scale
//! map           page runs in order of addresses, and what they add up to
//! dump          the lines that a kernel wrote, found anywhere in a log
//! trace         recorded events, replayed on a heap of this machine
//! units         bytes and shares for people
//! ```
//! A kernel prints `heap.dump(time)`; whatever carries its console's text to a file will do. Reading is strict where a
//! line claims to be one of ours: a log that lost or mixed lines is refused with the number of the line, since a
//! picture of half a heap looks just like one of a whole one. What is not ours passes unread.
#![expect(clippy::std_instead_of_core, reason = "a host program: std is what it is made of")]

mod chart;
mod dump;
mod map;
mod page;
mod svg;
mod text;
mod trace;
mod units;

pub use dump::{Class, Cpu, Dump, Kind, Misread, Run, Share, Totals, What, parse};
pub use map::Map;
pub use page::page;
pub use text::{map_text, overview};
pub use trace::{Failed, PlayedCpu, Replayed, Step, Trace, pack, parse_trace, replay, unpack};
pub use units::bytes;

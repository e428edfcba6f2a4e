#![doc = include_str!("../README.md")]
#![no_std]
#![deny(unsafe_code)]

pub use add::Added;
pub use free::{Free, LongestFirst, Ranges};
pub use map::{Entry, Kind, MemoryMap, NoMemoryMap};

mod add;
#[cfg(feature = "bootloader_api")]
pub mod bootloader_api;
#[cfg(feature = "fdt")]
pub mod fdt;
mod free;
#[cfg(feature = "limine")]
pub mod limine;
mod map;
#[cfg(feature = "multiboot2")]
pub mod multiboot2;
#[cfg(feature = "pvh")]
pub mod pvh;
#[cfg(feature = "uefi-raw")]
pub mod uefi;

//! The adapters over maps that real loaders gave (see `recorded/README.md`), against a second way to reckon what is
//! free: all borders sorted, and each piece between two of them asked for all entries.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::single_range_in_vec_init,
    reason = "a failed check ends a test, which is what a test is for; a list of ranges may have one"
)]

use core::alloc::Layout;
use core::ops::Range;

use ::bootloader_api::BootInfo;
use ::bootloader_api::info::{MemoryRegion, MemoryRegionKind, MemoryRegions};
use ::fdt::Fdt;
use ::limine::memory_map::{Entry as LimineEntry, EntryType};
use ::multiboot2::{BootInformation, BootInformationHeader};
use ::pvh::start_info::reader::{MemMap, StartInfoReader};
use smp_heap::RegionProvider;
use smp_heap_maps::{Entry, Free, Kind, MemoryMap, NoMemoryMap, bootloader_api, fdt, limine, multiboot2, pvh, uefi};
use uefi_raw::table::boot::{MemoryDescriptor, MemoryType};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Where a small kernel lies on a PC.
const IMAGE: Range<u64> = MIB..MIB + 0x7_3210;
/// A module in the middle of a page.
const MODULE: Range<u64> = 16 * MIB + 0x123..17 * MIB + 0x4567;

/// A recorded text: start, length and type of each entry.
fn recorded(name: &str) -> Vec<(u64, u64, u32)> {
    let text = std::fs::read_to_string(path(&format!("{name}.txt"))).expect("a recording");
    let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).expect("a number");
    let entry = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        (number(words[0]), number(words[1]), words[2].parse().expect("a type"))
    };
    text.lines().filter(|line| !line.starts_with('#')).map(entry).collect()
}

fn path(name: &str) -> String {
    format!("{}/tests/recorded/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The whole free pages above 1 MiB, by sorting all borders.
fn reckoned(free: &[Range<u64>], used: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut borders: Vec<u64> = free.iter().chain(used).flat_map(|range| [range.start, range.end]).collect();
    borders.push(MIB);
    borders.sort_unstable();
    let holds = |ranges: &[Range<u64>], at: u64| ranges.iter().any(|range| range.contains(&at));
    let mut pieces: Vec<Range<u64>> = Vec::new();
    for piece in borders.windows(2).map(|pair| pair[0]..pair[1]).filter(|piece| !piece.is_empty()) {
        if piece.start < MIB || !holds(free, piece.start) || holds(used, piece.start) {
            continue;
        }
        match pieces.last_mut() {
            Some(last) if last.end == piece.start => last.end = piece.end,
            _ => pieces.push(piece),
        }
    }
    let pages = pieces.into_iter().map(|piece| piece.start.next_multiple_of(4096)..piece.end / 4096 * 4096);
    pages.filter(|pages| !pages.is_empty()).collect()
}

/// Free and other ranges of a recording, by the types that are free.
fn split(entries: &[(u64, u64, u32)], free_types: &[u32]) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    let (free, used): (Vec<_>, Vec<_>) = entries.iter().partition(|(_, _, kind)| free_types.contains(kind));
    let range = |(start, len, _): &(u64, u64, u32)| *start..start + len;
    (free.iter().map(range).collect(), used.iter().map(range).collect())
}

fn ranges(map: impl MemoryMap) -> Vec<Range<u64>> {
    Free::new(map).ranges().collect()
}

/// Bytes at a multiple of 8, from words of 4 bytes.
fn memory(words: &[u32]) -> Vec<u64> {
    words.chunks(2).map(|pair| u64::from(pair[0]) | u64::from(*pair.get(1).unwrap_or(&0)) << 32).collect()
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// The machine's memory up to 64 KiB, as the PVH loader leaves it.
struct LowMemory(Vec<u64>);

const START_INFO: u32 = 0x6000;
const TABLE: u64 = 0x7000;
const MODULES: u64 = 0x8000;
const LINE: u64 = 0x9000;

impl LowMemory {
    fn new(entries: &[(u64, u64, u32)], version: u32) -> Self {
        let mut low = Self(vec![0; 0x2000]);
        let count = u32::try_from(entries.len()).expect("a short map");
        let mut info = vec![0x336e_c578, version, 0, 1];
        info.extend([MODULES, LINE, 0, TABLE].into_iter().flat_map(halves));
        info.extend([count, 0]);
        low.put(START_INFO.into(), &info);
        let table = entries.iter().flat_map(|(start, len, kind)| {
            let [start, len] = [halves(*start), halves(*len)];
            [start[0], start[1], len[0], len[1], *kind, 0]
        });
        low.put(TABLE, &table.collect::<Vec<u32>>());
        let module = [MODULE.start, MODULE.end - MODULE.start, 0, 0];
        low.put(MODULES, &module.into_iter().flat_map(halves).collect::<Vec<u32>>());
        low.put(LINE, &[u32::from_le_bytes(*b"quie"), u32::from(b't')]);
        low
    }

    fn put(&mut self, at: u64, words: &[u32]) {
        let at = at as usize / 8;
        let words = memory(words);
        self.0[at..at + words.len()].copy_from_slice(&words);
    }

    fn reader(&self) -> StartInfoReader<'_, &Self> {
        // SAFETY: `put` wrote a start info there, and what it points to lies in the same memory.
        unsafe { StartInfoReader::from_paddr(START_INFO, self) }.expect("a start info")
    }
}

impl MemMap for LowMemory {
    fn ptr(&self, paddr: usize, layout: Layout) -> *const u8 {
        let whole = self.0.len() * 8;
        assert!(paddr + layout.size() <= whole, "{paddr:#x} is not low memory");
        self.0.as_ptr().cast::<u8>().wrapping_add(paddr)
    }
}

#[test]
fn pvh_maps() {
    for name in ["pvh-2G", "pvh-64G"] {
        let entries = recorded(name);
        let low = LowMemory::new(&entries, 1);
        let reader = low.reader();
        let map = pvh::Map::new(&reader, START_INFO.into(), IMAGE).expect("a map");
        let (free, mut used) = split(&entries, &[1]);
        used.extend([IMAGE, MODULE]);
        assert_eq!(ranges(&map), reckoned(&free, &used), "{name}");

        // Of low memory a page each: the start info, the table of the map, the list of modules, the command line.
        let low = Free::new(&map).from(0x5000).below(0xb000);
        assert_eq!(low.ranges().collect::<Vec<_>>(), [0x5000..0x6000, 0xa000..0xb000], "{name}");
    }
    let two = [0x17_4000..MODULE.start / 4096 * 4096, 0x110_5000..0x7ffe_0000];
    let low = LowMemory::new(&recorded("pvh-2G"), 1);
    assert_eq!(ranges(pvh::Map::new(&low.reader(), START_INFO.into(), IMAGE).expect("a map")), two);
}

#[test]
fn a_start_info_without_a_map_is_an_error() {
    let low = LowMemory::new(&recorded("pvh-2G"), 0);
    assert_eq!(pvh::Map::new(&low.reader(), START_INFO.into(), IMAGE).err(), Some(NoMemoryMap));
}

/// A Multiboot2 boot information with the tags `tags`.
fn information(tags: &[Vec<u32>]) -> Vec<u64> {
    let mut words = vec![0, 0];
    for tag in tags {
        words.extend_from_slice(tag);
        words.resize(words.len().next_multiple_of(2), 0);
    }
    words.extend([0, 8]);
    words[0] = 4 * words.len() as u32;
    memory(&words)
}

fn memory_map_tag(entries: &[(u64, u64, u32)]) -> Vec<u32> {
    let mut tag = vec![6, 16 + 24 * entries.len() as u32, 24, 0];
    for (start, len, kind) in entries {
        tag.extend(halves(*start).into_iter().chain(halves(*len)).chain([*kind, 0]));
    }
    tag
}

fn module_tag() -> Vec<u32> {
    vec![3, 20, MODULE.start as u32, MODULE.end as u32, 0]
}

fn load(words: &[u64]) -> BootInformation<'_> {
    // SAFETY: the words are a boot information of the length that stands in it, and live longer than what is made of
    // them.
    unsafe { BootInformation::load(words.as_ptr().cast::<BootInformationHeader>()) }.expect("a boot information")
}

#[test]
fn multiboot2_maps() {
    for name in ["grub-seabios-2G", "grub-seabios-64G", "grub-ovmf-2G", "grub-ovmf-64G"] {
        let entries = recorded(name);
        let words = information(&[module_tag(), memory_map_tag(&entries)]);
        let info = load(&words);
        let at = 40 * MIB + 8;
        let (free, mut used) = split(&entries, &[1]);
        used.extend([IMAGE, MODULE, at..at + info.total_size() as u64]);
        let map = multiboot2::Map::new(&info, at, IMAGE).expect("a map");
        assert_eq!(ranges(&map), reckoned(&free, &used), "{name}");

        // ACPI's tables are free once they are read, and only on request.
        let (free, used) = split(&entries, &[1, 3]);
        let used = [used, vec![IMAGE, MODULE, at..at + info.total_size() as u64]].concat();
        assert_eq!(Free::new(&map).and(Kind::Acpi).ranges().collect::<Vec<_>>(), reckoned(&free, &used), "{name}");
    }
}

#[test]
fn a_boot_information_without_a_map_is_an_error() {
    let words = information(&[module_tag()]);
    assert_eq!(multiboot2::Map::new(&load(&words), MIB, IMAGE).err(), Some(NoMemoryMap));
}

/// A recorded UEFI map as descriptors.
fn descriptors(entries: &[(u64, u64, u32)]) -> Vec<MemoryDescriptor> {
    let descriptor = |&(start, len, kind): &(u64, u64, u32)| MemoryDescriptor {
        ty: MemoryType(kind),
        phys_start: start,
        page_count: len / 4096,
        ..MemoryDescriptor::default()
    };
    entries.iter().map(descriptor).collect()
}

#[test]
fn uefi_maps() {
    for (name, at_least) in
        [("uefi-x86_64-2G", 100), ("uefi-x86_64-64G", 100), ("uefi-aarch64-2G", 20), ("uefi-aarch64-64G", 20)]
    {
        let entries = recorded(name);
        assert!(entries.len() >= at_least, "{name} has {} entries", entries.len());
        let descriptors = descriptors(&entries);
        let map = uefi::Map::new(descriptors.iter());
        let (free, used) = split(&entries, &[7]);
        assert_eq!(ranges(&map), reckoned(&free, &used), "{name}");
        // The boot services' memory, once the kernel has left its stack and page tables.
        let (free, used) = split(&entries, &[3, 4, 7]);
        assert_eq!(Free::new(&map).and(Kind::Loader).ranges().collect::<Vec<_>>(), reckoned(&free, &used), "{name}");
    }
}

#[test]
fn a_map_of_124_entries_is_few_regions() {
    let descriptors = descriptors(&recorded("uefi-x86_64-2G"));
    assert_eq!(descriptors.len(), 124);
    let free = Free::new(uefi::Map::new(descriptors.iter()));
    let found: Vec<Range<u64>> = free.longest_first().collect();
    assert!(found.len() <= 8, "{found:x?}");
    let total: u64 = found.iter().map(|range| range.end - range.start).sum();
    assert_eq!(total, free.total_len());
    assert!(total > 2 * GIB / 100 * 97, "{found:x?}");
}

#[test]
fn limine_maps() {
    let kinds = [EntryType::USABLE, EntryType::BOOTLOADER_RECLAIMABLE, EntryType::ACPI_RECLAIMABLE];
    let others = [
        EntryType::RESERVED,
        EntryType::ACPI_NVS,
        EntryType::BAD_MEMORY,
        EntryType::EXECUTABLE_AND_MODULES,
        EntryType::FRAMEBUFFER,
    ];
    let all: Vec<EntryType> = kinds.into_iter().chain(others).collect();
    let entry = |(at, kind): (usize, &EntryType)| LimineEntry {
        base: MIB + 0x1000 * at as u64,
        length: 0x1000,
        entry_type: *kind,
    };
    let entries: Vec<LimineEntry> = all.iter().enumerate().map(entry).collect();
    let entries: Vec<&LimineEntry> = entries.iter().collect();
    let map = limine::Map::new(&entries);
    assert_eq!(ranges(map), [MIB..MIB + 0x1000]);
    assert_eq!(Free::new(map).and(Kind::Loader).ranges().collect::<Vec<_>>(), [MIB..MIB + 0x2000]);
    let both = Free::new(map).and(Kind::Loader).and(Kind::Acpi);
    assert_eq!(both.ranges().collect::<Vec<_>>(), [MIB..MIB + 0x3000]);
}

#[test]
fn bootloader_api_maps() {
    let regions = [
        MemoryRegion { start: 0, end: 0x9f000, kind: MemoryRegionKind::Usable },
        MemoryRegion { start: MIB, end: 8 * MIB, kind: MemoryRegionKind::Bootloader },
        MemoryRegion { start: 8 * MIB, end: 64 * MIB, kind: MemoryRegionKind::Usable },
        MemoryRegion { start: 64 * MIB, end: 65 * MIB, kind: MemoryRegionKind::UnknownUefi(7) },
        MemoryRegion { start: 65 * MIB, end: 66 * MIB, kind: MemoryRegionKind::UnknownBios(1) },
    ];
    let mut info = BootInfo::new(MemoryRegions::from(&mut *Vec::from(regions).leak()));
    assert_eq!(ranges(bootloader_api::Map::new(&info)), [8 * MIB..64 * MIB]);
    (info.kernel_addr, info.kernel_len) = (9 * MIB, MIB);
    (info.ramdisk_addr, info.ramdisk_len) = (Some(20 * MIB + 1).into(), 4096);
    let free = [8 * MIB..9 * MIB, 10 * MIB..20 * MIB, 20 * MIB + 0x2000..64 * MIB];
    assert_eq!(ranges(bootloader_api::Map::new(&info)), free);
}

/// Where OpenSBI has a kernel start.
const KERNEL: Range<u64> = 0x8020_0000..0x8026_4000;

#[test]
fn device_tree_maps() {
    let firmware_end = 0x8008_0000;
    let (opensbi, uboot, disk) = (0xbfe0_0000, 0xff73_44f0, 0x8800_0000..0x8801_0000);
    let end = |gib: u64| 0x8000_0000 + gib * GIB;
    for (name, at, gib) in [("opensbi-2G", opensbi, 2), ("opensbi-64G", opensbi, 64), ("opensbi-numa-2G", opensbi, 2)] {
        let blob = std::fs::read(path(&format!("{name}.dtb"))).expect("a recording");
        let tree = Fdt::new(&blob).expect("a device tree");
        let map = fdt::Map::new(&tree, at, KERNEL).expect("a map");
        let free = [firmware_end..KERNEL.start, KERNEL.end..at, at + 0x2000..end(gib)];
        assert_eq!(ranges(map), free, "{name}");
    }
    for (name, gib) in [("uboot-2G", 2), ("uboot-64G", 64)] {
        let blob = std::fs::read(path(&format!("{name}.dtb"))).expect("a recording");
        let tree = Fdt::new(&blob).expect("a device tree");
        let map = fdt::Map::new(&tree, uboot, KERNEL).expect("a map");
        let tree_end = (uboot + blob.len() as u64).next_multiple_of(4096);
        let free =
            [firmware_end..KERNEL.start, KERNEL.end..disk.start, disk.end..uboot / 4096 * 4096, tree_end..end(gib)];
        assert_eq!(ranges(map), free, "{name}");

        // U-Boot names the RAM disk twice. Without its block of reservations `/chosen` is enough.
        let mut blob = blob;
        let block = u32::from_be_bytes(blob[16..20].try_into().expect("four bytes")) as usize;
        assert!(blob[block..block + 16].iter().any(|byte| *byte != 0), "{name} has no reservations");
        blob[block..block + 16].fill(0);
        let tree = Fdt::new(&blob).expect("a device tree");
        assert_eq!(ranges(fdt::Map::new(&tree, uboot, KERNEL).expect("a map")), free, "{name}");
    }
}

#[test]
fn a_provider_of_few_slots_takes_every_range_of_a_map() {
    // The kinds of a recorded map, each entry two pages long, over memory of this program.
    let descriptors: Vec<MemoryDescriptor> = descriptors(&recorded("uefi-x86_64-2G"));
    let entry = |(at, entry): (usize, Entry)| Entry::new(MIB + 0x2000 * at as u64, 0x2000, entry.kind());
    let short: Vec<Entry> = uefi::Map::new(descriptors.iter()).entries().enumerate().map(entry).collect();
    let free = Free::new(&short[..]);
    let memory = vec![0_u8; 2 << 20].leak();
    let provider = RegionProvider::<3>::new();
    let offset = memory.as_mut_ptr().expose_provenance().next_multiple_of(4096).wrapping_sub(1 << 20);
    // SAFETY: the entries lie in memory of our own that nobody else uses, at that offset.
    let added = unsafe { free.add_to(&provider, offset) };
    assert!(free.ranges().count() > 3);
    assert_eq!((added.regions, added.bytes, added.left), (free.ranges().count(), free.total_len(), 0));
}

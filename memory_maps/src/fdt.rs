//! The map in a device tree (OpenSBI, U-Boot, QEMU's boards without firmware), by the `fdt` crate's types.

use core::ops::Range;

use fdt::Fdt;
use fdt::node::FdtNode;

use crate::{Entry, Kind, MemoryMap, NoMemoryMap};

/// The memory nodes of a device tree, without reserved memory of either form, the RAM disk, the tree itself, and the
/// kernel's image.
///
/// A node of reserved memory without `reg` asks for memory that nobody uses yet, and takes nothing away here.
#[derive(Clone, Debug)]
pub struct Map<'a> {
    tree: &'a Fdt<'a>,
    at: u64,
    image: Range<u64>,
}

impl<'a> Map<'a> {
    /// The map in `tree`, which lies at the physical address `at`. `image` is the kernel's own range of physical
    /// addresses, `.bss` and boot stack included.
    ///
    /// # Errors
    /// The tree has no memory node with a length.
    ///
    /// # Panics
    /// The `fdt` crate panics on a tree that is not well-formed, here and whenever the map is read.
    pub fn new(tree: &'a Fdt<'a>, at: u64, image: Range<u64>) -> Result<Self, NoMemoryMap> {
        if memory(tree).next().is_some() { Ok(Self { tree, at, image }) } else { Err(NoMemoryMap) }
    }
}

impl MemoryMap for Map<'_> {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        let reserved = self.tree.find_node("/reserved-memory").into_iter().flat_map(FdtNode::children);
        let reserved = reserved.flat_map(|node| ranges(node, Kind::Used));
        let block = self
            .tree
            .memory_reservations()
            .map(|reservation| Entry::new(reservation.address().addr() as u64, reservation.size() as u64, Kind::Used));
        let tree = Entry::new(self.at, self.tree.total_size() as u64, Kind::Used);
        let image = Entry::between(self.image.start, self.image.end, Kind::Used);
        memory(self.tree).chain(reserved).chain(block).chain(ram_disk(self.tree)).chain([tree, image])
    }
}

/// All ranges of all memory nodes; there may be one for each of a machine's parts.
fn memory<'a>(tree: &'a Fdt<'a>) -> impl Iterator<Item = Entry> + 'a {
    let is_memory = |node: &FdtNode<'_, '_>| {
        let text = |name| node.property(name).and_then(|property| property.as_str());
        text("device_type") == Some("memory") && text("status").is_none_or(|status| status == "okay" || status == "ok")
    };
    tree.all_nodes().filter(is_memory).flat_map(|node| ranges(node, Kind::Free))
}

fn ranges<'a>(node: FdtNode<'_, 'a>, kind: Kind) -> impl Iterator<Item = Entry> + use<'a> {
    let of = move |region: fdt::standard_nodes::MemoryRegion| {
        region.size.map(|len| Entry::new(region.starting_address.addr() as u64, len as u64, kind))
    };
    node.reg().into_iter().flatten().filter_map(of)
}

fn ram_disk(tree: &Fdt<'_>) -> Option<Entry> {
    let chosen = tree.find_node("/chosen")?;
    let address = |name| chosen.property(name)?.as_usize();
    let (start, end) = (address("linux,initrd-start")?, address("linux,initrd-end")?);
    Some(Entry::between(start as u64, end as u64, Kind::Used))
}

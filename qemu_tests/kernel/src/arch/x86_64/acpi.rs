//! Just enough ACPI to count the CPUs: root pointer, root table, MADT.

use core::ptr::with_exposed_provenance;

use crate::test;

/// Reads a `T` at a physical address that need not be aligned.
fn read<T: Copy>(address: usize) -> T {
    // SAFETY: the caller follows the firmware's own tables, which lie in the mapped first 4 GiB; `T` is an integer or
    // an array of bytes.
    unsafe { with_exposed_provenance::<T>(address).read_unaligned() }
}

/// Calls `found` with the APIC id of each CPU that can be used.
pub(super) fn cpus(rsdp: usize, mut found: impl FnMut(u32)) {
    let rsdp = if rsdp == 0 { search_rsdp() } else { rsdp };
    let madt = tables(rsdp)
        .find(|table| read::<[u8; 4]>(*table) == *b"APIC")
        .unwrap_or_else(|| test::fail(format_args!("the ACPI tables have no MADT")));
    let end = madt + read::<u32>(madt + 4) as usize;
    let mut entry = madt + 44;
    while entry < end {
        let (kind, len) = (read::<u8>(entry), read::<u8>(entry + 1));
        match kind {
            // Local APIC, local x2APIC: the flags' first bit says that the CPU is there.
            0 if read::<u32>(entry + 4) & 1 != 0 => found(u32::from(read::<u8>(entry + 3))),
            9 if read::<u32>(entry + 8) & 1 != 0 => found(read::<u32>(entry + 4)),
            _ => {}
        }
        entry += usize::from(len.max(2));
    }
}

/// The addresses of all tables that the root table lists.
fn tables(rsdp: usize) -> impl Iterator<Item = usize> {
    let extended = read::<u8>(rsdp + 15) >= 2;
    let (root, entry_len) =
        if extended { (read::<u64>(rsdp + 24) as usize, 8) } else { (read::<u32>(rsdp + 16) as usize, 4) };
    let end = root + read::<u32>(root + 4) as usize;
    (root + 36..end).step_by(entry_len).map(move |entry| match entry_len {
        8 => read::<u64>(entry) as usize,
        _ => read::<u32>(entry) as usize,
    })
}

/// Where the firmware of a PC leaves the root pointer if the loader does not pass it on.
fn search_rsdp() -> usize {
    (0xe_0000..0x10_0000)
        .step_by(16)
        .find(|address| read::<[u8; 8]>(*address) == *b"RSD PTR ")
        .unwrap_or_else(|| test::fail(format_args!("no ACPI tables: how many CPUs there are is unknown")))
}

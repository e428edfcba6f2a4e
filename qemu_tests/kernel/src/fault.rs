//! Reading where nothing may be mapped.

use crate::{Context, arch, interrupts};

/// The page fault that a read met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The address that the CPU reported.
    pub address: usize,
}

unsafe extern "C" {
    /// `false` if the read faults, in which case the handler goes on at `probe_faulted`.
    fn probe_read(address: *const u8, byte: *mut u8) -> bool;
    static probe_instruction: u8;
    static probe_faulted: u8;
}

/// Reads the byte at `address`.
///
/// # Errors
/// The page fault that it met, if it did.
pub fn read(address: usize) -> Result<u8, Fault> {
    // On riscv64 an interrupt clears the register that tells the address.
    interrupts::without(|| {
        let mut byte = 0;
        // SAFETY: the read may fault, for which `recover` is there; whatever it finds is a byte. No reference is made.
        let done = unsafe { probe_read(core::ptr::with_exposed_provenance(address), &raw mut byte) };
        if done { Ok(byte) } else { Err(Fault { address: arch::fault_address() }) }
    })
}

/// If the page fault is that of [`read`], goes on where it returns `false`.
pub(crate) fn recover(context: &mut Context) -> bool {
    let ours = context.pc() == (&raw const probe_instruction).addr() as u64;
    if ours {
        context.go_on_at((&raw const probe_faulted).addr() as u64);
    }
    ours
}

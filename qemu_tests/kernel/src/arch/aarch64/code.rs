//! As much of the instruction set as single steps need.

use core::ptr::with_exposed_provenance;

use crate::Context;

/// What a breakpoint takes the place of: an instruction.
pub(crate) type Breakpoint = u32;
/// `brk`.
pub(crate) const BREAKPOINT: Breakpoint = 0xd420_0000;

/// The address of the breakpoint that `step_call` has.
pub(crate) fn start() -> u64 {
    crate::step::called() - 4
}

fn instruction(pc: u64) -> u32 {
    // SAFETY: asked for instructions of this image, which are mapped.
    unsafe { with_exposed_provenance::<u32>(pc as usize).read_volatile() }
}

/// The length of every instruction.
pub(crate) fn len(_: u64) -> u64 {
    4
}

fn is_branch(code: u32) -> bool {
    code & 0x7c00_0000 == 0x1400_0000
}

fn is_indirect(code: u32) -> bool {
    code & 0xff9f_fc1f == 0xd61f_0000
}

/// Whether the next instruction in memory may be the next one.
pub(crate) fn falls_through(pc: u64) -> bool {
    let code = instruction(pc);
    !is_branch(code) && !is_indirect(code)
}

/// Where a branch may go, as far as the instruction alone says it.
pub(crate) fn targets(pc: u64) -> [Option<u64>; 1] {
    let code = instruction(pc);
    // A number of so many bits, with its sign, counted in instructions.
    let offset = |first: u32, bits: u32| i64::from((code << (32 - first - bits)) as i32 >> (32 - bits)) * 4;
    let offset = match code {
        _ if is_branch(code) => offset(0, 26),
        // On a condition, or on whether a register is 0.
        _ if code & 0xff00_0010 == 0x5400_0000 || code & 0x7e00_0000 == 0x3400_0000 => offset(5, 19),
        // On a bit.
        _ if code & 0x7e00_0000 == 0x3600_0000 => offset(5, 14),
        _ => return [None],
    };
    [Some(pc.wrapping_add_signed(offset))]
}

/// Where a branch to what a register holds goes.
pub(crate) fn indirect(context: &Context, pc: u64) -> Option<u64> {
    let code = instruction(pc);
    is_indirect(code).then(|| context.x.get((code >> 5 & 31) as usize).copied().unwrap_or(0))
}

/// Whether it is a load that reserves its memory.
pub(crate) fn reserves(pc: u64) -> bool {
    instruction(pc) & 0x3fe0_0000 == 0x0840_0000
}

/// Whether it is a store that fails without the reservation.
pub(crate) fn stores(pc: u64) -> bool {
    instruction(pc) & 0x3fe0_0000 == 0x0800_0000
}

/// Whether it reads and writes memory at once, or ends what does.
pub(crate) fn locks(pc: u64) -> bool {
    let code = instruction(pc);
    let compares = code & 0x3fa0_7c00 == 0x08a0_7c00;
    let exchanges = code & 0x3f20_0c00 == 0x3820_0000 && code & 0x3fff_fc00 != 0x38bf_c000;
    stores(pc) || compares || exchanges
}

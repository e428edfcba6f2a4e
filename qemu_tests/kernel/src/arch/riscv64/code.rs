//! As much of the instruction set as single steps need.

use core::ptr::with_exposed_provenance;

use crate::Context;

/// What a breakpoint takes the place of: a short instruction, or half of a long one.
pub(crate) type Breakpoint = u16;
/// `c.ebreak`.
pub(crate) const BREAKPOINT: Breakpoint = 0x9002;

/// The address of the breakpoint that `step_call` has.
pub(crate) fn start() -> u64 {
    crate::step::called() - 2
}

fn half(pc: u64) -> u32 {
    // SAFETY: asked for instructions of this image, which are mapped.
    unsafe { with_exposed_provenance::<u16>(pc as usize).read_volatile() }.into()
}

/// The length of the instruction.
pub(crate) fn len(pc: u64) -> u64 {
    if half(pc) & 3 == 3 { 4 } else { 2 }
}

/// An instruction, as far as it matters where it goes.
enum Kind {
    /// Only there.
    Jump(i64),
    /// There, or behind it.
    Branch(i64),
    /// To what a register holds, and so much more.
    Indirect(u32, i64),
    /// Of the atomic ones, by what it does.
    Atomic(u32),
    Other,
}

/// Puts bits of `code` together to a number with a sign, from `(bit of code, bit of the number)`; the last one is the
/// sign.
fn signed(code: u32, bits: &[(u32, u32)]) -> i64 {
    let number = bits.iter().fold(0_i64, |number, (from, to)| number | i64::from(code >> from & 1) << to);
    let sign = bits.last().map_or(0, |(_, to)| *to);
    number << (63 - sign) >> (63 - sign)
}

fn kind(pc: u64) -> Kind {
    let low = half(pc);
    if low & 3 != 3 {
        return short(low);
    }
    let code = low | half(pc + 2) << 16;
    match code & 0x7f {
        0x6f => {
            let offset = (code as i32 >> 31 << 20) as u32 | code & 0xf_f000 | code >> 9 & 0x800 | code >> 20 & 0x7fe;
            Kind::Jump(i64::from(offset as i32))
        }
        0x67 => Kind::Indirect(code >> 15 & 31, i64::from(code as i32 >> 20)),
        0x63 => {
            let offset = (code as i32 >> 31 << 12) as u32 | code << 4 & 0x800 | code >> 20 & 0x7e0 | code >> 7 & 0x1e;
            Kind::Branch(i64::from(offset as i32))
        }
        0x2f => Kind::Atomic(code >> 27),
        _ => Kind::Other,
    }
}

/// An instruction of 16 bits.
fn short(code: u32) -> Kind {
    match (code & 3, code >> 13) {
        (1, 5) => Kind::Jump(signed(
            code,
            &[(3, 1), (4, 2), (5, 3), (11, 4), (2, 5), (7, 6), (6, 7), (9, 8), (10, 9), (8, 10), (12, 11)],
        )),
        (1, 6 | 7) => Kind::Branch(signed(code, &[(3, 1), (4, 2), (10, 3), (11, 4), (2, 5), (5, 6), (6, 7), (12, 8)])),
        (2, 4) if code >> 2 & 31 == 0 && code >> 7 & 31 != 0 => Kind::Indirect(code >> 7 & 31, 0),
        _ => Kind::Other,
    }
}

/// Whether the next instruction in memory may be the next one.
pub(crate) fn falls_through(pc: u64) -> bool {
    !matches!(kind(pc), Kind::Jump(_) | Kind::Indirect(..))
}

/// Where a branch may go, as far as the instruction alone says it.
pub(crate) fn targets(pc: u64) -> [Option<u64>; 1] {
    match kind(pc) {
        Kind::Jump(offset) | Kind::Branch(offset) => [Some(pc.wrapping_add_signed(offset))],
        _ => [None],
    }
}

/// Where a branch to what a register holds goes.
pub(crate) fn indirect(context: &Context, pc: u64) -> Option<u64> {
    match kind(pc) {
        Kind::Indirect(register, offset) => Some(context.x(register).wrapping_add_signed(offset) & !1),
        _ => None,
    }
}

const LOAD_RESERVED: u32 = 2;
const STORE_CONDITIONAL: u32 = 3;

/// Whether it is a load that reserves its memory.
pub(crate) fn reserves(pc: u64) -> bool {
    matches!(kind(pc), Kind::Atomic(LOAD_RESERVED))
}

/// Whether it is a store that fails without the reservation.
pub(crate) fn stores(pc: u64) -> bool {
    matches!(kind(pc), Kind::Atomic(STORE_CONDITIONAL))
}

/// Whether it reads and writes memory at once, or ends what does.
pub(crate) fn locks(pc: u64) -> bool {
    matches!(kind(pc), Kind::Atomic(what) if what != LOAD_RESERVED)
}

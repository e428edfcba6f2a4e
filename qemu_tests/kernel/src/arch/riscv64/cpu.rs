//! Which CPU this is. `tp` points to the hart's own area from its set-up on, and before that to an area that all harts
//! share, one after the other, and whose index is "unknown".

use core::alloc::Layout;
use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{Ordering, compiler_fence};

pub use crate::start::Name;

const EARLY_FAULT_STACK_LEN: usize = 16 << 10;

/// One hart's own area.
#[repr(C, align(64))]
pub(super) struct Area {
    /// Preemption is off while this is not 0. The first field, so that one instruction reaches it by `tp` alone.
    pins: UnsafeCell<usize>,
    index: usize,
    /// Where the way into a trap puts two registers.
    saved_t0: UnsafeCell<usize>,
    saved_sp: UnsafeCell<usize>,
    /// The stack for exceptions: its low end, and the end from which it grows down.
    fault_stack_low: *const u8,
    fault_stack: *const u8,
}

pub(super) const SAVED_T0: usize = offset_of!(Area, saved_t0);
pub(super) const SAVED_SP: usize = offset_of!(Area, saved_sp);
pub(super) const FAULT_STACK_LOW: usize = offset_of!(Area, fault_stack_low);
pub(super) const FAULT_STACK: usize = offset_of!(Area, fault_stack);
/// Where in the area that `tp` points to the index is.
pub const INDEX_OFFSET: usize = offset_of!(Area, index);
const _: () = assert!(offset_of!(Area, pins) == 0, "it is reached by `tp` alone");

// SAFETY: each area is used by the one hart whose `tp` points to it; `UNKNOWN` by one hart at a time, since they start
// one after the other.
unsafe impl Sync for Area {}

/// The stack for exceptions of a hart that does not know its index yet.
#[repr(C, align(16))]
struct EarlyStack(UnsafeCell<[u8; EARLY_FAULT_STACK_LEN]>);

// SAFETY: as for `UNKNOWN`; nothing but the way into a trap uses it.
unsafe impl Sync for EarlyStack {}

static EARLY_STACK: EarlyStack = EarlyStack(UnsafeCell::new([0; EARLY_FAULT_STACK_LEN]));

pub(super) static UNKNOWN: Area = Area {
    pins: UnsafeCell::new(0),
    index: usize::MAX,
    saved_t0: UnsafeCell::new(0),
    saved_sp: UnsafeCell::new(0),
    fault_stack_low: (&raw const EARLY_STACK).cast(),
    fault_stack: (&raw const EARLY_STACK).cast::<u8>().wrapping_add(EARLY_FAULT_STACK_LEN),
};

/// The dense index of this CPU: 0 up to the number of CPUs, `usize::MAX` before it is known.
///
/// Read anew by every call: a thread may be on another CPU by then.
#[must_use]
pub fn index() -> usize {
    let index;
    // SAFETY: `tp` points to an `Area` since before any Rust code asks. Not `pure`: the answer may change.
    unsafe {
        asm!("ld {}, {}(tp)", out(reg) index, const INDEX_OFFSET, options(nostack, preserves_flags, readonly));
    }
    index
}

/// Keeps the running thread on this CPU until [`unpin`]; nests.
#[inline]
pub fn pin() {
    // SAFETY: one instruction, so it counts on whichever hart it happens to run.
    unsafe { asm!("amoadd.d zero, {}, (tp)", in(reg) 1, options(nostack, preserves_flags)) };
    compiler_fence(Ordering::SeqCst);
}

/// Undoes one [`pin`]. A switch that was due meanwhile comes with the next timer interrupt.
#[inline]
pub fn unpin() {
    compiler_fence(Ordering::SeqCst);
    // SAFETY: as in `pin`.
    unsafe { asm!("amoadd.d zero, {}, (tp)", in(reg) -1, options(nostack, preserves_flags)) };
}

/// Whether this CPU must not switch threads now.
#[must_use]
pub fn is_pinned() -> bool {
    let pins: usize;
    // SAFETY: as in `index`.
    unsafe { asm!("ld {}, 0(tp)", out(reg) pins, options(nostack, preserves_flags, readonly)) };
    pins != 0
}

/// What a kernel's hook has to allocate for a CPU.
pub(crate) const AREA: Layout = Layout::new::<Area>();

/// Makes `memory` the area of this CPU, which from now on is `index`.
///
/// # Safety
/// `memory` fits [`AREA`] and belongs to this CPU for ever; the stack is this CPU's alone.
pub(super) unsafe fn set_up(memory: *mut u8, index: usize, fault_stack: crate::Region) {
    let area = memory.cast::<Area>();
    let low = fault_stack.as_ptr().cast_const();
    let new = Area {
        pins: UnsafeCell::new(0),
        index,
        saved_t0: UnsafeCell::new(0),
        saved_sp: UnsafeCell::new(0),
        fault_stack_low: low,
        fault_stack: low.wrapping_add(fault_stack.len),
    };
    // SAFETY: the caller gives memory for it.
    unsafe { area.write(new) };
    // SAFETY: no thread pointer of the compiler's is in use, and from here on there is a whole area at the new place.
    unsafe { asm!("mv tp, {}", in(reg) area, options(nostack, preserves_flags)) };
}

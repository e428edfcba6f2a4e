//! Which CPU this is. `TPIDR_EL1` points to the CPU's own area from its set-up on, and before that to an area that all
//! CPUs share and whose index is "unknown".

use core::alloc::Layout;
use core::arch::asm;
use core::cell::UnsafeCell;

use crate::interrupts;

pub use crate::start::Name;

/// One CPU's own area.
#[repr(C, align(64))]
struct Area {
    index: usize,
    /// Preemption is off while this is not 0.
    pins: UnsafeCell<usize>,
}

// SAFETY: each area is used by the one CPU whose register points to it, but for `UNKNOWN`, of which only the `pins` are
// written, in a time when nobody reads them.
unsafe impl Sync for Area {}

static UNKNOWN: Area = Area { index: usize::MAX, pins: UnsafeCell::new(0) };

/// Where in the area that the register points to the index is.
pub const INDEX_OFFSET: usize = core::mem::offset_of!(Area, index);
const _: () = assert!(INDEX_OFFSET == 0, "as the instructions below say");

/// The dense index of this CPU: 0 up to the number of CPUs, `usize::MAX` before it is known.
///
/// Read anew by every call: a thread may be on another CPU by then.
#[must_use]
pub fn index() -> usize {
    let index;
    // SAFETY: the register points to an `Area` since before any Rust code asks. Not `pure`: the answer may change.
    unsafe {
        asm!("mrs {0}, tpidr_el1", "ldr {0}, [{0}]", out(reg) index, options(nostack, preserves_flags, readonly));
    }
    index
}

/// The count of this CPU's pins.
fn pins() -> *mut usize {
    let area: *const Area;
    // SAFETY: reads a register. Not `pure`, as above.
    unsafe { asm!("mrs {}, tpidr_el1", out(reg) area, options(nomem, nostack, preserves_flags)) };
    // SAFETY: the register points to an `Area`.
    unsafe { &*area }.pins.get()
}

#[inline]
fn add(change: isize) {
    // The processor cannot count in one instruction, so no thread may be switched meanwhile. Who nests in between takes
    // back what it adds.
    interrupts::without(|| {
        let pins = pins();
        // SAFETY: this CPU's own, and interrupts are off.
        let count = unsafe { pins.read() };
        // SAFETY: as above.
        unsafe { pins.write(count.wrapping_add_signed(change)) };
    });
}

/// Keeps the running thread on this CPU until [`unpin`]; nests.
#[inline]
pub fn pin() {
    add(1);
}

/// Undoes one [`pin`]. A switch that was due meanwhile comes with the next timer interrupt.
#[inline]
pub fn unpin() {
    add(-1);
}

/// Whether this CPU must not switch threads now.
#[must_use]
pub fn is_pinned() -> bool {
    // SAFETY: asked by this CPU, in an interrupt's handler or with interrupts off.
    unsafe { pins().read() != 0 }
}

fn set(area: *const Area) {
    // SAFETY: the register is the kernel's, and points to an area of its own or to the shared one.
    unsafe { asm!("msr tpidr_el1, {}", in(reg) area, options(nostack, preserves_flags)) };
}

/// This CPU does not know its index yet.
pub(super) fn set_unknown() {
    set(&raw const UNKNOWN);
}

/// What a kernel's hook has to allocate for a CPU.
pub(crate) const AREA: Layout = Layout::new::<Area>();

/// Makes `memory` the area of this CPU, which from now on is `index`.
///
/// # Safety
/// `memory` fits [`AREA`] and belongs to this CPU for ever.
pub(super) unsafe fn set_up(memory: *mut u8, index: usize) {
    let area = memory.cast::<Area>();
    // SAFETY: the caller gives memory for it.
    unsafe { area.write(Area { index, pins: UnsafeCell::new(0) }) };
    set(area);
}

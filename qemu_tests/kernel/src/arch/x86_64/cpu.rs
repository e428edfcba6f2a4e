//! Which CPU this is, and each CPU's own tables.
//!
//! The GS base points to the CPU's area from its set-up on: `gs:0` is the area's own address, `gs:8` the dense index.
//! Before that it points to an area that all CPUs share and whose index is "unknown", so code that asks too early gets
//! an answer that is no CPU's, not a fault.

use core::alloc::Layout;
use core::cell::UnsafeCell;

use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::registers::model_specific::GsBase;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

use crate::memory::Stacks;

pub use crate::start::Name;

/// The entries of the TSS's table of stacks.
pub(super) const FAULT_STACK: u16 = 0;
pub(super) const NMI_STACK: u16 = 1;

/// One CPU's own area.
#[repr(C, align(64))]
struct Area {
    this: *const Self,
    index: usize,
    /// Preemption is off while this is not 0.
    pins: UnsafeCell<usize>,
    gdt: UnsafeCell<GlobalDescriptorTable>,
    tss: UnsafeCell<TaskStateSegment>,
}

// SAFETY: each area is used by the one CPU whose GS base points to it, but for `UNKNOWN`, of which only the `pins` are
// written, by single instructions, in a time when nobody reads them.
unsafe impl Sync for Area {}

static UNKNOWN: Area = Area::new(core::ptr::null(), usize::MAX);

impl Area {
    const fn new(this: *const Self, index: usize) -> Self {
        Self {
            this,
            index,
            pins: UnsafeCell::new(0),
            gdt: UnsafeCell::new(GlobalDescriptorTable::new()),
            tss: UnsafeCell::new(TaskStateSegment::new()),
        }
    }
}

/// Where in the area that GS points to the index is.
pub const INDEX_OFFSET: usize = core::mem::offset_of!(Area, index);
const _: () = assert!(INDEX_OFFSET == 8 && core::mem::offset_of!(Area, pins) == 16, "as the instructions below say");

/// The dense index of this CPU: 0 up to the number of CPUs, `usize::MAX` before it is known.
///
/// Read anew by every call: a thread may be on another CPU by then.
#[must_use]
pub fn index() -> usize {
    let index;
    // SAFETY: the GS base points to an `Area` since before any Rust code asks. Not `pure`: the answer may change.
    unsafe { core::arch::asm!("mov {}, gs:[8]", out(reg) index, options(nostack, preserves_flags, readonly)) };
    index
}

/// Keeps the running thread on this CPU until [`unpin`]; nests.
#[inline]
pub fn pin() {
    // SAFETY: one instruction, so it counts on whichever CPU it happens to run.
    unsafe { core::arch::asm!("inc qword ptr gs:[16]", options(nostack)) };
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
}

/// Undoes one [`pin`]. A switch that was due meanwhile comes with the next timer interrupt.
#[inline]
pub fn unpin() {
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
    // SAFETY: as in `pin`.
    unsafe { core::arch::asm!("dec qword ptr gs:[16]", options(nostack)) };
}

/// As [`unpin`], and fails the test if there was no pin, by a branch on what the subtraction left.
#[inline]
pub fn unpin_or_fail() {
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
    // SAFETY: as in `pin`.
    unsafe {
        core::arch::asm!("dec qword ptr gs:[16]", "js {}",
            label { crate::test::fail(format_args!("unpinned more often than pinned")) }, options(nostack));
    }
}

/// Whether this CPU must not switch threads now.
#[must_use]
pub fn is_pinned() -> bool {
    let pins: usize;
    // SAFETY: as in `index`.
    unsafe { core::arch::asm!("mov {}, gs:[16]", out(reg) pins, options(nostack, preserves_flags, readonly)) };
    pins != 0
}

/// This CPU does not know its index yet.
pub(super) fn set_unknown() {
    GsBase::write(VirtAddr::from_ptr(&raw const UNKNOWN));
}

/// What a kernel's hook has to allocate for a CPU.
pub(crate) const AREA: Layout = Layout::new::<Area>();

/// Makes `memory` the area of this CPU, which from now on is `index`.
///
/// # Safety
/// `memory` fits [`AREA`] and belongs to this CPU for ever.
pub(super) unsafe fn set_up(memory: *mut u8, index: usize, stacks: Stacks) {
    let area = memory.cast::<Area>();
    // SAFETY: the caller gives memory for it.
    unsafe { area.write(Area::new(area, index)) };
    // SAFETY: just written, never freed, changed below only through its cells.
    let area: &'static Area = unsafe { &*area };
    // SAFETY: nobody else knows the area yet.
    let tss = unsafe { &mut *area.tss.get() };
    tss.interrupt_stack_table[usize::from(FAULT_STACK)] = VirtAddr::new(stacks.fault(index) as u64);
    tss.interrupt_stack_table[usize::from(NMI_STACK)] = VirtAddr::new(stacks.nmi(index) as u64);
    // SAFETY: as above.
    let gdt = unsafe { &mut *area.gdt.get() };
    let code = gdt.append(Descriptor::kernel_code_segment());
    let data = gdt.append(Descriptor::kernel_data_segment());
    let tss = gdt.append(Descriptor::tss_segment(tss));
    gdt.load();
    // SAFETY: the new table's 64-bit code segment, as before.
    unsafe { CS::set_reg(code) };
    // SAFETY: a flat data segment; likewise below.
    unsafe { SS::set_reg(data) };
    // SAFETY: as above.
    unsafe { DS::set_reg(data) };
    // SAFETY: as above.
    unsafe { ES::set_reg(data) };
    // SAFETY: a TSS of this CPU alone, not loaded yet.
    unsafe { load_tss(tss) };
    GsBase::write(VirtAddr::from_ptr(area));
}

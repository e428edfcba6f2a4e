//! The local interrupt controller of each CPU: timer, IPIs, starting the others.
//!
//! xAPIC mode only, through its page of registers: firmware leaves that mode on for machines this small, on emulators
//! that know the newer mode and on those that do not.

use x86_64::instructions::port::Port;
use x86_64::registers::model_specific::Msr;

use super::{interrupts, vector};
use crate::timer::Raise;
use crate::{clock, test, time};

const ID: usize = 0x20;
const EOI: usize = 0xb0;
const SPURIOUS: usize = 0xf0;
const COMMAND: usize = 0x300;
const COMMAND_TARGET: usize = 0x310;
const TIMER: usize = 0x320;
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;

const ENABLED: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const PENDING: u32 = 1 << 12;

/// Bits of the command register.
pub(super) const NMI: u32 = 4 << 8;
const INIT: u32 = 5 << 8;
const START_UP: u32 = 6 << 8;
const ASSERT: u32 = 1 << 14;
pub(super) const ALL_BUT_SELF: u32 = 3 << 18;

/// The address of this CPU's registers.
pub(super) fn base() -> usize {
    // SAFETY: every x86-64 CPU with a local APIC has this register.
    let value = unsafe { Msr::new(0x1b).read() };
    if value & (1 << 10) != 0 {
        test::fail(format_args!("the firmware left the APIC in x2APIC mode"));
    }
    (value & 0xf_ffff_f000) as usize
}

/// The registers are at the address that PCs have them at; [`base`] is checked against it once.
const REGISTERS: usize = 0xfee0_0000;

fn read(register: usize) -> u32 {
    // SAFETY: the page of registers is mapped from the first instruction on, and reading these has no side effect.
    unsafe { core::ptr::with_exposed_provenance::<u32>(REGISTERS + register).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: as in `read`; what is written changes which interrupts come, which no memory depends on.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(REGISTERS + register).write_volatile(value) };
}

pub(super) fn id() -> u32 {
    read(ID) >> 24
}

/// Switches this CPU's controller on, with nothing but IPIs coming through.
pub(super) fn enable() {
    if base() != REGISTERS {
        test::fail(format_args!("the APIC is not where PCs have it"));
    }
    write(SPURIOUS, ENABLED | u32::from(vector::SPURIOUS));
    write(LINT0, MASKED);
    write(LINT1, MASKED);
    write(TIMER, MASKED);
    write(TIMER_DIVIDE, 0b1011);
}

pub(super) fn end_of_interrupt() {
    write(EOI, 0);
}

/// Sends what `command` says to the CPU with the APIC id `target`, which shorthands ignore.
pub(super) fn send(target: u32, command: u32) {
    // The pair of writes belongs together.
    interrupts::without(|| {
        time::wait_for("an IPI to be sent", time::SOON, || read(COMMAND) & PENDING == 0);
        write(COMMAND_TARGET, target << 24);
        write(COMMAND, command | ASSERT);
    });
}

/// Makes the CPU with the APIC id `target` start in real mode at `page`, and waits until `online` says it did.
pub(super) fn start(target: u32, page: usize, online: impl Fn() -> bool) {
    send(target, INIT);
    time::spin(200);
    let command = START_UP | (page >> 12) as u32;
    send(target, command);
    // The second one is for CPUs that missed the first; one that runs ignores it.
    if !time::wait_until(100_000, &online) {
        send(target, command);
    }
    time::wait_for("a CPU to start", 3 * time::SOON, online);
}

/// How often the timer counts down in a microsecond; CPU 0 measures it, and it is the same for all.
static COUNTS_PER_MICRO: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);

/// Has the timer interrupt this CPU in so many cycles of the clock.
pub(crate) fn set_deadline(cycles: u64) {
    let per_micro = u64::from(COUNTS_PER_MICRO.load(core::sync::atomic::Ordering::Relaxed));
    let counts = cycles.saturating_mul(per_micro) / clock::cycles_per_micro().max(1);
    write(TIMER, u32::from(vector::TIMER));
    write(TIMER_INITIAL, u32::try_from(counts).unwrap_or(u32::MAX).max(1));
}

/// The timer interrupts this CPU no more; an interrupt may be on its way still.
pub(crate) fn clear_deadline() {
    write(TIMER, MASKED);
    write(TIMER_INITIAL, 0);
}

unsafe extern "C" {
    fn timed_call(work: unsafe extern "C" fn(*mut u8), argument: *mut u8, count: u32, timer: *mut u32);
}

/// Calls `work(argument)` with the timer set to raise something once, about `count` counts after the call begins.
///
/// # Safety
/// As for `work`.
pub(crate) unsafe fn call_timed(work: unsafe extern "C" fn(*mut u8), argument: *mut u8, count: u32, raise: Raise) {
    let what = match raise {
        Raise::Vector(vector) => u32::from(vector),
        Raise::Nmi => NMI,
    };
    write(TIMER, what);
    let initial = core::ptr::with_exposed_provenance_mut(REGISTERS + TIMER_INITIAL);
    // SAFETY: what is written to the register changes which interrupts come, and the caller answers for `work`.
    unsafe { timed_call(work, argument, count.max(1), initial) };
    clear_deadline();
}

/// Measures the timer and the cycle counter against the one clock whose rate is known, the PIT.
///
/// The smallest of three results counts: a host that pauses this CPU between two readings makes them too large.
pub(super) fn calibrate() {
    /// The PIT's rate, and 5 ms of it.
    const HERTZ: u64 = 1_193_182;
    const COUNTS: u64 = HERTZ / 200;
    let mut best = (u64::MAX, u64::MAX);
    start_pit();
    for _ in 0..3 {
        write(TIMER_INITIAL, u32::MAX);
        let cycles = clock::cycles();
        let pit = read_pit();
        let elapsed = loop {
            // It counts down, and starts again at the top.
            let elapsed = u64::from(pit.wrapping_sub(read_pit()));
            if elapsed >= COUNTS {
                break elapsed;
            }
        };
        let cycles = clock::cycles() - cycles;
        let counts = u64::from(u32::MAX - read(TIMER_CURRENT));
        let per_second = |n: u64| n * HERTZ / elapsed;
        best = (best.0.min(per_second(cycles)), best.1.min(per_second(counts)));
    }
    write(TIMER_INITIAL, 0);
    if best.0 < 1_000_000 || best.1 < 1_000_000 {
        test::fail(format_args!("clocks slower than 1 MHz: {best:?}"));
    }
    clock::set_rate(best.0);
    COUNTS_PER_MICRO.store((best.1 / 1_000_000) as u32, core::sync::atomic::Ordering::Relaxed);
}

fn start_pit() {
    // SAFETY: channel 0 of the PIT; its interrupt is masked at the interrupt controller.
    unsafe { Port::new(0x43).write(0x34_u8) };
    for _ in 0..2 {
        // SAFETY: as above: both bytes of the largest period.
        unsafe { Port::new(0x40).write(0_u8) };
    }
}

fn read_pit() -> u16 {
    // SAFETY: latches the count of channel 0.
    unsafe { Port::new(0x43).write(0_u8) };
    // SAFETY: the latched count, low byte, then high byte.
    let low: u8 = unsafe { Port::new(0x40).read() };
    // SAFETY: as above.
    let high: u8 = unsafe { Port::new(0x40).read() };
    u16::from_le_bytes([low, high])
}

/// Masks both of the old interrupt controllers, whose vectors are those of exceptions.
pub(super) fn mask_legacy() {
    for port in [0x21, 0xa1] {
        // SAFETY: their mask registers.
        unsafe { Port::new(port).write(0xff_u8) };
    }
}

//! The interrupt controller: GICv3. Group 1 interrupts are IRQs; group 0 ones are FIQs, of a higher priority, so that
//! they interrupt a handler of the others too.

use core::ptr::{NonNull, with_exposed_provenance_mut};

use arm_gic::gicv3::registers::{Gicd, GicrSgi};
use arm_gic::gicv3::{GicCpuInterface, GicV3, Group, InterruptGroup, SecureIntGroup, SgiTarget, SgiTargetGroup};
use arm_gic::{IntId, UniqueMmioPointer};

use super::{hardware_id, vector};
use crate::{Region, sync::Lock, test};

/// The software interrupt that is an NMI.
const NMI: IntId = IntId::sgi(15);
/// The virtual timer's.
const TIMER: IntId = IntId::ppi(vector::TIMER as u32 - 16);
/// Lower is more urgent.
const URGENT: u8 = 0x40;
const USUAL: u8 = 0x80;

static GIC: Lock<Option<GicV3<'static>>> = Lock::new(None);

/// Sets up what all CPUs share.
pub(super) fn set_up(distributor: Region, redistributors: Region, cpu_count: usize) {
    let (Some(distributor), Some(redistributors)) = (
        NonNull::new(with_exposed_provenance_mut::<Gicd>(distributor.start)),
        NonNull::new(with_exposed_provenance_mut::<GicrSgi>(redistributors.start)),
    ) else {
        test::fail(format_args!("the interrupt controller is at address 0"))
    };
    // SAFETY: the registers of the distributor, as the device tree has them, mapped as a device and used here alone.
    let distributor = unsafe { UniqueMmioPointer::new(distributor) };
    // SAFETY: likewise those of the redistributors, of which there is one for each CPU.
    let mut gic = unsafe { GicV3::new(distributor, redistributors, cpu_count, false) };
    gic.setup(0);
    gic.distributor().enable_group0(true);
    for cpu in 0..cpu_count {
        let id = done(gic.gicr_typer(cpu)).core_mpidr() as usize;
        if id != hardware_id(cpu) {
            test::fail(format_args!("redistributor {cpu} is that of CPU {id:#x}"));
        }
        for number in (0..15).map(IntId::sgi).chain([TIMER]) {
            done(gic.set_interrupt_priority(number, Some(cpu), USUAL));
            done(gic.enable_interrupt(number, Some(cpu), true));
        }
        done(gic.set_group(NMI, Some(cpu), Group::Secure(SecureIntGroup::Group0)));
        done(gic.set_interrupt_priority(NMI, Some(cpu), URGENT));
        done(gic.enable_interrupt(NMI, Some(cpu), true));
    }
    GIC.with(|place| *place = Some(gic));
}

/// Sets up this CPU's own part.
pub(super) fn enable(cpu: usize) {
    with(|gic| gic.init_cpu(cpu));
    GicCpuInterface::set_priority_mask(0xff);
    GicCpuInterface::enable_group0(true);
    GicCpuInterface::enable_group1(true);
}

fn with<T>(f: impl FnOnce(&mut GicV3<'static>) -> T) -> T {
    GIC.with(|gic| match gic {
        Some(gic) => f(gic),
        None => test::fail(format_args!("the interrupt controller is not set up yet")),
    })
}

fn done<T, E: core::fmt::Debug>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| test::fail(format_args!("the interrupt controller: {error:?}")))
}

/// Takes the most urgent IRQ, if there is one.
pub(super) fn acknowledge() -> Option<u8> {
    let number = GicCpuInterface::get_and_acknowledge_interrupt(InterruptGroup::Group1)?;
    u8::try_from(u32::from(number)).ok()
}

/// The IRQ was handled.
pub(super) fn end(number: u8) {
    let number = if number < 16 { IntId::sgi(number.into()) } else { IntId::ppi(u32::from(number) - 16) };
    GicCpuInterface::end_interrupt(number, InterruptGroup::Group1);
}

/// Takes an FIQ, if there is one, and has it handled.
pub(super) fn take_nmi(handle: impl FnOnce()) {
    let Some(number) = GicCpuInterface::get_and_acknowledge_interrupt(InterruptGroup::Group0) else { return };
    if number == TIMER {
        super::clear_deadline();
    }
    handle();
    GicCpuInterface::end_interrupt(number, InterruptGroup::Group0);
}

/// Makes this CPU's timer raise NMIs, or interrupts again.
pub(super) fn timer_is_nmi(cpu: usize, nmi: bool) {
    let (group, priority) =
        if nmi { (Group::Secure(SecureIntGroup::Group0), URGENT) } else { (Group::Group1NS, USUAL) };
    with(|gic| {
        done(gic.set_group(TIMER, Some(cpu), group));
        done(gic.set_interrupt_priority(TIMER, Some(cpu), priority));
    });
}

/// Whom an interrupt is sent to.
pub(super) enum To {
    Cpu(usize),
    Others,
}

impl To {
    fn target(self) -> SgiTarget {
        match self {
            Self::Others => SgiTarget::All,
            Self::Cpu(cpu) => {
                let id = hardware_id(cpu);
                let level = |number: u32| (id >> (8 * number)) as u8;
                SgiTarget::List {
                    affinity3: (id >> 32) as u8,
                    affinity2: level(2),
                    affinity1: level(1),
                    target_list: 1 << (level(0) & 15),
                }
            }
        }
    }
}

/// Sends a software interrupt. What was written before is seen by its handler.
pub(super) fn send(number: u8, to: To) {
    barrier();
    done(GicCpuInterface::send_sgi(IntId::sgi(number.into()), to.target(), SgiTargetGroup::CurrentGroup1));
}

/// Sends an NMI.
pub(super) fn send_nmi(to: To) {
    barrier();
    done(GicCpuInterface::send_sgi(NMI, to.target(), SgiTargetGroup::Group0));
}

fn barrier() {
    aarch64_cpu::asm::barrier::dsb(aarch64_cpu::asm::barrier::ISHST);
}

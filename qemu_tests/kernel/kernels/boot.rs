//! The ground that every other test stands on: CPUs, clock, timer, IPIs, NMIs, page faults, memory map.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use smp_heap_kernel::{Boot, Context, arch, cpu, fault, ipi, kernel, nmi, println, smp, test, time, timer};

const PING: u8 = arch::vector::FREE;

static SEEN: AtomicU64 = AtomicU64::new(0);
static PINGS: AtomicUsize = AtomicUsize::new(0);
static NMIS: AtomicUsize = AtomicUsize::new(0);

kernel! {
    fn main(boot: &Boot) {
        println!("{boot:?}");
        let count = boot.cpu_count();
        cpus_know_who_they_are(count);
        memory_is_ours(boot);
        timers_tick(count);
        interrupts_arrive(count);
        faults_are_caught();
    }
}

fn cpus_know_who_they_are(count: usize) {
    smp::on_all(|index| {
        assert_eq!(index, cpu::index());
        assert_eq!(SEEN.fetch_or(1 << index, Relaxed) & (1 << index), 0, "one CPU twice");
    });
    assert_eq!(SEEN.load(Relaxed), (1 << count) - 1);
    test::did(count, "cpus");
    for round in 0..100 {
        smp::on_all(|_| {
            SEEN.store(round, Relaxed);
            smp::barrier();
            assert_eq!(SEEN.load(Relaxed), round);
            smp::barrier();
        });
    }
}

fn memory_is_ours(boot: &Boot) {
    let mut total = 0;
    for region in boot.regions() {
        total += region.len;
        for address in (region.start..region.end()).step_by(4096) {
            let word: *mut u64 = core::ptr::with_exposed_provenance_mut(address);
            // SAFETY: usable memory that nobody uses; the image would not survive this if it were not.
            unsafe { word.write_volatile(0x5a5a_5a5a_5a5a_5a5a) };
            // SAFETY: as above.
            assert_eq!(unsafe { word.read_volatile() }, 0x5a5a_5a5a_5a5a_5a5a);
        }
    }
    assert!(total > boot.number("min_memory", 64 << 20), "only {total} bytes of RAM");
}

fn timers_tick(count: usize) {
    let before = time::micros();
    smp::on_all(|_| timer::start(1000));
    for cpu in 0..count {
        time::wait_for("ten timer interrupts", time::SOON, || timer::ticks(cpu) >= 10);
    }
    smp::on_all(|_| timer::stop());
    assert!(time::micros() - before >= 9_000, "ten milliseconds went by in {} us", time::micros() - before);
}

fn interrupts_arrive(count: usize) {
    smp_heap_kernel::interrupts::set_handler(PING, |_: &mut Context| {
        PINGS.fetch_add(1, Relaxed);
    });
    ipi::send_all_but_self(PING);
    ipi::send(0, PING);
    time::wait_for("an IPI on every CPU", time::SOON, || PINGS.load(Relaxed) == count);

    if !nmi::EXISTS {
        return;
    }
    nmi::set_handler(|_| {
        NMIS.fetch_add(1, Relaxed);
    });
    nmi::broadcast();
    nmi::send(0);
    time::wait_for("an NMI on every CPU", time::SOON, || NMIS.load(Relaxed) == count);
    test::did(NMIS.load(Relaxed), "nmis");
}

fn faults_are_caught() {
    smp::on_all(|_| {
        let fault = fault::read(8);
        assert_eq!(fault, Err(smp_heap_kernel::Fault { address: 8 }), "address 8 is not mapped");
        assert!(fault::read((&raw const SEEN).addr()).is_ok());
        test::did(1, "faults");
    });
}

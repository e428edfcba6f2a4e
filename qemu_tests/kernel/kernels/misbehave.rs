//! Ends in each way that must not look like success, for the tests of the test driver.
#![no_std]
#![no_main]

use smp_heap_kernel::arch::{Exit, exit, reset, stop};
use smp_heap_kernel::{Boot, kernel, println, test};

kernel! {
    fn main(boot: &Boot) {
        match boot.arg("mode") {
            Some("reset") => reset(),
            Some("hang") => loop {
                core::hint::spin_loop();
            },
            // For ever: nothing wakes a CPU whose interrupts are masked.
            Some("sleep") => stop(),
            Some("panic") => assert_eq!(boot.cpu_count(), 0, "as ordered"),
            Some("exception") => write_to_code(),
            Some("stack_overflow") => println!("{}", overflow(0)),
            // Everything is right but the code.
            Some("exit_code") => {
                println!("PASS misbehave");
                exit(Exit::Code(0x20))
            }
            // Everything is right but the line.
            Some("silent_exit") => exit(Exit::Pass),
            Some("late_output") => {
                println!("PASS misbehave");
                println!("and more");
                exit(Exit::Pass)
            }
            Some("pass") => test::did(1, "steps"),
            Some("early_return") => {}
            Some("rounds") => test::did(boot.rounds(3), "rounds"),
            other => test::fail(format_args!("no such mode: {other:?}")),
        }
    }
}

fn write_to_code() {
    let code = write_to_code as fn() as *mut u8;
    // SAFETY: not sound at all; the page tables have to refuse it.
    unsafe { code.write_volatile(0) };
}

/// A thousand bytes of stack for each call, without end.
fn overflow(depth: u64) -> u64 {
    let frame = core::hint::black_box([depth; 128]);
    if depth == u64::MAX { 0 } else { overflow(depth + 1) + core::hint::black_box(&frame).iter().sum::<u64>() }
}

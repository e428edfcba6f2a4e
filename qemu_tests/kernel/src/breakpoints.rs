//! Single steps by breakpoints, where the kernel cannot have the processor stop after an instruction: an instruction
//! that raises an exception takes the place of each one that may come next.
//!
//! A loop that begins by a load that reserves its memory and ends by a store that fails if somebody was there meanwhile
//! would never come to its end that way, since an exception takes the reservation away. So it runs as a whole, and its
//! instructions are shown behind it. No other CPU may run the code meanwhile.

use core::cell::Cell;

use crate::arch::{self, code};
use crate::sync::Lock;
use crate::{Context, memory::CODE_ALIAS, step, step::Next, step::Step};

/// The most instructions that may come next.
const MAX: usize = 4;
/// The most instructions from a reserving load to the store.
const MAX_LOOP: usize = 16;

/// Places that hold a breakpoint, and what belongs there.
static PLACED: Lock<[Option<(u64, code::Breakpoint)>; MAX]> = Lock::new([None; MAX]);

/// Before the first step.
pub(crate) fn prepare_steps() {}

/// If the exception at `context` is a step, asks what is wanted and goes on.
pub(crate) fn stepped(context: &mut Context) -> bool {
    let Some(mut current) = step::current() else { return false };
    let at = context.pc();
    if at == code::start() {
        // The breakpoint that `step_call` begins with; it stays there.
        context.go_on_at(step::called());
        place(context, step::called());
        return true;
    }
    if !take_back().contains(&Some(at)) {
        return false;
    }
    let mut next = Next::Step;
    let pc = current.pc;
    current.pc = at;
    step::go_on(current);
    each_executed(pc, at, |pc, behind| {
        let step = Step { pc, locks: code::locks(pc) };
        if behind == at {
            next = current.look(context, step);
        } else {
            let mut between = *context;
            between.go_on_at(behind);
            current.look(&mut between, step);
        }
    });
    if at != step::returned() && next == Next::Step {
        place(context, at);
    }
    true
}

/// Calls `each` for the instructions that were executed from `pc` on until the CPU stopped at `at`: one, or those of a
/// loop. With the address of the next one.
fn each_executed(pc: u64, at: u64, mut each: impl FnMut(u64, u64)) {
    if !code::reserves(pc) {
        return each(pc, at);
    }
    let mut pc = pc;
    loop {
        let next = pc + code::len(pc);
        let left = code::stores(pc) || code::targets(pc).contains(&Some(at));
        if left || next == at {
            return each(pc, at);
        }
        each(pc, next);
        pc = next;
    }
}

/// Places breakpoints where the CPU may come after the instruction at `pc`, which is the next one, or after the loop
/// that begins there.
fn place(context: &Context, pc: u64) {
    let places = Cell::new([None; MAX]);
    let add = |at: u64| {
        let mut all = places.get();
        if !all.contains(&Some(at)) {
            if let Some(place) = all.iter_mut().find(|place| place.is_none()) {
                *place = Some(at);
                return places.set(all);
            }
            if !all.contains(&None) {
                crate::test::fail(format_args!("more than {MAX} instructions may come after {pc:#x}"));
            }
        }
    };
    if code::reserves(pc) {
        let mut at = pc;
        let mut left = MAX_LOOP;
        loop {
            let next = at + code::len(at);
            if code::stores(at) {
                add(next);
                break;
            }
            // Where it is left before.
            code::targets(at).into_iter().flatten().for_each(add);
            left -= 1;
            if left == 0 {
                crate::test::fail(format_args!("no store belongs to the load at {pc:#x}"));
            }
            at = next;
        }
    } else {
        let targets = code::targets(pc);
        targets.into_iter().flatten().for_each(add);
        if let Some(target) = code::indirect(context, pc) {
            add(target);
        }
        if code::falls_through(pc) {
            add(pc + code::len(pc));
        }
    }
    PLACED.with(|placed| {
        for (place, at) in placed.iter_mut().zip(places.get()) {
            *place = at.map(|at| (at, patch(at, code::BREAKPOINT)));
        }
    });
}

/// Takes all breakpoints away; gives where they were.
fn take_back() -> [Option<u64>; MAX] {
    PLACED.with(|placed| {
        placed.each_mut().map(|place| {
            let (at, was) = place.take()?;
            patch(at, was);
            Some(at)
        })
    })
}

/// Puts a breakpoint, or what was there before it, into code; gives what was there.
fn patch(at: u64, new: code::Breakpoint) -> code::Breakpoint {
    let place = core::ptr::with_exposed_provenance_mut::<code::Breakpoint>(at as usize + CODE_ALIAS);
    // SAFETY: code is mapped at the alias too, writable, and whoever is stopped there is this CPU.
    let old = unsafe { place.read_volatile() };
    // SAFETY: as above. A breakpoint at the beginning of an instruction, or its own beginning.
    unsafe { place.write_volatile(new) };
    arch::code_has_changed(at as usize);
    old
}

//! The seam under `cfg(loom)`: the same atomics, watched.
//!
//! Loom's own atomics cannot be made in a `const`, are longer than what they stand for, and are not valid when all
//! zero, so a heap could not be built out of them without being another heap. Therefore the atomics here keep their
//! layout, and *loom's stand in a table beside the memory, found by address*. Everything else of the crate is compiled
//! as it ships. What that costs: a look into the table for each access.
//!
//! An access goes one of two ways:
//! - *Inside [`together`]*: to loom, which runs every order of the threads' accesses (up to a number of preemptions)
//!   and every value that a load may see. Accesses to blocks ([`read`], [`write`]) go to loom's cells, which find those
//!   that nothing orders.
//! - *Outside*: to the memory itself. So a model builds its heap and checks it afterwards at full speed.
//!
//! Both ways pass [`tick`], at which [`interrupted`] runs a nested context.
//!
//! A sequentially consistent access is put behind a sequentially consistent fence, since loom takes such accesses for
//! acquire and release only. That orders a weaker access before it too, which the language does not.

#![expect(unsafe_code, reason = "memory under the model checker")]
#![expect(dead_code, reason = "every atomic has the same methods, used or not")]
#![expect(clippy::cast_possible_truncation, reason = "loom's values have 64 bits, which hold any other")]

use core::cell::{Cell, RefCell};
use core::ops::Range;
use core::sync::atomic as plain;
pub(crate) use core::sync::atomic::{Ordering, compiler_fence};
use std::boxed::Box;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::vec::Vec;

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU64 as Watched;

/// What became known of a model's memory, and what happens in it.
#[derive(Default)]
struct World {
    /// Threads run, or may: accesses go to loom.
    watching: Cell<bool>,
    atomics: RefCell<HashMap<usize, Seat>>,
    /// Atomics that were made before the threads, for memory that no execution used before.
    spare: RefCell<Vec<Watched>>,
    cells: RefCell<HashMap<usize, Rc<UnsafeCell<()>>>>,
    /// Atomics that some execution used, with how to read and write their memory: to be there before threads are.
    known: RefCell<BTreeMap<usize, Access>>,
    /// Memory that a thread was given: what is first used there was made by that thread.
    fresh: RefCell<Vec<Range<usize>>>,
    /// Memory that was given away: nobody may touch it.
    dead: RefCell<Vec<Range<usize>>>,
    interrupt: RefCell<Option<Interrupt>>,
}

std::thread_local! {
    static WORLD: World = World::default();
}

/// How to read and write an atomic's memory, as 64 bits.
#[derive(Clone, Copy)]
struct Access {
    read: unsafe fn(usize) -> u64,
    write: unsafe fn(usize, u64),
}

/// Loom's atomic for an address. Its bits are those of the memory, but for `flipped` ones.
#[derive(Clone)]
struct Seat {
    atomic: Rc<Watched>,
    flipped: u64,
}

/// How many spare atomics one execution starts with.
const SPARE: usize = 32;

/// A nested context to come.
struct Interrupt {
    thread: Option<loom::thread::ThreadId>,
    left: u64,
    handler: Option<Box<dyn FnOnce()>>,
}

/// Thrown when threads use atomics that no execution used before in a way that spare ones do not allow: loom would take
/// a new one for one that this thread made. The exploration starts again, with those atomics there from the start.
pub(crate) struct Learned;

/// Forgets what an execution that broke off left behind.
pub(crate) fn reset() {
    WORLD.with(|world| {
        world.watching.set(false);
        world.atomics.borrow_mut().clear();
        world.spare.borrow_mut().clear();
        world.cells.borrow_mut().clear();
        world.fresh.borrow_mut().clear();
        world.dead.borrow_mut().clear();
        world.interrupt.take();
    });
}

/// Runs all the work at once, each on its own thread, watched; then the memory has the values that were stored last.
/// Inside a loom model, once.
pub(crate) fn together(work: Vec<Box<dyn FnOnce()>>) {
    WORLD.with(|world| {
        for (addr, access) in &*world.known.borrow() {
            // SAFETY: an atomic of this access was there in an earlier execution of the same model, whose memory stays
            // for ever.
            let value = unsafe { (access.read)(*addr) };
            world.atomics.borrow_mut().insert(*addr, Seat::new(value));
        }
        world.spare.borrow_mut().extend((0..SPARE).map(|_| Watched::new(0)));
        world.watching.set(true);
    });
    let mut work = work.into_iter();
    let own = work.next();
    let spawned: Vec<_> = work.map(loom::thread::spawn).collect();
    own.into_iter().for_each(|own| own());
    for thread in spawned {
        assert!(thread.join().is_ok(), "a thread of a model panicked");
    }
    WORLD.with(|world| {
        world.watching.set(false);
        for (addr, seat) in world.atomics.borrow_mut().drain() {
            let Some(access) = world.known.borrow().get(&addr).copied() else { continue };
            // SAFETY: the threads are done.
            let bits = unsafe { seat.atomic.unsync_load() };
            // SAFETY: as for `read` above.
            unsafe { (access.write)(addr, bits ^ seat.flipped) };
        }
        world.cells.borrow_mut().clear();
    });
}

/// Gives memory away, as `free` or `unmap` does: everything that was ever done to it must have happened before, and
/// nobody may touch it from now on. Outside [`together`], nothing.
pub(crate) fn bury(memory: Range<usize>) {
    WORLD.with(|world| {
        if !world.watching.get() {
            return;
        }
        for mut seat in take_out(&world.atomics, &memory) {
            let atomic = Rc::get_mut(&mut seat.atomic);
            assert!(atomic.map(|atomic| atomic.with_mut(|_| ())).is_some(), "an access is under way");
        }
        take_out(&world.cells, &memory).iter().for_each(|cell| cell.with_mut(|_| ()));
        world.dead.borrow_mut().push(memory);
    });
}

/// What a table has for a piece of memory, in the order of addresses.
fn take_out<T>(table: &RefCell<HashMap<usize, T>>, memory: &Range<usize>) -> Vec<T> {
    let mut table = table.borrow_mut();
    let mut addrs: Vec<_> = table.keys().copied().filter(|addr| memory.contains(addr)).collect();
    addrs.sort_unstable();
    addrs.iter().filter_map(|addr| table.remove(addr)).collect()
}

/// Takes memory that was given away, or never used: what is in it now was made by this thread. Outside
/// [`together`], nothing.
pub(crate) fn revive(memory: Range<usize>) {
    WORLD.with(|world| {
        if world.watching.get() {
            let mut dead = world.dead.borrow_mut();
            let rests =
                |dead: Range<usize>| [dead.start..dead.end.min(memory.start), dead.start.max(memory.end)..dead.end];
            *dead = dead.drain(..).flat_map(rests).filter(|rest| !rest.is_empty()).collect();
            drop(dead);
            world.fresh.borrow_mut().push(memory);
        }
    });
}

/// Runs `work`, and in the middle of it, right before its access number `step` (from 0), `handler`. False: the work has
/// fewer accesses.
pub(crate) fn interrupted(step: u64, handler: impl FnOnce() + 'static, work: impl FnOnce()) -> bool {
    WORLD.with(|world| {
        let thread = world.watching.get().then(|| loom::thread::current().id());
        let interrupt = Interrupt { thread, left: step, handler: Some(Box::new(handler)) };
        let outer = world.interrupt.replace(Some(interrupt));
        work();
        let rest = world.interrupt.replace(outer);
        rest.is_some_and(|rest| rest.handler.is_none())
    })
}

/// One access is about to happen.
fn tick(world: &World) {
    if std::thread::panicking() {
        return;
    }
    let handler = {
        let mut interrupt = world.interrupt.borrow_mut();
        let Some(interrupt) = &mut *interrupt else { return };
        if interrupt.thread.is_some_and(|thread| thread != loom::thread::current().id()) {
            return;
        }
        let now = interrupt.left == 0;
        interrupt.left = interrupt.left.wrapping_sub(1);
        if now { interrupt.handler.take() } else { None }
    };
    if let Some(handler) = handler {
        // The handler's own accesses are not the work's, and may be interrupted in turn.
        let outer = world.interrupt.take();
        handler();
        world.interrupt.replace(outer);
    }
}

fn assert_alive(world: &World, addr: usize) {
    assert!(!world.dead.borrow().iter().any(|dead| dead.contains(&addr)), "{addr:#x} was given away and is touched");
}

/// Loom's atomic for an address, if threads are watched.
fn watched(addr: usize, access: Access) -> Option<Seat> {
    WORLD.with(|world| {
        tick(world);
        if !world.watching.get() || std::thread::panicking() {
            return None;
        }
        assert_alive(world, addr);
        if let Some(seat) = world.atomics.borrow().get(&addr) {
            return Some(seat.clone());
        }
        // SAFETY: the caller has a reference to the atomic there.
        let bits = unsafe { (access.read)(addr) };
        world.known.borrow_mut().insert(addr, access);
        let is_fresh = world.fresh.borrow().iter().any(|fresh| fresh.contains(&addr));
        let spare = if is_fresh { None } else { world.spare.borrow_mut().pop() };
        let seat = match spare {
            Some(atomic) => Seat { atomic: Rc::new(atomic), flipped: bits },
            None if is_fresh => Seat::new(bits),
            None => std::panic::resume_unwind(Box::new(Learned)),
        };
        world.atomics.borrow_mut().insert(addr, seat.clone());
        Some(seat)
    })
}

impl Seat {
    fn new(bits: u64) -> Self {
        Self { atomic: Rc::new(Watched::new(bits)), flipped: 0 }
    }

    fn load(&self, order: Ordering) -> u64 {
        ordered(order, || self.atomic.load(order)) ^ self.flipped
    }

    fn store(&self, bits: u64, order: Ordering) {
        ordered(order, || self.atomic.store(bits ^ self.flipped, order));
    }

    fn swap(&self, bits: u64, order: Ordering) -> u64 {
        ordered(order, || self.atomic.swap(bits ^ self.flipped, order)) ^ self.flipped
    }

    fn exchange(&self, old: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64> {
        let (old, new) = (old ^ self.flipped, new ^ self.flipped);
        let result = ordered(success, || self.atomic.compare_exchange(old, new, success, failure));
        result.map(|bits| bits ^ self.flipped).map_err(|bits| bits ^ self.flipped)
    }

    /// Arithmetic, which flipped bits do not allow.
    fn change(&self, order: Ordering, change: impl FnOnce(&Watched) -> u64) -> u64 {
        if self.flipped != 0 {
            std::panic::resume_unwind(Box::new(Learned));
        }
        ordered(order, || change(&self.atomic))
    }
}

/// Loom's cell for an address, if threads are watched.
fn cell(addr: usize) -> Option<Rc<UnsafeCell<()>>> {
    WORLD.with(|world| {
        tick(world);
        if !world.watching.get() || std::thread::panicking() {
            return None;
        }
        assert_alive(world, addr);
        Some(Rc::clone(world.cells.borrow_mut().entry(addr).or_insert_with(|| Rc::new(UnsafeCell::new(())))))
    })
}

/// Reads memory that only this context writes.
///
/// # Safety
/// As for [`core::ptr::read`].
pub(crate) unsafe fn read<T>(from: *const T) -> T {
    if let Some(cell) = cell(from.addr()) {
        cell.with(|_| ());
    }
    // SAFETY: the contract is the same.
    unsafe { from.read() }
}

/// Writes memory that only this context uses.
///
/// # Safety
/// As for [`core::ptr::write`].
pub(crate) unsafe fn write<T>(to: *mut T, value: T) {
    if let Some(cell) = cell(to.addr()) {
        cell.with_mut(|_| ());
    }
    // SAFETY: the contract is the same.
    unsafe { to.write(value) }
}

pub(crate) fn fence(order: Ordering) {
    if is_watching() { loom::sync::atomic::fence(order) } else { plain::fence(order) }
}

pub(crate) fn spin_loop() {
    if is_watching() { loom::thread::yield_now() } else { core::hint::spin_loop() }
}

fn is_watching() -> bool {
    WORLD.with(|world| world.watching.get()) && !std::thread::panicking()
}

/// One access by loom, behind a fence if it is sequentially consistent.
fn ordered<R>(order: Ordering, access: impl FnOnce() -> R) -> R {
    if order == Ordering::SeqCst {
        loom::sync::atomic::fence(order);
    }
    access()
}

macro_rules! atomic {
    ($name:ident $(<$of:ident>)?, $value:ty, $to_bits:expr, $from_bits:expr) => {
        #[repr(transparent)]
        pub(crate) struct $name $(<$of>)? (plain::$name $(<$of>)?);

        impl $(<$of>)? core::fmt::Debug for $name $(<$of>)? {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl $(<$of>)? Default for $name $(<$of>)? {
            fn default() -> Self {
                Self::new($from_bits(0))
            }
        }

        impl $(<$of>)? $name $(<$of>)? {
            const ACCESS: Access = Access { read: Self::read_bits, write: Self::write_bits };

            pub(crate) const fn new(value: $value) -> Self {
                Self(plain::$name::new(value))
            }

            unsafe fn at<'a>(addr: usize) -> &'a plain::$name $(<$of>)? {
                // SAFETY: the caller knows that such an atomic is there.
                unsafe { &*core::ptr::with_exposed_provenance(addr) }
            }

            unsafe fn read_bits(addr: usize) -> u64 {
                // SAFETY: the contract is the same.
                $to_bits(unsafe { Self::at(addr) }.load(Ordering::Relaxed))
            }

            unsafe fn write_bits(addr: usize, bits: u64) {
                // SAFETY: the contract is the same.
                unsafe { Self::at(addr) }.store($from_bits(bits), Ordering::Relaxed)
            }

            fn watched(&self) -> Option<Seat> {
                watched((&raw const *self).expose_provenance(), Self::ACCESS)
            }

            pub(crate) fn load(&self, order: Ordering) -> $value {
                match self.watched() {
                    Some(seat) => $from_bits(seat.load(order)),
                    None => self.0.load(order),
                }
            }

            pub(crate) fn store(&self, value: $value, order: Ordering) {
                match self.watched() {
                    Some(seat) => seat.store($to_bits(value), order),
                    None => self.0.store(value, order),
                }
            }

            pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                match self.watched() {
                    Some(seat) => $from_bits(seat.swap($to_bits(value), order)),
                    None => self.0.swap(value, order),
                }
            }

            pub(crate) fn compare_exchange(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                let Some(seat) = self.watched() else {
                    return self.0.compare_exchange(old, new, success, failure);
                };
                seat.exchange($to_bits(old), $to_bits(new), success, failure).map($from_bits).map_err($from_bits)
            }

            pub(crate) fn compare_exchange_weak(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.compare_exchange(old, new, success, failure)
            }
        }
    };
}

macro_rules! arithmetic {
    ($name:ident, $value:ty, $($method:ident)*) => {
        impl $name {
            $(pub(crate) fn $method(&self, value: $value, order: Ordering) -> $value {
                match self.watched() {
                    Some(seat) => seat.change(order, |atomic| atomic.$method(value as u64, order)) as $value,
                    None => self.0.$method(value, order),
                }
            })*
        }
    };
}

atomic!(AtomicBool, bool, u64::from, |bits| bits != 0);
atomic!(AtomicU32, u32, u64::from, |bits| bits as u32);
atomic!(AtomicU64, u64, |value| value, |bits| bits);
atomic!(AtomicUsize, usize, |value| value as u64, |bits| bits as usize);
atomic!(AtomicPtr<T>, *mut T, |value: *mut T| value.expose_provenance() as u64, |bits| {
    core::ptr::with_exposed_provenance_mut(bits as usize)
});
arithmetic!(AtomicU32, u32, fetch_add fetch_sub fetch_and fetch_or fetch_max);
arithmetic!(AtomicU64, u64, fetch_add fetch_sub fetch_and fetch_or fetch_max);
arithmetic!(AtomicUsize, usize, fetch_add fetch_sub fetch_and fetch_or fetch_max);

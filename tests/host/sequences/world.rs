//! Runs one sequence on one kind of heap, and holds every answer against the shadow.
//!
//! What is checked after each operation: the block's place, length and bytes; that nothing overlaps; that a refusal
//! left the block as it was; that an ordinary context over a host provider that has memory, and does not fail, is never
//! refused. At each `Verify` and at the end: every block's bytes and every invariant. At the very end: after freeing,
//! draining and trimming, the provider has every run back as it was given.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::ptr::NonNull;
use std::rc::{Rc, Weak};

use smp_heap::cpu::CpuMode;
use smp_heap::{Heap, Hint, Pinned, Violation};

use super::machine::{Guess, Handler, Machine, Sure};
use super::pages::{Host, Pages, Regions, Source};
use super::shadow::{Block, Shadow};
use super::{Cpu, Cpus, Face, Failing, Interrupt, Mode, Op, Pick, Sequence, Setup, Size, Step};

/// What a sequence came to: that it was not about nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    /// Blocks allocated.
    pub(crate) served: u64,
    /// Requests refused.
    pub(crate) refused: u64,
    /// Blocks that changed their size where they stood, by `resize` or `remap`.
    pub(crate) in_place: u64,
    /// Blocks that moved, by `realloc` or `remap`.
    pub(crate) moved: u64,
    /// Interrupts that came at a call.
    pub(crate) at_calls: u64,
    /// Interrupts that came behind an instruction.
    pub(crate) at_instructions: u64,
    /// Calls of the provider, but for those at the very end.
    pub(crate) calls: u64,
    /// Those that were made to fail.
    pub(crate) failed: u64,
}

impl Report {
    /// Adds another sequence's.
    pub(crate) fn add(&mut self, other: Self) {
        self.served += other.served;
        self.refused += other.refused;
        self.in_place += other.in_place;
        self.moved += other.moved;
        self.at_calls += other.at_calls;
        self.at_instructions += other.at_instructions;
        self.calls += other.calls;
        self.failed += other.failed;
    }
}

/// A heap, its shadow, and the machine below both.
struct World<S: Source, C: CpuMode, const CPUS: usize> {
    heap: Heap<Pages<S>, C, CPUS>,
    machine: Rc<Machine>,
    shadow: Shadow,
    served: Cell<u64>,
    refused: Cell<u64>,
    in_place: Cell<u64>,
    moved: Cell<u64>,
}

/// Runs a sequence.
///
/// # Errors
/// What was wrong first.
pub(crate) fn run(sequence: &Sequence) -> Result<Report, String> {
    match sequence.setup.source {
        super::Source::Regions => with_source::<Regions>(sequence),
        super::Source::Plain => with_source::<Host<false, false>>(sequence),
        super::Source::Moving => with_source::<Host<false, true>>(sequence),
        super::Source::MovingReentrant => with_source::<Host<true, true>>(sequence),
    }
}

fn with_source<S: Source>(sequence: &Sequence) -> Result<Report, String> {
    match sequence.setup.cpus {
        Cpus::One => with_cpus::<S, 1>(sequence),
        Cpus::Two => with_cpus::<S, 2>(sequence),
        Cpus::Five => with_cpus::<S, 5>(sequence),
    }
}

fn with_cpus<S: Source, const CPUS: usize>(sequence: &Sequence) -> Result<Report, String> {
    let machine = Rc::new(Machine::new(CPUS));
    match sequence.setup.mode {
        Mode::Hint => World::<S, _, CPUS>::new(sequence.setup, Hint(Guess(machine.clone())), machine).run(sequence),
        Mode::Pinned => World::<S, _, CPUS>::new(sequence.setup, Pinned(Sure(machine.clone())), machine).run(sequence),
    }
}

fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

impl<S: Source, C: CpuMode + 'static, const CPUS: usize> World<S, C, CPUS> {
    fn new(setup: Setup, mode: C, machine: Rc<Machine>) -> Rc<Self> {
        let world = Rc::new(Self {
            heap: Heap::new(Pages::new(machine.clone(), setup.limit.bytes()), mode),
            machine,
            shadow: Shadow::new(),
            served: Cell::new(0),
            refused: Cell::new(0),
            in_place: Cell::new(0),
            moved: Cell::new(0),
        });
        let handler: Rc<dyn Handler> = world.clone();
        world.machine.call_on_interrupt(Rc::downgrade(&handler) as Weak<dyn Handler>);
        world
    }

    fn run(&self, sequence: &Sequence) -> Result<Report, String> {
        for (index, step) in sequence.steps.iter().enumerate() {
            self.step(*step).and_then(|()| self.machine.check()).map_err(|what| format!("step {index}: {what}"))?;
        }
        let calls = self.machine.calls.get();
        self.end().map_err(|what| format!("at the end: {what}"))?;
        Ok(Report {
            served: self.served.get(),
            refused: self.refused.get(),
            in_place: self.in_place.get(),
            moved: self.moved.get(),
            at_calls: self.machine.at_calls.get(),
            at_instructions: self.machine.at_instructions.get(),
            calls,
            failed: self.machine.failed.get(),
        })
    }

    fn step(&self, step: Step) -> Result<(), String> {
        match step {
            Step::Do(op) => self.op(op, None),
            Step::Interrupted(op, interrupt) => self.op(op, Some(interrupt)),
            Step::MoveTo(cpu) => {
                self.machine.move_to(cpu);
                Ok(())
            }
            Step::Trim(keep) => {
                self.heap.trim(usize::from(keep) << 10);
                Ok(())
            }
            Step::Verify => self.verify(),
            Step::AddMemory { pages, skew } => self.heap.provider().add(pages, skew),
            Step::Fail(failing) => {
                self.machine.fail(failing);
                Ok(())
            }
        }
    }

    fn usable_len(&self, start: NonNull<u8>, layout: Layout) -> usize {
        // SAFETY: asked of blocks in use only, each with its Layout.
        unsafe { self.heap.usable_len(start, layout) }
    }

    /// Checks every invariant.
    fn check_heap(&self) -> Result<(), Violation> {
        // SAFETY: one thread runs a sequence, and contexts that interrupt it have returned where it checks.
        unsafe { self.heap.verify_at_rest() }
    }

    fn verify(&self) -> Result<(), String> {
        self.check_heap().map_err(|violation| violation.to_string())?;
        self.shadow.blocks().try_for_each(|block| block.check(block.len))
    }

    /// Frees everything and sees all memory go back.
    fn end(&self) -> Result<(), String> {
        self.verify()?;
        self.machine.fail(Failing::Never);
        while let Some(block) = self.shadow.take(0) {
            self.free(block, false, None)?;
        }
        self.check_heap().map_err(|violation| format!("with all blocks free: {violation}"))?;
        for cpu in 0..=CPUS as u8 {
            self.machine.move_to(Cpu(cpu));
            self.heap.drain_current();
        }
        // SAFETY: as for the check.
        unsafe { self.heap.trim_at_rest() };
        self.check_heap().map_err(|violation| format!("trimmed: {violation}"))?;
        match (self.heap.stats().held_len, self.heap.provider().held_len()) {
            (0, 0) => self.machine.check(),
            (heap, provider) => Err(format!("the heap holds {heap} bytes, the provider gave {provider}")),
        }
    }

    /// One operation. What comes in between, and what it does itself, is not interrupted.
    fn op(&self, op: Op, interrupt: Option<Interrupt>) -> Result<(), String> {
        match op {
            Op::Alloc { size, align, face } => {
                // A Layout that cannot be is nothing that can be asked for.
                let layout = Layout::from_size_align(size.bytes(), align.bytes());
                layout.map_or(Ok(()), |layout| self.alloc(layout, face, interrupt))
            }
            Op::Free(pick) => self.with(pick, |block| self.free(block, pick.0 % 2 == 0, interrupt)),
            Op::Realloc(pick, size) => self.with(pick, |block| self.realloc(block, size, interrupt)),
            Op::Resize(pick, size) => self.with(pick, |block| self.resize(block, size, interrupt)),
            Op::Remap(pick, size) => self.with(pick, |block| self.remap(block, size, interrupt)),
            Op::DrainCurrent => {
                self.during(interrupt, || self.heap.drain_current());
                Ok(())
            }
            Op::Drain => {
                self.during(interrupt, || self.heap.drain());
                Ok(())
            }
            Op::Stats => {
                let stats = self.during(interrupt, || self.heap.stats());
                (stats.stray_count == 0).then_some(()).ok_or_else(|| format!("{} stray frees", stats.stray_count))
            }
        }
    }

    fn during<R>(&self, interrupt: Option<Interrupt>, work: impl FnOnce() -> R) -> R {
        match interrupt {
            Some(interrupt) => self.machine.interrupted(interrupt, work),
            None => work(),
        }
    }

    /// Works on the block picked, which is out of the table meanwhile: whatever comes in between does not touch it.
    fn with(&self, pick: Pick, work: impl FnOnce(Block) -> Result<(), String>) -> Result<(), String> {
        self.shadow.take(pick.0.into()).map_or(Ok(()), work)
    }

    /// Fills a block and keeps it; frees it at once if there is no place.
    fn keep(&self, block: Block) -> Result<(), String> {
        block.fill();
        match self.shadow.keep(block) {
            Some(block) => self.free(block, false, None),
            None => Ok(()),
        }
    }

    /// A refusal, by a provider that has `layout` and more.
    fn refuse(&self, layout: Layout, had_enough: bool) -> Result<(), String> {
        count(&self.refused);
        if had_enough { Err(format!("{layout:?} was refused, with memory to be had")) } else { Ok(()) }
    }

    /// Whether the provider has so much that the request must be served: the block, its alignment, and descriptors.
    fn must_serve(&self, layout: Layout, interrupt: Option<Interrupt>) -> bool {
        let need = layout.size().saturating_add(layout.align()).saturating_add(layout.size() / 16 + (128 << 10));
        interrupt.is_none() && !self.machine.is_inside() && self.heap.provider().has(need)
    }

    fn alloc(&self, layout: Layout, face: Face, interrupt: Option<Interrupt>) -> Result<(), String> {
        let had_enough = self.must_serve(layout, interrupt);
        // `GlobalAlloc` is not asked for nothing.
        let global = || {
            // SAFETY: the size is not 0.
            let start = NonNull::new(unsafe { GlobalAlloc::alloc(&self.heap, layout) })?;
            Some(NonNull::slice_from_raw_parts(start, self.usable_len(start, layout)))
        };
        let work = || match face {
            Face::Global if layout.size() > 0 => global(),
            Face::Zeroed => self.heap.alloc_zeroed(layout).ok(),
            _ => self.heap.alloc(layout).ok(),
        };
        let Some(block) = self.during(interrupt, work) else { return self.refuse(layout, had_enough) };
        count(&self.served);
        let block = self.admit(block, layout)?;
        if matches!(face, Face::Zeroed) {
            block.check_zero()?;
        }
        self.keep(block)
    }

    fn admit(&self, block: NonNull<[u8]>, layout: Layout) -> Result<Block, String> {
        let (start, len) = (block.cast(), block.len());
        let usable_len = self.usable_len(start, layout);
        if usable_len != len {
            return Err(format!("{len} bytes may be used at {start:?}, then {usable_len}"));
        }
        self.shadow.admit(start, len, layout)
    }

    fn free(&self, block: Block, global: bool, interrupt: Option<Interrupt>) -> Result<(), String> {
        block.check(block.len)?;
        let Block { start, layout, .. } = block;
        self.during(interrupt, || {
            if global && layout.size() > 0 {
                // SAFETY: the block is this heap's, of that Layout, and out of the table, so that nobody uses it.
                unsafe { GlobalAlloc::dealloc(&self.heap, start.as_ptr(), layout) };
            } else {
                // SAFETY: as above.
                unsafe { self.heap.free(start, layout) };
            }
        });
        Ok(())
    }

    fn realloc(&self, block: Block, size: Size, interrupt: Option<Interrupt>) -> Result<(), String> {
        block.check(block.len)?;
        let new = Layout::from_size_align(size.bytes(), block.layout.align());
        let had_enough = new.as_ref().is_ok_and(|new| self.must_serve(*new, interrupt));
        // SAFETY: the block is this heap's, of that Layout, and used by nobody meanwhile.
        let work = || unsafe { self.heap.realloc(block.start, block.layout, size.bytes()) };
        match (self.during(interrupt, work), new) {
            (Ok(changed), Ok(new)) => {
                count(if changed.cast() == block.start { &self.in_place } else { &self.moved });
                self.changed(block, changed, new)
            }
            (Ok(changed), Err(_)) => Err(format!("{changed:?} for {} bytes", size.bytes())),
            (Err(_), new) => self.unchanged(block, new.unwrap_or(block.layout), had_enough),
        }
    }

    fn resize(&self, block: Block, size: Size, interrupt: Option<Interrupt>) -> Result<(), String> {
        block.check(block.len)?;
        let new = Layout::from_size_align(size.bytes(), block.layout.align());
        // SAFETY: the block is this heap's, of that Layout, and used by nobody meanwhile.
        let done = self.during(interrupt, || unsafe { self.heap.resize(block.start, block.layout, size.bytes()) });
        match (done, new) {
            (true, Ok(new)) => {
                count(&self.in_place);
                let changed = NonNull::slice_from_raw_parts(block.start, self.usable_len(block.start, new));
                self.changed(block, changed, new)
            }
            (true, Err(_)) => Err(format!("{block:?} was resized to {} bytes", size.bytes())),
            (false, _) => self.unchanged(block, block.layout, false),
        }
    }

    fn remap(&self, block: Block, size: Size, interrupt: Option<Interrupt>) -> Result<(), String> {
        block.check(block.len)?;
        let new = Layout::from_size_align(size.bytes(), block.layout.align());
        // SAFETY: the block is this heap's, of that Layout, and used by nobody meanwhile.
        let work = || unsafe { self.heap.remap(block.start, block.layout, size.bytes()) };
        match (self.during(interrupt, work), new) {
            (Some(changed), Ok(new)) => {
                count(if changed.cast() == block.start { &self.in_place } else { &self.moved });
                self.changed(block, changed, new)
            }
            (Some(changed), Err(_)) => Err(format!("{changed:?} for {} bytes", size.bytes())),
            (None, _) => self.unchanged(block, block.layout, false),
        }
    }

    /// The block has a new size, perhaps at a new place: its bytes came along.
    fn changed(&self, old: Block, block: NonNull<[u8]>, layout: Layout) -> Result<(), String> {
        old.at(block.cast()).check(old.layout.size().min(layout.size()))?;
        let block = self.admit(block, layout)?;
        self.keep(block)
    }

    /// The block stayed as it was.
    fn unchanged(&self, block: Block, asked: Layout, had_enough: bool) -> Result<(), String> {
        block.check(block.len)?;
        self.refuse(asked, had_enough)?;
        match self.shadow.keep(block) {
            Some(block) => self.free(block, false, None),
            None => Ok(()),
        }
    }
}

impl<S: Source, C: CpuMode + 'static, const CPUS: usize> Handler for World<S, C, CPUS> {
    fn interrupted(&self, interrupt: Interrupt) {
        for op in interrupt.ops {
            if let Err(what) = self.op(op, None) {
                self.machine.report(format!("in between: {what}"));
            }
        }
    }
}

//! Models: small programs over the shipped code that a checker runs in every order.
//!
//! ```text
//! cargo test --test models                           all, each to the end of its bound
//! cargo test --test models -- slab                   some
//! LOOM_MAX_PREEMPTIONS=4 cargo test --test models    further
//! ```
//! A model builds its part of the heap, runs some threads on it [together](crate::base::sync::model::together), and
//! then checks that nothing is lost. What else is found while they run: accesses to a block, and to memory that was
//! given away, that nothing orders; loops without end. Nested contexts are
//! [interruptions](crate::base::sync::model::interrupted): at each access of the interrupted work, one after the other.
//!
//! Each model must be seen to fail: `tests/plants` breaks the shipped code, one line at a time, and says which model
//! noticed.

#![expect(unsafe_code, reason = "models write to blocks")]
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::std_instead_of_core,
    reason = "these run on a host, and a failed check ends a model, which is what a model is for"
)]

/// A model's name, and the model.
pub type Model = (&'static str, fn());

/// All models.
pub fn all() -> impl Iterator<Item = Model> {
    [slab::MODELS, cache::MODELS, gate::MODELS, pages::MODELS, panic_reserve::MODELS, nested::MODELS, trim::MODELS]
        .into_iter()
        .flatten()
        .copied()
}

/// Names the models of a file.
macro_rules! models {
    ($($name:ident)*) => {
        pub(super) const MODELS: &[super::Model] = &[$((concat!(module_path!(), "::", stringify!($name)), $name)),*];
    };
}

mod cache;
mod gate;
mod nested;
mod pages;
mod panic_reserve;
mod slab;
mod trim;

use core::alloc::Layout;
use core::ptr::NonNull;
use std::boxed::Box;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::println;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use std::vec::Vec;

use crate::base::size_class::SizeClass;
use crate::base::sync::model::{Learned, reset};
use crate::base::sync::write;
use crate::contract::provider::PageRun;
use crate::pages::{Mapping, Pages, Provided, Use, Want};
use crate::slab::block::Block;

/// How many executions are run between two looks at how many there were.
const CHECKPOINT: usize = 500;

/// Runs a model in every order of its threads' accesses with up to `preemptions` preemptions; `LOOM_MAX_PREEMPTIONS`
/// overrides that.
pub(crate) fn explore(preemptions: usize, model: impl Fn() + 'static) {
    explore_some(preemptions, usize::MAX, model);
}

/// The same, but for a model that is too large: about `most` executions and no more; `LOOM_MAX_PERMUTATIONS` overrides
/// that.
pub(crate) fn explore_some(preemptions: usize, most: usize, model: impl Fn() + 'static) {
    let start = Instant::now();
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 50_000;
    builder.checkpoint_interval = CHECKPOINT;
    let most = *builder.max_permutations.get_or_insert(most);
    let preemptions = *builder.preemption_bound.get_or_insert(preemptions);
    let model = Arc::new(Alone(model));
    loop {
        let executions = Arc::new(AtomicU64::new(0));
        let (model, counter) = (Arc::clone(&model), Arc::clone(&executions));
        let explored = catch_unwind(AssertUnwindSafe(|| {
            builder.check(move || {
                counter.fetch_add(1, Ordering::Relaxed);
                reset();
                model.run();
            });
        }));
        let executions = executions.load(Ordering::Relaxed);
        match explored {
            Ok(()) => {
                let end = if executions + CHECKPOINT as u64 > most as u64 { ", stopped there" } else { "" };
                println!("{executions} executions, {preemptions} preemptions, {:.1?}{end}", start.elapsed());
                return;
            }
            Err(reason) if reason.is::<Learned>() => {}
            Err(reason) => {
                println!("broken in execution {executions}");
                reset();
                resume_unwind(reason);
            }
        }
    }
}

/// A model as loom wants it.
struct Alone<F>(F);

// SAFETY: loom runs all threads of a model on the thread that explores it, one execution after the other.
unsafe impl<F> Send for Alone<F> {}
// SAFETY: as above.
unsafe impl<F> Sync for Alone<F> {}

impl<F: Fn()> Alone<F> {
    fn run(&self) {
        (self.0)();
    }
}

/// Room for a value, at the same address in each execution of a model.
pub(crate) struct Place<T>(*mut T);

impl<T> Place<T> {
    pub(crate) fn new() -> Self {
        Self(Box::into_raw(Box::<T>::new_uninit()).cast())
    }

    /// Puts a value there, in place of the last execution's.
    pub(crate) fn fill(&self, value: T) -> &'static T {
        // SAFETY: leaked memory for one `T`; what the last execution referred to there is no longer used.
        unsafe { self.0.write(value) };
        // SAFETY: just written; nobody writes it again in this execution.
        unsafe { &*self.0 }
    }

    /// Puts a copy of another place's value there, which was filled and never used: a model's stack is too short for a
    /// heap to pass over it.
    pub(crate) fn fill_from(&self, unused: &Self) -> &'static T {
        // SAFETY: both are leaked memory for one `T`; the copied value is never used or dropped itself, so that it is
        // one value still.
        unsafe { self.0.copy_from_nonoverlapping(unused.0, 1) };
        // SAFETY: just written; nobody writes it again in this execution.
        unsafe { &*self.0 }
    }
}

/// A page heap over one chunk, at the same addresses in each execution.
pub(crate) struct Ground {
    pages: Place<Pages<1>>,
    memory: NonNull<u8>,
}

impl Ground {
    pub(crate) const LEN: usize = 4096;

    pub(crate) fn new() -> Self {
        Self { pages: Place::new(), memory: memory(Self::LEN) }
    }

    pub(crate) fn renew(&self) -> &'static Pages<1> {
        let pages = self.pages.fill(Pages::new());
        let nothing = Want { len: 0, least_len: 0, align: 1, use_: Use::Slab };
        let run = PageRun::new(Self::LEN, 4096, 4096).unwrap();
        // SAFETY: leaked memory of that length, which only this page heap uses in this execution.
        pages
            .add_chunk(unsafe { Mapping::new(self.memory, run) }, nothing, 0, Provided::UNKNOWN, &|work| work(true))
            .unwrap();
        pages
    }
}

/// Leaked memory, page-aligned.
pub(crate) fn memory(len: usize) -> NonNull<u8> {
    // SAFETY: a length above 0.
    NonNull::new(unsafe { std::alloc::alloc_zeroed(Layout::from_size_align(len, 4096).unwrap()) }).unwrap()
}

pub(crate) fn class(size: usize) -> SizeClass {
    SizeClass::of(Layout::from_size_align(size, 1).unwrap()).unwrap()
}

/// What threads of a model gather, to be looked at when all are done. No access to it is watched.
pub(crate) struct Kept<T>(Arc<Mutex<Vec<T>>>);

impl<T> Clone for Kept<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Kept<T> {
    pub(crate) fn new() -> Self {
        Self(Arc::default())
    }

    pub(crate) fn add(&self, one: T) {
        self.0.lock().unwrap().push(one);
    }

    pub(crate) fn take(&self) -> Vec<T> {
        core::mem::take(&mut *self.0.lock().unwrap())
    }
}

/// What a block's user does with it.
pub(crate) fn used(block: Block) -> Block {
    // SAFETY: the token says that the block is ours; it is at least 8 bytes long.
    unsafe { write(block.start().cast::<u64>().as_ptr(), 0xa5) };
    block
}

/// A thread of a model.
pub(crate) fn spawn(work: impl FnOnce() + 'static) -> Box<dyn FnOnce()> {
    Box::new(work)
}

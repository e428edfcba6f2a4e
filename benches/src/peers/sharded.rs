//! Heaps of `no_std` Rust with something per CPU.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::hint::spin_loop;
use std::panic::Location;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use ax_sync::interface::{AcquireResult, ContextState, LockMetadata, SpinOps};
use buddy_slab_allocator::interface::BuddySlabIf;
use buddy_slab_allocator::{GlobalAllocator, PerCpuSlab, SlabPoolTrait, StaticSlabPool};
use wf_alloc::{ThreadToken, WfSpanAllocator};

use super::{Kind, MAX_THREADS, Peer, calls_of};
use crate::memory::{REGION_LEN, region};

thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
}

fn enter(thread: usize) {
    CPU.set(thread);
}

const PAGE_LEN: usize = 4096;

static SLABS: StaticSlabPool<PAGE_LEN, MAX_THREADS> = StaticSlabPool::new(
    [
        PerCpuSlab::new(0),
        PerCpuSlab::new(1),
        PerCpuSlab::new(2),
        PerCpuSlab::new(3),
        PerCpuSlab::new(4),
        PerCpuSlab::new(5),
        PerCpuSlab::new(6),
        PerCpuSlab::new(7),
        PerCpuSlab::new(8),
        PerCpuSlab::new(9),
        PerCpuSlab::new(10),
        PerCpuSlab::new(11),
        PerCpuSlab::new(12),
        PerCpuSlab::new(13),
        PerCpuSlab::new(14),
        PerCpuSlab::new(15),
    ],
    || CPU.get(),
);

struct Platform;

#[ax_crate_interface::impl_interface]
impl BuddySlabIf for Platform {
    fn virt_to_phys(vaddr: usize) -> usize {
        vaddr
    }

    fn slab_pool() -> &'static dyn SlabPoolTrait {
        &SLABS
    }
}

/// The lock of `buddy-slab-allocator`, whose operations its kernel has to bring: a plain spin lock.
struct PlainSpin;

#[ax_crate_interface::impl_interface]
impl SpinOps for PlainSpin {
    fn acquire(
        locked: &AtomicBool,
        _metadata: &LockMetadata,
        _lock_addr: usize,
        _context: u8,
        _subclass: u32,
        _caller: &'static Location<'static>,
    ) -> ContextState {
        while locked.swap(true, Ordering::Acquire) {
            while locked.load(Ordering::Relaxed) {
                spin_loop();
            }
        }
        ContextState::new(0, 0)
    }

    fn try_acquire(
        locked: &AtomicBool,
        _metadata: &LockMetadata,
        _lock_addr: usize,
        _context: u8,
        _subclass: u32,
        _caller: &'static Location<'static>,
    ) -> AcquireResult {
        AcquireResult::new(!locked.swap(true, Ordering::Acquire), ContextState::new(0, 0))
    }

    fn release(locked: &AtomicBool, _lock_addr: usize, _context: u8, _state: ContextState) {
        locked.store(false, Ordering::Release);
    }

    fn force_release(locked: &AtomicBool, _lock_addr: usize, _context: u8) {
        locked.store(false, Ordering::Release);
    }

    fn is_locked(locked: &AtomicBool) -> bool {
        locked.load(Ordering::Relaxed)
    }
}

static BUDDY_SLAB: GlobalAllocator<PAGE_LEN> = GlobalAllocator::new();

fn open_buddy_slab() {
    // SAFETY: the region is this heap's alone, for good.
    let memory = unsafe { std::slice::from_raw_parts_mut(region(REGION_LEN).as_ptr(), REGION_LEN) };
    // SAFETY: the only call, before any allocation.
    unsafe { BUDDY_SLAB.init(memory) }.expect("buddy-slab-allocator takes the region");
}

type WaitFree = WfSpanAllocator<{ wf_alloc::MAX_SUPPORTED_CLASSES }>;

/// The token interface, the thread's number as the token.
struct ByToken(OnceLock<WaitFree>);

static WAIT_FREE: ByToken = ByToken(OnceLock::new());

fn token() -> ThreadToken {
    ThreadToken { id: CPU.get() }
}

// SAFETY: the heap gives blocks as `GlobalAlloc` wants them; each thread uses a token of its own.
unsafe impl GlobalAlloc for ByToken {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(heap) = self.0.get() else { return ptr::null_mut() };
        // SAFETY: the heap was initialised, the token is this thread's.
        unsafe { heap.alloc_with_token(layout, token()) }
    }

    #[inline]
    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        let Some(heap) = self.0.get() else { return };
        // SAFETY: the contract is the same.
        unsafe { heap.dealloc_with_token(start, layout, token()) }
    }
}

fn open_wait_free() {
    let heap = WAIT_FREE.0.get_or_init(|| WaitFree::new(MAX_THREADS));
    // SAFETY: the only call, on a heap that stays where it is; the region is its alone, for good.
    unsafe { heap.init(region(REGION_LEN).as_ptr(), REGION_LEN) };
}

pub(super) const PEERS: [Peer; 2] = [
    Peer {
        name: "wf_alloc",
        about: "wf_alloc by its token interface",
        kind: Kind::Peer,
        calls: calls_of!(WAIT_FREE),
        open: open_wait_free,
        enter,
        provider_cost: None,
        describe: None,
        program: None,
    },
    Peer {
        name: "buddy-slab",
        about: "buddy-slab-allocator, a slab pool for each thread",
        kind: Kind::Peer,
        calls: calls_of!(BUDDY_SLAB),
        open: open_buddy_slab,
        enter,
        provider_cost: None,
        describe: None,
        program: None,
    },
];

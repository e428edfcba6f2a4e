//! The heaps of today's small kernels: one heap behind one spin lock, the same lock for all.

use std::alloc::{GlobalAlloc, Layout};
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};

use spin::Mutex;

use super::{Kind, Peer, calls_of, no_entry};
use crate::memory::{REGION_LEN, region};

/// A heap behind a spin lock.
struct Locked<H>(Mutex<H>);

/// What a heap behind the lock can do.
trait Single {
    fn take(&mut self, layout: Layout) -> *mut u8;
    unsafe fn give(&mut self, start: NonNull<u8>, layout: Layout);

    /// A longer or shorter block with the same content, if the heap knows a better way than to copy.
    unsafe fn change(&mut self, start: NonNull<u8>, layout: Layout, new_size: usize) -> Option<NonNull<u8>> {
        let _ = (start, layout, new_size);
        None
    }
}

fn or_null(start: Option<NonNull<u8>>) -> *mut u8 {
    start.map_or(ptr::null_mut(), NonNull::as_ptr)
}

// SAFETY: the heap inside gives blocks as `GlobalAlloc` wants them, one caller at a time.
unsafe impl<H: Single> GlobalAlloc for Locked<H> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.lock().take(layout)
    }

    #[inline]
    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        if let Some(start) = NonNull::new(start) {
            // SAFETY: the contract is the same.
            unsafe { self.0.lock().give(start, layout) };
        }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let changed = NonNull::new(start).and_then(|start| {
            // SAFETY: the contract is the same.
            unsafe { self.0.lock().change(start, layout, new_size) }
        });
        if let Some(start) = changed {
            return start.as_ptr();
        }
        let new = super::layout(new_size, layout.align());
        let block = self.0.lock().take(new);
        if !block.is_null() {
            // SAFETY: both blocks are at least that long, and two.
            unsafe { block.copy_from_nonoverlapping(start, layout.size().min(new_size)) };
            // SAFETY: the contract is the same.
            unsafe { self.dealloc(start, layout) };
        }
        block
    }
}

impl Single for linked_list_allocator::Heap {
    fn take(&mut self, layout: Layout) -> *mut u8 {
        or_null(self.allocate_first_fit(layout).ok())
    }

    unsafe fn give(&mut self, start: NonNull<u8>, layout: Layout) {
        // SAFETY: the contract is the same.
        unsafe { self.deallocate(start, layout) }
    }
}

type Tlsf = rlsf::Tlsf<'static, u32, u32, 32, 32>;

impl Single for Tlsf {
    fn take(&mut self, layout: Layout) -> *mut u8 {
        or_null(self.allocate(layout))
    }

    unsafe fn give(&mut self, start: NonNull<u8>, layout: Layout) {
        // SAFETY: the contract is the same.
        unsafe { self.deallocate(start, layout.align()) }
    }

    unsafe fn change(&mut self, start: NonNull<u8>, layout: Layout, new_size: usize) -> Option<NonNull<u8>> {
        // SAFETY: the contract is the same.
        unsafe { self.reallocate(start, super::layout(new_size, layout.align())) }
    }
}

type Buddy = buddy_system_allocator::Heap<33>;

impl Single for Buddy {
    fn take(&mut self, layout: Layout) -> *mut u8 {
        or_null(self.alloc(layout).ok())
    }

    unsafe fn give(&mut self, start: NonNull<u8>, layout: Layout) {
        // SAFETY: the contract is the same.
        unsafe { self.dealloc(start, layout) }
    }
}

static LINKED_LIST: Locked<linked_list_allocator::Heap> = Locked(Mutex::new(linked_list_allocator::Heap::empty()));
static TALC: talc::TalcLock<Mutex<()>, talc::source::Manual> = talc::TalcLock::new(talc::source::Manual);
static TLSF: Locked<Tlsf> = Locked(Mutex::new(Tlsf::new()));
static BUDDY: Locked<Buddy> = Locked(Mutex::new(Buddy::empty()));

fn open_linked_list() {
    // SAFETY: the region is this heap's alone, for good.
    unsafe { LINKED_LIST.0.lock().init(region(REGION_LEN).as_ptr(), REGION_LEN) };
}

fn open_talc() {
    // SAFETY: the region is this heap's alone, for good.
    let claimed = unsafe { TALC.lock().claim(region(REGION_LEN).as_ptr(), REGION_LEN) };
    claimed.expect("talc takes the region");
}

fn open_tlsf() {
    let start = region(REGION_LEN).cast::<MaybeUninit<u8>>().as_ptr();
    // SAFETY: the region is this heap's alone, for good.
    let memory = unsafe { std::slice::from_raw_parts_mut(start, REGION_LEN) };
    TLSF.0.lock().insert_free_block(memory);
}

fn open_buddy() {
    // SAFETY: the region is this heap's alone, for good.
    unsafe { BUDDY.0.lock().init(region(REGION_LEN).as_ptr().expose_provenance(), REGION_LEN) };
}

pub(super) const PEERS: [Peer; 4] = [
    Peer {
        name: "talc",
        about: "talc behind one spin lock",
        kind: Kind::Peer,
        calls: calls_of!(TALC),
        open: open_talc,
        enter: no_entry,
        provider_cost: None,
        describe: None,
        program: None,
    },
    Peer {
        name: "rlsf",
        about: "rlsf (TLSF) behind one spin lock",
        kind: Kind::Peer,
        calls: calls_of!(TLSF),
        open: open_tlsf,
        enter: no_entry,
        provider_cost: None,
        describe: None,
        program: None,
    },
    Peer {
        name: "buddy",
        about: "buddy_system_allocator behind one spin lock",
        kind: Kind::Peer,
        calls: calls_of!(BUDDY),
        open: open_buddy,
        enter: no_entry,
        provider_cost: None,
        describe: None,
        program: None,
    },
    Peer {
        name: "linked_list",
        about: "linked_list_allocator behind one spin lock",
        kind: Kind::Peer,
        calls: calls_of!(LINKED_LIST),
        open: open_linked_list,
        enter: no_entry,
        provider_cost: None,
        describe: None,
        program: None,
    },
];

//! What is handed out once: memory set aside for a panic.

use core::ptr::NonNull;
use std::vec::Vec;

use super::{Kept, Place, explore, memory, spawn};
use crate::base::sync::model::together;
use crate::base::sync::write;
use crate::heap::panic_reserve::{Emergency, GAP_LEN};

models! {
    panic_memory_is_handed_out_once
}

/// Three contexts report at once. A context that interrupts another one is one of these orders: it runs to its end in
/// the middle of the other.
fn panic_memory_is_handed_out_once() {
    const LEN: usize = 64;
    let (reserve, memory) = (Place::new(), memory(2 * GAP_LEN).as_ptr().expose_provenance());
    explore(4, move || {
        let (reserve, kept) = (reserve.fill(Emergency::new()), Kept::new());
        let start = NonNull::new(core::ptr::with_exposed_provenance_mut(memory)).unwrap();
        reserve.provide(NonNull::slice_from_raw_parts(start, 2 * GAP_LEN)).unwrap();
        reserve.begin();
        let take = || {
            let kept = kept.clone();
            spawn(move || {
                let block = reserve.take(LEN, LEN).unwrap().cast::<u64>();
                // SAFETY: it was handed out to this context, or so it says.
                unsafe { write(block.as_ptr(), 0xa5) };
                kept.add(block);
            })
        };
        together(Vec::from([take(), take(), take()]));
        let mut all = kept.take();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 3, "each block once");
    });
}

//! Level 2 of hardening: what reports and leak reports tell, and two frees at once.

use std::alloc::{GlobalAlloc, Layout};
use std::fmt::Write;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::{AtRest, Books, ThreadCpu, play_cpu};
use crate::stress::on_threads;
use smp_heap::battery::Filled;
use smp_heap::{Heap, Hint, Misuse, Pinned, Report, Site};

type Tested = Heap<Books, Pinned<ThreadCpu>, 4>;

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, 8).unwrap()
}

fn heap() -> Tested {
    play_cpu(0);
    Heap::new(Books::default(), Pinned(ThreadCpu))
}

fn line_of(site: Site) -> u32 {
    match site {
        Site::Line(line) if line.file().ends_with("debug_heap.rs") => line.line(),
        _ => panic!("{site}"),
    }
}

static REPORTS: Mutex<Vec<Report>> = Mutex::new(Vec::new());

#[test]
fn a_report_tells_who_allocated_and_who_freed_and_how_long_ago() {
    let heap = heap();
    heap.set_report_hook(|report| REPORTS.lock().unwrap().push(*report));
    let others = |count| {
        (0..count).for_each(|_| Filled::new(&heap, layout(24), 1).unwrap().unwrap().free().unwrap());
    };
    others(3);
    let (block, allocated) = (heap.alloc(layout(100)).unwrap().cast::<u8>(), line!());
    others(10);
    let freed = line!() + 2;
    // SAFETY: allocated above.
    unsafe { heap.free(block, layout(100)) };
    // SAFETY: none: that is what is tested. The block waits in quarantine, or is back, with its frame.
    unsafe { heap.free(block, layout(100)) };
    let report = REPORTS.lock().unwrap()[0];
    let told = report.block.unwrap();
    assert_eq!((report.misuse, report.addr), (Misuse::DoubleFree, block.addr().get()));
    assert_eq!((told.size, told.align, line_of(told.allocated), line_of(told.freed)), (100, 8, allocated, freed));
    assert_eq!(told.age, 11, "itself and ten more");
    let printed = report.to_string();
    assert!(printed.contains(&format!("debug_heap.rs:{allocated}")) && printed.contains("100 B"), "{printed}");
}

static RETURN_ADDRESS: AtomicUsize = AtomicUsize::new(0);

#[test]
fn a_hook_says_where_the_global_allocator_was_called() {
    let heap = heap();
    let get = |site| {
        RETURN_ADDRESS.store(site, Ordering::Relaxed);
        // SAFETY: the size is not 0.
        unsafe { GlobalAlloc::alloc(&heap, layout(40)) };
    };
    get(1);
    heap.set_site_hook(|| RETURN_ADDRESS.load(Ordering::Relaxed));
    (0..3).for_each(|_| get(0x1000));
    get(0x2000);
    let mut sites: Vec<_> = heap.leaks(0).sites().map(|leak| (leak.count, leak.len, leak.site)).collect();
    sites.sort_by_key(|(_, _, site)| if let Site::Code(addr) = site { *addr } else { 0 });
    assert_eq!(sites, [(1, 40, Site::Unknown), (3, 120, Site::Code(0x1000)), (1, 40, Site::Code(0x2000))]);
}

/// Takes text without allocating, as long as there is room.
struct Fixed([u8; 2048], usize);

impl Write for Fixed {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let place = self.0.get_mut(self.1..self.1 + text.len()).ok_or(std::fmt::Error)?;
        place.copy_from_slice(text.as_bytes());
        self.1 += text.len();
        Ok(())
    }
}

#[test]
fn leaks_are_told_by_class_site_and_age() {
    let heap = heap();
    let leak = |size| heap.alloc(layout(size)).unwrap();
    let site = line!() - 1;
    (0..7).for_each(|_| {
        leak(600);
    });
    leak(100_000);
    let young = Filled::new(&heap, layout(600), 1).unwrap().unwrap();
    Filled::new(&heap, layout(50), 1).unwrap().unwrap().free().unwrap();
    let leaks = heap.leaks(0);
    assert_eq!((leaks.count(), leaks.classes.last(), leaks.other_count), (9, Some(&1), 0));
    let own: Vec<_> =
        leaks.sites().filter(|leak| matches!(leak.site, Site::Line(line) if line.line() == site)).collect();
    assert_eq!(own.len(), 1);
    assert_eq!((own[0].count, own[0].len, own[0].age), (8, 104_200, (10, 3)));
    assert_eq!(heap.leaks(4).count(), 7, "only the old ones");
    let mut text = Fixed([0; 2048], 0);
    write!(text, "{leaks}").unwrap();
    let text = std::str::from_utf8(&text.0[..text.1]).unwrap();
    assert!(text.contains(&format!("debug_heap.rs:{site}")) && text.contains("104200"), "{text}");
    young.free().unwrap();
}

/// Looks for a moment without giving up the CPU, so that both go on at the same time.
fn wait_for(arrived: &AtomicUsize, count: usize) {
    let mut looks = 0;
    while arrived.load(Ordering::Acquire) < count {
        looks += 1;
        if looks < 5_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}

/// Of two contexts that free a block at the same time, exactly one does.
#[test]
fn of_two_frees_at_once_one_is_reported() {
    const ROUNDS: usize = 20_000;
    let heap: Heap<_, _, 4> = Heap::new(Books::default(), Hint(ThreadCpu));
    let places: Vec<_> = (0..ROUNDS).map(|_| AtomicUsize::new(0)).collect();
    let arrived: Vec<_> = (0..ROUNDS).map(|_| AtomicUsize::new(0)).collect();
    on_threads(2, |index| {
        for (place, arrived) in places.iter().zip(&arrived) {
            if index == 0 {
                let block = heap.alloc(layout(64)).unwrap().cast::<u8>();
                place.store(block.as_ptr().expose_provenance(), Ordering::Release);
            }
            arrived.fetch_add(1, Ordering::AcqRel);
            wait_for(arrived, 2);
            let block = std::ptr::with_exposed_provenance_mut(place.load(Ordering::Acquire));
            // SAFETY: none, for the second one: that is what is tested.
            unsafe { heap.free(NonNull::new(block).unwrap(), layout(64)) };
            arrived.fetch_add(1, Ordering::AcqRel);
            wait_for(arrived, 4);
        }
    });
    assert_eq!(heap.misuse_count(Misuse::DoubleFree), ROUNDS as u64);
    heap.drain();
    heap.verify_all().unwrap();
    assert_eq!(heap.leaks(0).count(), 0);
    assert_eq!(heap.stats().live_len(), 0);
}

/// What a slab's blocks were says nothing of what other blocks are in the same memory later on.
#[test]
fn memory_that_becomes_something_else_is_no_write_after_free() {
    let heap = heap();
    let keep = heap.alloc(layout(200_000)).unwrap();
    for size in [64, 1500, 300, 64, 2500, 700, 64, 1500].into_iter().cycle().take(64) {
        let blocks: Vec<_> = (0..400).map(|_| Filled::new(&heap, layout(size), 9).unwrap().unwrap()).collect();
        blocks.into_iter().for_each(|block| block.free().unwrap());
        heap.trim(usize::MAX);
    }
    let reported: Vec<_> = Misuse::ALL.map(|misuse| heap.misuse_count(misuse)).into();
    assert_eq!(reported, [0; 8]);
    // SAFETY: allocated above.
    unsafe { heap.free(keep.cast(), layout(200_000)) };
}

//! A program whose memory comes from the operating system, and goes back to it: `cargo run --release --example mmap`.
//!
//! It fills 64 MiB with blocks of mixed sizes, frees nine of ten at random, then the rest, and says after each step
//! what the process has. The provider is in `provider.rs`.

#[cfg(target_os = "linux")]
mod provider;

#[cfg(target_os = "linux")]
fn main() -> Result<(), std::io::Error> {
    use core::alloc::Layout;
    use core::ptr::NonNull;
    use provider::{Mmap, resident_len};
    use smp_heap::battery::Random;
    use smp_heap::cpu::UnknownCpu;
    use smp_heap::{Heap, Hint};

    static HEAP: Heap<Mmap, Hint<UnknownCpu>, 1> = Heap::new(Mmap::new(), Hint(UnknownCpu));

    let before = resident_len()?;
    let tell = |step: &str, live_len: usize| -> Result<(), std::io::Error> {
        let mib = |len: usize| len as f64 / f64::from(1 << 20);
        let (resident, addresses) = (mib(resident_len()?.saturating_sub(before)), mib(HEAP.provider().mapped_len()));
        println!("{step:<22} {:>6.1} MiB live, {resident:>6.1} resident, {addresses:>6.1} of addresses", mib(live_len));
        Ok(())
    };
    let mut random = Random::new(1);
    let (mut blocks, mut live_len) = (Vec::new(), 0);
    while live_len < 64 << 20 {
        let most = 8 << random.below(11);
        let size = 8 + random.below(most);
        let layout = Layout::from_size_align(size, 8).map_err(std::io::Error::other)?;
        let block = HEAP.alloc(layout).map_err(std::io::Error::other)?.cast::<u8>();
        // SAFETY: a block of that size, just allocated.
        unsafe { block.write_bytes(1, size) };
        blocks.push((block, layout));
        live_len += size;
    }
    tell("filled", live_len)?;
    let mut free = |count: usize, blocks: &mut Vec<(NonNull<u8>, Layout)>| {
        for _ in 0..count {
            let (block, layout) = blocks.swap_remove(random.below(blocks.len()));
            // SAFETY: allocated with that layout, and taken out of the list of blocks in use.
            unsafe { HEAP.free(block, layout) };
            live_len -= layout.size();
        }
        live_len
    };
    let nine_tenths = blocks.len() / 10 * 9;
    tell("nine of ten freed", free(nine_tenths, &mut blocks))?;
    HEAP.trim(0);
    tell("and trimmed", free(0, &mut blocks))?;
    let rest = blocks.len();
    tell("all freed, no trim", free(rest, &mut blocks))?;
    HEAP.trim(0);
    tell("and trimmed", 0)
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("This example asks Linux for its pages.");
}

//! Sizes as kernels ask for them.

use smp_heap::battery::Random;

/// Mostly a few small sizes, so that everybody meets in the same classes; now and then any size up to 8 KiB; one in 256
/// is a page run.
pub(crate) fn random_size(random: &mut Random) -> usize {
    const USUAL: [usize; 8] = [16, 24, 48, 64, 100, 200, 512, 1024];
    match random.below(256) {
        0 => 33 * 1024 + random.below(64 * 1024),
        1..=31 => 8 + random.below(8 * 1024),
        other => USUAL.get(other % USUAL.len()).copied().unwrap_or(8),
    }
}

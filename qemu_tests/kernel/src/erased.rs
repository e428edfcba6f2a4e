//! Closures that assembly calls.

/// A closure for assembly to call, once.
pub(crate) struct Erased<F>(Option<F>);

impl<F: FnOnce()> Erased<F> {
    pub(crate) fn new(work: F) -> Self {
        Self(Some(work))
    }

    /// The function to call, and its argument.
    pub(crate) fn parts(&mut self) -> (unsafe extern "C" fn(*mut u8), *mut u8) {
        unsafe extern "C" fn run<F: FnOnce()>(work: *mut u8) {
            // SAFETY: `parts` gives this function together with a pointer to such a value.
            if let Some(work) = unsafe { &mut *work.cast::<Option<F>>() }.take() {
                work();
            }
        }
        (run::<F>, (&raw mut self.0).cast())
    }
}

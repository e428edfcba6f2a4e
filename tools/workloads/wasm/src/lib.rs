//! A Markdown renderer as a WebAssembly module: `pulldown-cmark` over Rust's standard library and its allocator, which
//! live inside the linear memory.
//!
//! The module imports nothing. Its memory grows by `memory.grow` as the document needs, so the interpreter that runs it
//! has to move and zero a large block several times per document: that is what makes it a load for a kernel heap.
//!
//! Calls, in order: `input(len)` gives the address where the host writes the document; `render()` gives the HTML's
//! length; `output()` its address.

use std::cell::RefCell;

thread_local! {
    /// The document and what became of it.
    static STATE: RefCell<(Vec<u8>, String)> = const { RefCell::new((Vec::new(), String::new())) };
}

/// Makes room for a document of `len` bytes and tells where.
#[unsafe(no_mangle)]
pub extern "C" fn input(len: usize) -> *mut u8 {
    STATE.with_borrow_mut(|(document, _)| {
        document.clear();
        document.resize(len, 0);
        document.as_mut_ptr()
    })
}

/// Renders the document; the HTML's length, or -1 where the document is not UTF-8.
#[unsafe(no_mangle)]
pub extern "C" fn render() -> isize {
    STATE.with_borrow_mut(|(document, html)| {
        let Ok(text) = std::str::from_utf8(document) else { return -1 };
        html.clear();
        pulldown_cmark::html::push_html(html, pulldown_cmark::Parser::new_ext(text, pulldown_cmark::Options::all()));
        html.len() as isize
    })
}

/// Where the HTML stands.
#[unsafe(no_mangle)]
pub extern "C" fn output() -> *const u8 {
    STATE.with_borrow(|(_, html)| html.as_ptr())
}

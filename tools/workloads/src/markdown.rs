//! A WebAssembly interpreter that renders Markdown: the engine translates a 200 KiB module into its own code, then
//! gives the instance a linear memory that grows by a page at a time, by reallocation of a block of more than a
//! mebibyte.

use crate::{
    Product, Sum,
    documents::{MARKDOWN_WASM, RUSTC_ERRORS},
};
use alloc::{boxed::Box, vec};
use wasmi::{Engine, Linker, Module, Store};

/// How many parts the document is cut into, each a page to render.
pub(crate) const PARTS: usize = 3;

/// The sums of the HTML, per part.
pub(crate) const GOLDEN: [u64; PARTS] = [0x3318_4be6_d8b8_2bbe, 0xc170_2b57_80a5_cf3d, 0x9006_d416_e0fe_89c0];

/// Part `input` of the document, cut at a heading of the first level.
pub(crate) fn part(input: usize) -> Option<&'static str> {
    let text = RUSTC_ERRORS.text;
    let cut = |part: usize| {
        let near = text.get(..text.len() * part / PARTS)?;
        Some(near.rfind("\n# E").map_or(0, |at| at + 1))
    };
    let end = if input + 1 < PARTS { cut(input + 1)? } else { text.len() };
    text.get(cut(input)?..end)
}

/// Loads the module anew and has it render one part.
pub(crate) fn make(input: usize) -> Option<Product> {
    let page = part(input)?;
    let engine = Engine::default();
    let module = Module::new(&engine, MARKDOWN_WASM).ok()?;
    let mut store = Store::new(&engine, ());
    let instance = Linker::new(&engine).instantiate_and_start(&mut store, &module).ok()?;
    let memory = instance.get_memory(&store, "memory")?;
    let at = instance.get_typed_func::<i32, i32>(&store, "input").ok()?;
    let at = at.call(&mut store, i32::try_from(page.len()).ok()?).ok()?;
    memory.write(&mut store, usize::try_from(at).ok()?, page.as_bytes()).ok()?;
    let len = instance.get_typed_func::<(), i32>(&store, "render").ok()?.call(&mut store, ()).ok()?;
    let from = instance.get_typed_func::<(), i32>(&store, "output").ok()?.call(&mut store, ()).ok()?;
    let mut html = vec![0; usize::try_from(len).ok()?];
    memory.read(&store, usize::try_from(from).ok()?, &mut html).ok()?;
    let mut sum = Sum::new();
    sum.bytes(&html);
    Some(Product { units: page.len() as u64, checksum: sum.get(), keep: Box::new((store, module, html)) })
}

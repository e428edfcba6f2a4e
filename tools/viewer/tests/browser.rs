//! The page in a browser: drawn as it should be, steered by its script, without an error and without a network.
//!
//! `cargo test -p smp-heap-view --features browser --test browser`, with chromium installed. A browser with a remote
//! control would need a driver of its own version and a client for it; here a test adds a script to its copy of the
//! page that points and clicks, and reads what became of the document, and of the picture.
#![expect(
    clippy::std_instead_of_core,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a failed check ends a test, which is what a test is for"
)]

use std::{
    alloc::Layout,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use smp_heap::{Heap, Hint, RegionProvider, cpu::UnknownCpu};
use smp_heap_view::{Dump, page, parse};

fn chromium() -> PathBuf {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let path = env::var_os("PATH").unwrap_or_default();
    let places = || env::split_paths(&path).flat_map(|dir| names.map(|name| dir.join(name)));
    let named = env::var_os("CHROMIUM").map(PathBuf::from);
    named
        .into_iter()
        .chain(places())
        .find(|file| file.is_file())
        .expect("no chromium in PATH (or CHROMIUM): run ./setup --browser")
}

/// The dumps of a heap that fills and empties: five brief ones, one with the map, one more at the end.
fn dumps() -> Vec<Dump> {
    let heap: Heap<RegionProvider<1>, Hint<UnknownCpu>, 4> = Heap::new(RegionProvider::new(), Hint(UnknownCpu));
    let memory = Box::leak(vec![0_u8; 8 << 20].into_boxed_slice());
    // SAFETY: leaked, so nobody else uses it.
    unsafe { heap.provider().add_region(memory.as_mut_ptr(), memory.len()) }.unwrap();
    let mut blocks = Vec::new();
    let mut log = String::new();
    for step in 0..6_u64 {
        for size in
            [24, 100, 640, 3000, 9000, 50_000].into_iter().flat_map(|size: usize| (0..60_000 / size).map(move |_| size))
        {
            let layout = Layout::from_size_align(size, 8).unwrap();
            blocks.push((heap.alloc(layout).unwrap(), layout));
        }
        let brief = heap.dump(step * 500_000).brief();
        log += &if step == 5 { format!("kernel: {}\n", heap.dump(step * 500_000)) } else { format!("{brief}\n") };
    }
    for (index, (block, layout)) in blocks.into_iter().enumerate() {
        if index % 10 != 0 {
            // SAFETY: just allocated with that Layout, and used no more.
            unsafe { heap.free(block.cast(), layout) };
        }
    }
    log += &heap.dump(3_000_000).to_string();
    parse(&log).unwrap()
}

/// Opens the page with a script added to it, at an address's end, in a window so wide; gives the document afterwards,
/// and the file of the picture.
fn open(name: &str, dumps: &[Dump], script: &str, end: &str, width: u32) -> (String, PathBuf) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join("page.html");
    let added = format!("<script>const $ = query => document.querySelector(query);\n{script}</script></body>");
    fs::write(&file, page(dumps, "a test's heap").replace("</body>", &added)).unwrap();
    let picture = folder.join("page.png");
    let run = |what: &str| {
        let output = Command::new(chromium())
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"])
            .args(["--force-device-scale-factor=1", "--proxy-server=127.0.0.1:9", "--virtual-time-budget=3000"])
            .arg(format!("--user-data-dir={}", folder.join("profile").display()))
            .arg(format!("--window-size={width},2600"))
            .arg(what)
            .arg(format!("file://{}{end}", file.display()))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "chromium failed: {said}");
        let complaints: Vec<&str> = said.lines().filter(|line| line.contains(":CONSOLE")).collect();
        assert!(complaints.is_empty(), "the page complains: {complaints:#?}");
        String::from_utf8(output.stdout).unwrap()
    };
    run(&format!("--screenshot={}", picture.display()));
    (run("--dump-dom"), picture)
}

/// What the added script put down for the test.
fn noted<'a>(document: &'a str, key: &str) -> &'a str {
    let rest = document.split_once(&format!("data-{key}=\"")).unwrap_or_else(|| panic_without(key, document)).1;
    rest.split_once('"').unwrap().0
}

fn panic_without(key: &str, document: &str) -> ! {
    panic!("no data-{key} in {}", document.get(..2000).unwrap_or(document))
}

/// How many pixels of a picture are within a hair of each colour.
fn count_pixels(picture: &Path, colours: &[[u8; 3]]) -> Vec<usize> {
    let mut reader = png::Decoder::new(std::io::BufReader::new(fs::File::open(picture).unwrap())).read_info().unwrap();
    let mut buffer = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut buffer).unwrap();
    let pixels = buffer[..info.buffer_size()].chunks_exact(info.color_type.samples());
    let near = |pixel: &[u8], colour: &[u8; 3]| pixel.iter().zip(colour).all(|(one, other)| one.abs_diff(*other) <= 3);
    pixels.fold(vec![0; colours.len()], |mut counts, pixel| {
        counts.iter_mut().zip(colours).for_each(|(count, colour)| *count += usize::from(near(pixel, colour)));
        counts
    })
}

/// The colours of 112-byte, 640-byte and 10-KiB blocks, as the page's style has them.
fn colours(page: &str) -> Vec<[u8; 3]> {
    [112, 640, 10_240]
        .iter()
        .map(|size| {
            let hex = page.split_once(&format!(".b{size} {{ --c: #")).expect("the class's colour").1;
            [0, 2, 4].map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        })
        .collect()
}

#[test]
fn the_last_dump_is_shown_and_drawn() {
    let dumps = dumps();
    let (document, picture) = open(
        "drawn",
        &dumps,
        r#"
        const shown = [...document.querySelectorAll('section[data-d]')].filter(part => part.offsetHeight > 0);
        document.body.dataset.sections = shown.map(part => part.dataset.d).join();
        document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
        const half = $('.on .r[data-t*="Slab"] .u').getBoundingClientRect();
        document.body.dataset.size = Math.round(half.width) + 'x' + Math.round(half.height);
    "#,
        "",
        1280,
    );
    assert_eq!((noted(&document, "shown"), noted(&document, "sections")), ("6", "6,6"));
    assert_eq!(noted(&document, "wide"), "false", "nothing hangs out of the window");
    let (width, height) = noted(&document, "size").split_once('x').unwrap();
    assert!(width.parse::<u32>().unwrap() > 5 && height.parse::<u32>().unwrap() > 0, "{width} x {height}");
    let counts = count_pixels(&picture, &colours(&page(&dumps, "")));
    assert!(counts.iter().all(|count| *count > 60), "pixels of the classes' colours: {counts:?}");
}

#[test]
fn the_address_the_chart_and_the_slider_choose_a_dump() {
    let dumps = dumps();
    let (first, picture) = open("steered", &dumps, "", "#dump=6", 1280);
    assert_eq!(noted(&first, "shown"), "5");
    // The heap was full then: more of the map is coloured.
    let (_, last) = open("steered_last", &dumps, "", "", 1280);
    let (full, empty) =
        (count_pixels(&picture, &colours(&page(&dumps, ""))), count_pixels(&last, &colours(&page(&dumps, ""))));
    assert!(full.iter().sum::<usize>() > 2 * empty.iter().sum::<usize>(), "{full:?} full, {empty:?} empty");
    let (document, _) = open(
        "clicked",
        &dumps,
        r#"
        const seen = [];
        const note = () => seen.push(document.body.dataset.shown);
        $('[data-go="2"]').dispatchEvent(new MouseEvent('click', { bubbles: true })); note();
        $('.steer input').value = 4; $('.steer input').dispatchEvent(new Event('input')); note();
        dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft' })); note();
        dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' })); note();
        document.body.dataset.seen = seen.join();
        document.body.dataset.said = $('.steer output').textContent;
        const is_seen = mark => getComputedStyle(mark).visibility == 'visible';
        document.body.dataset.marks = [...document.querySelectorAll('.mark')].filter(is_seen).length;
    "#,
        "",
        1280,
    );
    assert_eq!((noted(&document, "seen"), noted(&document, "said")), ("2,4,3,4", "5 of 7, at 2000 ms"));
    assert_eq!(noted(&document, "marks"), "3", "one in each chart");
}

#[test]
fn pointing_tells_and_a_chip_leaves_one_size() {
    let (document, _) = open(
        "pointed",
        &dumps(),
        r#"
        const run = [...document.querySelectorAll('.on .r')].find(run => run.dataset.t.startsWith('Slab of 112'));
        const at = { bubbles: true, clientX: 50, clientY: 60 };
        run.querySelector('rect').dispatchEvent(new MouseEvent('mousemove', at));
        document.body.dataset.tip = $('.tip').style.display + ': ' + $('.tip b').textContent;
        const chip = $('.on .chip[data-c="b112"]');
        const is_lit = run => getComputedStyle(run).opacity == 1;
        const lit = () => [...document.querySelectorAll('.on .r')].filter(is_lit).length;
        const before = lit(); chip.click(); const only = lit(); chip.click();
        const of112 = document.querySelectorAll('.on .r.b112').length;
        document.body.dataset.lit = [before > only, only == of112, only > 0, lit() == before].join();
    "#,
        "",
        1280,
    );
    assert_eq!(noted(&document, "tip"), "block: Slab of 112-byte blocks");
    assert_eq!(noted(&document, "lit"), "true,true,true,true");
}

#[test]
fn a_narrow_window_has_everything_within_it() {
    let script = "document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;";
    let (document, _) = open("narrow", &dumps(), script, "", 500);
    assert_eq!(noted(&document, "wide"), "false");
}

//! Random sequences of operations against a shadow heap: any kind of heap, any CPU, any context, any fault. See
//! `sequences` for what is checked.
//!
//! Promises shown: 1 (nested contexts come back), 2, 3 (all memory back), 5 (failing providers), 6 (every Layout).
//!
//! `PROPTEST_CASES=100000` runs that many; `PROPTEST_RNG_SEED` repeats a run. A failing sequence is made as short as it
//! gets and printed, and its seed is kept in `random_sequences.txt` beside this file.

use std::cell::RefCell;
use std::path::Path;

use arbitrary::{Arbitrary, Unstructured};
use proptest::prelude::{Just, Strategy, any, prop, prop_oneof};
use proptest::test_runner::{Config, FileFailurePersistence, TestCaseError, TestRunner};

use crate::sequences::{
    Align, At, Cpu, Cpus, Face, Failing, Interrupt, Kinds, Limit, Mode, Op, Pick, Report, Sequence, Setup, Size,
    Source, Step, run,
};

/// Sequences for each kind of heap.
const CASES: u32 = 48;

/// Steps of one sequence at most.
const STEPS: usize = 160;

fn size() -> impl Strategy<Value = Size> {
    any::<u16>().prop_map(Size)
}

fn pick() -> impl Strategy<Value = Pick> {
    any::<u8>().prop_map(Pick)
}

fn op() -> impl Strategy<Value = Op> {
    let face = prop_oneof![Just(Face::Plain), Just(Face::Zeroed), Just(Face::Global)];
    let alloc = (size(), any::<u8>().prop_map(Align), face);
    prop_oneof![
        13 => alloc.prop_map(|(size, align, face)| Op::Alloc { size, align, face }),
        9 => pick().prop_map(Op::Free),
        3 => (pick(), size()).prop_map(|(pick, size)| Op::Realloc(pick, size)),
        2 => (pick(), size()).prop_map(|(pick, size)| Op::Resize(pick, size)),
        2 => (pick(), size()).prop_map(|(pick, size)| Op::Remap(pick, size)),
        1 => Just(Op::DrainCurrent),
        1 => Just(Op::Drain),
        1 => Just(Op::Stats),
    ]
}

fn cpu() -> impl Strategy<Value = Cpu> {
    any::<u8>().prop_map(Cpu)
}

/// Near as often as far: most operations are over soon, and each instruction that is walked takes a signal.
fn instruction() -> impl Strategy<Value = u16> {
    prop_oneof![0_u16..32, 32_u16..128, 128_u16..512, 512..At::LONGEST]
}

fn interrupt() -> impl Strategy<Value = Interrupt> {
    let at = prop_oneof![any::<u8>().prop_map(At::Call), instruction().prop_map(At::Instruction)];
    let ops = [op(), op(), op()];
    (at, prop::option::of(cpu()), ops).prop_map(|(at, cpu, ops)| Interrupt { at, cpu, ops })
}

fn failing() -> impl Strategy<Value = Failing> {
    let kinds = || prop_oneof![Just(Kinds::Map), Just(Kinds::Unmap), Just(Kinds::Change), Just(Kinds::Any)];
    // One call in a hundred, in ten, in two.
    let share = prop_oneof![Just(3_u8), Just(26), Just(128), any::<u8>()];
    prop_oneof![
        Just(Failing::Never),
        (kinds(), 0_u16..32).prop_map(|(kinds, count)| Failing::Once(kinds, count)),
        (kinds(), share).prop_map(|(kinds, share)| Failing::Share(kinds, share)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        18 => op().prop_map(Step::Do),
        6 => (op(), interrupt()).prop_map(|(op, interrupt)| Step::Interrupted(op, interrupt)),
        3 => cpu().prop_map(Step::MoveTo),
        1 => any::<u8>().prop_map(Step::Trim),
        1 => Just(Step::Verify),
        2 => (any::<u8>(), any::<u16>()).prop_map(|(pages, skew)| Step::AddMemory { pages, skew }),
        1 => failing().prop_map(Step::Fail),
    ]
}

/// A provider that fails from the first call on, and often: without it, sequences in which nothing happens to fail are
/// common enough that all of a run's can be such.
fn failing_at_once() -> impl Strategy<Value = Step> {
    let kinds = prop_oneof![Just(Kinds::Map), Just(Kinds::Any)];
    (kinds, 26_u8..=128).prop_map(|(kinds, share)| Step::Fail(Failing::Share(kinds, share)))
}

/// Sequences on heaps of one kind, every third with a provider that fails at once.
fn sequences(mode: Mode, source: Source) -> impl Strategy<Value = Sequence> {
    let cpus = prop_oneof![Just(Cpus::One), Just(Cpus::Two), Just(Cpus::Five)];
    let setup = (cpus, any::<u8>().prop_map(Limit)).prop_map(move |(cpus, limit)| Setup { mode, cpus, source, limit });
    let at_once = prop_oneof![1 => failing_at_once().prop_map(Some), 2 => Just(None)];
    (setup, prop::collection::vec(step(), 1..STEPS), at_once)
        .prop_map(|(setup, steps, at_once)| Sequence { setup, steps: at_once.into_iter().chain(steps).collect() })
}

/// So many cases, unless `PROPTEST_CASES` says another number.
pub(crate) fn cases(count: u32) -> Config {
    let told = std::env::var_os("PROPTEST_CASES").is_some();
    let config = Config::default();
    Config { cases: if told { config.cases } else { count }, ..config }
}

/// Runs random sequences on one kind of heap, and gives what they came to.
fn explore(mode: Mode, source: Source) -> Report {
    let mut config = cases(CASES);
    config.source_file = Some(file!());
    config.failure_persistence = Some(Box::new(FileFailurePersistence::WithSource("txt")));
    config.max_shrink_iters = 20_000;
    let sum = RefCell::new(Report::default());
    let result = TestRunner::new(config).run(&sequences(mode, source), |sequence| {
        let report = run(&sequence).map_err(TestCaseError::fail)?;
        sum.borrow_mut().add(report);
        Ok(())
    });
    let sum = sum.into_inner();
    println!("{sum:?}");
    result.unwrap();
    sum
}

/// Every kind of thing that a sequence can meet was met.
fn assert_not_about_nothing(sum: Report) {
    let Report { served, refused, in_place, moved, at_calls, at_instructions, failed, .. } = sum;
    let steps = cfg!(all(target_arch = "x86_64", target_os = "linux"));
    assert!(served > 0 && refused > 0 && in_place > 0 && moved > 0 && at_calls > 0 && failed > 0, "{sum:?}");
    assert!(at_instructions > 0 || !steps, "{sum:?}");
}

#[test]
fn sequences_with_hints_over_regions() {
    assert_not_about_nothing(explore(Mode::Hint, Source::Regions));
}

#[test]
fn sequences_pinned_over_regions() {
    assert_not_about_nothing(explore(Mode::Pinned, Source::Regions));
}

#[test]
fn sequences_with_hints_over_a_plain_provider() {
    assert_not_about_nothing(explore(Mode::Hint, Source::Plain));
}

#[test]
fn sequences_pinned_over_a_plain_provider() {
    assert_not_about_nothing(explore(Mode::Pinned, Source::Plain));
}

#[test]
fn sequences_with_hints_over_a_provider_that_moves_runs() {
    assert_not_about_nothing(explore(Mode::Hint, Source::Moving));
    assert_not_about_nothing(explore(Mode::Hint, Source::MovingReentrant));
}

#[test]
fn sequences_pinned_over_a_provider_that_moves_runs() {
    assert_not_about_nothing(explore(Mode::Pinned, Source::Moving));
    assert_not_about_nothing(explore(Mode::Pinned, Source::MovingReentrant));
}

/// What the fuzz target found worth keeping, every input that ever failed among it: `fuzz/seeds`.
#[test]
fn the_seeds_of_the_fuzz_target_pass() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    let mut sum = Report::default();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let sequence = Sequence::arbitrary(&mut Unstructured::new(&bytes)).unwrap();
        sum.add(run(&sequence).unwrap_or_else(|what| panic!("{}: {what}\n{sequence:#?}", path.display())));
    }
    println!("{sum:?}");
    assert_not_about_nothing(sum);
}

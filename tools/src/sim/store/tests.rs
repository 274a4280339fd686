//! The command: what it refuses, and that a sweep is complete and in order.

use clap::Parser;

use super::super::options::PolicyName;
use super::super::reference::tests::{conversations, trace_of};
use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

fn options(arguments: &[&str]) -> Result<Options, String> {
    let line = Line::try_parse_from(["store", "trace.jsonl"].iter().chain(arguments))
        .map_err(|error| error.to_string())?;
    line.options.check().map_err(|error| format!("{error:#}"))?;
    Ok(line.options)
}

/// A number without sense would be simulated to the end, and printed with three digits.
#[test]
fn senseless_options_are_refused() {
    for (arguments, says) in [
        (&["--workers", "0"][..], "--workers"),
        (&["--workers", "100000000"], "--workers"),
        (&["--speed=-1"], "--speed"),
        (&["--link-rate", "1e-300"], "--link-rate"),
        (&["--flops-linear", "1e300"], "--flops-linear"),
        (&["--flops-rate", "1e-300"], "--flops-rate"),
        (&["--seconds-per-token", "1e9"], "--seconds-per-token"),
        (&["--speed", "NaN"], "--speed"),
        (&["--flops-rate", "0"], "--flops-rate"),
        (&["--pinned", "12 parsecs"], "no size"),
        (&["--limit", "0"], "--limit"),
        (&["--devices", "0", "--nvme", "1TiB"], "--devices"),
        (&["--model", "reference", "--nvme", "1TiB"], "one tier"),
        (&["--chunk-bytes", "3%"], "--chunk-bytes"),
        (&["--open-loop", "--closed-loop"], "--open-loop"),
        (&["--policy", "belady"], "belady"),
        (&["--tokens-per-block", "0"], "--tokens-per-block"),
        (&["--seconds-per-token", "1e-5", "--flops-rate", "1e15"], "--flops-rate"),
    ] {
        let error = options(arguments).unwrap_err();
        assert!(error.contains(says), "{arguments:?}: {error}");
    }
}

/// A tier that is rounded to a few large chunks would not be of the size that was asked for.
#[test]
fn tiers_have_the_size_that_was_asked_for() {
    let trace = trace_of(&conversations(1, 3000));
    let options = options(&["--nvme", "50%"]).unwrap();
    for percent in [3.0, 10.0, 40.0] {
        let size = Size::Share(percent / 100.0);
        let hardware = options.hardware(&trace, (size, size), Policy::Lru).unwrap();
        let asked = size.frames(1, trace.distinct());
        let near = |frames: u64| frames.abs_diff(asked) * 50 <= asked;
        assert!(near(hardware.pinned_frames()), "{percent} %: {} of {asked}", hardware.pinned_frames());
        assert!(near(hardware.nvme_frames()), "{percent} %: {} of {asked}", hardware.nvme_frames());
        let frame_bytes = hardware.block_bytes + HEADER_PAGE_BYTES;
        assert!(hardware.chunk_bytes % frame_bytes < frame_bytes, "less than a frame is stranded");
    }
    let tiny = options.hardware(&trace, (Size::Bytes(100), Size::Bytes(0)), Policy::Lru);
    assert!(tiny.unwrap_err().to_string().contains("holds no block"));
}

/// A point of a sweep could be lost, or a result stand beside another's size, when several threads replay.
#[test]
fn a_sweep_is_complete_and_in_order() {
    let trace = trace_of(&conversations(2, 300));
    for model in ["node", "reference"] {
        let sweep = ["--sweep", "1%,5%,50%", "--policy", "lru,fifo", "--model", model, "--threads", "3"];
        let mut options = options(&sweep).unwrap();
        let runs = replay_all(&options, &trace).unwrap();
        let order: Vec<_> = runs.iter().map(|run| (run.policy, run.pinned_name.clone())).collect();
        let sizes = ["1 %", "5 %", "50 %"].map(str::to_owned);
        let policies = [PolicyName::Lru, PolicyName::Fifo].map(PolicyName::policy);
        let expected: Vec<_> =
            policies.iter().flat_map(|policy| sizes.iter().map(|size| (*policy, size.clone()))).collect();
        assert_eq!(order, expected);
        options.threads = Some(1);
        let again = replay_all(&options, &trace).unwrap();
        for (run, same) in runs.iter().zip(&again) {
            assert_eq!(run.outcome, same.outcome, "{model}, {}", run.pinned_name);
            assert_eq!(run.json()["requests"], 300);
        }
        assert!(runs[0].outcome.token_ratio() < runs[2].outcome.token_ratio());
    }
}

/// A sweep without sizes failed on every trace of fewer than 1,000 distinct blocks, whose thousandth is none.
#[test]
fn a_sweep_of_a_short_trace_begins_where_a_block_fits() {
    let trace = trace_of(&conversations(3, 40));
    assert!(trace.distinct() < 1000, "{}", trace.distinct());
    for model in ["node", "reference"] {
        let runs = replay_all(&options(&["--sweep", "--model", model]).unwrap(), &trace).unwrap();
        assert!((2..9).contains(&runs.len()), "{}", runs.len());
        assert!(runs.iter().all(|run| run.pinned_frames > 0));
    }
}

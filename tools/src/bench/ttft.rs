//! `bench ttft`: time to first token of a 1,000-token prompt, first and second time.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{bail, ensure};
use terrace_worker::kv::KvSequence;
use terrace_worker::model::{Model, ModelOptions, Outcome, Scratch, WantLogits};

use super::{Line, Options, ask, median, prompt, stand};

/// Tokens of a prompt.
const PROMPT_TOKENS: usize = 1000;
/// Prompts, each with a beginning of its own.
const ROUNDS: u64 = 5;
/// What everything but the tail's computation may take, in milliseconds.
const OVERHEAD_MS_MAX: f64 = 30.0;
/// How many times faster the second answer must begin.
const SPEEDUP_MIN: f64 = 15.0;
/// Tokens of one prefill pass.
const CHUNK_TOKENS: usize = 128;

pub(super) async fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let model = super::model_path(options)?;
    let home = stand::temp_dir(options)?;
    let node = stand::Node::start(home.path(), &model, &[])?;
    let client = ask::client()?;
    let url = &node.running.url;
    // Page tables, caches and connections are not what is measured.
    ask::ask(&client, url, &prompt::tokens(&model, 1, 64)?, 2).await?;
    let seed = prompt::fresh_seed();
    let (mut first, mut second, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let mut cached = 0;
    for round in 0..ROUNDS {
        let tokens = prompt::tokens(&model, seed + round, PROMPT_TOKENS)?;
        let cold = ask::ask(&client, url, &tokens, 8).await?;
        let warm = ask::ask(&client, url, &tokens, 8).await?;
        ensure!(cold.prompt_tokens == 1000, "the router counts {} tokens of 1,000", cold.prompt_tokens);
        ensure!(cold.text == warm.text, "the cached answer differs: {:?} and {:?}", cold.text, warm.text);
        ensure!(warm.cached_tokens > 0, "nothing of the second prompt came from the cache");
        cached = warm.cached_tokens;
        first.push(cold.first.as_secs_f64() * 1e3);
        second.push(warm.first.as_secs_f64() * 1e3);
        ratios.push(cold.first.as_secs_f64() / warm.first.as_secs_f64());
    }
    drop(node);
    let tail = PROMPT_TOKENS.saturating_sub(usize::try_from(cached)?);
    let tail_ms = tail_ms(&model, tail)?;
    Ok(vec![
        Line::plain("ttft_first", median(&first), "ms"),
        Line::plain("ttft_tail_tokens", f64::from(u32::try_from(tail)?), "tokens"),
        Line::plain("ttft_tail_prefill", tail_ms, "ms"),
        Line::at_most("ttft_second", median(&second), tail_ms + OVERHEAD_MS_MAX, "ms"),
        Line::speedup("ttft_speedup", median(&ratios), SPEEDUP_MIN),
    ])
}

/// Time to compute the last `tail` tokens behind the others, in this process
/// and with nothing else running, in milliseconds.
fn tail_ms(path: &Path, tail: usize) -> anyhow::Result<f64> {
    let model = Model::open_with(path, ModelOptions::detect())?;
    let tokens = prompt::tokens(path, 2, PROMPT_TOKENS)?;
    let (head, tail) = tokens.split_at(PROMPT_TOKENS - tail);
    let mut scratch = Scratch::new();
    let mut kv = KvSequence::new(model.geometry());
    kv.reserve_private(PROMPT_TOKENS);
    let mut forward = |tokens: &[u32], kv: &mut KvSequence, want| match model.forward(
        &mut scratch,
        tokens,
        kv,
        want,
        &AtomicBool::new(false),
    )? {
        Outcome::Done => Ok(()),
        Outcome::Cancelled => bail!("nobody cancels"),
    };
    for chunk in head.chunks(CHUNK_TOKENS) {
        forward(chunk, &mut kv, WantLogits::No)?;
    }
    let mut times = Vec::new();
    for _ in 0..7 {
        let began = Instant::now();
        forward(tail, &mut kv, WantLogits::Last)?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
        kv.rewind(head.len());
    }
    Ok(median(&times))
}

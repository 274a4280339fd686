//! `bench worker`: how fast the model runs on two threads.

use terrace_worker::model::{Model, ModelOptions, measure};

use super::{Line, Options, median};

/// Prompt tokens of one round.
const PREFILL_TOKENS: usize = 1024;
/// Generated tokens of one round.
const DECODE_TOKENS: usize = 64;
/// Rounds.
const ROUNDS: usize = 5;
/// Prefill tokens per second that two quiet cores must reach with the default model.
const PREFILL_RATE_MIN: f64 = 300.0;

pub(super) fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let path = super::model_path(options)?;
    let model = Model::open_with(&path, ModelOptions { threads: 2, ..ModelOptions::detect() })?;
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let round = measure(&model, PREFILL_TOKENS, DECODE_TOKENS)?;
        prefill.push(round.prefill_rate());
        decode.push(round.decode_rate());
    }
    Ok(vec![
        Line::at_least("worker_prefill_rate", median(&prefill), PREFILL_RATE_MIN, "tokens/s"),
        Line::plain("worker_decode_rate", median(&decode), "tokens/s"),
    ])
}

//! Speed of a model on this machine, as `terrace bench worker` prints it.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::{ForwardError, Model, Outcome, Scratch, WantLogits};
use crate::kv::KvSequence;

// Tokens per prefill pass of the measurement; the service's chunk is the same.
const CHUNK_TOKENS: usize = 128;

/// What was measured, in wall-clock time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measurement {
    /// Prompt tokens.
    pub prefill_tokens: usize,
    /// Time that they took.
    pub prefill_time: Duration,
    /// Tokens generated one by one behind the prompt.
    pub decode_tokens: usize,
    /// Time that they took.
    pub decode_time: Duration,
}

impl Measurement {
    /// Prompt tokens per second.
    pub fn prefill_rate(&self) -> f64 {
        self.prefill_tokens as f64 / self.prefill_time.as_secs_f64()
    }

    /// Generated tokens per second of one sequence.
    pub fn decode_rate(&self) -> f64 {
        self.decode_tokens as f64 / self.decode_time.as_secs_f64()
    }
}

/// Prefills `prefill` tokens into private memory in chunks of 128, then decodes
/// `decode` tokens behind them. The tokens are arbitrary but always the same.
///
/// # Errors
/// If both together exceed the model's context.
///
/// # Panics
/// Never: nobody can cancel the passes.
pub fn measure(model: &Model, prefill: usize, decode: usize) -> Result<Measurement, ForwardError> {
    let never = AtomicBool::new(false);
    let mut scratch = Scratch::new();
    let mut kv = KvSequence::new(model.geometry());
    kv.reserve_private(prefill + decode);
    let vocabulary = u32::try_from(model.shape().vocabulary).unwrap_or(u32::MAX).max(1);
    let prompt: Vec<u32> = (0..).map(|at: u32| at.wrapping_mul(7919) % vocabulary).take(prefill).collect();

    let start = Instant::now();
    for chunk in prompt.chunks(CHUNK_TOKENS) {
        let outcome = model.forward(&mut scratch, chunk, &mut kv, WantLogits::No, &never)?;
        assert_eq!(outcome, Outcome::Done, "nobody cancels a measurement");
    }
    let prefill_time = start.elapsed();

    let start = Instant::now();
    for at in 0..decode {
        let token = u32::try_from(at).unwrap_or(0) % vocabulary;
        let outcome = model.forward(&mut scratch, &[token], &mut kv, WantLogits::Last, &never)?;
        assert_eq!(outcome, Outcome::Done, "nobody cancels a measurement");
    }
    let decode_time = start.elapsed();
    Ok(Measurement { prefill_tokens: prefill, prefill_time, decode_tokens: decode, decode_time })
}

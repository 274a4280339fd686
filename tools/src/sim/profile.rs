//! What recomputing a prefix costs, and how many bytes its KV has.

use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::ensure;
use clap::Args;
use terrace_core::ComputeCost;

use super::trace::Trace;

/// What of a trace is replayed, and the model that it is replayed on: the same for every simulation.
#[derive(Clone, Debug, Args)]
pub(crate) struct ReplayOptions {
    /// Replay only so many requests
    #[arg(long, value_name = "REQUESTS")]
    limit: Option<usize>,
    /// Tokens of a block [default: told from the trace]
    #[arg(long, value_name = "TOKENS")]
    tokens_per_block: Option<u32>,
    /// KV of one token
    #[arg(long, value_name = "BYTES", default_value_t = BYTES_PER_TOKEN)]
    pub(crate) bytes_per_token: u64,
    /// FLOPs of prefilling a token: a in a h + b h^2
    #[arg(long, value_name = "FLOPS", default_value_t = LINEAR_FLOPS)]
    flops_linear: f64,
    /// FLOPs that grow with the position: b in a h + b h^2
    #[arg(long, value_name = "FLOPS", default_value_t = QUADRATIC_FLOPS)]
    flops_quadratic: f64,
    /// FLOPs that a worker does in a second
    #[arg(long, value_name = "FLOPS", default_value_t = FLOPS_PER_SECOND)]
    flops_rate: f64,
}

impl ReplayOptions {
    /// Everything that clap cannot check.
    ///
    /// # Errors
    /// With what is wrong and what is allowed.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        for (name, rate) in [("--flops-linear", self.flops_linear), ("--flops-rate", self.flops_rate)] {
            ensure!(rate.is_finite() && rate > 0.0, "{name} is {rate}: it must be more than 0");
        }
        let quadratic = self.flops_quadratic;
        ensure!(
            quadratic.is_finite() && quadratic >= 0.0,
            "--flops-quadratic is {quadratic}: it must be 0 or more"
        );
        ensure!(self.bytes_per_token > 0, "--bytes-per-token is 0: it must be more than 0");
        ensure!(self.bytes_per_token <= 1 << 30, "--bytes-per-token is more than 1 GiB");
        ensure!(self.limit != Some(0), "--limit 0 leaves nothing to replay");
        let tokens = self.tokens_per_block.unwrap_or(1);
        ensure!((1..=1 << 20).contains(&tokens), "--tokens-per-block is {tokens}: allowed are 1 to 2^20");
        Ok(())
    }

    /// The part of a file that is replayed.
    ///
    /// # Errors
    /// When it cannot be read, or is no trace.
    pub(crate) fn trace(&self, file: &Path) -> anyhow::Result<Trace> {
        Trace::read(file, self.limit, self.tokens_per_block)
    }

    /// The model.
    pub(crate) fn profile(&self) -> Profile {
        Profile {
            linear: self.flops_linear,
            quadratic: self.flops_quadratic,
            rate: self.flops_rate,
            bytes_per_token: self.bytes_per_token,
        }
    }
}

/// Tokens of a long prompt.
const LONG_PROMPT: u64 = 1 << 20;
/// A hundred thousand of these one after the other are not the end of the simulated time.
const PREFILL_SECONDS_MAX: f64 = 1e8;
/// Rates and factors that somebody can mean.
const RATES: RangeInclusive<f64> = 1e-3..=1e9;

/// Refuses what would run past the end of the simulated time.
///
/// # Errors
/// With the option, and what is allowed.
pub(crate) fn check_rates(rates: &[(&str, f64)]) -> anyhow::Result<()> {
    for (name, rate) in rates {
        ensure!(RATES.contains(rate), "{name} is {rate:?}: it must be more than 0, from 0.001 to 10^9");
    }
    Ok(())
}

/// A model on a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Profile {
    /// Cost of each token, in FLOPs or seconds.
    pub(crate) linear: f64,
    /// Cost that grows with the square of the position.
    pub(crate) quadratic: f64,
    /// Cost units done in a second.
    pub(crate) rate: f64,
    /// Bytes of KV of a token.
    pub(crate) bytes_per_token: u64,
}

/// A model of 70 billion parameters (80 layers, grouped queries) on four H100 at half of their peak.
pub(crate) const LINEAR_FLOPS: f64 = 141.2e9;
/// See [`LINEAR_FLOPS`].
pub(crate) const QUADRATIC_FLOPS: f64 = 1.31e6;
/// See [`LINEAR_FLOPS`].
pub(crate) const FLOPS_PER_SECOND: f64 = 1.98e15;
/// KV of a token of that model in 16 bits.
pub(crate) const BYTES_PER_TOKEN: u64 = 320 << 10;

impl Profile {
    /// The model named above.
    pub(crate) const REFERENCE: Profile = Profile {
        linear: LINEAR_FLOPS,
        quadratic: QUADRATIC_FLOPS,
        rate: FLOPS_PER_SECOND,
        bytes_per_token: BYTES_PER_TOKEN,
    };

    /// Refuses a model whose prompts take longer than can be simulated.
    ///
    /// # Errors
    /// With what a long prompt would take.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let seconds = self.seconds(LONG_PROMPT);
        ensure!(
            seconds <= PREFILL_SECONDS_MAX,
            "a prompt of {LONG_PROMPT} tokens takes {seconds:.3e} seconds by --flops-linear, --flops-quadratic and \
             --flops-rate, or by --seconds-per-token: at most {PREFILL_SECONDS_MAX:.0e} can be simulated"
        );
        Ok(())
    }

    /// Seconds to prefill the first `tokens` tokens of a prompt.
    #[expect(clippy::cast_precision_loss, reason = "prompts are far shorter than 2^53 tokens")]
    pub(crate) fn seconds(&self, tokens: u64) -> f64 {
        let tokens = tokens as f64;
        (self.linear * tokens + self.quadratic * tokens * tokens) / self.rate
    }

    /// The same cost block by block, as the core is told it.
    pub(crate) fn block_cost(&self, tokens_per_block: u32) -> ComputeCost {
        let tokens = f64::from(tokens_per_block);
        ComputeCost {
            first_seconds: (self.linear * tokens + self.quadratic * tokens * tokens) / self.rate,
            slope_seconds: 2.0 * self.quadratic * tokens * tokens / self.rate,
        }
    }

    /// Seconds to prefill a prompt of `tokens` tokens whose first `cached` are there.
    /// At least one token is computed: a full hit has no logits.
    pub(crate) fn prefill_seconds(&self, cached: u64, tokens: u64) -> f64 {
        self.seconds(tokens) - self.seconds(cached.min(tokens.saturating_sub(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        replay: ReplayOptions,
    }

    // A block of no tokens would replay to no hits at all, and a huge token would overflow a size: each is refused by
    // name, whatever is simulated.
    #[test]
    fn what_cannot_be_replayed_is_refused_by_name() {
        let check = |words: &[&str]| {
            let line: Line = clap::Parser::parse_from([&["sim"], words].concat());
            line.replay.check()
        };
        check(&[]).unwrap();
        let wrong = [
            ["--limit", "0"],
            ["--tokens-per-block", "0"],
            ["--tokens-per-block", "1048577"],
            ["--bytes-per-token", "0"],
            ["--bytes-per-token", "1000000000000000000"],
            ["--flops-linear", "0"],
            ["--flops-quadratic", "NaN"],
            ["--flops-rate", "inf"],
        ];
        for words in wrong {
            let error = check(&words).unwrap_err().to_string();
            assert!(error.contains(words[0]), "{words:?}: {error}");
        }
    }

    /// The unit could be lost on the way: the reference model reads 12,000 tokens in about a second.
    #[test]
    fn prefill_takes_what_the_formula_says() {
        let whole = Profile::REFERENCE.prefill_seconds(0, 12_035);
        assert!((whole - (141.2e9 * 12_035.0 + 1.31e6 * 12_035.0 * 12_035.0) / 1.98e15).abs() < 1e-9);
        assert!(Profile::REFERENCE.prefill_seconds(12_035, 12_035) > 0.0, "one token is computed");
        assert!(Profile::REFERENCE.prefill_seconds(6_000, 12_035) < whole);
    }

    /// The core would weigh blocks by another model than the one that is simulated.
    #[test]
    fn blocks_cost_what_their_prompt_costs() {
        let cost = Profile::REFERENCE.block_cost(512);
        let blocks: f64 = (0..200).map(|depth| cost.seconds(depth)).sum();
        assert!((blocks / Profile::REFERENCE.seconds(200 * 512) - 1.0).abs() < 1e-9);
    }
}

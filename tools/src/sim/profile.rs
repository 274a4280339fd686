//! What recomputing a prefix costs, and how many bytes its KV has.

use terrace_core::ComputeCost;

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

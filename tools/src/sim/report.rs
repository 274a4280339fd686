//! What a replay found, as numbers, as JSON and as text.

use serde_json::{Value, json};
use terrace_core::Policy;

use super::node::Traffic;
use crate::output;

/// Blocks or tokens, by the tier that had them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ByTier {
    /// In Pinned.
    pub(crate) pinned: u64,
    /// Brought in from Nvme.
    pub(crate) nvme: u64,
}

impl ByTier {
    /// Of both tiers.
    pub(crate) fn sum(self) -> u64 {
        self.pinned + self.nvme
    }
}

/// The findings of one replay. Equal inputs give equal findings.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    /// Requests replayed.
    pub(crate) requests: u64,
    /// Blocks of their prompts.
    pub(crate) blocks: u64,
    /// Of these, served: a hit is the longest prefix without a hole.
    pub(crate) block_hits: ByTier,
    /// Tokens of their prompts.
    pub(crate) tokens: u64,
    /// Of these, served.
    pub(crate) token_hits: ByTier,
    /// Seconds to prefill all prompts without a cache.
    pub(crate) seconds: f64,
    /// Of these, saved by hits.
    pub(crate) saved_seconds: f64,
    /// Seconds that workers waited for devices and the link instead.
    pub(crate) load_seconds: f64,
    /// What went over the devices.
    pub(crate) traffic: Traffic,
    /// Blocks evicted from Pinned.
    pub(crate) evictions_pinned: u64,
    /// Blocks evicted from Nvme.
    pub(crate) evictions_nvme: u64,
    /// Blocks that found no frame and were not stored.
    pub(crate) throttled: u64,
    /// Bytes of chunks that no frame covers, at the end.
    pub(crate) stranded_bytes: u64,
    /// Microseconds from the first arrival to the last answer's first token.
    pub(crate) simulated: u64,
    /// Time to first token of each request in microseconds, sorted. Empty when the model has no time.
    pub(crate) first_tokens: Vec<u64>,
}

impl Outcome {
    /// Share of tokens served.
    pub(crate) fn token_ratio(&self) -> f64 {
        ratio(self.token_hits.sum(), self.tokens)
    }

    /// Share of blocks served.
    pub(crate) fn block_ratio(&self) -> f64 {
        ratio(self.block_hits.sum(), self.blocks)
    }

    /// Share of prefill seconds saved.
    pub(crate) fn saved_ratio(&self) -> f64 {
        if self.seconds > 0.0 { self.saved_seconds / self.seconds } else { 0.0 }
    }

    /// Mean time to first token in seconds.
    pub(crate) fn first_token_mean(&self) -> Option<f64> {
        let count = self.first_tokens.len() as u64;
        (count > 0).then(|| float(self.first_tokens.iter().sum()) / float(count) / 1e6)
    }

    /// Time to first token in seconds that `share` of the requests did not exceed.
    pub(crate) fn first_token_at(&self, share: f64) -> Option<f64> {
        let last = self.first_tokens.len().checked_sub(1)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of at most 1 of a length, rounded up"
        )]
        let place = ((share * float(last as u64)).ceil() as usize).min(last);
        Some(float(self.first_tokens[place]) / 1e6)
    }
}

/// Which replay it was.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// The trace.
    pub(crate) trace: String,
    /// `node` or `reference`.
    pub(crate) model: &'static str,
    /// What was evicted first.
    pub(crate) policy: Policy,
    /// Tier sizes as the caller wrote them.
    pub(crate) pinned_name: String,
    /// See above.
    pub(crate) nvme_name: String,
    /// Frames of Pinned.
    pub(crate) pinned_frames: u64,
    /// Frames of Nvme.
    pub(crate) nvme_frames: u64,
    /// Header page and payload.
    pub(crate) frame_bytes: u64,
    /// Distinct blocks of the trace.
    pub(crate) distinct: u64,
    /// What it found.
    pub(crate) outcome: Outcome,
    /// Seconds that the replay itself took.
    pub(crate) wall_seconds: f64,
}

/// The word for a policy on the command line and in results.
pub(crate) fn policy_name(policy: Policy) -> &'static str {
    match policy {
        Policy::Duel => "duel",
        Policy::Learned => "learned",
        Policy::Lru => "lru",
        Policy::S3Fifo => "s3fifo",
        Policy::Fifo => "fifo",
    }
}

impl Run {
    /// Blocks handled in a second of the replay.
    pub(crate) fn references_per_second(&self) -> f64 {
        float(self.outcome.blocks) / self.wall_seconds.max(1e-9)
    }

    /// Capacity of Pinned as a share of the distinct blocks.
    pub(crate) fn pinned_share(&self) -> f64 {
        ratio(self.pinned_frames, self.distinct)
    }

    /// Capacity of Nvme as a share of the distinct blocks.
    pub(crate) fn nvme_share(&self) -> f64 {
        ratio(self.nvme_frames, self.distinct)
    }

    /// Everything, for programs.
    pub(crate) fn json(&self) -> Value {
        let outcome = &self.outcome;
        json!({
            "trace": self.trace,
            "model": self.model,
            "policy": policy_name(self.policy),
            "distinct_blocks": self.distinct,
            "pinned_blocks": self.pinned_frames,
            "pinned_bytes": self.pinned_frames * self.frame_bytes,
            "nvme_blocks": self.nvme_frames,
            "nvme_bytes": self.nvme_frames * self.frame_bytes,
            "requests": outcome.requests,
            "blocks": outcome.blocks,
            "block_hit_ratio": outcome.block_ratio(),
            "block_hits_pinned": outcome.block_hits.pinned,
            "block_hits_nvme": outcome.block_hits.nvme,
            "tokens": outcome.tokens,
            "token_hit_ratio": outcome.token_ratio(),
            "token_hits_pinned": outcome.token_hits.pinned,
            "token_hits_nvme": outcome.token_hits.nvme,
            "prefill_seconds": outcome.seconds,
            "saved_seconds": outcome.saved_seconds,
            "saved_ratio": outcome.saved_ratio(),
            "load_seconds": outcome.load_seconds,
            "nvme_blocks_written": outcome.traffic.blocks_written,
            "nvme_bytes_written": outcome.traffic.bytes_written,
            "nvme_bytes_read": outcome.traffic.bytes_read,
            "evictions_pinned": outcome.evictions_pinned,
            "evictions_nvme": outcome.evictions_nvme,
            "blocks_throttled": outcome.throttled,
            "stranded_bytes": outcome.stranded_bytes,
            "ttft_mean_seconds": outcome.first_token_mean(),
            "ttft_p50_seconds": outcome.first_token_at(0.50),
            "ttft_p99_seconds": outcome.first_token_at(0.99),
            "simulated_seconds": float(outcome.simulated) / 1e6,
            "references_per_second": self.references_per_second(),
        })
    }

    /// Everything, for people: one run has room for it.
    pub(crate) fn print(&self) {
        let outcome = &self.outcome;
        let frames = |frames: u64| output::bytes(frames * self.frame_bytes);
        println!("{}, policy {}, model {}", self.trace, policy_name(self.policy), self.model);
        println!(
            "  tiers      Pinned {} ({} blocks, {} of the distinct ones), Nvme {} ({} blocks, {})",
            frames(self.pinned_frames),
            self.pinned_frames,
            percent(self.pinned_share()),
            frames(self.nvme_frames),
            self.nvme_frames,
            percent(self.nvme_share())
        );
        println!(
            "  traffic    {} requests, {} blocks, {} tokens, {} distinct blocks",
            outcome.requests, outcome.blocks, outcome.tokens, self.distinct
        );
        let hits = outcome.token_hits;
        println!(
            "  hits       {} of tokens ({} from Pinned, {} from Nvme), {} of blocks",
            percent(outcome.token_ratio()),
            percent(ratio(hits.pinned, outcome.tokens)),
            percent(ratio(hits.nvme, outcome.tokens)),
            percent(outcome.block_ratio())
        );
        println!(
            "  saved      {:.0} of {:.0} s of prefill ({}), for {:.0} s of loading",
            outcome.saved_seconds,
            outcome.seconds,
            percent(outcome.saved_ratio()),
            outcome.load_seconds
        );
        println!(
            "  Nvme       {} written, {} read",
            output::bytes(outcome.traffic.bytes_written),
            output::bytes(outcome.traffic.bytes_read)
        );
        println!(
            "  evicted    {} blocks from Pinned, {} from Nvme; {} blocks found no room; {} stranded",
            outcome.evictions_pinned,
            outcome.evictions_nvme,
            outcome.throttled,
            output::bytes(outcome.stranded_bytes)
        );
        if let (Some(mean), Some(middle), Some(slow)) =
            (outcome.first_token_mean(), outcome.first_token_at(0.5), outcome.first_token_at(0.99))
        {
            println!("  first token after {mean:.3} s on average, {middle:.3} s p50, {slow:.3} s p99");
        }
        println!(
            "  {:.0} s simulated in {:.2} s, {:.0} block references a second",
            float(outcome.simulated) / 1e6,
            self.wall_seconds,
            self.references_per_second()
        );
    }
}

/// Prints several runs as a table, one line each.
pub(crate) fn print_all(runs: &[Run]) {
    let mut table = output::table(&[
        "TRACE", "POLICY", ">PINNED", ">NVME", ">TOKENS", ">SAVED", ">WRITTEN", ">TTFT", ">P50", ">P99",
    ]);
    let seconds = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
    let mut last = "";
    for run in runs {
        let outcome = &run.outcome;
        table.add_row([
            if run.trace == last { String::new() } else { run.trace.clone() },
            policy_name(run.policy).to_owned(),
            run.pinned_name.clone(),
            run.nvme_name.clone(),
            percent(outcome.token_ratio()),
            percent(outcome.saved_ratio()),
            output::bytes(outcome.traffic.bytes_written),
            seconds(outcome.first_token_mean()),
            seconds(outcome.first_token_at(0.5)),
            seconds(outcome.first_token_at(0.99)),
        ]);
        last = &run.trace;
    }
    output::print(&table);
}

/// A share as percent.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Part of a whole; 0 of nothing.
pub(crate) fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { float(part) / float(whole) }
}

/// For ratios and rates: exact up to 2^53.
#[expect(clippy::cast_precision_loss, reason = "counts and microseconds of a simulation are far below 2^53")]
pub(crate) fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A percentile that is off by one place would be the mean of luck.
    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let outcome =
            Outcome { first_tokens: (1..=100).map(|n| n * 1_000_000).collect(), ..Outcome::default() };
        assert_eq!(outcome.first_token_at(0.0), Some(1.0));
        assert_eq!(outcome.first_token_at(0.5), Some(51.0));
        assert_eq!(outcome.first_token_at(0.99), Some(100.0));
        assert_eq!(outcome.first_token_mean(), Some(50.5));
        assert_eq!(Outcome::default().first_token_at(0.5), None);
    }
}

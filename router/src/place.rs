//! Which workers serve a prompt: the choice with the least estimated time to
//! the first token.
//!
//! A pure function of what workers reported, what the router itself has in
//! flight, and what the block index holds. All times are seconds. It starts
//! nothing and remembers nothing.

/// Prompts with at most this many missing tokens skip the separate prefill: the
/// hand-over would cost more than it saves.
pub const SHORT_TOKENS: u64 = 64;
/// Context at which attention costs as much as everything else of a token.
const ATTENTION_TOKENS: f64 = 4096.0;
/// Time that a separate prefill costs beyond its work: one more call, one more
/// lease of the prefix.
const HANDOVER_SECONDS: f64 = 0.004;
/// Share of a prefill's time that is counted again for each request that decodes
/// on the same worker and stands still meanwhile, and for one that may come.
const HARM: f64 = 0.5;
/// Rate of a worker that has not measured its own, in tokens per second.
const RATE_UNKNOWN: f64 = 300.0;
/// Tokens that a decoding request is expected to go on for, when all of a
/// worker's places are taken.
const DECODE_TOKENS: f64 = 64.0;
const DECODE_RATE_UNKNOWN: f64 = 20.0;

/// What a worker is like now.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Index into the hits: the space that it reads and writes.
    pub space: usize,
    /// Prompt tokens that it has not computed yet.
    pub pending_tokens: u64,
    /// Requests that it computes or queues.
    pub requests: u32,
    /// Requests that it takes at once; 0 if it did not say.
    pub requests_max: u32,
    /// Prefill rate in tokens per second; 0 until measured.
    pub prefill_rate: f64,
    /// Decode rate of one request in tokens per second; 0 until measured.
    pub decode_rate: f64,
}

impl Candidate {
    /// Whether all its places are taken.
    pub fn is_full(&self) -> bool {
        self.requests_max > 0 && self.requests >= self.requests_max
    }

    /// Time until it begins with one more prompt.
    fn queue_seconds(&self) -> f64 {
        let decoding = if self.is_full() {
            let rate = measured(self.decode_rate, DECODE_RATE_UNKNOWN);
            f64::from(self.requests - self.requests_max + 1) * DECODE_TOKENS / rate
        } else {
            0.0
        };
        prefill_seconds(self.pending_tokens as f64, 0.0, self.prefill_rate) + decoding
    }
}

/// What one space holds of the prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hit {
    /// Tokens from the start that some tier holds.
    pub cached_tokens: u64,
    /// Time until all of them can be read, in microseconds.
    pub fetch_us: u64,
}

/// A choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Prefill worker to use first, if any.
    pub prefill: Option<usize>,
    /// Decode worker.
    pub decode: usize,
    /// Tokens that have to be computed.
    pub missing_tokens: u64,
    /// Estimated time to the first token.
    pub seconds: f64,
    /// The same with the harm to others; what is minimised.
    pub cost: f64,
}

/// Time to compute `tokens` after `context` earlier ones, at a measured rate for
/// short contexts. Attention grows with the context, so this has a linear and a
/// quadratic part.
pub fn prefill_seconds(tokens: f64, context: f64, rate: f64) -> f64 {
    tokens / measured(rate, RATE_UNKNOWN) * (1.0 + (context + tokens / 2.0) / ATTENTION_TOKENS)
}

fn measured(rate: f64, otherwise: f64) -> f64 {
    if rate.is_finite() && rate > 0.0 { rate } else { otherwise }
}

/// Picks the workers for a prompt of `tokens`. `hits` has one entry a space. A
/// full decode worker is chosen only when there is no other. Equal estimates go
/// to the worker with fewer requests, then to the first. `None` without a
/// decode worker.
pub fn choose(tokens: u64, hits: &[Hit], prefill: &[Candidate], decode: &[Candidate]) -> Option<Plan> {
    let plans = decode.iter().enumerate().flat_map(|(index, worker)| {
        let hit = usable(tokens, hits, worker.space);
        let missing = tokens - hit.cached_tokens;
        let direct = direct(index, worker, hit, missing);
        let helpers: &[Candidate] = if missing <= SHORT_TOKENS { &[] } else { prefill };
        let separate = helpers.iter().enumerate().filter(move |(_, helper)| helper.space == worker.space);
        let separate = separate.map(move |(helper_index, helper)| {
            let seconds = separate_seconds(helper, worker, hit, missing);
            let prefill = Some(helper_index);
            Plan { prefill, decode: index, missing_tokens: missing, seconds, cost: seconds }
        });
        std::iter::once(direct).chain(separate)
    });
    plans.min_by(|a, b| {
        let rank = |plan: &Plan| {
            let worker = &decode[plan.decode];
            let helper = plan.prefill.map_or(0, |index| prefill[index].requests);
            (worker.is_full(), plan.cost, u64::from(worker.requests) + u64::from(helper))
        };
        let (a, b) = (rank(a), rank(b));
        a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2))
    })
}

/// What of a hit helps: the last token of a prompt is always computed.
fn usable(tokens: u64, hits: &[Hit], space: usize) -> Hit {
    let hit = hits.get(space).copied().unwrap_or_default();
    Hit { cached_tokens: hit.cached_tokens.min(tokens.saturating_sub(1)), fetch_us: hit.fetch_us }
}

fn direct(index: usize, worker: &Candidate, hit: Hit, missing_tokens: u64) -> Plan {
    let compute = prefill_seconds(missing_tokens as f64, hit.cached_tokens as f64, worker.prefill_rate);
    let seconds = worker.queue_seconds() + fetch_seconds(hit) + compute;
    // A short piece of work goes between two steps of the others.
    let harmed = if missing_tokens <= SHORT_TOKENS { worker.requests } else { worker.requests + 1 };
    let cost = seconds + compute * HARM * f64::from(harmed);
    Plan { prefill: None, decode: index, missing_tokens, seconds, cost }
}

fn separate_seconds(helper: &Candidate, worker: &Candidate, hit: Hit, missing: u64) -> f64 {
    let compute = prefill_seconds(missing as f64, hit.cached_tokens as f64, helper.prefill_rate);
    let first = helper.queue_seconds() + fetch_seconds(hit) + compute;
    // The decode worker's queue drains while the prefill runs.
    first.max(worker.queue_seconds()) + HANDOVER_SECONDS
}

fn fetch_seconds(hit: Hit) -> f64 {
    hit.fetch_us as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle() -> Candidate {
        Candidate {
            space: 0,
            pending_tokens: 0,
            requests: 0,
            requests_max: 4,
            prefill_rate: 1000.0,
            decode_rate: 50.0,
        }
    }

    fn hit(cached_tokens: u64, fetch_us: u64) -> [Hit; 1] {
        [Hit { cached_tokens, fetch_us }]
    }

    /// A prompt that is nearly all cached must not pay for a second worker.
    #[test]
    fn short_and_cached_prompts_go_straight_to_decode() {
        let busy = Candidate { requests: 3, ..idle() };
        assert_eq!(choose(40, &hit(0, 0), &[idle()], std::slice::from_ref(&busy)).unwrap().prefill, None);
        let plan = choose(1000, &hit(992, 100), &[idle()], &[busy]).unwrap();
        assert_eq!((plan.prefill, plan.missing_tokens), (None, 8));
    }

    /// A long prompt must not stop running decodes when a prefill worker is free,
    /// and must not wait for a prefill worker whose queue is longer than the harm.
    #[test]
    fn long_prompts_prefer_a_prefill_worker_unless_it_is_far_behind() {
        let busy = Candidate { requests: 2, ..idle() };
        assert_eq!(
            choose(1000, &hit(0, 0), &[idle()], std::slice::from_ref(&busy)).unwrap().prefill,
            Some(0)
        );
        let behind = Candidate { pending_tokens: 8000, ..idle() };
        assert_eq!(choose(1000, &hit(0, 0), &[behind], &[busy]).unwrap().prefill, None);
    }

    /// A disk that needs longer than a computation must count: the space without
    /// a copy wins when its worker computes faster than the other fetches.
    #[test]
    fn slow_fetches_count_in_seconds() {
        let hits = [Hit { cached_tokens: 512, fetch_us: 40_000_000 }, Hit::default()];
        let other = Candidate { space: 1, ..idle() };
        assert_eq!(choose(600, &hits, &[], &[idle(), other.clone()]).unwrap().decode, 1);
        let quick = [Hit { cached_tokens: 512, fetch_us: 2_000 }, Hit::default()];
        assert_eq!(choose(600, &quick, &[], &[idle(), other]).unwrap().decode, 0);
    }

    /// Load must be spread: of two equal workers the one with less to do is
    /// taken, and a full one only when there is no other.
    #[test]
    fn the_queue_decides_between_equals() {
        let pending = Candidate { pending_tokens: 500, requests: 1, ..idle() };
        assert_eq!(choose(100, &hit(0, 0), &[], &[pending, idle()]).unwrap().decode, 1);
        let full = Candidate { requests: 4, prefill_rate: 1e6, ..idle() };
        let slow = Candidate { prefill_rate: 10.0, ..idle() };
        assert_eq!(choose(100, &hit(0, 0), &[], &[full.clone(), slow]).unwrap().decode, 1);
        assert_eq!(choose(100, &hit(0, 0), &[], &[full]).unwrap().decode, 0);
        // Everything is cached, so estimates are equal but for requests.
        let one = Candidate { requests: 1, prefill_rate: f64::INFINITY, ..idle() };
        assert_eq!(choose(1, &hit(0, 0), &[], &[one, idle()]).unwrap().decode, 1);
    }

    /// A prefill worker of another space seals blocks that the decode worker
    /// cannot read; using it would compute everything twice.
    #[test]
    fn prefill_and_decode_share_a_space() {
        let foreign = Candidate { space: 1, prefill_rate: 1e6, ..idle() };
        let busy = Candidate { requests: 3, ..idle() };
        let hits = [Hit::default(), Hit::default()];
        assert_eq!(choose(1000, &hits, &[foreign], &[busy]).unwrap().prefill, None);
    }

    /// Attention makes the second half of a long prompt dearer than the first;
    /// unknown and senseless rates must still give a finite estimate.
    #[test]
    fn estimates_grow_faster_than_the_prompt_and_stay_finite() {
        let short = prefill_seconds(1000.0, 0.0, 1000.0);
        let long = prefill_seconds(8000.0, 0.0, 1000.0);
        assert!(long > 10.0 * short, "{long} {short}");
        for rate in [0.0, -1.0, f64::NAN] {
            assert!(prefill_seconds(100.0, 0.0, rate).is_finite(), "{rate}");
        }
        assert_eq!(choose(0, &[], &[], &[idle()]).unwrap().missing_tokens, 0);
        assert!(choose(10, &[], &[idle()], &[]).is_none());
    }
}

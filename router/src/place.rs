//! Which workers serve a prompt: the choice with the least estimated time to
//! the first token.
//!
//! A pure function of what workers reported, what the router itself has in
//! flight, and what the block index holds. All times are seconds. It starts
//! nothing, remembers nothing, reads no clock and draws no number: the router
//! and `terrace sim route` call the same code.
//!
//! The estimate is the sum of the queue, of loading what is worth loading
//! ([`source`]), of computing the rest ([`rate`]), and of a hand-over where
//! prefill is separate. What is minimised is that and the harm to the requests
//! that stand still meanwhile. Sessions stay where their blocks are because
//! that is quickest, and leave when it is not: there is no rule for it.

pub mod active;
pub mod rate;
pub mod source;

use rate::Prefill;
use source::{Fetch, Split, View};

/// Prompts with at most this many missing tokens skip the separate prefill: the
/// hand-over would cost more than it saves.
pub const SHORT_TOKENS: u64 = 64;
/// Time that a separate prefill costs beyond its work: one more call, one more
/// lease of the prefix.
const HANDOVER_SECONDS: f64 = 0.004;
/// Share of a prefill's time that is counted again for each request that decodes
/// on the same worker and stands still meanwhile, and for one that may come.
const HARM: f64 = 0.5;
/// Tokens that a decoding request is expected to go on for, when all of a
/// worker's places are taken.
const DECODE_TOKENS: f64 = 64.0;
const DECODE_RATE_UNKNOWN: f64 = 20.0;

/// What a worker is like now.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Index into the views: what it can load of the prompt.
    pub view: usize,
    /// The blocks that it reads and writes; a prefill worker helps only decode
    /// workers of the same space.
    pub space: usize,
    /// Seconds until the prompts that it has are computed, by the router's account.
    pub queued_seconds: f64,
    /// Prompt tokens that it has not computed yet, by its own.
    pub pending_tokens: u64,
    /// Requests that it computes or queues.
    pub requests: u32,
    /// Requests that it takes at once; 0 if it did not say.
    pub requests_max: u32,
    /// Requests decode on it, and stand still while it computes a prompt.
    pub decodes: Decodes,
    /// What computing costs on it.
    pub prefill: Prefill,
    /// Decode rate of one request in tokens per second; 0 until measured.
    pub decode_rate: f64,
}

/// Whether a worker decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decodes {
    /// Its requests decode where they are.
    Here,
    /// It only computes prompts.
    Elsewhere,
}

impl Candidate {
    /// Whether all its places are taken.
    pub fn is_full(&self) -> bool {
        self.requests_max > 0 && self.requests >= self.requests_max
    }

    /// Time until it begins with one more prompt.
    fn queue_seconds(&self) -> f64 {
        let decoding = if self.is_full() {
            let known = self.decode_rate.is_finite() && self.decode_rate > 0.0;
            let rate = if known { self.decode_rate } else { DECODE_RATE_UNKNOWN };
            f64::from(self.requests - self.requests_max + 1) * DECODE_TOKENS / rate
        } else {
            0.0
        };
        let reported = self.prefill.seconds(0.0, source::float(self.pending_tokens));
        self.queued_seconds.max(reported) + decoding
    }

    /// Requests that stand still while it computes so much.
    fn harmed(&self, missing_tokens: u64) -> u32 {
        match self.decodes {
            Decodes::Elsewhere => 0,
            // A short piece of work goes between two steps of the others.
            Decodes::Here if missing_tokens <= SHORT_TOKENS => self.requests,
            Decodes::Here => self.requests + 1,
        }
    }
}

/// An estimate, term by term, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Until a worker begins.
    pub queue: f64,
    /// Of bringing in what is loaded.
    pub load: f64,
    /// Of computing the rest.
    pub prefill: f64,
    /// Of passing the prompt on to the worker that decodes, and waiting for it.
    pub handover: f64,
    /// To others, while the prompt is computed.
    pub harm: f64,
    /// Tokens of the prompt that are loaded.
    pub loaded_tokens: u64,
    /// Tokens of the prompt that exist somewhere.
    pub cached_tokens: u64,
    /// Tokens that are computed.
    pub missing_tokens: u64,
}

impl Estimate {
    /// Estimated time to the first token.
    pub fn first_token(&self) -> f64 {
        self.queue + self.load + self.prefill + self.handover
    }

    /// What is minimised.
    pub fn cost(&self) -> f64 {
        self.first_token() + self.harm
    }
}

/// One way to serve the prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Considered {
    /// Prefill worker to use first, if any.
    pub prefill: Option<usize>,
    /// Decode worker.
    pub decode: usize,
    /// All of the decode worker's places are taken.
    pub is_full: bool,
    /// Requests on the workers involved.
    pub requests: u64,
    /// Term by term.
    pub estimate: Estimate,
}

/// A choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Prefill worker to use first, if any.
    pub prefill: Option<usize>,
    /// Decode worker.
    pub decode: usize,
    /// Term by term.
    pub estimate: Estimate,
    /// Who serves which part of the prompt.
    pub fetches: Vec<Fetch>,
}

impl Plan {
    /// Parts that should be asked for before the request reaches its worker.
    pub fn prefetches(&self) -> impl Iterator<Item = &Fetch> {
        self.fetches.iter().filter(|fetch| fetch.is_prefetch())
    }
}

/// How near equals are told apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ties {
    /// By fewer requests, then by order.
    First,
    /// By chance, so that several routers do not all run to the same worker: one
    /// that costs `temperature` times the best one's cost more than it is chosen
    /// 2.7 times less often.
    Drawn {
        /// As above; more than 0.
        temperature: f64,
        /// A number in 0..1 that nobody knows beforehand.
        random: f64,
    },
}

/// Picks the workers for a prompt of `tokens`. A full decode worker is chosen
/// only when there is no other. `None` without a decode worker.
pub fn choose(
    tokens: u64,
    views: &[View],
    prefill: &[Candidate],
    decode: &[Candidate],
    ties: Ties,
) -> Option<Plan> {
    let best = consider(tokens, views, prefill, decode).min_by(order)?;
    let chosen = match ties {
        Ties::First => best,
        Ties::Drawn { temperature, random } => {
            let equals =
                || consider(tokens, views, prefill, decode).filter(|way| way.is_full == best.is_full);
            drawn(&best, equals, temperature, random)
        }
    };
    let worker = chosen.prefill.map_or(&decode[chosen.decode], |helper| &prefill[helper]);
    let fetches = views.get(worker.view).map(|view| view.fetches(chosen.estimate.loaded_tokens));
    Some(Plan {
        prefill: chosen.prefill,
        decode: chosen.decode,
        estimate: chosen.estimate,
        fetches: fetches.unwrap_or_default(),
    })
}

/// Every way to serve the prompt, the best one first.
pub fn explain(tokens: u64, views: &[View], prefill: &[Candidate], decode: &[Candidate]) -> Vec<Considered> {
    let mut ways: Vec<Considered> = consider(tokens, views, prefill, decode).collect();
    ways.sort_by(order);
    ways
}

fn order(a: &Considered, b: &Considered) -> std::cmp::Ordering {
    let by_cost = a.estimate.cost().total_cmp(&b.estimate.cost());
    a.is_full.cmp(&b.is_full).then(by_cost).then(a.requests.cmp(&b.requests))
}

fn drawn<I: Iterator<Item = Considered>>(
    best: &Considered,
    ways: impl Fn() -> I,
    temperature: f64,
    random: f64,
) -> Considered {
    let least = best.estimate.cost();
    let scale = (least * temperature).max(f64::MIN_POSITIVE);
    let weight = |way: &Considered| ((least - way.estimate.cost()) / scale).exp();
    let mut left = ways().map(|way| weight(&way)).sum::<f64>() * random;
    for way in ways() {
        left -= weight(&way);
        if left < 0.0 {
            return way;
        }
    }
    *best
}

fn consider<'a>(
    tokens: u64,
    views: &'a [View],
    prefill: &'a [Candidate],
    decode: &'a [Candidate],
) -> impl Iterator<Item = Considered> + 'a {
    decode.iter().enumerate().flat_map(move |(index, worker)| {
        let split = split(tokens, views, worker);
        let way = move |prefill, requests, estimate| {
            let is_full = worker.is_full();
            Considered { prefill, decode: index, is_full, requests, estimate }
        };
        let direct = way(None, u64::from(worker.requests), direct(worker, split, tokens));
        let helpers = if tokens - split.loaded_tokens <= SHORT_TOKENS { &[] } else { prefill };
        let separate = helpers.iter().enumerate().filter(|(_, helper)| helper.space == worker.space);
        let separate = separate.map(move |(helper_index, helper)| {
            let requests = u64::from(worker.requests) + u64::from(helper.requests);
            way(Some(helper_index), requests, separate_estimate(helper, worker, views, tokens))
        });
        std::iter::once(direct).chain(separate)
    })
}

fn split(tokens: u64, views: &[View], worker: &Candidate) -> Split {
    let nothing = View::default();
    views.get(worker.view).unwrap_or(&nothing).split(tokens, worker.prefill)
}

fn terms(queue: f64, split: Split, tokens: u64) -> Estimate {
    Estimate {
        queue,
        load: split.load_seconds,
        prefill: split.prefill_seconds,
        handover: 0.0,
        harm: 0.0,
        loaded_tokens: split.loaded_tokens,
        cached_tokens: split.cached_tokens,
        missing_tokens: tokens - split.loaded_tokens,
    }
}

fn direct(worker: &Candidate, split: Split, tokens: u64) -> Estimate {
    let estimate = terms(worker.queue_seconds(), split, tokens);
    let harmed = f64::from(worker.harmed(estimate.missing_tokens));
    Estimate { harm: estimate.prefill * HARM * harmed, ..estimate }
}

fn separate_estimate(helper: &Candidate, worker: &Candidate, views: &[View], tokens: u64) -> Estimate {
    let estimate = terms(helper.queue_seconds(), split(tokens, views, helper), tokens);
    // The decode worker's queue drains while the prefill runs.
    let waits = (worker.queue_seconds() - estimate.first_token()).max(0.0);
    Estimate { handover: HANDOVER_SECONDS + waits, ..estimate }
}

#[cfg(test)]
mod tests;

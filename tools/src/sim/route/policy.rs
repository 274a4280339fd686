//! Who serves the next prompt: the real placement, and what it is compared with.

use clap::ValueEnum;
use terrace_index::{Found, HolderId};
use terrace_router::place::active::{Active, Reported};
use terrace_router::place::rate::{Calibration, Prefill};
use terrace_router::place::source::{Link, Run, Tier, View};
use terrace_router::place::{self, Candidate, Decodes, Ties};

/// Load of one worker over the mean at which consistent hashing goes on to the next.
const LOAD_BOUND: f64 = 1.25;
/// Blocks of a prompt that consistent hashing looks at: prompts that share them go together.
const HASHED_TOKENS: u64 = 1024;
/// Tokens a second that a worker is taken to compute before its first prompt has shown it.
const RATE_GUESS: f64 = 10_000.0;
/// The simulated worker loses no completion, so what was sent counts until it is done.
const BUSY: Reported = Reported { requests: 1, pending_tokens: 0 };

/// A policy on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Policy {
    /// Any worker
    Random,
    /// One after the other
    RoundRobin,
    /// The fewest prompt tokens to be computed
    LeastLoad,
    /// By the first tokens of the prompt, the next one when that has 1.25 times the mean load
    Hash,
    /// Block-count cost of weight 1
    Blocks1,
    /// Block-count cost of weight 2
    Blocks2,
    /// Block-count cost with Dynamo's defaults: host memory counts 0.75, other nodes 0.25
    Dynamo,
    /// Least estimated time to first token: what the router does
    Estimate,
    /// No policy but a bound for all of them: nobody queues, and every worker has whatever any has computed
    Ideal,
}

impl Policy {
    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Policy::Random => "random",
            Policy::RoundRobin => "round-robin",
            Policy::LeastLoad => "least-load",
            Policy::Hash => "hash",
            Policy::Blocks1 => "blocks1",
            Policy::Blocks2 => "blocks2",
            Policy::Dynamo => "dynamo",
            Policy::Estimate => "estimate",
            Policy::Ideal => "ideal",
        }
    }
}

/// What the router knows of one worker.
#[derive(Debug)]
pub(crate) struct Known {
    active: Active,
    calibration: Calibration,
    /// Blocks of prompts that are to be computed.
    prefill_blocks: u64,
    /// Blocks of prompts that were sent here and are not answered to the end.
    decode_blocks: u64,
    /// Tokens to be computed.
    tokens: u64,
    /// Requests without their first token.
    requests: u32,
}

/// What was believed when a request was placed, and is taken back when it is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sent {
    /// Where it went.
    pub(crate) worker: u32,
    /// Estimated time to first token; by the estimating policy only.
    pub(crate) estimate: Option<f64>,
    job: u64,
    missing_blocks: u64,
    missing_tokens: u64,
    blocks: u64,
}

/// A prompt to be placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prompt<'a> {
    /// Its blocks.
    pub(crate) numbers: &'a [u32],
    /// Its tokens.
    pub(crate) tokens: u64,
    /// Tokens of a block.
    pub(crate) block_tokens: u64,
}

/// Seconds that the KV of a token takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    /// From a worker's own memory.
    pub(crate) private: f64,
    /// From the shared pool.
    pub(crate) pool: f64,
}

impl Known {
    fn new() -> Self {
        Self {
            active: Active::default(),
            calibration: Calibration::new(Prefill::of_rate(RATE_GUESS)),
            prefill_blocks: 0,
            decode_blocks: 0,
            tokens: 0,
            requests: 0,
        }
    }
}

/// A router with one policy.
#[derive(Debug)]
pub(crate) struct Router {
    policy: Policy,
    rates: Rates,
    temperature: f64,
    workers: Vec<Known>,
    turn: u32,
    draws: u64,
}

impl Router {
    /// Before `workers` workers. Holders of the index are the workers by number, then the pool.
    pub(crate) fn new(policy: Policy, workers: u32, rates: Rates, temperature: f64, seed: u64) -> Self {
        let workers = (0..workers).map(|_| Known::new()).collect();
        Self { policy, rates, temperature, workers, turn: 0, draws: seed }
    }

    /// Chooses, and counts the request as sent. `now` is in seconds.
    pub(crate) fn place(&mut self, prompt: Prompt<'_>, found: &Found, now: f64) -> Sent {
        let count = u32::try_from(self.workers.len()).unwrap_or(u32::MAX);
        let (worker, estimate) = match self.policy {
            Policy::Random => (u32::try_from(self.draw() % u64::from(count)).unwrap_or(0), None),
            Policy::RoundRobin => {
                self.turn = (self.turn + 1) % count;
                (self.turn, None)
            }
            Policy::LeastLoad => (self.least(|known, _| float(known.tokens)), None),
            Policy::Hash => (self.hashed(prompt), None),
            Policy::Blocks1 => (self.fewest_blocks(prompt, found, 1.0, [1.0, 1.0]), None),
            Policy::Blocks2 => (self.fewest_blocks(prompt, found, 2.0, [1.0, 1.0]), None),
            Policy::Dynamo => (self.fewest_blocks(prompt, found, 1.0, [0.75, 0.25]), None),
            Policy::Ideal => (self.idle(), None),
            Policy::Estimate => {
                let (worker, seconds) = self.quickest(prompt, found, now);
                (worker, Some(seconds))
            }
        };
        self.send(worker, estimate, prompt, found, now)
    }

    /// The first token of a request came; its prompt was computed in so many seconds.
    pub(crate) fn computed(&mut self, sent: &Sent, context: u64, tokens: u64, seconds: f64, now: f64) {
        let known = &mut self.workers[sent.worker as usize];
        known.active.computed(sent.job, now);
        known.active.end(sent.job, now);
        known.calibration.observe(float(context), float(tokens), seconds);
        known.prefill_blocks -= sent.missing_blocks;
        known.tokens -= sent.missing_tokens;
        known.requests -= 1;
    }

    /// Its answer is complete.
    pub(crate) fn answered(&mut self, sent: &Sent) {
        self.workers[sent.worker as usize].decode_blocks -= sent.blocks;
    }

    /// A worker without a request; there is always one more.
    fn idle(&mut self) -> u32 {
        let idle = self.workers.iter().position(|known| known.requests == 0);
        let place = idle.unwrap_or(self.workers.len());
        if place == self.workers.len() {
            self.workers.push(Known::new());
        }
        u32::try_from(place).unwrap_or(u32::MAX)
    }

    fn send(
        &mut self,
        worker: u32,
        estimate: Option<f64>,
        prompt: Prompt<'_>,
        found: &Found,
        now: f64,
    ) -> Sent {
        let (private, pool) = self.reach(worker, prompt, found, now);
        let blocks = prompt.numbers.len() as u64;
        let missing_blocks = blocks - private.max(pool);
        let here = (private.max(pool) * prompt.block_tokens).min(prompt.tokens.saturating_sub(1));
        let missing_tokens = prompt.tokens - here;
        let known = &mut self.workers[worker as usize];
        let seconds = known.calibration.cost().seconds(float(here), float(missing_tokens));
        let load = float(here) * self.rates.private;
        let job = known.active.send(missing_tokens, seconds + load, now);
        known.active.brings(job, prompt.numbers.iter().map(|&number| u64::from(number)).collect());
        known.prefill_blocks += missing_blocks;
        known.decode_blocks += blocks;
        known.tokens += missing_tokens;
        known.requests += 1;
        Sent { worker, estimate, job, missing_blocks, missing_tokens, blocks }
    }

    /// Blocks of the prompt in a worker's memory, and in the pool.
    fn held(&self, worker: u32, found: &Found) -> (u64, u64) {
        let pool = u32::try_from(self.workers.len()).unwrap_or(u32::MAX);
        let prefix = |holder| found.held(HolderId(holder)).map_or(0, |held| u64::from(held.prefix[2]));
        (prefix(worker), prefix(pool))
    }

    /// The same, with what the prompts bring that were sent to the worker before: only the estimate knows of them.
    fn reach(&self, worker: u32, prompt: Prompt<'_>, found: &Found, now: f64) -> (u64, u64) {
        let (private, pool) = self.held(worker, found);
        if self.policy != Policy::Estimate {
            return (private, pool);
        }
        let blocks: Vec<u64> = prompt.numbers.iter().map(|&number| u64::from(number)).collect();
        (private.max(self.workers[worker as usize].active.coming(&blocks, now, BUSY) as u64), pool)
    }

    /// The real placement, over workers that only prefill.
    fn quickest(&mut self, prompt: Prompt<'_>, found: &Found, now: f64) -> (u32, f64) {
        let mut views = Vec::with_capacity(self.workers.len());
        let mut candidates = Vec::with_capacity(self.workers.len());
        for (number, known) in (0u32..).zip(&self.workers) {
            candidates.push(Candidate {
                view: views.len(),
                space: 0,
                queued_seconds: known.active.queue_seconds(now, BUSY),
                pending_tokens: 0,
                requests: known.requests,
                requests_max: 0,
                decodes: Decodes::Elsewhere,
                prefill: known.calibration.cost(),
                decode_rate: 0.0,
            });
            views.push(self.view(number, prompt, found, now));
        }
        let ties = if self.temperature > 0.0 {
            Ties::Drawn { temperature: self.temperature, random: self.share() }
        } else {
            Ties::First
        };
        let plan = place::choose(prompt.tokens, &views, &[], &candidates, ties)
            .expect("there is at least one worker");
        (u32::try_from(plan.decode).unwrap_or(u32::MAX), plan.estimate.first_token())
    }

    fn view(&self, worker: u32, prompt: Prompt<'_>, found: &Found, now: f64) -> View {
        let (private, pool) = self.reach(worker, prompt, found, now);
        let mut view = View::default();
        for (holder, tier, blocks, seconds_per_token) in [
            (worker, Tier::Pinned, private, self.rates.private),
            (u32::MAX, Tier::Remote, pool, self.rates.pool),
        ] {
            if blocks > 0 {
                let end = (blocks * prompt.block_tokens).min(prompt.tokens);
                view.runs.push(Run { link: view.links.len(), begin: 0, end });
                let link =
                    Link { holder, tier, latency_seconds: 0.0, seconds_per_token, queued_seconds: 0.0 };
                view.links.push(link);
            }
        }
        view
    }

    /// Weight x (missing + queued prefill blocks) + active decode blocks; what is in a tier is credited.
    fn fewest_blocks(&mut self, prompt: Prompt<'_>, found: &Found, weight: f64, credits: [f64; 2]) -> u32 {
        let blocks = prompt.numbers.len() as u64;
        let held: Vec<(u64, u64)> = (0u32..).zip(&self.workers).map(|(n, _)| self.held(n, found)).collect();
        self.least(|known, number| {
            let (private, pool) = held[number];
            let beyond = pool.saturating_sub(private);
            let credit = credits[0] * float(private) + credits[1] * float(beyond);
            let missing = (float(known.prefill_blocks + blocks) - credit).max(0.0);
            weight * missing + float(known.decode_blocks)
        })
    }

    /// By rendezvous: each prompt has an order of all workers; the first that is not overloaded.
    fn hashed(&self, prompt: Prompt<'_>) -> u32 {
        let last = usize::try_from(HASHED_TOKENS.div_ceil(prompt.block_tokens)).unwrap_or(1);
        let key = prompt.numbers[..last.min(prompt.numbers.len())].last().map_or(0, |&n| u64::from(n) + 1);
        let total: u32 = self.workers.iter().map(|known| known.requests).sum();
        let bound = (LOAD_BOUND * f64::from(total + 1) / float(self.workers.len() as u64)).ceil();
        let fits = |known: &Known| f64::from(known.requests) < bound;
        let fit = (0u32..).zip(&self.workers).filter(|(_, known)| fits(known));
        fit.max_by_key(|(number, _)| mix(key ^ mix(u64::from(*number) + 1))).map_or(0, |(number, _)| number)
    }

    /// The least by some measure; equals are drawn.
    fn least(&mut self, of: impl Fn(&Known, usize) -> f64) -> u32 {
        let costs: Vec<f64> = self.workers.iter().enumerate().map(|(n, known)| of(known, n)).collect();
        let best = costs.iter().copied().fold(f64::INFINITY, f64::min);
        let equals: Vec<usize> = (0..costs.len()).filter(|&n| costs[n] <= best).collect();
        let drawn = self.draw() % (equals.len() as u64).max(1);
        let chosen = usize::try_from(drawn).ok().and_then(|drawn| equals.get(drawn)).copied();
        u32::try_from(chosen.unwrap_or(0)).unwrap_or(0)
    }

    fn draw(&mut self) -> u64 {
        self.draws = self.draws.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.draws)
    }

    fn share(&mut self) -> f64 {
        f64::from(u32::try_from(self.draw() >> 32).unwrap_or(0)) / 4_294_967_296.0
    }
}

fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

fn float(count: u64) -> f64 {
    super::super::report::float(count)
}

//! Workers behind a router, on a virtual clock.
//!
//! Each worker takes prompts in the order they were sent to it, one at a time:
//! it loads the longest prefix that its own memory and the shared pool have,
//! computes the rest, and then its blocks are there for others. The answer is
//! decoded without disturbing prompts; it decides when the next turn can come.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use indicatif::ProgressBar;

use super::directory::Directory;
use super::memory::Memory;
use super::policy::{Policy, Prompt, Rates, Router, Sent};
use super::report::Outcome;
use crate::sim::profile::Profile;
use crate::sim::report::float;
use crate::sim::trace::{Ask, Trace};

/// A cluster and its traffic.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// Workers.
    pub(crate) workers: u32,
    /// Blocks of each worker's own memory.
    pub(crate) private_blocks: usize,
    /// Blocks of the pool; 0 is none.
    pub(crate) pool_blocks: usize,
    /// Bytes a second from a worker's own memory.
    pub(crate) private_rate: f64,
    /// Bytes a second from the pool to a worker.
    pub(crate) pool_rate: f64,
    /// Microseconds after which the router learns what a worker has.
    pub(crate) delay: u64,
    /// Tokens a second of one answer.
    pub(crate) decode_rate: f64,
    /// A turn comes when the one before it was answered, plus its think time.
    pub(crate) closed_loop: bool,
    /// Recorded times are divided by this.
    pub(crate) speed: f64,
    /// Sessions start at this share of their recorded start; closed loop only.
    pub(crate) starts: f64,
    /// How freely the estimating policy chooses between near equals.
    pub(crate) temperature: f64,
    /// Of all draws.
    pub(crate) seed: u64,
    /// The model that workers run.
    pub(crate) profile: Profile,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive(u32),
    Computed(u32),
    Answered(u32),
}

#[derive(Debug)]
struct Worker {
    memory: Memory,
    queue: VecDeque<u32>,
    /// The request it computes.
    current: Option<Current>,
}

impl Worker {
    fn new(blocks: usize) -> Self {
        Self { memory: Memory::new(blocks), queue: VecDeque::new(), current: None }
    }
}

#[derive(Clone, Copy, Debug)]
struct Current {
    place: u32,
    cached: u64,
    compute: f64,
}

struct Cluster<'a> {
    trace: &'a Trace,
    setting: Setting,
    router: Router,
    directory: Directory,
    workers: Vec<Worker>,
    pool: Memory,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    event_last: u64,
    now: u64,
    sent: Vec<Option<(Sent, u64)>>,
    outcome: Outcome,
}

/// Replays a trace under one policy.
pub(crate) fn replay(trace: &Trace, setting: Setting, policy: Policy, progress: &ProgressBar) -> Outcome {
    let bytes = float(setting.profile.bytes_per_token);
    let setting = if policy == Policy::Ideal { ideal(trace, setting) } else { setting };
    let rates = Rates { private: bytes / setting.private_rate, pool: bytes / setting.pool_rate };
    let mut cluster = Cluster {
        trace,
        setting,
        router: Router::new(policy, setting.workers, rates, setting.temperature, setting.seed),
        directory: Directory::new(trace, setting.workers + 1, setting.delay),
        workers: (0..setting.workers).map(|_| Worker::new(setting.private_blocks)).collect(),
        pool: Memory::new(setting.pool_blocks),
        events: BinaryHeap::new(),
        event_last: 0,
        now: 0,
        sent: vec![None; trace.asks.len()],
        outcome: Outcome::default(),
    };
    cluster.schedule();
    while let Some(Reverse((at, _, event))) = cluster.events.pop() {
        cluster.now = at;
        cluster.happen(event, rates);
        if matches!(event, Event::Computed(_)) {
            progress.inc(1);
        }
    }
    cluster.outcome.finish(cluster.now)
}

/// One endless memory that every worker reaches like its own.
fn ideal(trace: &Trace, setting: Setting) -> Setting {
    let endless = usize::try_from(trace.distinct()).unwrap_or(usize::MAX);
    Setting { private_blocks: 0, pool_blocks: endless, pool_rate: setting.private_rate, delay: 0, ..setting }
}

/// How much faster than recorded requests have to come for workers that share one endless memory to be
/// busy for this share of the time.
pub(crate) fn speed_for(trace: &Trace, workers: u32, profile: &Profile, utilisation: f64) -> f64 {
    let mut known = vec![false; usize::try_from(trace.distinct()).unwrap_or(usize::MAX)];
    let mut work = 0.0;
    for ask in &trace.asks {
        let numbers = trace.numbers(ask);
        let cached = numbers.iter().take_while(|&&number| known[number as usize]).count();
        work += profile.prefill_seconds(trace.tokens(ask, cached), ask.input);
        for &number in numbers {
            known[number as usize] = true;
        }
    }
    let span = float(trace.asks.last().map_or(1, |ask| ask.at).max(1)) / 1e6;
    utilisation * span * f64::from(workers) / work
}

impl Cluster<'_> {
    fn schedule(&mut self) {
        for (place, ask) in (0u32..).zip(&self.trace.asks) {
            if !(self.setting.closed_loop && ask.follows) {
                let share = if self.setting.closed_loop { self.setting.starts } else { 1.0 };
                self.at(micros(self.seconds(ask.at) * share), Event::Arrive(place));
            }
        }
    }

    /// A recorded time, at the speed of this replay.
    fn seconds(&self, recorded: u64) -> f64 {
        float(recorded) / 1e6 / self.setting.speed
    }

    fn at(&mut self, at: u64, event: Event) {
        self.event_last += 1;
        self.events.push(Reverse((at, self.event_last, event)));
    }

    fn happen(&mut self, event: Event, rates: Rates) {
        match event {
            Event::Arrive(place) => {
                let ask = self.trace.asks[place as usize];
                let prompt = prompt(self.trace, &ask);
                let found = self.directory.find(self.now, prompt.numbers);
                let sent = self.router.place(prompt, found, float(self.now) / 1e6);
                self.sent[place as usize] = Some((sent, self.now));
                while self.workers.len() <= sent.worker as usize {
                    self.workers.push(Worker::new(self.setting.private_blocks));
                }
                self.workers[sent.worker as usize].queue.push_back(place);
                self.start(sent.worker, rates);
            }
            Event::Computed(worker) => {
                self.computed(worker);
                self.start(worker, rates);
            }
            Event::Answered(place) => {
                if let Some((sent, _)) = self.sent[place as usize].take() {
                    self.router.answered(&sent);
                }
            }
        }
    }

    /// A worker that is idle takes its next prompt.
    fn start(&mut self, number: u32, rates: Rates) {
        let worker = &mut self.workers[number as usize];
        if worker.current.is_some() {
            return;
        }
        let Some(place) = worker.queue.pop_front() else { return };
        let ask = self.trace.asks[place as usize];
        let numbers = self.trace.numbers(&ask);
        let private = worker.memory.prefix(numbers);
        let pool = self.pool.prefix(numbers).max(private);
        let (near, cached) = (self.trace.tokens(&ask, private), self.trace.tokens(&ask, pool));
        let load = float(near) * rates.private + float(cached - near) * rates.pool;
        let compute = self.setting.profile.prefill_seconds(cached, ask.input);
        worker.current = Some(Current { place, cached, compute });
        self.outcome.served(&ask, near, cached - near, load, compute);
        self.at(self.now + micros(load + compute), Event::Computed(number));
    }

    /// The first token is there, and the blocks are there for others.
    fn computed(&mut self, number: u32) {
        let worker = &mut self.workers[number as usize];
        let Some(Current { place, cached, compute }) = worker.current.take() else { return };
        let ask = self.trace.asks[place as usize];
        let numbers = self.trace.numbers(&ask);
        if self.setting.private_blocks > 0 {
            let changed = worker.memory.insert(numbers);
            let stored = (&numbers[..changed.new_to], changed.new_from);
            self.directory.tell(self.now, number, stored, changed.evicted);
        }
        if self.setting.pool_blocks > 0 {
            let changed = self.pool.insert(numbers);
            let stored = (&numbers[..changed.new_to], changed.new_from);
            self.directory.tell(self.now, self.setting.workers, stored, changed.evicted);
        }
        let (sent, arrived) = self.sent[place as usize].expect("a request is computed after it was sent");
        let context = cached.min(ask.input.saturating_sub(1));
        self.router.computed(&sent, context, ask.input - context, compute, float(self.now) / 1e6);
        self.outcome.first_token(self.now - arrived, sent.estimate);
        let answer = micros(float(ask.output) / self.setting.decode_rate);
        self.at(self.now + answer, Event::Answered(place));
        if let Some(next) = ask.next.filter(|_| self.setting.closed_loop) {
            // The think time is what was recorded between two turns, less the time of the answer.
            let recorded = micros(self.seconds(self.trace.asks[next as usize].at - ask.at));
            self.at(self.now + answer.max(recorded), Event::Arrive(next));
        }
    }
}

fn prompt<'a>(trace: &'a Trace, ask: &Ask) -> Prompt<'a> {
    Prompt { numbers: trace.numbers(ask), tokens: ask.input, block_tokens: trace.tokens_per_block.into() }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "simulated times are not negative and far below 2^52 microseconds"
)]
pub(super) fn micros(seconds: f64) -> u64 {
    (seconds * 1e6).round() as u64
}

#[cfg(test)]
mod tests;

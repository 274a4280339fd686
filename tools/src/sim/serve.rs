//! A node with its prefill workers, on a virtual clock.
//!
//! Workers take requests in the order of arrival, one at a time. A request
//! leases the longest prefix there is, waits for what comes from Nvme (no
//! longer than computing it would take), loads the prefix over its link,
//! computes the rest, and then publishes it. Decoding happens elsewhere: it only
//! decides when the next turn of a session can come.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use indicatif::ProgressBar;
use terrace_core::{
    Durability, Grant, LeaseId, MatchMode, Memory, Now, Purpose, Reply, Request, RequestId, Residence,
};

use super::node::{Hardware, LEASE_TTL, Node, micros, transfer_micros};
use super::profile::Profile;
use super::reference::{granted, to_seal};
use super::report::Outcome;
use super::trace::Trace;

/// Who looks and gives hints before a worker is found: any session may.
const ROUTER: u32 = 0;
/// After the last request, what is on its way to a device may arrive for this long.
const SETTLE_MICROS: u64 = 10_000_000;

/// How requests come and are served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    /// Prefill workers of the node.
    pub(crate) workers: u32,
    /// Bytes a second from Pinned to one worker.
    pub(crate) link_rate: f64,
    /// Tokens a second of one answer.
    pub(crate) decode_rate: f64,
    /// A turn comes when the one before it was answered, plus its think time.
    pub(crate) closed_loop: bool,
    /// Arrivals come this many times as fast as they were recorded.
    pub(crate) speed: f64,
    /// The model.
    pub(crate) profile: Profile,
}

/// What happens at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive(u32),
    /// The prefix is in the worker's memory.
    Loaded(u32),
    Computed(u32),
}

/// What a reply is about.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read,
    Write,
}

/// A request that a worker has taken.
struct Active {
    worker: u32,
    arrived: u64,
    /// Tiers of the prefix that was found.
    found: Vec<Residence>,
    began: u64,
    hits: usize,
    read: Option<LeaseId>,
    /// A write lease was asked for and is not answered yet.
    writing: bool,
    write: Option<(LeaseId, Vec<Grant>)>,
    computed: bool,
}

/// The simulation.
struct Serve<'a> {
    trace: &'a Trace,
    service: Service,
    node: Node,
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    event_last: u64,
    arrivals: BTreeMap<u32, u64>,
    queue: VecDeque<u32>,
    /// Workers without a request.
    idle: Vec<u32>,
    active: BTreeMap<u32, Active>,
    asked: BTreeMap<RequestId, (u32, Step)>,
    block_bytes: u64,
    outcome: Outcome,
}

/// Replays a trace against a node.
pub(crate) fn replay(trace: &Trace, hardware: Hardware, service: Service, progress: &ProgressBar) -> Outcome {
    let block_bytes = hardware.block_bytes;
    let mut serve = Serve {
        trace,
        service,
        node: Node::new(hardware),
        now: 0,
        events: BinaryHeap::new(),
        event_last: 0,
        arrivals: BTreeMap::new(),
        queue: VecDeque::new(),
        idle: (0..service.workers).rev().collect(),
        active: BTreeMap::new(),
        asked: BTreeMap::new(),
        block_bytes,
        outcome: Outcome::default(),
    };
    serve.schedule_arrivals();
    serve.run(progress);
    serve.finish()
}

impl Serve<'_> {
    fn schedule_arrivals(&mut self) {
        for (place, ask) in (0u32..).zip(&self.trace.asks) {
            if !(self.service.closed_loop && ask.follows) {
                let at = self.scaled(ask.at);
                self.at(at, Event::Arrive(place));
            }
        }
    }

    /// A recorded time, at the speed of this replay.
    fn scaled(&self, recorded: u64) -> u64 {
        micros(super::report::float(recorded) / 1e6 / self.service.speed)
    }

    fn at(&mut self, at: u64, event: Event) {
        self.event_last += 1;
        self.events.push(Reverse((at, self.event_last, event)));
    }

    fn run(&mut self, progress: &ProgressBar) {
        loop {
            let event = self.events.peek().map(|Reverse((at, _, _))| *at);
            if event.is_none() && self.active.is_empty() && self.queue.is_empty() {
                return;
            }
            let inside = self.node.next();
            match (inside, event) {
                (Some(inside), _) if event.is_none_or(|event| inside <= event) => {
                    self.now = self.now.max(inside);
                    self.node.advance(self.now);
                }
                (_, Some(_)) => {
                    let Some(Reverse((at, _, event))) = self.events.pop() else { continue };
                    self.now = self.now.max(at);
                    self.node.advance(self.now);
                    self.happen(event, progress);
                }
                (_, None) => panic!("requests wait for something that never comes"),
            }
            self.settle_replies();
        }
    }

    fn happen(&mut self, event: Event, progress: &ProgressBar) {
        match event {
            Event::Arrive(place) => {
                self.arrivals.insert(place, self.now);
                self.queue.push_back(place);
                if self.idle.is_empty() {
                    self.prefetch(place);
                }
                self.start_next();
            }
            Event::Loaded(place) => self.compute(place),
            Event::Computed(place) => {
                self.computed(place);
                self.start_next();
                progress.inc(1);
            }
        }
    }

    fn settle_replies(&mut self) {
        while let Some((request, reply)) = self.node.reply() {
            let Some((place, step)) = self.asked.remove(&request) else { continue };
            match step {
                Step::Read => self.loaded(place, reply),
                Step::Write => self.reserved(place, reply),
            }
        }
    }

    fn matched(&mut self, place: u32) -> Vec<Residence> {
        let ask = &self.trace.asks[place as usize];
        let op = Request::Match { blocks: self.trace.blocks(ask), mode: MatchMode::Prefix };
        match self.node.ask_now(ROUTER, op) {
            Reply::Matched { blocks } => blocks.into_iter().map_while(|there| there).collect(),
            other => panic!("a match was answered by {other:?}"),
        }
    }

    /// A request that has to queue has its prefix brought in meanwhile.
    fn prefetch(&mut self, place: u32) {
        let found = self.matched(place);
        if found.iter().any(|there| !there.pinned) {
            let blocks = self.trace.blocks(&self.trace.asks[place as usize]);
            self.node.ask_now(
                ROUTER,
                Request::Prefetch { blocks: blocks[..found.len()].to_vec(), want: Memory::Pinned },
            );
        }
    }

    fn start_next(&mut self) {
        while !self.queue.is_empty() {
            let Some(worker) = self.idle.pop() else { return };
            let Some(place) = self.queue.pop_front() else { return };
            self.start(place, worker);
        }
    }

    /// A worker takes the request: what is there is leased.
    fn start(&mut self, place: u32, worker: u32) {
        let found = self.matched(place);
        let arrived = self.arrivals.remove(&place).expect("a request is served after it arrived");
        let ask = self.trace.asks[place as usize];
        let blocks = self.trace.blocks(&ask);
        let near = found.iter().take_while(|there| there.pinned).count();
        let patience = self.service.profile.prefill_seconds(self.trace.tokens(&ask, near), ask.input);
        self.active.insert(
            place,
            Active {
                worker,
                arrived,
                found,
                began: self.now,
                hits: 0,
                read: None,
                writing: false,
                write: None,
                computed: false,
            },
        );
        let op = Request::LeaseRead {
            repeat: Some(self.node.repeat()),
            blocks,
            ttl: LEASE_TTL,
            answer_by: Now::from_micros(self.now + micros(patience)),
            purpose: Purpose::Prefill,
            want: Memory::Pinned,
        };
        let request = self.node.ask(worker, op);
        self.asked.insert(request, (place, Step::Read));
        self.settle_replies();
    }

    fn loaded(&mut self, place: u32, reply: Reply) {
        let hits = match reply {
            Reply::Leased { lease, blocks, .. } => {
                self.of(place).read = lease;
                granted(&blocks)
            }
            Reply::Throttled(_) => 0,
            other => panic!("a read lease was answered by {other:?}"),
        };
        self.load(place, hits);
    }

    /// The prefix goes over the link.
    fn load(&mut self, place: u32, hits: usize) {
        let bytes = hits as u64 * self.block_bytes;
        let load = if hits > 0 { transfer_micros(bytes, self.service.link_rate) } else { 0 };
        self.count_hits(place, hits, load);
        self.at(self.now + load, Event::Loaded(place));
    }

    /// The rest is computed. Its frames are reserved meanwhile.
    fn compute(&mut self, place: u32) {
        let ask = self.trace.asks[place as usize];
        let blocks = self.trace.blocks(&ask);
        let hits = self.of(place).hits;
        let tokens = self.trace.tokens(&ask, hits);
        let compute = micros(self.service.profile.prefill_seconds(tokens, ask.input));
        self.at(self.now + compute, Event::Computed(place));
        if hits == blocks.len() {
            return;
        }
        let op = Request::LeaseWrite {
            repeat: Some(self.node.repeat()),
            space: Node::SPACE,
            blocks: blocks[hits..].to_vec(),
            parent: hits.checked_sub(1).map(|last| blocks[last]),
            ttl: LEASE_TTL,
            want: Memory::Pinned,
        };
        let active = self.of(place);
        active.writing = true;
        let worker = active.worker;
        let request = self.node.ask(worker, op);
        self.asked.insert(request, (place, Step::Write));
        self.settle_replies();
    }

    fn count_hits(&mut self, place: u32, hits: usize, load: u64) {
        let (trace, profile, now) = (self.trace, self.service.profile, self.now);
        let ask = trace.asks[place as usize];
        let active = self.of(place);
        active.hits = hits;
        let waited = now - active.began + load;
        let mut near = 0;
        let (mut pinned, mut nvme) = (0, 0);
        for (position, there) in active.found.iter().take(hits).enumerate() {
            let tokens = trace.tokens(&ask, position + 1) - trace.tokens(&ask, position);
            if there.pinned {
                near += 1;
                pinned += tokens;
            } else {
                nvme += tokens;
            }
        }
        let outcome = &mut self.outcome;
        outcome.requests += 1;
        outcome.blocks += trace.numbers(&ask).len() as u64;
        outcome.block_hits.pinned += near;
        outcome.block_hits.nvme += hits as u64 - near;
        outcome.tokens += ask.input;
        outcome.token_hits.pinned += pinned;
        outcome.token_hits.nvme += nvme;
        outcome.seconds += profile.seconds(ask.input);
        outcome.saved_seconds += profile.seconds(pinned + nvme);
        outcome.load_seconds += super::report::float(waited) / 1e6;
    }

    fn reserved(&mut self, place: u32, reply: Reply) {
        let missing = self.trace.numbers(&self.trace.asks[place as usize]).len() - self.of(place).hits;
        let active = self.of(place);
        active.writing = false;
        match reply {
            Reply::Leased { lease, blocks, .. } => active.write = lease.map(|lease| (lease, blocks)),
            Reply::Throttled(_) => self.outcome.throttled += missing as u64,
            other => panic!("a write lease was answered by {other:?}"),
        }
        if self.of(place).computed {
            self.publish(place);
        }
    }

    /// The first token is there, and the worker is free.
    fn computed(&mut self, place: u32) {
        let now = self.now;
        let active = self.of(place);
        active.computed = true;
        let (arrived, ready, worker) = (active.arrived, !active.writing, active.worker);
        self.idle.push(worker);
        self.outcome.first_tokens.push(now - arrived);
        if ready {
            self.publish(place);
        }
        self.schedule_next_turn(place);
    }

    /// The think time is what was recorded between two turns, less the time of the answer.
    fn schedule_next_turn(&mut self, place: u32) {
        let ask = self.trace.asks[place as usize];
        let Some(next) = ask.next.filter(|_| self.service.closed_loop) else { return };
        let recorded = self.scaled(self.trace.asks[next as usize].at - ask.at);
        let answer = micros(super::report::float(ask.output) / self.service.decode_rate);
        self.at(self.now + answer.max(recorded), Event::Arrive(next));
    }

    /// What was computed becomes readable, and all leases end.
    fn publish(&mut self, place: u32) {
        let Some(active) = self.active.remove(&place) else { return };
        if let Some((lease, grants)) = active.write {
            let (blocks, throttled) = to_seal(&grants);
            self.outcome.throttled += throttled;
            let op = Request::Seal {
                repeat: Some(self.node.repeat()),
                lease,
                blocks,
                durability: Durability::Readable,
            };
            self.node.ask_now(active.worker, op);
            self.node.ask_now(active.worker, Request::Release { leases: vec![lease] });
        }
        if let Some(lease) = active.read {
            self.node.ask_now(active.worker, Request::Release { leases: vec![lease] });
        }
    }

    fn of(&mut self, place: u32) -> &mut Active {
        self.active.get_mut(&place).expect("a request is active until it is published")
    }

    fn finish(mut self) -> Outcome {
        let end = self.now + SETTLE_MICROS;
        while let Some(next) = self.node.next().filter(|&next| next <= end) {
            self.node.advance(next);
        }
        #[cfg(test)]
        self.node.check();
        let counters = self.node.counters();
        let tiers = self.node.tiers();
        let nvme: u64 = tiers.devices.iter().map(|device| device.stranded_bytes.get()).sum();
        self.outcome.evictions_pinned = counters.evictions_pinned;
        self.outcome.evictions_nvme = counters.evictions_nvme;
        self.outcome.stranded_bytes = tiers.pinned.stranded_bytes.get() + nvme;
        self.outcome.traffic = self.node.traffic();
        self.outcome.simulated = self.now;
        self.outcome.first_tokens.sort_unstable();
        self.outcome
    }
}

#[cfg(test)]
mod tests;

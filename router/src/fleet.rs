//! The workers that the router knows, what they reported last, and what the
//! router itself has in flight on each.
//!
//! Reports lag by some hundred milliseconds, so the router's own count stands
//! beside them and the larger of the two is believed, as far as the worker still
//! reports work ([`Active`]). What prompts took on a worker calibrates what the
//! next ones will. While the daemon is away the last known workers stay; one
//! whose endpoint fails is left alone for a while, longer after each failure in
//! a row.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use terrace_proto::v1;
use terrace_proto::v1::{WorkerLoad, WorkerRole};
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

use crate::place::active::{Active, Reported};
use crate::place::rate::{Calibration, Prefill};
use crate::place::{Candidate, Decodes};

/// Most workers kept.
const WORKERS_MAX: usize = 1024;
/// How long a worker is left alone after its first failure.
const SUSPEND: Duration = Duration::from_millis(250);
/// How long it is left alone at most.
const SUSPEND_MAX: Duration = Duration::from_secs(8);
/// How long a worker that said that it is full is left alone.
const SUSPEND_BUSY: Duration = Duration::from_millis(50);
/// How long after a restart of the daemon a worker may take to report again.
const ABSENT_MAX: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A worker that does not answer pings for this long is gone.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Fewer computed tokens say more of calls and queues than of computing.
const OBSERVED_TOKENS_MIN: u32 = 32;
/// Share of a measured time that is computing at least, however slow loading was said to be.
const COMPUTE_SHARE_MIN: f64 = 0.1;

/// All known workers. Cheap to ask; safe to share.
#[derive(Debug)]
pub struct Fleet {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    clock: Instant,
}

#[derive(Debug, Default)]
struct State {
    incarnation: u64,
    workers: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    load: WorkerLoad,
    channel: Channel,
    own: Arc<Own>,
    failures: u32,
    suspended_until: Option<Instant>,
    /// Whether it is left alone only because it is full.
    is_busy: bool,
    /// Since when the reports of a restarted daemon lack it.
    absent_since: Option<Instant>,
}

/// What this router has in flight on one worker process, and what it learned of it.
#[derive(Debug)]
struct Own {
    /// Where the seconds of its times begin.
    clock: Instant,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    active: Active,
    calibration: Option<Calibration>,
}

impl Own {
    fn seconds(&self) -> f64 {
        self.clock.elapsed().as_secs_f64()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Each change is one call, complete before the lock is let go.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One worker, as it was when asked for.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Its last report.
    pub load: WorkerLoad,
    /// For the placement; its space is an index into [`View::spaces`].
    pub candidate: Candidate,
    /// To call it.
    pub channel: Channel,
    /// Whether this router alone fills all its places.
    pub is_filled: bool,
    /// Prompts that this router has sent to it and that are not computed.
    pub prompts: usize,
    own: Arc<Own>,
}

/// Workers that could take a request now.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Spaces of these workers, each once.
    pub spaces: Vec<v1::SpaceManifest>,
    /// Prefill workers.
    pub prefill: Vec<Worker>,
    /// Decode workers.
    pub decode: Vec<Worker>,
    /// Decode workers that said a moment ago that they are full.
    pub busy: usize,
}

/// Counts as work in flight while it lives.
#[derive(Debug)]
pub struct InFlight {
    own: Arc<Own>,
    job: u64,
    changed: watch::Sender<()>,
}

impl Worker {
    /// Blocks from the first of a prompt that it will have when it begins with it; see [`Active::coming`].
    pub fn coming(&self, blocks: &[u64]) -> usize {
        let now = self.own.seconds();
        self.own.lock().active.coming(blocks, now, self.reported())
    }

    fn reported(&self) -> Reported {
        reported(&self.load)
    }
}

fn reported(load: &WorkerLoad) -> Reported {
    Reported {
        requests: load.active_requests.saturating_add(load.queued_requests),
        pending_tokens: load.pending_tokens,
    }
}

impl InFlight {
    /// The prompt is computed: only the request itself still counts.
    pub fn computed(&mut self) {
        let now = self.own.seconds();
        self.own.lock().active.computed(self.job, now);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let now = self.own.seconds();
        self.own.lock().active.end(self.job, now);
        self.changed.send_replace(());
    }
}

/// What a worker said of a prompt that it computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Computed {
    /// Tokens that it found.
    pub cached_tokens: u32,
    /// Tokens that it computed.
    pub computed_tokens: u32,
    /// Microseconds that both took.
    pub prefill_us: u64,
    /// Seconds of that which loading should have taken.
    pub load_seconds: f64,
}

impl Default for Fleet {
    fn default() -> Self {
        Self { state: Mutex::default(), changed: watch::Sender::new(()), clock: Instant::now() }
    }
}

impl Fleet {
    /// Takes all current reports. Workers with an endpoint that is no address
    /// are left out.
    pub fn observe(&self, reports: &v1::ObserveResponse, now: Instant) {
        let mut state = self.lock();
        let restarted = state.incarnation != reports.incarnation;
        state.incarnation = reports.incarnation;
        let mut known = std::mem::take(&mut state.workers);
        for load in reports.workers.iter().take(WORKERS_MAX) {
            // One that is named twice is one worker, and stays what it was.
            let known = known.remove(&load.name).or_else(|| state.workers.remove(&load.name));
            if let Some(entry) = Entry::updated(known, load, self.clock) {
                state.workers.insert(load.name.clone(), entry);
            }
        }
        for (name, mut entry) in known {
            let since = entry.absent_since.or(restarted.then_some(now));
            if since.is_some_and(|since| now.duration_since(since) < ABSENT_MAX)
                && state.workers.len() < WORKERS_MAX
            {
                entry.absent_since = since;
                state.workers.insert(name, entry);
            }
        }
        drop(state);
        self.changed.send_replace(());
    }

    /// Workers that could take a request now, of those that `accepts` likes.
    pub fn view(&self, now: Instant, accepts: impl Fn(&WorkerLoad) -> bool) -> View {
        let state = self.lock();
        let mut view = View::default();
        let fit = state.workers.values().filter(|entry| !entry.load.draining && accepts(&entry.load));
        for entry in fit {
            if entry.suspended_until.is_some_and(|until| until > now) {
                view.busy += usize::from(entry.is_busy && entry.load.role() == WorkerRole::Decode);
                continue;
            }
            let Some(space) = &entry.load.space else { continue };
            let index = view.spaces.iter().position(|known| known == space).unwrap_or_else(|| {
                view.spaces.push(space.clone());
                view.spaces.len() - 1
            });
            let worker = entry.worker(index);
            match entry.load.role() {
                WorkerRole::Prefill => view.prefill.push(worker),
                WorkerRole::Decode => view.decode.push(worker),
                WorkerRole::Unspecified => {}
            }
        }
        view
    }

    /// The last report of each worker, left alone or not.
    pub fn loads(&self) -> Vec<WorkerLoad> {
        self.lock().workers.values().map(|entry| entry.load.clone()).collect()
    }

    /// Changes after each report and each end of a request.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Counts one request with this many prompt tokens to compute, in about so
    /// many seconds, from now on. Its prompt consists of `blocks`.
    pub fn begin(&self, worker: &Worker, tokens: u64, seconds: f64, blocks: Arc<[u64]>) -> InFlight {
        let now = worker.own.seconds();
        let mut known = worker.own.lock();
        let job = known.active.send(tokens, seconds, now);
        known.active.brings(job, blocks);
        drop(known);
        InFlight { own: Arc::clone(&worker.own), job, changed: self.changed.clone() }
    }

    /// Learns from a prompt that a worker has computed.
    pub fn computed(&self, worker: &Worker, computed: Computed) {
        if computed.computed_tokens < OBSERVED_TOKENS_MIN {
            return;
        }
        let whole = Duration::from_micros(computed.prefill_us).as_secs_f64();
        let seconds = (whole - computed.load_seconds).max(whole * COMPUTE_SHARE_MIN);
        let guess = || Calibration::new(Prefill::of_rate(worker.load.prefill_tokens_per_second));
        let mut known = worker.own.lock();
        known.calibration.get_or_insert_with(guess).observe(
            computed.cached_tokens.into(),
            computed.computed_tokens.into(),
            seconds,
        );
    }

    /// The worker's endpoint failed: leave it alone for a while. One that no
    /// report names any more is forgotten.
    pub fn failed(&self, worker: &Worker, now: Instant) {
        let mut state = self.lock();
        let Some(entry) = state.entry(worker) else { return };
        if entry.absent_since.is_some() {
            state.workers.remove(&worker.load.name);
            return;
        }
        entry.is_busy = false;
        let doublings = entry.failures.min(8);
        entry.failures += 1;
        entry.suspended_until = Some(now + (SUSPEND * (1 << doublings)).min(SUSPEND_MAX));
    }

    /// The worker is there but takes nothing now.
    pub fn busy(&self, worker: &Worker, now: Instant) {
        if let Some(entry) = self.lock().entry(worker) {
            entry.is_busy = true;
            entry.suspended_until = Some(now + SUSPEND_BUSY);
        }
    }

    /// The worker is on its way out: it is offered nothing until it reports otherwise.
    pub fn leaving(&self, worker: &Worker, now: Instant) {
        if let Some(entry) = self.lock().entry(worker) {
            entry.load.draining = true;
            // A report from before it began to leave may still be on its way.
            entry.suspended_until = Some(now + SUSPEND_BUSY);
        }
    }

    /// The worker answered.
    pub fn answered(&self, worker: &Worker) {
        if let Some(entry) = self.lock().entry(worker) {
            entry.failures = 0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is complete before it is visible, so a panic elsewhere
        // leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The entry of the very process that a caller has in hand, not of a
    /// successor under its name.
    fn entry(&mut self, worker: &Worker) -> Option<&mut Entry> {
        self.workers.get_mut(&worker.load.name).filter(|entry| Arc::ptr_eq(&entry.own, &worker.own))
    }
}

impl Entry {
    /// The entry of a reported worker: the known one if it is the same process.
    fn updated(known: Option<Self>, load: &WorkerLoad, clock: Instant) -> Option<Self> {
        if let Some(mut entry) = known
            && entry.load.endpoint == load.endpoint
            && entry.load.pid == load.pid
        {
            entry.load = load.clone();
            entry.absent_since = None;
            return Some(entry);
        }
        let endpoint = match Endpoint::from_shared(load.endpoint.clone()) {
            Ok(endpoint) => endpoint,
            Err(error) => {
                tracing::warn!(worker = load.name, endpoint = load.endpoint, %error, "worker left out: its endpoint is no address");
                return None;
            }
        };
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .connect_lazy();
        Some(Self {
            load: load.clone(),
            channel,
            own: Arc::new(Own { clock, known: Mutex::default() }),
            failures: 0,
            suspended_until: None,
            is_busy: false,
            absent_since: None,
        })
    }

    fn worker(&self, space: usize) -> Worker {
        let load = &self.load;
        let reported = reported(load);
        let now = self.own.seconds();
        let known = self.own.lock();
        let guess = || Prefill::of_rate(load.prefill_tokens_per_second);
        let candidate = Candidate {
            view: space,
            space,
            queued_seconds: known.active.queue_seconds(now, reported),
            pending_tokens: known.active.pending_tokens(now, reported),
            requests: known.active.requests(now, reported),
            requests_max: load.requests_max,
            decodes: match load.role() {
                WorkerRole::Prefill => Decodes::Elsewhere,
                WorkerRole::Decode | WorkerRole::Unspecified => Decodes::Here,
            },
            prefill: known.calibration.map_or_else(guess, |calibration| calibration.cost()),
            decode_rate: load.decode_tokens_per_second,
        };
        Worker {
            load: load.clone(),
            candidate,
            channel: self.channel.clone(),
            prompts: known.active.prompts(now, reported),
            is_filled: load.requests_max > 0 && known.active.count() >= load.requests_max,
            own: Arc::clone(&self.own),
        }
    }
}

#[cfg(test)]
mod tests;

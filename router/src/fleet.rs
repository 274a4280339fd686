//! The workers that the router knows, what they reported last, and what the
//! router itself has in flight on each.
//!
//! Reports lag by some hundred milliseconds, so the router's own count stands
//! beside them and the larger of the two is believed. While the daemon is away
//! the last known workers stay; one whose endpoint fails is left alone for a
//! while, longer after each failure in a row.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use terrace_proto::v1;
use terrace_proto::v1::{WorkerLoad, WorkerRole};
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

use crate::place::Candidate;

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

/// All known workers. Cheap to ask; safe to share.
#[derive(Debug)]
pub struct Fleet {
    state: Mutex<State>,
    changed: watch::Sender<()>,
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

/// What this router has in flight on one worker.
#[derive(Debug, Default)]
struct Own {
    requests: AtomicU32,
    tokens: AtomicU64,
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
    tokens: u64,
    changed: watch::Sender<()>,
}

impl InFlight {
    /// The prompt is computed: only the request itself still counts.
    pub fn computed(&mut self) {
        self.own.tokens.fetch_sub(std::mem::take(&mut self.tokens), Ordering::Relaxed);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.computed();
        self.own.requests.fetch_sub(1, Ordering::Relaxed);
        self.changed.send_replace(());
    }
}

impl Default for Fleet {
    fn default() -> Self {
        Self { state: Mutex::default(), changed: watch::Sender::new(()) }
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
            let known = known.remove(&load.name);
            if let Some(entry) = Entry::updated(known, load) {
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

    /// Counts one request with this many prompt tokens to compute, from now on.
    pub fn begin(&self, worker: &Worker, tokens: u64) -> InFlight {
        worker.own.requests.fetch_add(1, Ordering::Relaxed);
        worker.own.tokens.fetch_add(tokens, Ordering::Relaxed);
        InFlight { own: Arc::clone(&worker.own), tokens, changed: self.changed.clone() }
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
    fn updated(known: Option<Self>, load: &WorkerLoad) -> Option<Self> {
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
            own: Arc::default(),
            failures: 0,
            suspended_until: None,
            is_busy: false,
            absent_since: None,
        })
    }

    fn worker(&self, space: usize) -> Worker {
        let own_requests = self.own.requests.load(Ordering::Relaxed);
        let own_tokens = self.own.tokens.load(Ordering::Relaxed);
        let reported = self.load.active_requests.saturating_add(self.load.queued_requests);
        let candidate = Candidate {
            space,
            pending_tokens: self.load.pending_tokens.max(own_tokens),
            requests: reported.max(own_requests),
            requests_max: self.load.requests_max,
            prefill_rate: self.load.prefill_tokens_per_second,
            decode_rate: self.load.decode_tokens_per_second,
        };
        Worker {
            load: self.load.clone(),
            candidate,
            channel: self.channel.clone(),
            is_filled: self.load.requests_max > 0 && own_requests >= self.load.requests_max,
            own: Arc::clone(&self.own),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(name: &str, pid: u32) -> WorkerLoad {
        WorkerLoad {
            name: name.to_owned(),
            role: WorkerRole::Decode.into(),
            endpoint: "http://127.0.0.1:1".to_owned(),
            pid,
            space: Some(v1::SpaceManifest::default()),
            requests_max: 2,
            ..WorkerLoad::default()
        }
    }

    fn reports(incarnation: u64, workers: &[WorkerLoad]) -> v1::ObserveResponse {
        v1::ObserveResponse { incarnation, workers: workers.to_vec(), pressures: Vec::new() }
    }

    fn names(fleet: &Fleet, now: Instant) -> Vec<String> {
        fleet.view(now, |_| true).decode.into_iter().map(|worker| worker.load.name).collect()
    }

    /// A daemon that restarts knows no worker for a moment; dropping them all would answer 503 to
    /// everybody although each worker is alive. One that the same daemon forgot is really gone.
    #[tokio::test]
    async fn workers_survive_a_restart_of_the_daemon() {
        let (fleet, now) = (Fleet::default(), Instant::now());
        fleet.observe(&reports(1, &[load("a", 1), load("b", 2)]), now);
        fleet.observe(&reports(1, &[load("a", 1)]), now);
        assert_eq!(names(&fleet, now), ["a"]);
        fleet.observe(&reports(2, &[]), now);
        fleet.observe(&reports(2, &[]), now + Duration::from_secs(1));
        assert_eq!(names(&fleet, now), ["a"]);
        fleet.observe(&reports(2, &[]), now + ABSENT_MAX);
        assert!(names(&fleet, now).is_empty());
        // Without the daemon's word, the first failure is the last.
        fleet.observe(&reports(2, &[load("a", 1)]), now);
        fleet.observe(&reports(3, &[]), now);
        let worker = fleet.view(now, |_| true).decode.remove(0);
        fleet.failed(&worker, now);
        assert!(fleet.loads().is_empty());
    }

    /// A worker that fails must be left alone for a growing while, and a successor under the same name
    /// must not inherit that, nor the work in flight of the dead one.
    #[tokio::test]
    async fn failures_suspend_one_process_only() {
        let (fleet, now) = (Fleet::default(), Instant::now());
        fleet.observe(&reports(1, &[load("a", 1)]), now);
        let worker = fleet.view(now, |_| true).decode.remove(0);
        let _in_flight = fleet.begin(&worker, 100);
        fleet.failed(&worker, now);
        fleet.failed(&worker, now);
        assert!(names(&fleet, now + SUSPEND).is_empty());
        assert_eq!(names(&fleet, now + SUSPEND * 2), ["a"]);
        fleet.observe(&reports(1, &[load("a", 2)]), now);
        fleet.failed(&worker, now);
        let successor = fleet.view(now, |_| true).decode.remove(0);
        assert_eq!((successor.candidate.requests, successor.candidate.pending_tokens), (0, 0));
    }

    /// Reports lag: two requests sent within one report must count at once, and cease to count when they end.
    #[tokio::test]
    async fn work_in_flight_counts_before_it_is_reported() {
        let (fleet, now) = (Fleet::default(), Instant::now());
        let reported = WorkerLoad { active_requests: 1, pending_tokens: 30, ..load("a", 1) };
        fleet.observe(&reports(1, &[reported]), now);
        let view = || fleet.view(now, |_| true).decode.remove(0);
        let mut first = fleet.begin(&view(), 100);
        let second = fleet.begin(&view(), 50);
        assert_eq!((view().candidate.requests, view().candidate.pending_tokens), (2, 150));
        assert!(view().is_filled && view().candidate.is_full());
        first.computed();
        drop(second);
        assert_eq!((view().candidate.requests, view().candidate.pending_tokens), (1, 30));
        let mut changes = fleet.changes();
        drop(first);
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
    }

    /// A draining worker, one of another model, and one with a broken address take nothing new.
    #[tokio::test]
    async fn unfit_workers_are_not_offered() {
        let (fleet, now) = (Fleet::default(), Instant::now());
        let draining = WorkerLoad { draining: true, ..load("a", 1) };
        let broken = WorkerLoad { endpoint: "not an address".to_owned(), ..load("b", 2) };
        let foreign = WorkerLoad { model_path: "/other".to_owned(), ..load("c", 3) };
        fleet.observe(&reports(1, &[draining, broken, foreign]), now);
        assert!(fleet.view(now, |load| load.model_path.is_empty()).decode.is_empty());
        assert_eq!(fleet.loads().len(), 2);
    }
}

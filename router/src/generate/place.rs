//! Where the next step of an answer runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_proto::v1;

use super::{Answer, BLOCK_TOKENS};
use crate::error::ApiError;
use crate::fleet::{InFlight, View, Worker};
use crate::metrics::Path;
use crate::place::source::{self, Link, Run, Tier};
use crate::place::{self, Candidate};

/// Failed separate prefills after which decode computes the prompt itself.
const PREFILL_FAILURES_MAX: u32 = 2;
/// A waiting request looks again at least this often.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// One that is behind others is woken for its turn, and looks this often whether waiting is still of use.
const LOOK_AGAIN_BEHIND: Duration = Duration::from_millis(500);
/// Prompts that a worker has at least before it counts as having enough: one to compute, one behind it.
const PROMPTS_AHEAD: usize = 2;

/// Where the next step runs. Counted as in flight from now on.
pub(super) struct Placed {
    pub(super) worker: Worker,
    pub(super) role: Step,
    /// Estimated seconds of loading what is there.
    pub(super) load_seconds: f64,
    /// Estimated seconds to its first token, or to the end of its prefill.
    pub(super) seconds: f64,
    pub(super) in_flight: InFlight,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Prefill,
    Generate,
}

impl Answer<'_> {
    /// Waits until a worker has a place, and takes it. A request has its turn once; what comes after, and
    /// what goes on after a failure, waits for a place only.
    pub(super) async fn place(&mut self) -> Result<Placed, ApiError> {
        if self.charge.is_none() {
            return self.first_place().await;
        }
        let mut changes = self.router.fleet.changes();
        let mut seen = Instant::now();
        loop {
            let view = self.known_view().await;
            if let Some(placed) = self.choose(&view)? {
                return Ok(placed);
            }
            self.refuse_if_late(0.0)?;
            self.refuse_if_alone(&view, &mut seen)?;
            // An unchanged fleet is looked at again as well: suspensions end by themselves.
            let _ = tokio::time::timeout(LOOK_AGAIN, changes.changed()).await;
        }
    }

    /// Waits for its turn, then for a worker that has room.
    async fn first_place(&mut self) -> Result<Placed, ApiError> {
        let router = self.router;
        let mut changes = router.fleet.changes();
        let began = Instant::now();
        let mut seen = began;
        let view = self.known_view().await;
        let (prompt, most) = (self.least_missing(&view), u64::from(self.job.tokens_max));
        let entered = router.admission.enter(&self.job.model.id, &self.job.caller, prompt, most);
        let waiting = entered.map_err(|refused| router.refuse(&refused))?;
        self.refuse_if_late(waiting.seconds())?;
        loop {
            let view = self.known_view().await;
            let is_first = waiting.is_first().map_err(|refused| router.refuse(&refused))?;
            if is_first
                && self.has_room(&view)
                && let Some(placed) = self.choose(&view)?
            {
                self.charge = Some(waiting.served(prompt));
                router.metrics.waited(self.job.caller.class.name(), began.elapsed());
                return Ok(placed);
            }
            self.refuse_if_late(0.0)?;
            self.refuse_if_alone(&view, &mut seen)?;
            if is_first {
                let _ = tokio::time::timeout(LOOK_AGAIN, changes.changed()).await;
            } else {
                waiting.turn(LOOK_AGAIN_BEHIND).await;
            }
        }
    }

    /// The workers as they are now, with what the index says of every space of theirs.
    async fn known_view(&mut self) -> View {
        loop {
            let view = self.view();
            let unknown = view.spaces.iter().find(|space| !self.knows(space)).cloned();
            let Some(space) = unknown else { return view };
            let router = self.router;
            let found = router.index.look_up(&space, &self.job.tokens, &router.metrics).await;
            self.found.push((space, found));
        }
    }

    /// Prompt tokens that have to be computed wherever it goes.
    fn least_missing(&self, view: &View) -> u64 {
        let tokens = self.job.tokens.len() as u64;
        let ends = view.spaces.iter().flat_map(|space| self.sources(space));
        let longest = ends.map(|view| view.runs.iter().map(|run| run.end).max().unwrap_or(0)).max();
        tokens.saturating_sub(longest.unwrap_or(0)).max(1)
    }

    /// Whether some worker would begin with it soon. What is sent to a worker can be overtaken no more, so
    /// that a request waits here while all of them have enough.
    fn has_room(&self, view: &View) -> bool {
        let limit = self.router.config.worker_queue.as_secs_f64();
        let soon =
            |worker: &Worker| worker.prompts < PROMPTS_AHEAD || worker.candidate.queued_seconds < limit;
        let decode = view.decode.iter().filter(|worker| !worker.is_filled);
        view.prefill.iter().chain(decode).any(soon)
    }

    /// `since` is when the last worker was seen; it moves on while there is one.
    fn refuse_if_alone(&self, view: &View, since: &mut Instant) -> Result<(), ApiError> {
        if !view.decode.is_empty() || view.busy > 0 {
            *since = Instant::now();
        }
        if since.elapsed() < self.router.config.worker_wait {
            return Ok(());
        }
        let message = "no decode worker is left; start one with `terrace-worker decode`, or see \
                       the planner's output for why it starts none";
        Err(ApiError::no_worker(message))
    }

    fn view(&self) -> View {
        let serves = |load: &v1::WorkerLoad| {
            self.router.models.of(load).is_some_and(|model| Arc::ptr_eq(&model, &self.job.model))
        };
        self.router.fleet.view(Instant::now(), serves)
    }

    fn knows(&self, space: &v1::SpaceManifest) -> bool {
        self.prefilled.is_some() || self.found.iter().any(|(known, _)| known == space)
    }

    /// A request whose first token would come too late is refused before it costs anything.
    fn refuse_if_late(&self, seconds: f64) -> Result<(), ApiError> {
        let Some(wanted) = self.job.first_token_by.filter(|_| !self.started) else { return Ok(()) };
        let (wanted, expected) = (wanted.as_secs_f64(), self.job.arrived.elapsed().as_secs_f64() + seconds);
        if expected <= wanted {
            return Ok(());
        }
        self.router.metrics.late();
        Err(ApiError::late(expected, wanted))
    }

    fn choose(&mut self, view: &View) -> Result<Option<Placed>, ApiError> {
        let tokens = (self.job.tokens.len() + self.generated.len()) as u64;
        let mut views: Vec<source::View> = view.spaces.iter().flat_map(|space| self.sources(space)).collect();
        let free: Vec<&Worker> = view.decode.iter().filter(|worker| !worker.is_filled).collect();
        let decode: Vec<Candidate> = free.iter().map(|worker| self.candidate(worker, &mut views)).collect();
        let wants_prefill = self.prefilled.is_none() && self.prefill_failures < PREFILL_FAILURES_MAX;
        let helpers: &[Worker] = if wants_prefill { &view.prefill } else { &[] };
        let prefill: Vec<Candidate> =
            helpers.iter().map(|worker| self.candidate(worker, &mut views)).collect();
        let Some(plan) = place::choose(tokens, &views, &prefill, &decode, self.router.ties()) else {
            return Ok(None);
        };
        let estimate = plan.estimate;
        self.refuse_if_late(estimate.first_token())?;
        if self.estimate_seconds.is_none() {
            self.estimate_seconds = Some(estimate.first_token());
            self.router.metrics.placed(if plan.prefill.is_some() { Path::Separate } else { Path::Direct });
        }
        self.share.missing(estimate.missing_tokens);
        let (worker, role) = match plan.prefill {
            Some(index) => (&helpers[index], Step::Prefill),
            None => (free[plan.decode], Step::Generate),
        };
        let work = estimate.load + estimate.prefill;
        let in_flight =
            self.router.fleet.begin(worker, estimate.missing_tokens, work, Arc::clone(&self.blocks));
        self.prefetch(&view.spaces[worker.candidate.space], &plan);
        tracing::debug!(
            request = self.job.id,
            worker = worker.load.name,
            tokens,
            missing = estimate.missing_tokens,
            loaded = estimate.loaded_tokens,
            queue = estimate.queue,
            load = estimate.load,
            prefill = estimate.prefill,
            handover = estimate.handover,
            harm = estimate.harm,
            "placed"
        );
        Ok(Some(Placed {
            worker: worker.clone(),
            role,
            load_seconds: estimate.load,
            seconds: estimate.first_token(),
            in_flight,
        }))
    }

    /// A worker with a view of its own, if prompts that it has before this one bring more of it than there is.
    fn candidate(&self, worker: &Worker, views: &mut Vec<source::View>) -> Candidate {
        let candidate = self.router.homes.candidate(worker, self.router.index.daemons());
        let coming = (worker.coming(&self.blocks) * BLOCK_TOKENS) as u64;
        let known = &views[candidate.view];
        if coming <= known.runs.iter().map(|run| run.end).max().unwrap_or(0) {
            return candidate;
        }
        let mut view = known.clone();
        let rates = view.links.iter().map(|link| link.seconds_per_token);
        let link = Link {
            holder: 0,
            tier: Tier::Pinned,
            latency_seconds: 0.0,
            seconds_per_token: rates.reduce(f64::min).unwrap_or(0.0),
            queued_seconds: 0.0,
        };
        view.runs.push(Run { link: view.links.len(), begin: 0, end: coming });
        view.links.push(link);
        views.push(view);
        Candidate { view: views.len() - 1, ..candidate }
    }

    /// Where a space has the prompt's blocks, for each daemon. What a prefill worker
    /// has just sealed is all there.
    fn sources(&self, space: &v1::SpaceManifest) -> Vec<source::View> {
        let daemons = self.router.index.daemons();
        if self.prefilled.is_some() {
            let link = Link {
                holder: 0,
                tier: Tier::Pinned,
                latency_seconds: 0.0,
                seconds_per_token: 0.0,
                queued_seconds: 0.0,
            };
            let run = Run { link: 0, begin: 0, end: self.job.tokens.len() as u64 };
            return vec![source::View { links: vec![link], runs: vec![run] }; daemons];
        }
        let found = self.found.iter().find(|(known, _)| known == space);
        found.map_or_else(|| vec![source::View::default(); daemons], |(_, found)| found.views.clone())
    }

    /// What will be loaded from a slow tier is asked for before the worker is.
    fn prefetch(&self, space: &v1::SpaceManifest, plan: &place::Plan) {
        let Some((_, found)) = self.found.iter().find(|(known, _)| known == space) else { return };
        for part in plan.prefetches() {
            self.router.index.prefetch(space, found, part);
        }
    }
}

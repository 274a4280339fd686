//! One answer, from its prompt's tokens to its last piece of text.
//!
//! Runs as a task of its own: places the request, has the prompt computed, and
//! streams text. When a worker fails the task goes on with another one, even in
//! the middle of an answer: the tokens so far become part of the prompt, so the
//! client sees none twice and misses none. When nobody listens any more the task
//! ends, and with it the call to the worker, which gives back what it held.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use terrace_proto::v1;
use terrace_proto::v1::generate_response::Part;
use terrace_proto::v1::worker_service_client::WorkerServiceClient;
use terrace_worker::tokenizer::DecodeStream;
use tokio::sync::mpsc;
use tonic::{Code, Request, Status};

use crate::error::ApiError;
use crate::fleet::{Computed, InFlight, View, Worker};
use crate::index::Found;
use crate::metrics::Path;
use crate::models::Model;
use crate::place::source::{self, Link, Run, Tier};
use crate::place::{self, Candidate};
use crate::pressure::Share;
use crate::response::{Finish, Usage};
use crate::serve::{Place, Router};
use crate::stop::{Passed, StopFilter};

/// Events that may wait for a slow client; then the worker waits too.
const EVENTS_MAX: usize = 64;
/// Failed separate prefills after which decode computes the prompt itself.
const PREFILL_FAILURES_MAX: u32 = 2;
/// A waiting request looks again at least this often.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Step of the sampler's random numbers; see [`seed_after`].
const SEED_STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// What to generate.
pub struct Job {
    /// Appears in logs of the router and the workers.
    pub id: String,
    /// Whose tokens these are.
    pub model: Arc<Model>,
    /// The prompt; at least one token.
    pub tokens: Vec<u32>,
    /// Texts that end the answer.
    pub stops: Vec<String>,
    /// Most tokens to generate.
    pub tokens_max: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus, in (0, 1].
    pub top_p: f32,
    /// Seed of the sampler.
    pub seed: u64,
    /// When the request came in.
    pub arrived: Instant,
    /// Time after that in which the first token is wanted; without it nobody waits for the answer.
    pub first_token_by: Option<Duration>,
}

/// What becomes of it.
#[derive(Debug)]
pub enum Event {
    /// The prompt is computed.
    Started,
    /// Some text; never empty.
    Text(String),
    /// The end.
    Finished(Finish, Usage),
    /// The end, before its time.
    Failed(ApiError),
}

/// Starts a job. It ends when the receiver is dropped.
pub fn start(router: Arc<Router>, job: Job, place: Place) -> mpsc::Receiver<Event> {
    let (events, receiver) = mpsc::channel(EVENTS_MAX);
    tokio::spawn(async move {
        let _place = place;
        let deadline = tokio::time::Instant::from_std(job.arrived + router.config.request_time_max);
        let answer = Answer::new(&router, &job, &events);
        let outcome = tokio::select! {
            biased;
            () = events.closed() => {
                router.metrics.cancelled();
                tracing::info!(request = job.id, "the client went away");
                return;
            }
            outcome = tokio::time::timeout_at(deadline, answer.run()) => outcome,
        };
        let error = match outcome {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => {
                let seconds = router.config.request_time_max.as_secs();
                let message = format!("the answer was not complete after {seconds} s, which is the limit");
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, message).code("timeout")
            }
        };
        tracing::info!(request = job.id, status = error.status.as_u16(), %error, "the request failed");
        // Nobody left to tell is no failure.
        let _ = events.send(Event::Failed(error)).await;
    });
    receiver
}

/// The seed that continues after some sampled tokens as if one worker had
/// sampled all of them: the sampler adds one step a token.
fn seed_after(seed: u64, tokens: usize) -> u64 {
    seed.wrapping_add(SEED_STEP.wrapping_mul(tokens as u64))
}

struct Answer<'a> {
    router: &'a Router,
    job: &'a Job,
    events: &'a mpsc::Sender<Event>,
    share: Share,
    decode: DecodeStream<'a>,
    filter: StopFilter,
    generated: Vec<u32>,
    /// What the index said, by space.
    found: Vec<(v1::SpaceManifest, Found)>,
    /// What a separate prefill said.
    prefilled: Option<v1::PrefillResponse>,
    prefill_failures: u32,
    failures: u32,
    cached_tokens: Option<u64>,
    estimate_seconds: Option<f64>,
    ttft: Option<Duration>,
    started: bool,
}

/// Where the next step runs. Counted as in flight from now on.
struct Placed {
    worker: Worker,
    role: Step,
    /// Estimated seconds of loading what is there.
    load_seconds: f64,
    in_flight: InFlight,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Prefill,
    Generate,
}

/// What a worker's failure means for the request.
enum Failure {
    /// The worker refused the request itself.
    Refused(ApiError),
    /// The worker takes nothing now.
    Busy,
    /// The worker is to be avoided.
    Broken,
}

impl<'a> Answer<'a> {
    fn new(router: &'a Router, job: &'a Job, events: &'a mpsc::Sender<Event>) -> Self {
        Self {
            router,
            job,
            events,
            share: router.pressure.arrive(job.tokens.len() as u64),
            decode: job.model.tokenizer.decode_stream(),
            filter: StopFilter::new(job.stops.clone()),
            generated: Vec::new(),
            found: Vec::new(),
            prefilled: None,
            prefill_failures: 0,
            failures: 0,
            cached_tokens: None,
            estimate_seconds: None,
            ttft: None,
            started: false,
        }
    }

    async fn run(mut self) -> Result<(), ApiError> {
        loop {
            let placed = self.place().await?;
            let worker = placed.worker.clone();
            let result = match placed.role {
                Step::Prefill => self.prefill(placed).await.map(|()| None),
                Step::Generate => self.generate(placed).await,
            };
            match result {
                Ok(Some(finish)) => return self.finish(finish).await,
                Ok(None) => {}
                Err(status) => self.failed(&worker, &status)?,
            }
            if self.generated.len() >= self.job.tokens_max as usize {
                return self.finish(Finish::Length).await;
            }
        }
    }

    /// Waits until a worker has a place, and takes it.
    async fn place(&mut self) -> Result<Placed, ApiError> {
        let router = self.router;
        let mut changes = router.fleet.changes();
        let began = Instant::now();
        let mut waiting = None;
        loop {
            let view = self.view();
            if let Some(space) = view.spaces.iter().find(|space| !self.knows(space)).cloned() {
                let found = router.index.look_up(&space, &self.job.tokens, &router.metrics).await;
                self.found.push((space, found));
                continue;
            }
            if let Some(placed) = self.choose(&view)? {
                return Ok(placed);
            }
            self.refuse_if_late(0.0)?;
            if view.decode.is_empty() && view.busy == 0 && began.elapsed() >= router.config.worker_wait {
                let message = "no decode worker is left; start one with `terrace-worker decode`, or see \
                               the planner's output for why it starts none";
                return Err(ApiError::no_worker(message));
            }
            if waiting.is_none() {
                waiting = Some(router.queue()?);
            }
            // An unchanged fleet is looked at again as well: suspensions end by themselves.
            let _ = tokio::time::timeout(LOOK_AGAIN, changes.changed()).await;
        }
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
        let views: Vec<source::View> = view.spaces.iter().flat_map(|space| self.sources(space)).collect();
        let free: Vec<&Worker> = view.decode.iter().filter(|worker| !worker.is_filled).collect();
        let decode = self.candidates(free.iter().copied());
        let wants_prefill = self.prefilled.is_none() && self.prefill_failures < PREFILL_FAILURES_MAX;
        let helpers: &[Worker] = if wants_prefill { &view.prefill } else { &[] };
        let prefill = self.candidates(helpers);
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
        let in_flight = self.router.fleet.begin(worker, estimate.missing_tokens, work);
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
        Ok(Some(Placed { worker: worker.clone(), role, load_seconds: estimate.load, in_flight }))
    }

    fn candidates<'w>(&self, workers: impl IntoIterator<Item = &'w Worker>) -> Vec<Candidate> {
        self.router.homes.candidates(workers, self.router.index.daemons())
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

    async fn prefill(&mut self, placed: Placed) -> Result<(), Status> {
        let tokens = [self.job.tokens.as_slice(), &self.generated].concat();
        let request = v1::PrefillRequest { request_id: self.job.id.clone(), tokens };
        let answer = client(&placed.worker).prefill(self.request(request)).await?.into_inner();
        self.router.fleet.answered(&placed.worker);
        let computed = Computed {
            cached_tokens: answer.cached_tokens,
            computed_tokens: answer.computed_tokens,
            prefill_us: answer.prefill_us,
            load_seconds: placed.load_seconds,
        };
        self.router.fleet.computed(&placed.worker, computed);
        self.prefilled = Some(answer);
        Ok(())
    }

    /// Streams tokens. `None` never comes back: the type is that of all steps.
    async fn generate(&mut self, placed: Placed) -> Result<Option<Finish>, Status> {
        let Placed { worker, mut in_flight, load_seconds, .. } = placed;
        let request = v1::GenerateRequest {
            request_id: self.job.id.clone(),
            tokens: [self.job.tokens.as_slice(), &self.generated].concat(),
            tokens_max: self.job.tokens_max.saturating_sub(count(self.generated.len())),
            temperature: self.job.temperature,
            top_p: self.job.top_p,
            seed: seed_after(self.job.seed, self.generated.len()),
            stop_tokens: self.job.model.tokenizer.ends().to_vec(),
            prefilled_tokens: self.prefilled.map_or(0, |answer| answer.computed_tokens),
        };
        let mut stream = client(&worker).generate(self.request(request)).await?.into_inner();
        if !self.generated.is_empty() {
            self.router.metrics.resumed();
        }
        while let Some(message) = stream.message().await? {
            match message.part {
                Some(Part::Started(started)) => {
                    in_flight.computed();
                    self.router.fleet.answered(&worker);
                    let computed = Computed {
                        cached_tokens: started.cached_tokens,
                        computed_tokens: started.computed_tokens,
                        prefill_us: started.prefill_us,
                        load_seconds,
                    };
                    self.router.fleet.computed(&worker, computed);
                    self.started(started).await;
                }
                Some(Part::Token(token)) => {
                    if let Some(finish) = self.token(token).await {
                        return Ok(Some(finish));
                    }
                }
                Some(Part::Finished(finished)) => {
                    return Ok(Some(match finished.reason() {
                        v1::FinishReason::Length => Finish::Length,
                        v1::FinishReason::Stop | v1::FinishReason::Unspecified => Finish::Stop,
                    }));
                }
                // A part of a later release.
                None => {}
            }
        }
        Err(Status::unavailable("the worker ended its answer without a last word"))
    }

    async fn started(&mut self, started: v1::GenerateStarted) {
        // After a failure the tokens that the first worker took from the cache still count.
        let cached = self.prefilled.map_or(started.cached_tokens, |answer| answer.cached_tokens);
        self.cached_tokens.get_or_insert(u64::from(cached).min(self.job.tokens.len() as u64));
        if !std::mem::replace(&mut self.started, true) {
            self.send(Event::Started).await;
        }
    }

    async fn token(&mut self, token: u32) -> Option<Finish> {
        if self.ttft.is_none() {
            let ttft = self.job.arrived.elapsed();
            self.ttft = Some(ttft);
            self.share.first_token();
            self.router.metrics.first_token(ttft, self.estimate_seconds.unwrap_or(0.0));
        }
        self.generated.push(token);
        let text = self.decode.push(token);
        if self.pass(&text).await {
            return Some(Finish::Stop);
        }
        (self.generated.len() >= self.job.tokens_max as usize).then_some(Finish::Length)
    }

    /// Shows text; true if a stop text was in it.
    async fn pass(&mut self, text: &str) -> bool {
        let (text, stopped) = match self.filter.push(text) {
            Passed::Text(text) => (text, false),
            Passed::Stopped(text) => (text, true),
        };
        if !text.is_empty() {
            self.send(Event::Text(text)).await;
        }
        stopped
    }

    async fn finish(mut self, finish: Finish) -> Result<(), ApiError> {
        let decode = std::mem::replace(&mut self.decode, self.job.model.tokenizer.decode_stream());
        let rest = decode.finish();
        self.pass(&rest).await;
        let held = self.filter.finish();
        if !held.is_empty() {
            self.send(Event::Text(held)).await;
        }
        let usage = Usage {
            prompt_tokens: self.job.tokens.len() as u64,
            completion_tokens: self.generated.len() as u64,
            cached_tokens: self.cached_tokens.unwrap_or(0),
        };
        let ttft = self.ttft.unwrap_or_else(|| self.job.arrived.elapsed());
        self.router.metrics.tokens(usage);
        tracing::info!(
            request = self.job.id,
            prompt = usage.prompt_tokens,
            cached = usage.cached_tokens,
            generated = usage.completion_tokens,
            ttft_ms = ttft.as_millis(),
            total_ms = self.job.arrived.elapsed().as_millis(),
            prefilled = self.prefilled.is_some(),
            "answered"
        );
        self.send(Event::Finished(finish, usage)).await;
        self.share.finish(Instant::now(), usage.cached_tokens, ttft);
        Ok(())
    }

    /// Decides what a failure means. `Ok` is: place the request again.
    fn failed(&mut self, worker: &Worker, status: &Status) -> Result<(), ApiError> {
        let (role, is_prefill) = match worker.load.role() {
            v1::WorkerRole::Prefill => ("prefill", true),
            v1::WorkerRole::Decode | v1::WorkerRole::Unspecified => ("decode", false),
        };
        match classify(status) {
            Failure::Refused(error) => return Err(error),
            Failure::Busy => {
                self.router.fleet.busy(worker, Instant::now());
                return Ok(());
            }
            Failure::Broken => {}
        }
        self.router.fleet.failed(worker, Instant::now());
        self.router.metrics.worker_failed(role);
        tracing::warn!(
            request = self.job.id,
            worker = worker.load.name,
            endpoint = worker.load.endpoint,
            reason = status.message(),
            generated = self.generated.len(),
            "a worker failed; trying another"
        );
        if is_prefill {
            self.prefill_failures += 1;
            return Ok(());
        }
        self.failures += 1;
        if self.failures < self.router.config.attempts_max {
            return Ok(());
        }
        let message =
            format!("{} workers failed on this request; the last said: {}", self.failures, status.message());
        Err(ApiError { retry_after: Some(1), ..ApiError::new(StatusCode::BAD_GATEWAY, message) }
            .code("worker_failed"))
    }

    async fn send(&self, event: Event) {
        // When nobody listens the task is about to end.
        let _ = self.events.send(event).await;
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.router.config.request_time_max.saturating_sub(self.job.arrived.elapsed()));
        request
    }
}

fn client(worker: &Worker) -> WorkerServiceClient<tonic::transport::Channel> {
    WorkerServiceClient::new(worker.channel.clone())
        .max_encoding_message_size(terrace_proto::MESSAGE_BYTES_MAX)
}

fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

fn classify(status: &Status) -> Failure {
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange => {
            let error = ApiError::new(StatusCode::BAD_REQUEST, status.message());
            Failure::Refused(error.code("refused_by_worker"))
        }
        Code::ResourceExhausted => Failure::Busy,
        _ => Failure::Broken,
    }
}

#[cfg(test)]
mod tests {
    use terrace_worker::sampler::{Sampler, Sampling};

    use super::*;

    /// An answer that goes on elsewhere must draw the numbers that the first worker would have drawn, or
    /// the same seed would give two texts.
    #[test]
    fn a_continued_seed_draws_the_same_numbers() {
        let logits = [0.3, 0.1, 0.9, 0.2, 0.5];
        let sampling = Sampling { temperature: 1.0, top_p: 0.95, seed: u64::MAX - 3 };
        let mut whole = Sampler::new(sampling);
        let tokens: Vec<u32> = (0..40).map(|_| whole.next(&logits)).collect();
        for cut in [1, 7, 39] {
            let mut rest = Sampler::new(Sampling { seed: seed_after(sampling.seed, cut), ..sampling });
            let rest: Vec<u32> = (cut..40).map(|_| rest.next(&logits)).collect();
            assert_eq!(rest, tokens[cut..], "cut at {cut}");
        }
    }
}

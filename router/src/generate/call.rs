//! The calls to workers, and what their ends mean.
//!
//! Whatever a worker sends before it fails stands. One that says nothing for too
//! long has failed as well: a process can hang with its connection alive.

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use terrace_proto::v1;
use terrace_proto::v1::generate_response::Part;
use terrace_proto::v1::worker_service_client::WorkerServiceClient;
use tonic::{Code, Request, Status};

use super::place::Placed;
use super::{Answer, Event, seed_after};
use crate::error::ApiError;
use crate::fleet::{Computed, Worker};
use crate::response::Finish;
use crate::stop::Passed;

/// How many times as long as estimated a first token may take, beyond what may pass between two.
const ESTIMATE_ERROR_MAX: f64 = 10.0;

/// What a worker's failure means for the request.
enum Failure {
    /// The worker is on its way out; what it said stands.
    Leaving,
    /// The worker refused the request itself.
    Refused(ApiError),
    /// The worker takes nothing now.
    Busy,
    /// The worker is to be avoided.
    Broken,
}

impl Answer<'_> {
    pub(super) async fn prefill(&mut self, mut placed: Placed) -> Result<(), Status> {
        let tokens = [self.job.tokens.as_slice(), &self.generated].concat();
        let request = v1::PrefillRequest { request_id: self.job.id.clone(), tokens };
        let mut client = client(&placed.worker);
        let called = client.prefill(self.request(request));
        let answer = in_time(self.patience(placed.seconds), called).await?.into_inner();
        self.router.fleet.answered(&placed.worker);
        placed.in_flight.computed();
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
    pub(super) async fn generate(&mut self, placed: Placed) -> Result<Option<Finish>, Status> {
        let Placed { worker, mut in_flight, load_seconds, seconds, .. } = placed;
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
        let mut patience = self.patience(seconds);
        let mut client = client(&worker);
        let mut stream = in_time(patience, client.generate(self.request(request))).await?.into_inner();
        if !self.generated.is_empty() {
            self.router.metrics.resumed();
        }
        while let Some(message) = in_time(patience, stream.message()).await? {
            match message.part {
                Some(Part::Started(started)) => {
                    in_flight.computed();
                    patience = self.router.config.stall;
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
            if let Some(charge) = &mut self.charge {
                charge.prompt = u64::from(started.computed_tokens);
            }
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
        if let Some(charge) = &mut self.charge {
            charge.generated += 1;
        }
        let text = self.decode.push(token);
        if self.pass(&text).await {
            return Some(Finish::Stop);
        }
        (self.generated.len() >= self.job.tokens_max as usize).then_some(Finish::Length)
    }

    /// Shows text; true if a stop text was in it.
    pub(super) async fn pass(&mut self, text: &str) -> bool {
        let (text, stopped) = match self.filter.push(text) {
            Passed::Text(text) => (text, false),
            Passed::Stopped(text) => (text, true),
        };
        if !text.is_empty() {
            self.send(Event::Text(text)).await;
        }
        stopped
    }

    /// Decides what a failure means. `Ok` is: place the request again.
    pub(super) fn failed(&mut self, worker: &Worker, status: &Status) -> Result<(), ApiError> {
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
            Failure::Leaving => {
                self.router.fleet.leaving(worker, Instant::now());
                self.found.clear();
                return Ok(());
            }
            Failure::Broken => {}
        }
        // What the failed worker has stored since is worth another look.
        self.found.clear();
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

    /// How long a worker may say nothing before its first word, which is estimated to take so many seconds.
    fn patience(&self, seconds: f64) -> Duration {
        let estimated = Duration::try_from_secs_f64(seconds * ESTIMATE_ERROR_MAX);
        self.router.config.stall.saturating_add(estimated.unwrap_or(Duration::MAX))
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.router.config.request_time_max.saturating_sub(self.job.arrived.elapsed()));
        request
    }
}

/// What was called for, unless it takes too long.
async fn in_time<T>(
    patience: Duration,
    called: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let late = || Status::deadline_exceeded(format!("the worker said nothing for {patience:.1?}"));
    tokio::time::timeout(patience, called).await.unwrap_or_else(|_| Err(late()))
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
        Code::Aborted => Failure::Leaving,
        _ => Failure::Broken,
    }
}

//! One answer, from its prompt's tokens to its last piece of text.
//!
//! Runs as a task of its own: places the request, has the prompt computed, and
//! streams text. When a worker fails the task goes on with another one, even in
//! the middle of an answer: the tokens so far become part of the prompt, so the
//! client sees none twice and misses none. When nobody listens any more the task
//! ends, and with it the call to the worker, which gives back what it held.
//! [`place`] chooses workers, [`call`] calls them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use terrace_proto::v1;
use terrace_worker::tokenizer::DecodeStream;
use tokio::sync::mpsc;

use crate::admit::{Caller, Charge, Place};
use crate::error::ApiError;
use crate::index::Found;
use crate::models::Model;
use crate::place::active;
use crate::pressure::Share;
use crate::response::{Finish, Usage};
use crate::serve::Router;
use crate::stop::StopFilter;
use place::Step;

mod call;
mod place;

/// Events that may wait for a slow client; then the worker waits too.
const EVENTS_MAX: usize = 64;
/// Tokens of a block by which prompts in flight are compared.
const BLOCK_TOKENS: usize = 16;
/// Step of the sampler's random numbers; see [`seed_after`].
const SEED_STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// What to generate.
pub struct Job {
    /// Who asks.
    pub caller: Caller,
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
    /// What it was charged for its turn, once it had one.
    charge: Option<Charge>,
    decode: DecodeStream<'a>,
    filter: StopFilter,
    generated: Vec<u32>,
    /// Names of the prompt's blocks; see [`active::names`].
    blocks: Arc<[u64]>,
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

impl<'a> Answer<'a> {
    fn new(router: &'a Router, job: &'a Job, events: &'a mpsc::Sender<Event>) -> Self {
        Self {
            router,
            job,
            events,
            share: router.pressure.arrive(job.tokens.len() as u64),
            charge: None,
            decode: job.model.tokenizer.decode_stream(),
            filter: StopFilter::new(job.stops.clone()),
            generated: Vec::new(),
            blocks: active::names(&job.tokens, BLOCK_TOKENS),
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

    async fn send(&self, event: Event) {
        // When nobody listens the task is about to end.
        let _ = self.events.send(event).await;
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

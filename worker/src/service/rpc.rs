//! WorkerService: what a router asks of a worker.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_proto::v1::generate_response::Part;
use terrace_proto::v1::worker_service_server::WorkerService;
use terrace_proto::v1::{
    DrainRequest, DrainResponse, FinishReason, GenerateFinished, GenerateRequest, GenerateResponse,
    GenerateStarted, PrefillRequest, PrefillResponse,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::kv::BLOCK_TOKENS;
use crate::model::WantLogits;
use crate::sampler::{Sampler, Sampling};
use crate::service::sequence::{Sequence, SequenceError, Shared};

// Tokens that may wait for a slow reader before its generation pauses.
const TOKENS_UNREAD_MAX: usize = 64;

// Of the requests that a worker takes at once, how many more may wait.
const QUEUE_FACTOR: usize = 2;

/// Limits of the model and the process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Longest sequence, in tokens.
    pub(crate) context: usize,
    /// Token ids that exist.
    pub(crate) vocabulary: usize,
    /// Requests at once.
    pub(crate) requests: usize,
    /// Time that running requests get when the worker has to go.
    pub(crate) drain: Duration,
}

/// The service.
#[derive(Clone)]
pub(crate) struct Worker {
    shared: Arc<Shared>,
    bounds: Bounds,
    /// Admits to the queue.
    queue: Arc<Semaphore>,
    /// Admits to work.
    slots: Arc<Semaphore>,
}

impl Worker {
    /// A service without requests.
    pub(crate) fn new(shared: Arc<Shared>, bounds: Bounds) -> Self {
        let waiting = bounds.requests * (1 + QUEUE_FACTOR);
        Self {
            shared,
            bounds,
            queue: Arc::new(Semaphore::new(waiting)),
            slots: Arc::new(Semaphore::new(bounds.requests)),
        }
    }

    fn admit(&self, tokens: &[u32]) -> Result<OwnedSemaphorePermit, Status> {
        if self.shared.load.is_draining() {
            return Err(leaving());
        }
        if tokens.is_empty() {
            return Err(Status::invalid_argument("the prompt has no tokens; send at least one"));
        }
        if tokens.len() >= self.bounds.context {
            return Err(Status::invalid_argument(format!(
                "the prompt has {} tokens, but this model's context of {} must also hold at least one generated token; \
                 shorten the prompt",
                tokens.len(),
                self.bounds.context
            )));
        }
        let inside =
            |token: &&u32| usize::try_from(**token).is_ok_and(|token| token < self.bounds.vocabulary);
        if let Some(token) = tokens.iter().find(|token| !inside(token)) {
            return Err(Status::invalid_argument(format!(
                "token {token} is outside this model's vocabulary of {}; use the model's own tokenizer",
                self.bounds.vocabulary
            )));
        }
        Arc::clone(&self.queue).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{} requests are active or queued on this worker, which is its limit; try again later",
                self.bounds.requests * (1 + QUEUE_FACTOR)
            ))
        })
    }
}

#[tonic::async_trait]
impl WorkerService for Worker {
    async fn prefill(&self, request: Request<PrefillRequest>) -> Result<Response<PrefillResponse>, Status> {
        let request = request.into_inner();
        let _place = self.admit(&request.tokens)?;
        tokio::select! {
            answer = self.prompt(request) => answer.map(Response::new),
            () = self.shared.load.left() => Err(leaving()),
        }
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        let asked = Duration::from_millis(request.into_inner().deadline_ms.into());
        let now = Instant::now();
        let time = if asked.is_zero() { self.bounds.drain } else { asked };
        let by = self.shared.load.drain(now + time);
        let (active, queued, _) = self.shared.load.counts();
        let left = by.saturating_duration_since(now).as_millis();
        tracing::info!(active, queued, left_ms = left, "asked to drain");
        Ok(Response::new(DrainResponse {
            requests: u32::try_from(active + queued).unwrap_or(u32::MAX),
            deadline_ms: u32::try_from(left).unwrap_or(u32::MAX),
        }))
    }

    type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        if request.tokens_max == 0 {
            return Err(Status::invalid_argument("tokens_max is 0; ask for at least one token"));
        }
        let place = self.admit(&request.tokens)?;
        let (sender, receiver) = mpsc::channel(TOKENS_UNREAD_MAX);
        let worker = self.clone();
        tokio::spawn(async move {
            let _place = place;
            // When the reader goes away, the generation ends at its next await:
            // dropping it gives back everything that it holds.
            tokio::select! {
                result = worker.generation(request, &sender) => {
                    if let Err(error) = result {
                        // A reader that is gone needs no reason.
                        drop(sender.send(Err(error)).await);
                    }
                }
                () = sender.closed() => tracing::debug!("the reader left; its generation ends"),
                () = worker.shared.load.left() => {
                    // What was said before stands in the channel, in order.
                    drop(sender.send(Err(leaving())).await);
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

impl Worker {
    async fn prompt(&self, request: PrefillRequest) -> Result<PrefillResponse, Status> {
        let queued_at = Instant::now();
        // The unfilled tail is never stored, so computing it here would be for nothing.
        let mut tokens = request.tokens;
        tokens.truncate(tokens.len() / BLOCK_TOKENS * BLOCK_TOKENS);
        let total = tokens.len();
        if total == 0 {
            return Ok(PrefillResponse::default());
        }
        let mut waiting = self.shared.load.queue(total);
        let _slot = Arc::clone(&self.slots).acquire_owned().await.map_err(|_| stopping())?;
        waiting.activate();
        let queue_us = micros(queued_at);
        let started = Instant::now();
        let mut sequence = Sequence::open(Arc::clone(&self.shared), tokens).await;
        if !sequence.has_store() {
            // Computed blocks could not be handed over; whoever generates computes them once.
            tracing::debug!(request = request.request_id, "no store to prefill for");
            return Ok(PrefillResponse { queue_us, ..PrefillResponse::default() });
        }
        let cached = sequence.loaded_tokens();
        waiting.left(total - cached);
        // No scores: a prompt that is known in full needs no work here.
        sequence.compute(WantLogits::No, Some(&mut waiting)).await.map_err(status)?;
        self.shared.load.metrics.prefill_seconds.observe(started.elapsed().as_secs_f64());
        self.shared.load.metrics.requests.inc();
        tracing::debug!(request = request.request_id, total, cached, "prefilled");
        Ok(PrefillResponse {
            cached_tokens: count(cached),
            computed_tokens: count(total - cached),
            queue_us,
            prefill_us: micros(started),
        })
    }

    async fn generation(
        &self,
        request: GenerateRequest,
        sender: &mpsc::Sender<Result<GenerateResponse, Status>>,
    ) -> Result<(), Status> {
        let queued_at = Instant::now();
        let total = request.tokens.len();
        let mut waiting = self.shared.load.queue(total);
        let _slot = Arc::clone(&self.slots).acquire_owned().await.map_err(|_| stopping())?;
        waiting.activate();
        let queue_us = micros(queued_at);
        let started = Instant::now();
        let mut sequence = Sequence::open(Arc::clone(&self.shared), request.tokens).await;
        // At least one token of a prompt is computed, however much is known.
        let cached = sequence.loaded_tokens().min(total - 1);
        waiting.left(total - cached);
        let mut logits = sequence.compute(WantLogits::Last, Some(&mut waiting)).await.map_err(status)?;
        self.shared.load.metrics.prefill_seconds.observe(started.elapsed().as_secs_f64());
        // What a prefill worker computed for this very request was not in the cache.
        let prefilled = (request.prefilled_tokens as usize).min(cached);
        let part = Part::Started(GenerateStarted {
            cached_tokens: count(cached - prefilled),
            computed_tokens: count(total - cached + prefilled),
            queue_us,
            prefill_us: micros(started),
        });
        say(sender, part).await?;

        let mut sampler = Sampler::new(Sampling {
            temperature: request.temperature,
            top_p: request.top_p,
            seed: request.seed,
        });
        let room = self.bounds.context - total;
        let tokens_max = (request.tokens_max as usize).min(room);
        let mut generated = 0;
        let reason = loop {
            let scores = logits.ok_or_else(|| Status::internal("a pass gave no scores"))?;
            let token = sampler.next(&scores);
            if request.stop_tokens.contains(&token) {
                break FinishReason::Stop;
            }
            generated += 1;
            self.shared.load.metrics.tokens_generated.inc();
            say(sender, Part::Token(token)).await?;
            sequence.push(token);
            if generated == tokens_max {
                break FinishReason::Length;
            }
            logits = sequence.compute(WantLogits::Last, None).await.map_err(status)?;
        };
        self.shared.load.metrics.requests.inc();
        say(sender, Part::Finished(GenerateFinished { reason: reason.into(), tokens: count(generated) }))
            .await
    }
}

async fn say(sender: &mpsc::Sender<Result<GenerateResponse, Status>>, part: Part) -> Result<(), Status> {
    let message = GenerateResponse { part: Some(part) };
    sender.send(Ok(message)).await.map_err(|_| Status::cancelled("the reader left"))
}

fn status(error: SequenceError) -> Status {
    match error {
        SequenceError::Stopping => stopping(),
        SequenceError::Refused(reason) => Status::invalid_argument(reason),
    }
}

/// No failure: the router goes on with another worker.
fn leaving() -> Status {
    Status::aborted("this worker drains; send the request, with what it said of it, to another one")
}

fn stopping() -> Status {
    Status::unavailable("the worker is stopping; send the request to another one")
}

/// A count of tokens on the wire; a context is far below the limit.
fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

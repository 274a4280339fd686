//! The thread that computes: takes what every request has ready and runs it as
//! one pass.
//!
//! A chunk of one prompt and one token each of several generations share a
//! pass, so that the weights are read once for all of them; the bits are those
//! that each would have had alone. A sequence moves into its job and comes back
//! with the answer, so nobody can touch its blocks meanwhile, and a request that
//! is dropped leaves its blocks alive until the pass that uses them has ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::kv::KvSequence;
use crate::model::{Engine, FORWARD_TOKENS_MAX, Outcome, Scratch, Step, WantLogits};
use crate::service::load::Load;

// Generations that shared the last pass come back within microseconds; a pass
// takes milliseconds, so a short wait for them keeps the batch together.
const GATHER_MAX: Duration = Duration::from_micros(300);

/// Some tokens of one sequence, to be computed.
struct Job {
    kv: KvSequence,
    tokens: Vec<u32>,
    logits: WantLogits,
    cancel: Arc<AtomicBool>,
    answer: oneshot::Sender<Computed>,
}

/// A sequence that comes back.
pub(crate) struct Computed {
    /// The blocks, longer by the tokens unless the pass did not run.
    pub(crate) kv: KvSequence,
    /// Scores of the next token, if they were asked for.
    pub(crate) logits: Option<Vec<f32>>,
    /// Why nothing was computed.
    pub(crate) refused: Option<String>,
}

/// Hands jobs to the compute thread.
#[derive(Clone)]
pub(crate) struct Compute {
    jobs: SyncSender<Job>,
}

impl Compute {
    /// Starts the thread. It ends when the last clone of the handle is dropped.
    ///
    /// # Errors
    /// If the system has no thread to give.
    pub(crate) fn start(engine: Engine, load: Arc<Load>, requests_max: usize) -> std::io::Result<Self> {
        let (jobs, waiting) = sync_channel(requests_max.max(1));
        std::thread::Builder::new()
            .name("compute".to_owned())
            .spawn(move || run(&engine, &load, &waiting))?;
        Ok(Self { jobs })
    }

    /// Computes `tokens` behind the sequence. `None` when the worker is ending.
    ///
    /// Cancel-safe in this sense: if the future is dropped, the pass may still
    /// run, and then drops the sequence.
    pub(crate) async fn run(
        &self,
        kv: KvSequence,
        tokens: Vec<u32>,
        logits: WantLogits,
        cancel: Arc<AtomicBool>,
    ) -> Option<Computed> {
        let (answer, computed) = oneshot::channel();
        // There is room: each request has one job at a time, and the queue is as
        // long as the number of requests.
        self.jobs.try_send(Job { kv, tokens, logits, cancel, answer }).ok()?;
        computed.await.ok()
    }
}

fn run(engine: &Engine, load: &Load, waiting: &Receiver<Job>) {
    let mut scratch = Scratch::new();
    let mut held: Option<Job> = None;
    let mut expected = 1;
    loop {
        let first = match held.take() {
            Some(job) => job,
            None => match waiting.recv() {
                Ok(job) => job,
                Err(_) => return,
            },
        };
        let mut jobs = vec![first];
        held = gather(&mut jobs, waiting, expected);
        jobs.retain(|job| !job.cancel.load(Ordering::Relaxed));
        if !jobs.is_empty() {
            expected = jobs.len();
            pass(engine, load, &mut scratch, jobs);
        }
    }
}

/// Adds what is ready, and waits a moment for those of the last pass. Returns a
/// job that did not fit.
fn gather(jobs: &mut Vec<Job>, waiting: &Receiver<Job>, expected: usize) -> Option<Job> {
    let until = Instant::now() + GATHER_MAX;
    let mut tokens = jobs[0].tokens.len();
    loop {
        let patience = if jobs.len() < expected {
            until.saturating_duration_since(Instant::now())
        } else {
            Duration::ZERO
        };
        match waiting.recv_timeout(patience) {
            Ok(job) if tokens + job.tokens.len() <= FORWARD_TOKENS_MAX => {
                tokens += job.tokens.len();
                jobs.push(job);
            }
            Ok(job) => return Some(job),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        }
    }
}

fn pass(engine: &Engine, load: &Load, scratch: &mut Scratch, mut jobs: Vec<Job>) {
    let never = AtomicBool::new(false);
    // Only a job that is alone can be stopped half-way: the others want the pass.
    let alone = (jobs.len() == 1).then(|| Arc::clone(&jobs[0].cancel));
    let cancel = alone.as_deref().unwrap_or(&never);
    let started = Instant::now();
    let mut steps: Vec<Step<'_>> = jobs
        .iter_mut()
        .map(|job| Step { tokens: &job.tokens, kv: &mut job.kv, logits: job.logits })
        .collect();
    let outcome = engine.forward_batch(scratch, &mut steps, cancel);
    let elapsed = started.elapsed();
    match outcome {
        Ok(Outcome::Done) => {
            let tokens: usize = jobs.iter().map(|job| job.tokens.len()).sum();
            let decoding = jobs.iter().all(|job| job.tokens.len() == 1);
            load.measured(tokens, decoding, elapsed);
            for (index, job) in jobs.into_iter().enumerate() {
                let logits = scratch.logits(index).map(<[f32]>::to_vec);
                answer(job, logits, None);
            }
        }
        // The one job that asked for it is gone; its answer goes nowhere.
        Ok(Outcome::Cancelled) => {}
        // One bad job must not fail its neighbours: run them one by one.
        Err(_) if jobs.len() > 1 => {
            for job in jobs {
                pass(engine, load, scratch, vec![job]);
            }
        }
        Err(error) => {
            for job in jobs {
                answer(job, None, Some(error.to_string()));
            }
        }
    }
}

fn answer(job: Job, logits: Option<Vec<f32>>, refused: Option<String>) {
    // A request that was dropped meanwhile has nobody to tell; its blocks go
    // with the sequence here.
    drop(job.answer.send(Computed { kv: job.kv, logits, refused }));
}

//! What this worker has to do, how quick it is, and the metrics of both.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use prometheus::{Encoder, Histogram, HistogramOpts, IntCounter, IntGauge, Opts, Registry, TextEncoder};
use tokio::sync::watch;

// A pass of fewer prompt tokens says more about its overhead than about the rate.
const PREFILL_SAMPLE_TOKENS_MIN: usize = 32;

/// Counters that requests update and the reporter reads.
pub(crate) struct Load {
    active: AtomicU64,
    queued: AtomicU64,
    pending_tokens: AtomicU64,
    /// By when running requests are given back; none while the worker stays.
    leaves: watch::Sender<Option<Instant>>,
    prefill_rate: Rate,
    decode_rate: Rate,
    /// Woken when something changed that a router wants to know.
    pub(crate) changed: tokio::sync::Notify,
    /// Metrics of this process.
    pub(crate) metrics: Metrics,
}

/// Metrics of this process.
pub(crate) struct Metrics {
    registry: Registry,
    /// Prompt tokens that came from the store.
    pub(crate) tokens_cached: IntCounter,
    /// Tokens computed, of prompts and generations.
    pub(crate) tokens_computed: IntCounter,
    /// Tokens generated.
    pub(crate) tokens_generated: IntCounter,
    /// Blocks sealed.
    pub(crate) blocks_sealed: IntCounter,
    /// Blocks computed in private memory because the store had no frame.
    pub(crate) blocks_private: IntCounter,
    /// Blocks, leased to read or to fill, that were used where they lie on a device.
    pub(crate) blocks_on_device: IntCounter,
    /// Sequences computed again because a fence had moved.
    pub(crate) fences_moved: IntCounter,
    /// Requests that ended well.
    pub(crate) requests: IntCounter,
    /// Time from taking a request to its first token or its end.
    pub(crate) prefill_seconds: Histogram,
    active: IntGauge,
    queued: IntGauge,
}

impl Load {
    /// All zero.
    ///
    /// # Errors
    /// If a metric's name is refused, which is a mistake in this file.
    pub(crate) fn new() -> prometheus::Result<Self> {
        Ok(Self {
            active: AtomicU64::new(0),
            queued: AtomicU64::new(0),
            pending_tokens: AtomicU64::new(0),
            leaves: watch::Sender::new(None),
            prefill_rate: Rate::new(),
            decode_rate: Rate::new(),
            changed: tokio::sync::Notify::new(),
            metrics: Metrics::new()?,
        })
    }

    /// Notes a pass.
    pub(crate) fn measured(&self, tokens: usize, decoding: bool, elapsed: Duration) {
        self.metrics.tokens_computed.inc_by(tokens as u64);
        if decoding {
            // What one generation sees: one token a pass, however many share it.
            self.decode_rate.sample(1.0 / elapsed.as_secs_f64().max(1e-9));
        } else if tokens >= PREFILL_SAMPLE_TOKENS_MIN {
            self.prefill_rate.sample(tokens as f64 / elapsed.as_secs_f64().max(1e-9));
        }
    }

    /// A request waits for its turn. Ends with the guard.
    pub(crate) fn queue(&self, tokens: usize) -> Waiting<'_> {
        self.queued.fetch_add(1, Ordering::Relaxed);
        self.pending_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
        self.changed.notify_one();
        Waiting { load: self, tokens: tokens as u64, active: false }
    }

    /// Takes nothing new from now on, and gives back what still runs at `by`.
    /// Of several times the earliest holds, which is returned.
    pub(crate) fn drain(&self, by: Instant) -> Instant {
        let mut earliest = by;
        self.leaves.send_modify(|known| {
            earliest = known.map_or(by, |known| known.min(by));
            *known = Some(earliest);
        });
        self.changed.notify_one();
        earliest
    }

    /// Whether the worker is on its way out.
    pub(crate) fn is_draining(&self) -> bool {
        self.leaves.borrow().is_some()
    }

    /// Waits until the worker is on its way out.
    pub(crate) async fn drained(&self) {
        // The sender is in `self`, so waiting ends only with the value.
        drop(self.leaves.subscribe().wait_for(Option::is_some).await);
    }

    /// Waits until the worker is on its way out and its time is over.
    pub(crate) async fn left(&self) {
        let mut leaves = self.leaves.subscribe();
        loop {
            let by = *leaves.borrow_and_update();
            let over = async {
                match by {
                    Some(by) => tokio::time::sleep_until(by.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = over => return,
                changed = leaves.changed() => drop(changed),
            }
        }
    }

    /// Requests active and queued, tokens pending.
    pub(crate) fn counts(&self) -> (u64, u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.active), read(&self.queued), read(&self.pending_tokens))
    }

    /// Tokens per second: prefill, decode. 0 until measured.
    pub(crate) fn rates(&self) -> (f64, f64) {
        (self.prefill_rate.value(), self.decode_rate.value())
    }

    /// Metrics in the Prometheus text format.
    ///
    /// # Errors
    /// If a metric cannot be written as text.
    pub(crate) fn text(&self) -> prometheus::Result<String> {
        let (active, queued, _) = self.counts();
        self.metrics.active.set(i64::try_from(active).unwrap_or(i64::MAX));
        self.metrics.queued.set(i64::try_from(queued).unwrap_or(i64::MAX));
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.metrics.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// A request in the queue, then at work. Its tokens count as pending until they
/// are computed or the request is gone.
pub(crate) struct Waiting<'a> {
    load: &'a Load,
    tokens: u64,
    active: bool,
}

impl Waiting<'_> {
    /// It has its turn.
    pub(crate) fn activate(&mut self) {
        if !self.active {
            self.active = true;
            self.load.queued.fetch_sub(1, Ordering::Relaxed);
            self.load.active.fetch_add(1, Ordering::Relaxed);
            self.load.changed.notify_one();
        }
    }

    /// So many of its prompt tokens are still to be computed.
    pub(crate) fn left(&mut self, tokens: usize) {
        let tokens = tokens as u64;
        // Counts only go down within one request.
        let done = self.tokens.saturating_sub(tokens);
        self.load.pending_tokens.fetch_sub(done, Ordering::Relaxed);
        self.tokens -= done;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let counter = if self.active { &self.load.active } else { &self.load.queued };
        counter.fetch_sub(1, Ordering::Relaxed);
        self.load.pending_tokens.fetch_sub(self.tokens, Ordering::Relaxed);
        self.load.changed.notify_one();
    }
}

/// A smoothed rate: one eighth of each new sample.
struct Rate(AtomicU64);

impl Rate {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    fn sample(&self, sample: f64) {
        let old = self.value();
        let new = if old == 0.0 { sample } else { old + (sample - old) / 8.0 };
        // Only the compute thread writes.
        self.0.store(new.to_bits(), Ordering::Relaxed);
    }

    fn value(&self) -> f64 {
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }
}

impl Metrics {
    fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::with_opts(Opts::new(name, help))?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::with_opts(Opts::new(name, help))?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let buckets = vec![0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];
        let prefill_seconds = Histogram::with_opts(
            HistogramOpts::new(
                "terrace_worker_prefill_seconds",
                "Time from taking a request until its prompt was computed.",
            )
            .buckets(buckets),
        )?;
        registry.register(Box::new(prefill_seconds.clone()))?;
        Ok(Self {
            tokens_cached: counter(
                "terrace_worker_tokens_cached_total",
                "Prompt tokens that came from the store.",
            )?,
            tokens_computed: counter("terrace_worker_tokens_computed_total", "Tokens computed.")?,
            tokens_generated: counter("terrace_worker_tokens_generated_total", "Tokens generated.")?,
            blocks_sealed: counter("terrace_worker_blocks_sealed_total", "Blocks sealed.")?,
            blocks_private: counter(
                "terrace_worker_blocks_private_total",
                "Blocks computed in private memory because the store had no frame.",
            )?,
            blocks_on_device: counter(
                "terrace_worker_blocks_on_device_total",
                "Blocks that were used where they lie on a device.",
            )?,
            fences_moved: counter(
                "terrace_worker_fences_moved_total",
                "Sequences computed again because a fence had moved.",
            )?,
            requests: counter("terrace_worker_requests_total", "Requests that ended well.")?,
            prefill_seconds,
            active: gauge("terrace_worker_requests_active", "Requests being computed.")?,
            queued: gauge("terrace_worker_requests_queued", "Requests waiting.")?,
            registry,
        })
    }
}

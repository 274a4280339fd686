//! What the router shows on `/metrics`.

use std::time::Duration;

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::response::Usage;

const SECONDS: [f64; 14] = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0];
const RATIOS: [f64; 10] = [0.1, 0.25, 0.5, 0.75, 1.0, 1.33, 2.0, 4.0, 10.0, 100.0];

/// Counters, gauges and histograms of one router.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    placements: IntCounterVec,
    failures: IntCounterVec,
    prompt_tokens: IntCounter,
    cached_tokens: IntCounter,
    generated_tokens: IntCounter,
    resumed: IntCounter,
    cancelled: IntCounter,
    index_misses: IntCounter,
    late: IntCounter,
    refused: IntCounterVec,
    queue: HistogramVec,
    ttft: Histogram,
    estimate_ratio: Histogram,
    /// Requests in progress.
    pub in_progress: IntGauge,
    /// Requests waiting for a worker.
    pub waiting: IntGauge,
    workers: IntGaugeVec,
}

/// How a request was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Straight to a decode worker.
    Direct,
    /// By way of a prefill worker.
    Separate,
}

impl Metrics {
    /// # Errors
    /// When two metrics have one name, which a test rules out.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let requests = "Requests answered, by route and HTTP status.";
        let failures = "Calls to workers that failed, by role.";
        let placements = "Requests placed, by path: direct to decode, or through a separate prefill.";
        let ratio = "Actual time to first token, divided by the estimate that placed the request.";
        Ok(Self {
            requests: counters("terrace_router_requests_total", requests, &["route", "status"])?,
            placements: counters("terrace_router_placements_total", placements, &["path"])?,
            failures: counters("terrace_router_worker_failures_total", failures, &["role"])?,
            prompt_tokens: counter(
                "terrace_router_prompt_tokens_total",
                "Prompt tokens of served requests.",
            )?,
            cached_tokens: counter(
                "terrace_router_cached_tokens_total",
                "Prompt tokens of served requests that were in the cache before.",
            )?,
            generated_tokens: counter("terrace_router_generated_tokens_total", "Tokens generated.")?,
            resumed: counter(
                "terrace_router_resumed_total",
                "Answers continued on another worker after theirs had failed.",
            )?,
            cancelled: counter("terrace_router_cancelled_total", "Answers whose client went away.")?,
            late: counter(
                "terrace_router_late_total",
                "Requests refused because their first token would have come too late.",
            )?,
            index_misses: counter(
                "terrace_router_index_failures_total",
                "Requests placed without the block index, as it did not answer in time.",
            )?,
            refused: counters(
                "terrace_router_refused_total",
                "Requests turned away at once, by what was full.",
                &["full"],
            )?,
            queue: queue_times(&registry)?,
            ttft: histogram(
                "terrace_router_ttft_seconds",
                "Time from the arrival of a request to its first token.",
                &SECONDS,
            )?,
            estimate_ratio: histogram("terrace_router_ttft_estimate_ratio", ratio, &RATIOS)?,
            in_progress: gauge("terrace_router_requests_in_progress", "Requests in progress.")?,
            waiting: gauge("terrace_router_requests_waiting", "Requests waiting for a worker.")?,
            workers: worker_counts(&registry)?,
            registry,
        })
    }

    /// Counts an answer. `route` must be one of few: it becomes a label.
    pub fn answered(&self, route: &str, status: u16) {
        self.requests.with_label_values(&[route, &status.to_string()]).inc();
    }

    /// Counts a placement.
    pub fn placed(&self, path: Path) {
        let path = match path {
            Path::Direct => "direct",
            Path::Separate => "separate",
        };
        self.placements.with_label_values(&[path]).inc();
    }

    /// Counts a failed call to a worker.
    pub fn worker_failed(&self, role: &str) {
        self.failures.with_label_values(&[role]).inc();
    }

    /// Records the first token of a request.
    pub fn first_token(&self, actual: Duration, estimate_seconds: f64) {
        self.ttft.observe(actual.as_secs_f64());
        if estimate_seconds > 0.0 {
            self.estimate_ratio.observe(actual.as_secs_f64() / estimate_seconds);
        }
    }

    /// Counts the tokens of a request that has ended.
    pub fn tokens(&self, usage: Usage) {
        self.prompt_tokens.inc_by(usage.prompt_tokens);
        self.cached_tokens.inc_by(usage.cached_tokens);
        self.generated_tokens.inc_by(usage.completion_tokens);
    }

    /// Counts an answer that goes on elsewhere.
    pub fn resumed(&self) {
        self.resumed.inc();
    }

    /// Counts an answer that nobody waits for any more.
    pub fn cancelled(&self) {
        self.cancelled.inc();
    }

    /// Counts a request that was refused as it would have been late.
    pub fn late(&self) {
        self.late.inc();
    }

    /// Counts a request that was turned away.
    pub fn refused(&self, full: &str) {
        self.refused.with_label_values(&[full]).inc();
    }

    /// Records how long a request waited for its turn.
    pub fn waited(&self, class: &str, waited: Duration) {
        self.queue.with_label_values(&[class]).observe(waited.as_secs_f64());
    }

    /// Counts a look-up that failed or took too long.
    pub fn index_failed(&self) {
        self.index_misses.inc();
    }

    /// The Prometheus text; `prefill` and `decode` are the workers known now.
    ///
    /// # Errors
    /// When a metric cannot be written, which a test rules out.
    pub fn text(&self, prefill: usize, decode: usize) -> Result<String, prometheus::Error> {
        for (role, count) in [("prefill", prefill), ("decode", decode)] {
            self.workers.with_label_values(&[role]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Times in the queue, by class.
fn queue_times(registry: &Registry) -> Result<HistogramVec, prometheus::Error> {
    let options = HistogramOpts::new(
        "terrace_router_queue_seconds",
        "Time that requests waited for their turn, by service class.",
    );
    let times = HistogramVec::new(options.buckets(SECONDS.to_vec()), &["class"])?;
    registry.register(Box::new(times.clone()))?;
    Ok(times)
}

fn worker_counts(registry: &Registry) -> Result<IntGaugeVec, prometheus::Error> {
    let counts = IntGaugeVec::new(Opts::new("terrace_router_workers", "Workers known, by role."), &["role"])?;
    registry.register(Box::new(counts.clone()))?;
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two metrics of one name would break the page, and dashboards need names and help: build it and read it.
    #[test]
    fn the_page_can_be_read() {
        let metrics = Metrics::new().unwrap();
        metrics.answered("chat", 200);
        metrics.placed(Path::Separate);
        metrics.first_token(Duration::from_millis(20), 0.01);
        metrics.tokens(Usage { prompt_tokens: 10, completion_tokens: 2, cached_tokens: 8 });
        let text = metrics.text(1, 2).unwrap();
        assert!(text.contains("terrace_router_requests_total{route=\"chat\",status=\"200\"} 1"), "{text}");
        assert!(text.contains("terrace_router_workers{role=\"decode\"} 2"), "{text}");
        assert!(text.contains("terrace_router_cached_tokens_total 8"), "{text}");
        let types = text.lines().filter(|line| line.starts_with("# TYPE terrace_router_")).count();
        assert_eq!(types, text.lines().filter(|line| line.starts_with("# HELP terrace_router_")).count());
    }
}

//! How hard prompts press on prefill, as this router sees it: what waits now,
//! and what the last ten seconds brought. Planners size the fleet by it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use terrace_proto::v1::PrefillPressure;

/// Time that sums run over.
const SPAN: Duration = Duration::from_secs(10);
/// Most finished requests remembered. Past it the oldest go, whatever their age.
const FINISHED_MAX: usize = 4096;

/// The sums of one router.
#[derive(Clone, Debug, Default)]
pub struct Pressure {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    queued_requests: u32,
    queued_tokens: u64,
    missing_tokens: u64,
    decoding_requests: u32,
    finished: VecDeque<Finished>,
}

#[derive(Debug)]
struct Finished {
    at: Instant,
    prompt_tokens: u64,
    cached_tokens: u64,
    ttft: Duration,
}

/// One request's part of the sums: waiting for its prompt to be computed, then
/// decoding. It leaves them when dropped.
#[derive(Debug)]
pub struct Share {
    state: Arc<Mutex<State>>,
    tokens: u64,
    missing: u64,
    decoding: bool,
}

impl Pressure {
    /// A prompt arrived, of which nothing is known to be cached yet.
    pub fn arrive(&self, tokens: u64) -> Share {
        let mut state = lock(&self.state);
        state.queued_requests += 1;
        state.queued_tokens += tokens;
        state.missing_tokens += tokens;
        Share { state: Arc::clone(&self.state), tokens, missing: tokens, decoding: false }
    }

    /// The report at this moment.
    pub fn report(&self, name: &str, now: Instant) -> PrefillPressure {
        let mut state = lock(&self.state);
        while state.finished.front().is_some_and(|oldest| now.saturating_duration_since(oldest.at) > SPAN) {
            state.finished.pop_front();
        }
        let mut times: Vec<f64> = state.finished.iter().map(|done| done.ttft.as_secs_f64() * 1e3).collect();
        times.sort_unstable_by(f64::total_cmp);
        let sum = |of: fn(&Finished) -> u64| state.finished.iter().map(of).sum();
        PrefillPressure {
            name: name.to_owned(),
            queued_requests: state.queued_requests,
            queued_tokens: state.queued_tokens,
            missing_tokens: state.missing_tokens,
            prompt_tokens: sum(|done| done.prompt_tokens),
            cached_tokens: sum(|done| done.cached_tokens),
            ttft_ms_p50: quantile(&times, 50),
            ttft_ms_p99: quantile(&times, 99),
            finished_requests: times.len() as u64,
            decoding_requests: state.decoding_requests,
        }
    }
}

impl Share {
    /// The index was asked: this many tokens are in no tier.
    pub fn missing(&mut self, tokens: u64) {
        if self.decoding {
            return;
        }
        let mut state = lock(&self.state);
        state.missing_tokens = state.missing_tokens - self.missing + tokens;
        self.missing = tokens;
    }

    /// The first token came.
    pub fn first_token(&mut self) {
        if !self.decoding {
            let mut state = lock(&self.state);
            self.leave_queue(&mut state);
            state.decoding_requests += 1;
            drop(state);
            self.decoding = true;
        }
    }

    /// The answer is complete.
    pub fn finish(self, now: Instant, cached_tokens: u64, ttft: Duration) {
        let mut state = lock(&self.state);
        if state.finished.len() == FINISHED_MAX {
            state.finished.pop_front();
        }
        state.finished.push_back(Finished { at: now, prompt_tokens: self.tokens, cached_tokens, ttft });
        drop(state);
    }

    fn leave_queue(&self, state: &mut State) {
        state.queued_requests -= 1;
        state.queued_tokens -= self.tokens;
        state.missing_tokens -= self.missing;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        if self.decoding {
            state.decoding_requests -= 1;
        } else {
            self.leave_queue(&mut state);
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Sums are changed in whole steps, so a panic elsewhere leaves them right.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Nearest rank; 0 of nothing.
fn quantile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A share that leaves twice or never would drive the planner mad: run through every way to end.
    #[test]
    fn every_way_to_end_leaves_the_sums_at_zero() {
        let (pressure, now) = (Pressure::default(), Instant::now());
        let queued = pressure.arrive(100);
        let mut decoding = pressure.arrive(200);
        decoding.missing(50);
        let report = pressure.report("r", now);
        assert_eq!((report.queued_requests, report.queued_tokens, report.missing_tokens), (2, 300, 150));
        decoding.first_token();
        decoding.first_token();
        decoding.missing(7);
        let report = pressure.report("r", now);
        assert_eq!((report.queued_requests, report.missing_tokens, report.decoding_requests), (1, 100, 1));
        drop(queued);
        decoding.finish(now, 150, Duration::from_millis(30));
        let report = pressure.report("r", now);
        assert_eq!((report.queued_tokens, report.missing_tokens, report.decoding_requests), (0, 0, 0));
        assert_eq!((report.prompt_tokens, report.cached_tokens, report.finished_requests), (200, 150, 1));
    }

    /// Old requests must not count for ever, and the quantiles must be of what is left.
    #[test]
    fn sums_run_over_ten_seconds() {
        let (pressure, start) = (Pressure::default(), Instant::now());
        for second in 0..20 {
            let at = start + Duration::from_secs(second);
            pressure.arrive(1).finish(at, 0, Duration::from_millis(second));
        }
        let report = pressure.report("r", start + Duration::from_secs(19));
        assert_eq!(report.finished_requests, 11);
        assert_eq!((report.ttft_ms_p50.round(), report.ttft_ms_p99.round()), (14.0, 19.0));
        let later = pressure.report("r", start + Duration::from_secs(60));
        assert_eq!((later.finished_requests, later.ttft_ms_p50.round()), (0, 0.0));
    }
}

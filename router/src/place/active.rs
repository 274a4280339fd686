//! What was sent to one worker and is not done yet, by the sender's own account.
//!
//! Reports of a worker lag, so its queue is counted here at once. A completion
//! that never comes must not count for ever either: what is older than a report
//! counts only as far as the worker still reports work.

use std::collections::VecDeque;

/// Seconds after which a worker's report must show what was sent to it.
pub const REPORT_LAG: f64 = 2.0;

/// Work in flight on one worker. Times are seconds on the caller's clock.
#[derive(Clone, Debug, Default)]
pub struct Active {
    jobs: VecDeque<Job>,
    next: u64,
    /// When the worker was last done with a prompt.
    done: f64,
}

#[derive(Clone, Copy, Debug)]
struct Job {
    id: u64,
    sent: f64,
    tokens: u64,
    /// Estimated for its prompt; `None` once that is computed.
    seconds: Option<f64>,
}

/// What a worker last said of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    /// Requests that it computes or queues.
    pub requests: u32,
    /// Prompt tokens that it has not computed.
    pub pending_tokens: u64,
}

impl Active {
    /// Work was sent: its prompt has `tokens` to compute, in about `seconds`.
    pub fn send(&mut self, tokens: u64, seconds: f64, now: f64) -> u64 {
        self.next += 1;
        self.jobs.push_back(Job { id: self.next, sent: now, tokens, seconds: Some(seconds) });
        self.next
    }

    /// Its prompt is computed; the request goes on.
    pub fn computed(&mut self, id: u64, now: f64) {
        if let Some(job) = self.jobs.iter_mut().find(|job| job.id == id)
            && job.seconds.take().is_some()
        {
            job.tokens = 0;
            self.done = now;
        }
    }

    /// It is over.
    pub fn end(&mut self, id: u64, now: f64) {
        self.computed(id, now);
        self.jobs.retain(|job| job.id != id);
    }

    /// Requests in flight, none of them lost.
    pub fn requests(&self, now: f64, reported: Reported) -> u32 {
        let young = self.jobs.iter().filter(|job| is_young(job, now)).count();
        let old = self.jobs.len() - young;
        let most = usize::try_from(reported.requests).unwrap_or(usize::MAX);
        u32::try_from(young + old.min(most)).unwrap_or(u32::MAX).max(reported.requests)
    }

    /// Prompt tokens to be computed.
    pub fn pending_tokens(&self, now: f64, reported: Reported) -> u64 {
        let counted = self.waiting(now, reported).map(|job| job.tokens).sum();
        reported.pending_tokens.max(counted)
    }

    /// Seconds until the prompts that were sent are computed, one after another.
    pub fn queue_seconds(&self, now: f64, reported: Reported) -> f64 {
        let mut jobs = self.waiting(now, reported);
        let Some(first) = jobs.next() else { return 0.0 };
        let began = first.sent.max(self.done);
        let left = (began + first.seconds.unwrap_or(0.0) - now).max(0.0);
        left + jobs.filter_map(|job| job.seconds).sum::<f64>()
    }

    /// All requests by this account alone.
    pub fn count(&self) -> u32 {
        u32::try_from(self.jobs.len()).unwrap_or(u32::MAX)
    }

    /// Prompts to be computed that are not lost: a worker that reports no request
    /// has none of those that it should have reported.
    fn waiting(&self, now: f64, reported: Reported) -> impl Iterator<Item = &Job> {
        self.jobs
            .iter()
            .filter(move |job| job.seconds.is_some() && (reported.requests > 0 || is_young(job, now)))
    }
}

fn is_young(job: &Job, now: f64) -> bool {
    now - job.sent < REPORT_LAG
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: Reported = Reported { requests: 3, pending_tokens: 0 };

    /// A queue shrinks while its head is computed, and never below what stands behind a head that is late.
    #[test]
    fn a_queue_shrinks_with_time() {
        let mut active = Active::default();
        let head = active.send(100, 4.0, 10.0);
        active.send(50, 1.0, 10.5);
        assert!((active.queue_seconds(10.0, BUSY) - 5.0).abs() < 1e-9);
        assert!((active.queue_seconds(13.0, BUSY) - 2.0).abs() < 1e-9);
        assert!((active.queue_seconds(99.0, BUSY) - 1.0).abs() < 1e-9, "the head is late");
        active.computed(head, 100.0);
        assert!(
            (active.queue_seconds(100.25, BUSY) - 0.75).abs() < 1e-9,
            "the next began when the head was done"
        );
        assert_eq!((active.pending_tokens(100.0, BUSY), active.count()), (50, 2));
    }

    /// A completion that never comes must not count once the worker has said that it has nothing; what
    /// was sent a moment ago counts although no report can show it.
    #[test]
    fn lost_completions_are_forgotten_by_the_next_report() {
        let mut active = Active::default();
        active.send(100, 4.0, 0.0);
        active.send(100, 4.0, 0.0);
        let idle = Reported::default();
        assert_eq!(active.requests(1.0, idle), 2);
        assert!(active.queue_seconds(1.0, idle) > 6.0);
        let later = REPORT_LAG + 0.1;
        assert_eq!((active.requests(later, idle), active.pending_tokens(later, idle)), (0, 0));
        assert!(active.queue_seconds(later, idle).abs() < 1e-9);
        assert_eq!(active.requests(later, Reported { requests: 1, pending_tokens: 7 }), 1);
        active.send(10, 1.0, later);
        assert_eq!((active.requests(later, idle), active.pending_tokens(later, idle)), (1, 10));
    }

    /// What others sent to the worker shows only in its report, and must count.
    #[test]
    fn reports_of_others_work_count() {
        let active = Active::default();
        let reported = Reported { requests: 5, pending_tokens: 900 };
        assert_eq!((active.requests(0.0, reported), active.pending_tokens(0.0, reported)), (5, 900));
    }

    /// An end that is told twice, or of a request that is not known, must change nothing.
    #[test]
    fn ends_are_idempotent() {
        let mut active = Active::default();
        let job = active.send(100, 4.0, 0.0);
        active.end(job, 1.0);
        active.end(job, 2.0);
        active.end(99, 2.0);
        assert_eq!((active.count(), active.done.to_bits()), (0, 1.0f64.to_bits()));
    }
}

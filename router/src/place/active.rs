//! What was sent to one worker and is not done yet, by the sender's own account.
//!
//! Reports of a worker lag, so its queue is counted here at once. A completion
//! that never comes must not count for ever either: what is older than a report
//! counts only as far as the worker still reports work.
//!
//! What was sent also tells what the worker will have: a prompt that comes behind
//! another one with the same beginning finds that computed, although no event has
//! said so yet. Without it a burst over one new document is computed everywhere.

use std::collections::VecDeque;
use std::sync::Arc;

/// Seconds after which a worker's report must show what was sent to it.
pub const REPORT_LAG: f64 = 2.0;

/// Seconds for which a computed prompt is remembered: events of its blocks may be so late.
const RECENT_SECONDS: f64 = 2.0;
/// Most computed prompts that are remembered.
const RECENT_MAX: usize = 64;

/// Work in flight on one worker. Times are seconds on the caller's clock.
#[derive(Clone, Debug, Default)]
pub struct Active {
    jobs: VecDeque<Job>,
    /// When prompts were computed, and their blocks.
    recent: VecDeque<(f64, Arc<[u64]>)>,
    next: u64,
    /// When the worker was last done with a prompt.
    done: f64,
}

#[derive(Clone, Debug)]
struct Job {
    id: u64,
    sent: f64,
    tokens: u64,
    /// Estimated for its prompt; `None` once that is computed.
    seconds: Option<f64>,
    /// Names of its prompt's blocks, each of which stands for all before it too.
    blocks: Arc<[u64]>,
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
        let blocks = Arc::new([]);
        self.jobs.push_back(Job { id: self.next, sent: now, tokens, seconds: Some(seconds), blocks });
        self.next
    }

    /// The prompt of what was sent consists of these blocks, each named for all before it too.
    pub fn brings(&mut self, id: u64, blocks: Arc<[u64]>) {
        if let Some(job) = self.jobs.iter_mut().find(|job| job.id == id) {
            job.blocks = blocks;
        }
    }

    /// Blocks from the first of a prompt that the worker will have when it begins with it; none if they are not
    /// most of it. A small beginning is cheap to compute, and whoever shares it would crowd on one worker.
    pub fn coming(&self, blocks: &[u64], now: f64, reported: Reported) -> usize {
        let waiting = self.waiting(now, reported).map(|job| &job.blocks);
        let recent = self.recent.iter().filter(|(computed, _)| now - computed < RECENT_SECONDS);
        let all = waiting.chain(recent.map(|(_, blocks)| blocks));
        let most = all.map(|known| shared(known, blocks)).max().unwrap_or(0);
        if most * 2 > blocks.len() { most } else { 0 }
    }

    /// Its prompt is computed; the request goes on.
    pub fn computed(&mut self, id: u64, now: f64) {
        if let Some(job) = self.jobs.iter_mut().find(|job| job.id == id)
            && job.seconds.take().is_some()
        {
            job.tokens = 0;
            self.done = now;
            if self.recent.len() == RECENT_MAX {
                self.recent.pop_front();
            }
            self.recent.push_back((now, Arc::clone(&job.blocks)));
        }
    }

    /// It is over.
    pub fn end(&mut self, id: u64, now: f64) {
        if self.jobs.iter().any(|job| job.id == id && job.seconds.is_some()) {
            self.done = now;
        }
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

    /// Prompts to be computed, none of them lost.
    pub fn prompts(&self, now: f64, reported: Reported) -> usize {
        self.waiting(now, reported).count()
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

/// Blocks that two prompts have in common. One that is equal follows equal ones, so that halving finds the end.
fn shared(a: &[u64], b: &[u64]) -> usize {
    let (mut low, mut high) = (0, a.len().min(b.len()));
    while low < high {
        let middle = low + (high - low) / 2;
        if a[middle] == b[middle] {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// Names for the whole blocks of a prompt, each for all before it too. Good for comparing prompts that one router
/// has sent, and for nothing else: callers can make them collide.
pub fn names(tokens: &[u32], per_block: usize) -> Arc<[u64]> {
    let mut name = 0u64;
    let blocks = tokens.chunks_exact(per_block.max(1));
    let named = blocks.map(|block| {
        for &token in block {
            name = (name.rotate_left(5) ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        name ^ (name >> 32)
    });
    named.collect()
}

fn is_young(job: &Job, now: f64) -> bool {
    now - job.sent < REPORT_LAG
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker will have what is queued on it and what it has just computed, as far as prompts agree from their
    /// first block; not what failed, what is long past, nor an equal block behind another beginning.
    #[test]
    fn what_was_sent_will_be_there() {
        let tokens = |first: u32, count: u32| (0..count).map(|n| n * 7 + first).collect::<Vec<u32>>();
        let mut other = tokens(0, 64);
        other[3] = 999;
        let (long, short, other) = (names(&tokens(0, 64), 16), names(&tokens(0, 40), 16), names(&other, 16));
        assert_eq!((long.len(), short.len()), (4, 2));
        let mut active = Active::default();
        let job = active.send(64, 1.0, 0.0);
        active.brings(job, Arc::clone(&long));
        assert_eq!(active.coming(&short, 0.5, BUSY), 2);
        assert_eq!(active.coming(&long, 0.5, BUSY), 4);
        assert_eq!(active.coming(&other, 0.5, BUSY), 0);
        active.computed(job, 1.0);
        active.end(job, 1.5);
        assert_eq!(active.coming(&long, 1.0 + RECENT_SECONDS / 2.0, BUSY), 4);
        assert_eq!(active.coming(&long, 1.0 + RECENT_SECONDS, BUSY), 0);
        let failed = active.send(64, 1.0, 5.0);
        active.brings(failed, Arc::clone(&long));
        active.end(failed, 5.5);
        assert_eq!(active.coming(&long, 5.5, BUSY), 0);
        for number in 0..1000 {
            let job = active.send(1, 0.1, 6.0 + f64::from(number));
            active.computed(job, 6.0 + f64::from(number));
        }
        assert!(active.recent.len() <= RECENT_MAX);
    }

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

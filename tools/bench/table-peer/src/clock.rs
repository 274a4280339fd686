//! Time that a thread had a core. On a machine with other work a thread waits
//! for one now and then; that is no cost of the code that is measured. As in
//! `terrace bench table`.

use std::fs;
use std::time::{Duration, Instant};

/// A stretch of work on this thread, which does not sleep.
#[derive(Debug)]
pub(crate) struct Stretch {
    began: Instant,
    waited: Duration,
}

impl Stretch {
    /// Begins now.
    pub(crate) fn begin() -> Self {
        let waited = waited();
        Self { began: Instant::now(), waited }
    }

    /// Time since the beginning, on a core or not.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Of the time since the beginning, the share that this thread had a core, above 0 and at most 1.
    pub(crate) fn share(&self) -> f64 {
        let elapsed = self.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
        let waited = waited().saturating_sub(self.waited).as_secs_f64();
        (1.0 - waited / elapsed).clamp(0.01, 1.0)
    }
}

/// How long this thread has waited for a core, ever. Zero where the kernel does not count it.
fn waited() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text.split_ascii_whitespace().nth(1).and_then(|field| field.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}

//! Time that a thread had a core. On a machine with other work a thread waits
//! for one now and then; that is no cost of the code that is measured.

use std::fs;
use std::time::{Duration, Instant};

/// A stretch of work on this thread, which does not sleep.
#[derive(Debug)]
pub(in crate::bench) struct Stretch {
    began: Instant,
    waited: Duration,
}

impl Stretch {
    /// Begins now.
    pub(in crate::bench) fn begin() -> Self {
        let waited = waited();
        Self { began: Instant::now(), waited }
    }

    /// Time since the beginning, on a core or not.
    pub(in crate::bench) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Of the time since the beginning, the share that this thread had a core, above 0 and at most 1.
    pub(in crate::bench) fn share(&self) -> f64 {
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

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A stretch could count what it should leave out: with more threads than cores each has a core for less than
    /// the whole time, and all of them together for no more than there are cores.
    #[test]
    fn waiting_for_a_core_is_left_out() {
        let cores = thread::available_parallelism().unwrap().get();
        let busy = || {
            let stretch = Stretch::begin();
            while stretch.elapsed() < Duration::from_millis(300) {
                std::hint::spin_loop();
            }
            stretch.share()
        };
        let threads: Vec<_> = (0..4 * cores).map(|_| thread::spawn(busy)).collect();
        let shares: Vec<f64> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let total: f64 = shares.iter().sum();
        #[expect(clippy::cast_precision_loss, reason = "a few cores")]
        let most = 1.5 * cores as f64;
        assert!(total < most, "{total} of {cores} cores: {shares:?}");
    }
}

//! How much work gets its turn in a second while somebody waits.

/// Seconds after which a measurement counts a third.
const MEMORY_SECONDS: f64 = 30.0;

/// A pace, learned from turns. Times are seconds on the caller's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    work: f64,
    seconds: f64,
    /// When the last turn was, if somebody has waited ever since.
    last: Option<f64>,
}

impl Pace {
    /// Somebody begins to wait behind nobody.
    pub fn begin(&mut self, now: f64) {
        self.last = Some(now);
    }

    /// So much work had its turn; whether somebody waits still.
    #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
    pub fn served(&mut self, work: u64, now: f64, is_waiting: bool) {
        if let Some(last) = self.last {
            let took = (now - last).max(0.0);
            let kept = (-took / MEMORY_SECONDS).exp();
            self.work = self.work * kept + work as f64;
            self.seconds = self.seconds * kept + took;
        }
        self.last = is_waiting.then_some(now);
    }

    /// Nobody waits any more, without a turn.
    pub fn end(&mut self) {
        self.last = None;
    }

    /// Seconds until so much work has had its turn; 0 before anything was measured.
    #[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
    pub fn seconds(&self, work: u64) -> f64 {
        if self.work > 0.0 { work as f64 * self.seconds / self.work } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pace that counted idle time would tell callers to come back far too late: a burst of turns without
    /// anybody waiting, and a pause, must not change what was learned under load.
    #[test]
    fn only_time_with_somebody_waiting_counts() {
        let mut pace = Pace::default();
        assert!(pace.seconds(100).abs() < 1e-9, "nothing is known");
        pace.begin(10.0);
        for turn in 1..=20 {
            pace.served(50, 10.0 + f64::from(turn) * 0.5, turn < 20);
        }
        assert!((pace.seconds(1000) - 10.0).abs() < 1e-6, "{pace:?}");
        pace.served(1_000_000, 500.0, false);
        assert!((pace.seconds(1000) - 10.0).abs() < 1e-6, "{pace:?}");
        pace.begin(600.0);
        pace.end();
        pace.served(50, 700.0, false);
        assert!((pace.seconds(1000) - 10.0).abs() < 1e-6, "{pace:?}");
    }
}

//! Whether a device may be used: a device that does not answer, fails every
//! read, or has become many times slower than it was is taken out; probes bring
//! it back; one that keeps too much memory, or is taken out again and again within
//! hours, is ejected until the daemon starts again. Pure: time is an argument.

use std::time::{Duration, Instant};

/// Reads that fail one after another until the device is taken out.
const FAILURES_MAX: u32 = 16;
/// Probes that must go well, one after another, to bring a device back.
const PROBES_GOOD: u32 = 3;
/// Pause between probes; doubles with every time that the device was taken out.
const PROBE_PAUSE: Duration = Duration::from_millis(100);
const PROBE_PAUSE_DOUBLINGS: u32 = 7;
/// A probe that takes longer is no good: a page from a device of any kind takes less.
const PROBE_TIME_MAX: Duration = Duration::from_millis(30);
/// Times that a device may be taken out before it stays out.
const OUTS_MAX: u32 = 5;
/// One of these is forgotten for so long that it was well: what happens once a week is no broken device.
const OUT_FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);
/// Times the service time that the device itself once had, and that its peers have now.
const SLOWDOWN_MAX: f64 = 50.0;
const PEERS_MAX: f64 = 10.0;
/// Slow in proportion only is not worth a device.
const SLOW_US_MIN: f64 = 20_000.0;
/// Without peers it cannot be told from a machine that is busy: then it must be worse by this.
const ALONE: f64 = 2.0;
/// No single I/O counts as slower than this, so that one pause is no verdict.
const OUTLIER_MAX: f64 = 4.0 * SLOWDOWN_MAX;
/// I/Os until a service time is known.
const SAMPLES_MIN: u32 = 16;
/// The best that is believed of any device: latency, and rate in bytes per microsecond.
const LATENCY_US: f64 = 100.0;
const BYTES_PER_US: f64 = 2147.0;
/// Best ratio to the above that is believed: a cache somewhere is no measure.
const BEST_MIN: f64 = 1.0;

/// What may be done with a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// All.
    Well,
    /// Nothing but probes.
    Out { reason: String, since: Instant, good: u32, next_probe: Instant },
    /// Nothing until the daemon starts again.
    Ejected { reason: String },
}

/// Its history.
pub(super) struct Health {
    pub(super) standing: Standing,
    pub(super) reads: Pace,
    pub(super) writes: Pace,
    failures: u32,
    outs: u32,
    /// When it came back last.
    back: Option<Instant>,
}

impl Health {
    pub(super) fn new() -> Self {
        Self {
            standing: Standing::Well,
            reads: Pace::default(),
            writes: Pace::default(),
            failures: 0,
            outs: 0,
            back: None,
        }
    }

    pub(super) fn is_well(&self) -> bool {
        self.standing == Standing::Well
    }

    /// Notes whether a read went well.
    pub(super) fn read_ended(&mut self, well: bool) {
        self.failures = if well { 0 } else { self.failures.saturating_add(1) };
    }

    /// Why it should be taken out for what it answered; `peers` is the middle of
    /// the other devices' slowdowns, if there are others.
    pub(super) fn complaint(&self, peers: Option<f64>) -> Option<String> {
        if self.failures >= FAILURES_MAX {
            return Some(format!("{} reads in a row failed", self.failures));
        }
        let slow = |pace: &Pace, what| {
            let slowdown = pace.slowdown();
            let factor = if peers.is_some() { 1.0 } else { ALONE };
            let differs = peers.is_none_or(|peers| slowdown > peers * PEERS_MAX);
            let slow = slowdown > SLOWDOWN_MAX * factor && pace.took_us > SLOW_US_MIN * factor;
            (slow && differs).then(|| {
                format!("{what} take {:.0} ms, {slowdown:.0} times what they took", pace.took_us / 1e3)
            })
        };
        slow(&self.reads, "reads").or_else(|| slow(&self.writes, "writes"))
    }

    /// The larger of the slowdowns of reads and writes.
    pub(super) fn slowdown(&self) -> f64 {
        self.reads.slowdown().max(self.writes.slowdown())
    }

    /// Takes the device out, or ejects it if that happened too often.
    pub(super) fn take_out(&mut self, reason: String, now: Instant) {
        let well = self.back.map_or(Duration::ZERO, |back| now.saturating_duration_since(back));
        let forgotten = well.as_secs() / OUT_FORGOTTEN_AFTER.as_secs();
        self.outs = self.outs.saturating_sub(u32::try_from(forgotten).unwrap_or(u32::MAX)) + 1;
        self.standing = if self.outs >= OUTS_MAX {
            Standing::Ejected { reason: format!("taken out {} times, last: {reason}", self.outs) }
        } else {
            Standing::Out { reason, since: now, good: 0, next_probe: now + self.pause() }
        };
    }

    /// For good.
    pub(super) fn eject(&mut self, reason: String) {
        self.standing = Standing::Ejected { reason };
    }

    /// Whether a probe is due. If so, the next one is due when this one ended.
    pub(super) fn probe_due(&self, now: Instant) -> bool {
        matches!(self.standing, Standing::Out { next_probe, .. } if now >= next_probe)
    }

    /// A probe ended. True: the device is back.
    pub(super) fn probed(&mut self, well: bool, took: Duration, now: Instant) -> bool {
        let pause = self.pause();
        let Standing::Out { good, next_probe, .. } = &mut self.standing else { return false };
        *good = if well && took <= PROBE_TIME_MAX { *good + 1 } else { 0 };
        *next_probe = now + pause;
        if *good < PROBES_GOOD {
            return false;
        }
        self.standing = Standing::Well;
        self.back = Some(now);
        self.failures = 0;
        self.reads.forget_lately();
        self.writes.forget_lately();
        true
    }

    fn pause(&self) -> Duration {
        PROBE_PAUSE * (1 << self.outs.min(PROBE_PAUSE_DOUBLINGS))
    }

    /// For `info`; empty if all is well.
    pub(super) fn sentence(&self, now: Instant) -> String {
        match &self.standing {
            Standing::Well => String::new(),
            Standing::Out { reason, since, .. } => format!(
                "taken out {} s ago: {reason}; its blocks are misses until it answers probes again",
                now.saturating_duration_since(*since).as_secs()
            ),
            Standing::Ejected { reason } => {
                format!("ejected until the daemon starts again: {reason}; its blocks are misses")
            }
        }
    }
}

/// How long I/Os of one kind take, compared with what they took at best.
#[derive(Default)]
pub(super) struct Pace {
    samples: u32,
    /// Smoothed time.
    took_us: f64,
    /// Smoothed ratio of that to what the best device would need.
    ratio: f64,
    best: Option<f64>,
}

impl Pace {
    /// An I/O took this long with so many bytes on the device in front of its end, its own included.
    pub(super) fn observe(&mut self, took: Duration, bytes: u64) {
        let took = took.as_secs_f64() * 1e6;
        let ratio = took / (LATENCY_US + float(bytes) / BYTES_PER_US);
        let ratio = self.best.map_or(ratio, |best| ratio.min(best * OUTLIER_MAX));
        self.samples = self.samples.saturating_add(1);
        let weight = 1.0 / f64::from(self.samples.min(SAMPLES_MIN));
        self.took_us += (took - self.took_us) * weight;
        self.ratio += (ratio - self.ratio) * weight;
        if self.samples >= SAMPLES_MIN {
            let best = self.best.unwrap_or(self.ratio).min(self.ratio);
            self.best = Some(best.max(BEST_MIN));
        }
    }

    /// Times slower than at best; 1 while nothing is known.
    pub(super) fn slowdown(&self) -> f64 {
        match self.best {
            Some(best) if self.samples >= SAMPLES_MIN => self.ratio / best,
            Some(_) | None => 1.0,
        }
    }

    /// What it lately did says nothing any more; what it once could, does.
    fn forget_lately(&mut self) {
        (self.samples, self.took_us, self.ratio) = (0, 0.0, 0.0);
    }
}

/// Exact below 2^53.
#[allow(clippy::cast_precision_loss, reason = "estimates need no more than 53 bits")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 368_640;

    fn read(health: &mut Health, times: u32, micros: u64) {
        (0..times).for_each(|_| health.reads.observe(Duration::from_micros(micros), BYTES));
    }

    /// A device a hundred times slower must be taken out soon; one that is ten times slower for
    /// a while, or as slow as its peers, must not.
    #[test]
    fn a_hundredfold_slowdown_is_a_complaint() {
        let mut health = Health::new();
        read(&mut health, 100, 400);
        assert_eq!(health.complaint(Some(1.0)), None);
        read(&mut health, 100, 4000);
        assert_eq!(health.complaint(Some(1.0)), None, "ten times is busy, not broken");
        health.reads.observe(Duration::from_secs(3), BYTES);
        assert_eq!(health.complaint(Some(1.0)), None, "one pause is no verdict");
        read(&mut health, 60, 60_000);
        assert!(health.complaint(Some(1.0)).is_some_and(|said| said.contains("reads take ")));
        assert!(health.complaint(None).is_some(), "without peers it is compared with itself");
        assert_eq!(health.complaint(Some(90.0)), None, "the whole machine is slow");
        let mut quick = Health::new();
        read(&mut quick, 100, 40);
        read(&mut quick, 100, 4000);
        assert_eq!(quick.complaint(None), None, "4 ms are no harm");
    }

    /// One failed read is not a dead device; sixteen in a row are.
    #[test]
    fn failures_in_a_row_are_a_complaint() {
        let mut health = Health::new();
        for _ in 0..FAILURES_MAX - 1 {
            health.read_ended(false);
        }
        assert_eq!(health.complaint(None), None);
        health.read_ended(true);
        health.read_ended(false);
        assert_eq!(health.complaint(None), None);
        (0..FAILURES_MAX).for_each(|_| health.read_ended(false));
        assert!(health.complaint(None).is_some());
    }

    /// A device comes back by good probes only, later each time, and at last not at all.
    #[test]
    fn probes_bring_it_back_until_it_was_out_too_often() {
        let (mut health, mut now) = (Health::new(), Instant::now());
        for out in 1..OUTS_MAX {
            health.take_out("test".to_owned(), now);
            assert!(!health.probe_due(now));
            now += PROBE_PAUSE * (1 << out);
            assert!(health.probe_due(now));
            assert!(!health.probed(true, Duration::from_millis(1), now));
            assert!(!health.probe_due(now), "a pause after each");
            assert!(!health.probed(true, Duration::from_millis(100), now), "too slow");
            assert!(!health.probed(true, Duration::from_millis(1), now));
            assert!(!health.probed(true, Duration::from_millis(1), now));
            assert!(health.probed(true, Duration::from_millis(1), now));
            assert!(health.is_well());
        }
        health.take_out("test".to_owned(), now);
        assert!(matches!(health.standing, Standing::Ejected { .. }));
        assert!(!health.probe_due(now + Duration::from_secs(1000)));
        assert!(health.sentence(now).contains("ejected"));
    }

    /// In a life of weeks a busy machine makes any device slow five times; it must not lose the device for that. One
    /// that is out for hours each time is not well meanwhile.
    #[test]
    fn what_was_long_ago_is_forgotten() {
        let (hour, good) = (OUT_FORGOTTEN_AFTER, Duration::from_millis(1));
        for (well, out, kept) in [(hour, Duration::ZERO, true), (hour / 2, hour * 10, false)] {
            let (mut health, mut now) = (Health::new(), Instant::now());
            for _ in 0..4 * OUTS_MAX {
                health.take_out("test".to_owned(), now);
                now += out;
                for _ in 0..PROBES_GOOD {
                    health.probed(true, good, now);
                }
                now += well;
            }
            assert_eq!(health.is_well(), kept, "well for {well:?}, out for {out:?}");
        }
    }
}

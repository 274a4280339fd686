//! What a block costs to compute and to load, in seconds, calibrated as blocks
//! are sealed and read.

use crate::units::{ByteCount, Micros, Now};

/// Before anything is known of a space: seconds to compute a byte of KV.
const COMPUTE_SECONDS_PER_BYTE: f64 = 1e-9;
/// Before anything is known of a device: seconds to load a byte.
const LOAD_SECONDS_PER_BYTE: f64 = 1e-9;
/// What remains of the evidence at each new sample: half after 700.
const KEEP: f64 = 0.999;
/// Samples that a declared cost is worth.
const DECLARED_SAMPLES: f64 = 32.0;
/// Depth at which a declared cost is taken a second time, so that its slope is evidence too.
const DECLARED_DEPTH: f64 = 1024.0;
/// A sample that is so many times over what was expected is cut: somebody waited
/// for something else.
const OUTLIER: f64 = 8.0;
/// Weight of a new sample of a device's rate.
const RATE_WEIGHT: f64 = 1.0 / 16.0;

/// Seconds to compute one block that has `depth` blocks before it:
/// `first + slope * depth`. Prefill is linear in a prompt's length but for
/// attention, which is quadratic: so a block's own cost is linear in its depth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ComputeCost {
    /// Of the first block of a prompt.
    pub first_seconds: f64,
    /// More for each block before it.
    pub slope_seconds: f64,
}

impl ComputeCost {
    /// Of a block at a depth.
    pub fn seconds(self, depth: u32) -> f64 {
        self.first_seconds + self.slope_seconds * f64::from(depth)
    }
}

/// A space's cost: least squares over what was declared and seen, old evidence fading.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compute {
    weight: f64,
    depth: f64,
    seconds: f64,
    depth_depth: f64,
    depth_seconds: f64,
    cost: ComputeCost,
    declared: bool,
}

impl Compute {
    /// Nothing is known but the size of a block.
    pub(crate) fn new(block: ByteCount) -> Self {
        let first_seconds = float(block.get()) * COMPUTE_SECONDS_PER_BYTE;
        let cost = ComputeCost { first_seconds, slope_seconds: 0.0 };
        let mut compute = Self {
            weight: 0.0,
            depth: 0.0,
            seconds: 0.0,
            depth_depth: 0.0,
            depth_seconds: 0.0,
            cost,
            declared: false,
        };
        compute.sample(0.0, first_seconds, 1.0);
        compute
    }

    /// Somebody who knows the model says what it costs.
    pub(crate) fn declare(&mut self, cost: ComputeCost) {
        let valid = |seconds: f64| seconds.is_finite() && (0.0..1e6).contains(&seconds);
        if !valid(cost.first_seconds) || !valid(cost.slope_seconds) || cost.first_seconds == 0.0 {
            return;
        }
        *self = Self { weight: 0.0, depth: 0.0, seconds: 0.0, depth_depth: 0.0, depth_seconds: 0.0, ..*self };
        self.cost = cost;
        self.declared = true;
        let far = cost.first_seconds + cost.slope_seconds * DECLARED_DEPTH;
        self.sample(0.0, cost.first_seconds, DECLARED_SAMPLES / 2.0);
        self.sample(DECLARED_DEPTH, far, DECLARED_SAMPLES / 2.0);
    }

    /// A block at this depth was computed in this time.
    pub(crate) fn observe(&mut self, depth: u32, seconds: f64) {
        let most = self.cost.seconds(depth) * OUTLIER;
        let cut = if self.weight > DECLARED_SAMPLES / 2.0 { seconds.min(most) } else { seconds };
        for sum in [
            &mut self.weight,
            &mut self.depth,
            &mut self.seconds,
            &mut self.depth_depth,
            &mut self.depth_seconds,
        ] {
            *sum *= KEEP;
        }
        self.sample(f64::from(depth), cut, 1.0);
    }

    fn sample(&mut self, depth: f64, seconds: f64, weight: f64) {
        self.weight += weight;
        self.depth += depth * weight;
        self.seconds += seconds * weight;
        self.depth_depth += depth * depth * weight;
        self.depth_seconds += depth * seconds * weight;
        let mean_depth = self.depth / self.weight;
        let mean = self.seconds / self.weight;
        let spread = self.depth_depth / self.weight - mean_depth * mean_depth;
        let shared = self.depth_seconds / self.weight - mean_depth * mean;
        let slope = if spread > 1.0 { (shared / spread).clamp(0.0, mean / mean_depth.max(1.0)) } else { 0.0 };
        self.cost =
            ComputeCost { first_seconds: (mean - slope * mean_depth).max(1e-9), slope_seconds: slope };
    }

    pub(crate) fn cost(&self) -> ComputeCost {
        self.cost
    }

    /// Whether the model's cost was declared: only then may recomputing be
    /// preferred to a copy that is there.
    pub(crate) fn is_declared(&self) -> bool {
        self.declared
    }
}

/// How fast a device delivers, from how far apart its answers are while it is busy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    seconds_per_byte: f64,
    /// Of one read alone, beyond its bytes.
    latency: f64,
    queued_bytes: u64,
    answered: Now,
}

impl Load {
    pub(crate) fn new() -> Self {
        Self {
            seconds_per_byte: LOAD_SECONDS_PER_BYTE,
            latency: 0.0,
            queued_bytes: 0,
            answered: Now::default(),
        }
    }

    /// A read was sent.
    pub(crate) fn sent(&mut self, bytes: u64) {
        self.queued_bytes += bytes;
    }

    /// It was answered.
    pub(crate) fn answered(&mut self, bytes: u64, sent: Now, now: Now, ok: bool) {
        assert!(self.queued_bytes >= bytes, "a read is answered once");
        let alone = sent >= self.answered;
        self.queued_bytes -= bytes;
        let busy = seconds(now.since(sent.max(self.answered)));
        self.answered = now;
        if !ok || bytes == 0 {
            return;
        }
        if alone {
            let beyond = (busy - float(bytes) * self.seconds_per_byte).max(0.0);
            self.latency += (beyond - self.latency) * RATE_WEIGHT;
        } else {
            let rate = busy / float(bytes);
            self.seconds_per_byte += (rate - self.seconds_per_byte) * RATE_WEIGHT;
        }
    }

    /// Seconds until `bytes` more would be here.
    pub(crate) fn seconds(&self, bytes: u64) -> f64 {
        self.latency + float(self.queued_bytes.saturating_add(bytes)) * self.seconds_per_byte
    }

    /// Seconds that `bytes` take on an idle device.
    pub(crate) fn seconds_idle(&self, bytes: u64) -> f64 {
        self.latency + float(bytes) * self.seconds_per_byte
    }
}

/// Seconds of a span.
pub(crate) fn seconds(span: Micros) -> f64 {
    float(span.get()) / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "an estimate needs no more than 52 bits")]
fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wrong fit would make deep blocks worth nothing, or recomputing look free.
    #[test]
    fn compute_cost_follows_what_is_seen() {
        let mut compute = Compute::new(ByteCount::new(1 << 20));
        for round in 0..4000u32 {
            let depth = round * 7 % 200;
            compute.observe(depth, 0.010 + 0.0001 * f64::from(depth));
        }
        let cost = compute.cost();
        assert!((cost.seconds(0) - 0.010).abs() < 0.0005, "{cost:?}");
        assert!((cost.seconds(150) - 0.025).abs() < 0.001, "{cost:?}");
        assert!(!compute.is_declared());
    }

    /// One client that paused between two seals must not make the model look slow.
    #[test]
    fn a_pause_is_no_evidence() {
        let mut compute = Compute::new(ByteCount::new(1 << 20));
        compute.declare(ComputeCost { first_seconds: 0.01, slope_seconds: 0.0 });
        compute.observe(0, 3600.0);
        assert!(compute.cost().seconds(0) < 0.02, "{:?}", compute.cost());
        compute.declare(ComputeCost { first_seconds: f64::NAN, slope_seconds: 0.0 });
        assert!(compute.cost().seconds(0).is_finite());
    }

    /// Reads that overlap must not count the same second twice.
    #[test]
    fn load_cost_is_time_between_answers() {
        let mut load = Load::new();
        let mut now = 0u64;
        for _ in 0..200 {
            let sent = Now::from_micros(now);
            for _ in 0..4 {
                load.sent(1_000_000);
            }
            for _ in 0..4 {
                now += 1_000;
                load.answered(1_000_000, sent, Now::from_micros(now), true);
            }
        }
        let took = load.seconds(10_000_000);
        assert!((took - 0.010).abs() < 0.001, "1 GB/s: {took}");
        load.sent(20_000_000);
        assert!(load.seconds(10_000_000) > 0.029, "what is queued comes first");
    }
}

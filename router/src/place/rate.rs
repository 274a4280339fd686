//! What computing a prompt costs on one worker, learned from what it took.
//!
//! Prefill is linear in the tokens, but for attention, which every token pays
//! for each token before it. Two coefficients are enough; they are fitted by
//! least squares over relative errors, old evidence fading. A sample far from
//! what others vary by is cut, so that one pause moves nothing, while a lasting
//! change widens what is believed and is followed.

/// Context at which attention costs as much as everything else of a token, when
/// nothing was measured.
const ATTENTION_TOKENS: f64 = 4096.0;
/// Rate of a worker that has not measured its own, in tokens per second.
const RATE_UNKNOWN: f64 = 300.0;
/// What remains of the evidence at each new sample: half after 35.
const KEEP: f64 = 0.98;
/// Samples that the first guess is worth.
const GUESS_SAMPLES: f64 = 0.5;
/// Weight of the last fit where the samples say nothing, as a share of their own.
const INERTIA: f64 = 1e-4;
/// A sample counts at most this many times the usual deviation from what was expected.
const DEVIATIONS_MAX: f64 = 4.0;
/// A sample may always deviate this far.
const DEVIATION_FREE: f64 = 0.25;
/// Weight of a new sample in the usual deviation.
const DEVIATION_WEIGHT: f64 = 1.0 / 16.0;

/// Cost of prefill on one worker: `tokens` after `context` earlier ones take
/// `linear * tokens + quadratic * ((context + tokens)^2 - context^2)` seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prefill {
    /// Seconds for each token.
    pub linear: f64,
    /// Seconds for each pair of tokens, the square of the position.
    pub quadratic: f64,
}

impl Prefill {
    /// Of a worker that computes so many tokens a second of short prompts; a
    /// rate that is none is taken as unknown.
    pub fn of_rate(rate: f64) -> Self {
        let rate = if rate.is_finite() && rate > 0.0 { rate } else { RATE_UNKNOWN };
        Self { linear: 1.0 / rate, quadratic: 0.5 / (rate * ATTENTION_TOKENS) }
    }

    /// Seconds to compute `tokens` after `context` earlier ones.
    pub fn seconds(self, context: f64, tokens: f64) -> f64 {
        self.linear * tokens + self.quadratic * pairs(context, tokens)
    }
}

fn pairs(context: f64, tokens: f64) -> f64 {
    tokens * (2.0 * context + tokens)
}

/// The cost of one worker, as it is learned.
#[derive(Clone, Copy, Debug)]
pub struct Calibration {
    cost: Prefill,
    // Sums of the normal equations; each sample is scaled by the shape of a prompt's cost, so that long and
    // short prompts weigh the same.
    linear_linear: f64,
    linear_quadratic: f64,
    quadratic_quadratic: f64,
    linear_seconds: f64,
    quadratic_seconds: f64,
    deviation: f64,
    samples: u64,
}

impl Calibration {
    /// Begins with a guess, which the first samples outweigh.
    pub fn new(guess: Prefill) -> Self {
        let mut calibration = Self {
            cost: guess,
            linear_linear: 0.0,
            linear_quadratic: 0.0,
            quadratic_quadratic: 0.0,
            linear_seconds: 0.0,
            quadratic_seconds: 0.0,
            deviation: 1.0,
            samples: 0,
        };
        for context in [0.0, 4.0 * ATTENTION_TOKENS] {
            calibration.add(context, 512.0, guess.seconds(context, 512.0), GUESS_SAMPLES / 2.0);
        }
        calibration
    }

    /// What is believed now.
    pub fn cost(&self) -> Prefill {
        self.cost
    }

    /// Samples seen.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// A prompt's `tokens` after `context` earlier ones took so long. What is no
    /// time, or no work, is ignored.
    pub fn observe(&mut self, context: f64, tokens: f64, seconds: f64) {
        let sound = [context, tokens, seconds].into_iter().all(f64::is_finite);
        if !sound || context < 0.0 || tokens < 1.0 || seconds <= 0.0 {
            return;
        }
        let expected = self.cost.seconds(context, tokens);
        let most = (DEVIATIONS_MAX * self.deviation).max(DEVIATION_FREE);
        let deviation = (seconds / expected - 1.0).clamp(-most, most);
        self.deviation += (deviation.abs() - self.deviation) * DEVIATION_WEIGHT;
        for sum in [
            &mut self.linear_linear,
            &mut self.linear_quadratic,
            &mut self.quadratic_quadratic,
            &mut self.linear_seconds,
            &mut self.quadratic_seconds,
        ] {
            *sum *= KEEP;
        }
        self.samples += 1;
        self.add(context, tokens, expected * (1.0 + deviation), 1.0);
        self.fit();
    }

    fn add(&mut self, context: f64, tokens: f64, seconds: f64, weight: f64) {
        // The same for every worker, so that a wrong guess does not weigh its samples wrongly.
        let scale = tokens + 0.5 * pairs(context, tokens) / ATTENTION_TOKENS;
        let (linear, quadratic) = (tokens / scale, pairs(context, tokens) / ATTENTION_TOKENS / scale);
        let seconds = seconds / scale;
        self.linear_linear += weight * linear * linear;
        self.linear_quadratic += weight * linear * quadratic;
        self.quadratic_quadratic += weight * quadratic * quadratic;
        self.linear_seconds += weight * linear * seconds;
        self.quadratic_seconds += weight * quadratic * seconds;
    }

    /// Least squares, held weakly to the last fit: prompts that are all alike say
    /// nothing of how the two parts share their time. Neither part is negative.
    fn fit(&mut self) {
        let inertia = INERTIA * (self.linear_linear + self.quadratic_quadratic);
        let last = (self.cost.linear, self.cost.quadratic * ATTENTION_TOKENS);
        let (a, b, c) =
            (self.linear_linear + inertia, self.linear_quadratic, self.quadratic_quadratic + inertia);
        let (y, z) = (self.linear_seconds + inertia * last.0, self.quadratic_seconds + inertia * last.1);
        let determinant = a * c - b * b;
        let (linear, quadratic) = ((y * c - z * b) / determinant, (z * a - y * b) / determinant);
        let (linear, quadratic) = match (linear > 0.0, quadratic >= 0.0) {
            (true, true) => (linear, quadratic),
            (true, false) => (y / a, 0.0),
            (false, _) => (f64::MIN_POSITIVE, z / c),
        };
        if linear.is_finite() && quadratic.is_finite() {
            self.cost = Prefill { linear, quadratic: quadratic / ATTENTION_TOKENS };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model of 70 billion parameters on four H100.
    const TRUE: Prefill = Prefill { linear: 7.13e-5, quadratic: 6.6e-10 };

    /// Numbers of a fixed sequence in 0..1.
    fn draws(mut state: u64) -> impl FnMut() -> f64 {
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            f64::from(u32::try_from(state >> 33).unwrap()) / f64::from(1u32 << 31)
        }
    }

    fn worst(cost: Prefill) -> f64 {
        let prompts = [(0.0, 500.0), (0.0, 12_000.0), (100_000.0, 2_000.0), (0.0, 100_000.0)];
        let off =
            |(context, tokens)| (cost.seconds(context, tokens) / TRUE.seconds(context, tokens) - 1.0).abs();
        prompts.into_iter().map(off).fold(0.0, f64::max)
    }

    fn feed(calibration: &mut Calibration, count: u32, slower: f64, outliers: f64, seed: u64) {
        let mut draw = draws(seed);
        for _ in 0..count {
            let context = if draw() < 0.5 { 0.0 } else { draw() * 100_000.0 };
            let tokens = 50.0 + draw() * 20_000.0;
            let noise = 0.9 + 0.2 * draw();
            let pause = if draw() < outliers { 100.0 } else { 1.0 };
            let seconds = TRUE.seconds(context, tokens) * slower * noise * pause;
            calibration.observe(context, tokens, seconds);
        }
    }

    /// A guess that is ten times off, either way, must be corrected by some dozen prompts, in both parts.
    #[test]
    fn a_wrong_guess_is_corrected() {
        for factor in [0.1, 1.0, 10.0] {
            let guess = Prefill { linear: TRUE.linear * factor, quadratic: 0.0 };
            let mut calibration = Calibration::new(guess);
            feed(&mut calibration, 150, 1.0, 0.0, 1);
            assert!(worst(calibration.cost()) < 0.08, "{factor}: {:?}", calibration.cost());
            assert_eq!(calibration.samples(), 150);
        }
    }

    /// One prompt in twenty that waited a hundred times too long for something else must not move the
    /// estimate by more than a tenth; senseless samples must not move it at all.
    #[test]
    fn outliers_are_survived() {
        let mut calibration = Calibration::new(TRUE);
        feed(&mut calibration, 2000, 1.0, 0.05, 2);
        assert!(worst(calibration.cost()) < 0.1, "{:?}", calibration.cost());
        let before = calibration.cost();
        for (context, tokens, seconds) in [
            (0.0, 0.0, 1.0),
            (0.0, 10.0, 0.0),
            (-1.0, 10.0, 1.0),
            (0.0, 10.0, f64::NAN),
            (0.0, f64::INFINITY, 1.0),
        ] {
            calibration.observe(context, tokens, seconds);
        }
        assert_eq!(calibration.cost(), before);
    }

    /// A worker that becomes four times slower for good is no outlier: it must be believed.
    #[test]
    fn a_lasting_change_is_followed() {
        let mut calibration = Calibration::new(TRUE);
        feed(&mut calibration, 500, 1.0, 0.0, 3);
        feed(&mut calibration, 300, 4.0, 0.0, 4);
        let found = calibration.cost().seconds(0.0, 12_000.0) / TRUE.seconds(0.0, 12_000.0);
        assert!((found / 4.0 - 1.0).abs() < 0.1, "{found}");
    }

    /// Prompts that are all alike leave the split between the two parts open: it must stay sane, and
    /// estimates of longer prompts with it.
    #[test]
    fn equal_prompts_keep_both_parts_sane() {
        let mut calibration = Calibration::new(Prefill::of_rate(10_000.0));
        for _ in 0..1000 {
            calibration.observe(0.0, 1000.0, 0.2);
        }
        let cost = calibration.cost();
        assert!((cost.seconds(0.0, 1000.0) / 0.2 - 1.0).abs() < 0.01, "{cost:?}");
        assert!(cost.linear > 0.0 && cost.quadratic >= 0.0);
        let longer = cost.seconds(0.0, 8000.0);
        assert!(longer > 1.6 && longer < 8.0, "{longer}");
    }

    /// Attention makes the second half of a long prompt dearer than the first; unknown and senseless rates
    /// must still give a finite estimate.
    #[test]
    fn estimates_grow_faster_than_the_prompt_and_stay_finite() {
        let cost = Prefill::of_rate(1000.0);
        assert!(cost.seconds(4096.0, 4096.0) > 1.6 * cost.seconds(0.0, 4096.0));
        assert!(
            (cost.seconds(0.0, 100.0) + cost.seconds(100.0, 50.0) - cost.seconds(0.0, 150.0)).abs() < 1e-12
        );
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let seconds = Prefill::of_rate(rate).seconds(0.0, 100.0);
            assert!(seconds.is_finite() && seconds > 0.0, "{rate}");
        }
    }
}

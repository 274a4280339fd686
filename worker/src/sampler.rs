//! Choice of the next token from its scores.
//!
//! The same settings and scores give the same tokens on every machine: the
//! generator is our own, ties go to the lower id, and probabilities are summed
//! in one order.

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the highest score; higher values flatten the choice.
    pub temperature: f32,
    /// Chooses among the most probable tokens that reach this share together, in
    /// (0, 1]. Other values count as 1.
    pub top_p: f32,
    /// Start of the random numbers.
    pub seed: u64,
}

/// Chooses the tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    state: u64,
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    pub fn new(sampling: Sampling) -> Self {
        Self { sampling, state: sampling.seed, candidates: Vec::new() }
    }

    /// The next token.
    ///
    /// # Panics
    /// If there are no scores.
    pub fn next(&mut self, logits: &[f32]) -> u32 {
        assert!(!logits.is_empty(), "a model has tokens");
        let scored = (0u32..).zip(logits).map(|(token, score)| (*score, token));
        // A temperature that is not a positive number is greedy.
        if !(self.sampling.temperature > 0.0 && self.sampling.temperature.is_finite()) {
            let best =
                scored.fold((f32::NEG_INFINITY, 0), |best, next| if next.0 > best.0 { next } else { best });
            return best.1;
        }
        self.candidates.clear();
        self.candidates.extend(scored);
        self.candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let largest = self.candidates[0].0;
        let mut total = 0.0;
        for candidate in &mut self.candidates {
            candidate.0 = ((candidate.0 - largest) / self.sampling.temperature).exp();
            total += candidate.0;
        }
        let share =
            if self.sampling.top_p > 0.0 && self.sampling.top_p < 1.0 { self.sampling.top_p } else { 1.0 };
        let mut kept = 0.0;
        let mut count = 0;
        while count < self.candidates.len() && (count == 0 || kept < share * total) {
            kept += self.candidates[count].0;
            count += 1;
        }
        let mut left = self.random() * kept;
        for (weight, token) in &self.candidates[..count] {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        self.candidates[count - 1].1
    }

    /// A number in [0, 1), by SplitMix64.
    fn random(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^= bits >> 31;
        // 24 bits are what an f32 holds exactly.
        (bits >> 40) as f32 / 16_777_216.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(sampling: Sampling, logits: &[f32]) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling);
        (0..200).map(|_| sampler.next(logits)).collect()
    }

    // A greedy choice that depended on order or on NaN would change answers:
    // give it a tie, and scores that are all not numbers.
    #[test]
    fn greedy_takes_the_first_highest() {
        let greedy = Sampling { temperature: 0.0, top_p: 1.0, seed: 1 };
        assert_eq!(Sampler::new(greedy).next(&[0.0, 3.0, 3.0, f32::NAN]), 1);
        assert_eq!(Sampler::new(greedy).next(&[f32::NAN, f32::NAN]), 0);
    }

    // A seed that did not decide everything would make answers irreproducible;
    // one that decided nothing would repeat itself.
    #[test]
    fn seed_decides() {
        let logits = [1.0, 1.1, 0.9, 1.0];
        let at = |seed| run(Sampling { temperature: 1.0, top_p: 1.0, seed }, &logits);
        assert_eq!(at(7), at(7));
        assert_ne!(at(7), at(8));
        for token in 0..4 {
            assert!(
                at(7).iter().filter(|got| **got == token).count() > 20,
                "token {token} is drawn at its rate"
            );
        }
    }

    // The nucleus must cut the tail: two tokens hold 99 % here.
    #[test]
    fn nucleus_cuts_the_tail() {
        let logits = [5.0, 5.0, 0.0, 0.0];
        let sampling = Sampling { temperature: 1.0, top_p: 0.9, seed: 3 };
        assert!(run(sampling, &logits).iter().all(|token| *token < 2));
        assert!(run(Sampling { top_p: 1.0, temperature: 50.0, ..sampling }, &logits).contains(&3));
    }
}

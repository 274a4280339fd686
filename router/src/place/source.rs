//! Where the blocks of a prompt can come from, and how much of it is better
//! loaded than computed.
//!
//! What is loaded is a prefix. It is covered run by run from the cheapest link;
//! the rest is computed. Loading a token costs the same everywhere in a run,
//! computing one costs more the later it comes: so the best cut lies at the end
//! of a run, and no other needs to be tried.

use super::rate::Prefill;

/// Where a holder keeps a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// Device memory.
    Hbm,
    /// Host memory.
    Pinned,
    /// Devices.
    Nvme,
    /// Another node.
    Remote,
}

impl Tier {
    /// Its name in answers.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Hbm => "hbm",
            Tier::Pinned => "pinned",
            Tier::Nvme => "nvme",
            Tier::Remote => "remote",
        }
    }

    /// Whether blocks should be asked for before the worker leases them.
    fn is_slow(self) -> bool {
        match self {
            Tier::Hbm | Tier::Pinned => false,
            Tier::Nvme | Tier::Remote => true,
        }
    }
}

/// A way for blocks to a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Who holds what comes over it.
    pub holder: u32,
    /// Where it is kept there.
    pub tier: Tier,
    /// Seconds before the first byte.
    pub latency_seconds: f64,
    /// Measured seconds for each token's KV.
    pub seconds_per_token: f64,
    /// Seconds until what is in front is done.
    pub queued_seconds: f64,
}

/// Tokens of the prompt that can come over a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index into the links.
    pub link: usize,
    /// First token.
    pub begin: u64,
    /// After the last token.
    pub end: u64,
}

/// What a worker could load of a prompt, and over what.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Ways to the worker. At most [`View::LINKS_MAX`] are looked at.
    pub links: Vec<Link>,
    /// In any order; they may overlap.
    pub runs: Vec<Run>,
}

/// One part of a fetch plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fetch {
    /// Who to ask.
    pub holder: u32,
    /// Where it keeps the blocks.
    pub tier: Tier,
    /// First token.
    pub begin: u64,
    /// After the last token.
    pub end: u64,
    /// Estimated time.
    pub seconds: f64,
}

impl Fetch {
    /// Whether it should be asked for now, so that it is on its way before the
    /// worker leases it.
    pub fn is_prefetch(&self) -> bool {
        self.tier.is_slow()
    }
}

/// A prompt, cut into what is loaded and what is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Split {
    /// Tokens from the start that are loaded.
    pub loaded_tokens: u64,
    /// Of these, tokens for which a copy exists.
    pub cached_tokens: u64,
    /// Seconds of loading them.
    pub load_seconds: f64,
    /// Seconds of computing the rest.
    pub prefill_seconds: f64,
}

impl View {
    /// Links that are looked at.
    pub const LINKS_MAX: usize = 64;

    /// The quickest cut of a prompt. Its last token is always computed.
    pub fn split(&self, tokens: u64, cost: Prefill) -> Split {
        let compute = |from: u64| cost.seconds(float(from), float(tokens.max(1) - from));
        let last = tokens.saturating_sub(1);
        let mut best =
            Split { loaded_tokens: 0, cached_tokens: 0, load_seconds: 0.0, prefill_seconds: compute(0) };
        let (mut load, mut cached) = (0.0, 0);
        for stretch in self.cover(last) {
            load += stretch.seconds;
            cached = stretch.end;
            let prefill = compute(stretch.end);
            // Equal is loaded: computing would keep others waiting.
            if load + prefill <= best.load_seconds + best.prefill_seconds {
                best = Split {
                    loaded_tokens: stretch.end,
                    load_seconds: load,
                    prefill_seconds: prefill,
                    ..best
                };
            }
        }
        Split { cached_tokens: cached, ..best }
    }

    /// What to fetch from whom, for the first `tokens` tokens.
    pub fn fetches(&self, tokens: u64) -> Vec<Fetch> {
        let mut fetches: Vec<Fetch> = Vec::new();
        for Stretch { link, begin, end, seconds } in self.cover(tokens) {
            let Link { holder, tier, .. } = self.links[link];
            match fetches.last_mut() {
                Some(last) if last.holder == holder && last.tier == tier => {
                    last.end = end;
                    last.seconds += seconds;
                }
                _ => fetches.push(Fetch { holder, tier, begin, end, seconds }),
            }
        }
        fetches
    }

    fn cover(&self, limit: u64) -> Cover<'_> {
        Cover { view: self, at: 0, limit, used: 0 }
    }
}

/// Consecutive tokens from one link.
struct Stretch {
    link: usize,
    begin: u64,
    end: u64,
    seconds: f64,
}

/// Covers a prefix run by run until the first hole.
struct Cover<'a> {
    view: &'a View,
    at: u64,
    limit: u64,
    /// Links whose queue and latency are paid.
    used: u64,
}

impl Cover<'_> {
    fn seconds(&self, link: usize, tokens: u64) -> f64 {
        let way = &self.view.links[link];
        let first = if self.used & (1 << link) == 0 { way.latency_seconds + way.queued_seconds } else { 0.0 };
        first + way.seconds_per_token * float(tokens)
    }
}

impl Iterator for Cover<'_> {
    type Item = Stretch;

    fn next(&mut self) -> Option<Stretch> {
        let begin = self.at;
        if begin >= self.limit {
            return None;
        }
        let known = self.view.links.len().min(View::LINKS_MAX);
        let runs = || self.view.runs.iter().filter(|run| run.link < known);
        let here = runs().filter(|run| run.begin <= begin && begin < run.end);
        let each = |run: &Run| {
            let tokens = run.end.min(self.limit) - begin;
            self.seconds(run.link, tokens) / float(tokens)
        };
        let best = here.min_by(|a, b| each(a).total_cmp(&each(b)))?;
        // Where another run begins, it may be the cheaper one from there.
        let next = runs().map(|run| run.begin).filter(|&start| start > begin).min().unwrap_or(u64::MAX);
        let end = best.end.min(self.limit).min(next);
        let seconds = self.seconds(best.link, end - begin);
        self.used |= 1 << best.link;
        self.at = end;
        Some(Stretch { link: best.link, begin, end, seconds })
    }
}

#[expect(clippy::cast_precision_loss, reason = "prompts are far shorter than 2^53 tokens")]
pub(super) fn float(tokens: u64) -> f64 {
    tokens as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: Prefill = Prefill { linear: 1e-3, quadratic: 1e-7 };

    fn link(holder: u32, tier: Tier, seconds_per_token: f64) -> Link {
        Link { holder, tier, latency_seconds: 0.0, seconds_per_token, queued_seconds: 0.0 }
    }

    /// A hole ends what can be loaded, however much lies behind it.
    #[test]
    fn a_hole_ends_the_prefix() {
        let view = View {
            links: vec![link(7, Tier::Pinned, 1e-6)],
            runs: vec![Run { link: 0, begin: 512, end: 1024 }, Run { link: 0, begin: 0, end: 256 }],
        };
        let split = view.split(2000, COST);
        assert_eq!((split.loaded_tokens, split.cached_tokens), (256, 256));
        assert_eq!(View::default().split(2000, COST).loaded_tokens, 0);
    }

    /// What loads slower than it computes must be computed, and only that.
    #[test]
    fn each_run_is_loaded_or_computed_by_its_seconds() {
        let view = View {
            links: vec![link(0, Tier::Pinned, 1e-6), link(1, Tier::Nvme, 1e-2)],
            runs: vec![Run { link: 0, begin: 0, end: 500 }, Run { link: 1, begin: 500, end: 1000 }],
        };
        let split = view.split(1500, COST);
        assert_eq!((split.loaded_tokens, split.cached_tokens), (500, 1000));
        assert!((split.load_seconds - 500e-6).abs() < 1e-9);
        assert!((split.prefill_seconds - COST.seconds(500.0, 1000.0)).abs() < 1e-9);
        assert_eq!(view.fetches(split.loaded_tokens).len(), 1);
    }

    /// A queue in front of a device makes the same blocks not worth waiting for; it counts once, however
    /// many runs come over that device.
    #[test]
    fn queues_and_latency_count_once_for_each_link() {
        let slow = |queued_seconds| View {
            links: vec![Link { latency_seconds: 0.1, queued_seconds, ..link(0, Tier::Nvme, 1e-5) }],
            runs: vec![Run { link: 0, begin: 0, end: 600 }, Run { link: 0, begin: 600, end: 1000 }],
        };
        let idle = slow(0.0).split(1001, COST);
        assert_eq!(idle.loaded_tokens, 1000);
        assert!((idle.load_seconds - 0.11).abs() < 1e-9, "{idle:?}");
        let busy = slow(5.0).split(1001, COST);
        assert_eq!((busy.loaded_tokens, busy.cached_tokens), (0, 1000));
    }

    /// Of several holders the cheapest serves each part, and the plan says who.
    #[test]
    fn the_plan_names_the_cheapest_holder_of_each_part() {
        let view = View {
            links: vec![link(3, Tier::Remote, 1e-4), link(5, Tier::Pinned, 1e-6), link(9, Tier::Nvme, 1e-5)],
            runs: vec![
                Run { link: 0, begin: 0, end: 1000 },
                Run { link: 1, begin: 0, end: 400 },
                Run { link: 2, begin: 600, end: 800 },
            ],
        };
        let fetches = view.fetches(1000);
        let parts: Vec<_> = fetches.iter().map(|fetch| (fetch.holder, fetch.begin, fetch.end)).collect();
        assert_eq!(parts, [(5, 0, 400), (3, 400, 600), (9, 600, 800), (3, 800, 1000)]);
        let ahead: Vec<bool> = fetches.iter().map(Fetch::is_prefetch).collect();
        assert_eq!(ahead, [false, true, true, true]);
    }

    /// A prompt that is all there still needs its last token computed; one of no tokens is no division by
    /// zero, and ten million tokens are no overflow.
    #[test]
    fn the_last_token_is_computed_and_extremes_are_finite() {
        let whole =
            |end| View { links: vec![link(0, Tier::Hbm, 0.0)], runs: vec![Run { link: 0, begin: 0, end }] };
        assert_eq!(whole(1000).split(1000, COST).loaded_tokens, 999);
        let none = whole(1000).split(0, COST);
        assert_eq!(none.loaded_tokens, 0);
        assert!(none.prefill_seconds.is_finite() && none.prefill_seconds > 0.0);
        let long = whole(5_000_000).split(10_000_000, COST);
        assert_eq!(long.loaded_tokens, 5_000_000);
        assert!(long.prefill_seconds.is_finite());
        let stray = View { links: Vec::new(), runs: vec![Run { link: 4, begin: 0, end: 10 }] };
        assert_eq!(stray.split(100, COST).loaded_tokens, 0);
    }
}

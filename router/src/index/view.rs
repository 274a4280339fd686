//! From what is known of a prompt to what placement reads.

use std::time::Duration;

use terrace_client::{BlockMatch, wire};
use terrace_index::{Found, HolderId};

use crate::place::source::{Link, Run, Tier, View};

/// One daemon's longest prefix, as the index has it. `nvme_seconds` is the time of
/// one block from a device; what is in memory is used in place.
pub(super) fn of_index(
    found: &Found,
    holder: HolderId,
    daemon: u32,
    block_tokens: u64,
    nvme_seconds: f64,
) -> View {
    let mut view = View::default();
    let mut end = 0;
    for (start, stop, tier) in prefix(found, holder) {
        let tier = place_tier(tier);
        let link = view.links.iter().position(|link| link.tier == tier).unwrap_or_else(|| {
            let seconds = if tier == Tier::Nvme { nvme_seconds } else { 0.0 };
            view.links.push(link(daemon, tier, seconds / float(block_tokens)));
            view.links.len() - 1
        });
        end = stop;
        view.runs.push(Run {
            link,
            begin: u64::from(start) * block_tokens,
            end: u64::from(end) * block_tokens,
        });
    }
    debug_assert_eq!(
        Some(end),
        found.held(holder).map(|held| held.prefix[2]).or(Some(0)),
        "spans are the prefix"
    );
    view
}

/// Blocks of the prefix that are fetched from a device: first and after the last of each run.
pub(super) fn on_devices(found: &Found, holder: HolderId) -> impl Iterator<Item = (u32, u32)> {
    prefix(found, holder)
        .filter(|(_, _, tier)| *tier == terrace_index::Tier::Nvme)
        .map(|(start, end, _)| (start, end))
}

/// The holder's spans from the first block to its first hole.
fn prefix(found: &Found, holder: HolderId) -> impl Iterator<Item = (u32, u32, terrace_index::Tier)> {
    let spans = found.spans().iter().filter(move |span| found.holders()[span.held as usize].holder == holder);
    spans.scan(0, |at, span| {
        let follows = span.start == *at;
        *at = span.end;
        follows.then_some((span.start, span.end, span.tier))
    })
}

fn place_tier(tier: terrace_index::Tier) -> Tier {
    match tier {
        terrace_index::Tier::Hbm => Tier::Hbm,
        terrace_index::Tier::Pinned => Tier::Pinned,
        terrace_index::Tier::Nvme => Tier::Nvme,
    }
}

/// Runs of blocks in one tier, as the daemon itself answered. Its estimates already
/// hold the queue in front of each device.
pub(super) fn of_match(blocks: &[BlockMatch], daemon: u32, block_tokens: u64) -> View {
    let mut view = View::default();
    let (mut begin, mut blocks) = (0, blocks);
    while let Some(first) = blocks.first() {
        let same = |block: &&BlockMatch| (block.tier, &block.holder) == (first.tier, &first.holder);
        let count = blocks.iter().take_while(same).count();
        let (run, rest) = blocks.split_at(count);
        let end = begin + count as u64 * block_tokens;
        let fetch: Duration = run.iter().map(|block| block.fetch).sum();
        let tier = match first.tier {
            wire::Tier::Hbm => Tier::Hbm,
            wire::Tier::Pinned => Tier::Pinned,
            wire::Tier::Nvme => Tier::Nvme,
            wire::Tier::Remote | wire::Tier::Unspecified => Tier::Remote,
        };
        view.runs.push(Run { link: view.links.len(), begin, end });
        view.links.push(link(daemon, tier, fetch.as_secs_f64() / float(end - begin)));
        (begin, blocks) = (end, rest);
    }
    view
}

fn link(daemon: u32, tier: Tier, seconds_per_token: f64) -> Link {
    Link { holder: daemon, tier, latency_seconds: 0.0, seconds_per_token, queued_seconds: 0.0 }
}

#[expect(clippy::cast_precision_loss, reason = "prompts are far shorter than 2^53 tokens")]
fn float(tokens: u64) -> f64 {
    tokens as f64
}

#[cfg(test)]
mod tests {
    use terrace_index::{Index, Key, Limits, TierSet};

    use super::*;

    /// Runs that are merged over a change of tier, or times that are lost, would place prompts by a wrong
    /// estimate: the view of a mixed match is compared with its blocks.
    #[test]
    fn a_match_becomes_runs_of_one_tier() {
        let block = |tier, holder: &str, fetch| BlockMatch {
            present: true,
            tier,
            holder: holder.to_owned(),
            fetch: Duration::from_millis(fetch),
        };
        let blocks = [
            block(wire::Tier::Pinned, "", 0),
            block(wire::Tier::Pinned, "", 0),
            block(wire::Tier::Nvme, "", 3),
            block(wire::Tier::Nvme, "", 5),
            block(wire::Tier::Remote, "other", 16),
        ];
        let view = of_match(&blocks, 3, 16);
        let runs: Vec<_> = view.runs.iter().map(|run| (run.begin, run.end)).collect();
        assert_eq!(runs, [(0, 32), (32, 64), (64, 80)]);
        let holders: Vec<_> = view.links.iter().map(|link| (link.holder, link.tier)).collect();
        assert_eq!(holders, [(3, Tier::Pinned), (3, Tier::Nvme), (3, Tier::Remote)]);
        let fetches = view.fetches(80);
        assert!((fetches[1].seconds - 0.008).abs() < 1e-9 && (fetches[2].seconds - 0.016).abs() < 1e-9);
        assert!(view.split(81, crate::place::rate::Prefill::of_rate(100.0)).loaded_tokens == 80);
    }

    /// Another holder's blocks, or those behind a hole, would be credited: the view must end where this holder's
    /// prefix does, and say what each part costs.
    #[test]
    fn the_index_becomes_the_holders_own_prefix() {
        let index = Index::new(Limits { holders: 4, bytes: 4 << 20 });
        let prompt: Vec<Key> = (0..300).map(Key::from_alias).collect();
        let (own, other) = (HolderId(1), HolderId(2));
        index.store(other, TierSet::HBM, None, &prompt).unwrap();
        index.store(own, TierSet::PINNED, None, &prompt[..100]).unwrap();
        index.store(own, TierSet::NVME, None, &prompt[..150]).unwrap();
        index.store(own, TierSet::PINNED, None, &prompt[200..]).unwrap();
        let mut found = Found::new();
        index.find(&prompt, &mut found);
        let view = of_index(&found, own, 5, 16, 0.016);
        let fetches = view.fetches(300 * 16);
        let parts: Vec<_> =
            fetches.iter().map(|part| (part.holder, part.tier, part.begin, part.end)).collect();
        assert_eq!(parts, [(5, Tier::Pinned, 0, 1600), (5, Tier::Nvme, 1600, 2400)]);
        assert!(fetches[0].seconds == 0.0 && (fetches[1].seconds - 0.8).abs() < 1e-9, "{fetches:?}");
        let blocks: u32 = on_devices(&found, own).map(|(start, end)| end - start).sum();
        assert_eq!(blocks, 50);
        assert_eq!(of_index(&found, HolderId(3), 5, 16, 0.0), View::default());
    }
}

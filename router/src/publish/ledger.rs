//! What was told of each block, and the batches that bring it up to date.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};
use terrace_index::events::{Medium, Move, encode};
use terrace_index::{Tier, TierSet};

use super::Media;
use super::owner::CacheOwner;
use crate::names::Block;

/// Most blocks of a batch, so that none is longer than a subscriber takes.
const BATCH_BLOCKS: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(super) struct Ledger {
    media: Media,
    /// By sequence hash.
    told: BTreeMap<u64, Told>,
}

#[derive(Debug)]
struct Told {
    block: Arc<Block>,
    media: [bool; 3],
}

const MEDIA: [Medium; 3] = [Medium::CpuPinned, Medium::Disk, Medium::External];
/// Dynamo's names of them.
const TIERS: [&str; 3] = ["host_pinned", "disk", "external"];

impl Ledger {
    pub(super) fn new(media: Media) -> Self {
        Self { media, told: BTreeMap::new() }
    }

    fn media(&self, tiers: TierSet) -> [bool; 3] {
        match self.media {
            Media::External => [false, false, !tiers.is_empty()],
            // Device memory of ours is no engine's: for other routers it is as near as host memory.
            Media::Tier => [tiers.has(Tier::Hbm) || tiers.has(Tier::Pinned), tiers.has(Tier::Nvme), false],
        }
    }

    /// Batches after which subscribers know what is held now. What is not named is held by nobody.
    pub(super) fn changes(&mut self, held: Vec<(Arc<Block>, TierSet)>, seconds: f64) -> Vec<Vec<u8>> {
        let mut gone = std::mem::take(&mut self.told);
        let mut batches = Vec::new();
        let mut new: [Vec<Arc<Block>>; 3] = Default::default();
        let mut lost: [Vec<u64>; 3] = Default::default();
        for (block, tiers) in held {
            let media = self.media(tiers);
            let before = gone.remove(&block.hash).map_or([false; 3], |told| told.media);
            for medium in 0..MEDIA.len() {
                match (before[medium], media[medium]) {
                    (false, true) => new[medium].push(Arc::clone(&block)),
                    (true, false) => lost[medium].push(block.hash),
                    (true, true) | (false, false) => {}
                }
            }
            if media != [false; 3] {
                self.told.insert(block.hash, Told { block, media });
            }
        }
        for (hash, told) in gone {
            let media = (0..MEDIA.len()).filter(|medium| told.media[*medium]);
            media.for_each(|medium| lost[medium].push(hash));
        }
        // First what is there, so that a block that moves is never nowhere.
        for (blocks, medium) in new.iter().zip(MEDIA) {
            for blocks in runs(blocks) {
                batches.push(stored(blocks, medium, seconds));
            }
        }
        for (hashes, medium) in lost.iter().zip(MEDIA) {
            for blocks in hashes.chunks(BATCH_BLOCKS) {
                batches.push(encode(seconds, &[Move::Removed { blocks, medium }], None));
            }
        }
        batches
    }

    /// Everything that is told, in the form of Dynamo's dumps. Blocks of several sizes are told of apart.
    pub(super) fn dump(&self, model: &str, worker: u64, owner: Option<&CacheOwner>) -> Value {
        let mut sizes: BTreeMap<usize, Vec<Value>> = BTreeMap::new();
        for told in self.told.values() {
            let block = &told.block;
            for medium in (0..MEDIA.len()).filter(|medium| told.media[*medium]) {
                let events = sizes.entry(block.tokens.len()).or_default();
                let entry =
                    json!({"block_hash": block.hash, "tokens_hash": block.local, "mm_extra_info": null});
                let data = json!({
                    "stored": {"parent_hash": block.parent, "start_position": null, "blocks": [entry]}
                });
                let mut event = json!({
                    "worker_id": worker,
                    "storage_tier": TIERS[medium],
                    "event": {"event_id": events.len(), "data": data, "dp_rank": 0},
                });
                if let Some(owner) = owner {
                    event["residency_domain"] = json!("cache_owner");
                    event["state_source"] = owner.body();
                }
                events.push(event);
            }
        }
        let mut dump = json!({});
        for (size, events) in sizes {
            let group = if dump.get(format!("{model}:default")).is_none() {
                "default".to_owned()
            } else {
                format!("default-{size}")
            };
            dump[format!("{model}:{group}")] = json!({"block_size": size, "events": events});
        }
        dump
    }
}

/// Pieces in which each block follows the one before it.
fn runs(blocks: &[Arc<Block>]) -> impl Iterator<Item = &[Arc<Block>]> {
    let follows = |one: &Arc<Block>, two: &Arc<Block>| {
        two.parent == Some(one.hash) && one.tokens.len() == two.tokens.len()
    };
    blocks.chunk_by(follows).flat_map(|run| run.chunks(BATCH_BLOCKS))
}

fn stored(run: &[Arc<Block>], medium: Medium, seconds: f64) -> Vec<u8> {
    let blocks: Vec<u64> = run.iter().map(|block| block.hash).collect();
    let tokens: Vec<u32> = run.iter().flat_map(|block| block.tokens.iter().copied()).collect();
    let block_size = u32::try_from(run[0].tokens.len()).expect("a block has fewer tokens than 2^32");
    let parent = run[0].parent;
    encode(seconds, &[Move::Stored { parent, blocks: &blocks, tokens: &tokens, block_size, medium }], None)
}

#[cfg(test)]
mod tests {
    use terrace_index::events::{Event, decode};

    use super::*;
    use crate::names::Names;

    fn blocks(count: u32) -> Vec<Arc<Block>> {
        let names = Names::new(1000);
        names.learn_prompt(&(0..count * 16).collect::<Vec<_>>(), 16);
        names.all().0
    }

    fn events(batches: &[Vec<u8>]) -> Vec<(&'static str, Vec<u64>, TierSet)> {
        let events = batches.iter().flat_map(|batch| decode(batch).unwrap().events);
        let shown = events.map(|event| match event {
            Event::Stored(stored) => ("stored", stored.blocks, stored.tiers),
            Event::Removed { blocks, tiers, .. } => ("removed", blocks, tiers),
            Event::Cleared => ("cleared", Vec::new(), TierSet::NONE),
        });
        shown.collect()
    }

    /// A subscriber that adds up all batches must know what is held: blocks that come, move between tiers, go, and
    /// lose their names.
    #[test]
    fn batches_add_up_to_what_is_held() {
        let blocks = blocks(3);
        let hash = |index: usize| blocks[index].hash;
        let held = |tiers: &[TierSet]| -> Vec<(Arc<Block>, TierSet)> {
            blocks.iter().cloned().zip(tiers.iter().copied()).collect()
        };
        let (none, pinned, disk) = (TierSet::NONE, TierSet::PINNED, TierSet::NVME);
        let mut ledger = Ledger::new(Media::Tier);
        let told = events(&ledger.changes(held(&[pinned, pinned, none]), 1.0));
        assert_eq!(told, [("stored", vec![hash(0), hash(1)], pinned)]);
        assert!(ledger.changes(held(&[pinned, pinned, none]), 1.0).is_empty(), "nothing has changed");
        let told = events(&ledger.changes(held(&[pinned, disk, disk]), 1.0));
        let expected = [("stored", vec![hash(1), hash(2)], disk), ("removed", vec![hash(1)], pinned)];
        assert_eq!(told, expected);
        let dump = ledger.dump("m", 7, None);
        assert_eq!(dump["m:default"]["block_size"], 16);
        assert_eq!(dump["m:default"]["events"].as_array().unwrap().len(), 3);
        let told = events(&ledger.changes(held(&[pinned])[..1].to_vec(), 1.0));
        let mut lost = vec![hash(1), hash(2)];
        lost.sort_unstable();
        assert_eq!(told, [("removed", lost, disk)]);
        assert_eq!(events(&ledger.changes(Vec::new(), 1.0)), [("removed", vec![hash(0)], pinned)]);
        let mut external = Ledger::new(Media::External);
        let told = events(&external.changes(held(&[pinned, disk, TierSet::HBM]), 1.0));
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].1.len(), 3, "one medium for all tiers");
    }

    /// A batch of everything would be longer than subscribers take: it is cut, and the pieces name their parents.
    #[test]
    fn long_runs_are_cut() {
        let names = Names::new(10_000);
        names.learn_prompt(&(0..5000 * 16).collect::<Vec<_>>(), 16);
        let held = names.all().0.into_iter().map(|block| (block, TierSet::NVME)).collect();
        let batches = Ledger::new(Media::Tier).changes(held, 1.0);
        let parents: Vec<_> = batches
            .iter()
            .map(|batch| match &decode(batch).unwrap().events[..] {
                [Event::Stored(stored)] => (stored.parent.is_some(), stored.blocks.len()),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(parents, [(false, BATCH_BLOCKS), (true, 5000 - BATCH_BLOCKS)]);
        assert!(batches.iter().all(|batch| batch.len() < 1 << 20));
    }
}

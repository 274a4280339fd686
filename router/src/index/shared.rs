//! Which blocks the daemons hold together, whoever wrote them.
//!
//! Other routers know a block by its tokens or by a hash of them; a daemon knows it by
//! its space and the key that the space's engine gives it. So every space of the
//! tenant is asked for by the name that its engine uses. Where a block is spread over
//! ranks, the first rank speaks for all.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use terrace_client::{admin, wire};
use terrace_core::{TokenCount, chain_keys};
use terrace_index::hashes::{VLLM_SEED, VllmHash, sglang, vllm};
use terrace_index::{Found, Key, TierSet};
use tokio::time::Instant;

use super::{Daemon, Index};
use crate::engines::Prefix;
use crate::names::Block;

/// How old a daemon's list of spaces may be.
const SPACES_AGE_MAX: Duration = Duration::from_secs(2);
/// How long a daemon may take for the list.
const SPACES_TIME_MAX: Duration = Duration::from_secs(1);

/// How the layout of SGLang's pool of K and V begins (`terrace_kv.sglang`).
const SGLANG_KV: &str = "sglang,opaque,";

/// A block as the engines of our spaces name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    /// Our own chain key.
    pub(crate) chain: [u8; 16],
    /// vLLM's `sha256_cbor`.
    pub(crate) vllm: [u8; 32],
    /// SGLang's page hash.
    pub(crate) sglang: [u8; 32],
}

impl Named {
    /// The key that an engine gives to a space; none if we do not know how it names blocks.
    fn key(&self, engine: &str) -> Option<&[u8]> {
        match engine {
            "terrace" => Some(&self.chain),
            "vllm" => Some(&self.vllm),
            "sglang" => Some(&self.sglang),
            _ => None,
        }
    }
}

/// A daemon's spaces, as it said last.
#[derive(Debug, Default)]
pub(super) struct Spaces(Mutex<Option<(Instant, Arc<Vec<wire::SpaceManifest>>)>>);

/// The names of a prompt's whole blocks.
pub(crate) fn names(tokens: &[u32], block_tokens: u32) -> Vec<Named> {
    let chain = chain_keys(tokens, TokenCount::new(block_tokens));
    let vllm = vllm(VllmHash::Sha256, VLLM_SEED, None, tokens, block_tokens as usize);
    let sglang = sglang(None, tokens, block_tokens as usize);
    let named = |((chain, vllm), sglang): ((_, Vec<u8>), _)| {
        let vllm = vllm.try_into().expect("SHA-256 has 32 bytes");
        Named { chain, vllm, sglang }
    };
    chain.into_iter().zip(vllm).zip(sglang).map(named).collect()
}

impl Index {
    /// Which whole blocks of a prompt some daemon holds.
    pub(crate) async fn held_tokens(
        &self,
        tokens: &[u32],
        block_tokens: u32,
        model: Option<&str>,
    ) -> Vec<bool> {
        let tokens = tokens.to_vec();
        let named = tokio::task::spawn_blocking(move || names(&tokens, block_tokens)).await;
        let named: Vec<_> = named.expect("hashing tokens does not panic").into_iter().map(Some).collect();
        let tiers = self.tiers(&named, block_tokens, model).await;
        tiers.into_iter().map(|tiers| !tiers.is_empty()).collect()
    }

    /// Which of these blocks of one prompt some daemon holds, by hashes that other routers have for them.
    pub(crate) async fn held_hashes(&self, hashes: &[u64], model: Option<&str>) -> Vec<bool> {
        let blocks: Vec<_> = hashes.iter().map(|hash| self.names.find(*hash)).collect();
        let Some(block_tokens) = blocks.iter().flatten().map(|block| block.tokens.len()).next() else {
            return vec![false; hashes.len()];
        };
        // Blocks of one prompt are of one size.
        let named = |block: &Option<Arc<Block>>| {
            block.as_ref().filter(|block| block.tokens.len() == block_tokens).map(|block| block.named)
        };
        let named: Vec<_> = blocks.iter().map(named).collect();
        let tiers = self.tiers(&named, u32::try_from(block_tokens).unwrap_or(0), model).await;
        tiers.into_iter().map(|tiers| !tiers.is_empty()).collect()
    }

    /// In which tiers the daemons together hold every block that has a name, in the order in which names came.
    pub(crate) async fn held_names(&self) -> Vec<(Arc<Block>, TierSet)> {
        let (blocks, _) = self.names.all();
        let mut tiers = vec![TierSet::NONE; blocks.len()];
        let mut sizes: Vec<usize> = blocks.iter().map(|block| block.tokens.len()).collect();
        sizes.sort_unstable();
        sizes.dedup();
        for size in sizes {
            let places: Vec<usize> =
                (0..blocks.len()).filter(|place| blocks[*place].tokens.len() == size).collect();
            let named: Vec<_> = places.iter().map(|place| Some(blocks[*place].named)).collect();
            let held = self.tiers(&named, u32::try_from(size).unwrap_or(0), None).await;
            places.into_iter().zip(held).for_each(|(place, held)| tiers[place] = held);
        }
        blocks.into_iter().zip(tiers).collect()
    }

    /// Changes whenever another answer of [`Index::held_names`] is possible.
    pub(crate) fn version(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.names.version().hash(&mut hasher);
        for daemon in &self.daemons {
            let row = daemon.row();
            (row.connected, row.known, row.applied, row.snapshots).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// In which tiers the daemons together hold blocks of a chain; a name that is not known is held by nobody.
    pub(crate) async fn tiers(
        &self,
        named: &[Option<Named>],
        block_tokens: u32,
        model: Option<&str>,
    ) -> Vec<TierSet> {
        let mut tiers = vec![TierSet::NONE; named.len()];
        for daemon in &self.daemons {
            let Some(open) = daemon.current.borrow().clone() else { continue };
            let Some(holder) = daemon.shown.holder() else { continue };
            for manifest in daemon.manifests().await.iter() {
                let is_asked = manifest.tokens_per_block == block_tokens
                    && model.is_none_or(|model| model == manifest.model);
                if !is_asked {
                    continue;
                }
                let Ok(space) = open.space(manifest).await else { continue };
                let id = |named: &Named| {
                    named
                        .key(&manifest.engine)
                        .map(|key| Key::from_bytes(space.space.block_id(key).to_bytes()))
                };
                let ids: Vec<Option<Key>> = named.iter().map(|named| named.as_ref().and_then(id)).collect();
                scan(&self.blocks, holder, &ids, &mut tiers);
            }
        }
        tiers
    }

    /// What each daemon holds of a prompt in each of its spaces.
    pub(crate) async fn daemon_prefixes(&self, tokens: &[u32]) -> Vec<Prefix> {
        let mut prefixes = Vec::new();
        let mut found = Found::new();
        for daemon in &self.daemons {
            let Some(open) = daemon.current.borrow().clone() else { continue };
            let Some(holder) = daemon.shown.holder() else { continue };
            for manifest in daemon.manifests().await.iter() {
                let block_tokens = manifest.tokens_per_block;
                let Ok(space) = open.space(manifest).await else { continue };
                let keys = names(tokens, block_tokens);
                let keys = keys.iter().map_while(|named| named.key(&manifest.engine));
                let ids: Vec<Key> =
                    keys.map(|key| Key::from_bytes(space.space.block_id(key).to_bytes())).collect();
                self.blocks.find(&ids, &mut found);
                let Some(held) = found.held(holder).filter(|held| held.prefix[2] > 0) else { continue };
                let (blocks, fastest) = (held.prefix[2], held.fastest);
                prefixes.push(Prefix { name: daemon.name.clone(), block_tokens, blocks, fastest });
            }
        }
        prefixes
    }
}

/// Adds what one holder has.
fn scan(
    blocks: &terrace_index::Index,
    holder: terrace_index::HolderId,
    ids: &[Option<Key>],
    tiers: &mut [TierSet],
) {
    let (places, known): (Vec<usize>, Vec<Key>) =
        ids.iter().enumerate().filter_map(|(place, id)| id.map(|id| (place, id))).unzip();
    for (place, tier) in places.into_iter().zip(blocks.fastest(holder, &known)) {
        tiers[place] = tier.map_or(tiers[place], |tier| tiers[place].with(TierSet::of(tier)));
    }
}

impl Daemon {
    /// The tenant's spaces whose blocks stand for tokens.
    async fn manifests(&self) -> Arc<Vec<wire::SpaceManifest>> {
        let known = self.spaces.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (asked, old) = known.map_or((None, Arc::default()), |(asked, list)| (Some(asked), list));
        if asked.is_some_and(|asked| asked.elapsed() < SPACES_AGE_MAX) {
            return old;
        }
        let asking = async {
            let mut admin = admin(&self.name).await.ok()?;
            Some(admin.list_spaces(wire::ListSpacesRequest {}).await.ok()?.into_inner().spaces)
        };
        let list = match tokio::time::timeout(SPACES_TIME_MAX, asking).await.ok().flatten() {
            None => old,
            Some(spaces) => {
                let own = spaces.into_iter().filter(|space| space.tenant == self.tenant);
                Arc::new(own.filter_map(|space| space.manifest).filter(speaks).collect())
            }
        };
        let known = Some((Instant::now(), Arc::clone(&list)));
        *self.spaces.0.lock().unwrap_or_else(PoisonError::into_inner) = known;
        list
    }
}

/// Whether a space's blocks stand for tokens, for all ranks and groups.
fn speaks(manifest: &wire::SpaceManifest) -> bool {
    let is_chain = manifest.kind() == wire::SpaceKind::Chain;
    // The other pools of SGLang (states, windows) have pages of the same names, which are of no use alone.
    let is_first = manifest.engine != "sglang" || manifest.layout.starts_with(SGLANG_KV);
    is_chain && is_first && manifest.tokens_per_block > 0 && (manifest.group, manifest.rank) == (0, 0)
}

#[cfg(test)]
mod tests {
    use terrace_index::{HolderId, Index as Blocks, Limits};

    use super::*;

    /// Pages of states, or of one rank of several, would be credited as if a prompt could be loaded by them.
    #[test]
    fn the_first_rank_of_k_and_v_speaks() {
        let kv = wire::SpaceManifest {
            engine: "sglang".to_owned(),
            layout: "sglang,opaque,0".to_owned(),
            kind: wire::SpaceKind::Chain.into(),
            tokens_per_block: 16,
            ..Default::default()
        };
        assert!(speaks(&kv));
        assert!(speaks(&wire::SpaceManifest {
            engine: "vllm".to_owned(),
            layout: "any".to_owned(),
            ..kv.clone()
        }));
        let states = wire::SpaceManifest { layout: "sglang,mamba,0".to_owned(), ..kv.clone() };
        let other_rank = wire::SpaceManifest { rank: 1, ..kv.clone() };
        let other_group = wire::SpaceManifest { group: 1, ..kv.clone() };
        let nameless = wire::SpaceManifest { tokens_per_block: 0, ..kv.clone() };
        let windows = wire::SpaceManifest { kind: wire::SpaceKind::Window.into(), ..kv };
        for silent in [states, other_rank, other_group, nameless, windows] {
            assert!(!speaks(&silent), "{silent:?}");
        }
    }

    /// Holes would hide what is behind them, and another's blocks count as ours: every block of a chain with
    /// holes, unknown names and two holders is compared with what was stored.
    #[test]
    fn every_block_is_seen_behind_any_hole() {
        let blocks = Blocks::new(Limits { holders: 4, bytes: 4 << 20 });
        let key = |number: usize| Key::from_alias(number as u64);
        let (own, other) = (HolderId(0), HolderId(1));
        let mut expected = vec![TierSet::NONE; 300];
        for (number, expected) in expected.iter_mut().enumerate() {
            let parent = (number > 0).then(|| key(number - 1));
            if number % 7 != 3 && number % 50 != 9 {
                let tiers = if number % 2 == 0 { TierSet::PINNED } else { TierSet::NVME };
                blocks.store(own, tiers, parent, &[key(number)]).unwrap();
                *expected = tiers;
            } else if number % 7 == 3 {
                blocks.store(other, TierSet::HBM, parent, &[key(number)]).unwrap();
            }
        }
        let mut ids: Vec<Option<Key>> = (0..300).map(|number| Some(key(number))).collect();
        (ids[20], expected[20]) = (None, TierSet::NONE);
        let mut tiers = vec![TierSet::NONE; 300];
        scan(&blocks, own, &ids, &mut tiers);
        assert_eq!(tiers, expected);
    }
}

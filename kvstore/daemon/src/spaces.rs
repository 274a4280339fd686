//! Spaces that this node knows: manifests, generations, and whose they are.
//!
//! The core knows a space by its id and block length; this table keeps the rest,
//! and is what the catalog's space records are made from.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use prost::Message;

use terrace_core::{ByteCount, SpaceId, SpaceManifest, TenantId};
use terrace_lane::{manifest_from_wire, manifest_to_wire};
use terrace_media::SpaceRecord;
use terrace_proto::v1;

/// One space.
#[derive(Clone, Debug)]
pub struct KnownSpace {
    /// Whose it is.
    pub tenant: TenantId,
    /// Its tenant's name.
    pub tenant_name: String,
    /// What the bytes are.
    pub manifest: SpaceManifest,
    /// Bumped by Clear. Starts at 1.
    pub generation: u64,
}

/// All spaces, by id.
#[derive(Debug)]
pub struct Spaces {
    known: Mutex<BTreeMap<SpaceId, KnownSpace>>,
    limit: usize,
}

/// No room for another space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Whether a space was known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    /// It was; this is its generation.
    Before(u64),
    /// It is new, with this generation.
    Now(u64),
}

impl Spaces {
    /// An empty table of at most `limit` spaces.
    pub fn new(limit: u32) -> Self {
        Self { known: Mutex::default(), limit: limit as usize }
    }

    /// Adds a space that a client opened, unless it is known.
    ///
    /// # Errors
    /// [`Full`].
    pub fn open(
        &self,
        space: SpaceId,
        tenant: TenantId,
        tenant_name: &str,
        manifest: &SpaceManifest,
        generation: u64,
    ) -> Result<Learned, Full> {
        let mut known = self.known();
        if let Some(before) = known.get(&space) {
            return Ok(Learned::Before(before.generation));
        }
        if known.len() >= self.limit {
            return Err(Full);
        }
        let manifest = manifest.clone();
        known.insert(space, KnownSpace { tenant, tenant_name: tenant_name.to_owned(), manifest, generation });
        Ok(Learned::Now(generation))
    }

    /// Adds a space that was found on disk. `None` if its manifest is no manifest
    /// of that space, which leaves its blocks unknown. Beyond the limit a space
    /// that was there before is still taken in.
    pub fn found(&self, record: &SpaceRecord) -> Option<KnownSpace> {
        let wire = v1::SpaceManifest::decode(record.manifest.as_slice()).ok()?;
        let manifest = manifest_from_wire(&wire).ok()?;
        if manifest.space_id(record.tenant) != record.space {
            return None;
        }
        let mut known = self.known();
        let space = known.entry(record.space).or_insert_with(|| KnownSpace {
            tenant: record.tenant,
            tenant_name: record.tenant_name.clone(),
            manifest,
            generation: record.generation,
        });
        space.generation = space.generation.max(record.generation);
        Some(space.clone())
    }

    /// The space was cleared.
    pub fn cleared(&self, space: SpaceId, generation: u64) {
        if let Some(known) = self.known().get_mut(&space) {
            known.generation = known.generation.max(generation);
        }
    }

    /// One space.
    pub fn one(&self, space: SpaceId) -> Option<KnownSpace> {
        self.known().get(&space).cloned()
    }

    /// Its generation now.
    pub fn generation(&self, space: SpaceId) -> Option<u64> {
        self.known().get(&space).map(|known| known.generation)
    }

    /// Every space, by id.
    pub fn all(&self) -> Vec<(SpaceId, KnownSpace)> {
        self.known().iter().map(|(space, known)| (*space, known.clone())).collect()
    }

    /// What the catalog keeps of a space.
    pub fn record(&self, space: SpaceId) -> Option<SpaceRecord> {
        let known = self.one(space)?;
        Some(SpaceRecord {
            space,
            tenant: known.tenant,
            tenant_name: known.tenant_name,
            generation: known.generation,
            manifest: manifest_to_wire(&known.manifest).encode_to_vec(),
        })
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<SpaceId, KnownSpace>> {
        // Every change is one assignment or one insertion, so a panic leaves the table whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KnownSpace {
    /// Header page and payload of one frame.
    pub fn frame_bytes(&self) -> ByteCount {
        frame_bytes(self.manifest.block_bytes)
    }
}

/// Header page and payload of one frame.
pub(crate) fn frame_bytes(block_bytes: ByteCount) -> ByteCount {
    // A validated block length is at most 64 MiB.
    ByteCount::new(terrace_media::PAGE_BYTES + block_bytes.get().next_multiple_of(terrace_media::PAGE_BYTES))
}

#[cfg(test)]
mod tests {
    use terrace_core::{SpaceKind, TokenCount, tenant_id};

    use super::*;

    fn manifest() -> SpaceManifest {
        SpaceManifest {
            model: "m".into(),
            model_fingerprint: vec![1],
            weights_generation: 1,
            dtype: "f16".into(),
            layout: "l".into(),
            tokens_per_block: TokenCount::new(16),
            block_bytes: ByteCount::new(5000),
            kind: SpaceKind::Chain,
            group: 0,
            topology: "canonical".into(),
            rank: 0,
            engine: "terrace".into(),
        }
    }

    /// A damaged record could make a space of one tenant another's, or an old generation could come back.
    #[test]
    fn found_spaces_are_checked() {
        let tenant = tenant_id("a");
        let space = manifest().space_id(tenant);
        let spaces = Spaces::new(1);
        assert_eq!(spaces.open(space, tenant, "a", &manifest(), 1), Ok(Learned::Now(1)));
        let other = SpaceManifest { rank: 1, ..manifest() };
        assert_eq!(spaces.open(other.space_id(tenant), tenant, "a", &other, 1), Err(Full));
        spaces.cleared(space, 5);
        let record = spaces.record(space).unwrap();
        assert_eq!(record.generation, 5);
        let restarted = Spaces::new(1);
        assert_eq!(restarted.found(&record).unwrap().generation, 5);
        assert_eq!(restarted.found(&SpaceRecord { generation: 3, ..record.clone() }).unwrap().generation, 5);
        let stolen = SpaceRecord { tenant: tenant_id("b"), ..record.clone() };
        assert!(restarted.found(&stolen).is_none());
        assert!(restarted.found(&SpaceRecord { manifest: vec![0xff; 9], ..record }).is_none());
        assert_eq!(restarted.one(space).unwrap().frame_bytes(), ByteCount::new(4096 + 8192));
    }
}

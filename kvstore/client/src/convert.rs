//! Between wire messages and the types of this library, each once.

use bytes::Bytes;

use terrace_core::{
    ByteCount, Durability, MatchMode, MissReason, Purpose, SealOutcome, SpaceKind, SpaceManifest, TokenCount,
};
use terrace_proto::{KEY_BYTES_MAX, v1};

use crate::error::ClientError;

/// Why a manifest from the wire was refused.
#[derive(Debug, thiserror::Error)]
pub enum BadWire {
    /// The kind of the space is missing or unknown.
    #[error("manifest field `kind` is {found}; it must be 1 (chain), 2 (window) or 3 (state)")]
    Kind {
        /// The number found.
        found: i32,
    },
    /// A field is out of bounds.
    #[error(transparent)]
    Manifest(#[from] terrace_core::BadManifest),
}

/// A manifest as the wire carries it.
pub fn to_wire(manifest: &SpaceManifest) -> v1::SpaceManifest {
    let kind = match manifest.kind {
        SpaceKind::Chain => v1::SpaceKind::Chain,
        SpaceKind::Window => v1::SpaceKind::Window,
        SpaceKind::State => v1::SpaceKind::State,
    };
    v1::SpaceManifest {
        model: manifest.model.clone(),
        model_fingerprint: Bytes::copy_from_slice(&manifest.model_fingerprint),
        weights_generation: manifest.weights_generation,
        dtype: manifest.dtype.clone(),
        layout: manifest.layout.clone(),
        tokens_per_block: manifest.tokens_per_block.get(),
        block_bytes: manifest.block_bytes.get(),
        kind: kind.into(),
        group: manifest.group,
        topology: manifest.topology.clone(),
        rank: manifest.rank,
        engine: manifest.engine.clone(),
    }
}

/// A validated manifest from the wire.
///
/// # Errors
/// The first field that is out of bounds.
pub fn from_wire(manifest: &v1::SpaceManifest) -> Result<SpaceManifest, BadWire> {
    let kind = match manifest.kind() {
        v1::SpaceKind::Unspecified => return Err(BadWire::Kind { found: manifest.kind }),
        v1::SpaceKind::Chain => SpaceKind::Chain,
        v1::SpaceKind::Window => SpaceKind::Window,
        v1::SpaceKind::State => SpaceKind::State,
    };
    let checked = SpaceManifest {
        model: manifest.model.clone(),
        model_fingerprint: manifest.model_fingerprint.to_vec(),
        weights_generation: manifest.weights_generation,
        dtype: manifest.dtype.clone(),
        layout: manifest.layout.clone(),
        tokens_per_block: TokenCount::new(manifest.tokens_per_block),
        block_bytes: ByteCount::new(manifest.block_bytes),
        kind,
        group: manifest.group,
        topology: manifest.topology.clone(),
        rank: manifest.rank,
        engine: manifest.engine.clone(),
    };
    checked.validate()?;
    Ok(checked)
}

/// Keys as the wire carries them.
pub(crate) fn keys_to_wire<K: AsRef<[u8]>>(keys: &[K], limit: usize) -> Result<Vec<Bytes>, ClientError> {
    if keys.len() > limit {
        return Err(ClientError::TooManyBlocks { found: keys.len(), limit });
    }
    // All in one piece of memory, of which each is a part.
    let mut all = Vec::with_capacity(keys.iter().map(|key| key.as_ref().len()).sum());
    for (index, key) in keys.iter().map(AsRef::as_ref).enumerate() {
        let found = key.len();
        if found == 0 || found > KEY_BYTES_MAX {
            return Err(ClientError::BadKey { index, found, limit: KEY_BYTES_MAX });
        }
        all.extend_from_slice(key);
    }
    let mut all = Bytes::from(all);
    Ok(keys.iter().map(|key| all.split_to(key.as_ref().len())).collect())
}

/// A parent key: empty where there is none.
pub(crate) fn parent_to_wire(parent: Option<&[u8]>) -> Result<Bytes, ClientError> {
    match parent {
        None => Ok(Bytes::new()),
        Some(key) => Ok(keys_to_wire(&[key], 1)?.swap_remove(0)),
    }
}

pub(crate) fn mode_to_wire(mode: MatchMode) -> i32 {
    match mode {
        MatchMode::Prefix => v1::MatchMode::Prefix.into(),
        MatchMode::Set => v1::MatchMode::Set.into(),
    }
}

pub(crate) fn purpose_to_wire(purpose: Purpose) -> v1::LeasePurpose {
    match purpose {
        Purpose::Prefill => v1::LeasePurpose::Prefill,
        Purpose::Decode => v1::LeasePurpose::Decode,
    }
}

pub(crate) fn durability_to_wire(durability: Durability) -> i32 {
    match durability {
        Durability::Readable => v1::Durability::Unspecified.into(),
        Durability::Durable => v1::Durability::Durable.into(),
    }
}

pub(crate) fn reason_from_wire(reason: v1::MissReason) -> MissReason {
    match reason {
        v1::MissReason::Unspecified | v1::MissReason::Unknown => MissReason::Unknown,
        v1::MissReason::Filling => MissReason::Filling,
        v1::MissReason::Checksum => MissReason::Checksum,
        v1::MissReason::Device => MissReason::Device,
        v1::MissReason::CheaperToRecompute => MissReason::CheaperToRecompute,
    }
}

pub(crate) fn seals_from_wire(
    outcomes: impl Iterator<Item = v1::SealOutcome>,
) -> Result<Vec<SealOutcome>, ClientError> {
    let known = outcomes.map(|outcome| match outcome {
        v1::SealOutcome::Unspecified => Err(ClientError::Protocol { detail: "a seal without an outcome" }),
        v1::SealOutcome::Sealed => Ok(SealOutcome::Sealed),
        v1::SealOutcome::Already => Ok(SealOutcome::Already),
        v1::SealOutcome::Conflict => Ok(SealOutcome::Conflict),
        v1::SealOutcome::Lost => Ok(SealOutcome::Lost),
        v1::SealOutcome::NotDurable => Ok(SealOutcome::NotDurable),
    });
    known.collect()
}

/// 16 bytes of a wire field.
pub(crate) fn id_from_wire(bytes: &[u8], detail: &'static str) -> Result<[u8; 16], ClientError> {
    bytes.try_into().map_err(|_| ClientError::Protocol { detail })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn manifest() -> SpaceManifest {
        SpaceManifest {
            model: "model".to_owned(),
            model_fingerprint: vec![1, 2, 3],
            weights_generation: 4,
            dtype: "f16".to_owned(),
            layout: "layer,kv".to_owned(),
            tokens_per_block: TokenCount::new(16),
            block_bytes: ByteCount::new(4096),
            kind: SpaceKind::State,
            group: 5,
            topology: "tp4".to_owned(),
            rank: 3,
            engine: "terrace".to_owned(),
        }
    }

    // A field that is lost on the wire would make two spaces one: convert a
    // manifest whose fields all differ from their defaults there and back.
    #[test]
    fn a_manifest_survives_the_wire() {
        assert_eq!(from_wire(&to_wire(&manifest())).unwrap(), manifest());
    }

    // A manifest of a foreign client may say nothing or nonsense.
    #[test]
    fn bad_manifests_are_refused() {
        let mut wire = to_wire(&manifest());
        wire.kind = 0;
        assert!(matches!(from_wire(&wire), Err(BadWire::Kind { found: 0 })));
        wire.kind = 1;
        wire.block_bytes = u64::MAX;
        assert!(matches!(from_wire(&wire), Err(BadWire::Manifest(_))));
    }

    // Keys at the edges of what is allowed, and too many of them.
    #[test]
    fn keys_are_checked_before_they_are_sent() {
        let found = keys_to_wire(&[vec![1u8; 1], vec![2; 64]], 2).unwrap();
        assert_eq!(found.iter().map(Bytes::len).collect::<Vec<_>>(), [1, 64]);
        assert!(matches!(keys_to_wire(&[b""], 2), Err(ClientError::BadKey { found: 0, .. })));
        assert!(matches!(keys_to_wire(&[[0u8; 65]], 2), Err(ClientError::BadKey { found: 65, .. })));
        assert!(matches!(
            keys_to_wire(&[b"k"; 3], 2),
            Err(ClientError::TooManyBlocks { found: 3, limit: 2 })
        ));
        assert!(parent_to_wire(None).unwrap().is_empty());
        assert!(parent_to_wire(Some(b"")).is_err(), "an empty parent would mean none");
    }
}

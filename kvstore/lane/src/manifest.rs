//! Space manifests on the wire: converted once, for both ends, since a field that is lost on the way makes two spaces one.

use bytes::Bytes;

use terrace_core::{ByteCount, SpaceKind, SpaceManifest, TokenCount};
use terrace_proto::v1;

/// Why a manifest from the wire was refused.
#[derive(Debug, thiserror::Error)]
pub enum BadManifestWire {
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
pub fn manifest_to_wire(manifest: &SpaceManifest) -> v1::SpaceManifest {
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
pub fn manifest_from_wire(manifest: &v1::SpaceManifest) -> Result<SpaceManifest, BadManifestWire> {
    let kind = match manifest.kind() {
        v1::SpaceKind::Unspecified => return Err(BadManifestWire::Kind { found: manifest.kind }),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> SpaceManifest {
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
        assert_eq!(manifest_from_wire(&manifest_to_wire(&manifest())).unwrap(), manifest());
    }

    // A manifest of a foreign client may say nothing or nonsense.
    #[test]
    fn bad_manifests_are_refused() {
        let mut wire = manifest_to_wire(&manifest());
        wire.kind = 0;
        assert!(matches!(manifest_from_wire(&wire), Err(BadManifestWire::Kind { found: 0 })));
        wire.kind = 1;
        wire.block_bytes = u64::MAX;
        assert!(matches!(manifest_from_wire(&wire), Err(BadManifestWire::Manifest(_))));
    }
}

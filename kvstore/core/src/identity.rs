//! What makes two blocks the same: manifests, tenant keys, and block ids.
//!
//! Promises: two manifests that differ in any field have different space ids;
//! the encoding that is hashed is canonical (fixed width, length-prefixed), so
//! that ids are equal on every machine and in every release of this format.

use crate::ids::{BlockId, SpaceId, TenantId};
use crate::units::{ByteCount, TokenCount};

/// Longest text field of a manifest, in bytes.
pub const MANIFEST_TEXT_BYTES_MAX: usize = 256;
/// Longest engine key, in bytes.
pub const KEY_BYTES_MAX: usize = 64;
/// Largest block payload: 64 MiB, one default chunk.
pub const BLOCK_BYTES_MAX: u64 = 64 << 20;

/// What the bytes of a block stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SpaceKind {
    /// KV of a fixed number of tokens, valid after all blocks before it.
    Chain,
    /// KV of a sliding-window layer group.
    Window,
    /// A recurrent state at a position.
    State,
}

/// Everything that makes KV bytes interchangeable, but for the tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceManifest {
    /// Model name.
    pub model: String,
    /// Revision fingerprint of the model.
    pub model_fingerprint: Vec<u8>,
    /// Bumped when weights change under the same name.
    pub weights_generation: u64,
    /// Element type of K and V.
    pub dtype: String,
    /// Name of the byte layout inside a block.
    pub layout: String,
    /// Tokens in one block.
    pub tokens_per_block: TokenCount,
    /// Payload of one block.
    pub block_bytes: ByteCount,
    /// What the bytes stand for.
    pub kind: SpaceKind,
    /// Layer group of a hybrid model.
    pub group: u32,
    /// Parallel topology, or "canonical".
    pub topology: String,
    /// Rank within the topology.
    pub rank: u32,
    /// Engine family that wrote the bytes.
    pub engine: String,
}

/// Why a manifest was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadManifest {
    /// A text or fingerprint is longer than its limit.
    #[error("manifest field `{field}` has {found} bytes; the limit is {limit}")]
    TooLong {
        /// The field.
        field: &'static str,
        /// Its length.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// A field that must say something is empty.
    #[error("manifest field `{field}` is empty; two models must not share a space by accident")]
    Empty {
        /// The field.
        field: &'static str,
    },
    /// A block of no bytes, or of more than a chunk.
    #[error("block_bytes is {found}; it must be 1 to {BLOCK_BYTES_MAX}")]
    BlockBytes {
        /// The value.
        found: u64,
    },
    /// A block of no tokens.
    #[error("tokens_per_block is 0; a block holds at least one token")]
    NoTokens,
}

impl SpaceManifest {
    /// Refuses manifests that say too little or too much.
    ///
    /// # Errors
    /// The first field that is out of bounds.
    pub fn validate(&self) -> Result<(), BadManifest> {
        let texts = [
            ("model", self.model.as_bytes()),
            ("dtype", self.dtype.as_bytes()),
            ("layout", self.layout.as_bytes()),
            ("topology", self.topology.as_bytes()),
            ("engine", self.engine.as_bytes()),
        ];
        for (field, text) in texts {
            if text.is_empty() {
                return Err(BadManifest::Empty { field });
            }
            if text.len() > MANIFEST_TEXT_BYTES_MAX {
                return Err(BadManifest::TooLong {
                    field,
                    found: text.len(),
                    limit: MANIFEST_TEXT_BYTES_MAX,
                });
            }
        }
        if self.model_fingerprint.len() > KEY_BYTES_MAX {
            let found = self.model_fingerprint.len();
            return Err(BadManifest::TooLong { field: "model_fingerprint", found, limit: KEY_BYTES_MAX });
        }
        if self.tokens_per_block.get() == 0 {
            return Err(BadManifest::NoTokens);
        }
        let found = self.block_bytes.get();
        if found == 0 || found > BLOCK_BYTES_MAX {
            return Err(BadManifest::BlockBytes { found });
        }
        Ok(())
    }

    /// Identity of this space for `tenant`.
    pub fn space_id(&self, tenant: TenantId) -> SpaceId {
        let mut hasher = blake3::Hasher::new_derive_key("terrace 2026 space id v1");
        hasher.update(&tenant.to_bytes());
        for text in [
            self.model.as_bytes(),
            &self.model_fingerprint,
            self.dtype.as_bytes(),
            self.layout.as_bytes(),
            self.topology.as_bytes(),
            self.engine.as_bytes(),
        ] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text);
        }
        let kind = match self.kind {
            SpaceKind::Chain => 1u32,
            SpaceKind::Window => 2,
            SpaceKind::State => 3,
        };
        hasher.update(&self.weights_generation.to_le_bytes());
        hasher.update(&self.block_bytes.get().to_le_bytes());
        for number in [self.tokens_per_block.get(), kind, self.group, self.rank] {
            hasher.update(&number.to_le_bytes());
        }
        SpaceId::from_bytes(first_16(hasher.finalize()))
    }
}

/// Identity of a tenant, from its name.
pub fn tenant_id(name: &str) -> TenantId {
    TenantId::from_bytes(first_16(
        blake3::Hasher::new_derive_key("terrace 2026 tenant id v1").update(name.as_bytes()).finalize(),
    ))
}

/// A tenant's secret. It makes block ids unguessable across tenants.
#[derive(Clone, PartialEq, Eq)]
pub struct TenantKey([u8; 32]);

impl std::fmt::Debug for TenantKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TenantKey(secret)")
    }
}

impl TenantKey {
    /// Wraps the secret.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The secret, for the client library of that tenant only.
    pub const fn to_bytes(&self) -> [u8; 32] {
        self.0
    }

    /// A tenant's key, from the node's own secret.
    pub fn derive(node_secret: &[u8; 32], tenant: TenantId) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(node_secret);
        hasher.update(b"terrace tenant key v1").update(&tenant.to_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// Identity of the block that an engine calls `key` in `space`. The key is
    /// either one of [`chain_keys`] or whatever the engine uses, up to
    /// [`KEY_BYTES_MAX`] bytes.
    pub fn block_id(&self, space: SpaceId, key: &[u8]) -> BlockId {
        let space = space.to_bytes();
        let mut name = [0; 16 + KEY_BYTES_MAX];
        let length = space.len() + key.len();
        let hash = match name.get_mut(..length) {
            // In one call: a hasher that could take more costs up to a quarter more.
            Some(name) => {
                name[..space.len()].copy_from_slice(&space);
                name[space.len()..].copy_from_slice(key);
                blake3::keyed_hash(&self.0, name)
            }
            None => blake3::Hasher::new_keyed(&self.0).update(&space).update(key).finalize(),
        };
        BlockId::from_bytes(first_16(hash))
    }
}

/// Our own prefix chain: one 16-byte key for each whole block of `tokens`. A
/// key stands for the block's tokens and every token before them. The unfilled
/// tail has no key.
///
/// # Panics
/// If `per_block` is zero.
pub fn chain_keys(tokens: &[u32], per_block: TokenCount) -> Vec<[u8; 16]> {
    assert!(per_block.get() > 0, "a block holds at least one token");
    let mut parent = [0u8; 16];
    let mut keys = Vec::with_capacity(tokens.len() / per_block.get() as usize);
    for block in tokens.chunks_exact(per_block.get() as usize) {
        parent = chain_key(&parent, block);
        keys.push(parent);
    }
    keys
}

/// The key after `parent` (all zeros before the first block).
pub fn chain_key(parent: &[u8; 16], tokens: &[u32]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_derive_key("terrace 2026 prefix chain v1");
    hasher.update(parent);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    first_16(hasher.finalize())
}

fn first_16(hash: blake3::Hash) -> [u8; 16] {
    let mut bytes = [0u8; 16];
    bytes.copy_from_slice(&hash.as_bytes()[..16]);
    bytes
}

//! A space as one session knows it.

use std::sync::Arc;

use terrace_core::{BlockId, ByteCount, SpaceId, SpaceManifest, TenantId, TenantKey};
use terrace_proto::v1::OpenSpaceResponse;

use crate::convert::id_from_wire;
use crate::error::ClientError;

/// A space that this session opened. It goes stale when the session ends, and, for
/// reads and writes over gRPC, when anybody clears the space: open it again.
#[derive(Clone, Debug)]
pub struct Space {
    pub(crate) session: u64,
    pub(crate) handle: u32,
    manifest: Arc<SpaceManifest>,
    id: SpaceId,
    tenant: TenantId,
    key: TenantKey,
    frame_bytes: ByteCount,
    block_bytes: ByteCount,
    generation: u64,
}

impl Space {
    pub(crate) fn new(
        session: u64,
        manifest: &SpaceManifest,
        answer: &OpenSpaceResponse,
    ) -> Result<Self, ClientError> {
        let key: [u8; 32] = answer
            .tenant_key
            .as_ref()
            .try_into()
            .map_err(|_| ClientError::Protocol { detail: "a tenant key that is not 32 bytes long" })?;
        let tenant =
            TenantId::from_bytes(id_from_wire(&answer.tenant_id, "a tenant id that is not 16 bytes")?);
        let id = SpaceId::from_bytes(id_from_wire(&answer.space_id, "a space id that is not 16 bytes")?);
        if id != manifest.space_id(tenant) {
            return Err(ClientError::Protocol { detail: "a space id that is not the manifest's" });
        }
        Ok(Self {
            session,
            handle: answer.space,
            manifest: Arc::new(manifest.clone()),
            id,
            tenant,
            key: TenantKey::from_bytes(key),
            frame_bytes: ByteCount::new(answer.frame_bytes),
            block_bytes: manifest.block_bytes,
            generation: answer.generation,
        })
    }

    /// Number of the space in this session.
    pub fn handle(&self) -> u32 {
        self.handle
    }

    pub(crate) fn manifest(&self) -> &SpaceManifest {
        &self.manifest
    }

    /// Identity of the space.
    pub fn id(&self) -> SpaceId {
        self.id
    }

    /// The tenant whose space it is.
    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// The tenant's key. Keep it from other tenants.
    pub fn tenant_key(&self) -> &TenantKey {
        &self.key
    }

    /// Bytes from one frame to the next in a chunk.
    pub fn frame_bytes(&self) -> ByteCount {
        self.frame_bytes
    }

    /// Payload of one block in bytes.
    pub fn block_bytes(&self) -> ByteCount {
        self.block_bytes
    }

    /// Generation when it was opened. Leases say what it is now.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Identity of the block that is called `key` here.
    pub fn block_id(&self, key: &[u8]) -> BlockId {
        self.key.block_id(self.id, key)
    }
}

//! Chunks that were dropped, for sessions that learn of it only when they want to map one.

use std::collections::VecDeque;

use crate::ids::{ChunkId, Memory, SessionId, TenantId};
use crate::state::chunk::Chunk;

/// Chunks that are remembered; past that the first to go is forgotten. What was granted is mapped within moments, and
/// so many chunks take seconds to come and go.
const GONE_MAX: usize = 1024;

/// Whose a chunk is. Nobody else maps it, nor learns that there is or was one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    tenant: TenantId,
    sealer: Option<SessionId>,
    private: bool,
    memory: Memory,
}

impl Owner {
    pub(crate) fn of(chunk: &Chunk) -> Self {
        Self { tenant: chunk.tenant, sealer: chunk.sealer, private: chunk.private, memory: chunk.memory }
    }

    /// Whether it is a chunk for this session, of this tenant.
    pub(crate) fn admits(&self, session: SessionId, tenant: TenantId, isolated: bool) -> bool {
        let theirs = self.private && self.sealer != Some(session);
        self.tenant == tenant && !theirs && (self.memory == Memory::Pinned || !isolated)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Gone(VecDeque<(ChunkId, Owner)>);

impl Gone {
    pub(crate) fn keep(&mut self, id: ChunkId, owner: Owner) {
        if self.0.len() >= GONE_MAX {
            self.0.pop_front();
        }
        self.0.push_back((id, owner));
    }

    /// Whose it was. Looks through all of them, for whoever is refused otherwise.
    pub(crate) fn find(&self, id: ChunkId) -> Option<Owner> {
        self.0.iter().rev().find(|(gone, _)| *gone == id).map(|(_, owner)| *owner)
    }

    pub(crate) fn check(&self) {
        assert!(self.0.len() <= GONE_MAX, "chunks that went are limited");
    }
}

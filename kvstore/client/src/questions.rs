//! What a session asks of blocks that it does not lease: which are there, and what is to become of them.

use std::time::Duration;

use terrace_core::MatchMode;
use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::lane_response::Result as Answer;
use terrace_proto::v1::{self, Tier};

use crate::again;
use crate::convert::{keys_to_wire, mode_to_wire};
use crate::error::ClientError;
use crate::keyed::{Keys, Named};
use crate::lease::millis;
use crate::session::{Backend, Session, call};
use crate::space::Space;

/// Which blocks are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// Keys present from the first one on without a gap.
    pub prefix: usize,
    /// One entry a key looked at; in prefix mode only the prefix.
    pub blocks: Vec<BlockMatch>,
}

/// One position of a [`Match`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMatch {
    /// Whether every space of the bundle holds it.
    pub present: bool,
    /// Fastest tier that holds all of it.
    pub tier: Tier,
    /// Node that holds it; empty means the daemon's own.
    pub holder: String,
    /// Estimated time until it could be read from memory.
    pub fetch: Duration,
}

/// What a prefetch did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefetched {
    /// Blocks being brought in.
    pub started: u32,
    /// Blocks that were there already.
    pub resident: u32,
}

impl Session {
    /// Which keys every space of the bundle holds: the length of the prefix, and
    /// one flag a key (in prefix mode, false after the first absent one).
    ///
    /// # Errors
    /// Bad keys, or the session has ended.
    pub async fn exists(
        &self,
        spaces: &[&Space],
        keys: &[impl AsRef<[u8]>],
        mode: MatchMode,
    ) -> Result<(usize, Vec<bool>), ClientError> {
        let request = v1::ExistsRequest {
            spaces: self.bundle(spaces)?,
            mode: mode_to_wire(mode),
            ..Default::default()
        };
        let limit = self.inner.blocks_max;
        let answer = match &self.inner.backend {
            Backend::Lane(lane) => {
                let named = match spaces {
                    [space] if self.inner.takes_block_ids => Named::blocks(space, keys, limit)?,
                    _ => Named::Keys(Keys::of(keys, limit)?),
                };
                lane.link.call_keyed(Op::Exists(request), named, &lane.keeper).await?.answer
            }
            Backend::Grpc(link) => {
                let keys = Keys::of(keys, limit)?.to_wire();
                link.call(Op::Exists(v1::ExistsRequest { keys, ..request })).await?
            }
        };
        let Answer::Exists(answer) = answer else {
            return Err(ClientError::Protocol { detail: "an answer to another question" });
        };
        let bit = |at: usize| answer.present.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1);
        let prefix = usize::try_from(answer.prefix_blocks).unwrap_or(usize::MAX).min(keys.len());
        Ok((prefix, (0..keys.len()).map(bit).collect()))
    }

    /// Which keys every space of the bundle holds, where, and how soon they could be read.
    ///
    /// # Errors
    /// Bad keys, or the session has ended.
    pub async fn match_blocks(
        &self,
        spaces: &[&Space],
        keys: &[impl AsRef<[u8]>],
        mode: MatchMode,
    ) -> Result<Match, ClientError> {
        let request = v1::MatchRequest {
            spaces: self.bundle(spaces)?,
            keys: keys_to_wire(keys, self.inner.blocks_max)?,
            mode: mode_to_wire(mode),
            ..Default::default()
        };
        let answer = call!(self, Match, request);
        let blocks = answer.blocks.into_iter().map(|block| BlockMatch {
            present: block.present,
            tier: block.tier(),
            fetch: Duration::from_micros(block.fetch_us),
            holder: block.holder,
        });
        let prefix = usize::try_from(answer.prefix_blocks).unwrap_or(usize::MAX).min(keys.len());
        Ok(Match { prefix, blocks: blocks.collect() })
    }

    /// Marks blocks as used; answers how many were present.
    ///
    /// # Errors
    /// Bad keys, or the session has ended.
    pub async fn touch(&self, space: &Space, keys: &[impl AsRef<[u8]>]) -> Result<u32, ClientError> {
        let keys = self.keys(space, keys)?;
        let request = v1::TouchRequest { space: space.handle, keys, reads: Vec::new() };
        Ok(call!(self, Touch, request).touched)
    }

    /// Starts bringing blocks into memory and does not wait for them.
    ///
    /// # Errors
    /// Bad keys, or the session has ended.
    pub async fn prefetch(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
    ) -> Result<Prefetched, ClientError> {
        let keys = self.keys(space, keys)?;
        let request = v1::PrefetchRequest { space: space.handle, keys, ..Default::default() };
        let answer = call!(self, Prefetch, request);
        Ok(Prefetched { started: answer.started, resident: answer.resident })
    }

    /// Asks for blocks to be kept for a while; answers for how many there was
    /// quota. `priority` is 0 (evict as usual) to 100 (evict last).
    ///
    /// # Errors
    /// Bad keys, or the session has ended.
    pub async fn retain(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        ttl: Duration,
        priority: u8,
    ) -> Result<u32, ClientError> {
        let request = v1::RetainRequest {
            request_id: self.request_id(),
            space: space.handle,
            keys: self.keys(space, keys)?,
            ttl_ms: millis(ttl),
            priority: u32::from(priority),
        };
        Ok(call!(self, Retain, request).retained)
    }

    /// Drops every block of a space, durably; answers how many there were. Open
    /// the space again before writing to it. When the connection breaks, the
    /// answer is asked for again over another, and the space is cleared once.
    ///
    /// # Errors
    /// The daemon refused, or it is away: the space may or may not be empty.
    pub async fn clear(&self, space: &Space) -> Result<u64, ClientError> {
        if !self.owns(space) {
            return Err(ClientError::ForeignSpace);
        }
        let request = v1::ClearRequest { request_id: self.request_id(), space: space.handle };
        match &self.inner.backend {
            Backend::Lane(lane) => again::clear(lane, space, request).await,
            Backend::Grpc(_) => Ok(call!(self, Clear, request).blocks),
        }
    }

    fn bundle(&self, spaces: &[&Space]) -> Result<Vec<u32>, ClientError> {
        if spaces.is_empty() {
            return Err(ClientError::EmptyBundle);
        }
        if spaces.iter().any(|space| !self.owns(space)) {
            return Err(ClientError::ForeignSpace);
        }
        Ok(spaces.iter().map(|space| space.handle).collect())
    }
}

//! Reading blocks where they lie.

use std::sync::Arc;
use std::sync::atomic::{self, Ordering};
use std::time::Duration;

use terrace_core::{BlockId, ByteCount, Checksum, Fence, Purpose};
use terrace_lane::SharedBytes;

use crate::error::ClientError;
use crate::lease::{Frame, Lease, Outcome, in_host_memory};
use crate::places::Place;

/// How to lease for reading.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReadOptions {
    /// Time to live; `None` is the daemon's default. Leases renew themselves
    /// while their guards live, so this only says how soon the daemon takes
    /// blocks back from a process that hangs.
    pub ttl: Option<Duration>,
    /// How long the answer may wait for blocks to come from a slower tier.
    pub wait: Duration,
    /// Who waits: a decode's blocks are read before a prefill's.
    pub purpose: Purpose,
}

/// The bytes were not, or are no longer, those that were granted: whatever was
/// derived from them is to be thrown away. Lease again, or count it as a miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the block is no longer there: its lease, its frame or the session ended")]
pub struct Stale;

/// Blocks pinned for reading. Dropping it, and every block taken out of it, releases them.
#[derive(Debug)]
pub struct ReadLease {
    /// One entry a key, in order.
    pub grants: Vec<Outcome<ReadBlock>>,
    pub(crate) lease: Option<Arc<Lease>>,
}

impl ReadLease {
    /// The daemon's number of the lease; `None` when nothing was granted.
    pub fn id(&self) -> Option<u64> {
        self.lease.as_ref().map(|lease| lease.id())
    }

    /// Blocks granted from the first key on without a gap.
    pub fn prefix(&self) -> usize {
        self.grants.iter().take_while(|grant| grant.granted().is_some()).count()
    }

    /// Whether every granted block is still the granted one; see [`ReadBlock::is_valid`].
    pub fn is_valid(&self) -> bool {
        self.grants.iter().filter_map(Outcome::granted).all(ReadBlock::is_valid)
    }

    /// Ends the lease now and waits until the daemon knows. Blocks that were
    /// taken out of it are stale from then on. When cancelled, the lease has
    /// ended here and is released in the background.
    ///
    /// # Errors
    /// The session has ended; so has the lease.
    pub async fn release(self) -> Result<(), ClientError> {
        match &self.lease {
            Some(lease) => lease.release().await,
            None => Ok(()),
        }
    }
}

/// A sealed block in shared memory.
#[derive(Clone, Debug)]
pub struct ReadBlock {
    source: Source,
}

/// Where what is known of a block is.
#[derive(Clone, Debug)]
enum Source {
    /// In a lease of many, at this position.
    Leased(Arc<Lease>, u32),
    Own(Arc<Own>),
}

/// A block by itself.
#[derive(Debug)]
struct Own {
    bytes: SharedBytes,
    chunk: u64,
    frame: u32,
    fence: Fence,
    checksum: Checksum,
    block: BlockId,
    generation: u64,
    lease: Arc<Lease>,
}

/// Why a block was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadBlock {
    /// See [`Stale`].
    #[error(transparent)]
    Stale(#[from] Stale),
    /// The bytes are not those that were sealed.
    #[error("the block's checksum is {found:#x} where {expected:#x} was sealed")]
    Checksum {
        /// Sealed checksum.
        expected: u64,
        /// Checksum of the bytes.
        found: u64,
    },
}

impl ReadBlock {
    pub(crate) fn new(frame: Frame, lease: Arc<Lease>) -> Result<Self, ClientError> {
        let bytes = in_host_memory(frame.mapping)?
            .into_view(frame.offset, frame.length)
            .ok_or(ClientError::Protocol { detail: "a frame outside its chunk" })?;
        let source = Source::Own(Arc::new(Own {
            bytes,
            chunk: frame.chunk,
            frame: frame.frame,
            fence: frame.fence,
            checksum: frame.checksum,
            block: frame.block,
            generation: frame.generation,
            lease,
        }));
        Ok(Self { source })
    }

    /// The block at a position of a lease, where it was granted.
    pub(crate) fn leased(at: u32, lease: Arc<Lease>) -> Self {
        Self { source: Source::Leased(lease, at) }
    }

    fn lease(&self) -> &Lease {
        match &self.source {
            Source::Leased(lease, _) => lease,
            Source::Own(own) => &own.lease,
        }
    }

    /// The frame, and its fence when it was granted.
    fn frame(&self) -> (u32, Fence) {
        match &self.source {
            Source::Leased(lease, at) => {
                let (grant, _) = lease.seen().grant(*at);
                (grant.frame, Fence::new(grant.fence))
            }
            Source::Own(own) => (own.frame, own.fence),
        }
    }

    /// Where it lies.
    pub(crate) fn place(&self) -> Place {
        let (frame, fence) = self.frame();
        let chunk = match &self.source {
            Source::Leased(lease, at) => lease.seen().grant(*at).0.chunk,
            Source::Own(own) => own.chunk,
        };
        Place {
            bytes: self.bytes().downgrade(),
            chunk,
            frame,
            fence,
            checksum: self.checksum(),
            generation: self.generation(),
        }
    }

    /// Identity of the block.
    pub fn id(&self) -> BlockId {
        match &self.source {
            Source::Leased(lease, at) => lease.seen().block(*at),
            Source::Own(own) => own.block,
        }
    }

    /// Checksum that was sealed.
    pub fn checksum(&self) -> Checksum {
        match &self.source {
            Source::Leased(lease, at) => Checksum::new(lease.seen().grant(*at).0.checksum),
            Source::Own(own) => own.checksum,
        }
    }

    /// Generation of the space when it was leased: what its checksum is seeded with.
    pub fn generation(&self) -> u64 {
        match &self.source {
            Source::Leased(lease, at) => lease.seen().grant(*at).1,
            Source::Own(own) => own.generation,
        }
    }

    /// Payload length.
    pub fn length(&self) -> ByteCount {
        ByteCount::new(self.bytes().len() as u64)
    }

    /// The bytes in place. Use them, then ask [`ReadBlock::is_valid`] before
    /// anything derived from them leaves.
    pub fn bytes(&self) -> &SharedBytes {
        match &self.source {
            Source::Leased(lease, at) => lease.seen().bytes(*at),
            Source::Own(own) => &own.bytes,
        }
    }

    /// Whether all bytes read until now were those of the granted block. Ask
    /// after reading; one load of shared memory.
    pub fn is_valid(&self) -> bool {
        // What was read before must not be read after the fence.
        atomic::fence(Ordering::Acquire);
        let (frame, granted) = self.frame();
        let fence = self.bytes().mapping().and_then(|mapping| mapping.fence(frame));
        fence == Some(granted) && self.lease().is_usable()
    }

    /// Copies the block out.
    ///
    /// # Errors
    /// The copy is not the block; `target` holds anything.
    ///
    /// # Panics
    /// If `target` is not one block long.
    pub fn read_into(&self, target: &mut [u8]) -> Result<(), Stale> {
        self.bytes().copy_to(target);
        if self.is_valid() { Ok(()) } else { Err(Stale) }
    }

    /// Copies the block out and compares the copy with the sealed checksum.
    ///
    /// # Errors
    /// The copy is not the block; `target` holds anything.
    ///
    /// # Panics
    /// If `target` is not one block long.
    pub fn read_verified(&self, target: &mut [u8]) -> Result<(), BadBlock> {
        let found = self.bytes().copy_and_checksum(target, self.id(), self.generation());
        self.judge(found)
    }

    /// Compares the bytes in place with the sealed checksum.
    ///
    /// # Errors
    /// They are not the block's.
    pub fn verify(&self) -> Result<(), BadBlock> {
        let found = self.bytes().checksum(self.id(), self.generation());
        self.judge(found)
    }

    pub(crate) fn judge(&self, found: Checksum) -> Result<(), BadBlock> {
        if !self.is_valid() {
            return Err(Stale.into());
        }
        let expected = self.checksum();
        if found != expected {
            return Err(BadBlock::Checksum { expected: expected.get(), found: found.get() });
        }
        Ok(())
    }
}

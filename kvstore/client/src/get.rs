//! Blocks by value, into memory of the caller's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::{BlockId, Checksum, MissReason, Purpose};
use terrace_lane::{SharedBytes, block_ids, drain};

use crate::error::ClientError;
use crate::lease::Outcome;
use crate::read::{BadBlock, ReadBlock, ReadOptions, Stale};
use crate::session::{Backend, LaneSession, Session};
use crate::space::Space;
use crate::transfer::{batch_blocks, stream_blocks};

/// Memory that one block is copied into by [`Session::get`].
pub trait BlockTarget {
    /// Length in bytes: that of the space's blocks.
    fn length(&self) -> usize;

    /// Copies all of `source`, which is as long, and answers the checksum of what was copied, as
    /// [`SharedBytes::copy_and_checksum`] does: each shared byte is loaded once. The copy may turn out not to be the block,
    /// and need not be whole for other threads before [`Session::get`] has ended.
    fn copy(&mut self, source: &SharedBytes, block: BlockId, generation: u64) -> Checksum;

    /// Copies all of `source`, which is as long, as [`SharedBytes::copy_to`] does.
    fn copy_unsummed(&mut self, source: &SharedBytes);

    /// Stores a piece of a block that comes over gRPC, from `offset` on; it ends within the length. Pieces come in order,
    /// and may begin anew.
    fn store(&mut self, offset: usize, piece: &[u8]);
}

impl BlockTarget for &mut [u8] {
    fn length(&self) -> usize {
        self.len()
    }

    fn copy(&mut self, source: &SharedBytes, block: BlockId, generation: u64) -> Checksum {
        source.copy_and_checksum(self, block, generation)
    }

    fn copy_unsummed(&mut self, source: &SharedBytes) {
        source.copy_to(self);
    }

    fn store(&mut self, offset: usize, piece: &[u8]) {
        self[offset..offset + piece.len()].copy_from_slice(piece);
    }
}

/// How what [`Session::get`] copied is judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// The copy is compared with the checksum that was sealed, and then the fence is checked.
    #[default]
    Checksum,
    /// The fence is checked: nobody but the writer and the daemon is known to have touched the bytes. Over gRPC the
    /// checksum is compared all the same.
    Fence,
}

/// What is got or put at once from this many bytes on is copied past the cache: it does not fit there beside what else the
/// processor works at.
const PAST_THE_CACHE_BYTES_MIN: u64 = 8 << 20;

/// Whether so many blocks are copied past the cache.
pub(crate) fn is_past_the_cache(space: &Space, blocks: usize) -> bool {
    space.block_bytes().get().saturating_mul(blocks as u64) >= PAST_THE_CACHE_BYTES_MIN
}

/// Blocks whose places are looked up together.
const FOUND_AT_ONCE: usize = 16;

/// How the copies of one call are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    verify: Verify,
    past_the_cache: bool,
}

impl How {
    fn of(space: &Space, blocks: usize, verify: Verify) -> Self {
        Self { verify, past_the_cache: is_past_the_cache(space, blocks) }
    }

    /// One of the blocks that are copied by one call, which drains at its end.
    pub(crate) fn of_many(self, source: SharedBytes) -> SharedBytes {
        let source = source.drained_later();
        if self.past_the_cache { source.past_the_cache() } else { source }
    }

    /// The checksum of what was copied, if it is to be compared.
    pub(crate) fn copy(
        self,
        source: &SharedBytes,
        target: &mut impl BlockTarget,
        block: BlockId,
        generation: u64,
    ) -> Option<Checksum> {
        match self.verify {
            Verify::Checksum => Some(target.copy(source, block, generation)),
            Verify::Fence => {
                target.copy_unsummed(source);
                None
            }
        }
    }
}

/// How to get blocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct GetOptions {
    /// How long the answer may wait for blocks to come from a slower tier.
    pub wait: Duration,
    /// Who waits: a decode's blocks are read before a prefill's.
    pub purpose: Purpose,
    /// How copies are judged.
    pub verify: Verify,
}

impl Session {
    /// Copies blocks into `targets`, one for each key, and judges each copy; answers what became of each, in order.
    /// What is not `Granted` left anything in its target. The quickest way to a block by value: over the socket the
    /// calling thread copies out of shared memory, a block that was got before is found without asking the daemon, and
    /// the lease of another is given back without waiting for it. When cancelled, some targets may be filled.
    ///
    /// # Errors
    /// Bad keys or targets; over gRPC [`ClientError::Throttled`] if the daemon is over a limit; the session has ended.
    pub async fn get(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        targets: &mut [impl BlockTarget],
        options: GetOptions,
    ) -> Result<Vec<Outcome<()>>, ClientError> {
        if !self.owns(space) {
            return Err(ClientError::ForeignSpace);
        }
        check(space, keys.len(), targets)?;
        match &self.inner.backend {
            Backend::Grpc(link) => {
                let keys = self.keys(space, keys)?;
                let store = |at: usize, offset: usize, piece: &[u8]| targets[at].store(offset, piece);
                stream_blocks(link, space, &keys, options.wait, store).await
            }
            Backend::Lane(lane) => {
                let how = How::of(space, keys.len(), options.verify);
                let (mut outcomes, open) = known(lane, space, keys, targets, how);
                let deadline = Instant::now() + options.wait;
                for batch in open.chunks(batch_blocks(space).min(self.blocks_max())) {
                    let wait = deadline.saturating_duration_since(Instant::now());
                    let options = ReadOptions { ttl: None, wait, purpose: options.purpose };
                    self.by_lease((space, options), keys, targets, (batch, &mut outcomes), how).await?;
                }
                Ok(outcomes)
            }
        }
    }

    /// The blocks at these positions, by a lease.
    async fn by_lease(
        &self,
        (space, options): (&Space, ReadOptions),
        keys: &[impl AsRef<[u8]>],
        targets: &mut [impl BlockTarget],
        (batch, outcomes): (&[usize], &mut [Outcome<()>]),
        how: How,
    ) -> Result<(), ClientError> {
        let places = &self.lane("get")?.places;
        let wanted: Vec<&[u8]> = batch.iter().map(|&at| keys[at].as_ref()).collect();
        let lease = self.lease_read(space, &wanted, options).await?;
        for ((&at, key), grant) in batch.iter().zip(wanted).zip(lease.grants) {
            outcomes[at] = match grant {
                Outcome::Granted(block) => {
                    let outcome = copied(&block, &mut targets[at], how);
                    if outcome.granted().is_some() {
                        places.keep(block.id(), block.place(), space.handle, key);
                    }
                    outcome
                }
                other => other.map(|_| ()),
            };
        }
        drain();
        if let Some(lease) = lease.lease {
            lease.end_soon();
        }
        Ok(())
    }
}

fn check(space: &Space, keys: usize, targets: &[impl BlockTarget]) -> Result<(), ClientError> {
    if keys != targets.len() {
        return Err(ClientError::Unpaired { keys, payloads: targets.len() });
    }
    let expected = space.block_bytes().get();
    for (index, target) in targets.iter().enumerate() {
        let found = target.length() as u64;
        if found != expected {
            return Err(ClientError::WrongLength { index, found, expected });
        }
    }
    Ok(())
}

/// Copies what is known to lie somewhere; answers the positions of the rest as well.
fn known(
    lane: &Arc<LaneSession>,
    space: &Space,
    keys: &[impl AsRef<[u8]>],
    targets: &mut [impl BlockTarget],
    how: How,
) -> (Vec<Outcome<()>>, Vec<usize>) {
    let mut outcomes = vec![Outcome::Granted(()); keys.len()];
    let mut open = Vec::new();
    let blocks = block_ids(space.tenant_key(), space.id(), keys);
    let mut found = Vec::with_capacity(FOUND_AT_ONCE.min(blocks.len()));
    let parts = blocks.chunks(FOUND_AT_ONCE).zip(targets.chunks_mut(FOUND_AT_ONCE));
    for (first, (blocks, targets)) in (0..).step_by(FOUND_AT_ONCE).zip(parts) {
        let length = targets.first().map_or(0, BlockTarget::length);
        lane.places.find(blocks, length, how, &mut found);
        for (at, (block, target)) in blocks.iter().zip(targets).enumerate() {
            if let Some([Some(lying), Some(next)]) = found.get_mut(at..at + 2) {
                lying.bytes.come_before(&next.bytes);
            }
            let lies = found[at].as_ref().is_some_and(|lying| lying.copy(*block, &lane.status, target, how));
            if !lies {
                outcomes[first + at] = Outcome::Missing(MissReason::Unknown);
                open.push(first + at);
            }
        }
    }
    drain();
    (outcomes, open)
}

fn copied(block: &ReadBlock, target: &mut impl BlockTarget, how: How) -> Outcome<()> {
    let source = how.of_many(block.bytes().clone());
    let found = how.copy(&source, target, block.id(), block.generation());
    let judged = match found {
        Some(found) => block.judge(found),
        None if block.is_valid() => Ok(()),
        None => Err(Stale.into()),
    };
    match judged {
        Ok(()) => Outcome::Granted(()),
        Err(error) => {
            tracing::warn!(block = %block.id(), %error, "counted as a miss");
            let reason = match error {
                BadBlock::Stale(_) => MissReason::Unknown,
                BadBlock::Checksum { .. } => MissReason::Checksum,
            };
            Outcome::Missing(reason)
        }
    }
}

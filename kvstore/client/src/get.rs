//! Blocks by value, into memory of the caller's.

use std::time::{Duration, Instant};

use terrace_core::{BlockId, Checksum, MissReason, Purpose};
use terrace_lane::{SharedBytes, block_ids, share};

use crate::error::ClientError;
use crate::lease::Outcome;
use crate::read::{BadBlock, ReadBlock, ReadOptions, Stale};
use crate::session::{Backend, LaneSession, Session};
use crate::space::Space;
use crate::transfer::{batch_blocks, stream_blocks};

/// Memory that one block is copied into by [`Session::get`], by any thread.
pub trait BlockTarget: Send {
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
/// Below this a second thread costs more than it saves.
const PARALLEL_BYTES_MIN: u64 = 4 << 20;
/// What a thread takes at once, of what several copy.
const PART_BYTES: u64 = 1 << 20;

/// How many threads copy so many blocks, and how many blocks one of them takes at once, at most `most`.
pub(crate) fn shared_by(space: &Space, blocks: usize, threads: usize, most: usize) -> (usize, usize) {
    let block = space.block_bytes().get().max(1);
    if threads < 2 || block.saturating_mul(blocks as u64) < PARALLEL_BYTES_MIN {
        return (1, most);
    }
    (threads, usize::try_from(PART_BYTES / block).unwrap_or(most).clamp(1, most))
}

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
                let mut outcomes = self.known(lane, space, keys, targets, how);
                let missing = outcomes.iter().enumerate().filter(|(_, outcome)| outcome.granted().is_none());
                let open: Vec<usize> = missing.map(|(at, _)| at).collect();
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

    /// Copies what is known to lie somewhere.
    fn known<T: BlockTarget>(
        &self,
        lane: &LaneSession,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        targets: &mut [T],
        how: How,
    ) -> Vec<Outcome<()>> {
        let mut outcomes = vec![Outcome::Missing(MissReason::Unknown); keys.len()];
        let blocks = block_ids(space.tenant_key(), space.id(), keys);
        let (threads, at_once) = shared_by(space, keys.len(), self.inner.copy_threads, FOUND_AT_ONCE);
        let parts = blocks.chunks(at_once).zip(targets.chunks_mut(at_once)).zip(outcomes.chunks_mut(at_once));
        let mut parts: Vec<_> = parts.collect();
        share(&mut parts, threads, |((blocks, targets), outcomes)| {
            copy_known(lane, blocks, targets, outcomes, how);
        });
        outcomes
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
        let mut open = batch.iter().peekable();
        let targets =
            targets.iter_mut().enumerate().filter_map(|(at, target)| open.next_if_eq(&&at).map(|_| target));
        let mut copies: Vec<_> =
            lease.grants.into_iter().zip(targets).map(|(grant, target)| (grant, target, None)).collect();
        let (threads, at_once) = shared_by(space, copies.len(), self.inner.copy_threads, FOUND_AT_ONCE);
        let mut parts: Vec<_> = copies.chunks_mut(at_once).collect();
        share(&mut parts, threads, |part| {
            for (grant, target, outcome) in part.iter_mut() {
                *outcome = grant.granted().map(|block| copied(block, *target, how));
            }
        });
        for ((&at, key), (grant, _, outcome)) in batch.iter().zip(wanted).zip(copies) {
            if let (Outcome::Granted(block), Some(Outcome::Granted(()))) = (&grant, &outcome) {
                places.keep(block.id(), block.place(), space.handle, key);
            }
            outcomes[at] = outcome.unwrap_or_else(|| grant.map(|_| ()));
        }
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

/// Copies those that are known to lie somewhere.
fn copy_known<T: BlockTarget>(
    lane: &LaneSession,
    blocks: &[BlockId],
    targets: &mut [T],
    outcomes: &mut [Outcome<()>],
    how: How,
) {
    let length = targets.first().map_or(0, BlockTarget::length);
    let mut found = lane.places.find(blocks, length, how);
    for (at, ((block, target), outcome)) in blocks.iter().zip(targets).zip(outcomes).enumerate() {
        if let Some([Some(lying), Some(next)]) = found.get_mut(at..at + 2) {
            lying.bytes.come_before(&next.bytes);
        }
        if found[at].as_ref().is_some_and(|lying| lying.copy(*block, &lane.status, target, how)) {
            *outcome = Outcome::Granted(());
        }
    }
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

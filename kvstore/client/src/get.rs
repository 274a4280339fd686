//! Blocks by value, into memory of the caller's.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use terrace_core::{BlockId, Checksum, MissReason, Purpose};
use terrace_lane::{SharedBytes, TargetMemory, block_ids, share};

use crate::error::ClientError;
use crate::lease::Outcome;
use crate::read::{BadBlock, ReadBlock, ReadOptions, Stale};
use crate::session::{Backend, LaneSession, Session};
use crate::space::Space;
use crate::transfer::{batch_blocks, stream_blocks};

/// What one block is copied into by [`Session::get`], by any thread.
pub trait BlockTarget: Send {
    /// Its memory, as long as the space's blocks. What is copied may turn out not to be the block.
    fn memory(&mut self) -> TargetMemory<'_>;
}

impl BlockTarget for &mut [u8] {
    fn memory(&mut self) -> TargetMemory<'_> {
        TargetMemory::from(&mut **self)
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

/// Length of so many blocks.
pub(crate) fn bytes_of(space: &Space, blocks: usize) -> usize {
    usize::try_from(space.block_bytes().get()).unwrap_or(usize::MAX).saturating_mul(blocks)
}

/// Blocks whose places are looked up together.
const FOUND_AT_ONCE: usize = 16;
/// What a thread takes at once, of many blocks that several copy.
const PART_BYTES: RangeInclusive<u64> = 64 << 10..=2 << 20;
/// Parts of each thread, at least: one that is late leaves some to the others.
const PARTS: u64 = 4;

/// How the blocks of one call are shared by threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sharing {
    /// Threads that take so many blocks at once.
    pub(crate) among: usize,
    pub(crate) at_once: usize,
    /// Threads that take parts of each block.
    pub(crate) within: usize,
}

impl Sharing {
    /// `most` blocks at once, at most. Few or long ones are shared one by one.
    pub(crate) fn of(space: &Space, blocks: usize, threads: usize, most: usize) -> Self {
        let block = space.block_bytes().get().max(1);
        if threads < 2 || blocks < 2 * threads || block > *PART_BYTES.end() {
            return Self { among: 1, at_once: most, within: threads };
        }
        let each = block.saturating_mul(blocks as u64) / (PARTS * threads as u64);
        let part = each.clamp(*PART_BYTES.start(), *PART_BYTES.end()) / block;
        Self { among: threads, at_once: usize::try_from(part).unwrap_or(most).clamp(1, most), within: 1 }
    }
}

/// How the copies of one call are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    verify: Verify,
    past_the_cache: bool,
    /// Bytes of all.
    bytes: usize,
    sharing: Sharing,
}

impl How {
    fn of(space: &Space, blocks: usize, verify: Verify, threads: usize) -> Self {
        Self {
            verify,
            past_the_cache: is_past_the_cache(space, blocks),
            bytes: bytes_of(space, blocks),
            sharing: Sharing::of(space, blocks, threads, FOUND_AT_ONCE),
        }
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
        let (target, threads) = (&mut target.memory(), self.sharing.within);
        match self.verify {
            Verify::Checksum => Some(source.copy_and_checksum_into(target, block, generation, threads)),
            Verify::Fence => {
                source.copy_into(target, threads);
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
                let store =
                    |at: usize, offset: usize, piece: &[u8]| targets[at].memory().store(offset, piece);
                stream_blocks(link, space, &keys, options.wait, store).await
            }
            Backend::Lane(lane) => {
                let how = How::of(space, keys.len(), options.verify, self.inner.copy_threads);
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
        let Sharing { among, at_once, .. } = how.sharing;
        let parts = blocks.chunks(at_once).zip(targets.chunks_mut(at_once)).zip(outcomes.chunks_mut(at_once));
        let mut parts: Vec<_> = parts.collect();
        share(&mut parts, among, how.bytes, |((blocks, targets), outcomes)| {
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
        let how = How::of(space, copies.len(), how.verify, self.inner.copy_threads);
        let Sharing { among, at_once, .. } = how.sharing;
        let mut parts: Vec<_> = copies.chunks_mut(at_once).collect();
        share(&mut parts, among, how.bytes, |part| {
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

fn check(space: &Space, keys: usize, targets: &mut [impl BlockTarget]) -> Result<(), ClientError> {
    if keys != targets.len() {
        return Err(ClientError::Unpaired { keys, payloads: targets.len() });
    }
    let expected = space.block_bytes().get();
    for (index, target) in targets.iter_mut().enumerate() {
        let found = target.memory().len() as u64;
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
    let length = targets.first_mut().map_or(0, |target| target.memory().len());
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

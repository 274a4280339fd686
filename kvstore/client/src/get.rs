//! Blocks by value, into memory of the caller's.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use terrace_core::{BlockId, Checksum, MissReason, Purpose};
use terrace_lane::{Called, SHARED_BYTES_MIN, SharedBytes, TargetMemory, block_ids, share};

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

/// What a thread takes at once, of many blocks that several copy.
const PART_BYTES: RangeInclusive<usize> = 64 << 10..=2 << 20;
/// Parts of each thread, at least: one that is late leaves some to the others.
const PARTS: usize = 4;

/// How blocks that are copied now are shared by threads.
#[derive(Clone, Copy, Debug)]
struct Sharing {
    /// Those that take so many blocks at once.
    among: Called,
    at_once: usize,
    /// Those that take parts of each block.
    within: Called,
    /// Length of all blocks.
    bytes: usize,
}

/// Calls `copy` once for each of these blocks, on up to so many threads. Those that it is told copy parts of the block.
pub(crate) fn copy_each<T: Send>(
    space: &Space,
    threads: usize,
    blocks: &mut [T],
    copy: impl Fn(&mut T, Called) + Sync,
) {
    let Sharing { among, at_once, within, bytes } = Sharing::of(space, blocks.len(), threads);
    let mut parts: Vec<_> = blocks.chunks_mut(at_once).collect();
    share(&mut parts, bytes, among, |part| part.iter_mut().for_each(|block| copy(block, within)));
}

impl Sharing {
    fn of(space: &Space, blocks: usize, threads: usize) -> Self {
        let block = usize::try_from(space.block_bytes().get()).unwrap_or(usize::MAX).max(1);
        let bytes = block.saturating_mul(blocks);
        let called = Called::of(threads, bytes);
        let alone = Self { among: Called::NONE, at_once: blocks.max(1), within: Called::NONE, bytes };
        if called.is_none() {
            return alone;
        }
        // A few long ones would not come out even.
        if block > *PART_BYTES.end() || (blocks < 2 * threads && block >= SHARED_BYTES_MIN) {
            return Self { within: called, ..alone };
        }
        let part = (bytes / (PARTS * threads)).clamp(*PART_BYTES.start(), *PART_BYTES.end());
        Self { among: called, at_once: (part / block).max(1), ..alone }
    }
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

    /// The checksum of what was copied, by those that are called, if it is to be compared.
    pub(crate) fn copy(
        self,
        source: &SharedBytes,
        target: &mut impl BlockTarget,
        (block, generation): (BlockId, u64),
        called: Called,
    ) -> Option<Checksum> {
        let target = &mut target.memory();
        match self.verify {
            Verify::Checksum => Some(source.copy_and_checksum_into(target, block, generation, called)),
            Verify::Fence => {
                source.copy_into(target, called);
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
    /// calling thread, and others where there is much, copy out of shared memory, a block that was got before is found
    /// without asking the daemon, and the lease of another is given back without waiting for it. When cancelled, some
    /// targets may be filled.
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
        let length = targets.first_mut().map_or(0, |target| target.memory().len());
        let mut lying = lane.places.find(&blocks, length, how);
        for at in 1..lying.len() {
            if let [Some(one), Some(next)] = &mut lying[at - 1..=at] {
                one.bytes.come_before(&next.bytes);
            }
        }
        let places = blocks.iter().zip(&lying).zip(targets).zip(&mut outcomes);
        let mut copies: Vec<_> = places
            .filter_map(|(((block, lying), target), outcome)| Some((block, lying.as_ref()?, target, outcome)))
            .collect();
        let threads = self.inner.copy_threads;
        copy_each(space, threads, &mut copies, |(block, lying, target, outcome), called| {
            if lying.copy(**block, &lane.status, *target, how, called) {
                **outcome = Outcome::Granted(());
            }
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
        let (Some(&first), Some(&last)) = (batch.first(), batch.last()) else { return Ok(()) };
        let mut open = batch.iter().zip(&lease.grants).peekable();
        let mut copies = Vec::with_capacity(batch.len());
        for (at, target) in (first..).zip(&mut targets[first..=last]) {
            let wanted = open.next_if(|(wanted, _)| **wanted == at);
            if let Some(block) = wanted.and_then(|(_, grant)| grant.granted()) {
                copies.push((block, target, Outcome::Promoting));
            }
        }
        let threads = self.inner.copy_threads;
        copy_each(space, threads, &mut copies, |(block, target, outcome), called| {
            *outcome = copied(block, *target, how, called);
        });
        let copied: Vec<_> = copies.into_iter().map(|(_, _, outcome)| outcome).collect();
        let mut copied = copied.into_iter();
        for ((&at, key), grant) in batch.iter().zip(wanted).zip(lease.grants) {
            outcomes[at] = match grant {
                Outcome::Granted(block) => {
                    let outcome = copied.next().expect("each granted block was copied");
                    if outcome.granted().is_some() {
                        places.keep(block.id(), block.place(), space.handle, key);
                    }
                    outcome
                }
                other => other.map(|_| ()),
            };
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

fn copied(block: &ReadBlock, target: &mut impl BlockTarget, how: How, called: Called) -> Outcome<()> {
    let source = how.of_many(block.bytes().clone());
    let found = how.copy(&source, target, (block.id(), block.generation()), called);
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

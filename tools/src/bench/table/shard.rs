//! One shard of the residency table, driven through the core's public surface.
//!
//! The shell around it is the least there can be: no memory and no device
//! stand behind it, so every effect is performed at once. What is timed is the
//! core, and the taking of its effects.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use terrace_core::{
    Admission, BlockId, ByteCount, Checksum, Config, Core, Done, Durability, Effect, GIB, Grant, Input,
    LeaseId, Limits, Locality, MIB, MatchMode, Memory, Micros, Notice, Now, Policy, Purpose, Reply, Request,
    RequestId, SealOutcome, SessionId, SpaceId, TenantId, TokenCount, frame_bytes,
};

/// Blocks of one chain, which is one request.
pub(super) const CHAIN_BLOCKS: usize = 200;
/// Leases that stay open while others come and go.
const LEASES_OPEN: usize = 64;
const CHUNK_BYTES: u64 = 64 * MIB;
const TENANT: TenantId = TenantId::from_bytes([1; 16]);
const SPACE: SpaceId = SpaceId::from_bytes([2; 16]);
const WRITER: SessionId = SessionId::new(1);
const READER: SessionId = SessionId::new(2);

/// What a shard is built for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Blocks that it holds at least, in whole chunks.
    pub(super) blocks: u64,
    /// Payload of a block. It decides how many share a chunk.
    pub(super) block_bytes: u64,
    /// How the writing session moves bytes.
    pub(super) locality: Locality,
    /// What is evicted first.
    pub(super) policy: Policy,
}

/// Time that one chain took to write.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Written {
    /// Write lease: frames, evictions and entries.
    pub(super) reserve: Duration,
    /// Seals.
    pub(super) seal: Duration,
    /// Release of the write lease, and the return of full windows.
    pub(super) release: Duration,
}

/// Time that one chain took to read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Read {
    /// Every block of the chain was there.
    pub(super) whole: bool,
    /// Look-up without a lease, if there was one.
    pub(super) matched: Option<Duration>,
    /// Read lease.
    pub(super) lease: Duration,
    /// Release of the oldest open lease, if one was released.
    pub(super) release: Option<Duration>,
}

/// A core and its shell.
#[derive(Debug)]
pub(super) struct Shard {
    core: Core,
    shape: Shape,
    origin: Instant,
    requests: u64,
    /// The answer that is waited for, once it is there.
    reply: Option<Arc<Reply>>,
    /// What effects that were performed led to.
    inputs: VecDeque<Input>,
    open: VecDeque<LeaseId>,
    capacity: u64,
}

impl Shard {
    /// An empty shard.
    ///
    /// # Errors
    /// When no block of this size fits into a chunk.
    pub(super) fn new(shape: Shape) -> anyhow::Result<Self> {
        let frame = frame_bytes(ByteCount::new(shape.block_bytes)).context("a block is too large")?;
        let per_chunk = CHUNK_BYTES / frame.get();
        ensure!(per_chunk > 0, "a block of {} bytes does not fit into a chunk", shape.block_bytes);
        let chunks = shape.blocks.div_ceil(per_chunk);
        let capacity = chunks * per_chunk;
        let mut shard = Self {
            core: Core::new(config(shape, chunks, capacity)?),
            shape,
            origin: Instant::now(),
            requests: 0,
            reply: None,
            inputs: VecDeque::new(),
            open: VecDeque::new(),
            capacity,
        };
        let block_bytes = ByteCount::new(shape.block_bytes);
        shard.tell(Input::SpaceKnown {
            space: SPACE,
            tenant: TENANT,
            block_bytes,
            block_tokens: TokenCount::new(16),
            generation: 0,
        })?;
        for session in [WRITER, READER] {
            shard.tell(Input::SessionOpened { session, tenant: TENANT, locality: shape.locality })?;
        }
        Ok(shard)
    }

    /// Blocks that fit.
    pub(super) const fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Blocks that can be read.
    pub(super) fn resident(&self) -> u64 {
        self.core.spaces().iter().map(|space| space.blocks_pinned).sum()
    }

    /// Blocks evicted so far.
    pub(super) fn evicted(&self) -> u64 {
        self.core.counters().evictions_pinned
    }

    /// Reserves, seals and releases a chain that was never written before.
    ///
    /// # Errors
    /// When a block of it is not granted or not sealed.
    pub(super) fn write(&mut self, number: u64) -> anyhow::Result<Written> {
        let blocks = chain(number);
        let parts = (0u32..)
            .zip(&blocks)
            .map(|(position, block)| {
                (position, ByteCount::new(self.shape.block_bytes), Checksum::new(low_bits(*block)))
            })
            .collect();
        let repeat = Some(self.requests);
        let reserve = Request::LeaseWrite {
            repeat,
            space: SPACE,
            blocks,
            parent: None,
            ttl: None,
            want: Memory::Pinned,
        };
        let (reply, reserve) = self.call(WRITER, reserve)?;
        let Reply::Leased { lease: Some(lease), blocks, .. } = reply else {
            bail!("chain {number} is not granted: {reply:?}");
        };
        ensure!(blocks.iter().all(is_granted), "chain {number} is granted in part");
        let repeat = Some(self.requests);
        let seal = Request::Seal { repeat, lease, blocks: parts, durability: Durability::Readable };
        let (reply, seal) = self.call(WRITER, seal)?;
        let Reply::Sealed { outcomes } = reply else { bail!("chain {number} is not sealed: {reply:?}") };
        ensure!(
            outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed),
            "chain {number}: {outcomes:?}"
        );
        let (_, release) = self.call(WRITER, Request::Release { leases: vec![lease] })?;
        Ok(Written { reserve, seal, release })
    }

    /// Leases a chain, after a look-up if `look` says so, and releases the oldest lease.
    ///
    /// # Errors
    /// When the core refuses.
    pub(super) fn read(&mut self, number: u64, look: Look) -> anyhow::Result<Read> {
        let session = match self.shape.locality {
            // A window's blocks are verified on their first use by another session.
            Locality::Local => WRITER,
            Locality::Streamed | Locality::Isolated => READER,
        };
        let blocks = chain(number);
        let matched = match look {
            Look::First => {
                let look = Request::Match { blocks: blocks.clone(), mode: MatchMode::Prefix };
                let (reply, matched) = self.call(session, look)?;
                ensure!(matches!(reply, Reply::Matched { .. }), "a match is answered {reply:?}");
                Some(matched)
            }
            Look::Never => None,
        };
        // Whoever waits for no promotion names a time that is past.
        let lease = Request::LeaseRead {
            repeat: Some(self.requests),
            blocks,
            ttl: None,
            answer_by: Now::default(),
            purpose: Purpose::Prefill,
            want: Memory::Pinned,
        };
        let (reply, lease) = self.call(session, lease)?;
        let Reply::Leased { lease: granted, blocks, .. } = reply else {
            bail!("a read lease is answered {reply:?}");
        };
        let whole = blocks.len() == CHAIN_BLOCKS && blocks.iter().all(is_granted);
        self.open.extend(granted);
        let mut release = None;
        if self.open.len() > LEASES_OPEN
            && let Some(oldest) = self.open.pop_front()
        {
            let (_, took) = self.call(session, Request::Release { leases: vec![oldest] })?;
            release = Some(took);
        }
        Ok(Read { whole, matched, lease, release })
    }

    /// Asks, performs what follows, and takes the answer.
    fn call(&mut self, session: SessionId, op: Request) -> anyhow::Result<(Reply, Duration)> {
        self.requests += 1;
        let request = RequestId::new(self.requests);
        self.reply = None;
        let began = Instant::now();
        self.tell(Input::Request { session, request, op })?;
        let took = began.elapsed();
        let reply = self.reply.take().context("the core leaves a request without an answer")?;
        Ok((Arc::unwrap_or_clone(reply), took))
    }

    fn tell(&mut self, input: Input) -> anyhow::Result<()> {
        let waited_for = RequestId::new(self.requests);
        let micros = u64::try_from(self.origin.elapsed().as_micros()).context("the clock ran over")?;
        let mut next = Some(input);
        while let Some(input) = next {
            self.core.handle(Now::from_micros(micros), input);
            while let Some(effect) = self.core.poll_effect() {
                self.perform(effect, waited_for)?;
            }
            next = self.inputs.pop_front();
        }
        Ok(())
    }

    fn perform(&mut self, effect: Effect, waited_for: RequestId) -> anyhow::Result<()> {
        match effect {
            Effect::Reply { request, reply, session: _ } => {
                if request == waited_for {
                    self.reply = Some(reply);
                }
            }
            Effect::CreateChunk { op, .. } => {
                self.inputs.push_back(Input::OpDone { op, outcome: Ok(Done::ChunkCreated) });
            }
            Effect::CloseWindow { op, .. }
            | Effect::DropChunk { op, .. }
            | Effect::Verify { op, .. }
            | Effect::Copy { op, .. } => {
                self.inputs.push_back(Input::OpDone { op, outcome: Ok(Done::Plain) });
            }
            Effect::Notify { session, notice: Notice::WindowRecalled { chunk } } => {
                // Answered under a number that nobody waits for.
                let request = RequestId::new(u64::MAX);
                self.inputs.push_back(Input::Request {
                    session,
                    request,
                    op: Request::ReturnWindow { chunk },
                });
            }
            Effect::Notify { notice: Notice::WindowOpened { .. }, .. } => {}
            Effect::Notify { notice, .. } => bail!("the core says {notice:?}"),
            Effect::EndSession { .. } | Effect::SetFences { .. } | Effect::Publish { .. } => {}
            Effect::Read { .. }
            | Effect::Promote { .. }
            | Effect::Cancel { .. }
            | Effect::Scrub { .. }
            | Effect::Write { .. }
            | Effect::CarveSlot { .. }
            | Effect::Commit { .. }
            | Effect::ClearSpace { .. } => bail!("the core uses a device that does not exist: {effect:?}"),
        }
        Ok(())
    }
}

/// Whether a read looks first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// `Match`, then lease.
    First,
    /// Lease at once.
    Never,
}

/// As the daemon's defaults are, but for the limits that the bench would run into.
fn config(shape: Shape, chunks: u64, capacity: u64) -> anyhow::Result<Config> {
    Ok(Config {
        incarnation: 1,
        // The pool keeps one chunk in reserve for windows.
        pinned_bytes: ByteCount::new((chunks + 1) * CHUNK_BYTES),
        chunk_bytes: ByteCount::new(CHUNK_BYTES),
        device_slots: Vec::new(),
        hbm: Vec::new(),
        persist_delay: Micros::from_millis(1_000),
        window_idle: Micros::from_millis(60_000),
        window_recall_max: Micros::from_millis(60_000),
        chunks_ready_min: 1,
        frames_ready_min: 0,
        policy: shape.policy,
        admission: Admission::All,
        limits: Limits {
            blocks: u32::try_from(capacity * 2).context("too many blocks for one shard")?,
            spaces: 16,
            sessions: 16,
            leases_per_session: 4_096,
            blocks_per_request: 8_192,
            leases_per_tenant: 4_096,
            leased_bytes_per_tenant: ByteCount::new(1024 * GIB),
            leased_bytes_per_session: ByteCount::new(1024 * GIB),
            lease_hold_max: Micros::from_millis(86_400_000),
            requests_waiting_per_session: 4_096,
            requests_waiting_per_tenant: 4_096,
            lease_ttl_max: Micros::from_millis(600_000),
            lease_ttl_default: Micros::from_millis(600_000),
            requests_waiting: 4_096,
            reads_in_flight: 64,
            writes_in_flight: 64,
            replies_remembered: 256,
            retained_percent: 50,
        },
    })
}

fn is_granted(grant: &Grant) -> bool {
    matches!(grant, Grant::Granted { .. })
}

/// The blocks of a chain. Their bits are uniform, as those of hashes are.
pub(super) fn chain(number: u64) -> Vec<BlockId> {
    (0..CHAIN_BLOCKS as u64)
        .map(|position| {
            let low = mix(number << 16 | position);
            let high = mix(low ^ 0x5bf0_3635_d1a8_e1c9);
            BlockId::from_bytes((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
        })
        .collect()
}

/// The low half of an id.
pub(super) fn low_bits(block: BlockId) -> u64 {
    let [b0, b1, b2, b3, b4, b5, b6, b7, ..] = block.to_bytes();
    u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7])
}

/// SplitMix64: spreads a number over 64 bits, one to one.
pub(super) fn mix(number: u64) -> u64 {
    let mut bits = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(locality: Locality) -> Shape {
        Shape { blocks: 2_000, block_bytes: MIB, locality, policy: Policy::Lru }
    }

    /// The bench could time evictions that do not happen or prefixes that are not there: in a full pool each
    /// new block must push out one, and a chain just written must be whole.
    #[test]
    fn a_full_pool_evicts_one_block_for_each_new_one() {
        for locality in [Locality::Streamed, Locality::Local] {
            let mut shard = Shard::new(shape(locality)).unwrap();
            let chains = shard.capacity() / CHAIN_BLOCKS as u64;
            for number in 0..2 * chains {
                shard.write(number).unwrap();
            }
            let resident = shard.resident();
            assert!(resident > shard.capacity() * 9 / 10, "{resident} of {}", shard.capacity());
            let written = 2 * chains * CHAIN_BLOCKS as u64;
            assert_eq!(shard.evicted() + resident, written);
            assert!(shard.read(2 * chains - 1, Look::First).unwrap().whole);
            assert!(!shard.read(0, Look::Never).unwrap().whole, "the first chain is long gone");
        }
    }

    /// Leases that are never released would pin the pool, and evictions would fail.
    #[test]
    fn reads_keep_a_bounded_number_of_leases() {
        let mut shard = Shard::new(shape(Locality::Streamed)).unwrap();
        shard.write(1).unwrap();
        let released = (0..3 * LEASES_OPEN).filter(|_| shard.read(1, Look::First).unwrap().release.is_some());
        assert_eq!(released.count(), 2 * LEASES_OPEN);
        assert_eq!(shard.core.lease_count(), LEASES_OPEN);
    }
}

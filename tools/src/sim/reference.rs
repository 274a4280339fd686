//! The plain model that eviction policies are compared by: one tier, requests
//! one after another, and a prompt's blocks are there before the next one comes.
//! The core is the real one.
//!
//! A hit is the longest prefix that is there; a hole ends it. What is missing is
//! inserted block by block, so that the core weighs each against what it has.
//! Computing takes its time, so that the core sees what blocks cost; nothing else
//! takes any.

use indicatif::ProgressBar;
use terrace_core::{
    Admission, BlockId, ByteCount, Checksum, Durability, Grant, HEADER_PAGE_BYTES, LeaseId, MatchMode,
    Memory, Now, Policy, Purpose, Reply, Request,
};

use super::node::{DeviceModel, Hardware, LEASE_TTL, Node, micros};
use super::profile::Profile;
use super::report::Outcome;
use super::trace::{Ask, Trace};

/// Replays a trace against a tier of `frames` blocks.
pub(crate) fn replay(
    trace: &Trace,
    frames: u64,
    policy: Policy,
    profile: &Profile,
    progress: &ProgressBar,
) -> Outcome {
    let block_bytes = u64::from(trace.tokens_per_block) * profile.bytes_per_token;
    let hardware = hardware(trace, frames, block_bytes, policy, profile);
    let mut replay = Replay { node: Node::new(hardware), trace, profile };
    let mut outcome = Outcome::default();
    for ask in &trace.asks {
        replay.request(ask, &mut outcome);
        progress.inc(1);
    }
    let counters = replay.node.counters();
    outcome.evictions_pinned = counters.evictions_pinned;
    outcome.stranded_bytes = replay.node.tiers().pinned.stranded_bytes.get();
    outcome.simulated = replay.node.now();
    outcome
}

/// One chunk holds the whole tier, so that its capacity is exact.
fn hardware(trace: &Trace, frames: u64, block_bytes: u64, policy: Policy, profile: &Profile) -> Hardware {
    Hardware {
        block_bytes,
        block_tokens: trace.tokens_per_block,
        frames_ready: 0,
        chunk_bytes: frames.max(1) * (block_bytes + HEADER_PAGE_BYTES),
        pinned_chunks: u64::from(frames > 0),
        device_slots: Vec::new(),
        device: DeviceModel { read_rate: 1.0, write_rate: 1.0, latency: 0 },
        memory_rate: 1.0,
        clients: 1,
        blocks_per_request: trace.longest(),
        // Only the first write waits: for its chunk, which takes no time.
        patience: 1_000_000,
        policy,
        admission: Admission::All,
        cost: profile.block_cost(trace.tokens_per_block),
    }
}

struct Replay<'a> {
    node: Node,
    trace: &'a Trace,
    profile: &'a Profile,
}

impl Replay<'_> {
    fn request(&mut self, ask: &Ask, outcome: &mut Outcome) {
        self.node.advance(ask.at);
        let blocks = self.trace.blocks(ask);
        let (lease, hits) = self.lease_read(&blocks);
        outcome.throttled += self.keep(&blocks, hits);
        if let Some(lease) = lease {
            self.node.ask_now(0, Request::Release { leases: vec![lease] });
        }
        let tokens = self.trace.tokens(ask, hits);
        outcome.requests += 1;
        outcome.blocks += blocks.len() as u64;
        outcome.block_hits.pinned += hits as u64;
        outcome.tokens += ask.input;
        outcome.token_hits.pinned += tokens;
        outcome.seconds += self.profile.seconds(ask.input);
        outcome.saved_seconds += self.profile.seconds(tokens);
    }

    /// The lease, and how many blocks from the first one on it covers.
    fn lease_read(&mut self, blocks: &[BlockId]) -> (Option<LeaseId>, usize) {
        let repeat = Some(self.node.repeat());
        let op = Request::LeaseRead {
            repeat,
            blocks: blocks.to_vec(),
            ttl: LEASE_TTL,
            answer_by: Now::from_micros(0),
            purpose: Purpose::Prefill,
            want: Memory::Pinned,
        };
        match self.node.ask_now(0, op) {
            Reply::Leased { lease, blocks, .. } => (lease, granted(&blocks)),
            other => panic!("a read lease was answered by {other:?}"),
        }
    }

    /// Inserts the blocks from `from` on. Ends, and says how many are left, where
    /// the core evicts the block before for the next one: it thinks that what
    /// else it has is worth more than the rest of this prompt.
    fn keep(&mut self, blocks: &[BlockId], from: usize) -> u64 {
        for place in from..blocks.len() {
            let left = (blocks.len() - place) as u64;
            let lease = match self.reserve(blocks, place) {
                Reserved::Frame(lease, length) => (lease, length),
                Reserved::There => continue,
                Reserved::NoRoom => return left,
            };
            if place > from && !self.is_there(blocks[place - 1]) {
                self.node.ask_now(0, Request::Abort { lease: lease.0, indexes: Vec::new() });
                self.node.ask_now(0, Request::Release { leases: vec![lease.0] });
                if let Reserved::Frame(lease, length) = self.reserve(blocks, place - 1) {
                    self.publish(blocks, place - 1, lease, length);
                }
                return left;
            }
            self.publish(blocks, place, lease.0, lease.1);
        }
        0
    }

    fn reserve(&mut self, blocks: &[BlockId], place: usize) -> Reserved {
        let op = Request::LeaseWrite {
            repeat: Some(self.node.repeat()),
            space: Node::SPACE,
            blocks: vec![blocks[place]],
            parent: place.checked_sub(1).map(|before| blocks[before]),
            ttl: LEASE_TTL,
            want: Memory::Pinned,
        };
        match self.node.ask_and_wait(0, op) {
            Reply::Leased { lease, blocks, .. } => match (lease, blocks.first()) {
                (Some(lease), Some(&Grant::Granted { length, .. })) => Reserved::Frame(lease, length),
                (_, Some(Grant::Exists)) => Reserved::There,
                (_, _) => Reserved::NoRoom,
            },
            Reply::Throttled(_) => Reserved::NoRoom,
            other => panic!("a write lease was answered by {other:?}"),
        }
    }

    /// Seals a block after the time that computing it takes.
    fn publish(&mut self, blocks: &[BlockId], place: usize, lease: LeaseId, length: ByteCount) {
        let depth = u32::try_from(place).unwrap_or(u32::MAX);
        let seconds = self.profile.block_cost(self.trace.tokens_per_block).seconds(depth);
        self.node.advance(self.node.now() + micros(seconds));
        let op = Request::Seal {
            repeat: Some(self.node.repeat()),
            lease,
            blocks: vec![(0, length, checksum_of(blocks[place]))],
            durability: Durability::Readable,
        };
        self.node.ask_now(0, op);
        self.node.ask_now(0, Request::Release { leases: vec![lease] });
    }

    fn is_there(&mut self, block: BlockId) -> bool {
        let op = Request::Match { blocks: vec![block], mode: MatchMode::Prefix };
        matches!(self.node.ask_now(0, op), Reply::Matched { blocks } if blocks.first().is_some_and(Option::is_some))
    }
}

/// What became of the wish for a frame.
enum Reserved {
    Frame(LeaseId, ByteCount),
    There,
    NoRoom,
}

/// The bytes are a function of the block, so their checksum is one as well.
fn checksum_of(block: BlockId) -> Checksum {
    let [low, ..] = block.to_bytes();
    Checksum::new(u64::from(low))
}

/// Blocks granted from the first one on.
pub(crate) fn granted(grants: &[Grant]) -> usize {
    grants.iter().take_while(|grant| matches!(grant, Grant::Granted { .. })).count()
}

/// What of a write lease is to be sealed, and how many blocks found no frame.
pub(crate) fn to_seal(grants: &[Grant]) -> (Vec<(u32, ByteCount, Checksum)>, u64) {
    let (mut parts, mut throttled) = (Vec::with_capacity(grants.len()), 0);
    for (index, grant) in (0u32..).zip(grants) {
        match grant {
            Grant::Granted { block, length, .. } => {
                parts.push((index, *length, checksum_of(*block)));
            }
            Grant::Throttled => throttled += 1,
            Grant::Promoting | Grant::Missing(_) | Grant::Exists => {}
        }
    }
    (parts, throttled)
}

#[cfg(test)]
pub(crate) mod tests;

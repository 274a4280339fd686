//! The plain model that eviction policies are compared by: one tier, requests
//! one after another, and a prompt's blocks are there before the next one comes.
//! The core is the real one.
//!
//! A hit is the longest prefix that is there; a hole ends it. Computing takes its
//! time, so that the core sees what blocks cost; nothing else takes any.

use indicatif::ProgressBar;
use terrace_core::{
    Admission, ByteCount, Checksum, Durability, Grant, HEADER_PAGE_BYTES, LeaseId, Now, Placement, Policy,
    Reply, Request,
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
        placement: Placement::Inclusive,
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
        let mut leases = Vec::from_iter(lease);
        if hits < blocks.len() {
            let seconds = self.profile.prefill_seconds(self.trace.tokens(ask, hits), ask.input);
            let (lease, throttled) = self.write(&blocks, hits, micros(seconds));
            // The later blocks are given back first, so that a prefix stays newer than what follows it.
            if let Some(lease) = lease {
                leases.insert(0, lease);
            }
            outcome.throttled += throttled;
        }
        for lease in leases {
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
    fn lease_read(&mut self, blocks: &[terrace_core::BlockId]) -> (Option<LeaseId>, usize) {
        let repeat = self.node.repeat();
        let op = Request::LeaseRead {
            repeat,
            blocks: blocks.to_vec(),
            ttl: LEASE_TTL,
            answer_by: Now::from_micros(0),
        };
        match self.node.ask_now(0, op) {
            Reply::Leased { lease, blocks, .. } => (lease, granted(&blocks)),
            other => panic!("a read lease was answered by {other:?}"),
        }
    }

    /// Stores what is missing from `from` on, after the time that it takes. What finds no frame is left out.
    fn write(
        &mut self,
        blocks: &[terrace_core::BlockId],
        from: usize,
        micros: u64,
    ) -> (Option<LeaseId>, u64) {
        let repeat = self.node.repeat();
        let op = Request::LeaseWrite {
            repeat,
            space: Node::SPACE,
            blocks: blocks[from..].to_vec(),
            parent: from.checked_sub(1).map(|place| blocks[place]),
            ttl: LEASE_TTL,
        };
        let (lease, grants) = match self.node.ask_now(0, op) {
            Reply::Leased { lease, blocks, .. } => (lease, blocks),
            Reply::Throttled(_) => return (None, (blocks.len() - from) as u64),
            other => panic!("a write lease was answered by {other:?}"),
        };
        self.node.advance(self.node.now() + micros);
        let (parts, throttled) = to_seal(&grants);
        if let Some(lease) = lease {
            let op = Request::Seal {
                repeat: self.node.repeat(),
                lease,
                blocks: parts,
                durability: Durability::Readable,
            };
            self.node.ask_now(0, op);
        }
        (lease, throttled)
    }
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
                // The bytes are a function of the block, so their checksum is one as well.
                let [low, ..] = block.to_bytes();
                parts.push((index, *length, Checksum::new(u64::from(low))));
            }
            Grant::Throttled => throttled += 1,
            Grant::Promoting | Grant::Missing(_) | Grant::Exists => {}
        }
    }
    (parts, throttled)
}

#[cfg(test)]
pub(crate) mod tests;

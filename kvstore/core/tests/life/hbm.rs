//! Blocks in device memory: each way in and out, and what a device that is lost
//! or wanted by its engine takes with it.

use terrace_core::*;

use super::{CHUNK_BYTES, Node, block, config, leased};

const GPU: GpuId = GpuId::new(0);
const HBM: Memory = Memory::Hbm(GPU);

fn gpu(chunks: u64, chunks_min: u64, reads: HbmReads) -> GpuConfig {
    GpuConfig {
        bytes: ByteCount::new(chunks * CHUNK_BYTES),
        bytes_min: ByteCount::new(chunks_min * CHUNK_BYTES),
        reads,
        peers: GpuSet::NONE,
        copies_in_flight: 8,
    }
}

fn node(reads: HbmReads) -> Node {
    Node::of(Config { hbm: vec![gpu(4, 1, reads), gpu(2, 0, HbmReads::ThroughPinned)], ..config() })
}

fn wanting(op: Request, memory: Memory) -> Request {
    match op {
        Request::LeaseRead { repeat, blocks, ttl, answer_by, purpose, .. } => {
            Request::LeaseRead { repeat, blocks, ttl, answer_by, purpose, want: memory }
        }
        Request::LeaseWrite { repeat, space, blocks, parent, ttl, .. } => {
            Request::LeaseWrite { repeat, space, blocks, parent, ttl, want: memory }
        }
        other => other,
    }
}

fn memories(grants: &[Grant]) -> Vec<Option<Memory>> {
    let memory = |grant: &Grant| match grant {
        Grant::Granted { memory, .. } => Some(*memory),
        _ => None,
    };
    grants.iter().map(memory).collect()
}

impl Node {
    /// Writes and seals blocks on the device; gives the lease back.
    fn write_hbm(&mut self, session: u64, blocks: &[u8]) {
        let op = wanting(self.lease_write(blocks), HBM);
        let (lease, grants) = leased(self.serve(session, op));
        assert!(memories(&grants).iter().all(|memory| *memory == Some(HBM)), "{grants:?}");
        let parts: Vec<(u32, u64)> = (0u32..).zip(blocks).map(|(at, &n)| (at, u64::from(n))).collect();
        let op = self.seal(lease, &parts, Durability::Readable);
        let outcomes = vec![SealOutcome::Sealed; blocks.len()];
        assert_eq!(self.call(session, op), Reply::Sealed { outcomes });
        self.call(session, Request::Release { leases: vec![lease] });
    }

    fn read_in(&mut self, session: u64, blocks: &[u8], memory: Memory) -> (LeaseId, Vec<Grant>) {
        let op = wanting(self.lease_read(blocks), memory);
        leased(self.serve(session, op))
    }

    fn tiers(&self, n: u8) -> Residence {
        self.core.stat(block(n)).map(|view| view.tiers).unwrap_or_default()
    }

    fn operation(&self, wanted: impl Fn(&Effect) -> bool) -> (OpId, &Effect) {
        let effect = self.effects.iter().find(|effect| wanted(effect)).expect("it was started");
        (Node::op_of(effect).expect("it is slow"), effect)
    }

    fn end(&mut self, wanted: impl Fn(&Effect) -> bool, outcome: Result<Done, Fault>) {
        let place = self.effects.iter().position(wanted).expect("it was started");
        let op = Node::op_of(&self.effects.remove(place)).expect("it is slow");
        self.tell(Input::OpDone { op, outcome });
    }
}

fn is_copy(effect: &Effect) -> bool {
    matches!(effect, Effect::Copy { .. })
}

/// A worker's blocks could be copied to be read by its neighbour: they are leased where they are, after one
/// verification, and the copy that write-behind makes goes by Pinned.
#[test]
fn a_block_is_leased_on_the_device_where_it_was_computed() {
    let mut node = node(HbmReads::ThroughPinned);
    node.write_hbm(1, &[1, 2]);
    assert!(node.tiers(1).hbm.contains(GPU) && !node.tiers(1).pinned);
    let op = wanting(node.lease_read(&[1, 2]), HBM);
    let request = node.ask(2, op);
    assert!(!node.effects.iter().any(is_copy), "no bytes move");
    let (op, _) = node.operation(|effect| matches!(effect, Effect::Verify { .. }));
    assert!(node.reply(request).is_none(), "{op}: a foreign session's bytes are verified first");
    node.run();
    let (_, grants) = leased(node.reply(request).expect("answered"));
    assert_eq!(memories(&grants), [Some(HBM); 2]);
    // Due; copied to Pinned when there is a chunk for it; written from there.
    for _ in 0..3 {
        node.after(1100);
        node.run();
    }
    let there = node.tiers(1);
    assert!(there.pinned && there.nvme && there.hbm.contains(GPU), "{there:?}");
    assert_eq!(node.core.counters().demotions_hbm, 2);
}

/// What only Nvme has could come by one read where the shell offers it, and by two steps where not. Both are right,
/// and a device that fails in between is a miss for the device and a hit in Pinned.
#[test]
fn what_is_on_nvme_comes_to_the_device() {
    for reads in [HbmReads::Direct, HbmReads::ThroughPinned] {
        let mut node = node(reads);
        node.write(1, &[1]);
        node.after(2000);
        node.run();
        let frames = node.core.tier_views().pinned.frames.sealed;
        assert_eq!((node.tiers(1).nvme, frames), (true, 1));
        node.tell(Input::SessionClosed { session: SessionId::new(1) });
        node.tell(Input::MemoryLimit { bytes: ByteCount::new(0) });
        node.run();
        node.tell(Input::MemoryLimit { bytes: ByteCount::new(4 * CHUNK_BYTES) });
        let op = wanting(node.lease_read(&[1]), HBM);
        let request = node.ask(2, op);
        node.run();
        let reply = node.reply(request);
        assert!(reply.is_some(), "{reads:?}: {:?} {:?}", node.core.stat(block(1)), node.core.tier_views());
        let (_, grants) = leased(reply.expect("answered"));
        assert_eq!(memories(&grants), [Some(HBM)], "{reads:?}");
        assert_eq!(node.core.counters().promotions_hbm, 1);
    }
}

/// The straight way from a file fails, or is not taken: the block must come to the device by Pinned, in the same lease,
/// and only what a read through Pinned finds damaged is.
#[test]
fn a_failed_straight_read_comes_by_pinned() {
    for fault in [Fault::Device, Fault::NotStarted] {
        let mut node = node(HbmReads::Direct);
        node.write(1, &[1]);
        node.after(2000);
        node.run();
        node.tell(Input::SessionClosed { session: SessionId::new(1) });
        node.tell(Input::MemoryLimit { bytes: ByteCount::new(0) });
        node.run();
        node.tell(Input::MemoryLimit { bytes: ByteCount::new(4 * CHUNK_BYTES) });
        let op = wanting(node.lease_read(&[1]), HBM);
        let request = node.ask(2, op);
        node.end(|effect| matches!(effect, Effect::CreateChunk { .. }), Ok(Done::ChunkCreated));
        node.end(|effect| matches!(effect, Effect::Read { .. }), Err(fault));
        assert!(node.reply(request).is_none(), "{fault:?}: there is another way");
        node.run();
        let (_, grants) = leased(node.reply(request).expect("answered"));
        assert_eq!(memories(&grants), [Some(HBM)], "{fault:?}");
        assert!(node.tiers(1).pinned && node.tiers(1).nvme, "{fault:?}: {:?}", node.tiers(1));
    }
}

/// A copy to the device fails: the lease is answered with the copy in Pinned, and nothing of the frame stays taken.
#[test]
fn a_failed_copy_is_granted_where_it_is() {
    let mut node = node(HbmReads::ThroughPinned);
    node.write(1, &[1]);
    let (lease, _) = node.read_in(2, &[1], Memory::Pinned);
    node.call(2, Request::Release { leases: vec![lease] });
    let op = wanting(node.lease_read(&[1]), HBM);
    let request = node.ask(2, op);
    node.end(|effect| matches!(effect, Effect::CreateChunk { .. }), Ok(Done::ChunkCreated));
    node.end(is_copy, Err(Fault::Device));
    let (_, grants) = leased(node.reply(request).expect("answered"));
    assert_eq!(memories(&grants), [Some(Memory::Pinned)]);
    let view = node.core.tier_views().hbm[0];
    assert_eq!((view.memory.frames.filling, view.faults), (0, 1));
    assert!(node.tiers(1).pinned, "a broken link is not the block's fault");
}

/// A lost device: what it held is a miss at once, a lease on it sees its fence move, who waits is answered, and its
/// chunks go when what is in flight on them has ended, not before.
#[test]
fn a_lost_device_is_misses_and_its_frames_wait_for_operations() {
    let mut node = node(HbmReads::ThroughPinned);
    node.write_hbm(1, &[1, 2]);
    let (_, grants) = node.read_in(2, &[1], HBM);
    let Grant::Granted { frame, fence, .. } = grants[0] else { panic!("granted") };
    // A copy out is under way.
    let op = wanting(node.lease_read(&[2]), Memory::Pinned);
    let request = node.ask(2, op);
    if !node.effects.iter().any(is_copy) {
        node.end(|effect| matches!(effect, Effect::CreateChunk { .. }), Ok(Done::ChunkCreated));
    }
    node.effects.retain(|effect| !matches!(effect, Effect::SetFences { .. }));
    node.tell(Input::GpuState { gpu: GPU, usable: false });
    let moved = node.effects.iter().any(|effect| {
        matches!(effect, Effect::SetFences { fences } if fences.iter().any(|(at, now)| *at == frame && *now > fence))
    });
    assert!(moved, "a reader sees that the block is gone");
    assert_eq!((node.tiers(1), node.tiers(2)), (Residence::default(), Residence::default()));
    assert!(node.reply(request).is_some(), "nobody waits for a lost device");
    assert!(
        !node.effects.iter().any(|effect| matches!(effect, Effect::DropChunk { .. })),
        "its frame is read"
    );
    node.end(is_copy, Err(Fault::Device));
    node.run();
    let view = node.core.tier_views().hbm[0];
    assert_eq!((view.memory.chunks, view.usable), (0, false));
    let op = wanting(node.lease_write(&[3]), HBM);
    let (_, grants) = leased(node.serve(1, op));
    assert_eq!(memories(&grants), [Some(Memory::Pinned)], "a lost device takes nothing");
    node.tell(Input::GpuState { gpu: GPU, usable: true });
    node.write_hbm(1, &[4]);
}

/// A device is out of memory although its configuration promised it: who writes there must not wait until that has
/// changed, and what it then seals is in Pinned, where its frames are.
#[test]
fn what_a_device_has_no_memory_for_is_written_in_pinned() {
    let mut node = node(HbmReads::ThroughPinned);
    let op = wanting(node.lease_write(&[1]), HBM);
    let request = node.ask(1, op);
    node.end(|effect| matches!(effect, Effect::CreateChunk { .. }), Err(Fault::NoMemory));
    node.run();
    let (lease, grants) = leased(node.reply(request).expect("answered at once"));
    assert_eq!(memories(&grants), [Some(Memory::Pinned)]);
    let op = node.seal(lease, &[(0, 1)], Durability::Readable);
    assert_eq!(node.call(1, op), Reply::Sealed { outcomes: vec![SealOutcome::Sealed] });
    assert!(node.tiers(1).pinned && node.tiers(1).hbm.is_empty(), "{:?}", node.tiers(1));
}

/// The bytes of a block in Pinned were not compared yet when its copy to the device fails: they must be compared there
/// and granted, not missed.
#[test]
fn a_failed_copy_of_an_unread_block_is_compared_where_it_is() {
    let mut node = node(HbmReads::ThroughPinned);
    node.write(1, &[1]);
    let op = wanting(node.lease_read(&[1]), HBM);
    let request = node.ask(2, op);
    node.end(|effect| matches!(effect, Effect::CreateChunk { .. }), Ok(Done::ChunkCreated));
    node.end(is_copy, Err(Fault::Device));
    assert!(node.reply(request).is_none(), "its bytes are another session's word");
    node.run();
    let (_, grants) = leased(node.reply(request).expect("answered"));
    assert_eq!(memories(&grants), [Some(Memory::Pinned)]);
}

/// The engine needs memory: chunks are given back down to the lower bound, blocks that only the device held go to
/// Pinned first, leases get the time of a recall, and the memory is the daemon's again when the session ends.
#[test]
fn an_engine_gets_memory_back() {
    let mut node = node(HbmReads::ThroughPinned);
    node.write_hbm(1, &[1]);
    let windows = node.core.tier_views().hbm[0].memory.windows;
    assert_eq!(windows, 1);
    node.tell(Input::SessionClosed { session: SessionId::new(1) });
    node.run();
    assert!(node.tiers(1).pinned, "the block is moved out of its dead writer's window");
    let (lease, grants) = node.read_in(2, &[1], HBM);
    assert_eq!(memories(&grants), [Some(HBM)]);
    node.open(3, 1, Locality::Local);
    let answer_by = Now::from_micros(node.now + 60_000_000);
    let bytes = ByteCount::new(4 * CHUNK_BYTES);
    let request = node.ask(3, Request::Shrink { gpu: GPU, bytes, answer_by });
    node.run();
    let free = ByteCount::new(3 * CHUNK_BYTES);
    assert_eq!(node.reply(request), Some(Reply::Shrunk { free }), "the lower bound is kept");
    let second = Memory::Hbm(GpuId::new(1));
    let (other, grants) = node.read_in(2, &[1], second);
    assert_eq!(memories(&grants), [Some(second)]);
    node.call(2, Request::Release { leases: vec![lease] });
    let request = node.ask(3, Request::Shrink { gpu: GpuId::new(1), bytes, answer_by });
    node.run();
    assert!(node.reply(request).is_none(), "a leased chunk stays for the time of a recall");
    node.after(5001);
    node.run();
    let free = ByteCount::new(2 * CHUNK_BYTES);
    assert_eq!(node.reply(request), Some(Reply::Shrunk { free }), "and goes then, lease or not");
    node.call(2, Request::Release { leases: vec![other] });
    node.tell(Input::SessionClosed { session: SessionId::new(3) });
    assert_eq!(node.core.tier_views().hbm[0].free, ByteCount::new(0));
}

/// Nothing protects device memory from a process that maps it: sessions that are kept apart, and such as map
/// nothing, get their blocks in Pinned, and no chunk of a device to map. A device that is not there is refused.
#[test]
fn only_trusted_sessions_map_a_device() {
    let mut node = node(HbmReads::ThroughPinned);
    node.write_hbm(1, &[1]);
    node.open(3, 1, Locality::Isolated);
    node.open(4, 1, Locality::Streamed);
    for session in [3, 4] {
        let (_, grants) = node.read_in(session, &[1], HBM);
        assert_eq!(memories(&grants), [Some(Memory::Pinned)]);
    }
    let (_, grants) = node.read_in(2, &[1], HBM);
    let Grant::Granted { frame, .. } = grants[0] else { panic!("granted") };
    let map = Request::MapChunk { chunk: frame.chunk };
    assert!(matches!(node.call(2, map.clone()), Reply::MayMap { .. }));
    assert!(matches!(node.call(3, map), Reply::Refused(Refusal::NotYourChunk { .. })));
    let nowhere = GpuId::new(7);
    let op = wanting(node.lease_read(&[1]), Memory::Hbm(nowhere));
    assert_eq!(node.call(2, op), Reply::Refused(Refusal::UnknownGpu { gpu: nowhere }));
}

/// A prefix is longer than the device: parents stay while their children are there, and what only the device held
/// is in Pinned when it goes.
#[test]
fn a_full_device_evicts_leaves_and_loses_nothing() {
    let mut node = Node::of(Config { hbm: vec![gpu(1, 0, HbmReads::ThroughPinned)], ..config() });
    // A frame is three pages: 170 fit into the chunk.
    let all: Vec<u8> = (1..=200).collect();
    for part in all.chunks(40) {
        node.write(1, part);
    }
    node.after(2000);
    node.run();
    for part in all.chunks(40) {
        let (lease, grants) = node.read_in(2, part, HBM);
        assert!(memories(&grants).iter().all(Option::is_some), "{grants:?}");
        node.call(2, Request::Release { leases: vec![lease] });
    }
    let view = node.core.tier_views().hbm[0];
    assert!(node.core.counters().evictions_hbm > 0, "{view:?}");
    assert!(all.iter().all(|&n| node.tiers(n).is_in_memory()), "each block is somewhere");
}

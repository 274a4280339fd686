//! The life of a block through the public surface, one step at a time: each
//! transition, and each bad input that the core decides.

mod ahead;
mod bursts;
mod clears;
mod curves;
mod demotion;
mod full_device;
mod hbm;
mod kept;
mod limits;
mod reads;
mod resumed;
mod retained;

use terrace_core::*;

const BLOCK_BYTES: u64 = 8192;
const CHUNK_BYTES: u64 = 2 * MIB;

fn config() -> Config {
    Config {
        incarnation: 7,
        pinned_bytes: ByteCount::new(4 * CHUNK_BYTES),
        chunk_bytes: ByteCount::new(CHUNK_BYTES),
        device_slots: vec![4],
        hbm: Vec::new(),
        persist_delay: Micros::from_millis(1000),
        window_idle: Micros::from_millis(5000),
        window_recall_max: Micros::from_millis(5000),
        chunks_ready_min: 1,
        frames_ready_min: 0,
        policy: Policy::Lru,
        admission: Admission::All,
        limits: Limits {
            blocks: 10_000,
            spaces: 8,
            sessions: 8,
            leases_per_session: 64,
            blocks_per_request: 64,
            leases_per_tenant: 64,
            leased_bytes_per_tenant: ByteCount::new(64 * MIB),
            leased_bytes_per_session: ByteCount::new(64 * MIB),
            lease_hold_max: Micros::from_millis(600_000),
            requests_waiting_per_session: 64,
            requests_waiting_per_tenant: 64,
            lease_ttl_max: Micros::from_millis(60_000),
            lease_ttl_default: Micros::from_millis(10_000),
            requests_waiting: 64,
            reads_in_flight: 16,
            writes_in_flight: 16,
            replies_remembered: 32,
            retained_percent: 50,
        },
    }
}

fn tenant(n: u8) -> TenantId {
    TenantId::from_bytes([n; 16])
}

fn space(n: u8) -> SpaceId {
    SpaceId::from_bytes([n; 16])
}

fn block(n: u8) -> BlockId {
    BlockId::from_bytes([n; 16])
}

/// A core, its clock, and a shell that does nothing by itself.
struct Node {
    core: Core,
    now: u64,
    request: u64,
    repeat: u64,
    effects: Vec<Effect>,
}

impl Node {
    fn new() -> Self {
        Self::of(config())
    }

    fn with(limits: Limits) -> Self {
        Self::of(Config { limits, ..config() })
    }

    fn of(config: Config) -> Self {
        let mut node = Self { core: Core::new(config), now: 1, request: 0, repeat: 0, effects: Vec::new() };
        node.tell(Input::SpaceKnown {
            space: space(1),
            tenant: tenant(1),
            block_bytes: ByteCount::new(BLOCK_BYTES),
            block_tokens: TokenCount::new(16),
            generation: 0,
        });
        node.open(1, 1, Locality::Local);
        node.open(2, 1, Locality::Local);
        node
    }

    fn open(&mut self, session: u64, of: u8, locality: Locality) {
        self.tell(Input::SessionOpened { session: SessionId::new(session), tenant: tenant(of), locality });
    }

    fn tell(&mut self, input: Input) {
        self.core.handle(Now::from_micros(self.now), input);
        while let Some(effect) = self.core.poll_effect() {
            self.effects.push(effect);
        }
        self.core.check();
    }

    fn after(&mut self, millis: u64) {
        self.now += millis * 1000;
        self.tell(Input::Tick);
    }

    fn ask(&mut self, session: u64, op: Request) -> RequestId {
        self.request += 1;
        let request = RequestId::new(self.request);
        self.tell(Input::Request { session: SessionId::new(session), request, op });
        request
    }

    fn reply(&mut self, wanted: RequestId) -> Option<Reply> {
        self.effects.iter().find_map(|effect| match effect {
            Effect::Reply { request, reply, .. } if *request == wanted => Some(Reply::clone(reply)),
            _ => None,
        })
    }

    /// Asks and takes the answer that comes at once.
    fn call(&mut self, session: u64, op: Request) -> Reply {
        let request = self.ask(session, op);
        self.reply(request).expect("answered at once")
    }

    /// Asks, and completes every operation until the answer is there.
    fn serve(&mut self, session: u64, op: Request) -> Reply {
        let request = self.ask(session, op);
        self.run();
        self.reply(request).expect("answered when nothing is in flight")
    }

    fn op_of(effect: &Effect) -> Option<OpId> {
        match effect {
            Effect::CreateChunk { op, .. }
            | Effect::CloseWindow { op, .. }
            | Effect::DropChunk { op, .. }
            | Effect::Read { op, .. }
            | Effect::Write { op, .. }
            | Effect::CarveSlot { op, .. }
            | Effect::Commit { op, .. }
            | Effect::ClearSpace { op, .. }
            | Effect::Verify { op, .. }
            | Effect::Copy { op, .. }
            | Effect::Scrub { op, .. } => Some(*op),
            _ => None,
        }
    }

    /// Completes everything in flight well.
    fn run(&mut self) {
        self.run_with(|_| Ok(Done::Plain));
    }

    fn run_with(&mut self, outcome: impl Fn(&Effect) -> Result<Done, Fault>) {
        while let Some(place) = self.effects.iter().position(|effect| Self::op_of(effect).is_some()) {
            let effect = self.effects.remove(place);
            let op = Self::op_of(&effect).expect("it has one");
            self.tell(Input::OpDone { op, outcome: outcome(&effect) });
        }
    }

    fn lease_write(&mut self, blocks: &[u8]) -> Request {
        self.repeat += 1;
        Request::LeaseWrite {
            repeat: Some(self.repeat),
            space: space(1),
            blocks: blocks.iter().map(|&n| block(n)).collect(),
            parent: None,
            ttl: None,
            want: Memory::Pinned,
        }
    }

    fn lease_read(&mut self, blocks: &[u8]) -> Request {
        self.repeat += 1;
        Request::LeaseRead {
            repeat: Some(self.repeat),
            blocks: blocks.iter().map(|&n| block(n)).collect(),
            ttl: None,
            answer_by: Now::from_micros(self.now + 1_000_000),
            purpose: Purpose::Prefill,
            want: Memory::Pinned,
        }
    }

    fn seal(&mut self, lease: LeaseId, parts: &[(u32, u64)], durability: Durability) -> Request {
        self.repeat += 1;
        let blocks = parts
            .iter()
            .map(|&(index, sum)| (index, ByteCount::new(BLOCK_BYTES), Checksum::new(sum)))
            .collect();
        Request::Seal { repeat: Some(self.repeat), lease, blocks, durability }
    }

    /// Writes and seals blocks whose checksum is their number; gives the lease back.
    fn write(&mut self, session: u64, blocks: &[u8]) {
        let op = self.lease_write(blocks);
        let (lease, _) = leased(self.serve(session, op));
        let parts: Vec<(u32, u64)> =
            (0u32..).zip(blocks).map(|(position, &n)| (position, u64::from(n))).collect();
        let op = self.seal(lease, &parts, Durability::Readable);
        let outcomes = vec![SealOutcome::Sealed; blocks.len()];
        assert_eq!(self.call(session, op), Reply::Sealed { outcomes });
        assert_eq!(
            self.call(session, Request::Release { leases: vec![lease] }),
            Reply::Released { count: 1 }
        );
    }
}

fn leased(reply: Reply) -> (LeaseId, Vec<Grant>) {
    match reply {
        Reply::Leased { lease: Some(lease), blocks, .. } => (lease, blocks),
        other => panic!("expected a lease, found {other:?}"),
    }
}

/// The main path could break anywhere: reserve, seal, read by the writer, read
/// by a foreigner after verification, persist, evict by restart, promote.
#[test]
fn a_block_is_written_read_persisted_and_restored() {
    let mut node = Node::new();
    node.write(1, &[1, 2, 3]);
    let op = node.lease_read(&[1, 2, 3]);
    let (own, grants) = leased(node.call(1, op));
    assert!(grants.iter().all(|grant| matches!(grant, Grant::Granted { .. })));
    let op = node.lease_read(&[1]);
    let request = node.ask(2, op);
    assert!(node.reply(request).is_none(), "a foreign session's first use is verified");
    node.run();
    let (foreign, _) = leased(node.reply(request).expect("verified"));
    assert_eq!(
        node.call(1, Request::Release { leases: vec![foreign] }),
        Reply::Refused(Refusal::NotYourLease { lease: foreign })
    );
    assert_eq!(node.core.unpersisted(), ByteCount::new(3 * BLOCK_BYTES));
    node.after(1001);
    node.run();
    assert_eq!(node.core.unpersisted(), ByteCount::new(0));
    assert_eq!(node.call(1, Request::Release { leases: vec![own] }), Reply::Released { count: 1 });
    let found: Vec<FoundBlock> = (1..=3u8)
        .map(|n| {
            let view = node.core.stat(block(n)).expect("known");
            let header = view.header.expect("sealed");
            FoundBlock {
                block: block(n),
                space: space(1),
                parent: header.parent,
                length: header.length,
                checksum: header.checksum,
                frame: view.disk.expect("durable").0,
                write_sequence: header.write_sequence,
                stats: UseStats::default(),
            }
        })
        .collect();
    let mut node = Node::new();
    node.tell(Input::BlocksFound { blocks: found });
    let op = node.lease_read(&[1, 2, 3]);
    let (_, grants) = leased(node.serve(1, op));
    assert!(
        grants.iter().all(|grant| matches!(grant, Grant::Granted { checksum: Some(_), .. })),
        "{grants:?}"
    );
    assert_eq!(node.core.counters().promotions, 3);
}

/// A client could name more than there is, or what is not its own.
#[test]
fn requests_that_can_never_be_granted_are_refused() {
    let mut node = Node::new();
    node.open(3, 2, Locality::Local);
    let op = node.lease_write(&[1]);
    let foreign_space = node.call(3, op);
    assert_eq!(
        foreign_space,
        Reply::Refused(Refusal::UnknownSpace),
        "a foreign space is like an unknown one"
    );
    let unknown = Request::LeaseWrite {
        repeat: Some(900),
        space: space(9),
        blocks: vec![block(1)],
        parent: None,
        ttl: None,
        want: Memory::Pinned,
    };
    assert_eq!(node.call(1, unknown), Reply::Refused(Refusal::UnknownSpace));
    let many = Request::Touch { blocks: vec![block(1); 65], reads: Vec::new() };
    assert_eq!(node.call(1, many), Reply::Refused(Refusal::TooManyBlocks { found: 65, limit: 64 }));
    assert_eq!(node.call(99, Request::Flush), Reply::Refused(Refusal::UnknownSession));
    let early = LeaseId::new(6 << 32 | 1);
    assert_eq!(
        node.call(1, Request::Renew { lease: early, ttl: None }),
        Reply::Refused(Refusal::EarlierIncarnation { lease: early })
    );
    let never = LeaseId::new(7 << 32 | 77);
    assert_eq!(
        node.call(1, Request::Release { leases: vec![never] }),
        Reply::Refused(Refusal::NotYourLease { lease: never })
    );
}

/// A seal could be of the wrong lease, place or length: then nothing may change.
#[test]
fn bad_seals_change_nothing() {
    let mut node = Node::new();
    let op = node.lease_write(&[1, 2]);
    let (lease, _) = leased(node.serve(1, op));
    let foreign = node.seal(lease, &[(0, 1)], Durability::Readable);
    assert_eq!(node.call(2, foreign), Reply::Refused(Refusal::NotYourLease { lease }));
    let outside = node.seal(lease, &[(0, 1), (2, 1)], Durability::Readable);
    assert_eq!(node.call(1, outside), Reply::Refused(Refusal::BadIndex { index: 2, blocks: 2 }));
    let short = Request::Seal {
        repeat: Some(901),
        lease,
        blocks: vec![(0, ByteCount::new(BLOCK_BYTES - 1), Checksum::new(1))],
        durability: Durability::Readable,
    };
    let wrong = Refusal::WrongLength { index: 0, found: BLOCK_BYTES - 1, expected: BLOCK_BYTES };
    assert_eq!(node.call(1, short), Reply::Refused(wrong));
    assert_eq!(node.core.tier_views().pinned.frames.sealed, 0);
    let read = node.lease_read(&[1]);
    let filling = Reply::Leased {
        lease: None,
        ttl: Micros::from_millis(10_000),
        blocks: vec![Grant::Missing(MissReason::Filling)],
    };
    assert_eq!(node.call(2, read), filling);
}

/// Two writers of one block: the first seal wins, the same bytes are a
/// repetition, other bytes a counted conflict; no frame may leak.
#[test]
fn the_first_seal_of_a_block_wins() {
    let mut node = Node::new();
    let mut writers = Vec::new();
    for session in [1, 2, 2] {
        let op = node.lease_write(&[1]);
        writers.push((session, leased(node.serve(session, op)).0));
    }
    let expected = [(5, SealOutcome::Sealed), (5, SealOutcome::Already), (6, SealOutcome::Conflict)];
    for ((session, lease), (sum, outcome)) in writers.iter().zip(expected) {
        let op = node.seal(*lease, &[(0, sum)], Durability::Readable);
        assert_eq!(node.call(*session, op), Reply::Sealed { outcomes: vec![outcome] });
    }
    assert_eq!(node.core.counters().seal_conflicts, 1);
    let frames = node.core.tier_views().pinned.frames;
    assert_eq!((frames.filling, frames.sealed), (0, 1));
    let op = node.lease_write(&[1]);
    assert!(
        matches!(node.call(1, op), Reply::Leased { lease: None, blocks, .. } if blocks == [Grant::Exists])
    );
}

/// A process killed in the middle of a write may leave a child that goes on
/// writing: its window must be replaced, what it sealed must be moved out.
#[test]
fn a_dead_writers_window_is_replaced_and_its_blocks_survive() {
    let mut node = Node::new();
    let op = node.lease_write(&[1, 2]);
    let (lease, _) = leased(node.serve(1, op));
    let op = node.seal(lease, &[(0, 1)], Durability::Readable);
    node.call(1, op);
    let window = node.core.stat(block(1)).and_then(|view| view.frame).expect("sealed").chunk;
    node.tell(Input::SessionClosed { session: SessionId::new(1) });
    assert_eq!(node.core.lease_count(), 0);
    node.run();
    let view = node.core.stat(block(1)).expect("it was sealed");
    assert!(view.verified, "it was compared when it was moved");
    assert_ne!(view.frame.expect("it is resident").chunk, window);
    assert!(node.core.chunk_tenant(window).is_none(), "its window is gone");
    assert!(node.core.stat(block(2)).is_none(), "what was half written is forgotten");
    assert_eq!(node.core.tier_views().pinned.frames.quarantined, 0);
}

/// Bytes that do not match what their writer sealed must not reach anybody else.
#[test]
fn a_seal_with_a_wrong_checksum_is_rejected_at_first_foreign_use() {
    let mut node = Node::new();
    node.write(1, &[1]);
    let op = node.lease_read(&[1]);
    let request = node.ask(2, op);
    node.run_with(|effect| match effect {
        Effect::Verify { .. } => Err(Fault::Checksum),
        _ => Ok(Done::Plain),
    });
    let reply = node.reply(request).expect("answered");
    assert!(
        matches!(reply, Reply::Leased { lease: None, blocks, .. } if blocks == [Grant::Missing(MissReason::Checksum)])
    );
    let told = |effect: &Effect| {
        matches!(effect, Effect::Notify { session, notice: Notice::SealRejected { block: of, .. } }
            if *session == SessionId::new(1) && *of == block(1))
    };
    assert!(node.effects.iter().any(told), "its writer is told");
    assert_eq!(node.core.counters().checksum_failures, 1);
}

/// A full device: a durable seal must say so, and the block stays readable.
#[test]
fn a_full_disk_makes_a_seal_not_durable() {
    let mut node = Node::new();
    let op = node.lease_write(&[1]);
    let (lease, _) = leased(node.serve(1, op));
    let op = node.seal(lease, &[(0, 1)], Durability::Durable);
    let request = node.ask(1, op);
    node.run_with(|effect| match effect {
        Effect::Write { .. } => Err(Fault::NoSpace),
        _ => Ok(Done::Plain),
    });
    assert_eq!(node.reply(request), Some(Reply::Sealed { outcomes: vec![SealOutcome::NotDurable] }));
    assert!(node.core.stat(block(1)).is_some_and(|view| view.tiers.pinned && !view.tiers.nvme));
    node.after(2000);
    node.run();
    assert!(node.core.stat(block(1)).is_some_and(|view| view.tiers.nvme), "it is tried again");
}

/// A damaged data file: the lease must answer a miss, the frame must never be used again.
#[test]
fn a_damaged_disk_copy_is_a_miss_and_its_frame_is_quarantined() {
    let mut node = Node::new();
    let frame = DiskFrame { device: DeviceId::new(0), slot: 0, index: 3 };
    let found = FoundBlock {
        block: block(1),
        space: space(1),
        parent: None,
        length: ByteCount::new(BLOCK_BYTES),
        checksum: Checksum::new(1),
        frame,
        write_sequence: 9,
        stats: UseStats::default(),
    };
    node.tell(Input::BlocksFound { blocks: vec![found] });
    let op = node.lease_read(&[1]);
    let request = node.ask(1, op);
    node.run_with(|effect| match effect {
        Effect::Read { .. } => Err(Fault::Checksum),
        _ => Ok(Done::Plain),
    });
    let reply = node.reply(request).expect("answered");
    assert!(
        matches!(reply, Reply::Leased { lease: None, blocks, .. } if blocks == [Grant::Missing(MissReason::Checksum)])
    );
    let tiers = node.core.tier_views();
    assert_eq!((tiers.devices[0].frames.quarantined, tiers.pinned.frames.filling), (1, 0));
}

/// A deadline ends the wait, not the read: the frame must stay Filling until the device is done.
#[test]
fn a_late_read_keeps_its_frame() {
    let mut node = Node::new();
    node.write(1, &[1]);
    node.after(1001);
    node.run();
    let view = node.core.stat(block(1)).expect("it is there");
    let (header, frame) = (view.header.expect("sealed"), view.disk.expect("durable").0);
    let found = FoundBlock {
        block: block(1),
        space: space(1),
        parent: None,
        length: header.length,
        checksum: header.checksum,
        frame,
        write_sequence: header.write_sequence,
        stats: UseStats::default(),
    };
    let mut node = Node::new();
    node.tell(Input::BlocksFound { blocks: vec![found] });
    let op = node.lease_read(&[1]);
    let request = node.ask(1, op);
    let place = node
        .effects
        .iter()
        .position(|effect| matches!(effect, Effect::CreateChunk { .. }))
        .expect("asked for");
    let effect = node.effects.remove(place);
    node.tell(Input::OpDone {
        op: Node::op_of(&effect).expect("it has one"),
        outcome: Ok(Done::ChunkCreated),
    });
    node.after(1001);
    assert!(
        matches!(node.reply(request), Some(Reply::Leased { blocks, .. }) if blocks == [Grant::Promoting])
    );
    assert_eq!(node.core.tier_views().pinned.frames.filling, 1);
    node.run();
    assert_eq!(node.core.tier_views().pinned.frames.filling, 0);
    assert!(node.core.stat(block(1)).is_some_and(|view| view.tiers.pinned), "it arrived for the next one");
}

/// A space whose frames exceed a chunk could divide by zero or wait for ever.
#[test]
fn a_block_larger_than_a_chunk_is_refused() {
    let mut node = Node::new();
    let block_bytes = ByteCount::new(CHUNK_BYTES);
    node.tell(Input::SpaceKnown {
        space: space(5),
        tenant: tenant(1),
        block_bytes,
        block_tokens: TokenCount::new(16),
        generation: 0,
    });
    let op = Request::LeaseWrite {
        repeat: Some(902),
        space: space(5),
        blocks: vec![block(1)],
        parent: None,
        ttl: None,
        want: Memory::Pinned,
    };
    assert!(matches!(node.call(1, op), Reply::Refused(Refusal::BlockTooLarge { .. })));
}

/// Clear while a writer fills: its seal must be refused, and nothing of before may be served.
#[test]
fn a_cleared_space_is_empty_and_takes_no_old_seals() {
    let mut node = Node::new();
    node.write(1, &[1]);
    let op = node.lease_write(&[2]);
    let (lease, _) = leased(node.serve(1, op));
    let cleared = node.serve(2, Request::Clear { repeat: Some(903), space: space(1) });
    assert_eq!(cleared, Reply::Cleared { generation: 1, blocks: 1 });
    let op = node.seal(lease, &[(0, 2)], Durability::Readable);
    assert_eq!(node.call(1, op), Reply::Refused(Refusal::Cleared));
    assert_eq!(node.call(1, Request::Release { leases: vec![lease] }), Reply::Released { count: 1 });
    let matched = node.call(1, Request::Match { blocks: vec![block(1)], mode: MatchMode::Set });
    assert_eq!(matched, Reply::Matched { blocks: vec![None] });
    assert_eq!(node.core.tier_views().pinned.frames.filling, 0);
}

/// A window is adopted whole; before that nothing in it may be being filled.
#[test]
fn a_window_is_adopted_when_it_is_handed_back() {
    let mut node = Node::new();
    let op = node.lease_write(&[1, 2]);
    let (lease, grants) = leased(node.serve(1, op));
    let Grant::Granted { frame, .. } = grants[0] else { panic!("granted") };
    let chunk = frame.chunk;
    assert_eq!(node.call(1, Request::MapChunk { chunk }), Reply::MayMap { chunk, access: MapAccess::Write });
    assert_eq!(node.call(2, Request::MapChunk { chunk }), Reply::MayMap { chunk, access: MapAccess::Read });
    assert_eq!(node.call(1, Request::ReturnWindow { chunk }), Reply::Refused(Refusal::WindowBusy { chunk }));
    assert_eq!(
        node.call(2, Request::ReturnWindow { chunk }),
        Reply::Refused(Refusal::NotYourChunk { chunk })
    );
    let op = node.seal(lease, &[(0, 1), (1, 2)], Durability::Readable);
    node.call(1, op);
    node.after(5001);
    let recalled = Notice::WindowRecalled { chunk };
    assert!(
        node.effects
            .iter()
            .any(|effect| matches!(effect, Effect::Notify { notice, .. } if *notice == recalled))
    );
    assert_eq!(node.call(1, Request::ReturnWindow { chunk }), Reply::WindowReturned { blocks: 2 });
    assert_eq!(node.call(1, Request::MapChunk { chunk }), Reply::MayMap { chunk, access: MapAccess::Read });
    assert_eq!(
        node.call(1, Request::ReturnWindow { chunk }),
        Reply::Refused(Refusal::NotYourChunk { chunk })
    );
    assert_eq!(node.core.counters().windows_adopted, 0, "adopted before anybody looked who can write");
    node.run();
    assert_eq!((node.core.counters().windows_adopted, node.core.counters().windows_replaced), (1, 0));
}

/// A client hands its window back and keeps a way to write into it: the window must not become part of the pool, and
/// what was sealed in it must move to other memory.
#[test]
fn a_window_that_can_still_be_written_is_replaced() {
    let mut node = Node::new();
    let op = node.lease_write(&[1, 2]);
    let (lease, grants) = leased(node.serve(1, op));
    let Grant::Granted { frame, .. } = grants[0] else { panic!("granted") };
    let op = node.seal(lease, &[(0, 1), (1, 2)], Durability::Readable);
    node.call(1, op);
    node.call(1, Request::Release { leases: vec![lease] });
    let chunk = frame.chunk;
    assert_eq!(node.call(1, Request::ReturnWindow { chunk }), Reply::WindowReturned { blocks: 2 });
    node.run_with(|effect| match effect {
        Effect::CloseWindow { .. } => Err(Fault::StillMapped),
        _ => Ok(Done::Plain),
    });
    assert_eq!((node.core.counters().windows_adopted, node.core.counters().windows_replaced), (0, 1));
    assert_eq!(node.call(1, Request::MapChunk { chunk }), Reply::Refused(Refusal::ChunkGone { chunk }));
    let matched = node.call(1, Request::Match { blocks: vec![block(1), block(2)], mode: MatchMode::Set });
    let Reply::Matched { blocks } = matched else { panic!("matched") };
    assert!(blocks.iter().all(|block| block.is_some_and(|place| place.pinned)), "{blocks:?}");
}

/// A byte that rots is found only by who looks: a pass must read every durable block once, at its rate,
/// drop the damaged one, keep the one that cannot be read, and write the dropped one again from memory.
#[test]
fn a_scrub_reads_everything_once_and_drops_what_rotted() {
    let mut node = Node::new();
    node.write(1, &[1, 2, 3]);
    node.after(1001);
    node.run();
    let places = |node: &Node| [1, 2, 3].map(|n| node.core.stat(block(n)).expect("known").disk);
    let before = places(&node);
    assert!(before.iter().all(Option::is_some));
    // One frame a second.
    let bytes_per_second = ByteCount::new(frame_bytes(ByteCount::new(BLOCK_BYTES)).expect("small").get());
    node.tell(Input::Scrub(Scrub::Start { bytes_per_second }));
    let mut read = Vec::new();
    for _ in 0..3 {
        assert!(node.effects.iter().filter(|effect| matches!(effect, Effect::Scrub { .. })).count() <= 1);
        node.run_with(|effect| match effect {
            Effect::Scrub { expect, .. } if expect.block == block(2) => Err(Fault::Checksum),
            Effect::Scrub { expect, .. } if expect.block == block(3) => Err(Fault::Device),
            _ => Ok(Done::Plain),
        });
        let counters = *node.core.counters();
        read.push(counters.scrub_blocks + counters.scrub_damaged + counters.scrub_unreadable);
        node.after(1000);
    }
    for _ in 0..2 {
        node.run();
        node.after(1000);
    }
    assert_eq!(read, [1, 2, 3], "one frame a second");
    let counters = *node.core.counters();
    let all = (counters.scrub_blocks, counters.scrub_damaged, counters.scrub_unreadable);
    assert_eq!(all, (2, 1, 1), "the new copy of the damaged one lies behind it and is read as well");
    assert_eq!((counters.scrub_passes, node.core.scrub_view().pass), (1, None));
    let after = places(&node);
    assert_eq!((after[0], after[2]), (before[0], before[2]), "what was not damaged stays");
    assert!(after[1].is_some() && after[1] != before[1], "the damaged frame is not used again: {after:?}");
}

/// A pass must leave alone what is off limits: nothing is read at a rate of zero, from a device that
/// is gone, from slots that are not scanned, and after it was stopped.
#[test]
fn a_scrub_reads_nothing_that_is_off_limits() {
    let mut node = Node::new();
    node.write(1, &[1, 2, 3]);
    node.after(1001);
    node.run();
    let scrubs =
        |node: &Node| node.effects.iter().filter(|effect| matches!(effect, Effect::Scrub { .. })).count();
    let start = |bytes| Input::Scrub(Scrub::Start { bytes_per_second: ByteCount::new(bytes) });
    node.tell(start(0));
    assert_eq!(scrubs(&node), 0);
    node.tell(Input::DeviceState { device: DeviceId::new(0), usable: false });
    node.tell(start(1 << 30));
    assert_eq!((scrubs(&node), node.core.counters().scrub_passes), (0, 1));
    node.tell(Input::DeviceState { device: DeviceId::new(0), usable: true });
    node.tell(Input::SlotsUnscanned { device: DeviceId::new(0), slots: (0..8).collect() });
    node.tell(start(1 << 30));
    assert_eq!((scrubs(&node), node.core.counters().scrub_passes), (0, 2));
    node.tell(Input::SlotsScanned { device: DeviceId::new(0), slots: (0..8).collect() });
    node.tell(start(1));
    assert_eq!(scrubs(&node), 1);
    node.tell(Input::Scrub(Scrub::Stop));
    node.after(100_000_000);
    assert_eq!(scrubs(&node), 1);
    // Passes of their own begin some time after the start, and once a day.
    node.run();
    node.tell(Input::Scrub(Scrub::Rate { bytes_per_second: ByteCount::new(1 << 30) }));
    assert_eq!(scrubs(&node), 0);
    assert!(node.core.scrub_view().next_pass_in.is_some());
    node.after(11 * 60 * 1000);
    assert!(scrubs(&node) > 0);
    node.run();
    node.after(1000);
    node.run();
    assert_eq!(node.core.scrub_view().pass, None);
    let passes = node.core.counters().scrub_passes;
    node.after(60 * 60 * 1000);
    node.run();
    assert_eq!(node.core.counters().scrub_passes, passes, "one a day");
    node.after(24 * 60 * 60 * 1000);
    node.run();
    node.after(1000);
    node.run();
    assert!(node.core.counters().scrub_passes > passes);
}

/// One of two devices never answers a scrub: it must not keep the other from being read, nor be sent more and
/// more; when it answers after all, the pass goes on and ends.
#[test]
fn a_device_that_hangs_holds_up_its_own_scrub_alone() {
    let mut node = Node::of(Config { device_slots: vec![4, 4], ..config() });
    let all: Vec<u8> = (1..=40).collect();
    node.write(1, &all);
    node.after(1001);
    node.run();
    let on = |node: &Node, device: u16| {
        let place = |&n: &u8| node.core.stat(block(n)).expect("known").disk.expect("durable").0.device;
        all.iter().filter(|n| place(n) == DeviceId::new(device)).count()
    };
    let (hung, well) = (on(&node, 0), on(&node, 1));
    assert!(hung > 8 && well > 8, "{hung} and {well} blocks");
    let of_device = |effect: &Effect, wanted: u16| match effect {
        Effect::Scrub { op, source, .. } if source.device == DeviceId::new(wanted) => Some(*op),
        _ => None,
    };
    node.tell(Input::Scrub(Scrub::Start { bytes_per_second: ByteCount::new(1 << 30) }));
    let mut read = 0;
    for _ in 0..200 {
        while let Some(op) = node.effects.iter().find_map(|effect| of_device(effect, 1)) {
            node.effects.retain(|effect| Node::op_of(effect) != Some(op));
            node.tell(Input::OpDone { op, outcome: Ok(Done::Plain) });
            read += 1;
        }
        node.after(1);
    }
    assert_eq!(read, well, "all of the device that answers");
    let sent = node.effects.iter().filter(|effect| of_device(effect, 0).is_some()).count();
    assert_eq!(sent, 4, "no more than its share waits at the other");
    let (_, behind, of) = node.core.scrub_view().pass.expect("it has not ended");
    assert!(behind >= 4 && behind < of, "{behind} of {of}");
    for _ in 0..20 {
        node.run();
        node.after(1);
    }
    let counters = node.core.counters();
    assert_eq!((counters.scrub_blocks, counters.scrub_passes), (40, 1));
}

/// A block that lies on device 0 only.
fn found(number: u8) -> FoundBlock {
    FoundBlock {
        block: block(number),
        space: space(1),
        parent: None,
        length: ByteCount::new(BLOCK_BYTES),
        checksum: Checksum::new(u64::from(number)),
        frame: DiskFrame { device: DeviceId::new(0), slot: 0, index: 2 + u32::from(number) },
        write_sequence: 9,
        stats: UseStats::default(),
    }
}

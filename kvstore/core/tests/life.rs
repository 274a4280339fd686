//! The life of a block through the public surface, one step at a time: each
//! transition, and each bad input that the core decides.

use terrace_core::*;

const BLOCK_BYTES: u64 = 8192;
const CHUNK_BYTES: u64 = 2 * MIB;

fn config() -> Config {
    Config {
        incarnation: 7,
        pinned_bytes: ByteCount::new(4 * CHUNK_BYTES),
        chunk_bytes: ByteCount::new(CHUNK_BYTES),
        device_slots: vec![4],
        persist_delay: Micros::from_millis(1000),
        window_idle: Micros::from_millis(5000),
        window_recall_max: Micros::from_millis(5000),
        chunks_ready_min: 1,
        limits: Limits {
            blocks: 10_000,
            spaces: 8,
            sessions: 8,
            leases_per_session: 64,
            blocks_per_request: 64,
            leased_bytes_per_tenant: ByteCount::new(64 * MIB),
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
        let mut node = Self { core: Core::new(config()), now: 1, request: 0, repeat: 0, effects: Vec::new() };
        node.tell(Input::SpaceKnown {
            space: space(1),
            tenant: tenant(1),
            block_bytes: ByteCount::new(BLOCK_BYTES),
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
            Effect::Reply { request, reply, .. } if *request == wanted => Some(reply.clone()),
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
            | Effect::DropChunk { op, .. }
            | Effect::Read { op, .. }
            | Effect::Write { op, .. }
            | Effect::CarveSlot { op, .. }
            | Effect::Commit { op, .. }
            | Effect::ClearSpace { op, .. }
            | Effect::Verify { op, .. }
            | Effect::Copy { op, .. } => Some(*op),
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
            repeat: self.repeat,
            space: space(1),
            blocks: blocks.iter().map(|&n| block(n)).collect(),
            parent: None,
            ttl: None,
        }
    }

    fn lease_read(&mut self, blocks: &[u8]) -> Request {
        self.repeat += 1;
        Request::LeaseRead {
            repeat: self.repeat,
            blocks: blocks.iter().map(|&n| block(n)).collect(),
            ttl: None,
            answer_by: Now::from_micros(self.now + 1_000_000),
        }
    }

    fn seal(&mut self, lease: LeaseId, parts: &[(u32, u64)], durability: Durability) -> Request {
        self.repeat += 1;
        let blocks = parts
            .iter()
            .map(|&(index, sum)| (index, ByteCount::new(BLOCK_BYTES), Checksum::new(sum)))
            .collect();
        Request::Seal { repeat: self.repeat, lease, blocks, durability }
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

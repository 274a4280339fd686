//! The model mix changes: memory and slots carved for one space must serve
//! another while both go on, without a write that is turned away.

use std::sync::Arc;

use terrace_core::*;

const CHUNK_BYTES: u64 = 2 * MIB;
const CHUNKS: u64 = 8;
const SLOTS: u32 = 16;
/// Payload of a block, by space: 30 and 10 frames a chunk, with an unequal rest.
const BLOCK_BYTES: [u64; 2] = [64 * KIB, 192 * KIB];
/// Blocks of one prompt.
const PROMPT: u32 = 5;
const SESSION: SessionId = SessionId::new(1);

struct Node {
    core: Core,
    now: u64,
    request: u64,
    chains: u64,
}

fn space(which: usize) -> SpaceId {
    SpaceId::from_bytes([u8::try_from(which).expect("there are two") + 1; 16])
}

/// Uniform bits from a chain's number and a block's place in it.
fn block(chain: u64, place: u32) -> BlockId {
    let mixed =
        u128::from(chain << 8 | u64::from(place)).wrapping_mul(0xda94_2042_e4dd_58b5_2b7e_1516_28ae_d2a7);
    BlockId::from_bytes((mixed ^ mixed >> 67).to_le_bytes())
}

impl Node {
    fn new(policy: Policy) -> Self {
        let config = Config {
            incarnation: 1,
            pinned_bytes: ByteCount::new(CHUNKS * CHUNK_BYTES),
            chunk_bytes: ByteCount::new(CHUNK_BYTES),
            device_slots: vec![SLOTS / 2; 2],
            hbm: Vec::new(),
            persist_delay: Micros::from_millis(100),
            window_idle: Micros::from_millis(1000),
            window_recall_max: Micros::from_millis(1000),
            chunks_ready_min: 0,
            frames_ready_min: 4,
            policy,
            admission: Admission::All,
            limits: Limits {
                blocks: 10_000,
                spaces: 4,
                sessions: 4,
                leases_per_session: 64,
                blocks_per_request: 64,
                leases_per_tenant: 64,
                leased_bytes_per_tenant: ByteCount::new(CHUNKS * CHUNK_BYTES),
                leased_bytes_per_session: ByteCount::new(CHUNKS * CHUNK_BYTES),
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
        };
        let mut node = Self { core: Core::new(config), now: 1, request: 0, chains: 0 };
        let tenant = TenantId::from_bytes([9; 16]);
        for (which, bytes) in BLOCK_BYTES.into_iter().enumerate() {
            let (block_bytes, block_tokens) = (ByteCount::new(bytes), TokenCount::new(16));
            node.tell(Input::SpaceKnown {
                space: space(which),
                tenant,
                block_bytes,
                block_tokens,
                generation: 0,
            });
        }
        node.tell(Input::SessionOpened { session: SESSION, tenant, locality: Locality::Streamed });
        node
    }

    /// Tells, and completes whatever it starts. The answer, if there was one.
    fn tell(&mut self, input: Input) -> Option<Reply> {
        let (mut inputs, mut reply) = (std::collections::VecDeque::from([input]), None);
        while let Some(input) = inputs.pop_front() {
            self.now += 10;
            self.core.handle(Now::from_micros(self.now), input);
            while let Some(effect) = self.core.poll_effect() {
                match effect {
                    Effect::Reply { reply: answer, .. } => reply = Some(Arc::unwrap_or_clone(answer)),
                    Effect::CreateChunk { op, .. } => {
                        inputs.push_back(Input::OpDone { op, outcome: Ok(Done::ChunkCreated) });
                    }
                    Effect::DropChunk { op, .. }
                    | Effect::Write { op, .. }
                    | Effect::Read { op, .. }
                    | Effect::CarveSlot { op, .. }
                    | Effect::Commit { op, .. }
                    | Effect::Verify { op, .. }
                    | Effect::Copy { op, .. } => {
                        inputs.push_back(Input::OpDone { op, outcome: Ok(Done::Plain) });
                    }
                    _ => {}
                }
            }
        }
        reply
    }

    fn ask(&mut self, op: Request) -> Reply {
        self.request += 1;
        let request = RequestId::new(self.request);
        let mut reply = self.tell(Input::Request { session: SESSION, request, op });
        // What waits for a device's pace gets its time.
        for _ in 0..100 {
            if reply.is_some() {
                break;
            }
            self.now += 20_000;
            reply = self.tell(Input::Tick);
        }
        reply.expect("answered within two seconds")
    }

    /// A prompt of a new conversation.
    fn prompt(&mut self, which: usize) {
        self.chains += 1;
        let blocks: Vec<BlockId> = (0..PROMPT).map(|place| block(self.chains, place)).collect();
        let repeat = self.chains * 2;
        let write = Request::LeaseWrite {
            repeat: Some(repeat),
            space: space(which),
            blocks,
            parent: None,
            ttl: None,
            want: Memory::Pinned,
        };
        let Reply::Leased { lease: Some(lease), blocks, .. } = self.ask(write) else {
            panic!("a write is turned away while the mix changes")
        };
        assert!(blocks.iter().all(|grant| matches!(grant, Grant::Granted { .. })), "{blocks:?}");
        let part = |place| (place, ByteCount::new(BLOCK_BYTES[which]), Checksum::new(u64::from(place)));
        let seal = Request::Seal {
            repeat: Some(repeat + 1),
            lease,
            blocks: (0..PROMPT).map(part).collect(),
            durability: Durability::Readable,
        };
        assert!(matches!(self.ask(seal), Reply::Sealed { .. }));
        self.ask(Request::Release { leases: vec![lease] });
        self.now += 50_000;
        self.tell(Input::Tick);
    }

    /// The next turn of an earlier conversation uses its prompt again.
    fn read(&mut self, chain: u64) {
        let read = Request::LeaseRead {
            repeat: Some(u64::MAX / 2 + self.request),
            blocks: (0..PROMPT).map(|place| block(chain, place)).collect(),
            ttl: None,
            answer_by: Now::from_micros(self.now + 1_000_000),
            purpose: Purpose::Prefill,
            want: Memory::Pinned,
        };
        let Reply::Leased { lease, .. } = self.ask(read) else { panic!("a read is turned away") };
        self.ask(Request::Release { leases: lease.into_iter().collect() });
    }
}

/// The mix goes from all of one model to all of the other and back, under every policy. Chunks or slots could stay
/// with the model that is gone, writes be turned away meanwhile, or bytes be lost between geometries. A policy that
/// goes by arrival could take the old blocks of the model in use for colder than those of the other. Some prompts
/// are used again, so that the policies differ.
#[test]
fn memory_and_slots_follow_the_model_mix() {
    for policy in [Policy::Duel, Policy::Learned, Policy::Lru, Policy::Fifo, Policy::S3Fifo] {
        let mut node = Node::new(policy);
        let mut stranded_max = 0;
        for towards in [1, 0] {
            // What changes hands last is filled in the rounds after the last step.
            for phase in 0..=15u32 {
                for turn in 0..40 {
                    let many = if turn % 12 < phase { towards } else { 1 - towards };
                    node.prompt(many);
                    if turn % 3 == 0 {
                        node.read(node.chains.saturating_sub(1).max(1));
                    }
                }
                node.core.check();
                stranded_max = stranded_max.max(node.core.tier_views().pinned.stranded_bytes.get());
            }
            let held = node.core.spaces();
            let (to, from) = (held[towards], held[1 - towards]);
            assert!(u64::from(to.chunks) >= CHUNKS - 1, "{policy:?}: {} of {CHUNKS} chunks moved", to.chunks);
            assert!(from.chunks <= 1, "{policy:?}: {} chunks stayed", from.chunks);
            let frames = u64::from(SLOTS) * ((CHUNK_BYTES - 4096) / to.frame_bytes.get());
            println!("{policy:?} {towards}: {} of {frames}, {} stayed", to.blocks_nvme, from.blocks_nvme);
            // Two batches of sixteen may have been evicted ahead of need.
            assert!(
                to.blocks_nvme * 4 >= frames * 3,
                "{policy:?}: {} of {frames} disk frames",
                to.blocks_nvme
            );
            assert_eq!(from.blocks_nvme, 0, "{policy:?}: slots stay with the model that is gone");
        }
        println!("{policy:?}: at most {stranded_max} bytes stranded of {}", CHUNKS * CHUNK_BYTES);
        assert!(stranded_max * 10 <= CHUNKS * CHUNK_BYTES, "{policy:?}: {stranded_max} bytes are stranded");
    }
}

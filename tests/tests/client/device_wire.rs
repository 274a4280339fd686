//! Device memory over the lane, from a daemon that the test is: it says what a real one says, and what none
//! should. The device is host memory in its place.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use terrace_client::wire::lane_request::Op;
use terrace_client::wire::lane_response::Result as Answer;
use terrace_client::wire::session_response::Notice;
use terrace_client::wire::{
    BlockGrant, ChunkDropped, GrantOutcome, HbmDevice, LaneRequest, LaneResponse, LeaseResponse, MappedChunk,
    OpenSpaceResponse, ReleaseResponse, SealOutcome as WireSeal, SealResponse, SessionOpened,
    SessionResponse, Shrunk, Tier, TouchResponse, WindowRecalled, WindowReturned,
};
use terrace_client::{
    BadBlock, ClientError, Durability, Leased, ReadOptions, Reserved, SealOutcome, Session, Space, Target,
    WriteOptions,
};
use terrace_core::{ByteCount, TenantKey, checksum, tenant_id};
use terrace_gpudirect::{Chunk, Device, DeviceBytes, DeviceError, HostOnly, copy_in, copy_out};
use terrace_lane::{Admits, LaneServer, LaneWriter};

use crate::daemon::{BLOCK_BYTES, keys, manifest, payload, until};

const CHUNK: u64 = 7;
const FRAME_BYTES: u64 = 4096 + BLOCK_BYTES as u64;
const GENERATION: u64 = 3;
const KEY: TenantKey = TenantKey::from_bytes([9; 32]);
const WITHIN: Duration = Duration::from_secs(10);

/// A daemon with one chunk on device 2, which it may call by another name.
struct Fake {
    memory: Arc<dyn Device>,
    chunk: Arc<Chunk>,
    fences: Arc<Chunk>,
    named: u32,
    /// Which device the chunk is said to be on.
    uuid: Mutex<[u8; 16]>,
    /// Whether it is a window of whoever asks.
    window: Mutex<bool>,
    asked: Mutex<Vec<Op>>,
    dir: tempfile::TempDir,
}

impl Fake {
    fn start(named: u32) -> Arc<Self> {
        let memory: Arc<dyn Device> = Arc::new(HostOnly::new(0, ByteCount::new(1 << 30)).unwrap());
        let chunk = memory.create(ByteCount::new(4 << 20)).unwrap();
        let fences = memory.create(ByteCount::new(4096)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let uuid = Mutex::new(memory.info().uuid);
        let (window, asked) = (Mutex::new(true), Mutex::default());
        let fake = Arc::new(Self { memory, chunk, fences, named, uuid, window, asked, dir });
        (0..8).for_each(|frame| fake.set_fence(frame, 100 + u64::from(frame)));
        let server = LaneServer::bind(&fake.dir.path().join("lane.sock"), Admits::Owner).unwrap();
        let serving = Arc::clone(&fake);
        tokio::spawn(async move {
            while let Ok(connection) = server.accept().await {
                let (_, mut reader, mut writer) = connection.split();
                let fake = Arc::clone(&serving);
                tokio::spawn(async move {
                    while let Ok(Some(received)) = reader.next().await {
                        fake.answer(received.message, &mut writer);
                        writer.flush().await.unwrap();
                    }
                });
            }
        });
        fake
    }

    async fn session(&self) -> (Session, Space) {
        let target = Target { socket: Some(self.dir.path().join("lane.sock")), ..Target::default() };
        let session = Session::connect(&target).await.unwrap();
        let space = session.open_space(&manifest("device", BLOCK_BYTES)).await.unwrap();
        (session, space)
    }

    fn frame(&self, frame: u32) -> DeviceBytes {
        let offset = u64::from(frame) * FRAME_BYTES + 4096;
        DeviceBytes::new(Arc::clone(&self.chunk), offset, ByteCount::new(BLOCK_BYTES as u64)).unwrap()
    }

    fn set_fence(&self, frame: u32, fence: u64) {
        let word =
            DeviceBytes::new(Arc::clone(&self.fences), u64::from(frame) * 8, ByteCount::new(8)).unwrap();
        copy_in(self.memory.as_ref(), &fence.to_le_bytes(), &word, WITHIN).unwrap();
    }

    fn asked(&self, what: impl Fn(&Op) -> bool) -> usize {
        self.asked.lock().unwrap().iter().filter(|op| what(op)).count()
    }

    fn answer(&self, request: LaneRequest, writer: &mut LaneWriter<LaneResponse>) {
        let op = request.op.unwrap();
        self.asked.lock().unwrap().push(op.clone());
        let (answer, descriptors): (Answer, Vec<OwnedFd>) = match op {
            Op::Hello(_) => {
                let opened = Some(Notice::Opened(self.opened()));
                (Answer::Session(SessionResponse { notice: opened }), vec![])
            }
            Op::OpenSpace(request) => {
                let manifest = terrace_client::manifest_from_wire(&request.manifest.unwrap()).unwrap();
                let tenant = tenant_id("default");
                let answer = OpenSpaceResponse {
                    space: 1,
                    space_id: manifest.space_id(tenant).to_bytes().to_vec().into(),
                    frame_bytes: FRAME_BYTES,
                    generation: GENERATION,
                    tenant_id: tenant.to_bytes().to_vec().into(),
                    tenant_key: KEY.to_bytes().to_vec().into(),
                };
                (Answer::OpenSpace(answer), vec![])
            }
            Op::Lease(request) => {
                let blocks = request.keys.iter().zip(0..).map(|(key, frame)| self.grant(key, frame));
                let lease = LeaseResponse {
                    lease: 5,
                    ttl_ms: 60_000,
                    blocks: blocks.collect(),
                    generation: GENERATION,
                    ..LeaseResponse::default()
                };
                (Answer::Lease(lease), vec![])
            }
            Op::MapChunk(_) => {
                let mapped = MappedChunk {
                    chunk: CHUNK,
                    bytes: self.chunk.bytes().get(),
                    fence_bytes: 4096,
                    writable: *self.window.lock().unwrap(),
                    tier: Tier::Hbm.into(),
                    device: self.named,
                    device_kind: "host-only".to_owned(),
                    device_uuid: self.uuid.lock().unwrap().to_vec().into(),
                };
                (
                    Answer::MappedChunk(mapped),
                    vec![self.chunk.export().unwrap(), self.fences.export().unwrap()],
                )
            }
            Op::Seal(request) => {
                let outcomes = vec![WireSeal::Sealed.into(); request.blocks.len()];
                (Answer::Seal(SealResponse { outcomes }), vec![])
            }
            Op::Shrink(_) => {
                let dropped = Notice::Dropped(ChunkDropped { chunk: CHUNK });
                let notice = Answer::Session(SessionResponse { notice: Some(dropped) });
                writer.queue(&LaneResponse { id: 0, result: Some(notice) }, vec![]).unwrap();
                (Answer::Shrunk(Shrunk { free_bytes: 4096 }), vec![])
            }
            Op::Touch(_) => {
                let recalled = Notice::Recalled(WindowRecalled { chunk: CHUNK });
                let notice = Answer::Session(SessionResponse { notice: Some(recalled) });
                writer.queue(&LaneResponse { id: 0, result: Some(notice) }, vec![]).unwrap();
                (Answer::Touch(TouchResponse { touched: 0 }), vec![])
            }
            Op::Release(_) => (Answer::Release(ReleaseResponse::default()), vec![]),
            Op::ReturnWindow(_) => (Answer::WindowReturned(WindowReturned::default()), vec![]),
            other => panic!("no test asks {other:?}"),
        };
        writer.queue(&LaneResponse { id: request.id, result: Some(answer) }, descriptors).unwrap();
    }

    fn opened(&self) -> SessionOpened {
        let info = self.memory.info();
        let device = HbmDevice {
            number: 2,
            kind: info.kind.label().to_owned(),
            uuid: info.uuid.to_vec().into(),
            name: info.name.clone(),
            bytes: info.bytes.get(),
        };
        SessionOpened { incarnation: 1, blocks_max: 64, devices: vec![device], ..SessionOpened::default() }
    }

    fn grant(&self, key: &[u8], frame: u32) -> BlockGrant {
        let space = manifest("device", BLOCK_BYTES).space_id(tenant_id("default"));
        let block = KEY.block_id(space, key);
        let mut bytes = vec![0; BLOCK_BYTES];
        copy_out(self.memory.as_ref(), &self.frame(frame), &mut bytes, WITHIN).unwrap();
        BlockGrant {
            outcome: GrantOutcome::Granted.into(),
            chunk: CHUNK,
            frame,
            offset: self.frame(frame).offset(),
            fence: 100 + u64::from(frame),
            length: BLOCK_BYTES as u64,
            checksum: checksum(block, GENERATION, &bytes).get(),
            block_id: block.to_bytes().to_vec().into(),
            tier: Tier::Hbm.into(),
            device: self.named,
            ..BlockGrant::default()
        }
    }
}

fn own_device() -> Arc<dyn Device> {
    Arc::new(HostOnly::new(0, ByteCount::new(0)).unwrap())
}

// A block on a device could come changed, or be used after its frame went to another block: read what lies there, then
// change the bytes, then move the fence, and see each noticed. The chunk is mapped once, and let go with the session.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_on_a_device_are_read_where_they_lie() {
    let fake = Fake::start(2);
    for frame in 0..3 {
        let bytes = payload(frame as usize, BLOCK_BYTES);
        copy_in(fake.memory.as_ref(), &bytes, &fake.frame(frame), WITHIN).unwrap();
    }
    let (session, space) = fake.session().await;
    let own = own_device();
    assert_eq!(session.add_device(Arc::clone(&own)).unwrap(), 2, "the daemon's number");
    let lease = session.lease_read_on(2, &space, &keys(0, 3), ReadOptions::default()).await.unwrap();
    assert_eq!(lease.prefix(), 3);
    let mut found = vec![0; BLOCK_BYTES];
    for (seed, grant) in lease.grants.iter().enumerate() {
        let block = grant.granted().and_then(Leased::on_device).expect("it lies on the device");
        assert_eq!(block.device(), 2);
        block.read_verified(&mut found).unwrap();
        assert!(found == payload(seed, BLOCK_BYTES), "block {seed}");
    }
    let again = session.lease_read_on(2, &space, &keys(0, 3), ReadOptions::default()).await.unwrap();
    assert_eq!(own.room().unwrap().imports, 1, "a chunk is mapped once");
    assert_eq!(fake.asked(|op| matches!(op, Op::MapChunk(_))), 1);

    copy_in(fake.memory.as_ref(), &payload(77, BLOCK_BYTES), &fake.frame(1), WITHIN).unwrap();
    let second = lease.grants[1].granted().and_then(Leased::on_device).unwrap();
    let refused = second.read_verified(&mut found);
    assert!(matches!(refused, Err(ClientError::Block(BadBlock::Checksum { .. }))), "{refused:?}");
    assert!(lease.is_valid(), "its fence has not moved");
    fake.set_fence(1, 200);
    assert!(!lease.is_valid() && !again.is_valid());
    let refused = second.read_verified(&mut found);
    assert!(matches!(refused, Err(ClientError::Block(BadBlock::Stale(_)))), "{refused:?}");
    drop((lease, again));
    session.close();
    until("the chunk is let go with its session", async || own.room().unwrap().imports == 0).await;
}

// The daemon has a dropped chunk's memory back only when nobody has it mapped, and others wait for it: the mapping must go
// when the notice comes, though not under who still looks at it. Whoever is granted a frame there then maps it anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_chunk_is_given_up() {
    let fake = Fake::start(2);
    *fake.window.lock().unwrap() = false;
    let (session, space) = fake.session().await;
    let own = own_device();
    session.add_device(Arc::clone(&own)).unwrap();
    let lease = async || session.lease_read_on(2, &space, &keys(0, 1), ReadOptions::default()).await.unwrap();
    let before = lease().await;
    session.shrink(2, ByteCount::new(1 << 20), WITHIN).await.unwrap();
    let mapped = |op: &Op| matches!(op, Op::MapChunk(_));
    until("the chunk is mapped anew", async || {
        drop(lease().await);
        fake.asked(mapped) == 2
    })
    .await;
    assert_eq!(own.room().unwrap().imports, 2, "who looks at it keeps it");
    drop(before);
    assert_eq!(own.room().unwrap().imports, 1);
}

// What is computed in a device's frame must be there for the daemon when it is sealed, with the right sum; and a window
// that is recalled must not go back while somebody may store into it.
#[tokio::test(flavor = "multi_thread")]
async fn frames_on_a_device_are_filled_and_sealed() {
    let fake = Fake::start(2);
    let (session, space) = fake.session().await;
    session.add_device(own_device()).unwrap();
    let options = WriteOptions::default();
    let mut lease = session.lease_write_on(2, &space, &keys(0, 2), None, options).await.unwrap();
    let Some(Reserved::Device(block)) = lease.block_mut(0) else { panic!("it is on the device") };
    block.write(&payload(4, BLOCK_BYTES)).unwrap();
    assert!(matches!(block.write(&[0; 8]), Err(ClientError::WrongLength { found: 8, .. })));
    let expected = checksum(block.id(), block.generation(), &payload(4, BLOCK_BYTES));
    let outcomes = lease.seal(&[0], Durability::Readable).await.unwrap();
    assert_eq!(outcomes, [SealOutcome::Sealed]);
    let sealed = |op: &Op| matches!(op, Op::Seal(seal) if seal.blocks[0].checksum == expected.get());
    assert_eq!(fake.asked(sealed), 1, "with the sum of what was written");
    let mut found = vec![0; BLOCK_BYTES];
    copy_out(fake.memory.as_ref(), &fake.frame(0), &mut found, WITHIN).unwrap();
    assert!(found == payload(4, BLOCK_BYTES), "the bytes are where the daemon has them");
    lease.reader(0).and_then(|read| read.on_device().cloned()).unwrap().read_verified(&mut found).unwrap();
    assert!(lease.seal(&[0], Durability::Readable).await.is_err(), "sealed once");
    let Some(Reserved::Device(block)) = lease.block_mut(0) else { panic!("it is on the device") };
    assert!(matches!(block.write(&payload(5, BLOCK_BYTES)), Err(ClientError::NotWritable { .. })));

    let returned = |op: &Op| matches!(op, Op::ReturnWindow(_));
    session.touch(&space, &keys(0, 1)).await.unwrap();
    // It answers behind the notice, and chores that were due would be asked before it.
    session.touch(&space, &keys(0, 1)).await.unwrap();
    assert_eq!(fake.asked(returned), 0, "block 1 may still be stored into");
    drop(lease);
    until("the window goes back", async || fake.asked(returned) == 1).await;
}

// A daemon that names a device that this process does not have, or grants one where host memory was asked for, must
// not make us touch what we cannot reach.
#[tokio::test(flavor = "multi_thread")]
async fn devices_that_are_not_known_are_refused() {
    let fake = Fake::start(5);
    let (session, space) = fake.session().await;
    let options = ReadOptions::default();
    let refused = session.lease_read_on(2, &space, &keys(0, 1), options).await;
    assert!(matches!(refused, Err(ClientError::UnknownDevice { device: 2 })), "{refused:?}");
    assert_eq!(fake.asked(|op| matches!(op, Op::Lease(_))), 0, "nothing is asked for it");
    let other = HostOnly::new(1, ByteCount::new(0)).unwrap();
    let refused = session.add_device(Arc::new(other));
    assert!(matches!(refused, Err(ClientError::OtherDevice { .. })), "{refused:?}");
    session.add_device(own_device()).unwrap();
    let refused = session.lease_read_on(2, &space, &keys(0, 1), options).await;
    assert!(matches!(refused, Err(ClientError::UnknownDevice { device: 5 })), "{refused:?}");
    let fake = Fake::start(2);
    let (session, space) = fake.session().await;
    session.add_device(own_device()).unwrap();
    *fake.uuid.lock().unwrap() = [1; 16];
    let refused = session.lease_read_on(2, &space, &keys(0, 1), options).await;
    assert!(matches!(refused, Err(ClientError::Protocol { .. })), "{refused:?}");
    *fake.uuid.lock().unwrap() = fake.memory.info().uuid;
    let refused = session.lease_read(&space, &keys(0, 1), options).await;
    assert!(matches!(refused, Err(ClientError::Protocol { .. })), "{refused:?}");
    until("what was granted is given back", async || fake.asked(|op| matches!(op, Op::Release(_))) > 0).await;
    assert_eq!(session.shrink(2, ByteCount::new(1 << 20), WITHIN).await.unwrap(), ByteCount::new(4096));
    let shrunk =
        |op: &Op| matches!(op, Op::Shrink(shrink) if shrink.bytes == 1 << 20 && shrink.wait_ms == 10_000);
    assert_eq!(fake.asked(shrunk), 1);
}

// A device that cannot map the chunk is an error that says so, and leaves nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_is_said() {
    let fake = Fake::start(2);
    let (session, space) = fake.session().await;
    let own = Arc::new(HostOnly::new(0, ByteCount::new(0)).unwrap());
    own.inject(terrace_gpudirect::Fault::Lose);
    session.add_device(own).unwrap();
    let refused = session.lease_read_on(2, &space, &keys(0, 1), ReadOptions::default()).await;
    assert!(matches!(refused, Err(ClientError::Device(DeviceError::Lost { .. }))), "{refused:?}");
    assert!(!session.is_closed(), "the session is as good as before");
    until("the lease is given back", async || fake.asked(|op| matches!(op, Op::Release(_))) > 0).await;
}

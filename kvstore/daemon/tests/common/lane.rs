//! The lane by hand, and processes that use it: what the client library would not do.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_client::wire::{
    self, GrantOutcome, LaneError, LaneHello, LaneRequest, LaneResponse, LeaseKind, lane_request::Op,
    lane_response::Result as Answer,
};
use terrace_client::{Durability, SealOutcome, manifest_to_wire};
use terrace_core::{ByteCount, TenantKey, checksum};
use terrace_lane::{Access, LaneConnection, LaneReader, LaneWriter, Mapping};

use super::{BLOCK_BYTES, PATIENCE, Running, manifest, payload, payloads};

/// The lane by hand, so that it can do what the client library would not.
pub(crate) struct Lane {
    reader: LaneReader<LaneResponse>,
    writer: LaneWriter<LaneRequest>,
    last: u64,
    tenant: String,
    /// Device of Hbm that leases ask for.
    pub(crate) want: Option<u32>,
    /// What the space of the tests is here: its handle, generation and key.
    pub(crate) space: wire::OpenSpaceResponse,
}

impl Lane {
    pub(crate) async fn open(path: &Path) -> Self {
        Self::open_as(path, "", "").await
    }

    pub(crate) async fn open_as(path: &Path, tenant: &str, token: &str) -> Self {
        Self::over(UnixStream::connect(path).unwrap(), tenant, token).await
    }

    pub(crate) async fn over(stream: UnixStream, tenant: &str, token: &str) -> Self {
        let hello = LaneHello { tenant: tenant.into(), token: token.into(), ..hello() };
        let mut lane = Self::greet(stream, hello).await.map_err(|error| panic!("{error:?}")).unwrap();
        lane.open_space().await;
        lane
    }

    /// As a client that may come back.
    pub(crate) async fn open_named(path: &Path, client_id: &[u8]) -> Self {
        let hello = LaneHello { client_id: client_id.to_vec().into(), ..hello() };
        let stream = UnixStream::connect(path).unwrap();
        let mut lane = Self::greet(stream, hello).await.map_err(|error| panic!("{error:?}")).unwrap();
        lane.open_space().await;
        lane
    }

    pub(crate) async fn greet(stream: UnixStream, hello: LaneHello) -> Result<Self, LaneError> {
        let (_, reader, writer) = LaneConnection::from_stream(stream).unwrap().split();
        let mut lane = Self {
            reader,
            writer,
            last: 0,
            tenant: hello.tenant.clone(),
            want: None,
            space: wire::OpenSpaceResponse::default(),
        };
        lane.ask(Op::Hello(hello)).await?;
        Ok(lane)
    }

    async fn open_space(&mut self) {
        let request =
            wire::OpenSpaceRequest { manifest: Some(manifest_to_wire(&manifest(0))), compute_cost: None };
        let (Answer::OpenSpace(space), _) = self.ask(Op::OpenSpace(request)).await.unwrap() else { panic!() };
        self.space = space;
    }

    /// Waits until the daemon closes the connection.
    pub(crate) async fn assert_ended(&mut self) {
        loop {
            match tokio::time::timeout(PATIENCE, self.reader.next()).await.unwrap() {
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    pub(crate) async fn ask(&mut self, op: Op) -> Result<(Answer, Vec<OwnedFd>), LaneError> {
        self.last += 1;
        self.writer.queue(&LaneRequest { id: self.last, op: Some(op) }, Vec::new()).unwrap();
        self.writer.flush().await.unwrap();
        loop {
            let next = tokio::time::timeout(PATIENCE, self.reader.next()).await.unwrap();
            let received = next.unwrap().expect("the daemon is there");
            if received.message.id == self.last {
                return match received.message.result.unwrap() {
                    Answer::Error(error) => Err(error),
                    answer => Ok((answer, received.descriptors)),
                };
            }
        }
    }

    pub(crate) async fn lease(&mut self, kind: LeaseKind, keys: &[[u8; 4]]) -> wire::LeaseResponse {
        let leased = self.lease_within(kind, keys, 5000).await;
        assert!(leased.blocks.iter().all(|block| block.outcome() == GrantOutcome::Granted), "{leased:?}");
        leased
    }

    /// Whatever is granted within so many milliseconds.
    pub(crate) async fn lease_within(
        &mut self,
        kind: LeaseKind,
        keys: &[[u8; 4]],
        wait_ms: u64,
    ) -> wire::LeaseResponse {
        let request = wire::LeaseRequest {
            request_id: 100 + self.last,
            space: self.space.space,
            kind: kind.into(),
            keys: keys.iter().map(|key| key.to_vec().into()).collect(),
            wait_ms,
            ttl_ms: 2000,
            want_tier: self.want.map_or(wire::Tier::Unspecified, |_| wire::Tier::Hbm).into(),
            want_device: self.want.unwrap_or_default(),
            ..wire::LeaseRequest::default()
        };
        let (Answer::Lease(leased), _) = self.ask(Op::Lease(request)).await.unwrap() else { panic!() };
        leased
    }

    /// The same for who takes what there is; `None` where nothing is granted.
    pub(crate) async fn try_lease(
        &mut self,
        kind: LeaseKind,
        keys: &[[u8; 4]],
    ) -> Option<wire::LeaseResponse> {
        let request = wire::LeaseRequest {
            request_id: 100 + self.last,
            space: self.space.space,
            kind: kind.into(),
            keys: keys.iter().map(|key| key.to_vec().into()).collect(),
            wait_ms: 20,
            ..wire::LeaseRequest::default()
        };
        match self.ask(Op::Lease(request)).await {
            Ok((Answer::Lease(leased), _)) => Some(leased).filter(|leased| leased.lease > 0),
            Ok(_) | Err(_) => None,
        }
    }

    /// Stores what is granted of a write lease, and seals it. Whatever is not ours to write is left alone.
    pub(crate) async fn fill_and_seal(&mut self, leased: &wire::LeaseResponse, keys: &[[u8; 4]]) {
        let tenant = TenantKey::from_bytes(self.space.tenant_key.as_ref().try_into().unwrap());
        let space = manifest(0).space_id(terrace_core::tenant_id("default"));
        let mut blocks = Vec::new();
        for ((index, grant), key) in (0..).zip(&leased.blocks).zip(keys) {
            let Ok((Answer::MappedChunk(mapped), mut both)) =
                self.ask(Op::MapChunk(wire::MapChunk { chunk: grant.chunk })).await
            else {
                continue;
            };
            let (Some(fences), Some(data)) = (both.pop(), both.pop()) else { continue };
            if mapped.writable {
                let mapping = map(data, fences, mapped.bytes, Access::Write).unwrap();
                store(&mapping, grant.offset, &payload(*key, 0));
                let sum = checksum(tenant.block_id(space, key), self.space.generation, &payload(*key, 0));
                blocks.push(wire::SealBlock { index, length: BLOCK_BYTES as u64, checksum: sum.get() });
            }
        }
        let request_id = 100 + self.last;
        let seal = wire::SealRequest { request_id, lease: leased.lease, blocks, durability: 0 };
        // A read lease cannot be sealed, and one that has expired neither.
        let _ = self.ask(Op::Seal(seal)).await;
    }

    /// Descriptors of a chunk: data, fences, length of the data.
    pub(crate) async fn descriptors(&mut self, chunk: u64) -> (OwnedFd, OwnedFd, u64, bool) {
        let (answer, mut both) = self.ask(Op::MapChunk(wire::MapChunk { chunk })).await.unwrap();
        let Answer::MappedChunk(mapped) = answer else { panic!("{answer:?}") };
        let fences = both.pop().unwrap();
        (both.pop().unwrap(), fences, mapped.bytes, mapped.writable)
    }

    /// Stores blocks into a window and seals them; gives the window's mapping and the places of the blocks.
    pub(crate) async fn write(&mut self, keys: &[[u8; 4]]) -> (Arc<Mapping>, wire::LeaseResponse) {
        let leased = self.lease(LeaseKind::Write, keys).await;
        let (data, fences, bytes, writable) = self.descriptors(leased.blocks[0].chunk).await;
        assert!(writable);
        let mapping = map(data, fences, bytes, Access::Write).unwrap();
        for (grant, key) in leased.blocks.iter().zip(keys) {
            store(&mapping, grant.offset, &payload(*key, 0));
        }
        let outcomes = self.seal(&leased, keys).await;
        assert!(outcomes.iter().all(|outcome| *outcome == wire::SealOutcome::Sealed), "{outcomes:?}");
        (mapping, leased)
    }

    /// Seals all blocks of a lease with the checksums of what they should hold.
    pub(crate) async fn seal(
        &mut self,
        leased: &wire::LeaseResponse,
        keys: &[[u8; 4]],
    ) -> Vec<wire::SealOutcome> {
        let block = |(index, checksum)| wire::SealBlock { index, length: BLOCK_BYTES as u64, checksum };
        let blocks = (0..).zip(self.sums(keys)).map(block).collect();
        let seal =
            wire::SealRequest { request_id: 100 + self.last, lease: leased.lease, blocks, durability: 0 };
        let (Answer::Seal(sealed), _) = self.ask(Op::Seal(seal)).await.unwrap() else { panic!() };
        sealed.outcomes().collect()
    }

    /// Checksums of what the blocks should hold.
    pub(crate) fn sums(&self, keys: &[[u8; 4]]) -> Vec<u64> {
        let tenant = if self.tenant.is_empty() { "default" } else { &self.tenant };
        let space = manifest(0).space_id(terrace_core::tenant_id(tenant));
        let tenant = TenantKey::from_bytes(self.space.tenant_key.as_ref().try_into().unwrap());
        let sum = |key: &[u8; 4]| {
            checksum(tenant.block_id(space, key), self.space.generation, &payload(*key, 0)).get()
        };
        keys.iter().map(sum).collect()
    }

    pub(crate) async fn release(&mut self, lease: u64) {
        let request = wire::ReleaseRequest { request_id: 100 + self.last, leases: vec![lease] };
        self.ask(Op::Release(request)).await.unwrap();
    }
}

pub(crate) fn hello() -> LaneHello {
    LaneHello { version: 1, client: "attacker".into(), ..LaneHello::default() }
}

pub(crate) fn map(
    data: OwnedFd,
    fences: OwnedFd,
    bytes: u64,
    access: Access,
) -> Result<Arc<Mapping>, String> {
    let (bytes, page) = (ByteCount::new(bytes), ByteCount::new(4096));
    Mapping::map(data, bytes, fences, page, access).map_err(|error| error.to_string())
}

pub(crate) fn store(mapping: &Arc<Mapping>, offset: u64, bytes: &[u8]) {
    let length = ByteCount::new(bytes.len() as u64);
    mapping.view_mut(offset, length).expect("the mapping is writable").copy_from(0, bytes);
}

/// Reads by new sessions on both transports: each block must be exact or a miss. Returns how many there were.
pub(crate) async fn exact_or_missing(daemon: &Running, keys: &[[u8; 4]]) -> usize {
    let mut there = 0;
    for lane in [true, false] {
        let session = daemon.session(lane).await;
        let space = session.open_space(&manifest(0)).await.unwrap();
        let found = session.read_within(&space, keys, Duration::from_secs(5)).await.unwrap();
        for (key, bytes) in keys.iter().zip(found) {
            there += usize::from(bytes.is_some());
            assert!(
                bytes.is_none_or(|bytes| bytes == payload(*key, 0)),
                "{key:?} has other bytes, lane {lane}"
            );
        }
    }
    there
}

pub(crate) async fn write(daemon: &Running, lane: bool, keys: &[[u8; 4]], durability: Durability) {
    let session = daemon.session(lane).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let outcomes = session.write(&space, keys, None, &payloads(keys, 0), durability).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{outcomes:?}");
    if lane {
        session.flush_windows().await.unwrap();
    }
}

pub(crate) fn helper(name: &str, path: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--ignored", "--nocapture"]).env("TERRACE_TEST_SOCKET", path);
    command
}

pub(crate) fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([name, &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

pub(crate) fn wait_for(path: &Path) {
    let began = Instant::now();
    while !path.exists() {
        assert!(began.elapsed() < PATIENCE, "{} does not come", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

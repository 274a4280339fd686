//! Bad input: each is refused with a sentence that says what to do, the daemon
//! stays up, and no frame leaks.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{BLOCK_BYTES, Running, folder, http, keys, manifest, payload, payloads, socket};
use terrace_client::wire::block_service_client::BlockServiceClient;
use terrace_client::wire::{self, LeaseKind, SealOutcome, write_request::Part};
use terrace_client::{Durability, Session, Target, manifest_to_wire};
use terrace_core::{Checksum, TenantKey, checksum};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// A gRPC session by hand, so that it can say what the client library would not.
struct Raw {
    client: BlockServiceClient<Channel>,
    token: String,
    _requests: tokio::sync::mpsc::Sender<wire::SessionRequest>,
    _responses: tonic::Streaming<wire::SessionResponse>,
}

impl Raw {
    async fn open(daemon: &Running) -> Self {
        Self::of_tenant(daemon, "").await
    }

    async fn of_tenant(daemon: &Running, tenant: &str) -> Self {
        let mut client = BlockServiceClient::new(terrace_client::channel(&daemon.grpc).await.unwrap());
        let (requests, stream) = tokio::sync::mpsc::channel(1);
        let hello = wire::SessionRequest { tenant: tenant.to_owned(), ..Default::default() };
        requests.send(hello).await.unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let mut responses = client.session(stream).await.unwrap().into_inner();
        let first = responses.message().await.unwrap().unwrap();
        let Some(wire::session_response::Notice::Opened(opened)) = first.notice else { panic!("{first:?}") };
        let token = opened.session.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { client, token, _requests: requests, _responses: responses }
    }

    fn with<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("terrace-session", self.token.parse().unwrap());
        request
    }

    async fn space(&mut self) -> wire::OpenSpaceResponse {
        let request =
            wire::OpenSpaceRequest { manifest: Some(manifest_to_wire(&manifest(0))), compute_cost: None };
        let request = self.with(request);
        self.client.open_space(request).await.unwrap().into_inner()
    }

    async fn lease(&mut self, request: wire::LeaseRequest) -> Result<wire::LeaseResponse, Status> {
        let request = self.with(request);
        self.client.lease(request).await.map(tonic::Response::into_inner)
    }

    async fn seal(&mut self, request: wire::SealRequest) -> Result<wire::SealResponse, Status> {
        let request = self.with(request);
        self.client.seal(request).await.map(tonic::Response::into_inner)
    }
}

fn write_lease(id: u64, keys: &[&[u8]]) -> wire::LeaseRequest {
    let keys = keys.iter().map(|key| key.to_vec().into()).collect();
    wire::LeaseRequest { request_id: id, space: 1, kind: LeaseKind::Write.into(), keys, ..Default::default() }
}

fn assert_refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, says: &str) {
    let refused = answer.unwrap_err();
    assert_eq!(refused.code(), code, "{refused}");
    assert!(refused.message().contains(says), "`{}` does not say `{says}`", refused.message());
}

/// Calls that were refused so far.
fn refused(daemon: &Running) -> f64 {
    let page = http(&daemon.metrics, "/metrics");
    let counts = page.lines().filter(|line| line.starts_with("terrace_calls_refused_total{"));
    counts.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
}

/// Refusals of sessions, streams and other services could go uncounted, and nobody would see a limit at work: one of each
/// kind, over gRPC and the socket.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_counted() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let mut raw = Raw::open(&daemon).await;
    let handle = raw.space().await.space;
    assert_eq!(refused(&daemon), 0.0);
    let read = |space| wire::ReadRequest { space, keys: vec![b"k".to_vec().into()], ..Default::default() };
    raw.client.read(Request::new(read(handle))).await.unwrap_err();
    assert_eq!(refused(&daemon), 1.0, "a stream without its session");
    raw.client.lease(raw.with(write_lease(1, &[b""]))).await.unwrap_err();
    assert_eq!(refused(&daemon), 2.0, "a call");
    let grpc = Target { socket: None, grpc: Some(daemon.grpc.clone()), ..Target::default() };
    let nobody = |target: Target| Target { tenant: "nobody".to_owned(), ..target };
    Session::connect(&nobody(grpc.clone())).await.unwrap_err();
    assert_eq!(refused(&daemon), 3.0, "a session over gRPC");
    let lane = Target { socket: Some(socket(folder.path())), grpc: None, ..Target::default() };
    Session::connect(&nobody(lane)).await.unwrap_err();
    assert_eq!(refused(&daemon), 4.0, "a session over the socket");
    let mut admin = terrace_client::admin(&daemon.grpc).await.unwrap();
    admin.stat_block(wire::StatBlockRequest { block_id: vec![1].into() }).await.unwrap_err();
    assert_eq!(refused(&daemon), 5.0, "another service");
}

/// A client names what is not there or not allowed: unknown session and space, long keys, too many blocks, bad manifests.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_names_and_numbers() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "[limits]\nblocks_per_request = 100");
    let mut raw = Raw::open(&daemon).await;
    assert_refused(raw.lease(write_lease(1, &[b"k"])).await, Code::NotFound, "OpenSpace");
    raw.space().await;
    let bare = Request::new(write_lease(1, &[b"k"]));
    assert_refused(raw.client.lease(bare).await, Code::Unauthenticated, "terrace-session");
    assert_refused(raw.lease(write_lease(2, &[&[7; 65]])).await, Code::InvalidArgument, "1 to 64");
    assert_refused(raw.lease(write_lease(3, &[b""])).await, Code::InvalidArgument, "1 to 64");
    let many = vec![b"k".as_slice(); 101];
    assert_refused(raw.lease(write_lease(4, &many)).await, Code::InvalidArgument, "limit is 100");
    let kindless = wire::LeaseRequest { kind: 0, ..write_lease(5, &[b"k"]) };
    assert_refused(raw.lease(kindless).await, Code::InvalidArgument, "READ or WRITE");
    let hbm = wire::LeaseRequest { want_tier: wire::Tier::Hbm.into(), ..write_lease(6, &[b"k"]) };
    assert_refused(raw.lease(hbm).await, Code::NotFound, "not configured");
    let nvme = wire::LeaseRequest { want_tier: wire::Tier::Nvme.into(), ..write_lease(6, &[b"k"]) };
    assert_refused(raw.lease(nvme).await, Code::Unimplemented, "TIER_PINNED");
    for (block_bytes, says) in [(0, "block_bytes"), (1 << 40, "block_bytes")] {
        let manifest = wire::SpaceManifest { block_bytes, ..manifest_to_wire(&manifest(0)) };
        let request = raw.with(wire::OpenSpaceRequest { manifest: Some(manifest), compute_cost: None });
        assert_refused(raw.client.open_space(request).await, Code::InvalidArgument, says);
    }
    // A block that is allowed, and larger than a chunk of this daemon.
    let large = wire::SpaceManifest { block_bytes: 8 << 20, ..manifest_to_wire(&manifest(0)) };
    let request = raw.with(wire::OpenSpaceRequest { manifest: Some(large), compute_cost: None });
    let space = raw.client.open_space(request).await.unwrap().into_inner().space;
    let lease = wire::LeaseRequest { space, ..write_lease(7, &[b"k"]) };
    assert_refused(raw.lease(lease).await, Code::InvalidArgument, "chunk_bytes");
    drop(raw);
    daemon.assert_quiet().await;
}

/// Blocks named by their ids: of a cut id, of too many, beside keys, of a bundle, and for writing, where the id would say
/// nothing of the space that is written to. What nobody has is a miss.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_ids() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "[limits]\nblocks_per_request = 100");
    let mut raw = Raw::open(&daemon).await;
    let space = raw.space().await.space;
    let read = |id, bytes: usize| wire::LeaseRequest {
        request_id: id,
        space,
        kind: LeaseKind::Read.into(),
        block_ids: vec![7; bytes].into(),
        ..Default::default()
    };
    assert_refused(raw.lease(read(1, 17)).await, Code::InvalidArgument, "each has 16 bytes");
    assert_refused(raw.lease(read(2, 16 * 101)).await, Code::InvalidArgument, "limit is 100");
    let both = wire::LeaseRequest { keys: vec![b"k".as_slice().into()], ..read(3, 16) };
    assert_refused(raw.lease(both).await, Code::InvalidArgument, "one of them");
    let write = wire::LeaseRequest { kind: LeaseKind::Write.into(), ..read(4, 16) };
    assert_refused(raw.lease(write).await, Code::InvalidArgument, "by their keys");
    let bundle = wire::ExistsRequest {
        spaces: vec![space, space],
        block_ids: vec![7; 16].into(),
        ..Default::default()
    };
    let bundle = raw.with(bundle);
    assert_refused(raw.client.exists(bundle).await, Code::InvalidArgument, "one space");
    let missing = raw.lease(read(5, 32)).await.unwrap();
    assert_eq!((missing.lease, missing.blocks.len()), (0, 2));
    assert!(missing.blocks.iter().all(|block| block.outcome() == wire::GrantOutcome::Missing));
    drop(raw);
    daemon.assert_quiet().await;
}

/// A writer seals what it did not write, or twice, or with a lease that is not its own.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_seals_and_leases() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let (mut raw, mut other) = (Raw::open(&daemon).await, Raw::open(&daemon).await);
    raw.space().await;
    other.space().await;
    let leased = raw.lease(write_lease(1, &[b"a", b"b"])).await.unwrap();
    let seal = |lease, index, length, checksum| wire::SealRequest {
        request_id: 10 + u64::from(index) + length,
        lease,
        blocks: vec![wire::SealBlock { index, length, checksum }],
        durability: 0,
    };
    let whole = BLOCK_BYTES as u64;
    assert_refused(raw.seal(seal(leased.lease, 0, 1000, 1)).await, Code::InvalidArgument, "1000 bytes");
    assert_refused(raw.seal(seal(leased.lease, 2, whole, 1)).await, Code::InvalidArgument, "index 2");
    let twice = wire::SealRequest {
        request_id: 9,
        lease: leased.lease,
        blocks: [1, 2].map(|checksum| wire::SealBlock { index: 1, length: whole, checksum }).to_vec(),
        durability: 0,
    };
    assert_refused(raw.seal(twice).await, Code::InvalidArgument, "index 1 is named twice");
    assert_refused(
        other.seal(seal(leased.lease, 0, whole, 1)).await,
        Code::FailedPrecondition,
        "not a live lease",
    );
    assert_refused(raw.seal(seal(5, 0, whole, 1)).await, Code::FailedPrecondition, "earlier life");
    let release = other.with(wire::ReleaseRequest { request_id: 1, leases: vec![leased.lease] });
    let released = other.client.release(release).await.map(|answer| answer.into_inner().released);
    assert!(!matches!(released, Ok(1)), "a foreign lease was released");
    let changed = wire::LeaseRequest { keys: vec![b"z".as_slice().into()], ..write_lease(1, &[]) };
    assert_refused(raw.lease(changed).await, Code::InvalidArgument, "request id 1");
    let repeated = raw.lease(write_lease(1, &[b"a", b"b"])).await.unwrap();
    assert_eq!(repeated.lease, leased.lease, "a repeat was answered as a new request");
    drop((raw, other));
    daemon.assert_quiet().await;
}

async fn write(raw: &mut Raw, key: &[u8], data: &[u8], sum: Option<Checksum>) -> Result<Vec<i32>, Status> {
    let header = wire::WriteHeader { space: 1, keys: vec![key.to_vec().into()], ..Default::default() };
    let mut messages = vec![wire::WriteRequest { part: Some(Part::Header(header)) }];
    let mut offset = 0;
    for piece in data.chunks(100_000) {
        let last = offset + piece.len() == data.len();
        let piece = wire::WritePiece {
            index: 0,
            offset: offset as u64,
            data: piece.to_vec().into(),
            checksum: sum.filter(|_| last).map(Checksum::get),
        };
        offset += piece.data.len();
        messages.push(wire::WriteRequest { part: Some(Part::Piece(piece)) });
    }
    let request = raw.with(tokio_stream::iter(messages));
    raw.client.write(request).await.map(|answer| answer.into_inner().outcomes)
}

/// Bytes change on the way, are cut off, too many, or differ from what is sealed: none of it may be served.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_not_sealed() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let mut raw = Raw::open(&daemon).await;
    let opened = raw.space().await;
    let key = TenantKey::from_bytes(opened.tenant_key.as_ref().try_into().unwrap());
    let block = key.block_id(manifest(0).space_id(terrace_core::tenant_id("default")), b"a");
    let (good, bad) = (payload([1; 4], 0), payload([2; 4], 0));
    let sum = checksum(block, opened.generation, &good);
    assert_refused(write(&mut raw, b"a", &bad, Some(sum)).await, Code::InvalidArgument, "checksum");
    assert_refused(write(&mut raw, b"a", &good[..1000], None).await, Code::InvalidArgument, "1000 of its");
    let long = [good.clone(), vec![1]].concat();
    assert_refused(write(&mut raw, b"a", &long, None).await, Code::InvalidArgument, "block 0");
    assert_eq!(write(&mut raw, b"a", &good, Some(sum)).await.unwrap(), [i32::from(SealOutcome::Sealed)]);
    assert_eq!(write(&mut raw, b"a", &good, Some(sum)).await.unwrap(), [i32::from(SealOutcome::Already)]);
    assert_eq!(write(&mut raw, b"a", &bad, None).await.unwrap(), [i32::from(SealOutcome::Conflict)]);
    drop(raw);
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    assert!(session.read(&space, &[b"a"]).await.unwrap()[0].as_ref() == Some(&good));
    drop((session, space));
    daemon.assert_quiet().await;
}

/// The messages of a Write, sent by hand.
struct Sending(tokio::sync::mpsc::Sender<wire::WriteRequest>);

impl Sending {
    /// Begins one; its answer comes from the task.
    async fn begin(
        raw: &Raw,
        keys: &[&[u8]],
        durability: wire::Durability,
    ) -> (Self, tokio::task::JoinHandle<Result<Vec<i32>, Status>>) {
        let (sender, messages) = tokio::sync::mpsc::channel(4);
        let request = raw.with(tokio_stream::wrappers::ReceiverStream::new(messages));
        let mut client = raw.client.clone();
        let answer =
            tokio::spawn(
                async move { client.write(request).await.map(|answer| answer.into_inner().outcomes) },
            );
        let keys = keys.iter().map(|key| key.to_vec().into()).collect();
        let header =
            wire::WriteHeader { space: 1, keys, durability: durability.into(), ..Default::default() };
        sender.send(wire::WriteRequest { part: Some(Part::Header(header)) }).await.unwrap();
        (Self(sender), answer)
    }

    /// Fails when the stream has ended.
    async fn piece(&self, index: u32, offset: u64, data: &[u8]) -> bool {
        let piece = wire::WritePiece { index, offset, data: data.to_vec().into(), checksum: None };
        self.0.send(wire::WriteRequest { part: Some(Part::Piece(piece)) }).await.is_ok()
    }
}

/// A space is cleared between two blocks of a Write. The second one could be sealed with the sum of a block of before:
/// acknowledged, durable even, and readable by nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_ends_where_its_space_is_cleared() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let mut raw = Raw::open(&daemon).await;
    raw.space().await;
    let (sending, answer) = Sending::begin(&raw, &[b"a", b"b"], wire::Durability::Durable).await;
    assert!(sending.piece(0, 0, &payload([1; 4], 0)).await);
    let ask = wire::ExistsRequest { spaces: vec![1], keys: vec![b"a".to_vec().into()], ..Default::default() };
    let began = std::time::Instant::now();
    while raw.client.exists(raw.with(ask.clone())).await.unwrap().into_inner().prefix_blocks == 0 {
        assert!(began.elapsed() < common::PATIENCE, "the first block is not sealed");
    }
    let clear = raw.with(wire::ClearRequest { request_id: u64::MAX, space: 1 });
    assert!(raw.client.clear(clear).await.unwrap().into_inner().generation > 1);
    sending.piece(1, 0, &payload([2; 4], 0)).await;
    drop(sending);
    assert_refused(answer.await.unwrap(), Code::FailedPrecondition, "was cleared");
    drop(raw);
    daemon.assert_quiet().await;
}

/// Writers and readers stand still: each could hold its frames, and a place among the streams, for ever. They must be
/// ended, and a reader that goes on must not take what it has for all that there is.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_stand_still_are_ended() {
    let folder = folder();
    let limits = "pinned_bytes = \"64MiB\"\n[limits]\nstreams = 2\nstream_idle_ms = 400";
    let daemon = Running::start(folder.path(), limits);
    let (mut raw, names) = (Raw::open(&daemon).await, keys(96));
    raw.space().await;
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    session.write(&space, &names, None, &payloads(&names, 0), Durability::Readable).await.unwrap();
    drop((session, space));
    let (stuck, answer) = Sending::begin(&raw, &[b"w"], wire::Durability::Unspecified).await;
    assert!(stuck.piece(0, 0, &[7; 1000]).await);
    let patience = Duration::from_secs(20);
    let answer = tokio::time::timeout(patience, answer).await.expect("a writer that stands still goes on");
    assert_refused(answer.unwrap(), Code::DeadlineExceeded, "limits.stream_idle_ms");
    let (_never, messages) = tokio::sync::mpsc::channel::<wire::WriteRequest>(1);
    let request = raw.with(tokio_stream::wrappers::ReceiverStream::new(messages));
    let answer = tokio::time::timeout(patience, raw.client.write(request)).await;
    let answer = answer.expect("a writer that says nothing goes on");
    assert_refused(answer, Code::DeadlineExceeded, "limits.stream_idle_ms");
    let keys = names.iter().map(|name| name.to_vec().into()).collect();
    let ask = wire::ReadRequest { space: 1, keys, wait_ms: 5000 };
    let mut readers = Vec::new();
    for _ in 0..2 {
        readers.push(raw.client.read(raw.with(ask.clone())).await.unwrap().into_inner());
    }
    let began = std::time::Instant::now();
    let one = wire::ReadRequest { keys: ask.keys[..1].to_vec(), ..ask };
    while let Err(refused) = raw.client.read(raw.with(one.clone())).await {
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        assert!(began.elapsed() < patience, "two readers keep all others out");
    }
    while daemon.info().await.leases > 0 {
        assert!(began.elapsed() < patience, "a reader that stands still keeps its lease");
    }
    let counted = refused(&daemon);
    for mut reader in readers {
        let ended = loop {
            match reader.message().await {
                Ok(Some(_)) => {}
                ended => break ended,
            }
        };
        assert_refused(ended, Code::DeadlineExceeded, "limits.stream_idle_ms");
    }
    assert_eq!(refused(&daemon), counted + 2.0, "why a stream ended behind its messages is counted");
    drop((raw, stuck));
    daemon.assert_quiet().await;
}

/// One of two tenants opens stream after stream: half of them must be left to the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_leaves_streams_to_others() {
    let folder = folder();
    let tenants = "[limits]\nstreams = 4\n[[tenant]]\nname = \"default\"\n[[tenant]]\nname = \"blue\"\n";
    let daemon = Running::start(folder.path(), tenants);
    let (mut greedy, mut blue) = (Raw::open(&daemon).await, Raw::of_tenant(&daemon, "blue").await);
    greedy.space().await;
    blue.space().await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(Sending::begin(&greedy, &[b"a"], wire::Durability::Unspecified).await);
    }
    let began = std::time::Instant::now();
    let refused = loop {
        if let Some(at) = streams.iter().position(|(_, answer)| answer.is_finished()) {
            break streams.remove(at).1.await.unwrap();
        }
        assert!(began.elapsed() < Duration::from_secs(20), "a tenant has more than half of the streams");
        tokio::task::yield_now().await;
    };
    assert_refused(refused, Code::ResourceExhausted, "for this tenant");
    let sealed = write(&mut blue, b"a", &payload([1; 4], 0), None).await;
    assert_eq!(sealed.unwrap(), [i32::from(SealOutcome::Sealed)]);
    assert!(streams.iter().all(|(_, answer)| !answer.is_finished()));
    drop((streams, greedy, blue));
    daemon.assert_quiet().await;
}

/// `limits.spaces` is lowered below what is on disk. A space that has no room could be opened all the same, and then
/// refuse every write as unknown: it must say which limit is in the way, and the others serve what they had.
#[tokio::test(flavor = "multi_thread")]
async fn spaces_beyond_a_lowered_limit_are_not_opened() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "[limits]\nspaces = 2");
    let session = daemon.session(true).await;
    let keys = keys(1);
    for rank in 0..2 {
        let space = session.open_space(&manifest(rank)).await.unwrap();
        session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Durable).await.unwrap();
    }
    drop(session);
    daemon.terminate();
    let daemon = Running::start(folder.path(), "[limits]\nspaces = 1");
    let session = daemon.session(true).await;
    let mut refused = Vec::new();
    for rank in 0..2 {
        match session.open_space(&manifest(rank)).await {
            Ok(space) => assert!(session.read(&space, &keys).await.unwrap()[0].is_some()),
            Err(error) => refused.push(format!("{error:?}")),
        }
    }
    assert!(matches!(&refused[..], [one] if one.contains("limits.spaces")), "{refused:?}");
}

/// Something that is no client speaks to the socket: it is cut off, and others are served.
#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_lane() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &[0; 8]]
    {
        let mut stream = UnixStream::connect(socket(folder.path())).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // It ends, with or without a sentence before that.
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        assert!(ended.is_ok() || ended.unwrap_err().kind() == std::io::ErrorKind::ConnectionReset);
    }
    let session = daemon.session(true).await;
    session.open_space(&manifest(0)).await.unwrap();
    drop(session);
    daemon.assert_quiet().await;
}

/// A token is wrong: no session, on either transport, and the tenant's name is not confirmed.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_tokens() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "[[tenant]]\nname = \"blue\"\ntoken = \"secret\"");
    for lane in [true, false] {
        for (tenant, token) in [("blue", "wrong"), ("green", "secret"), ("", "")] {
            let target = Target {
                socket: lane.then(|| socket(folder.path())),
                grpc: (!lane).then(|| daemon.grpc.clone()),
                tenant: tenant.to_owned(),
                token: token.to_owned(),
                ..Default::default()
            };
            let refused = Session::connect(&target).await.map(|_| ()).unwrap_err().to_string();
            assert!(refused.contains("unknown tenant, or wrong token"), "{refused}");
        }
    }
    daemon.assert_quiet().await;
}

/// A second daemon starts on the same folder, on the same port, or with a file that cannot grow: each says what to do.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_taken_is_named() {
    let one = folder();
    let daemon = Running::start(one.path(), "");
    let refused = Running::try_start(one.path(), "").err().unwrap();
    let said = refused.lines().last().unwrap();
    assert!(said.contains("already in use by pid") && said.contains("data_dir"), "{said}");
    let two = folder();
    let port = daemon.grpc.strip_prefix("http://").unwrap();
    let refused = Running::try_start(two.path(), "grpc_lsiten = 1").err().unwrap();
    assert!(refused.contains("grpc_lsiten"), "{refused}");
    let metrics = format!("metrics_listen = \"{port}\"");
    let refused = Running::try_start(two.path(), &metrics).err().unwrap();
    let said = refused.lines().last().unwrap();
    assert!(said.contains(port) && said.contains("`metrics_listen`"), "{said}");
    let large = format!("[[device]]\npath = \"{}\"\nbytes = \"4TiB\"", two.path().join("big.dat").display());
    let refused = Running::try_start(two.path(), &large).err().unwrap();
    let said = refused.lines().last().unwrap();
    assert!(said.contains("big.dat"), "{said}");
    daemon.assert_quiet().await;
}

/// A client that finds no place was told that its session had ended, and to lease again.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_too_many_is_told_so() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "[limits]\nlane_connections = 1\n");
    let first = daemon.session(true).await;
    let target = Target { grpc: None, ..daemon.target(true) };
    let error = Session::connect(&target).await.map(|_| ()).unwrap_err();
    assert!(matches!(&error, terrace_client::ClientError::Throttled { .. }), "{error:?}");
    assert!(error.to_string().contains("limits.lane_connections"), "{error}");
    first.close();
    let began = std::time::Instant::now();
    while Session::connect(&target).await.is_err() {
        assert!(began.elapsed() < common::PATIENCE, "the place is not given back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The device is too small for what is written: the newest blocks stay, the oldest go, and nothing fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_device_evicts() {
    let folder = folder();
    let device = folder.path().join("small.dat");
    let tables = format!("[[device]]\npath = \"{}\"\nbytes = \"16MiB\"", device.display());
    let daemon = Running::start(folder.path(), &tables);
    let session = daemon.session(false).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let keys = keys(200);
    let written =
        session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Readable).await.unwrap();
    assert!(written.iter().all(|outcome| *outcome == terrace_client::SealOutcome::Sealed), "{written:?}");
    let found = session.read_within(&space, &keys, Duration::from_secs(5)).await.unwrap();
    for (key, bytes) in keys.iter().zip(&found) {
        assert!(bytes.as_ref().is_none_or(|bytes| *bytes == payload(*key, 0)), "wrong bytes");
    }
    let there = found.iter().flatten().count();
    assert!((40..200).contains(&there), "{there} blocks are there");
    drop((session, space));
    daemon.assert_quiet().await;
}

/// Prometheus' own opinion, where its tool is installed.
fn promtool(page: &str) {
    let started = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn();
    let Ok(mut child) = started else { return eprintln!("SKIPPED: promtool is not on PATH") };
    child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let checked = child.wait_with_output().unwrap();
    assert!(checked.status.success() && checked.stderr.is_empty(), "{checked:?}");
}

/// The page of metrics must be one that Prometheus takes: every metric has help, no name twice.
#[tokio::test(flavor = "multi_thread")]
async fn info_and_metrics_agree() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let info = daemon.info().await;
    assert_eq!(info.tiers.len(), 3, "{info:?}");
    assert!(info.tiers[0].note.contains("Hbm tier off"), "{info:?}");
    assert!(!info.tiers[2].backend.is_empty(), "{info:?}");
    assert_eq!(info.incarnation, daemon.incarnation);
    assert!(info.ready_ms < 30_000 && info.scan_done >= 1.0);
    let page = http(&daemon.metrics, "/metrics");
    let mut names: Vec<_> = info.counters.keys().collect();
    names.sort();
    for name in names {
        assert!(page.contains(&format!("# HELP {name} ")), "{name} is not on the page");
    }
    assert!(page.contains("terrace_frames{state=\"free\",tier=\"pinned\"}"), "{page}");
    assert!(http(&daemon.metrics, "/healthz").contains("ok"));
    promtool(page.split_once("\r\n\r\n").unwrap().1);
    daemon.terminate();
}

/// A tier without a curve, or a tenant that does not exist, must not look like a tier without traffic.
#[tokio::test(flavor = "multi_thread")]
async fn curves_that_cannot_be_are_refused() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let mut admin = terrace_client::admin(&daemon.grpc).await.unwrap();
    for tier in [wire::Tier::Hbm, wire::Tier::Remote] {
        let request = wire::CurveRequest { tier: tier.into(), tenant: String::new() };
        let refused = admin.curve(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    }
    let request = wire::CurveRequest { tier: 0, tenant: "nobody".to_owned() };
    let refused = admin.curve(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused:?}");
    assert!(refused.message().contains("nobody"));
    let request = wire::CurveRequest { tier: wire::Tier::Nvme.into(), tenant: "default".to_owned() };
    let curves = admin.curve(request).await.unwrap().into_inner().curves;
    assert!(curves.iter().all(|curve| curve.tier() == wire::Tier::Nvme && curve.tenant == "default"));
    daemon.terminate();
}

/// The smallest pool that is allowed: the windows of two writers could use up what the tenant may lease, so that neither
/// gets a frame. Both must write; a third must be told of the pool.
#[tokio::test(flavor = "multi_thread")]
async fn two_chunks_are_enough_for_two_writers() {
    let folder = folder();
    let daemon = Running::start(
        folder.path(),
        "chunk_bytes = \"4MiB\"\npinned_bytes = \"8MiB\"\nwindow_idle_ms = 60000\n",
    );
    let sessions = [daemon.session(true).await, daemon.session(true).await];
    for round in 0..3 {
        for (at, session) in (0u8..).zip(&sessions) {
            let space = session.open_space(&manifest(u32::from(at))).await.unwrap();
            let key = [keys(3)[round]];
            let written = session.write(&space, &key, None, &payloads(&key, at), Durability::Readable).await;
            assert!(written.is_ok(), "writer {at}, round {round}: {written:?}");
        }
    }
    let third = daemon.session(true).await;
    let space = third.open_space(&manifest(0)).await.unwrap();
    let key = [keys(9)[8]];
    let refused =
        third.write(&space, &key, None, &payloads(&key, 0), Durability::Readable).await.unwrap_err();
    assert!(refused.to_string().contains("`pinned_bytes`"), "{refused}");
    drop((sessions, third));
    daemon.terminate();
}

/// A client goes over each of its limits: the answer must name the limit as the configuration calls it, and another
/// session of the tenant must go on.
#[tokio::test(flavor = "multi_thread")]
async fn limits_are_named_as_they_are_configured() {
    let folder = folder();
    let limits = "[limits]\nleases_per_session = 2\nleases_per_tenant = 3\nleased_bytes_per_session = \"6MiB\"\nlease_hold_max_ms = 700";
    let daemon = Running::start(folder.path(), limits);
    let path = socket(folder.path());
    let mut greedy = common::lane::Lane::open(&path).await;
    let mut other = common::lane::Lane::open(&path).await;
    let ask = async |lane: &mut common::lane::Lane, kind: LeaseKind, first: u32, count: u32| {
        let request = wire::LeaseRequest {
            request_id: 1000 + u64::from(first),
            space: lane.space.space,
            kind: kind.into(),
            keys: (first..first + count).map(|key| key.to_le_bytes().to_vec().into()).collect(),
            ttl_ms: 600_000,
            wait_ms: 1000,
            ..Default::default()
        };
        match lane.ask(wire::lane_request::Op::Lease(request)).await {
            Ok((wire::lane_response::Result::Lease(leased), _)) => Ok(leased),
            Ok((answer, _)) => panic!("{answer:?}"),
            Err(error) => Err(error),
        }
    };
    let refused = |answer: Result<wire::LeaseResponse, wire::LaneError>, says: &str| {
        let error = answer.unwrap_err();
        assert!(error.code == Code::ResourceExhausted as u32 && error.message.contains(says), "{error:?}");
    };
    // A window of 4 MiB, and seven frames of 260 KiB.
    let first = ask(&mut greedy, LeaseKind::Write, 1, 7).await.unwrap();
    assert_eq!(first.blocks.iter().filter(|block| block.chunk > 0).count(), 7, "{first:?}");
    refused(ask(&mut greedy, LeaseKind::Write, 50, 2).await, "`limits.leased_bytes_per_session`");
    ask(&mut other, LeaseKind::Write, 60, 1).await.unwrap();
    ask(&mut other, LeaseKind::Write, 70, 1).await.unwrap();
    refused(ask(&mut other, LeaseKind::Write, 80, 1).await, "`limits.leases_per_session`");
    refused(ask(&mut greedy, LeaseKind::Write, 90, 1).await, "`limits.leases_per_tenant`");
    // Nobody lets go: the hold ends, whatever the time to live was.
    let began = std::time::Instant::now();
    while daemon.info().await.leases > 0 {
        assert!(began.elapsed() < common::PATIENCE, "leases are held for ever");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(daemon.info().await.counters["terrace_leases_revoked_total"], 3);
    ask(&mut greedy, LeaseKind::Write, 100, 1).await.unwrap();
    drop((greedy, other));
    daemon.assert_quiet().await;
}

fn processor_ticks(daemon: &Running) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // utime and stime, of which the first two fields are gone.
    fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// A program that leaks connections must not cost the daemon a processor, and once it is gone nothing is left of it.
#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_open_files_cost_no_processor() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    daemon.info().await;
    let now = daemon.footprint();
    let most = Some((now.descriptors + now.of_chunks) as u64 + 16);
    let limit = rustix::process::Rlimit { current: most, maximum: most };
    let pid = rustix::process::Pid::from_raw(i32::try_from(daemon.pid()).unwrap());
    rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit).unwrap();
    let address = daemon.grpc.trim_start_matches("http://");
    // The kernel takes those that the daemon cannot, up to the backlog.
    let connections: Vec<_> = (0..64).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = processor_ticks(&daemon);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ticks = processor_ticks(&daemon) - before;
    assert!(ticks < 20, "{ticks} hundredths of a second of processor time in one");
    drop(connections);
    daemon.info().await;
}

/// A shell allows 1,024 open files; a pool of a few hundred chunks needs more.
#[test]
fn as_many_files_are_opened_as_are_allowed() {
    let folder = folder();
    let mut child = std::process::Command::new("sh")
        .args(["-c", "ulimit -Sn 64; exec \"$0\" --config \"$1\"", env!("CARGO_BIN_EXE_terraced")])
        .arg(common::config(folder.path(), ""))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let began = std::time::Instant::now();
    let raised = loop {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap_or_default();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.get(3).is_some_and(|soft| Some(soft) == words.get(4)) {
            break true;
        }
        if began.elapsed() > common::PATIENCE {
            break false;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    child.wait().unwrap();
    assert!(raised, "the limit stayed at 64 of more");
}

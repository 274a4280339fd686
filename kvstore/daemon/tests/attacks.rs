//! Hostile and broken processes of this machine against the real daemon: what they are given cannot be made
//! writable, what they store too late is never served, and who sleeps too long is refused.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{BLOCK_BYTES, PATIENCE, Running, folder, keys, manifest, payload, payloads, socket};
use terrace_client::wire::{
    self, GrantOutcome, LaneError, LaneHello, LaneRequest, LaneResponse, LeaseKind, lane_request::Op,
    lane_response::Result as Answer,
};
use terrace_client::{Durability, SealOutcome, to_wire};
use terrace_core::{ByteCount, TenantKey, checksum};
use terrace_lane::{Access, LaneConnection, LaneReader, LaneWriter, Mapping};
use tonic::Code;

/// The lane by hand, so that it can do what the client library would not.
struct Lane {
    reader: LaneReader<LaneResponse>,
    writer: LaneWriter<LaneRequest>,
    last: u64,
    /// What the space of the tests is here: its handle, generation and key.
    space: wire::OpenSpaceResponse,
}

impl Lane {
    async fn open(path: &Path) -> Self {
        let (_, reader, writer) = LaneConnection::connect(path).await.unwrap().split();
        let mut lane = Self { reader, writer, last: 0, space: wire::OpenSpaceResponse::default() };
        let hello = LaneHello { version: 1, client: "attacker".into(), ..LaneHello::default() };
        lane.ask(Op::Hello(hello)).await.unwrap();
        let request = wire::OpenSpaceRequest { manifest: Some(to_wire(&manifest(0))), compute_cost: None };
        let (Answer::OpenSpace(space), _) = lane.ask(Op::OpenSpace(request)).await.unwrap() else { panic!() };
        lane.space = space;
        lane
    }

    async fn ask(&mut self, op: Op) -> Result<(Answer, Vec<OwnedFd>), LaneError> {
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

    async fn lease(&mut self, kind: LeaseKind, keys: &[[u8; 4]]) -> wire::LeaseResponse {
        let request = wire::LeaseRequest {
            request_id: 100 + self.last,
            space: self.space.space,
            kind: kind.into(),
            keys: keys.iter().map(|key| key.to_vec().into()).collect(),
            wait_ms: 5000,
            ttl_ms: 2000,
            ..wire::LeaseRequest::default()
        };
        let (Answer::Lease(leased), _) = self.ask(Op::Lease(request)).await.unwrap() else { panic!() };
        assert!(leased.blocks.iter().all(|block| block.outcome() == GrantOutcome::Granted), "{leased:?}");
        leased
    }

    /// Descriptors of a chunk: data, fences, length of the data.
    async fn descriptors(&mut self, chunk: u64) -> (OwnedFd, OwnedFd, u64, bool) {
        let (answer, mut both) = self.ask(Op::MapChunk(wire::MapChunk { chunk })).await.unwrap();
        let Answer::MappedChunk(mapped) = answer else { panic!("{answer:?}") };
        let fences = both.pop().unwrap();
        (both.pop().unwrap(), fences, mapped.bytes, mapped.writable)
    }

    /// Stores blocks into a window and seals them; gives the window's mapping and the places of the blocks.
    async fn write(&mut self, keys: &[[u8; 4]]) -> (Arc<Mapping>, wire::LeaseResponse) {
        let leased = self.lease(LeaseKind::Write, keys).await;
        let (data, fences, bytes, writable) = self.descriptors(leased.blocks[0].chunk).await;
        assert!(writable);
        let mapping = map(data, fences, bytes, Access::Write).unwrap();
        let mut blocks = Vec::new();
        for ((index, grant), key) in (0..).zip(&leased.blocks).zip(keys) {
            store(&mapping, grant.offset, &payload(*key, 0));
            let tenant = TenantKey::from_bytes(self.space.tenant_key.as_ref().try_into().unwrap());
            let space = manifest(0).space_id(terrace_core::tenant_id("default"));
            let sum = checksum(tenant.block_id(space, key), self.space.generation, &payload(*key, 0));
            blocks.push(wire::SealBlock { index, length: BLOCK_BYTES as u64, checksum: sum.get() });
        }
        let seal =
            wire::SealRequest { request_id: 100 + self.last, lease: leased.lease, blocks, durability: 0 };
        let (Answer::Seal(sealed), _) = self.ask(Op::Seal(seal)).await.unwrap() else { panic!() };
        assert!(sealed.outcomes.iter().all(|outcome| *outcome == i32::from(wire::SealOutcome::Sealed)));
        (mapping, leased)
    }

    async fn release(&mut self, lease: u64) {
        let request = wire::ReleaseRequest { request_id: 100 + self.last, leases: vec![lease] };
        self.ask(Op::Release(request)).await.unwrap();
    }
}

fn map(data: OwnedFd, fences: OwnedFd, bytes: u64, access: Access) -> Result<Arc<Mapping>, String> {
    let (bytes, page) = (ByteCount::new(bytes), ByteCount::new(4096));
    Mapping::map(data, bytes, fences, page, access).map_err(|error| error.to_string())
}

fn store(mapping: &Arc<Mapping>, offset: u64, bytes: &[u8]) {
    let length = ByteCount::new(bytes.len() as u64);
    mapping.view_mut(offset, length).expect("the mapping is writable").copy_from(0, bytes);
}

/// Reads by new sessions on both transports: each block must be exact or a miss. Returns how many there were.
async fn exact_or_missing(daemon: &Running, keys: &[[u8; 4]]) -> usize {
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

async fn write(daemon: &Running, lane: bool, keys: &[[u8; 4]], durability: Durability) {
    let session = daemon.session(lane).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let outcomes = session.write(&space, keys, None, &payloads(keys, 0), durability).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{outcomes:?}");
    if lane {
        session.flush_windows().await.unwrap();
    }
}

/// A reader tries everything to write into a chunk that it was given: as given, opened again, cut short, past its end.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_finds_no_way_to_write() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    write(&daemon, true, &keys(4), Durability::Readable).await;
    let mut lane = Lane::open(&socket(folder.path())).await;
    let leased = lane.lease(LeaseKind::Read, &keys(4)).await;
    let chunk = leased.blocks[0].chunk;
    let (data, fences, bytes, writable) = lane.descriptors(chunk).await;
    assert!(!writable);
    for (what, fd, bytes) in [("data", &data, bytes), ("fences", &fences, 4096)] {
        let given = fd.try_clone().unwrap();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let again = File::options().read(true).write(true).open(path).map(OwnedFd::from);
        for fd in [Some(given), again.ok()].into_iter().flatten() {
            let file = File::from(fd.try_clone().unwrap());
            assert!(file.write_at(b"x", 4096).is_err(), "{what}: written by a call");
            assert!(file.set_len(0).is_err(), "{what}: cut short");
            assert!(file.set_len(bytes * 2).is_err(), "{what}: grown");
            let mapped = map(fd.try_clone().unwrap(), fences.try_clone().unwrap(), bytes, Access::Write);
            assert!(mapped.is_err(), "{what}: mapped for writing");
            let beyond = map(fd, fences.try_clone().unwrap(), bytes + 4096, Access::Read);
            assert!(beyond.unwrap_err().contains("bytes"), "{what}: mapped past its end");
        }
    }
    let mapping = map(data, fences, bytes, Access::Read).unwrap();
    assert!(mapping.view(bytes - 1, ByteCount::new(2)).is_none());
    assert_eq!(exact_or_missing(&daemon, &keys(4)).await, 8);
    drop((lane, mapping));
    daemon.assert_quiet().await;
}

/// A writer goes on storing into what it has sealed, before anybody has read it and after: a read by value must
/// never bring it, nor may a device, also not after the window is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn stores_after_the_seal_are_not_served() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let keys = keys(6);
    let mut lane = Lane::open(&socket(folder.path())).await;
    let (mapping, leased) = lane.write(&keys).await;
    let spoil = |range: std::ops::Range<usize>| {
        leased.blocks[range].iter().for_each(|grant| store(&mapping, grant.offset + 5000, b"spoilt"));
    };
    spoil(0..2);
    let before = exact_or_missing(&daemon, &keys).await;
    assert!(before >= 4, "only {before} of the blocks that nobody spoilt");
    spoil(2..4);
    exact_or_missing(&daemon, &keys).await;
    drop(lane);
    spoil(4..6);
    exact_or_missing(&daemon, &keys).await;
    daemon.assert_quiet().await;
    exact_or_missing(&daemon, &keys).await;
    daemon.kill();
    let daemon = Running::start(folder.path(), "");
    exact_or_missing(&daemon, &keys).await;
}

/// What a writer that handed its window back keeps of it.
enum Kept {
    Mapping,
    Descriptor,
    Nothing,
}

/// A writer hands its window back, and keeps a way to write into it: the window must not become a chunk that blocks
/// are read from in place. One that keeps nothing must have it adopted, or the test would pass for the wrong reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_mapping_that_is_kept_is_of_no_use() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let mut kept_mappings = Vec::new();
    for (life, kept) in [(0, Kept::Mapping), (1, Kept::Descriptor), (2, Kept::Nothing)] {
        let keys: Vec<_> = (life * 100..life * 100 + 6).map(u32::to_le_bytes).collect();
        let before = daemon.info().await.counters;
        let mut lane = Lane::open(&socket(folder.path())).await;
        let (mapping, leased) = lane.write(&keys).await;
        lane.release(leased.lease).await;
        let chunk = leased.blocks[0].chunk;
        let (descriptor, ..) = lane.descriptors(chunk).await;
        let store = || leased.blocks.iter().for_each(|grant| store(&mapping, grant.offset + 5000, b"spoilt"));
        let expected = match kept {
            Kept::Nothing => "terrace_windows_adopted_total",
            Kept::Mapping | Kept::Descriptor => "terrace_windows_replaced_total",
        };
        let mut held = None;
        match kept {
            Kept::Mapping => drop(descriptor),
            Kept::Descriptor => {
                mapping.drop_write().unwrap();
                held = Some(descriptor);
            }
            Kept::Nothing => {
                mapping.drop_write().unwrap();
                drop(descriptor);
            }
        }
        lane.ask(Op::ReturnWindow(wire::ReturnWindow { chunk })).await.unwrap();
        let began = Instant::now();
        while daemon.info().await.counters[expected] == before[expected] {
            assert!(began.elapsed() < PATIENCE, "{expected} does not rise");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let session = daemon.session(true).await;
        let space = session.open_space(&manifest(0)).await.unwrap();
        if mapping.is_writable() {
            // Until its blocks have left.
            while lane.ask(Op::MapChunk(wire::MapChunk { chunk })).await.is_ok() {
                assert!(began.elapsed() < PATIENCE, "the window is not replaced");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            store();
        }
        let found = common::granted(&session, &space, &keys).await;
        for (key, bytes) in keys.iter().zip(found) {
            assert!(bytes.is_some_and(|bytes| bytes == payload(*key, 0)), "{key:?} was lost or spoilt");
        }
        kept_mappings.push((mapping, held));
    }
    drop(kept_mappings);
    daemon.assert_quiet().await;
}

/// The client library hands windows back in which its own readers are still at work: they must be adopted all the same,
/// or every window costs a copy.
#[tokio::test(flavor = "multi_thread")]
async fn an_honest_window_is_adopted() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let keys = keys(4);
    session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Readable).await.unwrap();
    let reading = session.lease_read(&space, &keys, terrace_client::ReadOptions::default()).await.unwrap();
    assert_eq!(session.flush_windows().await.unwrap(), 1);
    let began = Instant::now();
    loop {
        let counters = daemon.info().await.counters;
        assert_eq!(counters["terrace_windows_replaced_total"], 0, "an honest window is replaced");
        if counters["terrace_windows_adopted_total"] == 1 {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "the window is not adopted");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    for (key, block) in keys.iter().zip(&reading.grants) {
        let mut bytes = vec![0; BLOCK_BYTES];
        block.granted().unwrap().read_verified(&mut bytes).unwrap();
        assert_eq!(bytes, payload(*key, 0));
    }
    drop((reading, space, session));
    daemon.assert_quiet().await;
}

fn helper(name: &str, path: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--ignored", "--nocapture"]).env("TERRACE_TEST_SOCKET", path);
    command
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([name, &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

fn wait_for(path: &Path) {
    let began = Instant::now();
    while !path.exists() {
        assert!(began.elapsed() < PATIENCE, "{} does not come", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A writer is killed while its child has the window mapped and goes on storing: what others seal from then on must
/// come back as it was sealed, and the window must not be used again.
#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_cannot_spoil_what_is_sealed_later() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let ready = folder.path().join("orphan");
    let mut parent =
        helper("has_a_child_that_stores", &socket(folder.path())).env("READY", &ready).spawn().unwrap();
    wait_for(&ready);
    parent.kill().unwrap();
    parent.wait().unwrap();
    let orphan = std::fs::read_to_string(&ready).unwrap();
    let stores = || std::fs::metadata(ready.with_extension("beat")).map_or(0, |facts| facts.len());
    let began = Instant::now();
    while daemon.info().await.counters["terrace_windows_replaced_total"] == 0 {
        assert!(began.elapsed() < PATIENCE, "the window of a dead writer is kept");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // More than memory holds, so that every frame there is gets used.
    for first in (1000..1160u32).step_by(20) {
        let keys: Vec<_> = (first..first + 20).map(u32::to_le_bytes).collect();
        write(&daemon, true, &keys, Durability::Durable).await;
        assert_eq!(exact_or_missing(&daemon, &keys).await, 40);
    }
    let before = stores();
    while stores() <= before {
        assert!(began.elapsed() < PATIENCE, "the orphan stores no more; nothing was tested");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let all: Vec<_> = (1000..1160u32).map(u32::to_le_bytes).collect();
    exact_or_missing(&daemon, &all).await;
    assert!(Command::new("kill").args(["-KILL", &orphan]).status().unwrap().success());
    daemon.assert_quiet().await;
}

/// The parent of the test above; by itself it is no test.
#[tokio::test]
#[ignore = "is started by an_orphan_cannot_spoil_what_is_sealed_later"]
async fn has_a_child_that_stores() {
    let Some(path) = std::env::var_os("TERRACE_TEST_SOCKET") else { return };
    let mut lane = Lane::open(path.as_ref()).await;
    let leased = lane.lease(LeaseKind::Write, &keys(3)).await;
    let (data, _, bytes, _) = lane.descriptors(leased.blocks[0].chunk).await;
    let mut child = helper("stores_for_ever", path.as_ref());
    // Both run until they are killed.
    child.env("BYTES", bytes.to_string()).stdin(Stdio::from(data)).spawn().unwrap().wait().unwrap();
}

/// The child: it has the window's descriptor and nothing else.
#[test]
#[ignore = "is started by has_a_child_that_stores"]
fn stores_for_ever() {
    let (Some(bytes), Some(ready)) = (std::env::var_os("BYTES"), std::env::var_os("READY")) else { return };
    let bytes: u64 = bytes.to_str().unwrap().parse().unwrap();
    let fd = || std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let length = ByteCount::new(bytes);
    let window = Mapping::map(fd(), length, fd(), length, Access::Write).unwrap();
    let junk = vec![0xee; usize::try_from(bytes).unwrap()];
    let ready = std::path::PathBuf::from(ready);
    let mut beats = File::create(ready.with_extension("beat")).unwrap();
    let began = Instant::now();
    while began.elapsed() < 2 * PATIENCE {
        store(&window, 0, &junk);
        std::io::Write::write_all(&mut beats, b".").unwrap();
        if !ready.exists() {
            let partial = ready.with_extension("part");
            std::fs::write(&partial, std::process::id().to_string()).unwrap();
            std::fs::rename(partial, &ready).unwrap();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A client is stopped for longer than its lease, and its frames are filled with other blocks meanwhile: when it goes
/// on, its fence must refuse what it finds.
#[tokio::test(flavor = "multi_thread")]
async fn who_sleeps_too_long_is_refused() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    write(&daemon, true, &keys(4), Durability::Durable).await;
    let ready = folder.path().join("sleeper");
    let mut sleeper =
        helper("reads_after_its_sleep", &socket(folder.path())).env("READY", &ready).spawn().unwrap();
    wait_for(&ready);
    signal(&sleeper, "-STOP");
    let began = Instant::now();
    while daemon.info().await.leases > 0 {
        assert!(began.elapsed() < PATIENCE, "a stopped client keeps its lease");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // By streams, which are stored into frames of the pool.
    for first in (1000..1200u32).step_by(20) {
        let keys: Vec<_> = (first..first + 20).map(u32::to_le_bytes).collect();
        write(&daemon, false, &keys, Durability::Durable).await;
    }
    std::fs::write(ready.with_extension("go"), "").unwrap();
    signal(&sleeper, "-CONT");
    assert!(sleeper.wait().unwrap().success(), "the sleeper was served");
    daemon.assert_quiet().await;
}

/// The client of the test above. It has heard nothing of the end of its lease: only the fence can tell it.
#[tokio::test]
#[ignore = "is started by who_sleeps_too_long_is_refused"]
async fn reads_after_its_sleep() {
    let Some(path) = std::env::var_os("TERRACE_TEST_SOCKET") else { return };
    let mut lane = Lane::open(path.as_ref()).await;
    let leased = lane.lease(LeaseKind::Read, &keys(4)).await;
    let mut blocks = Vec::new();
    for (key, grant) in keys(4).into_iter().zip(leased.blocks) {
        let (data, fences, bytes, _) = lane.descriptors(grant.chunk).await;
        blocks.push((key, map(data, fences, bytes, Access::Read).unwrap(), grant));
    }
    let ready = std::path::PathBuf::from(std::env::var_os("READY").unwrap());
    std::fs::write(&ready, "").unwrap();
    wait_for(&ready.with_extension("go"));
    let mut overwritten = 0;
    for (key, mapping, grant) in blocks {
        let mut bytes = vec![0; BLOCK_BYTES];
        mapping.view(grant.offset, ByteCount::new(grant.length)).unwrap().copy_to(&mut bytes);
        let exact = bytes == payload(key, 0);
        let valid = mapping.fence(grant.frame).unwrap().get() == grant.fence;
        assert!(exact || !valid, "other bytes, and the fence says that they are the block's");
        overwritten += usize::from(!exact);
    }
    assert!(overwritten > 0, "nothing was overwritten; nothing was tested");
}

/// Another user of the machine connects, with and without the socket's mode in his way: the kernel must refuse him.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_cannot_connect() {
    const NOBODY: u32 = 65534;
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let path = socket(folder.path());
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        return eprintln!("SKIPPED: another user needs root");
    }
    // A copy that he can run; the build folder may not be his to enter.
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = home.path().join("attacks");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let run = |uid: u32| {
        let mut command = Command::new(&program);
        command.args(["connects", "--exact", "--ignored"]).env("TERRACE_TEST_SOCKET", &path);
        command.uid(uid).gid(uid).current_dir("/").output().unwrap()
    };
    let own = run(0);
    assert!(own.status.success(), "{own:?}");
    let other = run(NOBODY);
    let said = String::from_utf8_lossy(&other.stdout).into_owned() + &String::from_utf8_lossy(&other.stderr);
    assert!(!other.status.success() && said.contains("PermissionDenied"), "{said}");
    daemon.assert_quiet().await;
}

/// The other user.
#[test]
#[ignore = "is started by another_user_cannot_connect"]
fn connects() {
    let Some(path) = std::env::var_os("TERRACE_TEST_SOCKET") else { return };
    UnixStream::connect(path).map_err(|error| error.kind()).unwrap();
}

/// Requests that are well formed and not allowed: each is refused with a sentence, and the session goes on.
#[tokio::test(flavor = "multi_thread")]
async fn the_lane_refuses_what_is_not_the_sessions_own() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "[limits]\nblocks_per_request = 100");
    let path = socket(folder.path());
    let (mut one, mut two) = (Lane::open(&path).await, Lane::open(&path).await);
    let leased = one.lease(LeaseKind::Write, &keys(2)).await;
    let chunk = leased.blocks[0].chunk;
    let refused = |answer: Result<(Answer, Vec<OwnedFd>), LaneError>, code: Code, says: &str| {
        let error = answer.unwrap_err();
        assert!(error.code == code as u32 && error.message.contains(says), "{error:?}");
    };
    let release = |leases| Op::Release(wire::ReleaseRequest { request_id: 7, leases });
    refused(two.ask(release(vec![leased.lease])).await, Code::FailedPrecondition, "not a live lease");
    let renew = |lease| Op::Renew(wire::RenewRequest { lease, ..Default::default() });
    refused(two.ask(renew(leased.lease)).await, Code::FailedPrecondition, "not a live lease");
    refused(two.ask(renew(leased.lease & 0xffff_ffff)).await, Code::FailedPrecondition, "earlier life");
    let back = Op::ReturnWindow(wire::ReturnWindow { chunk });
    assert!(two.ask(back.clone()).await.is_err(), "a foreign window was handed back");
    assert!(one.ask(back).await.is_err(), "a window was taken back while it is filled");
    assert!(two.ask(Op::MapChunk(wire::MapChunk { chunk: chunk + 1000 })).await.is_err());
    let keys: Vec<_> = (0..101).map(|key: u32| key.to_le_bytes().to_vec().into()).collect();
    let space = two.space.space;
    let many = wire::LeaseRequest { space, kind: LeaseKind::Read.into(), keys, ..Default::default() };
    refused(two.ask(Op::Lease(many)).await, Code::InvalidArgument, "limit is 100");
    let again = LaneHello { version: 1, ..LaneHello::default() };
    refused(two.ask(Op::Hello(again)).await, Code::FailedPrecondition, "open already");
    let unknown = wire::LeaseRequest { space: space + 1, ..Default::default() };
    assert!(two.ask(Op::Lease(unknown)).await.is_err());
    one.release(leased.lease).await;
    drop((one, two));
    daemon.assert_quiet().await;
}

/// A client maps a chunk and never answers nor reads again: its window is taken from it, others go on, and its
/// memory comes back when it is gone.
#[tokio::test(flavor = "multi_thread")]
async fn who_never_answers_costs_nobody_else() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "window_idle_ms = 100\nwindow_recall_max_ms = 300");
    let mut silent = Lane::open(&socket(folder.path())).await;
    let (mapping, leased) = silent.write(&keys(2)).await;
    silent.release(leased.lease).await;
    let began = Instant::now();
    while daemon.info().await.counters["terrace_windows_replaced_total"] == 0 {
        assert!(began.elapsed() < PATIENCE, "the window stays with a client that does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let others: Vec<_> = (100..140u32).map(u32::to_le_bytes).collect();
    write(&daemon, true, &others, Durability::Durable).await;
    assert_eq!(exact_or_missing(&daemon, &others).await, 80);
    drop((silent, mapping));
    daemon.assert_quiet().await;
}

/// The socket's path is too long, or its folder cannot be written: the daemon must say so and end.
#[test]
fn bad_socket_paths_are_named() {
    let folder = folder();
    let long = folder.path().join("x".repeat(120));
    for (path, says) in [(long.as_path(), "107"), (Path::new("/proc/none/lane.sock"), "/proc/none/lane.sock")]
    {
        let config = common::config(folder.path(), "");
        let own = socket(folder.path()).display().to_string();
        let text = std::fs::read_to_string(&config).unwrap().replace(&own, &path.display().to_string());
        std::fs::write(&config, text).unwrap();
        let ended =
            Command::new(env!("CARGO_BIN_EXE_terraced")).arg("--config").arg(&config).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!ended.status.success() && said.lines().last().unwrap().contains(says), "{said}");
    }
}

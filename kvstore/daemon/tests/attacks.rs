//! Hostile and broken processes of this machine against the real daemon: what they are given cannot be made
//! writable, what they store too late is never served, and who sleeps too long is refused.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::lane::{Lane, exact_or_missing, helper, map, signal, store, wait_for, write};
use common::{BLOCK_BYTES, PATIENCE, Running, folder, http, keys, manifest, payload, payloads, socket};
use terrace_client::Durability;
use terrace_client::wire::{
    self, LaneError, LaneHello, LeaseKind, lane_request::Op, lane_response::Result as Answer,
};
use terrace_core::ByteCount;
use terrace_lane::{Access, Mapping};
use tonic::Code;

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
    // Copied to a device sooner, the blocks would be looked at then, and the stores come after the first look.
    let daemon = Running::start(folder.path(), "persist_delay_ms = 600000");
    // Nobody spoils the last two.
    let keys = keys(8);
    let mut lane = Lane::open(&socket(folder.path())).await;
    let (mapping, leased) = lane.write(&keys).await;
    let spoil = |range: std::ops::Range<usize>| {
        leased.blocks[range].iter().for_each(|grant| store(&mapping, grant.offset + 5000, b"spoilt"));
    };
    spoil(0..2);
    // In place, without a checksum of the reader's own: the daemon's look at the first use must refuse them.
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let found = common::granted(&session, &space, &keys[..2]).await;
    assert!(found.iter().all(Option::is_none), "a spoilt block is granted");
    drop((session, space));
    let before = exact_or_missing(&daemon, &keys).await;
    assert!(before >= 4, "only {before} of the blocks that nobody spoilt");
    spoil(2..4);
    exact_or_missing(&daemon, &keys).await;
    drop(lane);
    spoil(4..6);
    exact_or_missing(&daemon, &keys).await;
    daemon.assert_quiet().await;
    exact_or_missing(&daemon, &keys).await;
    // Those that were spoilt may be found now, and fail.
    let mut admin = terrace_client::admin(&daemon.grpc).await.unwrap();
    admin.flush(wire::FlushRequest {}).await.unwrap();
    daemon.kill();
    let daemon = Running::start(folder.path(), "");
    exact_or_missing(&daemon, &keys).await;
    assert_eq!(exact_or_missing(&daemon, &keys[6..]).await, 4, "what nobody spoilt is on the device");
}

/// Windows that are handed back until one must have been adopted: a process that another test starts meanwhile has all
/// descriptors of this one until it runs its program, and may be found with them.
const TRIES: usize = 8;

/// Waits for the daemon to look who can write into a window that was handed back: whether it was adopted, not replaced.
async fn is_adopted(daemon: &Running, before: &HashMap<String, u64>) -> bool {
    let began = Instant::now();
    loop {
        let now = daemon.info().await.counters;
        let rose = |name: &str| now[name] > before[name];
        match (rose("terrace_windows_adopted_total"), rose("terrace_windows_replaced_total")) {
            (false, false) => {
                assert!(began.elapsed() < PATIENCE, "the window is neither adopted nor replaced")
            }
            (adopted, replaced) => {
                assert!(adopted != replaced, "one window was both");
                return adopted;
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
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
    let mut adopted = false;
    let nothing = std::iter::repeat_with(|| Kept::Nothing).take(TRIES);
    for (life, kept) in (0..).zip([Kept::Mapping, Kept::Descriptor].into_iter().chain(nothing)) {
        let keys: Vec<_> = (life * 100..life * 100 + 6).map(u32::to_le_bytes).collect();
        let before = daemon.info().await.counters;
        let mut lane = Lane::open(&socket(folder.path())).await;
        let (mapping, leased) = lane.write(&keys).await;
        lane.release(leased.lease).await;
        let chunk = leased.blocks[0].chunk;
        let (descriptor, ..) = lane.descriptors(chunk).await;
        let store = || leased.blocks.iter().for_each(|grant| store(&mapping, grant.offset + 5000, b"spoilt"));
        let may_be_adopted = matches!(kept, Kept::Nothing);
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
        adopted = is_adopted(&daemon, &before).await;
        assert!(may_be_adopted || !adopted, "a window that is written into was adopted");
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
        if adopted {
            break;
        }
    }
    assert!(adopted, "a window of which its writer kept nothing is never adopted");
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
    let mut adopted = false;
    for first in (0..).step_by(100).take(TRIES) {
        let keys: Vec<_> = (first..first + 4u32).map(u32::to_le_bytes).collect();
        let before = daemon.info().await.counters;
        session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Readable).await.unwrap();
        let reading =
            session.lease_read(&space, &keys, terrace_client::ReadOptions::default()).await.unwrap();
        assert_eq!(session.flush_windows().await.unwrap(), 1);
        adopted = is_adopted(&daemon, &before).await;
        if !adopted {
            continue;
        }
        for (key, block) in keys.iter().zip(&reading.grants) {
            let mut bytes = vec![0; BLOCK_BYTES];
            block.granted().unwrap().read_verified(&mut bytes).unwrap();
            assert_eq!(bytes, payload(*key, 0));
        }
        break;
    }
    assert!(adopted, "an honest window is never adopted");
    drop((space, session));
    daemon.assert_quiet().await;
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
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    // More than memory holds, so that every frame there is gets used.
    for first in (1000..1160u32).step_by(20) {
        let keys: Vec<_> = (first..first + 20).map(u32::to_le_bytes).collect();
        // By a stream they go into whatever memory of the pool is free; nobody looks at a checksum before they are used.
        write(&daemon, first % 40 != 0, &keys, Durability::Durable).await;
        for (key, bytes) in keys.iter().zip(common::granted(&session, &space, &keys).await) {
            assert!(bytes.is_none_or(|bytes| bytes == payload(*key, 0)), "{key:?} has other bytes in place");
        }
        assert_eq!(exact_or_missing(&daemon, &keys).await, 40);
    }
    drop((session, space));
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

/// A client with leases and a window is killed while a child of it holds its socket open: the end of its process alone
/// must end its leases, and soon.
#[tokio::test(flavor = "multi_thread")]
async fn death_is_noticed_though_the_socket_stays_open() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let mut took = Vec::new();
    for round in 0..5 {
        let ready = folder.path().join(format!("victim{round}"));
        let mut victim = helper("leaves_its_socket_to_a_child", &socket(folder.path()))
            .env("READY", &ready)
            .spawn()
            .unwrap();
        wait_for(&ready);
        let heir = std::fs::read_to_string(&ready).unwrap();
        let before = daemon.info().await;
        assert!(before.leases > 0 && before.sessions == 1, "{before:?}");
        let replaced = before.counters["terrace_windows_replaced_total"];
        victim.kill().unwrap();
        let began = Instant::now();
        loop {
            let info = daemon.info().await;
            if info.leases == 0 && info.counters["terrace_windows_replaced_total"] > replaced {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "the leases of a dead client stay");
        }
        took.push(began.elapsed());
        let alive = Command::new("kill").args(["-KILL", &heir]).status().unwrap();
        assert!(alive.success(), "the child with the socket was gone: nothing was tested");
        victim.wait().unwrap();
    }
    took.sort();
    println!("noticed after {took:?}");
    // The machine may be busy; the daemon has nothing to wait for.
    assert!(took[took.len() / 2] < Duration::from_millis(100), "noticed after {took:?}");
    daemon.assert_quiet().await;
}

/// The client of the test above. Its child, which has its end of the socket, sleeps.
#[tokio::test]
#[ignore = "is started by death_is_noticed_though_the_socket_stays_open"]
async fn leaves_its_socket_to_a_child() {
    let Some(path) = std::env::var_os("TERRACE_TEST_SOCKET") else { return };
    let stream = UnixStream::connect(path).unwrap();
    let heirloom = stream.try_clone().unwrap();
    let mut lane = Lane::over(stream, "", "").await;
    // Blocks outlive their writer: each victim has its own.
    let own = [0, 1, 2].map(|key| (std::process::id() * 4 + key).to_le_bytes());
    let _held = lane.write(&own).await;
    lane.lease(LeaseKind::Read, &own).await;
    let mut heir =
        Command::new("sleep").arg("600").stdin(Stdio::from(OwnedFd::from(heirloom))).spawn().unwrap();
    let ready = std::path::PathBuf::from(std::env::var_os("READY").unwrap());
    let partial = ready.with_extension("part");
    std::fs::write(&partial, heir.id().to_string()).unwrap();
    std::fs::rename(partial, &ready).unwrap();
    // Until this process is killed.
    heir.wait().unwrap();
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
    let Some(found) = looks_after_its_sleep(&keys(4)).await else { return };
    assert!(found.overwritten > 0, "nothing was overwritten; nothing was tested");
}

/// What a client finds that was stopped.
struct Found {
    refused: usize,
    overwritten: usize,
}

/// Maps the chunks of the blocks, tells that it is ready, and when it may go on reads what it was granted.
async fn looks_after_its_sleep(keys: &[[u8; 4]]) -> Option<Found> {
    let path = std::env::var_os("TERRACE_TEST_SOCKET")?;
    let mut lane = Lane::open(path.as_ref()).await;
    let leased = lane.lease(LeaseKind::Read, keys).await;
    let mut chunks = BTreeMap::new();
    for grant in &leased.blocks {
        if let Entry::Vacant(chunk) = chunks.entry(grant.chunk) {
            let (data, fences, bytes, _) = lane.descriptors(grant.chunk).await;
            chunk.insert(map(data, fences, bytes, Access::Read).unwrap());
        }
    }
    let ready = std::path::PathBuf::from(std::env::var_os("READY").unwrap());
    let partial = ready.with_extension("part");
    std::fs::write(&partial, chunks.len().to_string()).unwrap();
    std::fs::rename(partial, &ready).unwrap();
    wait_for(&ready.with_extension("go"));
    let mut found = Found { refused: 0, overwritten: 0 };
    for (key, grant) in keys.iter().zip(leased.blocks) {
        let mapping = &chunks[&grant.chunk];
        let mut bytes = vec![0; BLOCK_BYTES];
        mapping.view(grant.offset, ByteCount::new(grant.length)).unwrap().copy_to(&mut bytes);
        let exact = bytes == payload(*key, 0);
        let valid = mapping.fence(grant.frame).unwrap().get() == grant.fence;
        assert!(exact || !valid, "other bytes, and the fence says that they are the block's");
        found.overwritten += usize::from(!exact);
        found.refused += usize::from(!valid);
    }
    Some(found)
}

/// Blocks of half of a pool of 24 chunks, and of three whole ones.
const HALF: u32 = 180;
const THREE_POOLS: u32 = 1080;

/// A client that has mapped half of a full pool is stopped, and keeps the memory of what is dropped: each writer would
/// wait two seconds for each chunk of it, and the pool would lose them all. Writers wait once, and what it has mapped
/// goes last. When it goes on, its fences must refuse what was taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_client_holds_up_writers_once() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "pinned_bytes = \"96MiB\"");
    let fill = async |numbers: std::ops::Range<u32>| {
        let keys: Vec<_> = numbers.map(u32::to_le_bytes).collect();
        let began = Instant::now();
        write(&daemon, true, &keys, Durability::Readable).await;
        began.elapsed()
    };
    // What is read comes last: room for the next window may push the first ones out.
    for first in (HALF..2 * HALF).chain(0..HALF).step_by(15) {
        fill(first..first + 15).await;
    }
    let ready = folder.path().join("sleeper");
    let mut sleeper =
        helper("reads_half_a_pool", &socket(folder.path())).env("READY", &ready).spawn().unwrap();
    wait_for(&ready);
    let mapped: u64 = std::fs::read_to_string(&ready).unwrap().parse().unwrap();
    signal(&sleeper, "-STOP");
    let began = Instant::now();
    while daemon.info().await.leases > 0 {
        assert!(began.elapsed() < PATIENCE, "a stopped client keeps its lease");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut took = Vec::new();
    for first in (1000..1000 + THREE_POOLS).step_by(15) {
        took.push(fill(first..first + 15).await);
    }
    let page = http(&daemon.metrics, "/metrics");
    let lingering = page.lines().find_map(|line| line.strip_prefix("terrace_lingering_bytes ")).unwrap();
    let kept = lingering.parse::<u64>().unwrap() >> 22;
    took.sort();
    println!("{kept} of {mapped} chunks are kept; the slowest writes took {:?}", &took[took.len() - 4..]);
    assert!(kept > 0, "nothing of the stopped client's was dropped; nothing was tested");
    // Four that are late, and what is emptied ahead for windows meanwhile.
    assert!(kept <= 8 && mapped >= 12, "{kept} of {mapped} chunks are kept");
    assert!(took[took.len() - 2] < Duration::from_secs(1), "writers waited again: {took:?}");
    std::fs::write(ready.with_extension("go"), "").unwrap();
    signal(&sleeper, "-CONT");
    assert!(sleeper.wait().unwrap().success(), "the sleeper was served");
    daemon.assert_quiet().await;
}

/// The client of the test above.
#[tokio::test]
#[ignore = "is started by a_stopped_client_holds_up_writers_once"]
async fn reads_half_a_pool() {
    let Some(found) = looks_after_its_sleep(&keys(HALF)).await else { return };
    assert!(found.refused > 0, "nothing was taken; nothing was tested");
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

/// A session asks for the chunks of another tenant, by their numbers: it must not get one, nor learn that they exist.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_maps_only_its_own_chunks() {
    let folder = folder();
    let tenants = "[[tenant]]\nname = \"default\"\n[[tenant]]\nname = \"blue\"\ntoken = \"secret\"";
    let daemon = Running::start(folder.path(), tenants);
    let path = socket(folder.path());
    let mut own = Lane::open(&path).await;
    let (mapping, leased) = own.write(&keys(2)).await;
    write(&daemon, false, &[[9; 4]], Durability::Readable).await;
    let mut blue = Lane::open_as(&path, "blue", "secret").await;
    let chunk = leased.blocks[0].chunk;
    let mut told = Vec::new();
    for asked in [chunk, chunk + 1, chunk + 2, chunk + 1000] {
        let refused = blue.ask(Op::MapChunk(wire::MapChunk { chunk: asked })).await.unwrap_err();
        told.push((refused.code, refused.message.replace(&asked.to_string(), "N")));
    }
    assert!(told.iter().all(|answer| *answer == told[0]), "{told:?}");
    assert!(own.ask(Op::MapChunk(wire::MapChunk { chunk })).await.is_ok());
    drop((own, blue, mapping));
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

/// A client's address space is too small for the chunk that it is granted: it must get an error that says so, and go on,
/// and the daemon must get everything back.
#[tokio::test(flavor = "multi_thread")]
async fn a_mapping_beyond_the_address_space_is_an_error() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "chunk_bytes = \"8MiB\"\npinned_bytes = \"64MiB\"");
    write(&daemon, true, &keys(4), Durability::Readable).await;
    let client = helper("has_no_room_to_map", &socket(folder.path())).output().unwrap();
    let said =
        String::from_utf8_lossy(&client.stdout).into_owned() + &String::from_utf8_lossy(&client.stderr);
    if said.contains("SKIPPED") {
        return eprintln!("{said}");
    }
    assert!(client.status.success(), "{said}");
    daemon.assert_quiet().await;
}

/// The client of the test above: it may map some more memory, but not a chunk.
#[tokio::test]
#[ignore = "is started by a_mapping_beyond_the_address_space_is_an_error"]
async fn has_no_room_to_map() {
    let Some(path) = std::env::var_os("TERRACE_TEST_SOCKET") else { return };
    let target = terrace_client::Target { socket: Some(path.into()), ..Default::default() };
    let session = terrace_client::Session::connect(&target).await.unwrap();
    let space = session.open_space(&manifest(0)).await.unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let used = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let used: u64 = used.trim().trim_end_matches(" kB").parse().unwrap();
    let limit = |bytes: &str| {
        let pid = std::process::id().to_string();
        Command::new("prlimit").args(["--pid", &pid, &format!("--as={bytes}:")]).status()
    };
    if !limit(&((used + (6 << 10)) << 10).to_string()).is_ok_and(|status| status.success()) {
        return println!("SKIPPED: prlimit is not on PATH");
    }
    for _ in 0..2 {
        let options = terrace_client::ReadOptions { wait: PATIENCE, ..Default::default() };
        let refused = session.lease_read(&space, &keys(4), options).await;
        let error = refused.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("mapping data of the chunk"), "{error}");
    }
    assert!(session.exists(&[&space], &keys(4), terrace_core::MatchMode::Set).await.is_ok());
    assert!(limit("unlimited").unwrap().success());
    assert!(session.read(&space, &keys(4)).await.unwrap().iter().all(Option::is_some));
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

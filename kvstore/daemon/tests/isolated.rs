//! Writers whose memory is not trusted: those of an isolated tenant, and of another user of the machine. What they seal
//! is copied, and no page of theirs is served.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use common::lane::{Lane, exact_or_missing, map, store};
use common::{BLOCK_BYTES, PATIENCE, Running, folder, keys, manifest, payload, payloads, socket};
use terrace_client::wire::{self, LeaseKind, lane_request::Op};
use terrace_client::{Durability, SealOutcome};
use terrace_core::ByteCount;
use terrace_lane::Access;
use tonic::Code;

/// Rounds of a writer that changes what it seals, and most of them until a copy was caught.
const ROUNDS: u32 = 8;
const ROUNDS_MAX: u32 = 500;
const ISOLATED: &str = "[[tenant]]\nname = \"default\"\nwindows = \"isolated\"";

/// A writer of an isolated tenant changes what it seals: before, all the while, and afterwards. Whoever reads in place
/// must find the block, or nothing. Its window is nobody else's to map.
#[tokio::test(flavor = "multi_thread")]
async fn an_isolated_writer_cannot_change_what_it_sealed() {
    let folder = folder();
    let daemon = Running::start(folder.path(), ISOLATED);
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let mut lane = Lane::open(&socket(folder.path())).await;
    let mut other = Lane::open(&socket(folder.path())).await;
    let (mut sealed, mut lost) = (0, 0);
    for round in 0..ROUNDS_MAX {
        // A copy takes microseconds: whether the flipping meets it is a matter of luck.
        if round >= ROUNDS && lost > 0 {
            break;
        }
        let keys: Vec<_> = (round * 100..round * 100 + 6).map(u32::to_le_bytes).collect();
        let leased = lane.lease(LeaseKind::Write, &keys).await;
        let chunk = leased.blocks[0].chunk;
        let (data, fences, bytes, _) = lane.descriptors(chunk).await;
        let refused = other.ask(Op::MapChunk(wire::MapChunk { chunk })).await.unwrap_err();
        assert_eq!(refused.code, Code::PermissionDenied as u32, "{refused:?}");
        let mapping = map(data, fences, bytes, Access::Write).unwrap();
        for (grant, key) in leased.blocks.iter().zip(&keys) {
            store(&mapping, grant.offset, &payload(*key, 0));
        }
        // Two of six: the byte comes and goes while the daemon copies.
        let (stop, begun) = (AtomicBool::new(false), Barrier::new(2));
        let outcomes = std::thread::scope(|scope| {
            let (places, stop, begun) = (&leased.blocks[..2], &stop, &begun);
            let target = &mapping;
            let flipping = scope.spawn(move || {
                begun.wait();
                while !stop.load(Ordering::Relaxed) {
                    for grant in places {
                        let whole = BLOCK_BYTES / 2;
                        let mut byte = [0];
                        let at = grant.offset + whole as u64;
                        target.view(at, ByteCount::new(1)).unwrap().copy_to(&mut byte);
                        store(target, at, &[!byte[0]]);
                        store(target, at, &byte);
                    }
                }
            });
            let outcomes = tokio::task::block_in_place(|| {
                begun.wait();
                tokio::runtime::Handle::current().block_on(lane.seal(&leased, &keys))
            });
            stop.store(true, Ordering::Relaxed);
            flipping.join().unwrap();
            outcomes
        });
        leased.blocks.iter().for_each(|grant| store(&mapping, grant.offset + 5000, b"spoilt"));
        let found = common::granted(&session, &space, &keys).await;
        for ((key, outcome), bytes) in keys.iter().zip(&outcomes).zip(found) {
            let there = *outcome == wire::SealOutcome::Sealed;
            assert!(there || *outcome == wire::SealOutcome::Lost, "{outcome:?}");
            assert_eq!(bytes.is_some(), there, "{key:?}");
            assert!(bytes.is_none_or(|bytes| bytes == payload(*key, 0)), "{key:?} has other bytes");
            sealed += u32::from(there);
            lost += u32::from(!there);
        }
        assert!(outcomes[2..].iter().all(|outcome| *outcome == wire::SealOutcome::Sealed), "{outcomes:?}");
        lane.release(leased.lease).await;
    }
    assert!(lost > 0, "no copy ever caught the flipping: nothing was tested ({sealed} sealed)");
    assert_eq!(daemon.info().await.counters["terrace_windows_adopted_total"], 0);
    drop((session, space, lane, other));
    daemon.assert_quiet().await;
}

/// The client library in an isolated tenant: write, read back through the writer's own guard, read from another session,
/// durably too. What it says must be what it says elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn isolated_blocks_are_written_and_read_like_others() {
    let folder = folder();
    let daemon = Running::start(folder.path(), ISOLATED);
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let keys = keys(10);
    let options = terrace_client::WriteOptions { wait: PATIENCE, ..Default::default() };
    let mut lease = session.lease_write(&space, &keys, None, options).await.unwrap();
    for index in 0..10u32 {
        lease.block_mut(index).unwrap().write(&payload(keys[index as usize], 0)).unwrap();
    }
    let outcomes = lease.seal(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], Durability::Durable).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{outcomes:?}");
    lease.reader(3).unwrap().verify().unwrap();
    assert_eq!(exact_or_missing(&daemon, &keys).await, 20);
    lease.reader(9).unwrap().verify().unwrap();
    lease.release().await.unwrap();
    let again = session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Readable).await.unwrap();
    assert!(again.iter().all(|outcome| *outcome == SealOutcome::Already), "{again:?}");
    assert_eq!(session.flush_windows().await.unwrap(), 1);
    drop((session, space));
    daemon.assert_quiet().await;
    daemon.kill();
    let daemon = Running::start(folder.path(), ISOLATED);
    assert_eq!(exact_or_missing(&daemon, &keys).await, 20);
}

const NOBODY: u32 = 65534;

/// A copy of this program that another user can run; the build folder may not be his to enter. `None` without root.
fn program_for_others() -> Option<tempfile::TempDir> {
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("SKIPPED: another user needs root");
        return None;
    }
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::copy(std::env::current_exe().unwrap(), home.path().join("isolated")).unwrap();
    Some(home)
}

/// Runs one of the helpers below as another user.
fn as_user(uid: u32, home: &tempfile::TempDir, name: &str, path: &Path) -> std::process::Output {
    let mut command = Command::new(home.path().join("isolated"));
    command.args([name, "--exact", "--ignored", "--nocapture"]).env("TERRACE_TEST_SOCKET", path);
    command.uid(uid).gid(uid).current_dir("/").output().unwrap()
}

/// Another user is let in: without a token he must be refused; with one he must find no way to write into a window that
/// is open beside him, and what he seals must be copied.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_shares_no_page() {
    let Some(home) = program_for_others() else { return };
    let folder = folder();
    let tenants = "[[tenant]]\nname = \"default\"\n[[tenant]]\nname = \"blue\"\ntoken = \"secret\"";
    let daemon = Running::start(folder.path(), &format!("lane_admits = \"everybody\"\n{tenants}"));
    let path = socket(folder.path());
    // Of the daemon's own user: adopted, and served from the window while it is open.
    let mut own = Lane::open_as(&path, "blue", "secret").await;
    let (mapping, leased) = own.write(&keys(3)).await;
    let other = as_user(NOBODY, &home, "attacks_as_another_user", &path);
    let said = String::from_utf8_lossy(&other.stdout).into_owned() + &String::from_utf8_lossy(&other.stderr);
    assert!(other.status.success(), "{said}");
    for (grant, key) in leased.blocks.iter().zip(keys(3)) {
        let mut bytes = vec![0; BLOCK_BYTES];
        mapping.view(grant.offset, ByteCount::new(grant.length)).unwrap().copy_to(&mut bytes);
        assert_eq!(bytes, payload(key, 0), "{key:?} was changed by another user");
    }
    drop((own, mapping));
    daemon.assert_quiet().await;
}

/// The other user of the test above.
#[tokio::test]
#[ignore = "is started by another_user_shares_no_page"]
async fn attacks_as_another_user() {
    let Some(path) = std::env::var_os("TERRACE_TEST_SOCKET") else { return };
    let target = |tenant: &str, token: &str| terrace_client::Target {
        socket: Some(Path::new(&path).to_owned()),
        tenant: tenant.into(),
        token: token.into(),
        ..Default::default()
    };
    let refused = terrace_client::Session::connect(&target("default", "")).await.map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("no token"), "{refused}");
    let wrong = terrace_client::Session::connect(&target("blue", "guess")).await.map(|_| ()).unwrap_err();
    assert!(wrong.to_string().contains("wrong token"), "{wrong}");
    let mut lane = Lane::open_as(path.as_ref(), "blue", "secret").await;
    let found = lane.lease(LeaseKind::Read, &keys(3)).await;
    let (data, fences, bytes, writable) = lane.descriptors(found.blocks[0].chunk).await;
    assert!(!writable);
    let mut opened = 0;
    for fd in [&data, &fences] {
        let again = format!("/proc/self/fd/{}", fd.as_raw_fd());
        assert!(File::options().read(true).write(true).open(&again).is_err(), "opened again for writing");
        assert!(File::from(fd.try_clone().unwrap()).write_at(b"x", 4096).is_err(), "written as given");
        opened += usize::from(File::open(&again).is_ok());
    }
    assert_eq!(opened, 2, "it could not even be read again: the test proves nothing");
    drop(map(data, fences, bytes, Access::Read).unwrap());
    // What he writes himself is copied: nobody else maps his window, and he may.
    let own: Vec<_> = (50..53u32).map(u32::to_le_bytes).collect();
    let (_, leased) = lane.write(&own).await;
    let read = lane.lease(LeaseKind::Read, &own).await;
    for (read, written) in read.blocks.iter().zip(&leased.blocks) {
        assert_ne!(read.chunk, written.chunk, "his window is served from");
    }
}

/// Another user of the machine connects, with and without the socket's mode in his way: the kernel must refuse him.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_cannot_connect() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let path = socket(folder.path());
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let Some(home) = program_for_others() else { return };
    let own = as_user(0, &home, "connects", &path);
    assert!(own.status.success(), "{own:?}");
    let other = as_user(NOBODY, &home, "connects", &path);
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

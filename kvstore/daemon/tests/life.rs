//! Lives of a daemon: blocks go in, the daemon ends one way or another, and the
//! same bytes come out, or none.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::{BLOCK_BYTES, PATIENCE, Running, folder, keys, manifest, payload, payloads};
use terrace_client::{Durability, MatchMode, SealOutcome};

const WAIT: Duration = Duration::from_secs(30);

async fn write(daemon: &Running, lane: bool, count: u32, durability: Durability) {
    let session = daemon.session(lane).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let keys = keys(count);
    let outcomes = session.write(&space, &keys, None, &payloads(&keys, 0), durability).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{outcomes:?}");
}

/// Reads every block; what is there must be right. Returns how many were.
async fn read(daemon: &Running, lane: bool, count: u32) -> usize {
    let session = daemon.session(lane).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let keys = keys(count);
    let found = session.read_within(&space, &keys, WAIT).await.unwrap();
    for (key, bytes) in keys.iter().zip(&found) {
        if let Some(bytes) = bytes {
            assert!(*bytes == payload(*key, 0), "block {key:?} came back with other bytes");
        }
    }
    found.into_iter().flatten().count()
}

/// A block written on one transport could be missing or different on the other: write and read on both.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_come_back_on_both_transports() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    for (lane, count) in [(true, 20), (false, 20)] {
        let session = daemon.session(lane).await;
        let space = session.open_space(&manifest(u32::from(lane))).await.unwrap();
        let keys = keys(count);
        let written =
            session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Readable).await.unwrap();
        assert!(written.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{written:?}");
        let again =
            session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Readable).await.unwrap();
        assert!(again.iter().all(|outcome| *outcome == SealOutcome::Already), "{again:?}");
        for reader in [true, false] {
            let other = daemon.session(reader).await;
            let space = other.open_space(&manifest(u32::from(lane))).await.unwrap();
            let (prefix, _) = other.exists(&[&space], &keys, MatchMode::Prefix).await.unwrap();
            assert_eq!(prefix, keys.len());
            let found = other.read_within(&space, &keys, WAIT).await.unwrap();
            for (key, bytes) in keys.iter().zip(found) {
                assert!(
                    bytes.as_deref() == Some(&payload(*key, 0)),
                    "written by lane {lane}, read by {reader}"
                );
            }
        }
    }
    daemon.assert_quiet().await;
}

/// A block acknowledged as durable could be lost by a kill: kill without warning, start again, read them all.
#[tokio::test(flavor = "multi_thread")]
async fn durable_blocks_survive_kill() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    write(&daemon, true, 16, Durability::Durable).await;
    let first = daemon.incarnation;
    daemon.kill();
    let daemon = Running::start(folder.path(), "");
    assert!(daemon.incarnation > first, "a lease of the last life could pass for one of this");
    assert_eq!(read(&daemon, true, 16).await, 16);
    assert_eq!(read(&daemon, false, 16).await, 16);
    daemon.assert_quiet().await;
}

/// A clean stop could leave behind what was not written yet: stop at once after sealing, start, read them all.
#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_persists_everything() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "persist_delay_ms = 60000");
    write(&daemon, true, 16, Durability::Readable).await;
    daemon.terminate();
    let daemon = Running::start(folder.path(), "");
    assert_eq!(read(&daemon, true, 16).await, 16);
    daemon.assert_quiet().await;
}

/// More blocks than memory holds: the older ones must go to the device and come back from it, unchanged.
#[tokio::test(flavor = "multi_thread")]
async fn more_than_memory_holds() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    write(&daemon, false, 160, Durability::Readable).await;
    daemon.persisted().await;
    assert_eq!(read(&daemon, true, 160).await, 160);
    daemon.assert_quiet().await;
}

/// Somebody deletes the catalog while the daemon is down: the blocks must be found by their header pages.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_catalog_is_rebuilt() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    write(&daemon, true, 16, Durability::Durable).await;
    daemon.kill();
    std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
    let daemon = Running::start(folder.path(), "");
    let began = Instant::now();
    while read(&daemon, true, 16).await < 16 {
        assert!(began.elapsed() < PATIENCE, "the scan does not find the blocks: {:?}", daemon.info().await);
    }
    daemon.assert_quiet().await;
    daemon.kill();
    let daemon = Running::start(folder.path(), "");
    assert_eq!(read(&daemon, true, 16).await, 16, "the rebuilt catalog did not last");
}

/// One bit of a payload flips on the device: that block must be a miss, the others must come, and the daemon stay up.
#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_a_miss() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    write(&daemon, true, 4, Durability::Durable).await;
    daemon.kill();
    let path = folder.path().join("data/nvme0.dat");
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    // The first frame's payload begins after superblock, slot header and header page.
    let offset = (1 << 20) + 4096 + 4096 + 1000;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    file.sync_all().unwrap();
    let daemon = Running::start(folder.path(), "");
    assert_eq!(read(&daemon, true, 4).await, 3);
    let counters = daemon.info().await.counters;
    assert_eq!(counters["terrace_checksum_failures_total"], 1, "{counters:?}");
    daemon.assert_quiet().await;
}

/// The data file is cut while the daemon is down: what was cut off must be misses, and the daemon must start.
#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_device_serves_what_is_left() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    write(&daemon, true, 8, Durability::Durable).await;
    daemon.kill();
    let path = folder.path().join("data/nvme0.dat");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len((1 << 20) + 4096 + 3 * (BLOCK_BYTES as u64 + 4096) + 5000).unwrap();
    let daemon = Running::start(folder.path(), "");
    let left = read(&daemon, true, 8).await;
    assert!(left <= 3, "{left} blocks came from behind the end");
    daemon.assert_quiet().await;
}

/// A writer is killed between leasing and sealing, and a reader while it holds a lease: their frames must come back.
#[tokio::test(flavor = "multi_thread")]
async fn killed_clients_leave_nothing() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    write(&daemon, true, 4, Durability::Durable).await;
    let me = std::env::current_exe().unwrap();
    let mut children = Vec::new();
    for _ in 0..2 {
        let child = std::process::Command::new(&me)
            .args(["holds_leases_until_killed", "--exact", "--ignored", "--nocapture"])
            .env("TERRACE_TEST_SOCKET", common::socket(folder.path()))
            .spawn()
            .unwrap();
        children.push(child);
    }
    let began = Instant::now();
    while daemon.info().await.leases < 4 {
        assert!(began.elapsed() < PATIENCE, "the children do not get their leases");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for mut child in children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    daemon.assert_quiet().await;
    assert_eq!(read(&daemon, true, 4).await, 4);
}

/// The child of the test above; by itself it is no test.
#[tokio::test]
#[ignore = "is started by killed_clients_leave_nothing"]
async fn holds_leases_until_killed() {
    let Some(socket) = std::env::var_os("TERRACE_TEST_SOCKET") else { return };
    let target = terrace_client::Target { socket: Some(socket.into()), ..Default::default() };
    let session = terrace_client::Session::connect(&target).await.unwrap();
    let space = session.open_space(&manifest(0)).await.unwrap();
    let new = [format!("{}-a", std::process::id()), format!("{}-b", std::process::id())];
    let mut written = session.lease_write(&space, &new, None, Default::default()).await.unwrap();
    written.block_mut(0).unwrap().write(&[7; 100]).unwrap_or(());
    let options = terrace_client::ReadOptions { wait: WAIT, ..Default::default() };
    let read = session.lease_read(&space, &keys(4), options).await.unwrap();
    assert_eq!(read.prefix(), 4);
    std::future::pending::<()>().await;
}

/// Ten thousand blocks could make a start slow, while workers wait: it must serve within two seconds, with all of them.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_blocks_start_quickly() {
    const COUNT: u32 = 10_000;
    let folder = folder();
    let path = folder.path().join("large.dat");
    let tables = format!("[[device]]\npath = \"{}\"\nbytes = \"128MiB\"", path.display());
    let daemon = Running::start(folder.path(), &tables);
    let session = daemon.session(false).await;
    let mut small = manifest(0);
    small.block_bytes = terrace_core::ByteCount::new(4096);
    let space = session.open_space(&small).await.unwrap();
    let keys = keys(COUNT);
    for batch in keys.chunks(2000) {
        let payloads: Vec<[u8; 4096]> = batch.iter().map(|key| [key[0]; 4096]).collect();
        session.write(&space, batch, None, &payloads, Durability::Readable).await.unwrap();
    }
    daemon.persisted().await;
    daemon.kill();
    let daemon = Running::start(folder.path(), &tables);
    let info = daemon.info().await;
    eprintln!("ready after {} ms", info.ready_ms);
    assert!(info.ready_ms < 2000, "ready after {} ms", info.ready_ms);
    assert_eq!(info.counters["terrace_restored_total"], u64::from(COUNT));
}

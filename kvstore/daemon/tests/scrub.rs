//! The scrub of a running daemon, and the repair of its catalog: damage is found before anybody reads it, and what
//! is left of the store goes on.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::{BLOCK_BYTES, PATIENCE, Running, folder, keys, manifest, payload, payloads};
use terrace_client::Durability;
use terrace_client::wire::{ScrubAction, ScrubRequest, ScrubResponse};

const WAIT: Duration = Duration::from_secs(30);

async fn scrub(daemon: &Running, action: ScrubAction, bytes_per_second: u64) -> ScrubResponse {
    let mut admin = terrace_client::admin(&daemon.grpc).await.unwrap();
    let request = ScrubRequest { action: action.into(), bytes_per_second };
    admin.scrub(request).await.unwrap().into_inner()
}

/// How the scrub stands after so many passes of this life.
async fn passes(daemon: &Running, wanted: u64) -> ScrubResponse {
    let began = Instant::now();
    loop {
        let status = scrub(daemon, ScrubAction::Unspecified, 0).await;
        if status.passes >= wanted && !status.running {
            return status;
        }
        assert!(began.elapsed() < PATIENCE, "no pass comes to its end: {status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Blocks 0 to `count`: how many are there. Those must be right.
async fn read(daemon: &Running, count: u32) -> usize {
    let session = daemon.session(true).await;
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

/// Bit rot that nobody reads stays unknown until it is too late: bits are flipped in two of eight blocks, in a header
/// and in a payload; a pass must find both and no other, at most once each, and readers must get the rest.
#[tokio::test(flavor = "multi_thread")]
async fn rot_is_found_before_it_is_read() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let all = keys(8);
    session.write(&space, &all, None, &payloads(&all, 0), Durability::Durable).await.unwrap();
    drop(session);
    daemon.kill();
    let daemon = Running::start(folder.path(), "");
    scrub(&daemon, ScrubAction::Start, 1 << 30).await;
    let whole = passes(&daemon, 1).await;
    assert_eq!((whole.blocks, whole.damaged, whole.unreadable), (8, 0, 0), "{whole:?}");
    assert_eq!(whole.bytes, 8 * BLOCK_BYTES as u64);
    let file =
        std::fs::File::options().read(true).write(true).open(folder.path().join("data/nvme0.dat")).unwrap();
    let frame = |index: u64| (1 << 20) + 4096 + index * (BLOCK_BYTES as u64 + 4096);
    for offset in [frame(2) + 4096 + 12_345, frame(5) + 30] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
    }
    file.sync_all().unwrap();
    scrub(&daemon, ScrubAction::Start, 1 << 30).await;
    let rotten = passes(&daemon, 2).await;
    assert_eq!((rotten.blocks, rotten.damaged, rotten.unreadable), (14, 2, 0), "{rotten:?}");
    scrub(&daemon, ScrubAction::Start, 1 << 30).await;
    assert_eq!(passes(&daemon, 3).await.damaged, 2, "what was dropped is not found again");
    assert_eq!(read(&daemon, 8).await, 6);
    let page = daemon.info().await.counters;
    assert_eq!(page["terrace_scrub_damaged_total"], 2);
    daemon.assert_quiet().await;
    daemon.terminate();
    let daemon = Running::start(folder.path(), "");
    assert_eq!(read(&daemon, 8).await, 6, "the next life reads what is whole");
}

/// A pass must keep to its rate, and end when it is told to: at a slow rate it is still at its first blocks.
#[tokio::test(flavor = "multi_thread")]
async fn a_pass_keeps_its_rate_and_can_be_stopped() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "scrub_bytes_per_second = \"0\"");
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let all = keys(16);
    session.write(&space, &all, None, &payloads(&all, 0), Durability::Durable).await.unwrap();
    let status = scrub(&daemon, ScrubAction::Unspecified, 0).await;
    assert_eq!((status.running, status.configured_bytes_per_second, status.next_pass_ms), (false, 0, None));
    let began = Instant::now();
    let rate = 8 * (BLOCK_BYTES as u64 + 4096);
    let started = scrub(&daemon, ScrubAction::Start, rate).await;
    assert!(started.running && started.bytes_per_second == rate, "{started:?}");
    let done = passes(&daemon, 1).await;
    // Sixteen blocks at eight a second; the first goes at once.
    assert!(began.elapsed() >= Duration::from_millis(1700), "{:?}", began.elapsed());
    assert_eq!(done.blocks, 16);
    scrub(&daemon, ScrubAction::Start, 1).await;
    let stopped = scrub(&daemon, ScrubAction::Stop, 0).await;
    assert!(!stopped.running && stopped.passes == 1, "{stopped:?}");
}

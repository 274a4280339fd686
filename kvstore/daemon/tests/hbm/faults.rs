//! Processes that die around device memory.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{HOST_ONLY, all_on, assert_exact, assert_no_leak, device, places, until};
use crate::common::lane::{Lane, exact_or_missing, map, signal, wait_for};
use crate::common::{PATIENCE, Running, folder, keys, payload, socket};
use terrace_client::wire::LeaseKind;
use terrace_core::ByteCount;
use terrace_lane::Access;

/// This program again, as a client that is killed or outlives the daemon.
fn client(name: &str, folder: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("faults::{name}"), "--exact", "--ignored", "--nocapture"]);
    command.env("TERRACE_TEST_FOLDER", folder).stdout(Stdio::piped()).spawn().unwrap()
}

fn said(client: &mut Child, word: &str) {
    let mut lines = BufReader::new(client.stdout.as_mut().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(word)), "the client ended without `{word}`");
}

/// A worker is killed while it reads frames and fills others: its frames must be free of it, what it had not sealed
/// gone, its window replaced, and what it had sealed still exact.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_leaves_nothing_on_the_device() {
    let folder = folder();
    let extra = "persist_delay_ms = 3600000\nwindow_recall_max_ms = 100\nwindow_idle_ms = 50\n";
    let daemon = Running::start(folder.path(), &format!("{extra}{HOST_ONLY}"));
    for round in 0..5 {
        let mut client = client("holds_frames", folder.path());
        said(&mut client, "holds frames");
        let found = device(&daemon, 0).await;
        let frames = found.frames.unwrap();
        assert!(frames.pinned > 0 && frames.filling > 0, "round {round}: it holds nothing: {found:?}");
        client.kill().unwrap();
        client.wait().unwrap();
        assert_no_leak(&daemon).await;
    }
    until(&daemon, "the end of its windows", |found| found.windows == 0).await;
    exact_or_missing(&daemon, &keys(8)).await;
    assert_no_leak(&daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a client, started by the test above"]
async fn holds_frames() {
    let Ok(folder) = std::env::var("TERRACE_TEST_FOLDER") else { return };
    let mut lane = Lane::on_device(Path::new(&folder), 0).await;
    let names = keys(4);
    let written = lane.lease_within(LeaseKind::Write, &names, 5000).await;
    if written.blocks.iter().any(|grant| grant.chunk > 0) {
        lane.fill_and_seal(&written, &names).await;
    }
    let read = lane.lease(LeaseKind::Read, &names).await;
    assert!(all_on(&read, 0), "{:?}", places(&read));
    // Others, that it never seals.
    let filling = lane.lease(LeaseKind::Write, &[[7, 0, 0, 1], [7, 0, 0, 2]]).await;
    assert!(all_on(&filling, 0), "{:?}", places(&filling));
    println!("holds frames");
    std::thread::sleep(PATIENCE);
}

/// The daemon is killed while a worker has its chunks mapped: the worker must live on, with the bytes and the fences that
/// were there; the next daemon must start beside it and serve, and give nobody the old memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_outlives_the_daemon() {
    let folder = folder();
    let daemon = Running::start(folder.path(), HOST_ONLY);
    let mut client = client("outlives", folder.path());
    said(&mut client, "has mapped");
    daemon.kill();
    std::fs::write(folder.path().join("killed"), "").unwrap();
    said(&mut client, "bytes are there");
    let daemon = Running::start(folder.path(), HOST_ONLY);
    let names = keys(4);
    let mut lane = Lane::on_device(folder.path(), 0).await;
    let (_window, written) = lane.write(&[[5, 5, 5, 5]]).await;
    assert!(all_on(&written, 0));
    exact_or_missing(&daemon, &names).await;
    std::fs::write(folder.path().join("again"), "").unwrap();
    assert!(client.wait().unwrap().success(), "the worker did not live on");
    drop(lane);
    assert_no_leak(&daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a client, started by the test above"]
async fn outlives() {
    let Ok(folder) = std::env::var("TERRACE_TEST_FOLDER") else { return };
    let folder = Path::new(&folder);
    let names = keys(4);
    let mut lane = Lane::on_device(folder, 0).await;
    let (_window, written) = lane.write(&names).await;
    assert!(all_on(&written, 0));
    let grant = written.blocks[2].clone();
    let (data, fences, bytes, _) = lane.descriptors(grant.chunk).await;
    // A handle that is imported when its maker is dead.
    let later = (data.try_clone().unwrap(), fences.try_clone().unwrap());
    let mapping = map(data, fences, bytes, Access::Read).unwrap();
    println!("has mapped");
    wait_for(&folder.join("killed"));
    lane.assert_ended().await;
    let check = |mapping: &std::sync::Arc<terrace_lane::Mapping>| {
        let mut found = vec![0; usize::try_from(grant.length).unwrap()];
        mapping.view(grant.offset, ByteCount::new(grant.length)).unwrap().copy_to(&mut found);
        assert!(found == payload(names[2], 0), "the bytes changed when the daemon died");
        assert_eq!(mapping.fence(grant.frame).map(terrace_core::Fence::get), Some(grant.fence));
    };
    check(&mapping);
    check(&map(later.0, later.1, bytes, Access::Read).unwrap());
    println!("bytes are there");
    wait_for(&folder.join("again"));
    check(&mapping);
}

/// A worker that is stopped, not dead, keeps its connection and its leases end by their time: its window must be taken
/// from it, and the device's memory come back, without a word from it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_worker_loses_its_window() {
    let folder = folder();
    let extra = "persist_delay_ms = 3600000\nwindow_recall_max_ms = 100\nwindow_idle_ms = 50\n";
    let daemon = Running::start(folder.path(), &format!("{extra}{HOST_ONLY}"));
    let mut client = client("holds_frames", folder.path());
    said(&mut client, "holds frames");
    signal(&client, "-STOP");
    // Leases live two seconds here.
    let began = Instant::now();
    until(&daemon, "the end of its leases", |found| {
        let frames = found.frames.as_ref().unwrap();
        frames.pinned + frames.filling == 0 && found.windows == 0
    })
    .await;
    assert!(began.elapsed() < Duration::from_secs(30));
    let mut lane = Lane::on_device(folder.path(), 0).await;
    let names = [[6, 6, 6, 6]];
    let (_window, written) = lane.write(&names).await;
    assert_exact(&mut lane, &written, &names).await;
    client.kill().unwrap();
    client.wait().unwrap();
    drop(lane);
    assert_no_leak(&daemon).await;
    drop(socket(folder.path()));
}

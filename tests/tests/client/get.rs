//! Blocks by value, from where they were found before.

use std::num::NonZero;
use std::time::Duration;

use terrace_client::wire::{CurveRequest, Tier};
use terrace_client::{
    ClientError, Durability, GetOptions, MissReason, Outcome, ReadOptions, SealOutcome, Session, Space,
    Target, Verify,
};

use crate::daemon::{BLOCK_BYTES, Daemon, keys, manifest, payloads, until};

fn wait() -> GetOptions {
    GetOptions { wait: Duration::from_secs(5), ..GetOptions::default() }
}

type Got = Result<Vec<Outcome<Vec<u8>>>, ClientError>;

/// What was got, or why not.
async fn get(session: &Session, space: &Space, keys: &[Vec<u8>]) -> Got {
    fetch(session, space, keys, wait()).await
}

async fn fetch(session: &Session, space: &Space, keys: &[Vec<u8>], how: GetOptions) -> Got {
    let mut buffers = vec![vec![0xEE; BLOCK_BYTES]; keys.len()];
    let mut targets: Vec<&mut [u8]> = buffers.iter_mut().map(|buffer| &mut buffer[..]).collect();
    let outcomes = session.get(space, keys, &mut targets, how).await?;
    let found = outcomes.into_iter().zip(buffers).map(|(outcome, buffer)| match outcome {
        Outcome::Granted(()) => Outcome::Granted(buffer),
        Outcome::Missing(reason) => Outcome::Missing(reason),
        Outcome::Promoting => Outcome::Promoting,
        Outcome::Throttled => Outcome::Throttled,
        Outcome::Exists => Outcome::Exists,
    });
    Ok(found.collect())
}

fn all(payloads: Vec<Vec<u8>>) -> Vec<Outcome<Vec<u8>>> {
    payloads.into_iter().map(Outcome::Granted).collect()
}

// A block that was got before could be asked for again, or its lease stay behind: a daemon that stands still answers
// nothing, and afterwards must have no lease.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_got_before_is_got_without_the_daemon() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    session.write(&space, &keys(0, 9), None, &payloads(0, 9), Durability::Readable).await.unwrap();
    assert_eq!(get(&session, &space, &keys(0, 8)).await.unwrap(), all(payloads(0, 8)));
    // Without another question.
    until("what was got is not leased any more", async || daemon.leases().await == 0).await;
    daemon.stand_still();
    assert_eq!(get(&session, &space, &keys(0, 8)).await.unwrap(), all(payloads(0, 8)));
    let unknown = keys(8, 1);
    let asking = tokio::time::timeout(Duration::from_millis(200), get(&session, &space, &unknown));
    assert!(asking.await.is_err(), "nobody knows where this one is");
    daemon.go_on();
    assert_eq!(get(&session, &space, &keys(0, 9)).await.unwrap(), all(payloads(0, 9)));
    let absent = get(&session, &space, &keys(8, 2)).await.unwrap();
    assert_eq!(absent[1], Outcome::Missing(MissReason::Unknown));
    daemon.wait_quiet().await;
}

// A place is not leased, so its frame may be another block's at any time: blocks that were got are pushed out by many
// others, and must come from the device or not at all, never as the bytes that lie there now.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_pushed_out_is_never_other_bytes() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    // What comes over gRPC is filled into frames that were others' before.
    let other = Session::connect(&daemon.remote()).await.unwrap();
    let others = other.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
    other.write(&others, &keys(0, 64), None, &payloads(0, 64), Durability::Durable).await.unwrap();
    assert_eq!(get(&session, &space, &keys(0, 64)).await.unwrap(), all(payloads(0, 64)));
    // Keeps the chunk mapped, as a busy reader would.
    let kept = session.lease_read(&space, &keys(0, 1), ReadOptions::default()).await.unwrap();
    assert_eq!(kept.prefix(), 1);
    // Twice the pool.
    for round in 1..90 {
        let (names, bytes) = (keys(round * 64, 64), payloads(round * 64, 64));
        other.write(&others, &names, None, &bytes, Durability::Durable).await.unwrap();
    }
    // By the fence alone, which nothing else saves.
    for verify in [Verify::Fence, Verify::Checksum] {
        let found = fetch(&session, &space, &keys(0, 64), GetOptions { verify, ..wait() }).await.unwrap();
        for ((seed, outcome), expected) in found.into_iter().enumerate().zip(payloads(0, 64)) {
            match outcome {
                Outcome::Granted(bytes) => assert!(bytes == expected, "block {seed} is another"),
                Outcome::Missing(_) | Outcome::Promoting | Outcome::Throttled => {}
                Outcome::Exists => panic!("not an answer to a read"),
            }
        }
    }
    drop(kept);
    daemon.wait_quiet().await;
}

// What was cleared must not be had from where it lay, even while an older lease keeps its frame.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_cleared_is_gone_at_once() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    let (other, others) = daemon.open().await;
    session.write(&space, &keys(0, 4), None, &payloads(0, 4), Durability::Readable).await.unwrap();
    assert_eq!(get(&session, &space, &keys(0, 4)).await.unwrap(), all(payloads(0, 4)));
    let patient = ReadOptions { wait: Duration::from_secs(5), ..ReadOptions::default() };
    let lease = other.lease_read(&others, &keys(0, 4), patient).await.unwrap();
    assert_eq!(lease.prefix(), 4);
    other.clear(&others).await.unwrap();
    let gone = vec![Outcome::Missing(MissReason::Unknown); 4];
    assert_eq!(get(&session, &space, &keys(0, 4)).await.unwrap(), gone);
    // And under the same names there may be others.
    let again = session.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
    session.write(&again, &keys(0, 4), None, &payloads(50, 4), Durability::Readable).await.unwrap();
    for _ in 0..2 {
        assert_eq!(get(&session, &again, &keys(0, 4)).await.unwrap(), all(payloads(50, 4)));
    }
    drop(lease);
    daemon.wait_quiet().await;
}

// After the daemon's death its memory is still mapped, and nobody moves fences there any more.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_got_from_a_dead_daemon() {
    let mut daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    session.write(&space, &keys(0, 2), None, &payloads(0, 2), Durability::Readable).await.unwrap();
    assert_eq!(get(&session, &space, &keys(0, 2)).await.unwrap(), all(payloads(0, 2)));
    daemon.kill();
    session.closed().await;
    assert!(matches!(get(&session, &space, &keys(0, 2)).await, Err(ClientError::Disconnected)));
}

// Of what several threads copy, a block could land in another's place, or one that is absent pass for copied; and a thread
// that never takes part helps nobody.
#[tokio::test(flavor = "multi_thread")]
async fn several_threads_copy_what_one_call_moves() {
    const COUNT: usize = 300;
    let daemon = Daemon::start("");
    let target = Target { copy_threads: NonZero::new(3), ..daemon.target() };
    let session = Session::connect(&target).await.unwrap();
    let space = session.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
    session.write(&space, &keys(100, 7), None, &payloads(100, 7), Durability::Readable).await.unwrap();
    let mut names = keys(0, COUNT);
    let given = payloads(0, COUNT);
    let sealed = session.write(&space, &names, None, &given, Durability::Readable).await.unwrap();
    let was_there = |at: &usize| (100..107).contains(at);
    for (at, outcome) in sealed.iter().enumerate() {
        let expected = if was_there(&at) { SealOutcome::Already } else { SealOutcome::Sealed };
        assert_eq!(*outcome, expected, "block {at}");
    }
    let mut expected = all(given);
    for at in (0..COUNT).step_by(41) {
        names[at] = b"absent".to_vec();
        expected[at] = Outcome::Missing(MissReason::Unknown);
    }
    // By a lease, and then by their places.
    for verify in [Verify::Checksum, Verify::Fence, Verify::Checksum] {
        let found = fetch(&session, &space, &names, GetOptions { verify, ..wait() }).await.unwrap();
        assert!(found == expected, "by {verify:?} some block is another");
    }
    let mut tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let helps = tasks.any(|task| {
        let name = std::fs::read_to_string(task.unwrap().path().join("comm"));
        name.is_ok_and(|name| name.trim() == "terrace-copy")
    });
    assert!(helps, "one thread did all");
}

// Targets of another length or number would be overrun or left out; over gRPC blocks must be the same.
#[tokio::test(flavor = "multi_thread")]
async fn targets_are_checked_and_grpc_fills_them_too() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    session.write(&space, &keys(0, 2), None, &payloads(0, 2), Durability::Readable).await.unwrap();
    let (mut right, mut short) = (vec![0; BLOCK_BYTES], vec![0; BLOCK_BYTES - 1]);
    let wrong = session.get(&space, &keys(0, 2), &mut [&mut right[..], &mut short[..]], wait()).await;
    assert!(matches!(wrong, Err(ClientError::WrongLength { index: 1, .. })), "{wrong:?}");
    let few = session.get(&space, &keys(0, 2), &mut [&mut right[..]], wait()).await;
    assert!(matches!(few, Err(ClientError::Unpaired { keys: 2, payloads: 1 })), "{few:?}");
    let remote = Session::connect(&daemon.remote()).await.unwrap();
    let foreign = remote.get(&space, &keys(0, 1), &mut [&mut right[..]], wait()).await;
    assert!(matches!(foreign, Err(ClientError::ForeignSpace)), "{foreign:?}");
    let streamed = remote.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
    assert_eq!(get(&remote, &streamed, &keys(0, 2)).await.unwrap(), all(payloads(0, 2)));
    assert_eq!(get(&remote, &streamed, &keys(7, 1)).await.unwrap(), [Outcome::Missing(MissReason::Unknown)]);
}

// What is got without asking is a hit that operators must see, in the counters and in the curves.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_got_without_the_daemon_is_counted() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    session.write(&space, &keys(0, 8), None, &payloads(0, 8), Durability::Readable).await.unwrap();
    for _ in 0..50 {
        assert_eq!(get(&session, &space, &keys(0, 8)).await.unwrap(), all(payloads(0, 8)));
    }
    let mut admin = terrace_client::admin(&daemon.grpc()).await.unwrap();
    until("all were counted", async || {
        let curves = admin.curve(CurveRequest::default()).await.unwrap().into_inner().curves;
        let pinned = curves.iter().find(|curve| curve.tier() == Tier::Pinned && curve.tenant.is_empty());
        pinned.is_some_and(|curve| {
            // Of the blocks that were put 8 were asked for, which is once each at least.
            let ratio = curve.points.last().map_or(0.0, |point| point.token_hit_ratio);
            curve.references >= 50 * 8 && ratio > 0.9
        })
    })
    .await;
}

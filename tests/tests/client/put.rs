//! Blocks that are filled before their frames are granted.

use std::time::Duration;

use terrace_client::{Durability, SealOutcome, Session, Space, WriteOptions};

use crate::daemon::{BLOCK_BYTES, Daemon, keys, payload, payloads};

async fn put(session: &Session, space: &Space, first: usize, count: usize) {
    let sealed = session
        .write(space, &keys(first, count), None, &payloads(first, count), Durability::Readable)
        .await
        .unwrap();
    assert!(sealed.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{sealed:?}");
}

async fn is_there(session: &Session, space: &Space, first: usize, count: usize) {
    let found = session.read(space, &keys(first, count)).await.unwrap();
    for (at, (found, given)) in found.iter().zip(payloads(first, count)).enumerate() {
        assert_eq!(found.as_ref(), Some(&given), "block {}", first + at);
    }
}

// It could wait for the daemon all the same: one that stands still while others' blocks are put again leaves them where
// the next one will lie.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_filled_while_the_daemon_is_asked() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    put(&session, &space, 0, 8).await;
    daemon.stand_still();
    let (there, others) = (keys(0, 8), payloads(100, 8));
    let again = session.write(&space, &there, None, &others, Durability::Readable);
    let (again, ()) = tokio::join!(again, async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        daemon.go_on();
    });
    assert_eq!(again.unwrap(), [SealOutcome::Already; 8]);
    let mut lease = session.lease_write(&space, &keys(8, 1), None, WriteOptions::default()).await.unwrap();
    let block = lease.block_mut(0).expect("a frame is free");
    let mut left = vec![0; BLOCK_BYTES];
    block.bytes().copy_to(&mut left);
    assert_eq!(left, payload(100, BLOCK_BYTES));
    drop(lease);
    is_there(&session, &space, 0, 8).await;
    daemon.wait_quiet().await;
}

// What was filled for one block could be sealed as another, or with a sum of another generation: blocks that are there
// already move all behind them, and a cleared space changes what their sums are made with.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_guess_is_filled_once_more() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    put(&session, &space, 5000, 8).await;
    for round in 0..20 {
        let first = 100 * round;
        // Every third is there.
        for at in (0..60).step_by(3) {
            put(&session, &space, first + at, 1).await;
        }
        let all = session
            .write(&space, &keys(first, 60), None, &payloads(first, 60), Durability::Readable)
            .await
            .unwrap();
        assert_eq!(all.iter().filter(|outcome| **outcome == SealOutcome::Already).count(), 20);
        is_there(&session, &space, first, 60).await;
    }
    session.clear(&space).await.unwrap();
    for round in 0..20 {
        put(&session, &space, 40 * round, 40).await;
        is_there(&session, &space, 40 * round, 40).await;
    }
}

// Two tasks could be granted what one of them still fills by guessing: writers of both kinds beside each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writers_of_one_session_guess_in_turn() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    put(&session, &space, 9000, 8).await;
    let by_put = |first: usize| {
        let (session, space) = (session.clone(), space.clone());
        tokio::spawn(async move {
            for round in 0..100 {
                put(&session, &space, first + 20 * round, 20).await;
                is_there(&session, &space, first + 20 * round, 20).await;
            }
        })
    };
    let by_lease = |first: usize| {
        let (session, space) = (session.clone(), space.clone());
        tokio::spawn(async move {
            for round in 0..400 {
                let first = first + 5 * round;
                let wait = WriteOptions { wait: Duration::from_secs(5), ..WriteOptions::default() };
                let mut lease = session.lease_write(&space, &keys(first, 5), None, wait).await.unwrap();
                let mut sums = Vec::new();
                for at in 0..5u32 {
                    let block = lease.block_mut(at).expect("it waits for a frame");
                    sums.push((at, block.write_checked(&payload(first + at as usize, BLOCK_BYTES)).unwrap()));
                }
                let sealed = lease.seal_with(&sums, Durability::Readable).await.unwrap();
                assert_eq!(sealed, [SealOutcome::Sealed; 5]);
                drop(lease);
                is_there(&session, &space, first, 5).await;
            }
        })
    };
    for task in [by_put(0), by_lease(10_000), by_put(20_000), by_lease(30_000)] {
        task.await.unwrap();
    }
    daemon.wait_quiet().await;
}

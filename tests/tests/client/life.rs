//! What outlives a daemon, and what comes back after it.

use std::time::{Duration, Instant};

use terrace_client::{ClientError, Connector, Durability, ReadOptions, Session, Stale, Target};

use crate::daemon::{BLOCK_BYTES, Daemon, keys, manifest, payload, payloads, until};

// Touching a block after the daemon was killed could kill the reader (SIGBUS),
// or old bytes could pass for valid ones: kill it under a reader's hands.
#[tokio::test(flavor = "multi_thread")]
async fn guards_outlive_the_daemon_and_are_stale() {
    let mut daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    let keys = keys(0, 8);
    session.write(&space, &keys, None, &payloads(0, 8), Durability::Durable).await.unwrap();
    let options = ReadOptions { wait: Duration::from_secs(5), ..ReadOptions::default() };
    let lease = session.lease_read(&space, &keys, options).await.unwrap();
    let block = lease.grants[7].granted().unwrap().clone();
    block.verify().unwrap();
    let connector = Connector::new(daemon.target());
    let before = connector.session().await.unwrap();
    daemon.kill();
    // Each session learns of it by a connection of its own.
    for closed in [session.closed(), before.closed()] {
        tokio::time::timeout(Duration::from_secs(5), closed).await.unwrap();
    }
    let mut bytes = vec![0; BLOCK_BYTES];
    assert_eq!(block.read_into(&mut bytes), Err(Stale));
    assert_eq!(bytes, payload(7, BLOCK_BYTES), "the memory is still there");
    let error = session.lease_read(&space, &keys, options).await.unwrap_err();
    assert!(matches!(error, ClientError::Disconnected));
    assert!(connector.session().await.unwrap_err().is_transient());

    daemon.restart();
    let after = connector.wait().await.unwrap();
    assert!(after.incarnation() > before.incarnation());
    assert!(before.is_closed());
    let space = after.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
    let found = after.read(&space, &keys).await.unwrap();
    assert_eq!(found, payloads(0, 8).into_iter().map(Some).collect::<Vec<_>>(), "durable is durable");
    assert!(!block.is_valid(), "a new daemon does not revive old guards");
}

// Checksums are seeded with the space's generation. A session that had opened the space before somebody cleared it
// could seal blocks that only it can read, and that stand in everybody's way.
#[tokio::test(flavor = "multi_thread")]
async fn a_space_that_somebody_cleared_is_written_and_read_on() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    let (other, other_space) = daemon.open().await;
    other.write(&other_space, &keys(0, 4), None, &payloads(0, 4), Durability::Readable).await.unwrap();
    other.clear(&other_space).await.unwrap();
    session.write(&space, &keys(0, 4), None, &payloads(0, 4), Durability::Readable).await.unwrap();
    let all: Vec<_> = payloads(0, 4).into_iter().map(Some).collect();
    for (who, opened) in [(&other, &other_space), (&session, &space)] {
        assert_eq!(who.read(opened, &keys(0, 4)).await.unwrap(), all, "by a space that was opened before");
    }
    let (third, opened) = daemon.open().await;
    assert_eq!(third.read(&opened, &keys(0, 4)).await.unwrap(), all, "by a space that was opened since");
}

// A session could keep its leases after its process gave it up.
#[tokio::test(flavor = "multi_thread")]
async fn closing_ends_everything() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    session.write(&space, &keys(0, 2), None, &payloads(0, 2), Durability::Readable).await.unwrap();
    let lease = session.lease_read(&space, &keys(0, 2), ReadOptions::default()).await.unwrap();
    assert!(lease.is_valid());
    session.close();
    assert!(!lease.is_valid());
    daemon.wait_quiet().await;
    drop(lease);
    // The last clone ends it too.
    let (session, space) = daemon.open().await;
    let lease = session.lease_read(&space, &keys(0, 2), ReadOptions::default()).await.unwrap();
    drop(session);
    assert!(lease.is_valid(), "guards keep their session");
    drop(lease);
    until("the session is gone", async || daemon.info().await.sessions == 0).await;
}

// A client must say clearly that there is no daemon, and where it looked.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_said_clearly() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target { socket: Some(dir.path().join("none.sock")), ..Target::default() };
    let error = Session::connect(&target).await.unwrap_err();
    assert!(error.to_string().contains("none.sock"), "{error}");
    assert!(error.to_string().contains("is terraced running?"), "{error}");
    let error = Session::connect(&Target::default()).await.unwrap_err();
    assert!(matches!(error, ClientError::NoTarget));
    let target = Target { grpc: Some("127.0.0.1:1".to_owned()), ..Target::default() };
    let error = Session::connect(&target).await.unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
}

// A daemon that hangs could hold its clients up for good: more questions at once than may be under way, over both
// transports. Whoever said how long it waits goes on then, and finds the daemon again.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_hangs_is_given_up() {
    let daemon = Daemon::start("");
    let short = Some(Duration::from_secs(2));
    let lane = Target { answer_within: short, ..daemon.target() };
    let remote = Target { answer_within: short, ..daemon.remote() };
    let all: Vec<_> = payloads(0, 4).into_iter().map(Some).collect();
    // HTTP/2 ends a connection on which too many questions were given up before the daemon saw them.
    for (target, questions) in [(lane, 400), (remote, 8)] {
        let session = Session::connect(&target).await.unwrap();
        let space = session.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
        session.write(&space, &keys(0, 4), None, &payloads(0, 4), Durability::Readable).await.unwrap();
        daemon.stand_still();
        let began = Instant::now();
        let no_wait = Duration::ZERO;
        let mut asked = tokio::task::JoinSet::new();
        for _ in 0..questions {
            let (session, space) = (session.clone(), space.clone());
            asked.spawn(async move { session.read_within(&space, &keys(0, 4), no_wait).await.map(drop) });
        }
        while let Some(done) = asked.join_next().await {
            let error = done.unwrap().unwrap_err();
            assert!(matches!(error, ClientError::NoAnswer { .. }), "{error}");
        }
        let unreachable = Session::connect(&target).await.unwrap_err();
        assert!(unreachable.to_string().contains("in 2s"), "{unreachable}");
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        daemon.go_on();
        until("the same session serves again", async || {
            session.read(&space, &keys(0, 4)).await.is_ok_and(|found| found == all)
        })
        .await;
    }
    daemon.wait_quiet().await;
}

//! The same session without shared memory, and the streams.

use std::time::Duration;

use terrace_client::signals::{Follower, Report, Reporter};
use terrace_client::wire::{BlockEventKind, WorkerLoad, WorkerRole};
use terrace_client::{ClientError, Durability, MatchMode, ReadOptions, SealOutcome, Session, Transport};

use crate::daemon::{BLOCK_BYTES, Daemon, keys, manifest, payload, payloads, until};

// Bytes could differ between the transports: write by each, read by the other,
// with blocks of several pieces.
#[tokio::test(flavor = "multi_thread")]
async fn both_transports_carry_the_same_bytes() {
    const LARGE: usize = (2 << 20) + 12_345;
    let daemon = Daemon::start("");
    let local = daemon.session().await;
    let remote = Session::connect(&daemon.remote()).await.unwrap();
    assert_eq!(remote.transport(), Transport::Grpc);
    let manifest = manifest("large", LARGE);
    let here = local.open_space(&manifest).await.unwrap();
    let there = remote.open_space(&manifest).await.unwrap();
    let large = |seed| payload(seed, LARGE);

    let outcomes = remote
        .write(&there, &keys(0, 3), None, &[large(0), large(1), large(2)], Durability::Durable)
        .await
        .unwrap();
    assert_eq!(outcomes, [SealOutcome::Sealed; 3]);
    assert_eq!(local.read(&here, &keys(0, 3)).await.unwrap(), [0, 1, 2].map(|seed| Some(large(seed))));

    local.write(&here, &keys(3, 1), Some(&keys(2, 1)[0]), &[large(3)], Durability::Readable).await.unwrap();
    let found = remote.read(&there, &keys(2, 3)).await.unwrap();
    assert_eq!(found, [Some(large(2)), Some(large(3)), None]);

    let again = remote.write(&there, &keys(0, 1), None, &[large(0)], Durability::Readable).await.unwrap();
    assert_eq!(again, [SealOutcome::Already]);
    let (prefix, _) = remote.exists(&[&there], &keys(0, 5), MatchMode::Prefix).await.unwrap();
    assert_eq!(prefix, 4);
    assert_eq!(remote.touch(&there, &keys(0, 5)).await.unwrap(), 4);
    let error = remote.lease_read(&there, &keys(0, 1), ReadOptions::default()).await.unwrap_err();
    assert!(matches!(error, ClientError::NeedsLane { call: "lease_read" }));
    daemon.wait_quiet().await;
}

// Without a socket the client must still get through; a session over gRPC must
// end when it is dropped, and when it is closed while somebody still has it.
#[tokio::test(flavor = "multi_thread")]
async fn it_falls_back_to_grpc() {
    let daemon = Daemon::start("");
    let mut target = daemon.target();
    target.socket = Some("/nonexistent/lane.sock".into());
    let session = Session::connect(&target).await.unwrap();
    assert_eq!(session.transport(), Transport::Grpc);
    assert_eq!(daemon.info().await.sessions, 1);
    drop(session);
    until("the session is gone", async || daemon.info().await.sessions == 0).await;

    let session = Session::connect(&daemon.remote()).await.unwrap();
    assert_eq!(daemon.info().await.sessions, 1);
    session.close();
    until("the closed session is gone", async || daemon.info().await.sessions == 0).await;
    drop(session);
}

// A session over gRPC must notice that its daemon was killed.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_daemon_is_noticed_over_grpc() {
    let mut daemon = Daemon::start("");
    let session = Session::connect(&daemon.remote()).await.unwrap();
    let space = session.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
    daemon.kill();
    tokio::time::timeout(Duration::from_secs(10), session.closed()).await.unwrap();
    let error = session.touch(&space, &keys(0, 1)).await.unwrap_err();
    assert!(matches!(error, ClientError::Disconnected), "{error}");
}

// A subscriber that starts with a snapshot and goes on from its number must
// neither miss a block nor see one twice.
#[tokio::test(flavor = "multi_thread")]
async fn events_go_on_where_the_snapshot_ends() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    session.write(&space, &keys(0, 5), None, &payloads(0, 5), Durability::Readable).await.unwrap();
    let mut snapshot = session.snapshot().await.unwrap();
    let mut blocks = Vec::new();
    let mut sequence = 0;
    while let Some(part) = snapshot.next().await.unwrap() {
        sequence = part.sequence;
        blocks.extend(part.blocks.into_iter().map(|event| event.block_id.to_vec()));
    }
    let expected = |first, count| -> Vec<Vec<u8>> {
        keys(first, count).iter().map(|key| space.block_id(key).to_bytes().to_vec()).collect()
    };
    assert_eq!(blocks, expected(0, 5), "parents come before children");

    let mut events = session.watch(Some(sequence)).await.unwrap();
    session
        .write(&space, &keys(5, 2), Some(&keys(4, 1)[0]), &payloads(5, 2), Durability::Readable)
        .await
        .unwrap();
    let mut sealed = Vec::new();
    while sealed.len() < 2 {
        let run = events.next().await.unwrap().expect("the stream goes on");
        assert!(!run.resync);
        let new = run.events.iter().filter(|event| event.kind() == BlockEventKind::Sealed);
        sealed.extend(new.map(|event| event.block_id.to_vec()));
    }
    assert_eq!(sealed, expected(5, 2));
}

// Who follows events in one task and closes the session in another must not wait for ever; over the socket the stream has
// a connection of its own.
#[tokio::test(flavor = "multi_thread")]
async fn streams_end_with_their_session() {
    let daemon = Daemon::start("");
    let over_grpc = Session::connect(&daemon.remote()).await.unwrap();
    for session in [daemon.session().await, over_grpc] {
        let mut events = session.watch(None).await.unwrap();
        let waiting =
            tokio::spawn(async move { (events.next().await.map(|_| ()), events.next().await.map(|_| ())) });
        tokio::time::sleep(Duration::from_millis(20)).await;
        session.close();
        let (ended, again) = tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap();
        assert!(matches!(ended, Err(ClientError::Disconnected)), "{ended:?}");
        assert!(matches!(again, Err(ClientError::Disconnected)), "{again:?}");
    }
}

// A worker must appear to everybody who follows, with its latest report, and
// vanish when it goes.
#[tokio::test(flavor = "multi_thread")]
async fn reports_reach_their_followers() {
    let daemon = Daemon::start("");
    let load = |queued_requests| {
        Report::Worker(WorkerLoad {
            name: "prefill-0".to_owned(),
            role: WorkerRole::Prefill.into(),
            endpoint: "http://127.0.0.1:7101".to_owned(),
            queued_requests,
            requests_max: 4,
            ..WorkerLoad::default()
        })
    };
    let follower = Follower::start(daemon.grpc());
    let mut reports = follower.reports();
    let reporter = Reporter::start(daemon.grpc(), load(1));
    let limit = Duration::from_secs(20);
    let seen = reports.wait_for(|seen| seen.workers.iter().any(|worker| worker.queued_requests == 1));
    tokio::time::timeout(limit, seen).await.unwrap().unwrap();
    reporter.report(load(7));
    let seen = reports.wait_for(|seen| seen.workers.iter().any(|worker| worker.queued_requests == 7));
    tokio::time::timeout(limit, seen).await.unwrap().unwrap();
    assert!(reporter.is_connected());
    drop(reporter);
    let gone = reports.wait_for(|seen| seen.workers.is_empty());
    tokio::time::timeout(limit, gone).await.unwrap().unwrap();
}

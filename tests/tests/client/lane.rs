//! Leases, guards and windows over the socket.

use std::time::Duration;

use terrace_client::{
    ClientError, Durability, MatchMode, Outcome, ReadOptions, SealOutcome, Session, Space, Stale, Target,
    Transport, WriteOptions,
};

use terrace_core::Checksum;

use crate::daemon::{BLOCK_BYTES, Daemon, keys, manifest, payload, payloads, until};

// A block could come back changed, at another place, or not at all: fill frames
// in place, seal them, and read them by another session, by value and in place.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sealed_is_read_in_place() {
    let daemon = Daemon::start("");
    let (writer, space) = daemon.open().await;
    assert_eq!(writer.transport(), Transport::Lane);
    let keys = keys(0, 10);
    let mut lease = writer.lease_write(&space, &keys, None, WriteOptions::default()).await.unwrap();
    for (seed, grant) in lease.grants.iter_mut().enumerate() {
        let block = grant.granted_mut().expect("an empty daemon has frames");
        let bytes = payload(seed, BLOCK_BYTES);
        block.write_at(0, &bytes[..1000]).unwrap();
        block.write_at(1000, &bytes[1000..]).unwrap();
        assert!(block.is_valid());
    }
    let indexes: Vec<u32> = (0..10).collect();
    let outcomes = lease.seal(&indexes, Durability::Readable).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{outcomes:?}");
    let own = lease.reader(3).unwrap();
    own.verify().unwrap();

    let (reader, other_space) = daemon.open().await;
    let (prefix, present) = reader.exists(&[&other_space], &keys, MatchMode::Prefix).await.unwrap();
    assert_eq!((prefix, present), (10, vec![true; 10]));
    let held = reader.lease_read(&other_space, &keys, wait()).await.unwrap();
    assert_eq!(held.prefix(), 10);
    for (seed, grant) in held.grants.iter().enumerate() {
        let block = grant.granted().unwrap();
        let mut found = vec![0; BLOCK_BYTES];
        block.read_into(&mut found).unwrap();
        assert_eq!(found, payload(seed, BLOCK_BYTES), "block {seed}");
        block.verify().unwrap();
    }
    assert!(held.is_valid());
    drop((held, lease, own));
    daemon.wait_quiet().await;
}

fn wait() -> ReadOptions {
    ReadOptions { wait: Duration::from_secs(5), ..ReadOptions::default() }
}

// A lease could outlive its guards (a leak) or end before them: hold one for many
// times its time to live, then let it go, and look at the daemon's table.
#[tokio::test(flavor = "multi_thread")]
async fn leases_live_exactly_as_long_as_their_guards() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    let keys = keys(0, 3);
    session.write(&space, &keys, None, &payloads(0, 3), Durability::Readable).await.unwrap();
    let options = ReadOptions { ttl: Some(Duration::from_millis(150)), ..wait() };
    let lease = session.lease_read(&space, &keys, options).await.unwrap();
    let last = lease.grants[2].granted().unwrap().clone();
    drop(lease);
    // Time passing is what is tested here.
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(last.is_valid(), "a lease is renewed while a guard lives");
        assert_eq!(daemon.leases().await, 1);
    }
    drop(last);
    daemon.wait_quiet().await;

    let lease = session.lease_read(&space, &keys, wait()).await.unwrap();
    let kept = lease.grants[0].granted().unwrap().clone();
    lease.release().await.unwrap();
    assert_eq!(daemon.leases().await, 0, "release waits for the daemon");
    assert_eq!(kept.read_into(&mut vec![0; BLOCK_BYTES]), Err(Stale), "released guards are stale");
}

// A call that is given up could leave its lease behind: cancel many at every
// stage and wait for the daemon to be clean.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_lease_leaks_nothing() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    for round in 0..100usize {
        let keys = keys(round * 4, 4);
        let leasing = session.lease_write(&space, &keys, None, WriteOptions::default());
        let given_up = Duration::from_micros(round as u64 * 7);
        let _either = tokio::time::timeout(given_up, leasing).await;
    }
    daemon.wait_quiet().await;
}

// A window could stay with its session for ever, or be taken while somebody
// writes: let it idle with and without a writer.
#[tokio::test(flavor = "multi_thread")]
async fn windows_go_back_when_nobody_writes() {
    let daemon = Daemon::start("window_idle_ms = 100");
    let (session, space) = daemon.open().await;
    let mut lease = session.lease_write(&space, &keys(0, 2), None, WriteOptions::default()).await.unwrap();
    for (seed, grant) in lease.grants.iter_mut().enumerate() {
        grant.granted_mut().unwrap().write(&payload(seed, BLOCK_BYTES)).unwrap();
    }
    lease.seal(&[0], Durability::Readable).await.unwrap();
    assert_eq!(daemon.pinned().await.windows, 1);
    lease.seal(&[1], Durability::Readable).await.unwrap();
    // Sealed, but still held for reading: the window may go, the bytes stay.
    until("the idle window is adopted", async || daemon.pinned().await.windows == 0).await;
    for seed in 0..2 {
        lease.reader(seed).unwrap().verify().unwrap();
    }
    drop(lease);
    // The next writer gets a new window, and by hand it goes back at once.
    session.write(&space, &keys(2, 2), None, &payloads(2, 2), Durability::Readable).await.unwrap();
    assert_eq!(session.flush_windows().await.unwrap(), 1);
    // It is not the client's any more; the daemon still looks whether anybody can write into it.
    until("the window handed back is adopted", async || daemon.pinned().await.windows == 0).await;
    let found = session.read(&space, &keys(0, 4)).await.unwrap();
    assert_eq!(found, payloads(0, 4).into_iter().map(Some).collect::<Vec<_>>());
    daemon.wait_quiet().await;
}

// Handing a window back while a frame of it is being filled would make the
// writer fault: try it, then go on writing.
#[tokio::test(flavor = "multi_thread")]
async fn a_window_with_a_writer_is_not_handed_back() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    let mut lease = session.lease_write(&space, &keys(0, 1), None, WriteOptions::default()).await.unwrap();
    assert_eq!(session.flush_windows().await.unwrap(), 0);
    let block = lease.block_mut(0).unwrap();
    block.write(&payload(0, BLOCK_BYTES)).unwrap();
    assert_eq!(lease.seal(&[0], Durability::Durable).await.unwrap(), [SealOutcome::Sealed]);
    assert!(matches!(
        lease.block_mut(0).unwrap().write(&payload(1, BLOCK_BYTES)),
        Err(ClientError::NotWritable { .. })
    ));
    assert_eq!(session.flush_windows().await.unwrap(), 1);
    lease.reader(0).unwrap().verify().unwrap();
}

// Frames that are given back must neither be sealed later nor leak.
#[tokio::test(flavor = "multi_thread")]
async fn aborted_frames_are_gone() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    let mut lease = session.lease_write(&space, &keys(0, 3), None, WriteOptions::default()).await.unwrap();
    assert_eq!(lease.abort(&[1]).await.unwrap(), 1);
    assert_eq!(lease.abort(&[1]).await.unwrap(), 0, "no index left must not mean all");
    assert!(matches!(
        lease.seal(&[1], Durability::Readable).await,
        Err(ClientError::NotWritable { index: 1 })
    ));
    for index in [0, 2] {
        lease.block_mut(index).unwrap().write(&payload(0, BLOCK_BYTES)).unwrap();
    }
    assert_eq!(lease.seal(&[0, 2], Durability::Readable).await.unwrap(), [SealOutcome::Sealed; 2]);
    drop(lease);
    daemon.wait_quiet().await;
    let (_, present) = session.exists(&[&space], &keys(0, 3), MatchMode::Set).await.unwrap();
    assert_eq!(present, [true, false, true]);
}

// Writing the same block twice must not be an error, and other bytes under the
// same key must not replace the first.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_seal_wins() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    let key = keys(0, 1);
    let options = WriteOptions::default();
    let mut first = session.lease_write(&space, &key, None, options).await.unwrap();
    let mut same = session.lease_write(&space, &key, None, options).await.unwrap();
    let mut other = session.lease_write(&space, &key, None, options).await.unwrap();
    first.block_mut(0).unwrap().write(&payload(0, BLOCK_BYTES)).unwrap();
    same.block_mut(0).unwrap().write(&payload(0, BLOCK_BYTES)).unwrap();
    other.block_mut(0).unwrap().write(&payload(1, BLOCK_BYTES)).unwrap();
    assert_eq!(first.seal(&[0], Durability::Readable).await.unwrap(), [SealOutcome::Sealed]);
    assert_eq!(same.seal(&[0], Durability::Readable).await.unwrap(), [SealOutcome::Already]);
    assert_eq!(other.seal(&[0], Durability::Readable).await.unwrap(), [SealOutcome::Conflict]);
    let again = session.lease_write(&space, &key, None, options).await.unwrap();
    assert!(matches!(again.grants[..], [Outcome::Exists]));
    drop((first, same, other, again));
    assert_eq!(session.read(&space, &key).await.unwrap(), [Some(payload(0, BLOCK_BYTES))]);
    daemon.wait_quiet().await;
}

// Bad requests are refused here, before they cost the daemon anything, with a
// sentence that says the limit; the session goes on.
#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_with_the_limit() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    let long = vec![vec![1u8; 65]];
    let error = session.lease_read(&space, &long, wait()).await.unwrap_err();
    assert_eq!(error.to_string(), "key 0 has 65 bytes; a key has 1 to 64");
    let empty = [b"a".to_vec(), Vec::new()];
    let error = session.touch(&space, &empty).await.unwrap_err();
    assert!(matches!(error, ClientError::BadKey { index: 1, found: 0, .. }));
    let many = vec![b"k"; session.blocks_max() + 1];
    let error = session.exists(&[&space], &many, MatchMode::Set).await.unwrap_err();
    assert!(matches!(error, ClientError::TooManyBlocks { .. }));
    let error = session.exists(&[], &keys(0, 1), MatchMode::Set).await.unwrap_err();
    assert!(matches!(error, ClientError::EmptyBundle));
    let short = [payload(0, BLOCK_BYTES - 1)];
    let error = session.write(&space, &keys(0, 1), None, &short, Durability::Readable).await.unwrap_err();
    assert!(matches!(error, ClientError::WrongLength { index: 0, .. }));
    let (_other, foreign) = daemon.open().await;
    let error = session.read(&foreign, &keys(0, 1)).await.unwrap_err();
    assert!(matches!(error, ClientError::ForeignSpace));
    let mut nameless = manifest("", BLOCK_BYTES);
    nameless.model.clear();
    let error = session.open_space(&nameless).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
    assert_eq!(session.read(&space, &keys(0, 1)).await.unwrap(), [None]);
}

// Many callers of one session must not get each other's answers.
#[tokio::test(flavor = "multi_thread")]
async fn callers_do_not_mix() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..16usize {
        let (session, space) = (session.clone(), space.clone());
        callers.spawn(async move {
            let (keys, bytes) = (keys(caller * 10, 10), payloads(caller * 10, 10));
            session.write(&space, &keys, None, &bytes, Durability::Readable).await.unwrap();
            let found = session.read(&space, &keys).await.unwrap();
            assert_eq!(found, bytes.into_iter().map(Some).collect::<Vec<_>>(), "caller {caller}");
            let matched = session.match_blocks(&[&space], &keys, MatchMode::Prefix).await.unwrap();
            assert_eq!((matched.prefix, matched.blocks.len()), (10, 10));
            assert_eq!(session.touch(&space, &keys).await.unwrap(), 10);
            assert_eq!(session.prefetch(&space, &keys).await.unwrap().resident, 10);
        });
    }
    while let Some(done) = callers.join_next().await {
        done.unwrap();
    }
    daemon.wait_quiet().await;
}

// A cleared space must not serve its old blocks, also not to who holds them.
#[tokio::test(flavor = "multi_thread")]
async fn a_cleared_space_is_empty() {
    let daemon = Daemon::start("");
    let (session, space) = daemon.open().await;
    session.write(&space, &keys(0, 3), None, &payloads(0, 3), Durability::Readable).await.unwrap();
    let held = session.lease_read(&space, &keys(0, 3), wait()).await.unwrap();
    assert!(held.is_valid());
    assert_eq!(session.clear(&space).await.unwrap(), 3);
    assert!(!held.is_valid());
    drop(held);
    let again = session.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
    assert_eq!(again.generation(), space.generation() + 1);
    assert_eq!(session.read(&again, &keys(0, 1)).await.unwrap(), [None]);
    session.write(&again, &keys(0, 1), None, &payloads(7, 1), Durability::Readable).await.unwrap();
    assert_eq!(session.read(&again, &keys(0, 1)).await.unwrap(), [Some(payload(7, BLOCK_BYTES))]);
    daemon.wait_quiet().await;
}

// A program without a runtime must be able to do the same.
#[test]
fn the_blocking_session_works() {
    let daemon = Daemon::start("");
    let session = terrace_client::blocking::Session::connect(&daemon.target()).unwrap();
    let space = session.open_space(&manifest("client", BLOCK_BYTES)).unwrap();
    let (keys, bytes) = (keys(0, 4), payloads(0, 4));
    session.write(&space, &keys, None, &bytes, Durability::Durable).unwrap();
    let lease = session.lease_read(&space, &keys, wait()).unwrap();
    assert_eq!(lease.prefix(), 4);
    assert!(lease.is_valid());
    drop(lease);
    assert_eq!(session.read(&space, &keys[..1]).unwrap(), [Some(bytes[0].clone())]);
}

// A tenant could see another tenant's blocks, or act with a wrong secret.
#[tokio::test(flavor = "multi_thread")]
async fn tenants_are_apart() {
    let daemon = Daemon::start(
        "[[tenant]]\nname = \"blue\"\ntoken = \"b-secret\"\n[[tenant]]\nname = \"red\"\ntoken = \"r-secret\"\n",
    );
    let target = |tenant: &str, token: &str| {
        let mut target = daemon.target();
        (target.tenant, target.token) = (tenant.to_owned(), token.to_owned());
        target
    };
    let blue = Session::connect(&target("blue", "b-secret")).await.unwrap();
    let red = Session::connect(&target("red", "r-secret")).await.unwrap();
    let manifest = manifest("client", BLOCK_BYTES);
    let blues = blue.open_space(&manifest).await.unwrap();
    let reds = red.open_space(&manifest).await.unwrap();
    assert_ne!(blues.id(), reds.id());
    blue.write(&blues, &keys(0, 1), None, &payloads(0, 1), Durability::Readable).await.unwrap();
    assert_eq!(red.read(&reds, &keys(0, 1)).await.unwrap(), [None]);
    let error = Session::connect(&target("blue", "r-secret")).await.unwrap_err();
    assert!(matches!(error, ClientError::Refused { .. }), "no falling back on a refusal: {error}");
}

// A session that pauses has its next window, which must be his to write into, be in nobody's way, and go with him.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_window_is_open_before_it_is_needed() {
    // 16 chunks of some 140 blocks each.
    let daemon = Daemon::start("");
    let windows = async || daemon.pinned().await.windows;
    let write = async |session: &Session, space: &Space, first, count| {
        session.write(space, &keys(first, count), None, &payloads(first, count), Durability::Readable).await
    };
    let (session, space) = daemon.open().await;
    write(&session, &space, 0, 120).await.unwrap();
    until("the next window is open", async || windows().await == 2).await;
    // Into both of them.
    write(&session, &space, 120, 120).await.unwrap();
    let found = session.read(&space, &keys(0, 240)).await.unwrap();
    assert_eq!(found, payloads(0, 240).into_iter().map(Some).collect::<Vec<_>>());

    // All memory, twice over: what is ahead of the first session makes room.
    let other = daemon.session().await;
    let there = other.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
    for part in 0..10 {
        let outcomes = write(&other, &there, 1000 + 450 * part, 450).await.unwrap();
        assert!(outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{part}: {outcomes:?}");
    }
    drop((session, other));
    until("windows go with their sessions", async || windows().await == 0).await;
    daemon.wait_quiet().await;
}

// What the daemon has sealed could be stored into by whoever had no answer: a seal that is waited for too long, one that is
// given up, and an abort.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_stores_into_what_may_be_sealed() {
    let daemon = Daemon::start("");
    let target = Target { answer_within: Some(Duration::from_millis(200)), ..daemon.target() };
    let session = Session::connect(&target).await.unwrap();
    let space = session.open_space(&manifest("client", BLOCK_BYTES)).await.unwrap();
    let mut lease = session.lease_write(&space, &keys(0, 3), None, WriteOptions::default()).await.unwrap();
    for (seed, grant) in lease.grants.iter_mut().enumerate() {
        grant.granted_mut().unwrap().write(&payload(seed, BLOCK_BYTES)).unwrap();
    }
    let refused =
        lease.seal_with(&[(0, Checksum::new(0)), (0, Checksum::new(0))], Durability::Readable).await;
    assert!(matches!(refused, Err(ClientError::Refused { .. })), "one position twice: {refused:?}");
    assert!(lease.block(0).unwrap().is_writable(), "what was refused was not done");
    daemon.stand_still();
    let late = lease.seal(&[0], Durability::Readable).await;
    assert!(matches!(late, Err(ClientError::NoAnswer { .. } | ClientError::Disconnected)), "{late:?}");
    let given_up = tokio::time::timeout(Duration::from_millis(10), lease.seal(&[1], Durability::Readable));
    given_up.await.unwrap_err();
    lease.abort(&[2]).await.unwrap_err();
    for index in 0..3 {
        let block = lease.block_mut(index).unwrap();
        assert!(!block.is_writable());
        let stored = block.write(&payload(9, BLOCK_BYTES));
        assert!(matches!(stored, Err(ClientError::NotWritable { .. })), "{index}: {stored:?}");
    }
    daemon.go_on();
    drop(lease);
    daemon.wait_quiet().await;
}

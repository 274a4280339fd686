//! Connections that break before the answer is there: the client asks again with the same request id over another one,
//! gets the answer that was lost, and nothing is done twice.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use common::lane::{Lane, exact_or_missing, hello, map, store};
use common::{BLOCK_BYTES, PATIENCE, Running, folder, keys, manifest, payload, payloads, socket};
use terrace_client::wire::{self, LaneError, LeaseKind, lane_request::Op, lane_response::Result as Answer};
use terrace_client::{ClientError, Durability, MatchMode, SealOutcome, Session, Target};
use terrace_lane::{Access, Admits, LaneConnection, LaneServer};
use tokio::sync::Notify;
use tonic::Code;

/// Which requests lose their answer.
type Wanted = fn(&Op) -> bool;

/// Stands between a client and the daemon, descriptors included, and breaks connections.
struct Between {
    path: PathBuf,
    plan: Arc<Plan>,
}

#[derive(Default)]
struct Plan {
    /// Breaks the connection when the answer is there; or when the request is, which then never arrives.
    cut: Mutex<Option<(Wanted, Arrives)>>,
    cuts: AtomicU32,
    /// Told of a cut; if it `holds`, nobody is let in after that before `go_on`.
    broke: Notify,
    holds: AtomicBool,
    go_on: Notify,
}

impl Plan {
    /// Whether this request is the one whose connection breaks.
    fn take(&self, op: Option<&Op>) -> Option<Arrives> {
        let cut = self.cut.lock().unwrap().take_if(|(wanted, _)| op.is_some_and(*wanted));
        self.cuts.fetch_add(u32::from(cut.is_some()), Ordering::SeqCst);
        cut.map(|(_, arrives)| arrives)
    }
}

#[derive(Clone, Copy)]
enum Arrives {
    Yes,
    No,
}

impl Between {
    fn start(folder: &Path) -> Self {
        let path = socket(folder).with_extension("between");
        let server = LaneServer::bind(&path, Admits::Owner).unwrap();
        let (plan, daemon) = (Arc::new(Plan::default()), socket(folder));
        let shared = Arc::clone(&plan);
        tokio::spawn(async move {
            loop {
                let connection = server.accept().await.unwrap();
                let (plan, daemon) = (Arc::clone(&shared), daemon.clone());
                tokio::spawn(async move {
                    if plan.cuts.load(Ordering::SeqCst) > 0 && plan.holds.swap(false, Ordering::SeqCst) {
                        plan.go_on.notified().await;
                    }
                    if pass_on(connection, &daemon, &plan).await {
                        plan.broke.notify_one();
                    }
                });
            }
        });
        Self { path, plan }
    }

    async fn session(&self) -> Session {
        let target = Target { socket: Some(self.path.clone()), ..Target::default() };
        Session::connect(&target).await.unwrap()
    }

    fn cut(&self, wanted: Wanted, arrives: Arrives) {
        *self.plan.cut.lock().unwrap() = Some((wanted, arrives));
    }

    fn cuts(&self) -> u32 {
        self.plan.cuts.load(Ordering::SeqCst)
    }
}

/// True if it broke the connection.
async fn pass_on(
    client: LaneConnection<wire::LaneRequest, wire::LaneResponse>,
    daemon: &Path,
    plan: &Plan,
) -> bool {
    let (_, mut asked, mut answer) = client.split();
    let (_, mut answered, mut ask) = LaneConnection::connect(daemon).await.unwrap().split();
    let mut doomed = None;
    loop {
        tokio::select! {
            request = asked.next() => {
                let Ok(Some(request)) = request else { return false };
                match plan.take(request.message.op.as_ref()) {
                    None => {}
                    Some(Arrives::Yes) => doomed = Some(request.message.id),
                    Some(Arrives::No) => return true,
                }
                ask.queue(&request.message, request.descriptors).unwrap();
                ask.flush().await.unwrap();
            }
            response = answered.next() => {
                let Ok(Some(response)) = response else { return false };
                if doomed == Some(response.message.id) {
                    return true;
                }
                answer.queue(&response.message, response.descriptors).unwrap();
                // The client may be gone.
                let _ = answer.flush().await;
            }
        }
    }
}

async fn counter(daemon: &Running, name: &str) -> u64 {
    daemon.info().await.counters[name]
}

fn is_seal(op: &Op) -> bool {
    matches!(op, Op::Seal(_))
}

fn is_clear(op: &Op) -> bool {
    matches!(op, Op::Clear(_))
}

/// The answer to a seal is lost: the writer could believe that its blocks are not there, or seal them twice. It must
/// learn what became of them, also when they were to be durable.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_to_a_seal_is_given_again() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let between = Between::start(folder.path());
    let all = keys(8);
    for (part, durability) in [(&all[..4], Durability::Readable), (&all[4..], Durability::Durable)] {
        let session = between.session().await;
        let space = session.open_space(&manifest(0)).await.unwrap();
        let cuts = between.cuts();
        between.cut(is_seal, Arrives::Yes);
        let written = session.write(&space, part, None, &payloads(part, 0), durability).await.unwrap();
        assert_eq!(written, [SealOutcome::Sealed; 4]);
        assert_eq!(between.cuts(), cuts + 1, "nothing was cut: nothing was tested");
        assert!(session.is_closed(), "its leases are gone, and it must say so");
    }
    assert_eq!(counter(&daemon, "terrace_seals_total").await, 8);
    assert_eq!(counter(&daemon, "terrace_seals_repeated_total").await, 0, "sealed twice");
    assert_eq!(exact_or_missing(&daemon, &all).await, 16);
    daemon.assert_quiet().await;
}

/// The answer to a clear is lost, and before the client is back somebody writes into the new generation: a second clear
/// would drop that.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_to_a_clear_does_not_clear_again() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let between = Between::start(folder.path());
    let session = between.session().await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let keys = keys(3);
    session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Readable).await.unwrap();
    between.cut(is_clear, Arrives::Yes);
    let held = Arc::clone(&between.plan);
    held.holds.store(true, Ordering::SeqCst);
    let clearing = tokio::spawn({
        let (session, space) = (session.clone(), space.clone());
        async move { session.clear(&space).await }
    });
    held.broke.notified().await;
    let other = daemon.session(true).await;
    let again = other.open_space(&manifest(0)).await.unwrap();
    assert_eq!(again.generation(), space.generation() + 1);
    other.write(&again, &keys, None, &payloads(&keys, 1), Durability::Readable).await.unwrap();
    held.go_on.notify_one();
    assert_eq!(clearing.await.unwrap().unwrap(), 3);
    assert_eq!(between.cuts(), 1, "nothing was cut: nothing was tested");
    assert_eq!(counter(&daemon, "terrace_clears_total").await, 1, "cleared twice");
    let (there, _) = other.exists(&[&again], &keys, MatchMode::Prefix).await.unwrap();
    assert_eq!(there, 3, "what was written since is gone");
    drop((session, other));
    daemon.assert_quiet().await;
}

/// The request itself is lost: a clear must be done once, by the repeat; a seal is lost with its lease, and said to be.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_request_is_done_once_or_not_at_all() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let between = Between::start(folder.path());
    let keys = keys(3);
    let session = between.session().await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    between.cut(is_seal, Arrives::No);
    let lost = session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Readable).await;
    assert!(matches!(lost, Err(ClientError::Disconnected)), "{lost:?}");
    assert_eq!(counter(&daemon, "terrace_seals_total").await, 0);
    let session = between.session().await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Readable).await.unwrap();
    between.cut(is_clear, Arrives::No);
    assert_eq!(session.clear(&space).await.unwrap(), 3);
    assert_eq!((between.cuts(), counter(&daemon, "terrace_clears_total").await), (2, 1));
    // Who has closed his session himself wants nothing done any more.
    let session = between.session().await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    session.close();
    assert!(session.clear(&space).await.is_err());
    assert_eq!(counter(&daemon, "terrace_clears_total").await, 1);
    daemon.assert_quiet().await;
}

fn refused(answer: Result<(Answer, Vec<std::os::fd::OwnedFd>), LaneError>, code: Code, says: &str) {
    let error = answer.unwrap_err();
    assert!(error.code == code as u32 && error.message.contains(says), "{error:?}");
}

/// A request id comes back over another connection: with the same content it is answered as before, with other content
/// refused; a client of another id, or without one, learns nothing. The connection before it ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_id_with_other_content_is_refused() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "");
    let path = socket(folder.path());
    let mut lane = Lane::open_named(&path, &[7; 16]).await;
    let names = keys(2);
    let leased = lane.lease(LeaseKind::Write, &names).await;
    let (data, fences, bytes, _) = lane.descriptors(leased.blocks[0].chunk).await;
    let mapping = map(data, fences, bytes, Access::Write).unwrap();
    for (grant, key) in leased.blocks.iter().zip(&names) {
        store(&mapping, grant.offset, &payload(*key, 0));
    }
    let block = |index, checksum| wire::SealBlock { index, length: BLOCK_BYTES as u64, checksum };
    let sums: Vec<u64> = lane.sums(&names);
    let seal =
        |blocks| Op::Seal(wire::SealRequest { request_id: 9000, lease: leased.lease, blocks, durability: 0 });
    let right = vec![block(0, sums[0]), block(1, sums[1])];
    let (Answer::Seal(first), _) = lane.ask(seal(right.clone())).await.unwrap() else { panic!() };
    // Without closing the first: it must end by itself, with its lease and its window.
    let mut next = Lane::open_named(&path, &[7; 16]).await;
    refused(next.ask(seal(vec![block(0, sums[0])])).await, Code::InvalidArgument, "request id 9000");
    let (Answer::Seal(again), _) = next.ask(seal(right.clone())).await.unwrap() else { panic!() };
    assert_eq!(first, again);
    assert_eq!(counter(&daemon, "terrace_seals_total").await, 2);
    lane.assert_ended().await;
    // An answer outlives more than one connection; and nobody else gets it.
    drop(next);
    let mut third = Lane::open_named(&path, &[7; 16]).await;
    let (Answer::Seal(again), _) = third.ask(seal(right.clone())).await.unwrap() else { panic!() };
    assert_eq!(first, again);
    for other in [vec![8; 16], Vec::new()] {
        let mut stranger = Lane::open_named(&path, &other).await;
        refused(stranger.ask(seal(right.clone())).await, Code::FailedPrecondition, "not a live lease");
    }
    // A lease went with its connection: the id of one is new again, not answered with what is gone.
    let lease = |id| wire::LeaseRequest {
        request_id: id,
        space: third.space.space,
        kind: LeaseKind::Read.into(),
        keys: names.iter().map(|key| key.to_vec().into()).collect(),
        wait_ms: u64::try_from(PATIENCE.as_millis()).unwrap(),
        ..Default::default()
    };
    let wanted = lease(9100);
    let (Answer::Lease(before), _) = third.ask(Op::Lease(wanted.clone())).await.unwrap() else { panic!() };
    let mut fourth = Lane::open_named(&path, &[7; 16]).await;
    let (Answer::Lease(after), _) = fourth.ask(Op::Lease(wanted)).await.unwrap() else { panic!() };
    assert_ne!(before.lease, after.lease);
    drop((lane, third, fourth, mapping));
    assert_eq!(exact_or_missing(&daemon, &names).await, 4);
    daemon.assert_quiet().await;
    let short = wire::LaneHello { client_id: vec![7; 15].into(), ..hello() };
    let wrong = Lane::greet(UnixStream::connect(&path).unwrap(), short).await.map(|_| ()).unwrap_err();
    assert!(wrong.message.contains("client_id has 15 bytes"), "{wrong:?}");
}

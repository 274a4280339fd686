//! What happens between two questions of a reader: a real client speaks to a real daemon by way of the test, which holds
//! back what it likes.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::lane::Lane;
use common::{BLOCK_BYTES, PATIENCE, Running, folder, keys, manifest, payload, socket};
use terrace_client::wire::{self, LaneRequest, lane_request::Op};
use terrace_client::{Outcome, ReadOptions, Session, Target};
use terrace_core::MissReason;
use terrace_lane::{Admits, LaneConnection, LaneServer};
use tokio::sync::{Notify, mpsc};
use tonic::Code;

/// Between one client and the daemon: all but the client's questions for mappings is passed on at once, those when they
/// are let go.
struct Between {
    path: PathBuf,
    /// One is held back.
    held: Arc<Notify>,
    go: Arc<Notify>,
}

impl Between {
    fn start(folder: &Path) -> Self {
        let (daemon, path) = (socket(folder), socket(folder).with_extension("between"));
        let server = LaneServer::bind(&path, Admits::Owner).unwrap();
        let (held, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (holds, let_go) = (Arc::clone(&held), Arc::clone(&go));
        tokio::spawn(async move {
            let (_, mut asked, mut answers) = server.accept().await.unwrap().split();
            let (_, mut answered, mut questions) = LaneConnection::connect(&daemon).await.unwrap().split();
            let (pass, mut passed) = mpsc::unbounded_channel::<LaneRequest>();
            tokio::spawn(async move {
                while let Ok(Some(question)) = asked.next().await {
                    let (pass, let_go) = (pass.clone(), Arc::clone(&let_go));
                    if matches!(question.message.op, Some(Op::MapChunk(_))) {
                        holds.notify_one();
                        tokio::spawn(async move {
                            let_go.notified().await;
                            pass.send(question.message).unwrap();
                        });
                    } else {
                        pass.send(question.message).unwrap();
                    }
                }
            });
            let answering = tokio::spawn(async move {
                while let Ok(Some(answer)) = answered.next().await {
                    answers.queue(&answer.message, answer.descriptors).unwrap();
                    // The client may be gone.
                    let _ = answers.flush().await;
                }
            });
            while let Some(question) = passed.recv().await {
                questions.queue(&question, Vec::new()).unwrap();
                questions.flush().await.unwrap();
            }
            // The client is gone: so is its session.
            answering.abort();
        });
        Self { path, held, go }
    }

    async fn session(&self) -> Session {
        let target = Target { socket: Some(self.path.clone()), ..Target::default() };
        Session::connect(&target).await.unwrap()
    }
}

/// A session ends, and its window is emptied and dropped, when a reader was granted blocks there and has not mapped them
/// yet. They are a miss, as if they had not been granted: no error that takes the other blocks of the lease with it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_gone_before_it_is_mapped_is_a_miss() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "window_idle_ms = 60000\nwindow_recall_max_ms = 50");
    let keys = keys(4);
    let mut stays = Lane::open(&socket(folder.path())).await;
    let mut goes = Lane::open(&socket(folder.path())).await;
    let (kept, _) = stays.write(&keys[..2]).await;
    let (window, leased) = goes.write(&keys[2..]).await;
    let chunk = leased.blocks[0].chunk;
    drop(window);
    let between = Between::start(folder.path());
    let session = between.session().await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let (reader, wanted) = (session.clone(), keys.clone());
    let reading = tokio::spawn(async move {
        let options = ReadOptions { wait: PATIENCE, ..ReadOptions::default() };
        reader.lease_read(&space, &wanted, options).await
    });
    tokio::time::timeout(PATIENCE, between.held.notified()).await.expect("it is granted, and wants to map");
    let began = Instant::now();
    drop(goes);
    let refused = loop {
        match stays.ask(Op::MapChunk(wire::MapChunk { chunk })).await {
            Ok(_) => assert!(began.elapsed() < PATIENCE, "the window is not dropped"),
            Err(refused) => break refused,
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    assert!(refused.code == Code::NotFound as u32 && refused.message.contains("lease again"), "{refused:?}");
    let lease = loop {
        // Each chunk is asked for by itself.
        between.go.notify_one();
        if reading.is_finished() {
            break reading.await.unwrap().unwrap();
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    for (key, grant) in keys[..2].iter().zip(&lease.grants) {
        let mut bytes = vec![0; BLOCK_BYTES];
        grant.granted().expect("the chunk is there").read_verified(&mut bytes).unwrap();
        assert_eq!(bytes, payload(*key, 0));
    }
    for gone in &lease.grants[2..] {
        assert!(matches!(gone, Outcome::Missing(MissReason::Unknown)), "{gone:?}");
    }
    drop((lease, session, stays, kept));
    daemon.assert_quiet().await;
}

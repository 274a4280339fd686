//! A client is killed at every step of every operation, before it, in it, and after it.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use common::lane::{Lane, exact_or_missing, helper, map, store};
use common::{
    BLOCK_BYTES, PATIENCE, Random, Running, folder, keys, manifest, payload, payloads, seed, socket,
};
use terrace_client::wire::{self, LeaseKind, lane_request::Op};
use terrace_client::{Durability, SealOutcome};
use terrace_core::ByteCount;
use terrace_lane::Access;

const BLOCKS: u32 = 4;
/// What the client says before each step; it then waits for `go`.
const STEPS: [&str; 13] = [
    "open",
    "lease write",
    "map",
    "store one",
    "store the rest",
    "seal",
    "abort",
    "release",
    "return window",
    "lease read",
    "map and read",
    "prefetch and retain",
    "release what was read",
];

struct Client {
    child: Child,
    go: ChildStdin,
    said: BufReader<ChildStdout>,
}

impl Client {
    fn start(path: &Path) -> Self {
        let mut command = helper("takes_steps", path);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Self { go: child.stdin.take().unwrap(), said, child }
    }

    /// Waits until it is about to take the step.
    fn comes_to(&mut self, step: &str) {
        let wanted = format!("next: {step}\n");
        let mut line = String::new();
        while !line.ends_with(&wanted) {
            line.clear();
            assert!(self.said.read_line(&mut line).unwrap() > 0, "it ended before `{step}`");
        }
    }

    fn go(&mut self) {
        self.go.write_all(b"go\n").unwrap();
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Frames of memory that hold nothing, and all.
async fn free(daemon: &Running) -> (u64, u64) {
    let info = daemon.info().await;
    let pinned = info.tiers.iter().find(|tier| tier.tier() == wire::Tier::Pinned).unwrap();
    let frames = pinned.frames.unwrap();
    (frames.free, frames.capacity)
}

/// Everything must be given back, what is there must be exact, and others must be able to write what is not.
async fn nothing_is_left(daemon: &Running, at: &str) {
    daemon.assert_quiet().await;
    exact_or_missing(daemon, &keys(BLOCKS)).await;
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let (names, bytes) = (keys(BLOCKS), payloads(&keys(BLOCKS), 0));
    let written = session.write(&space, &names, None, &bytes, Durability::Durable).await.unwrap();
    let right = |outcome: &SealOutcome| matches!(outcome, SealOutcome::Sealed | SealOutcome::Already);
    assert!(written.iter().all(right), "{at}: {written:?}");
    assert_eq!(exact_or_missing(daemon, &names).await, 2 * BLOCKS as usize, "{at}");
    session.clear(&space).await.unwrap();
    session.flush_windows().await.unwrap();
    drop((session, space));
    daemon.assert_quiet().await;
    let began = Instant::now();
    loop {
        // Chunks come and go; every frame of theirs must be free.
        let (free, capacity) = free(daemon).await;
        if free == capacity {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{at}: {free} of {capacity} frames are free");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// See the module. In a step: killed some time after it was begun, wherever that is.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "window_idle_ms = 50\nwindow_recall_max_ms = 50");
    let path = socket(folder.path());
    let mut random = Random::new(seed("TERRACE_STEPS_SEED"));
    for upto in 0..STEPS.len() {
        for inside in [false, true] {
            let mut client = Client::start(&path);
            for step in &STEPS[..upto] {
                client.comes_to(step);
                client.go();
            }
            client.comes_to(STEPS[upto]);
            if inside {
                client.go();
                tokio::time::sleep(Duration::from_micros(random.below(1500).into())).await;
            }
            client.kill();
            let at = format!("killed {} `{}`", if inside { "in" } else { "before" }, STEPS[upto]);
            nothing_is_left(&daemon, &at).await;
        }
    }
}

/// The client of the test above.
#[tokio::test]
#[ignore = "is started by killed_at_every_step"]
async fn takes_steps() {
    let Some(path) = std::env::var_os("TERRACE_TEST_SOCKET") else { return };
    let mut steps = STEPS.iter();
    let mut next = || {
        println!("next: {}", steps.next().unwrap());
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).unwrap();
        assert_eq!(line, "go\n");
    };
    let names = keys(BLOCKS);
    next();
    let mut lane = Lane::open(path.as_ref()).await;
    next();
    let leased = lane.lease(LeaseKind::Write, &names).await;
    next();
    let (data, fences, bytes, _) = lane.descriptors(leased.blocks[0].chunk).await;
    let mapping = map(data, fences, bytes, Access::Write).unwrap();
    next();
    store(&mapping, leased.blocks[0].offset, &payload(names[0], 0));
    next();
    for (grant, key) in leased.blocks.iter().zip(&names).skip(1) {
        store(&mapping, grant.offset, &payload(*key, 0));
    }
    next();
    // The last one is given back instead.
    let last = names.len() - 1;
    lane.seal(&leased, &names[..last]).await;
    next();
    let abort = wire::AbortRequest { request_id: 5000, lease: leased.lease, indexes: vec![BLOCKS - 1] };
    lane.ask(Op::Abort(abort)).await.unwrap();
    next();
    lane.release(leased.lease).await;
    drop(mapping);
    next();
    // The daemon may have asked for it before, and taken it.
    let _ = lane.ask(Op::ReturnWindow(wire::ReturnWindow { chunk: leased.blocks[0].chunk })).await;
    next();
    let read = lane.lease(LeaseKind::Read, &names[..last]).await;
    next();
    let (data, fences, bytes, _) = lane.descriptors(read.blocks[0].chunk).await;
    let mapping = map(data, fences, bytes, Access::Read).unwrap();
    let mut found = vec![0; BLOCK_BYTES];
    mapping.view(read.blocks[0].offset, ByteCount::new(BLOCK_BYTES as u64)).unwrap().copy_to(&mut found);
    assert_eq!(found, payload(names[0], 0));
    next();
    let wanted: Vec<_> = names.iter().map(|key| key.to_vec().into()).collect();
    let space = lane.space.space;
    let prefetch = wire::PrefetchRequest { space, keys: wanted.clone(), ..Default::default() };
    lane.ask(Op::Prefetch(prefetch)).await.unwrap();
    let retain = wire::RetainRequest { request_id: 5001, space, keys: wanted, ttl_ms: 1000, priority: 50 };
    lane.ask(Op::Retain(retain)).await.unwrap();
    next();
    lane.release(read.lease).await;
    std::future::pending::<()>().await;
}

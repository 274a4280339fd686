//! Sessions by the thousand, opened by real processes and killed wherever they are: nothing of them may stay.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use common::lane::{Lane, exact_or_missing, helper};
use common::{Footprint, Random, Running, folder, seed, socket, times};
use terrace_client::wire::{self, LeaseKind, lane_request::Op};

/// Sessions of one process.
const AT_ONCE: u32 = 20;
/// What the daemon may grow by after it is warm. Its allocator keeps some of what it was given back: up to 10 MiB came
/// and went in runs of 300 to 10,000 sessions, wherever they ended.
const GROWTH_MAX: u64 = 16 << 20;
/// Descriptors of the chunks that the daemon may have: eight, of three each, and as many that are let go.
const OF_CHUNKS_MAX: usize = 2 * 8 * 3;

/// Each session leases, writes, seals, maps and reads at random until its process is killed. Afterwards every frame must
/// be there, and the daemon's memory and descriptors as they were when it was warm. `TERRACE_SESSIONS=10000` is the
/// long form.
#[tokio::test(flavor = "multi_thread")]
async fn killed_sessions_leave_nothing_behind() {
    let folder = folder();
    let daemon = Running::start(folder.path(), "window_idle_ms = 50\nwindow_recall_max_ms = 50");
    let seed = seed("TERRACE_SESSIONS_SEED");
    let mut random = Random::new(seed);
    let rounds = times("TERRACE_SESSIONS", 300).div_ceil(AT_ONCE);
    let warm = (rounds / 5).max(3);
    let mut before = Footprint::default();
    for round in 0..rounds {
        let mut command = helper("opens_sessions", &socket(folder.path()));
        command.env("SEED", random.next().to_string()).stdout(Stdio::piped());
        let mut client = command.spawn().unwrap();
        let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
        let opened = lines.any(|line| line.unwrap().contains("all are open"));
        assert!(opened, "the client of round {round} ended by itself");
        tokio::time::sleep(Duration::from_micros(random.below(20_000).into())).await;
        client.kill().unwrap();
        client.wait().unwrap();
        if round + 1 == warm {
            daemon.assert_quiet().await;
            before = daemon.footprint();
        }
    }
    daemon.assert_quiet().await;
    let after = daemon.footprint();
    println!("{} sessions: {before:?} when warm, {after:?} at the end", rounds * AT_ONCE);
    assert!(after.bytes <= before.bytes + GROWTH_MAX, "memory grows: {before:?} became {after:?}");
    let piled_up = after.descriptors > before.descriptors + 4 || after.of_chunks > OF_CHUNKS_MAX;
    assert!(!piled_up, "descriptors pile up: {before:?} became {after:?}");
    let keys: Vec<_> = (0..KEYS).map(u32::to_le_bytes).collect();
    exact_or_missing(&daemon, &keys).await;
    daemon.assert_quiet().await;
}

/// Few, so that sessions meet.
const KEYS: u32 = 40;

/// The clients of the test above, all in one process.
#[tokio::test]
#[ignore = "is started by killed_sessions_leave_nothing_behind"]
async fn opens_sessions() {
    let Some(path) = std::env::var_os("TERRACE_TEST_SOCKET") else { return };
    let seed: u64 = std::env::var("SEED").unwrap().parse().unwrap();
    let mut sessions = Vec::new();
    for _ in 0..AT_ONCE {
        sessions.push(Lane::open(path.as_ref()).await);
    }
    println!("all are open");
    let mut busy = tokio::task::JoinSet::new();
    for (number, lane) in (0..).zip(sessions) {
        busy.spawn(act(lane, Random::new(seed ^ number)));
    }
    busy.join_all().await;
}

/// Whatever is refused or throttled is asked for again: only the kill ends it.
async fn act(mut lane: Lane, mut random: Random) {
    let mut held = Vec::new();
    loop {
        let keys: Vec<_> = (0..1 + random.below(4)).map(|_| random.below(KEYS).to_le_bytes()).collect();
        match random.below(6) {
            0..=2 => {
                let kind = if random.percent(50) { LeaseKind::Write } else { LeaseKind::Read };
                let Some(leased) = lane.try_lease(kind, &keys).await else { continue };
                let granted = leased.blocks.iter().find(|block| block.chunk > 0);
                if let Some(chunk) = granted.map(|block| block.chunk)
                    && random.percent(50)
                {
                    // A lease may have ended, and its chunk with it.
                    let _ = lane.ask(Op::MapChunk(wire::MapChunk { chunk })).await;
                }
                held.push((leased, keys));
            }
            3 | 4 if !held.is_empty() => {
                let (leased, keys) = &held[random.below(u32::try_from(held.len()).unwrap()) as usize];
                lane.fill_and_seal(leased, keys).await;
            }
            _ => {
                if let Some((leased, _)) = held.pop() {
                    let leases = vec![leased.lease];
                    let _ = lane.ask(Op::Release(wire::ReleaseRequest { request_id: 1, leases })).await;
                }
            }
        }
    }
}

//! kill -9 at random moments of a write-heavy run, again and again, on one data
//! directory: whatever a get gives is exact, what was acknowledged as durable is
//! there, a cleared space stays cleared, starts are quick, and nothing leaks.
//!
//! Fifty kills by default. `TERRACE_KILLS=1000` is the long form,
//! `TERRACE_KILL_SEED=n` repeats a run (the moments, not the machine's pace).

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::load::Load;
use common::{Random, Running, folder, seed, times};

/// A start must serve within this, whatever was killed before.
const READY_MS_MAX: u64 = 2000;

fn extra(folder: &Path) -> String {
    let device = folder.join("data/nvme0.dat");
    format!(
        "chunk_bytes = \"2MiB\"\npinned_bytes = \"32MiB\"\npersist_delay_ms = 10\n\
         [[device]]\npath = {device:?}\nbytes = \"256MiB\"\n"
    )
}

/// Kills a daemon before or after it is ready, whichever comes first.
fn kill_while_starting(folder: &Path, after: Duration) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_terraced"))
        .arg("--config")
        .arg(common::config(folder, &extra(folder)))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Starts that were killed, catalogs that were deleted, and blocks that come and go between: each life is cut at a
/// random microsecond, and the next one must keep what was promised.
#[tokio::test(flavor = "multi_thread")]
async fn kills_at_random_moments() {
    let kills = times("TERRACE_KILLS", 50);
    let mut random = Random::new(seed("TERRACE_KILL_SEED"));
    let folder = folder();
    let load = Load::new();
    let (mut ready, mut rebuilt, mut damaged) = (Vec::new(), 0, 0);
    for life in 1..=kills {
        if random.percent(15) {
            kill_while_starting(folder.path(), Duration::from_micros(u64::from(random.below(150_000))));
        }
        let lose_catalog = random.percent(8);
        if lose_catalog && folder.path().join("data/catalog").exists() {
            std::fs::remove_dir_all(folder.path().join("data/catalog")).unwrap();
            if random.percent(50) {
                kill_while_starting(folder.path(), Duration::from_micros(u64::from(random.below(150_000))));
            }
        }
        let daemon = Running::start(folder.path(), &extra(folder.path()));
        let scanned = daemon.info().await.scan_done < 1.0 || lose_catalog;
        daemon.scanned().await;
        rebuilt += u32::from(scanned);
        damaged += u32::from(std::fs::remove_dir_all(folder.path().join("data/catalog.damaged")).is_ok());
        let info = daemon.info().await;
        assert!(info.ready_ms < READY_MS_MAX, "life {life} was ready after {} ms", info.ready_ms);
        ready.push(info.ready_ms);
        load.check(&daemon, &mut random, false).await;
        let evicted = daemon.info().await.counters["terrace_evictions_nvme_total"];
        assert_eq!(evicted, 0, "the device is too small for this test");
        let writers = load.start(&daemon, &mut random);
        tokio::time::sleep(Duration::from_micros(u64::from(random.below(250_000)))).await;
        daemon.kill();
        for writer in writers {
            writer.await.unwrap();
        }
    }
    let daemon = Running::start(folder.path(), &extra(folder.path()));
    daemon.scanned().await;
    load.check(&daemon, &mut random, true).await;
    assert_nothing_leaked(&daemon).await;
    assert_no_litter(&folder.path().join("data"));
    ready.sort_unstable();
    let (median, longest) = (ready[ready.len() / 2], ready[ready.len() - 1]);
    let seen = load.seen();
    eprintln!(
        "{kills} kills: {seen:?}; ready after {median} ms (median), {longest} ms (longest); {rebuilt} scans, \
         {damaged} damaged catalogs"
    );
    assert!(seen.durable > u64::from(kills) * 10, "too few durable blocks to mean anything: {seen:?}");
    assert!(seen.clears > 0 && seen.misses > 0, "clears and losses happen: {seen:?}");
}

/// Every frame is free or holds a block that is served.
async fn assert_nothing_leaked(daemon: &Running) {
    daemon.assert_quiet().await;
    for tier in daemon.info().await.tiers {
        let Some(frames) = tier.frames else { continue };
        assert_eq!(frames.free + frames.sealed, frames.capacity, "{} leaks: {frames:?}", tier.device);
    }
}

/// No file is left behind by a life that was cut.
fn assert_no_litter(data: &Path) {
    let names = |folder: &Path| -> BTreeSet<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let mut found = names(data);
    // A first start that was killed may leave its draft of the node's key.
    let drafts = found.extract_if(.., |name| name.starts_with("node.key.")).count();
    assert!(drafts <= 3, "{drafts} drafts of the node's key");
    let known = ["catalog", "lock", "node.key", "nvme0.dat"].map(str::to_owned);
    assert!(found.is_subset(&BTreeSet::from(known)), "litter in the data directory: {found:?}");
    let catalog = names(&data.join("catalog"));
    assert!(catalog.len() < 40, "litter in the catalog: {catalog:?}");
}

/// A service manager stops what it is just starting; the threads of the catalog must not be running when the process
/// takes its memory apart.
#[test]
fn a_stop_while_starting_is_no_crash() {
    let mut random = Random::new(seed("TERRACE_KILL_SEED"));
    let folder = folder();
    Running::start(folder.path(), &extra(folder.path())).terminate();
    for round in 0..40 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_terraced"))
            .arg("--config")
            .arg(common::config(folder.path(), &extra(folder.path())))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(u64::from(random.below(100_000))));
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let ended = child.wait().unwrap();
        // Before it listens for signals, one ends it.
        assert!(ended.success() || ended.signal() == Some(15), "round {round}: {ended}");
    }
    Running::start(folder.path(), &extra(folder.path())).terminate();
}

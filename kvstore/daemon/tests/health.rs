//! What probes and operators are told of a daemon that is not whole: it serves, and says what is out.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::lane::write;
use common::{PATIENCE, Running, folder, http, keys, manifest, payloads, socket};
use terrace_client::{Durability, Session, Target};
use terrace_media::Hooks;
use terraced::{Config, Daemon};

/// The lines of `/healthz`, which has status 200.
fn health(metrics: &str) -> Vec<String> {
    let answer = http(metrics, "/healthz");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    body.lines().map(str::to_owned).collect()
}

fn level(metrics: &str, name: &str) -> f64 {
    let page = http(metrics, "/metrics");
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is not on the page")).trim().parse().unwrap()
}

/// A daemon is started without one of its two devices. A probe that is told of an error would end it, and with it what
/// still serves; one that is told nothing would leave the operator in the dark.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_out_is_named() {
    let folder = folder();
    let (mount, away) = (folder.path().join("mount"), folder.path().join("away"));
    std::fs::create_dir(&mount).unwrap();
    let device = |path: std::path::PathBuf| format!("[[device]]\npath = {path:?}\nbytes = \"64MiB\"\n");
    let devices = device(folder.path().join("nvme0.dat")) + &device(mount.join("nvme1.dat"));
    let daemon = Running::start(folder.path(), &devices);
    assert_eq!(health(&daemon.metrics), ["ok"]);
    assert_eq!(level(&daemon.metrics, "terrace_degraded"), 0.0);
    daemon.terminate();
    std::fs::rename(&mount, &away).unwrap();
    let daemon = Running::start(folder.path(), &devices);
    let said = health(&daemon.metrics);
    assert!(said.len() == 2 && said[0] == "degraded" && said[1].contains("mount/nvme1.dat"), "{said:?}");
    assert_eq!(level(&daemon.metrics, "terrace_degraded"), 1.0);
    let usable = |number| level(&daemon.metrics, &format!("terrace_device_usable{{device=\"{number}\"}}"));
    assert_eq!((usable(0), usable(1)), (1.0, 0.0));
    let info = daemon.info().await;
    let tier = info.tiers.iter().find(|tier| tier.device.ends_with("nvme1.dat")).unwrap();
    assert!(!tier.on && tier.note.contains("is not there"), "{tier:?}");
    assert!(info.notes.iter().any(|note| note.contains("without a device")), "{:?}", info.notes);
    write(&daemon, true, &keys(4), Durability::Durable).await;
    daemon.terminate();
    std::fs::rename(&away, &mount).unwrap();
    let daemon = Running::start(folder.path(), &devices);
    assert_eq!(health(&daemon.metrics), ["ok"]);
}

/// The catalog fails while the daemon runs: that it persists nothing must be seen from outside, and that it does again.
#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_that_fails_is_named() {
    let folder = folder();
    let fails = Arc::new(AtomicBool::new(false));
    let hooks = Hooks { catalog_fails: Arc::clone(&fails), ..Hooks::default() };
    let config = Config::read(&common::config(folder.path(), "")).unwrap();
    let daemon = Daemon::start(config, hooks).await.unwrap();
    let metrics = daemon.metrics.to_string();
    let session = {
        let target = Target { socket: Some(socket(folder.path())), ..Target::default() };
        Session::connect(&target).await.unwrap()
    };
    let space = session.open_space(&manifest(0)).await.unwrap();
    assert_eq!(health(&metrics), ["ok"]);
    fails.store(true, Ordering::SeqCst);
    let keys = keys(2);
    session.write(&space, &keys, None, &payloads(&keys, 0), Durability::Durable).await.unwrap();
    let said = health(&metrics);
    assert!(said.len() == 2 && said[0] == "degraded" && said[1].contains("catalog"), "{said:?}");
    assert_eq!(level(&metrics, "terrace_degraded"), 1.0);
    fails.store(false, Ordering::SeqCst);
    let began = Instant::now();
    while health(&metrics) != ["ok"] {
        assert!(began.elapsed() < PATIENCE, "it stays degraded: {:?}", health(&metrics));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop((session, space));
    daemon.stop().await;
}

//! A full disk, with a real file system that fills up under the daemon.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Running, folder, keys, manifest, payloads};
use terrace_client::{Durability, SealOutcome};

/// Long enough that pauses which double from 200 ms would miss the room by seconds.
const FULL_FOR: Duration = Duration::from_millis(3300);
/// Blocks are durable again this soon after there is room.
const RESUMED_WITHIN: Duration = Duration::from_millis(1500);

/// A file system of our own to fill; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", "size=256m", "terrace-test"]).arg(at).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The daemon ends while the disk is full, and is started again. It could refuse, though the devices can be served, or
/// end when RocksDB finds no room: it must be degraded, serve what is durable, and persist again when there is room; the
/// next start must know all of it without a scan.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_on_a_full_disk_is_degraded() {
    let folder = folder();
    let Some(disk) = SmallDisk::mount(&folder.path().join("data")) else {
        eprintln!("SKIPPED a_start_on_a_full_disk_is_degraded: mounting a file system needs root");
        return;
    };
    let ballast = disk.0.join("ballast");
    let names = keys(3);
    let bytes = payloads(&names, 0);
    let mut daemon = Running::start(folder.path(), "");
    for (at, left) in [(0, 16 << 20), (1, 0)] {
        let session = daemon.session(false).await;
        let space = session.open_space(&manifest(0)).await.unwrap();
        let seal = |at: usize| (&names[at..=at], &bytes[at..=at]);
        let (key, payload) = seal(at);
        let sealed = session.write(&space, key, None, payload, Durability::Durable).await.unwrap();
        assert_eq!(sealed, [SealOutcome::Sealed]);
        drop(session);
        let room = rustix::fs::statvfs(&disk.0).unwrap();
        std::fs::write(&ballast, vec![7; usize::try_from(room.f_bavail * room.f_frsize - left).unwrap()])
            .unwrap();
        daemon.kill();

        daemon = Running::start(folder.path(), "");
        let info = daemon.info().await;
        assert!(info.degraded, "nothing can be persisted: {:?}", info.notes);
        let session = daemon.session(false).await;
        let space = session.open_space(&manifest(0)).await.unwrap();
        assert!(session.read(&space, key).await.unwrap()[0].is_some(), "what is durable is served");
        let (key, payload) = seal(2);
        let sealed = session.write(&space, key, None, payload, Durability::Durable).await.unwrap();
        assert_eq!(sealed, [if at == 0 { SealOutcome::NotDurable } else { SealOutcome::Already }]);
        drop(session);
        std::fs::remove_file(&ballast).unwrap();
        let room_again = Instant::now();
        while daemon.info().await.degraded {
            assert!(room_again.elapsed() < RESUMED_WITHIN, "still degraded with room on the disk");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let session = daemon.session(false).await;
        let space = session.open_space(&manifest(0)).await.unwrap();
        let sealed = session.write(&space, key, None, payload, Durability::Durable).await.unwrap();
        assert!(matches!(sealed[..], [SealOutcome::Sealed | SealOutcome::Already]), "{sealed:?}");
        drop(session);
    }
    daemon.kill();
    let daemon = Running::start(folder.path(), "");
    let notes = daemon.info().await.notes;
    assert!(!notes.iter().any(|note| note.contains("scanned")), "the catalog knows this life: {notes:?}");
    let session = daemon.session(false).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    assert!(
        session.read(&space, &names).await.unwrap().iter().all(Option::is_some),
        "durable blocks survive"
    );
    drop(session);
    daemon.kill();
}

/// The disk fills up while the daemon runs: seals are answered as not durable, reads go on, nothing is lost, and
/// when there is room again blocks are durable again, without a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_survived() {
    let folder = folder();
    let Some(disk) = SmallDisk::mount(&folder.path().join("data")) else {
        eprintln!("SKIPPED a_full_disk_is_survived: mounting a file system needs root");
        return;
    };
    let daemon = Running::start(folder.path(), "");
    let session = daemon.session(false).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let names = keys(3);
    let bytes = payloads(&names, 0);
    let seal = |at: usize| session.write(&space, &names[at..=at], None, &bytes[at..=at], Durability::Durable);
    assert_eq!(seal(0).await.unwrap(), [SealOutcome::Sealed]);

    // Taking all room but 16 MiB leaves less than the catalog asks for.
    let ballast = disk.0.join("ballast");
    let room = rustix::fs::statvfs(&disk.0).unwrap();
    let fill = usize::try_from(room.f_bavail * room.f_frsize - (16 << 20)).unwrap();
    std::fs::write(&ballast, vec![7; fill]).unwrap();
    assert_eq!(seal(1).await.unwrap(), [SealOutcome::NotDurable]);
    assert!(daemon.info().await.degraded, "the daemon says that nothing is persisted");
    assert!(session.read(&space, &names[1..2]).await.unwrap()[0].is_some(), "reads go on");

    // However long the disk was full: it is looked at often.
    tokio::time::sleep(FULL_FOR).await;
    assert!(daemon.info().await.degraded, "nothing is persisted on a full disk");
    assert!(session.read(&space, &names[..2]).await.unwrap().iter().all(Option::is_some), "reads go on");
    std::fs::remove_file(&ballast).unwrap();
    let room_again = Instant::now();
    while daemon.info().await.degraded {
        assert!(room_again.elapsed() < RESUMED_WITHIN, "still degraded with room on the disk");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eprintln!("persisting {} ms after there was room", room_again.elapsed().as_millis());
    assert_eq!(seal(2).await.unwrap(), [SealOutcome::Sealed]);
    drop(session);
    daemon.kill();
    let daemon = Running::start(folder.path(), "");
    let session = daemon.session(false).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let found = session.read(&space, &names).await.unwrap();
    assert!(found[0].is_some() && found[2].is_some(), "durable blocks survive");
    drop(session);
    daemon.kill();
}

//! A raw block device in place of a file: a loop device, as an NVMe namespace would be.
//!
//! Needs root and `losetup`; says so and does nothing otherwise.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Running, folder, keys, manifest, payload, payloads};
use terrace_client::{Durability, SealOutcome};
use terrace_core::ByteCount;
use terrace_media::MediaError;
use terrace_media::inspect::{
    CheckOptions, CheckReport, EntryFilter, FindingKind, OfflineCatalog, OfflineDevice, check,
};

const DEVICE_MIB: u64 = 96;

/// A loop device over a file. Detached when dropped.
struct Loop(String);

impl Loop {
    fn make(folder: &Path) -> Result<Self, String> {
        let image = folder.join("disk.img");
        std::fs::File::create(&image).unwrap().set_len(DEVICE_MIB << 20).unwrap();
        let mut setup = Command::new("losetup");
        setup.args(["--find", "--show", "--direct-io=on"]).arg(&image).stdin(Stdio::null());
        let output = setup.output().map_err(|error| format!("losetup: {error}"))?;
        if !output.status.success() {
            return Err(format!("losetup: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
        Ok(Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }

    fn extra(&self, mib: u64) -> String {
        format!("[[device]]\npath = {:?}\nbytes = \"{mib}MiB\"\n", self.0)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// A raw device has no length to grow and no file system to preallocate in: blocks that are durable on it must be there
/// after a kill, and a device that is smaller than configured be an error that says what to do.
#[tokio::test(flavor = "multi_thread")]
async fn a_raw_device_keeps_what_is_durable() {
    let folder = folder();
    let device = match Loop::make(folder.path()) {
        Ok(device) => device,
        Err(reason) => return eprintln!("SKIPPED a_raw_device_keeps_what_is_durable: {reason}"),
    };
    let all = keys(60);
    let daemon = Running::start(folder.path(), &device.extra(64));
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let written = session.write(&space, &all, None, &payloads(&all, 0), Durability::Durable).await.unwrap();
    assert!(written.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{written:?}");
    daemon.kill();
    drop(session);

    let too_large = Running::try_start(folder.path(), &device.extra(2 * DEVICE_MIB)).err().unwrap();
    assert!(too_large.contains("lower its `bytes`"), "{too_large}");

    let daemon = Running::start(folder.path(), &device.extra(64));
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    let found = session.read_within(&space, &all, Duration::from_secs(30)).await.unwrap();
    for (key, bytes) in all.iter().zip(found) {
        assert!(
            bytes.as_deref() == Some(payload(*key, 0).as_slice()),
            "block {key:?} is not as it was written"
        );
    }
    drop(session);
    daemon.assert_quiet().await;
    daemon.kill();
}

/// `terrace inspect` looks at a raw device with the code below, and an operator trusts it when a daemon does not start.
/// It could take the device from a running daemon, find nothing where there is no file length, change what it looks
/// at, or overlook a flipped bit.
#[tokio::test(flavor = "multi_thread")]
async fn a_raw_device_is_inspected() {
    let folder = folder();
    let device = match Loop::make(folder.path()) {
        Ok(device) => device,
        Err(reason) => return eprintln!("SKIPPED a_raw_device_is_inspected: {reason}"),
    };
    let path = Path::new(&device.0);
    let all = keys(60);
    let daemon = Running::start(folder.path(), &device.extra(64));
    let session = daemon.session(true).await;
    let space = session.open_space(&manifest(0)).await.unwrap();
    session.write(&space, &all, None, &payloads(&all, 0), Durability::Durable).await.unwrap();
    let refused = OfflineDevice::open(path).err().unwrap();
    assert!(matches!(refused, MediaError::InUse { .. }), "{refused}");
    drop(session);
    daemon.terminate();

    let before = std::fs::read(path).unwrap();
    let (report, entries) = inspected(folder.path(), path);
    assert!(!report.is_damaged(), "{report:?}");
    assert_eq!((report.blocks, report.entries, entries.len()), (60, Some(60), 60));
    let device = OfflineDevice::open(path).unwrap();
    let facts = device.superblock.as_ref().unwrap();
    assert_eq!((facts.slots, facts.chunk_bytes), (16, ByteCount::new(4 << 20)));
    let frame = device.frame(entries[7].frame.slot, entries[7].frame.index).unwrap();
    assert_eq!((frame.payload, frame.header), (Some(true), Some(Ok(entries[7].header))));
    drop(device);
    assert!(std::fs::read(path).unwrap() == before, "looking at the device changed it");

    let raw = std::fs::File::options().write(true).open(path).unwrap();
    let (at, bit) = (frame.offset.unwrap() + 4096 + 1, 0x10);
    raw.write_all_at(&[before[usize::try_from(at).unwrap()] ^ bit], at).unwrap();
    raw.sync_all().unwrap();
    drop(raw);
    let (report, _) = inspected(folder.path(), path);
    assert_eq!(report.counts.get(&FindingKind::DamagedPayload), Some(&1), "{report:?}");
    assert_eq!(report.findings.iter().find_map(|finding| finding.block), Some(entries[7].header.block));
}

/// The device beside the catalog, payloads as well, and what the catalog lists.
fn inspected(folder: &Path, device: &Path) -> (CheckReport, Vec<terrace_media::FoundHeader>) {
    let catalog = OfflineCatalog::open(&folder.join("data")).unwrap();
    let entries = catalog.entries(&EntryFilter::default(), 100).unwrap();
    let options = CheckOptions { payloads: true, findings_max: 10 };
    let report = check(&[OfflineDevice::open(device).unwrap()], Some(&catalog), options).unwrap();
    (report, entries)
}

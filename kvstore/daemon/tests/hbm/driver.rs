//! The CUDA code under a real daemon, over a driver that the test builds from C.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{all_on, all_pinned, assert_exact, assert_no_leak, device, places, until};
use crate::common::lane::{Lane, exact_or_missing};
use crate::common::{Running, folder, keys};
use terrace_client::wire::{LeaseKind, Tier};

/// Builds a library that stands in for one of NVIDIA's.
fn built(folder: &Path, source: &str, library: &str) -> bool {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../gpudirect/tests/suite/fake");
    let mut compiler = Command::new("cc");
    compiler.args(["-O1", "-shared", "-fPIC", "-o"]).arg(folder.join(library)).arg(sources.join(source));
    match compiler.arg("-lpthread").status() {
        Ok(status) => assert!(status.success(), "the stand-in {library} does not compile"),
        Err(error) => {
            eprintln!("skipped: no C compiler ({error}), so the daemon is not tested over a driver");
            return false;
        }
    }
    true
}

const CUDA: &str = "[[hbm]]\ndevice = \"cuda:0\"\nbytes = \"16MiB\"\n";

/// The stand-in for NVIDIA's driver, and the file that says what goes wrong in it.
struct Driver {
    folder: PathBuf,
    faults: PathBuf,
}

impl Driver {
    /// `None`, and a word about it, where there is no C compiler.
    fn build(folder: &Path) -> Option<Self> {
        if !built(folder, "cuda.c", "libcuda.so") {
            return None;
        }
        let driver = Self { folder: folder.to_owned(), faults: folder.join("faults") };
        driver.fail("");
        Some(driver)
    }

    /// What goes wrong from now on.
    fn fail(&self, words: &str) {
        let next = self.faults.with_extension("next");
        std::fs::write(&next, words).unwrap();
        std::fs::rename(next, &self.faults).unwrap();
    }

    fn start(&self, extra: &str) -> Running {
        let environment: [(&str, OsString); 2] =
            [("LD_LIBRARY_PATH", self.folder.clone().into()), ("FAKE_CUDA", self.faults.clone().into())];
        Running::try_start_in(&self.folder, extra, &environment).unwrap_or_else(|said| panic!("{said}"))
    }
}

/// The driver's way from a write to a read by another session, through an eviction to Pinned and back: what copies,
/// registers and exports must be the driver's, and every byte the writer's.
#[tokio::test(flavor = "multi_thread")]
async fn the_driver_serves_blocks() {
    let folder = folder();
    let Some(driver) = Driver::build(folder.path()) else { return };
    let daemon = driver.start(&format!("admission = \"all\"\n{CUDA}"));
    let names = keys(20);
    let mut writer = Lane::on_device(folder.path(), 0).await;
    for part in names.chunks(5) {
        let (_window, written) = writer.write(part).await;
        assert!(all_on(&written, 0), "{written:?}");
        writer.release(written.lease).await;
    }
    let mut reader = Lane::on_device(folder.path(), 0).await;
    let read = reader.lease(LeaseKind::Read, &names).await;
    assert!(all_on(&read, 0), "{:?}", places(&read));
    assert_exact(&mut reader, &read, &names).await;
    daemon.persisted().await;
    let found =
        until(&daemon, "registered memory", |found| found.activity.unwrap().registered_bytes > 0).await;
    assert_eq!(found.hbm.unwrap().kind, "cuda");
    assert_eq!(exact_or_missing(&daemon, &names).await, 2 * names.len());
    drop((writer, reader));
    assert_no_leak(&daemon).await;
    daemon.terminate();
}

/// A driver that is missing or too old must not keep the node's cache from starting, must be named where an operator
/// looks, and what is wanted there must be granted in host memory.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_driver_the_node_serves_from_pinned() {
    let folder = folder();
    let driver = Driver::build(folder.path());
    // What one life has written, the next may find on the device: each writes names of its own.
    let names = keys(9);
    let faults = [(None, "no CUDA driver"), (Some("old"), "CUDA 11.4"), (Some("no_device"), "off: ")];
    for ((fault, said), names) in faults.into_iter().zip(names.chunks(3)) {
        let daemon = match (fault, &driver) {
            (None, _)
                if matches!(terrace_gpudirect::probe(), terrace_gpudirect::HbmStatus::Present { .. }) =>
            {
                continue;
            }
            (None, _) => Running::start(folder.path(), CUDA),
            (Some(fault), Some(driver)) => {
                driver.fail(fault);
                driver.start(CUDA)
            }
            (Some(_), None) => continue,
        };
        let found = device(&daemon, 0).await;
        assert!(!found.on && found.note.contains(said), "{fault:?}: {found:?}");
        assert_eq!(found.hbm, None, "a device that is not there is shown to clients");
        let mut lane = Lane::on_device(folder.path(), 0).await;
        let (_window, written) = lane.write(names).await;
        let read = lane.lease(LeaseKind::Read, names).await;
        assert!(all_pinned(&written) && all_pinned(&read), "{:?}", places(&written));
        drop(lane);
        daemon.assert_quiet().await;
    }
}

/// Device memory runs out although the configuration promised it, and host memory cannot be registered: blocks go to
/// Pinned, copies take the slower way, and when there is memory again the device is used.
#[tokio::test(flavor = "multi_thread")]
async fn no_memory_on_the_device_is_pinned_memory() {
    let folder = folder();
    let Some(driver) = Driver::build(folder.path()) else { return };
    driver.fail("no_memory no_register");
    let daemon = driver.start(&format!("persist_delay_ms = 3600000\nwindow_idle_ms = 50\n{CUDA}"));
    let names = keys(6);
    let mut lane = Lane::on_device(folder.path(), 0).await;
    let (_window, written) = lane.write(&names[..3]).await;
    assert!(all_pinned(&written), "{:?}", places(&written));
    assert_eq!(device(&daemon, 0).await.activity.unwrap().registered_bytes, 0);
    driver.fail("no_register");
    // A failed chunk is tried again after a pause.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let read = lane.lease(LeaseKind::Read, &names[..3]).await;
    assert_exact(&mut lane, &read, &names[..3]).await;
    assert!(all_on(&read, 0), "{:?}", places(&read));
    drop(lane);
    assert_no_leak(&daemon).await;
}

/// The device is lost under blocks, leases and mappings: what only it held are misses at once, whoever maps its memory
/// lives on, and the daemon serves from the other tiers.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_is_misses() {
    let folder = folder();
    let Some(driver) = Driver::build(folder.path()) else { return };
    let daemon = driver.start(&format!("admission = \"all\"\npersist_delay_ms = 50\n{CUDA}"));
    let (kept, gone) = (keys(4), [[9, 9, 9, 9], [8, 8, 8, 8]]);
    let mut lane = Lane::on_device(folder.path(), 0).await;
    let (_window, written) = lane.write(&kept).await;
    assert!(all_on(&written, 0));
    daemon.persisted().await;
    let read = lane.lease(LeaseKind::Read, &kept).await;
    assert!(all_on(&read, 0));
    driver.fail("lost");
    until(&daemon, "the loss", |found| !found.on).await;
    // The fence of what was leased has moved: a reader throws away what it computed from it.
    let (_, written) = lane.write(&gone).await;
    assert!(all_pinned(&written), "{:?}", places(&written));
    assert_eq!(
        exact_or_missing(&daemon, &kept).await,
        2 * kept.len(),
        "what Nvme holds is served from there"
    );
    let found = device(&daemon, 0).await;
    let frames = found.frames.unwrap();
    assert_eq!((frames.sealed, frames.filling), (0, 0), "{found:?}");
    assert!(found.note.contains("misses"), "{}", found.note);
    drop(lane);
    daemon.assert_quiet().await;
    driver.fail("");
    daemon.terminate();
}

/// A driver that hangs must hang nobody: leases are answered in their time, with host memory, and what was under way
/// ends when the driver comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_hangs_holds_up_nobody() {
    let folder = folder();
    let Some(driver) = Driver::build(folder.path()) else { return };
    let daemon = driver.start(&format!("persist_delay_ms = 3600000\n{CUDA}"));
    let names = keys(4);
    let mut pinned = Lane::open(&crate::common::socket(folder.path())).await;
    let (_window, _) = pinned.write(&names).await;
    super::lost::compared(folder.path(), &names).await;
    let mut lane = Lane::on_device(folder.path(), 0).await;
    // The chunk is made before.
    let before = [[7, 7, 7, 7]];
    let (_other, _) = pinned.write(&before).await;
    assert!(all_on(&lane.lease(LeaseKind::Read, &before).await, 0));
    driver.fail("hold");
    let began = std::time::Instant::now();
    let read = lane.lease_within(LeaseKind::Read, &names, 300).await;
    assert!(began.elapsed() < Duration::from_secs(5), "a lease waited for the driver");
    assert!(all_pinned(&read), "{:?}", places(&read));
    assert_exact(&mut lane, &read, &names).await;
    lane.release(read.lease).await;
    assert!(device(&daemon, 0).await.activity.unwrap().copies_flying > 0, "nothing is held by the driver");
    driver.fail("");
    let read = lane.lease(LeaseKind::Read, &names).await;
    assert!(all_on(&read, 0), "{:?}", places(&read));
    assert_exact(&mut lane, &read, &names).await;
    drop((lane, pinned));
    assert_no_leak(&daemon).await;
}

/// Blocks that only a file has come straight to the device by cuFile. Whatever the library does wrong, the block must
/// come by host memory instead, exact, and a library that hangs must hold up nobody for longer than he wanted to wait.
#[tokio::test(flavor = "multi_thread")]
async fn files_are_read_straight_into_the_device() {
    let folder = folder();
    let Some(driver) = Driver::build(folder.path()) else { return };
    assert!(built(folder.path(), "cufile.c", "libcufile.so.0"));
    let extra = format!("admission = \"all\"\n{CUDA}gds = \"on\"\n");
    let names = keys(6);
    let daemon = driver.start(&extra);
    let mut writer = Lane::on_device(folder.path(), 0).await;
    let (_window, written) = writer.write(&names).await;
    assert!(all_on(&written, 0));
    daemon.persisted().await;
    daemon.kill();
    for fault in ["", "file_error", "file_short", "file_lies"] {
        driver.fail(fault);
        let daemon = driver.start(&extra);
        let mut lane = Lane::on_device(folder.path(), 0).await;
        let read = lane.lease(LeaseKind::Read, &names).await;
        assert!(all_on(&read, 0), "{fault}: {:?}", places(&read));
        assert_exact(&mut lane, &read, &names).await;
        let found = device(&daemon, 0).await;
        let activity = found.activity.unwrap();
        assert_eq!(activity.direct_reads_total, 6, "{fault}: {found:?}");
        let pinned = daemon.info().await.tiers.into_iter().find(|tier| tier.tier() == Tier::Pinned).unwrap();
        let through_pinned = pinned.frames.unwrap().sealed;
        assert_eq!(through_pinned, if fault.is_empty() { 0 } else { 6 }, "{fault}: another way");
        drop(lane);
        assert_no_leak(&daemon).await;
    }
    driver.fail("file_hang");
    let daemon = driver.start(&extra);
    let mut lane = Lane::on_device(folder.path(), 0).await;
    let began = std::time::Instant::now();
    let read = lane.lease_within(LeaseKind::Read, &names, 300).await;
    assert!(began.elapsed() < Duration::from_secs(5), "a lease waited for the library");
    assert!(!all_on(&read, 0), "the library does not hang");
    driver.fail("");
    let read = lane.lease(LeaseKind::Read, &names).await;
    assert_exact(&mut lane, &read, &names).await;
    drop((lane, writer));
    assert_no_leak(&daemon).await;
}

/// The self-test could choose a way that is slower or wrong, or its choice could not be the one that reads take. Make
/// the way through host memory slow, and then cuFile wrong: what `info` says was chosen must be how blocks come.
#[tokio::test(flavor = "multi_thread")]
async fn reads_go_the_way_that_the_self_test_chose() {
    let folder = folder();
    let Some(driver) = Driver::build(folder.path()) else { return };
    assert!(built(folder.path(), "cufile.c", "libcufile.so.0"));
    let extra = format!("admission = \"all\"\n{CUDA}gds = \"auto\"\n");
    let names = keys(6);
    driver.fail("no_module");
    let daemon = driver.start(&extra);
    assert!(device(&daemon, 0).await.note.contains("no cuFile"), "{}", device(&daemon, 0).await.note);
    let mut writer = Lane::on_device(folder.path(), 0).await;
    let (_window, written) = writer.write(&names).await;
    assert!(all_on(&written, 0));
    daemon.persisted().await;
    daemon.kill();
    // Blocks of 256 KiB go as those of 64 KiB were found to go best.
    for (fault, chosen, direct_reads) in
        [("slow_copy", "64 KiB by", 6), ("file_lies", "other bytes arrived", 0)]
    {
        driver.fail(fault);
        let daemon = driver.start(&extra);
        let found =
            until(&daemon, "the end of the self-test", |found| !found.note.contains("not yet measured"))
                .await;
        assert!(found.note.contains(chosen), "{fault}: {}", found.note);
        driver.fail("");
        let mut lane = Lane::on_device(folder.path(), 0).await;
        let read = lane.lease(LeaseKind::Read, &names).await;
        assert!(all_on(&read, 0), "{fault}: {:?}", places(&read));
        assert_exact(&mut lane, &read, &names).await;
        let activity = device(&daemon, 0).await.activity.unwrap();
        let reads = (activity.direct_reads_total, activity.direct_reads_fallen_back_total);
        assert_eq!(reads, (direct_reads, 0), "{fault}: {}", found.note);
        drop(lane);
        assert_no_leak(&daemon).await;
    }
    drop(writer);
}

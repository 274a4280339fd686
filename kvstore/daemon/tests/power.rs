//! Power cuts on a real file system: an ext4 on a loop device is shut down under
//! the daemon without flushing its journal, then mounted again.
//!
//! Needs root and a loop device; says so and does nothing otherwise.
//! `TERRACE_POWER_CUTS=n` makes n cuts, `TERRACE_POWER_SEED=n` repeats a run.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::load::{LOAD_BYTES, Load};
use common::{Random, Running, content, folder, manifest_of, seed, times};
use terrace_client::{Durability, SealOutcome};

/// An ext4 in a file. Unmounted when dropped.
struct Disk {
    image: PathBuf,
    at: PathBuf,
}

impl Disk {
    fn make(folder: &Path, layout: Layout) -> Result<Self, String> {
        let at = folder.join(if layout == Layout::Together { "data" } else { "device" });
        let disk = Self { image: folder.join("disk.img"), at };
        std::fs::create_dir_all(&disk.at).unwrap();
        std::fs::File::create(&disk.image).unwrap().set_len(640 << 20).unwrap();
        let image = disk.image.to_str().unwrap().to_owned();
        run("mkfs.ext4", &["-q", "-F", &image])?;
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&self) -> Result<(), String> {
        run("mount", &["-o", "loop", self.image.to_str().unwrap(), self.at.to_str().unwrap()])
    }

    /// After a power cut: the journal is replayed by the mount.
    fn remount(&self) {
        let umounted = (0..200).any(|_| {
            let done = run("umount", &[self.at.to_str().unwrap()]).is_ok();
            if !done {
                // A killed daemon's ring lets go of its files a little later.
                std::thread::sleep(Duration::from_millis(20));
            }
            done
        });
        assert!(umounted, "{} stays busy", self.at.display());
        self.mount().unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", self.at.to_str().unwrap()]);
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(format!("{program}: {said}")) }
}

/// What lies on the file system that loses its power: everything, or the device alone, so that no sync of the catalog
/// takes the device's along.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    Together,
    DeviceAlone,
}

fn extra(disk: &Disk) -> String {
    let device = disk.at.join("nvme0.dat");
    format!(
        "chunk_bytes = \"2MiB\"\npinned_bytes = \"32MiB\"\npersist_delay_ms = 10\n\
         [[device]]\npath = {device:?}\nbytes = \"192MiB\"\n"
    )
}

/// The power fails in the middle of writes and clears: what was answered as durable before is served after the next
/// mount, whatever else comes back is exact, and nothing is answered as durable once the power is gone.
#[tokio::test(flavor = "multi_thread")]
async fn durable_blocks_survive_power_cuts() {
    for layout in [Layout::Together, Layout::DeviceAlone] {
        if let Err(reason) = power_cuts(layout).await {
            return eprintln!("SKIPPED durable_blocks_survive_power_cuts: {reason}");
        }
    }
}

async fn power_cuts(layout: Layout) -> Result<(), String> {
    let cuts = times("TERRACE_POWER_CUTS", 6);
    let mut random = Random::new(seed("TERRACE_POWER_SEED"));
    let folder = folder();
    let disk = Disk::make(folder.path(), layout)?;
    let load = Load::new();
    let mut rebuilt = 0;
    for cut in 1..=cuts {
        let daemon = Running::start(folder.path(), &extra(&disk));
        daemon.scanned().await;
        let damaged = folder.path().join("data/catalog.damaged");
        rebuilt += u32::from(std::fs::remove_dir_all(damaged).is_ok());
        load.check(&daemon, &mut random, false).await;
        let session = daemon.session(false).await;
        let space = session.open_space(&manifest_of(99, LOAD_BYTES)).await.unwrap();
        let writers = load.start(&daemon, &mut random);
        tokio::time::sleep(Duration::from_micros(u64::from(random.below(400_000)))).await;
        load.power_goes();
        terrace_media::cut_power(&disk.at).map_err(|error| format!("no shutdown of ext4: {error}"))?;
        let payload = content(99, space.generation(), cut, LOAD_BYTES);
        let (key, payload) = ([cut.to_le_bytes()], [payload]);
        let late = session.write(&space, &key, None, &payload, Durability::Durable);
        if let Ok(Ok(outcomes)) = tokio::time::timeout(Duration::from_secs(5), late).await {
            assert_ne!(outcomes, [SealOutcome::Sealed], "durable without power");
        }
        daemon.kill();
        for writer in writers {
            writer.await.unwrap();
        }
        disk.remount();
    }
    let daemon = Running::start(folder.path(), &extra(&disk));
    daemon.scanned().await;
    load.check(&daemon, &mut random, true).await;
    daemon.assert_quiet().await;
    let seen = load.seen();
    eprintln!("{cuts} power cuts, {layout:?}: {seen:?}; {rebuilt} catalogs rebuilt");
    // What was synced reads back; a catalog that has to be rebuilt each time was not.
    assert!(rebuilt * 2 <= cuts, "{rebuilt} catalogs were damaged by {cuts} power cuts");
    assert!(seen.durable > u64::from(cuts) * 10, "too few durable blocks to mean anything: {seen:?}");
    daemon.kill();
    Ok(())
}

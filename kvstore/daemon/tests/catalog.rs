//! A catalog that was damaged, lost or exchanged for an older one, and a device
//! that was: the daemon starts, serves meanwhile, and what it gives is exact.
//! A space that was cleared stays cleared.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Random, Running, content, folder, granted, manifest_of, seed};
use terrace_client::{Durability, SealOutcome, Session, Space};

const BYTES: usize = 16 << 10;
/// The larger blocks of another space, for slots that change hands.
const LARGE: usize = 64 << 10;
const COUNT: u32 = 60;
/// Spaces: one that is left alone, one that is cleared and written again, one of larger blocks.
const LEFT: u32 = 0;
const CLEARED: u32 = 1;
const OTHER: u32 = 2;

fn extra(folder: &Path) -> String {
    let device = folder.join("data/nvme0.dat");
    format!(
        "chunk_bytes = \"2MiB\"\npinned_bytes = \"16MiB\"\npersist_delay_ms = 10\n\
         [[device]]\npath = {device:?}\nbytes = \"24MiB\"\n"
    )
}

fn start(folder: &Path) -> Running {
    Running::start(folder, &extra(folder))
}

fn bytes_of(rank: u32) -> usize {
    if rank == OTHER { LARGE } else { BYTES }
}

async fn open(session: &Session, rank: u32) -> Space {
    session.open_space(&manifest_of(rank, bytes_of(rank))).await.unwrap()
}

/// Writes blocks durably, in the space's present generation, which it returns.
async fn write(daemon: &Running, rank: u32, keys: std::ops::Range<u32>) -> u64 {
    let session = daemon.session(true).await;
    let space = open(&session, rank).await;
    let names: Vec<[u8; 4]> = keys.clone().map(u32::to_le_bytes).collect();
    let payloads: Vec<_> = keys.map(|key| content(rank, space.generation(), key, bytes_of(rank))).collect();
    let outcomes = session.write(&space, &names, None, &payloads, Durability::Durable).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == SealOutcome::Sealed), "{outcomes:?}");
    space.generation()
}

/// Reads blocks; what is there must be right for the generation. Returns which were there.
async fn read(daemon: &Running, rank: u32, generation: u64, keys: std::ops::Range<u32>) -> BTreeSet<u32> {
    let session = daemon.session(true).await;
    let space = open(&session, rank).await;
    assert!(space.generation() >= generation, "space {rank} went back to {}", space.generation());
    let names: Vec<[u8; 4]> = keys.clone().map(u32::to_le_bytes).collect();
    let found = granted(&session, &space, &names).await;
    let mut there = BTreeSet::new();
    for (key, bytes) in keys.zip(found) {
        if let Some(bytes) = bytes {
            let right = content(rank, space.generation(), key, bytes_of(rank));
            assert!(bytes == right, "space {rank}: block {key} came back with other bytes");
            there.insert(key);
        }
    }
    there
}

async fn clear(daemon: &Running, rank: u32) {
    let session = daemon.session(true).await;
    let space = open(&session, rank).await;
    session.clear(&space).await.unwrap();
}

fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let copied = Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

fn all() -> BTreeSet<u32> {
    (0..COUNT).collect()
}

/// A data directory with blocks of three spaces, one of which was cleared and written again in part. Its catalog has
/// a log and a table file. Returns the cleared space's generation.
async fn prepared(folder: &Path) -> u64 {
    let daemon = start(folder);
    write(&daemon, LEFT, 0..COUNT).await;
    write(&daemon, CLEARED, 0..COUNT).await;
    daemon.kill();
    // The log of the last life becomes a table file.
    let daemon = start(folder);
    clear(&daemon, CLEARED).await;
    let generation = write(&daemon, CLEARED, 0..COUNT / 2).await;
    write(&daemon, OTHER, 0..8).await;
    daemon.kill();
    generation
}

/// Files of the catalog by what they are; the lock and RocksDB's own text log do not matter.
fn catalog_files(data: &Path) -> Vec<PathBuf> {
    let matters = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        ["CURRENT", "MANIFEST"].iter().any(|start| name.starts_with(start))
            || [".sst", ".log"].iter().any(|end| name.ends_with(end))
    };
    let entries = std::fs::read_dir(data.join("catalog")).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(matters).collect();
    files.sort();
    for kind in ["CURRENT", "MANIFEST", ".sst", ".log"] {
        assert!(files.iter().any(|path| path.to_str().unwrap().contains(kind)), "no {kind}: {files:?}");
    }
    files
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Flip,
    Zeros,
    Truncate,
    Empty,
    Remove,
}

impl Damage {
    fn does(self, path: &Path, random: &mut Random) {
        let length = u32::try_from(std::fs::metadata(path).unwrap().len()).unwrap();
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        match self {
            Self::Flip => {
                let at = u64::from(random.below(length.max(1)));
                let mut byte = [0];
                // An empty file stays so.
                if file.read_exact_at(&mut byte, at).is_ok() {
                    file.write_all_at(&[byte[0] ^ 1 << random.below(8)], at).unwrap();
                }
            }
            Self::Zeros => {
                let zeros = vec![0; length.min(64) as usize];
                file.write_all_at(&zeros, u64::from(random.below(length.saturating_sub(64).max(1)))).unwrap();
            }
            Self::Truncate => file.set_len(u64::from(random.below(length.max(1)))).unwrap(),
            Self::Empty => file.set_len(0).unwrap(),
            Self::Remove => std::fs::remove_file(path).unwrap(),
        }
    }
}

/// Each file of the catalog is flipped, overwritten, cut, emptied and removed: the daemon must start, serve what it
/// knows while it looks for the rest, find every block, and never bring back what was cleared.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_catalogs_are_rebuilt() {
    let mut random = Random::new(seed("TERRACE_DAMAGE_SEED"));
    let folder = folder();
    let generation = prepared(folder.path()).await;
    let (data, kept) = (folder.path().join("data"), folder.path().join("kept"));
    copy(&data, &kept);
    let mut rebuilt = 0;
    for number in 0..catalog_files(&kept).len() {
        for damage in [Damage::Flip, Damage::Zeros, Damage::Truncate, Damage::Empty, Damage::Remove] {
            copy(&kept, &data);
            let path = &catalog_files(&data)[number];
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            eprintln!("{damage:?} of {name}");
            damage.does(path, &mut random);
            let daemon = start(folder.path());
            // Served meanwhile: exact or a miss, whatever is known by now.
            read(&daemon, LEFT, 1, 0..COUNT).await;
            read(&daemon, CLEARED, generation, 0..COUNT).await;
            daemon.scanned().await;
            let scanned =
                daemon.info().await.notes.iter().any(|note| note.contains("rebuilt from the header"));
            rebuilt += u32::from(scanned);
            let left = read(&daemon, LEFT, 1, 0..COUNT).await;
            let again = read(&daemon, CLEARED, generation, 0..COUNT).await;
            let other = read(&daemon, OTHER, 1, 0..8).await;
            assert_eq!(left, all(), "{damage:?} of {name}");
            assert_eq!(again, (0..COUNT / 2).collect(), "{damage:?} of {name}");
            assert_eq!(other.len(), 8, "{damage:?} of {name}");
            daemon.assert_quiet().await;
            daemon.kill();
        }
    }
    eprintln!("{rebuilt} catalogs were rebuilt");
    assert!(rebuilt >= 10, "most damage is noticed: {rebuilt}");
}

/// An older catalog is put back over newer frames, as by a restore from a backup: blocks are exact or misses, what was
/// cleared since does not come back, and what is written from now on is durable.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_catalog_over_newer_frames() {
    let folder = folder();
    let (catalog, kept) = (folder.path().join("data/catalog"), folder.path().join("kept"));
    let daemon = start(folder.path());
    write(&daemon, LEFT, 0..COUNT).await;
    write(&daemon, CLEARED, 0..COUNT).await;
    daemon.kill();
    copy(&catalog, &kept);
    let daemon = start(folder.path());
    clear(&daemon, CLEARED).await;
    let generation = write(&daemon, CLEARED, 0..COUNT / 2).await;
    write(&daemon, OTHER, 0..60).await;
    daemon.kill();
    copy(&kept, &catalog);
    let daemon = start(folder.path());
    daemon.scanned().await;
    read(&daemon, LEFT, 1, 0..COUNT).await;
    let there = read(&daemon, CLEARED, generation, 0..COUNT).await;
    assert!(there.is_subset(&(0..COUNT / 2).collect()), "cleared blocks came back: {there:?}");
    read(&daemon, OTHER, 1, 0..60).await;
    // Promises of this life hold as ever.
    let generation = write(&daemon, CLEARED, 1000..1000 + COUNT).await;
    write(&daemon, LEFT, 1000..1000 + COUNT).await;
    daemon.assert_quiet().await;
    daemon.kill();
    for _ in 0..2 {
        let daemon = start(folder.path());
        daemon.scanned().await;
        assert_eq!(read(&daemon, LEFT, 1, 1000..1000 + COUNT).await.len(), COUNT as usize);
        assert_eq!(read(&daemon, CLEARED, generation, 1000..1000 + COUNT).await.len(), COUNT as usize);
        read(&daemon, LEFT, 1, 0..COUNT).await;
        read(&daemon, CLEARED, generation, 0..COUNT).await;
        daemon.assert_quiet().await;
        daemon.kill();
        // The second time from the header pages alone.
        std::fs::remove_dir_all(&catalog).unwrap();
    }
}

/// An older copy of the device is put under a newer catalog: what it claims is not there, or is another block.
#[tokio::test(flavor = "multi_thread")]
async fn a_newer_catalog_over_older_frames() {
    let folder = folder();
    let (device, kept) = (folder.path().join("data/nvme0.dat"), folder.path().join("kept.dat"));
    let daemon = start(folder.path());
    write(&daemon, LEFT, 0..COUNT / 2).await;
    write(&daemon, CLEARED, 0..COUNT).await;
    daemon.kill();
    std::fs::copy(&device, &kept).unwrap();
    let daemon = start(folder.path());
    clear(&daemon, CLEARED).await;
    // These take the frames of the cleared ones, and a slot changes hands.
    write(&daemon, LEFT, COUNT / 2..COUNT).await;
    let generation = write(&daemon, CLEARED, 0..COUNT).await;
    write(&daemon, OTHER, 0..100).await;
    daemon.kill();
    std::fs::copy(&kept, &device).unwrap();
    let daemon = start(folder.path());
    daemon.scanned().await;
    let there = read(&daemon, LEFT, 1, 0..COUNT).await;
    assert!(there.is_superset(&(0..COUNT / 2).collect()), "{there:?}");
    let there = read(&daemon, CLEARED, generation, 0..COUNT).await;
    assert!(there.is_empty(), "blocks that are not on the device: {there:?}");
    assert!(read(&daemon, OTHER, 1, 0..100).await.is_empty());
    write(&daemon, LEFT, 1000..1000 + COUNT).await;
    daemon.assert_quiet().await;
    daemon.kill();
    let daemon = start(folder.path());
    daemon.scanned().await;
    assert_eq!(read(&daemon, LEFT, 1, 1000..1000 + COUNT).await.len(), COUNT as usize);
    daemon.assert_quiet().await;
    daemon.kill();
}

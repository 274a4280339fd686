//! Looking at devices and the catalog while no daemon runs. Nothing is changed:
//! files are opened for reading only, and their locks are held, so that no
//! daemon starts meanwhile.
//!
//! Whatever bytes lie there are told, never trusted: a report says what is
//! wrong, and reading never panics.

mod check;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use terrace_core::{BlockHeader, BlockId, ByteCount, DeviceId, SpaceId};

pub use check::{CheckOptions, CheckReport, Finding, FindingKind, check};

use crate::api::{Backend, Carve, FoundHeader, MediaError, SpaceRecord};
use crate::catalog::Catalog;
use crate::device::{AlignedPages, DeviceFile, lock_exclusively};
use crate::header::{BadHeader, SlotHeader, decode_header};
use crate::memory::PAGE_BYTES;
use crate::scrub::holds;
use crate::side::SideIo;
use crate::slots::frames_of;
use crate::superblock::{CopyState, DATA_START, Superblock, SuperblockFacts};

/// Devices that a catalog may name.
const DEVICES_MAX: u16 = 1024;
/// Blocks read at once.
const BATCH: usize = 4096;

/// A device that is open for reading.
pub struct OfflineDevice {
    path: PathBuf,
    side: SideIo,
    copies: [CopyState; 2],
    /// What counts of its superblock.
    pub superblock: Option<SuperblockFacts>,
}

impl OfflineDevice {
    /// Opens a file or raw device, whatever it holds.
    ///
    /// # Errors
    /// A daemon uses it, or it cannot be read.
    pub fn open(path: &Path) -> Result<Self, MediaError> {
        let file = Arc::new(DeviceFile::open_read_only(path)?);
        let side = SideIo::new(file, Backend::Auto);
        let copies = Superblock::copies(&side, path)?;
        let superblock =
            copies.iter().filter_map(CopyState::facts).max_by_key(|facts| facts.sequence).cloned();
        Ok(Self { path: path.to_owned(), side, copies, superblock })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The two copies of its superblock.
    pub fn copies(&self) -> &[CopyState; 2] {
        &self.copies
    }

    fn facts(&self) -> Result<&SuperblockFacts, MediaError> {
        if let Some(facts) = &self.superblock {
            return Ok(facts);
        }
        let path = self.path.clone();
        let newer = self.copies.iter().find_map(CopyState::newer);
        let ours = self.copies.contains(&CopyState::Damaged);
        Err(match newer {
            Some(found) => MediaError::NewerFormat { path, found, known: crate::superblock::MAJOR },
            None if ours => MediaError::SuperblockDamaged { path },
            None => MediaError::NotOurs { path },
        })
    }

    fn page(&self, offset: u64, bytes: u64) -> Result<AlignedPages, MediaError> {
        let failed = |source| MediaError::File { path: self.path.clone(), action: "read it", source };
        let mut pages = self.side.read_many(&[(offset, bytes)]).map_err(failed)?;
        pages.pop().unwrap_or_else(|| Ok(AlignedPages::new(bytes))).map_err(failed)
    }

    /// One frame, with its slot's header.
    ///
    /// # Errors
    /// The superblock is no good, there is no such slot or frame, or it cannot be read.
    pub fn frame(&self, slot: u32, index: u32) -> Result<FrameReport, MediaError> {
        let facts = self.facts()?;
        if slot >= facts.slots {
            let text = format!("there is no slot {slot}: the device has {}", facts.slots);
            return Err(self.asked_wrong(text));
        }
        let chunk_bytes = facts.chunk_bytes.get();
        let start = DATA_START.saturating_add(u64::from(slot).saturating_mul(chunk_bytes));
        let carved = SlotHeader::decode(self.page(start, PAGE_BYTES)?.as_slice());
        let Ok(header) = &carved else {
            return Ok(FrameReport { offset: None, slot: carved, header: None, payload: None });
        };
        let frames = frames_of(chunk_bytes, header.frame_bytes);
        if index >= frames {
            return Err(self.asked_wrong(format!("there is no frame {index}: slot {slot} has {frames}")));
        }
        let frame_bytes = header.frame_bytes.get();
        let offset = start + PAGE_BYTES + u64::from(index) * frame_bytes;
        let bytes = self.page(offset, frame_bytes)?;
        let found = decode_header(bytes.as_slice());
        let payload = found.as_ref().ok().map(|header| holds(bytes.as_slice(), header));
        Ok(FrameReport { offset: Some(offset), slot: carved, header: Some(found), payload })
    }

    fn asked_wrong(&self, text: String) -> MediaError {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, text);
        MediaError::File { path: self.path.clone(), action: "look at it", source }
    }
}

/// One frame.
#[derive(Clone, Debug)]
pub struct FrameReport {
    /// Its first byte on the device; `None` if the slot says no size.
    pub offset: Option<u64>,
    /// The header of its slot.
    pub slot: Result<SlotHeader, BadHeader>,
    /// Its own.
    pub header: Option<Result<BlockHeader, BadHeader>>,
    /// Whether the payload matches the header.
    pub payload: Option<bool>,
}

/// A catalog that is open for reading.
pub struct OfflineCatalog {
    catalog: Catalog,
    /// Where RocksDB writes its own log.
    logs: PathBuf,
    _lock: Option<File>,
}

/// What a catalog says in all.
#[derive(Clone, Debug)]
pub struct CatalogReport {
    /// Major and minor format.
    pub format: (u32, u32),
    /// The life of the daemon that last opened it.
    pub incarnation: u32,
    /// That life ended cleanly.
    pub clean: bool,
    /// A scan has to complete it.
    pub rebuild: bool,
    /// Devices by number, with their uuids.
    pub devices: BTreeMap<DeviceId, [u8; 16]>,
    /// Spaces.
    pub spaces: BTreeMap<SpaceId, SpaceRecord>,
    /// Carved slots with their carve sequences.
    pub carves: Vec<(Carve, u64)>,
    /// Blocks and their payload, by space.
    pub blocks: BTreeMap<SpaceId, (u64, ByteCount)>,
}

/// Which entries are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct EntryFilter {
    /// Of this space.
    pub space: Option<SpaceId>,
    /// This block.
    pub block: Option<BlockId>,
    /// On this device.
    pub device: Option<DeviceId>,
    /// In this slot.
    pub slot: Option<u32>,
}

impl EntryFilter {
    fn wants(&self, found: &FoundHeader) -> bool {
        self.space.is_none_or(|space| space == found.header.space)
            && self.block.is_none_or(|block| block == found.header.block)
            && self.device.is_none_or(|device| device == found.frame.device)
            && self.slot.is_none_or(|slot| slot == found.frame.slot)
    }
}

impl OfflineCatalog {
    /// Opens the catalog of a data directory.
    ///
    /// # Errors
    /// A daemon uses it, there is none, or it is damaged or too new.
    pub fn open(data_dir: &Path) -> Result<Self, MediaError> {
        let lock = lock_offline(data_dir)?;
        let path = data_dir.join("catalog");
        if !path.join("CURRENT").exists() {
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, "there is no catalog in it");
            return Err(MediaError::File {
                path: data_dir.to_owned(),
                action: "use it as a data directory",
                source,
            });
        }
        let logs = log_folder(data_dir)?;
        match Catalog::open_read_only(&path, &logs) {
            Ok(catalog) => Ok(Self { catalog, logs, _lock: lock }),
            Err(error) => {
                forget_logs(&logs);
                Err(error.into())
            }
        }
    }

    /// Reads it through.
    ///
    /// # Errors
    /// It is damaged.
    pub fn report(&self) -> Result<CatalogReport, MediaError> {
        let number = |name: &str| -> Result<u32, MediaError> {
            let value = self.catalog.meta(name)?.and_then(|value| value.try_into().ok());
            Ok(value.map_or(0, u32::from_le_bytes))
        };
        let mut blocks = BTreeMap::<SpaceId, (u64, ByteCount)>::new();
        self.catalog.blocks(BATCH, &mut |batch| {
            for found in batch {
                let (count, bytes) = blocks.entry(found.header.space).or_default();
                *count += 1;
                *bytes = ByteCount::new(bytes.get().saturating_add(found.header.length.get()));
            }
        })?;
        Ok(CatalogReport {
            format: (number("format")?, number("minor")?),
            incarnation: number("incarnation")?,
            clean: self.catalog.meta("clean")?.is_some(),
            rebuild: self.catalog.meta("rebuild")?.is_some(),
            devices: self.devices()?,
            spaces: self.catalog.spaces()?,
            carves: self.catalog.carves()?,
            blocks,
        })
    }

    /// The first entries that a filter lets through, by block id.
    ///
    /// # Errors
    /// It is damaged.
    pub fn entries(&self, filter: &EntryFilter, limit: usize) -> Result<Vec<FoundHeader>, MediaError> {
        if let Some(block) = filter.block {
            let found = self.catalog.block(block)?.filter(|found| filter.wants(found));
            return Ok(found.into_iter().take(limit).collect());
        }
        let mut wanted = BTreeMap::new();
        self.catalog.blocks(BATCH, &mut |batch| {
            for found in batch.into_iter().filter(|found| filter.wants(found)) {
                wanted.insert(found.header.block, found);
                if wanted.len() > limit {
                    wanted.pop_last();
                }
            }
        })?;
        Ok(wanted.into_values().collect())
    }

    fn devices(&self) -> Result<BTreeMap<DeviceId, [u8; 16]>, MediaError> {
        let mut devices = BTreeMap::new();
        for device in (0..DEVICES_MAX).map(DeviceId::new) {
            let uuid = self.catalog.meta(&crate::open::device_key(device))?;
            let Some(uuid) = uuid.and_then(|uuid| uuid.try_into().ok()) else { break };
            devices.insert(device, uuid);
        }
        Ok(devices)
    }

    fn all(&self, take: &mut dyn FnMut(Vec<FoundHeader>)) -> Result<(), MediaError> {
        self.catalog.blocks(BATCH, take)?;
        Ok(())
    }
}

impl Drop for OfflineCatalog {
    fn drop(&mut self) {
        forget_logs(&self.logs);
    }
}

/// RocksDB keeps a log of its own even when it only reads: it goes to a folder that is removed afterwards.
fn log_folder(data_dir: &Path) -> Result<PathBuf, MediaError> {
    let path = std::env::temp_dir().join(format!("terrace-inspect-{}", std::process::id()));
    std::fs::create_dir_all(&path).map_err(|source| MediaError::File {
        path: data_dir.to_owned(),
        action: "make a temporary folder beside it",
        source,
    })?;
    Ok(path)
}

fn forget_logs(path: &Path) {
    if let Err(error) = std::fs::remove_dir_all(path) {
        tracing::warn!(path = %path.display(), %error, "a temporary folder stays behind");
    }
}

/// Takes the lock of a data directory, if it has one, or says which daemon has it.
///
/// # Errors
/// A daemon has it, or it cannot be opened.
pub fn lock_offline(data_dir: &Path) -> Result<Option<File>, MediaError> {
    match File::open(data_dir.join("lock")) {
        Ok(lock) => {
            lock_exclusively(&lock, data_dir)?;
            Ok(Some(lock))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => {
            Err(MediaError::File { path: data_dir.to_owned(), action: "open its lock file", source })
        }
    }
}

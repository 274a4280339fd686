//! The catalog: which block is where, how slots are carved, and the spaces, in
//! RocksDB. One writer thread; any number of readers.
//!
//! Every batch is synced before it is answered. Recovery accepts no hole: a log
//! that does not read back completely makes `open` fail, and the caller moves
//! the catalog aside and rebuilds it from the header pages. Values carry a
//! version and a checksum of their own, so a wrong byte is damage, not a block.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rocksdb::{DB, DBRecoveryMode, Direction, IteratorMode, Options, ReadOptions, WriteBatch, WriteOptions};
use terrace_core::{BlockHeader, BlockId, ByteCount, Checksum, DeviceId, DiskFrame, SpaceId, TenantId};

use crate::api::{Carve, FoundHeader, SpaceRecord};
use crate::facts::room;
use crate::header::{crc, id_at, u16_at, u32_at, u64_at};

const FORMAT: u32 = 1;
const KEY_BLOCK: u8 = b'b';
const KEY_CARVE: u8 = b'c';
const KEY_META: u8 = b'm';
const KEY_SPACE: u8 = b's';
const BLOCK_BYTES: usize = 123;
const CARVE_BYTES: usize = 41;
const MEMTABLE_BYTES: usize = 8 << 20;
const CACHE_BYTES: usize = 16 << 20;
const OPEN_FILES_MAX: i32 = 128;
// Memtables, log and a compaction of them: with less room nothing is written at all, because RocksDB
// does not survive a write that finds the disk full (Debian's build ends the process).
const ROOM_BYTES_MIN: u64 = 64 << 20;

/// The catalog failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CatalogError {
    /// RocksDB refused.
    #[error("catalog {path}: {reason}")]
    Store {
        /// Its folder.
        path: PathBuf,
        /// RocksDB's words.
        reason: String,
    },
    /// A value that we did not write like this.
    #[error("catalog {path}: damaged entry ({what})")]
    Damaged {
        /// Its folder.
        path: PathBuf,
        /// Which kind of entry.
        what: &'static str,
    },
    /// Made by a newer Terrace.
    #[error("catalog {path} has format {found}; this Terrace knows {FORMAT}: use a newer one")]
    NewerFormat {
        /// Its folder.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It failed before and has not been reopened.
    #[error("catalog {path} takes no writes after an error")]
    Failed {
        /// Its folder.
        path: PathBuf,
    },
    /// The disk is as good as full.
    #[error(
        "catalog {path} has {available} bytes of room left and needs {ROOM_BYTES_MIN}: free space on its disk"
    )]
    NoRoom {
        /// Its folder.
        path: PathBuf,
        /// Room left.
        available: u64,
    },
    /// A record is longer than allowed.
    #[error("a space record holds a tenant name or a manifest that is too long or empty")]
    BadRecord,
}

/// Changes that become durable together, in the order in which they were added.
#[derive(Default)]
pub(crate) struct Batch(WriteBatch);

impl Batch {
    pub(crate) fn put_block(&mut self, frame: DiskFrame, header: &BlockHeader) {
        self.0.put(key(KEY_BLOCK, &header.block.to_bytes()), encode_block(frame, header));
    }

    pub(crate) fn delete_block(&mut self, block: BlockId) {
        self.0.delete(key(KEY_BLOCK, &block.to_bytes()));
    }

    pub(crate) fn put_carve(&mut self, carve: &Carve, sequence: u64) {
        let mut value = Vec::with_capacity(CARVE_BYTES);
        value.push(1);
        value.extend_from_slice(&carve.space.to_bytes());
        value.extend_from_slice(&carve.frame_bytes.get().to_le_bytes());
        value.extend_from_slice(&sequence.to_le_bytes());
        value.extend_from_slice(&crc(&value).to_le_bytes());
        self.0.put(carve_key(carve.device, carve.slot), value);
    }

    pub(crate) fn delete_carve(&mut self, device: DeviceId, slot: u32) {
        self.0.delete(carve_key(device, slot));
    }

    /// The lengths were checked by [`check_record`].
    pub(crate) fn put_space(&mut self, record: &SpaceRecord) {
        self.0.put(key(KEY_SPACE, &record.space.to_bytes()), encode_space(record));
    }

    pub(crate) fn put_meta(&mut self, name: &str, value: &[u8]) {
        self.0.put(key(KEY_META, name.as_bytes()), value);
    }

    pub(crate) fn delete_meta(&mut self, name: &str) {
        self.0.delete(key(KEY_META, name.as_bytes()));
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// An open catalog.
pub(crate) struct Catalog {
    path: PathBuf,
    /// `None` after a failed attempt to reopen.
    store: RwLock<Option<DB>>,
    failed: AtomicBool,
    fails: Arc<AtomicBool>,
}

impl Catalog {
    /// Opens or makes it. The flag says that it is new.
    pub(crate) fn open(path: &Path, fails: Arc<AtomicBool>) -> Result<(Self, bool), CatalogError> {
        let new = !path.join("CURRENT").exists();
        let store = open_store(path)?;
        let catalog = Self {
            path: path.to_owned(),
            store: RwLock::new(Some(store)),
            failed: AtomicBool::new(false),
            fails,
        };
        match catalog.meta("format")? {
            None if new => {
                let mut batch = Batch::default();
                batch.put_meta("format", &FORMAT.to_le_bytes());
                catalog.write(batch)?;
            }
            Some(value) if value.len() == 4 => {
                let found = u32_at(&value, 0);
                if found > FORMAT {
                    return Err(CatalogError::NewerFormat { path: path.to_owned(), found });
                }
            }
            _ => return Err(catalog.damaged("format")),
        }
        Ok((catalog, new))
    }

    /// Applies a batch and syncs it. After an error nothing is written until [`Self::reopen`].
    pub(crate) fn write(&self, batch: Batch) -> Result<(), CatalogError> {
        if self.failed.load(Ordering::Acquire) {
            return Err(self.closed());
        }
        let outcome = if self.fails.load(Ordering::Acquire) {
            Err(CatalogError::Store { path: self.path.clone(), reason: "failure was asked for".to_owned() })
        } else {
            check_room(&self.path).and_then(|()| {
                self.with(|store| {
                    let mut options = WriteOptions::default();
                    options.set_sync(true);
                    store.write_opt(batch.0, &options).map_err(|error| self.said(&error))
                })
            })
        };
        if let Err(error) = &outcome {
            self.failed.store(true, Ordering::Release);
            tracing::error!(%error, "catalog write failed: nothing is persisted until it is reopened");
        }
        outcome
    }

    /// False after a failed write.
    pub(crate) fn usable(&self) -> bool {
        !self.failed.load(Ordering::Acquire)
    }

    /// Closes, opens and reads everything; takes writes again if all is well.
    pub(crate) fn reopen(&self) -> Result<(), CatalogError> {
        // Cheap, so that it can be asked often.
        check_room(&self.path)?;
        {
            let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
            *store = None;
            *store = Some(open_store(&self.path)?);
        }
        self.blocks(4096, &mut |_| {})?;
        let mut probe = Batch::default();
        probe.put_meta("reopened", &[1]);
        self.failed.store(false, Ordering::Release);
        self.write(probe)
    }

    /// All blocks, in batches. Returns how many.
    pub(crate) fn blocks(
        &self,
        batch: usize,
        take: &mut dyn FnMut(Vec<FoundHeader>),
    ) -> Result<u64, CatalogError> {
        self.with(|store| {
            let mut found = Vec::with_capacity(batch);
            let mut count = 0u64;
            self.walk(store, KEY_BLOCK, |key, value| {
                let block = BlockId::from_bytes(key.try_into().map_err(|_| self.damaged("block key"))?);
                found.push(decode_block(block, value).ok_or_else(|| self.damaged("block"))?);
                count += 1;
                if found.len() >= batch {
                    take(std::mem::replace(&mut found, Vec::with_capacity(batch)));
                }
                Ok(())
            })?;
            if !found.is_empty() {
                take(found);
            }
            Ok(count)
        })
    }

    /// One block.
    pub(crate) fn block(&self, block: BlockId) -> Result<Option<FoundHeader>, CatalogError> {
        self.with(|store| {
            let value = store.get(key(KEY_BLOCK, &block.to_bytes())).map_err(|error| self.said(&error))?;
            let Some(value) = value else { return Ok(None) };
            decode_block(block, &value).map(Some).ok_or_else(|| self.damaged("block"))
        })
    }

    /// All carved slots with their carve sequences.
    pub(crate) fn carves(&self) -> Result<Vec<(Carve, u64)>, CatalogError> {
        self.with(|store| {
            let mut carves = Vec::new();
            self.walk(store, KEY_CARVE, |key, value| {
                carves.push(decode_carve(key, value).ok_or_else(|| self.damaged("slot"))?);
                Ok(())
            })?;
            Ok(carves)
        })
    }

    /// All spaces.
    pub(crate) fn spaces(&self) -> Result<BTreeMap<SpaceId, SpaceRecord>, CatalogError> {
        self.with(|store| {
            let mut spaces = BTreeMap::new();
            self.walk(store, KEY_SPACE, |key, value| {
                let space = SpaceId::from_bytes(key.try_into().map_err(|_| self.damaged("space key"))?);
                spaces.insert(space, decode_space(space, value).ok_or_else(|| self.damaged("space"))?);
                Ok(())
            })?;
            Ok(spaces)
        })
    }

    pub(crate) fn meta(&self, name: &str) -> Result<Option<Vec<u8>>, CatalogError> {
        self.with(|store| store.get(key(KEY_META, name.as_bytes())).map_err(|error| self.said(&error)))
    }

    fn walk(
        &self,
        store: &DB,
        kind: u8,
        mut take: impl FnMut(&[u8], &[u8]) -> Result<(), CatalogError>,
    ) -> Result<(), CatalogError> {
        let mut options = ReadOptions::default();
        options.set_verify_checksums(true);
        options.fill_cache(false);
        options.set_iterate_upper_bound(vec![kind + 1]);
        for entry in store.iterator_opt(IteratorMode::From(&[kind], Direction::Forward), options) {
            let (key, value) = entry.map_err(|error| self.said(&error))?;
            take(key.get(1..).unwrap_or_default(), &value)?;
        }
        Ok(())
    }

    fn with<T>(&self, act: impl FnOnce(&DB) -> Result<T, CatalogError>) -> Result<T, CatalogError> {
        let store = self.store.read().unwrap_or_else(PoisonError::into_inner);
        match store.as_ref() {
            Some(store) => act(store),
            None => Err(self.closed()),
        }
    }

    /// The answer when nobody takes changes any more.
    pub(crate) fn closed(&self) -> CatalogError {
        CatalogError::Failed { path: self.path.clone() }
    }

    fn said(&self, error: &rocksdb::Error) -> CatalogError {
        CatalogError::Store { path: self.path.clone(), reason: error.to_string() }
    }

    fn damaged(&self, what: &'static str) -> CatalogError {
        CatalogError::Damaged { path: self.path.clone(), what }
    }
}

/// Moves a damaged catalog out of the way, next to where it was. One such copy is kept.
pub(crate) fn move_aside(path: &Path) -> std::io::Result<PathBuf> {
    let aside = path.with_extension("damaged");
    if aside.exists() {
        std::fs::remove_dir_all(&aside)?;
    }
    std::fs::rename(path, &aside)?;
    Ok(aside)
}

/// Does a record fit a catalog entry and a slot header?
pub(crate) fn check_record(record: &SpaceRecord) -> Result<(), CatalogError> {
    let name = 1..=crate::header::TENANT_NAME_BYTES_MAX;
    let manifest = 1..=crate::header::MANIFEST_BYTES_MAX;
    if name.contains(&record.tenant_name.len()) && manifest.contains(&record.manifest.len()) {
        Ok(())
    } else {
        Err(CatalogError::BadRecord)
    }
}

/// Refuses to touch the store when the disk is as good as full.
fn check_room(path: &Path) -> Result<(), CatalogError> {
    let existing = path.ancestors().find(|folder| folder.exists()).unwrap_or(path);
    let failed =
        |error: std::io::Error| CatalogError::Store { path: path.to_owned(), reason: error.to_string() };
    let available = room(existing).map_err(failed)?;
    if available < ROOM_BYTES_MIN {
        return Err(CatalogError::NoRoom { path: path.to_owned(), available });
    }
    Ok(())
}

fn open_store(path: &Path) -> Result<DB, CatalogError> {
    check_room(path)?;
    let mut tables = rocksdb::BlockBasedOptions::default();
    let said =
        |error: rocksdb::Error| CatalogError::Store { path: path.to_owned(), reason: error.to_string() };
    tables.set_block_cache(&rocksdb::Cache::new_lru_cache(CACHE_BYTES).map_err(said)?);
    tables.set_bloom_filter(10.0, false);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_paranoid_checks(true);
    options.set_wal_recovery_mode(DBRecoveryMode::AbsoluteConsistency);
    options.set_block_based_table_factory(&tables);
    options.set_write_buffer_size(MEMTABLE_BYTES);
    options.set_max_write_buffer_number(2);
    options.set_max_total_wal_size(4 * MEMTABLE_BYTES as u64);
    options.set_max_background_jobs(2);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_compression_type(rocksdb::DBCompressionType::None);
    DB::open(&options, path).map_err(said)
}

fn key(kind: u8, rest: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + rest.len());
    key.push(kind);
    key.extend_from_slice(rest);
    key
}

/// Big-endian, so that slots are walked in order.
fn carve_key(device: DeviceId, slot: u32) -> Vec<u8> {
    let mut rest = device.get().to_be_bytes().to_vec();
    rest.extend_from_slice(&slot.to_be_bytes());
    key(KEY_CARVE, &rest)
}

fn encode_block(frame: DiskFrame, header: &BlockHeader) -> Vec<u8> {
    let mut value = Vec::with_capacity(BLOCK_BYTES);
    value.push(1);
    value.extend_from_slice(&frame.device.get().to_le_bytes());
    value.extend_from_slice(&frame.slot.to_le_bytes());
    value.extend_from_slice(&frame.index.to_le_bytes());
    value.extend_from_slice(&header.space.to_bytes());
    value.extend_from_slice(&header.tenant.to_bytes());
    value.extend_from_slice(&[u8::from(header.parent.is_some())]);
    value.extend_from_slice(&header.parent.map_or([0; 16], BlockId::to_bytes));
    value.extend_from_slice(&header.length.get().to_le_bytes());
    value.extend_from_slice(&header.checksum.get().to_le_bytes());
    value.extend_from_slice(&header.generation.to_le_bytes());
    value.extend_from_slice(&header.write_sequence.to_le_bytes());
    value.extend_from_slice(&[0; 23]);
    let sum = crc(&value);
    value.extend_from_slice(&sum.to_le_bytes());
    value
}

fn decode_block(block: BlockId, value: &[u8]) -> Option<FoundHeader> {
    let value = checked(value, BLOCK_BYTES)?;
    let parent = match value[43] {
        0 => None,
        1 => Some(BlockId::from_bytes(id_at(value, 44))),
        _ => return None,
    };
    let frame = DiskFrame {
        device: DeviceId::new(u16_at(value, 1)),
        slot: u32_at(value, 3),
        index: u32_at(value, 7),
    };
    let header = BlockHeader {
        block,
        space: SpaceId::from_bytes(id_at(value, 11)),
        tenant: TenantId::from_bytes(id_at(value, 27)),
        parent,
        length: ByteCount::new(u64_at(value, 60)),
        checksum: Checksum::new(u64_at(value, 68)),
        generation: u64_at(value, 76),
        write_sequence: u64_at(value, 84),
    };
    Some(FoundHeader { frame, header })
}

fn decode_carve(key: &[u8], value: &[u8]) -> Option<(Carve, u64)> {
    let value = checked(value, CARVE_BYTES)?;
    let device = u16::from_be_bytes(key.get(..2)?.try_into().ok()?);
    let slot = u32::from_be_bytes(key.get(2..)?.try_into().ok()?);
    let carve = Carve {
        device: DeviceId::new(device),
        slot,
        space: SpaceId::from_bytes(id_at(value, 1)),
        frame_bytes: ByteCount::new(u64_at(value, 17)),
    };
    Some((carve, u64_at(value, 25)))
}

fn encode_space(record: &SpaceRecord) -> Vec<u8> {
    let name = u16::try_from(record.tenant_name.len()).expect("check_record allows 256");
    let mut value = vec![1];
    value.extend_from_slice(&record.tenant.to_bytes());
    value.extend_from_slice(&record.generation.to_le_bytes());
    value.extend_from_slice(&name.to_le_bytes());
    value.extend_from_slice(record.tenant_name.as_bytes());
    value.extend_from_slice(&record.manifest);
    let sum = crc(&value);
    value.extend_from_slice(&sum.to_le_bytes());
    value
}

fn decode_space(space: SpaceId, value: &[u8]) -> Option<SpaceRecord> {
    let (body, sum) = value.split_at_checked(value.len().checked_sub(8)?)?;
    if body.len() < 27 || body[0] != 1 || u64_at(sum, 0) != crc(body) {
        return None;
    }
    let (name, manifest) = body[27..].split_at_checked(usize::from(u16_at(body, 25)))?;
    Some(SpaceRecord {
        space,
        tenant: TenantId::from_bytes(id_at(body, 1)),
        generation: u64_at(body, 17),
        tenant_name: std::str::from_utf8(name).ok()?.to_owned(),
        manifest: manifest.to_vec(),
    })
}

/// A value of version 1 and this length whose checksum matches.
fn checked(value: &[u8], bytes: usize) -> Option<&[u8]> {
    let good = value.len() == bytes && value[0] == 1 && u64_at(value, bytes - 8) == crc(&value[..bytes - 8]);
    good.then_some(value)
}

//! The catalog: which block is where, how slots are carved, and the spaces, in
//! RocksDB. One writer thread; any number of readers. Keys and values: `entry`.
//!
//! Every batch is synced before it is answered, but for those of a scan, which
//! is repeated from the start if it is cut short. Recovery accepts no hole: a log
//! that does not read back completely makes `open` fail, and the caller moves
//! the catalog aside and rebuilds it from the header pages. Values carry a
//! version and a checksum of their own, so a wrong byte is damage, not a block.
//!
//! The format is written twice: as an entry, and in the file `FORMAT` beside
//! RocksDB's own, which is read before RocksDB touches anything. A newer Terrace
//! may use a newer RocksDB, and what that wrote must not be taken for damage.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, mpsc};

use rocksdb::{DB, DBRecoveryMode, Options, ReadOptions, WriteBatch, WriteOptions};
use terrace_core::{BlockHeader, BlockId, DeviceId, DiskFrame, SpaceId, UseStats};

use crate::api::{Carve, FoundHeader, SpaceRecord};
use crate::entry::{
    KEY_BLOCK, KEY_CARVE, KEY_META, KEY_SPACE, carve_key, decode_block, decode_carve, decode_space,
    encode_block, encode_carve, encode_space, key,
};
use crate::facts::room;
use crate::header::u32_at;
use crate::open::keep_to_owner;

/// Major and minor format. Version 2 of a block's value came with 2.0.
const FORMAT: u32 = 2;
const MINOR: u32 = 0;
const FORMAT_FILE: &str = "FORMAT";
const FORMAT_WORDS: &str = "terrace catalog ";
const MEMTABLE_BYTES: usize = 8 << 20;
const CACHE_BYTES: usize = 16 << 20;
const OPEN_FILES_MAX: i32 = 128;
/// Tables are mostly read from end to end.
const TABLE_BLOCK_BYTES: usize = 16 << 10;
/// A folder that cannot be made, so that RocksDB keeps no log.
pub(crate) const NO_LOG: &str = "/dev/null/log";
const READAHEAD_BYTES: usize = 2 << 20;
/// Batches that a walk reads ahead of who takes them.
const BATCHES_AHEAD: usize = 4;
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
    #[error(
        "catalog {path} has format {found}; this Terrace knows up to {FORMAT}: use a newer one. Nothing was changed"
    )]
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
    /// Its files could not be moved or made.
    #[error("catalog {path}: cannot {action}: {reason}")]
    File {
        /// Its folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        reason: String,
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

impl CatalogError {
    /// Opening it again would not help: what it holds does not read back.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } => true,
            Self::Store { reason, .. } => reason.starts_with("Corruption"),
            Self::NewerFormat { .. }
            | Self::Failed { .. }
            | Self::File { .. }
            | Self::NoRoom { .. }
            | Self::BadRecord => false,
        }
    }
}

/// Changes that become durable together, in the order in which they were added.
#[derive(Default)]
pub(crate) struct Batch(WriteBatch);

impl Batch {
    pub(crate) fn put_block(&mut self, frame: DiskFrame, header: &BlockHeader, stats: UseStats) {
        self.0.put(key(KEY_BLOCK, &header.block.to_bytes()), encode_block(frame, header, stats));
    }

    pub(crate) fn delete_block(&mut self, block: BlockId) {
        self.0.delete(key(KEY_BLOCK, &block.to_bytes()));
    }

    pub(crate) fn put_carve(&mut self, carve: &Carve, sequence: u64) {
        self.0.put(carve_key(carve.device, carve.slot), encode_carve(carve, sequence));
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
    /// Entries that go in when it takes writes for the first time in this life.
    later: Mutex<Option<Vec<u8>>>,
}

impl Catalog {
    /// Opens or makes it, and brings an older format up to ours. The flag says that it is new. On a full disk
    /// one of our format is opened for reading, and takes writes after a [`Self::reopen`].
    pub(crate) fn open(path: &Path, fails: Arc<AtomicBool>) -> Result<(Self, bool), CatalogError> {
        check_format(path)?;
        let new = !path.join("CURRENT").exists();
        if !new && let Err(full) = check_room(path) {
            return Self::open_full(path, fails, full).map(|catalog| (catalog, false));
        }
        let catalog = Self::around(path, open_store(path)?, fails);
        let found = catalog.format()?;
        if found.is_none() && !new {
            return Err(catalog.damaged("format"));
        }
        if found != Some(FORMAT) {
            let mut batch = Batch::default();
            if new {
                begin(&mut batch);
            }
            batch.put_meta("format", &FORMAT.to_le_bytes());
            batch.put_meta("minor", &MINOR.to_le_bytes());
            catalog.write(batch)?;
        }
        mark_format(path)?;
        Ok((catalog, new))
    }

    /// Opens it where nothing can be written. What keeps that from being enough is the full disk's fault.
    fn open_full(path: &Path, fails: Arc<AtomicBool>, full: CatalogError) -> Result<Self, CatalogError> {
        match Self::open_read_only(path, Path::new(NO_LOG)) {
            Ok(catalog) if catalog.format() == Ok(Some(FORMAT)) => {
                tracing::error!(error = %full, "the catalog is opened for reading: nothing is persisted");
                Ok(Self { fails, ..catalog })
            }
            Ok(_) => Err(full),
            Err(error) => {
                tracing::error!(%error, "the catalog cannot be opened for reading either");
                Err(full)
            }
        }
    }

    /// Entries that [`Self::reopen`] adds, because now there is no room for them.
    pub(crate) fn write_later(&self, batch: &Batch) {
        *self.later.lock().unwrap_or_else(PoisonError::into_inner) = Some(batch.0.data().to_vec());
    }

    /// Opens it for reading only, without changing a file of it. RocksDB keeps its own log in `log_dir`.
    pub(crate) fn open_read_only(path: &Path, log_dir: &Path) -> Result<Self, CatalogError> {
        check_format(path)?;
        let mut options = store_options(path)?;
        options.create_if_missing(false);
        options.set_db_log_dir(log_dir);
        let store = DB::open_for_read_only(&options, path, false)
            .map_err(|error| CatalogError::Store { path: path.to_owned(), reason: error.to_string() })?;
        let catalog = Self::around(path, store, Arc::default());
        catalog.failed.store(true, Ordering::Release);
        catalog.format()?.ok_or_else(|| catalog.damaged("format"))?;
        Ok(catalog)
    }

    fn around(path: &Path, store: DB, fails: Arc<AtomicBool>) -> Self {
        Self {
            path: path.to_owned(),
            store: RwLock::new(Some(store)),
            failed: AtomicBool::new(false),
            fails,
            later: Mutex::new(None),
        }
    }

    /// Its major format, unless that is newer than ours; `None` if it says nothing.
    fn format(&self) -> Result<Option<u32>, CatalogError> {
        match self.meta("format")? {
            None => Ok(None),
            Some(value) if value.len() == 4 => match u32_at(&value, 0) {
                found if found > FORMAT => Err(CatalogError::NewerFormat { path: self.path.clone(), found }),
                found => Ok(Some(found)),
            },
            Some(_) => Err(self.damaged("format")),
        }
    }

    /// Applies a batch and syncs it. After an error nothing is written until [`Self::reopen`].
    pub(crate) fn write(&self, batch: Batch) -> Result<(), CatalogError> {
        self.apply(batch, true)
    }

    /// Applies a batch that the next [`Self::write`] makes durable: what a power cut before that takes away
    /// must be found again by other means.
    pub(crate) fn write_unsynced(&self, batch: Batch) -> Result<(), CatalogError> {
        self.apply(batch, false)
    }

    fn apply(&self, batch: Batch, synced: bool) -> Result<(), CatalogError> {
        if self.failed.load(Ordering::Acquire) {
            return Err(self.closed());
        }
        let outcome = if self.fails.load(Ordering::Acquire) {
            Err(CatalogError::Store { path: self.path.clone(), reason: "failure was asked for".to_owned() })
        } else {
            check_room(&self.path).and_then(|()| {
                self.with(|store| {
                    let mut options = WriteOptions::default();
                    options.set_sync(synced);
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
        self.failed.store(true, Ordering::Release);
        {
            let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
            *store = None;
            *store = Some(open_store(&self.path)?);
        }
        self.format()?.ok_or_else(|| self.damaged("format"))?;
        self.blocks(4096, &mut |_| {})?;
        self.carves()?;
        self.spaces()?;
        let later = self.later.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut probe = later.map_or_else(Batch::default, |data| Batch(WriteBatch::from_data(&data)));
        probe.put_meta("reopened", &[1]);
        self.failed.store(false, Ordering::Release);
        self.write(probe)?;
        *self.later.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    /// Moves it aside and begins a new one with these entries, in which a scan must find the rest.
    pub(crate) fn renew(&self, mut entries: Batch) -> Result<PathBuf, CatalogError> {
        let moved_to = {
            let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
            *store = None;
            let moved_to = move_aside(&self.path).map_err(|error| CatalogError::File {
                path: self.path.clone(),
                action: "move it aside",
                reason: error.to_string(),
            })?;
            *store = Some(open_store(&self.path)?);
            moved_to
        };
        *self.later.lock().unwrap_or_else(PoisonError::into_inner) = None;
        begin(&mut entries);
        entries.put_meta("format", &FORMAT.to_le_bytes());
        entries.put_meta("minor", &MINOR.to_le_bytes());
        self.failed.store(false, Ordering::Release);
        self.write(entries)?;
        mark_format(&self.path)?;
        Ok(moved_to)
    }

    /// All blocks, in batches, in no certain order. Returns how many. Threads read and decode ahead of `take`.
    pub(crate) fn blocks(
        &self,
        batch: usize,
        take: &mut dyn FnMut(Vec<FoundHeader>),
    ) -> Result<u64, CatalogError> {
        self.with(|store| {
            std::thread::scope(|scope| {
                let (sender, receiver) = mpsc::sync_channel(BATCHES_AHEAD);
                let readers = ranges(readers()).map(|range| {
                    let sender = sender.clone();
                    scope.spawn(move || self.read_blocks(store, range, batch, &sender))
                });
                let readers: Vec<_> = readers.collect();
                drop(sender);
                let mut count = 0u64;
                for found in receiver {
                    count += found.len() as u64;
                    take(found);
                }
                for reader in readers {
                    reader.join().unwrap_or_else(|_| Err(self.damaged("block: reading it panicked")))?;
                }
                Ok(count)
            })
        })
    }

    /// Sends the blocks whose ids lie in a range. Ends early when nobody takes them any more.
    fn read_blocks(
        &self,
        store: &DB,
        (from, to): (Vec<u8>, Vec<u8>),
        batch: usize,
        sender: &mpsc::SyncSender<Vec<FoundHeader>>,
    ) -> Result<(), CatalogError> {
        let mut found = Vec::with_capacity(batch);
        self.walk(store, &from, to, |key, value| {
            let block = BlockId::from_bytes(key.try_into().map_err(|_| self.damaged("block key"))?);
            found.push(decode_block(block, value).ok_or_else(|| self.damaged("block"))?);
            if found.len() >= batch {
                let full = std::mem::replace(&mut found, Vec::with_capacity(batch));
                sender.send(full).map_err(|_| self.closed())?;
            }
            Ok(())
        })?;
        if !found.is_empty() {
            sender.send(found).map_err(|_| self.closed())?;
        }
        Ok(())
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
            self.walk(store, &[KEY_CARVE], vec![KEY_CARVE + 1], |key, value| {
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
            self.walk(store, &[KEY_SPACE], vec![KEY_SPACE + 1], |key, value| {
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
        from: &[u8],
        to: Vec<u8>,
        mut take: impl FnMut(&[u8], &[u8]) -> Result<(), CatalogError>,
    ) -> Result<(), CatalogError> {
        let mut options = ReadOptions::default();
        options.set_verify_checksums(true);
        options.fill_cache(false);
        options.set_readahead_size(READAHEAD_BYTES);
        options.set_iterate_upper_bound(to);
        let mut cursor = store.raw_iterator_opt(options);
        cursor.seek(from);
        while let Some((key, value)) = cursor.item() {
            take(key.get(1..).unwrap_or_default(), value)?;
            cursor.next();
        }
        cursor.status().map_err(|error| self.said(&error))
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

/// In the first batch of a catalog: until this mark is gone it does not know every block. A start that is cut
/// short right after the catalog was made must not leave one that seems to know that there are none.
fn begin(batch: &mut Batch) {
    batch.put_meta("rebuild", &[1]);
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
pub(crate) fn check_room(path: &Path) -> Result<(), CatalogError> {
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
    // RocksDB makes files that everybody may read.
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| CatalogError::File {
        path: path.to_owned(),
        action: "make its folder",
        reason: error.to_string(),
    })?;
    keep_to_owner(path);
    DB::open(&store_options(path)?, path)
        .map_err(|error| CatalogError::Store { path: path.to_owned(), reason: error.to_string() })
}

fn store_options(path: &Path) -> Result<Options, CatalogError> {
    let mut tables = rocksdb::BlockBasedOptions::default();
    let said =
        |error: rocksdb::Error| CatalogError::Store { path: path.to_owned(), reason: error.to_string() };
    tables.set_block_cache(&rocksdb::Cache::new_lru_cache(CACHE_BYTES).map_err(said)?);
    tables.set_bloom_filter(10.0, false);
    tables.set_block_size(TABLE_BLOCK_BYTES);
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
    options.set_skip_stats_update_on_db_open(true);
    Ok(options)
}

/// Refuses a catalog of a newer major format by its `FORMAT` file, before RocksDB opens it. Changes nothing.
/// A file that is missing (before 2.0) or unreadable says nothing: then the entry of the same name decides.
pub(crate) fn check_format(path: &Path) -> Result<(), CatalogError> {
    match marked_format(path) {
        Some((found, _)) if found > FORMAT => Err(CatalogError::NewerFormat { path: path.to_owned(), found }),
        Some(_) | None => Ok(()),
    }
}

/// What the `FORMAT` file says.
fn marked_format(path: &Path) -> Option<(u32, u32)> {
    let text = std::fs::read_to_string(path.join(FORMAT_FILE)).ok()?;
    let (major, minor) = text.trim_end().strip_prefix(FORMAT_WORDS)?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Writes the `FORMAT` file, unless it says this or a later minor already.
fn mark_format(path: &Path) -> Result<(), CatalogError> {
    if marked_format(path).is_some_and(|marked| marked >= (FORMAT, MINOR)) {
        return Ok(());
    }
    let (file, next) = (path.join(FORMAT_FILE), path.join("FORMAT.next"));
    let write = || {
        std::fs::write(&next, format!("{FORMAT_WORDS}{FORMAT}.{MINOR}\n"))?;
        std::fs::File::open(&next)?.sync_all()?;
        std::fs::rename(&next, &file)?;
        std::fs::File::open(path)?.sync_all()
    };
    write().map_err(|error: std::io::Error| CatalogError::File {
        path: path.to_owned(),
        action: "write its FORMAT file",
        reason: error.to_string(),
    })
}

/// Threads that read blocks: half of the machine, because somebody takes what they read.
fn readers() -> u8 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u8::try_from((cores / 2).clamp(1, 4)).unwrap_or(1)
}

/// Keys of blocks in so many ranges of equal width: ids are uniform.
fn ranges(count: u8) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> {
    let bound = move |at: u8| match at {
        0 => vec![KEY_BLOCK],
        at if at == count => vec![KEY_BLOCK + 1],
        at => {
            let first = u16::from(at) * 256 / u16::from(count);
            vec![KEY_BLOCK, u8::try_from(first).unwrap_or(u8::MAX)]
        }
    };
    (0..count).map(move |at| (bound(at), bound(at + 1)))
}

#[cfg(test)]
mod tests;

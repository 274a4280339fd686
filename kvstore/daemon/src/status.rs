//! Facts about this life of the daemon, for operators: what was found, what was
//! chosen because of it, and how far the start has come.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use terrace_core::ByteCount;
use terrace_gpudirect::HbmStatus;

/// Most notes that are kept.
const NOTES_MAX: usize = 256;

/// What `info` shows beside the core's views.
pub(crate) struct Status {
    /// When the process began.
    pub began: Instant,
    /// Folder of everything that survives.
    pub data_dir: PathBuf,
    /// Life of the daemon.
    pub incarnation: u32,
    /// Configured size of the pool.
    pub pinned_bytes: ByteCount,
    /// Size of a chunk and of a slot.
    pub chunk_bytes: ByteCount,
    ready: OnceLock<Duration>,
    hbm: OnceLock<HbmStatus>,
    notes: Mutex<Vec<String>>,
    slots_to_scan: AtomicU64,
    slots_scanned: AtomicU64,
    scanning: Mutex<()>,
}

impl Status {
    /// A start that has just begun.
    pub(crate) fn new(
        began: Instant,
        data_dir: PathBuf,
        incarnation: u32,
        pinned_bytes: ByteCount,
        chunk_bytes: ByteCount,
        notes: Vec<String>,
    ) -> Self {
        Self {
            began,
            data_dir,
            incarnation,
            pinned_bytes,
            chunk_bytes,
            ready: OnceLock::new(),
            hbm: OnceLock::new(),
            notes: Mutex::new(notes),
            slots_to_scan: AtomicU64::new(0),
            slots_scanned: AtomicU64::new(0),
            scanning: Mutex::new(()),
        }
    }

    /// Adds a sentence. Past the limit the first ones stay.
    pub(crate) fn note(&self, note: String) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() < NOTES_MAX {
            notes.push(note);
        }
    }

    /// All sentences.
    pub(crate) fn notes(&self) -> Vec<String> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Blocks are served from now on.
    pub(crate) fn ready_now(&self) -> Duration {
        *self.ready.get_or_init(|| self.began.elapsed())
    }

    /// Time from start until blocks were served; zero before that.
    pub(crate) fn ready(&self) -> Duration {
        self.ready.get().copied().unwrap_or_default()
    }

    /// What the probe of the Hbm tier found.
    pub(crate) fn hbm_found(&self, status: HbmStatus) {
        // There is one probe in a life.
        let _ = self.hbm.set(status);
    }

    /// The Hbm tier in a sentence.
    pub(crate) fn hbm(&self) -> String {
        match self.hbm.get() {
            None => "still looking for a CUDA driver: Hbm tier off".to_owned(),
            Some(HbmStatus::Off { reason }) => reason.clone(),
            Some(found @ HbmStatus::Present { .. }) => {
                format!("{found}: Hbm tier off, because no [[hbm]] is configured")
            }
        }
    }

    /// The right to scan, unless somebody has it.
    pub(crate) fn scan_alone(&self) -> Option<MutexGuard<'_, ()>> {
        match self.scanning.try_lock() {
            Ok(alone) => Some(alone),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// A scan of this many slots begins.
    pub(crate) fn scan_begins(&self, slots: u64) {
        self.slots_scanned.store(0, Ordering::Relaxed);
        self.slots_to_scan.store(slots, Ordering::Relaxed);
    }

    /// One more slot is scanned.
    pub(crate) fn slot_scanned(&self) {
        self.slots_scanned.fetch_add(1, Ordering::Relaxed);
    }

    /// The scan has ended, whether it got to the end or not.
    pub(crate) fn scan_ends(&self) {
        self.slots_to_scan.store(0, Ordering::Relaxed);
    }

    /// Share of the scan that is done; 1 when none is running.
    pub(crate) fn scan_done(&self) -> f64 {
        let all = self.slots_to_scan.load(Ordering::Relaxed);
        let done = self.slots_scanned.load(Ordering::Relaxed).min(all);
        let float = |count: u64| u32::try_from(count).map_or(f64::from(u32::MAX), f64::from);
        if all == 0 { 1.0 } else { float(done) / float(all) }
    }
}

//! Copies that are under way, and what becomes of them when the device has let
//! go: their bytes are compared with the checksum, and the operation ends.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use terrace_core::{BlockHeader, Checksum, Checksummer, Done, Fault, GpuId, OpId};
use terrace_gpudirect::{DeviceError, Ends, HostBytes, JobId, Span, Sums};
use terrace_media::{ChunkMemory, PAGE_BYTES};

use super::Finish;
use super::chunk::HbmChunk;

/// A sum of one block takes microseconds.
const SUM_WITHIN: Duration = Duration::from_secs(30);

/// Where a payload is.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Host(Arc<ChunkMemory>, u32),
    Device(Arc<HbmChunk>, u32),
    /// Memory between two devices that do not reach each other.
    Between(HostBytes),
    /// A file, from which the device reads itself.
    File,
}

impl Place {
    pub(crate) fn gpu(&self) -> Option<GpuId> {
        match self {
            Self::Device(held, _) => Some(held.gpu),
            Self::Host(..) | Self::Between(_) | Self::File => None,
        }
    }

    /// The payload, as copies name it.
    pub(crate) fn span(&self, expect: &BlockHeader) -> Result<Span, DeviceError> {
        let outside = DeviceError::BadJob { detail: "a payload outside of its frame" };
        match self {
            Self::Device(held, index) => held.payload(*index, expect.length).map(Span::Device),
            Self::Between(bytes) => bytes.part(0, expect.length).map(Span::Host),
            Self::File => Err(DeviceError::BadJob { detail: "a file where memory is meant" }),
            Self::Host(memory, index) => {
                memory.payload(*index, 0, expect.length.get()).map_err(|_| outside)?;
                let offset = u64::from(*index) * memory.frame_bytes().get() + PAGE_BYTES;
                memory.host_bytes().part(offset, expect.length).map(Span::Host)
            }
        }
    }

    /// Its checksum as it is now.
    fn checksum(&self, expect: &BlockHeader, sums: &Sums) -> Result<Checksum, DeviceError> {
        match self {
            Self::Device(held, index) => {
                sums.checksum(&held.payload(*index, expect.length)?, expect.block, expect.generation)
            }
            Self::Host(memory, index) => memory
                .checksum(*index, expect)
                .map_err(|_| DeviceError::BadJob { detail: "a payload outside of its frame" }),
            Self::File => Err(DeviceError::BadJob { detail: "a file where memory is meant" }),
            Self::Between(bytes) => {
                let mut copy = vec![0; bytes.len()];
                bytes.copy_to(&mut copy);
                let mut summer = Checksummer::new(expect.block, expect.length, expect.generation);
                summer.update(&copy);
                Ok(summer.finish())
            }
        }
    }
}

/// One payload from one place to another.
#[derive(Clone, Debug)]
pub(crate) struct Transfer {
    pub(crate) op: OpId,
    pub(crate) source: Place,
    pub(crate) target: Place,
    pub(crate) expect: BlockHeader,
}

/// What follows a copy that arrived.
pub(crate) enum Next {
    /// Its bytes are compared, and the operation ends.
    Compare(Transfer),
    /// The second half of a way through the host.
    Onwards(Box<dyn FnOnce(Result<(), DeviceError>) + Send>),
}

struct Flying {
    next: Next,
    result: Result<(), DeviceError>,
}

/// What the checking thread is given.
pub(crate) enum Check {
    /// A copy's memory was let go.
    Landed(Next, Result<(), DeviceError>),
    /// A frame is compared with its checksum.
    Verify {
        op: OpId,
        place: Place,
        expect: BlockHeader,
    },
    /// An operation that is answered from this thread.
    Answer(OpId, Result<Done, Fault>),
    Stop,
}

/// Where the ends of one device's copies go.
pub(crate) struct Landing {
    flying: Mutex<BTreeMap<JobId, Flying>>,
    last: AtomicU64,
    checks: Sender<Check>,
    lost: Arc<dyn Fn() + Send + Sync>,
    told: AtomicBool,
    /// Since when the checking thread waits for the device.
    summing: Mutex<Option<Instant>>,
}

impl Landing {
    pub(crate) fn new(checks: Sender<Check>, lost: Arc<dyn Fn() + Send + Sync>) -> Self {
        let (flying, last, told) = (Mutex::default(), AtomicU64::new(0), AtomicBool::new(false));
        Self { flying, last, checks, lost, told, summing: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<JobId, Flying>> {
        self.flying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name for a copy that is about to be given to the device.
    pub(crate) fn begin(&self, next: Next) -> JobId {
        let id = JobId(self.last.fetch_add(1, Ordering::Relaxed) + 1);
        let result = Err(DeviceError::BadJob { detail: "let go before it was answered" });
        self.lock().insert(id, Flying { next, result });
        id
    }

    /// As [`Self::refused`], for what says nothing of the device: a library that hangs.
    pub(crate) fn turned_away(&self, id: JobId, error: DeviceError) {
        if let Some(flying) = self.lock().remove(&id) {
            self.check(Check::Landed(flying.next, Err(error)));
        }
    }

    /// It was not taken: the device never had its memory.
    pub(crate) fn refused(&self, id: JobId, error: DeviceError) {
        self.note(&error);
        if let Some(flying) = self.lock().remove(&id) {
            self.check(Check::Landed(flying.next, Err(error)));
        }
    }

    /// For the checking thread.
    pub(crate) fn check(&self, check: Check) {
        // The thread ends after the last copy.
        let _ = self.checks.send(check);
    }

    /// A device that is lost, or does not answer, is told of, once: by a thread of its own, because whoever
    /// notes it may hold the lock that hearing of it takes, or is wanted by a device that hangs.
    pub(crate) fn note(&self, error: &DeviceError) {
        let lost = error.is_lost() || matches!(error, DeviceError::Hung { .. });
        if !lost || self.told.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!(%error, "a device of the Hbm tier is lost; what it held are misses until the daemon starts again");
        let tell = Arc::clone(&self.lost);
        let spawned = std::thread::Builder::new().name("hbm-lost".to_owned()).spawn(move || tell());
        if spawned.is_err() {
            // The next one tries again.
            self.told.store(false, Ordering::Release);
        }
    }

    fn summing(&self) -> MutexGuard<'_, Option<Instant>> {
        self.summing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sum that does not end is noted as a device that hangs.
    pub(crate) fn watch(&self) {
        let since = *self.summing();
        if since.is_some_and(|since| since.elapsed() > SUM_WITHIN) {
            self.note(&DeviceError::Hung { call: "a checksum on the device", within: SUM_WITHIN });
        }
    }
}

impl Ends for Landing {
    fn answered(&self, id: JobId, result: Result<(), DeviceError>) {
        if let Err(error) = &result {
            self.note(error);
        }
        if let Some(flying) = self.lock().get_mut(&id) {
            flying.result = result;
        }
    }

    fn released(&self, id: JobId) {
        let flying = self.lock().remove(&id);
        if let Some(Flying { next, result }) = flying {
            self.check(Check::Landed(next, result));
        }
    }
}

/// The thread that compares: it may wait for the device.
pub(crate) fn run(checks: &Receiver<Check>, sums: &Sums, landing: &Landing, finish: &Finish) {
    while let Ok(check) = checks.recv() {
        match check {
            Check::Stop => return,
            Check::Answer(op, outcome) => finish(op, outcome),
            Check::Verify { op, place, expect } => {
                let outcome = judged(&place, &expect, sums, landing, op);
                drop(place);
                finish(op, outcome);
            }
            Check::Landed(Next::Onwards(next), result) => next(result),
            Check::Landed(Next::Compare(transfer), result) => {
                let op = transfer.op;
                let outcome = landed(&transfer, result, sums, landing);
                // Chunks are free of us before the core hears of the end.
                drop(transfer);
                finish(op, outcome);
            }
        }
    }
}

fn landed(
    transfer: &Transfer,
    result: Result<(), DeviceError>,
    sums: &Sums,
    landing: &Landing,
) -> Result<Done, Fault> {
    let Transfer { op, source, target, expect } = transfer;
    if let Err(error) = result {
        tracing::warn!(%op, %error, "a copy to or from a device failed");
        return Err(Fault::Device);
    }
    let outcome = judged(target, expect, sums, landing, *op);
    if outcome != Err(Fault::Checksum) {
        return outcome;
    }
    if matches!(source, Place::File) {
        // The way through host memory finds out which it was.
        return Err(Fault::Device);
    }
    // Damaged before, or on the way?
    judged(source, expect, sums, landing, *op).and(Err(Fault::Device))
}

/// Whether what is in a place now has the checksum.
fn judged(
    place: &Place,
    expect: &BlockHeader,
    sums: &Sums,
    landing: &Landing,
    op: OpId,
) -> Result<Done, Fault> {
    *landing.summing() = Some(Instant::now());
    let found = place.checksum(expect, sums);
    *landing.summing() = None;
    match found {
        Ok(found) if found == expect.checksum => Ok(Done::Plain),
        Ok(_) => Err(Fault::Checksum),
        Err(error) => {
            tracing::warn!(%op, %error, "a checksum on a device failed");
            landing.note(&error);
            Err(Fault::Device)
        }
    }
}

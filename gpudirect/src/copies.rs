//! Copies between host and device memory: bounded queues by direction and class,
//! batches that end by one event, and deadlines.
//!
//! Promises, to every job that was taken: exactly one answer, within its time
//! plus a scheduler's tick, even while the driver hangs; exactly one release,
//! after the answer, when the device touches its memory no more, however late
//! that is. A deadline ends the wait, never the ownership. Leaves to others: what
//! is copied, and whether a block that arrived is the right one.
//!
//! Three threads a device: one starts and polls batches over registered memory,
//! one those over other memory (the driver copies it through its own buffers
//! and makes the caller wait), one watches the clock and never calls the driver.

mod run;
mod state;
mod watch;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, IoClass, MIB};

use crate::device::{Device, Lane};
use crate::error::DeviceError;
use crate::pinned::Pinned;
use crate::span::Piece;
use crate::told::tell;

use state::{Path, State, Waiting};

/// The caller's name for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// A batch: all of it arrives, or the answer is an error.
#[derive(Debug)]
pub struct Job {
    /// Comes back in [`Ends`].
    pub id: JobId,
    /// Who waits.
    pub class: IoClass,
    /// All of one direction.
    pub pieces: Vec<Piece>,
    /// When waiting ends, counted from now.
    pub within: Duration,
}

/// A job that was not taken.
#[derive(Debug)]
pub struct Refused {
    /// As it was.
    pub job: Job,
    /// Why.
    pub error: DeviceError,
}

/// Where ends go. Called on the engine's threads, one call at a time and in
/// order; it must not wait, and may submit.
pub trait Ends: Send + Sync {
    /// The wait is over. After an error, nothing that the job wrote may be used,
    /// and its memory is not free yet.
    fn answered(&self, id: JobId, result: Result<(), DeviceError>);
    /// The device has let go of the job's memory.
    fn released(&self, id: JobId);
}

/// Every limit of an engine.
#[derive(Clone, Copy, Debug)]
pub struct CopyLimits {
    /// Jobs that are not released, in all.
    pub jobs_max: usize,
    /// Their bytes, in all. A larger job is refused.
    pub bytes_max: ByteCount,
    /// Batches that one direction has on the device at once: enough that it is
    /// never idle, few enough that an urgent one waits for little.
    pub flights_max: usize,
    /// Bytes of these, beyond which no further batch of the direction starts.
    pub flight_bytes_max: ByteCount,
    /// A device that sits on a batch for so long is treated as lost.
    pub silence_max: Duration,
}

impl CopyLimits {
    /// For one device on a PCIe link of some 50 GB/s: 64 MiB on the way are 1.3 ms.
    pub const ONE_LINK: Self = Self {
        jobs_max: 4096,
        bytes_max: ByteCount::new(4096 * MIB),
        flights_max: 8,
        flight_bytes_max: ByteCount::new(64 * MIB),
        silence_max: Duration::from_secs(30),
    };
}

/// What an engine has done and has under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyCounts {
    /// Jobs that wait for their turn.
    pub queued: u64,
    /// Jobs that the device has.
    pub flying: u64,
    /// Those of them that nobody waits for any more.
    pub held: u64,
    /// Bytes of everything that is not released.
    pub bytes: ByteCount,
    /// Jobs that arrived in time.
    pub done_total: u64,
    /// Their bytes.
    pub done_bytes_total: ByteCount,
    /// Jobs that were answered with an error, late ones included.
    pub failed_total: u64,
    /// Jobs that were late.
    pub late_total: u64,
    /// Jobs over memory that is not registered.
    pub bounced_total: u64,
}

/// The engine of one device.
#[derive(Debug)]
pub struct Copies {
    pinned: Arc<Pinned>,
    limits: CopyLimits,
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    state: Mutex<State>,
    /// For the two threads that call the driver.
    direct: Condvar,
    bounce: Condvar,
    /// For the thread that watches.
    alarm: Condvar,
    /// Held while ends are told, so that they are told in order.
    telling: Mutex<()>,
    ends: Arc<dyn Ends>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, path: Path) -> &Condvar {
        match path {
            Path::Direct => &self.direct,
            Path::Bounce => &self.bounce,
        }
    }

    fn wake_all(&self) {
        self.direct.notify_all();
        self.bounce.notify_all();
        self.alarm.notify_all();
    }

    /// Tells what has ended, in order. Not under the lock.
    fn tell(&self) {
        tell(&self.telling, &*self.ends, || std::mem::take(&mut self.lock().told));
    }
}

impl Copies {
    /// Starts the threads of a device.
    ///
    /// # Errors
    /// [`DeviceError::Driver`] if no thread can be started.
    pub fn start(
        device: Arc<dyn Device>,
        pinned: Arc<Pinned>,
        limits: CopyLimits,
        ends: Arc<dyn Ends>,
    ) -> Result<Self, DeviceError> {
        let ordinal = device.info().ordinal;
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(limits)),
            direct: Condvar::new(),
            bounce: Condvar::new(),
            alarm: Condvar::new(),
            telling: Mutex::default(),
            ends,
        });
        // From here on, dropping it ends the threads that run already.
        let copies = Self { pinned, limits, shared: Arc::clone(&shared) };
        for path in [Path::Direct, Path::Bounce] {
            let (device, shared) = (Arc::clone(&device), Arc::clone(&shared));
            spawn(format!("{}-{ordinal}", path.label()), move || run::run(&*device, &shared, path))?;
        }
        spawn(format!("watch-{ordinal}"), move || watch::watch(&shared))?;
        Ok(copies)
    }

    /// Takes a job. Nothing waits.
    ///
    /// # Errors
    /// The job, with [`DeviceError::Throttled`], [`DeviceError::BadJob`] or [`DeviceError::Lost`].
    pub fn submit(&self, job: Job) -> Result<(), Refused> {
        let direction = match one_direction(&job) {
            Ok(direction) => direction,
            Err(error) => return Err(Refused { job, error }),
        };
        let bytes = job.pieces.iter().map(|piece| piece.bytes().get()).sum();
        if let Err(error) = self.shared.lock().admits(bytes) {
            return Err(Refused { job, error });
        }
        let cut = match self.pinned.cut(job.pieces.clone()) {
            Ok(cut) => cut,
            Err(error) => return Err(Refused { job, error }),
        };
        let path = if cut.bounces { Path::Bounce } else { Path::Direct };
        let waiting = Waiting { pieces: cut.pieces.into(), slices: cut.slices };
        let lane = Lane { direction, class: job.class };
        let now = Instant::now();
        let earlier = match self.shared.lock().enqueue(&job, lane, path, bytes, waiting, now) {
            Ok(earlier) => earlier,
            Err(error) => return Err(Refused { job, error }),
        };
        self.shared.work(path).notify_one();
        if earlier {
            self.shared.alarm.notify_one();
        }
        Ok(())
    }

    /// What is under way and what was done. Stale at once.
    pub fn counts(&self) -> CopyCounts {
        self.shared.lock().counts()
    }

    /// Why nothing is taken any more, if so.
    pub fn lost(&self) -> Option<DeviceError> {
        self.shared.lock().lost.clone()
    }

    /// The limits it was started with.
    pub fn limits(&self) -> CopyLimits {
        self.limits
    }

    /// What is registered with the device.
    pub fn pinned(&self) -> &Arc<Pinned> {
        &self.pinned
    }
}

impl Drop for Copies {
    /// Refuses what waits. What the device has is released when it ends, by the
    /// threads, which then end too.
    fn drop(&mut self) {
        self.shared.lock().close();
        self.shared.wake_all();
        self.shared.tell();
    }
}

pub(crate) fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<(), DeviceError> {
    std::thread::Builder::new()
        .name(name)
        .spawn(run)
        .map(drop)
        .map_err(|error| DeviceError::Driver { call: "thread", detail: error.to_string() })
}

fn one_direction(job: &Job) -> Result<crate::span::Direction, DeviceError> {
    let Some(first) = job.pieces.first() else {
        return Err(DeviceError::BadJob { detail: "no pieces" });
    };
    let one = job.pieces.iter().all(|piece| piece.direction() == first.direction());
    if one {
        Ok(first.direction())
    } else {
        Err(DeviceError::BadJob { detail: "two directions in one batch" })
    }
}

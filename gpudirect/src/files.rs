//! Files that a device reads and writes itself, by cuFile (GPUDirect Storage).
//!
//! Promises, to every job that was taken: exactly one answer within its time,
//! even while the library hangs, and exactly one release when the library has let
//! go of the chunk. A library that is missing, refuses or hangs is an error value;
//! the caller then reads into pinned memory and copies ([`crate::Copies`]). Leaves to
//! others: which blocks lie where, and when this way is worth taking
//! ([`crate::measure_files`]).
//!
//! cuFile's calls wait, so some threads of ours make them: one job each, a batch
//! each, or some jobs on a stream each ([`Submission`]). A thread whose call hangs is not replaced; when all
//! hang, everything is refused.

mod library;
mod log;
mod measure;
mod run;
mod stream;
mod table;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::copies::{Ends, JobId};
use crate::device::{Chunk, Device, DeviceKind};
use crate::error::DeviceError;
use crate::span::DeviceBytes;
use crate::told::tell;

pub use library::GdsInfo;
use library::{Handle, Library};
pub use log::log_to;
pub use measure::{FileChoice, FileRate, measure_files};
use table::Table;

/// Opening asks the kernel module and every device.
const OPEN_WITHIN: Duration = Duration::from_secs(20);
/// What one batch may hold: the library's own limit is 128.
const BATCH_JOBS_MAX: usize = 32;
/// What one stream is given at once. They run one after the other there, so that many would keep other streams idle.
const STREAM_JOBS_MAX: usize = 4;
const PAGE_BYTES: u64 = 4096;

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileOperation {
    /// File to device.
    Read,
    /// Device to file.
    Write,
}

/// How a job is given to the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Submission {
    /// One call a job, some threads at once.
    Calls,
    /// Several jobs of one direction by one submission.
    Batches,
    /// Some jobs at once in the order of a CUDA stream, one stream a thread. Whole pages only.
    /// Old libraries have no such calls ([`Gds::offers`]).
    Streams,
}

impl Submission {
    /// All of them, the plainest first.
    pub const ALL: [Self; 3] = [Self::Calls, Self::Batches, Self::Streams];

    /// For logs and tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::Calls => "calls",
            Self::Batches => "batches",
            Self::Streams => "streams",
        }
    }

    fn jobs_max(self) -> usize {
        match self {
            Self::Calls => 1,
            Self::Batches => BATCH_JOBS_MAX,
            Self::Streams => STREAM_JOBS_MAX,
        }
    }
}

/// Every limit of the engine.
#[derive(Clone, Copy, Debug)]
pub struct FileLimits {
    /// Threads that call the library.
    pub threads: usize,
    /// Jobs that are not released, in all.
    pub jobs_max: usize,
    /// A call that takes so long makes its thread count as hanging.
    pub silence_max: Duration,
}

/// A file that the library knows. Dropped after the last job on it: forgotten and closed.
#[derive(Debug)]
pub struct GdsFile {
    handle: Handle,
    // After the handle.
    _file: File,
}

/// One transfer between a file and a chunk.
#[derive(Debug)]
pub struct FileJob {
    /// Comes back in [`Ends`].
    pub id: JobId,
    /// Which way.
    pub operation: FileOperation,
    /// How it is given to the library.
    pub submission: Submission,
    /// Registered with the same engine.
    pub file: Arc<GdsFile>,
    /// First byte in the file, a multiple of 4 KiB as O_DIRECT wants it.
    pub offset: u64,
    /// All of it is read or written; less is an error.
    pub bytes: DeviceBytes,
    /// When waiting ends, counted from now.
    pub within: Duration,
}

/// A job that was not taken.
#[derive(Debug)]
pub struct FileRefused {
    /// As it was.
    pub job: FileJob,
    /// Why. For all but [`DeviceError::BadJob`], the other way is open.
    pub error: DeviceError,
}

/// The library over one device, and its threads.
#[derive(Debug)]
pub struct Gds {
    library: Arc<Library>,
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    table: Mutex<Table>,
    work: Condvar,
    alarm: Condvar,
    telling: Mutex<()>,
    ends: Arc<dyn Ends>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("table", &self.table).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what has ended, in order. Not under the lock.
    fn tell(&self) {
        tell(&self.telling, &*self.ends, || std::mem::take(&mut self.lock().told));
    }
}

impl Gds {
    /// Loads the library and starts the threads. The library writes its log where
    /// CUFILE_LOGFILE_PATH says, which must be set ([`log_to`]): without, it would
    /// write into the working directory.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`] without the library, [`DeviceError::Unsupported`] on the
    /// stand-in or without a place for the log, [`DeviceError::Hung`], or what the library says.
    pub fn open(
        device: &Arc<dyn Device>,
        limits: FileLimits,
        ends: Arc<dyn Ends>,
    ) -> Result<Self, DeviceError> {
        if device.info().kind != DeviceKind::Cuda {
            return Err(DeviceError::Unsupported { what: "cuFile without a CUDA device".to_owned() });
        }
        let opened = Arc::clone(device);
        let library = crate::cuda::within("opening cuFile", OPEN_WITHIN, move || {
            opened.bind_thread()?;
            Library::open()
        })??;
        let library = Arc::new(library);
        let shared = Arc::new(Shared {
            table: Mutex::new(Table::new(limits)),
            work: Condvar::new(),
            alarm: Condvar::new(),
            telling: Mutex::default(),
            ends,
        });
        let gds = Self { library: Arc::clone(&library), shared: Arc::clone(&shared) };
        for number in 0..limits.threads.max(1) {
            let (device, library, shared) = (Arc::clone(device), Arc::clone(&library), Arc::clone(&shared));
            crate::copies::spawn(format!("cufile-{number}"), move || {
                run::run(&*device, &library, &shared, number);
            })?;
        }
        crate::copies::spawn("cufile-watch".to_owned(), move || run::watch(&shared))?;
        Ok(gds)
    }

    /// What the library says of itself.
    pub fn info(&self) -> &GdsInfo {
        self.library.info()
    }

    /// Whether the library can be given jobs so.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for streams, by a library before 1.7.
    pub fn offers(&self, submission: Submission) -> Result<(), DeviceError> {
        match submission {
            Submission::Calls | Submission::Batches => Ok(()),
            Submission::Streams => self.library.streams().map(drop),
        }
    }

    /// Lets the library know a file, opened with O_DIRECT.
    ///
    /// # Errors
    /// What the library says, for example that it does not know the file system.
    pub fn file(&self, file: File) -> Result<Arc<GdsFile>, DeviceError> {
        let handle = self.library.register(file.as_raw_fd())?;
        Ok(Arc::new(GdsFile { handle, _file: file }))
    }

    /// The same for the path of a file or a raw device, for reading.
    ///
    /// # Errors
    /// What the system or the library says.
    pub fn open_to_read(&self, path: &Path) -> Result<Arc<GdsFile>, DeviceError> {
        let opened = open_direct(path, false);
        self.file(opened.map_err(|error| DeviceError::Driver { call: "open", detail: error.to_string() })?)
    }

    /// Lets the library prepare a chunk, so that transfers need no buffers of its
    /// own. Optional; ends when the answer is dropped.
    ///
    /// # Errors
    /// What the library says. Jobs on the chunk work all the same.
    pub fn prepare(&self, chunk: &Arc<Chunk>) -> Result<Prepared, DeviceError> {
        self.library.prepare(chunk.address(), chunk.bytes().get())?;
        Ok(Prepared { library: Arc::clone(&self.library), chunk: Arc::clone(chunk) })
    }

    /// Takes a job. Nothing waits.
    ///
    /// # Errors
    /// The job, with [`DeviceError::Throttled`], [`DeviceError::BadJob`] or [`DeviceError::Hung`]; with
    /// [`DeviceError::Unsupported`] what [`Self::offers`] says.
    pub fn submit(&self, job: FileJob) -> Result<(), FileRefused> {
        if let Err(error) = well_formed(&job).and_then(|()| self.offers(job.submission)) {
            return Err(FileRefused { job, error });
        }
        let refused = self.shared.lock().enqueue(job, Instant::now());
        if let Err(refused) = refused {
            return Err(*refused);
        }
        self.shared.work.notify_one();
        self.shared.alarm.notify_one();
        Ok(())
    }

    /// Jobs that are not released yet.
    pub fn under_way(&self) -> usize {
        self.shared.lock().under_way()
    }
}

impl Drop for Gds {
    /// Refuses what waits. The threads end when what they do has ended.
    fn drop(&mut self) {
        self.shared.lock().close();
        self.shared.work.notify_all();
        self.shared.alarm.notify_all();
        self.shared.tell();
    }
}

/// A chunk that the library has prepared.
#[derive(Debug)]
pub struct Prepared {
    library: Arc<Library>,
    chunk: Arc<Chunk>,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.library.unprepare(self.chunk.address());
    }
}

fn well_formed(job: &FileJob) -> Result<(), DeviceError> {
    if i64::try_from(job.offset).is_err() || job.bytes.bytes().get() == 0 {
        return Err(DeviceError::BadJob { detail: "no bytes, or no such offset" });
    }
    let numbers = [job.offset, job.bytes.offset(), job.bytes.bytes().get()];
    let are_pages = numbers.iter().all(|number| number.is_multiple_of(PAGE_BYTES));
    if job.submission == Submission::Streams && !are_pages {
        return Err(DeviceError::BadJob { detail: "a stream takes whole pages" });
    }
    Ok(())
}

/// Whether the folder's files can be given to the library at all: O_DIRECT must work there.
pub(crate) fn open_direct(path: &Path, write: bool) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .read(true)
        .write(write)
        .create(write)
        .truncate(false)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}

//! Block devices of the Nvme tier: preallocated files or raw devices, O_DIRECT,
//! one queue each with classes of urgency.
//!
//! A request owns its buffer until its `done` is called: a chunk cannot be
//! unmapped under an I/O that the kernel still performs. Reads and writes that
//! the kernel cuts short are continued; a write or a sync that fails is
//! reported, and after a failed sync the device takes no more writes: what was
//! written before it may be lost, and the next sync would not say so.

mod file;
mod pages;
mod pread;
mod queue;
mod uring;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use terrace_core::{Fault, IoClass};

pub(crate) use file::{DeviceFile, lock_exclusively};
pub use pages::AlignedPages;
pub(crate) use pages::PagePool;

use crate::api::{Backend, MediaError};
use crate::memory::{ChunkMemory, PAGE_BYTES};
use queue::Shared;

/// Something that reads and writes pages. The real one is [`Device`]; fault
/// injectors stand in front of it.
pub trait BlockIo: Send + Sync {
    /// Starts a request. Never blocks; `done` is called from another thread.
    fn submit(&self, request: IoRequest);

    /// How it is doing.
    fn facts(&self) -> IoFacts;
}

/// One I/O.
pub struct IoRequest {
    /// What to do.
    pub op: IoOp,
    /// First byte on the device; a multiple of 4096.
    pub offset: u64,
    /// Length; a multiple of 4096, at most the buffer's. Zero for a sync.
    pub bytes: u64,
    /// Owned until `done`.
    pub buffer: IoBuffer,
    /// Its urgency.
    pub class: IoClass,
    /// Called once. Gets the buffer back.
    pub done: IoDone,
}

/// What becomes of a request.
pub type IoDone = Box<dyn FnOnce(IoBuffer, Result<(), Fault>) + Send>;

/// Kinds of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// Device to buffer.
    Read,
    /// Buffer to device.
    Write,
    /// Everything that was answered before is durable afterwards.
    Sync,
    /// Undo the registration of this memory ([`ChunkMemory::id`]), on which nothing is in flight.
    Forget(u64),
}

/// Memory of an I/O.
#[derive(Debug)]
pub enum IoBuffer {
    /// For syncs.
    Nothing,
    /// A frame of a chunk, from its header page on.
    Frame(Arc<ChunkMemory>, u32),
    /// Pages of our own.
    Pages(AlignedPages),
}

impl IoBuffer {
    /// Address and room, or `None` if the frame does not exist.
    fn range(&self) -> Option<(*mut u8, u64)> {
        match self {
            Self::Nothing => Some((std::ptr::null_mut(), 0)),
            Self::Frame(memory, index) => Some((memory.frame(*index).ok()?, memory.frame_bytes().get())),
            Self::Pages(pages) => Some((pages.pointer(), pages.bytes())),
        }
    }

    /// Gives the pages out, if it is pages.
    pub fn into_pages(self) -> Option<AlignedPages> {
        match self {
            Self::Pages(pages) => Some(pages),
            Self::Nothing | Self::Frame(..) => None,
        }
    }
}

/// Counters and state of a [`BlockIo`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoFacts {
    /// The backend that runs, and why.
    pub backend: String,
    /// No sync has failed.
    pub writable: bool,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Requests that wait or run.
    pub queued: u64,
}

/// An open device with its threads. Dropped: waits for what is queued.
pub struct Device {
    shared: Arc<Shared>,
    file: Arc<DeviceFile>,
    threads: Vec<JoinHandle<()>>,
    backend: String,
}

impl Device {
    /// Opens or makes a device of `bytes` and starts its threads.
    ///
    /// # Errors
    /// If it cannot be opened, locked or preallocated, or if io_uring is demanded and not to be had.
    pub fn open(
        path: &Path,
        bytes: u64,
        backend: Backend,
        bytes_in_flight_max: u64,
    ) -> Result<Self, MediaError> {
        let file = Arc::new(DeviceFile::open(path, bytes)?);
        Self::start(file, backend, bytes_in_flight_max)
    }

    pub(crate) fn start(
        file: Arc<DeviceFile>,
        backend: Backend,
        bytes_in_flight_max: u64,
    ) -> Result<Self, MediaError> {
        let shared = Arc::new(Shared::new(bytes_in_flight_max.max(PAGE_BYTES)).map_err(|source| {
            MediaError::File { path: file.path().to_owned(), action: "make a wake-up descriptor", source }
        })?);
        let failed = |action, source| MediaError::File { path: file.path().to_owned(), action, source };
        let (threads, backend) = match backend {
            Backend::Pread => (pread::start(&shared, &file), "pread (configured)".to_owned()),
            Backend::IoUring => match uring::start(&shared, &file) {
                Ok(thread) => (Ok(vec![thread]), "io_uring (configured)".to_owned()),
                Err(error) => return Err(failed("use io_uring on it", error)),
            },
            Backend::Auto => match uring::start(&shared, &file) {
                Ok(thread) => (Ok(vec![thread]), "io_uring".to_owned()),
                Err(error) => {
                    (pread::start(&shared, &file), format!("pread (io_uring is not to be had: {error})"))
                }
            },
        };
        let threads = threads.map_err(|source| failed("start a thread for it", source))?;
        Ok(Self { shared, file, threads, backend })
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.file.path().to_owned()
    }
}

impl BlockIo for Device {
    fn submit(&self, request: IoRequest) {
        self.shared.push(request);
    }

    fn facts(&self) -> IoFacts {
        let counters = &self.shared.counters;
        let mut backend = self.backend.clone();
        if !self.file.is_direct() {
            backend.push_str("; the file system refuses O_DIRECT: through the page cache");
        }
        if let Some(note) = self.shared.note() {
            backend.push_str("; ");
            backend.push_str(&note);
        }
        IoFacts {
            backend,
            writable: !self.shared.sync_failed.load(Ordering::Acquire),
            read_bytes: counters.read_bytes.load(Ordering::Relaxed),
            write_bytes: counters.write_bytes.load(Ordering::Relaxed),
            errors: counters.errors.load(Ordering::Relaxed),
            queued: counters.queued.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.shared.close();
        for thread in self.threads.drain(..) {
            if thread.thread().id() == std::thread::current().id() {
                continue;
            }
            if thread.join().is_err() {
                tracing::error!(path = %self.file.path().display(), "a device thread panicked");
            }
        }
    }
}

/// What a failed system call means to the core.
fn fault_of(error: &std::io::Error) -> Fault {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Fault::NoSpace,
        _ => Fault::Device,
    }
}

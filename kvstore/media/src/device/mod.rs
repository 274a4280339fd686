//! Block devices of the Nvme tier: preallocated files or raw devices, O_DIRECT,
//! one scheduler each with classes of urgency.
//!
//! A request owns its buffer until its `done` is called: a chunk cannot be
//! unmapped under an I/O that the kernel still performs. Reads and writes that
//! the kernel cuts short are continued; a write or a sync that fails is
//! reported, and after a failed sync the device takes no more writes: what was
//! written before it may be lost, and the next sync would not say so.

mod classes;
mod file;
mod health;
mod later;
mod pages;
mod pread;
mod queue;
mod schedule;
mod self_test;
mod uring;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use terrace_core::{Fault, IoClass};

pub(crate) use file::{DeviceFile, lock_exclusively};
pub use pages::AlignedPages;
pub(crate) use pages::PagePool;
pub use schedule::DeviceChanged;
pub(crate) use schedule::{Alarm, Patience, Scheduler};
pub use self_test::SelfTestLine;
pub(crate) use self_test::{Measured, Rig, SCRATCH_BYTES};

use crate::api::{Backend, MediaError};
use crate::memory::ChunkMemory;
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
    /// So many frames of a chunk from one on, which lie behind each other.
    Frames(Arc<ChunkMemory>, u32, u32),
    /// Pages of our own.
    Pages(AlignedPages),
}

impl IoBuffer {
    /// Address and room, or `None` if the frame does not exist.
    pub(crate) fn range(&self) -> Option<(*mut u8, u64)> {
        match self {
            Self::Nothing => Some((std::ptr::null_mut(), 0)),
            Self::Frame(memory, index) => Some((memory.frame(*index).ok()?, memory.frame_bytes().get())),
            Self::Frames(memory, first, count) => {
                memory.frame(first.checked_add(count.checked_sub(1)?)?).ok()?;
                Some((memory.frame(*first).ok()?, memory.frame_bytes().get() * u64::from(*count)))
            }
            Self::Pages(pages) => Some((pages.pointer(), pages.bytes())),
        }
    }

    /// Whether `next` is the frame that lies behind this one.
    fn is_followed_by(&self, next: &Self) -> bool {
        match (self, next) {
            (Self::Frame(memory, index), Self::Frame(other, behind)) => {
                Arc::ptr_eq(memory, other) && index.checked_add(1) == Some(*behind)
            }
            _ => false,
        }
    }

    /// Gives the pages out, if it is pages.
    pub fn into_pages(self) -> Option<AlignedPages> {
        match self {
            Self::Pages(pages) => Some(pages),
            Self::Nothing | Self::Frame(..) | Self::Frames(..) => None,
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
    pub fn open(path: &Path, bytes: u64, backend: Backend) -> Result<Self, MediaError> {
        let file = Arc::new(DeviceFile::open(path, bytes)?);
        Self::start(file, backend)
    }

    pub(crate) fn start(file: Arc<DeviceFile>, backend: Backend) -> Result<Self, MediaError> {
        let shared = Arc::new(Shared::new().map_err(|source| MediaError::File {
            path: file.path().to_owned(),
            action: "make a wake-up descriptor",
            source,
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::memory::PAGE_BYTES;

    fn device(path: &str, backend: Backend) -> Device {
        let file = Arc::new(DeviceFile::unchecked(Path::new(path)).unwrap());
        Device::start(file, backend).unwrap()
    }

    fn run(device: &Device, op: IoOp, class: IoClass) -> mpsc::Receiver<Result<(), Fault>> {
        let (sender, receiver) = mpsc::channel();
        let (bytes, buffer) = match op {
            IoOp::Read | IoOp::Write => (PAGE_BYTES, IoBuffer::Pages(AlignedPages::new(PAGE_BYTES))),
            IoOp::Sync | IoOp::Forget(_) => (0, IoBuffer::Nothing),
        };
        let done = Box::new(move |_: IoBuffer, outcome| sender.send(outcome).unwrap());
        device.submit(IoRequest { op, offset: 0, bytes, buffer, class, done });
        receiver
    }

    fn outcome(device: &Device, op: IoOp) -> Result<(), Fault> {
        run(device, op, IoClass::DecodeFetch).recv_timeout(Duration::from_secs(30)).unwrap()
    }

    /// A full device must say so, and one whose sync failed must take no more
    /// writes and never sync well again. /dev/full is both: every write is
    /// ENOSPC, fdatasync is EINVAL, and reads are zeros.
    #[test]
    fn a_full_device_and_a_failed_sync() {
        for backend in [Backend::IoUring, Backend::Pread] {
            let device = device("/dev/full", backend);
            assert_eq!(outcome(&device, IoOp::Read), Ok(()));
            assert_eq!(outcome(&device, IoOp::Write), Err(Fault::NoSpace), "{backend:?}");
            assert!(device.facts().writable);
            assert_eq!(outcome(&device, IoOp::Sync), Err(Fault::Device));
            assert!(!device.facts().writable);
            assert_eq!(outcome(&device, IoOp::Write), Err(Fault::Device));
            assert_eq!(outcome(&device, IoOp::Sync), Err(Fault::Device));
            assert_eq!(outcome(&device, IoOp::Read), Ok(()), "reads go on");
            assert!(device.facts().errors >= 4);
            assert_eq!(device.facts().queued, 0);
        }
    }

    /// A device thread that spins would cost a core for nothing: after some I/O
    /// it is left alone, and the CPU time of its threads must stand still.
    #[test]
    fn idle_devices_use_no_cpu() {
        for backend in [Backend::IoUring, Backend::Pread] {
            let device = device("/dev/zero", backend);
            assert_eq!(outcome(&device, IoOp::Read), Ok(()));
            let name = match backend {
                Backend::Pread => "media-pread",
                Backend::Auto | Backend::IoUring => "media-uring",
            };
            let before = cpu_ticks(name);
            std::thread::sleep(Duration::from_millis(300));
            // 30 ticks would be a spin. Other tests use devices beside us for a tick or two.
            assert!(cpu_ticks(name) - before < 15, "{name} uses the CPU while idle");
        }
    }

    /// User and system ticks (10 ms) of all threads with this name.
    fn cpu_ticks(name: &str) -> u64 {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let stats = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
        let of_name = stats.filter(|stat| stat.contains(&format!("({name})")));
        let ticks = of_name.map(|stat| {
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
        });
        ticks.sum()
    }

    /// Closing must answer what is queued: a request that is never answered stalls the core.
    #[test]
    fn closing_answers_what_is_queued() {
        for backend in [Backend::IoUring, Backend::Pread] {
            let device = device("/dev/zero", backend);
            let classes = [IoClass::Scrub, IoClass::Persistence, IoClass::Prefetch, IoClass::Demotion];
            let answers: Vec<_> =
                (0..400).map(|number| run(&device, IoOp::Read, classes[number % 4])).collect();
            drop(device);
            assert!(answers.iter().all(|answer| answer.try_recv() == Ok(Ok(()))), "{backend:?}");
        }
    }
}

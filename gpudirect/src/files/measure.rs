//! What the two ways from a file to the device can do here, by block size: cuFile,
//! and reading into pinned memory and copying. Measured once, at start, on a file
//! of its own; every wait has a deadline, so a start is never held up by it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, IoClass, MIB};

use super::{FileJob, FileLimits, FileOperation, Gds, Submission, open_direct};
use crate::copies::{Copies, CopyLimits, Ends, Job, JobId};
use crate::device::{Chunk, Device};
use crate::error::DeviceError;
use crate::host_bytes::HostBytes;
use crate::pinned::Pinned;
use crate::span::{DeviceBytes, Piece, Span};

/// Read once by each way and size: 0.05 s on a drive of 2.5 GB/s.
const FILE_BYTES: u64 = 128 * MIB;
/// Readers of the bounce, and callers of the library.
const THREADS: usize = 8;
const PAGE_BYTES: u64 = 4096;

/// The two ways at one block size.
#[derive(Clone, Debug, PartialEq)]
pub struct FileRate {
    /// Block size.
    pub block: ByteCount,
    /// By cuFile, in bytes a second; or why not.
    pub direct: Result<f64, DeviceError>,
    /// By pinned memory, in bytes a second; or why not.
    pub bounce: Result<f64, DeviceError>,
    /// Into pinned memory and no further: what the drive allows.
    pub read: Result<f64, DeviceError>,
}

impl FileRate {
    /// Whether cuFile is the better way.
    pub fn is_direct(&self) -> bool {
        match (&self.direct, &self.bounce) {
            (Ok(direct), Ok(bounce)) => direct > bounce,
            (Ok(_), Err(_)) => true,
            (Err(_), _) => false,
        }
    }
}

/// Which way to take, by block size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileChoice {
    /// By block size.
    pub rates: Vec<FileRate>,
}

impl FileChoice {
    /// Whether a block goes by cuFile: what the largest measured size that is not
    /// larger says, or the smallest.
    pub fn is_direct(&self, block: ByteCount) -> bool {
        let fits = self.rates.iter().filter(|rate| rate.block <= block).max_by_key(|rate| rate.block);
        fits.or_else(|| self.rates.iter().min_by_key(|rate| rate.block)).is_some_and(FileRate::is_direct)
    }
}

/// Jobs that have ended, for whoever waits.
#[derive(Debug, Default)]
struct Tally {
    ends: Mutex<(usize, Option<DeviceError>)>,
    changed: Condvar,
}

impl Tally {
    fn lock(&self) -> MutexGuard<'_, (usize, Option<DeviceError>)> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so many jobs were released, and answers the first error.
    fn wait(&self, jobs: usize, until: Instant) -> Result<(), DeviceError> {
        let mut ends = self.lock();
        while ends.0 < jobs {
            let now = Instant::now();
            if now >= until {
                return Err(ends.1.take().unwrap_or(DeviceError::Late(Duration::ZERO)));
            }
            ends = self.changed.wait_timeout(ends, until - now).unwrap_or_else(PoisonError::into_inner).0;
        }
        let (_, error) = std::mem::take(&mut *ends);
        error.map_or(Ok(()), Err)
    }
}

impl Ends for Tally {
    fn answered(&self, _id: JobId, result: Result<(), DeviceError>) {
        if let Err(error) = result {
            self.lock().1.get_or_insert(error);
        }
    }

    fn released(&self, _id: JobId) {
        self.lock().0 += 1;
        self.changed.notify_all();
    }
}

/// A file that goes when it is dropped.
struct Scratch {
    file: File,
    bytes: Vec<u8>,
}

impl Scratch {
    /// A file of bytes that name their place, on the device itself.
    fn make(folder: &Path) -> io::Result<Self> {
        let path = folder.join(format!(".terrace-files-{}", std::process::id()));
        let file = open_direct(&path, true)?;
        // It lives as long as it is open.
        std::fs::remove_file(&path)?;
        let memory = HostBytes::anonymous(ByteCount::new(MIB))?;
        let mut bytes = vec![0_u8; usize::try_from(MIB).map_err(io::Error::other)?];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from((at * 31 + at / 4096) % 251).unwrap_or(0);
        }
        memory.copy_from(&bytes);
        for offset in (0..FILE_BYTES).step_by(bytes.len()) {
            // SAFETY: nobody else has this memory, and no store happens while the slice lives.
            let page_aligned = unsafe { std::slice::from_raw_parts(memory.as_ptr(), memory.len()) };
            file.write_all_at(page_aligned, offset)?;
        }
        file.sync_all()?;
        Ok(Self { file, bytes })
    }
}

fn io_error(call: &'static str, error: &io::Error) -> DeviceError {
    DeviceError::Driver { call, detail: error.to_string() }
}

struct Course {
    device: Arc<dyn Device>,
    scratch: Scratch,
    chunk: Arc<Chunk>,
    memory: HostBytes,
    until: Instant,
}

/// Measures both ways on a file in `folder`, for blocks of these sizes (multiples
/// of 4 KiB, at most 64 MiB). Takes about as long as `time` at worst. What
/// fails or is late is the other way's gain.
///
/// # Errors
/// [`DeviceError`] when neither way can be tried: no room for a file of 128 MiB, no
/// O_DIRECT there, or no memory.
pub fn measure_files(
    device: &Arc<dyn Device>,
    folder: &Path,
    blocks: &[ByteCount],
    submission: Submission,
    time: Duration,
) -> Result<FileChoice, DeviceError> {
    let until = Instant::now() + time;
    let scratch = Scratch::make(folder).map_err(|error| io_error("making a file to measure", &error))?;
    let chunk = device.create(ByteCount::new(64 * MIB))?;
    let memory =
        HostBytes::anonymous(chunk.bytes()).map_err(|error| io_error("memory to measure", &error))?;
    let course = Course { device: Arc::clone(device), scratch, chunk, memory, until };
    let pinned = Arc::new(Pinned::new(Arc::clone(device), crate::pinned::SLICE_BYTES));
    pinned.add(&course.memory);
    let tally = Arc::new(Tally::default());
    let files = Arc::new(Tally::default());
    let copies = Copies::start(
        Arc::clone(device),
        Arc::clone(&pinned),
        CopyLimits::ONE_LINK,
        Arc::clone(&tally) as Arc<dyn Ends>,
    )?;
    let limits = FileLimits { threads: THREADS, jobs_max: 1 << 16, silence_max: Duration::from_secs(5) };
    let gds = Gds::open(device, submission, limits, Arc::clone(&files) as Arc<dyn Ends>);
    let mut choice = FileChoice::default();
    for block in blocks.iter().copied().filter(|block| fits(*block, course.chunk.bytes())) {
        let direct =
            gds.as_ref().map_err(DeviceError::clone).and_then(|gds| course.direct(gds, &files, block));
        let bounce = course.bounce(Some((&copies, &*tally)), block);
        let read = course.bounce(None, block);
        choice.rates.push(FileRate { block, direct, bounce, read });
    }
    Ok(choice)
}

fn fits(block: ByteCount, chunk: ByteCount) -> bool {
    block.get() > 0 && block.get().is_multiple_of(PAGE_BYTES) && block <= chunk
}

impl Course {
    /// Blocks of the file, each with its slot of the chunk.
    fn blocks(&self, block: ByteCount) -> Vec<(u64, u64)> {
        let slots = self.chunk.bytes().get() / block.get();
        (0..FILE_BYTES / block.get())
            .map(|index| (index * block.get(), index % slots * block.get()))
            .collect()
    }

    fn direct(&self, gds: &Gds, tally: &Tally, block: ByteCount) -> Result<f64, DeviceError> {
        let file = self.scratch.file.try_clone().map_err(|error| io_error("dup", &error))?;
        let file = gds.file(file)?;
        // Without it, the library copies once more; that is then what it can do here.
        let _prepared = gds.prepare(&self.chunk);
        let blocks = self.blocks(block);
        let began = Instant::now();
        for (index, (offset, slot)) in blocks.iter().enumerate() {
            let job = FileJob {
                id: JobId(index as u64),
                operation: FileOperation::Read,
                file: Arc::clone(&file),
                offset: *offset,
                bytes: DeviceBytes::new(Arc::clone(&self.chunk), *slot, block)?,
                within: self.until.saturating_duration_since(began),
            };
            gds.submit(job).map_err(|refused| refused.error)?;
        }
        tally.wait(blocks.len(), self.until)?;
        let seconds = began.elapsed().as_secs_f64();
        let last = blocks.last().copied().unwrap_or_default();
        self.verify(last, block)?;
        Ok(rate(blocks.len(), block, seconds))
    }

    /// Whether a block arrived as it lies in the file: a way that is quick and wrong is none.
    fn verify(&self, (offset, slot): (u64, u64), block: ByteCount) -> Result<(), DeviceError> {
        let target = self.memory.part(0, block)?;
        let source = DeviceBytes::new(Arc::clone(&self.chunk), slot, block)?;
        let pieces: Arc<[Piece]> = vec![Piece::new(Span::Device(source), Span::Host(target.clone()))?].into();
        let lane =
            crate::device::Lane { direction: crate::span::Direction::DeviceToHost, class: IoClass::Prefetch };
        let mut mark = self.device.start(lane, pieces)?;
        while !mark.ended()? {
            if Instant::now() > self.until {
                return Err(DeviceError::Late(Duration::ZERO));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let mut bytes = vec![0; target.len()];
        target.copy_to(&mut bytes);
        let start = usize::try_from(offset % MIB).unwrap_or(0);
        let expected = self.scratch.bytes.iter().cycle().skip(start).take(bytes.len());
        if bytes.iter().eq(expected) {
            Ok(())
        } else {
            Err(DeviceError::Driver { call: "a read by cuFile", detail: "other bytes arrived".to_owned() })
        }
    }

    /// Reads, and copies if there is an engine for it.
    fn bounce(&self, engine: Option<(&Copies, &Tally)>, block: ByteCount) -> Result<f64, DeviceError> {
        let copies = engine.map(|(copies, _)| copies);
        let blocks = self.blocks(block);
        let next = AtomicUsize::new(0);
        let slots = usize::try_from(self.chunk.bytes().get() / block.get()).unwrap_or(1);
        let readers = THREADS.min(slots);
        let began = Instant::now();
        std::thread::scope(|scope| {
            let reads: Vec<_> = (0..readers)
                .map(|_| scope.spawn(|| self.read_and_copy(copies, &blocks, &next, block)))
                .collect();
            let results = reads.into_iter().map(|read| {
                read.join()
                    .unwrap_or(Err(DeviceError::Driver { call: "thread", detail: "it panicked".to_owned() }))
            });
            results.collect::<Result<Vec<_>, _>>()
        })?;
        if let Some((_, tally)) = engine {
            tally.wait(blocks.len(), self.until)?;
        }
        Ok(rate(blocks.len(), block, began.elapsed().as_secs_f64()))
    }

    /// Slots are used anew every 64 MiB, long after the copy of the last block in them has begun: the bytes that
    /// arrive are not looked at.
    fn read_and_copy(
        &self,
        copies: Option<&Copies>,
        blocks: &[(u64, u64)],
        next: &AtomicUsize,
        block: ByteCount,
    ) -> Result<(), DeviceError> {
        while let Some((offset, slot)) = blocks.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
            if Instant::now() > self.until {
                return Err(DeviceError::Late(Duration::ZERO));
            }
            let memory = self.memory.part(slot, block)?;
            read_at(&self.scratch.file, &memory, offset).map_err(|error| io_error("pread", &error))?;
            let Some(copies) = copies else { continue };
            let target = DeviceBytes::new(Arc::clone(&self.chunk), slot, block)?;
            let mut job = Job {
                id: JobId(offset),
                class: IoClass::PrefillFetch,
                pieces: vec![Piece::new(Span::Host(memory), Span::Device(target))?],
                within: self.until.saturating_duration_since(Instant::now()),
            };
            while let Err(refused) = copies.submit(job) {
                if !matches!(refused.error, DeviceError::Throttled { .. }) || Instant::now() > self.until {
                    return Err(refused.error);
                }
                job = refused.job;
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        Ok(())
    }
}

fn rate(blocks: usize, block: ByteCount, seconds: f64) -> f64 {
    let bytes = u32::try_from(block.get()).map_or(f64::MAX, f64::from);
    bytes * u32::try_from(blocks).map_or(f64::MAX, f64::from) / seconds.max(1e-9)
}

/// Reads into memory that a device may be reading: through its pointer, never a reference.
fn read_at(file: &File, memory: &HostBytes, offset: u64) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: the memory is mapped writable for its length while `memory` lives.
    let read = unsafe { libc::pread(file.as_raw_fd(), memory.as_ptr().cast(), memory.len(), offset) };
    match usize::try_from(read) {
        Ok(read) if read == memory.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

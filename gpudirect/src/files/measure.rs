//! What the ways from a file to the device can do here, by block size: cuFile in
//! each manner of giving it jobs, and reading into pinned memory and copying. Measured once, at start, on a file
//! of its own; every wait has a deadline, so a start is never held up by it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, IoClass, MIB};

use super::{FileJob, FileLimits, FileOperation, Gds, PAGE_BYTES, Submission, open_direct};
use crate::copies::{Copies, CopyLimits, Ends, Job, JobId};
use crate::device::{Chunk, Device};
use crate::error::DeviceError;
use crate::host_bytes::HostBytes;
use crate::pinned::Pinned;
use crate::span::{DeviceBytes, Piece, Span};
use crate::waited::{copy_in, copy_out};

/// Read once by each way and size: 0.05 s on a drive of 2.5 GB/s.
const FILE_BYTES: u64 = 128 * MIB;
/// Readers of the bounce, and callers of the library.
const THREADS: usize = 8;

/// The ways at one block size.
#[derive(Clone, Debug, PartialEq)]
pub struct FileRate {
    /// Block size.
    pub block: ByteCount,
    /// By cuFile, in bytes a second, or why not; as [`Submission::ALL`] has them.
    pub direct: Vec<(Submission, Result<f64, DeviceError>)>,
    /// By pinned memory, in bytes a second; or why not.
    pub bounce: Result<f64, DeviceError>,
    /// Into pinned memory and no further: what the drive allows.
    pub read: Result<f64, DeviceError>,
}

impl FileRate {
    /// What cuFile does when it is given jobs so.
    pub fn by(&self, submission: Submission) -> Option<f64> {
        let found = self.direct.iter().find(|(of, _)| *of == submission);
        found.and_then(|(_, rate)| rate.as_ref().ok()).copied()
    }

    /// The quickest manner of cuFile. Of equal ones the plainest.
    pub fn best(&self) -> Option<(Submission, f64)> {
        let rates = self.direct.iter().filter_map(|(of, rate)| Some((*of, *rate.as_ref().ok()?)));
        rates.reduce(|best, next| if next.1 > best.1 { next } else { best })
    }

    /// How cuFile is given jobs, if it is the better way.
    pub fn choice(&self) -> Option<Submission> {
        let bounce = self.bounce.as_ref().map_or(0.0, |rate| *rate);
        self.best().filter(|(_, rate)| *rate > bounce).map(|(submission, _)| submission)
    }
}

/// Which way to take, by block size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileChoice {
    /// By block size.
    pub rates: Vec<FileRate>,
}

impl FileChoice {
    /// How a block goes by cuFile, or that it does not: what the largest measured size
    /// that is not larger says, or the smallest.
    pub fn submission(&self, block: ByteCount) -> Option<Submission> {
        let fits = self.rates.iter().filter(|rate| rate.block <= block).max_by_key(|rate| rate.block);
        fits.or_else(|| self.rates.iter().min_by_key(|rate| rate.block)).and_then(FileRate::choice)
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
                return Err(DeviceError::Late(Duration::ZERO));
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
}

/// One manner of giving jobs to cuFile, with threads of its own: one that hangs takes none from the others.
struct Manner {
    submission: Submission,
    tally: Arc<Tally>,
    gds: Result<Gds, DeviceError>,
}

impl Manner {
    fn open(device: &Arc<dyn Device>, submission: Submission) -> Self {
        let tally = Arc::new(Tally::default());
        let limits = FileLimits { threads: THREADS, jobs_max: 1 << 16, silence_max: Duration::from_secs(5) };
        let gds = Gds::open(device, limits, Arc::clone(&tally) as Arc<dyn Ends>);
        let gds = gds.and_then(|gds| gds.offers(submission).map(|()| gds));
        Self { submission, tally, gds }
    }

    /// At most half of the time that is left goes to it. One that was late once is late for good: what it still does
    /// would be counted among what comes later.
    fn measure(&mut self, course: &Course, block: ByteCount, until: Instant) -> Result<f64, DeviceError> {
        let now = Instant::now();
        let until = now + until.saturating_duration_since(now) / 2;
        let gds = self.gds.as_ref().map_err(DeviceError::clone)?;
        let rate = course.direct(gds, (&self.tally, self.submission), block, until);
        if let Err(
            error @ (DeviceError::Late(_) | DeviceError::Hung { .. } | DeviceError::Throttled { .. }),
        ) = &rate
        {
            self.gds = Err(error.clone());
        }
        rate
    }
}

/// Measures all ways on a file in `folder`, for blocks of these sizes (multiples
/// of 4 KiB, at most 64 MiB). Takes about as long as `time` at worst. What
/// fails or is late is the other way's gain.
///
/// # Errors
/// [`DeviceError`] when none can be tried: no room for a file of 128 MiB, no
/// O_DIRECT there, or no memory.
pub fn measure_files(
    device: &Arc<dyn Device>,
    folder: &Path,
    blocks: &[ByteCount],
    time: Duration,
) -> Result<FileChoice, DeviceError> {
    let until = Instant::now() + time;
    let scratch = Scratch::make(folder).map_err(|error| io_error("making a file to measure", &error))?;
    let chunk = device.create(ByteCount::new(64 * MIB))?;
    let memory =
        HostBytes::anonymous(chunk.bytes()).map_err(|error| io_error("memory to measure", &error))?;
    let course = Course { device: Arc::clone(device), scratch, chunk, memory };
    let pinned = Arc::new(Pinned::new(Arc::clone(device), crate::pinned::SLICE_BYTES));
    pinned.add(&course.memory);
    let tally = Arc::new(Tally::default());
    let copies = Copies::start(
        Arc::clone(device),
        Arc::clone(&pinned),
        CopyLimits::ONE_LINK,
        Arc::clone(&tally) as Arc<dyn Ends>,
    )?;
    let mut manners = Submission::ALL.map(|submission| Manner::open(device, submission));
    let mut choice = FileChoice::default();
    for block in blocks.iter().copied().filter(|block| fits(*block, course.chunk.bytes())) {
        let read = course.bounce(None, block, until);
        let bounce = course.bounce(Some((&copies, &*tally)), block, until);
        let direct = manners.iter_mut();
        let direct = direct.map(|manner| (manner.submission, manner.measure(&course, block, until)));
        choice.rates.push(FileRate { block, direct: direct.collect(), bounce, read });
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

    fn direct(
        &self,
        gds: &Gds,
        (tally, submission): (&Tally, Submission),
        block: ByteCount,
        until: Instant,
    ) -> Result<f64, DeviceError> {
        let file = self.scratch.file.try_clone().map_err(|error| io_error("dup", &error))?;
        let file = gds.file(file)?;
        // Without it, the library copies once more; that is then what it can do here.
        let _prepared = gds.prepare(&self.chunk);
        let blocks = self.blocks(block);
        let last = blocks.last().copied().unwrap_or_default();
        self.blank(last.1, block, until)?;
        let began = Instant::now();
        for (index, (offset, slot)) in blocks.iter().enumerate() {
            let job = FileJob {
                id: JobId(index as u64),
                operation: FileOperation::Read,
                submission,
                file: Arc::clone(&file),
                offset: *offset,
                bytes: DeviceBytes::new(Arc::clone(&self.chunk), *slot, block)?,
                within: until.saturating_duration_since(began),
            };
            gds.submit(job).map_err(|refused| refused.error)?;
        }
        tally.wait(blocks.len(), until)?;
        let seconds = began.elapsed().as_secs_f64();
        self.verify(last, block, until)?;
        Ok(rate(blocks.len(), block, seconds))
    }

    /// Takes away what another way left in a slot: a way that moves nothing must not look right.
    fn blank(&self, slot: u64, block: ByteCount, until: Instant) -> Result<(), DeviceError> {
        let target = DeviceBytes::new(Arc::clone(&self.chunk), slot, block)?;
        let zeros = vec![0; usize::try_from(block.get()).unwrap_or(0)];
        copy_in(&*self.device, &zeros, &target, until.saturating_duration_since(Instant::now()))
    }

    /// Whether a block arrived as it lies in the file: a way that is quick and wrong is none.
    fn verify(
        &self,
        (offset, slot): (u64, u64),
        block: ByteCount,
        until: Instant,
    ) -> Result<(), DeviceError> {
        let source = DeviceBytes::new(Arc::clone(&self.chunk), slot, block)?;
        let mut bytes = vec![0; usize::try_from(block.get()).unwrap_or(0)];
        copy_out(&*self.device, &source, &mut bytes, until.saturating_duration_since(Instant::now()))?;
        let start = usize::try_from(offset % MIB).unwrap_or(0);
        let expected = self.scratch.bytes.iter().cycle().skip(start).take(bytes.len());
        if bytes.iter().eq(expected) {
            Ok(())
        } else {
            Err(DeviceError::Driver { call: "a read by cuFile", detail: "other bytes arrived".to_owned() })
        }
    }

    /// Reads, and copies if there is an engine for it.
    fn bounce(
        &self,
        engine: Option<(&Copies, &Tally)>,
        block: ByteCount,
        until: Instant,
    ) -> Result<f64, DeviceError> {
        let copies = engine.map(|(copies, _)| copies);
        let blocks = self.blocks(block);
        let next = AtomicUsize::new(0);
        let slots = usize::try_from(self.chunk.bytes().get() / block.get()).unwrap_or(1);
        let readers = THREADS.min(slots);
        let began = Instant::now();
        std::thread::scope(|scope| {
            let reads: Vec<_> = (0..readers)
                .map(|_| scope.spawn(|| self.read_and_copy(copies, (&blocks, &next), block, until)))
                .collect();
            let results = reads.into_iter().map(|read| {
                read.join()
                    .unwrap_or(Err(DeviceError::Driver { call: "thread", detail: "it panicked".to_owned() }))
            });
            results.collect::<Result<Vec<_>, _>>()
        })?;
        if let Some((_, tally)) = engine {
            tally.wait(blocks.len(), until)?;
        }
        Ok(rate(blocks.len(), block, began.elapsed().as_secs_f64()))
    }

    /// Slots are used anew every 64 MiB, long after the copy of the last block in them has begun: the bytes that
    /// arrive are not looked at.
    fn read_and_copy(
        &self,
        copies: Option<&Copies>,
        (blocks, next): (&[(u64, u64)], &AtomicUsize),
        block: ByteCount,
        until: Instant,
    ) -> Result<(), DeviceError> {
        while let Some((offset, slot)) = blocks.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
            if Instant::now() > until {
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
                within: until.saturating_duration_since(Instant::now()),
            };
            while let Err(refused) = copies.submit(job) {
                if !matches!(refused.error, DeviceError::Throttled { .. }) || Instant::now() > until {
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
